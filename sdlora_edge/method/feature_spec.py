"""Which blocks and tokens the head sees, as text: `last`, `cls:4`, `mean:4`, `cls+mean:4`.

No torch: the settings are checked with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

AUTO = "auto"
"""stands for the default of the backbone's family"""
CLS, MEAN = "cls", "mean"
_TEXT = re.compile(r"(cls|mean|cls\+mean):([1-9]\d?)")


@dataclass(frozen=True)
class FeatureSpec:
    """What the head sees: tokens of the last blocks, the last block included.

    Attributes:
        tokens: CLS, the class token; MEAN, the mean of the patch tokens, or of all places of a
            stage. Empty: only what the backbone itself returns.
        blocks: How many blocks, or stages of a backbone without tokens.
    """

    tokens: tuple[str, ...] = ()
    blocks: int = 1

    @classmethod
    def parse(cls, text: str) -> FeatureSpec:
        """Read what `str` writes. Raises UsageError for anything else."""
        if text == str(LAST):
            return LAST
        if not (found := _TEXT.fullmatch(text)):
            raise UsageError(
                f"features is {text!r}: choose {AUTO}, last, or tokens of the last blocks such as "
                "cls:4, mean:4 or cls+mean:4"
            )
        return cls(tuple(found[1].split("+")), int(found[2]))

    def __str__(self) -> str:
        return f"{'+'.join(self.tokens)}:{self.blocks}" if self.tokens else "last"


LAST = FeatureSpec()
"""only what the backbone itself returns"""
