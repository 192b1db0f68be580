"""A run's folder, read without torch: what commands ask before they load anything, and its lock."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from ..errors import InputError, StorageError, UsageError
from ..formats.canonical import dump_json, parse_json
from ..formats.encoding import decode
from ..results import Result
from ..shortage import verdict
from ..state import Projection, lineage_id
from ..storage import atomic, disk
from . import config
from .settings import Settings

CONFIG, BACKBONE, STATE, STATISTICS, METRICS = (
    "config.toml",
    "backbone.safetensors",
    "state.safetensors",
    "statistics.safetensors",
    "metrics.json",
)
REVISIONS = "revisions.json"
LOCK = "run.lock"
SKIPPED = "skipped.csv"
"""files of the dataset that the run does not use"""
PENDING = "pending.json"
"""the task that is being added: a `Pending`"""


def newest(root: Path = Path("runs")) -> Path:
    """Return the run that runs/latest points to. Raises InputError if there is none."""
    latest = root / "latest"
    if not latest.is_dir():
        raise InputError(
            f"no run is named, and {latest} points to none: name a run, or make one with "
            "sdlora-edge train"
        )
    return latest.resolve()


def point_latest(path: Path) -> None:
    """Make `latest`, beside the run, point to it."""
    temporary = path.parent / ".latest.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.parent / "latest")


def settings(path: Path) -> Settings:
    """Read the settings of a run. Raises InputError if the folder is not a run."""
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} is not a run: no {CONFIG} in it; make one with sdlora-edge train")
    return config.load(path / CONFIG)


def is_begun(path: Path) -> bool:
    """Tell whether the run has its backbone, so that tasks can follow."""
    return (path / BACKBONE).is_file()


def require_begun(path: Path) -> Settings:
    """Read the settings of a run that has its first state. Raises InputError if it has none."""
    found = settings(path)
    if not is_begun(path):
        raise InputError(
            f"{path} was stopped before its first task: go on with sdlora-edge train --run {path}"
        )
    return found


def last_task(path: Path) -> int:
    """Return how many tasks the run has learned."""
    task = 0
    while (path / "tasks" / f"{task + 1:03d}").is_dir():
        task += 1
    return task


def require_no_gap(path: Path) -> None:
    """Raises UsageError if a task was removed from the run, but not those after it.

    The next task takes the place of the removed one, and the later ones do not follow from it.
    """
    last = last_task(path)
    later = sorted(p.name for p in (path / "tasks").glob("[0-9][0-9][0-9]") if int(p.name) > last)
    if later:
        raise UsageError(
            f"{path / 'tasks'} holds {', '.join(later)}, but no {last + 1:03d}: remove the tasks"
            " after a removed one too"
        )


def require_task(path: Path, task: int | None) -> int:
    """Check the number of a task; None is the last.

    Raises UsageError if the run has no such task.
    """
    last = last_task(path)
    if task is not None and not 0 <= task <= last:
        raise UsageError(f"{path} has the tasks 0 to {last}, not {task}")
    return last if task is None else task


def lineage(path: Path, projections: Sequence[Projection], encoding: str) -> str | None:
    """Return the run's lineage if it adapts these projections and ships in this encoding.

    None if the run does not record its backbone's digest.
    """
    if not (digest := config.recorded_in(path / CONFIG).get("backbone_sha256")):
        return None
    file = path / "tasks" / "000" / STATE
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            rows = [opened.get_tensor(f"head.new.{part}") for part in ("weight", "scale", "bias")]
            classes = json.loads(opened.metadata()["task"])["classes"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise verdict(error, InputError(f"{file} cannot be read: {error}")) from error
    head = decode(*rows[:2]), rows[2]
    features = settings(path).method.features
    return lineage_id(digest, projections, encoding, classes, head, features)


def metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.json of every scored task."""
    found = [path / "tasks" / f"{task:03d}" / METRICS for task in range(last_task(path) + 1)]
    return [parse_json(atomic.read(file), str(file)) for file in found if file.is_file()]


def names_after(
    entries: Sequence[Mapping[str, Any]], source: str, task: int
) -> dict[str, str | None]:
    """Return what the classes that a source calls by its own names are called after a task.

    None stands for a retired class. entries: metrics.json of every scored task.
    """
    names: dict[str, str | None] = {}
    for entry in entries:
        if entry["task"] > task:
            break
        changes = dict.fromkeys(entry.get("retired", ()), None) | entry.get("renamed", {})
        names = {label: changes.get(name, name) for label, name in names.items()}
        if entry["source"] == source:
            names |= {label: label for label in entry["classes"]}
    return names


def training_images(entries: Sequence[Mapping[str, Any]], task: int) -> dict[str, int]:
    """Count the images that each live class was learned from, up to a task, by today's names.

    Classes of a task that did not record them are left out. entries: metrics.json of every scored
    task.
    """
    counts: dict[str, int] = {}
    for entry in entries:
        if entry["task"] > task:
            break
        changes = dict.fromkeys(entry.get("retired", ()), None) | entry.get("renamed", {})
        renamed = ((changes.get(name, name), n) for name, n in counts.items())
        counts = {name: n for name, n in renamed if name is not None}
        for name, n in entry.get("training_by_class", {}).items():
            counts[name] = counts.get(name, 0) + n
    return counts


def classes(path: Path, task: int) -> tuple[str | None, ...]:
    """The class of each head row after a task; None if it is retired.

    Raises InputError if a task's file is damaged.
    """
    found: list[str | None] = []
    for number in range(task + 1):
        file = path / "tasks" / f"{number:03d}" / STATE
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                facts = json.loads(opened.metadata()["task"])
            # The same order as in `state.classes_after`: retire, rename, new classes.
            for row, name in [*((row, None) for row in facts["retired"]), *facts["renamed"]]:
                found[row] = name
            found += facts["classes"]
        except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise verdict(error, InputError(f"{file} cannot be read: {error}")) from error
    return tuple(found)


@dataclass(frozen=True)
class Pending(Result):
    """A task that is being added to a run.

    Attributes:
        images: Where its images are; "" for none.
        name: The task's name.
        strict: Whether warnings about the images are errors; None: as the run's settings say.
        retired, renamed: As in `plan.ClassChanges`.
    """

    images: str
    name: str
    strict: bool | None = None
    retired: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def adding(path: Path, task: Pending) -> Iterator[None]:
    """Note a task in the run while it is learned.

    If this block is interrupted or its process is killed, `train --run RUN` goes on with the task;
    if it fails, it does not.
    """
    atomic.write(path / PENDING, dump_json(task.to_dict()))
    try:
        yield
    except Exception:
        (path / PENDING).unlink(missing_ok=True)
        raise
    (path / PENDING).unlink(missing_ok=True)


def pending(path: Path) -> Pending | None:
    """The task that was being added when its process was stopped."""
    if not (path / PENDING).exists():
        return None
    found = parse_json(atomic.read(path / PENDING, 1 << 20), str(path / PENDING))
    try:
        changes = tuple(found["retired"]), dict(found["renamed"])
        return Pending(found["images"], found["name"], found["strict"], *changes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / PENDING} does not describe a task ({error!r}): "
            "remove it and add the task again"
        ) from error


def revision(path: Path, task: int) -> int:
    """The revision of a task: 0, or what `Run.revise` has set for it or for a task before it."""
    try:
        known = (
            parse_json(atomic.read(path / REVISIONS, 1 << 20), REVISIONS)
            if (path / REVISIONS).exists()
            else {}
        )
        return max((int(r) for first, r in known.items() if int(first) <= task), default=0)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / REVISIONS} does not hold revisions of tasks: {error}") from error


def require_revision(path: Path, wanted: int) -> int:
    """The run's highest revision. Raises UsageError if `wanted` is lower."""
    if wanted < (known := revision(path, last_task(path) + 1)):
        raise UsageError(
            f"--revision {wanted}: {path} has built packets of revision {known} already: "
            f"give {known} or a higher one"
        )
    return known


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one to write to a run.

    The operating system frees the lock of a process that dies. Raises UsageError at once if another
    process holds it, StorageError if the run cannot be written.
    """
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(disk.lock(path / LOCK))
    except BlockingIOError as error:
        raise UsageError(
            f"{path} is in use: another process is training it: wait until it ends, or stop it"
        ) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    with lock:
        yield


def require_free(path: Path) -> None:
    """Raises UsageError if another process is training the run.

    Of torchrun's processes, which are one holder, the first asks.
    """
    if os.environ.get("RANK", "0") == "0":
        with locked(path):
            pass


def require_known(labels: Sequence[str], path: Path, task: int, folder: str) -> None:
    """Raises UsageError for a class that the run does not know after a task, or has retired."""
    now = classes(path, task)
    unknown = [label for label in labels if label not in now]
    if not unknown:
        return
    rows = {name: r for before in range(task) for r, name in enumerate(classes(path, before))}
    retired = [label for label in unknown if label in rows and now[rows[label]] is None]
    raise UsageError(
        f"{folder}: after task {task} this run does not know the"
        f" {'class' if len(unknown) == 1 else 'classes'} {_some(unknown)}"
        f"{f' (retired: {_some(retired)})' if retired else ''}:"
        " remove them, or name another --task"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
