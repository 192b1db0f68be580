"""Packets of a run, each proved on a scratch device before it is written: no device gets one that it would refuse."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..device.device import Device
from ..errors import InputError, NotForThisDevice, TrustError
from ..formats import packet, signing
from ..formats.bundle import MANIFEST, TRUST, Bundle, describe
from ..formats.canonical import dump_json
from ..formats.container import LIMITS, countersigned, opened
from ..inputs import canary
from ..method.sdlora import logits
from ..state import TaskState
from ..storage import atomic
from ..train import splits
from ..train.evaluator import BATCH, images_of
from ..train.run import Run
from .parity import host_logits
from .requests import PacketRequest, Signing


def build_packets(
    run_path: Path,
    bundle_path: Path,
    key: Path | signing.Signers,
    task: int | None = None,
    out: Path | None = None,
    encoding: str | None = None,
    revision: int | None = None,
    trust: Sequence[Path] = (),
    images: str | None = None,
) -> list[dict[str, Any]]:
    """Sign a packet for every task after the bundle's, or for `task` alone, into `out` (default: packets/ in the run).

    key: one private key, or several: files, or what `signing.load_signer` gives. encoding: must be the bundle's, which is the
    default. revision: given to `task` and all after it, once and for all. trust: trust packets that the devices have applied, in
    order. images: a folder to score the states before and after each packet on.

    Raises NothingToDo where the bundle knows every task, NotForThisDevice where bundle and run are of different lineages or
    encodings, UsageError for a task the bundle knows already or the run has not, TrustError where the devices do not trust a
    key, HealthError where a device would not compute what this host computes.
    """
    keys = [key] if isinstance(key, Path) else key
    request = PacketRequest(
        run_path, bundle_path, keys, task, out, encoding, revision, trust, images
    )
    return build(request, request.require())


def build(request: PacketRequest, by: Signing) -> list[dict[str, Any]]:
    """`build_packets`, of what was checked."""
    bundle, signers, keys, task = by.bundle, by.signers, by.keys, request.task
    takes = bundle.manifest.encoding
    own = Run.open(request.run)
    run = own.encoded(takes)
    first, last = bundle.manifest.task + 1, len(run.updates)
    if bundle.manifest.lineage != run.lineage or (
        first <= last + 1 and run.states[first - 1].digest != bundle.manifest.state
    ):
        raise NotForThisDevice(
            f"{bundle.path} was not exported from {run.path}: name the bundle of this run"
        )
    if request.revision is not None and task is not None:
        own.revise(task, request.revision)
    out = request.out or request.run / "packets"
    built = []
    with tempfile.TemporaryDirectory() as scratch:
        device = Device.init(
            _trusting(bundle, signers, Path(scratch) / "bundle"), Path(scratch) / "store"
        )
        for number in range(first, (task or last) + 1):
            inputs = canary.inputs(number, run.preprocessing)
            contents = packet.Contents(
                lineage=run.lineage,
                begin=run.states[number - 1].digest,
                updates=(run.updates[number - 1],),
                canary_seed=number,
                canary_logits=host_logits(run, number, inputs),
                encoding=takes,
                revisions=(run.revision(number),),
            )
            sealed = packet.build(contents, lambda payload: signing.sign(payload, signers))
            name = f"{number:03d}-{run.states[number].digest[:8]}{packet.SUFFIX}"
            proof = Path(scratch) / name
            proof.write_bytes(sealed)
            status = device.apply(proof)
            if task in (None, number):
                facts = _facts(run, number, request.images)
                sealed = _with_others(out / name, sealed, signers)
                atomic.write(out / name, sealed)
                built.append(
                    {
                        "file": str(out / name),
                        **facts,
                        "bytes": len(sealed),
                        "signatures": signing.good_signatures(opened(sealed)[0].encode(), keys),
                        "threshold": keys.threshold,
                        "canary_difference": status.canary_difference,
                    }
                )
    return built


def _with_others(path: Path, sealed: bytes, signers: Sequence[Any]) -> bytes:
    """The new packet; where the very same one lies there already, that one, with what others have signed."""
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
    except (InputError, TrustError):  # damaged, or of another purpose: the new one takes its place
        return sealed


def _facts(run: Run, task: int, folder: str | None) -> dict[str, Any]:
    """What a packet brings, and what it loses in its encoding."""
    update, features = run.updates[task - 1], run.states[task].head_weight.shape[1]
    facts = {
        "task": task,
        "name": update.name,
        "classes": list(update.classes),
        "encoding": run.config.method.encoding,
        "revision": run.revision(task),
        "weight_error": run.weight_error(task),
        "old_rows": len(update.head.index),
        "old_rows_bytes": len(update.head.index) * (features + 12),
    }
    return facts | ({"accuracy": accuracies(run, task, folder)} if folder else {})


def accuracies(run: Run, task: int, folder: str) -> dict[str, Any]:
    """Shares of right answers on a folder's images of the classes known after `task`: {"before", "after",
    "after_without_old_rows", "images"}. Images of classes that are new in `task` are all wrong before it. The third is the
    state after it if known classes had kept their head rows.
    """
    before, after = run.states[task - 1], run.states[task]
    known = {
        label: own for label, own in images_of(run, folder)[0].items() if label in after.classes
    }
    decoded = {
        label: splits.decode({label: own}, [label], run.preprocessing, need=False).pixels
        for label, own in known.items()
    }
    total = sum(map(len, decoded.values()))
    if not total:
        raise InputError(f"{folder} has no readable test image of a class known after task {task}")
    rows = (
        np.concatenate([b, a[len(b) :]])
        for b, a in ((before.head_weight, after.head_weight), (before.head_bias, after.head_bias))
    )
    kept = replace(after, **dict(zip(("head_weight", "head_bias"), rows)))
    weights = run.weights(task)
    return {
        "before": _right(run, run.weights(task - 1), before, decoded) / total,
        "after": _right(run, weights, after, decoded) / total,
        "after_without_old_rows": _right(run, weights, kept, decoded) / total,
        "images": total,
    }


def _right(
    run: Run, weights: Mapping[str, np.ndarray], state: TaskState, decoded: Mapping[str, np.ndarray]
) -> int:
    right = 0
    for label, pixels in decoded.items():
        for start in range(0, len(pixels) if label in state.classes else 0, BATCH):
            scores = logits(
                run.backbone,
                weights,
                state,
                run.preprocessing.normalise(pixels[start : start + BATCH]),
            )
            right += int((scores.argmax(axis=1) == state.classes.index(label)).sum())
    return right


def _trusting(bundle: Bundle, signers: Sequence[Any], folder: Path) -> Path:
    """The same bundle for a scratch device that obeys these signers alone: they may be fewer than the threshold so far."""
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
