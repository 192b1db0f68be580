"""`sdlora-edge bundle`: what a bundle holds."""

from __future__ import annotations

import json as formats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..formats.bundle import Bundle, open_bundle
from .output import Json, emit, facts, spaced, table

app = typer.Typer(no_args_is_help=True, help="Look into a bundle.")


@app.callback()
def _group() -> None:
    pass


@app.command()
def inspect(bundle: Path, json: Json = False) -> None:
    """Compare every file with the manifest, then show it: projections, bytes, classes, preprocessing, keys."""
    value = _described(open_bundle(bundle))
    emit(value, json, lambda: _text(value))


def _described(bundle: Bundle) -> dict[str, Any]:
    """The manifest as it stands but for the canary's numbers, with the id and the keys."""
    fields = formats.loads(bundle.manifest.to_json())
    canary = fields.pop("canary")
    shown = {
        "bundle": str(bundle.path),
        "id": bundle.id,
        "bytes": sum(f["size"] for f in fields["files"].values()),
        **fields,
    }
    trust = {"threshold": bundle.trust.threshold, "keys": [key.keyid for key in bundle.trust.keys]}
    return shown | {
        "canary": {"seed": canary["seed"], "images": len(canary["logits"])},
        "trust": trust,
    }


def _text(value: dict[str, Any]) -> list[str]:
    tables: dict[str, tuple[list[str], Callable[[Any], list[list[str]]]]] = {
        "projections": (["projection", "tensor", "rows", "shape"], _projections),
        "weights": (["weight", "dtype", "shape", "file", "at byte"], _weights),
        "files": (["file", "bytes", "sha256"], _files),
    }
    others = [name for name in value if isinstance(value[name], dict) and name not in tables]
    parts = [facts(value, *(name for name in value if name not in (*tables, *others)))]
    parts += [[name.replace("_", " "), *facts(value[name], *value[name])] for name in others]
    parts += [table(head, rows(value[name])) for name, (head, rows) in tables.items()]
    return spaced(parts)


def _projections(projections: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [p["name"], p["tensor"], "{}..{}".format(*p["rows"]), "{} x {}".format(*p["shape"])]
        for p in projections
    ]


def _weights(weights: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [n, w["dtype"], " x ".join(map(str, w["shape"])), w["file"], str(w["offset"])]
        for n, w in sorted(weights.items())
    ]


def _files(files: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [[name, f"{f['size']:,}", f["sha256"][:16]] for name, f in sorted(files.items())]
