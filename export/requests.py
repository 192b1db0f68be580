"""What `export`, `packet` and `expect` are asked to do.

It is checked here, before torch is imported and any model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device.chain import follow_trust
from ..errors import InputError, NotForThisDevice, NothingToDo, TrustError, UsageError
from ..formats import signing
from ..formats.bundle import CONSTANTS, INPUTS, Bundle, open_bundle
from ..formats.encoding import ENCODINGS
from ..formats.limits import LIMITS
from ..inputs.modality import kind_of, of_kind
from ..train import folder, splits

if TYPE_CHECKING:
    Key = Path | str | signing.Signers

TARGETS = ("onnx", "executorch")
WEB = "web"
PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8", "int8-dynamic"),
    "executorch": ("fp32", "int8", "int8-dynamic"),
}
ADAPTER, ADAPTER_SUFFIX = "onnx-adapter", ".onnx_adapter"
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class ExportOptions:
    """How a bundle is made.

    Attributes:
        threshold: how many of the trusted keys must sign a packet.
        target: one of TARGETS.
        precision: one of PRECISIONS[target], for all that is not adapted.
        weights_as: `bundle.INPUTS` or CONSTANTS. None: the one that serves faster.
        max_classes: room in the head. None: any number with inputs, else 1000 or twice those known.
        tolerance: largest logit difference to torch. None: the precision's own.
        min_agreement: share of test images that must get the same class as in torch. None: the
            precision's own.
        runs_in: WEB for onnxruntime-web and onnxruntime-node. None: for every other ONNX Runtime.
        also: ADAPTER writes the merged weights as a file beside the bundle too.
        fleet_root: root of trust of the fleet repository that devices will follow (its
            `1.root.json`), to be a part of the bundle.
    """

    threshold: int = 1
    target: str = "onnx"
    precision: str = "fp32"
    weights_as: str | None = None
    max_classes: int | None = None
    tolerance: float | None = None
    min_agreement: float | None = None
    also: str | None = None
    fleet_root: Path | None = None
    runs_in: str | None = None

    def require(self) -> None:
        """Raises UsageError for words that are unknown, or exclude each other."""
        self._require_target()
        if self.runs_in is not None:
            self._require_web()
        if self.weights_as not in (None, INPUTS, CONSTANTS):
            raise UsageError(
                f"--weights-as {self.weights_as!r} is unknown: choose {INPUTS} or {CONSTANTS}"
            )
        if self.also not in (None, ADAPTER):
            raise UsageError(f"--also {self.also!r} is unknown: choose {ADAPTER}")
        if self.also and (self.target, self.weights_as or INPUTS) != ("onnx", INPUTS):
            raise UsageError(
                f"--also {self.also} goes with --target onnx --weights-as {INPUTS} only: change "
                "these options, or leave --also out"
            )
        require_bounds(self.tolerance, self.min_agreement)

    def _require_target(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"target {self.target!r} is unknown: choose {', '.join(TARGETS)}")
        if self.precision not in PRECISIONS[self.target]:
            raise UsageError(
                f"target {self.target} has no precision {self.precision!r}: choose "
                f"{', '.join(PRECISIONS[self.target])}"
            )
        if self.target == "executorch" and self.weights_as == INPUTS:
            raise UsageError(
                f"target executorch takes weights as {CONSTANTS} only: as inputs they would not "
                "reach XNNPACK"
            )
        if self.target == "executorch" and find_spec("executorch") is None:
            raise UsageError(
                "target executorch needs the package: pip install 'sdlora-edge[executorch]'"
            )

    def _require_web(self) -> None:
        if self.runs_in != WEB:
            raise UsageError(f"--for {self.runs_in!r} is unknown: choose {WEB}")
        if self.target != "onnx" or self.weights_as is not None or self.also is not None:
            raise UsageError(
                f"--for {WEB} goes with --target onnx only, and decides --weights-as: leave "
                "--target, --weights-as and --also out"
            )

    def require_room(self, known: int) -> None:
        """Raises UsageError if max_classes is out of bounds, or less than the known classes."""
        if (most := self.max_classes) is None:
            return
        if not 0 < most <= MAX_CLASSES:
            raise UsageError(f"--max-classes {most}: choose a number between 1 and {MAX_CLASSES}")
        if most < known:
            raise UsageError(f"--max-classes {most}: the run knows {known} classes already")


@dataclass(frozen=True)
class BundleRequest:
    """What `bundles.export` is asked for.

    Attributes:
        out: the new folder.
        task: the state to export is the one after this task. None: the last.
        trust: names or files of public keys. None: the only one in keys/.
        options: all the rest.
    """

    out: Path
    task: int | None = None
    trust: Sequence[Path | str] | None = None
    options: ExportOptions = field(default_factory=ExportOptions)

    def require(self, run: Path) -> signing.Trust:
        """The keys that the bundle trusts.

        Raises UsageError or InputError for what cannot be exported from a run.
        """
        self.options.require()
        kind = of_kind(kind_of(folder.require_begun(run).backbone.backbone))
        if self.options.runs_in == WEB and not kind.spatial:
            raise UsageError(
                f"--for {WEB} is for models that read images, and this one reads {kind.noun}s: "
                "leave it out"
            )
        task = folder.require_task(run, self.task)
        if not (known := len(folder.classes(run, task))):
            raise UsageError(f"task {task} knows no class yet: export a later one with --task")
        self.options.require_room(known)
        for path in (self.out, self.adapter):
            require_new(path)
        return _trusted(self.trust, self.options.threshold)

    @property
    def adapter(self) -> Path | None:
        """The file beside the bundle, if one is asked for."""
        return Path(str(self.out) + ADAPTER_SUFFIX) if self.options.also else None


def keys_of(key: Key) -> signing.Signers:
    """One private key, or several, as a list."""
    return [key] if isinstance(key, (str, Path)) else key


def require_new(out: Path | None) -> None:
    """Raises UsageError if something lies where an output is to be written."""
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already: choose another --out")


def require_bounds(tolerance: float | None, min_agreement: float | None) -> None:
    """Raises UsageError for bounds of a comparison that make no sense."""
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g} is not between 0 and 1: choose another")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(
            f"--min-agreement {min_agreement:g} is not between 0 and 1: choose another"
        )


def require_encoding(encoding: str | None) -> None:
    """Raises UsageError for an unknown encoding."""
    if encoding not in (None, *ENCODINGS):
        raise UsageError(f"encoding {encoding!r} is unknown: choose {', '.join(ENCODINGS)}")


def require_same_run(bundle: Bundle, run: Path) -> None:
    """Raises NotForThisDevice for the bundle of another run."""
    folder.require_begun(run)
    manifest = bundle.manifest
    if folder.lineage(run, manifest.projections, manifest.encoding) not in (None, manifest.lineage):
        raise NotForThisDevice(
            f"{bundle.path} was not exported from {run}: name the bundle of this run"
        )


@dataclass(frozen=True)
class PacketOptions:
    """Which packets are built, and how.

    Attributes:
        task: only this task. None: every task after the bundle's.
        encoding: must be the bundle's, which is the default.
        revision: of `task` and all after it, noted in the run for good. It replaces a revoked task.
        after: the trust packets that the devices have applied, in order.
        images: a folder or dataset to score the states before and after each packet on.
        max_megapixels: skip larger images of it. None: the run's setting.
    """

    task: int | None = None
    encoding: str | None = None
    revision: int | None = None
    after: Sequence[Path | str] = ()
    images: Path | str | None = None
    max_megapixels: int | None = None


@dataclass(frozen=True)
class PacketRequest:
    """What `packets.build` is asked for. out: the packets' folder. None: packets/ in the run."""

    run: Path
    bundle: Path
    keys: signing.Signers
    out: Path | None = None
    options: PacketOptions = field(default_factory=PacketOptions)

    def require(self) -> Signing:
        """What the packets are signed for, and by whom.

        Raises what `packets.build_packets` raises before it builds a packet.
        """
        options = self.options
        require_encoding(options.encoding)
        bundle = open_bundle(self.bundle)
        if options.encoding not in (None, takes := bundle.manifest.encoding):
            raise NotForThisDevice(
                f"{self.bundle} takes packets in {takes}: for {options.encoding}, export a bundle "
                f"with --encoding {options.encoding}"
            )
        require_same_run(bundle, self.run)
        last = self._require_tasks(bundle)
        bundle.require_room(len(folder.classes(self.run, last)))
        self._require_revision()
        if options.images is not None:
            splits.load_for(folder.settings(self.run), str(options.images))
        keys = follow_trust(bundle.trust, options.after)
        signers = signing.signers_of(self.keys)  # last: this may ask for a passphrase
        _require_obeyed(signers, keys, self.bundle)
        return Signing(bundle, signers, keys)

    def _require_tasks(self, bundle: Bundle) -> int:
        """The last task to build."""
        task = self.options.task
        first, last = bundle.manifest.task + 1, folder.last_task(self.run)
        if task is not None and not first <= task <= last:
            raise UsageError(
                f"--task {task}: {self.bundle} knows the tasks up to {first - 1}, and {self.run} "
                f"has {last}"
            )
        if first > last:
            raise NothingToDo(
                f"{self.bundle} knows all {last} tasks of {self.run}: nothing to ship"
            )
        return task or last

    def _require_revision(self) -> None:
        if (revision := self.options.revision) is None:
            return
        if self.options.task is None:
            raise UsageError(
                "--revision goes with --task: name the task that is replaced; those after it follow"
            )
        if not 0 <= revision <= LIMITS.revision:
            raise UsageError(
                f"--revision {revision}: choose a number between 0 and {LIMITS.revision}"
            )
        folder.require_revision(self.run, revision)


@dataclass(frozen=True, eq=False)
class Signing:
    """A bundle, the signers of its packets, and the keys that its devices trust now."""

    bundle: Bundle
    signers: list[Any]
    keys: signing.Trust


def expectation(run: Path, images: Path, out: Path) -> list[Path]:
    """The files that `expected.record` reads.

    Raises UsageError if `out` exists, InputError if there are no such files.
    """
    require_new(out)
    folder.require_begun(run)
    if not images.is_dir() or not (paths := sorted(p for p in images.iterdir() if p.is_file())):
        raise InputError(
            f"{images} is not a folder with files in it: name one that has them directly inside"
        )
    return paths


def _trusted(names: Sequence[Path | str] | None, threshold: int) -> signing.Trust:
    paths = (
        [signing.find_key(name, ".pub") for name in names]
        if names
        else [signing.find_key(None, ".pub")]
    )
    keys = tuple(signing.load_public(path) for path in paths if path is not None)
    if len({key.keyid for key in keys}) < len(keys):
        raise UsageError("--trust names one key twice: name each key once")
    if keys and threshold > len(keys):
        raise UsageError(
            f"--threshold {threshold}: {len(keys)} key(s) cannot meet it; lower it, or trust more"
        )
    return signing.Trust(keys, threshold)


def _require_obeyed(signers: Sequence[Any], keys: signing.Trust, bundle: Path) -> None:
    """Raises TrustError if the devices do not trust a signer, UsageError if one is named twice."""
    names = [signer.public_key.keyid for signer in signers]
    if len(set(names)) < len(names):
        raise UsageError("--key names one key twice: name each key once")
    if not keys.keys:
        raise TrustError(f"{bundle} trusts no key: export it again with --trust")
    if unknown := set(names) - {key.keyid for key in keys.keys}:
        raise TrustError(
            f"signature refused: {bundle} does not trust key {sorted(unknown)[0][:12]}: sign with "
            "a key it trusts, or name the trust packets that the devices have applied with --after"
        )
