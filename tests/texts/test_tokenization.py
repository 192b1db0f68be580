"""From a text to token ids."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdlora_edge.errors import InputError
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.modality import joined, kind_of, of_kind, preparation
from sdlora_edge.inputs.text import END, IDS, MASK, TOKENIZER, Tokenization
from sdlora_edge.method.encoders import create


@pytest.fixture(scope="module")
def prepare() -> Tokenization:
    _, found = create("micro_bert", 24, None)
    assert found is not None
    return found


def test_an_item_holds_the_ids_and_the_end(prepare: Tokenization) -> None:
    item = prepare.item("cat")
    assert (item.dtype, item.shape) == (np.int32, (24,))
    assert (item != END).sum() == 5  # three bytes, and the two tokens around them
    assert prepare.seen(item) == "cat"
    assert prepare.seen(prepare.item("a" * 1000)) == "a" * 22
    assert (prepare.item(" " * (64 * 24) + "a") == prepare.item(" " * (64 * 24 - 1) + "b")).all()


def test_a_batch_is_as_long_as_its_longest_text_and_masks_the_rest(prepare: Tokenization) -> None:
    found = prepare.arrays(prepare.stacked([prepare.item(t) for t in ("dog", "a longer text")]))
    assert found[IDS].shape == found[MASK].shape == (2, 15)
    assert found[IDS].dtype == found[MASK].dtype == np.int64
    assert found[MASK].sum(axis=1).tolist() == [5, 15]
    assert (found[IDS][0, 5:] == prepare.padding).all()


def test_what_is_no_text_is_refused_by_name(prepare: Tokenization, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for wrong, said in (
        ("  \n", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        (tmp_path / "latin.txt", r"latin\.txt is not UTF-8"),
        (tmp_path / "none.txt", r"none\.txt"),
        ("x" * (10**6 + 1), "characters"),
        ("half \ud83d a pair", "cannot be tokenised"),
    ):
        with pytest.raises(InputError, match=said):
            prepare.item(wrong)
    with pytest.raises(TypeError, match="no text"):
        prepare.item(7)
    with pytest.raises(TypeError, match="no text"):
        prepare.many(7)


def test_a_string_is_one_text_and_a_list_holds_many(prepare: Tokenization) -> None:
    assert prepare.many("a b") == (["a b"], True)
    assert prepare.many(["a", "b"]) == (["a", "b"], False)


def test_it_comes_back_from_the_manifest_with_its_file_and_no_other(
    prepare: Tokenization, tmp_path: Path
) -> None:
    (tmp_path / TOKENIZER).write_bytes(prepare.files[TOKENIZER])
    value = prepare.to_manifest()
    assert preparation(value, tmp_path) == prepare
    for change, said in (
        ({"length": 1 << 20}, "length"),
        ({"padding": -1}, "padding"),
        ({"more": 1}, "more"),
        ({"kind": "odour"}, "odour"),
        ({"vocabulary": 2.5}, "whole"),
    ):
        with pytest.raises(InputError, match=said):
            preparation({**value, **change}, tmp_path)
    (tmp_path / TOKENIZER).write_bytes(prepare.tokenizer + b" ")
    with pytest.raises(InputError, match="not the file"):
        preparation(value, tmp_path)


def test_a_damaged_tokenizer_is_an_input_error(prepare: Tokenization) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        replace(prepare, tokenizer=b"{}").item("text")


def test_the_canary_is_the_same_everywhere_and_tries_the_mask(prepare: Tokenization) -> None:
    found = canary.inputs(5, prepare)
    bits = hashlib.shake_256(b"sdlora-edge canary 5").digest(
        4 * (24 + 19)
    )  # as docs/packet.md says
    ids = np.frombuffer(bits, "<u4") % 259
    assert found[IDS][0].tolist() == ids[:24].tolist()
    assert found[IDS][1, :19].tolist() == ids[24:].tolist()
    assert found[MASK].sum(axis=1).tolist() == [24, 19]
    assert found[IDS].max() < prepare.vocabulary
    three = canary.inputs(5, prepare, 3)
    assert three[MASK].sum(axis=1).tolist() == [24, 19, 14]


def test_views_mix_texts_and_keep_the_first_token(prepare: Tokenization) -> None:
    items = prepare.stacked([prepare.item(t) for t in ("aaaaaaaaaaaaaa", "bbbbbbbbbbbbbb", "cc")])
    views = prepare.views(items, np.random.RandomState(0))
    assert views.shape == items.shape
    assert (views[:, 0] == items[:, 0]).all()
    assert (views != items).any(axis=1).all()
    assert set(np.unique(views)) <= set(np.unique(items))


def test_blank_texts_are_items(prepare: Tokenization) -> None:
    found = prepare.blank(each=3, seed=1)
    assert len(found) == 5
    for items in found.values():
        assert (items.shape, items.dtype) == ((3, 24), np.int32)
        assert ((items != END).sum(axis=1) > 2).all()


def test_batches_of_other_lengths_can_be_joined(prepare: Tokenization) -> None:
    short, long = (prepare.arrays(prepare.item(t)[None]) for t in ("a", "abcdef"))
    found = joined([short, long])
    assert found[MASK].tolist() == [[1] * 3 + [0] * 5, [1] * 8]


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        ("vit_tiny_patch16_224", "image"),
        ("micro_bert", "text"),
        ("./folder", "text"),
        ("sentence-transformers/all-MiniLM-L6-v2", "text"),
        ("window:64x3", "window"),
    ],
)
def test_the_name_of_a_backbone_says_what_it_reads(backbone: str, kind: str) -> None:
    assert kind_of(backbone) == kind


def test_a_kind_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match=r"'odour' are not known here.*image, text"):
        of_kind("odour")
