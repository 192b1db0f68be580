"""How the commands of `sdlora-edge fleet` show their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .output import Line, table

if TYPE_CHECKING:
    from ..fleet.enforcing import Publication
    from ..fleet.overview import RepositoryStatus


def published(value: Publication) -> list[Line]:
    lines: list[Line] = [f"added {path}" for path in value.added]
    lines += [f"removed {path}" for path in value.removed]
    lines.append(f"{value.role} version {value.version}")
    if value.staged:
        lines.append(
            f"signed by {value.signatures} of the {value.threshold} keys needed: "
            f"add others with sdlora-edge fleet sign {value.role}"
        )
    elif not value.visible:
        lines.append("devices see it after sdlora-edge fleet refresh")
    return lines


def overview(value: RepositoryStatus) -> list[Line]:
    roles = [
        [
            name,
            str(role.version),
            role.expires[:10],
            str(role.days),
            f"{role.threshold} of {len(role.keys)}",
            "yes" if role.staged else "",
        ]
        for name, role in value.roles.items()
    ]
    targets = [
        [
            *(one.kind, one.lineage[:12], str(one.sequence), str(one.revision)),
            *(one.name, one.digest[:12], str(one.bytes)),
        ]
        for one in value.targets
    ]
    lines = table(["role", "version", "expires", "days", "keys", "staged"], roles)
    if targets:
        head = ["kind", "lineage", "task", "revision", "name", "digest", "bytes"]
        lines += ["", *table(head, targets)]
    for plan in value.channels.values():
        lines += ["", *steps(plan.to_dict())]
    if not value.settled:
        lines += ["", "devices do not see all of it yet: run sdlora-edge fleet refresh"]
    return lines


def steps(plan: Mapping[str, Any]) -> list[Line]:
    """The steps of a plan as a table."""
    rows = []
    for step in plan["steps"]:
        waves = [f"[{w}]" if i == step["wave"] else str(w) for i, w in enumerate(step["waves"])]
        groups = ", ".join(step["groups"])
        rows.append(
            [
                *(str(step["sequence"]), step["packet"][:12], step["status"], " ".join(waves)),
                *(groups, f"{step['success']} / {step['error']}", step["reason"]),
            ]
        )
    head = ["task", "packet", "status", "waves in %", "groups", "success / error", "reason"]
    return [f"channel {plan['channel']}", *table(head, rows)]
