"""What the head sees of an item: tokens of the backbone's last blocks, in one forward pass.

    f(x) = [ what the backbone itself returns | the other tokens of the last block |
             the tokens of the block before it | ... ]

The backbone's own features come first, so f[:, :d] is what `last` gives. They stand for the token
that the backbone pools: the class token of the last block, or the mean of its patch tokens. Within
a block the class token comes before the mean.

An earlier block's tokens are taken as they leave it, without a norm: the head is fitted in units of
each feature's own spread (`method.head`). With the backbone's last norm on them, accuracy was 1.8
and 1.0 points lower on Omniglot and PACS, and 0.8 higher on Caltech-101. Of stages (Swin, ConvNeXt,
EfficientNet, MobileNet, ResNet, RegNet) the mean over all places is taken. N stages are the last
one, for which the backbone's own features stand, and N - 1 earlier ones.

Everything but pooling is computed once, by timm's `forward_intermediates`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UsageError
from ..inputs.modality import Inputs
from ..shortage import shortage
from . import backbones
from .feature_spec import AUTO, CLS, LAST, MEAN, FeatureSpec

BLOCKS, STAGES = 4, 2
"""of the default, by family"""
CLOSE = 1e-4
"""largest difference of the backbone's own features to the first part, relative to the largest"""
_POOLED = {"token": CLS, "avg": MEAN}


class Extractor(nn.Module):
    """A backbone that returns what the head sees. Its parameters are the backbone's own.

    Args:
        backbone: Maps images (N, 3, H, W) to its own features (N, d).
        spec: What the head sees.
    """

    def __init__(self, backbone: nn.Module, spec: FeatureSpec = LAST) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec

    def under(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        """Compute `forward` with some of the backbone's parameters and buffers replaced.

        weights: By their names in the backbone, such as blocks.0.attn.qkv.weight.
        """
        named = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        found: Tensor = functional_call(self, named, inputs)
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of the model's inputs, such as images (N, 3, H, W): (N, `width`)."""
        if not self.spec.tokens:
            own: Tensor = self.backbone(*inputs)
            return own
        parts = _parts_of(self.backbone)
        own, last, before = parts(self.backbone, self.spec, *inputs)
        return torch.cat([own, *last, *before], dim=1)


def last_under(backbone: nn.Module, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """What the backbone itself returns with some of its parameters replaced: (N, d).

    Training calls it: a direction is learned behind these features, whatever the head sees.
    """
    found: Tensor = functional_call(backbone, dict(weights), inputs)
    return found


def width(backbone: nn.Module, spec: FeatureSpec) -> int:
    """Return F, the number of features that the head sees."""
    model: Any = backbone
    own = backbones.features(backbone)
    if not spec.tokens:
        return own
    if _has_tokens(backbone):
        others = spec.blocks * len(spec.tokens) - (_pooled(backbone) in spec.tokens)
        return own + others * int(model.embed_dim)
    return own + sum(int(model.feature_info[i]["num_chs"]) for i in _before(backbone, spec))


def resolve(backbone: nn.Module, text: str, example: Inputs, head: str) -> FeatureSpec:
    """Choose what the head sees.

    Args:
        backbone: timm's model.
        text: `auto` or what `FeatureSpec.parse` reads.
        example: What the backbone reads of one item.
        head: The setting `head`. The head `paper` is trained with its task, so it sees `last`.

    Raises:
        UsageError: The backbone does not have these tokens.
    """
    if text != AUTO:
        _require(backbone, spec := FeatureSpec.parse(text), example)
        return spec
    if head == "paper":
        return LAST
    try:
        _require(backbone, spec := _default(backbone), example)
    except UsageError:
        return LAST
    return spec


def _default(backbone: nn.Module) -> FeatureSpec:
    """The default of the backbone's family."""
    if not _shows_blocks(backbone):
        return LAST
    if not _has_tokens(backbone):
        return FeatureSpec((MEAN,), STAGES)
    return FeatureSpec((_pooled(backbone) or MEAN,), min(BLOCKS, _depth(backbone)))


def _require(backbone: nn.Module, spec: FeatureSpec, example: Inputs) -> None:
    """Raise UsageError unless the backbone has these tokens."""
    kind = type(backbone).__name__
    if not spec.tokens:
        return
    if not _shows_blocks(backbone):
        raise UsageError(f"features is {spec}, but {kind} shows no blocks: choose last")
    if spec.blocks > (depth := _depth(backbone)):
        parts = "blocks" if _has_tokens(backbone) else "stages"
        raise UsageError(f"features is {spec}, but {kind} has {depth} {parts}: choose fewer")
    if CLS in spec.tokens and not _has_class_token(backbone):
        mean = FeatureSpec((MEAN,), spec.blocks)
        raise UsageError(
            f"features is {spec}, but the blocks of {kind} have no class token: choose {mean} or "
            "last"
        )
    _try(backbone, spec, example)


@torch.no_grad()
def _try(backbone: nn.Module, spec: FeatureSpec, example: Inputs) -> None:
    """Raise UsageError unless an item becomes a vector whose first part is the backbone's own."""
    inputs = [torch.from_numpy(array) for array in example.values()]
    kind, own = type(backbone).__name__, backbone(*inputs)
    try:
        found = Extractor(backbone, spec)(*inputs)
    except Exception as error:  # each of timm's families raises its own kinds
        if short := shortage(error):
            raise short from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(
            f"features is {spec}, but the blocks of {kind} cannot be read ({reason}): choose last"
        ) from error
    alike = found.shape == (len(own), width(backbone, spec)) and bool(
        (found[:, : own.shape[1]] - own).abs().max() <= CLOSE * own.abs().max()
    )
    if not alike:
        raise UsageError(
            f"features is {spec}, but the blocks of {kind} do not lead to its own features: "
            "choose last"
        )


def _parts_of(backbone: nn.Module) -> Callable[..., _Parts]:
    if hasattr(backbone, "token_parts"):
        return _of_texts
    return _of_tokens if _has_tokens(backbone) else _of_stages


def _of_texts(backbone: nn.Module, spec: FeatureSpec, *inputs: Tensor) -> _Parts:
    """The parts of a text encoder (`method.encoders`)."""
    model: Any = backbone
    own, blocks = model.token_parts(spec.blocks, *inputs)
    last, *before = [[block[token] for token in spec.tokens] for block in blocks]
    others = [part for token, part in zip(spec.tokens, last) if token != _pooled(backbone)]
    return own, others, [part for block in before for part in block]


_Parts = tuple[Tensor, list[Tensor], list[Tensor]]
"""own features; the other parts of the last block; those of earlier blocks, the nearest first"""


def _of_tokens(backbone: nn.Module, spec: FeatureSpec, images: Tensor) -> _Parts:
    """The parts of a backbone whose blocks pass on tokens, those that are no patches first."""
    model: Any = backbone
    prefixed = int(model.num_prefix_tokens) > 0
    if indices := _before(backbone, spec):
        last, blocks = model.forward_intermediates(
            images, indices=indices, return_prefix_tokens=prefixed, output_fmt="NLC"
        )
    else:
        last, blocks = model.forward_features(images), []
    pairs = [block if prefixed else (block, block[:, :0]) for block in reversed(blocks)]
    patches, prefix = last[:, model.num_prefix_tokens :], last[:, : model.num_prefix_tokens]
    others = [
        _token(model, token, patches, prefix) for token in spec.tokens if token != _pooled(model)
    ]
    before = [
        _token(model, token, block, prefix) for block, prefix in pairs for token in spec.tokens
    ]
    return model.forward_head(last), others, before


def _token(model: Any, token: str, patches: Tensor, prefix: Tensor) -> Tensor:
    """One token of a block: of DeiT, the mean of both class tokens, as it pools them itself."""
    if token == MEAN:
        return patches.mean(dim=1)
    classes = prefix if _pooled(model) == CLS and hasattr(model, "dist_token") else prefix[:, :1]
    return classes[:, :2].mean(dim=1)


def _of_stages(backbone: nn.Module, spec: FeatureSpec, images: Tensor) -> _Parts:
    """The parts of a backbone whose stages pass on maps (N, channels, height, width)."""
    model: Any = backbone
    if not (indices := _before(backbone, spec)):
        return model(images), [], []
    last, maps = model.forward_intermediates(images, indices=indices)
    before = [places.mean(dim=(2, 3)) for places in reversed(maps)]
    return model.forward_head(last), [], before


def _before(backbone: nn.Module, spec: FeatureSpec) -> list[int]:
    """The indices of the chosen blocks before the last one, ascending."""
    depth = _depth(backbone)
    return list(range(depth - spec.blocks, depth - 1))


def _depth(backbone: nn.Module) -> int:
    """How many blocks, or stages, `forward_intermediates` counts."""
    model: Any = backbone
    return len(model.blocks) if _has_tokens(backbone) else len(model.feature_info)


def _shows_blocks(backbone: nn.Module) -> bool:
    return hasattr(backbone, "forward_intermediates") or hasattr(backbone, "token_parts")


def _has_tokens(backbone: nn.Module) -> bool:
    """Tell whether blocks pass on tokens, or stages pass on maps."""
    if hasattr(backbone, "token_parts"):
        return True
    method: Any = getattr(backbone, "forward_intermediates", None)
    return method is not None and "return_prefix_tokens" in inspect.signature(method).parameters


def _has_class_token(backbone: nn.Module) -> bool:
    return _has_tokens(backbone) and getattr(backbone, "cls_token", None) is not None


def _pooled(backbone: nn.Module) -> str:
    """The token that the backbone's own features are: CLS, MEAN, or "" for another pooling."""
    return _POOLED.get(str(getattr(backbone, "global_pool", "")), "")
