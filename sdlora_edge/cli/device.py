"""`sdlora-edge device`: what runs on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..device.runtime import Device
from .output import Json, Store, emit, facts

Unproved = Annotated[
    bool,
    typer.Option("--unproved", help="ExecuTorch without its Python runtime: the program that loads the pair tries the canary."),
]
app = typer.Typer(no_args_is_help=True, help="Run a device: init, apply, predict, status, rollback.")
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
    """Verify packets and apply them, in the order given. Stops at the first that is refused."""
    device = Device.open(store, unproved=unproved)
    done: list[dict[str, Any]] = []
    for path in packets:
        done.append(device.apply(path, allow_older))
        if not json:
            last = done[-1]
            typer.echo(
                f"{path}: {_KINDS[last['kind']]}task {last['task']} in force, {len(last['classes'])} classes, "
                f"{last['apply_ms']} ms, canary {last['canary_difference']:.1e}"
            )
    if json:
        emit({"applied": done}, json, str)


@app.command()
def predict(
    images: list[Path],
    store: Store,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    json: Json = False,
) -> None:
    """Name the classes of pictures."""
    found = Device.open(store).predict(images, top)
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
def rollback(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Go back by one packet, even from one whose file is damaged."""
    _show(Device.open(store, without_newest=True, unproved=unproved).rollback(), json)


@app.command("export-adapter")
def export_adapter(
    store: Store,
    out: Annotated[Path, typer.Option(help="The .onnx_adapter file; one that is there is replaced.")],
    json: Json = False,
) -> None:
    """Write the weights in force for ONNX Runtime programs in other languages, which run the bundle's model.onnx with them."""
    from ..device.adapter import export_adapter as write

    value = write(Device.open(store), out)
    emit(value, json, lambda: facts(value, *value))


def _show(value: dict[str, Any], json: bool) -> None:
    emit(value, json, lambda: facts(value, *_STATUS))
