"""The file that every packet is: a signed manifest, and tensors. This module knows nothing of what they mean.

    bytes 0..7     length of the header, unsigned, little endian                            } a safetensors file, so
    header         canonical JSON, padded with spaces to a multiple of 8:                   } any tool opens it
                   {"__metadata__": {"envelope": DSSE envelope of the manifest, "format": FORMAT}, tensor table}
    data           the tensors, widest dtype first, then by name, without gaps

    manifest       {"format": FORMAT, "kind", ..., "content": sha256(canonical JSON of the tensor table, data)}

Reading goes from the outside in: sizes, header, signatures, content digest, format, and only then tensors. numpy only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, LimitError
from . import signing
from .canonical import dump_json, parse_json, sha256

FORMAT = "sdlora-edge/packet/2"
SUFFIX = ".sdlora"
Sign = Callable[[bytes], bytes]
"""puts a payload into a DSSE envelope (`signing.sign`)"""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Limits:
    """What a reader is willing to look at, in bytes unless said otherwise."""

    packet: int = 64 * 1024 * 1024
    header: int = 1024 * 1024
    name: int = 200
    """characters in a task or class name"""
    canary_inputs: int = 16
    """images"""
    magnitude: float = 1e4
    """absolute value of a magnitude, and of a factor's or head's entry"""
    tasks: int = 1000
    """that one packet brings"""
    sequence: int = 1_000_000
    """the highest number of a task"""
    revision: int = 1_000_000
    """the highest revision, and version of the keys"""
    revocations: int = 1_000
    """that a device remembers; one that another covers is not counted"""
    seed: int = 2**53
    """of a canary"""


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Sealed:
    """A file whose signatures and content have been verified, and nothing else. digest: SHA-256 of the whole file."""

    manifest: Mapping[str, Any]
    table: Mapping[str, Any]
    content: bytes
    envelope: bytes
    digest: str

    def tensors(self) -> dict[str, np.ndarray]:
        """Read-only arrays. Raises KeyError, ValueError or TypeError unless the table tiles the data exactly."""
        return tensors(self.table, self.content)


def seal(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray], sign: Sign) -> bytes:
    """The bytes of a packet; `manifest` lacks format and content, which are added here. Raises LimitError."""
    table, data = tiled(arrays)
    payload = dump_json({"format": FORMAT, **manifest, "content": sha256(dump_json(table), data)})
    sealed = header(sign(payload).decode("ascii"), table) + data
    opened(sealed)
    return sealed


def unseal(data: bytes, trust: signing.Trust, limits: Limits = LIMITS) -> Sealed:
    """Verify a packet. Raises InputError (not whole, or not one of ours), LimitError (too large), TrustError (signatures)."""
    envelope, table, content = opened(data, limits)
    manifest = parse_json(signing.verify(envelope.encode("ascii"), trust), "the manifest")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"packet format {manifest.get('format')!r} is not {FORMAT!r}: update this program"
        )
    if manifest.get("content") != sha256(dump_json(table), content):
        raise InputError(
            "the packet's content is damaged: its digest is not the one that was signed; get it again"
        )
    return Sealed(manifest, table, content, envelope.encode("ascii"), sha256(data))


def countersigned(data: bytes, signers: list[Any]) -> bytes:
    """The same packet with more signatures; those that are there are kept as they are, unverified.

    Raises InputError where the file is damaged (a damaged file is never signed), NothingToDo where a key has signed it already.
    """
    envelope, table, content = opened(data)
    manifest = parse_json(signing.unverified_payload(envelope.encode("ascii")), "the manifest")
    if manifest.get("format") != FORMAT or manifest.get("content") != sha256(
        dump_json(table), content
    ):
        raise InputError("the packet is damaged, or of another version: it is not signed")
    sealed = (
        header(signing.countersign(envelope.encode("ascii"), signers).decode("ascii"), table)
        + content
    )
    opened(sealed)
    return sealed


def tiled(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """(tensor table, data)."""
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
    """Everything before the data."""
    text = dump_json({"__metadata__": {"envelope": envelope, "format": FORMAT}, **table})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def opened(data: bytes, limits: Limits = LIMITS) -> tuple[str, dict[str, Any], bytes]:
    """(envelope, tensor table, data) of a file in the one canonical form; nothing is believed yet."""
    if len(data) > limits.packet:
        raise LimitError(f"the packet has {len(data)} bytes, more than the {limits.packet} allowed")
    if len(data) < 8:
        raise InputError("not a packet: shorter than its first field; the download was cut short")
    (length,) = struct.unpack("<Q", data[:8])
    if length > limits.header:
        raise LimitError(
            f"the packet's header claims {length} bytes, more than the {limits.header} allowed"
        )
    if len(data) < 8 + length:
        raise InputError("the packet ends within its header; the download was cut short")
    table = parse_json(data[8 : 8 + length], "the packet's header")
    metadata = table.pop("__metadata__", None)
    envelope = metadata.get("envelope") if isinstance(metadata, dict) else None
    if not isinstance(envelope, str) or not envelope.isascii():
        raise InputError("not a packet: its header carries no envelope")
    if (found := metadata.get("format")) != FORMAT:
        raise InputError(
            f"packet format {found!r} is not {FORMAT!r}: build the packet, or update the program, anew"
        )
    try:
        canonical = header(envelope, table)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the packet's header is malformed: {error}") from error
    if canonical != data[: 8 + length]:
        raise InputError(
            "the packet's header is not in canonical form: it was changed after it was built"
        )
    return envelope, table, data[8 + length :]


def tensors(table: Mapping[str, Any], data: bytes) -> dict[str, np.ndarray]:
    """Read-only arrays of the data. Raises KeyError, ValueError or TypeError unless the table tiles it exactly."""
    found: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in sorted(
        table.items(), key=lambda item: (-_DTYPES[item[1]["dtype"]].itemsize, item[0])
    ):
        start, stop = (natural(n) for n in entry["data_offsets"])
        dtype, shape = _DTYPES[entry["dtype"]], tuple(natural(n) for n in entry["shape"])
        if len(shape) > 2:
            raise ValueError(f"{name} has {len(shape)} dimensions")
        if start != end or stop - start != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{name}: offsets {start}..{stop} do not fit shape {shape}")
        found[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes belong to no tensor")
    return found


def natural(value: Any, limit: int | None = None) -> int:
    """Raises ValueError unless `value` is a whole number from 0 (up to `limit`)."""
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise ValueError(
            f"{value!r} is not a natural number" + (f" up to {limit}" if limit is not None else "")
        )
    return value
