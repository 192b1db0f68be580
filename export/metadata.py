"""What an exported model says about itself in its `metadata_props`, for people who open it in Netron or another tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.canonical import dump_json

PREFIX = "sdlora_edge."
_FIELDS = (
    "lineage",
    "state",
    "task",
    "task_name",
    "model",
    "precision",
    "weights_as",
    "capacity",
    "classes",
    "preprocessing",
)


def metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a `Manifest` that say what a model is and how its images are prepared: texts as they are, the rest as JSON.

    Not the bundle's id: that is the digest of the manifest, which holds the digest of the very file these lines stand in.
    Lineage, state and task name the same model. They are for reading: devices believe the manifest alone.
    """
    values = {name: manifest[name] for name in _FIELDS}
    return {
        PREFIX + name: value if isinstance(value, str) else dump_json(value).decode()
        for name, value in values.items()
    }
