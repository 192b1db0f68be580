"""What the checks work on: a bundle, its packets, a scratch folder, and what the host answered."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..device.device import Device
from ..errors import InputError, SdloraError
from ..formats import packet
from ..formats.bundle import Bundle, open_bundle
from ..formats.canonical import parse_json, sha256
from ..storage import atomic

EXPECTED, EXPECTED_FORMAT = "expected.json", "sdlora-edge/expected/1"


@dataclass(frozen=True)
class Kit:
    """A device's files, and a folder to try them in.

    chain: packets that follow from the bundle, in order. scratch: an empty folder. expected: a
    folder made by `sdlora-edge expect`, or None.
    """

    bundle: Path
    chain: tuple[Path, ...]
    scratch: Path
    expected: Path | None = None

    @contextlib.contextmanager
    def store(self) -> Iterator[Path]:
        """A new store of the bundle, removed afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            Device.init(self.bundle, Path(folder) / "store")
            yield Path(folder) / "store"


@contextlib.contextmanager
def open_kit(
    bundle: Path, packets: Path, expected: Path | None = None, scratch: Path | None = None
) -> Iterator[Kit]:
    """Check the files, and make a scratch folder for the time of the block.

    Args:
        bundle: the bundle that devices are flashed with.
        packets: a folder with packets that follow from it.
        expected: a folder made by `sdlora-edge expect`.
        scratch: a folder on the disk to test, made if it is missing. Default: where temporary
            files go.

    Raises:
        InputError: the bundle or the record of what is expected is damaged, or no packet in the
            folder follows from the bundle.
        StorageError: the scratch folder cannot be written.
    """
    if expected is not None:
        Expected.read(expected)
    chain = _chain(open_bundle(bundle), packets)
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="sdlora-edge-", dir=scratch)
    except OSError as error:
        raise atomic.unwritten(scratch or Path("the temporary folder"), error) from error
    with made as folder:
        yield Kit(bundle, chain, Path(folder), expected)


def _chain(bundle: Bundle, folder: Path) -> tuple[Path, ...]:
    """The packets that lead on from the bundle's state. Other kinds and keys are left out."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob(f"*{packet.SUFFIX}")):
        with contextlib.suppress(SdloraError):
            one = packet.read(atomic.read(path, packet.LIMITS.packet), bundle.trust)
            if one.lineage == bundle.manifest.lineage:
                found.setdefault(one.begin, (one.end, path))
    state, chain = bundle.manifest.state, []
    while state in found:
        state, path = found.pop(state)
        chain.append(path)
    if not chain:
        raise InputError(
            f"{folder} holds no packet that this bundle trusts and that follows from its task "
            f"{bundle.manifest.task}: name a folder with packets of the same run"
        )
    return tuple(chain)


@dataclass(frozen=True, eq=False)
class Expected:
    """What the host answers. images: files. logits: float32 (images, classes), by state digest."""

    images: tuple[Path, ...]
    logits: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Expected:
        """Raises InputError if the folder is damaged."""
        known = parse_json(atomic.read(folder / EXPECTED), EXPECTED)
        if known.get("format") != EXPECTED_FORMAT:
            raise InputError(
                f"{folder / EXPECTED} is not of format {EXPECTED_FORMAT}: record it again with "
                "sdlora-edge expect"
            )
        for name, digest in known["images"].items():
            if sha256(atomic.read(folder / name)) != digest:
                raise InputError(
                    f"{folder / name} is not the image that was recorded: copy the folder again"
                )
        states = known["states"].items()
        return cls(
            tuple(folder / name for name in known["images"]),
            {digest: np.array(state["logits"], np.float32) for digest, state in states},
        )
