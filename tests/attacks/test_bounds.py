"""Numbers are bounded before they are used, and before they are written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attacks_kit import Victim
from conftest import Fleet
from forge import Draft

from sdlora_edge.device import Device
from sdlora_edge.device import store as stores
from sdlora_edge.device.store import Store
from sdlora_edge.errors import InputError, LimitError
from sdlora_edge.formats import control, signing
from sdlora_edge.formats.canonical import dump_json, parse_exact_json, parse_json, sha256
from sdlora_edge.formats.control import Revoked, with_revocation
from sdlora_edge.formats.limits import LIMITS

HUGE = 10**4000
"""as many digits as Python takes, nearly"""


def test_a_number_without_bound_in_a_packet(victim: Victim) -> None:
    lineage = Draft(victim.next).manifest["lineage"]
    revocation = control.build_revocation(
        lineage, Revoked(2, 0), lambda payload: signing.sign(payload, [victim.signer])
    )
    fields = [
        (victim.next, "sequence"),
        (victim.next, "seed"),
        (victim.next, "revision"),
        (revocation, "sequence"),
        (revocation, "revision"),
    ]
    refused = []
    for number in (HUGE, 10**15, LIMITS.sequence + 1, -HUGE):
        for packet, field in fields:
            draft = Draft(packet)
            place: Any = draft.manifest
            if field == "seed":
                place = draft.manifest["canary"]
                number = max(number, 2**53)
            elif "tasks" in place and field == "revision":
                place = draft.manifest["tasks"][0]
            place[field] = number
            refused.append((draft.sealed(victim.signer, leads=False), 3, ""))
    victim.refuses_each(refused)


def test_a_record_of_300_revocations_of_4000_digits_is_damaged_and_read_at_once(
    store: Path,
) -> None:
    """They were taken once; each look at the records took seconds."""
    old = Store(store).current()
    body = parse_json(old.to_json(), "")
    del body["checksum"]
    body["revoked"] = [{"sequence": HUGE + i, "revision": i} for i in range(300)]
    (store / "generation.0.json").write_bytes(
        dump_json({**body, "checksum": sha256(dump_json(body))})
    )
    begin = time.process_time()
    assert Store(store).records()[store / "generation.0.json"] is None
    assert Store(store).current() == old
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "changes",
    [
        {"counter": 2**53 + 1},
        {"highest": LIMITS.sequence + 1},
        {"revision": LIMITS.revision + 1},
        {"revoked": [{"sequence": LIMITS.sequence + 1, "revision": 0}]},
        {"revoked": [{"sequence": 1, "revision": LIMITS.revision + 1}]},
        {"revoked": [{"sequence": i, "revision": i} for i in range(1, LIMITS.revocations + 2)]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_record_beyond_the_bounds_is_damaged(store: Path, changes: dict[str, Any]) -> None:
    old = Store(store).current()
    body = {**parse_json(old.to_json(), ""), **changes}
    del body["checksum"]
    (store / "generation.0.json").write_bytes(
        dump_json({**body, "checksum": sha256(dump_json(body))})
    )
    assert Store(store).records()[store / "generation.0.json"] is None


def test_one_revocation_too_many_is_refused_and_an_earlier_one_covers_them_all(
    victim: Victim,
) -> None:
    opened = Store(victim.store)
    full = tuple(Revoked(100 + i, i) for i in range(LIMITS.revocations))
    with opened.lock(), opened.replacing(replace(opened.current(), revoked=full)):
        pass
    lineage = Draft(victim.next).manifest["lineage"]

    def revocation(task: int, revision: int) -> bytes:
        return control.build_revocation(
            lineage, Revoked(task, revision), lambda payload: signing.sign(payload, [victim.signer])
        )

    victim.refuses(
        revocation(99 + LIMITS.revocations + 1, LIMITS.revocations),
        3,
        f"remembers {LIMITS.revocations} revocations",
    )
    victim.refuses(revocation(101, 1), 7, "revoked already")
    assert with_revocation(full, Revoked(50, LIMITS.revocations)) == (
        Revoked(50, LIMITS.revocations),
    )
    assert victim.apply(revocation(50, LIMITS.revocations)).code == 0


def test_a_newer_revision_that_would_be_one_revocation_too_many_changes_nothing(
    victim: Victim,
) -> None:
    """Its file was left in the store."""
    opened = Store(victim.store)
    full = tuple(Revoked(100 + i, i + 1) for i in range(LIMITS.revocations))
    with opened.lock(), opened.replacing(replace(opened.current(), revoked=full)):
        pass
    draft = Draft(victim.next)
    draft.manifest["tasks"][0]["revision"] = 1
    victim.refuses(draft.sealed(victim.signer), 3, f"remembers {LIMITS.revocations} revocations")


def test_a_record_that_no_reader_would_take_is_not_written(
    fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device.open(store, threads=1)
    device.apply(fleet.packets[0])
    before = Store(store).current()
    monkeypatch.setattr(stores, "RECORD_LIMIT", len(before.to_json()) + 300)
    with pytest.raises(LimitError, match="generation record"):
        device.apply(fleet.packets[1])
    assert Store(store).current() == before
    assert device.status().task == Device.open(store, threads=1).status().task == 1


@pytest.mark.parametrize(
    "text",
    [b'{"a":10000000000000000}', b'{"a":-10000000000000000}', b'{"a":[' + b"9" * 100_000 + b"]}"],
)
def test_a_whole_number_of_more_than_16_digits_is_no_json_of_ours(text: bytes) -> None:
    with pytest.raises(InputError, match="digits"):
        parse_json(text, "this")
    assert parse_json(b'{"a":-9007199254740992}', "this") == {"a": -(2**53)}


@pytest.mark.parametrize("text", [b"1.0", b"0.5", b"1e3", b"-0.0", b"1E400"])
def test_a_signed_file_holds_no_float(text: bytes) -> None:
    """JavaScript, C++ and Python write floats differently, and would compute different digests."""
    with pytest.raises(InputError, match="is not an integer"):
        parse_exact_json(b'{"a":[' + text + b"]}", "this")


def test_a_signed_integer_is_one_that_javascript_reads_exactly() -> None:
    for number in (2**53 - 1, 1 - 2**53, 0):
        assert parse_exact_json(b'{"a":%d}' % number, "this") == {"a": number}
    for number in (2**53, -(2**53)):
        with pytest.raises(InputError, match="out of range"):
            parse_exact_json(b'{"a":%d}' % number, "this")


def test_a_version_of_the_keys_beyond_the_bounds(victim: Victim) -> None:
    new = signing.Trust((victim.signer.public_key,), 1, 2)
    data = control.build_trust(new, lambda payload: signing.sign(payload, [victim.signer]))
    refused = []
    for field, number in (("version", LIMITS.revision + 1), ("version", 0), ("threshold", 2)):
        draft = Draft(data)
        draft.manifest["trust"][field] = number
        refused.append((draft.sealed(victim.signer), 3, ""))
    victim.refuses_each(refused)
