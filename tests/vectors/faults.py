"""Vectors of packets with one thing wrong: signatures, form, and what tensors and manifest hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from book import Book, Canary, by, draft, enveloped, flipped, resigned, signed, update
from curve import ORDER, PRIME, mirrored, public, scalar, signature
from forge import Draft, framed, joined, split
from lives import AGAIN_THREE, BASE, ONE, SMALL, TWO, UNASSIGNED, UNIT

from sdlora_edge.formats.canonical import dump_json, sha256
from sdlora_edge.formats.container import FORMAT

OTHER_TYPE = "application/vnd.sdlora-edge.bundle+json"
REVOCATION = {
    "format": FORMAT,
    "kind": "revocation",
    "content": sha256(b"{}"),
    "lineage": BASE.lineage,
    "sequence": 9,
    "revision": 0,
}
"""the smallest packet: it changes nothing that a device of `fp16` holds"""
PAYLOAD = dump_json(REVOCATION)


def file(envelope: dict[str, Any] | str) -> bytes:
    return joined(envelope if isinstance(envelope, str) else dump_json(envelope).decode(), {}, b"")


def manifest(text: str | dict[str, Any]) -> bytes:
    """A revocation's file around a manifest, signed by a."""
    payload = (
        json.dumps(text, sort_keys=True, separators=(",", ":")) if isinstance(text, dict) else text
    )
    return file(enveloped(payload.encode(), [signed(payload.encode(), "a")]))


def too_large(signature: dict[str, str]) -> dict[str, str]:
    """The same signature, its second half beyond the group's order."""
    sig = base64.b64decode(signature["sig"])
    half = int.from_bytes(sig[32:], "little") + ORDER
    return {**signature, "sig": base64.b64encode(sig[:32] + half.to_bytes(32, "little")).decode()}


def signatures(book: Book) -> None:
    v = book.vector("signatures", "fp16", "Who has signed, and how")
    a, b, R = signed(PAYLOAD, "a"), signed(PAYLOAD, "b"), public("nonce")
    neutral = (PRIME + 1).to_bytes(32, "little")
    for name, code, found in (
        ("signature-wrong", 4, [flipped(a)]),
        ("signature-of-another-payload", 4, [signed(PAYLOAD + b" ", "a")]),
        ("signature-of-b-named-a", 4, [{**b, "keyid": a["keyid"]}]),
        ("signature-unknown", 4, [b]),
        ("signature-unknown-and-wrong", 4, [b, flipped(a)]),
        ("signature-none", 3, []),
        ("signature-twice", 3, [a, a]),
        ("signature-17", 3, [a, *(signed(PAYLOAD, f"crowd {i}") for i in range(16))]),
        ("signature-beyond-order", 3, [too_large(a)]),
        ("signature-r-not-canonical", 4, [{**a, "sig": signature(PAYLOAD, "a", neutral, 0)}]),
        (
            "signature-with-cofactor",
            4,
            [{**a, "sig": signature(PAYLOAD, "a", mirrored(R), scalar("nonce"))}],
        ),
        (
            "signature-short",
            3,
            [{**a, "sig": base64.b64encode(base64.b64decode(a["sig"])[:63]).decode()}],
        ),
        (
            "signature-loose-bits",
            3,
            [{**a, "sig": a["sig"][:-3] + chr(ord(a["sig"][-3]) + 1) + "=="}],
        ),
        ("signature-keyid", 3, [{**a, "keyid": a["keyid"].upper()}]),
        ("signature-field", 3, [{**a, "also": 1}]),
    ):
        v(name, code, file(enveloped(PAYLOAD, found)))
    v("type", 4, file(enveloped(PAYLOAD, [signed(PAYLOAD, "a", OTHER_TYPE)], OTHER_TYPE)))
    v("type-number", 4, file({**enveloped(PAYLOAD, [a]), "payloadType": 7}))
    v(
        "signature-of-another-nonce",
        BASE,
        file(enveloped(PAYLOAD, [{**a, "sig": signature(PAYLOAD, "a", R, scalar("nonce"))}])),
    )
    v = book.vector(
        "signature-and-others", "fp16", "Signatures of other keys, and wrong ones, do no harm"
    )
    v("signature-and-others", BASE, file(enveloped(PAYLOAD, [b, a, flipped(signed(PAYLOAD, "c"))])))


def form(book: Book) -> None:
    v = book.vector("envelope", "fp16", "There is one way to write an envelope")
    good = enveloped(PAYLOAD, [signed(PAYLOAD, "a")])
    text, payload = dump_json(good).decode(), good["payload"]
    unpadded = enveloped(PAYLOAD + b" " * (-len(PAYLOAD) % 3 + 1), [])["payload"]
    longer = base64.b64decode(unpadded)
    v("envelope-space", 3, file(text.replace(",", ", ", 1)))
    v("envelope-order", 3, file(json.dumps(dict(reversed(good.items())), separators=(",", ":"))))
    v("envelope-twice", 3, file(text.replace("{", '{"payload":"",', 1)))
    v("envelope-field", 3, file({**good, "also": 1}))
    v("envelope-line-end", 3, file({**good, "payload": f"{payload[:76]}\n{payload[76:]}"}))
    v(
        "envelope-unpadded",
        3,
        file({**enveloped(longer, [signed(longer, "a")]), "payload": unpadded.rstrip("=")}),
    )
    v("envelope-list", 3, file(f"[{text}]"))
    v = book.vector("header", "fp16", "There is one way to write a header")
    data = file(good)
    header = data[8:].rstrip(b" ")
    v("header-space", 3, framed(header.replace(b":", b": ", 1)))
    v(
        "header-order",
        3,
        framed(
            json.dumps(
                {"__metadata__": {"format": FORMAT, "envelope": text}}, separators=(",", ":")
            ).encode()
        ),
    )
    v("header-twice", 3, framed(header.replace(b"{", b'{"__metadata__":{},', 1)))
    v("header-field", 3, joined(text, {}, b"", {"also": "1"}))
    v("header-padded-twice", 3, (len(data)).to_bytes(8, "little") + data[8:] + b" " * 8)
    v("header-unpadded", 3, len(header).to_bytes(8, "little") + header)
    v("header-padded-with-tabs", 3, data[:8] + header + b"\t" * (len(data) - 8 - len(header)))
    v("header-length", 3, b"\xff" * 8 + data[8:])
    v("header-format", 3, framed(header.replace(b"packet/3", b"packet/2")))
    v("file-cut", 3, data[:-1])
    v("file-of-seven-bytes", 3, data[:7])
    v("file-longer", 3, data + b"\0")
    v = book.vector("manifest", "fp16", "The manifest's form, once it is verified")
    as_text = PAYLOAD.decode()
    for name, change in (
        ("twice", as_text.replace("{", '{"kind":"revocation",', 1)),
        ("float", {**REVOCATION, "sequence": 9.0}),
        ("nan", {**REVOCATION, "revision": float("nan")}),
        ("negative", {**REVOCATION, "revision": -1}),
        ("text", {**REVOCATION, "sequence": "9"}),
        ("true", {**REVOCATION, "sequence": True}),
        ("large", {**REVOCATION, "revision": 1_000_001}),
        ("deep", as_text.replace("{", '{"also":' + "[" * 16 + "]" * 16 + ",", 1)),
        ("format", {**REVOCATION, "format": "sdlora-edge/packet/2"}),
        ("content", {**REVOCATION, "content": sha256(b"")}),
        ("kind", {**REVOCATION, "kind": "reset"}),
        ("list", f"[{as_text}]"),
    ):
        v(f"manifest-{name}", 3, manifest(change))


def changed_after(data: bytes) -> bytes:
    """Flip the last bit of the canary's first logit, which `to` does not cover."""
    envelope, _, table, content = split(data)
    begin = table["canary.logits"]["data_offsets"][0]
    changed = content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1 :]
    return joined(dump_json(envelope).decode(), table, changed)


def tabled(
    data: bytes, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]
) -> bytes:
    """The same manifest around another table and other data, signed again."""
    _, payload, table, found = split(data)
    table, found = change(table, found)
    text = dump_json({**json.loads(payload), "content": sha256(dump_json(table), found)})
    return joined(by("a")(text).decode(), table, found)


def by_name(table: dict[str, Any], found: bytes) -> tuple[dict[str, Any], bytes]:
    """The tensors in the order of their names."""
    entries, moved = {}, b""
    for name in sorted(table):
        begin, end = table[name]["data_offsets"]
        entries[name] = {**table[name], "data_offsets": [len(moved), len(moved) + end - begin]}
        moved += found[begin:end]
    return entries, moved


def shifted(by_bytes: int) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    """Move the last tensor. One byte earlier, it shares a byte with the one before it."""

    def change(table: dict[str, Any], found: bytes) -> tuple[dict[str, Any], bytes]:
        last = max(table, key=lambda name: table[name]["data_offsets"][1])
        begin, end = table[last]["data_offsets"]
        entry = {**table[last], "data_offsets": [begin + by_bytes, end + by_bytes]}
        return {**table, last: entry}, found[:begin] + b"\0" * by_bytes + found[
            begin + max(0, -by_bytes) :
        ]

    return change


def grown(d: Draft) -> None:
    """Task 2 of a squash takes a row that task 1 brought beyond the limit."""
    d.arrays["1.head.new.weight"][0] = 127
    d.arrays["1.head.new.scale"][0] = 78
    d.arrays["2.head.old.left"][2] = 127
    d.arrays["2.head.old.right"][:] = 127
    d.arrays["2.head.old.scale"][2] = 1 / 128


def content(book: Book) -> None:
    v = book.vector(
        "content",
        "fp16",
        "Packets that contradict the page, signed by the right key; the last one is right",
    )
    good = update(SMALL)
    v("data-changed", 3, changed_after(good))
    v("data-changed-signature-wrong", 4, resigned(changed_after(good), lambda s: [flipped(s[0])]))
    A, B, old = "1.qkv.q.A", "1.qkv.q.B", "1.head.old."
    fresh, unknown, temperature = "1.head.new.", "1.head.unknown.", "1.head.temperature"
    nan, inf, half = float("nan"), float("inf"), np.float16
    last = int(Draft(good).arrays[old + "right"].flat[-1])  # the byte before the last tensor's
    v("tensors-by-name", 3, tabled(good, by_name))
    v("tensors-gap", 3, tabled(good, shifted(1)))
    v(
        "tensors-overlap",
        3,
        tabled(
            draft(good, lambda d: d.arrays[unknown + "weight"].flat.__setitem__(0, last)),
            shifted(-1),
        ),
    )
    v("tensors-end", 3, tabled(good, lambda table, found: (table, found + b"\0")))
    v(
        "shape-negative",
        3,
        tabled(good, lambda table, found: ({**table, A: {**table[A], "shape": [-1, 36]}}, found)),
    )

    def put(name: str, value: float) -> Callable[[Draft], object]:
        return lambda d: d.arrays[name].flat.__setitem__(1, value)

    def be(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Draft], object]:
        return lambda d: d.arrays.update({name: np.asarray(change(d.arrays[name]))})

    def of_task(**fields: Any) -> Callable[[Draft], object]:
        return lambda d: d.manifest["tasks"][0].update(fields)

    changes: dict[str, Callable[[Draft], object]] = {
        "nan-in-A": put(A, nan),
        "inf-in-B": put(B, inf),
        "factor-too-large": put(B, 10008),
        "nan-in-new-scale": be(fresh + "scale", lambda x: x * np.float32(nan)),
        "new-scale-negative": be(fresh + "scale", lambda x: -x),
        "new-scale-too-large": be(fresh + "scale", lambda x: x * 0 + np.float32(78.5)),
        "new-float16": be(fresh + "weight", lambda x: x.astype(half)),
        "new-scale-short": be(fresh + "scale", lambda x: x[:0]),
        "left-too-wide": be(old + "left", lambda x: np.tile(x, 2)),
        "left-too-long": be(old + "left", lambda x: np.vstack([x, x[:1]])),
        "left-float32": be(old + "left", lambda x: x.astype(np.float32)),
        "right-too-narrow": be(old + "right", lambda x: x[:, :-1]),
        "right-of-one-dimension": be(old + "right", lambda x: x[0]),
        "temperature-0": be(temperature, lambda x: x * 0),
        "temperature-negative": be(temperature, lambda x: -x),
        "temperature-nan": be(temperature, lambda x: x * np.float32(nan)),
        "temperature-too-small": be(temperature, lambda x: x * 0 + np.float32(2.0**-25)),
        "temperature-too-large": be(temperature, lambda x: x * 0 + np.float32(10_001)),
        "temperature-twice": be(temperature, lambda x: np.tile(x, 2)),
        "temperature-none": be(temperature, lambda x: x[:0]),
        "temperature-missing": lambda d: d.arrays.pop(temperature),
        "unknown-too-narrow": be(unknown + "weight", lambda x: x[:, :-1]),
        "unknown-too-wide": be(unknown + "weight", lambda x: np.hstack([x, x[:, :1]])),
        "unknown-float32": be(unknown + "weight", lambda x: x.astype(np.float32)),
        "unknown-scale-short": be(unknown + "scale", lambda x: x[:-1]),
        "unknown-scale-negative": put(unknown + "scale", -0.01),
        "unknown-scale-too-large": put(unknown + "scale", 78.5),
        "unknown-scale-inf": put(unknown + "scale", inf),
        "unknown-bias-short": be(unknown + "bias", lambda x: x[:-1]),
        "unknown-bias-too-large": put(unknown + "bias", -10_001),
        "unknown-bias-nan": put(unknown + "bias", nan),
        "mean-too-wide": be(unknown + "mean", lambda x: np.append(x, x[:1])),
        "mean-float32": be(unknown + "mean", lambda x: x.astype(np.float32)),
        "mean-inf": put(unknown + "mean", inf),
        "mean-too-large": put(unknown + "mean", 10008),
        "mean-missing": lambda d: d.arrays.pop(unknown + "mean"),
        "mean-alone": be(unknown + "precision", lambda x: x[:0]),
        "mean-and-precision-short": lambda d: [
            be(unknown + part, lambda x: x[:-1])(d) for part in ("mean", "precision")
        ],
        "precision-alone": be(unknown + "mean", lambda x: x[:0]),
        "precision-negative": put(unknown + "precision", -0.5),
        "precision-nan": put(unknown + "precision", nan),
        "unknown-missing": lambda d: d.arrays.pop(unknown + "bias"),
        "threshold-twice": be(unknown + "threshold", lambda x: np.tile(x, 2)),
        "threshold-too-large": be(unknown + "threshold", lambda x: x * 0 + np.float32(1_000_064)),
        "threshold-nan": be(unknown + "threshold", lambda x: x * np.float32(nan)),
        "threshold-alone": be(unknown + "threshold", lambda x: x.reshape(1, 1)),
        "inf-in-bias": be("1.head.new.bias", lambda x: x + np.float32(inf)),
        "nan-in-known-bias": put(old + "bias", nan),
        "nan-in-scale": put(old + "scale", nan),
        "scale-negative": put(old + "scale", -0.01),
        "scale-too-large": put(old + "scale", 78.5),
        "nan-in-canary": put("canary.logits", nan),
        "canary-too-large": put("canary.logits", 1_000_001),
        "canary-too-narrow": be("canary.logits", lambda x: x[:, :-1]),
        "canary-float16": be("canary.logits", lambda x: x.astype(half)),
        "canary-of-one-class": be("canary.logits", lambda x: x[:, :1]),
        "canary-empty": lambda d: (
            d.arrays.update({"canary.logits": np.zeros((0, 4), np.float32)}),
            d.manifest["canary"].update(count=0),
        ),
        "canary-count": lambda d: d.manifest["canary"].update(count=1),
        "index-falls": be(old + "index", lambda x: x[::-1]),
        "index-twice": be(old + "index", lambda x: x * 0),
        "index-beyond": be(old + "index", lambda x: x + 1),
        "index-negative": be(old + "index", lambda x: x - 1),
        "class-known": of_task(classes=["bee"]),
        "class-control": of_task(classes=["do\u202eve"]),
        "class-not-nfc": of_task(classes=["Ka\u0308fer"]),
        "class-slash": of_task(classes=["do/ve"]),
        "class-blank": of_task(classes=[" "]),
        "class-long": of_task(classes=["x" * 201]),
        "name-backslash": of_task(name="a\\b"),
        "classes-text": of_task(classes="d"),
        "class-missing": of_task(classes=[]),
        "delta-missing": of_task(deltas=[]),
        "delta-more": of_task(deltas=[UNIT, UNIT // 2]),
        "delta-for-four-projections": of_task(deltas=[[UNIT] * 4]),
        "delta-too-large": of_task(deltas=[10_000 * UNIT + 1]),
        "delta-text": of_task(deltas=["1"]),
        "revision-too-large": of_task(revision=1_000_001),
        "head-of-another-format": lambda d: d.arrays.update(
            {"1.head.old.step": np.zeros((2, 24), np.int8)}
        ),
        "shape-beyond": lambda d: d.arrays.update(
            {old + "right": np.zeros((0, 2**26 + 1), np.int8)}
        ),
        "tensor-unknown": lambda d: d.arrays.update({"1.head.old.bits": np.ones(1, np.float32)}),
        "tensor-of-another-task": lambda d: d.arrays.update(
            {"2.qkv.q.A": d.arrays[A], "2.qkv.q.B": d.arrays[B]}
        ),
        "tensor-of-no-task": lambda d: d.arrays.update({"x": np.zeros(0, np.int8)}),
        "tensor-of-proto": lambda d: d.arrays.update({"__proto__.x": np.zeros(0, np.int8)}),
        "tensor-of-constructor": lambda d: d.arrays.update({"constructor.x": np.zeros(0, np.int8)}),
        "tensor-missing": lambda d: d.arrays.pop(B),
        "head-missing": lambda d: d.arrays.pop(old + "bias"),
        "projection-unknown": lambda d: d.arrays.update(
            {"1.qkv.k.A": d.arrays[A], "1.qkv.k.B": d.arrays[B]}
        ),
        "rank-0": lambda d: d.arrays.update(
            {A: np.zeros((0, 36), half), B: np.zeros((8, 0), half)}
        ),
        "ranks-differ": be(B, lambda x: np.tile(x, 2)),
        "dtype-float32": be(A, lambda x: x.astype(np.float32)),
        "dtype-float64": be(A, lambda x: x.astype(np.float64)),
        "shape": be(A, lambda x: x[:, :-1]),
        "dimensions": be(A, lambda x: x[None]),
        "encoding-unknown": lambda d: d.manifest.update(encoding="fp8"),
        "encoding-unknown-and-unused": lambda d: (
            d.arrays.pop(A),
            d.arrays.pop(B),
            d.manifest.update(encoding="fp8"),
        ),
        "sequence-0": lambda d: d.manifest.update(sequence=0),
        "deep": lambda d: d.manifest.update(also=json.loads("[" * 16 + "]" * 16)),
        "no-tasks": lambda d: d.manifest.update(tasks=[]),
    }
    for name, change in changes.items():
        v(name, 3, draft(good, change))
    v("to", 3, draft(good, lambda d: d.manifest.update(to=sha256(b"elsewhere")), leads=False))
    v("lineage", 5, draft(good, lambda d: d.manifest.update(lineage=sha256(b"another run"))))
    v("from", 5, draft(good, lambda d: d.manifest.update({"from": sha256(b"another state")})))
    v("canary-fails", 6, update(SMALL, canary=Canary(off=2e-4)))
    v("signed-as-other", 4, resigned(good, lambda s: [signed(split(good)[1], "a", OTHER_TYPE)]))
    v("head-too-large", 3, draft(update(TWO, tasks=2), grown))
    v("field", SMALL, draft(good, lambda d: d.manifest.update(also=1)))
    v = book.vector("unassigned", "fp16", "A class name may hold a character of a later Unicode")
    v("class-unassigned", UNASSIGNED, update(UNASSIGNED))
    v = book.vector("near", "fp16", "A canary that is off, and within the tolerance")
    v("canary-near", SMALL, update(SMALL, canary=Canary(off=5e-5)))
    v = book.vector(
        "squash-malformed",
        "fp16",
        "A squash whose later task has the lower revision, and one that brings a class twice",
    )
    v("1", ONE)
    v("squash-falls", 3, update(AGAIN_THREE, tasks=2, revision=[2, 1]))
    v(
        "squash-class-twice",
        3,
        draft(
            update(AGAIN_THREE, tasks=2, revision=1),
            lambda d: d.manifest["tasks"][1].update(classes=["Grille"]),
        ),
    )
