"""Adapters of text encoders: peft and transformers alone compute what the device computes, and what peft trained becomes a task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import Fleet, Result
from sdlora_edge.export.from_peft import from_peft, read_adapter
from sdlora_edge.export.peft import HEAD, to_peft
from texts_fixture import rows, write_table

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError
from sdlora_edge.inputs.text import IDS, MASK
from sdlora_edge.train.run import ARCHITECTURE, Run
from sdlora_edge.train.tasks import load

with warnings.catch_warnings():  # torchao's and peft's own, at import
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft's own
Cli = Callable[..., Result]
QUERY = "encoder.layer.1.attention.self.query"
SAMPLES = [row["text"] for row in rows(["sport", "rain", "wood"], 3, seed=9)]


def encoder(run: Run, kind: Any = transformers.AutoModel) -> Any:
    """As somebody without this package builds it: the run's weights in the class of transformers."""
    torch.manual_seed(1)
    _, facts = load(run.path / "backbone.safetensors")
    values = json.loads(facts[ARCHITECTURE])
    values.pop("architectures", None)
    model = kind.from_config(transformers.AutoConfig.for_model(**values))
    weights = safetensors.torch.load_file(run.path / "backbone.safetensors")
    own = {name.removeprefix("model."): weight for name, weight in weights.items()}
    inner = model.base_model if kind is not transformers.AutoModel else model
    missing, unexpected = inner.load_state_dict(own, strict=False)
    assert {name.partition(".")[0] for name in missing} <= {"pooler"}
    assert not unexpected
    return model.eval()


@torch.no_grad()
def test_peft_and_transformers_compute_what_the_device_computes(
    texts: Fleet, cli: Cli, tmp_path: Path
) -> None:
    """The program of docs/guides/texts.md."""
    device, run = Device.init(texts.bundle, tmp_path / "store"), Run.open(texts.run)
    batch = run.preprocessing.arrays(np.stack([run.preprocessing.item(t) for t in SAMPLES]))
    ids, mask = (torch.from_numpy(batch[name]) for name in (IDS, MASK))
    for task, path in enumerate(texts.packets, 2):
        device.apply(path)
        out = tmp_path / f"adapter{task}"
        command = ("packet", "to-peft", *texts.packets[: task - 1], "--bundle", texts.bundle)
        result = cli(*command, "--out", out, "--json")
        assert result.code == 0, result
        assert json.loads(result.out)["head"] == HEAD
        assert json.loads((out / "sdlora_edge.json").read_text())["features"] == "mean:2"
        model = PeftModel.from_pretrained(encoder(run), str(out)).eval()
        assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == [
            QUERY,
            QUERY.replace("query", "value"),
        ]
        layers = model(ids, mask, output_hidden_states=True).hidden_states[:-3:-1]
        kept = mask.unsqueeze(-1)
        features = torch.cat([(t * kept).sum(1) / kept.sum(1) for t in layers], dim=1)
        head = safetensors.torch.load_file(out / HEAD)
        logits = features @ head["head.weight"].T + head["head.bias"]
        np.testing.assert_allclose(logits, device.logits(batch), atol=1e-4)


def trained(run: Run, out: Path, kind: Any = transformers.AutoModel, **settings: Any) -> Path:
    """An adapter that peft itself saved, its B no longer zero."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": [QUERY]} | settings
    adapted = get_peft_model(encoder(run, kind), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(str(out))
    return out


def test_an_adapter_of_a_classifier_becomes_a_task(
    texts: Fleet, text_run: Path, tmp_path: Path
) -> None:
    """As most people train one: with a head of transformers, which is left aside."""
    sequence = transformers.AutoModelForSequenceClassification
    path = trained(Run.open(text_run), tmp_path / "a", sequence, task_type=TaskType.SEQ_CLS)
    run = from_peft(path, text_run, str(write_table(tmp_path / "new" / "train.csv", ["food"], 20)))
    assert run.states[-1].classes[-1] == "food"
    moved = PeftModel.from_pretrained(encoder(run, sequence), str(path)).merge_and_unload()
    after, before = run.weights(4)[f"model.{QUERY}.weight"], run.weights(3)[f"model.{QUERY}.weight"]
    theirs = moved.base_model.get_submodule(QUERY).weight - encoder(run).get_submodule(QUERY).weight
    moved_by = theirs.detach().numpy()
    scale = np.abs(moved_by).max()
    assert scale > 1e-3
    np.testing.assert_allclose(after - before, moved_by, atol=2e-3 * scale)


def test_there_and_back_gives_the_same_factors(texts: Fleet, tmp_path: Path) -> None:
    run = Run.open(texts.run)
    to_peft(texts.bundle, texts.packets, tmp_path / "adapter", alone=True)
    found, update = read_adapter(tmp_path / "adapter", run), run.updates[2]
    assert set(found) == set(update.factors)
    for name, factors in update.factors.items():
        np.testing.assert_array_equal(found[name].A, factors.A.astype(np.float32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["encoder.layer.1.attention.output.dense"]}, "--targets"),
        ({"modules_to_save": ["embeddings"]}, "modules_to_save: embeddings"),
    ],
)
def test_what_the_run_cannot_hold_is_refused(
    texts: Fleet, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    run = Run.open(texts.run)
    with pytest.raises(InputError, match=words):
        read_adapter(trained(run, tmp_path / "a", **settings), run)


def test_an_adapter_that_holds_a_module_twice_is_refused(texts: Fleet, tmp_path: Path) -> None:
    run = Run.open(texts.run)
    path = trained(run, tmp_path / "a") / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    twice = {
        name.replace("model.encoder", "model.bert.encoder"): t.clone()
        for name, t in tensors.items()
    }
    safetensors.torch.save_file(tensors | twice, path)
    with pytest.raises(InputError, match="twice"):
        read_adapter(path.parent, run)
