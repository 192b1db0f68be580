"""What the fleet repository says of each published file, as custom metadata of a TUF target.

    packets/<kind>-<sequence>-r<revision>-<digest>.sdlora    signed packets of all kinds
    bundles/<bundle id>/<file>                                    files of a bundle
    rollout/<channel>.json                                        `rollout.Plan`, by role `rollout`

Only what the offline role `targets` lists is a packet or a bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..formats.container import SUFFIX
from ..formats.fields import digest, either, one_of, record, text, whole
from ..formats.limits import LIMITS
from ..results import Result
from .rollout import Edge

UPDATE, TRUST, REVOCATION, BUNDLE = "update", "trust", "revocation", "bundle"
PACKETS, BUNDLES, ROLLOUTS = "packets/", "bundles/", "rollout/"
ROLLOUT_ROLE = "rollout"
SIGNED_AT = "x-sdlora-signed-at"
"""Field of the timestamp's signed part: Unix seconds when it was signed."""


@dataclass(frozen=True)
class Published(Result):
    """Custom metadata of a packet, or of a bundle's manifest.

    Attributes:
        kind: UPDATE, TRUST, REVOCATION or BUNDLE.
        lineage: State digest S_0. Empty for TRUST, which belongs to no lineage.
        begin: Of an update: state digest that it follows. Empty otherwise.
        end: Of an update: state digest that it leads to. Of a bundle: of its state.
        sequence: Last task of an update or a bundle; revoked task; version of the keys.
        revision: Of that task.
        name: Of that task. Of a bundle: target and precision, such as "onnx fp32".
    """

    kind: str
    lineage: str
    begin: str
    end: str
    sequence: int
    revision: int
    name: str

    @classmethod
    def from_custom(cls, custom: Any) -> Published:
        """Read custom metadata. Raises InputError."""
        try:
            _PUBLISHED(custom)
            return cls(**custom)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"custom metadata of a target is malformed: {error}") from error

    def path(self, data_digest: str) -> str:
        """Target path of a packet with this SHA-256."""
        version = f"{self.kind}-{self.sequence:04d}-r{self.revision}"
        return f"{PACKETS}{version}-{data_digest[:12]}{SUFFIX}"


_STATE = either(digest, one_of(""))
_PUBLISHED = record(
    {
        "kind": one_of(UPDATE, TRUST, REVOCATION, BUNDLE),
        "lineage": _STATE,
        "begin": _STATE,
        "end": _STATE,
        "sequence": whole(0, LIMITS.sequence),
        "revision": whole(0, LIMITS.revision),
        "name": text(),
    }
)


@dataclass(frozen=True)
class Target:
    """A published file: its path, bytes and digest, as the role `targets` signed them."""

    path: str
    size: int
    digest: str
    published: Published

    @property
    def edge(self) -> Edge:
        """The target as an edge between states; meaningful for updates alone."""
        return Edge(self.path, self.published.begin, self.published.end, self.size)
