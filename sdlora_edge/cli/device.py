"""`sdlora-edge device`: what runs on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import files
from ..canonical import sha256
from ..device import store as stores
from ..device.preprocessing import MAX_PIXELS, PILLOW_MAX_PIXELS
from ..device.runtime import IN_PLACE, Device
from ..device.verify import verify as verified
from ..errors import InputError, NothingToDo, naming
from ..packet import LIMITS
from .output import Json, Store, emit, facts

Unproved = Annotated[
    bool,
    typer.Option("--unproved", help="ExecuTorch without its Python runtime: the program that loads the pair tries the canary."),
]
app = typer.Typer(no_args_is_help=True, help="Run a device: init, apply, predict, status, verify, rollback.")
_KINDS = {"update": "", "trust": "new keys, ", "recall": "recalled, "}
_STATUS = (
    "task",
    "task_name",
    "generation",
    "revision",
    "trust_version",
    "classes",
    "packets",
    "state",
    "model",
    "target",
    "precision",
    "bundle",
)


@app.command()
def init(bundle: Path, store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Make a store from a bundle: what flashing a device does."""
    _show(Device.init(bundle, store, unproved).status(), json)


@app.command()
def apply(
    packets: list[Path],
    store: Store,
    allow_older: Annotated[bool, typer.Option("--allow-older", help="Take again what was rolled back.")] = False,
    unproved: Unproved = False,
    json: Json = False,
) -> None:
    """Verify packets and apply them, in the order given. Of several, those that the device holds are passed over; the first that is
    refused ends it."""
    device = Device.open(store, unproved=unproved, swap=IN_PLACE)
    done: list[dict[str, Any]] = []
    for path in packets:
        if len(packets) > 1 and _held(Path(store), path):
            continue
        try:
            with naming(path):
                done.append(device.apply(path, allow_older))
        except NothingToDo:  # such as a recall that has been obeyed
            if len(packets) == 1:
                raise
            continue
        if not json:
            last = done[-1]
            canary = "not run" if last["canary_difference"] is None else f"{last['canary_difference']:.1e}"
            typer.echo(
                f"{path}: {_KINDS[last['kind']]}task {last['task']} in force, {len(last['classes'])} classes, "
                f"{last['apply_ms']} ms, canary {canary}"
            )
    if not done:
        raise NothingToDo(f"all {len(packets)} packets are applied already")
    if json:
        emit({"applied": done}, json, str)


@app.command()
def predict(
    images: list[Path],
    store: Store,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    max_megapixels: Annotated[
        int, typer.Option(min=1, max=PILLOW_MAX_PIXELS // 10**6, help="Refuse an image with more pixels than this.")
    ] = MAX_PIXELS // 10**6,
    json: Json = False,
) -> None:
    """Name the classes of pictures."""
    found = Device.open(store).predict(images, top, max_pixels=max_megapixels * 10**6)
    value = [
        {"image": str(path), "generation": p.generation, "top": [{"class": name, "probability": score} for name, score in p.top]}
        for path, p in zip(images, found)
    ]
    lines = (f"{path}: " + ", ".join(f"{name} {100 * score:.1f} %" for name, score in p.top) for path, p in zip(images, found))
    emit({"predictions": value}, json, lambda: "\n".join(lines))


@app.command()
def status(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Show where a device stands."""
    _show(Device.open(store, unproved=unproved).status(), json)


@app.command()
def verify(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Compare every file of a store with what it should be. Exit code 3 where something is damaged."""
    found = verified(store, unproved)
    lines = [f"{d['file']}: {d['problem']}: {d['remedy']}" for d in found["damage"]]
    lines += [f"{name}: left over, removed by the next update" for name in found["leftovers"]]
    serves = found["serves"]
    lines.append(f"{found['files']} files, {found['bytes']:,} bytes: {len(found['damage'])} damaged")
    lines.append(f"serves generation {serves['generation']}, task {serves['task']}" if serves else "serves nothing")
    emit(found, json, lambda: "\n".join(lines))
    if not found["whole"]:
        raise typer.Exit(InputError.exit_code)


@app.command()
def rollback(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Go back by one packet, for good; where packets are damaged, to what is left."""
    _show(Device.open(store, unproved=unproved, swap=IN_PLACE).rollback(), json)


@app.command("export-adapter")
def export_adapter(
    store: Store,
    out: Annotated[Path, typer.Option(help="The .onnx_adapter file; one that is there is replaced.")],
    json: Json = False,
) -> None:
    """Write the weights in force as an adapter file, with which a C or C++ program runs the bundle's model.onnx."""
    from ..device.adapter import export_adapter as write

    value = write(Device.open(store), out)
    emit(value, json, lambda: facts(value, *value))


def _held(store: Path, packet: Path) -> bool:
    """Whether the device has it, to the bit, and undamaged."""
    opened = stores.Store(store)
    digest = sha256(files.receive(packet, LIMITS.packet)) if packet.is_file() else ""
    return digest in opened.current().digests and not opened.broken((digest,))


def _show(value: dict[str, Any], json: bool) -> None:
    shown = {**value, "recalled": [f"task {task} up to revision {revision}" for task, revision in value["recalled"]]}
    emit(value, json, lambda: facts(shown, *_STATUS, *(name for name in ("recalled", "damage") if shown[name])))
