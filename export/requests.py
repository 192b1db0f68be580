"""What `export`, `packet` and `expect` are asked to do, checked before torch is imported and any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..device.chain import follow_trust
from ..errors import InputError, NotForThisDevice, NothingToDo, TrustError, UsageError
from ..formats import signing
from ..formats.bundle import CONSTANTS, INPUTS, Bundle, open_bundle
from ..formats.container import LIMITS
from ..formats.encoding import ENCODINGS
from ..train import folder, splits

TARGETS = ("onnx", "executorch")
PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8", "int8-dynamic"),
    "executorch": ("fp32", "int8", "int8-dynamic"),
}
ADAPTER, ADAPTER_SUFFIX = "onnx-adapter", ".onnx_adapter"
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class BundleRequest:
    """The options of `bundles.export_bundle`, which describes them."""

    out: Path
    task: int | None = None
    trust: Sequence[str] | None = None
    threshold: int = 1
    target: str = "onnx"
    precision: str = "fp32"
    weights_as: str | None = None
    max_classes: int | None = None
    tolerance: float | None = None
    min_agreement: float | None = None
    also: str | None = None

    def require(self, run: Path) -> signing.Trust:
        """The keys that the bundle trusts. Raises UsageError, InputError for what cannot be exported from a run."""
        self._require_words()
        folder.require_begun(run)
        task = folder.require_task(run, self.task)
        if not (known := len(folder.classes(run, task))):
            raise UsageError(f"task {task} knows no class yet: export a later one with --task")
        if self.max_classes is not None and not 0 < self.max_classes <= MAX_CLASSES:
            raise UsageError(f"--max-classes {self.max_classes} is not between 1 and {MAX_CLASSES}")
        if self.max_classes is not None and self.max_classes < known:
            raise UsageError(
                f"--max-classes {self.max_classes}: the run knows {known} classes already"
            )
        for path in (self.out, self.adapter):
            require_new(path)
        return _trusted(self.trust, self.threshold)

    def require_only_bounds(self) -> None:
        """Raises UsageError for options that a bundle which is only compared says itself."""
        require_bounds(self.tolerance, self.min_agreement)
        if replace(self, tolerance=None, min_agreement=None) != BundleRequest(Path("bundle")):
            raise UsageError(
                "--check takes --run, --tolerance and --min-agreement alone: the bundle says the rest itself"
            )

    @property
    def adapter(self) -> Path | None:
        """The file beside the bundle, if there is to be one."""
        return Path(str(self.out) + ADAPTER_SUFFIX) if self.also else None

    def _require_words(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"target {self.target!r} is none of {', '.join(TARGETS)}")
        if self.precision not in PRECISIONS[self.target]:
            raise UsageError(
                f"precision {self.precision!r} is none of {', '.join(PRECISIONS[self.target])} of target {self.target}"
            )
        if self.weights_as not in (None, INPUTS, CONSTANTS):
            raise UsageError(
                f"--weights-as {self.weights_as!r} is neither {INPUTS} nor {CONSTANTS}"
            )
        if self.target == "executorch" and self.weights_as == INPUTS:
            raise UsageError(
                f"target executorch takes weights as {CONSTANTS} alone: as inputs they would not reach XNNPACK"
            )
        if self.target == "executorch" and find_spec("executorch") is None:
            raise UsageError(
                "target executorch needs the package: pip install 'sdlora-edge[executorch]'"
            )
        if self.also not in (None, ADAPTER):
            raise UsageError(f"--also {self.also!r} is unknown: this version makes {ADAPTER}")
        if self.also and (self.target, self.weights_as or INPUTS) != ("onnx", INPUTS):
            raise UsageError(
                f"--also {self.also} goes with --target onnx --weights-as {INPUTS} alone"
            )
        require_bounds(self.tolerance, self.min_agreement)


def require_new(out: Path | None) -> None:
    """Raises UsageError if there is something in the place of an output."""
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already: choose another --out")


def require_bounds(tolerance: float | None, min_agreement: float | None) -> None:
    """Raises UsageError for bounds of a comparison that make no sense."""
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g} is not between 0 and 1")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g} is not between 0 and 1")


def require_encoding(encoding: str | None) -> None:
    """Raises UsageError for an encoding that there is not."""
    if encoding not in (None, *ENCODINGS):
        raise UsageError(f"encoding {encoding!r} is none of {', '.join(ENCODINGS)}")


def require_same_run(bundle: Bundle, run: Path) -> None:
    """Raises NotForThisDevice for the bundle of another run."""
    folder.require_begun(run)
    manifest = bundle.manifest
    if folder.lineage(run, manifest.projections, manifest.encoding) not in (None, manifest.lineage):
        raise NotForThisDevice(
            f"{bundle.path} was not exported from {run}: name the bundle of this run"
        )


@dataclass(frozen=True)
class PacketRequest:
    """The options of `packets.build_packets`, which describes them."""

    run: Path
    bundle: Path
    keys: signing.Signers
    task: int | None = None
    out: Path | None = None
    encoding: str | None = None
    revision: int | None = None
    after: Sequence[Path] = ()
    images: str | None = None

    def require(self) -> Signing:
        """What the packets are signed for and by. Raises what `packets.build_packets` raises before it builds any."""
        require_encoding(self.encoding)
        bundle = open_bundle(self.bundle)
        if self.encoding not in (None, takes := bundle.manifest.encoding):
            raise NotForThisDevice(
                f"{self.bundle} takes packets in {takes}: for {self.encoding}, export a bundle with --encoding {self.encoding}"
            )
        signers = signing.signers_of(self.keys)
        require_same_run(bundle, self.run)
        first, last = bundle.manifest.task + 1, folder.last_task(self.run)
        if self.task is not None and not first <= self.task <= last:
            raise UsageError(
                f"--task {self.task}: {self.bundle} knows the tasks up to {first - 1}, and {self.run} has {last}"
            )
        if first > last:
            raise NothingToDo(
                f"{self.bundle} knows all {last} tasks of {self.run}: nothing to ship"
            )
        bundle.require_room(len(folder.classes(self.run, self.task or last)))
        keys = follow_trust(bundle.trust, self.after)
        _require_obeyed(signers, keys, self.bundle)
        if self.revision is not None:
            if self.task is None:
                raise UsageError(
                    "--revision goes with --task: name the task that is replaced; those after it follow"
                )
            if not 0 <= self.revision <= LIMITS.revision:
                raise UsageError(f"--revision {self.revision}: between 0 and {LIMITS.revision}")
            folder.require_revision(self.run, self.revision)
        if self.images is not None:
            splits.load_for(folder.settings(self.run), self.images)
        return Signing(bundle, signers, keys)


@dataclass(frozen=True, eq=False)
class Signing:
    """A bundle, those who sign its packets, and the keys that its devices obey now."""

    bundle: Bundle
    signers: Sequence[Any]
    keys: signing.Trust


def expectation(run: Path, images: Path, out: Path) -> list[Path]:
    """The files that `expected.record` reads. Raises UsageError, InputError where it cannot, or `out` exists."""
    require_new(out)
    folder.require_begun(run)
    if not images.is_dir() or not (paths := sorted(p for p in images.iterdir() if p.is_file())):
        raise InputError(
            f"{images} is not a folder with images in it: name one, without folders inside"
        )
    return paths


def _trusted(names: Sequence[str] | None, threshold: int) -> signing.Trust:
    paths = (
        [signing.find_key(name, ".pub") for name in names]
        if names
        else [signing.find_key(None, ".pub")]
    )
    keys = tuple(signing.load_public(path) for path in paths if path is not None)
    if len({key.keyid for key in keys}) < len(keys):
        raise UsageError("--trust names one key twice")
    if keys and threshold > len(keys):
        raise UsageError(f"--threshold {threshold} cannot be met by {len(keys)} key(s)")
    return signing.Trust(keys, threshold)


def _require_obeyed(signers: Sequence[Any], keys: signing.Trust, bundle: Path) -> None:
    """Raises TrustError for a signer whose key the devices do not obey, UsageError for one named twice."""
    names = [signer.public_key.keyid for signer in signers]
    if len(set(names)) < len(names):
        raise UsageError("--key names one key twice")
    if not keys.keys:
        raise TrustError(f"{bundle} trusts no key: export it again with --trust")
    if unknown := set(names) - {key.keyid for key in keys.keys}:
        raise TrustError(
            f"signature refused: {bundle} does not trust key {sorted(unknown)[0][:12]}: sign with a key it trusts, or name the "
            "trust packets that the devices have applied"
        )
