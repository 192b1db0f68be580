"""What is done to packets besides building them: sign, squash, change keys, revoke tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device.chain import follow_trust
from ..errors import InputError, NothingToDo, TrustError, UsageError, naming
from ..formats import control, packet, signing
from ..formats.bundle import open_bundle
from ..formats.container import countersigned, opened
from ..formats.control import Revoked
from ..formats.limits import LIMITS
from ..results import Result
from ..storage import atomic
from .requests import keys_of

if TYPE_CHECKING:
    from .requests import Key


@dataclass(frozen=True)
class SignedPacket(Result):
    """signed_by: ids of all keys that have signed the packet, unverified."""

    file: Path
    bytes: int
    signed_by: tuple[str, ...]


def sign_packet(file: Path | str, key: Key, out: Path | str | None = None) -> SignedPacket:
    """Add signatures to a packet, in place or into `out`.

    Raises:
        InputError: the file is damaged.
        NothingToDo: a key has signed it already.
    """
    file = Path(file)
    with naming(file):
        data = atomic.receive(file, LIMITS.packet)
        opened(data)
    signers = signing.signers_of(keys_of(key))  # after the checks: this may ask for a passphrase
    with naming(file):
        sealed = countersigned(data, signers)
    target = Path(out or file)
    atomic.write(target, sealed)
    signed_by = packet.unverified_manifest(sealed)["signed_by"]
    return SignedPacket(target, len(sealed), tuple(signed_by))


@dataclass(frozen=True)
class SquashedPacket(Result):
    """A packet from `from_task` to `to_task`. single_bytes: of the packets it stands for."""

    file: Path
    from_task: int
    to_task: int
    classes: tuple[str, ...]
    bytes: int
    single_bytes: int


def squash_packets(
    packets: Sequence[Path | str],
    key: Key,
    out: Path | str,
    trust: Sequence[Path | str] = (),
) -> SquashedPacket:
    """Join packets that follow each other into one packet. Pass them in any order.

    It leads from the first packet's state to the last one's, bit for bit.

    Args:
        packets: two or more.
        key: signs the new packet.
        out: the new packet.
        trust: names or files of public keys that may have signed the packets, besides `key`.
            Nobody signs what they have not verified.

    Raises:
        UsageError: there is only one packet, or `out` exists.
        TrustError: none of these keys has signed a packet.
        NotForThisDevice: the packets do not follow each other.
    """
    if len(packets) < 2:
        raise UsageError("squash makes one packet of several: name two or more")
    out = _require_new(out)
    signers = signing.signers_of(keys_of(key))
    known = {signer.public_key.keyid: signer.public_key for signer in signers} | _public(trust)
    keys = signing.Trust(tuple(known.values()), 1)
    files = [Path(path) for path in packets]
    read = sorted((_verified(path, keys) for path in files), key=lambda one: one.sequence)
    sealed = packet.squash(read, lambda payload: signing.sign(payload, signers))
    atomic.write(out, sealed)
    return SquashedPacket(
        file=out,
        from_task=read[0].first - 1,
        to_task=read[-1].sequence,
        classes=tuple(name for one in read for update in one.updates for name in update.classes),
        bytes=len(sealed),
        single_bytes=sum(path.stat().st_size for path in files),
    )


def _verified(path: Path, keys: signing.Trust) -> packet.Packet:
    with naming(path):
        try:
            return packet.read(atomic.receive(path, LIMITS.packet), keys)
        except TrustError as error:
            raise TrustError(f"{error}; or name a key that has signed it with --trust") from error


@dataclass(frozen=True)
class KeyChange:
    """What changes in the keys that devices trust.

    Attributes:
        add: names or files of public keys to trust from now on.
        remove: names or files of public keys to trust no longer.
        threshold: how many must sign from now on. None: as many as before.
    """

    add: Sequence[Path | str] = ()
    remove: Sequence[Path | str] = ()
    threshold: int | None = None


@dataclass(frozen=True)
class RotatedKeys(Result):
    """A trust packet. signatures: (have, need) of the `old` and the `new` keys."""

    file: Path
    version: int
    threshold: int
    keys: tuple[str, ...]
    signatures: Mapping[str, tuple[int, int]]
    complete: bool


def rotate_keys(
    bundle: Path | str,
    key: Key,
    out: Path | str,
    change: KeyChange,
    after: Sequence[Path | str] = (),
) -> RotatedKeys:
    """Write a packet that changes the keys that the devices of a bundle trust.

    It counts once enough of the old keys and enough of the new keys have signed it. `sign_packet`
    adds what is missing.

    Args:
        bundle: the bundle that the devices were flashed with.
        key: signs the packet.
        out: the new packet.
        change: keys to add and to remove.
        after: the trust packets that the devices have applied already, in order.

    Raises:
        NothingToDo: nothing would change.
        UsageError: the threshold cannot be met, or a key to remove is not in force.
        TrustError: a signer is neither among the old keys nor among the new ones.
    """
    out = _require_new(out)
    old = follow_trust(open_bundle(Path(bundle)).trust, after)
    new = _changed(old, change)
    signers = signing.signers_of(keys_of(key))
    known = {one.keyid for one in (*old.keys, *new.keys)}
    if strangers := {signer.public_key.keyid for signer in signers} - known:
        raise TrustError(
            f"key {sorted(strangers)[0][:12]} is neither among the old keys nor among the new "
            "ones: sign with one of these"
        )
    sealed = control.build_trust(new, lambda payload: signing.sign(payload, signers))
    envelope = opened(sealed)[0].encode()
    counts = {
        side: (signing.good_signatures(envelope, trust), trust.threshold)
        for side, trust in (("old", old), ("new", new))
    }
    atomic.write(out, sealed)
    return RotatedKeys(
        file=out,
        version=new.version,
        threshold=new.threshold,
        keys=tuple(one.keyid for one in new.keys),
        signatures=counts,
        complete=all(have >= need for have, need in counts.values()),
    )


def _changed(old: signing.Trust, change: KeyChange) -> signing.Trust:
    """The next version of the keys. Raises NothingToDo, UsageError."""
    known, removed = {key.keyid: key for key in old.keys}, set(_public(change.remove))
    if unknown := removed - set(known):
        raise UsageError(
            f"--remove: key {sorted(unknown)[0][:12]} is not in force: name one that is, or name "
            "the trust packets that the devices have applied with --after"
        )
    named = {
        keyid: key
        for keyid, key in {**known, **_public(change.add)}.items()
        if keyid not in removed
    }
    wanted = old.threshold if change.threshold is None else change.threshold
    if not 1 <= wanted <= len(named) <= LIMITS.keys:
        raise UsageError(
            f"a threshold of {wanted} with {len(named)} key(s): choose between 1 and all of at "
            f"most {LIMITS.keys}"
        )
    if set(named) == set(known) and wanted == old.threshold:
        raise NothingToDo(
            "these keys and this threshold are in force already: use --add, --remove or --threshold"
        )
    return signing.Trust(tuple(named[keyid] for keyid in sorted(named)), wanted, old.version + 1)


@dataclass(frozen=True)
class RevokedTask(Result):
    """A revocation. signatures: how many of the `threshold` needed it has."""

    file: Path
    task: int
    revision: int
    bytes: int
    signatures: int
    threshold: int


def revoke(
    bundle: Path | str,
    task: int,
    revision: int,
    key: Key,
    out: Path | str,
    after: Sequence[Path | str] = (),
) -> RevokedTask:
    """Write a packet that takes the devices of a bundle back to before a task, for good.

    Args:
        bundle: the bundle that the devices were flashed with.
        task: the task to take back, with all after it.
        revision: the highest revision of it that is taken back.
        key: signs the packet.
        out: the new packet.
        after: the trust packets that the devices have applied already. They decide only how many
            of the signatures count in the result.

    Raises:
        UsageError: the bundle itself knows the task.
    """
    flashed = open_bundle(Path(bundle))
    manifest, trust = flashed.manifest, follow_trust(flashed.trust, after)
    if task <= manifest.task:
        raise UsageError(
            f"--task {task}: {bundle} knows the tasks up to {manifest.task} itself; no packet can "
            "take them back"
        )
    if not 0 <= revision <= LIMITS.revision:
        raise UsageError(f"--revision {revision}: choose a number between 0 and {LIMITS.revision}")
    out = _require_new(out)
    signers = signing.signers_of(keys_of(key))
    sealed = control.build_revocation(
        manifest.lineage, Revoked(task, revision), lambda payload: signing.sign(payload, signers)
    )
    atomic.write(out, sealed)
    count = signing.good_signatures(opened(sealed)[0].encode(), trust)
    return RevokedTask(out, task, revision, len(sealed), count, trust.threshold)


def _public(names: Sequence[Path | str]) -> dict[str, Any]:
    paths = [signing.find_key(name, ".pub") for name in names]
    return {
        key.keyid: key for key in (signing.load_public(path) for path in paths if path is not None)
    }


def _require_new(name: Path | str) -> Path:
    """The new packet's file. Raises UsageError, InputError."""
    out = Path(name)
    if out.exists():
        raise UsageError(f"{out} exists already: choose another name")
    if not out.name.endswith(packet.SUFFIX):
        raise InputError(
            f"{out}: the name of a packet ends with {packet.SUFFIX}: choose such a name"
        )
    return out
