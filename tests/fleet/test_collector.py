"""`fleet serve` as a process of its own: real HTTP, a real broker, real TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import debian
import paho.mqtt.client as mqtt
import pytest
from cameras import NOW, TOKEN, Camera, collector, eventually, predicted
from conftest import Result

from sdlora_edge.errors import UsageError
from sdlora_edge.fleet.access import Access, read_token
from sdlora_edge.fleet.collector.inbox import Inbox
from sdlora_edge.fleet.collector.subscriber import Subscriber
from sdlora_edge.fleet.doors import Door, access_of
from sdlora_edge.fleet.mqtt_link import report_topic, status_topic
from sdlora_edge.fleet.report import SIZE_LIMIT

Cli = Callable[..., Result]
NAME = "<script>alert('x')</script> \"検査\" & co"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def ask(
    url: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, str, Any]:
    """Status, text and headers of an answer."""
    handlers: list[Any] = [NoRedirect, urllib.request.ProxyHandler({})]
    handlers += [urllib.request.HTTPSHandler(context=tls)] if tls else []
    request = urllib.request.Request(url, body, headers or {})  # noqa: S310
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collector")


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera(NAME, groups=("canary",))


@pytest.fixture(scope="module")
def url(place: Path, camera: Camera) -> Iterator[str]:
    """A collector that has taken one report."""
    from sdlora_edge.cli import main

    database = f"sqlite:///{place / 'fleet.db'}"
    assert main(["fleet", "enroll", str(camera.file(place)), "--database", database]) == 0
    with collector(place) as found:
        sealed = camera.sealed(predictions=predicted(NOW, 3, cat=9))
        assert ask(f"{found}/v1/reports", sealed)[0] == 200
        yield found


def test_reports_need_no_token_but_a_signature(url: str, camera: Camera) -> None:
    post = f"{url}/v1/reports"
    sealed = camera.sealed()
    assert ask(post, sealed)[:2] == (200, '{"kind":"stored","reason":""}')
    assert ask(post, sealed)[0] == 409
    assert ask(post, sealed.replace(b'"task":2', b'"task":3'))[0] == 403
    assert ask(post, Camera("nobody").sealed())[0] == 403
    assert ask(post, json.dumps(json.loads(sealed)["report"]).encode())[0] == 401
    assert ask(post, b'{"key":0,"report":{},"signature":""}')[0] == 400
    assert ask(post, b"x" * (SIZE_LIMIT + 1))[0] == 413
    assert ask(f"{url}/", headers={**BEARER})[1].count("1 reports of devices that are not") == 1


def test_a_large_body_is_refused_before_it_is_read(url: str) -> None:
    parts = urlsplit(url)
    head = b"POST /v1/reports HTTP/1.1\r\nHost: x\r\n"
    for length in (b"Content-Length: 99999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection((parts.hostname or "", parts.port or 0), 10) as link:
            link.sendall(head + length)
            if b"chunked" in length:
                link.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")  # and more would follow
            assert link.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/openapi.json", "/v1/devices", "/v1/channels", "/v1/events", "/x"]
)
def test_everything_else_needs_the_token(url: str, path: str) -> None:
    assert ask(url + path)[0] == 401
    for wrong in ("Bearer wrong-token-of-a-test", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}é"):
        assert ask(url + path, headers={"Authorization": wrong.encode().decode("latin1")})[0] == 401
    assert ask(url + path, headers={"Cookie": "sdlora-edge-fleet=99999999999.00"})[0] == 401
    assert ask(url + path, headers=BEARER)[0] == (404 if path == "/x" else 200)
    assert ask(f"{url}/healthz")[:2] == (200, '{"status":"ok"}')


def test_a_browser_logs_in_and_gets_a_cookie_that_scripts_cannot_read(url: str) -> None:
    code, _, headers = ask(f"{url}/", headers={"Accept": "text/html"})
    assert (code, headers["location"]) == (303, "/login")
    assert ask(f"{url}/login", urlencode({"token": "wrong"}).encode())[0] == 401
    assert ask(f"{url}/login", b"x" * 10_000)[0] == 413
    code, _, headers = ask(f"{url}/login", urlencode({"token": TOKEN}).encode())
    assert (code, headers["location"]) == (303, "/")
    cookie, _, rules = headers["set-cookie"].partition(";")
    assert "HttpOnly" in rules
    assert "SameSite=strict" in rules
    assert TOKEN not in cookie
    assert ask(f"{url}/", headers={"Cookie": cookie})[0] == 200
    assert ask(f"{url}/", headers={"Cookie": cookie[:-1] + "0"})[0] in (401, 200)
    end, _, seal = cookie.partition("=")[2].partition(".")
    assert ask(f"{url}/", headers={"Cookie": f"sdlora-edge-fleet={int(end) + 9}.{seal}"})[0] == 401
    assert "Max-Age=0" in ask(f"{url}/logout", b"", {"Cookie": cookie})[2]["set-cookie"]


def test_pages_hold_no_script_and_no_name_becomes_markup(url: str, camera: Camera) -> None:
    for path in ("/", f"/devices/{camera.id}", "/?channel=<script>", "/login"):
        code, text, headers = ask(url + path, headers=BEARER)
        assert code == 200
        assert "<script>alert" not in text
        assert re.findall(r"<script[^>]*>", text) in ([], ['<script src="/collector.js" defer>'])
        assert not re.search(r"\son\w+=|style=|javascript:|https?://", text)
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'")
        assert headers["cache-control"] == "no-store"
    page = ask(f"{url}/devices/{camera.id}", headers=BEARER)[1]
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &#34;検査&#34; &amp; co" in page
    assert ask(f"{url}/devices/nobody", headers=BEARER)[0] == 404


def test_the_api_and_the_metrics_say_what_the_pages_say(url: str, camera: Camera) -> None:
    found = json.loads(ask(f"{url}/v1/devices", headers=BEARER)[1])
    (row,) = found["devices"]
    assert (found["total"], row["name"], row["groups"]) == (1, NAME, ["canary"])
    one = json.loads(ask(f"{url}/v1/devices/{camera.id}", headers=BEARER)[1])
    assert one["report"]["device"] == camera.id
    for query, count in (("group=canary", 1), ("group=other", 0), ("task=2&channel=line-3", 1)):
        assert json.loads(ask(f"{url}/v1/devices?{query}", headers=BEARER)[1])["total"] == count
    assert ask(f"{url}/v1/devices?condition=odd", headers=BEARER)[0] == 400
    assert ask(f"{url}/v1/devices/nobody", headers=BEARER)[0] == 404
    text = ask(f"{url}/metrics", headers=BEARER)[1]
    assert re.search(
        r'sdlora_edge_devices\{channel="line-3",condition="\w+",task="2"\} 1.0', text
    ), text
    assert 'sdlora_edge_reports_refused_total{reason="forged"} ' in text
    described = json.loads(ask(f"{url}/openapi.json", headers=BEARER)[1])
    for path, methods in described["paths"].items():
        for method, rules in methods.items():
            place = url + path.replace("{id}", camera.id)
            code = ask(place, b"" if method == "post" else None, BEARER)[0]
            assert str(code) in rules["responses"], (path, code)


def test_the_terminal_shows_the_same(url: str, place: Path, cli: Cli) -> None:
    database = f"sqlite:///{place / 'fleet.db'}"
    shown = cli("fleet", "devices", "--database", database)
    assert NAME in shown.out
    found = json.loads(cli("fleet", "devices", "--database", database, "--json").out)
    assert sum(found["conditions"].values()) == len(found["devices"]) == 1
    assert cli("fleet", "devices", "--database", database, "--group", "x").code == 0


def test_enroll_refuses_what_is_no_identity(cli: Cli, tmp_path: Path) -> None:
    value = Camera("gate").identity.to_dict()
    path = tmp_path / "identity.json"
    at = ("--database", f"sqlite:///{tmp_path / 'fleet.db'}")
    for wrong in ({**value, "id": "../x"}, {**value, "public": "0" * 64}, {}, {**value, "name": 1}):
        path.write_text(json.dumps(wrong))
        result = cli("fleet", "enroll", str(path), *at)
        assert (result.code, "device identity --json" in result.err) == (3, True)
    path.write_text(json.dumps(value))
    assert (
        cli("fleet", "enroll", str(path), *at).out
        == "enrolled: 1 new, 0 with a new key, 0 known before\n"
    )
    path.write_text(json.dumps({**value, "public": Camera("x").identity.public}))
    assert cli("fleet", "enroll", str(path), *at).code == 2
    assert cli("fleet", "enroll", str(path), *at, "--replace", "--json").code == 0


@pytest.fixture(scope="module")
def amqtt() -> Iterator[int]:
    """The broker of the pip package, which knows MQTT 3.1.1 alone."""
    port = debian.free_port()
    program = """
import asyncio, sys
from amqtt.broker import Broker
anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
listener = {"type": "tcp", "bind": "127.0.0.1:" + sys.argv[1]}
async def serve():
    await Broker({"listeners": {"default": listener}, "plugins": anonymous}).start()
    await asyncio.Event().wait()
asyncio.run(serve())
"""
    command = [sys.executable, "-c", program, str(port)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert eventually(lambda: debian.answers(port))
    yield port
    child.kill()
    child.wait()


def published(port: int, *messages: tuple[str, bytes]) -> None:
    """Publish retained messages, as devices do."""
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.connect("127.0.0.1", port)
    client.loop_start()
    for topic, payload in messages:
        client.publish(topic, payload, 1, retain=True).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def check_broker(port: int, folder: Path, cli: Cli) -> None:
    early, late = Camera("early"), Camera("late")
    for one in (early, late):
        at = ("--database", f"sqlite:///{folder / 'fleet.db'}")
        assert cli("fleet", "enroll", str(one.file(folder)), *at).code == 0
    topics = {one.name: report_topic("line-3", one.id) for one in (early, late)}
    published(port, (topics["early"], early.sealed()), ("sdlora-edge/a/b/report", b"{"))

    def online(url: str) -> dict[str, Any]:
        rows = json.loads(ask(f"{url}/v1/devices", headers=BEARER)[1])["devices"]
        return {row["name"]: (row["task"], row["online"]) for row in rows}

    with collector(folder, "--broker", f"mqtt://127.0.0.1:{port}") as url:
        assert eventually(lambda: online(url)["early"][0] == 2), "what the broker has kept"
        published(
            port,
            (topics["late"], b"x" * (SIZE_LIMIT + 1)),
            (topics["late"], late.sealed()),
            (status_topic("line-3", late.id), b"online"),
            (status_topic("line-3", early.id), b"offline"),
        )
        assert eventually(lambda: online(url) == {"early": (2, False), "late": (2, True)})
        text = ask(f"{url}/metrics", headers=BEARER)[1]
        assert 'refused_total{reason="too large"} 1.0' in text
        assert 'refused_total{reason="unsigned"} 1.0' in text
        assert "sdlora_edge_devices_online 1.0" in text


def counted_images(path: str, device: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT coalesce(sum(total), 0) FROM hours WHERE device = ?"
        return int(connection.execute(query, (device,)).fetchone()[0])


def test_reports_come_from_a_broker(amqtt: int, tmp_path: Path, cli: Cli) -> None:
    check_broker(amqtt, tmp_path, cli)


@pytest.mark.debian
def test_reports_come_from_mosquitto(mosquitto: int, tmp_path: Path, cli: Cli) -> None:
    check_broker(mosquitto, tmp_path, cli)
    late = Camera("again")
    at = ("--database", f"sqlite:///{tmp_path / 'fleet.db'}")
    assert cli("fleet", "enroll", str(late.file(tmp_path)), *at).code == 0
    topic, broker = report_topic("line-3", late.id), f"mqtt://127.0.0.1:{mosquitto}"

    def task(url: str) -> int | None:
        row = json.loads(ask(f"{url}/v1/devices/{late.id}", headers=BEARER)[1])
        return row["task"]

    published(mosquitto, (topic, late.sealed()))
    with collector(tmp_path, "--broker", broker) as url:
        assert eventually(lambda: task(url) == 2)
        again = 'refused_total{reason="stale"} 0.0'
        assert again in ask(f"{url}/metrics", headers=BEARER)[1], "what a broker keeps: no replay"
    # what arrives while the collector is away is counted later, not only the newest
    for since in (1, 2, 3):
        counted = predicted(NOW + since, 1, cat=9)
        published(mosquitto, (topic, late.sealed(predictions=counted)))
    with collector(tmp_path, "--broker", broker, "--keep-days", "9999") as url:
        path = f"{tmp_path / 'fleet.db'}"
        assert eventually(lambda: counted_images(path, late.id) == 30)


def test_a_broker_that_is_away_stops_nothing(tmp_path: Path) -> None:
    with collector(tmp_path, "--broker", f"mqtt://127.0.0.1:{debian.free_port()}") as url:
        assert ask(f"{url}/healthz")[0] == 200
    assert (tmp_path / "serve.log").read_text().count("cannot be reached") == 1


def test_broker_urls_are_checked() -> None:
    inbox = Inbox.__new__(Inbox)
    for url in ("http://host", "mqtt://", "mqtt://user:secret@host", "mqtt://host:99999"):
        with pytest.raises(UsageError) as caught:
            Subscriber(url, inbox)
        assert "secret" not in str(caught.value)


def test_client_certificates_open_the_dashboard(
    certificates: debian.Certificates, tmp_path: Path
) -> None:
    c = certificates
    options = ["--tls-cert", str(c.server), "--tls-key", str(c.server_key)]
    options += ["--client-ca", str(c.authority)]
    known = ssl.create_default_context(cafile=str(c.authority))
    known.load_cert_chain(c.client, c.client_key)
    unknown = ssl.create_default_context(cafile=str(c.authority))
    with collector(tmp_path, *options, token="") as url:
        assert url.startswith("https://127.0.0.1:")
        assert ask(f"{url}/healthz", tls=unknown)[0] == 200
        assert ask(f"{url}/v1/reports", b"{}", tls=unknown)[0] == 401
        assert ask(f"{url}/v1/devices", tls=unknown)[0] == 401
        assert ask(f"{url}/v1/devices", tls=known)[0] == 200
    other = debian.certificates(tmp_path / "other")
    stranger = ssl.create_default_context(cafile=str(c.authority))
    stranger.load_cert_chain(other.client, other.client_key)
    with collector(tmp_path, *options) as url:
        with pytest.raises((urllib.error.URLError, http.client.HTTPException, OSError)):
            ask(f"{url}/v1/devices", tls=stranger)
        assert ask(f"{url}/v1/devices", headers=BEARER, tls=unknown)[0] == 200, "or the token"
        cookie = ask(f"{url}/login", urlencode({"token": TOKEN}).encode(), tls=unknown)[2]
        assert "Secure" in cookie["set-cookie"]


def test_without_a_token_only_this_machine_is_answered(tmp_path: Path, cli: Cli) -> None:
    with collector(tmp_path, token="") as url:
        assert ask(f"{url}/v1/devices")[0] == 200
        assert ask(f"{url}/v1/devices", headers={"Host": "evil.example"})[0] == 403
        assert "this machine only" in (tmp_path / "serve.log").read_text()
    for host in ("0.0.0.0", "::", "192.0.2.1", "fleet.example"):  # noqa: S104
        with pytest.raises(UsageError, match="--token-file"):
            access_of(Door(host=host))
    with pytest.raises(UsageError, match="belong together"):
        access_of(Door(cert=tmp_path))
    with pytest.raises(UsageError, match="needs TLS"):
        access_of(Door(client_ca=tmp_path))
    result = cli("fleet", "serve", "--online-keys", str(tmp_path))
    assert (result.code, "--repository" in result.err) == (2, True)


def test_tokens_are_long_and_sessions_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    for wrong in ("short", "", "a" * 15, "a token with a tab\tinside"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(UsageError, match="at least 16"):
            read_token(tmp_path / "token")
    monkeypatch.setenv("SDLORA_EDGE_FLEET_TOKEN", "short")
    with pytest.raises(UsageError, match="SDLORA_EDGE_FLEET_TOKEN"):
        read_token(None)
    access = Access(TOKEN)
    session = access.session(1000)
    assert access.is_session(session, 1000 + 12 * 3600 - 1)
    assert not access.is_session(session, 1000 + 12 * 3600)
    assert not Access("another token of a test").is_session(session, 1000)
    assert not access.is_session("", 1000)
    assert not Access().is_token("")
