"""What Debian's packages bring: programs, headers, and real servers as children of a test.

`make test-fleet` installs the packages. Without one, `program` skips the test. Nothing outside a
folder of the test is read or written, and every server is stopped at the end. A test that uses any
of this is marked `debian`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {
    "chromedriver": "chromium-driver",
    "chromium": "chromium",
    "initdb": "postgresql",
    "mender": "mender-client",
    "mender-artifact": "mender-artifact",
    "mosquitto": "mosquitto",
    "nginx": "nginx-light",
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "onnxruntime/onnxruntime_cxx_api.h": "libonnxruntime-dev",
    "openssl/evp.h": "libssl-dev",
    "postgres": "postgresql",
}
"""The package of each program and each header. `make test-fleet` installs them all."""
ARM_PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
}
"""What `make test-arm` needs beside them."""
WEB_PACKAGES = {"node": "nodejs", "npm": "npm"} | {
    name: package for name, package in PACKAGES.items() if name.startswith("chrom")
}
GROUPS = {"fleet": PACKAGES, "arm": PACKAGES | ARM_PACKAGES, "web": WEB_PACKAGES}
"""What each of `make test-fleet`, `test-arm` and `test-web` installs."""
UNPACKED = Path(__file__).resolve().parents[2] / "build" / "debian"
"""where install.py puts headers of a later release"""
HEADERS = (Path("/usr/include"), UNPACKED / "usr" / "include")
PLACES = ("/usr/sbin", "/usr/lib/postgresql/*/bin")
"""where Debian puts programs that are not on everyone's PATH"""
HOSTING = Path(__file__).resolve().parents[2] / "docs" / "guides" / "fleet-hosting.md"
DEADLINE = 30
"""Seconds in which a server starts or stops."""


def found(name: str) -> str | None:
    """Path of a program or a header, if it is installed."""
    if name.endswith((".h", ".hpp")):
        return next((str(p / name) for p in HEADERS if (p / name).is_file()), None)
    places = [os.environ.get("PATH", ""), *(p for g in PLACES for p in sorted(glob.glob(g)))]
    return shutil.which(name, path=os.pathsep.join(places))


def program(name: str) -> str:
    """Path of a program or a header; the test is skipped if its package is not installed."""
    if path := found(name):
        return path
    target, packages = next((t, packages) for t, packages in GROUPS.items() if name in packages)
    pytest.skip(f"{name} is not here: install Debian's {packages[name]}, or run make test-{target}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def running(
    command: list[str], port: int, log: Path, stop: int = signal.SIGTERM
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the foreground, from when it listens to the end of the test.

    stop: the signal that ends it.
    """
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        end = time.monotonic() + DEADLINE
        while not answers(port):
            early = child.poll() is not None or time.monotonic() > end
            assert not early, f"{command[0]} did not start: {log.read_text()}"
            time.sleep(0.02)
        yield child
    finally:
        child.send_signal(stop)
        try:
            child.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(frozen=True)
class Certificates:
    """PEM files of a certificate authority, a server at localhost and 127.0.0.1, and a client."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


def certificates(folder: Path) -> Certificates:
    """New ones, valid for a day."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    authority = ec.generate_private_key(ec.SECP256R1())

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def issued(name: str, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> Path:
        places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        built = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName(places), critical=False)
            .add_extension(identifier, critical=False)
            .add_extension(issuer, critical=False)
            .sign(authority, hashes.SHA256())
        )
        path = folder / f"{name}.pem"
        path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        path.with_suffix(".key").write_bytes(secret)
        return path

    ca = issued("authority", authority, True)
    server = issued("server", ec.generate_private_key(ec.SECP256R1()), False)
    client = issued("client", ec.generate_private_key(ec.SECP256R1()), False)
    return Certificates(ca, server, server.with_suffix(".key"), client, client.with_suffix(".key"))


def documented() -> str:
    """The server block of the guide."""
    block = re.search(r"^```nginx\n(.*?)^```$", HOSTING.read_text(), re.S | re.M)
    assert block, f"{HOSTING} has no nginx block"
    return block[1]


@contextlib.contextmanager
def nginx(folder: Path, root: Path, tls: Certificates | None = None) -> Iterator[str]:
    """The URL of a real nginx that serves `root` as the guide says. Its log is in `folder`.

    With `tls` it asks for a client certificate of that authority.
    """
    path = program("nginx")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    block = re.sub(r"(?m)^( *)root [^;]+;", rf'\1root "{root}";', documented())
    block = re.sub(r"\n *ssl_\w+ [^;]+;", "", block)
    listen = f"listen 127.0.0.1:{port}"
    if tls:
        listen += (
            f" ssl; ssl_certificate {tls.server}; ssl_certificate_key {tls.server_key}; "
            f"ssl_client_certificate {tls.authority}; ssl_verify_client on"
        )
    block = re.sub(r"(?m)^( *)listen [^;]+;", rf"\1{listen};", block, count=1)
    block = re.sub(r"(?m)^ *listen \[::\][^;]*;\n", "", block)
    temporary = "".join(
        f"{kind}_temp_path {folder / kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\n{'user root;' if os.geteuid() == 0 else ''}\npid {folder / 'nginx.pid'};\n"
        f"worker_processes 1;\nerror_log {folder / 'error.log'};\n"
        f"events {{ worker_connections 1024; }}\nhttp {{\n{temporary}"
        f"access_log {folder / 'access.log'};\n{block}\n}}\n"
    )
    command = [path, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    command += ["-e", str(folder / "error.log")]
    with running(command, port, folder / "output.log"):
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


@contextlib.contextmanager
def mosquitto(folder: Path, tls: Certificates | None = None, settings: str = "") -> Iterator[int]:
    """The port of a real mosquitto on 127.0.0.1, open to all.

    With `tls` it asks for a client certificate of that authority. `settings` are further lines of
    its configuration.
    """
    path = program("mosquitto")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence false"]
    lines += ["log_dest stderr"]
    if os.geteuid() == 0:
        lines.insert(0, "user root")  # else it could not read the test's folder
    if tls:
        lines += [f"cafile {tls.authority}", f"certfile {tls.server}", f"keyfile {tls.server_key}"]
        lines += ["require_certificate true"]
    config = folder / "mosquitto.conf"
    config.write_text("\n".join([*lines, settings, ""]))
    with running([path, "-c", str(config)], port, folder / "mosquitto.log"):
        yield port


@dataclass(frozen=True)
class Database:
    """A PostgreSQL server with a database of the same name as its user.

    url: of SQLAlchemy, with the driver psycopg and a password.
    """

    port: int
    password: str

    @property
    def url(self) -> str:
        return self.named("postgres")

    def named(self, name: str) -> str:
        return f"postgresql+psycopg://postgres:{self.password}@127.0.0.1:{self.port}/{name}"

    def new(self) -> str:
        """The URL of a new, empty database."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        plain = self.url.replace("+psycopg", "")
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.named(name)


def _ordinary() -> tuple[list[str], str]:
    """A prefix that runs a program as a user without rights, and that user's name.

    PostgreSQL refuses to run as root.
    """
    if os.geteuid() != 0:
        return [], pwd.getpwuid(os.geteuid()).pw_name
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            return [shutil.which("setpriv") or "setpriv", *ids], name
    pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


@contextlib.contextmanager
def postgresql() -> Iterator[Database]:
    """A real server with a new cluster, on 127.0.0.1."""
    initdb, postgres = program("initdb"), program("postgres")
    prefix, user = _ordinary()
    # a folder of pytest belongs to the user who runs the tests alone
    folder = Path(tempfile.mkdtemp(prefix="sdlora-postgresql-"))
    try:
        database = Database(free_port(), secrets.token_hex(16))
        (folder / "password").write_text(database.password)
        if prefix:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)
        data = str(folder / "data")
        made = [*prefix, initdb, "--pgdata", data, "--username", "postgres", "--no-sync"]
        made += ["--auth", "scram-sha-256", "--pwfile", str(folder / "password")]
        made += ["--encoding", "UTF8", "--locale", "C"]
        done = subprocess.run(made, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
        options = {
            "fsync": "off",
            "listen_addresses": "127.0.0.1",
            "port": str(database.port),
            "unix_socket_directories": "",
        }
        settings = [word for k, v in options.items() for word in ("-c", f"{k}={v}")]
        command = [*prefix, postgres, "-D", data, *settings]
        # a fast shutdown: after SIGTERM it would wait for clients that forgot to close
        log = folder / "postgresql.log"
        with running(command, database.port, log, signal.SIGINT) as child:
            _wait_until_ready(database, child)
            yield database
    finally:
        shutil.rmtree(folder)


def _wait_until_ready(database: Database, child: subprocess.Popen[bytes]) -> None:
    """It listens before it takes connections."""
    import psycopg

    end = time.monotonic() + DEADLINE
    while True:
        try:
            psycopg.connect(database.url.replace("+psycopg", "")).close()
        except psycopg.OperationalError:
            if child.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """A headless Chromium, driven by selenium, whose console is recorded."""
    from selenium import webdriver

    chosen = webdriver.ChromeOptions()
    chosen.binary_location = program("chromium")
    words = ["headless=new", "disable-dev-shm-usage", *options]
    for word in [*words, *(["no-sandbox"] if os.geteuid() == 0 else [])]:
        chosen.add_argument(f"--{word}")
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.ChromeService(program("chromedriver"))
    found = webdriver.Chrome(options=chosen, service=driver)
    try:
        yield found
    finally:
        found.quit()
