"""Runs something that applies packets through the test vectors, and says where it goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy

FOLDER = Path(__file__).resolve().parent / "vectors"
INDEX: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text())
VECTORS: list[dict[str, Any]] = INDEX["vectors"]


@dataclass
class Stand:
    """Where a device stands. head, factors: tensors. weights: W_t. answer: of logits and features."""

    state: str
    trust_version: int
    classes: list[str | None]
    head: str
    factors: str
    weights: Mapping[str, np.ndarray]
    answer: Callable[[np.ndarray, np.ndarray], tuple[float, bool, np.ndarray]]


class Subject(Protocol):
    """A device."""

    def apply(self, packet: Path) -> int:
        """The exit code."""

    def rollback(self) -> None: ...

    def stand(self) -> Stand: ...


def wrong(vector: Mapping[str, Any], flash: Callable[[Path], Subject]) -> str:
    """The first step that goes wrong, and how, or "". Any exception is exit code 1."""
    subject = flash(FOLDER / "bundles" / vector["bundle"])
    for number, step in enumerate(vector["steps"], 1):
        where = f"{vector['name']}, step {number} ({step.get('packet', 'rollback')})"
        if "packet" not in step:
            subject.rollback()
        code = (
            subject.apply(FOLDER / "packets" / f"{step['packet']}.sdlora")
            if "packet" in step
            else 0
        )
        if code != step["exit"]:
            return f"{where}: exit code {code}, not {step['exit']}"
        if code and step is not vector["steps"][-1]:
            continue  # what a refused packet has changed is seen later
        stand, expected = subject.stand(), INDEX["states"][step["state"]]
        for name in ("state", "trust_version", "classes", "head", "factors"):
            if (found := getattr(stand, name)) != (right := step.get(name, expected.get(name))):
                return f"{where}: {name} is {found}, not {right}"
        for name, right in expected["weights"].items():
            if not np.allclose(found := fingerprint(stand.weights[name]), right, rtol=0, atol=1e-4):
                return f"{where}: {name} has {found}, not {right}"
        for right in expected["answers"]:
            given = (np.array(right[name], np.float32) for name in ("logits", "features"))
            score, known, shares = stand.answer(*given)
            same = np.allclose(score, right["score"], rtol=0, atol=1e-4)
            same &= np.allclose(shares, right["probabilities"], rtol=0, atol=1e-4)
            if not same or known != right["known"]:
                return f"{where}: {right['logits']} is worth {score, known, shares}, not {right}"
    return ""


def fingerprint(weight: np.ndarray) -> list[float]:
    """docs/packet.md, section 6."""
    rows, columns = np.indices(weight.shape)
    w = weight.astype(np.float64)
    return [float(w.sum()), float((w * ((3 * rows + 5 * columns) % 7 - 3)).sum())]


def wrong_image(
    entry: Mapping[str, Any], pictures: Callable[[bytes, dict[str, Any]], np.ndarray]
) -> str:
    """Says so if an image does not become its tensor, to the bit."""
    right = safetensors.numpy.load_file(FOLDER / "images" / f"{entry['tensor']}.safetensors")
    found = pictures(_read(FOLDER / "images" / entry["image"]), entry["preprocessing"])
    same = found.shape == right["pictures"].shape and found.tobytes() == right["pictures"].tobytes()
    return "" if same else f"image {entry['tensor']}: other pixels"


def flash_reader(module: Mapping[str, Any], bundle: Path) -> Subject:
    """The reader of `vectors_reader`, or of a module like it."""
    return _Reading(module, module["Reader"](bundle))


_read = cache(Path.read_bytes)


@dataclass
class _Reading:
    module: Mapping[str, Any]
    reader: Any

    def apply(self, packet: Path) -> int:
        try:
            self.reader.apply(_read(packet))
        except self.module["Refused"] as refused:
            return int(refused.code)
        return 0

    def rollback(self) -> None:
        self.reader.rollback()

    def stand(self) -> Stand:
        digest, s = self.module["tensors_digest"], self.reader.state
        factors = {
            f"{k}.{name}.{part}": np.ascontiguousarray(x)
            for k, task in enumerate(s.factors, 1)
            for name, pair in task.items()
            for part, x in zip("AB", pair)
        }
        head = digest({"head.weight": s.weight, "head.bias": s.bias})
        return Stand(
            s.digest,
            self.reader.trust["version"],
            s.classes,
            head,
            digest(factors),
            self.reader.merged(s),
            self.reader.answer,
        )
