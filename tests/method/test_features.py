"""What the head sees: the backbone's own features first, then the tokens that blocks really passed
on, every block run once; a choice that a family does not have is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import square
from networks import every_kind
from torch import Tensor, nn

from sdlora_edge.errors import UsageError
from sdlora_edge.method import backbones, features
from sdlora_edge.method.feature_spec import LAST, FeatureSpec
from sdlora_edge.method.features import Extractor
from sdlora_edge.train.settings import Settings

KINDS = every_kind()
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Means = Callable[[Tensor], Tensor]
EXAMPLE = square(32).canary(0, 1)


def first(tokens: Tensor) -> Tensor:
    return tokens[:, 0]


def patches(skipped: int) -> Means:
    return lambda tokens: tokens[:, skipped:].mean(dim=1)


def places(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3))


CASES: list[tuple[str, str, list[tuple[str, Means]]]] = [
    ("vit", "cls:3", [("blocks.1", first), ("blocks.0", first)]),
    ("vit", "mean:2", [("norm", patches(1)), ("blocks.1", patches(1))]),
    ("vit", "cls+mean:2", [("norm", patches(1)), ("blocks.1", first), ("blocks.1", patches(1))]),
    ("vit", "cls+mean:1", [("norm", patches(1))]),
    ("deit", "cls:2", [("blocks.1", lambda x: x[:, :2].mean(dim=1))]),
    ("dinov2", "mean:2", [("norm", patches(3)), ("blocks.1", patches(3))]),
    ("gap", "mean:3", [("blocks.1", patches(0)), ("blocks.0", patches(0))]),
    ("eva", "cls:2", [("norm", first), ("blocks.1", first)]),
    ("beit", "mean:2", [("blocks.1", patches(1))]),
    ("swin", "mean:2", [("layers.0", lambda x: x.mean(dim=(1, 2)))]),
    ("convnext", "mean:3", [("stages.2", places), ("stages.1", places)]),
    ("efficientnet", "mean:2", [("blocks.4", places)]),
    ("mobilenet", "mean:2", [("blocks.2", places)]),
    ("resnet", "mean:2", [("layer3", places)]),
    ("regnet", "mean:2", [("s3", places)]),
]


@pytest.mark.parametrize(("kind", "text", "parts"), CASES)
@torch.no_grad()
def test_tokens_are_those_that_the_blocks_pass_on_and_no_block_runs_twice(
    kind: str, text: str, parts: list[tuple[str, Means]]
) -> None:
    backbone, spec = KINDS[kind](), FeatureSpec.parse(text)
    seen: dict[str, list[Tensor]] = {}
    watched = {name for name, _ in parts}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, []).append(output)

    for name, module in backbone.named_modules():
        if name and (name in watched or not list(module.children())):
            module.register_forward_hook(note(name))
    expected = [backbone(IMAGES)]
    calls = {name: len(outputs) for name, outputs in seen.items()}
    expected += [mean(seen[name][0]) for name, mean in parts]
    seen.clear()
    found = Extractor(backbone, spec)(IMAGES)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, : expected[0].shape[1]], expected[0], rtol=0, atol=0)
    assert {name: len(outputs) for name, outputs in seen.items()} == calls
    assert found.shape[1] == features.width(backbone, spec)
    assert features.resolve(backbone, text, EXAMPLE, "aligned") == spec
    assert str(spec) == text


@torch.no_grad()
def test_replaced_weights_bear_the_backbones_names() -> None:
    backbone, spec = KINDS["vit"](), FeatureSpec.parse("cls:3")
    name = "blocks.0.attn.qkv.weight"
    weight = backbone.get_parameter(name) + 0.1
    other = copy.deepcopy(backbone)
    other.get_parameter(name).copy_(weight)
    found = Extractor(backbone, spec).under({name: weight}, IMAGES)
    assert torch.equal(found, Extractor(other, spec)(IMAGES))
    assert not torch.equal(found, Extractor(backbone, spec)(IMAGES))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("vit", "cls:3"), ("gap", "mean:3"), ("beit", "mean:3"), ("deit", "cls:3"), ("swin", "mean:2"), ("resnet", "mean:2")],
)  # fmt: skip
def test_the_default_follows_the_family(kind: str, expected: str) -> None:
    assert str(features.resolve(KINDS[kind](), "auto", EXAMPLE, "aligned")) == expected
    assert features.resolve(KINDS[kind](), "auto", EXAMPLE, "paper") == LAST


class Odd(nn.Module):
    """Shows blocks that are not the ones it answers with."""

    num_features = 6
    feature_info = ({"num_chs": 6},) * 2

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 2)

    def forward_head(self, x: Tensor) -> Tensor:
        return self(x) + 1

    def forward_intermediates(self, x: Tensor, indices: Any) -> tuple[Tensor, list[Tensor]]:
        return x, [x.repeat(1, 2, 1, 1) for _ in indices]


class Plain(nn.Module):
    num_features = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def test_a_backbone_that_shows_no_blocks_is_served_by_its_own_features() -> None:
    for backbone, message in ((Odd(), "do not lead to its own features"), (Plain(), "no blocks")):
        assert features.resolve(backbone, "auto", EXAMPLE, "aligned") == LAST
        assert features.width(backbone, LAST) == backbones.features(backbone)
        with pytest.raises(UsageError, match=f"{message}: choose last"):
            features.resolve(backbone, "mean:2", EXAMPLE, "aligned")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("gap", "cls:2", r"VisionTransformer have no class token: choose mean:2 or last"),
        ("swin", "cls+mean:2", r"SwinTransformer have no class token: choose mean:2 or last"),
        ("vit", "cls:4", r"VisionTransformer has 3 blocks: choose fewer"),
        ("convnext", "mean:5", r"ConvNeXt has 4 stages: choose fewer"),
    ],
)
def test_tokens_that_a_family_does_not_have_are_refused(kind: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        features.resolve(KINDS[kind](), text, EXAMPLE, "aligned")


@pytest.mark.parametrize("text", ["", "cls", "cls:0", "mean+cls:2", "cls:4 ", "last:2", "cls:100"])
def test_another_text_is_refused_before_anything_is_built(text: str) -> None:
    with pytest.raises(UsageError, match=r"features is .*: choose auto, last, or tokens"):
        Settings.of(features=text)


def test_the_head_of_the_paper_sees_the_backbones_own_features_only() -> None:
    with pytest.raises(UsageError, match="not cls:4: set features to last or auto, or head to"):
        Settings.of(features="cls:4", head="paper")
    for text in ("auto", "last"):
        assert Settings.of(features=text, head="paper").method.features == text


def test_attention_on_classes_behind_the_blocks_is_no_class_token_of_theirs() -> None:
    with torch.device("meta"):
        xcit = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    with pytest.raises(UsageError, match="the blocks of Xcit have no class token"):
        features.resolve(xcit, "cls:2", EXAMPLE, "aligned")
