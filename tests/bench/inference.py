"""Does inference get slower? A bundle after 1, 20 and 100 tasks, beside the same model with every weight a constant.

Contestants, all of the same network (random weights: time does not depend on them), 100 classes, ONNX Runtime on CPU; images have
224 px, texts 64 tokens:

* `tasks_T`: a device that was flashed once and has applied T packets (rank 10, query and value of every block), asked through
  `Device.logits`;
* `constants_bundle_100`: the same, of a bundle exported with `--weights-as constants`: ONNX Runtime made a new session for the
  last packet;
* `constants`: the merged weights of 100 tasks exported by torch as ordinary constants, in a plain session;
* `branches_T`: the low-rank branches of T tasks kept apart, as in a LoRA that was not merged: x A^T B^T with the factors of all
  tasks side by side (rank 10 T) for query and for value, every weight a constant (for images);
* `torch`: torch in eager mode, merged weights.

Before anything is timed they must agree with each other. Within a round every contestant has its turn, in an order that rotates;
a ratio is the median over rounds of the ratio WITHIN a round, so what slows the machine down for a while slows both sides.
Each contestant has a process of its own. A cell (model, threads, batch) is kept in build/inference, as the models are (5 GB): a run that
was stopped goes on where it was. Delete that folder to measure anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import figures
import numpy as np
import random_runs
import torch
from sdlora_edge.export.bundles import export, export_bundle
from sdlora_edge.export.onnx import OPSET
from sdlora_edge.export.parity import host_logits
from sdlora_edge.export.requests import BundleRequest, ExportOptions
from torch import Tensor, nn

from sdlora_edge.device import Device
from sdlora_edge.device.engines.onnx_runtime import ort  # telemetry is off then
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.bundle import CONSTANTS
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.image import PICTURES
from sdlora_edge.inputs.modality import Preparation
from sdlora_edge.inputs.text import Tokenization
from sdlora_edge.method import backbones
from sdlora_edge.state import Factors, TaskState
from sdlora_edge.train.run import Run

MODELS = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "minilm": random_runs.MINILM,
}
TEXTS = "minilm"
THREADS, BATCHES, TASKS, BRANCHES = (1, 2), (1, 8), (1, 20, 100), (20, 100)
CLASSES = 100
BUILD = figures.ROOT / "build" / "inference"
LEAST_ROUNDS = 5
TURN = 0.1
"""seconds of a contestant's turn, at least"""
AGREE = 1e-3
"""largest difference of logits, as a share of the largest logit: float32 after twelve blocks, summed in another order"""
Call = Callable[[], np.ndarray]


class Branches(nn.Module):
    """A fused qkv with the branches of all tasks beside its query and value rows. A: (ranks, d), B: (d, ranks)."""

    def __init__(self, qkv: nn.Linear, query: Factors, value: Factors) -> None:
        super().__init__()
        self.qkv = qkv
        self.factors = nn.ParameterList(
            nn.Parameter(torch.from_numpy(t), False) for f in (query, value) for t in (f.A, f.B)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        A_q, B_q, A_v, B_v = self.factors
        return torch.cat([query + x @ A_q.T @ B_q.T, key, value + x @ A_v.T @ B_v.T], dim=-1)


class Whole(nn.Module):
    """Backbone and head with weights of their own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbones.features(backbone), CLASSES)
        self.eval().requires_grad_(False)

    def with_head(self, state: TaskState) -> Whole:
        self.head.load_state_dict(
            {
                "weight": torch.from_numpy(state.head_weight),
                "bias": torch.from_numpy(state.head_bias),
            }
        )
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.backbone(*inputs))


def merged(run: Run, task: int) -> Whole:
    """The model with W_t in it. (It takes the run's backbone along.)"""
    weights = {name: torch.from_numpy(w) for name, w in run.weights(task).items()}
    run.backbone.load_state_dict(backbones.shaped(run.backbone, weights), strict=False)
    return Whole(run.backbone).with_head(run.states[task])


def apart(run: Run, task: int) -> Whole:
    """The model with W_0 and the branches of `task` tasks. (It takes the run's backbone along.)"""
    own = run.states[task].magnitudes.astype(np.float32)

    def joined(name: str) -> Factors:
        factors = [f[name] for f in run.factors(task)]
        B = [f.B.astype(np.float32) * alpha for f, alpha in zip(factors, own, strict=True)]
        return Factors(
            np.concatenate([f.A.astype(np.float32) for f in factors]), np.concatenate(B, axis=1)
        )

    for i, block in enumerate(run.backbone.blocks):  # type: ignore[arg-type]
        block.attn.qkv = Branches(
            block.attn.qkv, joined(f"blocks.{i}.attn.q"), joined(f"blocks.{i}.attn.v")
        )
    return Whole(run.backbone).with_head(run.states[task])


def make_models(model: str, folder: Path) -> None:
    """stores/tasks_T: devices after T packets; stores/constants_bundle_100; constants.onnx, branches_T.onnx, whole.pt."""
    shutil.rmtree(folder, ignore_errors=True)
    run = random_runs.make_run(MODELS[model], folder / "run", max(TASKS), CLASSES)
    key, public = signing.new_key("bench", folder / "keys")
    signer = signing.load_signer(key)
    export_bundle(run, folder / "bundle", 0, [str(public)])
    device = Device.init(folder / "bundle", folder / "store")
    for update, before in zip(run.updates, run.states, strict=False):
        inputs = canary.inputs(update.task, run.preprocessing, 1)
        logits = host_logits(run, update.task, inputs)
        contents = packet.Contents(
            lineage=run.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=update.task,
            canary_logits=logits,
        )
        data = packet.build(contents, lambda payload: signing.sign(payload, [signer]))
        (folder / "next").write_bytes(data)
        device.apply(folder / "next")
        if update.task in TASKS:
            shutil.copytree(folder / "store", folder / "stores" / f"tasks_{update.task}")
            print(f"{model}: {update.task} packets applied", file=sys.stderr, flush=True)
    options = ExportOptions(weights_as=CONSTANTS, max_classes=CLASSES)
    last = BundleRequest(folder / "other", max(TASKS) - 1, [str(public)], options)
    # not export_bundle: the tasks of this run are in memory only
    export(run, last, BundleRequest(folder / "other", 0, [str(public)]).require(run.path))
    Device.init(folder / "other", folder / "stores" / "constants_bundle_100").apply(folder / "next")
    whole = merged(run, max(TASKS))
    write_onnx(whole, run.preprocessing, folder / "constants.onnx")
    torch.save(whole.state_dict(), folder / "whole.pt")
    for task in () if model == TEXTS else BRANCHES:
        run.backbone.load_state_dict(
            {n: torch.from_numpy(w) for n, w in run.base_weights.items()}, strict=False
        )
        write_onnx(apart(run, task), run.preprocessing, folder / f"branches_{task}.onnx")
        for block in run.backbone.blocks:  # type: ignore[union-attr]
            block.attn.qkv = block.attn.qkv.qkv
    for name in ("run", "bundle", "other", "store", "keys"):
        shutil.rmtree(folder / name)
    (folder / "next").unlink()
    (folder / "done").touch()


def inputs_of(prepare: Preparation, batch: int) -> dict[str, np.ndarray]:
    """What the model reads of a batch of random images, or of texts that are as long as they may be."""
    random = np.random.default_rng(1)
    if isinstance(prepare, Tokenization):
        return prepare.arrays(random.integers(0, prepare.vocabulary, (batch, prepare.length)))
    return {PICTURES: random.standard_normal((batch, 3, 224, 224)).astype(np.float32)}


def write_onnx(whole: nn.Module, prepare: Preparation, path: Path) -> None:
    """As anyone exports a model: every weight a constant, any number of images, or of texts of any length."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = tuple(torch.from_numpy(array) for array in inputs_of(prepare, 2).values())
        dynamic = tuple(
            dict.fromkeys(range(len(axes)), torch.export.Dim.DYNAMIC)
            for axes in prepare.axes.values()
        )
        program = torch.onnx.export(
            whole,
            example,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=(dynamic,),
        )
    assert program is not None
    program.save(path)


def names_of(model: str) -> tuple[str, ...]:
    """The contestants."""
    branches = () if model == TEXTS else tuple(f"branches_{t}" for t in BRANCHES)
    tasks = tuple(f"tasks_{t}" for t in TASKS)
    return ("constants", *tasks, "constants_bundle_100", *branches, "torch")


def load(name: str, folder: Path, threads: int, batch: int) -> Call:
    """A contestant: what computes the logits of a batch."""
    backbone, prepare = random_runs.create(MODELS[folder.name])
    inputs = inputs_of(prepare, batch)
    if name == "torch":
        torch.set_num_threads(threads)
        whole, tensors = Whole(backbone), [torch.from_numpy(array) for array in inputs.values()]
        whole.load_state_dict(torch.load(folder / "whole.pt"))

        def eager() -> np.ndarray:
            with torch.inference_mode():
                return whole(*tensors).numpy()

        return eager
    if (folder / "stores" / name).exists():
        opened = Device.open(folder / "stores" / name, threads)
        return lambda: opened.logits(inputs)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = ort.InferenceSession(
        str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    fed = {
        one.name: array for one, array in zip(session.get_inputs(), inputs.values(), strict=True)
    }
    return lambda: session.run(None, fed)[0]


def serve(name: str, model: str, threads: int, batch: int) -> None:
    """A contestant's own process: for each line with a number, so many calls, and the milliseconds of one; a path: logits go there."""
    call = load(name, BUILD / model, threads, batch)
    for line in sys.stdin:
        if not line.strip().isdigit():
            np.save(line.strip(), call())
            print("saved", flush=True)
            continue
        call()  # its threads and caches are cold after the others' turns
        begin = time.perf_counter()
        for _ in range(int(line)):
            call()
        print(1e3 * (time.perf_counter() - begin) / int(line), flush=True)


class Contestant:
    """Loaded in a process of its own: the threads of an ONNX Runtime session disturb those of another in one process, by half."""

    def __init__(self, name: str, *where: object) -> None:
        command = [sys.executable, __file__, "--serve", name, *map(str, where)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def logits(self, folder: str) -> np.ndarray:
        self._ask(f"{folder}/logits.npy")
        return np.load(f"{folder}/logits.npy")

    def milliseconds(self, calls: int) -> float:
        return float(self._ask(str(calls)))

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()


def agree(logits: dict[str, np.ndarray]) -> float:
    """The largest difference, as a share of the largest logit. Stops unless all compute what they stand for."""
    pairs = [("tasks_100", n) for n in ("constants", "constants_bundle_100", "torch")]
    pairs += [(f"tasks_{t}", f"branches_{t}") for t in BRANCHES if f"branches_{t}" in logits]
    worst = max(
        float(np.abs(logits[a] - logits[b]).max() / np.abs(logits[b]).max()) for a, b in pairs
    )
    apart = float(
        np.abs(logits["tasks_100"] - logits["tasks_20"]).max() / np.abs(logits["tasks_20"]).max()
    )
    if not worst < AGREE < apart:
        raise SystemExit(
            f"the contestants do not compute the same: {worst:.2g}; after 80 tasks more the logits moved by {apart:.2g}"
        )
    return worst


def cell(model: str, threads: int, batch: int, seconds: float) -> dict[str, float]:
    """Everything about one model, number of threads and number of images."""
    names = names_of(model)
    contestants = {name: Contestant(name, model, threads, batch) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        difference = agree({name: one.logits(folder) for name, one in contestants.items()})
    repeats = {
        name: max(1, round(1e3 * TURN / one.milliseconds(1))) for name, one in contestants.items()
    }
    rows, end = [], time.perf_counter() + seconds
    while len(rows) < LEAST_ROUNDS or time.perf_counter() < end:
        turn = len(rows) % len(names)
        rows.append(
            {
                name: contestants[name].milliseconds(repeats[name])
                for name in names[turn:] + names[:turn]
            }
        )
    for one in contestants.values():
        one.close()
    found = {
        f"{n}_over_constants": round(median(r[n] / r["constants"] for r in rows), 4)
        for n in names
        if n != "constants"
    }
    found |= {f"{name}_ms": round(median(r[name] for r in rows), 3) for name in names}
    return found | {"largest_difference": float(f"{difference:.1e}"), "rounds": len(rows)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, for each cell")
    parser.add_argument(
        "--models",
        default="vit_tiny,vit_base",
        help="comma-separated; minilm goes to inference_text",
    )
    parser.add_argument(
        "--serve", nargs=4, metavar=("NAME", "MODEL", "THREADS", "BATCH"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.serve:
        name, model, threads, batch = options.serve
        serve(name, model, int(threads), int(batch))
        return
    values: dict[str, Any] = {
        "image_size": 224,
        "tokens": random_runs.TOKENS,
        "rank": random_runs.RANK,
        "classes": CLASSES,
        "seconds": options.seconds,
    }
    for model in options.models.split(","):
        if not (BUILD / model / "done").exists():
            make_models(model, BUILD / model)
        for threads in THREADS:
            for batch in BATCHES:
                kept = BUILD / f"{model}-{threads}-{batch}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(cell(model, threads, batch, options.seconds)))
                measured = json.loads(kept.read_text())
                print(model, threads, batch, measured, file=sys.stderr, flush=True)
                values.setdefault(model, {}).setdefault(str(threads), {})[str(batch)] = measured
    command = (
        " ".join(["python tests/bench/inference.py", *sys.argv[1:]])
        if sys.argv[1:]
        else "make bench-inference"
    )
    print(
        figures.write(
            "inference_text" if options.models == TEXTS else "inference",
            command,
            values,
            packages=("torch", "timm", "onnx", "onnxruntime", "numpy"),
        )
    )


if __name__ == "__main__":
    main()
