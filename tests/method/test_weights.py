"""A weights file is used whole, or refused before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import shared
from torch import Tensor, nn

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.method import backbones

NAME = "test_vit"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in timm.create_model(NAME).state_dict().items()}


@pytest.fixture
def create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """A backbone from weights that are stored first; whatever would be fetched fails."""
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: pytest.fail("downloaded")
    )

    def make(tensors: Weights, name: str = NAME, size: int | None = 32) -> nn.Module:
        safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
        return backbones.create(name, size, tmp_path / "w.safetensors", pretrained=False)[0]

    return make


def changed(weights: Weights, **tensors: Tensor) -> Weights:
    return {**weights, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def test_every_tensor_comes_from_the_file_and_the_head_may_be_left_out(
    weights: Weights, create: Callable[..., nn.Module]
) -> None:
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    for tensors in (weights, headless):
        found = create(tensors, size=None).state_dict()
        assert found
        assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_position_embedding_of_another_size_is_resampled_and_fp16_taken(
    weights: Weights, create: Callable[..., nn.Module]
) -> None:
    found = create({name: tensor.half() for name, tensor in weights.items()}, size=32)
    assert found.pos_embed.shape != weights["pos_embed"].shape  # type: ignore[union-attr]
    assert found.pos_embed.dtype == torch.float32
    model, _ = backbones.create(
        "vit_tiny_patch16_224",
        96,
        shared("vit_tiny_patch16_224.fp16.safetensors"),
        pretrained=False,
    )
    assert model.pos_embed.shape == (1, 37, 192)  # type: ignore[union-attr]


@pytest.mark.parametrize("prefix", ["model.", "module.", "backbone.", "state_dict.model."])
def test_names_with_a_prefix_are_refused_and_the_prefix_named(
    prefix: str, weights: Weights, create: Callable[..., nn.Module]
) -> None:
    message = f"lacks 78 of 78 tensors, such as cls_token: 78 would fit without the prefix '{prefix}': save the file without it"
    with pytest.raises(InputError, match=message):
        create({prefix + name: tensor for name, tensor in weights.items()})


def test_what_is_lacking_is_counted_and_named(
    weights: Weights, create: Callable[..., nn.Module]
) -> None:
    lacking = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.5.")}
    with pytest.raises(
        InputError,
        match=r"does not fit backbone test_vit: it lacks 12 of 78 tensors, such as blocks\.5\.norm1\.weight",
    ):
        create(lacking)
    del (one := dict(weights))["norm.bias"]
    with pytest.raises(
        InputError, match=r"lacks 1 of 78 tensors, such as norm\.bias: give a complete file"
    ):
        create(one)
    with pytest.raises(
        InputError,
        match=r"lacks \d+ of \d+ tensors, such as conv_stem\.weight: its 80 have names such as blocks",
    ):
        create(weights, "mobilenetv3_small_050")


def test_running_statistics_are_weights_too_and_their_counts_are_not(
    create: Callable[..., nn.Module],
) -> None:
    own = {
        name: tensor.clone()
        for name, tensor in timm.create_model("mobilenetv3_small_050").state_dict().items()
    }
    create(
        {name: tensor for name, tensor in own.items() if "num_batches" not in name},
        "mobilenetv3_small_050",
    )
    with pytest.raises(InputError, match=r"lacks 34 of \d+ tensors, such as bn1\.running_mean"):
        create(
            {name: tensor for name, tensor in own.items() if "running_mean" not in name},
            "mobilenetv3_small_050",
        )


def test_other_shapes_are_named_with_their_tensor(
    weights: Weights, create: Callable[..., nn.Module]
) -> None:
    wrong = changed(weights, blocks__0__attn__qkv__weight=torch.zeros(96, 64))
    with pytest.raises(
        InputError,
        match=r"1 tensor\(s\) have another shape, such as blocks\.0\.attn\.qkv\.weight: 96 x 64 in the file, 192 x 64 in the backbone$",
    ):
        create(wrong)
    with pytest.raises(
        InputError,
        match=r"another shape, such as cls_token: 1 x 1 x 64 in the file, 1 x 1 x 192 in the backbone",
    ):
        create(weights, "vit_tiny_patch16_224", 224)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "head.bias"])
def test_numbers_that_are_none_are_refused_with_the_tensors_name(
    name: str, value: float, weights: Weights, create: Callable[..., nn.Module]
) -> None:
    wrong = {**weights, name: weights[name].clone()}
    wrong[name].view(-1)[0] = value
    with pytest.raises(InputError, match=rf"w\.safetensors: tensor {name} holds NaN or infinity"):
        create(wrong)


def test_integers_are_no_weights(weights: Weights, create: Callable[..., nn.Module]) -> None:
    name = "blocks.0.attn.qkv.weight"
    with pytest.raises(
        InputError, match=rf"tensor {name} is torch\.int8: give weights in floating point"
    ):
        create({**weights, name: weights[name].to(torch.int8)})


def test_tensors_that_are_not_used_are_counted(
    weights: Weights, create: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    create(changed(weights, blocks__6__norm1__weight=torch.zeros(3)))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "1 tensors are not used, such as blocks.6.norm1.weight"
    ]


@pytest.mark.parametrize("data", [b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(InputError, match="is not a safetensors file"):
        backbones.create(NAME, 32, tmp_path / "w", pretrained=False)


def test_a_pickle_is_never_opened(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode())
    with pytest.raises(InputError, match="is not a safetensors file"):
        backbones.create(NAME, 32, tmp_path / "w.pth", pretrained=False)
    assert not (tmp_path / "ran").exists()
    torch.save(weights, tmp_path / "w.bin")
    with pytest.raises(InputError, match="is not a safetensors file"):
        backbones.create(NAME, 32, tmp_path / "w.bin", pretrained=False)


def test_an_empty_file_is_not_taken_for_none(create: Callable[..., nn.Module]) -> None:
    with pytest.raises(InputError, match="holds no tensors"):
        create({})


def test_micro_vit_takes_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave --weights out"):
        backbones.create(backbones.MICRO, 16, tmp_path / "w", pretrained=False)


def test_each_retry_of_a_download_says_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = logging.getLogger("huggingface_hub.utils._http")

    def offline(*_: Any, **__: Any) -> None:
        for attempt in (1, 2):
            hub.warning(
                "'[Errno -2] Name or service not known' thrown while requesting HEAD https://example.org/w"
            )
            hub.warning(f"Retrying in {attempt}s [Retry {attempt}/2].")
        raise OSError("no such address")

    monkeypatch.setattr(timm, "create_model", offline)
    root = logging.getLogger("huggingface_hub")
    before = root.handlers, root.propagate
    with pytest.raises(
        InputError,
        match=r"weights of test_vit could not be downloaded \(no such address\): connect .* or pass --weights",
    ):
        backbones.create(NAME, 32, None, pretrained=True)
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("sdlora_edge", f"the weights of test_vit cannot be downloaded ('[Errno -2] Name or service not known'): Retrying in {i}s [Retry {i}/2].")
        for i in (1, 2)
    ]  # fmt: skip
    assert (root.handlers, root.propagate) == before
