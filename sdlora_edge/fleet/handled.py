"""What a sync has handled completely: `STORE/fleet/handled.json`, written last."""

from __future__ import annotations

from dataclasses import dataclass

from ..device.device import Device
from ..errors import InputError
from ..formats.canonical import dump_json, parse_exact_json
from ..formats.fields import digest, listed, record, text, whole
from ..formats.limits import LIMITS
from .rollout import LATEST

HANDLED = "handled.json"
MOST_FAILED = 100


@dataclass(frozen=True)
class Facts:
    """What a way is found by. To learn it, the model is opened; so it is kept.

    Attributes:
        lineage: State digest S_0.
        states: Digests of all states that led to the one in force, S_0 first.
        keys: Version of the keys in force.
        task: Number of the last task.
    """

    lineage: str = ""
    states: tuple[str, ...] = ()
    keys: int = 0
    task: int = 0

    @classmethod
    def of(cls, device: Device) -> Facts:
        """Those of an open device."""
        status = device.status()
        return cls(status.lineage, device.states, status.trust_version, status.task)


@dataclass(frozen=True)
class Handled:
    """What was handled completely.

    Attributes:
        snapshot: Version of the repository's snapshot.
        standing: Digest of the store's record, the identity and the program's version.
        wakes: Unix seconds when a step of the roll-out begins; 0 if none does.
        root_checked: Unix seconds when a newer root was asked for.
        failed: Digests of packets that this device refuses for good, as it is now.
        facts: Of the device, as it is with this standing.
    """

    snapshot: int = 0
    standing: str = ""
    wakes: int = 0
    root_checked: int = 0
    failed: tuple[str, ...] = ()
    facts: Facts = Facts()

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return dump_json({**self.__dict__, "facts": self.facts.__dict__})

    @classmethod
    def from_json(cls, data: bytes) -> Handled:
        """Raises InputError."""
        value = parse_exact_json(data, HANDLED)
        try:
            _HANDLED(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{HANDLED} is malformed: {error}") from error
        facts = value["facts"]
        facts = Facts(**facts | {"states": tuple(facts["states"])})
        return cls(**value | {"failed": tuple(value["failed"]), "facts": facts})


_HANDLED = record(
    {
        "snapshot": whole(0, 2**53 - 1),
        "standing": text(64),
        "wakes": whole(0, LATEST),
        "root_checked": whole(0, LATEST),
        "failed": listed(digest, 0, MOST_FAILED),
        "facts": record(
            {
                "lineage": text(64),
                "states": listed(digest, 0, LIMITS.sequence + 1),
                "keys": whole(0, LIMITS.revision),
                "task": whole(0, LIMITS.sequence),
            }
        ),
    }
)
