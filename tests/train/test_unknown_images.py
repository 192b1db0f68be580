"""Which images count as unknown: all of a folder or ZIP, but for those in folders of known
classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import make_images

from sdlora_edge.errors import InputError
from sdlora_edge.train.unknown_images import find

MOST = 10**6


def test_class_folders_are_optional_and_those_of_known_classes_are_left_out(tmp_path: Path) -> None:
    make_images(tmp_path / "set" / "train", ["apple", "bolt"], 2)
    make_images(tmp_path / "set" / "test", ["apple", "cup"], 3)
    make_images(tmp_path, ["set"], 4)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    found = find(str(tmp_path / "set"), {"apple", "pear"}, MOST)
    assert found.left_out == ("apple",)
    assert sorted(image.name for image in found.images) == sorted(
        f"{tmp_path}/set/{name}.png"
        for name in ["00", "01", "02", "03", *(f"train/bolt/{i:02d}" for i in range(2))]
        + [f"test/cup/{i:02d}" for i in range(3)]
    )
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "set")
    assert len(find(zipped, {"apple"}, MOST).images) == len(found.images)


def test_a_class_of_several_folders_is_known_by_its_joined_name(tmp_path: Path) -> None:
    make_images(tmp_path / "Greek", ["nu", "mu"], 2)
    found = find(str(tmp_path), {"Greek.nu", "mu.x"}, MOST)
    assert found.left_out == ("Greek.nu",)
    assert {image.name.split("/")[-2] for image in found.images} == {"mu"}


def test_known_images_alone_or_none_at_all_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path / "known", ["apple"], 2)
    with pytest.raises(InputError, match="all its images are of known classes: give"):
        find(str(tmp_path / "known"), {"apple"}, MOST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="it has no image: give images"):
        find(str(tmp_path / "empty"), {"apple"}, MOST)
    with pytest.raises(InputError, match="no such folder"):
        find(str(tmp_path / "nowhere"), {"apple"}, MOST)


def test_the_bound_on_pixels_reaches_every_image(tmp_path: Path) -> None:
    make_images(tmp_path, ["a"], 1)
    assert find(str(tmp_path), set(), 1234).images[0].max_pixels == 1234
