"""`sdlora-edge bundle`: show a bundle, or compare it with its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from . import arguments
from .help import CONTEXT, Command, Group
from .output import Json, Line, emit, facts, spaced, table

if TYPE_CHECKING:
    from ..formats.bundle import Bundle

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Show a bundle, or compare it with its run.",
)


@app.command(cls=Command)
def inspect(bundle: arguments.Bundle, all: arguments.All = False, json: Json = False) -> None:
    """Compare every file with the manifest, then show what the bundle holds."""
    from ..formats.bundle import open_bundle

    value = _described(open_bundle(bundle))
    emit(value, json, lambda: _everything(value) if all else _summary(value))


@app.command(cls=Command)
def check(
    bundle: arguments.Bundle,
    run: arguments.Run = None,
    tolerance: arguments.Tolerance = None,
    min_agreement: arguments.MinAgreement = None,
    json: Json = False,
) -> None:
    """Prove again that a bundle computes what torch computes for its run."""
    from ..export import requests
    from ..formats.bundle import open_bundle
    from ..train.folder import newest

    path = run or newest()
    opened = open_bundle(bundle)
    requests.require_bounds(tolerance, min_agreement)
    requests.require_same_run(opened, path)
    from ..export.bundles import check_bundle  # torch, which takes seconds, comes after the checks
    from ..export.parity import CheckedBundle
    from ..train.run import Run

    same = Run.open(path).encoded(opened.manifest.encoding)
    value = CheckedBundle(bundle, check_bundle(same, bundle, tolerance, min_agreement))
    emit(value, json, lambda: facts(value, "bundle", *PROOF))


PROOF = ("images", "agreement", "largest_difference", "largest_logit")
"""What a comparison with torch found."""


def _described(bundle: Bundle) -> dict[str, Any]:
    """The manifest without the canary's numbers, with the id and the keys."""
    from json import loads

    from ..inputs.modality import preparation

    manifest = bundle.manifest
    fields = loads(manifest.to_json())
    canary = fields.pop("canary")
    shown = {
        "bundle": str(bundle.path),
        "id": bundle.id,
        "bytes": sum(f["size"] for f in fields["files"].values()),
        "lineage": manifest.lineage,
        "state": manifest.state,
        "task": manifest.task,
        "classes": list(bundle.state.classes),
        **fields,
        "tolerance": manifest.tolerance,
        "min_agreement": manifest.min_agreement,
        "magnitudes": list(manifest.magnitudes),
    }
    confidence = bundle.state.confidence
    answers = {
        "temperature": float(confidence.temperature[0]),
        "threshold": confidence.least,
        "components": len(confidence.scale),
    }
    trust = {"threshold": bundle.trust.threshold, "keys": [key.keyid for key in bundle.trust.keys]}
    return shown | {
        "answers": answers,
        "reads": preparation(manifest.preprocessing, bundle.path).described,
        "canary": {"seed": canary["seed"], "images": canary["count"]},
        "trust": trust,
    }


def _summary(value: dict[str, Any]) -> list[Line]:
    """What fits on a screen of 24 lines and 80 columns."""
    canary, trust = value["canary"], value["trust"]
    answers, least = value["answers"], value["answers"]["threshold"]
    shown = {
        **{name: value[name] for name in ("bundle", "id", "lineage", "state")},
        "model": f"{value['model']} ({value['target']}, {value['precision']}, "
        f"weights as {value['weights_as']}, features: {value['features']})",
        "task": f"{value['task']} ({value['task_name']})",
        "classes": listed(value["classes"])
        + (f" (room for {value['capacity']})" if value["capacity"] else ""),
        "reads": value["reads"],
        "answers": f"temperature {answers['temperature']:.4g}, "
        + ("nothing is unknown" if least is None else f"unknown below a score of {least:.4g}"),
        "projections": listed([p["name"] for p in value["projections"]]),
        "packets": f"factors in {value['encoding']}",
        "canary": f"{canary['images']} inputs, tolerance {value['tolerance']:.1e}",
        "trust": f"{trust['threshold']} of {listed([key[:12] for key in trust['keys']])}",
        "made with": ", ".join(f"{name} {v}" for name, v in value["made_with"].items()),
    }
    return spaced(
        [
            facts({name: shortened(v) for name, v in shown.items()}, *shown),
            table(FILES, _files(value["files"])),
            ["--all shows every field, projection and weight"],
        ]
    )


def listed(names: list[Any]) -> str:
    """How many there are, and the first of them."""
    return f"{len(names)}: {', '.join(map(str, names[:4]))}" + (", ..." if len(names) > 4 else "")


def shortened(text: Any, width: int = 66) -> str:
    """The text, cut so that a line of a summary fits on 80 columns. A digest fits whole."""
    text = str(text)
    return text if len(text) <= width else f"{text[: width - 4]} ..."


FILES = ("file", "bytes", "sha256")


def _everything(value: dict[str, Any]) -> list[Line]:
    tables: dict[str, tuple[tuple[str, ...], Callable[[Any], list[list[str]]]]] = {
        "projections": (("projection", "tensor", "rows", "shape"), _projections),
        "weights": (("weight", "dtype", "shape", "file", "at byte"), _weights),
        "files": (FILES, _files),
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
