"""What a reader is willing to look at: a bound for every number and every name in a signed file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The largest values that a reader accepts.

    Attributes:
        packet: Bytes of a packet file.
        header: Bytes of its header.
        name: Characters of a task or class name.
        canary_inputs: Images of a canary.
        magnitude: Absolute value of a magnitude, and of an entry of a factor or of the head.
        logit: Absolute value of a logit of a canary, and of the threshold of the unknown score.
        step_rank: Rank of the step of known head rows. 1,024 products of two int8 are at most
            2^24, so that float32 holds their sum exactly.
        components: Rows of the unknown score.
        tasks: Tasks that one packet brings.
        sequence: Number of a task.
        rows: Rows of the head, those of retired classes included.
        revision: Revision of a task, and version of the keys.
        revocations: Revocations that a device remembers. One that another covers is not counted.
        keys: Keys that are trusted, and signatures of one file. Equal, or a packet that all keys
            have signed would be one that no device reads.
        seed: Seed of a canary. The largest integer that JavaScript reads exactly.
    """

    packet: int = 64 * 1024 * 1024
    header: int = 1024 * 1024
    name: int = 200
    canary_inputs: int = 16
    magnitude: int = 10_000
    logit: int = 1_000_000
    step_rank: int = 1024
    components: int = 64
    tasks: int = 1000
    sequence: int = 1_000_000
    rows: int = 1_000_000
    revision: int = 1_000_000
    revocations: int = 1000
    keys: int = 16
    seed: int = 2**53 - 1


LIMITS = Limits()


def natural(value: Any, limit: int | None = None) -> int:
    """Return `value` if it is an integer from 0 to `limit`. Raises ValueError for anything else."""
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        bound = "" if limit is None else f" up to {limit}"
        raise ValueError(f"{value!r} is not a natural number{bound}")
    return value
