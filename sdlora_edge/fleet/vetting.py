"""What may be published: packets are verified with the keys of a published bundle of their lineage.

The repository's keys say only that a file belongs to the fleet. Here the packet's own signatures
are checked, so that nothing is published that every device would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..device.chain import follow_trust
from ..errors import InputError, NotForThisDevice, NothingToDo, SdloraError, TrustError, naming
from ..formats.bundle import MANIFEST, Bundle, open_bundle
from ..formats.canonical import sha256
from ..formats.container import SUFFIX
from ..formats.control import Revocation, Rotation, read_any
from ..formats.limits import LIMITS
from ..formats.packet import Packet, unverified_manifest
from ..formats.signing import Trust
from ..state import next_digest
from ..storage import atomic
from .targets import BUNDLE, BUNDLES, REVOCATION, TRUST, UPDATE, Published, Target


@dataclass(frozen=True)
class Offered:
    """A file that may be published.

    Attributes:
        source: The file.
        path: Its target path.
        published: None for a file of a bundle other than its manifest.
    """

    source: Path
    path: str
    size: int
    digest: str
    published: Published | None


@dataclass
class _Chain:
    """The keys of one bundle, and those that trust packets have put in their place.

    valid: any of them may have signed a packet that is new here.
    """

    lineage: str
    valid: list[Trust]


@dataclass
class Keys:
    """Who may sign packets: the keys of each bundle, changed by trust packets.

    Args:
        old: The published trust packets, in order. The keys that they replace sign no new packet.
    """

    old: Sequence[bytes] = ()
    chains: list[_Chain] = field(default_factory=list)

    def add(self, lineage: str, trust: Trust) -> None:
        """Know a bundle."""
        for data in self.old:
            with suppress(TrustError, NothingToDo):  # a packet for the keys of other bundles
                trust = follow_trust(trust, [data])
        self.chains.append(_Chain(lineage, [trust]))

    def follow(self, data: bytes) -> Rotation:
        """Follow a new trust packet. The keys that it replaces still sign what comes with it.

        Raises:
            NotForThisDevice: No bundle is known.
            NothingToDo: Its keys are in force.
            TrustError: It is signed by the keys of no bundle.
        """
        last: SdloraError = _no_bundle("it changes keys")
        found = None
        for chain in self.chains:
            try:
                after = follow_trust(chain.valid[-1], [data])
            except (TrustError, NothingToDo) as error:
                last = error
                continue
            found = read_any(data, chain.valid[-1])
            chain.valid.append(after)
        if not isinstance(found, Rotation):
            raise last
        return found

    def read(self, data: bytes, lineage: str) -> Packet | Revocation:
        """Verify an update or a revocation.

        Raises:
            NotForThisDevice: No bundle of its lineage is known.
            TrustError: Signatures are missing.
        """
        last: SdloraError = _no_bundle(f"it belongs to lineage {lineage[:12]}")
        for trust in (t for c in self.chains if c.lineage == lineage for t in c.valid):
            try:
                found = read_any(data, trust)
            except TrustError as error:
                last = error
                continue
            if not isinstance(found, Rotation):
                return found
        raise last


def _no_bundle(why: str) -> NotForThisDevice:
    return NotForThisDevice(
        f"{why}, and no bundle that could verify it is published: publish the bundle, or name it "
        "with --bundle"
    )


def examine(
    files: Sequence[Path], bundles: Sequence[Path], keys: Keys, published: Mapping[str, Target]
) -> list[Offered]:
    """Verify files and say what is published of them.

    Args:
        files: Packets, folders of packets, and bundles.
        bundles: Bundles that verify packets and are not published.
        keys: Of the published bundles.
        published: Targets by their digests. They were verified before.

    Raises:
        InputError: A file is neither a packet nor a bundle, or is damaged.
        NotForThisDevice: No bundle of a packet's lineage is known.
        TrustError: A packet's signatures are missing.
    """
    folders = [path for path in files if (path / MANIFEST).is_file()]
    packets = [one for path in files if path not in folders for one in _packets(path)]
    opened = [open_bundle(path) for path in folders]
    for bundle in (*opened, *map(open_bundle, bundles)):
        keys.add(bundle.manifest.lineage, bundle.trust)
    offered = [one for bundle in opened for one in _files(bundle)]
    for _, path in sorted((_place(path), path) for path in packets):
        offered.append(_packet(path, keys, published))
    return list({one.path: one for one in offered}.values())


def _packets(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob(f"*{SUFFIX}")):
        return found
    raise InputError(f"{path} holds neither {MANIFEST} nor packets (*{SUFFIX}): name another")


def _place(path: Path) -> int:
    """Where a packet comes: trust packets first, by version. Nothing of it is verified yet."""
    with naming(path):
        claims = unverified_manifest(atomic.receive(path, LIMITS.packet))
    keys = claims.get("trust")
    version = keys.get("version") if isinstance(keys, dict) else None
    return version if isinstance(version, int) else LIMITS.revision + 1


def _packet(path: Path, keys: Keys, published: Mapping[str, Target]) -> Offered:
    data = atomic.receive(path, LIMITS.packet)
    digest = sha256(data)
    if known := published.get(digest):
        return Offered(path, known.path, len(data), digest, known.published)
    with naming(path):
        claims = unverified_manifest(data)
        lineage = str(claims.get("lineage", ""))
        found = keys.follow(data) if claims["kind"] == TRUST else keys.read(data, lineage)
        says = _published(found)
    return Offered(path, says.path(digest), len(data), digest, says)


def _published(found: Packet | Rotation | Revocation) -> Published:
    if isinstance(found, Rotation):
        return Published(TRUST, "", "", "", found.trust.version, 0, "")
    if isinstance(found, Revocation):
        named = found.revoked
        return Published(REVOCATION, found.lineage, "", "", named.sequence, named.revision, "")
    end = found.begin
    for update in found.updates:
        end = next_digest(end, update.digest())
    if end != found.end:
        raise InputError("it does not lead to the state it names: build it again")
    return Published(
        UPDATE,
        found.lineage,
        found.begin,
        found.end,
        found.sequence,
        found.revision,
        found.update.name,
    )


def _files(bundle: Bundle) -> list[Offered]:
    manifest, folder = bundle.manifest, f"{BUNDLES}{bundle.id}/"
    name = f"{manifest.target} {manifest.precision}"
    published = Published(
        BUNDLE, manifest.lineage, "", manifest.state, manifest.task, manifest.revision, name
    )
    size = (bundle.path / MANIFEST).stat().st_size
    first = Offered(bundle.path / MANIFEST, folder + MANIFEST, size, bundle.id, published)
    return [
        first,
        *(
            Offered(bundle.path / one, folder + one, entry["size"], entry["sha256"], None)
            for one, entry in manifest.files.items()
        ),
    ]
