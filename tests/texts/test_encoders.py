"""Text encoders: what is adapted, what the head sees, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from texts_fixture import save_encoder

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.inputs.text import END
from sdlora_edge.method import backbones, encoders, features
from sdlora_edge.method.feature_spec import FeatureSpec

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
BERT = {**SMALL, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "bert": (BERT, "model.encoder.layer.1.attention.self.query", "value"),
    "roberta": (BERT, "model.encoder.layer.1.attention.self.query", "value"),
    "distilbert": (
        {
            "vocab_size": 50,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 48,
            "pad_token_id": 0,
        },
        "model.transformer.layer.1.attention.q_lin",
        "v_lin",
    ),
    "deberta-v2": (BERT, "model.encoder.layer.1.attention.self.query_proj", "value_proj"),
    "modernbert": (
        {**BERT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        "model.layers.1.attn.Wq",
        "Wv",
    ),
    "t5": (
        {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
        "model.encoder.block.1.layer.0.SelfAttention.q",
        "v",
    ),
}


def encoder(kind: str) -> encoders.TextEncoder:
    import transformers

    torch.manual_seed(0)
    return encoders._built(transformers, {"model_type": kind, **FAMILIES[kind][0]})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 5, 6, 8, 9, 2]])
    return ids, (ids > 0).long()


@pytest.mark.parametrize("kind", FAMILIES)
def test_query_and_value_of_the_upper_half_of_the_layers_are_adapted(kind: str) -> None:
    found = backbones.projections(encoder(kind))
    _, query, value = FAMILIES[kind]
    assert len(found) == 2
    assert found[0].name == query
    assert found[1].name.endswith(value)
    assert all((p.stop - p.start, p.columns) == (32, 32) for p in found)
    ends = [f"*{p.name.rpartition('.1.')[2]}" for p in found]
    everything = "*.Wqkv:q,*.Wqkv:v" if kind == "modernbert" else ",".join(ends)
    assert len(backbones.projections(encoder(kind), everything)) == 4


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_head_sees_tokens_of_the_last_layers_and_no_padding(kind: str) -> None:
    model, (ids, mask) = encoder(kind), inputs()
    example = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    assert str(features.resolve(model, "auto", example, "aligned")) == "mean:2"
    for words in ("last", "mean:2", "cls+mean:2", "cls:1"):
        spec = FeatureSpec.parse(words)
        seen = features.Extractor(model, spec)(ids, mask)
        assert seen.shape == (2, features.width(model, spec))
        short = features.Extractor(model, spec)(ids[:1, :4], mask[:1, :4])
        torch.testing.assert_close(seen[:1], short, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        features.Extractor(model, FeatureSpec.parse("cls+mean:2"))(ids, mask)[:, :32],
        model(ids, mask),
    )


def test_an_encoder_is_built_again_from_what_it_says_of_itself() -> None:
    first, prepare = encoders.create("micro_bert", 16, None)
    again, none = encoders.create("micro_bert", 16, None, first.architecture)
    assert prepare is not None
    assert none is None
    again.load_state_dict(first.state_dict())
    arrays = [torch.from_numpy(a) for a in prepare.arrays(prepare.item("a text")[None]).values()]
    torch.testing.assert_close(first(*arrays), again(*arrays))


def test_a_folder_brings_weights_and_tokenizer(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "mine")
    torch.manual_seed(4)
    model, prepare = encoders.create(str(folder), 0, None)
    assert prepare is not None
    assert (prepare.length, prepare.vocabulary) == (32, 259)
    torch.manual_seed(3)
    same, _ = encoders.create("micro_bert", 32, None)
    for name, value in same.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert (prepare.item("abc") != END).sum() == 5
    with pytest.raises(UsageError, match="takes 32 tokens: give a smaller --max-tokens"):
        encoders.create(str(folder), 64, None)


def test_what_is_no_encoder_is_an_input_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty cannot be read .*name a folder with config\.json"):
        encoders.create(f"{tmp_path}/empty", 0, None)
    folder = save_encoder(tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="mine cannot be read"):
        encoders.create(str(folder), 0, None)
    with pytest.raises(UsageError, match="no weights to read from a file"):
        encoders.create("micro_bert", 0, tmp_path / "w.safetensors")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A .bin file is a pickle, which can run any code."""
    folder = save_encoder(tmp_path / "mine")
    state = encoders.create(str(folder), 0, None)[0].model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        encoders.create(str(folder), 0, None)


def test_half_a_batch_of_padding_changes_no_answer() -> None:
    model, prepare = encoders.create("micro_bert", 64, None)
    assert prepare is not None
    items = prepare.stacked([prepare.item(t) for t in ("short", "a text that is much longer " * 2)])
    together = model(*map(torch.from_numpy, prepare.arrays(items).values()))
    alone = model(*map(torch.from_numpy, prepare.arrays(items[:1]).values()))
    np.testing.assert_allclose(together[:1].detach(), alone.detach(), atol=1e-6)


def test_weights_of_another_encoder_and_a_foreign_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "mine")
    own = safetensors.torch.load_file(folder / "model.safetensors")
    again, _ = encoders.create(str(folder), 0, folder / "model.safetensors")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"foo": torch.zeros(2)}, other)
    with pytest.raises(InputError, match=r"lack .* of its parameters, such as embeddings"):
        encoders.create(str(folder), 0, other)
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(again.model.state_dict()[name], own[name])
    safetensors.torch.save_file({"foo": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lack .* of its parameters"):
        encoders.create(str(folder), 0, None)
    safetensors.torch.save_file(own, folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="they do not belong together"):
        encoders.create(str(folder), 0, None)


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot be read"):
        encoders.create(str(folder), 0, None)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_said_of_packages_that_transformers_imports() -> None:
    program = "from sdlora_edge.method.encoders import create; create('micro_bert', 16, None)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
