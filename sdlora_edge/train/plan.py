"""What a command is asked to do, checked before torch is imported and any model is loaded."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError, UsageError
from ..formats.packet import name_problem
from ..inputs.modality import kind_of, of_kind
from . import folder, splits, unknown_images
from .declaration import nearest
from .files import counted
from .settings import SETTINGS, Settings
from .source import Source
from .unknown_images import UnknownImages

MICRO = "micro_vit"


@dataclass(frozen=True)
class ClassChanges:
    """What a task does to classes that the run knows.

    Attributes:
        retired: Classes that are never answered again. Their names may come back as new classes.
        renamed: {name today: new name}.
    """

    retired: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.retired or self.renamed)

    def check(self, known: Collection[str]) -> None:
        """Raise UsageError for a change that the run's live classes, `known`, do not allow."""
        for name in (*self.retired, *self.renamed):
            if name not in known:
                raise UsageError(f"the run has no live class {name!r}: {nearest(name, known)}")
        if both := set(self.retired) & set(self.renamed):
            raise UsageError(f"{min(both)!r} is both retired and renamed: choose one")
        for name in self.renamed.values():
            if problem := name_problem(name):
                raise UsageError(f"the new name {name!r} {problem}: choose another")
        left = [self.renamed.get(name, name) for name in known if name not in self.retired]
        if self.retired and not left:
            raise UsageError("no class would be left: retire fewer, or begin a new run")
        if twice := next((name for name in left if left.count(name) > 1), None):
            raise UsageError(f"two classes would be called {twice!r}: choose another name")


@dataclass(frozen=True)
class NewTask:
    """One more task of a run, as it was asked for.

    Attributes:
        images: The folder or ZIP that `source` was read from; "" for a task without images.
        source: None for a task without images, which only changes known classes.
        strict: Whether warnings about the images are errors; None: as the run's settings say.
        changes: Of known classes, checked.
    """

    run: Path
    images: str
    name: str
    source: Source | None
    strict: bool | None = None
    changes: ClassChanges = ClassChanges()


def new_run(settings: Settings, out: Path | None) -> Source:
    """Return the images of a new run.

    Raises:
        UsageError: if the settings, images and folder do not go together.
        InputError: if the images or the weights cannot be read.
    """
    if out is not None and out.exists():
        raise UsageError(
            f"{out} exists already: choose another --out, or go on with --run {out} if it is a run"
        )
    if settings.backbone.backbone == MICRO and not settings.data.base_classes:
        raise UsageError(
            "micro_vit has no pre-trained weights: give it a base session with base_classes,"
            " or choose another backbone"
        )
    if settings.backbone.weights and not Path(settings.backbone.weights).is_file():
        raise InputError(f"weights {settings.backbone.weights!r}: there is no such file")
    _require_pictures(settings)
    source = splits.load_for(settings)
    if len(source.classes) == 1:
        raise UsageError(
            f"{settings.data.data} has only one class ({source.classes[0]}): add a folder for"
            f" another class, or let a run that knows other classes learn it with --run RUN"
            f" --data {settings.data.data}{_unused(source)}"
        )
    splits.parts(source, settings)
    return source


def _require_pictures(settings: Settings) -> None:
    """Raise UsageError for settings that need pictures, if the backbone reads something else."""
    kind, wanted = of_kind(kind_of(settings.backbone.backbone)), settings.data
    if kind.spatial:
        return
    for name in ("base_classes", "augment"):
        if (value := getattr(wanted, name)) != SETTINGS[name].default:
            raise UsageError(
                f"{name} {value} needs images, and {settings.backbone.backbone} reads "
                f"{kind.noun}s: leave it out"
            )


def _unused(source: Source) -> str:
    problems = counted(image.problem for image in source.skipped)
    return f" (files that are not used: {problems})" if problems else ""


def resumed(path: Path) -> Source | NewTask:
    """Return what a run goes on with: a task that was being added, or the images of its own tasks.

    Raises:
        InputError: if the folder is not a run, or its images cannot be read.
        UsageError: if another process is training the run.
    """
    settings = folder.settings(path)
    folder.require_free(path)
    folder.require_no_gap(path)
    if found := folder.pending(path):
        changes = ClassChanges(found.retired, found.renamed)
        task = one_more(path, found.images or None, found.name, changes)
        return replace(task, strict=found.strict)
    return splits.load_for(settings)


def one_more(
    path: Path,
    images: str | None,
    name: str | None = None,
    changes: ClassChanges = ClassChanges(),
) -> NewTask:
    """Return a task for a run that has finished its own ones.

    Args:
        path: The run.
        images: Folder or ZIP of new images; None for a task that only changes known classes.
        name: Of the task; default: that of the folder.
        changes: Of known classes.

    Raises:
        UsageError: if the run does not take the images, or the changes.
        InputError: if the folder is not a run, or the images cannot be read.
    """
    settings = folder.require_begun(path)
    folder.require_free(path)
    folder.require_no_gap(path)
    done = folder.last_task(path)
    if done < settings.data.tasks:
        raise UsageError(
            f"{path} has finished {done} of its {settings.data.tasks} tasks:"
            f" resume it first with sdlora-edge train --run {path}"
        )
    if images is None and not changes:
        raise UsageError("a task needs data or changes of classes: give --data")
    changes.check([label for label in folder.classes(path, done) if label is not None])
    name = unicodedata.normalize("NFC", name or _name_of(images))
    if problem := name_problem(name):
        raise UsageError(f"the task's name {name!r} {problem}: give another --name")
    source = None if images is None else _new_images(path, images, settings)
    return NewTask(path, images or "", name, source, changes=changes)


def _name_of(images: str | None) -> str:
    """What a task is called by default: its folder, or its file without the suffix."""
    path = Path(images or "")
    is_file = path.suffix.lower() == ".zip" or path.is_file()  # a ZIP may lie in --data-root
    return (path.stem if is_file else path.name) or "task"


def _new_images(path: Path, images: str, settings: Settings) -> Source:
    source = splits.load_for(settings, images)
    if len(source.classes) < 2 and settings.method.head != "aligned":
        raise UsageError(
            f"{images} has only one class ({source.classes[0]}), and --head paper learns a class by"
            " how it differs from others of its task: add a folder for another class, or begin a"
            " run with --head aligned, which learns a class alone"
        )
    if set(source.classes) <= _learned_from(source, path, settings):
        raise UsageError(
            f"{images} holds {source.noun}s that the run has learned already, by their names:"
            f" give new {source.noun}s"
        )
    return source


def _learned_from(source: Source, path: Path, settings: Settings) -> set[str]:
    """Return the classes that the run has learned from these very images, by their names."""
    known = [entry for entry in folder.metrics(path) if entry["source"] == source.name]
    live = folder.classes(path, folder.last_task(path))  # a retired class may come back
    again = [
        (e, splits.part(source, e["name"], e["classes"], e.get("domains", ()), settings))
        for e in known
    ]
    return {
        c
        for entry, part in again
        if part and splits.trained_on(part) == entry["trained_on"]
        for c in entry["classes"]
        if c in live
    }


def adapter(path: Path, run: Path) -> None:
    """Check that a run takes an adapter.

    Raises:
        InputError: if the folder holds no adapter.
        UsageError: if the run's method has no place for one.
    """
    settings = folder.require_begun(run)
    if settings.method.method != "sdlora" or settings.method.directions == "shared":
        setting = (
            f"directions {settings.method.directions}"
            if settings.method.method == "sdlora"
            else f"method {settings.method.method}"
        )
        raise UsageError(
            f"{run} was begun with {setting}, which has no place for another direction:"
            " begin a run without it"
        )
    if not (path / "adapter_config.json").is_file():
        raise InputError(
            f"{path} holds no adapter_config.json: name the folder that peft's save_pretrained"
            " has made"
        )


def evaluation(
    path: Path, images: str, task: int | None, max_megapixels: int | None = None
) -> Source:
    """Return the images that a run's state is scored on.

    Raises:
        UsageError: if the run does not know the task, or a class of the images.
        InputError: if the folder is not a run, or the images cannot be read.
    """
    settings = folder.require_begun(path)
    task = folder.require_task(path, task)
    source = splits.load_for(settings, images)
    names = folder.names_after(folder.metrics(path), source.name, task)
    labels = [names.get(label, label) for label, own in source.test.items() if own]
    known = [label for label in labels if label is not None]
    folder.require_known(known, path, task, images)
    return limited(source, max_megapixels)


def unknown(
    path: Path, images: str, task: int | None, max_megapixels: int | None = None
) -> UnknownImages:
    """Return images of classes that a run's state does not know.

    Raises:
        UsageError: if the run does not know the task.
        InputError: if the folder is not a run, or the images cannot be read.
    """
    settings = folder.require_begun(path)
    classes = folder.classes(path, folder.require_task(path, task))
    most = max_megapixels or settings.data.max_megapixels
    kind = kind_of(settings.backbone.backbone)
    return unknown_images.find(images, {c for c in classes if c is not None}, most * 10**6, kind)


def limited(source: Source, max_megapixels: int | None) -> Source:
    """The same images with another bound on their pixels; None leaves the run's own."""
    if max_megapixels is None:
        return source
    return source.changed(lambda item: item.limited(max_megapixels * 10**6))


def report(path: Path, out: Path) -> None:
    """Check that a report can be made, and written to `out`.

    Raises:
        UsageError: if `out` is a folder.
        InputError: if the folder is not a run, or has no scored task yet.
    """
    folder.require_begun(path)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file, such as {out / 'report.html'}")
    if not folder.metrics(path):
        raise InputError(
            f"{path} has no scored task yet: go on with sdlora-edge train --run {path}"
        )
