"""What an update costs a device: ViT-B/16 shapes at 224 px, 10 new classes and rank 10 a packet, a hundred packets, 2 threads.

The run is random (`random_runs`): times and bytes do not depend on training. Everything is measured in fresh processes, each
with a store of its own; a number is the median over the packets applied, or the largest where it says so.

    verify, merge, canary      parts of one `apply`, each called alone: signatures and digests; W_e + sum c_k B_k A_k; the
                               canary's inference and that of nothing else
    pause                      the longest time for which taking the new generation into force can hold up a predictor: the
                               swap of one reference. Measured as the longest time that a thread which does nothing but ask which
                               generation is in force waits for the answer, while packets are applied and while none is; the
                               difference is what an update costs beyond the scheduler's own pauses
    slow-down                  what it costs to share two cores with an update: median and longest `predict` beside updates
                               (verification, merge and canary all the time), over the median alone
    peak                       resident memory at its highest while packets are applied, over that of the device before, which has answered
                               for one image and for two
    a hundred packets          in one go (`apply_all`: one merge, one canary, one commit), and one by one; seconds, and seconds of
                               the processor, which others on the machine do not lengthen
    in place                   the same of a device that gives up its weights first; and the longest that a predictor then waits
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import figures
import numpy as np
from threadpoolctl import threadpool_limits

from sdlora_edge.device import Device
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.bundle import INPUTS, Bundle
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.modality import count
from sdlora_edge.selftest import workers
from sdlora_edge.state import Factors, extended, merge

MODEL, THREADS, TASKS, BASE, NEW = "vit_base_patch16_224", 2, 100, 10, 10
FEW = 10
"""packets that are applied where single updates are measured"""
DEFAULT = (MODEL, "onnx", INPUTS)
BUILD = figures.ROOT / "build" / "device"


def make(folder: Path, model: str, target: str, weights_as: str, size: int | None = None) -> None:
    """folder/bundle and folder/packets/NNN.sdlora of a random run."""
    import random_runs  # torch: not in the processes that are measured
    from sdlora_edge.export.bundles import export_bundle
    from sdlora_edge.export.parity import host_logits
    from sdlora_edge.export.requests import ExportOptions

    shutil.rmtree(folder, ignore_errors=True)
    run = random_runs.make_run(model, folder / "run", TASKS, BASE, NEW, size)
    key, public = signing.new_key("bench", folder / "keys")
    signer = signing.load_signer(key)
    room = None if weights_as == INPUTS else BASE + TASKS * NEW
    export_bundle(
        run,
        folder / "bundle",
        0,
        [str(public)],
        ExportOptions(target=target, weights_as=weights_as, max_classes=room),
    )
    (folder / "packets").mkdir()
    for update, before in zip(run.updates, run.states, strict=False):
        inputs = canary.inputs(update.task, run.preprocessing)
        logits = host_logits(run, update.task, inputs)
        contents = packet.Contents(
            lineage=run.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=update.task,
            canary_logits=logits,
        )
        data = packet.build(contents, lambda payload: signing.sign(payload, [signer]))
        (folder / "packets" / f"{update.task:03d}.sdlora").write_bytes(data)
        print(f"packet {update.task} of {TASKS}", file=sys.stderr, flush=True)
    (folder / "done").touch()


def chain(folder: Path) -> list[Path]:
    return sorted((folder / "packets").iterdir())


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median milliseconds of a call."""
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spent.append(1000 * (time.perf_counter() - begin))
    return statistics.median(spent)


def merged(bundle: Bundle, factors: list[Mapping[str, Factors]], coefficients: np.ndarray) -> None:
    """With one thread, as a device does it."""
    with threadpool_limits(1, "blas"):
        merge(bundle.weights, bundle.manifest.projections, factors, coefficients)


def parts(folder: Path, store: Path) -> dict[str, Any]:
    """The parts of an update, each alone, and whole updates with nothing beside them."""
    packets, device = chain(folder), Device.open(store, THREADS)
    data, bundle = packets[0].read_bytes(), device.bundle
    verified = packet.read(data, bundle.trust)
    prepare = Preprocessing.from_manifest(bundle.manifest.preprocessing)
    inputs = canary.inputs(verified.canary_seed, prepare)
    factors = [verified.update.factors]
    found = {
        "packet_bytes": len(data),
        "verify_ms": timed(lambda: packet.read(data, bundle.trust)),
        "merge_ms": timed(lambda: merged(bundle, factors, verified.update.deltas)),
        "canary_ms": timed(lambda: device.logits(inputs)),
        "canary_images": count(inputs),
    }
    spent = [device.apply(path).apply_ms for path in packets[:FEW]]
    return found | {"apply_ms": statistics.median(spent), "apply_ms_longest": max(spent)}


def hundred(folder: Path, store: Path) -> dict[str, Any]:
    """All packets in one go, the merge of their factors, and what the store holds then."""
    packets, device = chain(folder), Device.open(store, THREADS)
    spent, begin = time.process_time(), time.perf_counter()
    status = device.apply_all(packets)
    found = {
        "apply_100_packets_s": time.perf_counter() - begin,
        "apply_100_packets_cpu_s": time.process_time() - spent,
        "store_bytes_100_tasks": status.store_bytes,
    }
    verified = [packet.read(path.read_bytes(), device.bundle.trust) for path in packets]
    state, bundle = device.current()[0], device.bundle
    coefficients = state.magnitudes - extended(bundle.state.magnitudes, state.magnitudes)
    factors = [one.update.factors for one in verified]
    return found | {
        "merge_100_tasks_s": timed(lambda: merged(bundle, factors, coefficients), 5) / 1000
    }


def one_by_one(folder: Path, store: Path) -> dict[str, Any]:
    """All packets, each with a merge, a canary and a commit of its own."""
    packets, device = chain(folder), Device.open(store, THREADS)
    spent, begin = time.process_time(), time.perf_counter()
    for path in packets:
        device.apply(path)
    return {
        "apply_100_packets_one_by_one_s": time.perf_counter() - begin,
        "apply_100_packets_one_by_one_cpu_s": time.process_time() - spent,
    }


def opening(folder: Path, store: Path) -> dict[str, Any]:
    """From nothing to the first answer; the store holds as many packets as were applied before."""
    begin = time.perf_counter()
    device = Device.open(store, THREADS)
    opened = time.perf_counter()
    device.predict([np.zeros((224, 224, 3), np.uint8)])
    packets = device.status().packets
    return {
        f"open_ms_{packets}_packets": 1000 * (opened - begin),
        f"open_to_first_answer_ms_{packets}_packets": 1000 * (time.perf_counter() - begin),
    }


def memory(folder: Path, store: Path) -> dict[str, Any]:
    """Resident bytes: before updates, and at the highest during them."""
    steady, peak, device = resident(folder, store, DOUBLE_BUFFER)
    adapted = sum(array.nbytes for array in device.bundle.weights.values())
    return {"steady_bytes": steady, "peak_over_steady_bytes": peak, "adapted_bytes": adapted}


def in_place(folder: Path, store: Path) -> dict[str, Any]:
    """The same of a device that holds one model; and how long a predictor waits."""
    steady, peak, device = resident(folder, store, IN_PLACE)
    spent: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            begin = time.perf_counter()
            with device._serving():
                spent.append(1000 * (time.perf_counter() - begin))
            time.sleep(0.001)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    times = [device.apply(path).apply_ms for path in chain(folder)[FEW : 2 * FEW]]
    done.set()
    asker.join()
    return {
        "in_place_steady_bytes": steady,
        "in_place_peak_over_steady_bytes": peak,
        "in_place_apply_ms": statistics.median(times),
        "in_place_wait_ms_p100": max(spent),
    }


def resident(folder: Path, store: Path, swap: str) -> tuple[int, int, Device]:
    """(bytes before updates, bytes more at the highest during them, the device)."""
    device = Device.open(store, THREADS, swap=swap)
    for images in (
        1,
        2,
        1,
        2,
    ):  # ONNX Runtime keeps what it once needed for so many, and the canary are two
        device.predict([np.zeros((224, 224, 3), np.uint8)] * images)
    steady = workers.memory().now
    workers.forget_peak()
    for path in chain(folder)[:FEW]:
        device.apply(path)
    return steady, workers.memory().peak - steady, device


def under_load(folder: Path, store: Path) -> dict[str, Any]:
    """The pause and the slow-down."""
    packets, device = chain(folder), Device.open(store, THREADS)
    image = [np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)]

    def predict() -> None:
        device.predict(image)

    def generation() -> None:
        for _ in range(100):
            device._live  # noqa: B018  what `predict` begins with: the only thing it shares with an update

    found = {}
    for name, call in (("predict", predict), ("reference", generation)):
        found[name] = {}
        for beside in (False, True):
            spent: list[float] = []
            done = threading.Event()

            def ask(
                call: Callable[[], None] = call,
                spent: list[float] = spent,
                done: threading.Event = done,
            ) -> None:
                while not done.is_set():
                    begin = time.perf_counter()
                    call()
                    spent.append(1000 * (time.perf_counter() - begin))
                    if call is generation:
                        time.sleep(0.001)

            asker = threading.Thread(target=ask, daemon=True)
            asker.start()
            if beside:
                for path in packets[:FEW]:
                    device.apply(path, allow_older=True)
            else:
                time.sleep(5)
            done.set()
            asker.join()
            for _ in range(device.status().packets):
                device.rollback()
            found[name][beside] = spent
    alone = statistics.median(found["predict"][False])
    return {
        "predict_ms": alone,
        "predict_ms_longest": max(found["predict"][False]),
        "predict_ms_beside_updates": statistics.median(found["predict"][True]),
        "predict_ms_beside_updates_longest": max(found["predict"][True]),
        "reference_ms_p100_without_updates": max(found["reference"][False]),
        "pause_ms_p100": max(found["reference"][True]),
    }


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (parts, memory, in_place, under_load, opening, one_by_one, hundred)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--target",
        default="onnx",
        help="another model or target is measured and printed, not written down",
    )
    parser.add_argument(
        "--weights-as", default=INPUTS, help="likewise; executorch has constants alone"
    )
    parser.add_argument("--part", nargs=2, metavar=("NAME", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = [
        "--model",
        options.model,
        "--target",
        options.target,
        "--weights-as",
        options.weights_as,
    ]
    chosen = (options.model, options.target, options.weights_as)
    folder = BUILD / (MODEL if chosen == DEFAULT else "-".join(chosen))
    if options.part:
        print(json.dumps(PARTS[options.part[0]](folder, Path(options.part[1]))))
        return
    if not (folder / "done").exists():
        make(folder, *chosen)
    values: dict[str, Any] = {
        "model": options.model,
        "threads": THREADS,
        "rank": 10,
        "new_classes": NEW,
    }
    store = folder / "store"

    def measure(name: str, fresh: bool = True) -> None:
        if fresh:
            shutil.rmtree(store, ignore_errors=True)
            Device.init(folder / "bundle", store)
        command = [sys.executable, __file__, *arguments, "--part", name, str(store)]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        print(name, found, file=sys.stderr, flush=True)
        values.update(found)

    for name in PARTS:
        measure(name)
    measure("opening", fresh=False)
    rounded = {
        key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()
    }
    if chosen != DEFAULT:
        print(json.dumps(rounded, indent=1))
        return
    packages = ("onnxruntime", "numpy", "securesystemslib", "cryptography")
    print(figures.write("device", "make bench-device", rounded, packages=packages))


if __name__ == "__main__":
    main()
