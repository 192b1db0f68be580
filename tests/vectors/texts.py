"""Texts of the test vectors, and the token ids that a model gets of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from network import TOKENIZATION

BATCHES = (
    ["An ant, a BEE and a cat."],
    ["the cat", "the bee sees the ant and the ant sees the bee and the cat sees the bee"],
    ["a dove", " \n ant\tant", "K\u00e4fer bee"],
)
"""unknown words, capital letters, blanks, and one that is cut off"""


def write() -> list[dict[str, Any]]:
    """`texts` of vectors.json."""
    found = []
    for texts in BATCHES:
        arrays = TOKENIZATION.arrays(np.stack([TOKENIZATION.item(text) for text in texts]))
        found.append(
            {"bundle": "texts", "texts": texts} | {n: a.tolist() for n, a in arrays.items()}
        )
    return found
