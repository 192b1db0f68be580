"""Sorting unknown images by hand: groups by what the model sees, a page for this machine only, and the folder that `train --run` takes."""

from __future__ import annotations

import contextlib
import io
import queue
import re
import shutil
import socket
import stat
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import urllib3
from conftest import Fleet, Result, make_images, snapshot, within
from PIL import Image

from sdlora_edge.device.answers import Prediction
from sdlora_edge.errors import InputError, SdloraError, UsageError
from sdlora_edge.label import eyes
from sdlora_edge.label.board import NEW, THROWN, Board, Written, class_problem
from sdlora_edge.label.eyes import by_bundle, by_run, images_in
from sdlora_edge.label.grouping import grouped
from sdlora_edge.label.sorting import Request, sorted_by_hand
from sdlora_edge.train import plan

NASTY = "<script>alert(1)<&.png"


def unknown(folder: Path) -> Path:
    """Six images of two things, from two cameras that gave the same names, and what lies beside them."""
    for camera in ("a", "b"):
        (folder / camera).mkdir(parents=True)
    made = make_images(folder / "made", ["gear", "hook"], 3, size=16)
    for n in range(3):
        (made / "gear" / f"{n:02d}.png").rename(folder / "a" / f"{n}.png")
        (made / "hook" / f"{n:02d}.png").rename(folder / "b" / f"{n}.png")
    shutil.rmtree(made)
    (folder / "a" / "0.json").write_text("{}")
    (folder / "b" / "broken.png").write_bytes(b"no image")
    return folder


def board(tmp_path: Path, groups: list[list[int]]) -> Board:
    paths = images_in(unknown(tmp_path / "unknown"))[:6]
    answers = [Prediction(((("0", "1")[i > 3], 0.5),), 0, False, 0, 1) for i in range(6)]
    return Board(paths, answers, ("0", "1"), groups)


def test_groups_with_one_name_become_one_class_and_nameless_ones_are_left_out(
    tmp_path: Path,
) -> None:
    before = board(tmp_path, [[0, 1], [2], [3, 4, 5]])
    before.name(1, " gear ")
    before.name(2, "gear")
    written = before.write(tmp_path / "new")
    assert written == Written(tmp_path / "new", {"gear": 3}, (), unnamed=3)
    before.name(3, "1")
    before.move([5], THROWN)
    written = before.write(tmp_path / "new")
    assert written == Written(tmp_path / "new", {"1": 2, "gear": 3}, ("1",), thrown=1)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    found = snapshot(tmp_path / "new")
    assert sorted(found) == ["1/0.png", "1/1.png", "gear/0.png", "gear/1.png", "gear/2.png"]
    assert found["gear/0.png"] == (tmp_path / "unknown" / "a" / "0.png").read_bytes()


def test_what_was_written_stays_until_the_next_folder_is_complete(tmp_path: Path) -> None:
    sorting = board(tmp_path, [[0, 1, 2]])
    sorting.name(1, "gear")
    sorting.write(tmp_path / "new")
    before = snapshot(tmp_path / "new")
    sorting.paths[1].rename(tmp_path / "moved.png")
    with pytest.raises(SdloraError, match=r"1\.png"):
        sorting.write(tmp_path / "new")
    assert snapshot(tmp_path / "new") == before
    (tmp_path / "moved.png").rename(sorting.paths[1])
    sorting.name(1, "cog")
    sorting.write(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "cog"]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "unknown"}


def test_a_link_that_a_device_made_leads_nowhere(tmp_path: Path) -> None:
    """`rsync --archive` brings links home as links: to files of this host."""
    folder = unknown(tmp_path / "unknown")
    private = make_images(tmp_path / "private", ["me"], 1, size=16)
    (folder / "link.png").symlink_to(private / "me" / "00.png")
    (folder / "everything").symlink_to(private)
    found = images_in(folder)
    assert len(found) == 7
    assert not [path for path in found if path.is_symlink() or "everything" in path.parts]


def test_images_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    both = board(tmp_path, [[0, 1, 2, 3, 4, 5]])
    both.name(1, "gear")
    both.write(tmp_path / "new")
    found = snapshot(tmp_path / "new")
    assert len(set(found.values())) == len(found) == 6


def test_images_move_between_groups_and_back_from_what_is_thrown_away(tmp_path: Path) -> None:
    sorting = board(tmp_path, [[0, 1], [2], [3, 4, 5]])
    sorting.move([2, 5], 1)
    assert [group.images for group in sorting.groups] == [[0, 1, 2, 5], [3, 4]]
    sorting.move([0, 3], NEW)
    assert [(g.number, g.images) for g in sorting.groups] == [
        (1, [1, 2, 5]),
        (3, [4]),
        (4, [0, 3]),
    ]
    sorting.move([4], THROWN)
    sorting.move([4], 4)
    assert [(g.number, g.images) for g in sorting.groups] == [(1, [1, 2, 5]), (4, [0, 3, 4])]
    assert sorting.thrown.images == []
    assert (sorting.suggestion(sorting.groups[1]).name, sorting.names()) == ("0", ["0", "1"])
    for images, to in (([], 1), ([6], 1), ([0], 9)):
        with pytest.raises(UsageError):
            sorting.move(images, to)
    assert sorted(i for g in sorting.groups for i in g.images) == list(range(6))


@pytest.mark.parametrize("name", ["..", ".hidden", "Train", "a/b", "a\\b", "a\nb", "x" * 1000])
def test_a_name_that_makes_no_class_is_refused_and_the_old_one_stays(
    tmp_path: Path, name: str
) -> None:
    sorting = board(tmp_path, [[0, 1, 2, 3, 4, 5]])
    sorting.name(1, "gear")
    with pytest.raises(UsageError, match="choose another"):
        sorting.name(1, name)
    assert sorting.groups[0].name == "gear"
    assert class_problem("Zahnrad 3 µm") is None


def test_nothing_is_written_over_what_somebody_else_made(tmp_path: Path) -> None:
    sorting = board(tmp_path, [[0, 1, 2]])
    with pytest.raises(UsageError, match="no group has a name"):
        sorting.write(tmp_path / "new")
    sorting.name(1, "gear")
    (tmp_path / "new").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        sorting.write(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_looks_alike_is_one_group_from_where_the_known_classes_are() -> None:
    random = np.random.default_rng(0)
    centre = 20 * random.standard_normal(64)
    things = random.standard_normal((3, 64))
    rows = [centre + things[t] + 0.3 * random.standard_normal(64) for t in (0, 0, 0, 1, 1, 2)]
    features = np.array(rows, np.float32)
    assert [sorted(g) for g in grouped(features, centre)] == [[0, 1, 2], [3, 4], [5]]
    assert len(grouped(features, np.zeros(64))) == 1, "from zero all are alike"
    assert grouped(features[:1], centre) == [[0]]
    assert len(grouped(features, centre, distance=0.0)) == 6
    assert grouped(features[:0], centre) == []


def test_a_run_and_a_bundle_see_the_same(fleet: Fleet, tmp_path: Path) -> None:
    paths = images_in(unknown(tmp_path / "unknown"))
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png"] * 2 + ["broken.png"]
    run, bundle = by_run(fleet.run, paths), by_bundle(fleet.bundle, paths)
    for seen in (run, bundle):
        assert seen.paths == tuple(paths[:6])
        assert len(seen.unread) == 1
        assert "broken.png cannot be read" in seen.unread[0]
        assert all(len(answer.top) == 3 for answer in seen.answers)
    assert len(run.classes) > len(bundle.classes), "the bundle knows the base classes"
    assert bundle.features.shape == run.features.shape == (6, run.features.shape[1])
    base = by_bundle(fleet.bundle, paths[:6])
    np.testing.assert_allclose(base.features, bundle.features, atol=1e-3)


def test_what_holds_no_image_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is no folder"):
        images_in(tmp_path / "nothing")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(InputError, match="has no image"):
        images_in(tmp_path)
    unknown(tmp_path / "unknown")
    monkeypatch.setattr(eyes, "MOST", 6)
    with pytest.raises(UsageError, match="has 7 images: sort at most 6"):
        images_in(tmp_path)


@dataclass
class Served:
    """A page that is being served; `ended` is what the command returned or raised."""

    url: str
    said: list[str]
    ended: list[Written | BaseException] = field(default_factory=list)

    def get(self, path: str = "") -> urllib3.BaseHTTPResponse:
        return urllib3.request("GET", self.url + path, timeout=10)

    def post(self, *fields: tuple[str, object]) -> str:
        """What the page shows then."""
        data = urllib.parse.urlencode(fields)
        head = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = urllib3.request("POST", self.url, body=data, headers=head, timeout=10)
        return answer.data.decode()


@contextlib.contextmanager
def serving(folder: Path, out: Path, fleet: Fleet) -> Iterator[Served]:
    """The real server, in a thread."""
    lines: queue.Queue[str] = queue.Queue()
    found = Served("", [])

    def run() -> None:
        try:
            request = Request(folder, out, None, fleet.bundle, 0.8, 0)
            found.ended.append(sorted_by_hand(request, lines.put))
        except BaseException as error:
            found.ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not found.url:
        said = lines.get(timeout=60)
        found.said.append(said)
        found.url = said.removeprefix("label: open ") if said.startswith("label: ") else ""
    yield found
    if thread.is_alive():
        found.post(("do", "end"))
    thread.join(10)
    assert not thread.is_alive()


def test_a_person_names_groups_and_gets_the_folder_of_a_task(
    fleet: Fleet, tmp_path: Path, run_copy: Path
) -> None:
    folder, out = unknown(tmp_path / "unknown"), tmp_path / "new_images"
    shutil.copy(folder / "a" / "0.png", folder / NASTY)
    before = snapshot(folder)
    with serving(folder, out, fleet) as page:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", page.url)
        assert "broken.png cannot be read" in page.said[0]
        html = page.get().data.decode()
        assert NASTY not in html
        assert "&lt;script&gt;alert(1)&lt;&amp;.png" in html
        assert "Label 7 images" in html
        assert "An unknown image may be of a known class" in html
        numbers = list(range(7))
        # whatever the groups are: all of `a` and the copy to one new group, all of `b` to another
        name_of = dict(re.findall(r'<img src="image/(\d+)" alt="([^"]+)"', html))
        assert sorted(map(int, name_of)) == numbers
        assert "none selected" not in html
        assert "nothing is selected" in page.post(("do", "move"), ("to", 0))
        for odd in ({}, {"to": "x"}, {"image": "9" * 5000}):
            assert "form is incomplete" in page.post(("do", "move"), *odd.items())
        html = page.post(("do", "move"), ("to", 0), *(("image", i) for i in range(4)))
        assert "Moved 4 images." in html
        html = page.post(("do", "move"), ("to", 0), *(("image", i) for i in (4, 5, 6)))
        first, second = re.findall(r'name="name-(\d+)"', html)
        html = page.post((f"name-{first}", "gear"), (f"name-{second}", "a/b"), ("do", "write"))
        assert "holds a path separator: choose another" in html
        assert not out.exists()
        html = page.post((f"name-{first}", "gear"), (f"name-{second}", ""), ("do", "write"))
        assert "gear 4. 3 images without a class name left out." in html
        html = page.post((f"name-{first}", "gear"), (f"name-{second}", "hook"), ("do", "write"))
        assert f"Wrote {out}: gear 4, hook 3. Now run: sdlora-edge train --run RUN" in html
        html = page.post(("image", 0), ("do", "throw"))
        assert "Threw away 1 image." in html
        assert "ended" in page.post(("do", "end"))
    assert page.ended == [Written(out, {"gear": 4, "hook": 3})]
    assert snapshot(folder) == before, "the folder is never changed"
    task = plan.one_more(run_copy, str(out))
    assert task.source is not None
    assert task.source.classes == ("gear", "hook")


def test_nobody_without_the_address_learns_or_changes_anything(
    fleet: Fleet, tmp_path: Path
) -> None:
    with serving(unknown(tmp_path / "unknown"), tmp_path / "new", fleet) as page:
        host, port = urllib.parse.urlsplit(page.url).netloc.split(":")
        for path in ("/", "/image/0", "/label.js", f"/{'A' * 32}/", f"/{'A' * 32}/image/0"):
            stranger = Served(f"http://{host}:{port}{path}", [])
            assert stranger.get().status == 404
            assert "Not" in stranger.post(("do", "end"))
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(port)), 1):  # noqa: PT011
            pass
        for path in ("image/99", "../label.html", "label.html"):
            assert page.get(path).status == 404
        for path in ("", "image/0", "label.js", "label.css"):
            answer = page.get(path)
            assert answer.status == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["cache-control"] == "no-store"
    assert page.ended == [Written(None)]


def test_a_shown_image_is_small_and_upright(fleet: Fleet, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "unknown").mkdir()
    wide = Image.fromarray(np.zeros((300, 1200, 3), np.uint8))
    wide.save(tmp_path / "unknown" / "a.jpg", exif=exif)
    with (
        serving(tmp_path / "unknown", tmp_path / "new", fleet) as page,
        Image.open(io.BytesIO(page.get("image/0").data)) as image,
    ):
        assert (image.format, image.size) == ("JPEG", (60, 240))


def test_the_command_checks_what_it_is_asked_before_it_loads_a_model(
    cli: object, fleet: Fleet, tmp_path: Path
) -> None:
    assert callable(cli)
    folder = unknown(tmp_path / "unknown")
    for words, code, said in (
        (("--out", tmp_path / "unknown"), 2, "exists already"),
        (("--out", tmp_path / "o", "--run", fleet.run, "--bundle", fleet.bundle), 2, "give one"),
        (("--out", tmp_path / "o", "--run", tmp_path), 3, "is not a run"),
        (("--out", tmp_path / "o", "--bundle", tmp_path), 3, "manifest.json"),
    ):
        result: Result = cli("label", folder, *words)
        assert (result.code, said in result.err) == (code, True), result


def test_a_model_that_knows_no_features_says_so(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from sdlora_edge.device import Device

    answer_each = Device.answer_each

    def without(self: Device, *arguments: object) -> Iterator[object]:
        for answer in answer_each(self, *arguments):  # type: ignore[arg-type]
            yield answer if isinstance(answer, SdloraError) else replace(answer, features=None)

    monkeypatch.setattr(Device, "answer_each", without)
    paths = images_in(unknown(tmp_path / "unknown"))
    with pytest.raises(UsageError, match="no output `features`: export it again"):
        within(60, lambda: by_bundle(fleet.bundle, paths))
