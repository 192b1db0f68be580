"""Bad input gives one clear line and its exit code, and changes nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Fleet, Result, make_fleet, make_images, snapshot
from faults.scenarios import Orders
from PIL import Image

from sdlora_edge.device import Device
from sdlora_edge.errors import MESSAGE_LIMIT, InputError
from sdlora_edge.storage import atomic

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr (stages, the header of a training and warnings apart), the right code, nothing on
    stdout, no traceback."""
    lines = [
        line
        for line in result.err.splitlines()
        if line
        and not line.endswith(" ...")
        and not line.startswith(
            ("  ", "warning: ", "model  ", "device  ", "classes  ", "images  ", "tasks  ")
        )
    ]
    assert result.code == code, result
    assert len(lines) == 1, result
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0]


def test_bad_images(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def train(data: Path, *more: object) -> Result:
        base = (
            "--backbone",
            "micro_vit",
            "--base-classes",
            2,
            "--tasks",
            1,
            "--epochs",
            1,
            "--image-size",
            16,
        )
        return cli("train", "--data", data, *base, "--out", out, *more)

    refused(train(tmp_path / "none"), 3, "no such folder")
    (tmp_path / "file.txt").write_text("hello")
    refused(train(tmp_path / "file.txt"), 3, "neither a folder nor a ZIP")
    (tmp_path / "empty").mkdir()
    refused(train(tmp_path / "empty"), 3, "no class folders")
    refused(train(make_images(tmp_path / "one", ["only"], 4)), 2, "only one class", "only")
    refused(train(make_images(tmp_path / "few", ["a", "b", "c"], 4)), 2, "too few")
    bad = make_images(tmp_path / "bad", ["a", "b", "c", "d"], 4)
    for image in (bad / "c").iterdir():
        image.write_bytes(b"no image")
    result = train(bad)
    refused(result, 3, "'c'", "no readable")
    assert result.err.count("cannot be read as an image") >= 3
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0no weights here.")
    good = make_images(tmp_path / "good", ["a", "b", "c", "d"], 4)
    refused(
        train(
            good, "--backbone", "vit_tiny_patch16_224", "--base-classes", 0, "--weights", weights
        ),
        3,
        "is not a safetensors file",
    )
    refused(train(good, "--backbone", "vit_nonsense"), 2, "not known to timm")
    refused(train(good, "--backbone", "resnet18", "--base-classes", 2), 2)
    assert "'carry', 'reset'" in train(good, "--magnitudes", "sideways").err
    refused(train(good, "--mean", "a,b"), 2, "three numbers")
    (tmp_path / "bad.toml").write_text("learning_rate = 1")
    refused(train(good, "--config", tmp_path / "bad.toml"), 2, "learning_rate", "known are")
    assert not out.exists()


def test_an_unreadable_image_is_named_counted_and_skipped(cli: Cli, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", ["a", "b", "c", "d"], 6)
    (data / "b" / "00.png").write_bytes(b"damaged")
    base = (
        "--backbone",
        "micro_vit",
        "--base-classes",
        2,
        "--tasks",
        1,
        "--epochs",
        1,
        "--image-size",
        16,
    )
    result = cli("train", "--data", data, *base, "--out", tmp_path / "run", "--json")
    assert result.code == 0
    assert "1 skipped, unreadable: " in result.err
    assert "b/00.png cannot be read as an image" in result.err
    assert json.loads(result.out)["classes"]


def test_without_weights_and_network_there_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = make_images(tmp_path / "data", ["a", "b"], 4)
    program = "import sys; from sdlora_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", "--data", str(data), "--tasks", "1", "--out", str(tmp_path / "run")]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "--weights FILE" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Another lineage: the same classes, another seed."""
    return make_fleet(tmp_path_factory.mktemp("foreign"), {**SMALL, "seed": 7, "tasks": 1})


def test_bad_packets_leave_the_store_as_it_was(
    cli: Cli, fleet: Fleet, foreign: Fleet, store: Path, tmp_path: Path
) -> None:
    first, second, third = fleet.packets
    before = snapshot(store)

    def apply(path: Path) -> Result:
        return cli("device", "apply", path, "--store", store)

    data = first.read_bytes()
    (tmp_path / "cut.sdlora").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[-100] ^= 4
    (tmp_path / "flipped.sdlora").write_bytes(flipped)
    foreign_signed = [p for p in foreign.packets]
    refused(apply(tmp_path / "none.sdlora"), 3, "none.sdlora")
    refused(apply(tmp_path / "cut.sdlora"), 3)
    refused(apply(tmp_path / "flipped.sdlora"), 3, "damaged")
    refused(apply(foreign_signed[0]), 4, "signature refused")
    refused(apply(second), 5, "out of order", "apply 1 first")
    refused(apply(third), 5, "apply 1 and 2 first")
    assert snapshot(store) == before
    lineage = tmp_path / "lineage"
    result = cli(
        "packet",
        "build",
        "--run",
        foreign.run,
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--out",
        lineage,
    )
    refused(result, 5, "name the bundle of this run")
    assert not lineage.exists()
    # the same key, another lineage
    bundle = tmp_path / "bundle"
    public = fleet.key.with_suffix(".pub")
    assert (
        cli("export", "--run", foreign.run, "--task", 0, "--trust", public, "--out", bundle).code
        == 0
    )
    built = cli(
        "packet",
        "build",
        "--run",
        foreign.run,
        "--bundle",
        bundle,
        "--key",
        fleet.key,
        "--out",
        lineage,
        "--json",
    )
    refused(apply(Path(json.loads(built.out)["packets"][0]["file"])), 5, "another lineage")
    assert snapshot(store) == before


def test_replays_and_repeats(cli: Cli, fleet: Fleet, store: Path) -> None:
    assert cli("device", "apply", *fleet.packets[:2], "--store", store).code == 0
    before = snapshot(store)
    refused(cli("device", "apply", fleet.packets[1], "--store", store), 7, "applied already")
    refused(cli("device", "apply", fleet.packets[0], "--store", store), 7, "applied already")
    assert snapshot(store) == before
    assert cli("device", "rollback", "--store", store).code == 0
    assert cli("device", "rollback", "--store", store).code == 0
    refused(cli("device", "rollback", "--store", store), 7, "nothing to roll back")
    refused(
        cli("device", "apply", fleet.packets[0], "--store", store), 4, "not newer than packet 2"
    )
    assert cli("device", "apply", *fleet.packets[:2], "--store", store, "--allow-older").code == 0
    assert cli("device", "apply", fleet.packets[2], "--store", store).code == 0


def test_of_several_packets_those_that_a_device_has_are_skipped(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    """The README's `apply packets/*.sdlora`, week after week."""
    for count in (1, 3):
        result = cli("device", "apply", *fleet.packets[:count], "--store", store)
        assert (result.code, f"task {count} in force" in result.out) == (0, True)
    before = snapshot(store)
    again = cli("device", "apply", *fleet.packets, "--store", store)
    assert (again.code, again.out.count("applied already"), again.err) == (0, 3, "")
    cut = tmp_path / "cut.sdlora"
    cut.write_bytes(fleet.packets[0].read_bytes()[:100])
    found = cli("device", "apply", fleet.packets[2], cut, "--store", store)
    assert (found.code, f"{cut}: " in found.err, "ends within its header" in found.err) == (
        3,
        True,
        True,
    )
    assert snapshot(store) == before
    revocation = tmp_path / "revocation.sdlora"
    order = (
        "packet",
        "revoke",
        "--bundle",
        fleet.bundle,
        "--task",
        5,
        "--key",
        fleet.key,
        "--out",
        revocation,
    )
    assert cli(*order).code == 0
    assert cli("device", "apply", revocation, "--store", store).code == 0
    for _ in (3, 2, 1):
        assert cli("device", "rollback", "--store", store).code == 0
    # obeyed already, and the same packet twice; what is too large comes after what is applied
    large = tmp_path / "large.sdlora"
    large.touch()
    os.truncate(large, 1 << 30)
    twice = (revocation, *fleet.packets[:2], *fleet.packets[:2], large)
    found = cli("device", "apply", *twice, "--allow-older", "--store", store)
    shown = f"{fleet.packets[1]}: task 2\n" in found.out
    assert (found.code, shown, str(large) in found.err) == (3, True, True)
    assert cli("device", "apply", revocation, fleet.packets[0], "--store", store).code == 0


@pytest.mark.parametrize("text", ["x" * 5000, "\x1b" * 999, "\U000e0001" * 5000])
def test_a_message_is_never_longer_than_its_limit(text: str) -> None:
    shown = str(InputError(f"begin {text} end"))
    assert len(shown) <= MESSAGE_LIMIT
    assert shown.isprintable()
    assert shown.startswith("begin")
    assert shown.endswith("end")


def test_bad_runs_bundles_stores_and_keys(
    cli: Cli, fleet: Fleet, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("export"), 3, "runs/latest")
    refused(cli("export", "--run", tmp_path), 3, "not a run")
    refused(cli("export", "--run", fleet.run, "--task", 9), 2, "tasks 0 to 3")
    refused(cli("export", "--run", fleet.run, "--target", "tpu"), 2, "tpu")
    refused(cli("export", "--run", fleet.run, "--trust", "nobody"), 3, "no key 'nobody'")
    refused(cli("export", "--run", fleet.run, "--out", fleet.bundle), 2, "exists already")
    refused(cli("packet", "build", "--run", fleet.run, "--bundle", fleet.bundle), 2, "keys new")
    refused(
        cli("packet", "build", "--run", fleet.run, "--bundle", tmp_path, "--key", fleet.key),
        3,
        "manifest.json",
    )
    refused(
        cli(
            "packet",
            "build",
            "--run",
            fleet.run,
            "--bundle",
            fleet.bundle,
            "--key",
            fleet.key,
            "--task",
            7,
        ),
        2,
        "--task 7",
    )
    (tmp_path / "file").touch()
    for command in (
        ("export", "--run", fleet.run, "--out"),
        ("device", "init", "--bundle", fleet.bundle, "--store"),
    ):
        refused(cli(*command, tmp_path / "file" / "out"), 3, "cannot be written")
    (tmp_path / "file").unlink()
    refused(cli("device", "status", "--store", tmp_path), 3, "not a store")
    refused(
        cli("device", "init", "--bundle", tmp_path / "none", "--store", tmp_path / "s"),
        3,
        "not a bundle",
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(fleet.bundle, damaged)
    data = bytearray((damaged / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(data)
    refused(
        cli("device", "init", "--bundle", damaged, "--store", tmp_path / "s"),
        3,
        "weights.safetensors",
        "not the file",
    )
    state = run_copy / "tasks" / "002" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    refused(cli("export", "--run", run_copy), 3, "does not follow")
    assert {p.name for p in tmp_path.iterdir()} == {"damaged", "run"}
    for arguments in (["device"], ["device", "apply"], ["nonsense"], ["train", "--epochs", "many"]):
        assert cli(*arguments).code == 2
    refused(cli("train", "--run", fleet.run, "--lr", "0.1"), 2, "--lr")
    refused(cli("train", "--run", fleet.run, "--data", "digits"), 2, "already")


def test_a_bug_of_ours_is_one_line_and_shows_its_place_only_with_debug(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "status", lambda self: 1 / 0)
    refused(cli("device", "status", "--store", store), 1, "internal error", "ZeroDivisionError")
    assert "Traceback" in cli("--debug", "device", "status", "--store", store).err


def test_json_is_all_there_is_on_stdout(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    image = tmp_path / "p.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
    for arguments in (
        ("device", "apply", *fleet.packets, "--store", store),
        ("device", "status", "--store", store),
        ("device", "verify", "--store", store),
        ("device", "predict", image, image, "--store", store, "--top", 3),
        ("device", "rollback", "--store", store),
        ("packet", "inspect", fleet.packets[0]),
        ("packet", "verify", fleet.packets[0], "--bundle", fleet.bundle),
        (
            "packet",
            "build",
            "--run",
            fleet.run,
            "--bundle",
            fleet.bundle,
            "--key",
            fleet.key,
            "--out",
            tmp_path / "p",
            "--task",
            2,
        ),
        ("keys", "new", "other", "--out", tmp_path / "keys"),
        ("train", "--run", fleet.run),
    ):
        result = cli(*arguments, "--json")
        assert result.code == 0, result
        assert isinstance(json.loads(result.out), dict)
    assert [p.name[:3] for p in (tmp_path / "p").iterdir()] == ["002"]


def test_an_error_is_json_too_beside_what_was_done(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    """stderr has its line all the same."""
    cut = tmp_path / "cut.sdlora"
    cut.write_bytes(fleet.packets[1].read_bytes()[:100])
    for code, *arguments in (
        (3, "device", "status", "--store", tmp_path),
        (3, "device", "verify", "--store", tmp_path),
        (2, "device", "predict", "--store", store),
        (2, "device", "apply", "--nonsense"),
        (3, "device", "watch", tmp_path, "--store", tmp_path, "--once"),
        (3, "device", "selftest", "--bundle", tmp_path, "--packets", tmp_path),
        (7, "device", "rollback", "--store", store),
        (5, "device", "apply", fleet.packets[1], "--store", store),
        (3, "packet", "inspect", cut),
        (3, "packet", "build", "--run", tmp_path, "--bundle", fleet.bundle, "--key", fleet.key),
        (3, "bundle", "inspect", "--bundle", tmp_path),
        (2, "keys", "new", "a/b"),
        (3, "export", "--run", tmp_path),
        (3, "eval", "--run", tmp_path, "--data", tmp_path),
        (3, "report", "--run", tmp_path, "--out", tmp_path / "r.html"),
        (3, "train", "--data", tmp_path / "none", "--tasks", 1),
        (2, "nonsense"),
    ):
        result = cli(*arguments, "--json")
        assert result.code == code, result
        error = json.loads(result.out)["error"]
        assert error["exit_code"] == code
        assert error["message"] in " ".join(result.err.split()) or code == 2
    result = cli(
        "device", "apply", *fleet.packets[:2], cut, fleet.packets[2], "--store", store, "--json"
    )
    value = json.loads(result.out)
    assert (
        result.code,
        [one["task"] for one in value["applied"]],
        value["error"]["exit_code"],
    ) == (3, [1, 2], 3)
    assert str(cut) in value["error"]["message"]
    value = json.loads(cli("device", "apply", *fleet.packets, "--store", store, "--json").out)
    assert ([one["task"] for one in value["applied"]], value["skipped"]) == (
        [3],
        [
            {"file": str(path), "reason": "this packet is applied already"}
            for path in fleet.packets[:2]
        ],
    )


def test_an_interruption_tells_what_was_done(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, receive = Orders(fleet, tmp_path), atomic.receive

    def interrupted(path: Path, limit: int) -> bytes:
        if path == orders.renewed[1]:
            raise KeyboardInterrupt
        return receive(path, limit)

    monkeypatch.setattr(atomic, "receive", interrupted)
    packets = fleet.packets[0], orders.rotation, orders.renewed[1]
    result = cli("device", "apply", *packets, "--store", store, "--json")
    value = json.loads(result.out)
    assert (result.code, len(value["applied"]), value["error"]["exit_code"]) == (130, 2, 130)


@pytest.mark.parametrize("stdout", ["full disk", "closed pipe"])
@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_output_that_cannot_be_written_stops_no_work(
    fleet: Fleet, store: Path, stdout: str, json_option: list[str]
) -> None:
    program = [sys.executable, "-m", "sdlora_edge", "device"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if stdout == "full disk" else writer, "wb") as out:
        for code, *arguments in (
            (8, "apply", *fleet.packets[:2]),
            (8, "status"),
            (3, "apply", fleet.packets[0], store / "none"),
        ):
            line = [*program, *map(str, arguments), "--store", str(store), *json_option]
            done = subprocess.run(line, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
            assert done.returncode == code, done.stderr
            assert "output is lost" in done.stderr
            assert ("the command did its work" in done.stderr) == (code == 8)
            assert not any(word in done.stderr for word in ("Traceback", "Exception", "internal"))
    assert Device.open(store).status().task == 2


def test_predict_answers_image_by_image(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "images", ["a", "b"], 2)
    (images / "a" / "bad.png").write_bytes(b"no image")
    (images / "b" / "notes.txt").write_text("no image, and not meant to be one")
    (images / "b" / "._00.png").write_bytes(b"what a Mac leaves")
    (images / "b" / "loop").symlink_to(images)
    good = images / "a" / "00.png"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(good.read_bytes())))
    result = cli(
        "device",
        "predict",
        good,
        images,
        tmp_path / "none.png",
        "-",
        "--store",
        store,
        "--batch-size",
        2,
        "--json",
    )
    entries = json.loads(result.out)["predictions"]
    names = ["a/00.png", "a/01.png", "a/bad.png", "b/00.png", "b/01.png"]
    assert result.code == 3
    assert [entry["image"] for entry in entries] == [
        str(good),
        *(str(images / n) for n in names),
        str(tmp_path / "none.png"),
        "-",
    ]
    assert [i for i, entry in enumerate(entries) if "error" in entry] == [3, 6]
    assert entries[3]["error"]["exit_code"] == 3
    assert "bad.png" in entries[3]["error"]["message"]
    alone = json.loads(cli("device", "predict", good, "--store", store, "--json").out)[
        "predictions"
    ][0]
    for entry in (entries[0], entries[1], entries[7]):  # batches of one or two are rounded apart
        assert set(entry) == {"image", "known", "score", "threshold", "generation", "top"}
        assert (entry["known"], entry["generation"]) == (alone["known"], alone["generation"])
        assert entry["score"] == pytest.approx(alone["score"], abs=1e-5)
        assert [one["class"] for one in entry["top"]] == [one["class"] for one in alone["top"]]
    result = cli("device", "predict", images / "a", "--store", store)
    assert (result.code, len(result.out.splitlines())) == (3, 2)
    assert len(result.err.splitlines()) == 1
    assert "bad.png" in result.err
    (tmp_path / "empty").mkdir()
    for stdin, said in (
        (None, "standard input is closed: name a file"),
        (io.TextIOWrapper(io.BytesIO(bytes(11))), "more than the 10"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr("sdlora_edge.cli.device.MAX_FILE", 10)
        result = cli("device", "predict", good, "-", good, "--store", store, "--json")
        entries = json.loads(result.out)["predictions"]
        assert (
            result.code,
            [i for i, entry in enumerate(entries) if "error" in entry],
            len(entries),
        ) == (3, [1], 3)
        assert said in entries[1]["error"]["message"]
    refused(cli("device", "predict", tmp_path / "empty", "--store", store), 3, "holds no image")


def test_every_command_has_help(cli: Cli) -> None:
    groups = {
        "keys": ["new"],
        "bundle": ["inspect"],
        "packet": [
            "build",
            "inspect",
            "verify",
            "sign",
            "squash",
            "trust",
            "revoke",
            "to-peft",
            "from-peft",
        ],
        "device": ["init", "apply", "predict", "status", "verify", "rollback", "export-weights"],
    }
    words = [
        [],
        ["train"],
        ["export"],
        ["demo"],
        *([g, c] for g, commands in groups.items() for c in ["", *commands]),
    ]
    for line in words:
        result = cli(*filter(None, line), "--help")
        assert result.code == 0
        assert "Usage" in result.out


def test_verify_says_what_inspect_does_not(cli: Cli, fleet: Fleet, foreign: Fleet) -> None:
    shown = cli("packet", "inspect", foreign.packets[0])
    assert shown.code == 0
    assert "not verified" in shown.out
    refused(
        cli("packet", "verify", foreign.packets[0], "--bundle", fleet.bundle),
        4,
        "signature refused",
    )
    assert "good, task 1" in cli("packet", "verify", fleet.packets[0], "--bundle", fleet.bundle).out


def test_large_images_are_left_out_wherever_images_are_read(
    cli: Cli, fleet: Fleet, tmp_path: Path
) -> None:
    label = json.loads(cli("bundle", "inspect", "--bundle", fleet.bundle, "--json").out)["classes"][
        0
    ]
    folder = tmp_path / "images" / label
    folder.mkdir(parents=True)
    for name, side in (("small", 8), ("large", 1200)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(folder / f"{name}.png")
    used = ("--run", fleet.run, "--data", tmp_path / "images", "--json")
    packet = ("packet", "build", "--bundle", fleet.bundle, "--key", fleet.key, "--task", 1)
    for bound, count in (((), 2), (("--max-megapixels", 1), 1)):
        assert json.loads(cli("eval", *used, *bound).out)["total"] == count
        built = cli(*packet, *used, *bound, "--out", tmp_path / "packets").out
        assert json.loads(built)["packets"][0]["accuracy"]["images"] == count
    expect = ("expect", folder, "--run", fleet.run, "--out", tmp_path / "expected")
    refused(cli(*expect, "--max-megapixels", 1), 3, "large.png")
    assert cli(*expect).code == 0


def test_what_a_task_retires_and_renames_is_shown(
    cli: Cli, fleet: Fleet, run_copy: Path, tmp_path: Path
) -> None:
    """By name where it is built; by row where a packet alone is read."""
    first, second = json.loads(cli("bundle", "inspect", "--bundle", fleet.bundle, "--json").out)[
        "classes"
    ][:2]
    change = ("--retire", first, "--rename", f"{second}=second")
    assert cli("train", "--run", run_copy, *change).code == 0
    used = ("--bundle", fleet.bundle, "--key", fleet.key, "--task", 4, "--out", tmp_path / "out")
    built = cli("packet", "build", "--run", run_copy, *used)
    assert f"task 4: retires {first}, renames {second} to second" in built.out, built
    (packet,) = (tmp_path / "out").iterdir()
    for result in (
        cli("packet", "inspect", packet),
        cli("packet", "verify", packet, "--bundle", fleet.bundle),
    ):
        assert "retires row 0; renames row 1 to second" in result.out, result
