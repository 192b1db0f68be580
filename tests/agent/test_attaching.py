"""A whole agent: from a folder and a stream to a webhook, unknown images kept by the way, and an end at any time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, Result, images, within
from PIL import Image
from streaming import streaming
from telling import packets
from webhook import Hook, until

from sdlora_edge.agent import feeding
from sdlora_edge.agent.agent import Agent, Serving
from sdlora_edge.agent.attaching import Wanted, attach
from sdlora_edge.agent.batching import Busy
from sdlora_edge.agent.feeding import Feed
from sdlora_edge.agent.held import Unserved
from sdlora_edge.agent.sinks import sink
from sdlora_edge.agent.sources import Camera, camera
from sdlora_edge.agent.updating import Source
from sdlora_edge.device import Device
from sdlora_edge.device.answers import Answered, Asked, Prediction
from sdlora_edge.errors import HealthError, UsageError
from sdlora_edge.inputs.image_files import ImageLike
from sdlora_edge.train.run import Run


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.end()


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """Six images, and one that is none."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    for n, image in enumerate(images()):
        Image.fromarray(image).save(folder / f"{n}.png")
    (folder / "6.png").write_bytes(b"no image")
    return folder


@contextlib.contextmanager
def opened(store: Path) -> Iterator[Agent]:
    """An agent that has opened its store."""
    with Agent(store, Serving(), Source(), lambda *_: None) as agent:
        until(lambda: is_open(agent), 30)
        yield agent


def is_open(agent: Agent) -> bool:
    try:
        return agent.device is not None
    except HealthError:
        return False


def test_each_image_of_a_folder_is_answered_as_device_predict_does(
    store: Path, incoming: Path, hook: Hook
) -> None:
    device = Device.open(store)
    right = [device.predict(path, top=3) for path in sorted(incoming.glob("[0-5].png"))]
    with opened(store) as agent:
        wanted = Wanted((str(incoming),), 0, (hook.url,), top=3)
        with attach(agent, wanted) as attached:
            until(lambda: len(hook.bodies) == 7)
    found = [json.loads(body) for body in hook.bodies]
    assert [one["source"] for one in found] == [str(incoming / f"{n}.png") for n in range(7)]
    assert found[6]["error"]["exit_code"] == 3
    for one, expected in zip(found, right, strict=False):
        del one["time"], one["source"]
        assert one == expected.to_dict()
    assert attached.sinks[0].sent == 7
    assert agent.on_answer == []


def test_unknown_images_of_a_camera_are_kept_by_the_way(
    fleet: Fleet, store: Path, incoming: Path, tmp_path: Path, hook: Hook
) -> None:
    (packet,) = packets(Run.open(fleet.run), fleet, tmp_path / "telling", [(1e6, 1.0)])
    Device.open(store).apply(packet)
    for n in range(10, 14):  # the same again
        shutil.copy(incoming / "0.png", incoming / f"{n}.png")
    kept = tmp_path / "kept"
    wanted = Wanted((str(incoming),), 0, (hook.url,), keep_unknown=kept)
    with opened(store) as agent, attach(agent, wanted) as attached:
        until(lambda: len(hook.bodies) == 11)
        assert attached.unknowns is not None
        until(lambda: attached.unknowns.kept + attached.unknowns.left_out == 10)
    files = list(kept.glob("*.jpg"))
    assert 1 <= len(files) <= 6, "the same image is kept once"
    assert len(files) == attached.unknowns.kept
    for path in files:
        with Image.open(path) as image:
            assert image.size == (16, 16)
    assert all(json.loads(body).get("known") is not True for body in hook.bodies)


def test_an_agent_ends_while_a_stream_goes_on(store: Path, hook: Hook) -> None:
    with streaming() as stream, opened(store) as agent:
        with attach(agent, Wanted((stream.url,), 0, (hook.url,))):
            until(lambda: len(hook.bodies) > 3, 30)
            begun = time.monotonic()
        assert time.monotonic() - begun < 3
        count = len(hook.bodies)
        time.sleep(0.3)
        assert len(hook.bodies) == count
    assert stream.name in hook.bodies[0].decode()
    assert b"secret" not in b"".join(hook.bodies)


class Still(Camera):
    """Gives one image again and again."""

    def _images(self) -> Iterator[tuple[ImageLike, str]]:
        while True:
            yield np.zeros((4, 4, 3), np.uint8), "still"


class Times:
    """Refuses the first three times."""

    def __init__(self, error: Exception) -> None:
        self.error, self.asked = error, 0

    def __call__(self, image: ImageLike, asked: Asked) -> Future[Answered]:
        self.asked += 1
        if self.asked <= 3:
            raise self.error
        found: Future[Answered] = Future()
        found.set_result(Answered(Prediction((("bolt", 1.0),), 1, True, 1.0, None), None))
        return found


@pytest.mark.parametrize("error", [Busy("too many wait"), Unserved("it is being opened")])
def test_images_of_a_live_camera_pass_by_a_busy_agent_and_those_of_a_folder_wait(
    monkeypatch: pytest.MonkeyPatch, incoming: Path, hook: Hook, error: Exception
) -> None:
    monkeypatch.setattr(feeding, "LOOK", 0.05)
    times = Times(error)
    with sink(hook.url) as place:
        with Feed(Still("still", 0.01), times, Asked(), [place]) as feed:
            until(lambda: times.asked > 5)
        assert feed.passed == 3
        with Feed(camera(str(incoming), 0), Times(error), Asked(), [place]) as feed:
            until(lambda: b"6.png" in b"".join(hook.bodies))
    assert feed.passed == 0
    found = [json.loads(body)["source"] for body in hook.bodies]
    assert [f for f in found if f != "still"] == [str(incoming / f"{n}.png") for n in range(7)]


def test_an_image_that_nobody_expected_does_not_end_its_camera(
    store: Path, tmp_path: Path, hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Camera):
        def _images(self) -> Iterator[tuple[ImageLike, str]]:
            for channels in (4, 4, 3):
                yield np.zeros((4, 4, channels), np.uint8), "odd"

    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsdecode(b"a\xff.png")
    Image.fromarray(images()[0]).save(folder / "b.png")
    (folder / "b.png").rename(folder / name)
    with opened(store) as agent, sink(hook.url) as place:
        for source in (Odd("odd", 0), camera(str(folder), 0)):
            before = len(hook.bodies)
            with Feed(source, agent.batcher.submit, Asked(), [place]):
                until(lambda before=before: len(hook.bodies) > before)
    found = [json.loads(body)["source"] for body in hook.bodies]
    assert found == ["odd", str(folder / "a?.png")]
    assert caplog.text.count("an image got no answer") == 1, "a lasting trouble is told once"


def test_a_hanging_agent_does_not_keep_a_feed_open() -> None:
    hanging: Future[Answered] = Future()
    feed = Feed(Still("still", 0), lambda *_: hanging, Asked())
    time.sleep(0.1)
    begun = time.monotonic()
    feed.close()
    assert time.monotonic() - begun < 2
    assert feed.over.is_set()


def test_the_end_of_a_video_ends_its_feed_and_a_failure_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Camera):
        def _images(self) -> Iterator[tuple[ImageLike, str]]:
            yield from ()
            raise RuntimeError("a bug")

    with Feed(Failing("failing", 0), lambda *_: Future(), Asked()) as feed:
        assert feed.over.wait(5)
    assert "--camera failing: nothing is taken from it any more" in caplog.text


def test_options_that_do_nothing_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --camera too"):
        Wanted(answers=("-",))
    with pytest.raises(UsageError, match="give --keep-unknown too"):
        Wanted(blur="a:b")


def test_device_run_answers_a_folder_on_stdout_and_nothing_else_stands_there(
    store: Path, incoming: Path, tmp_path: Path
) -> None:
    words = ["device", "run", "--store", store, "--listen", "127.0.0.1:0", "--camera", incoming]
    words += ["--interval", "0", "--keep-unknown", tmp_path / "unknown"]
    command = [sys.executable, "-m", "sdlora_edge", *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    answers = [json.loads(within(60, child.stdout.readline)) for _ in range(7)]
    child.send_signal(signal.SIGTERM)
    rest, said = child.communicate(timeout=30)
    assert (child.returncode, rest) == (0, ""), said
    assert [one["source"] for one in answers] == [str(incoming / f"{n}.png") for n in range(7)]
    assert "agent: http://127.0.0.1:" in said
    assert (tmp_path / "unknown").is_dir()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--answers", "-"], 2, "give --camera too"),
        (["--keep-unknown", "STORE/unknown"], 2, "lies in the store"),
        (["--keep-unknown", "u", "--blur", "nowhere:f"], 2, "give MODULE:FUNCTION"),
        (["--camera", "nowhere"], 2, "there is no such file or folder"),
        (["--camera", "nowhere", "--interval", "-1"], 2, "interval"),
    ],
)
def test_wrong_options_of_device_run_are_errors_at_the_start(
    cli: Callable[..., Result],
    store: Path,
    words: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("STORE", str(store)) for word in words]
    result = cli("device", "run", "--store", store, "--listen", "127.0.0.1:0", *words)
    assert (result.code, said in result.err) == (code, True), result
