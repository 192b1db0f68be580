"""The examples run, the Dockerfiles' pip commands work, and the sdist is complete."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Fleet, make_images

from sdlora_edge import Settings
from sdlora_edge.train.config import resolve
from sdlora_edge.train.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DOCKERFILES = (ROOT / "Dockerfile", EXAMPLES / "device.Dockerfile")
IGNORED = (".git", ".venv", ".matrix", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def test_the_whole_loop_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images", ["apple", "bolt", "cup", "disc"], 10)
    more = make_images(tmp_path / "more", ["egg", "fork"], 10, seed=1)
    small = {"backbone": "micro_vit", "base_classes": 2, "image_size": 16, "epochs": 1}
    settings = Settings.of(data=str(images), tasks=1, **small)
    program = runpy.run_path(str(EXAMPLES / "loop.py"))
    device = program["main"](settings, str(more), str(more / "fork" / "00.png"), tmp_path)
    assert len(device.current()[0].classes) == 6
    assert "with the packet" in capsys.readouterr().out
    assert len((EXAMPLES / "loop.py").read_text().splitlines()) <= 50


def test_the_preset_files_say_what_the_presets_say() -> None:
    files = {path.stem: path for path in (EXAMPLES / "presets").glob("*.toml")}
    assert files.keys() == PRESETS.keys()
    written = runpy.run_path(str(EXAMPLES / "make_presets.py"))["toml"]
    for name, path in files.items():
        assert path.read_text() == written(name), "run: python examples/make_presets.py"
        assert resolve(path, {}) == resolve(None, {}, preset(name))


def test_a_plot_of_a_run(fleet: Fleet, tmp_path: Path) -> None:
    program = [sys.executable, EXAMPLES / "plot.py", fleet.run, tmp_path / "plot.svg"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "4 points" in done.stdout
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()  # noqa: S314
    assert len(drawn.findall("{*}circle")) == 4


def instructions(path: Path) -> list[tuple[str, str]]:
    """[(instruction, its arguments)] of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_a_dockerfile_ends_as_a_user_without_rights(path: Path) -> None:
    found = instructions(path)
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"}
    known |= {"RUN", "USER", "VOLUME", "WORKDIR"}
    assert {name for name, _ in found} <= known
    assert all("-slim" in words for name, words in found if name == "FROM")
    names = [name for name, _ in found]
    assert "RUN" not in names[names.index("USER") :]
    assert dict(found)["USER"] == "10001"
    assert dict(found)["ENTRYPOINT"] == '["sdlora-edge"]'
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"**/*.key", "keys", "runs", ".git"} <= set(ignored)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked: so that builds share no folder, and what it lacks is missed."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*IGNORED))
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", folder, folder / "copy"]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_sdist_holds_what_the_repository_holds(source: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = [name for name in listed.stdout.splitlines() if not (source / name).exists()]
    assert missing == []


@pytest.mark.long
def test_the_device_image_installs_without_torch(source: Path, tmp_path: Path) -> None:
    """The pip commands of device.Dockerfile, in a fresh environment; so are those of the README."""
    runs = [words for name, words in instructions(EXAMPLES / "device.Dockerfile") if name == "RUN"]
    build, install = (re.sub(r"--mount=\S+ +", "", w) for w in runs if "pip " in w)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    places = {"/src[agent]": f"{source}[agent]", "/wheels": str(tmp_path / "wheels")}
    for command in (build, install):
        words = [places.get(word, word) for word in shlex.split(command)]
        assert words[0] == "pip"
        subprocess.run([python, "-m", *words, "--quiet"], check=True)
    cmd = json.loads(dict(instructions(EXAMPLES / "device.Dockerfile"))["CMD"])
    begun = [python.with_name("sdlora-edge"), *cmd]
    shown = subprocess.run(begun, capture_output=True, text=True, check=False)
    assert "lets everybody on the network look: give --token-file" in shown.stderr
    begun[begun.index("--store") + 1] = str(tmp_path)
    token = os.environ | {"SDLORA_EDGE_AGENT_TOKEN": "0123456789abcdef"}
    shown = subprocess.run(begun, capture_output=True, text=True, check=False, env=token)
    assert f"{tmp_path} is not a store" in shown.stderr
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, check=True)
    assert b"torch" not in listed.stdout
