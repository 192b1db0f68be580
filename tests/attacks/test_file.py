"""Attacks on the file itself, for which no key is needed."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from attacks_kit import Victim, said_no
from conftest import Fleet, Result, snapshot
from forge import Draft, framed, joined, split

from sdlora_edge.errors import InputError, SdloraError, TrustError
from sdlora_edge.formats import container, control

HEADER = json.dumps(
    {"__metadata__": {"envelope": "{}", "format": container.FORMAT}},
    sort_keys=True,
    separators=(",", ":"),
).encode()


def test_arbitrary_packet(victim: Victim, fleet: Fleet) -> None:
    """TUF: arbitrary installation. Files that are no packets at all."""
    random = np.random.default_rng(0)
    cases: list[tuple[Path | bytes, str]] = [
        (random.bytes(5000), "header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "header"),
        (b"PK\3\4" + bytes(100), "header"),
        ((fleet.bundle / "model.onnx").read_bytes(), "header"),
        ((fleet.bundle / "factors.safetensors").read_bytes(), "envelope"),
        (victim.folder, "directory"),
        (victim.folder / "missing.sdlora", "No such file"),
    ]
    victim.refuses_each((packet, 3, word) for packet, word in cases)


def test_truncated_at_every_length_class_or_one_byte_too_many(victim: Victim) -> None:
    good = victim.next.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    classes = [
        (0, "fewer than 8 bytes"),
        (1, "fewer than 8 bytes"),
        (7, "fewer than 8 bytes"),
        (8, "within its header"),
        (9, "within its header"),
        (8 + length // 2, "within its header"),
        (8 + length - 1, "within its header"),
        (8 + length, "damaged"),
        (8 + length + 1, "damaged"),
        ((8 + length + len(good)) // 2, "damaged"),
        (len(good) - 1, "damaged"),
    ]
    more = [good + b"\0", good + good]
    victim.refuses_each(
        [
            *((good[:size], 3, word) for size, word in classes),
            *((data, 3, "damaged") for data in more),
        ]
    )


def test_any_single_bit_flipped(victim: Victim, fleet: Fleet) -> None:
    """One bit of each byte of the header, every bit of a tenth of them, and of every 97th byte of the
    data, for the reader; some through the command line."""
    good = victim.next.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    dense = [
        (place, bit)
        for place in range(8 + length)
        for bit in (range(8) if place < 64 or place % 10 == 0 else [place % 8])
    ]
    sparse = [(place, place % 8) for place in [*range(8 + length, len(good), 97), len(good) - 1]]
    accepted = []
    for place, bit in dense + sparse:
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        try:
            control.read_any(bytes(bad), fleet.trust)
            accepted.append((place, bit))
        except (InputError, TrustError):
            pass
    assert accepted == []
    for place in [0, 5, 7, *range(8, 8 + length, length // 6), 8 + length, len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1
        before = snapshot(victim.store)
        result = victim.apply(bytes(bad))
        assert result.code in (3, 4), (place, result)
        said_no(result, result.code, "")
        assert snapshot(victim.store) == before


def test_flipped_signatures_without_cryptography(victim: Victim, fleet: Fleet) -> None:
    """Without `cryptography`, securesystemslib's Python code checks every bit of a signature."""
    victim.file(victim.next.read_bytes(), "good.sdlora")
    program = """
import sys; sys.modules["cryptography"] = None
import base64, collections, json, pathlib
from sdlora_edge.formats import container, control, signing
from sdlora_edge.errors import TrustError
data = pathlib.Path(sys.argv[1]).read_bytes()
trust = signing.Trust.from_dict(json.loads(pathlib.Path(sys.argv[2]).read_text()))
control.read_any(data, trust)
envelope, table, content = container.opened(data)
value = json.loads(envelope)
good = base64.b64decode(value["signatures"][0]["sig"])
for place in range(0, 60, 4):
    sig = bytearray(good)
    sig[place] ^= 1 << place % 8
    value["signatures"][0]["sig"] = base64.b64encode(sig).decode()
    envelope = json.dumps(value, sort_keys=True, separators=(",", ":"))
    bad = container.header(envelope, table) + content
    try:
        control.read_any(bad, trust)
        print("accepted", place)
    except TrustError:
        pass
print("done")
"""
    command = [
        sys.executable,
        "-c",
        program,
        str(victim.folder / "good.sdlora"),
        str(fleet.bundle / "trust.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["done"]


def test_endless_data(victim: Victim) -> None:
    """TUF: endless data. Too large for the manifest, the limit or any disk, and a pipe."""
    good = victim.next.read_bytes()
    lengths = (container.LIMITS.header + 1, 2**32, 2**63, 2**64 - 1)
    os.mkfifo(victim.folder / "pipe")
    sparse = victim.file(good, "sparse.sdlora")
    os.truncate(sparse, 1 << 40)
    cases: list[tuple[Path | bytes, int, str]] = [
        (good + bytes(1 << 20), 3, "damaged"),
        *((struct.pack("<Q", length) + good[8:], 3, "header claims") for length in lengths),
        (Path("/dev/zero"), 3, "not a file"),
        (victim.folder / "pipe", 3, "not a file"),
        (sparse, 3, "more than the"),
    ]
    begin = time.monotonic()
    victim.refuses_each(cases)
    assert time.monotonic() - begin < 60
    for command in ("inspect", "verify"):
        more = ("--bundle", victim.store / "bundle") if command == "verify" else ()
        for path in (Path("/dev/zero"), victim.folder / "pipe", sparse):
            said_no(victim.cli("packet", command, path, *more), 3, "")


def test_a_file_beyond_the_limit_is_not_read_into_memory(victim: Victim) -> None:
    sparse = victim.file(b"", "sparse.sdlora")
    os.truncate(sparse, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    said_no(victim.cli("packet", "inspect", sparse), 3, "more than the")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


BOMBS = {
    "lists in lists": b"[" * 1_000_000,
    "objects in objects": b'{"a":' * 200_000,
    "closed lists in lists": b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "a few levels too many": b'{"a":' + b"[" * 30 + b"]" * 30 + b"}",
    "levels that Python still reads": b'{"a":' + b"[" * 700 + b"]" * 700 + b"}",
    "a number of a million digits": b'{"a":' + b"9" * 1_000_000 + b"}",
    "a fraction of a million digits": b'{"a":0.' + b"3" * 1_000_000 + b"}",
    "a power beyond all numbers": b'{"a":1e400}',
    "a million digits and a point": b'{"a":' + b"9" * 1_000_000 + b".0}",
    "a huge exponent": b'{"a":1e' + b"9" * 1_000_000 + b"}",
    "many keys": b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
    "many lists": b'{"a":[' + b"[]," * 300_000 + b"0]}",
    "many escapes": b'{"a":"' + b"\\u0041" * 160_000 + b'"}',
    "terminal commands": b'{"__metadata__":{"envelope":"{}","format":"\\u001b[2J'
    + b"\\u009b" * 1000
    + b'"}}',
    "half a character": b'{"__metadata__":{"envelope":"\\ud800","format":"'
    + container.FORMAT.encode()
    + b'"}}',
    "not UTF-8": b'{"a":"\xff\xfe"}',
    "duplicate keys": HEADER[:-1] + b',"__metadata__":{}}',
    "a key twice in the table": b'{"x":0,"x":0,' + HEADER[1:],
    "NaN": b'{"a":NaN,' + HEADER[1:],
    "infinity": b'{"a":-Infinity,' + HEADER[1:],
}


def test_json_bombs_and_duplicate_keys_in_the_header(victim: Victim) -> None:
    """Refused quickly, with a short line and a small multiple of the header's memory."""
    bombs = {name: framed(text[: container.LIMITS.header - 8]) for name, text in BOMBS.items()}
    victim.refuses_each((data, 3, "") for data in bombs.values())
    for name, data in bombs.items():
        begin = time.process_time()
        said_no(victim.cli("packet", "inspect", victim.file(data)), 3, "")
        assert time.process_time() - begin < 5, name
        tracemalloc.start()
        with pytest.raises(SdloraError):
            container.opened(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * container.LIMITS.header, name


def test_json_bombs_in_the_envelope(victim: Victim) -> None:
    _, _, table, content = split(victim.next.read_bytes())
    texts = [
        text.decode("latin-1")[: container.LIMITS.header // 8]
        for text in BOMBS.values()
        if b"__metadata__" not in text
    ]
    victim.refuses_each((joined(text, table, content), 3, "") for text in texts)


def test_a_header_written_another_way(victim: Victim) -> None:
    """The signed content is the same, the file is not: one packet has one form, so one digest."""
    good = victim.next.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header, content = good[8 : 8 + length], good[8 + length :]
    value = json.loads(header)
    turned = dict(reversed(value.items()))
    ways = [
        header + bytes(b" " * 8),
        json.dumps(value).encode(),
        json.dumps(turned, separators=(",", ":")).encode(),
    ]
    ways.append(header.rstrip().replace(b'"dtype"', b'"\\u0064type"', 1))
    victim.refuses_each((framed(way, content), 3, "canonical") for way in ways)


def test_a_packet_of_another_format_is_called_by_its_format(victim: Victim) -> None:
    envelope, _, table, content = split(victim.next.read_bytes())
    other = joined(json.dumps(envelope), table, content, {"format": "sdlora-edge/packet/1"})
    victim.refuses(other, 3, "'sdlora-edge/packet/1' is not")


def test_nothing_in_a_packet_is_decompressed(victim: Victim) -> None:
    """A decompression bomb needs a reader that decompresses. This one does not."""
    good = victim.next.read_bytes()
    squeezed = (gzip.compress(good), lzma.compress(good), gzip.compress(bytes(1 << 26)))
    victim.refuses_each((data, 3, "header") for data in squeezed)


def test_a_packet_that_is_only_looked_at_gives_no_commands_to_the_terminal(
    victim: Victim, stranger: object
) -> None:
    """`inspect` proves nothing, so what it shows may come from anyone."""
    draft = Draft(victim.next)
    draft.manifest["tasks"][0] |= {
        "name": "\x1b]0;owned\x07\x9b2J\nsigned by  everybody",
        "classes": ["\u202egpj.exe", "\ud800", "a\rb"],
    }
    draft.manifest["encoding"] = "\x1b[31m"
    path = victim.file(draft.sealed(stranger))
    shown = victim.cli("packet", "inspect", path)
    assert shown.code == 0, shown
    assert all(
        line.isprintable() and not line.startswith("signed by  everybody")
        for line in shown.out.split("\n")
    )
    value = json.loads(victim.cli("packet", "inspect", path, "--json").out)
    assert value["tasks"][0]["classes"] == ["\u202egpj.exe", "\ud800", "a\rb"]
    victim.refuses(path, 4, "signature refused")
    envelope, _, table, content = split(path.read_bytes())
    envelope["signatures"][0]["keyid"] = "\x1b[2J"
    path = victim.file(
        joined(json.dumps(envelope, sort_keys=True, separators=(",", ":")), table, content)
    )
    assert json.loads(victim.cli("packet", "inspect", path, "--json").out)["signed_by"] == []


def test_the_program_ends_with_the_exit_code(victim: Victim, fleet: Fleet) -> None:
    """Once as a process of its own, as a script on a device would run it."""
    command = [
        sys.executable,
        "-m",
        "sdlora_edge",
        "device",
        "apply",
        str(victim.file(b"")),
        "--store",
        str(victim.store),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    said_no(Result(done.returncode, done.stdout, done.stderr), 3, "fewer than 8 bytes")
