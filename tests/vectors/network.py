"""The model of the test vectors, small enough for numpy, and the runs of the packets.

Nothing is trained: numbers are drawn by SHAKE-256, so every machine makes the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from sdlora_edge.export.onnx import OPSET, WEIGHTS, _store_externally

from sdlora_edge.device.engines import with_room
from sdlora_edge.device.engines.onnx_runtime import MODEL
from sdlora_edge.formats import bundle, encoding, signing
from sdlora_edge.formats.bundle import (
    CANARY_LOGITS,
    CONSTANTS,
    FACTORS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    INPUTS,
    MANIFEST,
    TRUST,
    Canary,
    Manifest,
    classes_json,
)
from sdlora_edge.formats.canonical import dump_json, sha256, tensors_digest
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.encoding import Factors
from sdlora_edge.formats.head_update import HeadUpdate
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.modality import Preparation
from sdlora_edge.inputs.text import Tokenization
from sdlora_edge.state import Projection, TaskState, TaskUpdate, advance, factor_tensors, lineage_id
from sdlora_edge.storage import atomic

PREPROCESSING = Preprocessing(4, 4, "bilinear", (0.5, 0.375, 0.25), (0.5, 0.25, 0.125))
WORDS = ["[PAD]", "[CLS]", "[UNK]", "a", "an", "and", "ant", "bee", "cat", "sees", "the", ",", "."]
TOKENIZATION = Tokenization(
    16,
    len(WORDS),
    0,
    dump_json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": WORDS[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in range(3)
            ],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 0}},
                ],
                "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}},
            },
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: i for i, word in enumerate(WORDS)},
                "unk_token": "[UNK]",
            },
        }
    ),
)
PROJECTIONS = (
    Projection("mix", "mix.weight", 0, 36, 48),
    Projection("qkv.q", "qkv.weight", 0, 8, 36),
    Projection("qkv.v", "qkv.weight", 16, 24, 36),
)
SHAPES = {"mix.weight": (36, 48), "qkv.weight": (24, 36)}
FEATURES, CLASSES = 24, ("ant", "bee", "cat")
SEED = 7
"""of the canaries of bundles; a packet's is the number of its task"""


def drawn(label: str, *shape: int) -> np.ndarray:
    """float32, multiples of 1/32 between -1 and 1."""
    stream = hashlib.shake_256(f"sdlora-edge vectors {label}".encode()).digest(int(np.prod(shape)))
    return (
        (np.frombuffer(stream, np.uint8) % 63).astype(np.float32).reshape(shape) - 31
    ) / np.float32(32)


def samples(live: int) -> np.ndarray:
    """Logits whose worth vectors.json tells: float32 (3, live)."""
    return drawn(f"logits {live}", 3, live) * 16


def sample_features() -> np.ndarray:
    """The features that belong to `samples`: float32 (3, FEATURES)."""
    return drawn("features", 3, FEATURES) * 4


def confident(name: str, live: int, components: int | None = None) -> Confidence:
    """Of a task of this name: 0 to 2 components, and a threshold or none, by the name's length.

    A name of odd length has a part that needs the features. If there is neither, the score is a
    logit, and that of the first sample is the threshold itself.
    """
    k = len(name) % 3 if components is None else components
    wide = FEATURES * (len(name) % 2)
    weight = (drawn(f"{name} unknown", k, live) * 127).astype(np.int8)
    weight.flat[:1] = -128
    found = Confidence(
        np.full(1, 0.5 + len(name) / 8, np.float32),
        weight,
        (1 + np.arange(k, dtype=np.float32)) / np.float32(700),
        drawn(f"{name} unknown bias", k),
        drawn(f"{name} mean", wide).astype(np.float16),
        np.abs(drawn(f"{name} precision", wide) / 4).astype(np.float16),
        np.zeros(0, np.float32),
    )
    scores = found.scores(samples(live), sample_features())
    threshold = (scores.min() + scores.max()) / 2 if k or wide else scores[0]
    none = len(name) % 4 == 3
    return found if none else replace(found, threshold=np.full(1, threshold, np.float32))


UNUSUAL = {
    "fp32": (2.0**-149, -0.0),
    "fp16": (2.0**-24, -0.0),
    "int8": (-128, 127),
    "int4": (0x78, 0x80),
}
"""values that no encoder writes, or seldom: the first two of A"""
W = {name: drawn(name, *shape) / 4 for name, shape in SHAPES.items()}
TOKENS = drawn("tokens", len(WORDS), 48) / 4
"""what a text's tokens add up to: the 48 numbers that an image has"""


@dataclass(frozen=True)
class Chain:
    """A run up to some task. states: of the tasks 0 to t; updates: of the tasks 1 to t."""

    encoding: str
    states: tuple[TaskState, ...]
    updates: tuple[TaskUpdate, ...] = ()
    reads: Preparation = PREPROCESSING

    @classmethod
    def base(cls, name: str, encoding: str, reads: Preparation = PREPROCESSING) -> Chain:
        """Another `name` is another lineage."""
        weight, bias = drawn("head", len(CLASSES), FEATURES) / 2, drawn("bias", len(CLASSES))
        head = weight, bias
        lineage = lineage_id(sha256(name.encode()), PROJECTIONS, encoding, CLASSES, head, "last")
        known = confident(name, len(CLASSES))
        state = TaskState(0, "base", lineage, CLASSES, np.zeros(0), *head, {}, known)
        return cls(encoding, (state,), reads=reads)

    @property
    def state(self) -> TaskState:
        return self.states[-1]

    @property
    def lineage(self) -> str:
        return self.states[0].digest

    def then(
        self,
        name: str,
        classes: Sequence[str],
        deltas: Sequence[Any],
        ranks: Mapping[str, int] | None = None,
        changed: Sequence[int] = (),
        **fields: Any,
    ) -> Chain:
        """One task more. ranks: of the projections it adapts. changed: known rows that change.

        step: rank of their step. confidence: in place of the one drawn. The rest: of the update.
        """
        live = len(self.state.live) + len(classes) - len(fields.get("retired", ()))
        confidence = fields.pop("confidence", None) or confident(name, live)
        head = self._head(name, len(classes), changed, fields.pop("step", 3), confidence)
        factors = {}
        for p in PROJECTIONS:
            if rank := (ranks or {}).get(p.name, 0):
                A, B = (
                    drawn(f"{name} {p.name} A", rank, p.columns),
                    drawn(f"{name} {p.name} B", p.stop - p.start, rank),
                )
                factors[p.name] = encoding.encode(
                    Factors(A / np.float32(3), B / np.float32(5)), self.encoding
                )
                factors[p.name].stored["A"].flat[:2] = UNUSUAL[self.encoding]
        number = len(self.states)
        update = TaskUpdate(
            number, name, tuple(classes), np.array(deltas, np.float64), head, factors, **fields
        )
        return replace(
            self,
            states=(*self.states, advance(self.state, update)),
            updates=(*self.updates, update),
        )

    def _head(
        self, name: str, n: int, changed: Sequence[int], rank: int, confidence: Confidence
    ) -> HeadUpdate:
        """The drawn rows of a task with n classes."""
        m = len(changed)
        rank = rank if m else 0
        left = (drawn(f"{name} left", m, rank) * 127).astype(np.int8)
        left.flat[:1] = -128
        right = (drawn(f"{name} right", rank, FEATURES) * 127).astype(np.int8)
        right.flat[:2] = -128, 127
        return HeadUpdate(
            (drawn(f"{name} rows", n, FEATURES) * 127).astype(np.int8),
            (1 + np.arange(n, dtype=np.float32)) / np.float32(300),
            drawn(f"{name} biases", n) / np.float32(3),
            np.array(changed, np.int32),
            left,
            right,
            (1 + np.arange(m, dtype=np.float32)) / np.float32(30_000 * max(1, rank)),
            drawn(f"{name} known biases", m) / np.float32(3),
            confidence,
        )

    def weights(self) -> dict[str, np.ndarray]:
        """W_t, float64."""
        merged = {name: w.astype(np.float64) for name, w in W.items()}
        for i, p in enumerate(PROJECTIONS):
            for row, update in zip(self.state.magnitudes, self.updates, strict=True):
                if f := update.factors.get(p.name):
                    alpha = np.float32(row[i] if np.ndim(row) else row).astype(np.float64)
                    merged[p.tensor][p.start : p.stop] += alpha * (
                        f.B.astype(np.float64) @ f.A.astype(np.float64)
                    )
        return merged

    def logits(self, seed: int, count: int = 2) -> np.ndarray:
        """Of a canary's inputs, float32 (count, live classes)."""
        inputs = [*canary.inputs(seed, self.reads, count).values()]
        if self.reads is TOKENIZATION:
            ids, mask = inputs
            hidden = (TOKENS[ids] * mask[..., None]).astype(np.float64).sum(axis=1)
        else:
            hidden = inputs[0].astype(np.float64).reshape(count, -1)
        for w in self.weights().values():
            hidden = np.maximum(hidden @ w.T, 0)
        logits = hidden @ self.state.head_weight.astype(np.float64).T + self.state.head_bias
        return logits[:, self.state.live].astype(np.float32)

    def expected(self, dtype: str = "float32") -> dict[str, Any]:
        """The entry of `states` in vectors.json. dtype: of the bundle's weights."""
        factors = {
            f"{u.task}.{name}.{part}": np.ascontiguousarray(getattr(f, part), np.float32)
            for u in self.updates
            for name, f in u.factors.items()
            for part in "AB"
        }
        return {
            "classes": list(self.state.classes),
            "head": tensors_digest(
                {HEAD_WEIGHT: self.state.head_weight, HEAD_BIAS: self.state.head_bias}
            ),
            "factors": tensors_digest(factors),
            "answers": self.answers(),
            "weights": {name: fingerprint(w.astype(dtype)) for name, w in self.weights().items()},
        }

    def answers(self) -> list[dict[str, Any]]:
        """What the samples are worth."""
        known, given = self.state.confidence, (samples(len(self.state.live)), sample_features())
        found = known.scores(*given), known.known(*given), known.probabilities(given[0])
        return [
            {
                "logits": z.tolist(),
                "features": x.tolist(),
                "score": round(float(u), 6),
                "known": bool(k),
                "probabilities": p.round(6).tolist(),
            }
            for z, x, u, k, p in zip(*given, *found, strict=True)
        ]


def fingerprint(weight: np.ndarray) -> list[float]:
    """Its sum, and the sum of its values times ((3 row + 5 column) mod 7) - 3."""
    rows, columns = np.indices(weight.shape)
    w = weight.astype(np.float64)
    return [float(w.sum()), float((w * ((3 * rows + 5 * columns) % 7 - 3)).sum())]


@dataclass(frozen=True)
class Export:
    """How a bundle is made of a chain."""

    chain: Chain
    trust: signing.Trust
    revisions: tuple[int, ...] = ()
    dtype: str = "float32"
    capacity: int = 0
    canary_tolerance: float | None = None

    def write(self, folder: Path) -> None:
        """A capacity makes the weights constants of the model."""
        folder.mkdir(parents=True)
        state = self.chain.state
        weights = {name: w.astype(np.float32) for name, w in self.chain.weights().items()}
        weights |= {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
        places = write_model(
            {n: with_room(n, w, self.capacity) for n, w in weights.items()},
            folder,
            self.dtype,
            bool(self.capacity),
            self.chain.reads,
        )
        for name, data in self.chain.reads.files.items():
            atomic.write(folder / name, data)
        stored = {
            f"{u.task}.{n}": t
            for u in self.chain.updates
            for n, t in factor_tensors(u.factors).items()
        }
        stored |= state.confidence.tensors()
        stored[CANARY_LOGITS] = logits = self.chain.logits(SEED)
        atomic.write(
            folder / FACTORS,
            safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in stored.items()}),
        )
        atomic.write(folder / bundle.CLASSES, classes_json(state.classes))
        atomic.write(folder / TRUST, dump_json(self.trust.to_dict()))
        tolerance = 1e-4 if self.dtype == "float32" else 1e-2
        manifest = Manifest(
            states=tuple(state.digest for state in self.chain.states),
            task_name=state.name,
            model="vectors",
            features="last",
            target="onnx",
            precision="fp32" if self.dtype == "float32" else "fp16",
            tolerance=tolerance,
            min_agreement=1.0,
            weights_as=CONSTANTS if self.capacity else INPUTS,
            capacity=self.capacity,
            encoding=self.chain.encoding,
            magnitudes=tuple(state.magnitudes.tolist()),
            preprocessing=self.chain.reads.to_manifest(),
            projections=PROJECTIONS,
            weights=places,
            canary=Canary(SEED, len(logits), self.canary_tolerance or tolerance),
            made_with={},
            files={path.name: bundle.describe(path) for path in sorted(folder.iterdir())},
            revisions=self.revisions,
        )
        atomic.write(folder / MANIFEST, manifest.to_json())


def write_model(
    weights: Mapping[str, np.ndarray],
    folder: Path,
    dtype: str,
    constants: bool,
    reads: Preparation,
) -> dict[str, dict[str, Any]]:
    """The network for ONNX Runtime. Returns the manifest's `weights`."""
    stored = {
        name: w.astype(np.float32 if name == HEAD_BIAS else dtype) for name, w in weights.items()
    }
    if reads is TOKENIZATION:
        inputs, nodes, own = _of_texts()
    else:
        inputs = [helper.make_tensor_value_info("pictures", TensorProto.FLOAT, ["batch", 3, 4, 4])]
        nodes, own = [helper.make_node("Flatten", ["pictures"], ["hidden.0"], axis=1)], []
    for name, array in stored.items():
        nodes.append(helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        shape = ["classes", *array.shape[1:]] if name in (HEAD_WEIGHT, HEAD_BIAS) else array.shape
        inputs += (
            []
            if constants
            else [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), shape
                )
            ]
        )
    for i, name in enumerate(SHAPES):
        nodes.append(
            helper.make_node("Gemm", [f"hidden.{i}", f"{name}.float"], [f"sum.{i}"], transB=1)
        )
        nodes.append(helper.make_node("Relu", [f"sum.{i}"], [f"hidden.{i + 1}"]))
    nodes.append(helper.make_node("Identity", [f"hidden.{len(SHAPES)}"], ["features"]))
    head = [f"hidden.{len(SHAPES)}", f"{HEAD_WEIGHT}.float", f"{HEAD_BIAS}.float"]
    nodes.append(helper.make_node("Gemm", head, ["logits"], transB=1))
    outputs = [
        helper.make_tensor_value_info(
            "logits",
            TensorProto.FLOAT,
            ["batch", len(stored[HEAD_BIAS]) if constants else "classes"],
        ),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES]),
    ]
    initial = [
        numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()
    ]
    initial += own
    graph = helper.make_graph(nodes, "vectors", inputs, outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    places = _store_externally(model.graph, list(stored), folder / WEIGHTS)
    atomic.write(folder / MODEL, model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(folder / MODEL))
    return places


def _of_texts() -> tuple[list[Any], list[Any], list[Any]]:
    """(inputs, nodes up to `hidden.0`, constants): the sum of the tokens' rows in TOKENS."""
    names = (*TOKENIZATION.axes,)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in names
    ]
    nodes = [
        helper.make_node("Gather", ["tokens", names[0]], ["rows"]),
        helper.make_node("Cast", [names[1]], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["hidden.0"], keepdims=0),
    ]
    constants = {"tokens": TOKENS, "last": np.array([2]), "middle": np.array([1])}
    return inputs, nodes, [numpy_helper.from_array(a, name) for name, a in constants.items()]
