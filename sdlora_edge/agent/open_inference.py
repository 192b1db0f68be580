"""The Open Inference Protocol, version 2: images or texts as tensors in, answers as tensors out.

https://github.com/kserve/open-inference-protocol. Tensors are JSON, or binary as Triton's
extension `binary_tensor_data` has them: the body is JSON, then the bytes of the binary tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..device.answers import Asked, Prediction
from ..errors import LimitError, UsageError
from ..inputs.modality import Tensor

HEADER = "inference-header-content-length"
EXTENSION = "binary_tensor_data"
OUTPUTS = {
    "class": ("BYTES", [-1, -1]),
    "probability": ("FP32", [-1, -1]),
    "known": ("BOOL", [-1]),
    "score": ("FP32", [-1]),
}
"""{output: datatype and shape}; the second axis of the first two is `top` long"""


@dataclass(frozen=True)
class Wanted:
    """A request.

    Attributes:
        images: Each is uint8 (H, W, 3), or a text.
        asked: Classes and threshold.
        outputs: {name: whether it is to be binary}.
        id: What the client calls the request.
    """

    images: Sequence[np.ndarray | bytes]
    asked: Asked
    outputs: Mapping[str, bool]
    id: str | None = None


@dataclass(frozen=True)
class Most:
    """What a request may have. images: Number. text: Bytes of JSON. tensor: Of the model."""

    images: int
    text: int
    tensor: Tensor


def server_metadata() -> dict[str, Any]:
    """What `GET /v2` answers."""
    return {"name": "sdlora-edge", "version": __version__, "extensions": [EXTENSION]}


def model_metadata(name: str, generation: int, tensor: Tensor) -> dict[str, Any]:
    """What `GET /v2/models/NAME` answers."""
    return {
        "name": name,
        "versions": [str(generation)],
        "platform": "sdlora-edge",
        "inputs": [{**tensor._asdict(), "shape": list(tensor.shape)}],
        "outputs": [
            {"name": output, "datatype": datatype, "shape": shape}
            for output, (datatype, shape) in OUTPUTS.items()
        ],
    }


def read(body: bytes, header: str | None, most: Most) -> Wanted:
    """A request of `infer`.

    Args:
        body: JSON, and the bytes of binary tensors.
        header: The value of HEADER: the length of the JSON. None if there are no binary tensors.
        most: What is read at most.

    Raises:
        UsageError: It is malformed, or asks for what there is not, or has too many images.
        LimitError: The JSON is too long.
    """
    try:
        return _read(body, header, most)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UsageError(
            f"the request is malformed ({error!r}): see {most.tensor.name} in /v2/models"
        ) from error


def _read(body: bytes, header: str | None, most: Most) -> Wanted:
    length = len(body) if header is None else _whole(int(header))
    if length > len(body):
        raise ValueError(f"the body is shorter than {HEADER}")
    if length > most.text:
        raise LimitError(f"the JSON has more than {most.text} bytes: send the tensor as binary")
    request, rest = json.loads(body[:length]), memoryview(body)[length:]
    if [tensor["name"] for tensor in request["inputs"]] != [most.tensor.name]:
        raise UsageError(f"the inputs are not the one that there is: send {most.tensor.name}")
    images = _items(request["inputs"][0], rest, most)
    name = request.get("id")
    if not (name is None or isinstance(name, str)):
        raise TypeError("id must be a string")
    parameters = request.get("parameters", {})
    threshold = parameters.get("threshold")
    asked = Asked(_whole(parameters.get("top", 1)), None if threshold is None else float(threshold))
    return Wanted(images, asked, _outputs(request, parameters), name)


def _items(tensor: Mapping[str, Any], rest: memoryview, most: Most) -> Sequence[np.ndarray | bytes]:
    wanted = most.tensor
    shape = [_whole(side) for side in tensor["shape"]]
    fits = len(shape) == len(wanted.shape) and all(
        side == own or (own < 0 < side) for side, own in zip(shape, wanted.shape)
    )
    if tensor["datatype"] != wanted.datatype or not fits:
        raise UsageError(
            f"{wanted.name} is {tensor['datatype']} {shape}: send {wanted.datatype} of shape "
            f"{list(wanted.shape)}, any number in place of -1"
        )
    if shape[0] > most.images:
        raise UsageError(f"{shape[0]} {wanted.name} at once: send at most {most.images}")
    size = tensor.get("parameters", {}).get("binary_data_size")
    if size is not None and size != len(rest):
        raise ValueError(f"binary_data_size is {size}, but {len(rest)} bytes follow the JSON")
    data, rest_or_none = tensor.get("data"), None if size is None else rest
    if wanted.datatype == "BYTES":
        return _texts(data, rest_or_none, shape)
    return list(_pixels(data, rest_or_none, shape))


def _texts(data: Any, rest: memoryview | None, shape: list[int]) -> list[bytes]:
    """Each as UTF-8. Binary ones are a length, uint32 little endian, and the bytes."""
    if rest is None:
        if not isinstance(data, list) or len(data) != shape[0]:
            raise ValueError(f"data must be a list of {shape[0]} texts")
        return [text.encode() for text in data]
    found = []
    for _ in range(shape[0]):
        length = int.from_bytes(rest[:4], "little")
        if len(rest) < 4 + length:
            raise ValueError(f"the tensor ends before its {shape[0]} texts do")
        found.append(bytes(rest[4 : 4 + length]))
        rest = rest[4 + length :]
    if len(rest):
        raise ValueError(f"the tensor holds more than its {shape[0]} texts")
    return found


def _pixels(data: Any, rest: memoryview | None, shape: list[int]) -> np.ndarray:
    """uint8 of a shape."""
    if rest is None:
        found = np.array(data)
        if found.dtype.kind not in "iu" or (
            found.size and not 0 <= found.min() <= found.max() < 256
        ):
            raise ValueError("data must be whole numbers from 0 to 255")
        return found.astype(np.uint8).reshape(shape)
    return np.frombuffer(rest, np.uint8).reshape(shape)


def _outputs(request: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, bool]:
    everything = bool(parameters.get("binary_data_output", False))
    wanted = request.get("outputs") or [{"name": name} for name in OUTPUTS]
    found: dict[str, bool] = {}
    for output in wanted:
        own = output.get("parameters", {})
        if output["name"] not in OUTPUTS or "classification" in own:
            raise UsageError(
                f"there is no output {output['name']!r} of this kind: ask for {', '.join(OUTPUTS)}"
            )
        found[output["name"]] = bool(own.get("binary_data", everything))
    return found


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number of 0 or more")
    return value


def answer(name: str, wanted: Wanted, found: Sequence[Prediction]) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if bytes follow it.

    found: Of one generation, which is the version of the model.
    """
    columns: dict[str, np.ndarray] = {
        "class": np.array([[label for label, _ in one.top] for one in found], object),
        "probability": np.array([[p for _, p in one.top] for one in found], np.float32),
        "known": np.array([one.known for one in found], bool),
        "score": np.array([one.score for one in found], np.float32),
    }
    outputs, binary = [], []
    for output, is_binary in wanted.outputs.items():
        column = columns[output]
        entry: dict[str, Any] = {
            "name": output,
            "datatype": OUTPUTS[output][0],
            "shape": list(column.shape),
        }
        if is_binary:
            data = _bytes(column)
            entry["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            entry["data"] = column.ravel().tolist()
        outputs.append(entry)
    described: dict[str, Any] = {
        "model_name": name,
        "model_version": str(found[0].generation),
        "outputs": outputs,
    }
    if wanted.id is not None:
        described["id"] = wanted.id
    head = json.dumps(described).encode()
    return b"".join((head, *binary)), len(head) if binary else None


def _bytes(column: np.ndarray) -> bytes:
    if column.dtype != object:
        return column.tobytes()
    texts = [text.encode() for text in column.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
