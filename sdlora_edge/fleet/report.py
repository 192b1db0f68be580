"""A device's report: what it says of itself, in at most 2,048 signed bytes.

    {"key": <public key>, "report": {...}, "signature": <of PREFIX + the canonical report>}

Canonical JSON, integers only. It holds counts and states; nothing in it is about an image or a
single prediction. docs/reports.md has every field.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securesystemslib.signer import SSlibKey

from .. import __version__
from ..errors import InputError, LimitError, TrustError, printable
from ..formats import signing
from ..formats.canonical import LARGEST, dump_json, is_sha256, parse_exact_json
from ..formats.ed25519 import is_key
from ..formats.fields import (
    digest,
    either,
    flag,
    line,
    listed,
    mapped,
    one_of,
    record,
    whole,
)
from ..formats.limits import LIMITS
from ..results import Result, Status
from ..storage import atomic
from .counts import CONFIDENCE
from .identity import Identity, channel_name, device_groups, device_id
from .rollout import LATEST
from .shortening import shortened
from .sync_state import (
    CANARY,
    NEWEST_ERRORS,
    STEP,
    Failure,
    Progress,
    SyncState,
    as_errors,
    as_step,
)

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

FORMAT = "sdlora-edge/report/1"
PREFIX = FORMAT.encode() + b"\n"
SIZE_LIMIT = 2048
MESSAGE, WAITING, PLATFORM, VERSION = 300, 300, 100, 40
"""Characters of such a text. `seal` cuts further if the whole is too large."""
MOST_SOFTWARE = 8


@dataclass(frozen=True)
class Predictions(Result):
    """What a device has predicted in a period.

    Attributes:
        since: Unix seconds when the period began. It rises from period to period. Reports with the
            same one are of the same period: the newer takes the older's place, and nothing is
            counted twice.
        total: Number of images.
        unknown: Of them, those of no known class.
        confidence_1e4: Mean probability of the best class times 10,000; 0 if there are no images.
        by_class: {class: number of images}, the most frequent classes.
        other: Number of images of all other classes.
    """

    since: int = 0
    total: int = 0
    unknown: int = 0
    confidence_1e4: int = 0
    by_class: Mapping[str, int] = field(default_factory=dict)
    other: int = 0


@dataclass(frozen=True)
class Report(Result):
    """What a device says of itself.

    Attributes:
        device: Its id.
        name, channel, groups: As in its identity.
        number: Rises by one with each report.
        time: Unix seconds, by the device's clock.
        software: Versions.
        platform: Operating system and processor.
        lineage, bundle, state: Digests; empty if the device serves nothing.
        task, task_name, revision, generation, packets, trust_version: As in `results.Status`.
        step: Where the device stands in its roll-out; None if there is none.
        waiting: Why it does not go on; empty if it waits for nothing.
        errors: The newest ones, the newest last.
        canary_1e9: Largest difference of the last canary times 1e9; None if none was run.
        uptime_s: Seconds since the device was started.
        disk_free: Bytes.
        store_bytes: Bytes of the store.
        damage: Number of damaged files in it.
        metadata_expired: The fleet repository's timestamp has expired.
        clock_behind: The device's clock is before a time that the repository has signed.
        predictions: Counts since the last report that was delivered.
    """

    device: str
    name: str
    channel: str
    groups: tuple[str, ...]
    number: int
    time: int
    software: Mapping[str, str]
    platform: str
    lineage: str
    bundle: str
    state: str
    task: int
    task_name: str
    revision: int
    generation: int
    packets: int
    trust_version: int
    step: Progress | None
    waiting: str
    errors: tuple[Failure, ...]
    canary_1e9: int | None
    uptime_s: int
    disk_free: int
    store_bytes: int
    damage: int
    metadata_expired: bool
    clock_behind: bool
    predictions: Predictions

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **super().to_dict()}


_COUNT = whole(0, LARGEST)
_STATE = either(digest, one_of(""))
_REPORT = record(
    {
        "format": one_of(FORMAT),
        "device": device_id,
        "name": line(),
        "channel": channel_name,
        "groups": device_groups,
        "number": whole(1, LARGEST),
        "time": whole(0, LATEST),
        "software": mapped(line(VERSION)),
        "platform": line(PLATFORM),
        "lineage": _STATE,
        "bundle": _STATE,
        "state": _STATE,
        "task": whole(0, LIMITS.sequence),
        "task_name": line(),
        "revision": whole(0, LIMITS.revision),
        "generation": _COUNT,
        "packets": _COUNT,
        "trust_version": whole(0, LIMITS.revision),
        "step": STEP,
        "waiting": line(WAITING),
        "errors": listed(
            record({"time": whole(0, LATEST), "code": whole(0, 255), "message": line(MESSAGE)}),
            0,
            NEWEST_ERRORS,
        ),
        "canary_1e9": CANARY,
        "uptime_s": whole(0, LATEST),
        "disk_free": _COUNT,
        "store_bytes": _COUNT,
        "damage": _COUNT,
        "metadata_expired": flag,
        "clock_behind": flag,
        "predictions": record(
            {
                "since": whole(0, LATEST),
                "total": _COUNT,
                "unknown": _COUNT,
                "confidence_1e4": whole(0, CONFIDENCE),
                "by_class": mapped(_COUNT),
                "other": _COUNT,
            }
        ),
    }
)


@dataclass(frozen=True)
class Surroundings:
    """What a report says of the machine.

    time: Unix seconds. uptime_s: seconds. disk_free: bytes.
    """

    time: int
    uptime_s: int
    disk_free: int
    software: Mapping[str, str]
    platform: str


def surroundings(store: Path) -> Surroundings:
    """Look at this machine. Raises InputError if the store's disk does not answer."""
    with atomic.reading(store):
        free = shutil.disk_usage(store).free
    return Surroundings(
        time=min(max(0, int(time.time())), LATEST),
        uptime_s=int(time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))),
        disk_free=free,
        software={
            "sdlora-edge": __version__,
            "python": platform.python_version(),
            "onnxruntime": _version("onnxruntime"),
        },
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Counted:
    """The number of the next report, and what has been predicted since the last delivered one."""

    number: int
    predictions: Predictions


def build(
    status: Status | None,
    who: Identity,
    sync: SyncState | None,
    counted: Counted,
    here: Surroundings,
) -> Report:
    """Make a report.

    Args:
        status: Of the device; None if it serves nothing. Then an error in `sync` should say why.
        who: The device.
        sync: What its last sync found; None if there was none.
        counted: Number of the report, and its predictions.
        here: The machine.
    """
    last = sync or SyncState(here.time)
    return Report(
        device=who.id,
        name=who.name,
        channel=who.channel,
        groups=who.groups,
        number=counted.number,
        time=here.time,
        software={name: _line(v, VERSION) for name, v in here.software.items()},
        platform=_line(here.platform, PLATFORM),
        lineage=status.lineage if status else "",
        bundle=status.bundle if status else "",
        state=status.state if status else "",
        task=status.task if status else 0,
        task_name=_line(status.task_name, LIMITS.name) if status else "",
        revision=status.revision if status else 0,
        generation=status.generation if status else 0,
        packets=status.packets if status else 0,
        trust_version=status.trust_version if status else 0,
        step=last.step,
        waiting=_line(last.waiting, WAITING),
        errors=tuple(
            Failure(e.time, e.code, _line(e.message, MESSAGE)) for e in last.errors[-NEWEST_ERRORS:]
        ),
        canary_1e9=last.canary_1e9,
        uptime_s=here.uptime_s,
        disk_free=here.disk_free,
        store_bytes=sum(status.store_bytes.values()) if status else 0,
        damage=len(status.damage) if status else 0,
        metadata_expired=last.metadata_expired,
        clock_behind=last.clock_behind,
        predictions=counted.predictions,
    )


def _line(text: str, most: int) -> str:
    """A text on one line, of at most `most` characters."""
    return printable(text)[:most]


def seal(report: Report, signer: CryptoSigner) -> bytes:
    """Sign a report. If it is too large, texts are cut and rare classes counted in `other`.

    Raises:
        InputError: A field is out of bounds.
    """
    key = signer.public_key.keyval["public"]

    def fits(candidate: dict[str, Any]) -> bool:
        return len(_sealed(key, candidate, bytes(64))) <= SIZE_LIMIT

    small = shortened(report.to_dict(), fits)
    _check(small)
    return _sealed(key, small, bytes.fromhex(signer.sign(_signed(small)).signature))


def unseal(data: bytes, keys: Mapping[str, str]) -> Report:
    """Read a report that came from outside.

    Args:
        data: The sealed report.
        keys: {device id: public key in hexadecimal} of the enrolled devices.

    Raises:
        LimitError: It has more than SIZE_LIMIT bytes.
        InputError: It is not canonical, or a field is missing, unknown or out of bounds.
        TrustError: The device is not enrolled, or its key has not signed this.
    """
    if len(data) > SIZE_LIMIT:
        raise LimitError(f"a report of {len(data)} bytes exceeds {SIZE_LIMIT}")
    value = parse_exact_json(data, "a report")
    try:
        if dump_json(value) != data:
            raise ValueError("it is not in canonical form")
        if value.keys() != {"key", "report", "signature"} or not is_sha256(value["key"]):
            raise ValueError("it is not {key, report, signature}")
        signature, report = bytes.fromhex(value["signature"]), value["report"]
        if signature.hex() != value["signature"] or not signing.is_whole(signature):
            raise ValueError("its signature is not one of Ed25519")
        device_id(report["device"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a report is malformed: {error}") from error
    _verify(value["key"], signature, report, keys)
    _check(report)
    return _read(report)


def _verify(key: str, signature: bytes, report: dict[str, Any], keys: Mapping[str, str]) -> None:
    """Raises TrustError unless the device is enrolled with this key, and the key has signed."""
    device = report["device"]
    if device not in keys:
        raise TrustError(f"device {device} is not enrolled: run sdlora-edge fleet enroll")
    if keys[device] != key or not is_key(bytes.fromhex(key)):
        raise TrustError(
            f"device {device} is enrolled with key {keys[device][:12]}, not {key[:12]}: if its "
            "store was made again, enroll it again"
        )
    enrolled = SSlibKey(key, "ed25519", "ed25519", {"public": key})
    if not signing.is_good(enrolled, signature, _signed(report)):
        raise TrustError(f"a report of device {device} is not signed by its key: it was changed")


def _check(report: dict[str, Any]) -> None:
    try:
        _REPORT(report)
        if len(report["software"]) > MOST_SOFTWARE:
            raise ValueError(f"software: more than {MOST_SOFTWARE}")
        for name in (*report["software"], *report["predictions"]["by_class"]):
            line()(name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a report is malformed: {error}") from error


def _read(report: dict[str, Any]) -> Report:
    value = {f.name: report[f.name] for f in fields(Report)}
    value["groups"] = tuple(value["groups"])
    value["step"] = as_step(value["step"])
    value["errors"] = as_errors(value["errors"])
    value["predictions"] = Predictions(**value["predictions"])
    return Report(**value)


def _signed(report: dict[str, Any]) -> bytes:
    return PREFIX + dump_json(report)


def _sealed(key: str, report: dict[str, Any], signature: bytes) -> bytes:
    return dump_json({"key": key, "report": report, "signature": signature.hex()})
