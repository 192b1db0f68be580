"""Packets and bundles through the Python API: results, and what a run keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, make_images
from sdlora_edge.export import packets
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import build_packets
from sdlora_edge.export.parity import host_logits
from sdlora_edge.export.requests import PacketOptions

from sdlora_edge.errors import HealthError
from sdlora_edge.train import loop
from sdlora_edge.train.plan import ClassChanges
from sdlora_edge.train.run import Run


def wrong(run: Run, task: int, inputs: np.ndarray) -> np.ndarray:
    return host_logits(run, task, inputs) + 1


def test_a_run_notes_a_revision_once_its_packet_is_proved(
    fleet: Fleet, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> packets.BuiltPacket:
        options = PacketOptions(task=2, revision=3)
        (built,) = build_packets(run_copy, fleet.bundle, fleet.key, tmp_path / "packets", options)
        return built

    with monkeypatch.context() as patch:
        patch.setattr(packets, "host_logits", wrong)
        with pytest.raises(HealthError):
            build()
    assert [Run.open(run_copy).revision(task) for task in (1, 2, 3)] == [0, 0, 0]
    assert not (tmp_path / "packets").exists()
    built = build()
    assert (built.task, built.revision) == (2, 3)
    assert [Run.open(run_copy).revision(task) for task in (1, 2, 3)] == [0, 3, 3]
    data = built.file.read_bytes()
    assert build().file.read_bytes() == data, "the same revision is built again"


def test_a_packet_that_retires_and_renames_is_proved_and_lists_both(
    fleet: Fleet, run_copy: Path, tmp_path: Path
) -> None:
    loop.add_task(run_copy, None, "tidy", ClassChanges(("3",), {"2": "two"}))
    run = Run.open(run_copy)
    images = make_images(tmp_path / "images", ["two", "3", "4"], 4)
    options = PacketOptions(task=4, images=str(images))
    (built,) = build_packets(run, fleet.bundle, fleet.key, tmp_path / "packets", options)
    assert (built.classes, built.retired, built.renamed) == ((), ("3",), (("2", "two"),))
    assert built.canary_difference is not None
    assert built.canary_difference < 1e-4
    shown = built.to_dict()
    assert (shown["retired"], shown["renamed"]) == (["3"], [["2", "two"]])
    scores = built.accuracy
    assert scores is not None
    assert scores.images == 8, "images of the retired class do not count"
    assert scores.after == scores.after_without_old_rows, "no other row has changed"


def test_results_are_attributes_and_the_json_of_the_command_line(
    fleet: Fleet, tmp_path: Path
) -> None:
    run = Run.open(fleet.run)
    public = str(fleet.key.with_suffix(".pub"))
    bundle = export_bundle(run, tmp_path / "bundle", 0, [public])
    shown: dict[str, Any] = bundle.to_dict()
    assert shown["bundle"] == str(bundle.bundle) == str(tmp_path / "bundle")
    assert shown["agreement"] == bundle.parity.same_top / bundle.parity.images == 1
    assert "adapter" not in shown
    assert "parity" not in shown
    for where in (run, fleet.run):
        built = build_packets(where, bundle.bundle, fleet.key, tmp_path / "packets")
        assert [one.file.name for one in built] == [path.name for path in fleet.packets]
    shown = built[0].to_dict()
    assert (shown["file"], shown["classes"]) == (str(built[0].file), list(built[0].classes))
    assert (shown["retired"], shown["renamed"]) == ([], [])
    assert "accuracy" not in shown
