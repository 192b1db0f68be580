"""A dataset of short texts in which each class has words of its own, and a run on it."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch

from sdlora_edge.method import encoders

WORDS = {
    "sport": ["goal", "team", "match", "coach", "score", "league", "player"],
    "money": ["bank", "stock", "market", "price", "euro", "profit", "tax"],
    "music": ["song", "album", "guitar", "band", "concert", "melody", "piano"],
    "space": ["rocket", "orbit", "planet", "moon", "comet", "launch", "galaxy"],
    "rain": ["rain", "cloud", "storm", "wind", "snow", "frost", "thunder"],
    "wood": ["oak", "maple", "timber", "plank", "forest", "birch", "pine"],
    "food": ["bread", "soup", "cheese", "apple", "kitchen", "recipe", "salt"],
}
FILLER = ["the", "a", "of", "and", "to", "in", "is", "was", "for", "with", "on", "that", "by"]


def sentence(label: str, chance: random.Random) -> str:
    words = [chance.choice(WORDS[label]) for _ in range(5)] + chance.sample(FILLER, 4)
    chance.shuffle(words)
    return " ".join(words)


def rows(labels: list[str], each: int, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)  # noqa: S311
    return [
        {"text": sentence(label, chance), "label": label} for label in labels for _ in range(each)
    ]


def write_table(path: Path, labels: list[str], each: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(
            file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ","
        )
        table.writeheader()
        table.writerows(rows(labels, each, seed))
    return path


def save_encoder(folder: Path, tokens: int = 32) -> Path:
    """A folder as `save_pretrained` makes it, with random weights."""
    torch.manual_seed(3)
    model, prepare = encoders.create("micro_bert", tokens, None)
    model.model.save_pretrained(folder)
    assert prepare is not None
    (folder / "tokenizer.json").write_bytes(prepare.tokenizer)
    return folder


def write_folders(path: Path, labels: list[str], each: int, seed: int = 0) -> Path:
    for i, row in enumerate(rows(labels, each, seed)):
        (path / row["label"]).mkdir(parents=True, exist_ok=True)
        (path / row["label"] / f"{i}.txt").write_text(row["text"])
    return path


SETTINGS: dict[str, Any] = {
    "backbone": "micro_bert", "max_tokens": 64, "tasks": 3, "epochs": 4, "rank": "4", "lr": 0.02,
    "min_steps": 20, "first_task": 1.0, "device": "cpu", "batch_size": 16, "optimizer": "sgd", "head_lr_factor": 0.1,
}  # fmt: skip
