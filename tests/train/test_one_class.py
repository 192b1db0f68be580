"""A class that comes alone: a head row and nothing else, in a packet of a few kilobytes, which
every later command takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Fleet, Result, inputs, make_fleet, make_images
from networks import chain, model_of, small_vit
from sdlora_edge.export.packets import build_packets
from sdlora_edge.export.parity import host_logits

from sdlora_edge.device import Device
from sdlora_edge.errors import UsageError
from sdlora_edge.inputs.canary import largest_difference
from sdlora_edge.method import backbones
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.method.lora import OneLoRA
from sdlora_edge.state import TaskUpdate, advance, changed_rows
from sdlora_edge.train import loop, plan
from sdlora_edge.train.config import resolve
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def fleet_of_one(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The small fleet with an aligned head; its run has learned `bolt` alone, `nut` alone, and then
    two classes together."""
    folder = tmp_path_factory.mktemp("one")
    fleet = make_fleet(folder, SMALL | {"head": "aligned"})
    every = make_images(folder / "every", ["bolt", "nut", "gear", "hook"], 8)  # no two look alike
    for names in (["bolt"], ["nut"], ["gear", "hook"]):
        images = folder / "-".join(names)
        for name in names:
            shutil.copytree(every / name, images / name)
        loop.add_task(fleet.run, str(images))
    return fleet


def test_a_class_alone_moves_nothing_but_its_own_row(fleet_of_one: Fleet) -> None:
    run = Run.open(fleet_of_one.run)
    for task, name in ((4, "bolt"), (5, "nut")):
        before, after, update = run.states[task - 1], run.states[task], run.updates[task - 1]
        assert (update.classes, update.factors, update.head.index.tolist()) == ((name,), {}, [])
        np.testing.assert_array_equal(after.head_weight[:-1], before.head_weight)
        np.testing.assert_array_equal(after.magnitudes, [*before.magnitudes, 0])
        assert all(
            (run.weights(task)[name] == run.weights(task - 1)[name]).all()
            for name in run.base_weights
        )
        entry = run.metrics[task]
        assert (entry["rank"], entry["training_images"]) == (0, 6)
        assert entry["correct"][task][task] == entry["totals"][task]  # known at once
        assert entry["packet_bytes"] < 4000
    assert run.states[6].factors  # those who came together have a direction again
    assert run.kept.aligned is not None
    assert run.kept.aligned.counts[-4:].tolist() == [6, 6, 6, 6]


def test_a_device_takes_it_and_gives_it_back(fleet_of_one: Fleet, tmp_path: Path, cli: Cli) -> None:
    built = build_packets(
        fleet_of_one.run, fleet_of_one.bundle, fleet_of_one.key, out=tmp_path / "packets"
    )
    assert [b.task for b in built if b.bytes < 4000] == [4, 5]
    run, packets = Run.open(fleet_of_one.run), [b.file for b in built]
    device = Device.init(fleet_of_one.bundle, tmp_path / "store")
    serving = Device.open(tmp_path / "store")
    for task, path in enumerate(packets, 1):
        assert device.apply(path).task == task
        assert serving.refresh()
        # Logits of these made-up classes reach 1,000, so only the device's own measure says something.
        wanted = host_logits(run, task, inputs(device))
        assert largest_difference(serving.logits(inputs(serving)), wanted) < 3e-6
    assert device.rollback().task == 5
    assert device.rollback().task == 4
    cli("packet", "squash", *packets, "--key", fleet_of_one.key, "--out", tmp_path / "all.sdlora")
    fresh = Device.init(fleet_of_one.bundle, tmp_path / "fresh")
    fresh.apply(tmp_path / "all.sdlora")
    assert fresh.status().state == run.states[6].digest


@pytest.mark.long
def test_every_command_takes_a_run_that_ends_with_one(
    fleet_of_one: Fleet, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(fleet_of_one.run, tmp_path / "run")
    shutil.rmtree(run / "tasks" / "006")
    public = fleet_of_one.key.with_suffix(".pub")
    for command in (
        ("report", "--run", run),
        (
            "eval",
            "--run",
            run,
            "--data",
            make_images(tmp_path / "more", ["bolt", "nut"], 3, seed=0),
        ),
        ("export", "--run", run, "--trust", public, "--out", tmp_path / "bundle"),
        ("bundle", "check", "--run", run, "--bundle", tmp_path / "bundle"),
        ("export", "--run", run, "--task", 4, "--trust", public, "--out", tmp_path / "four"),
        (
            "packet",
            "build",
            "--run",
            run,
            "--bundle",
            tmp_path / "four",
            "--key",
            fleet_of_one.key,
            "--out",
            tmp_path / "p",
        ),
        ("packet", "to-peft", "--bundle", tmp_path / "bundle", "--out", tmp_path / "adapter"),
        ("device", "init", "--bundle", tmp_path / "four", "--store", tmp_path / "store"),
    ):
        done = cli(*command, "--json")
        assert done.code == 0, done
        json.loads(done.out)
    (packet,) = (tmp_path / "p").iterdir()
    assert cli("device", "apply", packet, "--store", tmp_path / "store").code == 0
    alone = cli(
        "packet",
        "to-peft",
        packet,
        "--bundle",
        tmp_path / "four",
        "--out",
        tmp_path / "x",
        "--alone",
    )
    assert (alone.code, "no direction of its own" in alone.err) == (7, True)


def test_a_task_with_one_class_of_a_known_name_fits_its_row_again(
    fleet_of_one: Fleet, tmp_path: Path
) -> None:
    path = shutil.copytree(fleet_of_one.run, tmp_path / "run")
    run = loop.add_task(path, str(make_images(tmp_path / "fog", ["bolt"], 8, seed=9)))
    known = run.states[-2].classes.index("bolt")
    assert run.updates[-1].head.index.tolist() == [known]
    assert run.kept.aligned is not None
    assert run.kept.aligned.counts[known] == 12


def test_a_plain_head_takes_no_class_alone(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"only one class .*another class, or begin a run with --head aligned"
    ):
        plan.one_more(fleet.run, str(make_images(tmp_path / "q", ["new"], 4)))


def test_a_new_run_of_one_class_stays_a_usage_error(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "q", ["new"], 4)
    with pytest.raises(UsageError, match="only one class"):
        loop.train(
            resolve(None, {"data": str(folder), "backbone": "test_vit", "tasks": 1}),
            tmp_path / "run",
        )


def test_the_row_beside_others_is_the_whole_fit_up_to_what_no_answer_depends_on() -> None:
    random = np.random.default_rng(0)
    features, targets = (
        random.normal(size=(60, 8)) + np.repeat(random.normal(size=(6, 8)) * 3, 10, axis=0),
        np.repeat(np.arange(6), 10),
    )
    statistics = FeatureStatistics.empty(8).with_images(features, targets, 6)
    weight, bias = statistics.discriminant()
    shift = random.normal(size=8).astype(np.float32)
    old = 2.5 * weight[:5] + shift, 2.5 * bias[:5] + 7
    found = statistics.beside(*old, np.array([5]))
    np.testing.assert_allclose(found[0][5], 2.5 * weight[5] + shift, atol=1e-3)
    np.testing.assert_allclose(found[1][5], 2.5 * bias[5] + 7, atol=1e-3)
    np.testing.assert_array_equal(found[0][:5], old[0])
    answers = (features @ found[0].T + found[1]).argmax(axis=1)
    np.testing.assert_array_equal(answers, (features @ weight.T + bias).argmax(axis=1))
    # one row alone that is kept tells no scale, and stays as it is
    found = statistics.beside(old[0][:1], old[1][:1], np.arange(1, 6))
    np.testing.assert_array_equal(found[0][:1], old[0][:1])
    np.testing.assert_allclose(found[0] - found[0][0], weight - weight[0], atol=1e-3)


def test_one_lora_goes_on_after_a_task_without_a_direction() -> None:
    backbone = small_vit()
    states = chain(backbone, 1)
    head = states[-1].head_weight, states[-1].head_bias
    states.append(
        advance(
            states[-1], TaskUpdate(2, "alone", (), np.zeros(2), changed_rows(states[-1], *head), {})
        )
    )
    projections = backbones.projections(backbone)
    model = model_of(backbone, states, kind=OneLoRA)
    last = states[1].factors[projections[0].name]
    expected = states[1].magnitudes[0] * last.B.astype(np.float32) @ last.A.astype(np.float32)
    np.testing.assert_allclose((model.B[0] @ model.A[0]).detach().numpy(), expected, atol=1e-6)
