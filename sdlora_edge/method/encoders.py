"""Text encoders of the `transformers` library, and a small one with random weights.

What the backbone itself returns is the mean of the last layer's tokens, as sentence encoders do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import InputError, SdloraError, UsageError
from ..inputs.modality import MICRO_TEXT
from ..inputs.text import TOKENIZER, TOKENIZER_LIMIT, Tokenization, tokenizer_of
from ..shortage import shortage
from ..storage import atomic
from .feature_spec import CLS, MEAN

TOKENS = 128
"""of a text, if nobody says and the encoder takes as many"""
LEAST = 8
"""tokens, of which some encoders add two or more themselves"""
INNER = "model."
"""of the names of a `TextEncoder`'s parameters; what follows are those of `transformers`"""
_ENCODERS = ("t5", "mt5", "umt5", "longt5")
"""model types of which only the encoder is used"""


class TextEncoder(nn.Module):
    """An encoder of `transformers`: token ids and mask to one vector.

    Args:
        model: Its `last_hidden_state` and `hidden_states` are used.
    """

    global_pool, cls_token = "avg", True

    def __init__(self, model: Any) -> None:
        super().__init__()
        if hasattr(model, "pooler"):
            model.pooler = None  # it is not used
        self.model = model
        self.num_features = self.embed_dim = int(model.config.hidden_size)
        self.blocks = range(int(model.config.num_hidden_layers))

    @property
    def architecture(self) -> str:
        """JSON from which `create` builds it again."""
        return str(self.model.config.to_json_string(use_diff=False))

    def is_kept(self, name: str) -> bool:
        """Whether a module is in the lower half of the layers, which is not adapted by default.

        So the lowest block that the head sees never drifts (docs/method.md).
        """
        found = re.search(r"\.(\d+)\.", name)
        return found is not None and int(found[1]) < len(self.blocks) // 2

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 (N, tokens) each, to the mean of the tokens: (N, width)."""
        return _mean(self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    def token_parts(
        self, blocks: int, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """(own features, {CLS: .., MEAN: ..} of the last blocks, the last one first)."""
        found = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        last = found.last_hidden_state
        layers = [last, *reversed(found.hidden_states[-blocks:-1])]
        return _mean(last, mask), [{CLS: t[:, 0], MEAN: _mean(t, mask)} for t in layers]


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """(N, tokens, width) to (N, width), over the tokens that the mask holds."""
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def create(
    name: str, tokens: int, weights: Path | None, architecture: str = ""
) -> tuple[TextEncoder, Tokenization | None]:
    """Build a text encoder in eval mode.

    Args:
        name: A folder with config.json, model.safetensors and tokenizer.json, a model of the
            Hugging Face hub, or `MICRO_TEXT`.
        tokens: Of a text at most; 0 for TOKENS, or fewer if it takes fewer.
        weights: A safetensors file in place of the folder's.
        architecture: `TextEncoder.architecture` of a run that is opened. Then nothing is read or
            downloaded, and there is no tokenizer.

    Raises:
        UsageError: transformers is not installed, or the encoder does not take so many tokens.
        InputError: The encoder cannot be read, or has no fast tokenizer.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"backbone {name} reads texts, which needs the package transformers: "
            "pip install 'sdlora-edge[host,text-host]'"
        ) from error
    with _told(name), _quiet(transformers):
        if architecture:
            return _built(transformers, json.loads(architecture)), None
        if name == MICRO_TEXT:
            if weights:
                raise UsageError(f"{name} has no weights to read from a file: leave --weights out")
            data, encoder = _bytewise(), _built(transformers, _micro(tokens or TOKENS))
        else:
            config = transformers.AutoConfig.from_pretrained(name, **_SAFE)
            encoder = _loaded(transformers, name, config, weights)
            data = _tokenizer(transformers, name)
        length = _length(encoder, tokens, name)
        config = encoder.model.config
        vocabulary = 1 + max(tokenizer_of(data, length).get_vocab().values())
        if vocabulary > int(config.vocab_size):
            raise InputError(
                f"backbone {name} knows {config.vocab_size} tokens, and its {TOKENIZER} has "
                f"{vocabulary}: they do not belong together"
            )
        padding = getattr(config, "pad_token_id", None)
        return encoder, Tokenization(length, vocabulary, int(padding or 0), data)


def _length(encoder: TextEncoder, tokens: int, name: str) -> int:
    most = getattr(encoder.model.config, "max_position_embeddings", None) or 1 << 15
    # RoBERTa counts positions from its padding id on
    most -= 2 * (encoder.model.config.model_type in ("roberta", "xlm-roberta", "camembert"))
    if 0 < tokens < LEAST:
        raise UsageError(f"--max-tokens {tokens} leaves no text: give {LEAST} or more")
    if tokens > most:
        raise UsageError(f"backbone {name} takes {most} tokens: give a smaller --max-tokens")
    return tokens or min(TOKENS, most)


def _built(transformers: Any, values: dict[str, Any]) -> TextEncoder:
    """An encoder with random weights. values: of its configuration."""
    values = {k: v for k, v in values.items() if k not in ("architectures", "transformers_version")}
    config = transformers.AutoConfig.for_model(**values)
    return TextEncoder(_class(transformers, config)._from_config(config, **_OPTIONS)).float().eval()


_SAFE: dict[str, Any] = {"trust_remote_code": False}
"""no code of a folder or of the hub is ever run"""
_OPTIONS: dict[str, Any] = {"attn_implementation": "eager"}
"""what every target can be exported with, and what half precision is fastest with on a CPU"""


def _class(transformers: Any, config: Any) -> Any:
    kind = transformers.AutoModel
    if config.model_type in _ENCODERS:
        kind = transformers.AutoModelForTextEncoding
    return kind._model_mapping[type(config)]


def _loaded(transformers: Any, name: str, config: Any, weights: Path | None) -> TextEncoder:
    kind = _class(transformers, config)
    if weights:
        model = kind._from_config(config, **_OPTIONS)
        missing = _fill(model, weights)
    else:
        options = {**_OPTIONS, **_SAFE, "use_safetensors": True, "dtype": torch.float32}
        model, info = kind.from_pretrained(name, config=config, output_loading_info=True, **options)
        missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if lacking := sorted(str(key) for key in missing if "pooler" not in str(key)):
        raise InputError(
            f"the weights of {name} lack {len(lacking)} of its parameters, such as {lacking[0]}: "
            "name those of this encoder"
        )
    return TextEncoder(model).float().eval()


def _fill(model: Any, weights: Path) -> list[str]:
    """Load a safetensors file into a model: the parameters that it lacks."""
    prefix = f"{model.base_model_prefix}."
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in safetensors.torch.load_file(weights).items()
    }
    return list(model.load_state_dict(found, strict=False).missing_keys)


def _tokenizer(transformers: Any, name: str) -> bytes:
    """Content of tokenizer.json, which a folder has or `transformers` makes."""
    if (found := Path(name) / TOKENIZER).is_file():
        return atomic.read(found, TOKENIZER_LIMIT)
    fast = transformers.AutoTokenizer.from_pretrained(name, use_fast=True, **_SAFE)
    if not fast.is_fast:
        raise InputError(
            f"backbone {name} has no fast tokenizer, which devices need: choose another"
        )
    return str(fast.backend_tokenizer.to_str()).encode()


def _micro(tokens: int) -> dict[str, Any]:
    """Two layers."""
    return {
        "model_type": "bert",
        "vocab_size": 259,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": max(tokens, 16),
        "pad_token_id": 0,
    }


def _bytewise() -> bytes:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["[PAD]", "[CLS]", "[SEP]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {token: i for i, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab=names, merges=[]))
    made.add_special_tokens(special)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    ends = [(token, names[token]) for token in special[1:]]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return str(made.to_str()).encode()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence its report of weights that are not used, its progress bars, and what torch says of
    the packages that it imports."""
    pytree = logging.getLogger("torch.utils._pytree")
    levels = transformers.logging.get_verbosity(), pytree.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pytree.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        pytree.setLevel(levels[1])


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever transformers raises is an InputError."""
    try:
        yield
    except (SdloraError, MemoryError):
        raise
    except Exception as error:
        if short := shortage(error):
            raise short from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"backbone {name} cannot be read ({reason}): name a folder with config.json, "
            f"model.safetensors and {TOKENIZER}, or a model of the Hugging Face hub"
        ) from error
