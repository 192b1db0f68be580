"""Weights of a backbone: from a file, of which every tensor must fit, or downloaded by timm."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import InputError, SdloraError
from ..shortage import verdict

log = logging.getLogger("sdlora_edge")
_MISMATCH = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
)


def from_file(path: Path, name: str, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Load timm's model with the weights of a safetensors file in timm's naming.

    timm renames old names and resamples position embeddings. The classifier may be missing.

    Args:
        path: The file.
        name: The backbone, for messages.
        build: Makes the model from a `pretrained_cfg_overlay`.

    Raises:
        InputError: A tensor of the backbone is not in the file, does not fit, or is not finite.
    """
    tensors = _read(path)
    try:
        with _loads() as loads:
            model = build({"state_dict": dict(tensors)})
    except (SdloraError, MemoryError):
        raise
    except Exception as error:  # each of timm's families raises its own kinds
        raise verdict(
            error, InputError(f"{path} does not fit backbone {name}: {_reason(error)}")
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    own = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if missing := [key for key in own if not loads or key in loads[-1].missing_keys]:
        lacks = f"it lacks {len(missing)} of {len(own)} tensors, such as {missing[0]}"
        advice = _advice(missing, tensors) if len(missing) == len(own) else "give a complete file"
        raise InputError(f"{path} does not fit backbone {name}: {lacks}: {advice}")
    if other := [key for key in own if key in tensors and not tensors[key].is_floating_point()]:
        raise InputError(
            f"{path}: tensor {other[0]} is {tensors[other[0]].dtype}: "
            "give weights in floating point"
        )
    if more := loads[-1].unexpected_keys:
        log.warning("%s: %d tensors are not used, such as %s", path, len(more), more[0])
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a safetensors file ({error}): save the weights with "
            "safetensors.torch.save_file"
        ) from error
    if not tensors:  # timm would take that for no weights at all, and download its own
        raise InputError(f"{path} holds no tensors: give weights of the backbone")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity: save the weights again")
    return tensors


@contextmanager
def _loads() -> Iterator[list[Any]]:
    """Collect what torch reports of each load in this block.

    timm loads with strict=False and does not pass on what is missing.
    """
    found: list[Any] = []
    load_state_dict, timm = nn.Module.load_state_dict, logging.getLogger("timm")
    level = timm.level

    def load(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        found.append(load_state_dict(module, *arguments, **options))
        return found[-1]

    nn.Module.load_state_dict = load  # type: ignore[assignment, method-assign]
    timm.setLevel(logging.ERROR)  # it would name every tensor that is not used
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
        timm.setLevel(level)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or repr(error)
    if found := _MISMATCH.findall(text):
        tensor, *shapes = found[0]
        here, there = (shape.replace(", ", " x ") or "a number" for shape in shapes)
        return (
            f"{len(found)} tensor(s) have another shape, such as {tensor}: {here} in the file, "
            f"{there} in the backbone"
        )
    return text


def _advice(missing: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Say how the file's names would fit, or what the file holds instead."""
    lacking, prefixes = set(missing), Counter[str]()
    for name in tensors:
        parts = name.split(".")
        prefixes.update(
            ".".join(parts[:n]) + "."
            for n in range(1, len(parts))
            if ".".join(parts[n:]) in lacking
        )
    if prefixes:
        prefix, count = prefixes.most_common(1)[0]
        return f"{count} would fit without the prefix {prefix!r}: save the file without it"
    return (
        f"its {len(tensors)} have names such as {min(tensors, default='')}: "
        "give weights of this backbone in timm's naming"
    )


@contextmanager
def hub_in_few_words(name: str) -> Iterator[None]:
    """While timm downloads weights, log one line for each retry.

    The hub itself logs two, with a link.
    """
    hub = logging.getLogger("huggingface_hub")
    before = hub.handlers, hub.propagate
    hub.handlers, hub.propagate = [_Retries(name)], False
    try:
        yield
    finally:
        hub.handlers, hub.propagate = before


class _Retries(logging.Handler):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._reason = name, ""

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text.startswith("Retrying"):
            log.warning(
                "the weights of %s cannot be downloaded (%s): %s", self._name, self._reason, text
            )
        else:
            self._reason = text.partition(" thrown while")[0]
