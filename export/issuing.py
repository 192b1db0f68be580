"""What is done to packets beside building them: sign, squash, and the orders that change keys and revocation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..device.chain import follow_trust
from ..errors import InputError, NothingToDo, TrustError, UsageError, naming
from ..formats import control, packet, signing
from ..formats.bundle import open_bundle
from ..formats.container import LIMITS, countersigned, opened
from ..formats.control import Revoked
from ..storage import atomic


def sign(file: Path, keys: signing.Signers, out: Path | None = None) -> dict[str, Any]:
    """Add signatures to a packet: in place, or into `out`. Raises InputError for a damaged file, NothingToDo for a key that has signed."""
    signers = signing.signers_of(keys)
    with naming(file):
        sealed = countersigned(atomic.receive(file, LIMITS.packet), signers)
    atomic.write(out or file, sealed)
    return {
        "file": str(out or file),
        "bytes": len(sealed),
        "signed_by": packet.unverified_manifest(sealed)["signed_by"],
    }


def squash(
    packets: Sequence[Path], keys: signing.Signers, out: Path, trust: Sequence[str] = ()
) -> dict[str, Any]:
    """Make one packet of several that follow each other, in any order given. It leads from the first one's state to the last one's.

    Each must be signed by one of `keys`, or of the public keys named in `trust`: nobody signs what they have not verified.
    Raises UsageError for a single packet, NotForThisDevice for packets that do not follow each other.
    """
    if len(packets) < 2:
        raise UsageError("squash makes one packet of several: name two or more")
    _require_new(out)
    signers = signing.signers_of(keys)
    obeyed = {signer.public_key.keyid: signer.public_key for signer in signers} | _public(trust)
    read = []
    for path in packets:
        with naming(path):
            try:
                read.append(
                    packet.read(
                        atomic.receive(path, LIMITS.packet),
                        signing.Trust(tuple(obeyed.values()), 1),
                    )
                )
            except TrustError as error:
                raise TrustError(
                    f"{error}; or name a key that has signed it with --trust"
                ) from error
    read.sort(key=lambda one: one.sequence)
    sealed = packet.squash(read, lambda payload: signing.sign(payload, signers))
    atomic.write(out, sealed)
    before, after = read[0].first - 1, read[-1].sequence
    names = [name for one in read for update in one.updates for name in update.classes]
    single = sum(path.stat().st_size for path in packets)
    return {
        "file": str(out),
        "from_task": before,
        "to_task": after,
        "classes": names,
        "bytes": len(sealed),
        "single_bytes": single,
    }


def rotate(
    bundle: Path,
    keys: signing.Signers,
    out: Path,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
    after: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write a packet that changes the keys that devices of a bundle obey.

    add, remove: public keys, by name or file. after: the trust packets that the devices have applied already, in order. The packet
    counts once enough of the old keys AND of the new ones have signed; `sign` adds what is missing.

    Raises UsageError where nothing would change, or the threshold cannot be met; TrustError for a signer of neither side.
    """
    _require_new(out)
    old = follow_trust(open_bundle(bundle).trust, after)
    added, removed = _public(add), _public(remove)
    known = {key.keyid: key for key in old.keys}
    if unknown := set(removed) - set(known):
        raise UsageError(f"--remove: key {sorted(unknown)[0][:12]} is not in force")
    named = {keyid: key for keyid, key in {**known, **added}.items() if keyid not in removed}
    wanted = old.threshold if threshold is None else threshold
    if not 1 <= wanted <= len(named) <= LIMITS.keys:
        raise UsageError(
            f"a threshold of {wanted} with {len(named)} key(s): between 1 and all of at most {LIMITS.keys} is possible"
        )
    if set(named) == set(known) and wanted == old.threshold:
        raise NothingToDo(
            "these keys and this threshold are in force already: use --add, --remove or --threshold"
        )
    new = signing.Trust(tuple(named[keyid] for keyid in sorted(named)), wanted, old.version + 1)
    signers = signing.signers_of(keys)
    if strangers := {s.public_key.keyid for s in signers} - set(known) - set(named):
        raise TrustError(
            f"key {sorted(strangers)[0][:12]} is neither among the old keys nor among the new ones"
        )
    sealed = control.build_trust(new, lambda payload: signing.sign(payload, signers))
    envelope = opened(sealed)[0].encode()
    counts = {
        side: [signing.good_signatures(envelope, t), t.threshold]
        for side, t in (("old", old), ("new", new))
    }
    atomic.write(out, sealed)
    return {
        "file": str(out),
        "version": new.version,
        "threshold": wanted,
        "keys": [key.keyid for key in new.keys],
        "signatures": counts,
        "complete": all(have >= need for have, need in counts.values()),
    }


def revoke(
    bundle: Path,
    task: int,
    revision: int,
    keys: signing.Signers,
    out: Path,
    after: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write a packet that takes devices of a bundle back to before `task`, wherever they hold it in a revision up to `revision`.

    after: as for `rotate`; it decides only how many of the signatures are said to count. Raises UsageError for a task that the
    bundle itself knows.
    """
    flashed = open_bundle(bundle)
    manifest, obeyed = flashed.manifest, follow_trust(flashed.trust, after)
    if task <= manifest.task:
        raise UsageError(
            f"--task {task}: {bundle} knows the tasks up to {manifest.task} itself; no packet can take them back"
        )
    if not 0 <= revision <= LIMITS.revision:
        raise UsageError(f"--revision {revision}: between 0 and {LIMITS.revision}")
    _require_new(out)
    signers = signing.signers_of(keys)
    sealed = control.build_revocation(
        manifest.lineage, Revoked(task, revision), lambda payload: signing.sign(payload, signers)
    )
    atomic.write(out, sealed)
    count = signing.good_signatures(opened(sealed)[0].encode(), obeyed)
    facts = {"file": str(out), "task": task, "revision": revision, "bytes": len(sealed)}
    return facts | {"signatures": count, "threshold": obeyed.threshold}


def _public(names: Sequence[str]) -> dict[str, Any]:
    paths = [signing.find_key(name, ".pub") for name in names]
    return {
        key.keyid: key for key in (signing.load_public(path) for path in paths if path is not None)
    }


def _require_new(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists already: choose another name")
    if not out.name.endswith(packet.SUFFIX):
        raise InputError(f"{out}: the name of a packet ends with {packet.SUFFIX}")
