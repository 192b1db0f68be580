"""Somebody who serves another repository under the same URL, and holds some of its keys."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fleet_kit import Made
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from sdlora_edge.fleet.rollout import Plan
from sdlora_edge.fleet.targets import SIGNED_AT
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.signing import load_signer

LATER = datetime(2099, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Thief:
    """A copy of a repository in `folder`, and the keys that were stolen: {role: signers}."""

    folder: Path
    signers: Mapping[str, list[Any]]

    @classmethod
    def of(cls, site: Made, folder: Path, *roles: str) -> Thief:
        """Copy a repository as it is now, and take the keys of these roles."""
        shutil.copytree(site.path, folder)
        return cls(folder, {r: [load_signer(path) for path in site.keys[r]] for r in roles})

    def newest(self, role: str) -> Metadata[Any]:
        """What the copy holds of a role."""
        return Metadata.from_bytes(self.path(role).read_bytes())

    def path(self, role: str, version: int = 0) -> Path:
        """The file of a role's version; of the newest for 0."""
        folder = self.folder / "metadata"
        if role == "timestamp":
            return folder / "timestamp.json"
        found = sorted(int(p.name.split(".")[0]) for p in folder.glob(f"*.{role}.json"))
        return folder / f"{version or found[-1]}.{role}.json"

    def sign(self, role: str, signed: Any) -> bytes:
        """Sign metadata with the stolen keys of a role, and put it among the files."""
        metadata = Metadata(signed)
        for signer in self.signers[role]:
            metadata.sign(signer, append=True)
        data = metadata.to_bytes()
        self.path(role, signed.version).write_bytes(data)
        return data

    def settle(
        self,
        meta: Mapping[str, MetaFile] | None = None,
        snapshot: int = 0,
        timestamp: int = 0,
        signed_at: int = 0,
    ) -> None:
        """Sign a snapshot, with other entries, and a timestamp. 0: the next version; no time."""
        old: Snapshot = self.newest("snapshot").signed
        listed = {**old.meta, **(meta or {})}
        new = Snapshot(snapshot or old.version + 1, expires=LATER, meta=listed)
        self.stamp(new.version, self.sign("snapshot", new), timestamp, signed_at)

    def stamp(
        self, snapshot: int, data: bytes | None = None, timestamp: int = 0, signed_at: int = 0
    ) -> None:
        """Sign a timestamp of a snapshot."""
        old: Timestamp = self.newest("timestamp").signed
        data = data or self.path("snapshot", snapshot).read_bytes()
        entry = MetaFile.from_data(snapshot, data, ["sha256"])
        new = Timestamp(timestamp or old.version + 1, expires=LATER, snapshot_meta=entry)
        if signed_at:
            new.unrecognized_fields[SIGNED_AT] = signed_at
        self.sign("timestamp", new)

    def roll_out(self, plan: Plan, extra: Mapping[str, bytes] | None = None) -> None:
        """Sign a plan, and whatever else the role `rollout` may list."""
        old: Targets = copy.deepcopy(self.newest("rollout").signed)
        files = {f"rollout/{plan.channel}.json": plan.to_json(), **(extra or {})}
        for path, data in files.items():
            old.targets[path] = TargetFile.from_data(path, data, ["sha256"])
            self.put(path, data)
        self.rollout(replace_version(old))

    def rollout(self, signed: Targets) -> None:
        """Put metadata of the role `rollout` in force."""
        signed.expires = LATER
        data = self.sign("rollout", signed)
        self.settle({"rollout.json": MetaFile.from_data(signed.version, data, ["sha256"])})

    def put(self, path: str, data: bytes) -> None:
        """A file of a target."""
        folder, _, name = path.rpartition("/")
        place = self.folder / "targets" / folder / f"{sha256(data)}.{name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def replace_version(signed: Targets) -> Targets:
    """The same metadata, one version later."""
    signed.version += 1
    return signed


def with_steps(plan: Plan, *steps: Any) -> Plan:
    """The plan with other steps."""
    return replace(plan, steps=tuple(steps))
