"""`sdlora-edge fleet`: the repository of static files that devices pull their updates from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UsageError
from .arguments import PASSPHRASE
from .fleet_text import overview, published
from .help import CONTEXT, Command, Group
from .output import Json, emit, facts, output

if TYPE_CHECKING:
    from ..fleet.keyholders import KeyFolder
    from ..fleet.repository import Repository
    from ..formats.signing import Signers

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Publish packets to a fleet, and roll them out in waves.",
)

At = Annotated[
    Path,
    typer.Option(
        "--repository",
        metavar="REPOSITORY",
        help="Folder of the fleet repository.",
    ),
]
Keys = Annotated[Path, typer.Option("--keys", metavar="KEYS", help="Folder of the fleet's keys.")]
Key = Annotated[
    Optional[list[Path]],
    typer.Option(
        "--key",
        metavar="KEY",
        help="Offline private key to sign with; repeat it for several. Default: those in "
        "KEYS/offline.",
    ),
]
REPOSITORY, KEYS = Path("fleet"), Path("fleet-keys")


def opened(path: Path, keys: Path) -> tuple[Repository, KeyFolder]:
    """The repository and its keys. Its first root is the one kept with the keys, if one is."""
    from ..fleet.extras import need

    need("tuf.api.metadata", "fleet")
    from ..fleet.keyholders import KeyFolder
    from ..fleet.repository import Repository

    folder = KeyFolder(keys)
    return Repository.open(path, pinned=folder.pinned()), folder


def _signers(named: list[Path] | None, folder: KeyFolder, keyids: Collection[str]) -> Signers:
    """Keys to sign with. A passphrase is asked for when the command is about to sign."""
    from functools import partial

    from ..formats.signing import load_signer
    from .passphrase import known

    if not (files := named or folder.files(keyids)):
        raise UsageError(
            f"{folder.offline} holds no key of this role: name one with --key, or another folder "
            "with --keys"
        )
    return [partial(load_signer, file, known) for file in files]


def _days(given: list[str] | None, allowed: Collection[str]) -> dict[str, int]:
    found = {}
    for one in given or []:
        role, _, days = one.partition("=")
        if role not in allowed or not days.isdigit() or not 1 <= int(days) <= 3650:
            raise UsageError(
                f"--expires {one}: give ROLE=DAYS, with 1 to 3650 days and one of the roles "
                f"{', '.join(allowed)}"
            )
        found[role] = int(days)
    return found


@app.command(cls=Command)
def init(
    repository: Annotated[
        Path,
        typer.Option(
            "--repository",
            metavar="REPOSITORY",
            callback=output,
            help="New folder, for a web server to serve.",
        ),
    ] = REPOSITORY,
    keys: Annotated[
        Path,
        typer.Option(
            "--keys",
            metavar="KEYS",
            callback=output,
            help="New folder for the keys. Keep KEYS/offline off the network.",
        ),
    ] = KEYS,
    threshold: Annotated[
        int, typer.Option(metavar="M", min=1, help="Keys of root, and of targets, that must sign.")
    ] = 1,
    root_keys: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="Number of keys of root.")
    ] = 1,
    targets_keys: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="Number of keys of targets.")
    ] = 1,
    expires: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="ROLE=DAYS",
            help="Days until the metadata of a role expires. Default: root=365, targets=365, "
            "rollout=90, snapshot=30, timestamp=14.",
        ),
    ] = None,
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help="Encrypt the offline keys. The passphrase is asked for twice, or is in "
            f"{PASSPHRASE}.",
        ),
    ] = False,
    passphrase_file: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Encrypt the offline keys with what is in this file."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a fleet repository, and its keys."""
    from ..fleet.extras import need

    need("tuf.api.metadata", "fleet")
    from ..fleet.keyholders import Choices, KeyFolder
    from ..fleet.overview import created
    from ..fleet.roles import ROLES
    from .passphrase import chosen

    counts = {"root": root_keys, "targets": targets_keys}
    choices = Choices(counts, threshold, _days(expires, ROLES))
    encrypted = passphrase or passphrase_file is not None
    secret = chosen("the offline keys", passphrase_file) if encrypted else None
    value = created(repository, KeyFolder(keys), choices, secret)
    lines = [
        f"serve {repository}/metadata and {repository}/targets; keep {keys} to yourself",
        f"devices trust {keys}/root.json (SHA-256 {value.root})",
    ]
    emit(value, json, lambda: [*facts(value, "repository", "keys"), *lines])


@app.command(cls=Command)
def publish(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Packets, folders of packets, and bundles."),
    ],
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    key: Key = None,
    bundle: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="BUNDLE",
            help="Bundle that verifies packets and is not published; repeat it for several.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Add packets and bundles to the repository, after their signatures have been verified."""
    at, folder = opened(repository, keys)
    signers = _signers(key, folder, at.roles.keyids("targets"))
    value = at.publish(files, signers, folder.online_keys(), bundle or [])
    emit(value, json, lambda: published(value))


@app.command(cls=Command)
def sign(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="root or targets.")] = "targets",
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    key: Key = None,
    json: Json = False,
) -> None:
    """Add a signature to a change that waits for several. It comes into force once complete."""
    at, folder = opened(repository, keys)
    signers = _signers(key, folder, _all_keys(at))
    value = at.sign(_offline(role), signers, folder.online_keys())
    emit(value, json, lambda: published(value))


@app.command(cls=Command)
def refresh(
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    expires: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="ROLE=DAYS",
            help="New lifetime of the metadata of rollout, snapshot or timestamp.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sign a new timestamp, so that devices know they see the newest files. Run it daily."""
    at, folder = opened(repository, keys)
    from ..fleet.online import OnlineKeys
    from ..fleet.roles import ONLINE

    value = at.refresh(OnlineKeys.load(folder.online), _days(expires, ONLINE))
    lines = [f"signed {', '.join(value.renewed)}"]
    lines += [f"{role} expires in {days} days" for role, days in value.expires.items()]
    emit(value, json, lambda: lines)


@app.command(cls=Command)
def renew(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="root or targets.")],
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    key: Key = None,
    days: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", min=1, max=3650, help="Days until it expires. Default: as before."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sign the metadata of root or targets anew, before it expires."""
    at, folder = opened(repository, keys)
    from ..fleet.rotation import RoleChange

    signers = _signers(key, folder, at.roles.keyids(_offline(role)))
    value = at.rotate(role, RoleChange(days=days), signers, folder.online_keys())
    emit(value, json, lambda: published(value))


@app.command(cls=Command)
def rotate(
    role: Annotated[
        str,
        typer.Argument(metavar="ROLE", help="root, targets, rollout, snapshot or timestamp."),
    ],
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    key: Key = None,
    add: Annotated[
        Optional[list[str]],
        typer.Option(metavar="PUBLIC_KEY", help="File of a public key that signs from now on."),
    ] = None,
    remove: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Key that signs no longer: its file, or the first digits of its id.",
        ),
    ] = None,
    threshold: Annotated[
        Optional[int],
        typer.Option(metavar="M", help="Keys that must sign. Default: as many as before."),
    ] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt the new keys, as fleet init does.")
    ] = False,
    json: Json = False,
) -> None:
    """Change the keys of a role. Without --add and --remove, new keys are made for all of them."""
    at, folder = opened(repository, keys)
    from ..fleet.overview import rotated
    from ..fleet.roles import OFFLINE, ROLES
    from ..fleet.rotation import KeyNames
    from .passphrase import chosen

    if role not in ROLES:
        raise UsageError(f"role {role!r}: choose one of {', '.join(ROLES)}")
    if passphrase and role not in OFFLINE:
        raise UsageError("--passphrase: online keys sign without a person; leave it out")
    secret = chosen(f"the new keys of {role}", None) if passphrase else None
    names = KeyNames(tuple(add or ()), tuple(remove or ()), threshold)
    change = rotated(at, folder, role, names, secret)
    signers = _signers(key, folder, {*_all_keys(at), *(k.keyid for k in change.add)})
    value = at.rotate(role, change, signers, folder.online_keys())
    old = [f"destroy {file} once no change waits" for file in folder.files(change.remove)]
    emit(value, json, lambda: [*published(value), *old])


@app.command(cls=Command)
def prune(
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    key: Key = None,
    keep_days: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Keep files this long after nothing lists them."),
    ] = 30,
    state: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="DIGEST",
            help="State of a device that must still be able to follow; repeat it for several.",
        ),
    ] = None,
    files_only: Annotated[
        bool,
        typer.Option("--files-only", help="Only remove old files, and steps that are done."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be removed.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove packets that a squash covers, steps that are done, and files that nobody needs."""
    at, folder = opened(repository, keys)
    from ..fleet.pruning import PruneOptions

    signers = [] if files_only else _signers(key, folder, at.roles.keyids("targets"))
    options = PruneOptions(keep_days, tuple(state or ()), dry_run)
    value = at.prune(signers, folder.online_keys(), options)
    lines = [f"a device at task {task} needs a newer bundle" for task in value.stranded]
    shown = ("packets", "steps", "files", "bytes")
    emit(value, json, lambda: [*facts(value, *shown), *lines])


@app.command(cls=Command)
def status(repository: At = REPOSITORY, keys: Keys = KEYS, json: Json = False) -> None:
    """Show roles and their expiry, what is published, and the roll-outs."""
    at, _ = opened(repository, keys)
    from ..fleet.overview import status as status_of

    value = status_of(at)
    emit(value, json, lambda: overview(value))


def _all_keys(at: Repository) -> set[str]:
    return at.roles.keyids("root") | at.roles.keyids("targets")


def _offline(role: str) -> str:
    if role not in ("root", "targets"):
        raise UsageError(f"role {role!r}: choose root or targets; fleet refresh signs the others")
    return role
