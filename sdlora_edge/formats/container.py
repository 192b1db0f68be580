"""The file that every packet is: a signed manifest and tensors. Their meaning is not known here.

    bytes 0..7     length of the header, unsigned, little endian                  } a safetensors
    header         canonical JSON, padded with spaces to a multiple of 8:         } file, so any
                   {"__metadata__": {"envelope", "format"}, tensor table}         } tool opens it
    data           the tensors, widest dtype first, then by name, without gaps

    envelope       the DSSE envelope of the manifest
    manifest       {"format": FORMAT, "kind", ..., "content": sha256(tensor table, data)}

A reader goes from the outside in: sizes, header, signatures, content digest, format, and only then
tensors. numpy only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, LimitError
from . import signing
from .canonical import dump_json, parse_exact_json, sha256
from .limits import LIMITS, Limits, natural

FORMAT = "sdlora-edge/packet/3"
SUFFIX = ".sdlora"
Sign = Callable[[bytes], bytes]
"""Puts a payload into a DSSE envelope (`signing.sign`)."""
DIMENSIONS = 2
"""Dimensions of a tensor, at most."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Sealed:
    """A file whose signatures and content have been verified, and nothing else.

    Attributes:
        digest: SHA-256 of the whole file.
    """

    manifest: Mapping[str, Any]
    table: Mapping[str, Any]
    content: bytes
    envelope: bytes
    digest: str

    def tensors(self) -> dict[str, np.ndarray]:
        """Read the tensors, as `tensors` does."""
        return tensors(self.table, self.content)


def seal(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray], sign: Sign) -> bytes:
    """Write a packet.

    Args:
        manifest: Without `format` and `content`, which are added here. No float is in it.
        arrays: The tensors by name.
        sign: Signs the manifest.

    Raises:
        LimitError: The packet is larger than any device would read.
    """
    table, data = tiled(arrays)
    payload = dump_json({"format": FORMAT, **manifest, "content": sha256(dump_json(table), data)})
    sealed = header(sign(payload).decode("ascii"), table) + data
    opened(sealed)
    return sealed


def unseal(data: bytes, trust: signing.Trust, limits: Limits = LIMITS) -> Sealed:
    """Verify a packet.

    Raises:
        InputError: The file is damaged, or is not a packet of this format.
        LimitError: The file is too large.
        TrustError: Signatures are missing.
    """
    envelope, table, content = opened(data, limits)
    # Nothing inside the manifest is parsed before enough trusted keys have signed its bytes.
    payload = signing.verify(envelope.encode("ascii"), trust)
    manifest = parse_exact_json(payload, "the manifest")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"packet format {manifest.get('format')!r} is not {FORMAT!r}: update this program"
        )
    if manifest.get("content") != sha256(dump_json(table), content):
        raise InputError(
            "the packet's content is damaged: its digest is not the signed one; get it again"
        )
    return Sealed(manifest, table, content, envelope.encode("ascii"), sha256(data))


def countersigned(data: bytes, signers: list[Any]) -> bytes:
    """Return the same packet with more signatures. Those it has are kept, unverified.

    Raises:
        InputError: The file is damaged. A damaged file is never signed.
        NothingToDo: One of the keys has signed it already.
    """
    envelope, table, content = opened(data)
    payload = signing.unverified_payload(envelope.encode("ascii"))
    manifest = parse_exact_json(payload, "the manifest")
    content_digest = sha256(dump_json(table), content)
    if (manifest.get("format"), manifest.get("content")) != (FORMAT, content_digest):
        raise InputError(
            "the packet is damaged or has another format, so it was not signed: get it again"
        )
    signed = signing.countersign(envelope.encode("ascii"), signers).decode("ascii")
    sealed = header(signed, table) + content
    opened(sealed)
    return sealed


def tiled(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Lay tensors out one after the other. Returns (tensor table, data)."""
    table: dict[str, Any] = {}
    chunks, end = [], 0
    for name in sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n)):
        array = arrays[name]
        dtype = array.dtype.newbyteorder("<")
        chunk = np.ascontiguousarray(array, dtype).tobytes()
        table[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + len(chunk)],
        }
        chunks.append(chunk)
        end += len(chunk)
    return table, b"".join(chunks)


def header(envelope: str, table: Mapping[str, Any]) -> bytes:
    """Write everything before the data."""
    text = dump_json({"__metadata__": {"envelope": envelope, "format": FORMAT}, **table})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def opened(data: bytes, limits: Limits = LIMITS) -> tuple[str, dict[str, Any], bytes]:
    """Split a file into (envelope, tensor table, data). Nothing in them is verified yet.

    Raises:
        InputError: The file is not in the one canonical form.
        LimitError: The file or its header is too large.
    """
    length = _header_length(data, limits)
    table = parse_exact_json(data[8 : 8 + length], "the packet's header")
    metadata = table.pop("__metadata__", None)
    envelope = metadata.get("envelope") if isinstance(metadata, dict) else None
    if not isinstance(envelope, str) or not envelope.isascii():
        raise InputError("not a packet: its header has no envelope")
    if (found := metadata.get("format")) != FORMAT:
        raise InputError(
            f"packet format {found!r} is not {FORMAT!r}: build the packet again, or update "
            "this program"
        )
    try:
        canonical = header(envelope, table)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the packet's header is malformed: {error}") from error
    if canonical != data[: 8 + length]:
        raise InputError(
            "the packet's header is not canonical: it was changed after the packet was built"
        )
    return envelope, table, data[8 + length :]


def _header_length(data: bytes, limits: Limits) -> int:
    if len(data) > limits.packet:
        raise LimitError(f"the packet has {len(data)} bytes, more than the {limits.packet} allowed")
    if len(data) < 8:
        raise InputError("not a packet: it has fewer than 8 bytes; download it again")
    length = int(struct.unpack("<Q", data[:8])[0])
    if length > limits.header:
        raise LimitError(
            f"the packet's header claims {length} bytes, more than the {limits.header} allowed"
        )
    if len(data) < 8 + length:
        raise InputError("the packet ends within its header: download it again")
    return length


def tensors(table: Mapping[str, Any], data: bytes) -> dict[str, np.ndarray]:
    """Read the tensors, as read-only arrays.

    Raises:
        KeyError, ValueError, TypeError: The table does not tile the data exactly.
    """
    found: dict[str, np.ndarray] = {}
    end = 0
    for name in sorted(table, key=lambda n: (-_DTYPES[table[n]["dtype"]].itemsize, n)):
        entry = table[name]
        if set(entry) != {"data_offsets", "dtype", "shape"}:
            raise ValueError(f"{name} has fields {sorted(entry)}")
        start, stop = (natural(n) for n in entry["data_offsets"])
        # An empty tensor could claim any size, so its dimensions are bounded too.
        shape = tuple(natural(n, LIMITS.packet) for n in entry["shape"])
        dtype = _DTYPES[entry["dtype"]]
        if len(shape) > DIMENSIONS:
            raise ValueError(f"{name} has {len(shape)} dimensions, more than {DIMENSIONS}")
        if start != end or stop - start != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name}: offsets {start}..{stop} do not fit shape {shape}")
        found[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes belong to no tensor")
    return found
