"""No module but `inputs` asks what kind of input it handles, and another package can add a kind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Result

from sdlora_edge.device import Device

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
HOME = ("inputs/", "train/image_modality.py", "train/text_modality.py", "train/images.py", "train/texts.py",
        "train/upload.py", "method/text.py")  # fmt: skip
"""Modules of one kind."""
ASKS = re.compile(
    r"isinstance\([^)]*(Preprocessing|Tokenization)"
    r"|(==|!=|\bin|\bis) *(IMAGE\b|[\"'](image|text)[\"'])|[\"'](image|text)[\"'] *(==|!=)"
)


def test_no_other_module_asks_which_kind_it_is() -> None:
    modules = [*(ROOT / "sdlora_edge").rglob("*.py"), *(ROOT / "export").glob("*.py")]
    names = {
        path: path.relative_to(ROOT).as_posix().removeprefix("sdlora_edge/") for path in modules
    }
    asking = {
        f"{name}: {found[0]}"
        for path, name in names.items()
        if not name.startswith(HOME)
        for found in ASKS.finditer(path.read_text())
    }
    assert asking == set()


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's package, installed, and a dataset of it."""
    site = tmp_path / "site"
    (site / "windows-1.dist-info").mkdir(parents=True)
    for path in (ROOT / "examples" / "modality").glob("*.py"):
        (site / path.name).write_bytes(path.read_bytes())
    (site / "windows-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: windows\nVersion: 1\n"
    )
    (site / "windows-1.dist-info" / "entry_points.txt").write_text(
        "[sdlora_edge.modalities]\nwindow = windows:Windows\n"
    )
    monkeypatch.syspath_prepend(str(site))
    random, steps = np.random.RandomState(0), np.arange(64) / 64
    labels = np.repeat(["idle", "slow", "fast", "loose"], 24)
    tones = {"idle": 0, "slow": 2, "fast": 9, "loose": 5}
    data = [
        np.stack([np.sin(2 * np.pi * tones[label] * steps + p) for p in random.rand(3) * 6], 1)
        for label in labels
    ]
    noisy = (np.array(data) + 0.1 * random.randn(len(data), 64, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", windows=noisy, labels=labels)
    np.save(tmp_path / "one.npy", noisy[0])
    yield tmp_path
    for name in ("windows", "windows_host"):
        sys.modules.pop(name, None)


def test_a_kind_of_another_package_goes_all_the_way(windows: Path, cli: Cli) -> None:
    """The commands of docs/guides/modality.md."""

    def run(*words: object) -> str:
        found = cli(*words)
        assert found.code == 0, found.err
        return found.out

    options = ["--tasks", 2, "--epochs", 4, "--targets", "fc1,fc2", "--rank", 4, "--device", "cpu"]
    data = ["--backbone", "window:64x3", "--data", windows / "data.npz"]
    run("train", *data, *options, "--out", windows / "run")
    run("keys", "new", "owner", "--out", windows / "keys")
    keys = ["--trust", windows / "keys" / "owner.pub"]
    run("export", "--run", windows / "run", "--task", 1, *keys, "--out", windows / "bundle")
    of_run = ["--run", windows / "run", "--bundle", windows / "bundle"]
    key = ["--key", windows / "keys" / "owner.key"]
    run("packet", "build", *of_run, *key, "--out", windows / "packets")
    run("device", "init", "--bundle", windows / "bundle", "--store", windows / "store")
    run("device", "apply", *(windows / "packets").glob("*.sdlora"), "--store", windows / "store")
    shown = run("device", "predict", windows / "one.npy", "--store", windows / "store")
    assert shown.startswith(f"{windows / 'one.npy'}: ")
    device = Device.open(windows / "store")
    with np.load(windows / "data.npz") as found:
        answers = device.predict(list(found["windows"]))
        right = [a.label == label for a, label in zip(answers, found["labels"], strict=True)]
    assert np.mean(right) > 0.6


def test_the_example_is_short() -> None:
    lines = (ROOT / "examples" / "modality" / "windows.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"'))]
    assert len(code) <= 60
