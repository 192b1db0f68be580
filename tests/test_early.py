"""Arguments are checked before torch is imported: what makes no sense is refused in a moment, not after a model was loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Fleet, make_images

from sdlora_edge.formats import signing

PROGRAM = """
import contextlib, io, json, os, sys
for name in ("torch", "timm", "onnx", "executorch"):
    sys.modules[name] = None  # whoever imports it is told that it is not installed
from sdlora_edge.cli import main
done = []
for arguments in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    done.append([code, err.getvalue()])
print(json.dumps(done))
"""


def without_torch(folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, err) for code, err in json.loads(done.stdout)]


@pytest.fixture
def place(fleet: Fleet, tmp_path: Path) -> Path:
    """A working directory: two keys, a run, an unfinished run, bundles, images."""
    for name in ("one", "two"):
        signing.new_key(name, tmp_path / "keys")
    shutil.copytree(fleet.run, tmp_path / "run")
    unfinished = shutil.copytree(fleet.run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "tasks" / "003")
    other = shutil.copytree(fleet.run, tmp_path / "other")
    config = (other / "config.toml").read_text()
    digest = config[config.index("backbone_sha256") :].split('"')[1]
    (other / "config.toml").write_text(config.replace(digest, "0" * 64))
    shutil.copytree(fleet.bundle, tmp_path / "flashed")
    shutil.copy(fleet.key, tmp_path / "factory.key")
    shutil.copy(fleet.key.with_suffix(".pub"), tmp_path / "factory.pub")
    for packet in fleet.packets:
        shutil.copy(packet, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "there.sdlora").touch()
    make_images(tmp_path / "single", ["x"], 3)
    make_images(tmp_path / "two", ["x", "y"], 3)
    return tmp_path


def test_every_command_refuses_before_it_loads_anything_slow(place: Path) -> None:
    packets = sorted(p.name for p in place.glob("0*.sdlora"))
    cases: dict[str, tuple[int, str]] = {
        "train --data single": (2, "only one class"),
        "train --data nowhere": (3, "nowhere: no such folder"),
        "train --data two --tasks 1 --out full": (2, "full exists already"),
        "train --data two --tasks 1 --backbone vit --weights none.safetensors": (3, "none.safetensors"),
        "train --data two --tasks 1 --backbone micro_vit": (2, "base_classes"),
        "train --data two --tasks 9": (2, "fewer --tasks"),
        "train --seed -1": (2, "seed is -1"),
        "train --preset imagenet": (2, "did you mean"),
        "train --run full": (3, "full is not a run"),
        "train --run run --epochs 3": (2, "--epochs: a run keeps"),
        "train --run run --data nowhere": (3, "nowhere"),
        "train --name x": (2, "--name: give --run RUN too"),
        "train --retire 1 --rename 2=two": (2, "--rename, --retire: give --run RUN too"),
        "train --run run --name x": (2, "give --data too"),
        "train --run run --strict": (2, "give --data too"),
        "train --run run --retire x": (2, "no live class 'x'"),
        "train --run run --retire 1 --rename 1=one": (2, "both retired and renamed"),
        "train --run run --rename 1": (2, "write OLD=NEW"),
        "train --run run --rename 1=2": (2, "two classes would be called '2'"),
        "train --run run --rename 1=a/\x1b": (2, "choose another"),
        "train --run run --retire 1 --data nowhere": (3, "nowhere"),
        "train --run unfinished --retire 1": (2, "resume it first"),
        "train --run run --data single": (2, "only one class"),
        "train --run run --data two --name ../x": (2, "give another --name"),
        "train --run unfinished --data two": (2, "resume it first"),
        "eval --run full --data two": (3, "full is not a run"),
        "eval --run run --data two": (2, "does not know the classes x, y"),
        "eval --run run --data nowhere": (3, "nowhere"),
        "eval --run run --data two --task 9": (2, "has the tasks 0 to 3, not 9"),
        "report --run full": (3, "full is not a run"),
        "report --run run --out full": (2, "name a file"),
        "export --run run": (2, "several keys"),
        "export --run full --trust factory.pub": (3, "full is not a run"),
        "export --run run --trust factory.pub --out full": (2, "full exists already"),
        "export --run run --trust factory.pub --threshold 2": (2, "--threshold 2"),
        "export --run run --trust factory.pub --target tflite": (2, "choose onnx"),
        "export --run run --trust factory.pub --precision fp8": (2, "choose fp32"),
        "export --run run --trust factory.pub --encoding fp8": (2, "choose fp32"),
        "export --run run --trust factory.pub --weights-as magic": (2, "choose inputs"),
        "export --run run --trust factory.pub --task 9": (2, "not 9"),
        "export --run run --trust factory.pub --max-classes 3": (2, "knows 10 classes already"),
        "export --run run --trust factory.pub --also magic": (2, "onnx-adapter"),
        "export --run run --trust nobody --out new": (3, "no key 'nobody'"),
        "bundle check --run other --bundle flashed": (5, "was not exported from other"),
        "bundle check --run run --bundle flashed --tolerance 2": (2, "--tolerance 2"),
        "packet build --run run --bundle flashed": (2, "several keys"),
        "packet build --run full --bundle flashed --key factory.key": (3, "full is not a run"),
        "packet build --run run --bundle full --key factory.key": (3, "full"),
        "packet build --run other --bundle flashed --key factory.key": (5, "was not exported from other"),
        "packet build --run run --bundle flashed --key one": (4, "does not trust key"),
        "packet build --run run --bundle flashed --key factory.key --task 7": (2, "--task 7"),
        "packet build --run run --bundle flashed --key factory.key --encoding int8": (5, "takes packets in fp16"),
        "packet build --run run --bundle flashed --key factory.key --revision 1": (2, "--revision goes with --task"),
        "packet build --run run --bundle flashed --key factory.key --data nowhere": (3, "nowhere"),
        "packet build --run run --bundle flashed --key factory.key --after nothing": (3, "nothing"),
        f"packet squash {packets[0]} --key factory.key --out new.sdlora": (2, "two or more"),
        f"packet squash {packets[0]} {packets[1]} --key factory.key --out there.sdlora": (2, "exists already"),
        "packet trust --bundle full --key factory.key --out there.sdlora": (2, "exists already"),
        "packet revoke --bundle flashed --task 1 --key factory.key --out there.sdlora": (2, "exists already"),
        "packet to-peft --bundle flashed --out full": (2, "full exists already"),
        "packet from-peft adapter --run run --data two": (3, "adapter_config.json"),
        "packet from-peft adapter --run full --data two": (3, "full is not a run"),
        "expect two/x --run full": (3, "full is not a run"),
        "expect two/x --run run --out full": (2, "full exists already"),
        "expect two --run run": (3, "not a folder with"),
        "device selftest --bundle flashed --packets . --expected nowhere": (3, "nowhere"),
        "device selftest --bundle flashed --packets . --report full": (2, "name a file"),
        "device selftest --bundle flashed --packets full": (3, "no packet"),
        "demo --out full": (2, "not made by a demo"),
    }  # fmt: skip
    done = zip(
        cases.items(), without_torch(place, [command.split() for command in cases]), strict=True
    )
    wrong = [
        f"{command}: {found} {err}"
        for (command, (code, words)), (found, err) in done
        if found != code or words not in err
    ]
    assert not wrong, "\n".join(wrong)
