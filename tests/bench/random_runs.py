"""Runs that nobody trained: real backbones, random directions. What a device does with a packet does not depend on training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.encoding import Factors, encode
from sdlora_edge.formats.limits import LIMITS
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.modality import MICRO_TEXT, Preparation
from sdlora_edge.method import backbones, encoders
from sdlora_edge.method.feature_spec import FeatureSpec
from sdlora_edge.method.features import width as feature_width
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.state import Projection, TaskUpdate, changed_rows
from sdlora_edge.train.config import resolve
from sdlora_edge.train.run import Base, Run
from sdlora_edge.train.shipped import before_all
from sdlora_edge.train.tasks import Kept

RANK = 10
MINILM = "random/MiniLM-L6"
ARCHITECTURE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
                "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512}  # fmt: skip
TOKENS = 64


def make_run(
    name: str,
    path: Path,
    tasks: int,
    base_classes: int,
    new_classes: int = 0,
    size: int | None = None,
    weights: Path | None = None,
    features: str = "last",
    confident: bool = False,
) -> Run:
    """A run of `tasks` tasks of `new_classes` each, after a base session of `base_classes`; the tasks are in memory only.

    features: As `--features` takes them; with tasks, "last". confident: Whether the base session has an unknown score.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    settings = resolve(
        None,
        {
            "backbone": name,
            "head": "paper" if features == "last" else "aligned",
            "features": features,
            "data": "none",
            "base_classes": base_classes,
            "image_size": size or 0,
        },
    )
    backbone, prepare = create(name, size, weights)
    width = feature_width(backbone, FeatureSpec.parse(features))
    head = _head(random, base_classes, width)
    score = _confidence(random, base_classes, width) if confident else None
    Run.begin(path, settings)
    classes = tuple(f"class {i}" for i in range(base_classes))
    rows = changed_rows(before_all(width), *head, confidence=score)
    update = TaskUpdate(0, "base", classes, np.zeros(0), rows, {})
    base = Base(update, Kept(FeatureStatistics.empty(width), head))
    run = Run.create(path, settings, backbone, prepare, base)
    for _ in range(tasks):
        run.history.follow(_random_update(run, random, new_classes))
    return run


def create(
    name: str, size: int | None = None, weights: Path | None = None
) -> tuple[nn.Module, Preparation]:
    """A timm model with random weights, unless `weights` has them, or MINILM, for texts of TOKENS tokens."""
    if name != MINILM:
        backbone, prepared = backbones.create(name, size, weights, pretrained=False)
        return backbone, Preprocessing(**prepared)
    _, bytewise = encoders.create(MICRO_TEXT, TOKENS, None)
    assert bytewise is not None
    encoder, _ = encoders.create(name, TOKENS, None, json.dumps(ARCHITECTURE))
    return encoder, replace(bytewise, vocabulary=int(ARCHITECTURE["vocab_size"]))


def _head(random: np.random.Generator, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return (random.standard_normal((classes, width)) / width**0.5).astype(np.float32), np.zeros(
        classes, np.float32
    )


def _confidence(random: np.random.Generator, classes: int, width: int) -> Confidence:
    """An unknown score of the largest rank."""
    weight = random.integers(-127, 128, (LIMITS.components, classes)).astype(np.int8)
    small = np.full(len(weight), 1e-4, np.float32)
    mean, precision = np.zeros(width, np.float16), np.full(width, 1e-2, np.float16)
    threshold = np.full(1, -100, np.float32)
    return Confidence(np.ones(1, np.float32), weight, small, small, mean, precision, threshold)


def _random_update(run: Run, random: np.random.Generator, new_classes: int) -> TaskUpdate:
    """A task of random directions of norm 1. It moves the old magnitudes a little; the old head rows stay."""
    task, known = len(run.states), len(run.states[-1].classes)

    def direction(p: Projection) -> Factors:
        A, B = (
            random.standard_normal((RANK, p.columns)),
            random.standard_normal((p.stop - p.start, RANK)),
        )
        return encode(Factors(A, B / np.linalg.norm(B @ A)), run.config.method.encoding)

    deltas = np.append(
        random.integers(-4, 5, task - 1) / 1024, 0.25
    )  # multiples of the magnitudes' step
    weight, bias = _head(random, new_classes, backbones.features(run.backbone))
    classes = tuple(f"class {known + i}" for i in range(new_classes))
    before = run.states[-1]
    head = changed_rows(
        before,
        np.concatenate([before.head_weight, weight]),
        np.concatenate([before.head_bias, bias]),
    )
    factors = {p.name: direction(p) for p in run.projections}
    return TaskUpdate(task, f"task {task}", classes, deltas, head, factors)
