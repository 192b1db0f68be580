"""The rules of docs/packet.md, row by row, without a disk, a key or an engine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdlora_edge import acceptance
from sdlora_edge.acceptance import (
    KeysCase,
    RevocationCase,
    Standing,
    accept_keys,
    accept_revocation,
    accept_update,
    require_not_revoked,
)
from sdlora_edge.errors import NotForThisDevice, NothingToDo, SdloraError, TrustError
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.control import Revocation, Revoked, Rotation
from sdlora_edge.formats.packet import Packet
from sdlora_edge.formats.signing import Trust
from sdlora_edge.state import TaskState, TaskUpdate, advance, changed_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "packet.md"
LINEAGE, ELSEWHERE = sha256(b"a run"), sha256(b"elsewhere")


def updated(state: TaskState, *new: str, deltas: float = 0.0, **fields: Any) -> TaskUpdate:
    """An update that brings these classes."""
    weight = np.vstack([state.head_weight, np.ones((len(new), 2), np.float32)])
    bias = np.append(state.head_bias, np.zeros(len(new))).astype(np.float32)
    task = state.task + 1
    rows = changed_rows(state, weight, bias, fields.get("retired", ()))
    return TaskUpdate(task, f"task {task}", new, np.full(task, deltas), rows, {}, **fields)


def states(*branch: str) -> list[TaskState]:
    """Of a run whose tasks bring one class each."""
    head = np.zeros((2, 2), np.float32), np.zeros(2, np.float32)
    found = [
        TaskState(0, "base", LINEAGE, ("ant", "bee"), np.zeros(0), *head, {}, Confidence.none(2))
    ]
    for name in branch:
        found.append(advance(found[-1], updated(found[-1], name)))
    return found


S = states("cat", "dog", "emu", "fox")


def packet(first: int, last: int, revision: int = 0, branch: list[TaskState] = S) -> Packet:
    """The packet of tasks `first` to `last`."""
    return Packet(
        lineage=LINEAGE,
        begin=branch[first - 1].digest,
        end=branch[last].digest,
        updates=tuple(
            updated(branch[t - 1], str(branch[t].classes[-1])) for t in range(first, last + 1)
        ),
        canary_seed=1,
        canary_logits=np.zeros((1, len(branch[last].live)), np.float32),
        revisions=(revision,) * (last - first + 1),
        digest="",
    )


def at(task: int, **fields: Any) -> Standing:
    return Standing(**{"lineage": LINEAGE, "projections": (), "state": S[task], **fields})


FORK = states("cat", "doe", "eel", "fly")
REVOKED = (Revoked(2, 0),)
CASES: dict[str, list[tuple[Packet, Standing]]] = {
    "another lineage": [(replace(packet(2, 2), lineage=ELSEWHERE), at(1))],
    "applied already": [
        (packet(2, 2), at(2)),
        (packet(1, 1), at(3)),
        (packet(1, 2), at(2)),
        # a state that the bundle itself went through: no packet brought it to this device
        (packet(1, 1), at(2, state=S[2])),
    ],
    "a newer revision of a task that is held": [
        (packet(2, 2, 1, FORK), at(2)),
        (packet(2, 3, 1, FORK), at(2)),
    ],
    "replay": [(packet(2, 2, 0, FORK), at(2)), (packet(1, 2, 0, FORK), at(3))],
    "a squash over the device's state": [(packet(1, 3), at(2)), (packet(2, 3), at(2))],
    "out of order": [(packet(3, 3), at(1)), (packet(4, 4), at(1))],
    "fork": [(packet(3, 3, 0, FORK), at(2))],
    "damaged content": [
        (replace(packet(2, 2), end=ELSEWHERE), at(1)),
        (replace(packet(2, 2), canary_logits=np.zeros((1, 9), np.float32)), at(1)),
    ],
    "revoked": [(packet(2, 2), at(1, revoked=REVOKED)), (packet(2, 3), at(1, revoked=REVOKED))],
    "not newer than ever confirmed": [
        (packet(2, 2), at(1, confirmed=(0, 2))),
        (packet(2, 2), at(1, confirmed=(1, 1))),
    ],
    "no room": [(packet(2, 2), at(1, capacity=3)), (packet(2, 4), at(1, capacity=5))],
}


@pytest.mark.parametrize("rule", acceptance.UPDATES, ids=lambda rule: rule.name)
def test_each_rule_refuses_its_own_cases_and_is_the_first_to_do_so(rule: Any) -> None:
    before = acceptance.UPDATES[: acceptance.UPDATES.index(rule)]
    for one, standing in CASES[rule.name]:
        case = acceptance.UpdateCase(one, standing)
        assert not [earlier.name for earlier in before if earlier.problem(case)]
        with pytest.raises(rule.error) as raised:
            accept_update(one, standing)
        assert str(raised.value) == rule.problem(case)


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in acceptance.UPDATES]


@pytest.mark.parametrize(
    ("one", "standing"),
    [
        (packet(2, 2), at(1)),
        (packet(2, 4), at(1)),
        (packet(2, 2), at(1, confirmed=(0, 1), capacity=4, revoked=(Revoked(3, 9),))),
        (packet(2, 2), at(1, confirmed=(0, 3), allow_older=True)),
        (packet(2, 2, 1), at(1, confirmed=(0, 9), revoked=REVOKED)),
    ],
)
def test_what_no_rule_refuses_leads_to_its_state(one: Packet, standing: Standing) -> None:
    assert accept_update(one, standing).digest == one.end


def test_a_revoked_packet_that_a_device_holds_is_refused_when_it_is_read_again() -> None:
    require_not_revoked(packet(1, 1), REVOKED)
    with pytest.raises(TrustError, match="was revoked"):
        require_not_revoked(packet(1, 3), REVOKED)


def test_the_class_names_of_another_run_make_another_state() -> None:
    """Same numbers, other names: once taken for a packet that the bundle knows."""
    other = states("cow", "dog")
    assert other[1].digest != S[1].digest
    with pytest.raises(TrustError, match="replay"):
        accept_update(packet(1, 1, 0, other), at(2))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"retired": (9,)}, "has no class"),
        ({"retired": (2,)}, "has no class"),
        ({"renamed": ((2, "x"),)}, "has no class"),
        ({"renamed": ((0, "bee"),)}, "two rows the class 'bee'"),
        ({"classes": ("ant",)}, "two rows the class 'ant'"),
        ({"retired": (0,), "renamed": ((0, "x"),)}, "renames a class that it retires"),
        ({"retired": (0, 1), "classes": ()}, "retires every class"),
        ({"deltas": np.full(2, 10_001.0)}, "a magnitude is above"),
    ],
)
def test_a_task_that_does_not_fit_the_classes_it_follows(
    changes: dict[str, Any], problem: str
) -> None:
    """Row 2 is retired already."""
    state = advance(S[1], updated(S[1], retired=(2,)))
    update = replace(updated(state, *changes.get("classes", ("new",))), **changes)
    update = replace(update, task=3, deltas=changes.get("deltas", np.zeros(3)))
    if "deltas" in changes:
        state = replace(state, magnitudes=np.zeros(2))
        update = replace(update, deltas=np.append(changes["deltas"], 0.0))
    one = replace(
        packet(2, 2),
        begin=state.digest,
        updates=(update,),
        revisions=(0,),
        canary_logits=np.zeros((1, 1), np.float32),
    )
    with pytest.raises(SdloraError, match=re.escape(problem)):
        accept_update(one, at(2, state=state))


def test_steps_that_are_bounded_do_not_add_up_beyond_the_bound() -> None:
    state = replace(S[1], magnitudes=np.array([9_000.0]))
    update = replace(updated(state), deltas=np.array([2_000.0, 0.0]))
    one = replace(packet(2, 2), updates=(update,), begin=state.digest)
    with pytest.raises(SdloraError, match="a magnitude is above 10000 after it"):
        accept_update(one, at(1, state=state))


def test_keys_row_by_row() -> None:
    def keys(version: int, threshold: int = 0) -> Trust:
        return Trust((), 1, version)

    current = keys(3)
    accept_keys(KeysCase(Rotation(keys(4), ""), current))
    with pytest.raises(NothingToDo, match="in force already"):
        accept_keys(KeysCase(Rotation(keys(3), ""), current))
    with pytest.raises(TrustError, match="has seen version 3"):
        accept_keys(KeysCase(Rotation(keys(2), ""), current))


def test_revocations_row_by_row() -> None:
    def accept(lineage: str, new: Revoked) -> None:
        revocation = Revocation(lineage, new, "")
        accept_revocation(RevocationCase(revocation, LINEAGE, (0, 1), (Revoked(5, 2),)))

    accept(LINEAGE, Revoked(2, 0))
    accept(LINEAGE, Revoked(4, 2))
    with pytest.raises(NotForThisDevice, match="another lineage"):
        accept(ELSEWHERE, Revoked(6, 1))
    with pytest.raises(NothingToDo, match="revoked already"):
        accept(LINEAGE, Revoked(6, 1))
    with pytest.raises(NotForThisDevice, match="the revoked task 1 is part"):
        accept(LINEAGE, Revoked(1, 0))
    with pytest.raises(NotForThisDevice, match="the revoked task 2 is part"):
        accept(LINEAGE, Revoked(2, 1))


def test_the_page_and_the_code_have_the_same_rows_in_the_same_order() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \| (\d) \|$", PAGE.read_text(), re.MULTILINE)
    rules = [*acceptance.UPDATES, *acceptance.KEYS, *acceptance.REVOCATIONS]
    assert rows == [(rule.name, str(rule.error.exit_code)) for rule in rules]
