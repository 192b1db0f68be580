"""Downloads over links and servers as they are: cut, slow, busy, moved, behind a proxy, and hostile."""

from __future__ import annotations

import ssl
import time
from collections.abc import Generator, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from conftest import within
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faulty_server import Faulty, Handler, faulty_server, statuses
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError

from sdlora_edge.errors import ResourceError, TrustError, UsageError
from sdlora_edge.fleet import answering, fetching
from sdlora_edge.fleet.fetching import PROGRESS, TRIES, Fetcher, Link
from sdlora_edge.fleet.incoming import Incoming, Wanted
from sdlora_edge.formats.canonical import sha256

pytestmark = pytest.mark.long

DATA = bytes(range(256)) * 4000
"""a megabyte"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Faulty]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    with faulty_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher(sleep=waits.append)


def fetched(fetcher: Fetcher, server: Faulty, begin: int = 0) -> bytes:
    return b"".join(fetcher.stream(f"{server.url}/file", begin))


def test_a_link_that_cuts_every_100_kb_brings_the_file(server: Faulty, fetcher: Fetcher) -> None:
    server.cut = 100_000
    assert fetched(fetcher, server) == DATA
    asked = [headers.get("Range") for _, headers in server.asked]
    assert asked == [None, *(f"bytes={n}-" for n in range(100_000, len(DATA), 100_000))]
    assert all(headers["If-Range"] == '"1"' for _, headers in server.asked[1:])
    assert len(DATA) <= fetcher.received < len(DATA) * 1.01
    assert fetcher.requests == len(server.asked)


def test_a_server_without_ranges_is_read_again_from_the_beginning(
    server: Faulty, fetcher: Fetcher
) -> None:
    server.ranges, server.cut = False, 100_000

    def longer(handler: Handler) -> bool:
        server.cut += 300_000
        return False

    server.fault = longer
    assert fetched(fetcher, server) == DATA
    assert fetched(fetcher, server, 1000) == DATA[1000:]


def test_a_server_that_never_gets_further_is_given_up(server: Faulty, fetcher: Fetcher) -> None:
    server.ranges, server.cut = False, 100_000
    with pytest.raises(DownloadError):
        fetched(fetcher, server)
    assert len(server.asked) < 2 * TRIES


def test_a_byte_with_each_answer_holds_no_device(
    server: Faulty, fetcher: Fetcher, waits: list[float]
) -> None:
    server.cut = 1
    with pytest.raises(DownloadError):
        within(20, lambda: fetched(fetcher, server))
    assert len(server.asked) == TRIES
    assert len(waits) == TRIES - 1
    assert PROGRESS > 1000


def test_a_busy_server_is_asked_again_when_it_says(
    server: Faulty, fetcher: Fetcher, waits: list[float]
) -> None:
    server.fault = statuses(503, Retry_After="7")
    assert fetched(fetcher, server) == DATA
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    server.fault = statuses(429, Retry_After=format_datetime(later, usegmt=True))
    assert fetched(fetcher, server) == DATA
    assert waits[0] == 7
    assert 25 < waits[1] <= 30


def test_waits_grow_and_differ(server: Faulty, waits: list[float]) -> None:
    for _ in range(20):
        server.fault = statuses(*[500] * (TRIES - 1))
        assert fetched(Fetcher(sleep=waits.append), server) == DATA
    first, last = waits[:: TRIES - 1], waits[TRIES - 2 :: TRIES - 1]
    assert max(first) <= 1
    assert max(last) > 2
    assert len(set(waits)) == len(waits)


def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    server: Faulty, fetcher: Fetcher, waits: list[float]
) -> None:
    server.fault = statuses(503, Retry_After="3600")
    with pytest.raises(DownloadHTTPError):
        fetched(fetcher, server)
    assert waits == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(
    server: Faulty, fetcher: Fetcher, waits: list[float], status: int
) -> None:
    server.fault = statuses(status)
    with pytest.raises(DownloadHTTPError) as refused:
        fetcher.download_bytes(f"{server.url}/file", 100)
    assert refused.value.status_code == status
    assert (waits, len(server.asked)) == ([], 1)


def test_redirects_are_followed_a_few_times_and_to_the_web_alone(
    server: Faulty, fetcher: Fetcher
) -> None:
    server.fault = statuses(301, 307, Location="/file")
    assert fetched(fetcher, server) == DATA
    server.fault = statuses(*[302] * 20, Location="/file")
    server.asked.clear()
    with pytest.raises(DownloadError, match="redirects"):
        fetched(fetcher, server)
    assert len(server.asked) == 6
    for to in ("file:///etc/passwd", "ftp://127.0.0.1/file"):
        server.fault = statuses(302, Location=to)
        with pytest.raises(DownloadError, match="is not followed"):
            fetched(fetcher, server)


def test_a_rate_is_kept(server: Faulty) -> None:
    begin = time.monotonic()
    assert fetched(Fetcher(Link(max_rate=2_000_000)), server) == DATA
    assert time.monotonic() - begin > 0.2


def test_a_longer_file_is_cut_off_at_once(server: Faulty, fetcher: Fetcher) -> None:
    with pytest.raises(DownloadLengthMismatchError):
        fetcher.download_bytes(f"{server.url}/file", 1000)
    assert fetcher.received < 100_000


def drip(seconds: float, piece: bytes, count: int) -> fetching.Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        for _ in range(count):
            try:
                handler.wfile.write(piece)
                handler.wfile.flush()
            except OSError:
                break
            time.sleep(seconds)
        handler.hang_up()
        return True

    return fault


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(
    server: Faulty, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "LONGEST", 0.15)
    monkeypatch.setattr(fetching, "TRIES", 2)
    server.fault = drip(0.05, b"HTTP/1.1 200 OK\r\nX-Pad: y\r\n", 100)
    with pytest.raises(DownloadError):
        within(4, lambda: fetched(fetcher, server))


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(
    server: Faulty, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "WINDOW", 0.1)
    monkeypatch.setattr(fetching, "TRIES", 2)

    def slow(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        return drip(0.03, b"x", 200)(handler)

    server.fault = slow
    with pytest.raises(DownloadError, match="too slow"):
        within(4, lambda: fetched(fetcher, server))


def test_no_answer_at_all_is_not_waited_for(
    server: Faulty, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TRIES", 2)
    server.fault = lambda handler: bool(time.sleep(1)) or True
    fetcher = Fetcher(Link(timeout=0.1), sleep=waits.append)
    with pytest.raises(DownloadError):
        within(4, lambda: fetched(fetcher, server))


def test_a_proxy_gets_the_requests(
    server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proxied(handler: Handler) -> bool:  # a proxy gets the whole URL
        assert handler.path.startswith("http://repository.example/")
        handler.answer(200, b"by proxy")
        return True

    server.fault = proxied
    url = "http://repository.example/file"
    assert Fetcher(Link(proxy=server.url)).download_bytes(url, 100) == b"by proxy"
    monkeypatch.setenv("http_proxy", server.url)
    assert Fetcher().download_bytes(url, 100) == b"by proxy"
    monkeypatch.setenv("no_proxy", "repository.example")
    with pytest.raises(DownloadError):
        Fetcher(sleep=lambda _: None).download_bytes(url, 100)


def certified(folder: Path, name: str, issuer: tuple[x509.Certificate, object] | None) -> Path:
    """A PEM file with a key and a certificate for 127.0.0.1, signed by an issuer or by itself."""
    from ipaddress import ip_address

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(issuer is None, None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(issuer[1] if issuer else key, hashes.SHA256())  # type: ignore[arg-type]
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / f"{name}.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_of_both_sides_count(tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "file").write_bytes(DATA)
    authority = certified(tmp_path, "authority", None)
    data = authority.read_bytes()
    issuer = (
        x509.load_pem_x509_certificate(data),
        serialization.load_pem_private_key(data, None),
    )
    own, device = (certified(tmp_path, name, issuer) for name in ("server", "device"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(own)
    tls.load_verify_locations(authority)
    tls.verify_mode = ssl.CERT_REQUIRED
    with faulty_server(tmp_path, tls) as server:
        link = Link(ca=authority, client_cert=device)
        assert fetched(Fetcher(link), server) == DATA
        with pytest.raises(DownloadError, match="certificate"):
            fetched(Fetcher(Link(client_cert=device), sleep=waits.append), server)
        assert waits == []  # a server that is not trusted is not asked again
        with pytest.raises(DownloadError):
            fetched(Fetcher(Link(ca=authority), sleep=waits.append), server)


def test_a_folder_is_read_and_other_schemes_are_not(tmp_path: Path, fetcher: Fetcher) -> None:
    (tmp_path / "a file").write_bytes(DATA)
    assert b"".join(fetcher.stream(f"file://{tmp_path}/a%20file", 1000)) == DATA[1000:]
    with pytest.raises(DownloadHTTPError):
        fetcher.download_bytes(f"file://{tmp_path}/none", 10)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DownloadError):
        fetcher.download_bytes(f"file://{tmp_path}/folder", 10)
    for url in ("ftp://127.0.0.1/file", "file://host/file", "127.0.0.1/file"):
        with pytest.raises(UsageError):
            fetcher.download_bytes(url, 10)
    with pytest.raises(UsageError, match="proxy"):
        Fetcher(Link(proxy="ftp://127.0.0.1")).download_bytes("http://127.0.0.1/file", 10)


# downloads into a folder


def wanted(fetcher: Fetcher, server: Faulty, data: bytes = DATA) -> Wanted:
    url = f"{server.url}/file"
    return Wanted(sha256(data), len(data), lambda begin: fetcher.stream(url, begin))


def test_a_download_goes_on_in_another_process(
    server: Faulty, fetcher: Fetcher, tmp_path: Path
) -> None:
    incoming = Incoming(tmp_path / "incoming", tmp_path)
    one = wanted(fetcher, server)

    def cut(begin: int) -> Generator[bytes, None, None]:
        for place, chunk in enumerate(one.stream(begin)):
            if place == 20:
                raise DownloadError("cut")
            yield chunk

    with pytest.raises(DownloadError):
        incoming.fetch(Wanted(one.digest, one.size, cut))
    server.asked.clear()
    assert Incoming(tmp_path / "incoming", tmp_path).fetch(one).read_bytes() == DATA
    assert int(server.asked[0][1]["Range"][6:-1]) > 100_000
    server.asked.clear()
    incoming.fetch(one)
    assert server.asked == []


def test_a_damaged_download_begins_anew(server: Faulty, fetcher: Fetcher, tmp_path: Path) -> None:
    incoming, one = Incoming(tmp_path / "incoming", tmp_path), wanted(fetcher, server)
    incoming.folder.mkdir()
    (incoming.folder / f"{one.digest}.{0:012d}").write_bytes(b"x" * 5000)
    assert incoming.fetch(one).read_bytes() == DATA


@pytest.mark.parametrize("data", [DATA[:-1], b"y" + DATA[1:], b""])
def test_another_file_is_refused_and_nothing_of_it_stays(
    server: Faulty, fetcher: Fetcher, tmp_path: Path, data: bytes
) -> None:
    (server.folder / "file").write_bytes(data)
    incoming = Incoming(tmp_path / "incoming", tmp_path)
    with pytest.raises(TrustError, match="is not the one"):
        incoming.fetch(wanted(fetcher, server))
    assert not list(incoming.folder.iterdir())
    assert len(server.asked) == 2


def test_room_is_asked_for_before_a_download(
    server: Faulty, fetcher: Fetcher, tmp_path: Path
) -> None:
    incoming, one = Incoming(tmp_path / "incoming", tmp_path), wanted(fetcher, server)
    with pytest.raises(ResourceError, match="free disk space"):
        incoming.fetch(Wanted(one.digest, 1 << 60, one.stream))
    assert server.asked == []
