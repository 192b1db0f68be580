"""What peft loads computes what the device computes; what peft trained becomes a task; what neither can hold is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from conftest import Fleet, Result, make_images, pictures
from forge import Draft
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.from_peft import from_peft, read_adapter
from sdlora_edge.export.parity import host_logits
from sdlora_edge.export.peft import AdaptedModel, to_peft, write_adapter
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, NotForThisDevice, NothingToDo, TrustError, UsageError
from sdlora_edge.formats import control, signing
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.method import backbones, sdlora
from sdlora_edge.method.merged import Merged, adapted_weights, logits_of
from sdlora_edge.state import Factors, TaskState, merge
from sdlora_edge.train import task as learning
from sdlora_edge.train.evaluator import class_answers
from sdlora_edge.train.images import images_in
from sdlora_edge.train.run import Run

with warnings.catch_warnings():  # torchao's and peft's own, at import
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

Cli = Callable[..., Result]


def backbone(run: Path, classes: int) -> nn.Module:
    """As somebody without this package builds it: timm's class, the run's weights, a fresh head."""
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0, num_classes=classes, global_pool="avg",
        class_token=False,
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(
        safetensors.torch.load_file(run / "backbone.safetensors"), strict=False
    )
    assert set(missing) <= {"head.weight", "head.bias"}
    assert not unexpected
    return model.eval()


def inputs(count: int = 4) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(3).standard_normal((count, 3, 16, 16)).astype(np.float32)
    )


@torch.no_grad()
def logits(model: nn.Module) -> np.ndarray:
    return model.eval()(inputs()).numpy()


def test_peft_computes_what_the_device_computes_after_each_packet(
    fleet: Fleet, store: Path, cli: Cli, tmp_path: Path
) -> None:
    device = Device.open(store)
    for task, path in enumerate(fleet.packets, 1):
        classes = device.apply(path).classes
        out = tmp_path / f"adapter{task}"
        result = cli(
            "packet",
            "to-peft",
            *fleet.packets[:task],
            "--bundle",
            fleet.bundle,
            "--out",
            out,
            "--json",
        )
        assert result.code == 0, result
        assert json.loads(result.out)["rank"] == 8 * task  # query and value, rank 4 each
        model = PeftModel.from_pretrained(backbone(fleet.run, len(classes)), str(out))
        np.testing.assert_allclose(
            logits(model), device.logits(pictures(inputs().numpy())), atol=1e-4
        )
        np.testing.assert_allclose(
            logits(model.merge_and_unload()), device.logits(pictures(inputs().numpy())), atol=1e-4
        )


def test_a_later_bundle_gives_the_same_adapter(fleet: Fleet, tmp_path: Path) -> None:
    export_bundle(Run.open(fleet.run), tmp_path / "later", 2, [str(fleet.key.with_suffix(".pub"))])
    to_peft(fleet.bundle, fleet.packets, tmp_path / "a")
    to_peft(tmp_path / "later", fleet.packets[2:], tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_adapters_of_single_tasks_add_up_in_peft_by_cat(fleet: Fleet, tmp_path: Path) -> None:
    """With the weights alpha_k(t) / alpha_k(k): the semantics that export/peft.py states."""
    states = Run.open(fleet.run).states
    model = None
    for task in (1, 2, 3):
        to_peft(fleet.bundle, fleet.packets[:task], tmp_path / str(task), alone=True)
        if model is None:
            model = PeftModel.from_pretrained(backbone(fleet.run, 0), str(tmp_path / "1"), "1")
        else:
            model.load_adapter(str(tmp_path / str(task)), str(task))
    assert model is not None
    now = [float(states[3].magnitudes[k] / states[k + 1].magnitudes[k]) for k in range(3)]
    model.add_weighted_adapter(["1", "2", "3"], now, "all", combination_type="cat")
    model.set_adapter("all")
    seen = logits(model) @ states[3].head_weight.T + states[3].head_bias
    np.testing.assert_allclose(
        seen, host_logits(Run.open(fleet.run), 3, pictures(inputs().numpy())), atol=1e-4
    )


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"],
)
def test_any_backbone_any_ranks_and_magnitudes_of_projections(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pointwise convolutions, classifiers that bear other names, RR, an absorbed task; beside our own merge of the same factors."""
    size = 28 if name.startswith("eva") else 32
    own, _ = backbones.create(name, size, None, pretrained=False)
    projections, random = backbones.projections(own), np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (0.1 * random.standard_normal(shape)).astype(np.float16)

    factors = [
        {
            p.name: Factors(normal(rank, p.columns), normal(p.stop - p.start, rank))
            for p in projections
        }
        for rank in (3, 2)
    ]
    factors = [factors[0], {}, {projections[0].name: factors[1][projections[0].name]}]
    width = backbones.features(own)
    head = normal(5, width).astype(np.float32), normal(5).astype(np.float32)
    magnitudes = random.standard_normal((3, len(projections)))
    state = TaskState(3, "t", "00" * 32, tuple("abcde"), magnitudes, *head, {}, Confidence.none(5))
    found = write_adapter(
        AdaptedModel(name, size, projections), state, factors, tmp_path / "adapter"
    )
    torch.manual_seed(0)
    sized = {"img_size": size} if name.startswith(("vit", "eva")) else {}
    model = timm.create_model(name, num_classes=5, **sized).eval()
    ours = timm.create_model(name, num_classes=0, **sized).eval()
    for parameter in (
        p for n, p in model.named_parameters() if n.endswith("gamma")
    ):  # 1e-6 in a fresh ConvNeXt
        parameter.data.fill_(1.0)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(str(found.head))}
    ours.load_state_dict(weights)
    merged = merge(adapted_weights(ours, projections), projections, factors, state.magnitudes)
    image = np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(np.float32)
    reference = logits_of(state, Merged(ours, merged, exact=True).features(image))
    plain = logits_of(state, Merged(ours, {}, exact=True).features(image))
    scale = np.abs(reference).max()
    assert np.abs(plain - reference).max() > 1e-2 * scale
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    bypassed = "merge_and_unload" in caplog.text
    assert bypassed == name.startswith("eva")
    with torch.no_grad():
        if not bypassed:
            np.testing.assert_allclose(
                adapted(torch.from_numpy(image)).numpy(), reference, atol=1e-4 * scale
            )
        np.testing.assert_allclose(
            adapted.merge_and_unload()(torch.from_numpy(image)).numpy(),
            reference,
            atol=1e-4 * scale,
        )


def test_there_and_back_gives_the_same_factors(fleet: Fleet, tmp_path: Path) -> None:
    run = Run.open(fleet.run)
    to_peft(fleet.bundle, fleet.packets[:2], tmp_path / "adapter", alone=True)
    found = read_adapter(tmp_path / "adapter", run)
    update, magnitude = run.updates[1], float(run.states[2].magnitudes[1])
    assert set(found) == set(update.factors) == {p.name for p in run.projections}
    for name, factors in update.factors.items():
        np.testing.assert_array_equal(found[name].A, factors.A.astype(np.float32))
        np.testing.assert_allclose(
            found[name].B, factors.B.astype(np.float32) * magnitude, rtol=1e-6
        )


def test_a_shipped_direction_comes_back_as_a_task_and_reaches_a_device(
    fleet: Fleet, run_copy: Path, cli: Cli, tmp_path: Path
) -> None:
    """to-peft, from-peft, packet build, apply: the direction is the same to float16's rounding, the head is new."""
    to_peft(fleet.bundle, fleet.packets[:2], tmp_path / "adapter", alone=True)
    data = make_images(tmp_path / "new", ["gear", "hook"], 12)
    command = (
        "packet",
        "from-peft",
        tmp_path / "adapter",
        "--run",
        run_copy,
        "--data",
        data,
        "--name",
        "partner",
    )
    result = cli(*command, "--json")
    assert result.code == 0, result
    run = Run.open(run_copy)
    assert json.loads(result.out)["tasks"] == 4
    assert run.states[4].classes[-2:] == ("gear", "hook")
    assert run.updates[3].name == "partner"
    alpha, old = run.states[4].magnitudes, run.updates[1]
    np.testing.assert_array_equal(alpha[:3], run.states[3].magnitudes)
    sign = np.sign(run.states[2].magnitudes[1])
    assert alpha[3] == pytest.approx(abs(run.states[2].magnitudes[1]), rel=1e-3)
    for name, factors in old.factors.items():
        np.testing.assert_array_equal(run.updates[3].factors[name].A, factors.A)
        np.testing.assert_allclose(
            run.updates[3].factors[name].B, sign * factors.B, rtol=2e-3, atol=1e-6
        )
    images = {
        label: [p for p in images_in(data)[""] if p.label == label] for label in ("gear", "hook")
    }
    found = class_answers(run, run.states[4], images)
    assert (
        found.logits[:, -2:].argmax(axis=1) == found.truth - len(run.states[3].classes)
    ).mean() > 0.8  # the head's new rows were fitted
    assert (
        cli(
            "packet",
            "build",
            "--run",
            run_copy,
            "--bundle",
            fleet.bundle,
            "--key",
            fleet.key,
            "--out",
            tmp_path / "p",
        ).code
        == 0
    )
    device = Device.init(fleet.bundle, tmp_path / "store")
    for path in sorted((tmp_path / "p").iterdir()):
        device.apply(path)
    np.testing.assert_allclose(
        device.logits(pictures(inputs().numpy())),
        host_logits(run, 4, pictures(inputs().numpy())),
        atol=1e-4,
    )


def trained(run: Path, out: Path, **settings: Any) -> Path:
    """An adapter that peft itself saved, its B no longer zero."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["qkv"]} | settings
    torch.manual_seed(0)
    adapted = get_peft_model(backbone(run, 3), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn_like(parameter)
                if parameter.shape[0] == 192:
                    parameter[64:128] = 0  # the run adapts query and value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lora_bias, which peft's own check takes for shards
        adapted.save_pretrained(str(out))
    return out


def test_an_adapter_that_peft_trained_moves_the_weights_as_peft_does(
    fleet: Fleet, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks and scalings for single modules included, and a head of its own left aside."""
    patterns = {"rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {"blocks.2.attn.qkv": 3}}
    path = trained(
        run_copy,
        tmp_path / "adapter",
        modules_to_save=["head"],
        target_modules=["blocks.1.attn.qkv", "blocks.2.attn.qkv"],
        **patterns,
    )
    data, held = make_images(tmp_path / "new", ["gear", "hook"], 8), {}

    def spy(model: sdlora.SDLoRA, *arguments: Any) -> None:
        trained_on(model, *arguments)
        held.update({name: w.detach().numpy() for name, w in model.weights().items()})

    trained_on = learning.fit
    monkeypatch.setattr(learning, "fit", spy)
    run = from_peft(path, run_copy, str(data))
    peft = PeftModel.from_pretrained(backbone(run_copy, 3), str(path)).merge_and_unload()
    before, after = run.weights(3), run.weights(4)
    assert {p for p in before if not np.array_equal(before[p], after[p])} == {
        f"blocks.{i}.attn.qkv.weight" for i in (1, 2)
    }
    for name, weight in after.items():
        moved = peft.get_parameter(name).detach().numpy() - run.base_weights[name]
        np.testing.assert_allclose(
            weight - before[name], moved, atol=2e-3 * max(1e-9, np.abs(moved).max())
        )
        np.testing.assert_allclose(held[name], weight, atol=1e-6)  # what the head was fitted on
    assert {len(f.A) for f in run.updates[3].factors.values()} == {2, 4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, ("use_dora",)),
        ({"use_rslora": True}, ("use_rslora",)),
        ({"bias": "lora_only"}, ("bias=lora_only",)),
        ({"lora_bias": True}, ("lora_bias",)),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights=pissa", "backbone's own weights")),
        ({"target_modules": ["attn.proj"]}, ("blocks.0.attn.proj", "--targets")),
        ({"target_modules": ["patch_embed.proj"]}, ("patch_embed.proj",)),
        ({"modules_to_save": ["norm"]}, ("modules_to_save: norm",)),
    ],
)
def test_what_factors_cannot_represent_is_refused_by_name(
    fleet: Fleet, tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = trained(fleet.run, tmp_path / "adapter", **settings)
    with pytest.raises(InputError) as caught:
        read_adapter(path, Run.open(fleet.run))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"), [("method", "lora"), ("method", "frozen"), ("directions", "shared")]
)
def test_a_run_whose_method_has_no_place_for_it_refuses(
    fleet: Fleet, run_copy: Path, tmp_path: Path, setting: str, value: str
) -> None:
    to_peft(fleet.bundle, fleet.packets[:1], tmp_path / "adapter")
    text = (run_copy / "config.toml").read_text()
    old = {"method": 'method = "sdlora"', "directions": 'directions = "free"'}[setting]
    assert old in text
    (run_copy / "config.toml").write_text(text.replace(old, f'{setting} = "{value}"'))
    with pytest.raises(UsageError, match=f"{setting} {value}"):
        from_peft(
            tmp_path / "adapter", run_copy, str(make_images(tmp_path / "new", ["gear", "hook"], 4))
        )
    assert len(Run.open(run_copy).updates) == 3


def edited(
    path: Path,
    out: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> Path:
    shutil.copytree(path, out)
    value = json.loads((path / "adapter_config.json").read_text()) | (config or {})
    (out / "adapter_config.json").write_text(json.dumps(value))
    found = safetensors.torch.load_file(path / "adapter_model.safetensors") | (tensors or {})
    safetensors.torch.save_file(
        {n: t for n, t in found.items() if t is not None}, out / "adapter_model.safetensors"
    )
    return out


def test_folders_that_are_no_such_adapter_are_refused_and_change_nothing(
    fleet: Fleet, run_copy: Path, cli: Cli, tmp_path: Path
) -> None:
    good = trained(run_copy, tmp_path / "good")
    data = make_images(tmp_path / "new", ["gear", "hook"], 4)
    key = "base_model.model.blocks.0.attn.qkv.lora_{}.weight"
    A, B = torch.ones(4, 64), torch.zeros(192, 4)
    whole, unfinished, small = (
        torch.ones(192, 4),
        torch.full((4, 64), float("nan")),
        torch.ones(4, 32),
    )
    tiny = torch.full((4, 64), 1e-9)
    cases: list[tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = [
        ({"peft_type": "IA3"}, {}, "IA3 adapter"),
        ({"peft_type": "LOHA"}, {}, "LOHA adapter"),
        ({"use_something_new": {"a": 1}}, {}, "use_something_new"),
        ({"r": 5}, {}, "rank 5"),
        ({"rank_pattern": {"(": 5}}, {}, "'(' in its rank_pattern"),
        ({"rank_pattern": {"qkv": 0}}, {}, "a rank of 0"),
        ({"rank_pattern": "qkv"}, {}, "adapter_config.json"),
        ({"r": "many"}, {}, "adapter_config.json"),
        ({"r": 0}, {key.format("A"): A[:0], key.format("B"): B[:, :0]}, "a rank of 0"),
        ({"r": 1e300}, {}, "a rank of"),
        ({"lora_alpha": 10**400}, {}, "adapter_config.json"),
        ({"lora_alpha": 1e300}, {}, "a lora_alpha of"),
        ({"alpha_pattern": {"qkv": "nan"}}, {}, "a lora_alpha of nan"),
        ({}, {key.format("A"): None}, "not the other factor"),
        ({}, {key.format("A"): unfinished}, "NaN"),
        ({}, {key.format("A"): small}, "another backbone"),
        ({}, {key.format("B"): whole}, "rows 64 to 127"),
        (
            {},
            {key.format("A"): tiny, key.format("B"): 1e7 * torch.cat([whole[:64], B[:128]])},
            "fp16",
        ),
        (
            {},
            {"base_model.model.blocks.0.attn.qkv.lora_magnitude_vector": A[0]},
            "lora_magnitude_vector",
        ),
    ]
    before = {p: p.read_bytes() for p in sorted(run_copy.rglob("*")) if p.is_file()}
    for i, (config, tensors, word) in enumerate(cases):
        path = edited(good, tmp_path / f"bad{i}", config, tensors)
        result = cli("packet", "from-peft", path, "--run", run_copy, "--data", data)
        assert (result.code, word in result.err, result.err.count("\n")) == (3, True, 1), (
            word,
            result,
        )
    zero = {
        n: torch.zeros_like(t)
        for n, t in safetensors.torch.load_file(good / "adapter_model.safetensors").items()
        if "lora_B" in n
    }
    for path, word in (
        (edited(good, tmp_path / "zero", {}, zero), "changes nothing"),
        (tmp_path / "none", "adapter_config.json"),
    ):
        result = cli("packet", "from-peft", path, "--run", run_copy, "--data", data)
        assert (result.code, word in result.err) == (3, True), result
    pickled = edited(good, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    result = cli("packet", "from-peft", pickled, "--run", run_copy, "--data", data)
    assert (result.code, "pickle" in result.err) == (3, True), result
    (pickled / "adapter_model.safetensors").write_bytes(b"no tensors")
    result = cli("packet", "from-peft", pickled, "--run", run_copy, "--data", data)
    assert (result.code, "not a readable safetensors file" in result.err) == (3, True), result
    assert {p: p.read_bytes() for p in sorted(run_copy.rglob("*")) if p.is_file()} == before


def test_to_peft_refuses_what_a_device_would_refuse(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(NotForThisDevice, match="out of order"):
        to_peft(fleet.bundle, fleet.packets[1:], out)
    with pytest.raises(NothingToDo, match="no directions yet"):
        to_peft(fleet.bundle, [], out)
    with pytest.raises(NothingToDo, match="applied already"):
        to_peft(fleet.bundle, [fleet.packets[0], fleet.packets[1], fleet.packets[0]], out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        to_peft(fleet.bundle, fleet.packets, out)


@pytest.mark.parametrize(
    "pattern",
    [
        "((([a-z0-9.]+)+)+)+!",  # takes for ever, even on a name as short as blocks.0.attn.qkv
        "(.*){1,32000}[bc]",
        "qkv|proj",
        "blocks.*",
        "q[kv]+",
        "(?:qkv)",
        "qkv" + "." * 100_000,
        "",
        "qkv\n",
        "q kv",
        "\\w+",
        "qkv\\",
    ],
    ids=range(12),
)
def test_a_strangers_pattern_is_no_regular_expression(
    fleet: Fleet, tmp_path: Path, pattern: str
) -> None:
    good = trained(fleet.run, tmp_path / "good")
    for i, name in enumerate(("rank_pattern", "alpha_pattern")):
        with pytest.raises(
            InputError, match=f"in its {name}: write it as the end of a module's name"
        ):
            read_adapter(edited(good, tmp_path / str(i), {name: {pattern: 4}}), Run.open(fleet.run))


def test_thousands_of_patterns_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    many = {f"m{i}": 4 for i in range(20_000)}
    path = edited(trained(fleet.run, tmp_path / "good"), tmp_path / "many", {"rank_pattern": many})
    with pytest.raises(InputError, match="rank_pattern of 20000 entries"):
        read_adapter(path, Run.open(fleet.run))


@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.1.attn.qkv",
        "1.attn.qkv",
        r"^blocks\.1\.attn\.qkv",
        r"blocks.1.attn\.qkv$",
        "bl.cks.1.attn.qkv",
    ],
)
def test_the_patterns_that_people_write_mean_what_they_mean_to_peft(
    fleet: Fleet, tmp_path: Path, pattern: str
) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {pattern: 2},
        "alpha_pattern": {"2.attn.qkv": 9, pattern: 3},
    }
    path = trained(fleet.run, tmp_path / "adapter", **patterns)
    factors = read_adapter(path, Run.open(fleet.run))
    assert {name: len(f.A) for name, f in factors.items()} == {
        n: 2 if n.startswith("blocks.1.") else 4 for n in factors
    }
    merged = PeftModel.from_pretrained(backbone(fleet.run, 3), str(path)).merge_and_unload()
    name = "blocks.1.attn.qkv.weight"
    query = next(p for p in Run.open(fleet.run).projections if p.tensor == name and p.start == 0)
    moved = merged.get_parameter(name).detach().numpy() - Run.open(fleet.run).base_weights[name]
    found = factors[query.name]
    np.testing.assert_allclose(found.B @ found.A, moved[: query.stop], atol=1e-6)


def test_no_smaller_rank_holds_the_whole_update(fleet: Fleet, tmp_path: Path) -> None:
    """Query and value of rank 4, three tasks: 24, as the README says."""
    written = to_peft(fleet.bundle, fleet.packets, tmp_path / "adapter")
    found = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (
        found[f"base_model.model.blocks.0.attn.qkv.lora_{part}.weight"].double() for part in "AB"
    )
    assert written.rank == len(A) == int(torch.linalg.matrix_rank(B @ A)) == 24


def test_packets_from_before_and_after_a_change_of_keys(
    fleet: Fleet, cli: Cli, tmp_path: Path
) -> None:
    old = signing.load_signer(fleet.key)
    new = signing.load_signer(signing.new_key("new", tmp_path / "keys")[0])
    newer = signing.load_signer(signing.new_key("newer", tmp_path / "keys")[0])

    def rotation(version: int, before: Any, now: Any) -> Path:
        trust = signing.Trust((now.public_key,), 1, version)
        path = tmp_path / f"keys{version}.sdlora"
        path.write_bytes(
            control.build_trust(trust, lambda payload: signing.sign(payload, [before, now]))
        )
        return path

    def signed(task: int, signer: Any) -> Path:
        path = tmp_path / f"{task}-{signer.public_key.keyid[:6]}.sdlora"
        path.write_bytes(Draft(fleet.packets[task - 1]).sealed(signer))
        return path

    after = [rotation(2, old, new), rotation(3, new, newer)]
    command = (
        "packet",
        "to-peft",
        "--bundle",
        fleet.bundle,
        *(word for path in after for word in ("--after", path)),
    )
    packets = [fleet.packets[0], signed(2, new), signed(3, newer)]
    assert cli(*command, *packets, "--out", tmp_path / "adapter").code == 0
    to_peft(fleet.bundle, fleet.packets, tmp_path / "same")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    to_peft(fleet.bundle, [signed(1, newer)], tmp_path / "signed again", after=after)
    to_peft(fleet.bundle, fleet.packets[:1], tmp_path / "before", after=after)
    out = tmp_path / "refused"
    for these in (after[:1], []):
        with pytest.raises(TrustError, match=r"signature refused.*--after"):
            to_peft(fleet.bundle, packets, out, after=these)
    for wrong in (
        [signed(1, new), fleet.packets[1]],
        [fleet.packets[0], signed(2, newer), signed(3, new)],
    ):
        with pytest.raises(
            TrustError, match="signature refused"
        ):  # by keys that had been replaced by then
            to_peft(fleet.bundle, wrong, out, after=after)
    with pytest.raises(TrustError, match="signature refused"):
        to_peft(fleet.bundle, packets, out, after=after[::-1])
    with pytest.raises(InputError, match="changes no keys"):
        to_peft(fleet.bundle, packets, out, after=[fleet.packets[0]])
    assert not out.exists()
