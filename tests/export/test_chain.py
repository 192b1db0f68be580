"""Twenty packets in a row, on every target: after each the device computes what torch computes, on real images."""

from __future__ import annotations

from pathlib import Path

import chain
import pytest
import random_runs
from conftest import shared
from sdlora_edge.export.requests import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("model", "size", "weights"),
    [
        ("micro_vit", None, None),
        pytest.param(
            "vit_tiny_patch16_224",
            64,
            "vit_tiny_patch16_224.fp16.safetensors",
            marks=pytest.mark.long,
        ),
        pytest.param("efficientnet_lite0", 64, None, marks=pytest.mark.long),
    ],
)
def test_a_chain_of_twenty_packets(
    model: str, size: int | None, weights: str | None, target: str, tmp_path: Path
) -> None:
    if (model, target) == ("vit_tiny_patch16_224", "executorch"):
        pytest.skip("lowering takes half a minute: make bench-chain has it")
    shared("omniglot_small1.zip")
    found = shared(weights) if weights else None
    run = random_runs.make_run(
        model, tmp_path / "run", chain.PACKETS, chain.BASE, chain.NEW, size=size, weights=found
    )
    inputs = chain.images(run, 8)
    differences = chain.follow(run, tmp_path, inputs, target=target)
    assert len(differences) == 20
    assert 0 < max(differences) <= 1e-4
    first, last = (run.states[t] for t in (0, 20))
    assert len(last.classes) == len(first.classes) + 80
