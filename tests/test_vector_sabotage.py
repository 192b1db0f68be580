"""The test vectors prove something: a reader with one of these mistakes fails at least one.

Each mistake changes one line of the reader: vectors_reader.py, vectors_file.py, vectors_image.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import vectors_file
import vectors_image
import vectors_reader
from vectors_run import INDEX, VECTORS, flash_reader, wrong, wrong_image

SOURCES = {
    module.__name__: Path(module.__file__).read_text() for module in (vectors_file, vectors_reader)
}
RULES = [
    (name, found.start())
    for name, source in SOURCES.items()
    for found in re.finditer(r"(?<!def )\bneed\(", source)
]
"""where the reader refuses something"""
TOO_LARGE = "need(len(data) <= 64 << 20)"
"""the one rule without a vector, which would be as large"""

MISTAKES = {
    # signatures and keys
    "a signature of a known key is not checked": (
        "        return False\n",
        "        return True\n",
    ),
    "the threshold is ignored": ('good >= trust["threshold"]', "good >= 1"),
    "every signature must be good": ("good += ", "good = "),
    "one key counts twice": ('({signature["keyid"] for signature in signatures})', "(signatures)"),
    "a payload of another type is taken": ('need(envelope["payloadType"] == TYPE, 4)', "pass"),
    "new keys need not sign": ("verified(envelope, new)", "verified(envelope, self.trust)"),
    "old keys stay in force": (
        "self.trust = new",
        'self.trust = {**self.trust, "version": new["version"]}',
    ),
    "a signature's second half is read in the wrong order": (
        'sig[32:], "little"',
        'sig[32:], "big"',
    ),
    "a key may be the neutral element": (" and x != 0", ""),
    "a key may be of any order": (" and ends", ""),
    "texts of a canary have one length": ("- 5 * i", "- 0 * i"),
    # form
    "base64 is not checked": ("need(base64.b64encode(data).decode() == text)", "pass"),
    "the header is not checked": (
        'need(data[8 : 8 + n] == text + b" " * (-len(text) % 8))',
        "pass",
    ),
    "the content's digest is not checked": (
        'need(manifest["content"] == sha(plain(table), content))',
        "pass",
    ),
    "whole numbers may be floats": ("type(value) is int and 0", "0"),
    "tensors may come in any order": (
        "(-dtypes[name].itemsize, name)",
        'table[name]["data_offsets"]',
    ),
    "names need not be in NFC": ('unicodedata.is_normalized("NFC", name)', "True"),
    "names may hold control characters": ("unicodedata.category(c) in controls or ", ""),
    "NaN is within the limits": (
        "(np.abs(values) <= most).all()",
        "not (np.abs(values) > most).any()",
    ),
    "scales have the limit of factors": ("LARGEST / 128 if scale else LARGEST", "LARGEST"),
    # the head
    "the rows of head.old.index are the first ones": (
        "weight[index] +=",
        "weight[: len(index)] +=",
    ),
    "the biases of head.old.index are the first ones": ("bias[index] =", "bias[: len(index)] ="),
    "known biases are added": ("bias[index] =", "bias[index] +="),
    "the scale of known rows is ignored": (' * own["head.old.scale"][:, None]', ""),
    "known rows are rounded once": (
        "weight[index] += (left @ right).astype(np.float32)",
        "weight[index] = weight[index] + (left @ right)",
    ),
    "steps are summed in 16 bits": ("astype(np.int64) for side", "astype(np.int16) for side"),
    "steps are summed in float16": (
        "(left @ right).astype(",
        "(left @ right).astype('f2').astype(",
    ),
    "left and right are unsigned": (
        '{side}"].astype',
        '{side}"].view(np.uint8).astype',
    ),
    "the scale of new rows is ignored": (' * own["head.new.scale"][:, None]', ""),
    "new rows share a scale": ('own["head.new.scale"][:, None]', 'own["head.new.scale"][:1, None]'),
    "new rows come first": ("[weight, rows]", "[rows, weight]"),
    # what the logits are worth
    "the temperature multiplies": ("/ float(own", "* float(own"),
    "the temperature is ignored": ('/ float(own["head.temperature"][0])', ""),
    "the threshold itself is unknown": ("score >= least", "score > least"),
    "without a threshold nothing is known": ("known = all(", "known = any("),
    "the score ignores the components": (" - (parts**2).sum()", ""),
    "components are not squared": ("(parts**2).sum()", "parts.sum()"),
    "the scale of components is ignored": ('own["head.unknown.scale"] * inner', "inner"),
    "the bias of components is ignored": (' + own["head.unknown.bias"]', ""),
    "components are unsigned": (
        'own["head.unknown.weight"].astype(np.float64)',
        'own["head.unknown.weight"].view(np.uint8).astype(np.float64)',
    ),
    "the temperature before stays": (
        "factors, confidence_of(own))",
        "factors, {**confidence_of(own), 'head.temperature': s.confidence['head.temperature']})",
    ),
    "retired rows have a place in the unknown score": (
        "check_confidence(own, len(live(classes)), ",
        "check_confidence(own, len(classes), ",
    ),
    "the score ignores the features": ("score -= float((away**2).sum())", "pass"),
    "the precision is a variance": ("float((away**2).sum())", "float(away.sum())"),
    "the mean is not taken off": ('(x - own["head.unknown.mean"])', "x"),
    "a temperature is anything above 0": ("temperature[0] >= 2.0**-24", "temperature[0] > 0"),
    "a threshold has the limit of weights": (
        "(np.abs(threshold) <= 1_000_000)",
        "(np.abs(threshold) <= LARGEST)",
    ),
    "the bias is ignored": ("hidden @ head.T + bias", "hidden @ head.T"),
    # encodings
    "int8 is taken as unsigned": (
        "x.astype(np.float32) * own",
        "x.view(np.uint8).astype(np.float32) * own",
    ),
    "int8 ends at -127": (
        "x.astype(np.float32) * own",
        "np.maximum(x, -127).astype(np.float32) * own",
    ),
    "int4: the upper four bits come first": ("[x & 15, x >> 4]", "[x >> 4, x & 15]"),
    "int4: eight stands for zero": ("np.where(halves > 7, halves - 16, halves)", "(halves - 8)"),
    "int4: -8 is taken as 8": ("halves > 7", "halves > 8"),
    "int4: blocks of scales alternate": ("// 32]", "% scale.shape[1]]"),
    "int4: one scale for a whole row": ("// 32]", "* 0]"),
    "fp16: subnormal numbers are zero": (
        "x.T if turned else x.astype(np.float32)",
        "x.T if turned else np.where(np.abs(x) < 2.0**-14, 0, x).astype(np.float32)",
    ),
    "B is turned in int8 alone": ('encoding in ("int8", "int4")', 'encoding == "int8"'),
    # digests
    "deltas are rounded to float32": ("np.array(value, np.float64)", "np.array(value, np.float32)"),
    "deltas have another unit": ("np.array(value, np.float64) / UNIT", "np.array(value) / 2**23"),
    "deltas are digested as fractions": (
        '{**fields, "tensors"',
        '{**fields, "deltas": deltas.tolist(), "tensors"',
    ),
    "class names are not digested": ('("classes", "deltas",', '("deltas",'),
    "new names are not digested": ('"renamed", "retired")', '"retired")'),
    "retired rows are not digested": ('"renamed", "retired")', '"renamed")'),
    # classes
    "a retired row keeps its weight": ("weight[retired], bias[retired] = 0,", "bias[retired] ="),
    "a retired row keeps its bias": (
        "weight[retired], bias[retired] = 0, -1e30",
        "weight[retired] = 0",
    ),
    "a retired row has the bias -inf": ("= 0, -1e30", "= 0, -np.inf"),
    "names are exchanged one after the other": (
        "        for row, name in renamed:\n            classes[row] = name\n",
        "        for row, name in renamed:\n            need(name not in classes)\n"
        "            classes[row] = name\n",
    ),
    "the name of a retired class never comes back": (
        "need(len(set(names)) == len(names))",
        "need(len(set(names)) == len(names) and not {*new} & {*before})",
    ),
    "a retired row is taken out": (
        "        classes += new\n",
        "        classes = [name for name in classes if name] + new\n",
    ),
    "retired rows have a place in the canary": (
        "need(logits.shape[1] == len(live(s.classes)))",
        "need(logits.shape[1] == len(s.classes))",
    ),
    "floats are numbers": ("parse_float=no_number", "parse_float=float"),
    "tensors are digested in the order of the file": (
        "for name in sorted(arrays):",
        "for name in arrays:",
    ),
    "states are chained in hexadecimal": (
        "sha(bytes.fromhex(s.digest), ",
        "sha(s.digest.encode(), ",
    ),
    "the state that a packet names is not checked": ('need(s.digest == m["to"])', "pass"),
    # weights
    "magnitudes are not added up": ("alpha[: number - 1] +=", "_ ="),
    "magnitudes are in the opposite order": ("zip(own, s.factors", "zip(own[::-1], s.factors"),
    "the bundle's magnitudes are not taken off": ("alpha[: len(flashed)] -=", "_ ="),
    "the bundle's factors are ignored": (
        "flashed_factors(stored, m)",
        "[{} for _ in before]",
    ),
    "projections share the mean magnitude": ("alpha[:, i] if", "alpha.mean(axis=1) if"),
    "a projection's rows are the first ones": ('slice(*p["rows"])', 'slice(p["shape"][0])'),
    "weights are not rounded to the bundle's dtype": (
        "w.astype(dtypes[name])",
        "w.astype(np.float32)",
    ),
    # the canary
    "the canary is not checked": (" <= tolerance * largest", " <= np.inf"),
    "the canary's own tolerance is ignored": (
        '["canary"]["tolerance"]',
        '["tolerance"]',
    ),
    "the canary's tolerance is absolute": ("tolerance * largest", "tolerance"),
    "the canary shows its first squares": ("[8 * y // size for y", "[y for y"),
    "the canary is blue, green, red": (
        "pixels.transpose(0, 3, 1, 2)",
        "pixels[..., ::-1].transpose(0, 3, 1, 2)",
    ),
    "the canary lies on its side": ("pixels.transpose(0, 3, 1, 2)", "pixels.transpose(0, 3, 2, 1)"),
    # order, capacity, revocations
    "another lineage is taken": (
        'need(m["lineage"] == self.bundle["states"][0], 5)\n        need(m["to"]',
        'need(m["to"]',
    ),
    "the states that led to the bundle are not known": ("flashed.before =", "_ ="),
    "the state before is not checked": (' and m["from"] == s.digest', ""),
    "a capacity of 0 is no room": ('0 < self.bundle["capacity"] <', 'self.bundle["capacity"] <'),
    "a full capacity is too much": (
        '< self.bundle["capacity"] < len',
        '< self.bundle["capacity"] <= len',
    ),
    "only the last task of a squash is followed": (
        "in enumerate(tasks, a + 1):",
        "in [(t, tasks[-1])]:",
    ),
    "only the first task of a squash may be revoked": (
        "any(self.is_revoked(*one) for one in revisions.items())",
        "self.is_revoked(a + 1, revisions[a + 1])",
    ),
    "only the newest packet is applied already": ("not in (s.digest, *s.before)", "!= s.digest"),
    "keys are never applied already": ("{*self.rotations, *(s.file", "{*(s.file"),
    "a revocation is forgotten": (
        "self.revoked.append((task, revision))",
        "self.revoked.append((task, -1))",
    ),
    "a revision revokes nothing": ("self.revoked +=", "_ ="),
    "a revocation drops one packet": ("while any(self", "if any(self"),
    "a revocation is of one task": ("task >= i and revision <= r", "task == i and revision <= r"),
    "a revocation is of every revision": ("task >= i and revision <= r", "task >= i"),
    "what was rolled back may come again": (
        "(revisions[t], t) > self.highest",
        "(revisions[t], t) > (s.revision, 0)",
    ),
    "the task counts before the revision": (
        "(revisions[t], t) > self.highest",
        "(t, revisions[t]) > self.highest[::-1]",
    ),
    "the bundle is not newer than any packet": (
        "self.highest = (revision, task)",
        "self.highest = (0, 0)",
    ),
    "a device forgets the revision that it is in": (
        "s.revision, s.revisions, s.file = revisions[t],",
        "s.revision, s.revisions, s.file = 0,",
    ),
}
"""{what is wrong: (a line of the reader, what it is changed to)}"""
IMAGE_MISTAKES = {
    "columns are resized first": (
        """    image = one_pass(image, width, interpolation)
    return one_pass(image.transpose(1, 0, 2), height, interpolation).transpose(1, 0, 2)
""",
        """    image = one_pass(image.transpose(1, 0, 2), height, interpolation).transpose(1, 0, 2)
    return one_pass(image, width, interpolation)
""",
    ),
    "there is no antialiasing": ("stretch = max(scale, 1.0)", "stretch = 1.0"),
    "an enlarged image is sharpened": ("stretch = max(scale, 1.0)", "stretch = scale"),
    "bicubic is that of OpenCV": ("a, x = -0.5", "a, x = -0.75"),
    "weights are not rounded": (
        "[int(x * 2**22 + (0.5 if x >= 0 else -0.5)) for x in w]",
        "[int(x * 2**22) for x in w]",
    ),
    "values are rounded down": ("total = 2**21 + ", "total = "),
    "values wrap around": (".clip(0, 255)", ""),
    "pixels lie on corners": ("center = (i + 0.5) * scale", "center = i * scale"),
    "nearest rounds": ("int(place)", "round(place)"),
    "the size is rounded": ("width * resize // short", "round(width * resize / short)"),
    "the crop begins at half a pixel rounded down": (
        "round((side - size) / 2)",
        "(side - size) // 2",
    ),
    "padding is at the end": ("begin = (size - side) // 2", "begin = 0"),
    "a border is black": ('p["crop_mode"] == "border" else', "False else"),
    "squash keeps the shape": ('mode == "squash"', "False"),
    "border crops": ('mode == "border"', "False"),
    "channels are blue, green, red": (
        "scaled.transpose(2, 0, 1)",
        "scaled[..., ::-1].transpose(2, 0, 1)",
    ),
    "numbers are float64": ("np.float32(np.array(p[name]) / UNIT)", "np.array(p[name]) / UNIT"),
    "values end at 256": ("np.float32(255)", "np.float32(256)"),
}
"""the same of tests/vectors_image.py"""


def failure(sources: dict[str, str]) -> str:
    """The first vector that a reader of these sources fails, and how."""
    with patch.dict(sys.modules), np.errstate(all="ignore"):
        for name, source in sources.items():
            sys.modules[name] = ModuleType(name)
            exec(compile(source, name, "exec"), vars(sys.modules[name]))  # noqa: S102
        reader = vars(sys.modules["vectors_reader"])
        fast_first = sorted(
            VECTORS, key=lambda vector: ("keys" in vector["name"], len(vector["steps"]))
        )
        found = (
            wrong(vector, lambda bundle: flash_reader(reader, bundle)) for vector in fast_first
        )
        return next(filter(None, found), "")


def test_the_reader_as_it_is_fails_none() -> None:
    assert not failure(SOURCES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str) -> None:
    right, sabotaged = MISTAKES[mistake]
    assert [source.count(right) for source in SOURCES.values()] in ([0, 1], [1, 0])
    assert failure({name: source.replace(right, sabotaged) for name, source in SOURCES.items()})


@pytest.mark.parametrize("mistake", IMAGE_MISTAKES)
def test_a_mistake_with_an_image(mistake: str) -> None:
    right, sabotaged = IMAGE_MISTAKES[mistake]
    source = Path(vectors_image.__file__).read_text()
    assert source.count(right) == 1
    module: dict[str, Any] = {}
    exec(compile(source.replace(right, sabotaged), "vectors_image", "exec"), module)  # noqa: S102
    assert any(wrong_image(entry, module["pictures"]) for entry in INDEX["images"])


@pytest.mark.parametrize(("name", "place"), RULES)
def test_a_rule_that_is_forgotten(name: str, place: int) -> None:
    source = SOURCES[name]
    forgotten = f"{source[:place]}(lambda *of: None)({source[place:].removeprefix('need(')}"
    assert bool(failure({**SOURCES, name: forgotten})) != source.startswith(TOO_LARGE, place)
