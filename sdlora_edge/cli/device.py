"""`sdlora-edge device`: what runs on a device."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import InputError, LimitError, NothingToDo, UsageError
from ..inputs.sizes import MAX_FILE
from ..results import AppliedPacket, SkippedPacket
from . import arguments, sync
from .arguments import Provider, Store, Unproved
from .help import CONTEXT, Command, Group
from .output import Json, answered, completing, emit, facts, fields, output, say

if TYPE_CHECKING:
    from ..inputs.modality import Preparation
    from ..results import AppliedAll, Status, Verification

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Run a device: init, apply, predict, status, verify, rollback.",
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
    "temperature",
    "threshold",
    "bundle",
)


@app.command(cls=Command)
def init(
    store: arguments.NewStore,
    bundle: Annotated[
        Optional[str],
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="Folder of the bundle. With --from: the bundle's name, or the beginning of its "
            "id; needed if the repository holds bundles of several names.",
        ),
    ] = None,
    url: sync.From = None,
    root: sync.Root = None,
    unproved: Unproved = False,
    group: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Group whose members may read the store and predict. Default: nobody else may.",
        ),
    ] = None,
    provider: Provider = "",
    max_rate: sync.MaxRate = 0,
    proxy: sync.Proxy = None,
    ca: sync.Ca = None,
    client_cert: sync.ClientCert = None,
    client_key: sync.ClientKey = None,
    json: Json = False,
) -> None:
    """Make a store from a bundle: the first start of a device.

    With --from, the bundle is downloaded from a fleet repository, and the device gets an identity.
    After a cut, the same command goes on where it ended.
    """
    from ..device.device import Device
    from ..progress import stage

    def make(bundle: Path, store: Path) -> Device:
        with stage("checking the bundle and running its canary"):
            return Device.init(bundle, store, unproved, group, provider)

    if url is None:
        if bundle is None:
            raise UsageError("a bundle is missing: name its folder with --bundle, or use --from")
        device = make(Path(bundle), store)
    else:
        link = sync.link_of(max_rate, proxy, ca, client_cert, client_key)
        device = sync.init_from((url, root, bundle), store, link, make)
    _show(device.status(), json)


@app.command(cls=Command)
def apply(
    packets: arguments.Packets,
    store: Store,
    allow_older: Annotated[
        bool, typer.Option("--allow-older", help="Accept packets that were rolled back before.")
    ] = False,
    unproved: Unproved = False,
    provider: Provider = "",
    json: Json = False,
) -> None:
    """Verify packets and apply them in the given order.

    If you pass several packets, `apply` skips those already applied. Updates in a row are merged
    once and proved by the canary of the last one. The first packet that is refused ends the
    command, and those before it are in force. With `--json`, `applied` lists a file, kind, task,
    generation, canary difference and time for each packet, `skipped` a file and a reason, and the
    rest is the device's status.
    """
    from ..device.device import IN_PLACE, Device

    device = Device.open(store, unproved=unproved, swap=IN_PLACE, provider=provider)
    result: dict[str, list[dict[str, Any]]] = {"applied": [], "skipped": []}
    alone = len(packets) == 1

    def told(one: AppliedPacket | SkippedPacket) -> None:
        result["applied" if isinstance(one, AppliedPacket) else "skipped"].append(one.to_dict())
        if not json and not alone:
            say(_taken(one))

    with completing(result):
        done = device.apply_all(packets, allow_older, told)
        if alone and done.skipped:
            raise NothingToDo(f"{done.skipped[0].file}: {done.skipped[0].reason}")
    emit(done, json, lambda: [_in_force(done, alone)] if done.applied else [])


def _taken(one: AppliedPacket | SkippedPacket) -> str:
    if isinstance(one, SkippedPacket):
        return f"{one.file}: {one.reason}"
    return f"{one.file}: {_KINDS[one.kind]}task {one.task}"


def _in_force(done: AppliedAll, alone: bool) -> str:
    """alone: The only packet, which has no line of its own."""
    last, difference = done.applied[-1], done.canary_difference
    canary = "not run" if difference is None else f"{difference:.1e}"
    begin = f"{last.file}: {_KINDS[last.kind]}" if alone else ""
    now = f"task {done.task} in force, {len(done.classes)} classes"
    return f"{begin}{now}, {done.apply_ms} ms, canary {canary}"


@app.command(cls=Command)
def predict(
    store: Store,
    inputs: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="IMAGE",
            help="Files, folders (all images below them), or - for one image on standard input. "
            "If the model reads texts: the texts themselves.",
        ),
    ] = None,
    file: Annotated[
        Optional[str],
        typer.Option(
            metavar="FILE", help="File with a text on each line, or - for standard input."
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of classes to show in each answer.")
    ] = 1,
    max_megapixels: arguments.MaxMegapixels = arguments.MEGAPIXELS,
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Inputs to answer together. More of them need more memory.",
        ),
    ] = 8,
    threshold: Annotated[
        Optional[float],
        typer.Option(
            metavar="SCORE",
            help="Answer unknown if the score is lower. Default: the state's own threshold.",
        ),
    ] = None,
    count: Annotated[
        Optional[bool],
        typer.Option(
            "--count/--no-count",
            help="Count the predictions for the next report. Default: if the device reports.",
        ),
    ] = None,
    provider: Provider = "",
    json: Json = False,
) -> None:
    """Name the classes of images or texts, or say that one is unknown.

    An image that cannot be read gets an error in place of an answer. The exit code is then 3, or 8
    if memory ran out for an image, or 6 if the model failed.
    """
    from ..device.answers import Prediction
    from ..device.device import Device
    from ..fleet.tally import counting

    if not (inputs or file):
        raise UsageError("there is nothing to answer: name an image, or give a text")
    found: list[dict[str, Any]] = []
    device = Device.open(store, provider=provider)
    read = device.preparation
    given = [one for argument in inputs or () for one in _given(read, argument)]
    if file is not None:
        given += read.streamed(_content(file))
    names = deque(name for name, _ in given)
    with completing({"predictions": found}), counting(store, count) as tally:
        sources = (raw for _, raw in given)
        pixels = max_megapixels * 10**6
        for answer in device.predict_each(sources, top, batch_size, pixels, threshold):
            name = names.popleft()
            if isinstance(answer, Prediction):
                if tally is not None:
                    tally.add([answer])
                found.append({read.noun: name, **answer.to_dict()})
                if not json:
                    say(f"{name}: {answered(answer)}")
            else:
                found.append({read.noun: name, "error": answer.to_dict()})
                named = str(answer).startswith(name)
                say(f"error: {answer}" if named else f"error: {name}: {answer}", err=True)
    if json:
        emit({"predictions": found}, json, list)
    if failed := [entry["error"]["exit_code"] for entry in found if "error" in entry]:
        raise typer.Exit(max(failed))


def _given(read: Preparation, argument: str) -> Iterable[tuple[str, Any]]:
    """What an argument stands for. Standard input is read when its turn comes."""
    return [("-", lambda: _content("-"))] if argument == "-" else read.named(argument)


def _content(file: str) -> bytes:
    """Of a file, or of standard input. Raises InputError, LimitError."""
    from ..inputs.image_files import reading
    from ..storage import atomic

    if file != "-":
        return atomic.read(Path(file), MAX_FILE)
    if sys.stdin is None:
        raise InputError("standard input is closed: name a file")
    with reading("standard input"):
        data = sys.stdin.buffer.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise LimitError(
            f"standard input holds more than the {MAX_FILE} bytes allowed here: name a file"
        )
    return data


@app.command(cls=Command)
def status(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Show what a device serves: task, classes, packets, keys."""
    from ..device.device import Device

    _show(Device.open(store, unproved=unproved).status(), json)


@app.command(cls=Command)
def verify(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Compare every file of a store with what it should be. Nothing is written.

    The exit code is 3 if something is damaged.
    """
    from ..device.device import Device

    found = Device.verify(store, unproved)
    emit(found, json, lambda: _verified(found))
    if not found.intact:
        raise typer.Exit(InputError.exit_code)
    if found.untried:
        raise typer.Exit(found.untried.exit_code)


def _verified(found: Verification) -> list[str]:
    lines = [f"{d.file}: {d.problem}: {d.remedy}" for d in found.damage]
    lines += [f"{name}: left over, removed by the next update" for name in found.leftovers]
    lines.append(f"{found.files} files, {found.bytes:,} bytes: {len(found.damage)} damaged")
    if found.untried:
        return [*lines, f"the model could not be tried: {found.untried.message}"]
    if found.serves:
        return [*lines, f"serves generation {found.serves.generation}, task {found.serves.task}"]
    return [*lines, "serves nothing"]


@app.command(cls=Command)
def rollback(store: Store, unproved: Unproved = False, json: Json = False) -> None:
    """Take back the last packet for good. If packets are damaged, keep those that are intact."""
    from ..device.device import IN_PLACE, Device

    _show(Device.open(store, unproved=unproved, swap=IN_PLACE).rollback(), json)


app.command("sync", cls=Command)(sync.sync)


@app.command("export-weights", cls=Command)
def export_weights(
    store: Store,
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="safetensors|adapter|ptd",
            help="safetensors for any runtime, adapter (.onnx_adapter) for ONNX Runtime, ptd for "
            "ExecuTorch.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            callback=output,
            help="File to write, with current.json beside it. Existing ones are replaced.",
        ),
    ],
    unproved: Unproved = False,
    json: Json = False,
) -> None:
    """Write the current weights as a file, for a program in another language that runs the model.

    current.json beside the file says which run, task and classes it holds, with its SHA-256.
    """
    from ..device.device import Device
    from ..device.export_weights import export_weights as write

    value = write(Device.open(store, unproved=unproved), kind, out)
    emit(value, json, lambda: facts(value, *fields(value)))


def _show(status: Status, json: bool) -> None:
    revoked = [f"task {task} up to revision {revision}" for task, revision in status.revoked]
    shown = {**status.to_dict(), "revoked": revoked}
    if status.threshold is None:
        shown["threshold"] = "none, so nothing is unknown"
    more = (name for name in ("revoked", "damage") if shown[name])
    emit(status, json, lambda: facts(shown, *_STATUS, *more))
