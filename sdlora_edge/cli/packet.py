"""`sdlora-edge packet`: build, inspect, verify, sign and squash packets; change keys and revocation tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..device.chain import follow_trust
from ..errors import UsageError, naming
from ..formats import packet
from ..formats.bundle import open_bundle
from ..formats.control import Revocation, Rotation
from ..formats.signing import PASSPHRASE, find_key, load_signer
from ..storage import atomic
from .output import Json, emit, facts, output, table
from .passphrase import known

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

app = typer.Typer(
    no_args_is_help=True,
    help="Build, inspect, verify, sign and squash packets; change keys, revocation tasks, trade with peft.",
)

Keys = Annotated[
    Optional[list[str]],
    typer.Option(
        "--key",
        help="Private key, once for each: a file, or NAME for keys/NAME.key. Default: the only one in keys/. "
        f"The passphrase of an encrypted key is asked for, or taken from {PASSPHRASE}.",
    ),
]
After = Annotated[
    Optional[list[Path]],
    typer.Option(
        "--after", help="A trust packet that the devices have applied, once for each, in order."
    ),
]
Out = Annotated[Path, typer.Option("--out", callback=output, help="The packet's file.")]


def _signers(names: list[str] | None) -> list[CryptoSigner]:
    found = [find_key(name, ".key") for name in names] if names else [find_key(None, ".key")]
    paths = [path for path in found if path is not None]
    if not paths:
        raise UsageError(
            "no key: make one with sdlora-edge keys new NAME, and export the bundle with --trust NAME"
        )
    return [load_signer(path, known) for path in paths]


@app.command()
def build(
    run: Annotated[Optional[Path], typer.Argument(help="The run. Default: runs/latest.")] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle that the devices were flashed with.")] = ...,  # type: ignore[assignment]
    key: Keys = None,
    task: Annotated[Optional[int], typer.Option(help="Only this task. Default: every task after the bundle's.")] = None,
    encoding: Annotated[Optional[str], typer.Option(help="fp32, fp16, int8 or int4: must be the bundle's, which is the default.")] = None,
    revision: Annotated[Optional[int], typer.Option(min=0, help="With --task: this task, trained again, replaces a revoked one.")] = None,
    after: After = None,
    data: Annotated[Optional[str], typer.Option(help="A folder of images to score before and after each packet.")] = None,
    out: Annotated[Optional[Path], typer.Option(callback=output, help="Folder for the packets. Default: packets/ in the run.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Sign one packet per task, and prove each on a scratch device before it is written."""
    from ..export.requests import PacketRequest
    from ..train.folder import newest

    request = PacketRequest(
        run or newest(), bundle, _signers(key), task, out, encoding, revision, after or [], data
    )
    checked = request.require()
    from ..export import packets  # torch, which takes seconds, comes after the checks

    built = packets.build(request, checked)
    head = [
        "packet",
        "task",
        "bytes",
        "new classes",
        "old rows",
        "their bytes",
        "encoding",
        "weight error",
        "canary difference",
    ]
    rows = []
    for b in built:
        numbers = [
            str(b["task"]),
            str(b["bytes"]),
            str(len(b["classes"])),
            str(b["old_rows"]),
            str(b["old_rows_bytes"]),
        ]
        rows.append(
            [
                b["file"],
                *numbers,
                b["encoding"],
                f"{b['weight_error']:.1e}",
                f"{b['canary_difference']:.1e}",
            ]
        )
    emit(
        {"packets": built},
        json,
        lambda: [*table(head, rows), *_accuracies(built), *_missing(built)],
    )


def _accuracies(built: list[dict[str, Any]]) -> list[str]:
    lines = []
    for b in built:
        if a := b.get("accuracy"):
            shares = [
                f"{100 * a[name]:.1f} %" for name in ("before", "after", "after_without_old_rows")
            ]
            lines.append(
                f"task {b['task']}: accuracy {shares[0]} before, {shares[1]} after ({shares[2]} if known classes kept their rows), "
                f"{a['images']} images"
            )
    return lines


def _missing(built: list[dict[str, Any]]) -> list[str]:
    last = built[-1]
    if last["signatures"] >= last["threshold"]:
        return []
    return [
        f"signed by {last['signatures']} of the {last['threshold']} keys needed: add others with sdlora-edge packet sign"
    ]


@app.command()
def inspect(file: Path, json: Json = False) -> None:
    """Show what a packet claims, WITHOUT verifying it."""
    data = atomic.receive(file, packet.LIMITS.packet)
    with naming(file):
        claims = packet.unverified_manifest(data)
    value: dict[str, Any] = {"verified": False, "bytes": len(data), **claims}

    def text() -> list[str]:
        shown = value | {
            "tasks": [
                f"{t['name']} (revision {t['revision']}): {', '.join(t['classes'])}"
                for t in claims["tasks"]
            ]
        }
        shown |= {
            "tensors": [
                f"{name} {dtype}{shape}" for name, (dtype, shape) in claims["tensors"].items()
            ]
        }
        if isinstance(keys := claims.get("trust"), dict) and isinstance(keys.get("keys"), dict):
            shown |= {
                "trust": f"version {keys.get('version')}, {keys.get('threshold')} of {', '.join(map(str, keys['keys']))}"
            }
        shown = {name: v for name, v in shown.items() if v != []}
        names = ("format", "kind", "lineage", "sequence", "revision", "from", "to", "encoding", "tasks", "trust", "signed_by", "bytes", "tensors")  # fmt: skip
        return [
            *facts(shown, *(n for n in names if n in shown)),
            "not verified: sdlora-edge packet verify FILE --bundle BUNDLE does that",
        ]

    emit(value, json, text)


@app.command()
def verify(
    file: Path,
    bundle: Annotated[Path, typer.Option(help="The bundle whose keys and lineage count.")] = ...,  # type: ignore[assignment]
    after: After = None,
    json: Json = False,
) -> None:
    """Check a packet's signatures, content and lineage against a bundle."""
    from ..device.chain import open_packet

    flashed = open_bundle(bundle)
    keys = follow_trust(flashed.trust, after or [])
    with naming(file):
        opened = open_packet(file, flashed, keys)
    value: dict[str, Any] = {"verified": True}
    if isinstance(opened, Rotation):
        value |= {"kind": "trust", **opened.trust.to_dict()}
        line = f"keys of version {opened.trust.version}, {opened.trust.threshold} of {len(opened.trust.keys)} must sign"
    elif isinstance(opened, Revocation):
        value |= {
            "kind": "revocation",
            "task": opened.revoked.sequence,
            "revision": opened.revoked.revision,
        }
        line = f"revocation of task {opened.revoked.sequence} in revision {opened.revoked.revision}"
    else:
        classes = [name for update in opened.updates for name in update.classes]
        value |= {
            "kind": "update",
            "task": opened.sequence,
            "name": opened.update.name,
            "classes": classes,
        }
        line = f"task {opened.sequence} ({opened.update.name}), classes {', '.join(classes)}"
    emit(value, json, lambda: [f"{file}: good, {line}"])


@app.command()
def sign(
    file: Path,
    key: Keys = None,
    out: Annotated[
        Optional[Path],
        typer.Option(callback=output, help="Write another file. Default: the packet itself."),
    ] = None,
    json: Json = False,
) -> None:
    """Add a signature to a packet, for devices that want several. Look at it first: inspect, verify."""
    from ..export import issuing

    output(out or file)
    value = issuing.sign(file, _signers(key), out)
    emit(value, json, lambda: facts(value, "file", "signed_by"))


@app.command()
def squash(
    packets: list[Path],
    out: Out,
    key: Keys = None,
    trust: Annotated[
        Optional[list[str]],
        typer.Option(help="Public key that may have signed them, besides --key's own."),
    ] = None,
    json: Json = False,
) -> None:
    """Make ONE packet of several that follow each other: for devices that were offline for long. The result is equal to the bit."""
    from ..export import issuing

    value = issuing.squash(packets, _signers(key), out, trust or [])
    emit(
        value,
        json,
        lambda: facts(value, "file", "from_task", "to_task", "classes", "bytes", "single_bytes"),
    )


@app.command()
def trust(
    out: Out,
    bundle: Annotated[
        Path, typer.Option(help="The bundle that the devices were flashed with.")
    ] = ...,  # type: ignore[assignment]
    key: Keys = None,
    add: Annotated[
        Optional[list[str]], typer.Option(help="Public key to obey from now on.")
    ] = None,
    remove: Annotated[
        Optional[list[str]], typer.Option(help="Public key to obey no longer.")
    ] = None,
    threshold: Annotated[
        Optional[int],
        typer.Option(help="How many must sign from now on. Default: as many as before."),
    ] = None,
    after: After = None,
    json: Json = False,
) -> None:
    """Change the keys that devices obey. Enough of the old keys and enough of the new ones must sign it."""
    from ..export import issuing

    value = issuing.rotate(
        bundle, _signers(key), out, add or [], remove or [], threshold, after or []
    )
    need = [
        f"{have} of {want} {side} keys have signed"
        for side, (have, want) in value["signatures"].items()
    ]
    missing = (
        [] if value["complete"] else ["not enough yet: add the others with sdlora-edge packet sign"]
    )
    emit(
        value,
        json,
        lambda: [*facts(value, "file", "version", "threshold", "keys"), ", ".join(need), *missing],
    )


@app.command()
def revoke(
    out: Out,
    bundle: Annotated[
        Path, typer.Option(help="The bundle that the devices were flashed with.")
    ] = ...,  # type: ignore[assignment]
    task: Annotated[int, typer.Option(help="The task to take back, with all after it.")] = ...,  # type: ignore[assignment]
    revision: Annotated[int, typer.Option(help="The highest revision of it that was bad.")] = 0,
    key: Keys = None,
    after: After = None,
    json: Json = False,
) -> None:
    """Make devices go back to before a task by themselves, and refuse it for ever. A later build --revision replaces it."""
    from ..export import issuing

    value = issuing.revoke(bundle, task, revision, _signers(key), out, after or [])
    emit(
        value,
        json,
        lambda: [*facts(value, "file", "task", "revision", "bytes"), *_missing([value])],
    )


@app.command("to-peft")
def to_peft(
    packets: Annotated[
        Optional[list[Path]], typer.Argument(help="Every packet after the bundle's task, in order.")
    ] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle that they follow.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(callback=output, help="The adapter's folder.")] = ...,  # type: ignore[assignment]
    alone: Annotated[
        bool, typer.Option("--alone", help="The last task's direction only, without the head.")
    ] = False,
    after: After = None,
    json: Json = False,
) -> None:
    """Write a LoRA adapter that the peft library loads: the whole update of the backbone's own weights, and the head."""
    from ..export.requests import require_new

    require_new(out)
    from ..export.peft import to_peft as write

    value = write(bundle, packets or [], out, alone, after or [])
    names = (
        "adapter",
        "model",
        "task",
        "rank",
        "modules",
        "head",
        "classes",
        "magnitudes",
        "bytes",
    )
    emit(
        value,
        json,
        lambda: [
            *facts(value, *names),
            "applies to: the backbone before task 1 (backbone.safetensors of the run, or timm's weights)",
        ],
    )


@app.command("from-peft")
def from_peft(
    adapter: Annotated[
        Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")
    ],
    run: Annotated[
        Optional[Path], typer.Option(help="The run that gets one more task. Default: runs/latest.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Images that the head is fitted to: a folder per class, or a ZIP.")
    ] = ...,  # type: ignore[assignment]
    name: Annotated[
        Optional[str], typer.Option(help="The task's name. Default: the adapter's.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a LoRA adapter, trained elsewhere on the same backbone, the next task of a run; packet build then ships it."""
    from ..train import folder, plan
    from .train import accuracy_row

    path = run or folder.newest()
    plan.adapter(adapter, path)
    task = plan.one_more(path, data, name or adapter.resolve().name)
    from ..export.peft import add  # torch, which takes seconds, comes after the checks

    done = add(adapter, task)
    value = {
        "run": str(done.path),
        "tasks": len(done.updates),
        "classes": list(done.states[-1].classes),
        "metrics": done.metrics[-1],
    }
    emit(value, json, lambda: [accuracy_row(done), f"run: {done.path}"])
