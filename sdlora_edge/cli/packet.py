"""`sdlora-edge packet`: make, check and sign packets; change keys; revoke tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import UsageError, naming
from . import arguments
from .arguments import After, Keys
from .bundle import listed, shortened
from .help import CONTEXT, Command, Group
from .output import Json, Line, emit, facts, output, table

if TYPE_CHECKING:
    from ..device.contents import Contents
    from ..export.issuing import RevokedTask, RotatedKeys
    from ..export.packets import BuiltPacket
    from ..formats.signing import Signers

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Make, check and sign packets; change keys; revoke tasks.",
)


def _signers(names: list[str] | None) -> Signers:
    """The keys to sign with. A passphrase is asked for when the command is about to sign."""
    from ..formats.signing import find_key, load_signer
    from .passphrase import known

    found = [find_key(name, ".key") for name in names] if names else [find_key(None, ".key")]
    paths = [path for path in found if path is not None]
    if not paths:
        raise UsageError(
            "there is no key in keys/: make one with sdlora-edge keys new NAME, "
            "and export the bundle with --trust NAME"
        )
    return [partial(load_signer, path, known) for path in paths]


@app.command(cls=Command)
def build(
    bundle: arguments.Bundle,
    run: arguments.Run = None,
    key: Keys = None,
    after: After = None,
    task: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Only this task. Default: every task after the bundle's."),
    ] = None,
    encoding: Annotated[
        Optional[str],
        typer.Option(
            metavar=arguments.ENCODINGS,
            help="Encoding of the factors. It must be the bundle's, which is the default.",
        ),
    ] = None,
    revision: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=0,
            help="With --task: revision of a task that was trained again to replace a revoked one.",
        ),
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA", help="Folder or ZIP of images to score before and after each packet."
        ),
    ] = None,
    max_megapixels: arguments.RunMegapixels = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            callback=output,
            help="Folder for the packets. Default: packets/ in the run.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sign one packet for each task, and prove each on a scratch device before it is written."""
    from ..export.requests import PacketOptions, PacketRequest
    from ..train.folder import newest

    options = PacketOptions(task, encoding, revision, after or [], data, max_megapixels)
    request = PacketRequest(run or newest(), bundle, _signers(key), out, options)
    checked = request.require()
    from ..export import packets  # torch, which takes seconds, comes after the checks

    built = packets.build(request, checked)
    emit({"packets": [one.to_dict() for one in built]}, json, lambda: _built(built))


def _built(built: Sequence[BuiltPacket]) -> list[Line]:
    head = ["packet", "task", "bytes", "encoding", "old rows", "row bytes", "new classes"]
    rows = []
    for b in built:
        cells = (b.file, b.task, b.bytes, b.encoding, b.old_rows, b.old_rows_bytes, len(b.classes))
        canary = "not run" if b.canary_difference is None else f"{b.canary_difference:.1e}"
        rows.append([*map(str, cells), f"{b.weight_error:.1e}", canary])
    lines = [line for b in built for line in (*_changes(b), *_accuracy(b))]
    return [*table([*head, "weight error", "canary"], rows), *lines, *_missing(built[-1])]


def _changes(b: BuiltPacket) -> list[str]:
    """What a task retires and renames, if it does."""
    retired = [f"retires {name}" for name in b.retired]
    renamed = [f"renames {old} to {new}" for old, new in b.renamed]
    return [f"task {b.task}: {', '.join(retired + renamed)}"] if retired or renamed else []


def _accuracy(b: BuiltPacket) -> list[str]:
    if (a := b.accuracy) is None:
        return []
    before, after, kept = (
        f"{100 * share:.1f} %" for share in (a.before, a.after, a.after_without_old_rows)
    )
    return [
        f"task {b.task}: accuracy {before} before, {after} after "
        f"({kept} if known classes kept their rows), {a.images} inputs"
    ]


def _missing(packet: BuiltPacket | RevokedTask) -> list[str]:
    if packet.signatures >= packet.threshold:
        return []
    return [
        f"signed by {packet.signatures} of the {packet.threshold} keys needed: "
        "add others with sdlora-edge packet sign"
    ]


@app.command(cls=Command)
def inspect(packet: arguments.Packet, all: arguments.All = False, json: Json = False) -> None:
    """Show what a packet claims, WITHOUT verifying it."""
    from ..formats.packet import LIMITS, unverified_manifest
    from ..storage import atomic

    data = atomic.receive(packet, LIMITS.packet)
    with naming(packet):
        claims = unverified_manifest(data)
    value: dict[str, Any] = {"verified": False, "bytes": len(data), **claims}
    emit(value, json, lambda: _claims(value, all))


_CLAIMS = (
    *("format", "kind", "lineage", "sequence", "revision", "from", "to", "encoding"),
    *("tasks", "trust", "signed_by", "bytes", "tensors"),
)


def _claims(claims: Mapping[str, Any], everything: bool) -> list[Line]:
    shown = _readable(claims)
    end = ["not verified: sdlora-edge packet verify PACKET --bundle BUNDLE does that"]
    if not everything:
        short = {
            name: shortened(listed(v) if isinstance(v, list) else v) for name, v in shown.items()
        }
        return [*facts(short, *short), *end, "--all shows every task, class and tensor"]
    lists = {name: v for name, v in shown.items() if isinstance(v, list)}
    rest = facts(shown, *(name for name in shown if name not in lists))
    return [*rest, *(f"{name}: {one}" for name, v in lists.items() for one in v), *end]


def _readable(claims: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a manifest, in words. Its values may be of any kind: nothing is verified."""
    tensors = [f"{name} {dtype}{shape}" for name, (dtype, shape) in claims["tensors"].items()]
    shown = {**claims, "tasks": [_task(one) for one in claims["tasks"]], "tensors": tensors}
    if isinstance(keys := claims.get("trust"), dict) and isinstance(keys.get("keys"), dict):
        who = ", ".join(map(str, keys["keys"]))
        shown["trust"] = f"version {keys.get('version')}, {keys.get('threshold')} of {who}"
    return {name: shown[name] for name in _CLAIMS if name in shown and shown[name] != []}


def _task(task: Mapping[str, Any]) -> str:
    changes = _rows(task["classes"], task["retired"], task["renamed"])
    return f"{task['name']} (revision {task['revision']}): {changes}"


def _rows(classes: Sequence[str], retired: Iterable[int], renamed: Iterable[Sequence[Any]]) -> str:
    """What a task does to classes. A packet names known classes by their row in the head."""
    parts = [f"classes {', '.join(classes)}"] if classes else []
    parts += [f"retires row {row}" for row in retired]
    parts += [f"renames row {row} to {name}" for row, name in renamed]
    return "; ".join(parts)


@app.command(cls=Command)
def verify(
    packet: arguments.Packet,
    bundle: arguments.Bundle,
    after: After = None,
    json: Json = False,
) -> None:
    """Check a packet's signatures, content and lineage against a bundle."""
    from ..device.chain import follow_trust, open_packet
    from ..device.contents import contents
    from ..formats.bundle import open_bundle

    flashed = open_bundle(bundle)
    keys = follow_trust(flashed.trust, after or [])
    with naming(packet):
        value = contents(open_packet(packet, flashed, keys))
    emit(value, json, lambda: [f"{packet}: good, {_verified(value)}"])


def _verified(value: Contents) -> str:
    from ..device.contents import RevocationContents, TrustContents

    if isinstance(value, TrustContents):
        need = f"{value.threshold} of {len(value.keys)} must sign"
        return f"keys of version {value.version}, {need}"
    if isinstance(value, RevocationContents):
        return f"revocation of task {value.task} up to revision {value.revision}"
    changes = _rows(value.classes, value.retired, value.renamed)
    return f"task {value.task} ({value.name}), {changes}"


@app.command(cls=Command)
def sign(
    packet: arguments.Packet,
    key: Keys = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            metavar="PACKET", callback=output, help="File to write. Default: the packet itself."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Add a signature to a packet, for devices that need several.

    Look at the packet first, with inspect and verify.
    """
    from ..export import issuing

    output(out or packet)
    value = issuing.sign_packet(packet, _signers(key), out)
    emit(value, json, lambda: facts(value, "file", "signed_by"))


@app.command(cls=Command)
def squash(
    packets: arguments.Packets,
    out: arguments.NewPacket,
    key: Keys = None,
    trust: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Public key that may have signed the packets, beside those of --key; "
            "repeat it for several.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Join packets that follow each other into ONE packet.

    A device that was offline for long then loads less. It ends in exactly the same state.
    """
    from ..export import issuing

    value = issuing.squash_packets(packets, _signers(key), out, trust or [])
    shown = ("file", "from_task", "to_task", "classes", "bytes", "single_bytes")
    emit(value, json, lambda: facts(value, *shown))


@app.command(cls=Command)
def trust(
    bundle: arguments.Bundle,
    out: arguments.NewPacket,
    key: Keys = None,
    after: After = None,
    add: Annotated[
        Optional[list[str]],
        typer.Option(metavar="PUBLIC_KEY", help="Public key to obey from now on."),
    ] = None,
    remove: Annotated[
        Optional[list[str]],
        typer.Option(metavar="PUBLIC_KEY", help="Public key to obey no longer."),
    ] = None,
    threshold: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Number of keys that must sign. Default: as before."),
    ] = None,
    json: Json = False,
) -> None:
    """Change the keys that devices obey.

    Enough of the old keys and enough of the new ones must sign the packet.
    """
    from ..export import issuing

    change = issuing.KeyChange(add or [], remove or [], threshold)
    value = issuing.rotate_keys(bundle, _signers(key), out, change, after or [])
    emit(value, json, lambda: _rotated(value))


def _rotated(value: RotatedKeys) -> list[Line]:
    need = [f"{n} of {all} {side} keys have signed" for side, (n, all) in value.signatures.items()]
    missing = "not enough yet: add the others with sdlora-edge packet sign"
    lines = [", ".join(need), *([] if value.complete else [missing])]
    return [*facts(value, "file", "version", "threshold", "keys"), *lines]


@app.command(cls=Command)
def revoke(
    bundle: arguments.Bundle,
    out: arguments.NewPacket,
    task: Annotated[
        int, typer.Option(metavar="N", help="Task to take back, with all tasks after it.")
    ],
    revision: Annotated[
        int, typer.Option(metavar="N", help="Highest revision of the task that is bad.")
    ] = 0,
    key: Keys = None,
    after: After = None,
    json: Json = False,
) -> None:
    """Make devices go back to before a task, and refuse it for good.

    A later packet build with --revision replaces the task.
    """
    from ..export import issuing

    value = issuing.revoke(bundle, task, revision, _signers(key), out, after or [])
    shown = ("file", "task", "revision", "bytes")
    emit(value, json, lambda: [*facts(value, *shown), *_missing(value)])
