"""The public API: every name resolves and is documented, and README's whole loop can be written with it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_images

import sdlora_edge

LOOP = """
import logging
from pathlib import Path

import sdlora_edge as sdlora

logging.basicConfig(level=logging.ERROR)

# on the workstation: train, make a key, export
settings = sdlora.Settings.of(tasks=1, base_epochs=2, epochs=1, device="cpu")
run = sdlora.train(settings, "runs/digits")
private, public = sdlora.new_key("factory", "keys")
sdlora.export_bundle(run, "bundle", trust=[public], options=sdlora.ExportOptions(threshold=1))

# on the device: begin with the bundle
device = sdlora.Device.init(Path("bundle"), Path("store"))
before = device.status()
assert before.task == 1
assert set(before.classes) == set(run.states[-1].classes)

# a week later: learn new classes, and build their packet
run = sdlora.add_task("runs/digits", Path("new_images"), name="tools")
options = sdlora.PacketOptions(images=Path("new_images"))
(built,) = sdlora.build_packets(run.path, "bundle", [str(private)], "packets", options)
assert built.accuracy.before == 0
packet = built.file

# on the device: apply it, answer, go back
device.apply(packet)
after = device.status()
assert isinstance(after, sdlora.Status)
assert after.task == 2
assert {"gear", "hook"} <= set(after.classes)
answer = device.predict("new_images/gear/00.png")
assert isinstance(answer, sdlora.Prediction)
assert answer.label in after.classes
assert len(device.predict(["new_images/gear/00.png", "new_images/hook/00.png"])) == 2
device.rollback()
assert device.status().task == 1
try:
    device.apply("keys/factory.pub")
except sdlora.SdloraError as error:
    assert isinstance(error, sdlora.InputError), error
assert sdlora.evaluate(sdlora.Run.open("runs/digits"), Path("new_images")).total > 0

# new keys, named as texts or paths; then a class is retired
_, second = sdlora.new_key("second", "keys")
sdlora.rotate_keys("bundle", private, "1.sdlora", sdlora.KeyChange(add=[second]))
change = sdlora.KeyChange(remove=["second"])
sdlora.rotate_keys("bundle", private, "2.sdlora", change, after=["1.sdlora"])
changes = sdlora.ClassChanges(retired=("hook",), renamed={"gear": "wheel"})
run = sdlora.add_task("runs/digits", changes=changes)
assert run.states[-1].names[-1] == "wheel"
options = sdlora.PacketOptions(task=3, after=["1.sdlora"])
(built,) = sdlora.build_packets("runs/digits", "bundle", str(private), "packets", options)
assert (built.retired, built.renamed) == (("hook",), (("gear", "wheel"),))
assert sdlora.resume("runs/digits").path == Path("runs/digits")
assert sdlora.open_bundle("bundle").manifest.task == 1
print(sorted(device.status().to_dict())[0])
"""


def test_readmes_loop_is_a_program(tmp_path: Path) -> None:
    make_images(tmp_path / "new_images", ["gear", "hook"], 8, size=16)
    done = subprocess.run(
        [sys.executable, "-c", LOOP], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bundle"


@pytest.mark.parametrize("name", sdlora_edge.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(sdlora_edge, name)
    assert callable(found)
    assert found.__name__.rpartition(".")[2] == name  # train is a package that can be called
    assert inspect.getdoc(found), f"{name} has no docstring"


def test_the_names_are_declared_alike() -> None:
    """For Python in `_WHERE`, for type checkers as imports, for readers in `__all__`."""
    tree = ast.parse(Path(sdlora_edge.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {a.name for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported == set(sdlora_edge.__all__) == set(sdlora_edge._WHERE)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sdlora_edge.trian  # noqa: B018


def test_the_package_imports_nothing_heavy() -> None:
    program = "import sys, sdlora_edge; print(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "PIL", "onnxruntime"} & {*done.stdout.split()}
