"""`sdlora-edge packet`: build, inspect and verify update packets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .. import files, packet
from ..bundle import open_bundle
from ..errors import UsageError
from .output import Json, emit, facts, table

app = typer.Typer(no_args_is_help=True, help="Build, inspect and verify update packets, and trade them with peft.")


@app.command()
def build(
    run: Annotated[Optional[Path], typer.Argument(help="The run. Default: runs/latest.")] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle that the devices were flashed with.")] = ...,  # type: ignore[assignment]
    key: Annotated[
        Optional[str], typer.Option(help="Private key: a file, or NAME for keys/NAME.key. Default: the only one in keys/.")
    ] = None,
    task: Annotated[Optional[int], typer.Option(help="Only this task. Default: every task after the bundle's.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the packets. Default: packets/ in the run.")] = None,
    json: Json = False,
) -> None:
    """Sign one packet per task, and prove each on a scratch device before it is written."""
    from ..export.packets import build_packets
    from ..signing import find_key
    from ..train.run import newest

    if (path := find_key(key, ".key")) is None:
        raise UsageError("no key: make one with sdlora-edge keys new NAME, and export the bundle with --trust NAME")
    built = build_packets(run or newest(), bundle, path, task, out)
    rows = [[b["file"], str(b["task"]), str(b["bytes"]), str(len(b["classes"])), f"{b['canary_difference']:.1e}"] for b in built]
    emit({"packets": built}, json, lambda: table(["packet", "task", "bytes", "new classes", "canary difference"], rows))


@app.command()
def inspect(file: Path, json: Json = False) -> None:
    """Show what a packet claims, WITHOUT verifying it."""
    data = files.read(file, packet.LIMITS.packet)
    claims = packet.unverified_manifest(data)
    value: dict[str, Any] = {"verified": False, "bytes": len(data), **claims}

    def text() -> str:
        shown = value | {"task": claims["task"]["name"], "classes": claims["task"]["classes"]}
        shown |= {"tensors": [f"{name} {dtype}{shape}" for name, (dtype, shape) in claims["tensors"].items()]}
        names = ("format", "lineage", "sequence", "from", "to", "task", "classes", "encoding", "deltas", "bytes", "tensors")
        return (
            facts({n: shown.get(n) for n in names}, *names)
            + "\nnot verified: sdlora-edge packet verify FILE --bundle BUNDLE does that"
        )

    emit(value, json, text)


@app.command()
def verify(
    file: Path,
    bundle: Annotated[Path, typer.Option(help="The bundle whose keys and lineage count.")] = ...,  # type: ignore[assignment]
    json: Json = False,
) -> None:
    """Check a packet's signatures, content and lineage against a bundle."""
    from ..device.runtime import open_packet

    opened = open_packet(file, open_bundle(bundle))
    value = {"verified": True, "task": opened.sequence, "name": opened.update.name, "classes": list(opened.update.classes)}
    emit(
        value,
        json,
        lambda: f"{file}: good, task {opened.sequence} ({opened.update.name}), classes {', '.join(opened.update.classes)}",
    )


@app.command("to-peft")
def to_peft(
    packets: Annotated[Optional[list[Path]], typer.Argument(help="Every packet after the bundle's task, in order.")] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle that they follow.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The adapter's folder.")] = ...,  # type: ignore[assignment]
    alone: Annotated[bool, typer.Option("--alone", help="The last task's direction only, without the head.")] = False,
    json: Json = False,
) -> None:
    """Write a LoRA adapter that the peft library loads: the whole update of the backbone's own weights, and the head."""
    from ..export.peft import to_peft as write

    value = write(bundle, packets or [], out, alone)
    names = ("adapter", "model", "task", "rank", "modules", "head", "classes", "magnitudes", "bytes")
    emit(
        value,
        json,
        lambda: (
            facts(value, *names) + "\napplies to: the backbone before task 1 (backbone.safetensors of the run, or timm's weights)"
        ),
    )


@app.command("from-peft")
def from_peft(
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    run: Annotated[Optional[Path], typer.Option(help="The run that gets one more task. Default: runs/latest.")] = None,
    data: Annotated[str, typer.Option(help="Pictures that the head is fitted to: a folder per class, or a ZIP.")] = ...,  # type: ignore[assignment]
    name: Annotated[Optional[str], typer.Option(help="The task's name. Default: the adapter's.")] = None,
    json: Json = False,
) -> None:
    """Make a LoRA adapter, trained elsewhere on the same backbone, the next task of a run; packet build then ships it."""
    from ..export.peft import from_peft as add
    from ..train.run import newest
    from .train import accuracy_row

    done = add(adapter, run or newest(), data, name)
    value = {
        "run": str(done.path),
        "tasks": len(done.updates),
        "classes": list(done.states[-1].classes),
        "metrics": done.metrics[-1],
    }
    emit(value, json, lambda: f"{accuracy_row(done)}\nrun: {done.path}")
