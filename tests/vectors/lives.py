"""Vectors of what devices live through: tasks, bundles, order, keys, revocations."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from book import KEYS, Book, by, damaged, draft, resigned, revocation, signed, trust, update
from curve import PRIME, mirrored, of_mixed_order, public
from forge import Draft, split
from network import PROJECTIONS, Chain, Export

from sdlora_edge.formats import control
from sdlora_edge.formats.canonical import dump_json, sha256

STEP = 2.0**-24
"""of magnitudes"""
ALL = {p.name: 1 for p in PROJECTIONS}

BASE = Chain.base("vectors", "fp16")
ONE = BASE.then("birds", ["dove", "emu"], [1.0], {"mix": 2, "qkv.q": 1, "qkv.v": 2})
TWO = ONE.then(
    "insects", ["K\u00e4fer"], [-0.625, 1 + STEP], {"mix": 1, "qkv.v": 1}, changed=[0, 2, 3]
)
THREE = TWO.then("more of the same", [], [0.0, 1023 * STEP, 0.5], ALL, changed=[5])
FOUR = THREE.then("head alone", ["fox"], [STEP, -STEP, 0.0, 1.0])
AGAIN = ONE.then("insects", ["Grille"], [0.25, 0.75], ALL, changed=[1])
AGAIN_THREE = AGAIN.then("fish", ["gar"], [-0.125, 0.5, 0.875], {"qkv.q": 1}, changed=[0, 5])
OTHER_ONE = BASE.then("other birds", ["dodo"], [0.5], {"qkv.q": 1})
OTHER_TWO = OTHER_ONE.then("other insects", ["flea"], [0.25, 0.5], {"qkv.q": 1})
SMALL = BASE.then("small", ["dove"], [1.0], {"qkv.q": 1}, changed=[0, 2])
"""what packets with one thing wrong are made of"""

OWN_BASE = Chain.base("own magnitudes", "fp16")
OWN_ONE = OWN_BASE.then("birds", ["dove"], [[1.0, -0.5, 0.25]], ALL)
OWN_TWO = OWN_ONE.then(
    "insects", ["midge"], [[0.125, 0.5, -1.0], [1.0, 0.0, 0.75]], ALL, changed=[1, 3]
)

LATE_BASE = Chain.base("late", "int8")
LATE_ONE = LATE_BASE.then("birds", ["dove"], [1.0], ALL)
LATE_TWO = LATE_ONE.then("insects", ["midge"], [-0.25, 0.5], {"mix": 1, "qkv.q": 2}, changed=[1])
LATE_OTHER = LATE_ONE.then("insects", ["wasp"], [0.0, 1.0], {"mix": 1})
LATE_TWIN = LATE_ONE.then("insects", ["midge"], [0.0, 1.0], {"mix": 1})
LATE_STRANGE = LATE_BASE.then("other birds", ["dodo"], [1.0], ALL)
LATE_MOVED = LATE_BASE.then("insects first", ["midge"], [1.0], ALL)
LATE_THREE = LATE_TWO.then("fish", ["gar"], [0.75, -1.0, 0.5], {"qkv.v": 1}, changed=[0, 4])

ROOM_BASE = Chain.base("room", "fp16")
ROOM_ONE = ROOM_BASE.then("birds", ["dove"], [1.0], ALL)
ROOM_TWO = ROOM_ONE.then("insects", ["midge"], [0.5, 1.0], {"mix": 1})
ROOM_LARGE = ROOM_ONE.then("insects", ["midge", "wasp"], [0.5, 1.0], {"mix": 1})


def exports() -> dict[str, Export]:
    return {
        "fp16": Export(BASE, trust("a")),
        **{e: Export(Chain.base("vectors", e), trust("a")) for e in ("fp32", "int8", "int4")},
        "own": Export(OWN_ONE, trust("a"), (0,)),
        "late": Export(LATE_TWO, trust("ab", 2), (0, 1), canary_tolerance=0.02),
        "room": Export(ROOM_BASE, trust("a"), dtype="float16", capacity=5),
    }


def deltas(value: list[Any]) -> Callable[[Draft], object]:
    return lambda d: d.manifest["tasks"][0].update(deltas=value)


def tasks(book: Book) -> None:
    v = book.vector(
        "tasks", "fp16", "Deltas of 0, 1, 2^-24, about 6.1e-05 and below 0; known rows with gaps"
    )
    v("1", ONE, update(ONE))
    v("1", 7)
    v("2", TWO, update(TWO))
    v("3", THREE, update(THREE, count=1))
    v("4", FOUR, update(FOUR))
    v("4", 7)
    v = book.vector(
        "held", "fp16", "A packet that the device holds is applied already, wherever it stands"
    )
    v("1", ONE)
    v("2", TWO)
    v("1", 7)
    v("1-by-a-and-b", 7, update(ONE, "ab"))
    for encoding in ("fp32", "int8", "int4"):
        v = book.vector(encoding, encoding, f"Two tasks in {encoding}")
        one = v.state.then("birds", ["dove"], [1.0], {"mix": 2, "qkv.q": 1, "qkv.v": 1})
        v(f"{encoding}-1", one, update(one))
        two = one.then("insects", ["midge"], [-0.5, 0.75], {"mix": 1}, changed=[2])
        v(f"{encoding}-2", two, update(two))
    v = book.vector(
        "own-first", "fp16", "The first task gives every projection a magnitude of its own"
    )
    own = BASE.then("birds", ["dove"], [[1.0, -0.5, 0.25]], ALL)
    v("own-first", own, update(own))
    v = book.vector(
        "own", "own", "Every projection has magnitudes of its own; the bundle is at task 1"
    )
    shared = OWN_ONE.then("insects", ["midge"], [[0.125] * 3, [1.0] * 3], {"qkv.q": 1})
    v("own-shared", 3, draft(update(shared), deltas([0.125, 1.0])))
    v("own-two", 3, draft(update(shared), deltas([[0.125] * 2, [1.0] * 2])))
    v("own-2", OWN_TWO, update(OWN_TWO))
    v = book.vector(
        "whole-deltas", "fp16", "A delta that the manifest writes as 1 is digested as 1.0"
    )
    v("whole-delta", SMALL, draft(update(SMALL), deltas([1])))


def bundles(book: Book) -> None:
    v = book.vector(
        "late",
        "late",
        "A bundle at task 2 with its own factors; two keys; a tolerance in the canary",
    )
    v("late-a", 4, update(LATE_THREE, "a", revision=1))
    v("late-a-twice", 3, resigned(update(LATE_THREE, "a", revision=1), lambda s: s * 2))
    v("late-a-and-c", 4, update(LATE_THREE, "ac", revision=1))
    v("late-a-and-bad-b", 4, damaged(update(LATE_THREE, "ab", revision=1), "b"))
    v("late-not-above", 4, update(LATE_THREE, "ab", revision=0))
    v("late-1", 7, update(LATE_ONE, "ab"))
    v("late-strange-1", 4, update(LATE_STRANGE, "ab"))
    v("late-moved-1", 4, update(LATE_MOVED, "ab"))
    v("late-twin-2", 4, update(LATE_TWIN, "ab", revision=1))
    v("late-2-revised", 5, update(LATE_OTHER, "ab", revision=2))
    v("late-revocation-flashed", 5, revocation(LATE_BASE, 2, 1, "ab"))
    v("late-canary-fails", 6, update(LATE_THREE, "ab", revision=1, off=0.03))
    v("late-canary-near", LATE_THREE, update(LATE_THREE, "ab", revision=1, off=0.01))
    v = book.vector("late-keys", "late", "The same bundle: both keys have signed")
    v("late-revocation-older", LATE_TWO, revocation(LATE_BASE, 2, 0, "ab"))
    v("late-3", LATE_THREE, update(LATE_THREE, "ab", revision=1))
    v = book.vector(
        "room", "room", "Room for five classes; weights are float16, and constants of the model"
    )
    v("room-1", ROOM_ONE, update(ROOM_ONE))
    v("room-2-too-large", 5, update(ROOM_LARGE))
    v("room-2", ROOM_TWO, update(ROOM_TWO))


def order(book: Book) -> None:
    v = book.vector(
        "order", "fp16", "Out of order, replay, fork, another lineage, a squash from elsewhere"
    )
    v("2", 5)
    v("int8-1", 5)
    v("1", ONE)
    v("other-2", 5, update(OTHER_TWO))
    v("other-1", 4, update(OTHER_ONE))
    v("other-1-revised", 5, update(OTHER_ONE, revision=1))
    v("squash-1-2", 5, update(TWO, tasks=2))
    v("3", 5)
    v("2", TWO)
    v("other-1", 4)
    v = book.vector("squash", "fp16", "A squash leads to the state that its packets lead to")
    v("squash-1-2", TWO)
    v("squash-1-2", 7)
    v("1", 7)
    v("3", THREE)
    v = book.vector(
        "rollback", "fp16", "What was rolled back by hand comes back in a newer revision alone"
    )
    v("1", ONE)
    v("2", TWO)
    v("3", THREE)
    v.rollback(TWO)
    v.rollback(ONE)
    v("2", 4)
    v("2-revised", AGAIN, update(AGAIN, revision=1))
    v.rollback(ONE)
    v("2", 4)
    v = book.vector(
        "revocation",
        "fp16",
        "A revocation takes a task back for good; a newer revision of it may come",
    )
    v("revocation-0", 3, draft(revocation(BASE, 2, 0), lambda d: d.manifest.update(sequence=0)))
    v("revocation-other", 5, revocation(LATE_BASE, 2, 0))
    v("revocation-field", 3, draft(revocation(BASE, 2, 0), lambda d: d.manifest.update(also=1)))
    v(
        "revocation-lineage",
        3,
        draft(revocation(BASE, 2, 0), lambda d: d.manifest.update(lineage=BASE.lineage.upper())),
    )
    v("1", ONE)
    v("2", TWO)
    v("3", THREE)
    v("revocation", ONE, revocation(BASE, 2, 0))
    v("revocation", 7)
    v("revocation-3-0", 7, revocation(BASE, 3, 0))
    v("2", 4)
    v("squash", AGAIN_THREE, update(AGAIN_THREE, tasks=2, revision=1))
    v("revocation-3-1", ONE, revocation(BASE, 3, 1))
    v("squash", 4)
    v("2-revised", 4)
    v = book.vector(
        "revocation-first",
        "fp16",
        "A revocation holds for packets that the device has not seen yet",
    )
    v("revocation", BASE)
    v("squash-1-2", 4)
    v("1", ONE)
    v("2", 4)
    v("2-revised", AGAIN)
    v = book.vector("revision", "fp16", "A revision revokes those before it")
    v("1", ONE)
    v("2-revised-5", AGAIN, update(AGAIN, revision=5))
    v("2-other-5", 4, update(TWO, revision=5))
    v.rollback(ONE)
    v("2", 4)
    v("revocation-2-4", 7, revocation(BASE, 2, 4))


def keys(book: Book) -> None:
    new = trust("bc", 2, 2)
    v = book.vector(
        "keys", "fp16", "From a to two of b and c, on to a: old and new keys sign, versions rise"
    )
    v("1", ONE)
    v("keys-by-old", 4, control.build_trust(new, by("a")))
    v("keys-by-new", 4, control.build_trust(new, by("bc")))
    v("keys-by-old-and-one-new", 4, control.build_trust(new, by("ab")))
    v("keys-version-1", 4, control.build_trust(trust("b"), by("ab")))
    v("2-by-b-and-c", 4, update(TWO, "bc"))
    v("keys", ONE, control.build_trust(new, by("abc")), trust_version=2)
    v("keys", 7)
    v("keys-by-new", 7)
    v("1", 7)
    v("2", 4)
    v("2-by-b", 4, update(TWO, "b"))
    v("2-by-b-and-c", TWO)
    v("revocation", 4)
    v.rollback(ONE)
    v("keys-3", ONE, control.build_trust(trust("a", 1, 3), by("abc")), trust_version=3)
    v("keys", 7)
    v("keys-2-other", 4, control.build_trust(trust("d", 1, 2), by("ad")))
    v("2-revised", AGAIN)
    v = book.vector(
        "one-of-two",
        "fp16",
        "One of two keys suffices; a wrong signature of the other one does no harm",
    )
    v("keys-one-of-two", BASE, control.build_trust(trust("ab", 1, 2), by("a")), trust_version=2)
    v("1-by-bad-a-and-b", ONE, damaged(update(ONE, "ab"), "a"))
    v = book.vector("keys-malformed", "fp16", "Keys that are not written as they must be")
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "threshold-0": lambda t: t.update(threshold=0),
        "threshold-3": lambda t: t.update(threshold=3),
        "version-0": lambda t: t.update(version=0),
        "no-keys": lambda t: t.update(keys={}),
        "field": lambda t: t.update(also=1),
        "keyid": lambda t: t.update(keys={"0" * 64: t["keys"].popitem()[1], **t["keys"]}),
        "scheme": lambda t: [key.update(scheme="ed448") for key in t["keys"].values()],
    }
    good = control.build_trust(new, by("abc"))
    for name, change in changes.items():
        v(f"keys-{name}", 3, draft(good, lambda d, c=change: c(d.manifest["trust"]), "abc"))
    shouted = KEYS["b"].public_key.keyval["public"].upper()
    v("keys-upper-case", 3, rotation(shouted, lambda payload: signed(payload, "b")["sig"]))
    v("keys-manifest-field", 3, draft(good, lambda d: d.manifest.update(also=1), "abc"))
    v("keys-tensor", 3, draft(good, lambda d: d.arrays.update(x=np.zeros(2, np.float32)), "abc"))
    v = book.vector(
        "keys-unsafe", "fp16", "Keys for which everybody can sign, and one with a field more"
    )
    more = draft(
        good, lambda d: [key.update(also=1) for key in d.manifest["trust"]["keys"].values()], "abc"
    )
    v("keys-key-field", 3, more)
    v("keys-neutral", 3, rotation(point(1), lambda payload: FOR_EVERYBODY))
    v("keys-not-canonical", 3, rotation(point(PRIME + 1), lambda payload: FOR_EVERYBODY))
    v("keys-of-order-4", 3, rotation(point(0), lambda payload: FOR_EVERYBODY))
    v("keys-off-curve", 3, rotation(point(2), lambda payload: FOR_EVERYBODY))
    v(
        "keys-of-mixed-order",
        3,
        rotation(mirrored(public("b")).hex(), lambda payload: of_mixed_order(payload, "b")),
    )


FOR_EVERYBODY = base64.b64encode((1).to_bytes(32, "little") + bytes(32)).decode()
"""R is the point that is its own double, and S is 0: a signature of it for every payload"""


def point(y: int) -> str:
    return y.to_bytes(32, "little").hex()


def rotation(key: str, sign: Callable[[bytes], str]) -> bytes:
    """To this key alone; signed by a, and by `sign`."""
    keyid = sha256(dump_json({"keytype": "ed25519", "public": key, "scheme": "ed25519"}))
    keys = {keyid: {"keytype": "ed25519", "keyval": {"public": key}, "scheme": "ed25519"}}
    named = {"version": 2, "threshold": 1, "keys": keys}
    data = draft(
        control.build_trust(trust("b", 1, 2), by("a")), lambda d: d.manifest.update(trust=named)
    )
    own = {"keyid": keyid, "sig": sign(split(data)[1])}
    return resigned(data, lambda signatures: [*signatures, own])
