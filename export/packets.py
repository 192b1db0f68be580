"""Packets of a run. Each is proved on a scratch device before it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..device.device import Device
from ..errors import InputError, NotForThisDevice, TrustError
from ..formats import packet, signing
from ..formats.bundle import MANIFEST, TRUST, Bundle, describe
from ..formats.canonical import dump_json
from ..formats.container import countersigned, opened
from ..formats.limits import LIMITS
from ..inputs import canary
from ..method.merged import logits_of
from ..progress import stage
from ..results import Result
from ..state import TaskState
from ..storage import atomic
from ..train.evaluator import Evaluator, decoded_by_class, host_logits, images_of
from ..train.plan import limited
from ..train.run import Run
from ..train.splits import load_for
from .requests import PacketOptions, PacketRequest, Signing, keys_of

if TYPE_CHECKING:
    from .requests import Key


@dataclass(frozen=True)
class Accuracies(Result):
    """Shares of right answers on images of the classes known after a task.

    Attributes:
        before: in the state before the task, where images of its new classes are all wrong.
        after: in the state after it.
        after_without_old_rows: in the state after it, if known classes had kept their head rows.
        images: how many images were scored.
    """

    before: float
    after: float
    after_without_old_rows: float
    images: int


@dataclass(frozen=True)
class BuiltPacket(Result):
    """A packet that was written.

    Attributes:
        file: the packet.
        task: number of its task; `name` is the task's name.
        classes: the classes that are new with it.
        retired: the classes that are never answered again.
        renamed: (old name, new name) of classes.
        encoding: of its factors.
        revision: of its task.
        weight_error: largest absolute error that the encoding makes in a merged weight.
        old_rows: how many rows of known classes it changes, in `old_rows_bytes` bytes.
        bytes: size of the file.
        signatures: how many of the devices' keys have signed it, of the `threshold` needed.
        canary_difference: largest logit difference on the scratch device; None if it runs nothing.
        accuracy: None if no images were named.
    """

    file: Path
    task: int
    name: str
    classes: tuple[str, ...]
    retired: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    encoding: str
    revision: int
    weight_error: float
    old_rows: int
    old_rows_bytes: int
    bytes: int
    signatures: int
    threshold: int
    canary_difference: float | None
    accuracy: Accuracies | None

    def to_dict(self) -> dict[str, Any]:
        """Without `accuracy` if no images were named."""
        shown = super().to_dict()
        if self.accuracy is None:
            del shown["accuracy"]
        return shown


def build_packets(
    run: Run | Path | str,
    bundle: Path | str,
    key: Key,
    out: Path | str | None = None,
    options: PacketOptions | None = None,
) -> list[BuiltPacket]:
    """Sign a packet for every task after the bundle's.

    Each packet is proved on a scratch device before it is written.

    Args:
        run: the run, or its folder.
        bundle: the bundle that the devices were flashed with.
        key: one private key, or several: files, or what `signing.load_signer` returns.
        out: the packets' folder. Default: packets/ in the run.
        options: which tasks, and how.

    Raises:
        NothingToDo: the bundle knows every task.
        NotForThisDevice: bundle and run are of different lineages or encodings.
        UsageError: the bundle knows the task already, or the run has no such task.
        TrustError: the devices do not trust a key.
        HealthError: a device would not compute what this host computes.
    """
    request = PacketRequest(
        run.path if isinstance(run, Run) else Path(run),
        Path(bundle),
        keys_of(key),
        None if out is None else Path(out),
        options or PacketOptions(),
    )
    return build(request, request.require())


def build(request: PacketRequest, by: Signing) -> list[BuiltPacket]:
    """`build_packets`, of a request that was checked."""
    bundle, options = by.bundle, request.options
    own = Run.open(request.run)
    run = own.encoded(bundle.manifest.encoding)
    first, last = bundle.manifest.task + 1, options.task or len(run.updates)
    if bundle.manifest.lineage != run.lineage or (
        first <= len(run.states) and run.states[first - 1].digest != bundle.manifest.state
    ):
        raise NotForThisDevice(
            f"{bundle.path} was not exported from {run.path}: name the bundle of this run"
        )
    out = request.out or request.run / "packets"
    built = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        stage("building packets", 1 + last - first) as advance,
    ):
        device = Device.init(
            _trusting(bundle, by.signers, Path(scratch) / "bundle"), Path(scratch) / "store"
        )
        for number in range(first, last + 1):
            revision = _revision(run, options, number)
            sealed = _sealed(run, number, revision, by)
            name = f"{number:03d}-{run.states[number].digest[:8]}{packet.SUFFIX}"
            proof = Path(scratch) / name
            proof.write_bytes(sealed)
            status = device.apply(proof)
            if options.task in (None, number):
                score = accuracies(run, number, options) if options.images else None
                # The run notes a revision once its packet is proved, before anybody can have it.
                if options.revision is not None:
                    own.revise(number, options.revision)
                sealed = _with_others(out / name, sealed, by.signers)
                atomic.write(out / name, sealed)
                built.append(
                    BuiltPacket(
                        file=out / name,
                        **_facts(run, number),
                        revision=revision,
                        bytes=len(sealed),
                        signatures=signing.good_signatures(opened(sealed)[0].encode(), by.keys),
                        threshold=by.keys.threshold,
                        canary_difference=status.canary_difference,
                        accuracy=score,
                    )
                )
            advance()
    return built


def _revision(run: Run, options: PacketOptions, number: int) -> int:
    """The revision of a task, as if the one that is asked for were noted already."""
    asked, highest = options.revision, run.revision(len(run.states))
    if asked is None or options.task is None or number < options.task or asked <= highest:
        return run.revision(number)
    return asked


def _sealed(run: Run, number: int, revision: int, by: Signing) -> bytes:
    """The packet of one task."""
    contents = packet.Contents(
        lineage=run.lineage,
        begin=run.states[number - 1].digest,
        updates=(run.updates[number - 1],),
        canary_seed=number,
        canary_logits=host_logits(run, number, canary.inputs(number, run.preprocessing)),
        encoding=by.bundle.manifest.encoding,
        revisions=(revision,),
    )
    return packet.build(contents, lambda payload: signing.sign(payload, by.signers))


def _with_others(path: Path, sealed: bytes, signers: Sequence[Any]) -> bytes:
    """The new packet, or the same one that lies there already, with the signatures of others."""
    if not path.exists():
        return sealed
    try:
        old = atomic.receive(path, LIMITS.packet)
        envelopes = [opened(data)[0].encode() for data in (old, sealed)]
        if len({signing.unverified_payload(envelope) for envelope in envelopes}) > 1:
            return sealed
        signed = signing.unverified_keyids(envelopes[0])
        both = countersigned(
            old, [signer for signer in signers if signer.public_key.keyid not in signed]
        )
        ours = signing.Trust(tuple(signer.public_key for signer in signers), 1)
        return (
            both
            if signing.good_signatures(opened(both)[0].encode(), ours) == len(ours.keys)
            else sealed
        )
    except (InputError, TrustError):  # damaged, or something else: the new packet takes its place
        return sealed


def _facts(run: Run, task: int) -> dict[str, Any]:
    """What a packet brings, and what it loses in its encoding: some fields of `BuiltPacket`."""
    update, known = run.updates[task - 1], run.states[task - 1].classes
    return {
        "task": task,
        "name": update.name,
        "classes": update.classes,
        "retired": tuple(str(known[row]) for row in update.retired),
        "renamed": tuple((str(known[row]), new) for row, new in update.renamed),
        "encoding": run.config.method.encoding,
        "weight_error": run.weight_error(task),
        "old_rows": len(update.head.index),
        "old_rows_bytes": update.head.known_bytes,
    }


def accuracies(run: Run, task: int, options: PacketOptions) -> Accuracies:
    """Score the states before and after a task on the images that the options name.

    Raises InputError if there is no readable image of a class known after the task.
    """
    before, after, folder = run.states[task - 1], run.states[task], str(options.images)
    source = limited(load_for(run.config, folder), options.max_megapixels)
    images, _ = images_of(run, folder, source, task)
    known = {label: own for label, own in images.items() if label in after.classes}
    kept = _with_old_rows(before, after)
    old, new, total = Evaluator.at(run, task - 1), Evaluator.at(run, task), 0
    right = dict.fromkeys(("before", "after", "after_without_old_rows"), 0)
    for label, decoded in decoded_by_class(run, known):
        total += len(decoded)
        seen = new.features(decoded)
        row = after.classes.index(label)  # rows never move, whatever their classes are called
        right["after"] += _right(after, row, seen)
        right["after_without_old_rows"] += _right(kept, row, seen)
        if row < len(before.classes):
            right["before"] += _right(before, row, old.features(decoded))
    if not total:
        noun = run.preprocessing.noun
        raise InputError(f"{folder} has no readable test {noun} of a class known after task {task}")
    return Accuracies(**{name: count / total for name, count in right.items()}, images=total)


def _with_old_rows(before: TaskState, after: TaskState) -> TaskState:
    """The state after a task, if known classes had kept their rows. Retired rows stay retired."""
    old = [row for row in after.live if row < len(before.classes)]
    weight, bias = after.head_weight.copy(), after.head_bias.copy()
    weight[old], bias[old] = before.head_weight[old], before.head_bias[old]
    return replace(after, head_weight=weight, head_bias=bias)


def _right(state: TaskState, row: int, seen: np.ndarray) -> int:
    """How many images are answered with the class of a row, by their features."""
    return int((logits_of(state, seen).argmax(axis=1) == row).sum())


def _trusting(bundle: Bundle, signers: Sequence[Any], folder: Path) -> Path:
    """A copy of the bundle that trusts these signers only.

    A scratch device needs it, because the signers may be fewer than the bundle's threshold so far.
    """
    shutil.copytree(bundle.path, folder, copy_function=_link_or_copy)
    for name in (TRUST, MANIFEST):
        (folder / name).unlink()
    trust = signing.Trust(tuple(signer.public_key for signer in signers), len(signers))
    atomic.write(folder / TRUST, dump_json(trust.to_dict()))
    entries = {**bundle.manifest.files, TRUST: describe(folder / TRUST)}
    atomic.write(folder / MANIFEST, replace(bundle.manifest, files=entries).to_json())
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
