"""From a text to token ids, with the `tokenizers` library. The host uses these functions too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError, UsageError
from ..formats.canonical import sha256
from ..storage import atomic
from .modality import KIND, TEXT, Preparation, Tensor, drawn

TOKENIZER = "tokenizer.json"
TOKENIZER_LIMIT = 64 << 20
"""bytes of it"""
IDS, MASK = "input_ids", "attention_mask"
"""the model's inputs: int64 (N, tokens)"""
END = -1
"""fills an item behind its last token"""
MAX_TOKENS = 1 << 15
MAX_CHARACTERS = 10**6
"""of a text: one with more is refused before it is tokenised"""
PREVIEW = 400
"""characters of a text that a web page shows"""
CHARACTERS = 64
"""of a text that are tokenised, for each token that is kept: this bounds the time"""
DROPPED = 0.15
"""share of tokens that a view leaves out"""
_FIELDS = (KIND, "length", "padding", "tokenizer", "vocabulary")
_CANARY = 24
"""tokens of a canary's first text; each further one is shorter, so that the mask counts"""


@dataclass(frozen=True)
class Tokenization(Preparation):
    """Token ids of a text, cut off after `length`.

    An item is int32 (length,), filled with END behind the last token. The model reads int64
    (N, tokens), as long as the longest text of a batch: ids, filled with `padding`, and a mask that
    is 0 there.

    Args:
        length: Tokens of a text at most, those that the tokenizer adds included.
        vocabulary: Number of token ids.
        padding: The id that stands where the mask is 0.
        tokenizer: The content of tokenizer.json.
    """

    kind: ClassVar[str] = TEXT
    noun: ClassVar[str] = "text"
    host: ClassVar[str] = "sdlora_edge.train.text_modality:TextModality"
    suffix: ClassVar[str] = ".txt"
    tensor: ClassVar[Tensor] = Tensor("texts", "BYTES", (-1,))
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        IDS: ("batch", "tokens"),
        MASK: ("batch", "tokens"),
    }
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.int32)
    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamw",
        "lr": 5e-4,
        # A sentence encoder's features are short vectors: at the rate of the direction a head
        # learns too little to teach it anything (docs/method.md).
        "head_lr_factor": 20.0,
        "batch_size": 32,
        "epochs": 2,
        "first_task": 1.0,
        # Classes that differ by little, such as grades, need exact rows (docs/method.md).
        "head_rank": 32,
    }

    length: int
    vocabulary: int
    padding: int
    tokenizer: bytes = field(repr=False)

    def __post_init__(self) -> None:
        whole = (self.length, self.vocabulary, self.padding)
        if not all(type(number) is int for number in whole):
            raise TypeError("length, vocabulary and padding must be whole numbers")
        if not (2 < self.length <= MAX_TOKENS and 0 <= self.padding < self.vocabulary < 1 << 31):
            raise ValueError(
                f"length {self.length}, vocabulary {self.vocabulary}, padding {self.padding}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def described(self) -> str:
        return f"texts of up to {self.length} tokens, of a vocabulary of {self.vocabulary}"

    @property
    def tokens(self) -> float:
        return self.length

    @property
    def files(self) -> Mapping[str, bytes]:
        return {TOKENIZER: self.tokenizer}

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_tokens": self.length}

    def item(self, raw: Any, limit: int | None = None) -> np.ndarray:
        """Token ids of a text: a str, UTF-8 bytes, or the Path of a text file.

        limit: characters, up to MAX_CHARACTERS.
        """
        text = self.text(raw)
        if len(text) > min(MAX_CHARACTERS, MAX_CHARACTERS if limit is None else limit):
            raise InputError(
                f"{_shown(raw)} has {len(text)} characters, more than are allowed:"
                " send a part of it"
            )
        if not text.strip():
            raise InputError(f"{_shown(raw)} is empty: send at least one word")
        return self._filled(self._ids(text[: CHARACTERS * self.length], _shown(raw)))

    def _ids(self, text: str, name: str) -> list[int]:
        """Raises InputError if the tokenizer makes nothing of a text."""
        try:
            found: list[int] = self._encoder.encode(text).ids
        except Exception as error:  # tokenizers has no error of its own; half a surrogate pair
            raise InputError(f"{name} cannot be tokenised: {error}") from error
        if not found:
            raise InputError(f"{name} holds nothing that the tokenizer knows: send other words")
        return found

    @staticmethod
    def text(raw: Any) -> str:
        """What a user hands over, as text.

        Raises:
            TypeError: It is no text.
            InputError: It cannot be read, or is not UTF-8.
        """
        if isinstance(raw, str):
            return raw
        if not isinstance(raw, (bytes, Path)):
            raise TypeError(
                f"{type(raw).__name__} is no text: pass a str, UTF-8 bytes or the Path of a text "
                "file, or an iterable of these"
            )
        data = atomic.read(raw, 4 * MAX_CHARACTERS) if isinstance(raw, Path) else raw
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{_shown(raw)} is not UTF-8: save it as UTF-8") from error

    def many(self, value: Any) -> tuple[Iterable[Any], bool]:
        if isinstance(value, (str, bytes, Path)):
            return [value], True
        if not isinstance(value, Iterable) or isinstance(value, Mapping):
            self.text(value)  # raises TypeError
        return value, False

    @staticmethod
    def kept(raw: Any, change: Callable[[Any], Any] | None = None) -> bytes:
        """The text as a UTF-8 file. change: gets a str."""
        text = Tokenization.text(raw)
        found = text if change is None else change(text)
        if not isinstance(found, str):
            raise UsageError(
                f"the function of --blur returned a {type(found).__name__}: return a str"
            )
        return found.encode()

    @staticmethod
    def preview(path: Path) -> tuple[str, bytes]:
        """Its first PREVIEW characters."""
        text = Tokenization.text(path)
        return "text/plain", (text[:PREVIEW] + "..." * (len(text) > PREVIEW)).encode()

    def named(self, argument: str) -> Iterator[tuple[str, Any]]:
        """The text itself."""
        yield argument, argument

    def streamed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """One text on each line. Raises InputError if they are not UTF-8."""
        lines = (line.rstrip("\r") for line in self.text(data).split("\n"))
        return ((line, line) for line in lines if line.strip())

    def arrays(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """int32 (N, length) to ids and mask, int64 (N, tokens)."""
        there = items != END
        tokens = max(1, int(there.sum(axis=1).max(initial=0)))
        items, there = items[:, :tokens], there[:, :tokens]
        ids = np.where(there, items, self.padding)
        return {IDS: ids.astype(np.int64), MASK: there.astype(np.int64)}

    def canary(self, seed: int, count: int) -> dict[str, np.ndarray]:
        """Ids are 32-bit numbers of SHAKE-256, modulo the vocabulary."""
        lengths = [max(3, min(_CANARY, self.length) - 5 * i) for i in range(count)]
        ids = np.frombuffer(drawn(seed, 4 * sum(lengths)), "<u4") % self.vocabulary
        cut = np.split(ids, np.cumsum(lengths)[:-1])
        return self.arrays(np.stack([self._filled(own) for own in cut]))

    def seen(self, item: np.ndarray) -> np.ndarray | str:
        """The text up to where it is cut off, without the tokens that the tokenizer adds."""
        return str(self._encoder.decode(item[item != END].tolist()))

    def samples(self, count: int) -> list[Any]:
        random = np.random.default_rng(0)
        words = "a red green dog train reads runs near under the old new house".split()  # noqa: SIM905
        return [" ".join(random.choice(words, 12)) for _ in range(count)]

    def views(self, items: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """The beginning of each text with the end of another, and some tokens left out."""
        lengths, others = (items != END).sum(axis=1), random.permutation(len(items))
        found = []
        for own, length, j in zip(items, lengths, others, strict=True):
            share = random.uniform(0.25, 0.75)
            cut, rest = max(1, round(share * length)), round(share * lengths[j])
            mixed = np.concatenate([own[:cut], items[j][rest : lengths[j]]])
            kept = random.rand(len(mixed)) >= DROPPED
            kept[0] = True  # the class token
            found.append(self._filled(mixed[kept]))
        return self.stacked(found)

    def blank(self, each: int, seed: int) -> dict[str, np.ndarray]:
        random = np.random.RandomState(seed)
        letters = np.array([*"abcdefghijklmnopqrstuvwxyz    "])
        lengths = np.linspace(8, 80, each).astype(int)
        texts = {
            "random letters": ["x" + "".join(random.choice(letters, n)) for n in lengths],
            "random digits": ["".join(map(str, random.randint(0, 10, n))) for n in lengths],
            "one character": [chr(random.randint(33, 127)) * n for n in lengths],
            "punctuation": ["".join(random.choice([*".,;:!?-_/()"], n)) for n in lengths],
        }
        items = {
            kind: np.stack([self._filled(self._ids(text, kind)) for text in own])
            for kind, own in texts.items()
        }
        ids = [random.randint(0, self.vocabulary, min(n, self.length)) for n in lengths]
        return items | {"random tokens": np.stack([self._filled(own) for own in ids])}

    def to_manifest(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("length", "vocabulary", "padding")}
        return {KIND: self.kind, **own, "tokenizer": sha256(self.tokenizer)}

    @classmethod
    def from_manifest(cls, value: Mapping[str, Any], folder: Path) -> Tokenization:
        data = atomic.read(folder / TOKENIZER, TOKENIZER_LIMIT)
        try:
            if odd := sorted(value.keys() ^ set(_FIELDS)):
                raise ValueError(f"field {odd[0]!r} is missing or unknown")
            if sha256(data) != value["tokenizer"]:
                raise ValueError(f"{TOKENIZER} is not the file that it names")
            found = cls(value["length"], value["vocabulary"], value["padding"], data)
        except (TypeError, ValueError) as error:
            raise InputError(f"the manifest's preprocessing is malformed: {error}") from error
        _ = found._encoder  # what is missing is said when a store is opened, not when it answers
        return found

    def _filled(self, ids: Any) -> np.ndarray:
        found = np.full(self.length, END, np.int32)
        found[: len(ids)] = ids[: self.length]
        return found

    @functools.cached_property
    def _encoder(self) -> Any:
        return tokenizer_of(self.tokenizer, self.length)


def tokenizer_of(data: bytes, length: int) -> Any:
    """A `tokenizers.Tokenizer` that cuts texts off and fills none.

    Raises:
        UsageError: tokenizers is not installed.
        InputError: `data` is no tokenizer.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "this model reads texts, which needs the package tokenizers: "
            "pip install 'sdlora-edge[text]'"
        ) from error
    try:
        found = tokenizers.Tokenizer.from_str(data.decode())
        found.enable_truncation(length)
        found.no_padding()
    except Exception as error:  # tokenizers has no error of its own
        raise InputError(f"{TOKENIZER} cannot be read: {error}") from error
    return found


def _shown(raw: Any) -> str:
    return str(raw) if isinstance(raw, Path) else "the text"
