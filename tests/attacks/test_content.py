"""Senseless packets that the fleet's own key has signed, by a thief or by a bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks_kit import Cli, Victim, said_no
from conftest import Fleet
from forge import Draft
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import build_packets

from sdlora_edge.device import Device
from sdlora_edge.train.run import Run

NAN, INF = float("nan"), float("inf")


def tensor(draft: Draft, ending: str) -> str:
    """The first tensor of that kind."""
    return next(name for name in sorted(draft.arrays) if name.endswith(ending))


def forged(
    victim: Victim, change: Callable[[Draft], Any], source: Path | None = None, **options: Any
) -> bytes:
    draft = Draft(source or victim.next)
    change(draft)
    return draft.sealed(victim.signer, **options)


def put(ending: str, value: float, place: int = 0) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        array = draft.arrays[tensor(draft, ending)]
        with np.errstate(all="ignore"):
            array.flat[place] = np.array(value).astype(array.dtype)

    return change


def change_one_row(draft: Draft) -> None:
    """The fleet's heads change no known row: let this one change the bias of the first."""
    features = draft.arrays["2.head.new.weight"].shape[1]
    draft.arrays["2.head.old.index"] = np.zeros(1, np.int32)
    draft.arrays["2.head.old.left"] = np.zeros((1, 1), np.int8)
    draft.arrays["2.head.old.right"] = np.zeros((1, features), np.int8)
    draft.arrays["2.head.old.scale"] = np.zeros(1, np.float32)
    draft.arrays["2.head.old.bias"] = np.zeros(1, np.float32)


def score_unknown(draft: Draft) -> None:
    """Give it an unknown score of one component."""
    live = draft.arrays["canary.logits"].shape[1]
    features = draft.arrays["2.head.new.weight"].shape[1]
    draft.arrays["2.head.unknown.weight"] = np.ones((1, live), np.int8)
    for part in ("mean", "precision"):
        draft.arrays[f"2.head.unknown.{part}"] = np.zeros(features, np.float16)
    for part in ("scale", "bias", "threshold"):
        draft.arrays[f"2.head.unknown.{part}"] = np.zeros(1, np.float32)


def narrow(draft: Draft, *names: str) -> None:
    """Take the first column away."""
    for name in names:
        draft.arrays[name] = draft.arrays[name][:, 1:]


def test_a_forged_packet_without_a_fault_is_taken(victim: Victim) -> None:
    """So that every refusal below is for its own fault."""
    data = forged(victim, lambda draft: None)
    assert victim.apply(data).code == 0


def test_nan_infinity_and_huge_magnitudes(victim: Victim) -> None:
    def change(ending: str, value: float) -> Callable[[Draft], None]:
        def apply(draft: Draft) -> None:
            change_one_row(draft)
            score_unknown(draft)
            put(ending, value)(draft)

        return apply

    head = ["new.scale", "new.bias", "old.scale", "old.bias", "temperature"]
    head += ["unknown.scale", "unknown.bias", "unknown.mean", "unknown.precision"]
    endings = [".A", ".B", *(f"head.{name}" for name in head)]
    values = [NAN, INF, -INF, 20_000.0, -20_000.0]
    victim.refuses_each(
        (forged(victim, change(ending, value)), 3, "out of bounds")
        for ending in endings
        for value in values
    )
    lone = [("head.temperature", 0.0), ("head.temperature", 1e-9)]
    lone += [("head.unknown.precision", -0.5), ("head.unknown.scale", -0.5)]
    lone += [("head.unknown.threshold", value) for value in (NAN, INF, -INF, 2e6, -2e6)]
    victim.refuses_each((forged(victim, change(*one)), 3, "out of bounds") for one in lone)
    # a huge logit would make the canary's tolerance as huge, so that any model passed
    victim.refuses_each(
        (forged(victim, change("canary.logits", value)), 3, "holds NaN, infinity or a logit above")
        for value in (NAN, INF, -INF, 2e6, -2e6)
    )


def test_without_such_a_number_these_packets_reach_the_canary(victim: Victim) -> None:
    """So that every refusal above is for its own fault."""

    def change(draft: Draft) -> None:
        change_one_row(draft)
        score_unknown(draft)

    assert victim.apply(forged(victim, change)).code == 6  # the row has another bias
    assert victim.apply(forged(victim, score_unknown)).code == 0


def test_nan_infinity_and_huge_numbers_in_the_manifest(victim: Victim) -> None:
    def deltas(value: Any) -> Callable[[Draft], None]:
        return lambda draft: draft.manifest["tasks"][0]["deltas"].__setitem__(-1, value)

    numbers = [
        10_001 * 2**24,
        -(2**53) + 1,
        2**53,
        1.0,
        -1e300,
        10**400,
        True,
        "1.0",
        None,
        [1.0],
        {},
    ]
    victim.refuses_each((forged(victim, deltas(value)), 3, "") for value in numbers)
    written = [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"9" * 5000, b"9" * 100_000]
    mark = b"0.123456789"
    victim.refuses_each(
        (
            forged(
                victim, deltas(0.123456789), payload=lambda text, new=value: text.replace(mark, new)
            ),
            3,
            "not valid JSON",
        )
        for value in written
    )
    canaries = [
        (field, value) for field in ("seed", "count") for value in (-1, 1.0, "1", None, [[]])
    ] + [("count", 10**6)]
    victim.refuses_each(
        (forged(victim, lambda d, c=c: d.manifest["canary"].update([c])), 3, "") for c in canaries
    )


def test_magnitudes_of_another_form(victim: Victim) -> None:
    """One for each projection, where the task before had one for all."""
    count = sum(name.endswith(".A") for name in Draft(victim.next).arrays)
    data = forged(
        victim, lambda d: d.manifest["tasks"][0].update(deltas=[[0] * count, [2**24] * count])
    )
    victim.refuses(data, 3, "do not follow magnitudes")


def test_a_signed_manifest_that_is_no_strict_json(victim: Victim) -> None:
    """With a key twice, two readers could see two manifests. The rest: no reader should guess."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        "twice": lambda t: t[:-1] + b',"sequence":1}',
        "levels": lambda t: t[:-1] + b',"x":' + b"[" * 700 + b"]" * 700 + b"}",
        "trailing": lambda t: t + b"{}",
        "list": lambda t: b"[" + t + b"]",
        "empty": lambda t: b"",
        "utf-16": lambda t: t.decode().encode("utf-16"),
        "bom": lambda t: b"\xef\xbb\xbf" + t,
    }
    packets = [forged(victim, lambda draft: None, payload=change) for change in changes.values()]
    victim.refuses_each((data, 3, "the manifest") for data in packets)
    for data in packets:
        said_no(victim.cli("packet", "inspect", victim.file(data)), 3, "the manifest")


def test_wrong_shapes_dtypes_and_ranks(victim: Victim) -> None:
    def reshape(ending: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Draft], None]:
        def apply(draft: Draft) -> None:
            draft.arrays[tensor(draft, ending)] = change(draft.arrays[tensor(draft, ending)])

        return apply

    changes = [
        reshape(".A", lambda a: a[:, 1:]),
        reshape(".A", lambda a: a.T),
        reshape(".A", lambda a: a[:1]),
        reshape(".A", lambda a: a[:0]),
        reshape(".A", lambda a: a.reshape(-1)),
        reshape(".A", lambda a: a[0, 0].reshape(())),
        reshape(".A", lambda a: a.reshape(1, *a.shape)),
        reshape(".A", lambda a: np.zeros((0, 2**40), np.float16)),
        reshape(".A", lambda a: a.astype(np.float32)),
        reshape(".B", lambda a: a.astype(np.float64)),
        reshape(".B", lambda a: a.astype(np.int8)),
        reshape(".B", lambda a: a[:-1]),
        reshape("head.new.weight", lambda a: a[:, :-1]),
        reshape("head.new.weight", lambda a: a[:-1]),
        reshape("head.new.weight", lambda a: a.astype(np.float16)),
        reshape("head.new.scale", lambda a: a[:-1]),
        reshape("head.old.left", lambda a: np.zeros((1, a.shape[1]), np.int8)),
        reshape("head.old.left", lambda a: a.reshape(-1)),
        reshape("head.old.right", lambda a: np.zeros((1, a.shape[1] + 1), np.int8)),
        reshape("head.old.right", lambda a: np.zeros((1025, a.shape[1]), np.int8)),
        reshape("head.old.right", lambda a: a.reshape(-1)),
        reshape("head.temperature", lambda a: a[:0]),
        reshape("head.temperature", lambda a: a.reshape(())),
        reshape("head.unknown.weight", lambda a: np.zeros((1, a.shape[1]), np.int8)),
        reshape("head.unknown.weight", lambda a: a[:, :-1]),
        reshape("head.unknown.scale", lambda a: np.zeros((1, 1), np.float32)),
        reshape("head.unknown.scale", lambda a: np.zeros((), np.float32)),
        reshape("head.unknown.bias", lambda a: np.zeros(1, np.float32)),
        reshape("head.unknown.mean", lambda a: np.zeros(1, np.float16)),
        reshape("head.unknown.mean", lambda a: np.zeros((), np.float16)),
        reshape("head.unknown.precision", lambda a: np.zeros(1, np.float16)),
        reshape("head.unknown.precision", lambda a: np.zeros((1, 0), np.float16)),
        reshape("head.unknown.threshold", lambda a: np.zeros(2, np.float32)),
        reshape("head.unknown.threshold", lambda a: np.zeros((), np.float32)),
        reshape("head.new.bias", lambda a: a[:-1]),
        reshape("head.new.bias", lambda a: a.reshape(-1, 1)),
        reshape("head.old.index", lambda a: np.array([[0]], np.int32)),
        reshape("head.old.index", lambda a: np.array([5000], np.int32)),
        reshape("head.old.index", lambda a: np.array([-1], np.int32)),
        reshape("canary.logits", lambda a: a[:, :-1]),
        reshape("canary.logits", lambda a: a[:0]),
        reshape("canary.logits", lambda a: a.reshape(-1)),
        reshape("canary.logits", lambda a: a[:, 0]),
        reshape("canary.logits", lambda a: a * np.float32(NAN)),
    ]
    victim.refuses_each((forged(victim, change), 3, "") for change in changes)

    def no_rank(draft: Draft) -> None:
        for name, array in draft.arrays.items():
            if name.endswith((".A", ".B")):
                draft.arrays[name] = array[:0] if name.endswith(".A") else array[:, :0]

    victim.refuses(forged(victim, no_rank), 3, "has no rows")


def test_overlapping_or_missing_tensors(victim: Victim) -> None:
    def table(change: Callable[[dict[str, Any], str], Any]) -> bytes:
        return forged(
            victim, lambda d: None, table=lambda entries: change(entries, tensor_in(entries))
        )

    def tensor_in(entries: dict[str, Any]) -> str:
        return next(name for name in sorted(entries) if name.endswith(".A"))

    def offsets(shift: int, grow: int) -> Callable[[dict[str, Any], str], Any]:
        def change(entries: dict[str, Any], name: str) -> None:
            begin, end = entries[name]["data_offsets"]
            entries[name]["data_offsets"] = [begin + shift, end + shift + grow]

        return change

    changes: list[Callable[[dict[str, Any], str], Any]] = [
        lambda entries, name: entries[name].update(more=1),
        offsets(-2, 0),
        offsets(2, 0),
        offsets(0, 2),
        offsets(2**52, 0),
        offsets(-(10**6), 0),
        lambda e, n: e[n].update(data_offsets=[False, True]),
        lambda e, n: e[n].update(data_offsets=[0]),
        lambda e, n: e[n].update(data_offsets="ab"),
        lambda e, n: e[n].update(shape=[2**52, 2**52]),
        lambda e, n: e[n].update(shape=[-1, 4]),
        lambda e, n: e[n].update(shape=[1] * 40),
        lambda e, n: e[n].update(shape=[10**15]),
        lambda e, n: e[n].update(dtype="F8"),
        lambda e, n: e[n].update(dtype=["F16"]),
        lambda e, n: e[n].pop("shape"),
        lambda e, n: e.pop(n),
        lambda e, n: e.update({n: 5}),
        lambda e, n: e.update({n: None}),
        lambda e, n: e.update({"twin": dict(e[n])}),
        lambda e, n: e.update({"../../x": e.pop(n)}),
        lambda e, n: e.clear(),
    ]
    victim.refuses_each((table(change), 3, "does not describe its tensors") for change in changes)
    fraction = table(lambda e, n: e[n].update(data_offsets=[0.0, 1.0]))
    victim.refuses(fraction, 3, "not valid JSON: 0.0 is not an integer")
    endless: list[Callable[[dict[str, Any], str], Any]] = [
        offsets(2**62, 0),
        lambda e, n: e[n].update(shape=[2**62, 2**62]),
        lambda e, n: e[n].update(shape=[10**4000]),
    ]
    victim.refuses_each((table(change), 3, "digits") for change in endless)
    endings = (".A", ".B", "head.new.weight", "head.old.index", "canary.logits")
    missing = [forged(victim, lambda d, e=ending: d.arrays.pop(tensor(d, e))) for ending in endings]
    victim.refuses_each((data, 3, "does not describe its tensors") for data in missing)
    # bytes at the end that the table does not name
    unnamed = forged(
        victim,
        lambda d: d.arrays.update(unnamed=np.zeros(3, np.int8)),
        table=lambda entries: entries.pop("unnamed"),
    )
    victim.refuses(unnamed, 3, "3 bytes belong to no tensor")
    victim.refuses(
        forged(victim, lambda d: d.arrays.update(more=np.zeros(3, np.int8))),
        3,
        "unexpected tensors: ['more']",
    )
    # whole, but of a projection that this bundle does not have
    victim.refuses(
        forged(
            victim,
            lambda d: [
                d.arrays.update({f"2.../../x.{part}": d.arrays.pop(tensor(d, f".{part}"))})
                for part in "AB"
            ],
        ),
        3,
        "which this bundle does not have",
    )


def test_class_names(victim: Victim) -> None:
    """Twice, known, empty, not NFC, with control characters or separators, too long, not text."""

    def named(value: Any, where: str = "class") -> Callable[[Draft], None]:
        def change(draft: Draft) -> None:
            (task,) = draft.manifest["tasks"]
            if where == "class":
                task["classes"] = [value, *task["classes"][1:]]
            else:
                task[where] = value

        return change

    bad: list[Any] = [
        "",
        " ",
        "e\u0301",
        "a\nb",
        "a\0",
        "\x1b[31m",
        "\x9b",
        "\u202eevil",
        "\ud800",
        "a/b",
        "a\\b",
        "../up",
        "x" * 201,
    ]
    bad += [5, None, ["a"], {"a": 1}, True]
    victim.refuses_each((forged(victim, named(name)), 3, "") for name in bad)
    victim.refuses_each((forged(victim, named(name, "name")), 3, "") for name in bad)
    count = len(Draft(victim.next).manifest["tasks"][0]["classes"])
    victim.refuses_each(
        (forged(victim, named(name, "classes")), 3, "")
        for name in ("ab"[:count], {}, None, ["a"] * count, ["a"])
    )
    known = victim.stand()[0]["classes"][0]
    victim.refuses(forged(victim, named(known)), 3, "gives two rows the class")


def test_classes_that_are_retired_and_renamed(victim: Victim) -> None:
    """Rows that do not exist or are retired, not ascending, not integers; names that are taken."""
    names = victim.stand()[0]["classes"]
    end = len(names)
    changes: list[dict[str, Any]] = [
        {"retired": [end]},
        {"retired": [10**15]},
        {"retired": [-1]},
        {"retired": [1, 0]},
        {"retired": [0, 0]},
        {"retired": [True]},
        {"retired": [0.0]},
        {"retired": ["0"]},
        {"retired": 0},
        {"retired": None},
        {"retired": {"0": 0}},
        {"retired": list(range(end)), "classes": []},
        {"renamed": [[end, "x"]]},
        {"renamed": [[-1, "x"]]},
        {"renamed": [[1, "x"], [0, "y"]]},
        {"renamed": [[0, "x"], [0, "y"]]},
        {"renamed": [[0, names[1]]]},
        {"renamed": [[0, "x/y"]]},
        {"renamed": [[0, 5]]},
        {"renamed": [[0]]},
        {"renamed": ["0x"]},
        {"renamed": {"0": "x"}},
        {"retired": [0], "renamed": [[0, "x"]]},
    ]
    victim.refuses_each(
        (forged(victim, lambda d, c=change: d.manifest["tasks"][0].update(c)), 3, "")
        for change in changes
    )
    for field in ("retired", "renamed"):
        gone = forged(victim, lambda d, f=field: d.manifest["tasks"][0].pop(f), leads=False)
        victim.refuses(gone, 3, "does not describe")
    # nothing is renamed, so the tasks lead to the right state all the same
    for nothing in ({}, ""):
        other = forged(
            victim, lambda d, n=nothing: d.manifest["tasks"][0].update(renamed=n), leads=False
        )
        victim.refuses(other, 3, "are not a list")

    def stepped(draft: Draft) -> None:
        draft.manifest["tasks"][0]["retired"] = [0]
        change_one_row(draft)
        narrow(draft, "canary.logits", "2.head.unknown.weight")

    victim.refuses(forged(victim, stepped), 3, "changes row 0, which is retired")
    # its canary, or its unknown score, still has a column for the row that is retired

    def retired(*narrowed: str) -> bytes:
        def change(draft: Draft) -> None:
            draft.manifest["tasks"][0]["retired"] = [0]
            narrow(draft, *narrowed)

        return forged(victim, change)

    victim.refuses(retired("2.head.unknown.weight"), 3, "classes are live")
    victim.refuses(retired("canary.logits"), 3, "head.unknown.weight is int8")


def test_an_encoding_that_is_unknown_or_not_the_tensors(victim: Victim) -> None:
    encodings = ("fp32", "int8", "int4", "int3", "", None, ["fp16"], "../fp16")
    victim.refuses_each(
        (forged(victim, lambda d, e=encoding: d.manifest.update(encoding=e)), 3, "")
        for encoding in encodings
    )


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_bad_scales(cli: Cli, fleet: Fleet, victim: Victim, tmp_path: Path, encoding: str) -> None:
    """A scale of 0 is good. A negative, infinite or too large one, and NaN, are refused."""
    export_bundle(
        Run.open(fleet.run).encoded(encoding),
        tmp_path / "bundle",
        0,
        [str(fleet.key.with_suffix(".pub"))],
    )
    built = build_packets(fleet.run, tmp_path / "bundle", fleet.key, out=tmp_path / "packets")
    Device.init(tmp_path / "bundle", tmp_path / "own").apply(built[0].file)
    own = Victim(cli, tmp_path / "own", victim.images, built[1].file, victim.folder, victim.signer)
    values = (-1.0, NAN, INF, 6e4 if encoding == "int4" else 3e38, 79.0)
    own.refuses_each(
        (forged(own, put(e, v)), 3, "out of bounds")
        for e in (".A.scale", ".B.scale")
        for v in values
    )
    gone = [
        forged(own, lambda d, e=e: d.arrays.pop(tensor(d, e))) for e in (".A.scale", ".B.scale")
    ]
    short = [
        forged(own, lambda d, e=e: d.arrays.update({tensor(d, e): d.arrays[tensor(d, e)][:-1]}))
        for e in (".A.scale", ".B.scale")
    ]
    own.refuses_each(
        [
            *((data, 3, "does not describe its tensors") for data in gone),
            *((data, 3, "not float") for data in short),
        ]
    )

    def emptied(draft: Draft) -> None:
        """Rank rows without scales: nothing to decode."""
        for name, array in draft.arrays.items():
            if name.startswith("2.blocks"):
                draft.arrays[name] = array[:0]

    own.refuses(forged(own, emptied), 3, "has no rows")

    def zeros(draft: Draft) -> None:
        for name, array in draft.arrays.items():
            if name.endswith((".A.scale", ".B.scale", "new.scale")):
                array[...] = 0

    stand = own.stand()
    result = own.apply(forged(own, zeros))
    # in order, but its canary was computed with other factors and rows
    assert (result.code, result.out) == (6, ""), result
    assert own.stand() == without_bytes(stand, own)


def test_a_canary_of_no_images_or_of_too_many(victim: Victim) -> None:
    """No image proves nothing, and a thousand would keep the device busy."""

    def canary(count: int) -> Callable[[Draft], None]:
        def change(draft: Draft) -> None:
            draft.arrays["canary.logits"] = np.resize(
                draft.arrays["canary.logits"], (count, draft.arrays["canary.logits"].shape[1])
            )
            draft.manifest["canary"]["count"] = count

        return change

    victim.refuses_each(
        (forged(victim, canary(count)), 3, "does not describe its tensors") for count in (0, 17)
    )


def test_a_packet_of_no_task(victim: Victim) -> None:
    def emptied(draft: Draft) -> None:
        draft.manifest["tasks"] = []
        draft.arrays = {"canary.logits": draft.arrays["canary.logits"]}

    victim.refuses(forged(victim, emptied), 3, "tasks are not a list")


def test_canary_that_fails(victim: Victim) -> None:
    """A packet that does not compute what its host did is undone, and the next one is applied."""
    stand = victim.stand()
    result = victim.apply(forged(victim, put("canary.logits", 50.0)))
    assert (result.code, result.out) == (6, ""), result
    assert len(result.err.splitlines()) == 1
    assert "canary of task 2 failed" in result.err
    assert victim.stand() == without_bytes(stand, victim)


def without_bytes(stand: Any, victim: Victim) -> Any:
    """What was seen before, with the size of the store now: a failed packet stays in it."""
    stand[0]["store_bytes"] = victim.stand()[0]["store_bytes"]
    return stand


def test_canary_with_overflowing_weights(victim: Victim) -> None:
    """Each number is within its bound, but the sum overflows float32: the canary finds it."""
    stand = victim.stand()

    def huge(draft: Draft) -> None:
        for name, array in draft.arrays.items():
            if name.endswith((".A", ".B")):
                array[...] = 9984.0
        draft.manifest["tasks"][0]["deltas"][-1] = 9999 * 2**24

    result = victim.apply(forged(victim, huge))
    assert (result.code, result.out) == (6, ""), result
    assert len(result.err.splitlines()) == 1
    assert victim.stand() == without_bytes(stand, victim)
