"""What an exported model says about itself, for people who open it in Netron or another tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.canonical import dump_json
from ..state import TaskState

PREFIX = "sdlora_edge."
_FIELDS = ("task_name", "model", "features", "precision", "weights_as", "capacity", "preprocessing")


def metadata(manifest: Mapping[str, Any], state: TaskState) -> dict[str, str]:
    """The model's `metadata_props`: what it is, and how its images are prepared.

    Values that are not texts are written as JSON. The bundle's id is missing: it is the digest of
    the manifest, which holds the digest of the file that these lines stand in. Lineage, state and
    task name the same model. Only people read these lines: devices read the manifest.

    Args:
        manifest: The fields of a `Manifest`.
        state: The exported state.
    """
    values = {
        "lineage": (*state.before, state.digest)[0],
        "state": state.digest,
        "task": state.task,
        "classes": list(state.classes),
        **{name: manifest[name] for name in _FIELDS},
    }
    return {
        PREFIX + name: value if isinstance(value, str) else dump_json(value).decode()
        for name, value in values.items()
    }
