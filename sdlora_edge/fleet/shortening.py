"""Cuts a report to the bytes that it may have: texts first, then the rarest classes.

A text is measured as canonical JSON holds it: a letter outside ASCII takes six bytes, some twelve.
Pure.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import printable
from ..formats.canonical import dump_json

CLASS_BYTES = 48
"""A longer class name is always shortened, in every report alike, so that it stays one class."""
LEVELS = 1200, 300, 120, 60, 30, 15
"""Bytes of one text, from the most generous to what always fits."""
LEAST_CLASSES = 8
"""Texts are cut further until so many classes fit."""
_TEXTS = "name", "task_name", "platform", "waiting"


def shortened(report: Mapping[str, Any], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Cut a report until it fits.

    Args:
        report: A report as JSON has it.
        fits: Whether such a report is small enough.

    Returns:
        A report that fits: as many texts and classes as possible, the classes with the largest
        counts. The other classes are counted in `other`.
    """
    counts: Counter[str] = Counter()
    for name, number in report["predictions"]["by_class"].items():
        counts[class_name(name)] += number
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    found: dict[str, Any] = {}
    for level in LEVELS:
        found = _cut(report, level)
        most = _most(found, ranked, fits)
        if most >= min(len(ranked), LEAST_CLASSES) or level == LEVELS[-1]:
            return _with_classes(found, ranked, max(most, 0))
    return found


def class_name(name: str) -> str:
    """A class name as reports have it. A long one ends with a digest, so that no two are one."""
    if _size(shown := printable(name)) <= CLASS_BYTES:
        return shown
    ending = f"~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return beginning(shown, CLASS_BYTES - len(ending)) + ending


def cut(text: str, most: int) -> str:
    """A text of at most `most` bytes of JSON, and of no more characters than before (or three).

    Three dots show that there was more.
    """
    return text if _size(text) <= most else beginning(text[:-3], most - 3) + "..."


def beginning(text: str, most: int) -> str:
    """As many characters as fit in `most` bytes of JSON."""
    low, high = 0, min(len(text), most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _size(text[:middle]) <= most else (low, middle - 1)
    return text[:low]


def _size(text: str) -> int:
    return len(dump_json(text)) - 2


def _cut(report: Mapping[str, Any], level: int) -> dict[str, Any]:
    """A report without classes, every text of which has at most `level` bytes."""
    found = {**report, **{name: cut(report[name], level) for name in _TEXTS}}
    found["groups"] = _groups(report["groups"], level)
    found["errors"] = [{**e, "message": cut(e["message"], level)} for e in report["errors"]]
    found["software"] = {
        cut(name, level): cut(version, level) for name, version in report["software"].items()
    }
    return found


def _groups(groups: list[str], level: int) -> list[str]:
    """The first groups that together take few bytes. A group is never cut: it would be another."""
    found: list[str] = []
    for group in groups:
        if len(dump_json([*found, group])) <= 2 * level:
            found.append(group)
    return found


def _most(
    report: dict[str, Any], ranked: list[tuple[str, int]], fits: Callable[[dict[str, Any]], bool]
) -> int:
    """How many of the classes fit; -1 if not even none does."""
    low, high = -1, len(ranked)
    while low < high:
        middle = (low + high + 1) // 2
        enough = fits(_with_classes(report, ranked, middle))
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def _with_classes(
    report: dict[str, Any], ranked: list[tuple[str, int]], count: int
) -> dict[str, Any]:
    predictions = report["predictions"]
    rest = predictions["other"] + sum(n for _, n in ranked[count:])
    return {
        **report,
        "predictions": {**predictions, "by_class": dict(ranked[:count]), "other": rest},
    }
