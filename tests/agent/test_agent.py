"""The agent as a process: updates under load, access, signals, reports, and what it does in need."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import debian
import pytest
from agents import TOKEN, Answer, agent, encoded, multipart, request
from conftest import Fleet, Result
from faults.scenarios import wrong_canary
from fleet_kit import made, served
from test_follow import roll_out
from webhook import until

from sdlora_edge.agent import updating
from sdlora_edge.agent.agent import Agent, Serving
from sdlora_edge.agent.origin import Source
from sdlora_edge.device import Device
from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.identity import Changes, configure, identity
from sdlora_edge.fleet.report import unseal

Cli = Callable[..., Result]


def classes_of(fleet: Fleet, folder: Path) -> dict[int, frozenset[str]]:
    """{generation: its classes} of a store that takes one packet after the other."""
    device = Device.init(fleet.bundle, folder)
    found = {device.status().generation: frozenset(device.status().classes)}
    for packet in fleet.packets:
        status = device.apply(packet)
        found[status.generation] = frozenset(status.classes)
    return found


class Load:
    """Clients that ask without a pause, each on one connection."""

    def __init__(self, running: Any, clients: int) -> None:
        self._running, self._done = running, threading.Event()
        self.answers: list[Answer] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._ask, i) for i in range(clients)]

    def _ask(self, seed: int) -> None:
        body, headers = multipart(*((f"{i}.png", encoded(seed + i)) for i in range(3)))
        with contextlib.closing(self._running.connection()) as connection:
            while not self._done.is_set():
                self.answers.append(request(connection, "/v1/predict?top=99", body, headers))

    def end(self) -> list[Answer]:
        self._done.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
        return self.answers


def test_updates_under_load_fail_and_mix_nothing(fleet: Fleet, store: Path, tmp_path: Path) -> None:
    """Good packets, one whose canary fails, and what another process does to the store."""
    known, incoming = classes_of(fleet, tmp_path / "other"), tmp_path / "incoming"
    incoming.mkdir()
    bad = wrong_canary(fleet, tmp_path)
    with agent(store, "--watch", incoming, "--every", 0.05) as running:
        load = Load(running, 3)
        shutil.copy(bad, incoming / "bad.sdlora")
        running.wait("failed")
        shutil.copy(fleet.packets[0], incoming / "1.sdlora")
        running.wait("applied", task=1)
        Device.open(store).apply(fleet.packets[1])  # as sdlora-edge device apply
        newest = max(known)
        while len(load.answers) < 20 or load.answers[-1].json["predictions"][0]["generation"] < 3:
            time.sleep(0.05)
        shutil.copy(fleet.packets[2], incoming / "3.sdlora")
        running.wait("applied", task=3)
        time.sleep(0.3)
        answers = load.end()
        metrics = running.metrics()
    assert {answer.status for answer in answers} == {200}
    seen = set()
    for answer in answers:
        generations = {one["generation"] for one in answer.json["predictions"]}
        assert len(generations) == 1, "one request, two generations"
        seen |= generations
        for one in answer.json["predictions"]:
            assert {top["class"] for top in one["top"]} == known[one["generation"]]
    assert seen >= {1, newest}
    assert metrics['sdlora_edge_updates_total{result="applied"}'] == 2
    assert metrics['sdlora_edge_updates_total{result="failed"}'] == 1
    assert metrics["sdlora_edge_generation"] == newest


def test_sigterm_answers_what_is_under_way(store: Path) -> None:
    with agent(store) as running:
        load = Load(running, 2)
        while len(load.answers) < 4:
            time.sleep(0.02)
        with contextlib.closing(running.connection()) as slow:
            image = encoded()
            slow.putrequest("POST", "/v1/predict")
            slow.putheader("Content-Length", str(len(image)))
            slow.endheaders(image[:100])
            time.sleep(0.2)  # its request has begun
            running.process.send_signal(signal.SIGTERM)
            load._done.set()
            time.sleep(0.5)  # after what uvicorn waits for anyway
            slow.send(image[100:])
            assert slow.getresponse().status == 200
        assert running.process.wait(60) == 0
        with contextlib.suppress(ConnectionError):  # a client that asked again after the end
            load.end()
        assert {answer.status for answer in load.answers} == {200}
        assert running.events()[-1]["event"] == "stopped"


def test_systemd_is_told_and_the_token_is_needed_and_read_again(
    store: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        path = tmp_path / "own.sock"
        options = ("--token-file", token, "--socket", path)
        with agent(store, *options, environment=environment) as running:
            assert b"READY=1" in systemd.recv(100)

            def ask(path: str, given: str | None) -> int:
                headers = {} if given is None else {"Authorization": f"Bearer {given}"}
                return running.ask(path, headers=headers).status

            for path in ("/metrics", "/v2/models/sdlora-edge"):
                statuses = [ask(path, given) for given in (None, "wrong", TOKEN)]
                assert statuses == [401, 401, 200]
            assert running.ask("/v1/predict", encoded()).json["code"] == "unauthorized"
            assert ask("/healthz", None) == ask("/v2/health/ready", None) == 200
            token.write_text("another" + TOKEN)
            running.process.send_signal(signal.SIGHUP)
            running.wait("reloaded")
            assert (ask("/metrics", TOKEN), ask("/metrics", "another" + TOKEN)) == (401, 200)
            token.write_text("short")  # refused: the one before stays
            running.process.send_signal(signal.SIGHUP)
            running.wait("log", level="error")
            assert ask("/metrics", "another" + TOKEN) == 200
        messages = b""
        while b"STOPPING=1" not in messages:
            messages += systemd.recv(100)


def test_an_agent_follows_a_repository_and_reports(fleet: Fleet, tmp_path: Path) -> None:
    site, store, report = made(tmp_path, time.time), tmp_path / "store", tmp_path / "report.json"
    site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
    roll_out(site)
    Device.init(fleet.bundle, store)
    with served(site.path) as server:
        configure(store, Changes(url=server.url, report_to=(str(report),)))
        Client(store).trust(site.root)
        with agent(store, "--from", server.url, "--every", 1) as running:
            running.wait("applied", task=3)
            assert running.ask("/healthz").json["task"] == 3
            for seed in range(5):
                assert running.ask("/v1/predict", encoded(seed)).status == 200
            assert running.metrics()["sdlora_edge_last_sync_age_seconds"] < 60
            (tmp_path / "report.json").unlink(missing_ok=True)
            configure(store, Changes(name="camera 7"))  # which a report tells at once
            running.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 60
            while not report.exists() and time.monotonic() < end:
                time.sleep(0.05)
    who = identity(store)
    found = unseal(report.read_bytes(), {who.id: who.public})
    assert (found.name, found.task, found.predictions.total) == ("camera 7", 3, 5)


def test_a_store_that_cannot_be_served_says_so_until_it_can(store: Path) -> None:
    model = store / "bundle" / "model.onnx"
    data = model.read_bytes()
    model.chmod(0o600)
    model.write_bytes(data[:-1])
    with agent(store, "--log-format", "json", ready=False) as running:
        for path in ("/healthz", "/v2/health/ready", "/v2/models/sdlora-edge"):
            found = running.ask(path)
            assert (found.status, found.json["code"]) == (503, "no_model"), path
        found = running.ask("/v1/predict", encoded())
        assert (found.status, found.json["code"]) == (503, "no_model")
        assert int(found.headers["retry-after"]) >= 1
        assert running.ask("/v2/health/live").status == 200
        assert running.metrics()["sdlora_edge_serving"] == 0
        model.write_bytes(data)
        running.wait("opened")
        assert running.ask("/v1/predict", encoded()).status == 200


def test_a_repository_that_does_not_answer_keeps_no_agent_from_ending_but_a_packet_does(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updating, "LONGEST_END", 0.5)
    site = made(tmp_path, time.time)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        configure(store, Changes(url=url))
        Client(store).trust(site.root)
        running = Agent(store, Serving(), Source(url), lambda *_: None)
        connection, _ = hanging.accept()
        with connection, running.device._changing:  # as while a packet is applied
            ending = threading.Thread(target=running.close)
            ending.start()
            ending.join(2)
            assert ending.is_alive()
        ending.join(2)
        assert not ending.is_alive()


def test_reports_begin_once_a_damaged_identity_is_repaired(store: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    configure(store, Changes(report_to=(str(report),)))
    path = store / "fleet" / "device.json"
    good = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(b"{")
    with agent(store) as running:
        running.wait("log", level="error")
        assert running.ask("/v1/predict", encoded()).status == 200, "it serves meanwhile"
        time.sleep(1.5)
        assert len([e for e in running.events() if e["event"] == "log"]) == 1, "told once"
        path.write_bytes(good)
        until(lambda: running.process.send_signal(signal.SIGHUP) or report.exists(), 30)


def test_a_full_queue_is_429_and_certificates_open_the_door(store: Path, tmp_path: Path) -> None:
    c = debian.certificates(tmp_path / "certificates")
    options = ("--tls-cert", c.server, "--tls-key", c.server_key, "--client-ca", c.authority)
    with agent(store, *options, "--queue", 2) as running:
        running.tls = ssl.create_default_context(cafile=str(c.authority))
        assert running.ask("/healthz").status == 200
        assert running.ask("/v1/predict", encoded()).status == 401
        running.tls.load_cert_chain(c.client, c.client_key)
        large = encoded(kind="PNG", size=(600, 600))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: running.ask("/v1/predict", large), range(16)))
        assert {answer.status for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status == 429:
                assert answer.json["code"] == "busy"
                assert int(answer.headers["retry-after"]) >= 1
        assert running.ask("/v1/predict", large).status == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--listen", "0.0.0.0:0"), "--listen 0.0.0.0 lets everybody on the network"),
        (("--listen", "8080"), "give HOST:PORT"),
        (("--listen", "off"), "listens nowhere"),
        (("--from", "file:///x", "--watch", "x"), "two places"),
        (("--from", "file:///x", "--every", "0.5"), "too often"),
        (("--tls-cert", "x"), "belong together"),
        (("--socket", "STORE/x"), "lies in the store"),
    ],
)
def test_wrong_calls_are_refused(
    cli: Cli, store: Path, options: tuple[str, ...], said: str
) -> None:
    given = [word.replace("STORE", str(store)) for word in options]
    found = cli("device", "run", "--store", store, *given)
    assert (found.code, said in found.err) == (2, True), found


def test_what_does_not_fit_is_refused(cli: Cli, store: Path, tmp_path: Path) -> None:
    found = cli("device", "run", "--store", tmp_path, "--listen", "127.0.0.1:0")
    assert found.code == 3, "no store"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = cli("device", "run", "--store", store, "--listen", f"127.0.0.1:{port}")
    assert (found.code, "choose another address" in found.err) == (3, True)
    found = cli("device", "run", "--store", store, "--listen", "127.0.0.1:0", "--memory-limit", 20)
    assert found.code == 8
    assert "but --memory-limit is 20: raise it" in found.err


def test_events_are_text_if_asked(cli: Cli, store: Path) -> None:
    found = cli(
        *("device", "run", "--store", store, "--listen", "127.0.0.1:0"),
        *("--memory-limit", 20, "--log-format", "text"),
    )
    assert ' serving address="http://127.0.0.1:' in found.err
    assert not [line for line in found.err.splitlines() if line[:1] == "{"], json.dumps(found.err)
