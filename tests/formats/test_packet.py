"""The packet format: what is written is read back, any tool opens it, no changed byte passes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import Fleet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, LimitError, SdloraError
from sdlora_edge.formats import container, packet, signing
from sdlora_edge.formats.canonical import dump_json
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.encoding import Factors, encode
from sdlora_edge.formats.lead import lead
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.state import TaskState, TaskUpdate, changed_rows
from sdlora_edge.train.run import Run


def test_a_packet_brings_back_its_update(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    for path, update, state in zip(fleet.packets, run.updates, run.states[1:], strict=True):
        opened = packet.read(path.read_bytes(), fleet.trust)
        assert opened.end == state.digest
        assert (opened.update.task, opened.update.name, opened.update.classes) == (
            update.task,
            update.name,
            update.classes,
        )
        assert opened.update.deltas.tobytes() == update.deltas.tobytes()
        assert opened.update.digest() == update.digest()
        assert opened.canary_logits.shape[1] == len(state.classes)


def test_any_safetensors_tool_opens_it_and_factors_are_float16(fleet: Fleet) -> None:
    tensors = safetensors.numpy.load(fleet.packets[0].read_bytes())
    assert {name.rsplit(".", 1)[1] for name in tensors} == {
        "A",
        "B",
        "index",
        "weight",
        "bias",
        "logits",
        "left",
        "right",
        "scale",
        "temperature",
        "mean",
        "precision",
        "threshold",
    }
    assert all(t.dtype == np.float16 for name, t in tensors.items() if name.endswith((".A", ".B")))


def test_every_flipped_bit_of_the_header_and_many_of_the_data_are_refused(fleet: Fleet) -> None:
    good = fleet.packets[0].read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    random = np.random.default_rng(0)
    places = [*range(0, 8 + length, 7), *random.integers(8 + length, len(good), 200)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(random.integers(8))
        with pytest.raises(SdloraError):
            packet.read(bytes(bad), fleet.trust)
    assert packet.read(good, fleet.trust).sequence == 1


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_packets_end_in_a_typed_error(fleet: Fleet, data: st.DataObject) -> None:
    good = fleet.packets[0].read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    stop = data.draw(st.integers(start, min(len(good), start + 64)))
    bad = good[:start] + data.draw(st.binary(max_size=64)) + good[stop:]
    if bad != good:
        with pytest.raises(SdloraError):
            packet.read(bad, fleet.trust)


def test_truncated_and_endless_files_are_refused(fleet: Fleet) -> None:
    good = fleet.packets[0].read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        with pytest.raises(InputError):
            packet.read(good[:size], fleet.trust)
    with pytest.raises(InputError, match="damaged"):
        packet.read(good + b"\0", fleet.trust)
    with pytest.raises(LimitError):
        packet.read(struct.pack("<Q", 2**63) + good[8:], fleet.trust)
    with pytest.raises(LimitError):
        packet.read(good, fleet.trust, packet.Limits(packet=len(good) - 1))


def resign(fleet: Fleet, path: Path, **changes: object) -> bytes:
    """A packet with a changed manifest, signed by the good key: a careless or hostile host."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    metadata = table.pop("__metadata__")
    manifest = json.loads(signing.unverified_payload(metadata["envelope"].encode()))
    envelope = signing.sign(
        dump_json({**manifest, **changes}), [signing.load_signer(fleet.key)]
    ).decode()
    text = dump_json({"__metadata__": {**metadata, "envelope": envelope}, **table})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def built(
    update: TaskUpdate, before: TaskState, lineage: str, fleet: Fleet, **fields: object
) -> bytes:
    """A packet of the first task, signed, with a canary of zeros."""
    logits = np.zeros((1, len(before.live) + len(update.classes)), np.float32)
    contents = packet.Contents(
        **{
            "lineage": lineage,
            "begin": before.digest,
            "updates": (update,),
            "canary_seed": 1,
            "canary_logits": logits,
            **fields,
        }  # type: ignore[arg-type]
    )
    return packet.build(contents, lambda p: signing.sign(p, [signing.load_signer(fleet.key)]))


UNIT = 2**24
TASK = {
    "name": "x",
    "classes": ["x"],
    "retired": [],
    "renamed": [],
    "revision": 0,
    "deltas": [UNIT],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "sdlora-edge/packet/1"},
        {"kind": "greeting"},
        {"kind": "trust"},
        {"kind": None},
        {"encoding": "int3"},
        {"sequence": 0},
        {"sequence": True},
        {"sequence": 2},
        {"tasks": []},
        {"tasks": [5]},
        {"tasks": [{**TASK, "deltas": []}]},
        {"tasks": [{**TASK, "deltas": ["1"]}]},
        {"tasks": [{**TASK, "deltas": [10**15]}]},
        {"tasks": [{**TASK, "deltas": [1.0]}]},
        {"tasks": [{**TASK, "deltas": [10_001 * UNIT]}]},
        {"tasks": [{**TASK, "retired": 0}]},
        {"tasks": [{**TASK, "retired": [-1]}]},
        {"tasks": [{**TASK, "retired": [1, 1]}]},
        {"tasks": [{**TASK, "retired": [1_000_000]}]},
        {"tasks": [{**TASK, "renamed": [[1, "a"], [0, "b"]]}]},
        {"tasks": [{**TASK, "renamed": [[0, "a/b"]]}]},
        {"tasks": [{**TASK, "renamed": [[0]]}]},
        {"tasks": [{name: TASK[name] for name in TASK if name != "retired"}]},
        {"tasks": [{name: TASK[name] for name in TASK if name != "renamed"}]},
        {"tasks": [{**TASK, "revision": -1}]},
        {"tasks": [{**TASK, "revision": 10**9}]},
        {"tasks": [TASK, {**TASK, "deltas": [0, UNIT]}]},
        {"lineage": "zz"},
        {"tasks": [{**TASK, "classes": ["a/b"]}]},
        {"tasks": [{**TASK, "classes": [""]}]},
        {"tasks": [{**TASK, "classes": ["a\u0000"]}]},
        {"tasks": [{**TASK, "classes": ["e\u0301"]}]},
        {"encoding": "int8"},
        {"canary": {"seed": -1, "count": 2}},
        {"canary": {"seed": 1, "count": 3}},
        {"content": "00" * 32},
    ],
)
def test_a_signed_but_senseless_manifest_is_refused(
    fleet: Fleet, changes: dict[str, object]
) -> None:
    with pytest.raises(InputError):
        packet.read(resign(fleet, fleet.packets[0], **changes), fleet.trust)


def test_resigning_itself_gives_a_good_packet(fleet: Fleet) -> None:
    assert packet.read(resign(fleet, fleet.packets[0]), fleet.trust).sequence == 1


def test_shapes_dtypes_and_finiteness_are_checked_against_the_state(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    before, update = run.states[0], run.updates[0]
    logits = np.zeros((1, len(before.classes) + len(update.classes)), np.float32)
    name = next(iter(update.factors))
    factors, head = update.factors[name], update.head

    def check(**changes: object) -> None:
        changed = type(update)(
            **{f: changes.get(f, getattr(update, f)) for f in update.__dataclass_fields__}
        )
        canary = changes.get("canary", logits)
        data = built(changed, before, run.lineage, fleet, canary_logits=canary)
        lead(packet.read(data, fleet.trust), before, run.projections)

    check()
    infinite = factors.A.copy()
    infinite[0, 0] = np.inf
    bad: list[dict[str, object]] = [
        {"factors": {**update.factors, name: type(factors)(infinite, factors.B)}},
        {"factors": {**update.factors, name: type(factors)(factors.A[:, 1:], factors.B)}},
        {"factors": {**update.factors, name: type(factors)(factors.A[1:], factors.B)}},
        {
            "factors": {
                **update.factors,
                name: type(factors)(factors.A.astype(np.float32), factors.B),
            }
        },
        {"factors": {**update.factors, name: encode(factors, "int8")}},
        {"factors": {**update.factors, "blocks.9.attn.q": factors}},
        {"head": replace(head, new=head.new[:, 1:])},
        {"head": replace(head, new=head.new[1:], new_bias=head.new_bias[1:])},
        {"head": replace(head, new_scale=head.new_scale * np.float32(np.nan))},
        {"head": replace(head, new_scale=-head.new_scale)},
        {"head": replace(head, left=np.zeros((0, 1), np.int8))},
        {"head": replace(head, right=head.right[:, 1:])},
        {"head": replace(head, confidence=Confidence.none(len(logits[0]) + 1))},
        {"head": replace(head, new_bias=head.new_bias + np.float32(1e30))},
        {"deltas": np.ones((1, len(run.projections) - 1))},
        {"classes": (update.classes[0], update.classes[0])},
        {"classes": (before.classes[0], update.classes[1])},
        {"canary": logits[:, 1:]},
        {"canary": logits * np.float32(np.nan)},
    ]
    for changes in bad:
        with pytest.raises((InputError, ValueError, IndexError)):
            check(**changes)


@pytest.mark.parametrize("index", [np.int32(3), [0, 2**31 - 1], [-1, 1], [3, 4], [2, 2], [2, 1]])
def test_head_rows_that_do_not_exist_are_refused(fleet: Fleet, index: object) -> None:
    run = Run.open(fleet.run)
    before, rows = run.states[0], np.array(index, np.int32)
    count, old = max(1, rows.size), run.updates[0].head
    zeros = np.zeros(count, np.float32)
    changed = replace(
        run.updates[0],
        head=replace(
            old,
            index=rows,
            left=np.zeros((count, 1), np.int8),
            right=np.zeros((1, 64), np.int8),
            scale=zeros,
            bias=zeros,
        ),
    )
    assert len(before.classes) == 4
    manifest = {
        "kind": "update",
        "lineage": run.lineage,
        "sequence": 1,
        "from": before.digest,
        "to": before.digest[::-1],
        "encoding": "fp16",
        "tasks": [{**TASK, "classes": list(changed.classes)}],
        "canary": {"seed": 1, "count": 1},
    }
    arrays = {f"1.{name}": array for name, array in changed.tensors().items()} | {
        "canary.logits": np.zeros((1, 6), np.float32)
    }
    data = container.seal(
        manifest, arrays, lambda payload: signing.sign(payload, [signing.load_signer(fleet.key)])
    )
    with pytest.raises(InputError, match=r"head\.old\.index is not"):
        lead(packet.read(data, fleet.trust), before, run.projections)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_scales_are_bounded_and_quantised_factors_have_their_shapes(
    fleet: Fleet, encoding: str
) -> None:
    run = Run.open(fleet.run).encoded(encoding)
    before, update = run.states[0], run.updates[0]
    name = next(iter(update.factors))
    good = dict(update.factors[name].stored)

    def check(**stored: np.ndarray) -> None:
        parts = {**good, **{part.replace("_", "."): array for part, array in stored.items()}}
        changed = replace(update, factors={**update.factors, name: Factors(*parts.values())})
        data = built(changed, before, run.lineage, fleet, encoding=encoding)
        lead(packet.read(data, fleet.trust), before, run.projections)

    check()
    if encoding == "int4":  # half a byte has no place in a row
        data = built(update, before, run.lineage, fleet, encoding=encoding)
        for odd in (
            [replace(p, columns=p.columns + 1) for p in run.projections],
            [replace(p, stop=p.stop + 1) for p in run.projections],
        ):
            with pytest.raises(InputError, match="odd width"):
                lead(packet.read(data, fleet.trust), before, odd)
    scale = good["A.scale"]
    for value in (np.nan, np.inf, -scale.max(), 79.0):
        with pytest.raises(InputError, match="out of bounds"):
            check(A_scale=np.full_like(scale, value))
    for wrong in (
        {"A_scale": scale[:-1]},
        {"A": good["A"][:, 1:]},
        {"B": np.ascontiguousarray(good["B"].T)},
        {"A": good["A"][1:]},
    ):
        with pytest.raises(InputError):
            check(**wrong)
    for wrong in (
        {"A_scale": scale.astype(np.float32 if encoding == "int4" else np.float16)},
        {"A": good["A"].astype(np.float16)},
    ):
        with pytest.raises(InputError, match="not"):
            check(**wrong)


def test_a_step_of_a_known_row_is_bounded(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    before, update = run.states[0], run.updates[0]
    one = np.ones(1, np.float32)

    def check(scale: float, bias: float = 0.0, before: TaskState = before) -> None:
        head = replace(
            update.head,
            index=np.zeros(1, np.int32),
            left=np.ones((1, 1), np.int8),
            right=np.full((1, 64), 127, np.int8),
            scale=one * scale,
            bias=one * bias,
        )
        data = built(replace(update, head=head), before, run.lineage, fleet)
        lead(packet.read(data, fleet.trust), before, run.projections)

    check(70.0)
    for scale, bias in ((np.nan, 0), (-1, 0), (79, 0), (1, np.inf), (1, 20_000)):
        with pytest.raises(InputError):
            check(scale, bias)
    far = replace(
        before, head_weight=before.head_weight + np.float32(5000)
    )  # bounded steps, one after the other
    with pytest.raises(InputError, match="a head row is too large"):
        check(70.0, before=far)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        [],
        {},
        "x",
        None,
        {"dtype": 1},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
    ],
)
def test_inspecting_rubbish_is_a_typed_error(fleet: Fleet, entry: object) -> None:
    good = fleet.packets[0].read_bytes()
    envelope, table, content = container.opened(good, packet.LIMITS)
    with pytest.raises(InputError):
        packet.unverified_manifest(container.header(envelope, {**table, "x": entry}) + content)


def test_a_device_never_answers_a_retired_class_and_uses_new_names(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    """A task of such changes alone, through a real engine; a rollback brings the old names back."""
    device, run = Device.open(store, threads=1), Run.open(fleet.run)
    before = run.states[0]
    prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
    rows = changed_rows(before, before.head_weight, before.head_bias, (1,))
    renamed = ((0, "first"), (2, str(before.classes[3])), (3, str(before.classes[2])))
    update = TaskUpdate(1, "names", (), np.zeros(1), rows, {}, (1,), renamed)
    logits = device.logits(canary.inputs(1, prepare))[:, [0, 2, 3]]
    (tmp_path / "names.sdlora").write_bytes(
        built(update, before, run.lineage, fleet, canary_logits=logits)
    )
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3)).astype(np.uint8)
    old = device.predict(list(images), top=9)
    device.apply(tmp_path / "names.sdlora")
    for opened in (device, Device.open(store, threads=1)):
        names = opened.status().classes
        assert names == ("first", before.classes[3], before.classes[2])
        new = opened.predict(list(images), top=9)
        assert all({name for name, _ in one.top} == set(names) for one in new)
        for one, two in zip(old, new, strict=True):
            ranked = [name for name, _ in one.top if name != before.classes[1]]
            called = dict(zip([before.classes[row] for row in (0, 2, 3)], names, strict=True))
            assert [called[name] for name in ranked] == [name for name, _ in two.top]
    device.rollback()
    assert device.status().classes == before.names
