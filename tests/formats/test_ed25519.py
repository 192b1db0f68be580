"""Keys and signatures on which verifiers of Ed25519 differ: all devices must refuse them.

The cases are those of "Taming the many EdDSAs" (Chalkias, Garillot, Nikolaenko 2020),
with our envelopes.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib._vendor.ed25519 import ed25519 as reference
from securesystemslib.dsse import Envelope
from securesystemslib.signer import _key

from sdlora_edge.errors import InputError, SdloraError, TrustError
from sdlora_edge.formats import ed25519, signing
from sdlora_edge.formats.canonical import dump_json, parse_exact_json, sha256

L, P = reference.l, reference.q
SECRET, NONCE = 2**251 + 12345, 2**250 + 6789
T8 = reference.decodepoint(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
)
SMALL = [reference.encodepoint(reference.scalarmult(T8, k)) for k in range(8)]
PRIME = reference.encodepoint(reference.scalarmult_B(SECRET))
MIXED = reference.encodepoint(reference.edwards_add(reference.scalarmult_B(SECRET), T8))
IDENTITY, NOT_CANONICAL_IDENTITY = SMALL[0], (P + 1).to_bytes(32, "little")


def numbers(*values: int) -> list[bytes]:
    return [value.to_bytes(32, "little") for value in values]


UNSOUND = {
    "small order": SMALL,
    "not canonical": numbers(
        P, P + 1, 2**255 + P, 2**255 + P + 1, 2**255 + 1, 2**255 + P - 1, *range(P + 3, P + 19)
    ),
    "mixed order": [
        MIXED,
        reference.encodepoint(reference.edwards_add(reference.decodepoint(MIXED), T8)),
    ],
    "not on the curve": numbers(2, 7, 2**255 + 2),
}


def nonce_point(torsion: int) -> bytes:
    """r B + torsion T8."""
    return reference.encodepoint(
        reference.edwards_add(reference.scalarmult_B(NONCE), reference.scalarmult(T8, torsion))
    )


def key_entry(public: bytes) -> tuple[str, dict[str, object]]:
    keyid = sha256(dump_json({"keytype": "ed25519", "scheme": "ed25519", "public": public.hex()}))
    return keyid, {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public.hex()}}


def trusting(public: bytes) -> signing.Trust:
    return signing.Trust.from_dict(
        {"version": 1, "threshold": 1, "keys": dict([key_entry(public)])}
    )


def enveloped(public: bytes, signature: bytes, payload: bytes) -> bytes:
    sig = {"keyid": key_entry(public)[0], "sig": base64.b64encode(signature).decode()}
    value = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": signing.PAYLOAD_TYPE,
        "signatures": [sig],
    }
    return dump_json(value)


def message(payload: bytes) -> bytes:
    pae: bytes = Envelope(payload, signing.PAYLOAD_TYPE, {}).pae()
    return pae


def challenge(R: bytes, A: bytes, payload: bytes) -> int:
    return int.from_bytes(hashlib.sha512(R + A + message(payload)).digest(), "little")


@dataclass(frozen=True)
class Case:
    """A signature, and what `cryptography` and securesystemslib's Python code say of it."""

    public: bytes
    signature: bytes
    payload: bytes
    compiled: bool
    pure: bool


def found(wanted: Callable[[bytes], bool]) -> bytes:
    return next(payload for payload in (b"%d" % i for i in range(10_000)) if wanted(payload))


def signed(
    A: bytes,
    R: bytes,
    wanted: Callable[[int, int], bool],
    verdicts: tuple[bool, bool],
    r: int = 0,
    extra: int = 0,
) -> Case:
    """S = r + h a + extra, over the first payload whose h, in whole and modulo L, is wanted."""
    payload = found(lambda one: wanted(h := challenge(R, A, one), h % L))
    S = (r + challenge(R, A, payload) * SECRET) % L + extra
    return Case(A, R + S.to_bytes(32, "little"), payload, *verdicts)


def small_key(A: bytes, R: bytes, S: int, wanted: Callable[[bytes], bool], verdict: bool) -> Case:
    return Case(A, R + S.to_bytes(32, "little"), found(wanted), verdict, verdict)


def cases() -> dict[str, Case]:
    same = lambda torsion: lambda h, short: h % 8 == short % 8 == -torsion % 8  # noqa: E731
    odd, order4 = SMALL[1], P.to_bytes(32, "little")
    reduced = bytes(32)  # order4 in canonical form
    any_h = lambda h, short: True  # noqa: E731
    real = found(lambda one: True)
    h = challenge(IDENTITY, PRIME, real)
    return {
        "0: small A and R, S = 0": small_key(
            odd, SMALL[3], 0, lambda m: same(3)(c := challenge(SMALL[3], odd, m), c % L), True
        ),
        "1: small A": small_key(
            odd,
            nonce_point(3),
            NONCE,
            lambda m: same(3)(c := challenge(nonce_point(3), odd, m), c % L),
            True,
        ),
        "2: mixed A, small R": signed(MIXED, SMALL[3], same(3), (True, True)),
        "3: mixed A and R": signed(MIXED, nonce_point(3), same(3), (True, True), NONCE),
        "4: with the cofactor only": signed(MIXED, nonce_point(3), same(4), (False, False), NONCE),
        "5: h reduced first": signed(
            MIXED, nonce_point(3), lambda h, short: short % 8 == 5 != h % 8, (True, False), NONCE
        ),
        "5: h not reduced": signed(
            MIXED, nonce_point(3), lambda h, short: h % 8 == 5 != short % 8, (False, True), NONCE
        ),
        "6: S + L": signed(PRIME, nonce_point(0), any_h, (False, True), NONCE, L),
        "7: S + 14 L": signed(PRIME, nonce_point(0), any_h, (False, True), NONCE, 14 * L),
        "8: R not canonical, reduced before h": Case(
            PRIME,
            NOT_CANONICAL_IDENTITY + (h * SECRET % L).to_bytes(32, "little"),
            real,
            False,
            True,
        ),
        "8: R = 1, its sign set": Case(
            PRIME,
            numbers(2**255 + 1)[0] + (h * SECRET % L).to_bytes(32, "little"),
            real,
            False,
            True,
        ),
        "9: R not canonical, as it is in h": signed(
            PRIME, NOT_CANONICAL_IDENTITY, any_h, (False, False)
        ),
        "10: A not canonical, reduced before h": small_key(
            order4,
            IDENTITY,
            0,
            lambda m: (
                challenge(IDENTITY, reduced, m) % 4 == 0 != challenge(IDENTITY, order4, m) % L % 2
            ),
            False,
        ),
        "11: A not canonical, as it is in h": small_key(
            order4,
            IDENTITY,
            0,
            lambda m: (c := challenge(IDENTITY, order4, m)) % 4 == c % L % 4 == 0,
            True,
        ),
        "R is no point": Case(PRIME, numbers(2)[0] + bytes(32), real, False, False),
    }


CASES = cases()


def compiled_says(case: Case) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(case.public).verify(
            case.signature, message(case.payload)
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def pure_says(case: Case) -> bool:
    try:
        reference.checkvalid(case.signature, message(case.payload), case.public)
    except (reference.SignatureMismatch, ValueError):
        return False
    return True


def both(envelope: bytes, trust: signing.Trust) -> set[str]:
    """What a host says, and a device without `cryptography`."""

    def verdict() -> str:
        try:
            return signing.verify(envelope, trust).decode()
        except SdloraError as error:
            return f"{type(error).__name__}: {error}"

    with pytest.MonkeyPatch.context() as device:
        said = {verdict()}
        device.setattr(_key, "CRYPTO_IMPORT_ERROR", "not installed")
        return said | {verdict()}


@pytest.mark.parametrize(
    "public", [k for keys in UNSOUND.values() for k in keys], ids=lambda k: k.hex()
)
def test_an_unsound_key_is_refused_wherever_keys_are_read(public: bytes, tmp_path: Path) -> None:
    keyid, entry = key_entry(public)
    with pytest.raises(InputError, match=f"key {keyid[:12]}: {public.hex()} is not a sound"):
        trusting(public)
    (tmp_path / "k.pub").write_bytes(dump_json({"keyid": keyid, **entry}))
    with pytest.raises(InputError, match="is not a sound"):
        signing.load_public(tmp_path / "k.pub")


@pytest.mark.parametrize("name", CASES)
def test_a_signature_that_verifiers_judge_differently_is_refused_by_both(name: str) -> None:
    case = CASES[name]
    assert (compiled_says(case), pure_says(case)) == (
        case.compiled,
        case.pure,
    )  # so the case is what its name says
    if case.public != PRIME:
        with pytest.raises(InputError, match="is not a sound"):
            trusting(case.public)
        return
    (said,) = both(enveloped(case.public, case.signature, case.payload), trusting(PRIME))
    assert said.startswith(
        ("TrustError: signature refused", "InputError: the envelope is malformed")
    )


def test_a_good_signature_counts_beside_a_wrong_one_of_a_known_key(tmp_path: Path) -> None:
    """Even if R of the wrong one is not a point: one verifier says wrong, the other raises."""
    private, public = signing.new_key("a", tmp_path)
    good = signing.sign(b"{}", [signing.load_signer(private)])
    trust = signing.Trust((trusting(PRIME).keys[0], signing.load_public(public)), 1)
    for R in numbers(2, P + 1, 2**255 + 1):
        value, other = (
            parse_exact_json(e, "") for e in (good, enveloped(PRIME, R + bytes(32), b"{}"))
        )
        value["signatures"] = other["signatures"] + value["signatures"]
        assert both(dump_json(value), trust) == {"{}"}
        assert signing.good_signatures(dump_json(value), trust) == 1


def test_keys_that_people_make_are_taken_quickly(tmp_path: Path) -> None:
    publics = [
        bytes.fromhex(signing.load_public(signing.new_key(str(i), tmp_path)[1]).keyval["public"])
        for i in range(20)
    ]
    ed25519.is_key.cache_clear()
    begin = time.process_time()
    assert all(map(ed25519.is_key, publics))
    assert time.process_time() - begin < 20 * 0.05


R_VALUES = [
    nonce_point(0),
    nonce_point(1),
    *SMALL,
    *UNSOUND["not canonical"][:8],
    *UNSOUND["not on the curve"],
]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    R=st.sampled_from(R_VALUES) | st.binary(min_size=32, max_size=32),
    hashed=st.none() | st.just(IDENTITY),
    flipped=st.none() | st.integers(0, 511),
    r=st.sampled_from([0, NONCE]),
    times=st.sampled_from([0, 0, 0, 1, 7, 14]),
)
def test_both_verifiers_agree_on_every_signature_of_a_sound_key(
    R: bytes, hashed: bytes | None, flipped: int | None, r: int, times: int
) -> None:
    """Made by the owner of the key, who may choose R, what is hashed for it, and S."""
    S = (r + challenge(hashed or R, PRIME, b"text") * SECRET) % L + times * L
    signature = int.from_bytes(R + S.to_bytes(32, "little"), "little") ^ (
        0 if flipped is None else 1 << flipped
    )
    assert (
        len(both(enveloped(PRIME, signature.to_bytes(64, "little"), b"text"), trusting(PRIME))) == 1
    )


def test_what_rfc_8032_takes_is_taken() -> None:
    for R, r in ((nonce_point(0), NONCE), (IDENTITY, 0)):
        S = (r + challenge(R, PRIME, b"good") * SECRET) % L
        assert both(enveloped(PRIME, R + S.to_bytes(32, "little"), b"good"), trusting(PRIME)) == {
            "good"
        }
    with pytest.raises(TrustError):
        signing.verify(enveloped(PRIME, IDENTITY + bytes(32), b"good"), trusting(PRIME))
