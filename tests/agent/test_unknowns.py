"""Unknown images come home: only those that look new, few enough, and nothing that a hook should have hidden."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import snapshot
from PIL import Image

from sdlora_edge.agent import unknowns
from sdlora_edge.agent.unknowns import Unknowns, blur_of, read_features
from sdlora_edge.device.answers import Answered, Prediction
from sdlora_edge.errors import StorageError, UsageError
from sdlora_edge.storage import disk

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (48, 64, 3)).astype(np.uint8)


def answered(features: np.ndarray | None, known: bool = False) -> Answered:
    top = (("bolt", 0.75), ("cup", 0.25))
    return Answered(Prediction(top, 7, known, 1.0 + known, 1.5), features)


def direction(seed: int) -> np.ndarray:
    """Features that no other seed has anything near to."""
    return 3 * np.random.default_rng(seed).standard_normal(64).astype(np.float32)


def near(seed: int, count: int) -> list[np.ndarray]:
    """What a still camera sees of one thing: features at a cosine distance of about 0.1."""
    around = direction(seed)
    noise = RANDOM.standard_normal((count, 64)) * np.linalg.norm(around) / 8 * 0.3
    return list((around + noise).astype(np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "away" / "unknown"


def stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.jpg"))


def test_only_unknown_images_are_kept_with_their_features_and_nobody_else_reads_them(
    folder: Path,
) -> None:
    keep = Unknowns(folder)
    keep(PIXELS, answered(direction(1), known=True))
    assert stems(folder) == []
    keep(PIXELS, answered(direction(1)))
    (stem,) = stems(folder)
    with Image.open(folder / f"{stem}.jpg") as image:
        assert (image.size, image.mode) == ((64, 48), "RGB")
    facts = json.loads((folder / f"{stem}.json").read_text())
    assert facts.pop("time").endswith("+00:00")
    assert facts.pop("features")
    assert facts == answered(None).prediction.to_dict()
    found = read_features(folder / f"{stem}.jpg")
    assert float(found @ direction(1)) / np.linalg.norm(direction(1)) == pytest.approx(1, abs=1e-3)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_fifty_alike_keep_one_also_after_a_restart(folder: Path) -> None:
    keep = Unknowns(folder)
    for features in near(1, 50):
        keep(PIXELS, answered(features))
    assert (len(stems(folder)), keep.kept, keep.left_out) == (1, 1, 49)
    keep(PIXELS, answered(direction(2)))
    assert len(stems(folder)) == 2
    again = Unknowns(folder)
    for features in [*near(1, 5), *near(2, 5)]:
        again(PIXELS, answered(features))
    assert (len(stems(folder)), again.left_out) == (2, 10)


def test_what_is_taken_home_may_be_kept_again(folder: Path) -> None:
    keep = Unknowns(folder)
    keep(PIXELS, answered(direction(1)))
    (first,) = stems(folder)
    (folder / f"{first}.jpg").unlink()
    keep(PIXELS, answered(direction(1)))
    (second,) = stems(folder)
    assert second != first
    assert sorted(path.name for path in folder.iterdir()) == [f"{second}.jpg", f"{second}.json"]


def test_no_more_than_so_many_a_day_also_after_a_restart(folder: Path) -> None:
    keep = Unknowns(folder, per_day=3)
    for seed in range(5):
        keep(PIXELS, answered(direction(seed)))
    assert (len(stems(folder)), keep.left_out) == (3, 2)
    Unknowns(folder, per_day=3)(PIXELS, answered(direction(9)))
    assert len(stems(folder)) == 3
    for path in list(folder.iterdir()):  # yesterday's
        path.rename(path.with_name(f"unknown-20200101{path.name[16:]}"))
    again = Unknowns(folder, per_day=3)
    for seed in range(9, 14):
        again(PIXELS, answered(direction(seed)))
    assert len(stems(folder)) == 6


def test_the_oldest_are_removed_and_what_is_not_ours_stays(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    (folder / "mine.jpg").write_bytes(b"x" * 100_000)
    (folder / "unknown-thing.json").write_text("{}")
    noise = RANDOM.integers(0, 256, (100, 100, 3)).astype(np.uint8)
    keep = Unknowns(folder, megabytes=0.1)
    order: list[str] = []
    for seed in range(12):
        keep(noise, answered(direction(seed)))
        (new,) = set(stems(folder)) - {*order, "mine"}
        # Within a second the order of names is a random one.
        renamed = f"unknown-20200101T0000{seed:02d}-000000"
        for end in (".jpg", ".json"):
            (folder / f"{new}{end}").rename(folder / f"{renamed}{end}")
        order.append(renamed)
    left = [stem for stem in stems(folder) if stem != "mine"]
    assert left == order[-len(left) :]
    assert 3 < len(left) < 12
    sizes = [(folder / f"{stem}{end}").stat().st_size for stem in left for end in (".jpg", ".json")]
    assert sum(sizes) <= 100_000
    assert len(list(folder.iterdir())) == 2 * len(left) + 2
    assert (folder / "mine.jpg").stat().st_size == 100_000


def test_an_image_is_kept_small_upright_and_without_its_exif(tmp_path: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x010E] = "a place that nobody should learn"
    Image.fromarray(RANDOM.integers(0, 256, (600, 2400, 3)).astype(np.uint8)).save(
        tmp_path / "photo.jpg", exif=exif
    )
    Unknowns(folder)((tmp_path / "photo.jpg").read_bytes(), answered(direction(1)))
    (stem,) = stems(folder)
    with Image.open(folder / f"{stem}.jpg") as image:
        assert (image.size, dict(image.getexif())) == ((256, 1024), {})
    assert b"nobody should learn" not in (folder / f"{stem}.jpg").read_bytes()


HOOK = """
def black(image):
    return image.point(lambda value: 0)
def wrong(image):
    return None
def failing(image):
    raise RuntimeError("no face model")
NUMBER = 1
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], unknowns.Blur]:
    (tmp_path / "hidden_faces.py").write_text(HOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hidden_faces", raising=False)
    return lambda name: blur_of(f"hidden_faces:{name}")


def test_what_the_hook_returns_is_what_is_kept(
    folder: Path, hook: Callable[[str], unknowns.Blur]
) -> None:
    Unknowns(folder, blur=hook("black"))(PIXELS, answered(direction(1)))
    (stem,) = stems(folder)
    with Image.open(folder / f"{stem}.jpg") as image:
        assert np.asarray(image).max() <= 2


@pytest.mark.parametrize("name", ["wrong", "failing"])
def test_if_the_hook_fails_nothing_is_kept(
    folder: Path,
    hook: Callable[[str], unknowns.Blur],
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep = Unknowns(folder, blur=hook(name))
    for seed in range(3):
        keep(PIXELS, answered(direction(seed)))
    assert list(folder.iterdir()) == []
    assert len(caplog.records) == 1, "a log is not flooded"
    assert ("NoneType" if name == "wrong" else "no face model") in caplog.text


@pytest.mark.parametrize("place", ["nowhere:black", "hidden_faces:nothing", "hidden_faces", ""])
def test_a_hook_that_is_not_there_is_an_error_at_the_start(
    hook: Callable[[str], unknowns.Blur], place: str
) -> None:
    with pytest.raises(UsageError, match="give MODULE:FUNCTION"):
        blur_of(place)
    with pytest.raises(UsageError, match="this is no function"):
        hook("NUMBER")


def test_the_folder_is_never_part_of_a_store(store: Path, tmp_path: Path) -> None:
    before = snapshot(store)
    (tmp_path / "link").symlink_to(store)
    for inside in (store, store / "unknown", store / "packets" / "x", tmp_path / "link" / "x"):
        with pytest.raises(UsageError, match="lies in the store"):
            Unknowns(inside)
    assert snapshot(store) == before


def test_a_folder_that_others_can_open_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(UsageError, match=r"mode 755\): run chmod 700"):
        Unknowns(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, StorageError)):
        Unknowns(tmp_path / "file")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error")])
def test_a_disk_that_fails_stops_keeping_for_a_while_and_leaves_no_half_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    keep = Unknowns(folder)

    def failing(path: Path, *_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", failing)
        for seed in range(3):
            keep(PIXELS, answered(direction(seed)))
    assert list(folder.iterdir()) == []
    assert len(caplog.records) == 1
    keep(PIXELS, answered(direction(1)))
    assert list(folder.iterdir()) == [], "it is not tried again at once"
    monkeypatch.setattr(unknowns.time, "monotonic", lambda: 1e9)
    keep(PIXELS, answered(direction(1)))
    assert len(stems(folder)) == 1


def test_a_file_that_has_gone_keeps_no_other_image_from_being_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = Unknowns(folder)
    keep(tmp_path / "gone.png", answered(direction(1)))
    keep(PIXELS, answered(direction(2)))
    assert (keep.left_out, keep.kept, len(stems(folder))) == (1, 1, 1)
    assert caplog.text == ""


def test_room_for_updates_is_left_on_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep = Unknowns(folder)
    found = os.statvfs(folder)
    monkeypatch.setattr(unknowns, "LEAST_FREE", found.f_bavail * found.f_frsize + (1 << 30))
    keep(PIXELS, answered(direction(1)))
    assert list(folder.iterdir()) == []
    assert "kept for updates: free some" in caplog.text


def test_what_a_power_cut_leaves_is_cleared_away(folder: Path) -> None:
    keep = Unknowns(folder)
    keep(PIXELS, answered(direction(1)))
    (stem,) = stems(folder)
    (folder / "unknown-20200101T000000-000000.json").write_text("half of")
    (folder / f"{stem}.json").write_text("half of")
    again = Unknowns(folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"{stem}.jpg", f"{stem}.json"]
    again(PIXELS, answered(direction(1)))
    assert len(stems(folder)) == 2, "an image without features is like no other"


def test_a_model_without_features_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Unknowns(folder)(PIXELS, answered(None))
    assert "no output `features`: export it again" in caplog.text
    assert list(folder.iterdir()) == []
