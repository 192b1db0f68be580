"""Every family of backbones: what is adapted, that folding is a low-rank branch, and the whole way
to a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import make_images, pictures
from sdlora_edge.export.parity import host_logits
from timm.models import (
    build_model_with_cfg,
    convnext,
    eva,
    register_model,
    swin_transformer,
    vision_transformer,
)
from timm.models.efficientnet import _gen_efficientnet_lite
from torch import Tensor, nn

from sdlora_edge.demo import ship
from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.method import backbones
from sdlora_edge.method.merged import Merged, adapted_weights
from sdlora_edge.method.sdlora import Past, SDLoRA, Variant, zero_head
from sdlora_edge.state import TaskState, TaskUpdate, advance, changed_rows, merge
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run

VIT: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
EVA: dict[str, Any] = VIT | {
    "swiglu_mlp": True,
    "scale_mlp": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (4, 4),
}
SWIN: dict[str, Any] = {
    "img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 0,
}  # fmt: skip
CONVNEXT: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 8, 12, 16),
    "ls_init_value": None,
    "num_classes": 0,
}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: vision_transformer.VisionTransformer(**VIT),
    "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT),
    "dinov2": lambda: vision_transformer.VisionTransformer(
        **VIT, init_values=1.0, reg_tokens=2, no_embed_class=True
    ),
    "eva_fused": lambda: eva.Eva(**EVA),
    "eva_separate": lambda: eva.Eva(**EVA, qkv_fused=False),
    "swin": lambda: swin_transformer.SwinTransformer(**SWIN, head_dim=6),
    "efficientnet_lite": lambda: _gen_efficientnet_lite(
        "efficientnet_lite0", channel_multiplier=0.25, num_classes=0
    ),
    "mobilenet_v3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
    "mobilenet_v4": lambda: timm.create_model("mobilenetv4_conv_small_035", num_classes=0),
    "convnext_linear": lambda: convnext.ConvNeXt(**CONVNEXT),
    "convnext_pointwise": lambda: convnext.ConvNeXt(**CONVNEXT, conv_mlp=True),
}
every_family = pytest.mark.parametrize("family", BUILD)

PROMISED = {  # how many, and the first two: name, parameter, first row, last row + 1, columns
    "vit": (
        4,
        ("blocks.0.attn.q", "blocks.0.attn.qkv", 0, 16, 16),
        ("blocks.0.attn.v", "blocks.0.attn.qkv", 32, 48, 16),
    ),
    "deit": (
        4,
        ("blocks.0.attn.q", "blocks.0.attn.qkv", 0, 16, 16),
        ("blocks.0.attn.v", "blocks.0.attn.qkv", 32, 48, 16),
    ),
    "dinov2": (
        4,
        ("blocks.0.attn.q", "blocks.0.attn.qkv", 0, 16, 16),
        ("blocks.0.attn.v", "blocks.0.attn.qkv", 32, 48, 16),
    ),
    "eva_fused": (
        4,
        ("blocks.0.attn.q", "blocks.0.attn.qkv", 0, 16, 16),
        ("blocks.0.attn.v", "blocks.0.attn.qkv", 32, 48, 16),
    ),
    "eva_separate": (
        4,
        ("blocks.0.attn.q_proj", None, 0, 16, 16),
        ("blocks.0.attn.v_proj", None, 0, 16, 16),
    ),
    "swin": (
        6,  # three heads of 6 rows: attention is not as wide as its input
        ("layers.0.blocks.0.attn.q", "layers.0.blocks.0.attn.qkv", 0, 6, 8),
        ("layers.0.blocks.0.attn.v", "layers.0.blocks.0.attn.qkv", 12, 18, 8),
    ),
    "efficientnet_lite": (
        31,
        ("blocks.0.0.conv_pw", None, 0, 8, 32),
        ("blocks.1.0.conv_pw", None, 0, 48, 8),
    ),
    "mobilenet_v3": (
        22,
        ("blocks.0.0.conv_pw", None, 0, 8, 16),
        ("blocks.1.0.conv_pw", None, 0, 40, 8),
    ),
    "mobilenet_v4": (
        27,
        ("blocks.0.1.conv", None, 0, 16, 16),
        ("blocks.1.1.conv", None, 0, 24, 32),
    ),
    "convnext_linear": (
        8,
        ("stages.0.blocks.0.mlp.fc1", None, 0, 32, 8),
        ("stages.0.blocks.0.mlp.fc2", None, 0, 8, 32),
    ),
    "convnext_pointwise": (
        8,
        ("stages.0.blocks.0.mlp.fc1", None, 0, 32, 8),
        ("stages.0.blocks.0.mlp.fc2", None, 0, 8, 32),
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share: on a busy machine, threads that wait for each other take
    ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(family: str) -> nn.Module:
    """A random member of the family, in which no weight, bias or running statistic has its idle
    first value."""
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand(buffer.shape)
    return model


def images(family: str) -> Tensor:
    size = 32 if family.startswith(("efficient", "mobile", "conv")) else 16
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def first_state(backbone: nn.Module) -> TaskState:
    nothing = np.zeros((0, backbones.features(backbone)), np.float32), np.zeros(0, np.float32)
    return TaskState(0, "base", "00" * 32, (), np.zeros(0), *nothing, {}, Confidence.none(0))


@torch.no_grad()
def shake(model: SDLoRA) -> None:
    """Stands for training."""
    for parameter in (*model.A, *model.B, model.magnitudes):
        parameter += 0.2 * torch.randn(parameter.shape).to(parameter)


def model_of(backbone: nn.Module, states: list[TaskState]) -> SDLoRA:
    """The model of the next task, of one class."""
    past = Past.of(backbones.projections(backbone), states)
    return SDLoRA(backbone, past, zero_head(1, backbones.features(backbone)), Variant(2))


def chain(backbone: nn.Module, tasks: int) -> list[TaskState]:
    states = [first_state(backbone)]
    for t in range(1, tasks + 1):
        model = model_of(backbone, states)
        shake(model)
        model.finish_task()
        weight = np.concatenate(
            [states[-1].head_weight, np.full((1, backbones.features(backbone)), t, np.float32)]
        )
        rows = changed_rows(states[-1], weight, np.zeros(t, np.float32))
        update = TaskUpdate(t, "t", (f"c{t}",), model.deltas(), rows, model.directions())
        states.append(advance(states[-1], update))
    return states


def branch(
    A: Tensor, B: Tensor, scale: Tensor, start: int
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """A forward hook that adds scale B A x to the rows from `start` on, by the module's own kind of
    arithmetic."""

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        if isinstance(module, nn.Conv2d):
            seen = nn.functional.conv2d(x, A[:, :, None, None], stride=module.stride)
            return output + scale * nn.functional.conv2d(seen, B[:, :, None, None])
        added = scale * nn.functional.linear(nn.functional.linear(x, A), B)
        return output + nn.functional.pad(
            added, (start, output.shape[-1] - start - added.shape[-1])
        )

    return add


@every_family
def test_projections_are_the_promised_rows(family: str) -> None:
    model = small(family)
    count, *first = PROMISED[family]
    found = backbones.projections(model)
    assert len(found) == count
    assert [(p.name, p.tensor, p.start, p.stop, p.columns) for p in found[:2]] == [
        (name, f"{module or name}.weight", *rest) for name, module, *rest in first
    ]
    assert all(model.get_parameter(p.tensor).flatten(1).shape[1] == p.columns for p in found)
    assert not any(word in p.name for p in found for word in ("se.", "stem", "head"))


@every_family
def test_folding_is_an_explicit_low_rank_branch_and_gradients_reach_everything_trained(
    family: str,
) -> None:
    backbone = small(family).double()
    past = Past.of(backbones.projections(backbone), [first_state(backbone)])
    model = SDLoRA(backbone, past, zero_head(2, backbones.features(backbone)), Variant(3)).double()
    shake(model)
    nn.init.normal_(model.head.weight)
    x = images(family).double()
    reference = copy.deepcopy(backbone)
    calls = []
    for p, A, B in zip(model.projections, model.A, model.B, strict=True):
        module = reference.get_submodule(p.tensor.removesuffix(".weight"))
        if (
            family == "eva_fused"
        ):  # reads qkv.weight without calling the module: a hook would never be heard
            with torch.no_grad():
                module.weight[p.start : p.stop] += model.magnitudes[0] * B @ A
        else:
            module.register_forward_hook(lambda *_: calls.append(1))
            module.register_forward_hook(branch(A, B, model.magnitudes[0], p.start))
    with torch.no_grad():
        expected = model.head(reference(x))
        assert (expected - model.head(backbone(x))).abs().max() > 1e-3
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(calls) == (0 if family == "eva_fused" else len(model.projections))
    nn.functional.cross_entropy(found, torch.tensor([0, 1])).backward()
    for parameter in (*model.A, *model.B, model.magnitudes):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@every_family
def test_what_is_shipped_merges_to_what_training_folds(family: str) -> None:
    backbone = small(family)
    projections, states = backbones.projections(backbone), chain(backbone, 2)
    model = model_of(backbone, states)  # B_3 = 0: the state after task 2
    merged = merge(
        adapted_weights(backbone, projections),
        projections,
        [s.factors for s in states[1:]],
        states[-1].magnitudes,
    )
    assert all(weight.ndim == 2 for weight in merged.values())
    with torch.no_grad():
        folded = model.weights()
        for name, weight in folded.items():
            assert weight.shape == backbone.get_parameter(name).shape
            np.testing.assert_allclose(weight.flatten(1).numpy(), merged[name], atol=1e-5)
        seen = torch.func.functional_call(backbone, folded, (images(family),)).numpy()
    inputs = images(family).numpy()
    assert seen.shape == (2, backbones.features(backbone))
    for exact in (False, True):
        found = Merged(backbone, merged, exact).features(inputs)
        assert np.abs(found - seen).max() < 1e-4 * max(1, np.abs(seen).max())
    assert np.abs(seen - Merged(backbone, {}).features(inputs)).max() > 1e-3
    assert not backbone.training


def test_targets_choose_modules_and_rows_in_the_models_order() -> None:
    model = small("vit")
    found = backbones.projections(
        model, " blocks.*.mlp.fc1 , blocks.0.attn.qkv:v,blocks.0.*:q, blocks.0.attn.qkv:k"
    )
    assert [(p.name, p.start, p.stop, p.columns) for p in found] == [
        ("blocks.0.attn.q", 0, 16, 16),
        ("blocks.0.attn.k", 16, 32, 16),
        ("blocks.0.attn.v", 32, 48, 16),
        ("blocks.0.mlp.fc1", 0, 64, 16),
        ("blocks.1.mlp.fc1", 0, 64, 16),
    ]
    whole = backbones.projections(model, "blocks.1.attn.qkv")
    assert [(p.name, p.tensor, p.start, p.stop) for p in whole] == [
        ("blocks.1.attn.qkv", "blocks.1.attn.qkv.weight", 0, 48)
    ]
    squeeze = backbones.projections(small("mobilenet_v3"), "*.se.conv_reduce,conv_head")
    assert {p.name for p in squeeze} >= {"blocks.0.0.se.conv_reduce", "conv_head"}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("vit", "blocks.*.mlp.fc9", r"'blocks.\*.mlp.fc9' match nothing in Vision.*: .*blocks.\*.attn.qkv \(or its :q, :k, :v\), "),
        ("vit", "blocks.*.mlp.fc1:q", r"'blocks.\*.mlp.fc1:q' match nothing"),
        ("vit", "blocks.*.attn.qkv:x", "must be q, k or v"),
        ("vit", "blocks.*.attn.qkv,*:q", "blocks.0.attn.qkv both whole and in parts"),
        ("mobilenet_v3", "blocks.*.conv_dw", r"match nothing in MobileNetV3: choose .*blocks.\*.\*.conv_pwl, .*conv_head"),
    ],
)  # fmt: skip
def test_targets_that_make_no_sense_are_refused_with_a_list_of_what_there_is(
    family: str, targets: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        backbones.projections(small(family), targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "ghostnet_050", "maxvit_rmlp_pico_rw_256"])
def test_a_family_without_default_says_what_can_be_adapted(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    with pytest.raises(UsageError, match="has no default targets: choose --targets among"):
        backbones.projections(model)
    with pytest.raises(
        UsageError, match="match nothing"
    ):  # no rows of a qkv that has each head's three side by side
        backbones.projections(model, "*.qkv:q")


def test_other_families_have_defaults_too() -> None:
    first = {
        "resnet50": "layer1.0.conv1",
        "regnety_002": "s1.b1.conv1.conv",
        "efficientnetv2_rw_t": "blocks.1.0.conv_pwl",
    }
    for name, expected in first.items():
        with torch.device("meta"):
            assert backbones.projections(timm.create_model(name, num_classes=0))[0].name == expected


def test_images_are_prepared_as_the_weights_were_made_for() -> None:
    name = "convnextv2_nano.fcmae_ft_in22k_in1k_384"  # both sides squashed, where ViT-Tiny's images are cropped
    modes = [
        backbones.create(n, 64, None, pretrained=False)[1]["crop_mode"]
        for n in (name, "vit_tiny_patch16_224")
    ]
    assert modes == ["squash", "center"]
    _, prepare = backbones.create("vit_tiny_patch16_224", None, None, pretrained=False)
    assert (prepare["size"], prepare["resize"]) == (224, 248)
    with pytest.raises(UsageError, match="1024 x 768, and ours are square: choose an --image-size"):
        backbones.create("vit_base_patch16_sapiens2", None, None, pretrained=False)


def test_a_backbone_is_made_for_a_image_size_or_the_size_is_refused() -> None:
    model, prepare = backbones.create("mobilenetv3_small_050", 40, None, pretrained=False)
    assert (prepare["size"], backbones.features(model), model.training) == (40, 1024, False)
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 1024)
    assert backbones.create("mobilenetv3_small_050", None, None, pretrained=False)[1]["size"] == 224
    with pytest.raises(
        UsageError,
        match=r"vit_tiny_patch16_224 cannot take images of 8 x 8 \(.*\): choose another --image-size",
    ):
        backbones.create("vit_tiny_patch16_224", 8, None, pretrained=False)
    with pytest.raises(UsageError, match="is not known to timm"):
        backbones.create("vit_tinny", None, None, pretrained=False)
    with pytest.raises(InputError, match="no such weights file"):
        backbones.create("mobilenetv3_small_050", 40, Path("none.safetensors"), pretrained=False)


def register(name: str, kind: type[nn.Module], settings: dict[str, Any]) -> str:
    """Make a tiny model one of timm's own for this process: all of timm's in these families are
    large."""

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        cfg = {
            "architecture": name,
            "input_size": (3, 32, 32),
            "num_classes": 0,
            "first_conv": "",
            "classifier": "",
        }
        options["pretrained_cfg"] = options.get("pretrained_cfg") or cfg
        return build_model_with_cfg(kind, name, pretrained, **(settings | options))

    entry.__name__, entry.__module__ = name, __name__
    register_model(entry)
    return name


def learned(name: str, lr: float, folder: Path) -> Run:
    """A run over tiny images, from random weights in a file."""
    torch.manual_seed(0)
    model, _ = backbones.create(name, 32, None, pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(
        torch.randn(16, 3, 32, 32)
    )  # running statistics as if it had seen images: else features shrink to nothing
    tensors = model.state_dict()
    safetensors.torch.save_file(tensors, folder / "weights.safetensors")
    settings = {
        "data": str(make_images(folder / "data", ["a", "b", "c", "d"], 5)), "weights": str(folder / "weights.safetensors"),
        "backbone": name, "image_size": 32, "tasks": 2, "epochs": 1, "batch_size": 2, "rank": "3",
        "test_fraction": 0.4, "lr": lr, "head_lr_factor": 1.0, "magnitude_lr_factor": 1.0, "head": "paper",
        "min_steps": 0, "turned": 0.0, "held_out": 0.0,
    }  # fmt: skip
    run = train(resolve(None, settings), folder / "run")
    for key, tensor in (
        Run.open(folder / "run").backbone.state_dict().items()
    ):  # frozen, running statistics and their counts too
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(tensor, tensors[key]), key
    return run


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("efficientnet_lite0", 0.002),
        ("mobilenetv3_small_050", 2e-5),
        (register("tiny_fused_eva_of_the_tests", eva.Eva, EVA), 0.2),
        (register("tiny_eva_of_the_tests", eva.Eva, EVA | {"qkv_fused": False}), 0.2),
        (register("tiny_swin_of_the_tests", swin_transformer.SwinTransformer, SWIN), 0.2),
        (
            register(
                "tiny_convnext_of_the_tests", convnext.ConvNeXt, CONVNEXT | {"conv_mlp": True}
            ),
            0.2,
        ),
    ],
)
def test_from_training_to_a_device_that_takes_a_packet(
    name: str, lr: float, tmp_path: Path
) -> None:
    run = learned(name, lr, tmp_path)
    seen = host_logits(run, 2, pictures(images("conv").numpy()))
    assert 0.05 < np.abs(seen).max() < 20  # else 1e-4 says little, or is float32's own rounding
    assert any(np.abs(f.B).max() > 0 for f in run.factors(2)[1].values())
    shipped = ship(run, tmp_path, 1)
    assert [row.task for row in shipped.tasks] == [1, 2]
    for row in shipped.tasks:
        assert row.max_logit_difference <= 1e-4
        assert row.same_top == row.images > 0
