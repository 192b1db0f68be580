"""Reports reach real brokers, a real HTTP server and files; what does not arrive is kept."""

from __future__ import annotations

import contextlib
import getpass
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from fleet_kit import AMQTT
from reported import STATUS, predicted

from sdlora_edge.errors import InputError, LinkError, SdloraError, StorageError, UsageError
from sdlora_edge.fleet import extras, ledger
from sdlora_edge.fleet.identity import Changes, Identity, configure
from sdlora_edge.fleet.mqtt_link import Options
from sdlora_edge.fleet.report import unseal
from sdlora_edge.fleet.reporting import Reporter, read_outbox
from sdlora_edge.fleet.tally import Tally
from sdlora_edge.fleet.transports import send

QUICK = Options(timeout=5.0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def amqtt() -> Iterator[int]:
    """The broker of the pip package: it knows MQTT 3.1.1 alone."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", AMQTT, str(port)], stderr=subprocess.DEVNULL)
    wait_for(port)
    yield port
    process.kill()
    process.wait()


def wait_for(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)
    raise AssertionError("the broker does not start")


class Mosquitto:
    """The Debian broker: MQTT 5, TLS, users."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plain, self.tls = folder, free_port(), free_port()
        self._certificates()
        (folder / "users").touch(0o600)
        subprocess.run(
            ["mosquitto_passwd", "-b", folder / "users", "camera", "pass word"], check=True
        )
        (folder / "conf").write_text(
            f"user {getpass.getuser()}\nper_listener_settings true\nlistener {self.plain} 127.0.0.1\nallow_anonymous true\n"
            f"listener {self.tls} 127.0.0.1\nallow_anonymous false\npassword_file {folder}/users\n"
            f"cafile {folder}/ca.pem\ncertfile {folder}/server.pem\nkeyfile {folder}/server.key\n"
        )
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["mosquitto", "-c", self.folder / "conf"], stderr=subprocess.DEVNULL
        )
        wait_for(self.tls)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _certificates(self) -> None:
        def openssl(*words: str) -> None:
            subprocess.run(["openssl", *words], check=True, cwd=self.folder, capture_output=True)

        (self.folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl("req", "-x509", "-newkey", "ed25519", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
                "-subj", "/CN=ca", "-days", "2")  # fmt: skip
        openssl("req", "-newkey", "ed25519", "-nodes", "-keyout", "server.key", "-out", "server.csr",
                "-subj", "/CN=server")  # fmt: skip
        openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                "-CAcreateserial", "-extfile", "san", "-out", "server.pem")  # fmt: skip


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    if not shutil.which("mosquitto"):
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    folder = tmp_path_factory.mktemp("mosquitto")
    broker = Mosquitto(folder)
    yield broker
    broker.stop()


@contextlib.contextmanager
def listening(port: int, topics: str = "sdlora-edge/#") -> Iterator[Callable[[str], list[str]]]:
    """Another client of the broker: what it received, by the end of the topic."""
    found: list[tuple[str, str]] = []
    ready = threading.Event()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.on_message = lambda _, __, m: found.append((m.topic, m.payload.decode()))
    client.on_connect = lambda c, *_: c.subscribe(topics, qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert ready.wait(10)
    try:
        yield lambda ending: [payload for topic, payload in found if topic.endswith(ending)]
    finally:
        client.disconnect()
        client.loop_stop()


def until(done: Callable[[], object]) -> None:
    for _ in range(200):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    (store / "bundle").mkdir(parents=True)
    return store


def reports_to(store: Path, *places: str) -> Identity:
    return configure(store, Changes(channel="line-3", report_to=places))


def opened(sealed: str | bytes, who: Identity) -> Any:
    return unseal(sealed.encode() if isinstance(sealed, str) else sealed, {who.id: who.public})


def test_a_broker_of_mqtt_3_keeps_the_newest_report(amqtt: int, bare: Path) -> None:
    who = reports_to(bare, f"mqtt://127.0.0.1:{amqtt}")
    with Reporter(bare, who, Options(timeout=1.0)) as reporter:
        reporter.report(STATUS)
        reporter.report(STATUS)
    with listening(
        amqtt, f"sdlora-edge/line-3/{who.id}/report"
    ) as received:  # comes later: retained
        until(lambda: received("report"))
        (newest,) = received("report")
    assert opened(newest, who).number == ledger.preview(bare, 0).number - 1
    assert read_outbox(bare) is None


def test_a_broker_says_whether_a_device_is_online(mosquitto: Mosquitto, bare: Path) -> None:
    who = reports_to(bare, f"mqtt://127.0.0.1:{mosquitto.plain}")
    with listening(mosquitto.plain, f"sdlora-edge/line-3/{who.id}/#") as received:
        with Reporter(bare, who, QUICK) as reporter:
            reporter.connect()
            until(lambda: received("status") == ["online"])
            sent = reporter.report(STATUS)
            until(lambda: received("report"))
        until(lambda: received("status") == ["online", "offline"])
        assert sent is not None
        assert opened(received("report")[0], who) == sent.report


def test_the_last_will_says_that_a_device_is_gone(mosquitto: Mosquitto, bare: Path) -> None:
    """Its power is cut: the connection ends without a word."""
    who = reports_to(bare, f"mqtt://127.0.0.1:{mosquitto.plain}")
    with listening(mosquitto.plain, f"sdlora-edge/line-3/{who.id}/status") as received:
        reporter = Reporter(bare, who, QUICK)
        reporter.connect()
        until(lambda: received("status") == ["online"])
        (link,) = reporter._links.values()
        client = link._client
        client.reconnect_delay_set(0.05, 0.05)
        client._sock_close()
        # the broker publishes the will; the device connects again and says so
        until(lambda: received("status")[-2:] == ["offline", "online"])
        reporter.close()
        until(lambda: received("status")[-1] == "offline")


# paho leaves a socket open whose handshake failed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_report_over_tls_with_a_user(
    mosquitto: Mosquitto, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"mqtts://camera@127.0.0.1:{mosquitto.tls}"
    who, trusted = reports_to(bare, url), Options(str(mosquitto.folder / "ca.pem"), timeout=5.0)
    with pytest.raises(LinkError, match="CERTIFICATE_VERIFY_FAILED"):
        send(b"{}", who, url, QUICK)
    with pytest.raises(InputError, match=r"certificates for .* cannot be used"):
        send(b"{}", who, url, Options(str(mosquitto.folder / "none"), timeout=5.0))
    monkeypatch.setenv("SDLORA_EDGE_MQTT_PASSWORD", "wrong")
    with pytest.raises(InputError, match=r"refused the connection .*SDLORA_EDGE_MQTT_PASSWORD"):
        send(b"{}", who, url, trusted)
    monkeypatch.setenv("SDLORA_EDGE_MQTT_PASSWORD", "pass word")
    with Reporter(bare, who, trusted) as reporter:
        sent = reporter.report(STATUS)
    assert sent is not None
    assert sent.delivered == (url,)


class Server(BaseHTTPRequestHandler):
    """Keeps what it is sent, and answers what it is told."""

    received: list[tuple[str, bytes, str | None]]
    answer = 202

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body, self.headers["Authorization"]))
        self.send_response(self.answer)
        if self.answer == 307:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"no\x1b[2J" + b"x" * (10**6 if self.answer == 403 else 0))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def http() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"received": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_report_is_posted(
    http: tuple[str, type[Server]], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = http
    who = reports_to(bare, url)
    monkeypatch.setenv("SDLORA_EDGE_REPORT_TOKEN", "secret")
    with Tally(bare) as tally:
        tally.add([predicted("cat")])
    with Reporter(bare, who, QUICK) as reporter:
        reporter.report(STATUS)
        ((path, body, token),) = server.received
        assert (path, token) == ("/v1/reports", "Bearer secret")
        report = opened(body, who)
        assert report.predictions.by_class == {"cat": 1}
        reporter.report(STATUS)
    assert opened(server.received[1][1], who).predictions.total == 0  # those were delivered
    send(body, who, f"{url}/other?a=1", QUICK)
    assert server.received[-1][0] == "/other?a=1"


def test_a_report_whose_first_answer_was_lost_counts_as_delivered(
    http: tuple[str, type[Server]], bare: Path
) -> None:
    url, server = http
    server.answer = 409  # the collector has this number
    with Reporter(bare, reports_to(bare, url), QUICK) as reporter:
        sent = reporter.report(STATUS)
    assert sent is not None
    assert (sent.delivered, sent.refused) == ((url,), ())
    assert read_outbox(bare) is None


@pytest.mark.parametrize("answer", [307, 400, 403, 500])
def test_a_report_that_is_refused_is_kept(
    http: tuple[str, type[Server]], bare: Path, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no token follows a redirection."""
    url, server = http
    who = reports_to(bare, url)
    server.answer = answer
    with Tally(bare) as tally:
        tally.add([predicted("cat")])
    with Reporter(bare, who, QUICK) as reporter:
        sent = reporter.report(STATUS)
        assert sent is not None
        assert (sent.delivered, sent.refused[0].place) == ((), url)
        assert f"refused the report ({answer}: no\\u001b[2J" in sent.refused[0].message
        assert len(server.received) == 1
        kept = read_outbox(bare)
        assert kept is not None
        assert kept.sealed.encode() == server.received[0][1]
        reporter.report(STATUS)  # the newest takes its place, with all counts of the period
        newer = read_outbox(bare)
        assert newer is not None
        assert newer.number == kept.number + 1
        assert opened(newer.sealed, who).predictions.total == 1
        server.answer = 200
        reporter.retry()
    assert server.received[-1][1] == newer.sealed.encode()
    assert read_outbox(bare) is None
    assert ledger.preview(bare, 0).predictions.total == 0


def test_a_period_ends_once_every_place_has_its_counts(
    http: tuple[str, type[Server]], bare: Path, tmp_path: Path
) -> None:
    url, server = http
    who = reports_to(bare, str(tmp_path / "out.json"), url)
    with Tally(bare) as tally:
        tally.add([predicted("cat")])
    server.answer = 503
    with Reporter(bare, who, QUICK) as reporter:
        reporter.report(STATUS)
        first = opened((tmp_path / "out.json").read_bytes(), who)
        kept = read_outbox(bare)
        assert kept is not None
        assert kept.places == (url,)
        # an extra place ends no period: the server still lacks the counts
        sent = reporter.report_to((str(tmp_path / "extra.json"),), STATUS)
        assert sent.delivered == (str(tmp_path / "extra.json"),)
        assert ledger.preview(bare, 0).predictions.total == 1
        server.answer = 200
        reporter.report(STATUS)
    last = opened(server.received[-1][1], who)
    assert last.predictions == first.predictions  # of one period, so nothing is counted twice
    assert last.number == first.number + 2
    assert ledger.preview(bare, 0).predictions.since > first.predictions.since


def test_nobody_there_stops_nothing(bare: Path) -> None:
    port = free_port()
    who = reports_to(bare, f"mqtt://127.0.0.1:{port}", f"http://127.0.0.1:{port}")
    with Reporter(bare, who, QUICK) as reporter:
        reporter.connect()
        sent = reporter.report(STATUS)
        assert sent is not None
        assert [r.exit_code for r in sent.refused] == [8, 8]
        assert all("cannot be reached" in r.message for r in sent.refused)


def test_a_silent_broker_and_server_are_not_waited_for_long(bare: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, who = silent.getsockname()[1], reports_to(bare)
        for url in (f"mqtt://127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
            begun = time.monotonic()
            with pytest.raises(LinkError):
                send(b"{}", who, url, Options(timeout=0.5))
            assert time.monotonic() - begun < 4


def test_a_report_goes_into_a_file_or_a_folder(bare: Path, tmp_path: Path) -> None:
    who = reports_to(bare)
    stick = tmp_path / "stick"
    stick.mkdir()
    for url in (str(stick), stick.as_uri(), str(stick / "one.json"), (stick / "two.json").as_uri()):
        send(b"sealed", who, url, QUICK)
    assert sorted(p.name for p in stick.iterdir()) == sorted(
        [f"{who.id}.json", "one.json", "two.json"]
    )
    with pytest.raises(StorageError):
        send(b"sealed", who, str(stick / "one.json" / "x"), QUICK)
    for url in ("", "file://", "ftp://x"):
        with pytest.raises(UsageError):
            send(b"sealed", who, url, QUICK)


def test_a_device_that_serves_nothing_reports_why(bare: Path, tmp_path: Path) -> None:
    who = reports_to(bare, str(tmp_path / "out.json"))
    with Reporter(bare, who, QUICK) as reporter:
        reporter.report(InputError("the bundle is damaged: flash the device again"))
    report = opened((tmp_path / "out.json").read_bytes(), who)
    assert (report.state, report.errors[-1].code) == ("", 3)
    assert "flash" in report.errors[-1].message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    who = reports_to(bare)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    for url in ("mqtt://127.0.0.1", "http://127.0.0.1"):
        with pytest.raises(UsageError, match=r"pip install 'sdlora-edge\[agent\]'"):
            send(b"{}", who, url, QUICK)


def test_the_store_keeps_reports_readable_as_json(bare: Path, tmp_path: Path) -> None:
    who = reports_to(bare, f"http://127.0.0.1:{free_port()}")
    with Reporter(bare, who, QUICK) as reporter:
        reporter.report(STATUS)
    assert json.loads((bare / "fleet" / "outbox.json").read_bytes())["places"] == list(
        who.report_to
    )
    (bare / "fleet" / "outbox.json").write_bytes(b"\xff")
    assert read_outbox(bare) is None
    assert issubclass(StorageError, SdloraError)
