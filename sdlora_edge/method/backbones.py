"""Backbones: timm's vision transformers with a fused qkv, and a micro ViT of ours that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import InputError, UsageError
from ..state import Projection

MICRO = "micro_vit"
DEFAULT = "vit_tiny_patch16_224"


def create(name: str, image_size: int | None, weights: Path | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone without head, in eval mode, and how its pictures are prepared: image_size, resize, interpolation, mean, std.

    weights: a safetensors file in timm's naming (another picture size is resampled by timm); without one, `pretrained`
    downloads timm's own. Raises UsageError for a name timm does not know, InputError where weights do not fit or cannot
    be fetched.
    """
    if name == MICRO:
        size = image_size or 16
        model: nn.Module = VisionTransformer(
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
        model.eval()
        return model, {"size": size, "resize": size, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise UsageError(f"backbone {name!r} is not known to timm: did you mean one of {near}")
    options: dict[str, Any] = {"num_classes": 0}
    if image_size:
        options["img_size"] = image_size
    if weights:
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
        if not weights.is_file():
            raise InputError(f"{weights}: no such weights file")
    try:
        model = timm.create_model(name, pretrained=pretrained or weights is not None, **options)
    except Exception as error:  # timm, safetensors and the hub each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if weights:
            raise InputError(f"{weights} does not fit backbone {name}: {reason}") from error
        if pretrained:
            raise InputError(
                f"the weights of {name} could not be downloaded ({reason}): connect to the internet once, or pass --weights FILE"
            ) from error
        raise UsageError(f"backbone {name} cannot be built at image size {image_size}: {reason}") from error
    model.float().eval()
    config = timm.data.resolve_model_data_config(model)
    native = config["input_size"][1]
    size = image_size or native
    # timm's crop fraction belongs to the size the weights were made for; at another size the whole picture is used
    resize = int(size / config["crop_pct"]) if size == native else size
    prepare = {"size": size, "resize": resize, "interpolation": config["interpolation"]}
    return model, prepare | {"mean": tuple(config["mean"]), "std": tuple(config["std"])}


def projections(model: nn.Module, targets: str = "") -> tuple[Projection, ...]:
    """Query and value of every block: rows [0, D) and [2D, 3D) of each fused qkv. Raises UsageError where there is none."""
    found = []
    for name, module in model.named_modules():
        if name.endswith("attn.qkv") and isinstance(module, nn.Linear) and module.out_features == 3 * module.in_features:
            width = module.in_features
            prefix = name.removesuffix("qkv")
            found.append(Projection(prefix + "q", name + ".weight", 0, width, width))
            found.append(Projection(prefix + "v", name + ".weight", 2 * width, 3 * width, width))
    if not found:
        raise UsageError(f"{type(model).__name__} has no fused attn.qkv: choose a timm ViT, such as {DEFAULT}")
    return tuple(found)


def features(model: nn.Module) -> int:
    """Width of the features the head sees."""
    return int(model.num_features)  # type: ignore[arg-type]


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda. Raises UsageError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)
