"""Packets that a thief of the fleet's keys could sign: a good one, changed and signed again.

Nothing here refuses anything: what is wrong must be found by the reader.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdlora_edge.formats import container, signing
from sdlora_edge.formats.canonical import tensors_digest
from sdlora_edge.state import next_digest

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


def split(data: bytes) -> tuple[dict[str, Any], bytes, dict[str, Any], bytes]:
    """(envelope, payload, tensor table, data) of a well-formed packet."""
    envelope, table, content = container.opened(data)
    value = json.loads(envelope)
    return value, base64.b64decode(value["payload"]), table, content


def joined(
    envelope: str,
    table: Mapping[str, Any],
    content: bytes,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """The file around an envelope. NaN and all that Python's json knows is written too."""
    header = {
        "__metadata__": {"envelope": envelope, "format": container.FORMAT, **(metadata or {})},
        **table,
    }
    return framed(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), content)


def framed(header: bytes, content: bytes = b"") -> bytes:
    """A header's length, the header, padded, and the data."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content


def tiled(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """(tensor table, data): as `container.tiled`, of any dtype."""
    table: dict[str, Any] = {}
    content = b""
    for name in sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n)):
        array = np.ascontiguousarray(arrays[name])
        end = len(content) + array.nbytes
        table[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(np.shape(arrays[name])),
            "data_offsets": [len(content), end],
        }
        content += array.tobytes()
    return table, content


class Draft:
    """A packet's manifest and tensors, to be changed. `sealed` computes its digests again."""

    def __init__(self, packet: Path | bytes) -> None:
        _, payload, table, content = split(
            packet if isinstance(packet, bytes) else packet.read_bytes()
        )
        self.manifest: dict[str, Any] = json.loads(payload)
        self.arrays = {
            name: array.copy() for name, array in container.tensors(table, content).items()
        }

    def sealed(
        self,
        *signers: Any,
        table: Callable[[dict[str, Any]], object] = lambda table: None,
        payload: Callable[[bytes], bytes] = lambda payload: payload,
        leads: bool = True,
    ) -> bytes:
        """Return the file.

        table, payload: change what is about to be signed. leads: make `to` the state that the tasks
        lead to.
        """
        entries, content = tiled(self.arrays)
        table(entries)
        if leads and "tasks" in self.manifest:
            self.manifest["to"] = self._end() or self.manifest["to"]
        text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
        self.manifest["content"] = hashlib.sha256(text + content).hexdigest()
        manifest = json.dumps(self.manifest, sort_keys=True, separators=(",", ":")).encode()
        envelope = signing.sign(payload(manifest), list(signers)).decode()
        return joined(envelope, entries, content)

    def _end(self) -> str | None:
        """The state that the tasks lead to, where they lead anywhere."""
        try:
            tasks, digest = self.manifest["tasks"], self.manifest["from"]
            for number, task in enumerate(tasks, self.manifest["sequence"] - len(tasks) + 1):
                prefix = f"{number}."
                own = {
                    name[len(prefix) :]: array
                    for name, array in self.arrays.items()
                    if name.startswith(prefix)
                }
                fields = {f: task[f] for f in ("classes", "deltas", "renamed", "retired")}
                payload = json.dumps(
                    fields | {"tensors": tensors_digest(own)}, sort_keys=True, separators=(",", ":")
                )
                digest = next_digest(digest, hashlib.sha256(payload.encode()).hexdigest())
            return str(digest)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return None
