"""`sdlora-edge bundle`: what a bundle holds."""

from __future__ import annotations

import json as formats
from pathlib import Path
from typing import Any

import typer

from ..bundle import Bundle, open_bundle
from .output import Json, emit, facts, table

app = typer.Typer(no_args_is_help=True, help="Look into a bundle.")
_TABLES = ("projections", "files", "preprocessing", "trust")


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
    shown = {"bundle": str(bundle.path), "id": bundle.id, "bytes": sum(f["size"] for f in fields["files"].values()), **fields}
    trust = {"threshold": bundle.trust.threshold, "keys": [key.keyid for key in bundle.trust.keys]}
    return shown | {"canary": {"seed": canary["seed"], "pictures": len(canary["logits"])}, "trust": trust}


def _text(value: dict[str, Any]) -> str:
    projections = [
        [p["name"], p["tensor"], "{}..{}".format(*p["rows"]), "{} x {}".format(*p["shape"])] for p in value["projections"]
    ]
    bytes_ = [[name, f"{f['size']:,}", f["sha256"][:16]] for name, f in sorted(value["files"].items())]
    keys = value["trust"]["keys"]
    parts = [
        facts(value, *(name for name in value if name not in _TABLES)),
        "preprocessing\n" + facts(value["preprocessing"], *value["preprocessing"]),
        table(["projection", "tensor", "rows", "shape"], projections),
        table(["file", "bytes", "sha256"], bytes_),
        f"trusted keys, of which {value['trust']['threshold']} must sign\n" + "\n".join(keys) if keys else "trusts no key: its devices can never be updated",
    ]  # fmt: skip
    return "\n\n".join(parts)
