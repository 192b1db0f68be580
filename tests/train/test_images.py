"""Folders and ZIPs as people have them: every file is read, or skipped for a reason."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import struct
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

from sdlora_edge.errors import InputError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.image_files import SUFFIXES
from sdlora_edge.inputs.sizes import MAX_FILE
from sdlora_edge.train import files, splits
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.source import SeedSplit, Source

PREPARE = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)


def load(path: Path) -> Source:
    return splits.load(str(path), SeedSplit(0.5, 0))


def skipped(source: Source) -> dict[str, str]:
    """Reasons by the last part of each name."""
    return {p.name.rpartition("/")[2]: p.problem for p in source.skipped}


def counts(source: Source) -> dict[str, tuple[int, int, int]]:
    return {
        c: (len(source.train[c]), len(source.test[c]), len(source.val.get(c, [])))
        for c in source.classes
    }


def zipped(folder: Path, file: Path, name: Callable[[str], str] = str) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, name(path.relative_to(folder).as_posix()))
    return file


# ---- files


def test_every_suffix_of_a_format_is_an_image_and_every_other_file_has_a_reason(
    tmp_path: Path,
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 2)
    for suffix in SUFFIXES:
        shutil.copy(folder / "a" / "00.png", folder / "a" / f"x{suffix.upper()}")
    for name in ("notes.txt", "none", "scan.jp2", ".hidden.png", "._a.png"):
        (folder / "a" / name).write_bytes(b"x")
    (folder / ".git" / "deep").mkdir(parents=True)
    (folder / ".git" / "deep" / "c.png").write_bytes(b"x")
    shutil.copy(folder / "a" / "00.png", folder / "loose.png")
    (folder / "empty").mkdir()
    for source in (load(folder), load(zipped(folder, tmp_path / "p.zip"))):
        found = skipped(source)
        heif = {name: found.pop(name) for name in ("x.HEIC", "x.HEIF") if name in found}
        assert set(heif.values()) <= {"needs pip install 'sdlora-edge[heif]'"}
        assert found.pop("empty", files.EMPTY) == files.EMPTY  # `zipped` stores no folders
        assert found == {
            "notes.txt": "not an image",
            "none": "not an image",
            "scan.jp2": "an image format that is not read (.jp2)",
            ".hidden.png": "hidden",
            "._a.png": "hidden",
            ".git": "hidden",
            "loose.png": "outside any class folder",
        }
        assert len(source.train["a"]) + len(source.test["a"]) + len(heif) == 2 + len(SUFFIXES)


def test_an_empty_folder_of_a_zip_is_named_too(tmp_path: Path) -> None:
    path = zipped(make_images(tmp_path / "p", ["a", "b"], 2), tmp_path / "p.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("c") if hasattr(archive, "mkdir") else archive.writestr("c/", b"")
        archive.writestr("a/", b"")
    assert skipped(load(path)) == {"c": files.EMPTY}
    assert load(path).skipped[0].label == "c"


def test_a_name_that_is_not_utf8_is_skipped_and_a_class_of_such_a_name_refused(
    tmp_path: Path,
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 2)
    shutil.copy(folder / "a" / "00.png", os.fsencode(folder / "a") + b"/caf\xe9.png")
    assert skipped(load(folder)) == {"caf\\udce9.png": "its name is not UTF-8"}
    os.rename(folder / "a", os.fsencode(folder) + b"/caf\xe9")
    with pytest.raises(
        InputError, match=r"class folder 'caf\\udce9': its name is not UTF-8: rename it"
    ) as caught:
        load(folder)
    str(caught.value).encode()


def test_links_in_a_circle_and_folders_that_cannot_be_listed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b", "secret"], 2)
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "over").symlink_to(folder / "b")
    (folder / "b" / "back").symlink_to(folder / "a")
    (folder / "linked").symlink_to(folder / "b")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = load(folder)
    assert source.classes == ("a", "b", "linked")
    problems = set(skipped(source).values())
    assert problems == {
        "a link to a folder that it lies in",
        "cannot be listed (Permission denied)",
    }
    assert (
        len(source.train["a"]) + len(source.test["a"]) == 4
    )  # its own, and those of the folder that is linked into it


# ---- splits and classes


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("TRAINING", "testing"), ("train", "TEST")]
)
def test_splits_have_any_case_of_letters(train: str, test: str, tmp_path: Path) -> None:
    make_images(tmp_path / "p" / train, ["a", "b"], 5)
    make_images(tmp_path / "p" / test, ["a", "b"], 3)
    assert counts(load(tmp_path / "p")) == {"a": (5, 3, 0), "b": (5, 3, 0)}
    assert counts(load(zipped(tmp_path / "p", tmp_path / "p.zip", "outer/{}".format))) == {
        "a": (5, 3, 0),
        "b": (5, 3, 0),
    }


def test_val_is_neither_trained_on_nor_tested_on_but_validates(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 4), ("test", 3)):
        make_images(tmp_path / "p" / split, ["a", "b"], count)
    source = load(tmp_path / "p")
    assert counts(source) == {"a": (5, 3, 4), "b": (5, 3, 4)}
    settings = Settings().changed(data=str(tmp_path / "p"), tasks=1)
    for validate, test in ((0.0, 3), (0.5, 4)):
        (part,) = splits.parts(source, settings.changed(validate=validate))
        assert {c: (len(part.train[c]), len(part.test[c])) for c in part.classes} == {
            "a": (5, test),
            "b": (5, test),
        }
    make_images(tmp_path / "p" / "val", ["c"], 1)
    with pytest.raises(InputError, match="val/ has classes that train/ lacks: c"):
        load(tmp_path / "p")


def test_val_without_test_tests_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sdlora_edge")
    for split, count in (("train", 4), ("valid", 3)):
        make_images(tmp_path / "p" / split, ["a", "b"], count)
    settings = Settings().changed(data=str(tmp_path / "p"), tasks=1)
    assert counts(splits.load_for(settings)) == {"a": (4, 3, 0), "b": (4, 3, 0)}
    assert "has val/ but no test/: val/ is used for testing" in caplog.text
    validated = settings.changed(validate=0.5)
    (part,) = splits.parts(splits.load_for(validated), validated)
    assert {c: (len(part.train[c]), len(part.test[c])) for c in part.classes} == {
        "a": (4, 3),
        "b": (4, 3),
    }


def test_one_class_deep_inside_a_folder_is_not_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sdlora_edge")
    make_images(tmp_path / "p", ["star/2026-11-28"], 3)
    with pytest.raises(
        InputError,
        match=r"all images lie in star/2026-11-28, and it is not certain .*: move them",
    ):
        load(tmp_path / "p")
    assert load(zipped(tmp_path / "p" / "star", tmp_path / "p.zip", "new/{}".format)).classes == (
        "2026-11-28",
    )
    make_images(tmp_path / "p", ["star/2026-12-05"], 3)
    assert load(tmp_path / "p").classes == ("2026-11-28", "2026-12-05")
    assert "all images lie in star/, which is not part of the class names" in caplog.text


def test_test_images_without_classes_are_skipped_and_folders_beside_a_split_refused(
    tmp_path: Path,
) -> None:
    make_images(tmp_path / "p" / "train", ["a", "b"], 3)
    make_images(tmp_path / "p", ["test"], 4)
    source = load(tmp_path / "p")
    assert counts(source) == {"a": (3, 0, 0), "b": (3, 0, 0)}
    assert [p.problem for p in source.skipped] == ["outside any class folder"] * 4
    make_images(tmp_path / "p" / "more", ["c"], 1)
    with pytest.raises(
        InputError, match="'more' lies beside 'train', which holds a split: move it"
    ):
        load(tmp_path / "p")
    assert load(make_images(tmp_path / "q", ["train", "bus"], 2)).classes == (
        "bus",
        "train",
    )  # classes of that name


def test_files_beside_class_folders_belong_to_no_class(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p" / "train", ["x/a", "x/b", "y/c"], 2).parent
    for place in (folder, folder / "train", folder / "train" / "x"):
        (place / "notes.txt").write_text("x")
    (folder / "train" / "x" / "a" / "notes.txt").write_text("x")
    (folder / "train" / "z").mkdir()
    shutil.copy(folder / "train" / "y" / "c" / "00.png", folder / "loose.png")
    for source in (load(folder), load(tmp_path), load(zipped(folder, tmp_path / "p.zip"))):
        labels = {
            p.name.rpartition("p/")[2].rpartition(".zip/")[2]: p.label for p in source.skipped
        }
        assert labels.pop("train/z", "z") == "z"
        inside = {"loose.png": "", "notes.txt": "", "train/notes.txt": "", "train/x/notes.txt": ""}
        assert labels == inside | {"train/x/a/notes.txt": "x.a"}
        assert source.classes == ("x.a", "x.b", "y.c")


def test_a_folder_inside_a_class_folder_makes_no_class(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "a/more/deeper", "x/b", "x/c"], 2)
    source = load(folder)
    assert counts(source) == {"a": (2, 2, 0), "x.b": (1, 1, 0), "x.c": (1, 1, 0)}
    nested = [p for own in (*source.train.values(), *source.test.values()) for p in own if p.nested]
    assert {p.label for p in nested} == {"a"}
    assert len(nested) == 2


def test_a_folder_without_any_image_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "x.txt").write_text("x")
    (tmp_path / "p" / "b").mkdir()
    with pytest.raises(
        InputError,
        match=r"no class folders with images \(not an image: 1, an empty folder: 1\): put",
    ):
        load(tmp_path / "p")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a folder nor a ZIP"):
        load(tmp_path / "pipe")


# ---- ZIPs


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return zipped(make_images(tmp_path / "p", ["a", "b"], 2), tmp_path / "p.zip")


def patched(path: Path, flag: int = 0, method: int | None = None) -> Path:
    """The first member of a ZIP with other flags or another method."""
    whole = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = whole.find(signature) + offset
        whole[at] |= flag
        if method is not None:
            struct.pack_into("<H", whole, at + 2, method)
    path.write_bytes(whole)
    return path


def test_members_that_cannot_be_read_are_skipped_with_the_reason(archive: Path) -> None:
    assert skipped(load(patched(archive, flag=1))) == {"00.png": "encrypted"}


@pytest.mark.parametrize("method", [9, 12, 14, 93, 99])
def test_members_in_another_compression_than_deflate_are_skipped_on_every_python(
    archive: Path, method: int
) -> None:
    assert skipped(load(patched(archive, method=method))) == {
        "00.png": f"compressed by method {method}, not by deflate"
    }


def test_an_archive_of_nothing_else_is_refused_with_the_reason(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/0.png", b"x")
    with pytest.raises(InputError, match="compressed by method 12, not by deflate: 1"):
        load(tmp_path / "p.zip")


@pytest.mark.parametrize("damage", ["directory", "flag", "cut", "text"])
def test_a_damaged_directory_is_refused(archive: Path, damage: str) -> None:
    whole = bytearray(archive.read_bytes())
    at = whole.find(b"PK\x01\x02")
    if damage == "directory":
        whole[at + 3] = 3
    elif damage == "flag":  # a name that says it is UTF-8, and is not
        whole[at + 9] |= 8
        whole[at + 46] = 0xFF
    else:
        del whole[at if damage == "cut" else 30 :]
    archive.write_bytes(whole)
    with pytest.raises(InputError, match="ZIP file"):
        load(archive)


def test_a_damaged_member_is_that_images_error(archive: Path) -> None:
    whole = bytearray(archive.read_bytes())
    whole[60] ^= 0xFF
    archive.write_bytes(whole)
    source = load(archive)
    images = [p for side in (source.train, source.test) for own in side.values() for p in own]
    failed = []
    for image in images:
        try:
            image.array(PREPARE)
        except InputError as error:
            failed.append(str(error))
    assert len(failed) == 1
    assert "a/00.png cannot be read as an image" in failed[0]


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 2)
    path = zipped(folder, tmp_path / "p.zip", lambda name: f"outer\\{name}".replace("/", "\\"))
    assert counts(load(path)) == counts(load(folder))
    assert len(splits.decode(load(path).train, ["a", "b"], PREPARE, need=True)) == 2


def test_names_are_escaped_wherever_they_are_shown(tmp_path: Path) -> None:
    path = zipped(make_images(tmp_path / "p", ["a", "b"], 2), tmp_path / "p.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/\x1b]0;title\x07\nerror: forged.png", b"no image")
    (image,) = (
        p for side in (load(path).train, load(path).test) for p in side["a"] if "forged" in p.name
    )
    with pytest.raises(InputError) as caught:
        image.array(PREPARE)
    for text in (image.name, str(caught.value)):
        assert "\\u001b]0;title\\u0007\\nerror: forged.png" in text
        assert not any(unicodedata.category(character) == "Cc" for character in text)


def test_a_huge_member_is_skipped_unread_and_one_that_lies_is_read_no_further(
    archive: Path,
) -> None:
    with (
        zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file,
        file.open("a/z.png", "w", force_zip64=True) as member,
    ):
        for _ in range(32):
            member.write(bytes(1 << 20))
    whole = bytearray(archive.read_bytes())
    at = whole.rfind(b"PK\x01\x02") + 24
    assert struct.unpack_from("<I", whole, at) == (32 << 20,)
    struct.pack_into("<I", whole, at, MAX_FILE + 1)
    archive.write_bytes(whole)
    assert skipped(load(archive)) == {"z.png": f"larger than {MAX_FILE} bytes"}
    struct.pack_into("<I", whole, at, 1000)
    archive.write_bytes(whole)
    (image,) = (
        p
        for side in (load(archive).train, load(archive).test)
        for p in side["a"]
        if p.name.endswith("z.png")
    )
    tracemalloc.start()
    with pytest.raises(InputError):
        image.array(PREPARE)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_an_archive_that_changes_is_opened_anew(archive: Path, tmp_path: Path) -> None:
    first = load(archive).train["a"][0]
    before = first.array(PREPARE)
    zipped(make_images(tmp_path / "q", ["a", "b"], 2, seed=1), archive)
    os.utime(archive, (1, 1))
    assert not np.array_equal(before, first.array(PREPARE))
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("x", b"x")
    with pytest.raises(InputError, match="a/"):
        first.array(PREPARE)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_zip_larger_than_the_cache_is_read_by_workers_that_were_not_forked(
    archive: Path, method: str
) -> None:
    source = load(archive)
    streamed = splits.read(source.train, source.classes, PREPARE, cache_gb=0)
    assert isinstance(streamed, splits.Streamed)
    expected = [streamed[i] for i in range(len(streamed))]
    with multiprocessing.get_context(method).Pool(1) as pool:
        copied = pickle.loads(pickle.dumps(streamed))  # noqa: S301
        found = pool.map(copied.__getitem__, range(len(streamed)))
    np.testing.assert_array_equal(found, expected)


def test_pixels_are_limited_by_the_setting(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 2)
    Image.new("L", (1100, 1000)).save(folder / "a" / "large.png")
    for megapixels, readable in ((1, 2), (2, 3)):
        source = splits.load_for(
            Settings().changed(data=str(folder), tasks=1, max_megapixels=megapixels)
        )
        found = [
            splits.decode(side, ["a"], PREPARE, need=False) for side in (source.train, source.test)
        ]
        assert sum(map(len, found)) == readable
