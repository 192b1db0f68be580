"""Answers reach a real broker, a real webhook and stdout; a place that is away loses the oldest, and holds up nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest
from fleet_kit import AMQTT
from webhook import Hook, until

from sdlora_edge.agent import sinks
from sdlora_edge.agent.sinks import Outcome, document, sink
from sdlora_edge.agent.sources import Frame
from sdlora_edge.device.answers import Prediction
from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.fleet.mqtt_link import Options

QUICK = Options(timeout=3.0)
ANSWER = Prediction((("bolt", 0.75), ("cup", 0.25)), 7, True, 1.5, 1.25)
FRAME = Frame("/in/a.png", "rtsp://camera/1", 1_800_000_000.25)


@pytest.mark.parametrize(
    ("outcome", "facts"),
    [
        (ANSWER, ANSWER.to_dict()),
        (
            InputError("a.png is damaged"),
            {"error": {"message": "a.png is damaged", "exit_code": 3}},
        ),
    ],
)
def test_a_document_says_when_where_and_what(outcome: Outcome, facts: dict[str, object]) -> None:
    data = document(FRAME, outcome)
    assert b"\n" not in data
    head = {"time": "2027-01-15T08:00:00.250+00:00", "source": "rtsp://camera/1"}
    assert json.loads(data) == {**head, **facts}


@pytest.fixture(scope="module")
def broker() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    process = subprocess.Popen([sys.executable, "-c", AMQTT, str(port)], stderr=subprocess.DEVNULL)
    until(lambda: reaches(port), 30)
    yield port
    process.kill()
    process.wait()


def reaches(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_broker_gets_each_answer_and_keeps_none(broker: int) -> None:
    found: list[tuple[str, bytes, bool]] = []
    ready = threading.Event()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.on_message = lambda _, __, m: found.append((m.topic, m.payload, m.retain))
    client.on_connect = lambda c, *_: c.subscribe("line 3/#", qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", broker)
    client.loop_start()
    assert ready.wait(10)
    with sink(f"mqtt://127.0.0.1:{broker}/line%203/answers", QUICK) as place:
        for n in range(3):
            place.put(b'{"n": %d}' % n)
        until(lambda: place.sent == 3)
    until(lambda: len(found) == 3)
    assert found == [("line 3/answers", b'{"n": %d}' % n, False) for n in range(3)]
    late = []
    client.on_message = lambda _, __, m: late.append(m.payload)
    ready.clear()
    client.subscribe("line 3/#", qos=1)
    assert ready.wait(10)
    client.disconnect()
    client.loop_stop()
    assert late == [], "nobody who comes later learns an old answer"


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.end()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(sinks, "FLUSH", 0.5)


def test_a_webhook_gets_each_answer_over_one_connection(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sinks.TOKEN, "a token")
    with sink(hook.url, QUICK) as place:
        for n in range(5):
            place.put(b"%d" % n)
    assert hook.bodies == [b"0", b"1", b"2", b"3", b"4"], "closing sends what waits"
    assert set(hook.tokens) == {"Bearer a token"}
    assert (hook.connections, place.sent, place.dropped) == (1, 5, 0)


def test_a_place_that_is_away_loses_the_oldest_and_takes_the_others_once_it_is_back(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "WAITING", 5)
    hook.status = 503
    with sink(hook.url, QUICK) as place:
        begun = time.monotonic()
        for n in range(20):
            place.put(b"%d" % n)
        assert time.monotonic() - begun < 0.1, "nothing is held up"
        until(lambda: "503: no" in caplog.text)
        hook.status = 200
        until(lambda: place.sent == 5)
    assert hook.bodies == [b"15", b"16", b"17", b"18", b"19"]
    assert place.dropped == 15
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "503: no" in line]) == 1, "a lasting trouble is told once"
    assert f"--answers {hook.url} takes answers again" in said


def test_an_answer_that_is_refused_is_dropped_and_the_next_one_sent(hook: Hook) -> None:
    hook.status = 400
    with sink(hook.url, QUICK) as place:
        place.put(b"wrong")
        until(lambda: place.dropped == 1)
        hook.status = 200
        place.put(b"right")
        until(lambda: place.sent == 1)
    assert hook.bodies == [b"right"]


def test_a_place_that_hangs_does_not_keep_the_agent_from_ending(hook: Hook) -> None:
    hook.held.set()
    place = sink(hook.url, QUICK)
    for n in range(3):
        place.put(b"%d" % n)
    time.sleep(0.1)
    begun = time.monotonic()
    place.close()
    assert time.monotonic() - begun < 2
    assert place.dropped >= 2


def test_an_address_without_a_server_is_tried_until_the_end(hook: Hook) -> None:
    hook.end()
    place = sink(hook.url, QUICK)
    place.put(b"lost")
    time.sleep(0.5)
    place.close()
    assert (place.sent, place.dropped) == (0, 1)


STDOUT = """
import sys
from sdlora_edge.agent.sinks import sink
with sink("-") as place:
    for n in range(int(sys.argv[1])):
        place.put(b'{"n": %d}' % n)
"""


def test_stdout_gets_one_line_for_each_answer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STDOUT, "3"], capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"n": n} for n in range(3)]


@pytest.mark.parametrize("gone", [False, True], ids=["it reads nothing", "it has gone"])
def test_a_reader_that_takes_nothing_does_not_keep_the_program_from_ending(gone: bool) -> None:
    out, into = os.pipe()
    os.set_blocking(into, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(into, b"x" * 4096)
    os.set_blocking(into, True)
    if gone:
        os.close(out)
    child = subprocess.Popen([sys.executable, "-c", STDOUT, "5"], stdout=into, stderr=-1)
    assert child.wait(20) == 0
    assert child.stderr is not None
    assert b"5 answers did not arrive" in child.stderr.read()
    child.stderr.close()
    os.close(into)
    if not gone:
        os.close(out)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ftp://host/x", "takes no answers: use -, mqtt://BROKER/TOPIC"),
        ("answers.txt", "takes no answers"),
        ("mqtt://broker", "name a broker and a topic"),
        ("mqtt://user:secret@broker/", "name a broker and a topic"),
        ("mqtt://broker/a/#", "name a broker and a topic"),
        ("https://user:secret@host/x", "put the token into SDLORA_EDGE_ANSWERS_TOKEN"),
    ],
)
def test_what_is_no_place_is_an_error_that_says_so(place: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as found:
        sink(place)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize(
    ("package", "place"), [("paho.mqtt.client", "mqtt://b/t"), ("urllib3", "http://h/")]
)
def test_a_missing_package_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, package: str, place: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"pip install 'sdlora-edge\[agent\]'"):
        sink(place)
