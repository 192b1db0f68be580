"""What a user is told of the images before anything is trained."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, make_images
from PIL import Image

from sdlora_edge.errors import InputError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.method import backbones
from sdlora_edge.train import inventory, splits
from sdlora_edge.train.loop import add_task, train
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.source import Source

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sdlora_edge")


def settings(folder: Path, **changes: object) -> Settings:
    return Settings().changed(**{"data": str(folder), "tasks": 1, "test_fraction": 0.4, **changes})


def checked(config: Settings) -> Source:
    return inventory.checked(splits.load_for(config), lambda s: splits.parts(s, config), config)[0]


def table(caplog: pytest.LogCaptureFixture) -> dict[str, list[str]]:
    """The cells of each row, by class."""
    lines = [r.getMessage().strip() for r in caplog.records if r.levelno == logging.INFO]
    start = next(i for i, line in enumerate(lines) if line.startswith("class"))
    return {line[:8].strip(): line[8:].split(None, 3) for line in lines[start + 1 :]}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def damaged(folder: Path) -> Path:
    """Two classes of ten, the first with a damaged image and a file that is none; a tiny third."""
    make_images(folder, ["a", "b"], 10)
    make_images(folder, ["few", "one"], 3)
    for i in (1, 2):
        (folder / "one" / f"0{i}.png").unlink()
    whole = (folder / "a" / "00.png").read_bytes()
    (folder / "a" / "00.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "01.png").write_bytes(b"no image")
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "b" / "more").mkdir()
    shutil.copy(folder / "b" / "00.png", folder / "b" / "more" / "n.png")
    (folder / "empty").mkdir()
    return folder


def test_the_table_counts_every_file_and_the_warnings_name_what_is_odd(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = checked(settings(damaged(tmp_path / "p")))
    rows = table(caplog)
    assert list(rows) == ["a", "b", "empty", "few", "one", "all 5"]
    assert [int(rows["a"][i]) for i in (0, 1, 2)] in ([6, 0, 2], [5, 0, 3], [4, 0, 4])
    assert rows["a"][3] in ("unreadable: 2, not an image: 1", "not an image: 1, unreadable: 2")
    assert rows["b"] == ["7", "0", "4"]
    assert rows["empty"] == ["0", "0", "0", "an empty folder: 1"]
    assert (rows["few"], rows["one"]) == (["2", "0", "1"], ["1", "0", "0"])
    assert sum(map(int, rows["all 5"][:3])) == 8 + 11 + 3 + 1
    found = warnings(caplog)
    assert found[:3] == [
        "classes without a readable image: empty",
        "classes with fewer than 5 training images: "
        + ("few, one" if int(rows["a"][0]) > 4 else "a, few, one"),
        "classes without a test image: one",
    ]  # fmt: skip
    assert found[3].startswith("2 skipped, unreadable: ")
    assert "p/a/00.png cannot be read as an image: " in found[3]
    assert found[4].startswith(
        "1 in a folder inside a class folder, used as images of that class: "
    )
    assert len(found) == 5
    assert {p.name.rpartition("/")[2] for p in inventory.unused(source)} == {
        "00.png",
        "01.png",
        "notes.txt",
        "empty",
    }


def test_with_validate_the_columns_say_what_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, count in (("train", 10), ("test", 4)):
        make_images(tmp_path / "p" / split, ["a", "b"], count)
    checked(settings(tmp_path / "p", validate=0.5))
    assert table(caplog)["a"] == ["5", "5", "4"]
    caplog.clear()
    make_images(tmp_path / "p" / "val", ["a"], 3)
    checked(settings(tmp_path / "p", validate=0.5))
    assert (table(caplog)["a"], table(caplog)["b"]) == (["10", "3", "4"], ["10", "0", "4"])
    assert warnings(caplog) == ["classes without a validation image: b"]


def test_what_was_named_once_is_not_named_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(damaged(tmp_path / "p"))
    source = checked(config)
    caplog.clear()
    (part,) = splits.parts(source, config)
    prepare = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    for cache in (1.0, 0.0):
        found = splits.read(part.train, part.classes, prepare, cache)
        assert len(found) == sum(not p.problem for own in part.train.values() for p in own)
    assert not caplog.records


def test_of_many_classes_only_the_odd_ones_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(
        tmp_path / "p", [f"c{i:03}" for i in range(inventory.ROWS + 20)], 10, size=4
    )
    shutil.rmtree(folder / "c007")
    make_images(folder, ["c007"], 2, size=4)
    (folder / "c008" / "00.png").write_bytes(b"x")
    checked(settings(folder))
    lines = [r.getMessage().strip() for r in caplog.records if r.levelno == logging.INFO]
    assert [line.split()[0] for line in lines] == ["class", "c007", "c008", "all", "58"]
    assert lines[-1] == "58 more classes are not shown"
    caplog.clear()
    for name in folder.iterdir():
        for path in sorted(name.iterdir())[4:]:
            path.unlink()
    checked(settings(folder))
    assert len([r for r in caplog.records if r.levelno == logging.INFO]) == inventory.ROWS + 3
    assert any(w.endswith(f"c004 and {inventory.ROWS + 15} more") for w in warnings(caplog))


def test_beyond_a_budget_headers_alone_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 10)
    whole = (folder / "b" / "00.png").read_bytes()
    (folder / "b" / "00.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "01.png").write_bytes(b"x")
    for budget, problems in ((inventory.DECODED, 2), (0, 1)):
        monkeypatch.setattr(inventory, "DECODED", budget)
        assert len(inventory.unused(checked(settings(folder)))) == problems


def test_a_class_without_a_readable_image_is_refused_before_weights_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 10)
    for path in (folder / "b").iterdir():
        path.write_bytes(b"x")
    monkeypatch.setattr(backbones, "create", lambda *_: pytest.fail("a backbone was made"))
    with pytest.raises(
        InputError,
        match="class 'b' has no readable training image: repair its files or remove its folder",
    ):
        train(settings(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strict_makes_warnings_errors_before_anything_is_trained(tmp_path: Path, cli: Cli) -> None:
    flags = (
        "--backbone",
        "micro_vit",
        "--base-classes",
        2,
        "--tasks",
        1,
        "--out",
        tmp_path / "run",
    )
    found = cli("train", "--data", damaged(tmp_path / "p"), "--strict", *flags)
    assert found.code == 3
    assert "warning(s), which --strict makes errors" in found.err
    assert not (tmp_path / "run").exists()


def test_the_skipped_files_are_listed_in_the_run_with_those_of_later_tasks(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "p")
    micro = {
        "backbone": "micro_vit",
        "base_classes": 2,
        "base_epochs": 1,
        "epochs": 1,
        "image_size": 8,
        "rank": "1",
    }
    run = train(settings(folder, **micro), tmp_path / "run")
    more = make_images(tmp_path / "more", ["x", "y"], 10)
    (more / "x" / "00.png").write_bytes(b"x")
    (more / "x" / "a\nb.jp2").write_bytes(b"x")
    add_task(run.path, str(more))
    with open(tmp_path / "run" / inventory.SKIPPED, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row["class"], row["reason"]) for row in rows] == [
        ("notes.txt", "a", "not an image"),
        ("empty", "empty", "an empty folder"),
        ("00.png", "a", "unreadable"),
        ("01.png", "a", "unreadable"),
        ("a\\nb.jp2", "x", "an image format that is not read (.jp2)"),
        ("00.png", "x", "unreadable"),
    ]
    assert rows[3]["detail"].startswith(
        "cannot be read as an image: it is damaged, or none of JPEG"
    )


def test_the_default_data_are_checked_too(caplog: pytest.LogCaptureFixture) -> None:
    checked(Settings().changed(tasks=1))
    assert table(caplog)["all 10"] == ["1438", "0", "359"]
    assert not warnings(caplog)


def test_a_grey_image_of_many_bits_is_no_problem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 10)
    Image.new("I;16", (20, 20)).save(folder / "a" / "00.png")
    checked(settings(folder))
    assert not warnings(caplog)


def test_what_training_refuses_the_check_refuses_first(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 6)
    for i in range(6):
        Image.new("RGB", (400, 4)).save(folder / "b" / f"0{i}.png")
    with pytest.raises(InputError, match="class 'b' has no readable training image"):
        checked(settings(folder))


def test_only_new_files_are_told_of(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "p", ["x", "y"], 6)
    (folder / "x" / "notes.txt").write_text("x")
    add_task(run_copy, str(folder))
    assert (
        f"{run_copy / 'skipped.csv'} says why files are not used: 1 of this dataset" in caplog.text
    )
    caplog.clear()
    add_task(run_copy, str(make_images(tmp_path / "q", ["z", "w"], 6)))
    assert "skipped.csv" not in caplog.text
