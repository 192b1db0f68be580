"""`sdlora-edge device`: what runs on a device."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..device.answers import BATCH, Prediction
from ..device.device import IN_PLACE, Device
from ..device.verify import verify as verified
from ..errors import InputError, LimitError, NothingToDo, ResourceError, naming
from ..inputs.image import MAX_FILE, MAX_PIXELS, PILLOW_MAX_PIXELS, SUFFIXES, ImageLike, reading
from .output import Json, Store, completing, emit, facts, output, say

Unproved = Annotated[
    bool,
    typer.Option(
        "--unproved",
        help="ExecuTorch without its Python runtime: the program that loads the pair tries the canary.",
    ),
]
app = typer.Typer(
    no_args_is_help=True, help="Run a device: init, apply, predict, status, verify, rollback."
)
_KINDS = {"update": "", "trust": "new keys, ", "revocation": "revoked, "}
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
def init(
    bundle: Path,
    store: Annotated[Path, typer.Option(callback=output, help="The device's directory, made anew.")],
    unproved: Unproved = False,
    group: Annotated[Optional[str], typer.Option(help="Group whose members may read the store, and predict. Default: nobody else.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Make a store from a bundle: what flashing a device does."""
    _show(Device.init(bundle, store, unproved, group).status(), json)


@app.command()
def apply(
    packets: list[Path],
    store: Store,
    allow_older: Annotated[
        bool, typer.Option("--allow-older", help="Take again what was rolled back.")
    ] = False,
    unproved: Unproved = False,
    json: Json = False,
) -> None:
    """Verify packets and apply them, in the order given. If you pass several, those already applied are skipped, and the first that
    is refused ends the command."""
    device = Device.open(store, unproved=unproved, swap=IN_PLACE)
    done: list[dict[str, Any]] = []
    skipped: list[str] = []
    result = {"applied": done, "skipped": skipped}
    with completing(result):
        for path in packets:
            try:
                with naming(path):
                    done.append(device.apply(path, allow_older))
                line = _applied(path, done[-1])
            except NothingToDo as error:
                if len(packets) == 1:
                    raise
                skipped.append(str(path))
                line = str(error)
            if not json:
                say(line)
    if json:
        emit(result, json, list)


def _applied(path: Path, status: dict[str, Any]) -> str:
    canary = (
        "not run" if status["canary_difference"] is None else f"{status['canary_difference']:.1e}"
    )
    stands = (
        f"{_KINDS[status['kind']]}task {status['task']} in force, {len(status['classes'])} classes"
    )
    return f"{path}: {stands}, {status['apply_ms']} ms, canary {canary}"


@app.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(help="Files, folders (all images below them), or - for one image on stdin."),
    ],
    store: Store,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    max_megapixels: Annotated[
        int,
        typer.Option(
            min=1,
            max=PILLOW_MAX_PIXELS // 10**6,
            help="Refuse an image with more pixels than this.",
        ),
    ] = MAX_PIXELS // 10**6,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images to answer together: more take more memory.")
    ] = BATCH,
    json: Json = False,
) -> None:
    """Name the classes of images. One that cannot be read gets an error in place of an answer, and exit code 3 in the end; 8 if
    memory ran out for one."""
    names = deque(name for argument in images for name in _images(argument))
    found: list[dict[str, Any]] = []
    device = Device.open(store)
    with completing({"predictions": found}):
        sources = (_stdin if name == "-" else name for name in list(names))
        for answer in device.predict_each(sources, top, batch_size, max_megapixels * 10**6):
            name = names.popleft()
            found.append({"image": name, **_answer(answer)})
            if not isinstance(answer, Prediction):
                say(
                    f"error: {answer}"
                    if str(answer).startswith(name)
                    else f"error: {name}: {answer}",
                    err=True,
                )
            elif not json:
                say(
                    f"{name}: "
                    + ", ".join(f"{label} {100 * score:.1f} %" for label, score in answer.top)
                )
    if json:
        emit({"predictions": found}, json, list)
    if failed := [entry["error"]["exit_code"] for entry in found if "error" in entry]:
        raise typer.Exit(max(failed))


def _images(argument: str) -> Iterator[str]:
    """What an argument names. Raises InputError for a folder without images, or one that cannot be read."""

    def unread(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    if argument == "-" or not os.path.isdir(argument):
        yield argument
        return
    found = False
    for folder, below, names in os.walk(argument, onerror=unread):
        below.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                found = True
                yield os.path.join(folder, name)
    if not found:
        raise InputError(
            f"{argument} holds no image: name a folder with images ({', '.join(sorted(SUFFIXES))})"
        )


def _stdin() -> ImageLike:
    if sys.stdin is None:
        raise InputError("standard input is closed: name a file")
    with reading("standard input"):
        data = sys.stdin.buffer.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise LimitError(
            f"standard input holds more than the {MAX_FILE} bytes allowed here: name a file"
        )
    return io.BytesIO(data)


def _answer(answer: Prediction | InputError | ResourceError) -> dict[str, Any]:
    if not isinstance(answer, Prediction):
        return {"error": answer.to_dict()}
    return {
        "generation": answer.generation,
        "top": [{"class": name, "probability": score} for name, score in answer.top],
    }


@app.command()
def status(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Show where a device stands."""
    _show(Device.open(store, unproved=unproved).status(), json)


@app.command()
def verify(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Compare every file of a store with what it should be, and write nothing. Exit code 3 if something is damaged."""
    found = verified(store, unproved)
    lines = [f"{d['file']}: {d['problem']}: {d['remedy']}" for d in found["damage"]]
    lines += [f"{name}: left over, removed by the next update" for name in found["leftovers"]]
    serves = found["serves"]
    lines.append(
        f"{found['files']} files, {found['bytes']:,} bytes: {len(found['damage'])} damaged"
    )
    untried = found["untried"]
    lines.append(
        f"serves generation {serves['generation']}, task {serves['task']}"
        if serves
        else "serves nothing"
    )
    if untried:
        lines[-1] = f"the model could not be tried: {untried['message']}"
    emit(found, json, lambda: lines)
    if not found["whole"] or untried:
        raise typer.Exit(untried["exit_code"] if found["whole"] else InputError.exit_code)


@app.command()
def rollback(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Go back by one packet, for good; where packets are damaged, to what is left."""
    _show(Device.open(store, unproved=unproved, swap=IN_PLACE).rollback(), json)


@app.command("export-adapter")
def export_adapter(
    store: Store,
    out: Annotated[
        Path,
        typer.Option(
            callback=output, help="The .onnx_adapter file; one that is there is replaced."
        ),
    ],
    json: Json = False,
) -> None:
    """Write the weights in force as an adapter file, with which a C or C++ program runs the bundle's model.onnx."""
    from ..device.adapter import export_adapter as write

    value = write(Device.open(store), out)
    emit(value, json, lambda: facts(value, *value))


def _show(value: dict[str, Any], json: bool) -> None:
    shown = {
        **value,
        "revoked": [
            f"task {task} up to revision {revision}" for task, revision in value["revoked"]
        ],
    }
    emit(
        value,
        json,
        lambda: facts(shown, *_STATUS, *(name for name in ("revoked", "damage") if shown[name])),
    )
