"""The whole loop after training, with host and device compared after every packet, and the demo
that runs it on digits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .inputs.pictures import blank
from .results import Result
from .train.config import resolve

if TYPE_CHECKING:
    from .device.answers import Prediction
    from .device.device import Device
    from .train.loop import Report
    from .train.run import Run


@dataclass(frozen=True)
class Shipped(Result):
    """A device after a task, compared with the host over ALL test images so far.

    Attributes:
        packet_bytes: Size of the task's packet; 0 for the bundle itself, as is apply_ms.
        max_logit_difference: Largest absolute difference of a logit.
        same_top: Images that get the same answer on both sides.
        images: How many there are.
    """

    task: int
    host_accuracy: float
    device_accuracy: float
    max_logit_difference: float
    same_top: int
    images: int
    packet_bytes: int = 0
    apply_ms: float = 0.0


@dataclass(frozen=True)
class Shipping(Result):
    """A device from its bundle to the newest task. tasks: the first one is the bundle's."""

    tasks: tuple[Shipped, ...]
    model_bytes: int


@dataclass(frozen=True)
class Demo(Result):
    """What the demo shows at its end.

    Attributes:
        packet_bytes: Of all packets together.
        noise: What the device answers to an image of noise; None if the run tells no unknown.
    """

    host_accuracy: float
    device_accuracy: float
    packets: int
    packet_bytes: int
    model_bytes: int
    noise: Prediction | None


def run_demo(out: Path, report: Report) -> Demo:
    """Train the embedded default, export its base session, ship its tasks, and score both sides.

    `out` is made anew. Raises UsageError if it holds something that no demo has left there.
    """
    marker = out / ".sdlora-edge-demo"
    if out.exists() and not marker.exists():
        raise UsageError(f"{out} exists and was not made by a demo: choose another --out")
    from .train.loop import train  # torch, which takes seconds, comes after the check

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()
    run = train(resolve(None, {}), out / "runs" / "demo", report)
    shipped = ship(run, out, 0)
    last = shipped.tasks[-1]
    return Demo(
        host_accuracy=last.host_accuracy,
        device_accuracy=last.device_accuracy,
        packets=len(shipped.tasks) - 1,
        packet_bytes=sum(row.packet_bytes for row in shipped.tasks),
        model_bytes=shipped.model_bytes,
        noise=_noise(out / "store"),
    )


def _noise(store: Path) -> Prediction | None:
    """What a device answers to an image that shows no class, if it can say so."""
    from .device.device import Device

    device = Device.open(store)
    if device.status().threshold is None:
        return None
    pixels: np.ndarray = blank(64, each=1, seed=1)["noise"][0]
    answer: Prediction = device.predict(pixels)
    return answer


def ship(run: Run, out: Path, task: int) -> Shipping:
    """Ship all tasks after `task` to a device, and compare both sides over ALL test images.

    The device starts from the bundle of `task` and gets every later task as a packet. It gets the
    images as a camera would hand them over and prepares them itself.
    """
    from .device.device import Device
    from .export.bundles import export_bundle
    from .export.packets import build_packets
    from .formats import signing

    private, public = signing.new_key("loop", out / "keys")
    exported = export_bundle(run, out / "bundle", task, [str(public)])
    packets = build_packets(run.path, out / "bundle", private, out=out / "packets")
    device = Device.init(out / "bundle", out / "store")
    rows = [_compare(run, device, task)]
    for built in packets:
        applied = device.apply(built.file)
        compared = _compare(run, device, built.task)
        rows.append(replace(compared, packet_bytes=built.bytes, apply_ms=applied.apply_ms))
    return Shipping(tuple(rows), exported.model_bytes)


def _compare(run: Run, device: Device, task: int) -> Shipped:
    """Answer all test images up to a task on both sides.

    The host decodes each once and computes in float64.
    """
    from .export.parity import BATCH, compare
    from .method.merged import logits_of
    from .train import splits
    from .train.evaluator import Evaluator, slices
    from .train.score import test_images_by_class

    by_class = test_images_by_class(run, task)
    state = run.states[task]
    names = state.names
    known = [name for name in names if name in by_class]
    decoded = splits.decode(by_class, known, run.preprocessing, need=False)
    seen = Evaluator.at(run, task, exact=True).features(decoded)
    reference = logits_of(state, seen)[:, state.live]
    predictions = device.predict([image.open() for name in known for image in by_class[name]])
    truth = np.array([names.index(known[target]) for target in decoded.targets])
    answers = np.array([names.index(p.top[0][0]) for p in predictions])
    batches = (decoded.pixels[rows] for rows in slices(len(decoded), BATCH))
    logits = [device.logits(run.preprocessing.arrays(pixels)) for pixels in batches]
    return Shipped(
        task=task,
        host_accuracy=float((reference.argmax(axis=1) == truth).mean()),
        device_accuracy=float((answers == truth).mean()),
        max_logit_difference=compare(np.concatenate(logits), reference).difference,
        same_top=int((answers == reference.argmax(axis=1)).sum()),
        images=len(truth),
    )
