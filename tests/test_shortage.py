"""Memory and disk space that run out are known for what they are, whoever says so, and are no verdict on any file."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, Result, inputs, make_images, snapshot

from sdlora_edge import shortage
from sdlora_edge.device import Device, gate
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.device.engines.onnx_runtime import OnnxEngine
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import InputError, ResourceError, StorageError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.storage import atomic

Cli = Callable[..., Result]


class Foreign(Exception):
    """As ONNX Runtime's, of no other kind."""


def made_of(cause: Exception) -> Exception:
    """As libraries wrap what they do not know."""
    error = Foreign("unknown failure")
    error.__cause__ = cause
    return error


SHORT = (
    MemoryError(),
    made_of(MemoryError()),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("out of memory error when reading image file"),
    Foreign(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 99"
    ),
    Foreign("[ONNXRuntimeError] : 1 : FAIL : Load model from model.onnx failed:bad allocation"),
    Foreign("Exception caught: std::bad_alloc"),
    RuntimeError("Failed to load method forward, error: 0x:21"),
    RuntimeError("method->execute() failed with error 0x21"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("can't start new thread"),
    ImportError("libonnxruntime.so: failed to map segment from shared object"),
)
OTHERS = (
    made_of(ValueError("bad_alloc")),
    InputError("the class 'bad_alloc' stands twice"),
    ValueError("name 'out of memory' holds a control character"),
    KeyError("bad allocation"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError("cannot identify image file 'out of memory.png'"),
    Foreign("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF"),
    RuntimeError("method->execute() failed with error 0x210"),
    ImportError("cannot import name 'x'"),
)


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_what_ran_out(error: Exception) -> None:
    blamed = InputError("the model is damaged")
    assert isinstance(shortage.verdict(error, blamed), ResourceError)
    with (
        pytest.raises(ResourceError, match=r"ran out while it was tried.*try again"),
        shortage.noticed("while it was tried"),
    ):
        raise error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_words_from_a_file_are_no_shortage(error: Exception) -> None:
    blamed = InputError("the model is damaged")
    assert shortage.verdict(error, blamed) is blamed
    with pytest.raises(type(error)), shortage.noticed("while it was tried"):
        raise error


def test_a_full_disk_is_no_damage_and_a_read_only_one_no_shortage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, kind in (
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EROFS, StorageError),
    ):

        def fails(*_: object, code: int = code, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails)
            with pytest.raises(kind):
                atomic.write(tmp_path / "file", b"x")


def short_of_memory(*_: object) -> None:
    raise Foreign("Failed to allocate memory for requested buffer of size 99")


@pytest.mark.parametrize("swap", [DOUBLE_BUFFER, IN_PLACE])
def test_an_update_without_memory_is_tried_again(
    fleet: Fleet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    device = Device.open(store, threads=1, swap=swap)
    before = device.logits(inputs(device))
    for method in ("load", "outputs"):
        run = getattr(OnnxEngine, method)
        with monkeypatch.context() as patch:
            patch.setattr(
                OnnxEngine,
                method,
                lambda *a, run=run, short=iter([1]): (
                    short_of_memory() if next(short, 0) else run(*a)
                ),
            )
            with pytest.raises(ResourceError, match=r"about \d+ MB"):
                device.apply(fleet.packets[0])
        np.testing.assert_array_equal(device.logits(inputs(device)), before)
        assert Device.open(store, threads=1).status().damage == ()
    folder, events = tmp_path / "folder", []
    folder.mkdir()
    shutil.copy(fleet.packets[0], folder)
    watcher = Watcher(
        folder, store, emit=lambda event, fields: events.append(fields.get("exit_code")), threads=1
    )
    with monkeypatch.context() as patch:
        patch.setattr(OnnxEngine, "load", short_of_memory)
        watcher.look(settled=False)
    assert events == [8]
    assert watcher.look(settled=False).device.task == 1


def test_without_memory_nothing_is_called_damaged(
    cli: Cli, fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Device.open(store, threads=1).apply(fleet.packets[0])
    monkeypatch.setattr(OnnxEngine, "load", short_of_memory)
    with pytest.raises(ResourceError):
        Device.open(store)
    found = Device.verify(store)
    assert (found.intact, found.damage, found.serves, found.untried.exit_code) == (
        True,
        (),
        None,
        8,
    )
    for command in ("status", "verify"):
        result = cli("device", command, "--store", store)
        assert result.code == 8
        assert "flash" not in result.out + result.err
    assert (
        cli("device", "init", "--bundle", fleet.bundle, "--store", store.with_name("new")).code == 8
    )
    assert not store.with_name("new").exists()


@pytest.mark.parametrize("megabytes", [90, 130, 170, 200, 230, 245, 260, 300, 400])
def test_a_device_without_memory_says_so(store: Path, tmp_path: Path, megabytes: int) -> None:
    """However little address space there is: it serves, or ends with 8; it is never killed, and calls nothing damaged."""
    (image,) = make_images(tmp_path / "images", ["a"], 1).rglob("*.png")
    program = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)
from sdlora_edge.__main__ import main
sys.argv = ["sdlora-edge", "device", "predict", {str(image)!r}, "--store", {str(store)!r}, "--json"]
sys.exit(main())
"""
    before = snapshot(store)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 8), (done.returncode, done.stderr)
    if done.returncode:
        found = json.loads(done.stdout)
        assert (found.get("error") or found["predictions"][0]["error"])["exit_code"] == 8
        assert "memory ran out" in done.stderr
    assert snapshot(store) == before


def test_an_image_without_memory_leaves_the_others_their_answers(
    cli: Cli, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images", ["a"], 3)
    (tmp_path / "images" / "a" / "bad.png").write_bytes(b"no image")
    prepared, turns = Preprocessing.prepared, itertools.count()

    def short(*rest: Any) -> Any:
        if next(turns) % 3 == 1:
            raise MemoryError
        return prepared(*rest)

    monkeypatch.setattr(Preprocessing, "prepared", short)
    result = cli("device", "predict", tmp_path / "images", "--store", store, "--json")
    codes = [
        entry.get("error", {}).get("exit_code") for entry in json.loads(result.out)["predictions"]
    ]
    assert (result.code, codes) == (8, [None, 8, None, 3])
    with pytest.raises(ResourceError, match="memory ran out"):
        Device.open(store).predict(sorted((tmp_path / "images" / "a").glob("0*.png")))


def test_openblas_does_not_end_the_process() -> None:
    """It would, at its first product, if it got no memory; what it got is kept for the next ones."""
    program = """
import resource
from sdlora_edge.device import gate
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
for more in (16 << 20, gate.BLAS_BUFFER + (16 << 20)):
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        with gate.one_blas_thread():
            print("had")
    except MemoryError:
        print("none")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["none", "had"]), done.stderr
    assert gate.BLAS_BUFFER > 32 << 20
