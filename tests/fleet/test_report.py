"""A report: what it holds, how small it is, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reported import COUNTS, DEVICE, HERE, KEYS, REPORT, SIGNER, STATUS, SYNC, WHO
from securesystemslib.signer import CryptoSigner

from sdlora_edge.errors import InputError, LimitError, TrustError, printable
from sdlora_edge.fleet.report import (
    PREFIX,
    SIZE_LIMIT,
    Counted,
    Predictions,
    Report,
    Surroundings,
    build,
    seal,
    surroundings,
    unseal,
)
from sdlora_edge.fleet.shortening import LEVELS, class_name, cut
from sdlora_edge.fleet.sync_state import Failure, Progress, SyncState, canary_1e9
from sdlora_edge.formats.canonical import LARGEST, dump_json
from sdlora_edge.formats.ed25519 import ORDER


def test_a_report_arrives_as_it_was_sent() -> None:
    sealed = seal(REPORT, SIGNER)
    assert unseal(sealed, KEYS) == REPORT
    assert len(sealed) < 1500
    assert (REPORT.store_bytes, REPORT.task_name, REPORT.errors[0].code) == (1200, "jam", 6)
    value = json.loads(sealed)
    assert value.keys() == {"key", "report", "signature"}
    key = SIGNER.public_key
    key.verify_signature(
        SIGNER.sign(PREFIX + dump_json(value["report"])), PREFIX + dump_json(REPORT.to_dict())
    )


def test_a_device_that_serves_nothing_says_so() -> None:
    failed = SyncState(HERE.time, errors=(Failure(HERE.time, 3, "the bundle is damaged"),))
    report = unseal(seal(build(None, WHO, failed, Counted(1, Predictions()), HERE), SIGNER), KEYS)
    assert (report.state, report.generation, report.errors[0].code) == ("", 0, 3)


def test_nothing_but_what_the_docs_name_leaves_a_device(tmp_path: Path) -> None:
    here = surroundings(tmp_path)
    report = build(STATUS, WHO, None, Counted(1, COUNTS), here).to_dict()
    documented = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    for name in [*report, *report["predictions"]]:
        assert f"`{name}`" in documented or f".{name}`" in documented, name
    assert set(here.software) == {"sdlora-edge", "python", "onnxruntime"}
    assert 0 < here.uptime_s < 2**40
    assert here.disk_free > 0


TEXT = st.text(max_size=200)

PRINTABLE = TEXT.map(lambda text: printable(text)[:200])


@st.composite
def largest(draw: Any) -> Report:
    """Reports of every size, to the bound of every field."""
    digest = st.text("0123456789abcdef", min_size=64, max_size=64)
    who = replace(
        WHO,
        name=draw(PRINTABLE),
        channel="c" * draw(st.integers(1, 64)),
        groups=tuple(draw(st.lists(PRINTABLE.filter(bool), max_size=20, unique=True))),
    )
    status = replace(STATUS, task_name=draw(TEXT), task=10**6, revision=10**6, packets=LARGEST)
    failure = st.builds(Failure, st.just(2**40), st.just(255), st.text(max_size=1000))
    sync = SyncState(
        2**40,
        waiting=draw(st.text(max_size=500)),
        step=draw(st.none() | st.builds(Progress, digest, st.just(100), st.booleans())),
        errors=tuple(draw(st.lists(failure, max_size=3))),
        canary_1e9=draw(st.none() | st.just(LARGEST)),
        metadata_expired=True,
    )
    classes: Mapping[str, int] = draw(st.dictionaries(TEXT, st.integers(0, 2**40), max_size=60))
    other = draw(st.integers(0, 2**40))
    counts = Predictions(2**40, LARGEST, LARGEST, 10_000, classes, other)
    here = Surroundings(
        2**40, 2**40, LARGEST, {f"package {i}": draw(TEXT) for i in range(3)}, draw(TEXT)
    )
    return build(status, who, sync, Counted(LARGEST, counts), here)


@given(largest())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_report_fits_and_loses_no_count(report: Report) -> None:
    sealed = seal(report, SIGNER)
    assert len(sealed) <= SIZE_LIMIT
    found = unseal(sealed, KEYS)
    sent, made = found.predictions, report.predictions
    assert sum(sent.by_class.values()) + sent.other == sum(made.by_class.values()) + made.other
    kept = sorted(sent.by_class.values())
    names = {class_name(name) for name in made.by_class}
    assert set(sent.by_class) <= names
    if len(names) == len(made.by_class):  # the classes that were dropped are the rarest
        dropped = [n for name, n in made.by_class.items() if class_name(name) not in sent.by_class]
        assert not kept or not dropped or max(dropped) <= kept[0]
    assert (found.device, found.number, found.channel) == (
        report.device,
        report.number,
        report.channel,
    )


def test_the_largest_report_of_all_fits() -> None:
    wide = "\U0001f600" * 200  # twelve bytes of JSON each
    status = replace(
        STATUS,
        task_name=wide,
        task=10**6,
        revision=10**6,
        trust_version=10**6,
        packets=LARGEST,
        generation=LARGEST,
    )
    who = replace(
        WHO, name=wide, channel="c" * 64, groups=tuple(f"{i:02}{wide}"[:200] for i in range(20))
    )
    errors = (Failure(2**40, 255, wide * 5),) * 3
    sync = SyncState(
        2**40,
        waiting=wide,
        step=Progress("d" * 64, 100, False),
        errors=errors,
        canary_1e9=LARGEST,
    )
    counts = Predictions(
        2**40, LARGEST, LARGEST, 10_000, {f"{wide[:190]}{i}": 2**40 for i in range(50)}, 2**40
    )
    here = Surroundings(2**40, 2**40, LARGEST, {f"package {i}": wide for i in range(3)}, wide)
    sealed = seal(build(status, who, sync, Counted(LARGEST, counts), here), SIGNER)
    assert len(sealed) <= SIZE_LIMIT
    assert len(unseal(sealed, KEYS).predictions.by_class) >= 1


@given(st.text(max_size=80), st.sampled_from(LEVELS))
@example("a" * 38 + "\U0001f600" * 2, 60)  # 62 bytes: the dots took more characters than they gave
def test_a_text_that_is_cut_has_no_more_characters(text: str, most: int) -> None:
    short = cut(text, most)
    assert len(dump_json(short)) - 2 <= most
    assert len(short) <= max(len(text), len("..."))  # so it keeps the bound of its field
    assert short == text or (short.endswith("...") and text.startswith(short[:-3]))


def test_a_class_has_one_name_in_every_report() -> None:
    assert class_name("cat") == "cat"
    long = "a class with a name that is far longer than a report has room for, number "
    assert class_name(f"{long}1") != class_name(f"{long}2")
    assert class_name(f"{long}1").startswith("a class with a name that")


def _changed(**changes: Any) -> bytes:
    return _signed({**REPORT.to_dict(), **changes})


def _signed(report: Any, signer: CryptoSigner = SIGNER, prefix: bytes = PREFIX) -> bytes:
    signature = signer.sign(prefix + dump_json(report)).signature
    key = signer.public_key.keyval["public"]
    return dump_json({"key": key, "report": report, "signature": signature})


SEALED = seal(REPORT, SIGNER)
OTHER = CryptoSigner.generate_ed25519()
_R, _S = json.loads(SEALED)["signature"][:64], bytes.fromhex(json.loads(SEALED)["signature"][64:])
HIGH_S = _R + (int.from_bytes(_S, "little") + ORDER).to_bytes(32, "little").hex()


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b" " * 2049, LimitError, "2049 bytes"),
        (b"", InputError, "not valid JSON"),
        (b"[]", InputError, "not a JSON object"),
        (b"{}", InputError, "not {key, report, signature}"),
        (SEALED + b"\n", InputError, "canonical"),
        (SEALED.replace(b'"number":7', b'"number":7.0'), InputError, "not an integer"),
        (SEALED.replace(b'"key"', b'"key":"","key"'), InputError, "key twice"),
        (dump_json({**json.loads(SEALED), "more": 1}), InputError, "not {key"),
        (dump_json({**json.loads(SEALED), "signature": "00"}), InputError, "Ed25519"),
        (dump_json({**json.loads(SEALED), "signature": HIGH_S}), InputError, "Ed25519"),
        (dump_json({**json.loads(SEALED), "report": 1}), InputError, "malformed"),
        (SEALED.replace(b'"number":7', b'"number":8'), TrustError, "changed"),
        (_signed(REPORT.to_dict(), OTHER), TrustError, "enrolled with key"),
        (_signed(REPORT.to_dict(), prefix=b""), TrustError, "changed"),
        (_changed(device="f" * 32), TrustError, "not enrolled"),
        (_changed(device="F" * 32), InputError, "device id"),
        (_changed(format="sdlora-edge/report/2"), InputError, "format"),
        (_changed(more=1), InputError, "missing or unknown"),
        (_changed(number=0), InputError, "number"),
        (_changed(task=-1), InputError, "task"),
        (_changed(channel="a/b"), InputError, "channel"),
        (_changed(name="\x1b[2J"), InputError, "cannot be shown"),
        (_changed(name="\ud800"), InputError, "cannot be shown"),
        (_changed(damage=True), InputError, "damage"),
        (_changed(clock_behind=0), InputError, "clock_behind"),
        (_changed(software={f"p{i}": "1" for i in range(9)}), InputError, "more than 8"),
        (_changed(software=None), InputError, "malformed"),
        (_changed(errors=[{"time": 1, "code": 256, "message": ""}]), InputError, "errors"),
        (_changed(predictions={**COUNTS.to_dict(), "by_class": {"\n": 1}}), InputError, "cannot"),
        (_changed(predictions={**COUNTS.to_dict(), "confidence_1e4": 10_001}), InputError, "confid"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(data: bytes, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        unseal(data, KEYS)


def test_a_weak_enrolled_key_accepts_nothing() -> None:
    """For the neutral point, one signature is good for every message."""
    weak = "01" + "00" * 31
    data = dump_json({**json.loads(SEALED), "key": weak, "signature": weak + "00" * 32})
    with pytest.raises(TrustError):
        unseal(data, {DEVICE: weak})


def test_a_canary_that_is_not_finite_is_a_large_one() -> None:
    assert canary_1e9(None) is None
    assert canary_1e9(1.5e-6) == 1500
    assert canary_1e9(float("nan")) == canary_1e9(float("inf")) == LARGEST


def test_the_state_of_a_sync_is_kept(tmp_path: Path) -> None:
    assert SyncState.from_json(SYNC.to_json()) == SYNC
    for bad in (
        b"{}",
        SYNC.to_json().replace(b"1200", b"-1"),
        SYNC.to_json().replace(b'percent":10', b'percent":101'),
    ):
        with pytest.raises(InputError, match="malformed"):
            SyncState.from_json(bad)
