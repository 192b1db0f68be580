"""Every variant of the method reaches the device: the same packets format, the same answers as the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdlora_edge.demo import ship
from sdlora_edge.formats.packet import magnitudes_from
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run

QUICK = {"base_epochs": 3, "epochs": 2, "lr": 0.05}
VARIANTS: dict[str, dict[str, object]] = {
    "the authors' settings": {
        "magnitudes": "reset",
        "magnitude_init": 0.8,
        "magnitude_norm": "factors",
        "head": "paper",
    },
    "RR": {"rank": "4,3@2,2@3"},
    "KD, everything absorbed": {"absorb": 1.0},
    "A shared": {"directions": "shared"},
    "one LoRA": {"method": "lora", "head": "paper"},
    "a frozen backbone": {"method": "frozen"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_host_and_device_agree_on_every_variant(name: str, tmp_path: Path) -> None:
    run = train(resolve(None, {**QUICK, **VARIANTS[name]}), tmp_path / "runs" / "small")
    shipped = ship(run, tmp_path, 0)
    for row in shipped.tasks:
        assert row.same_top == row.images
        assert row.max_logit_difference < 1e-3
    for entry, row in zip(run.metrics[1:], shipped.tasks[1:], strict=True):
        assert (
            abs(entry["packet_bytes"] - row.packet_bytes) < 64
        )  # what the run says a packet takes is what it takes
    ranks = {next(iter(u.factors.values())).A.shape[0] if u.factors else 0 for u in run.updates}
    if name == "RR":
        assert [next(iter(u.factors.values())).A.shape[0] for u in run.updates] == [4, 3, 2]
    elif name.startswith("KD"):
        assert [bool(u.factors) for u in run.updates] == [True, False, False]
        assert [e.get("absorbed") for e in run.metrics[1:]] == [None, True, True]
        assert shipped.tasks[-1].packet_bytes < 0.6 * shipped.tasks[1].packet_bytes
        assert run.updates[-1].deltas[0] != 0  # it went into the old magnitudes
    elif name == "a frozen backbone":
        assert ranks == {0}
        shipped, exact = (
            np.array(run.metrics[-1][name][-1]) for name in ("correct", "frozen_correct")
        )
        assert np.abs(shipped - exact).max() <= 1  # rows of known classes travel as int8 steps
    else:
        assert ranks == {4}
    width = (len(run.projections),) if name == "the authors' settings" else ()
    assert run.states[-1].magnitudes.shape == (3, *width)
    same = Run.open(run.path)
    np.testing.assert_array_equal(same.states[-1].magnitudes, run.states[-1].magnitudes)


@pytest.mark.parametrize(
    "value",
    [
        [1.0, [2.0]],
        [[1.0]],
        [[1.0, 2.0], [1.0]],
        [float("nan"), 1.0],
        [[1.0] * 3, [1e9] * 3],
        "ab",
        [True, 1.0],
        [],
    ],
)
def test_magnitudes_of_another_shape_or_kind_are_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        magnitudes_from(value, 2, 3)  # type: ignore[arg-type]


def test_magnitudes_of_either_shape_are_taken() -> None:
    assert magnitudes_from([1, 2], 2, 3).shape == (2,)
    assert magnitudes_from([[1, 2, 3], [4, 5, 6]], 2, 3).shape == (2, 3)
