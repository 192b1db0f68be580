"""Cameras: real video files, a real stream, folders; the newest frame, whatever happens to it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import within
from streaming import streaming

from sdlora_edge.agent import sources
from sdlora_edge.agent.sources import Camera, Frame, camera
from sdlora_edge.errors import InputError, UsageError


def take(found: Camera, count: int) -> list[Frame]:
    """The next images."""
    frames = found.frames()
    return within(30, lambda: [next(frames) for _ in range(count)])


def brightness(frame: Frame) -> float:
    assert isinstance(frame.image, np.ndarray)
    return float(frame.image.mean())


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two seconds, ten frames in each: red, and as bright as 10 + 10 n."""
    path = tmp_path / "belt.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    for n in range(20):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 2] = 10 + 10 * n  # OpenCV's order is blue, green, red
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.parametrize(("interval", "expected"), [(0.5, [0, 5, 10, 15]), (0.0, range(20))])
def test_a_video_file_is_answered_to_its_end_at_intervals_of_its_own_time(
    video: Path, interval: float, expected: list[int]
) -> None:
    begun = time.monotonic()
    frames = list(camera(str(video), interval).frames())
    assert time.monotonic() - begun < 1.5, "nothing is waited for"
    assert [frame.source for frame in frames] == [str(video)] * len(expected)
    for frame, n in zip(frames, expected, strict=True):
        assert isinstance(frame.image, np.ndarray)
        assert (frame.image.dtype, frame.image.shape) == (np.uint8, (48, 64, 3))
        np.testing.assert_allclose(frame.image.mean((0, 1)), [10 + 10 * n, 0, 0], atol=6)


def test_of_a_stream_only_the_newest_frame_is_taken() -> None:
    with streaming() as stream, camera(stream.url, 0.3) as found:
        frames = found.frames()
        within(30, lambda: next(frames))
        for _ in range(3):
            time.sleep(0.6)  # a slow answer: thirty frames pass by
            frame = within(10, lambda: next(frames))
            assert stream.sent - stream.number(brightness(frame)) <= 12
            assert frame.source == stream.name, "no password"


def test_a_stream_that_breaks_is_opened_again_later_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(sources, "LONGEST_WAIT", 0.4)
    with streaming() as stream, camera(stream.url, 0) as found:
        take(found, 2)
        stream.cut.set()
        time.sleep(1.0)
        assert 2 <= stream.opened <= 8
        stream.cut.clear()
        take(found, 2)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "gives no more frames" in line or "cannot be opened" in line]
    assert len(said) == 2, "a lasting trouble is told once, and its end"
    assert said[-1] == f"--camera: {stream.name} gives frames again"
    assert "secret" not in caplog.text


def test_a_frame_that_opencv_cannot_convert_does_not_end_the_camera(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.1)
    real, count = cv2.cvtColor, [0]

    def fails_once(*arguments: object) -> np.ndarray:
        count[0] += 1
        if count[0] == 1:
            raise cv2.error("an odd frame")
        return real(*arguments)

    monkeypatch.setattr(cv2, "cvtColor", fails_once)
    with streaming() as stream, camera(stream.url, 0) as found:
        take(found, 2)
    assert "an odd frame: it is opened again" in caplog.text


def hanging(_: str) -> str:
    """The address of a server that never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    OPEN.append(server)
    return f"http://127.0.0.1:{server.getsockname()[1]}/"


OPEN: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.mark.parametrize("place", [hanging, lambda folder: folder], ids=["stream", "folder"])
def test_a_camera_that_gives_nothing_can_be_closed_at_once(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    found = camera(place(str(tmp_path)), 0.1)
    ended = []
    frames = found.frames()
    within(5, lambda: ended.append(_closing(found, frames)))
    assert ended == [[]]


def _closing(found: Camera, frames: Iterator[Frame]) -> list[Frame]:
    import threading

    threading.Timer(0.2, found.close).start()
    return list(frames)


def test_a_program_with_a_hanging_stream_ends_when_it_wants_to() -> None:
    program = (
        "import sys, time; from sdlora_edge.agent.sources import camera\n"
        "camera(sys.argv[1], 1); time.sleep(0.5); print('end')"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, hanging("")], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("end\n", "")
    assert time.monotonic() - begun < 8


def test_each_image_of_a_folder_is_taken_once_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SETTLED", 0.1)
    for name in ("b.png", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with camera(str(tmp_path), 0) as found:
        frames = found.frames()

        def name() -> str:
            return os.path.basename(str(within(10, lambda: next(frames)).image))

        assert [name(), name()] == ["a.jpg", "b.png"]
        growing = (tmp_path / "c.png").open("ab", buffering=0)
        import threading

        def grow() -> None:
            for _ in range(8):
                growing.write(b"1")
                time.sleep(0.05)
            growing.close()

        thread = threading.Thread(target=grow)
        thread.start()
        assert name() == "c.png"
        assert growing.closed, "it was taken while it grew"
        thread.join()
        (tmp_path / "a.jpg").write_bytes(b"another one")
        assert name() == "a.jpg"


def test_a_folder_that_is_gone_for_a_while_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "SETTLED", 0.05)
    folder = tmp_path / "in"
    folder.mkdir()
    with caplog.at_level(logging.WARNING), camera(str(folder), 0) as found:
        folder.rmdir()
        import threading

        def back() -> None:
            folder.mkdir()
            (folder / "a.png").write_bytes(b"1")

        timer = threading.Timer(0.4, back)
        timer.start()
        (frame,) = take(found, 1)
    assert frame.image == folder / "a.png"
    assert caplog.text.count("No such file") == 1


@pytest.mark.parametrize("interval", [-1.0, float("nan"), float("inf")])
def test_an_interval_is_a_number_of_seconds(tmp_path: Path, interval: float) -> None:
    with pytest.raises(UsageError, match="give 0 or more seconds"):
        camera(str(tmp_path), interval)


def test_what_is_no_camera_is_an_error_that_says_so(tmp_path: Path) -> None:
    for odd in ("nowhere", "ftp://user:secret@host/video"):
        with pytest.raises(UsageError, match="no such file or folder") as found:
            camera(odd)
        assert "secret" not in str(found.value)
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(InputError, match=r"text\.avi cannot be opened"):
        camera(str(tmp_path / "text.avi"))


def test_without_opencv_a_folder_works_and_a_camera_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"pip install 'sdlora-edge\[camera\]'"):
        camera("0")
    (tmp_path / "a.png").write_bytes(b"1")
    with camera(str(tmp_path), 0) as found:
        (frame,) = take(found, 1)
    assert frame.source == str(tmp_path / "a.png")
