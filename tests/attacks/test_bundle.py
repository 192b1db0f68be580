"""Bundles whose manifest or files were changed, with digests that fit: a bundle is not signed, but a
fault in it must be an InputError when it is opened, not a crash weeks later."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from conftest import Fleet, with_file
from sdlora_edge.export.bundles import export_bundle

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError
from sdlora_edge.formats.bundle import CLASSES, FACTORS, HEAD_BIAS, MANIFEST, open_bundle
from sdlora_edge.formats.canonical import dump_json
from sdlora_edge.train.run import Run

Change = Callable[[dict[str, Any]], Any]


def changed(bundle: Path, folder: Path, change: Change) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    (folder / MANIFEST).write_bytes(dump_json(manifest))
    return folder


def projection(field: str, value: Any) -> Change:
    return lambda manifest: manifest["projections"][0].update({field: value})


def a_state_again(manifest: dict[str, Any]) -> None:
    manifest["states"].append(manifest["states"][0])
    manifest["revisions"].append(0)
    manifest["magnitudes"].append(1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (projection("name", 5), "name: 5 is not a text"),
        (projection("tensor", "x" * 201), "at most 200 characters"),
        (projection("more", 1), "'more' is missing or unknown"),
        (projection("rows", [-1, 63]), "is not an integer"),
        (projection("name", "head.x"), "only tensors of the head"),
        (lambda m: m["projections"].append(m["projections"][0]), "two projections have one name"),
        (a_state_again, "a state is named twice"),
        (lambda m: m["weights"][HEAD_BIAS].update(dtype="float16"), "must be float32"),
    ],
)
def test_a_manifest_with_a_field_that_no_export_writes(
    fleet: Fleet, tmp_path: Path, change: Change, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        open_bundle(changed(fleet.bundle, tmp_path / "bundle", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("crop_mode"),
        lambda p: p.update(more=1),
        lambda p: p.update(size=2**53 - 1),
        lambda p: p.update(mean=[2**53 - 1] * 3),
        lambda p: p.update(std=[0, 1, 1]),
    ],
)
def test_preprocessing_with_a_field_too_many_too_few_or_out_of_bounds(
    fleet: Fleet, tmp_path: Path, change: Change
) -> None:
    bundle = changed(fleet.bundle, tmp_path / "bundle", lambda m: change(m["preprocessing"]))
    with pytest.raises(InputError, match="preprocessing"):
        Device.init(bundle, tmp_path / "store")


def test_classes_with_another_field(fleet: Fleet, tmp_path: Path) -> None:
    value = json.loads((fleet.bundle / CLASSES).read_bytes())
    for field in (1, 0.5):
        data = dump_json({**value, "more": field})
        with pytest.raises(InputError, match=r"unknown field 'more'|not an integer"):
            open_bundle(with_file(fleet.bundle, tmp_path / str(field), CLASSES, data))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16"])
def test_factors_of_a_dtype_that_numpy_does_not_have(
    fleet: Fleet, tmp_path: Path, dtype: str
) -> None:
    header = dump_json({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}})
    header += b" " * (-len(header) % 8)
    data = struct.pack("<Q", len(header)) + header + bytes(2)
    with pytest.raises(InputError):
        open_bundle(with_file(fleet.bundle, tmp_path / "bundle", FACTORS, data))


def test_factors_that_do_not_fit_are_found_when_the_bundle_is_opened(
    fleet: Fleet, tmp_path: Path
) -> None:
    """They were used, and a ValueError, once a later task changed their magnitudes."""
    bundle = export_bundle(Run.open(fleet.run), tmp_path / "late", 1, [])
    assert bundle
    stored = safetensors.numpy.load_file(tmp_path / "late" / FACTORS)
    name = next(name for name in sorted(stored) if name.endswith(".A"))
    assert name.startswith("1.")
    for place, wrong in enumerate(
        (
            stored[name][:, :-1],
            stored[name][:0],
            stored[name].astype("f8"),
            stored[name][0],
            stored[name] * float("nan"),
        )
    ):
        data = safetensors.numpy.save({**stored, name: wrong.copy()})
        folder = with_file(tmp_path / "late", tmp_path / str(place), FACTORS, data)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            open_bundle(folder)
