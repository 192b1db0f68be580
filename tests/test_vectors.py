"""The test vectors of docs/packet.md, for this library and for a reader written from the page."""

from __future__ import annotations

import ast
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
import vectors_file
import vectors_image
import vectors_reader
from vectors_run import FOLDER, INDEX, VECTORS, Stand, Subject, flash_reader, wrong, wrong_image

from sdlora_edge.device import Device
from sdlora_edge.errors import SdloraError
from sdlora_edge.formats.canonical import tensors_digest
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.text import Tokenization


@dataclass
class Library:
    """This package's device."""

    device: Device

    def apply(self, packet: Path) -> int:
        try:
            self.device.apply(packet)
        except SdloraError as error:
            return error.exit_code
        return 0

    def rollback(self) -> None:
        self.device.rollback()

    def stand(self) -> Stand:
        state, weights = self.device.current()
        head = {name: weights.pop(name) for name in ("head.weight", "head.bias")}
        dtypes = {
            name: entry["dtype"] for name, entry in self.device.bundle.manifest.weights.items()
        }
        factors = {
            f"{k}.{name}.{part}": np.ascontiguousarray(getattr(f, part), np.float32)
            for k, task in enumerate([*self.device.bundle.factors, *self.device._live.factors], 1)
            for name, f in task.items()
            for part in "AB"
        }
        return Stand(
            state.digest,
            self.device.trust.version,
            list(state.classes),
            tensors_digest(head),
            tensors_digest(factors),
            {name: w.astype(dtypes[name]) for name, w in weights.items()},
            lambda logits, features: _answer(state.confidence, logits[None], features[None]),
        )


def _answer(
    confidence: Confidence, logits: np.ndarray, features: np.ndarray
) -> tuple[float, bool, np.ndarray]:
    (score,), (known,) = (
        confidence.scores(logits, features),
        confidence.known(logits, features),
    )
    return float(score), bool(known), confidence.probabilities(logits)[0]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Subject]:
    """Makes a device of a bundle; each bundle is proved once."""
    folder = tmp_path_factory.mktemp("stores")
    made: list[Path] = []

    def flash(bundle: Path) -> Subject:
        if not (flashed := folder / bundle.name).exists():
            Device.init(bundle, flashed)
        made.append(folder / f"{len(made)}")
        return Library(Device.open(shutil.copytree(flashed, made[-1])))

    return flash


def named(vector: dict[str, Any]) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("vector", VECTORS, ids=named)
def test_this_library(vector: dict[str, Any], stores: Callable[[Path], Subject]) -> None:
    assert not wrong(vector, stores)


@pytest.mark.parametrize("vector", VECTORS, ids=named)
def test_the_reader_written_from_the_page(vector: dict[str, Any]) -> None:
    assert not wrong(vector, lambda bundle: flash_reader(vars(vectors_reader), bundle))


@pytest.mark.parametrize("entry", INDEX["images"], ids=lambda entry: str(entry["tensor"]))
def test_an_image_becomes_the_same_tensor_here_and_by_the_page(entry: dict[str, Any]) -> None:
    """To the bit: no step of it depends on the machine."""
    prepare = Preprocessing.from_manifest(entry["preprocessing"])
    ours = prepare.normalise(prepare.pixels(FOLDER / "images" / entry["image"])[None])
    assert not wrong_image(entry, lambda data, preprocessing: ours)
    assert not wrong_image(entry, vectors_image.pictures)


@pytest.mark.parametrize("batch", INDEX["texts"], ids=lambda batch: str(batch["texts"][0]))
def test_texts_become_the_same_ids_here_and_by_the_page(batch: dict[str, Any]) -> None:
    folder = FOLDER / "bundles" / batch["bundle"]
    manifest = json.loads((folder / "manifest.json").read_text())["preprocessing"]
    prepare = Tokenization.from_manifest(manifest, folder)
    arrays = prepare.arrays(np.stack([prepare.item(text) for text in batch["texts"]]))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        name: batch[name] for name in ("input_ids", "attention_mask")
    }
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(manifest["length"])
    ids = [tokenizer.encode(text[: 64 * manifest["length"]]).ids for text in batch["texts"]]
    longest = max(map(len, ids))
    filled = [own + [manifest["padding"]] * (longest - len(own)) for own in ids]
    assert batch["input_ids"] == filled
    assert batch["attention_mask"] == [[int(i < len(own)) for i in range(longest)] for own in ids]


@pytest.mark.parametrize("module", [vectors_file, vectors_image, vectors_reader])
def test_the_reader_uses_nothing_of_this_library(module: ModuleType) -> None:
    tree = ast.parse(Path(module.__file__ or "").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {*sys.stdlib_module_names, "numpy", "cryptography", "vectors_file"}
    assert {name.split(".")[0] for name in imported} <= allowed


def test_every_packet_and_bundle_is_part_of_a_vector() -> None:
    used = {
        f"{step['packet']}.sdlora"
        for vector in VECTORS
        for step in vector["steps"]
        if "packet" in step
    }
    assert {path.name for path in (FOLDER / "packets").iterdir()} == used
    assert {path.name for path in (FOLDER / "bundles").iterdir()} == {
        vector["bundle"] for vector in VECTORS
    }
    assert {step["exit"] for vector in VECTORS for step in vector["steps"]} == {0, 3, 4, 5, 6, 7}


def test_make_writes_the_same_bytes_again(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent / "attacks")}
    subprocess.run([sys.executable, FOLDER / "make.py", tmp_path], check=True, env=environment)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    there = {
        path.relative_to(FOLDER)
        for path in FOLDER.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert made == {path for path in there if path.suffix != ".py"}
    assert not [
        path for path in made if not filecmp.cmp(tmp_path / path, FOLDER / path, shallow=False)
    ]
    assert sum((FOLDER / path).stat().st_size for path in made) < 1_000_000
