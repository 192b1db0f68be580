"""Genuine packets at the wrong time, in the wrong place, or not meant for this device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attacks_kit import Cli, Victim, said_no
from conftest import Fleet
from forge import Draft

from sdlora_edge.errors import NotForThisDevice
from sdlora_edge.formats import control, packet, signing
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.control import Revoked

VECTORS = Path(__file__).resolve().parents[1] / "vectors"


@pytest.fixture(scope="session")
def squash(fleet: Fleet) -> bytes:
    """Tasks 1 to 3 in one."""
    signers = [signing.load_signer(fleet.key)]
    read = [packet.read(path.read_bytes(), fleet.trust) for path in fleet.packets]
    return packet.squash(read, lambda payload: signing.sign(payload, signers))


def revocation(victim: Victim, task: int, revision: int = 0, lineage: str | None = None) -> bytes:
    lineage = lineage or Draft(victim.next).manifest["lineage"]
    return control.build_revocation(
        lineage, Revoked(task, revision), lambda payload: signing.sign(payload, [victim.signer])
    )


def fork(victim: Victim, path: Path, revision: int = 0, scale: float = 0.5) -> bytes:
    """Another successor of the state that `path` follows, signed and sound, with the same canary."""
    draft = Draft(path)
    (task,) = draft.manifest["tasks"]
    task["deltas"] = [*task["deltas"][:-1], int(task["deltas"][-1] * scale)]
    task["revision"] = revision
    return draft.sealed(victim.signer)


def test_replay(victim: Victim, fleet: Fleet, stranger: Any) -> None:
    """What the device holds changes nothing, whoever signs it again. Another packet of an old task
    is refused."""
    victim.refuses(fleet.packets[0], 7, "applied already")
    assert victim.apply(victim.next).code == 0
    again = Draft(fleet.packets[0]).sealed(victim.signer, stranger)
    assert again != fleet.packets[0].read_bytes()
    held = [(packet, 7, "applied already") for packet in (*fleet.packets[:2], again)]
    victim.refuses_each([*held, (fork(victim, fleet.packets[0]), 4, "replay")])


def test_rollback(victim: Victim, fleet: Fleet) -> None:
    """TUF: rollback. No packet brings an older state, and none undoes a rollback by hand."""
    assert victim.apply(victim.next).code == 0
    victim.refuses(fork(victim, fleet.packets[0]), 4, "replay")
    assert victim.cli("device", "rollback", "--store", victim.store).code == 0
    victim.refuses(victim.next, 4, "not newer than packet 2")
    victim.refuses(fork(victim, victim.next), 4, "not newer than packet 2")
    assert (
        victim.cli("device", "apply", victim.next, "--store", victim.store, "--allow-older").code
        == 0
    )
    # an older one, taken on purpose, opens the door to no other
    for _ in range(2):
        assert victim.cli("device", "rollback", "--store", victim.store).code == 0
    assert (
        victim.cli(
            "device", "apply", fleet.packets[0], "--store", victim.store, "--allow-older"
        ).code
        == 0
    )
    victim.refuses(victim.next, 4, "not newer than packet 2")
    assert (
        victim.cli("device", "apply", victim.next, "--store", victim.store, "--allow-older").code
        == 0
    )


def test_skipped_predecessor(victim: Victim, fleet: Fleet) -> None:
    victim.refuses(fleet.packets[2], 5, "apply 2 first")
    # one that says that it comes next, and does not
    draft = Draft(fleet.packets[2])
    draft.manifest["sequence"] = 2
    victim.refuses(draft.sealed(victim.signer), 3, "does not describe")
    draft = Draft(fleet.packets[2])
    draft.manifest["from"] = Draft(victim.next).manifest["from"]
    victim.refuses(draft.sealed(victim.signer), 5, "apply 2 first")


def test_fork(victim: Victim, fleet: Fleet) -> None:
    """Two successors of one state: whoever took the one never takes what follows the other."""
    other = Draft(fleet.packets[1])
    other.manifest["from"] = sha256(b"the other branch")
    victim.refuses(other.sealed(victim.signer), 5, "follows another state")
    victim.refuses(fork(victim, fleet.packets[0]), 4, "replay")
    victim.refuses(fork(victim, fleet.packets[0], revision=1), 5, "roll back to task 0")


def test_another_lineage(victim: Victim) -> None:
    """A packet of another run, signed with a trusted key: as it is, and with this run's lineage."""
    for number, name in enumerate(("1", "2")):
        draft = Draft(VECTORS / "packets" / f"{name}.sdlora")
        data = draft.sealed(victim.signer)
        victim.refuses(data, 5, "another lineage")
        said_no(
            victim.cli("packet", "verify", victim.file(data), "--bundle", victim.store / "bundle"),
            5,
            "another lineage",
        )
        draft.manifest["lineage"] = Draft(victim.next).manifest["lineage"]
        victim.refuses(
            draft.sealed(victim.signer), *[(4, "replay"), (5, "follows another state")][number]
        )


def test_squash_over_a_state_the_device_is_not_in(
    victim: Victim, fleet: Fleet, squash: bytes
) -> None:
    victim.refuses(squash, 5, "leads from task 0 to 3")
    draft = Draft(squash)
    draft.manifest["from"] = Draft(victim.next).manifest["from"]
    victim.refuses(draft.sealed(victim.signer), 5, "leads from task 0 to 3")


def test_manifests_that_lead_nowhere(victim: Victim) -> None:
    changes: list[Any] = [
        lambda m: m.update(sequence=m["sequence"] + 1),
        lambda m: m.update(sequence=m["sequence"] - 1),
        lambda m: m.update(sequence=0),
        lambda m: m.update(sequence=10**4000),
        lambda m: m.update(sequence=2.0),
        lambda m: m.update(tasks=m["tasks"] * 2),
        lambda m: m.update(tasks=m["tasks"] * 2000),
        lambda m: m.update(tasks=[]),
        lambda m: m.update(to="0" * 64),
        lambda m: m.update({"from": "../../etc/passwd"}),
        lambda m: m["tasks"][0].update(revision=-1),
        lambda m: m["tasks"][0].update(revision=10**7),
        lambda m: m["tasks"][0].update(revision=[[]]),
    ]
    drafts = [Draft(victim.next) for _ in changes]
    for change, draft in zip(changes, drafts, strict=True):
        change(draft.manifest)
    victim.refuses_each((draft.sealed(victim.signer, leads=False), 3, "") for draft in drafts)


def test_a_squash_whose_revisions_fall(victim: Victim, fleet: Fleet, squash: bytes) -> None:
    """Revision 1, then revision 0: a revocation of the first would not cover what follows it."""
    draft = Draft(squash)
    draft.manifest["tasks"][0]["revision"] = 1
    victim.refuses(draft.sealed(victim.signer), 3, "lower revision")


def test_a_squash_of_two_lineages_is_not_made(fleet: Fleet) -> None:
    one, two = (packet.read(path.read_bytes(), fleet.trust) for path in fleet.packets[:2])
    other = replace(two, lineage="ab" * 32)
    with pytest.raises(NotForThisDevice, match="different lineages"):
        packet.squash([one, other], lambda payload: payload)


def test_a_packet_that_leads_where_the_device_is(victim: Victim) -> None:
    draft = Draft(victim.next)
    draft.manifest["to"] = draft.manifest["from"]
    victim.refuses(draft.sealed(victim.signer, leads=False), 7, "applied already")


def test_revocation_of_another_lineage(victim: Victim) -> None:
    victim.refuses(revocation(victim, 1, lineage=sha256(b"another")), 5, "another lineage")


def test_revocation_that_says_nothing(victim: Victim) -> None:
    for change in (
        {"sequence": 0},
        {"sequence": -1},
        {"revision": 10**7},
        {"revision": "0"},
        {"lineage": "x"},
        {"more": 1},
    ):
        draft = Draft(revocation(victim, 1))
        draft.manifest |= change
        victim.refuses(draft.sealed(victim.signer), 3, "")
    # of a kind that another program may know
    draft = Draft(revocation(victim, 1))
    draft.manifest["kind"] = "greeting"
    victim.refuses(draft.sealed(victim.signer), 3, "kind 'greeting'")
    # with tensors
    draft = Draft(revocation(victim, 1))
    draft.arrays = Draft(victim.next).arrays
    victim.refuses(draft.sealed(victim.signer), 3, "has tensors")


def test_revoked_revision_applied_again(cli: Cli, victim: Victim, fleet: Fleet) -> None:
    """It is refused for ever: alone, in a squash, with --allow-older."""
    assert victim.apply(victim.next).code == 0
    assert victim.apply(revocation(victim, 2)).code == 0
    assert victim.stand()[0]["task"] == 1
    victim.refuses_each(
        [
            (victim.next, 4, "revoked"),
            (revocation(victim, 2), 7, "revoked already"),
            (revocation(victim, 3), 7, "revoked already"),
        ]
    )
    older = cli("device", "apply", victim.next, "--store", victim.store, "--allow-older")
    assert (older.code, older.out) == (4, "")
    assert "revoked" in older.err
    signers = [victim.signer]
    read = [packet.read(path.read_bytes(), fleet.trust) for path in fleet.packets[1:]]
    victim.refuses(
        packet.squash(read, lambda payload: signing.sign(payload, signers)), 4, "revoked"
    )
    # a newer revision of it is taken
    draft = Draft(victim.next)
    draft.manifest["tasks"][0]["revision"] = 1
    assert victim.apply(draft.sealed(victim.signer)).code == 0
    victim.refuses(revocation(victim, 2), 7, "revoked already")
