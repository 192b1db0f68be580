"""The web servers of docs/guides/fleet-hosting.md serve a fleet repository as the guide says."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import debian
import pytest
import typer.main

from sdlora_edge.cli import app

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "docs").glob("sdlora-edge-*.[st]*"))
DATA = bytes(range(256)) * 40
TARGET = f"/targets/packets/{hashlib.sha256(DATA).hexdigest()}.update-0001-r0-abc.safetensors"
FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    url: str, path: str, method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str
) -> Answer:
    place = urlsplit(url).netloc
    connection: http.client.HTTPConnection = (
        http.client.HTTPSConnection(place, timeout=10, context=tls)
        if tls
        else http.client.HTTPConnection(place, timeout=10)
    )
    try:
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, answer.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the names of a fleet repository, beside one that must not be served."""
    folder = tmp_path_factory.mktemp("hosting") / "fleet"
    files = {"metadata/timestamp.json": b"{}", "metadata/1.root.json": b"{}", TARGET[1:]: DATA}
    for name, data in {**files, "fleet.toml": b"", "metadata/.hidden/x": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def served(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with debian.nginx(tmp_path_factory.mktemp("nginx"), repository) as url:
        yield url


@pytest.mark.debian
def test_only_the_timestamp_is_asked_for_again(served: str) -> None:
    timestamp = ask(served, "/metadata/timestamp.json")
    assert timestamp.headers["cache-control"] == "no-cache"
    tag = timestamp.headers["etag"]
    again = ask(served, "/metadata/timestamp.json", If_None_Match=tag)
    assert (again.status, again.body) == (304, b"")
    for path in ("/metadata/1.root.json", TARGET):
        assert ask(served, path).headers["cache-control"] == FOREVER


@pytest.mark.debian
def test_a_name_that_comes_later_is_not_kept_as_missing(served: str, repository: Path) -> None:
    missing = ask(served, "/metadata/2.root.json")
    assert missing.status == 404
    assert "cache-control" not in missing.headers
    try:
        (repository / "metadata" / "2.root.json").write_bytes(b"{}")
        assert ask(served, "/metadata/2.root.json").status == 200
    finally:
        (repository / "metadata" / "2.root.json").unlink()


@pytest.mark.debian
def test_a_download_goes_on_after_a_cut(served: str) -> None:
    whole = ask(served, TARGET, Accept_Encoding="gzip")
    assert whole.body == DATA
    assert "content-encoding" not in whole.headers
    rest = ask(served, TARGET, Range="bytes=1000-", If_Range=whole.headers["etag"])
    assert rest.status == 206
    assert rest.headers["content-range"] == f"bytes 1000-{len(DATA) - 1}/{len(DATA)}"
    assert rest.body == DATA[1000:]
    assert ask(served, TARGET, Range=f"bytes={len(DATA)}-").status == 416


@pytest.mark.debian
@pytest.mark.parametrize(
    "path", ["/", "/metadata", "/metadata/", "/targets/", "/targets/packets/", "/fleet.toml"]
)
def test_nothing_is_listed_and_nothing_else_is_served(served: str, path: str) -> None:
    found = ask(served, path)
    assert found.status in (301, 403, 404)
    assert b"safetensors" not in found.body
    assert ask(served, "/metadata/../fleet.toml").status in (400, 404)


@pytest.mark.debian
@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nothing_can_be_changed(served: str, method: str) -> None:
    assert ask(served, "/metadata/timestamp.json", method).status in (403, 405)
    assert ask(served, TARGET, method).status in (403, 405)


@pytest.mark.debian
def test_with_client_certificates_nobody_else_reads(
    repository: Path, certificates: debian.Certificates, tmp_path: Path
) -> None:
    tls = ssl.create_default_context(cafile=str(certificates.authority))
    with debian.nginx(tmp_path / "nginx", repository, certificates) as url:
        assert ask(url, TARGET, tls=tls).status == 400  # nginx: no certificate was sent
        tls.load_cert_chain(certificates.client, certificates.client_key)
        assert ask(url, TARGET, tls=tls).body == DATA


@pytest.mark.debian
def test_the_block_is_valid_as_it_stands(certificates: debian.Certificates, tmp_path: Path) -> None:
    """But for its certificate, which nobody else has, and for ports that only root may use."""
    block = debian.documented().replace("listen 443 ", f"listen 127.0.0.1:{debian.free_port()} ")
    block = block.replace("listen [::]:443 ", f"listen 127.0.0.1:{debian.free_port()} ")
    for name, path in (("fullchain", certificates.server), ("privkey", certificates.server_key)):
        block, count = re.subn(rf"/etc/letsencrypt/\S*{name}\.pem", str(path), block)
        assert count == 1
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\nclient_body_temp_path {tmp_path}/body;\n"
        f"access_log off;\n{block}}}\n"
    )
    words = [debian.program("nginx"), "-t", "-p", str(tmp_path), "-c", str(config)]
    words += ["-e", f"{tmp_path}/error.log", "-g", f"error_log {tmp_path}/error.log;"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def test_the_policy_of_the_bucket_is_json_and_allows_no_listing() -> None:
    (policy,) = re.findall(r"^```json\n(.*?)^```$", debian.HOSTING.read_text(), re.S | re.M)
    (statement,) = json.loads(policy)["Statement"]
    assert statement["Action"] == "s3:GetObject"


def test_systemd_takes_every_unit(tmp_path: Path) -> None:
    """In a folder of their own, with a program that exists."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here: install Debian's systemd")
    assert len(UNITS) >= 5
    for unit in UNITS:
        text = unit.read_text()
        assert "/opt/sdlora-edge/bin/sdlora-edge" in text or unit.suffix == ".timer"
        text = text.replace("/opt/sdlora-edge/bin/sdlora-edge", shutil.which("true") or "/bin/true")
        (tmp_path / unit.name).write_text(text)
    names = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "sdlora-edge" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr


def test_each_unit_calls_a_command_as_it_is() -> None:
    root = typer.main.get_command(app)
    if "fleet" not in root.commands:  # type: ignore[attr-defined]
        pytest.skip("there are no commands of the fleet")
    for unit in UNITS:
        for line in re.findall(r"^ExecStart=\S+ (.+)$", unit.read_text(), re.M):
            command, words = root, line.split()
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context("unit", words)  # an unknown option or a missing one is an error
