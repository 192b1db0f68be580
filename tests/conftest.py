"""A small real run, its bundle and its packets, made once; every test gets its own copy of what it changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import build_packets

from sdlora_edge.cli import main
from sdlora_edge.device import Device
from sdlora_edge.formats import signing
from sdlora_edge.formats.bundle import MANIFEST, describe
from sdlora_edge.formats.canonical import dump_json, parse_json
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run

T = TypeVar("T")
SMALL = {"base_epochs": 3, "epochs": 2, "lr": 0.05, "head": "paper"}


@dataclass(frozen=True)
class Fleet:
    """A run of three tasks on digits, the bundle of its base session, its packets, and the key they are signed with."""

    run: Path
    bundle: Path
    packets: list[Path]
    key: Path
    trust: signing.Trust


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return make_fleet(tmp_path_factory.mktemp("fleet"), SMALL)


def make_fleet(folder: Path, settings: dict[str, object]) -> Fleet:
    run = train(resolve(None, settings), folder / "runs" / "small")
    key, public = signing.new_key("factory", folder / "keys")
    export_bundle(Run.open(run.path), folder / "bundle", 0, [str(public)])
    packets = [
        p.file for p in build_packets(run.path, folder / "bundle", key, out=folder / "packets")
    ]
    return Fleet(
        run.path, folder / "bundle", packets, key, signing.Trust((signing.load_public(public),), 1)
    )


def retargeted(fleet: Fleet, out: Path, target: str) -> Path:
    """The fleet's bundle, its manifest naming another target."""
    shutil.copytree(fleet.bundle, out)
    manifest = parse_json((out / MANIFEST).read_bytes(), MANIFEST)
    (out / MANIFEST).write_bytes(dump_json({**manifest, "target": target}))
    return out


def with_file(bundle: Path, folder: Path, name: str, data: bytes) -> Path:
    """A copy of a bundle in which one file has other bytes, as its manifest says."""
    shutil.copytree(bundle, folder)
    (folder / name).write_bytes(data)
    manifest = parse_json((folder / MANIFEST).read_bytes(), MANIFEST)
    manifest["files"][name] = describe(folder / name)
    (folder / MANIFEST).write_bytes(dump_json(manifest))
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    import safetensors.torch
    import timm
    import torch

    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path
    )
    return str(path)


@pytest.fixture
def store(fleet: Fleet, tmp_path: Path) -> Path:
    """A fresh store of the fleet's bundle."""
    from sdlora_edge.device import Device

    Device.init(fleet.bundle, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def run_copy(fleet: Fleet, tmp_path: Path) -> Path:
    shutil.copytree(fleet.run, tmp_path / "run")
    return tmp_path / "run"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command as the console script does."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def make_images(
    folder: Path, classes: list[str], count: int, size: int = 20, seed: int = 0
) -> Path:
    """Class folders of images, each class with its own colour and stripes."""
    random = np.random.default_rng(seed)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 60, (size, size, 3))
            pixels[:, :: index + 2] += np.array([180, 40 * index % 180, 90])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{i:02d}.png"
            )
    return folder


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises. One that hangs is a failure, and does not hang the tests."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, call()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"it still hangs after {seconds} s"
    returned, value = outcome
    if not returned:
        raise value
    result: T = value
    return result


@contextlib.contextmanager
def signals_as_by_default() -> Iterator[None]:
    """In this process, and in those that it starts: nohup, a shell's background jobs and some CI runners ignore signals, and what
    is ignored stays so in every child."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def interruptible() -> Iterator[None]:
    with signals_as_by_default():
        yield


def shared(name: str) -> Path:
    """A file of the real data; the test is skipped where it is not there."""
    path = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data")) / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: real images and weights lie beside the project")
    return path


def images(count: int = 6) -> list[np.ndarray]:
    """Of the fleet's size, uint8."""
    return list(np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3)).astype(np.uint8))


def square(size: int) -> Preprocessing:
    """How images of this size are read."""
    return Preprocessing(size, size, "bilinear", (0.5,) * 3, (0.5,) * 3)


def pictures(images: np.ndarray) -> dict[str, np.ndarray]:
    """float32 (N, 3, size, size), as a model reads it."""
    return {"pictures": images}


def inputs(device: Device) -> dict[str, np.ndarray]:
    """The same images, as the model reads them."""
    prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
    return prepare.arrays(np.stack([prepare.pixels(p) for p in images()]))
