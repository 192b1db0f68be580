"""What a training step costs as tasks add up: time and peak memory at tasks 1, 5, 10 and 20, beside plain LoRA and a loop.

Three ways to take the same step (forward, backward, SGD with momentum) on the same frozen random backbone:

* `sdlora_T`: ours at task T, with T - 1 random old directions of rank 10 on query and value of every block;
* `peft`: one LoRA of rank 10 by the `peft` library. The qkv of timm's ViT is one linear layer, so the fair nearest thing is
  `LoraConfig(r=10, target_modules=["qkv"])`: it adapts the key rows too, at about the same cost;
* `loop_T`: a branch per task beside each projection, as the authors' code does (without its norms, which it takes anew each step).

All variants are timed in one process, one after the other within a round, in an order that rotates; a ratio is the median over
rounds of the ratio WITHIN a round, so what slows the machine down for a while slows both sides. Memory: each variant in a process
of its own; what is compared is the peak ABOVE the loaded bare backbone: old directions, folded weights, activations, optimizer.
On CPU that is resident memory (Linux), on CUDA what torch allocated.

`epoch.py` measures whole epochs, from image files, beside a plain timm loop. `--epoch-only` measures these alone and leaves all
other figures of step_cost.json as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import epoch
import figures
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.method import backbones
from sdlora_edge.method.sdlora import Past, SDLoRA, Variant, zero_head
from sdlora_edge.state import Factors, TaskState

RANK, CLASSES, THREADS = 10, 10, 2
TASKS = (1, 5, 10, 20)
VARIANTS = (*(f"sdlora_{t}" for t in TASKS), "peft", *(f"loop_{t}" for t in TASKS))
MEASURED_MEMORY = (*(f"sdlora_{t}" for t in TASKS), "peft", "loop_1", "loop_20")
SHAPES = {
    "vit_tiny": {"img_size": 96, "embed_dim": 192, "num_heads": 3},
    "vit_base": {"img_size": 224, "embed_dim": 768, "num_heads": 12},
}
BATCH = {"cpu": {"vit_tiny": 64, "vit_base": 4}, "cuda": {"vit_tiny": 64, "vit_base": 64}}
STEPS = {"cpu": 1, "cuda": 10}
"""timed at once; on CUDA many, so that waiting for the device is no part of it"""
Step = Callable[[], None]


class Loop(nn.Module):
    """The equation as it is written: a frozen qkv, and beside it one low-rank branch per task for query and value."""

    def __init__(
        self, qkv: nn.Linear, factors: list[tuple[Factors, Factors]], magnitudes: nn.Parameter
    ) -> None:
        super().__init__()
        self.qkv, self.magnitudes = qkv, magnitudes
        width = qkv.in_features
        fresh = Factors(
            0.02 * np.random.default_rng(0).standard_normal((RANK, width)), np.zeros((width, RANK))
        )
        self.branches = nn.ModuleList(
            nn.ModuleList(_branch(f, trained) for f in pair)
            for pair, trained in [*((pair, False) for pair in factors), ((fresh, fresh), True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        for k, (on_query, on_value) in enumerate(self.branches):
            query = query + self.magnitudes[k] * on_query(x)
            value = value + self.magnitudes[k] * on_value(x)
        return torch.cat([query, key, value], dim=-1)


def _branch(factors: Factors, trained: bool) -> nn.Sequential:
    pair = []
    for matrix in (factors.A, factors.B):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight = nn.Parameter(
            torch.from_numpy(matrix.astype(np.float32)), requires_grad=trained
        )
        pair.append(linear)
    return nn.Sequential(*pair)


def states(backbone: nn.Module, task: int) -> list[TaskState]:
    """The states a run has left before it learns this task: random directions of norm about one, magnitudes of 0.1."""
    random = np.random.default_rng(task)
    width = backbones.features(backbone)
    head = np.zeros((0, width), np.float32), np.zeros(0, np.float32)
    found = [TaskState(0, "base", "", (), np.zeros(0), *head, {}, Confidence.none(0))]
    for t in range(1, task):
        factors = {}
        for p in backbones.projections(backbone):
            A, B = (
                random.standard_normal((RANK, p.columns)),
                random.standard_normal((p.stop - p.start, RANK)),
            )
            factors[p.name] = Factors(
                A.astype(np.float16), (B / width / RANK**0.5).astype(np.float16)
            )
        own = np.full(t, 0.1), *head, factors, Confidence.none(0)
        found.append(TaskState(t, f"task {t}", "", (), *own))
    return found


def build(variant: str, backbone: nn.Module) -> nn.Module:
    """The variant as a module from images to logits; parameters of the backbone are shared, not copied."""
    name, _, task = variant.partition("_")
    if name == "sdlora":
        past = Past.of(backbones.projections(backbone), states(backbone, int(task)))
        head = zero_head(CLASSES, backbones.features(backbone))
        return SDLoRA(backbone, past, head, Variant(RANK))
    own = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
    head = nn.Linear(backbones.features(backbone), CLASSES)
    if name == "peft":
        return nn.Sequential(
            get_peft_model(own, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"])), head
        )
    magnitudes = nn.Parameter(torch.full((int(task),), 0.1))
    old = [s.factors for s in states(backbone, int(task))[1:]]
    for i, block in enumerate(own.blocks):  # type: ignore[arg-type]
        pairs = [(f[f"blocks.{i}.attn.q"], f[f"blocks.{i}.attn.v"]) for f in old]
        block.attn.qkv = Loop(block.attn.qkv, pairs, magnitudes)
    return nn.Sequential(own, head)


def bare(model: str, device: str, precision: str) -> VisionTransformer:
    """The backbone with random weights, frozen, in eval mode as in training."""
    torch.manual_seed(0)
    backbone = (
        VisionTransformer(patch_size=16, depth=12, num_classes=0, **SHAPES[model])
        .eval()
        .requires_grad_(False)
    )
    if (
        device == "cpu" and precision == "bf16"
    ):  # torch's fused attention is slow there: half of the step, in every variant
        for block in backbone.blocks:
            block.attn.fused_attn = False
    return backbone.to(device)


def stepper(variant: str, backbone: nn.Module, model: str, device: str, precision: str) -> Step:
    """One training step of the variant, on images that stay the same."""
    module = build(variant, backbone).to(device)
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], lr=0.01, momentum=0.9
    )
    side, count = SHAPES[model]["img_size"], BATCH[device][model]
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    targets = (torch.arange(count) % CLASSES).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(module(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(steps: dict[str, Step], device: str, rounds: int) -> Iterator[dict[str, float]]:
    """For every round: milliseconds of a step of each variant."""
    for _ in range(2):
        for step in steps.values():
            step()
    names = list(steps)
    for turn in range(rounds):
        row = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait(device)
            begin = time.perf_counter()
            for _ in range(STEPS[device]):
                steps[name]()
            _wait(device)
            row[name] = 1e3 * (time.perf_counter() - begin) / STEPS[device]
        yield row


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(model: str, variant: str, device: str, precision: str) -> float:
    """MB that three steps of the variant need at most, above the bare backbone. Call it in a fresh process."""
    backbone = bare(model, device, precision)
    before = torch.cuda.memory_allocated() if device == "cuda" else _resident()
    step = stepper(variant, backbone, model, device, precision)
    for _ in range(3):
        step()
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return (peak - before) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_apart(model: str, variant: str, options: argparse.Namespace) -> float:
    """`memory` in a process of its own. (It starts with this process's peak as its own: call it before anything is loaded.)"""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        model,
        variant,
        "--device",
        options.device,
        "--precision",
        options.precision,
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ratio(rows: list[dict[str, float]], above: str, below: str) -> float:
    """Median over rounds of the ratio within a round."""
    return round(median(row[above] / row[below] for row in rows), 4)


def measure(model: str, memories: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one backbone."""
    backbone = bare(model, options.device, options.precision)
    steps = {v: stepper(v, backbone, model, options.device, options.precision) for v in VARIANTS}
    rows = []
    for row in timed(steps, options.device, options.rounds):
        print(
            model,
            " ".join(f"{name} {ms:.0f}" for name, ms in row.items()),
            file=sys.stderr,
            flush=True,
        )
        rows.append(row)
    found: dict[str, Any] = {
        "image_size": SHAPES[model]["img_size"],
        "batch": BATCH[options.device][model],
    }
    for t in TASKS[1:]:
        found[f"task{t}_over_task1"] = ratio(rows, f"sdlora_{t}", "sdlora_1")
        found[f"loop_task{t}_over_task1"] = ratio(rows, f"loop_{t}", "loop_1")
    for t in TASKS:
        found[f"task{t}_over_peft"] = ratio(rows, f"sdlora_{t}", "peft")
        found[f"loop_task{t}_over_peft"] = ratio(rows, f"loop_{t}", "peft")
    found["ms"] = {v: round(median(row[v] for row in rows), 2) for v in VARIANTS}
    found["memory_mb"] = {v: round(mb, 1) for v, mb in memories.items()}
    for name, below in (("task1", "sdlora_1"), ("peft", "peft")):
        found[f"memory_task20_over_{name}"] = round(memories["sdlora_20"] / memories[below], 4)
    found["memory_loop_task20_over_task1"] = round(memories["loop_20"] / memories["loop_1"], 4)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--models", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument(
        "--out", type=Path, default=figures.FIGURES, help="folder of step_cost.json"
    )
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--epoch-only", action="store_true", help="measure whole epochs, nothing else"
    )
    parser.add_argument("--epoch-rounds", type=int, default=5)
    parser.add_argument(
        "--epoch-images", type=int, default=0, help="at most so many images in an epoch"
    )
    options = parser.parse_args()
    options.device = backbones.resolve_device(options.device).type
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(THREADS)
    if options.memory_of:
        print(memory(*options.memory_of, options.device, options.precision))
        return
    values = {} if options.epoch_only else steps_of(options)
    values |= epoch.figures_of(options)
    path = _written(values, options)
    print(json.dumps(json.loads(path.read_text()), indent=1))


def steps_of(options: argparse.Namespace) -> dict[str, Any]:
    """The cost of steps, of all models."""
    models = options.models.split(",")
    memories = {m: {v: memory_apart(m, v, options) for v in MEASURED_MEMORY} for m in models}
    values: dict[str, Any] = {
        "device": options.device,
        "precision": options.precision,
        "rounds": options.rounds,
        "rank": RANK,
        "machine": torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{THREADS} threads, CPU",
    }
    return values | {m: measure(m, memories[m], options) for m in models}


def _written(values: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write step_cost.json. After `--epoch-only` its other figures stay, with how they were made."""
    command = " ".join(["python tests/bench/step_cost.py", *sys.argv[1:]])
    packages = (*figures.PACKAGES[:2], "peft", "torchvision")
    path = options.out / "step_cost.json"
    if options.epoch_only and path.exists():
        made = f"{command}, {date.today().isoformat()}"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | values | {"epoch_made_by": made}, indent=1)
            + "\n"
        )
        return path
    command = command if sys.argv[1:] else "make bench-step-cost"
    return figures.write("step_cost", command, values, options.out, packages)


if __name__ == "__main__":
    main()
