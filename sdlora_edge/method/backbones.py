"""Backbones (timm's vision transformers and convolutional nets, a micro ViT), and what is adapted.

What can be adapted is a matrix: the weight of a linear layer, of a pointwise convolution (1x1, one
group: (out, in, 1, 1) is read as (out, in)), or the query, key or value rows of a fused qkv.
Outside torch it always has two dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import InputError, SdloraError, UsageError
from ..shortage import shortage
from ..state import Projection
from .weights import from_file, hub_in_few_words

MICRO = "micro_vit"
DEFAULT = "vit_tiny_patch16_224"
PARTS = ("q", "k", "v")
"""thirds of a fused qkv's rows, in this order"""

_FAMILIES = (
    # ViT, DeiT, DINOv2, BEiT, Swin, small EVA-02: query and value, as in the paper
    "*.qkv:q,*.qkv:v",
    "*.q_proj,*.v_proj",  # EVA-02 base and large
    # text encoders: BERT, MiniLM and RoBERTa; DistilBERT; DeBERTa; ModernBERT; T5
    "*.self.query,*.self.value",
    "*.q_lin,*.v_lin",
    "*.query_proj,*.value_proj",
    "*.Wqkv:q,*.Wqkv:v",
    "*.SelfAttention.q,*.SelfAttention.v",
    # EfficientNet, its Lite, MobileNetV2 and V3; no squeeze-excite
    "blocks.*.conv_pw,blocks.*.conv_pwl,blocks.*.conv",
    "blocks.*.pw_exp.conv,blocks.*.pw_proj.conv,blocks.*.conv",  # MobileNetV4
    # ConvNeXt: linear or pointwise
    "stages.?.blocks.?.mlp.fc1,stages.?.blocks.?.mlp.fc2,stages.?.blocks.??.mlp.fc?",
    "layer?.*.conv3,layer?.*.conv1",  # ResNets with bottlenecks
    "s?.*.conv3.conv,s?.*.conv1.conv",  # RegNet
)
"""Default targets: those of the first row whose first pattern matches.

Stem, conv_head and classifier are never among them.
"""

_NOT_THIRDS = (
    *("attention2d", "bottleneck_attn", "csatv2", "efficientformer", "efficientvit_mit"),
    *("gcvit", "lambda_layer", "maxxvit", "shvit", "tiny_vit"),
)
"""timm's modules in which the rows of a `qkv` are not all queries, then all keys, all values.

In most of them each head has its own three.
"""
_LISTED = 24


def create(
    name: str, image_size: int | None, weights: Path | None, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a backbone without head, in eval mode.

    Args:
        name: A timm model, or `MICRO`.
        image_size: Side of the input in pixels; None for the model's own.
        weights: A safetensors file.
        pretrained: Download timm's weights if no file is given.

    Returns:
        The model, and how its images are prepared: the fields of `Preprocessing`.

    Raises:
        UsageError: The name is unknown, or the model does not take this size.
        InputError: The weights do not fit, or cannot be downloaded.
    """
    if name == MICRO:
        if weights:
            raise UsageError(
                f"{MICRO} has no weights to read from a file: leave --weights out, or choose "
                "another --backbone"
            )
        return _micro(image_size or 16)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise UsageError(
            f"backbone {name!r} is not known to timm: did you mean one of "
            + (", ".join(near) or "timm.list_models()")
        )
    model = _loaded(name, image_size, weights, pretrained)
    model.float().eval()
    config = timm.data.resolve_model_data_config(model)
    native, width = config["input_size"][1:]
    if native != width and not image_size:
        raise UsageError(
            f"backbone {name} is made for images of {native} x {width}, and ours are square: "
            "choose an --image-size"
        )
    size = image_size or native
    # timm's crop fraction belongs to the size that the weights were made for. At another size the
    # whole image is used.
    resize = int(size / config["crop_pct"]) if size == native == width else size
    _try(model, name, size)
    prepare = {
        "size": size,
        "resize": resize,
        "interpolation": config["interpolation"],
        "crop_mode": config["crop_mode"],
    }
    return model, prepare | {"mean": tuple(config["mean"]), "std": tuple(config["std"])}


def _micro(size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A small ViT with random weights, for the built-in digits."""
    model = VisionTransformer(
        img_size=size,
        patch_size=max(1, size // 4),
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        num_classes=0,
        global_pool="avg",
        class_token=False,
    )
    prepare = {"size": size, "resize": size, "interpolation": "bilinear"}
    return model.eval(), prepare | {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def _loaded(name: str, image_size: int | None, weights: Path | None, pretrained: bool) -> nn.Module:
    """Build timm's model with its weights. The arguments are those of `create`."""
    try:
        if weights:

            def build(overlay: dict[str, Any]) -> nn.Module:
                options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
                return _build(name, image_size, **options)

            return from_file(weights, name, build)
        with hub_in_few_words(name):
            return _build(name, image_size, pretrained=pretrained)
    except (SdloraError, MemoryError):
        raise
    except Exception as error:  # timm and the hub each raise their own kinds
        if short := shortage(error):
            raise short from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if pretrained:
            raise InputError(
                f"the weights of {name} could not be downloaded ({reason}): connect to the "
                "internet once, or pass --weights FILE"
            ) from error
        raise UsageError(
            f"backbone {name} cannot be built at image size {image_size}: {reason}"
        ) from error


def _build(name: str, image_size: int | None, **options: Any) -> nn.Module:
    """Build timm's model, and tell it the image size if it takes one.

    A convolutional net takes any size, so its class has no such option.
    """
    if image_size:
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, num_classes=0, **options)


@torch.no_grad()
def _try(model: nn.Module, name: str, size: int) -> None:
    """Raise UsageError unless an image of this size becomes one vector of features."""
    try:
        found = model(torch.zeros(1, 3, size, size))
    # A reshape, a window or a padding that does not fit: each raises its own kind.
    except Exception as error:
        if short := shortage(error):
            raise short from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(
            f"backbone {name} cannot take images of {size} x {size} ({reason}): choose another "
            "--image-size or --backbone"
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (1, features(model)):
        raise UsageError(
            f"backbone {name} makes {shape} of an image, not one feature vector: choose another, "
            f"such as {DEFAULT}"
        )


def projections(model: nn.Module, targets: str = "") -> tuple[Projection, ...]:
    """Choose the matrices to adapt, in the model's order.

    A whole matrix is named as its module, a part as blocks.0.attn.q.

    Args:
        model: The backbone.
        targets: Patterns of module names with commas between (`fnmatch`, so * crosses dots too).
            The suffix :q, :k or :v takes that third of a fused qkv's rows:
            `blocks.*.attn.qkv:q,blocks.*.mlp.fc1`. Empty: query and value of every attention (of a
            text encoder: in the upper half of its layers), or else the pointwise convolutions
            (ConvNeXt: the MLPs) of the blocks.

    Raises:
        UsageError: A pattern matches nothing, a matrix is taken both whole and in parts, or the
            family has no default. The message lists what there is.
    """
    matrices = _matrices(model)
    fused = _fused(model, matrices)
    patterns = [text.strip() for text in targets.split(",") if text.strip()]
    offered = matrices if patterns else _adaptable(model, matrices)
    patterns = patterns or _default(offered, fused)
    there_is = _candidates(matrices, fused)
    if not patterns:
        raise UsageError(f"{type(model).__name__} has no default targets: {there_is}")
    chosen: set[tuple[str, str]] = set()
    for pattern in patterns:
        found = _matching(pattern, offered, fused)
        if not found and targets.strip(" ,"):
            raise UsageError(
                f"targets {pattern!r} match nothing in {type(model).__name__}: {there_is}"
            )
        chosen |= found
    if twice := [name for name, part in chosen if part and (name, "") in chosen]:
        raise UsageError(f"targets take {min(twice)} both whole and in parts: choose one of them")
    return tuple(
        _projection(name, part, *matrices[name])
        for name in matrices
        for part in ("", *PARTS)
        if (name, part) in chosen
    )


def _adaptable(
    model: nn.Module, matrices: Mapping[str, tuple[int, int]]
) -> Mapping[str, tuple[int, int]]:
    """Without the modules that the backbone keeps if nobody names targets."""
    kept = getattr(model, "is_kept", None)
    return {name: shape for name, shape in matrices.items() if not (kept and kept(name))}


def _default(matrices: Mapping[str, tuple[int, int]], fused: frozenset[str]) -> list[str]:
    """The patterns of the first family whose first pattern matches; empty if there is none."""
    families = (family.split(",") for family in _FAMILIES)
    return next((own for own in families if _matching(own[0], matrices, fused)), [])


def convolutions(model: nn.Module, chosen: Sequence[Projection]) -> bool:
    """Tell whether an adapted matrix is the weight of a convolution."""
    return any(model.get_parameter(p.tensor).ndim > 2 for p in chosen)


def shaped(model: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapted weights (rows, columns) by parameter name, each in its parameter's own shape."""
    parameters = {name: model.get_parameter(name) for name in matrices}
    return {
        name: m if m.shape == parameters[name].shape else m.reshape(parameters[name].shape)
        for name, m in matrices.items()
    }


def _matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Everything that can be adapted: module name to (rows, columns) of its weight."""
    found = {}
    for name, module in model.named_modules():
        pointwise = (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        )
        if pointwise or isinstance(module, nn.Linear):
            found[name] = module.weight.shape[0], module.weight.shape[1]
    return found


def _fused(model: nn.Module, matrices: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """The modules whose rows are query, key and value, a third each."""
    names = [
        name
        for name, (rows, _) in matrices.items()
        if name.split(".")[-1] in ("qkv", "Wqkv") and rows % 3 == 0
    ]
    kinds = {
        name: type(model.get_submodule(name.rpartition(".")[0])).__module__.split(".")[-1]
        for name in names
    }
    return frozenset(name for name, kind in kinds.items() if kind not in _NOT_THIRDS)


def _matching(
    pattern: str, matrices: Mapping[str, tuple[int, int]], fused: frozenset[str]
) -> set[tuple[str, str]]:
    """What a pattern takes: {(module name, part)}, part "" being the whole.

    Raises UsageError for a part that is none.
    """
    modules, colon, part = pattern.partition(":")
    if colon and part not in PARTS:
        raise UsageError(f"targets {pattern!r}: the part after the colon must be q, k or v")
    return {
        (name, part)
        for name in matrices
        if fnmatchcase(name, modules) and (not part or name in fused)
    }


def _candidates(matrices: Mapping[str, tuple[int, int]], fused: frozenset[str]) -> str:
    """What --targets may be, block numbers written as *."""
    parts = {name: f" (or its :{', :'.join(PARTS)})" if name in fused else "" for name in matrices}
    names = list(
        dict.fromkeys(
            re.sub(r"(?<![^.])\d+(?![^.])", "*", name) + part for name, part in parts.items()
        )
    )
    if not names:
        return (
            "it has neither linear layers nor pointwise convolutions; choose another backbone, "
            f"such as {DEFAULT}"
        )
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"choose --targets among {', '.join(names[:_LISTED])}{more}"


def _projection(name: str, part: str, rows: int, columns: int) -> Projection:
    if not part:
        return Projection(name, name + ".weight", 0, rows, columns)
    third = rows // len(PARTS)
    start = PARTS.index(part) * third
    return Projection(
        name.removesuffix("qkv") + part, name + ".weight", start, start + third, columns
    )


def features(model: nn.Module) -> int:
    """Return the width of the features that the head sees: after MobileNet's conv_head, if any."""
    width = getattr(model, "head_hidden_size", None) or model.num_features
    return int(width)  # type: ignore[arg-type]


def resolve_device(name: str) -> torch.device:
    """Choose a device: auto, cpu or cuda. Raises UsageError if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here: use --device cpu")
    return torch.device(name)
