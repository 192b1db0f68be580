"""Images that the device does not know, kept so that a person can bring them home.

    FOLDER/unknown-20261129T100000-1f6c90.json   features, score, guess: written first
    FOLDER/unknown-20261129T100000-1f6c90.jpg    the image (`Preparation.kept`); a text is a .txt

Nothing is sent. Only what looks new is kept: an image whose features are as close as NEAR to those
of a kept one is left out. If the folder is full, the oldest images are removed. What somebody takes
out of the folder is forgotten, and what else lies in it is left alone.

Keeping never stops the agent. If the disk is full or `blur` fails, nothing is kept for a while.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..device.answers import Answered
from ..device.store import store_around
from ..errors import HealthError, InputError, ResourceError, SdloraError, UsageError
from ..formats.canonical import parse_json
from ..inputs.image import Preprocessing
from ..inputs.image_files import ImageLike
from ..inputs.modality import Preparation
from ..storage import atomic, disk

log = logging.getLogger("sdlora_edge")
NEAR = 0.25
"""Cosine distance of features below which two images are alike (docs/guides/unknown-images.md)."""
LEAST_FREE = 64 << 20
"""bytes of the disk that are left for updates"""
PAUSE = 60.0
"""seconds after a failure before an image is kept again"""
_NAME = re.compile(r"unknown-(\d{8})T\d{6}-[0-9a-f]{6}")
_FACTS_LIMIT = 1 << 18
FACTS = ".json"
Blur = Callable[[Any], Any]
"""Gets a Pillow image (8-bit RGB) or a text, and returns the one to keep."""


@dataclass(frozen=True)
class _Kept:
    """size: bytes of both files. features: unit length; None if they cannot be read."""

    size: int
    features: np.ndarray | None


class Unknowns:
    """Call it with each image and its answer. One thread at a time.

    Args:
        folder: Where to keep them; it is made for this user alone.
        megabytes: Of all files together.
        per_day: Images kept in a day (UTC), at most.
        blur: None keeps an image as it is.
        kind: Returns what the model reads. It is called once there is an answer.

    Attributes:
        kept, left_out: Numbers of unknown images since the start: kept, and not kept because they
            look like a kept one, because of the limit of the day, or because their file has gone.

    Raises:
        UsageError: The folder lies in a store, or other users can read it.
        StorageError: It cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        megabytes: float = 100,
        per_day: int = 50,
        blur: Blur | None = None,
        kind: Callable[[], type[Preparation]] = lambda: Preprocessing,
    ) -> None:
        self._folder, self._blur, self._kind = folder, blur, kind
        self._most, self._per_day = int(megabytes * 1e6), per_day
        self.kept = self.left_out = 0
        self._changed, self._files = -1, dict[str, _Kept]()
        self._today, self._of_today = "", 0
        self._paused = -np.inf
        _make(folder)
        with contextlib.suppress(HealthError):  # no model is served yet: later
            self._look()

    def __call__(self, image: ImageLike, answered: Answered) -> None:
        """Keep an image if it is unknown and looks new."""
        if answered.prediction.known or time.monotonic() < self._paused:
            return
        try:
            if answered.features is None:
                raise UsageError("this bundle's model has no output `features`: export it again")
            self._look()
            features = _unit(answered.features)
            if self._is_full_today() or self._is_like_a_kept_one(features):
                self.left_out += 1
                return
            try:
                data = self._kind().kept(image, self._blur)
            except InputError:  # a file of a camera's folder has gone meanwhile
                self.left_out += 1
                return
            self._keep(data, features, answered)
            self.kept += 1
        except Exception as error:
            known = str(error) if isinstance(error, SdloraError) else repr(error)
            log.warning("what is unknown is not kept for %g s: %s", PAUSE, known)
            self._paused = time.monotonic() + PAUSE

    def _look(self) -> None:
        """Notice what has been put into the folder, or taken out of it."""
        with atomic.reading(self._folder):
            changed = os.stat(self._folder).st_mtime_ns
            if changed == self._changed:
                return
            names = disk.names(self._folder)
            suffix, pairs = self._kind().suffix, [os.path.splitext(name) for name in names]
            for stem, end in pairs:
                if _NAME.fullmatch(stem) and end == FACTS and f"{stem}{suffix}" not in names:
                    disk.unlink(self._folder / f"{stem}{end}")  # its image is gone, or never was
            stems = [stem for stem, end in pairs if end == suffix and _NAME.fullmatch(stem)]
            self._files = {stem: self._files.get(stem) or self._read(stem) for stem in stems}
            self._changed = changed

    def _read(self, stem: str) -> _Kept:
        size = sum(disk.size(path) or 0 for path in self._both(stem))
        try:
            return _Kept(size, read_features(self._folder / f"{stem}{FACTS}"))
        except InputError:
            return _Kept(size, None)

    def _both(self, stem: str) -> list[Path]:
        """The image, and what is known of it."""
        return [self._folder / f"{stem}{end}" for end in (self._kind().suffix, FACTS)]

    def _is_full_today(self) -> bool:
        today = datetime.now(timezone.utc).strftime("%Y%m%d")
        if today != self._today:
            found = [_NAME.fullmatch(stem) for stem in self._files]
            self._today, self._of_today = today, sum(m is not None and m[1] == today for m in found)
        return self._of_today >= self._per_day

    def _is_like_a_kept_one(self, features: np.ndarray) -> bool:
        return any(
            one.features is not None
            and one.features.shape == features.shape
            and 1 - float(one.features @ features) < NEAR
            for one in self._files.values()
        )

    def _keep(self, data: bytes, features: np.ndarray, answered: Answered) -> None:
        moment = datetime.now(timezone.utc)
        stem = f"unknown-{moment:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        facts = described(features, answered, moment)
        self._make_room(len(data) + len(facts))
        path = self._folder / f"{stem}{self._kind().suffix}"
        atomic.place(path.with_suffix(FACTS), facts, 0o600)
        atomic.write(path, data, 0o600)
        self._files[stem] = _Kept(len(data) + len(facts), features)
        self._of_today += 1
        self._changed = os.stat(self._folder).st_mtime_ns

    def _make_room(self, size: int) -> None:
        """Remove the oldest images. Raises ResourceError if the disk is nearly full."""
        if size > self._most:
            raise UsageError(f"one {self._kind().noun} takes {size} bytes: raise --keep-mb")
        while sum(one.size for one in self._files.values()) + size > self._most:
            oldest = min(self._files)
            for path in self._both(oldest):  # the image first: facts alone are removed by `_look`
                with contextlib.suppress(FileNotFoundError):
                    disk.unlink(path)
            del self._files[oldest]
        found = os.statvfs(self._folder)
        if (free := found.f_bavail * found.f_frsize - size) < LEAST_FREE:
            raise ResourceError(
                f"{self._folder}: {max(0, free) >> 20} MiB would be left on the disk, fewer than "
                f"the {LEAST_FREE >> 20} kept for updates: free some"
            )


def described(features: np.ndarray, answered: Answered, moment: datetime) -> bytes:
    """What is kept beside an image."""
    value = {
        "time": moment.isoformat(timespec="seconds"),
        "features": base64.b64encode(features.astype("<f2").tobytes()).decode(),
        **answered.prediction.to_dict(),
    }
    return json.dumps(value).encode()


def read_features(image: Path) -> np.ndarray:
    """The features beside a kept image: float32, of unit length. Raises InputError."""
    path = image.with_suffix(FACTS)
    value = parse_json(atomic.receive(path, _FACTS_LIMIT), str(path))
    try:
        found = np.frombuffer(base64.b64decode(value["features"], validate=True), "<f2")
        return _unit(found)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no features: remove it, and what it belongs to") from error


def _unit(features: np.ndarray) -> np.ndarray:
    """The same direction with a length of 1."""
    wide = features.astype(np.float32)
    length = float(np.linalg.norm(wide))
    if not np.isfinite(length) or not length:
        raise ValueError("these features have no direction")
    found: np.ndarray = wide / length
    return found


def _make(folder: Path) -> None:
    if store := store_around(folder):
        raise UsageError(
            f"--keep-unknown {folder} lies in the store {store}: choose a folder outside it"
        )
    try:
        if disk.size(folder) is None:
            atomic.make_folder(folder.parent)
            disk.mkdir(folder, 0o700)
            atomic.keep_name(folder)
        if (mode := os.stat(folder).st_mode) & 0o077:
            raise UsageError(
                f"--keep-unknown {folder}: other users may open it (mode {mode & 0o777:o}): "
                f"run chmod 700 {folder}, or name a new folder"
            )
    except OSError as error:
        raise atomic.unwritten(folder, error) from error


def blur_of(place: str) -> Blur:
    """The function of `--blur module:function`. Raises UsageError."""
    module, _, name = place.partition(":")
    try:
        found: Blur = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(
            f"--blur {place}: {error}: give MODULE:FUNCTION, and name the folder of the module in "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"--blur {place}: this is no function: give MODULE:FUNCTION")
    return found
