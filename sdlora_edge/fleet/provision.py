"""`device init --from URL`: makes a store from a bundle in a fleet repository.

Everything lies beside the new store, in `STORE.incoming`, until the store is made. After a cut the
same command goes on where it ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..device.device import Device
from ..errors import InputError, UsageError
from ..storage import atomic, disk
from .fetching import Fetcher
from .identity import Changes, configure
from .incoming import Incoming, Wanted
from .targets import BUNDLE, BUNDLES, Target
from .trusted import TrustedMetadata, View


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from.

    Attributes:
        url: Of the repository.
        root: Bytes of the repository's `1.root.json`, got from a place that you trust.
        bundle: Beginning of the bundle's id, or its name, such as "onnx fp32". None takes the
            newest bundle, if all have one name.
    """

    url: str
    root: bytes
    bundle: str | None = None


def init_from(
    source: Source,
    store: Path,
    fetcher: Fetcher,
    changes: Changes,
    make: Callable[[Path, Path], Device] = Device.init,
) -> Device:
    """Download a bundle, make a store of it, and make the device a member of the fleet.

    Args:
        source: The repository, its root of trust, and the bundle.
        store: The new store.
        fetcher: The link.
        changes: What the device's identity is to hold.
        make: Makes the store of a bundle's folder, as `Device.init`.

    Raises:
        UsageError: The store exists, or it is not clear which bundle is meant.
        LinkError, TrustError: The repository cannot be reached, or is refused.
        InputError, HealthError: As `Device.init`.
    """
    staging = store.with_name(f"{store.name}.incoming")
    made = disk.size(store) is not None
    if made and disk.size(staging) is None:  # else a cut came after the store was made
        raise UsageError(f"{store} exists already: choose another name, or remove it first")
    metadata = TrustedMetadata(staging, source.url, fetcher)
    metadata.anchor(source.root)
    with metadata.refresh(time.time()) as view:
        bundle = _chosen(view, source.bundle)
        folder = _downloaded(view, bundle, staging, fetcher)
    device = Device.open(store) if made else make(folder, store)
    if device.bundle.id != bundle.digest:
        raise UsageError(f"{store} was made from another bundle: remove it, or choose another name")
    TrustedMetadata(store, source.url, fetcher).anchor(source.root)
    configure(store, changes)
    with contextlib.suppress(OSError):
        atomic.remove(staging)
    return device


def _chosen(view: View, name: str | None) -> Target:
    bundles = [t for t in view.targets if t.published.kind == BUNDLE]
    if not bundles:
        raise InputError(
            "the repository holds no bundle: publish one with sdlora-edge fleet publish"
        )
    fitting = [
        t for t in bundles if name is None or t.published.name == name or t.digest.startswith(name)
    ]
    names = {t.published.name for t in fitting or bundles}
    if len(names) != 1 or not fitting:
        known = ", ".join(sorted(f"{t.digest[:12]} ({t.published.name})" for t in bundles))
        raise UsageError(f"the repository holds these bundles: {known}: choose one with --bundle")
    return max(fitting, key=lambda t: (t.published.revision, t.published.sequence))


def _downloaded(view: View, bundle: Target, staging: Path, fetcher: Fetcher) -> Path:
    """The folder of a bundle, complete. Its files are verified one by one."""
    begin = f"{BUNDLES}{bundle.digest}/"
    files = {path[len(begin) :]: f for path, f in view.files.items() if path.startswith(begin)}
    folder, incoming = staging / bundle.digest, Incoming(staging / "pieces", staging)
    for name, file in files.items():
        if not name or name != Path(name).name or name.startswith("."):
            raise InputError(f"the bundle has a file with the name {name[:80]!r}: publish it again")
        digest, url = file.hashes["sha256"], view.url(file)
        target = folder / name
        if disk.size(target) != file.length or atomic.sha256_of(target)[0] != digest:
            done = incoming.fetch(Wanted(digest, file.length, partial(fetcher.stream, url)))
            with atomic.reading(target):
                atomic.make_folder(folder)
                disk.rename(done, target)
                disk.sync(folder)
    return folder
