"""The test vectors of docs/packet.md, read by this library, and by a reader that was written from that page alone."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sdlora_edge.bundle import open_bundle
from sdlora_edge.canonical import tensors_digest
from sdlora_edge.device import Device
from sdlora_edge.errors import NotForThisDevice, TrustError
from sdlora_edge.orders import Recall, Rotation, follow_trust, read_any
from sdlora_edge.packet import Packet

FOLDER = Path(__file__).resolve().parent / "vectors"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
DTYPES = {"F32": "<f4", "I32": "<i4", "F16": "<f2", "I8": "i1", "U8": "u1"}


# The independent reader: docs/packet.md, numpy, and any Ed25519. Nothing of sdlora_edge.


def plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read(data: bytes, keys: dict[str, str], threshold: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Section 1: (manifest, tensors) of a packet that enough of the keys {keyid: public key} have signed."""
    (n,) = struct.unpack("<Q", data[:8])
    table, content = json.loads(data[8 : 8 + n]), data[8 + n :]
    text = plain(table)
    assert data[8 : 8 + n] == text + b" " * (-len(text) % 8)
    envelope = json.loads(table.pop("__metadata__")["envelope"])
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    good = set()
    for signature in envelope["signatures"]:
        if public := keys.get(signature["keyid"]):
            assert signature["keyid"] == sha(plain({"keytype": "ed25519", "scheme": "ed25519", "public": public}))
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(base64.b64decode(signature["sig"]), signed)
            good.add(signature["keyid"])
    if len(good) < threshold:
        raise InvalidSignature
    manifest = json.loads(payload)
    assert manifest["format"] == "sdlora-edge/packet/2"
    assert manifest["content"] == sha(plain(table), content)
    tensors = {}
    for name, entry in table.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return manifest, tensors


def decoded(own: dict[str, np.ndarray], name: str, part: str, encoding: str) -> np.ndarray:
    """Section 2: a factor as float32, A (rank, columns) or B (rows, rank)."""
    q, scale = own[f"{name}.{part}"], own.get(f"{name}.{part}.scale")
    if scale is None:
        return q.astype(np.float32)
    if encoding == "int8":
        x = q.astype(np.float32) * scale[:, None]
    else:
        halves = np.empty((len(q), 2 * q.shape[1]), np.int64)
        halves[:, 0::2], halves[:, 1::2] = q % 16, q // 16
        whole = np.where(halves > 7, halves - 16, halves).astype(np.float32)
        x = whole * scale.astype(np.float32)[:, np.arange(whole.shape[1]) // 32]
    return x.T if part == "B" else x


def digest(tensors: dict[str, np.ndarray]) -> str:
    """Section 4."""
    parts = [plain([n, tensors[n].dtype.name, list(tensors[n].shape)]) + tensors[n].tobytes() for n in sorted(tensors)]
    return sha(*parts)


def follow(state: dict[str, Any], manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Sections 2 and 4: the state after an update. A state: digest, weight and bias of the head, alpha, factors of all tasks."""
    assert manifest["from"] == state["digest"]
    s = dict(state)
    for i, task in enumerate(manifest["tasks"], manifest["sequence"] - len(manifest["tasks"]) + 1):
        own = {n[len(f"{i}.") :]: t for n, t in tensors.items() if n.startswith(f"{i}.")}
        s["digest"] = sha(bytes.fromhex(s["digest"]), bytes.fromhex(sha(plain(task["deltas"]), digest(own).encode())))
        weight, bias = s["weight"].copy(), s["bias"].copy()
        weight[own["head.old.index"]] += own["head.old.step"].astype(np.float32) * own["head.old.scale"][:, None]
        bias[own["head.old.index"]] = own["head.old.bias"]
        s["weight"] = np.concatenate([weight, own["head.new.weight"].astype(np.float32)])
        s["bias"] = np.concatenate([bias, own["head.new.bias"]])
        s["alpha"] = np.append(s["alpha"], 0.0) + task["deltas"]
        names = {n[:-2] for n in own if n.endswith((".A", ".B"))}
        s["factors"] = [*s["factors"], {n: [decoded(own, n, part, manifest["encoding"]) for part in "AB"] for n in names}]
    assert manifest["to"] == s["digest"]
    return s


# ... ends here.


def keys_of(trust: dict[str, Any]) -> tuple[dict[str, str], int]:
    return {keyid: key["keyval"]["public"] for keyid, key in trust["keys"].items()}, trust["threshold"]


def raw(name: str) -> bytes:
    return (FOLDER / f"{name}.sdlora").read_bytes()


def flashed(lineage: str) -> tuple[dict[str, Any], dict[str, np.ndarray], list[dict[str, Any]]]:
    """(the state before task 1, W_0, projections) of the bundle, which is the same in every encoding."""
    bundle = open_bundle(FOLDER / "bundle")
    head = {"weight": bundle.state.head_weight, "bias": bundle.state.head_bias}
    state = {"digest": lineage, **head, "alpha": np.zeros(0), "factors": []}
    return state, dict(bundle.weights), [p.to_dict() for p in bundle.manifest.projections]


def agrees(state: dict[str, Any], base: dict[str, np.ndarray], projections: list[dict[str, Any]], name: str) -> None:
    wanted = EXPECTED[name]
    assert state["digest"] == wanted["state"]
    assert digest({"head.weight": state["weight"], "head.bias": state["bias"]}) == wanted["head"]
    last = {f"{n}.{part}": np.ascontiguousarray(x) for n, f in state["factors"][-1].items() for part, x in zip("AB", f)}
    assert digest(last) == wanted["factors"]
    weights = {n: w.astype(np.float64) for n, w in base.items()}
    for p in projections:
        start, stop = p["rows"]
        for alpha, f in zip(state["alpha"], state["factors"], strict=True):
            A, B = f[p["name"]]
            weights[p["tensor"]][start:stop] += np.float32(alpha) * (B.astype(np.float64) @ A)
    for n, w in weights.items():
        np.testing.assert_allclose([w.sum(), (w**2).sum(), *w[1, :4]], wanted["weights"][n], rtol=1e-6, atol=1e-6)


def test_a_reader_written_from_the_page_gets_the_expected_weights() -> None:
    keys, threshold = keys_of(json.loads((FOLDER / "bundle" / "trust.json").read_text()))
    manifest, tensors = read(raw("1"), keys, threshold)
    first, base, projections = flashed(manifest["lineage"])
    state = follow(first, manifest, tensors)
    agrees(state, base, projections, "1")
    with pytest.raises(InvalidSignature):
        read(raw("2"), keys, threshold)
    rotation, none = read(raw("keys"), keys, threshold)
    assert none == {}
    keys, threshold = keys_of(rotation["trust"])
    assert read(raw("keys"), keys, threshold)[0] == rotation  # the new keys have signed it too
    second = follow(state, *read(raw("2"), keys, threshold))
    agrees(second, base, projections, "2")
    recall, _ = read(raw("recall"), keys, threshold)
    assert (recall["kind"], recall["sequence"], recall["revision"]) == ("recall", 2, 0)
    squash = read(raw("squash"), keys, threshold)
    assert [task["revision"] for task in squash[0]["tasks"]] == [1, 1]
    agrees(follow(state, *squash), base, projections, "squash")


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_the_reader_decodes_the_other_encodings(encoding: str) -> None:
    keys, threshold = keys_of(json.loads((FOLDER / "bundle" / "trust.json").read_text()))
    manifest, tensors = read(raw(encoding), keys, threshold)
    assert manifest["encoding"] == encoding
    first, base, projections = flashed(manifest["lineage"])
    agrees(follow(first, manifest, tensors), base, projections, encoding)


def test_this_library_takes_the_vectors_in_their_order(tmp_path: Path) -> None:
    device = Device.init(FOLDER / "bundle", tmp_path / "store")
    packet = lambda name: FOLDER / f"{name}.sdlora"  # noqa: E731
    assert device.apply(packet("1"))["state"] == EXPECTED["1"]["state"]
    with pytest.raises(TrustError):
        device.apply(packet("2"))
    assert device.apply(packet("keys"))["trust_version"] == 2
    second = device.apply(packet("2"))
    assert (second["state"], second["classes"]) == (EXPECTED["2"]["state"], EXPECTED["2"]["classes"])
    with pytest.raises(NotForThisDevice, match="revision 1 of a task"):
        device.apply(packet("squash"))
    assert device.apply(packet("recall"))["task"] == 1
    with pytest.raises(TrustError, match="recalled"):
        device.apply(packet("2"))
    assert device.apply(packet("squash"))["state"] == EXPECTED["squash"]["state"]
    live = Device.open(tmp_path / "store")._live
    assert tensors_digest({"head.weight": live.state.head_weight, "head.bias": live.state.head_bias}) == EXPECTED["squash"]["head"]


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_this_library_decodes_the_other_encodings(encoding: str) -> None:
    bundle = open_bundle(FOLDER / "bundle")
    opened = read_any(raw(encoding), bundle.trust)
    assert isinstance(opened, Packet)
    before = replace(bundle.state, digest=opened.manifest["lineage"])
    after = opened.check(before, opened.manifest["lineage"], bundle.manifest.projections)
    wanted = EXPECTED[encoding]
    factors = {f"{n}.{part}": np.ascontiguousarray(getattr(f, part)) for n, f in after.factors.items() for part in "AB"}
    assert (after.digest, tensors_digest(factors)) == (wanted["state"], wanted["factors"])


def test_the_kinds_of_the_vectors() -> None:
    trust = open_bundle(FOLDER / "bundle").trust
    assert isinstance(read_any(raw("keys"), trust), Rotation)
    assert isinstance(read_any(raw("recall"), follow_trust(trust, [raw("keys")])), Recall)
