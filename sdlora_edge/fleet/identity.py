"""Who a device is in its fleet: `STORE/fleet/device.json`, and the key that signs its reports.

    fleet/key            Ed25519, PKCS#8 PEM, mode 0600; made once, never leaves the device
    fleet/device.json    id, name, channel, groups, URLs and the public part of the key

The key is written first, so that a power cut leaves no identity without its key.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import InputError, UsageError, printable
from ..formats import signing
from ..formats.canonical import dump_json, parse_exact_json
from ..formats.ed25519 import is_key
from ..formats.fields import line, listed, one_of, record
from ..results import Result
from ..storage import atomic, disk
from .extras import need
from .rollout import MOST_GROUPS

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

FORMAT = "sdlora-edge/device/1"
FOLDER, DEVICE, KEY, LOCK = "fleet", "device.json", "key", "fleet.lock"
FILE_LIMIT = 64 * 1024
URL_LIMIT, MOST_DESTINATIONS = 1000, 8
SOURCES = "http", "https", "file"
"""Schemes of a fleet repository."""
DESTINATIONS = "mqtt", "mqtts", "http", "https", "file"
"""Schemes of a place that takes reports."""
REMEDY = "run sdlora-edge device configure --store"


@dataclass(frozen=True)
class Identity(Result):
    """Who a device is.

    Attributes:
        id: 32 hexadecimal digits, by chance. Waves are drawn by it.
        name: For people.
        channel: Name of the roll-outs that it follows.
        groups: Groups that it belongs to.
        url: Of the fleet repository; empty if there is none.
        report_to: URLs or files that get its reports.
        public: Ed25519 public key of its reports, 64 hexadecimal digits.
    """

    id: str
    name: str
    channel: str
    groups: tuple[str, ...]
    url: str
    report_to: tuple[str, ...]
    public: str


@dataclass(frozen=True)
class Changes:
    """What to change of an identity. None leaves a field as it is."""

    name: str | None = None
    channel: str | None = None
    groups: tuple[str, ...] | None = None
    url: str | None = None
    report_to: tuple[str, ...] | None = None


def device_id(value: Any) -> None:
    """The kind of a device id: 32 lower-case hexadecimal digits."""
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{32}", value) is None:
        raise ValueError(f"{value!r} is not a device id: 32 hexadecimal digits")


def channel_name(value: Any) -> None:
    """The kind of a channel: it is also a file name and a level of an MQTT topic."""
    if not isinstance(value, str) or re.fullmatch("[A-Za-z0-9._-]{1,64}", value) is None:
        raise ValueError(f"{value!r} is not a channel: use up to 64 of A-Z a-z 0-9 . _ -")


def public_hex(value: Any) -> None:
    """The kind of an Ed25519 public key: 64 hexadecimal digits of a sound point."""
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise ValueError(f"{value!r} is not a public key: 64 hexadecimal digits")
    if not is_key(bytes.fromhex(value)):
        raise ValueError(f"{value} is a weak key: no signature of it proves anything")


def device_groups(value: Any) -> None:
    """The kind of a device's groups."""
    listed(line(), 0, MOST_GROUPS)(value)
    if "" in value or len(set(value)) < len(value):
        raise ValueError(f"groups {value} hold an empty one, or one twice")


_DEVICE = record(
    {
        "format": one_of(FORMAT),
        "id": device_id,
        "name": line(),
        "channel": channel_name,
        "groups": device_groups,
        "url": line(URL_LIMIT),
        "report_to": listed(line(URL_LIMIT), 0, MOST_DESTINATIONS),
        "public": public_hex,
    }
)


def folder_of(store: Path) -> Path:
    """The folder for what the fleet keeps in a store."""
    return store / FOLDER


def is_configured(store: Path) -> bool:
    """Whether a store has an identity."""
    with atomic.reading(store):
        return disk.size(folder_of(store) / DEVICE) is not None


def identity(store: Path) -> Identity:
    """Who the device with this store is.

    Raises:
        InputError: It has no identity yet, or its file is damaged.
    """
    if not is_configured(store):
        raise InputError(f"{store} has no identity in a fleet: {REMEDY} {store}")
    path = folder_of(store) / DEVICE
    value = parse_exact_json(atomic.read(path, FILE_LIMIT), str(path))
    try:
        _DEVICE(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove it, {REMEDY} {store}, and enroll the device again"
        ) from error
    return _from(value)


def configure(store: Path, changes: Changes) -> Identity:
    """Change an identity, or make one with a new id and key.

    Raises:
        UsageError: A change is not valid, or `cryptography` (extra `agent`) is not installed.
        InputError: The identity is damaged, or the path is no store.
        StorageError: It cannot be written.
    """
    if disk.size(store / "bundle") is None:
        raise InputError(f"{store} is not a store: make one with sdlora-edge device init")
    with locked(store):
        old = identity(store) if is_configured(store) else _new(store)
        given = {f.name: getattr(changes, f.name) for f in fields(changes)}
        new = replace(old, **{name: value for name, value in given.items() if value is not None})
        new = replace(new, report_to=tuple(map(_destination, new.report_to)))
        if new.url:
            _check_url(new.url, SOURCES)
        value = {"format": FORMAT, **new.to_dict()}
        try:
            _DEVICE(value)
        except ValueError as error:
            raise UsageError(f"the identity is not valid: {error}") from error
        if old != new or not is_configured(store):
            atomic.write(folder_of(store) / DEVICE, dump_json(value), like=store)
    return new


def device_signer(store: Path) -> CryptoSigner:
    """The key that signs this device's reports.

    Raises:
        InputError: There is no identity, or the key is missing or not the one of the identity.
        UsageError: `cryptography` (extra `agent`) is not installed.
    """
    public = identity(store).public
    need("cryptography", "agent")
    path = folder_of(store) / KEY
    signer = signing.load_signer(path)
    if signer.public_key.keyval["public"] != public:
        raise InputError(
            f"{path} is not the key that {DEVICE} names: put the right one back, or remove both, "
            f"{REMEDY} {store}, and enroll the device again"
        )
    return signer


@contextlib.contextmanager
def locked(store: Path, wait: float = 10.0) -> Iterator[None]:
    """Let one process at a time write in the fleet's folder of a store.

    Raises:
        UsageError: Another process still holds the lock after `wait` seconds.
        StorageError: The store cannot be written.
    """
    folder = folder_of(store)
    with contextlib.ExitStack() as held:
        try:
            atomic.make_folder(folder, store)
            held.enter_context(disk.lock(folder / LOCK, wait))
        except BlockingIOError as error:
            raise UsageError(
                f"{folder} is being written by another process: try again when it is done"
            ) from error
        except OSError as error:
            raise atomic.unwritten(folder, error) from error
        yield


def _from(value: dict[str, Any]) -> Identity:
    lists = {name: tuple(value[name]) for name in ("groups", "report_to")}
    return Identity(**{f.name: value[f.name] for f in fields(Identity)} | lists)


def _new(store: Path) -> Identity:
    """An identity with a new id, whose key is on the disk."""
    need("cryptography", "agent")
    path = folder_of(store) / KEY
    if disk.size(path) is None:
        atomic.write(path, _new_key(), mode=0o600, like=store)
    signer = signing.load_signer(path)
    name = printable(socket.gethostname())[:200]
    public = signer.public_key.keyval["public"]
    return Identity(os.urandom(16).hex(), name, "default", (), "", (), public)


def _new_key() -> bytes:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate().private_bytes(
        pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
    )


def _destination(place: str) -> str:
    """A place for reports as it is kept: a path is absolute, for a service may run elsewhere."""
    if not place:
        raise UsageError("a place for reports is empty: name a URL or a file")
    if "://" not in place:
        return os.path.abspath(place)
    _check_url(place, DESTINATIONS)
    return place


def _check_url(url: str, schemes: tuple[str, ...]) -> None:
    """Raises UsageError for a URL that is malformed, or that holds a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for one that is out of range
    except ValueError as error:
        raise UsageError(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in schemes or not (parts.hostname or parts.scheme == "file"):
        raise UsageError(f"{url!r} is not a URL: use {'://, '.join(schemes)}://")
    if parts.password is not None:
        raise UsageError(
            "a password in a URL would be kept in plain text: remove it, and set "
            "SDLORA_EDGE_MQTT_PASSWORD or SDLORA_EDGE_REPORT_TOKEN"
        )
