"""RR: the schedule of ranks, as text. No import of numpy or torch."""

from __future__ import annotations

import re

from ..errors import UsageError

MAX_RANK = 4096


def rank_steps(schedule: str) -> list[tuple[int, int]]:
    """Read a schedule: (first task, rank) of each step, in order. The first task is 1.

    "10,8@4,6@8" is 10, then 8 from task 4 and 6 from task 8. Raises UsageError for anything else.
    """
    number = r"[1-9]\d{0,5}"
    text = schedule.replace(" ", "")
    if not re.fullmatch(rf"{number}(,{number}@{number})*", text):
        raise UsageError(f"rank is {schedule!r}: give a number, or a schedule such as 10,8@4,6@8")
    first, *more = text.split(",")
    pairs = (step.split("@") for step in more)
    steps = [(1, int(first)), *((int(at), int(rank)) for rank, at in pairs)]
    if [at for at, _ in steps] != sorted({at for at, _ in steps}):
        raise UsageError(f"rank is {schedule!r}: its tasks must ascend")
    if max(rank for _, rank in steps) > MAX_RANK:
        raise UsageError(f"rank is {schedule!r}: it must be at most {MAX_RANK}")
    return steps
