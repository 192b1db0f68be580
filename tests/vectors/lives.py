"""Vectors of what devices live through: tasks, bundles, order, keys, revocations."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from book import (
    KEYS,
    Book,
    Canary,
    by,
    damaged,
    draft,
    resigned,
    revocation,
    signed,
    signer,
    trust,
    update,
)
from curve import PRIME, mirrored, of_mixed_order, public
from forge import Draft, split
from network import PROJECTIONS, TOKENIZATION, Chain, Export, confident

from sdlora_edge.formats import control
from sdlora_edge.formats.canonical import dump_json, sha256
from sdlora_edge.formats.confidence import Confidence

STEP, UNIT = 2.0**-24, 2**24
"""of magnitudes: as a number, and how many of them are 1"""
ALL = {p.name: 1 for p in PROJECTIONS}

BASE = Chain.base("vectors", "fp16")
ONE = BASE.then("birds", ["dove", "emu"], [1.0], {"mix": 2, "qkv.q": 1, "qkv.v": 2})
TWO = ONE.then(
    "insects", ["K\u00e4fer"], [-0.625, 1 + STEP], {"mix": 1, "qkv.v": 1}, changed=[0, 2, 3]
)
THREE = TWO.then("more of the same", [], [0.0, 1023 * STEP, 0.5], ALL, changed=[5])
FOUR = THREE.then("head alone", ["fox"], [STEP, -STEP, 0.0, 1.0])
AGAIN = ONE.then("insects", ["Grille"], [0.25, 0.75], ALL, changed=[1])
AGAIN_THREE = AGAIN.then("fishes", ["gar"], [-0.125, 0.5, 0.875], {"qkv.q": 1}, changed=[0, 5])
OTHER_ONE = BASE.then("other birds", ["dodo"], [0.5], {"qkv.q": 1})
OTHER_TWO = OTHER_ONE.then("other insects", ["flea"], [0.25, 0.5], {"qkv.q": 1})
SMALL = BASE.then("small", ["dove"], [1.0], {"qkv.q": 1}, changed=[0, 2])
"""what packets with one thing wrong are made of"""
UNASSIGNED = BASE.then("unassigned", ["\u0378"], [1.0], {"qkv.q": 1})

FAR = BASE.then("far", ["dove"], [6000.0], {"qkv.q": 1})
FAR_TWO = FAR.then("back", ["emu"], [0.0, 1.0])

OWN_BASE = Chain.base("own magnitudes", "fp16")
OWN_ONE = OWN_BASE.then("birds", ["dove"], [[1.0, -0.5, 0.25]], ALL)
OWN_TWO = OWN_ONE.then(
    "insects", ["midge"], [[0.125, 0.5, -1.0], [1.0, 0.0, 0.75]], ALL, changed=[1, 3]
)

LATE_BASE = Chain.base("late", "int8")
LATE_ONE = LATE_BASE.then("birds", ["dove"], [1.0], ALL)
LATE_TWO = LATE_ONE.then(
    "insects", ["midge"], [-0.25, 0.5], {"mix": 1, "qkv.q": 2}, changed=[1], retired=(2,)
)
LATE_OTHER = LATE_ONE.then("insects", ["wasp"], [0.0, 1.0], {"mix": 1})
LATE_TWIN = LATE_ONE.then("insects", ["midge"], [0.0, 1.0], {"mix": 1})
LATE_STRANGE = LATE_BASE.then("other birds", ["dodo"], [1.0], ALL)
LATE_NAMES = LATE_BASE.then("birds", ["duck"], [1.0], ALL)
"""as LATE_ONE, but for the name of the class"""
LATE_MOVED = LATE_BASE.then("insects first", ["midge"], [1.0], ALL)
LATE_THREE = LATE_TWO.then("fishes", ["gar"], [0.75, -1.0, 0.5], {"qkv.v": 1}, changed=[0, 4])

ROOM_BASE = Chain.base("room", "fp16")
ROOM_ONE = ROOM_BASE.then("birds", ["dove"], [1.0], ALL)
ROOM_TWO = ROOM_ONE.then("insects", ["midge"], [0.5, 1.0], {"mix": 1})
ROOM_LARGE = ROOM_ONE.then("insects", ["midge", "wasp"], [0.5, 1.0], {"mix": 1})

TEXTS_BASE = Chain.base("texts", "int8", TOKENIZATION)
TEXTS_ONE = TEXTS_BASE.then("insects", ["wasp"], [1.0], ALL, changed=[0, 2])
TEXTS_TWO = TEXTS_ONE.then("birds", ["dove"], [-0.5, 0.75], {"qkv.v": 2})


def exports() -> dict[str, Export]:
    return {
        "fp16": Export(BASE, trust("a")),
        **{e: Export(Chain.base("vectors", e), trust("a")) for e in ("fp32", "int8", "int4")},
        "own": Export(OWN_ONE, trust("a"), (0,)),
        "late": Export(LATE_TWO, trust("ab", 2), (0, 1), canary_tolerance=0.02),
        "room": Export(ROOM_BASE, trust("a"), dtype="float16", capacity=5),
        "texts": Export(TEXTS_BASE, trust("a")),
    }


def extreme(threshold: float, temperature: float, components: int, live: int) -> Confidence:
    """Numbers at their bounds."""
    found = replace(confident("extreme", live, components), scale=np.zeros(components, np.float32))
    return replace(
        found,
        temperature=np.full(1, temperature, np.float32),
        threshold=np.full(1, threshold, np.float32),
    )


LARGE = BASE.then(
    "large",
    ["dove"],
    [1.0],
    {"qkv.q": 1},
    changed=[0, 2],
    step=1024,
    confidence=extreme(10**6, 10_000, 64, 4),
)
LARGE_TWO = LARGE.then("low", [], [0.0, 0.0], confidence=extreme(-(10**6), STEP, 0, 4))


def deltas(value: list[Any]) -> Callable[[Draft], object]:
    return lambda d: d.manifest["tasks"][0].update(deltas=value)


def texts(book: Book) -> None:
    v = book.vector("texts", "texts", "A model that reads texts: packets are the same")
    wrong = Canary(off=0.1)
    v("texts-canary-off", 6, update(TEXTS_ONE, canary=wrong))
    v("texts-1", TEXTS_ONE, update(TEXTS_ONE))
    v("texts-2", TEXTS_TWO, update(TEXTS_TWO))


def tasks(book: Book) -> None:
    v = book.vector(
        "tasks", "fp16", "Deltas of 0, 1, 2^-24, about 6.1e-05 and below 0; known rows with gaps"
    )
    v("1", ONE, update(ONE))
    v("1", 7)
    v("2", TWO, update(TWO))
    v("3", THREE, update(THREE, canary=Canary(count=1)))
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
    v("own-shared", 3, draft(update(shared), deltas([UNIT // 8, UNIT])))
    v("own-two", 3, draft(update(shared), deltas([[UNIT // 8] * 2, [UNIT] * 2])))
    v("own-2", OWN_TWO, update(OWN_TWO))
    v = book.vector("magnitude", "fp16", "A delta within the bounds takes a magnitude beyond them")
    v("1", ONE)
    v("magnitude-too-large", 3, draft(update(TWO), deltas([10_000 * UNIT, UNIT])))
    v("magnitude-too-small", 3, draft(update(TWO), deltas([-10_000 * UNIT, -10_001 * UNIT])))
    v = book.vector("delta", "fp16", "From 6,000 to -6,000 is too far for one delta")
    v("delta-of-6000", FAR, update(FAR))
    v("delta-of-12000", 3, draft(update(FAR_TWO), deltas([-12_000 * UNIT, UNIT])))


CHANGES_ONE = BASE.then(
    "changes",
    ["dove"],
    [1.0],
    {"qkv.q": 1},
    changed=[0],
    retired=(1,),
    renamed=((2, "cat flap"),),
)
"""ant, -, cat flap, dove"""
CHANGES_TWO = CHANGES_ONE.then("names alone", [], [0.0, 0.0], renamed=((0, "cat flap"), (2, "ant")))
"""cat flap, -, ant, dove"""
CHANGES_THREE = CHANGES_TWO.then(
    "back", ["bee", "ant"], [0.0, 0.0, 0.5], ALL, changed=[0, 3], retired=(2,)
)
"""cat flap, -, -, dove, bee, ant"""
CHANGES_FOUR = CHANGES_THREE.then("one is left", [], [0.0] * 4, retired=(0, 3, 4))
NEXT = CHANGES_ONE.then("next", ["emu"], [0.0, 0.5], {"qkv.q": 1}, changed=[0, 3])
NOTHING = CHANGES_ONE.then("nothing", [], [0.0, 0.0])


def narrowed(by_columns: int, **fields: Any) -> Callable[[Draft], object]:
    """Fields of the first task, and tensors of fewer columns where live rows have one."""

    def change(d: Draft) -> None:
        d.manifest["tasks"][0].update(fields)
        for name in [n for n in d.arrays if n.endswith(("canary.logits", "unknown.weight"))]:
            found = d.arrays[name]
            d.arrays[name] = found[:, : found.shape[1] - by_columns]

    return change


def stepped(row: int) -> Callable[[Draft], object]:
    """The first row that changes is another one."""
    return lambda d: d.arrays["2.head.old.index"].__setitem__(0, row)


def changes(book: Book) -> None:
    v = book.vector(
        "changes",
        "fp16",
        "Classes retire, are renamed, exchange their names, and come back as new ones",
    )
    v("changes-1", CHANGES_ONE, update(CHANGES_ONE))
    v("changes-1", 7)
    v("changes-2", CHANGES_TWO, update(CHANGES_TWO))
    v("changes-3", CHANGES_THREE, update(CHANGES_THREE))
    v("changes-4", CHANGES_FOUR, update(CHANGES_FOUR))
    v.rollback(CHANGES_THREE)
    v("changes-4-revised", CHANGES_FOUR, update(CHANGES_FOUR, revision=1))
    v = book.vector("changes-squash", "fp16", "The same in one packet")
    v("changes-squash", CHANGES_FOUR, update(CHANGES_FOUR, tasks=4))
    v = book.vector("changes-nothing", "fp16", "A task that changes nothing is a task")
    v("changes-1", CHANGES_ONE)
    v("changes-nothing", NOTHING, update(NOTHING))
    v = book.vector(
        "changes-malformed", "fp16", "Row 1 is retired. Each packet retires or renames wrongly"
    )
    v("changes-1", CHANGES_ONE)
    good = update(NEXT)
    for name, change in {
        "retired-again": narrowed(0, retired=[1]),
        "retired-beyond": narrowed(0, retired=[4]),
        "retired-falls": narrowed(2, retired=[2, 0]),
        "retired-twice": narrowed(1, retired=[2, 2]),
        "retired-negative": narrowed(1, retired=[-2]),
        "retired-float": narrowed(1, retired=[2.0]),
        "retired-false": narrowed(1, retired=[False]),
        "retired-text": narrowed(0, retired="2"),
        "retired-missing": lambda d: d.manifest["tasks"][0].pop("retired"),
        "retired-and-stepped": narrowed(1, retired=[0]),
        "retired-and-renamed": narrowed(1, retired=[2], renamed=[[2, "x"]]),
        "retired-in-canary": narrowed(0, retired=[2]),
        "renamed-retired": narrowed(0, renamed=[[1, "x"]]),
        "renamed-beyond": narrowed(0, renamed=[[4, "x"]]),
        "renamed-falls": narrowed(0, renamed=[[2, "x"], [0, "y"]]),
        "renamed-twice": narrowed(0, renamed=[[2, "x"], [2, "y"]]),
        "renamed-to-known": narrowed(0, renamed=[[2, "ant"]]),
        "renamed-to-new": narrowed(0, renamed=[[2, "emu"]]),
        "renamed-slash": narrowed(0, renamed=[[2, "x/y"]]),
        "renamed-long": narrowed(0, renamed=[[2, "x" * 201]]),
        "renamed-number": narrowed(0, renamed=[[2, 5]]),
        "renamed-false": narrowed(0, renamed=[[False, "x"]]),
        "renamed-three": narrowed(0, renamed=[[2, "x", "y"]]),
        "renamed-missing": lambda d: d.manifest["tasks"][0].pop("renamed"),
        "stepped-retired": stepped(1),
        "class-live": narrowed(0, classes=["cat flap"]),
    }.items():
        v(name, 3, draft(good, change))
    for name, change in {
        "classes-not-in-to": narrowed(0, classes=["eft"]),
        "retired-not-in-to": narrowed(1, retired=[2]),
        "renamed-not-in-to": narrowed(0, renamed=[[2, "x"]]),
        "deltas-not-in-to": narrowed(0, deltas=[1, UNIT // 2]),
    }.items():
        v(name, 3, draft(good, change, leads=False))
    v("retired-all", 3, draft(update(NOTHING), narrowed(3, retired=[0, 2, 3])))


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
    v("late-squash-1-2", 7, update(LATE_TWO, "ab", tasks=2, revision=[0, 1]))
    v("late-names-1", 4, update(LATE_NAMES, "ab"))
    v("late-strange-1", 4, update(LATE_STRANGE, "ab"))
    v("late-moved-1", 4, update(LATE_MOVED, "ab"))
    v("late-twin-2", 4, update(LATE_TWIN, "ab", revision=1))
    v("late-2-revised", 5, update(LATE_OTHER, "ab", revision=2))
    v("late-revocation-flashed", 5, revocation(LATE_BASE, 2, 1, "ab"))
    v("late-canary-fails", 6, update(LATE_THREE, "ab", revision=1, canary=Canary(off=0.03)))
    v("late-canary-near", LATE_THREE, update(LATE_THREE, "ab", revision=1, canary=Canary(off=0.01)))
    v = book.vector("late-keys", "late", "The same bundle: both keys have signed")
    v("late-revocation-older", LATE_TWO, revocation(LATE_BASE, 2, 0, "ab"))
    v("late-3", LATE_THREE, update(LATE_THREE, "ab", revision=1))
    v = book.vector(
        "room", "room", "Room for five classes; weights are float16, and constants of the model"
    )
    v("room-1", ROOM_ONE, update(ROOM_ONE))
    v("room-2-too-large", 5, update(ROOM_LARGE))
    v("room-2", ROOM_TWO, update(ROOM_TWO))


def bounds(book: Book) -> None:
    v = book.vector("bounds", "fp16", "The largest numbers that a reader accepts")
    v(
        "keys-largest",
        BASE,
        control.build_trust(trust("ab", 1, 10**6), by("ab")),
        trust_version=10**6,
    )
    v(
        "1-largest",
        ONE,
        draft(
            update(ONE, revision=10**6, canary=Canary(seed=2**53 - 1)),
            lambda d: d.manifest.update(also=1 - 2**53),
        ),
    )
    v("revocation-largest", 7, revocation(BASE, 10**6, 10**6 - 1))
    v = book.vector("bounds-head", "fp16", "The longest step of known rows, and the widest score")
    v("head-large", LARGE, update(LARGE))
    v("head-low", LARGE_TWO, update(LARGE_TWO))
    v = book.vector("bounds-head-beyond", "fp16", "One more than that")
    v("head-rank-1025", 3, draft(update(LARGE), longer))
    v("head-components-65", 3, draft(update(SMALL), more_components))
    v = book.vector("bounds-beyond", "fp16", "One more than that")
    v("keys-too-new", 3, draft(control.build_trust(trust("ab", 1, 2), by("ab")), beyond, "ab"))
    v("keys-17", 3, keys_of_17())
    v("seed-too-large", 3, draft(update(SMALL), lambda d: d.manifest["canary"].update(seed=2**53)))
    v("integer-too-large", 3, draft(update(SMALL), lambda d: d.manifest.update(also=2**53)))
    v("integer-too-small", 3, draft(update(SMALL), lambda d: d.manifest.update(also=-(2**53))))
    v("integer-of-17-digits", 3, draft(update(SMALL), lambda d: d.manifest.update(also=10**16)))
    v("float-in-a-field", 3, draft(update(SMALL), lambda d: d.manifest.update(also=0.5)))
    v("float-that-is-whole", 3, draft(update(SMALL), lambda d: d.manifest.update(also=1.0)))
    v("delta-float", 3, draft(update(SMALL), deltas([float(UNIT)])))


def longer(d: Draft) -> None:
    """A step of rank 1,025."""
    left, right = (d.arrays[f"1.head.old.{side}"] for side in ("left", "right"))
    d.arrays["1.head.old.left"] = np.hstack([left, left[:, :1]])
    d.arrays["1.head.old.right"] = np.vstack([right, right[:1]])


def more_components(d: Draft) -> None:
    """A score of 65 components."""
    for part in ("weight", "scale", "bias"):
        own = d.arrays[f"1.head.unknown.{part}"]
        d.arrays[f"1.head.unknown.{part}"] = np.concatenate([own[:1]] * 65)


def beyond(d: Draft) -> None:
    d.manifest["trust"]["version"] = 10**6 + 1


def keys_of_17() -> bytes:
    """17 keys, of which one must sign."""
    crowd = {
        key.keyid: key.to_dict() for key in (signer(f"crowd {i}").public_key for i in range(16))
    }
    named = draft(
        control.build_trust(trust("a", 1, 2), by("a")),
        lambda d: d.manifest["trust"]["keys"].update(crowd),
    )
    return named


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
