"""Sources of images, and how they are cut."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images, shared

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.train import splits
from sdlora_edge.train.source import SeedSplit, Source

PREPARE = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)


def counts(source: Source) -> dict[str, tuple[int, int]]:
    return {c: (len(source.train[c]), len(source.test[c])) for c in source.classes}


def test_class_folders_are_split_by_the_seed_and_every_image_is_used_once(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 10)
    one, same, other = (splits.load(str(folder), SeedSplit(0.3, seed)) for seed in (1, 1, 2))
    assert counts(one) == {"a": (7, 3), "b": (7, 3)}
    names = [[p.name for p in s.test["a"]] for s in (one, same, other)]
    assert names[0] == names[1] != names[2]
    assert len({p.name for p in (*one.train["a"], *one.test["a"])}) == 10


def test_a_class_of_two_has_one_on_each_side(tmp_path: Path) -> None:
    assert counts(
        splits.load(str(make_images(tmp_path / "p", ["a", "b"], 2)), SeedSplit(0.1, 0))
    ) == {
        "a": (1, 1),
        "b": (1, 1),
    }


def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    make_images(tmp_path / "p" / "train", ["a", "b"], 5)
    make_images(tmp_path / "p" / "test", ["a", "b"], 3)
    assert counts(splits.load(str(tmp_path / "p"), SeedSplit(0.5, 0))) == {"a": (5, 3), "b": (5, 3)}


def test_test_without_train_or_with_other_classes_is_an_error(tmp_path: Path) -> None:
    make_images(tmp_path / "p" / "train", ["a", "b"], 3)
    make_images(tmp_path / "p" / "test", ["a", "c"], 3)
    with pytest.raises(InputError, match="c"):
        splits.load(str(tmp_path / "p"), SeedSplit(0.5, 0))
    make_images(tmp_path / "q" / "test", ["a", "b"], 3)
    with pytest.raises(InputError, match="train/"):
        splits.load(str(tmp_path / "q"), SeedSplit(0.5, 0))


def test_a_zip_is_a_folder_and_deeper_folders_are_joined(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["x/a", "x/b", "y/a"], 4)
    (folder / "x" / "a" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "z.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path("outer") / path.relative_to(folder))
    from_zip, from_folder = (
        splits.load(str(tmp_path / "p.zip"), SeedSplit(0.25, 0)),
        splits.load(str(folder), SeedSplit(0.25, 0)),
    )
    assert counts(from_zip) == counts(from_folder) == {"x.a": (3, 1), "x.b": (3, 1), "y.a": (3, 1)}
    pixels = [
        splits.decode(s.train, ["x.b"], PREPARE, need=True).pixels for s in (from_zip, from_folder)
    ]
    np.testing.assert_array_equal(*pixels)


def test_one_class_folder_keeps_its_name(tmp_path: Path) -> None:
    assert splits.load(
        str(make_images(tmp_path / "p", ["scratch"], 4)), SeedSplit(0.25, 0)
    ).classes == ("scratch",)


def test_names_that_cannot_be_told_apart_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one class name"):
        splits.load(str(make_images(tmp_path / "p", ["x/a", "x.a/", "y/b"], 2)), SeedSplit(0.5, 0))


def test_tasks_cover_all_classes_once_in_the_customary_order() -> None:
    classes = [f"{i:02d}" for i in range(11)]
    stream = splits.task_classes(classes, 3, 3, 1993)
    assert [len(task) for task in stream] == [3, 3, 3, 2]
    flat = [c for task in stream for c in task]
    assert sorted(flat) == classes
    np.random.seed(1993)
    assert flat == [classes[i] for i in np.random.permutation(11)]
    with pytest.raises(UsageError, match="too few"):
        splits.task_classes(classes, 0, 6, 0)


def test_omniglot_and_its_fellows_open_as_they_are() -> None:
    omniglot = splits.load(str(shared("omniglot_small1.zip")), SeedSplit(0.3, 1993))
    assert len(omniglot.classes) == 136
    assert set(counts(omniglot).values()) == {(14, 6)}
    assert "Latin.character01" in omniglot.classes
    caltech = splits.load(str(shared("caltech101_128px_max50.zip")), SeedSplit(0.3, 1993))
    assert len(caltech.classes) == 101
    pacs = splits.load(str(shared("pacs_128px.zip")), SeedSplit(0.3, 1993))
    assert len(pacs.classes) == 28
    assert "photo.dog" in pacs.classes
