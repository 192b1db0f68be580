"""What the attacks are told with: a device, and what it must do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import Result, snapshot

Cli = Callable[..., Result]


@dataclass(frozen=True)
class Victim:
    """A device at task 1 of the fleet's three. `next` is the packet it would take."""

    cli: Cli
    store: Path
    images: list[Path]
    next: Path
    folder: Path
    signer: Any

    def file(self, data: bytes, name: str = "evil.sdlora") -> Path:
        """The bytes, as a file that could have been downloaded."""
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def apply(self, *packets: Path | bytes) -> Result:
        files = [
            p if isinstance(p, Path) else self.file(p, f"{i}.sdlora") for i, p in enumerate(packets)
        ]
        return self.cli("device", "apply", *files, "--store", self.store)

    def stand(self) -> Any:
        """What a user sees of the device: where it stands, and what it says to images."""
        seen = []
        for command in (("status",), ("predict", *self.images)):
            result = self.cli("device", *command, "--store", self.store, "--json")
            assert result.code == 0, result
            seen.append(json.loads(result.out))
        return seen

    def refuses(self, packet: Path | bytes, code: int, word: str) -> None:
        """One clear line, this exit code, and no change of the store or of a prediction."""
        self.refuses_each([(packet, code, word)])

    def refuses_each(self, packets: Iterable[tuple[Path | bytes, int, str]]) -> None:
        """The same for several packets. What a user sees is compared after the last one."""
        stand, before = self.stand(), snapshot(self.store)
        for packet, code, word in packets:
            said_no(self.apply(packet), code, word)
            assert snapshot(self.store) == before
        assert self.stand() == stand


def said_no(result: Result, code: int, word: str) -> None:
    """One line that says why, and nothing else but the stages of long work."""
    assert (result.code, result.out) == (code, ""), result
    lines = [line for line in result.err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result
    assert lines[0].startswith("error: "), result
    assert word in lines[0], result
    assert len(lines[0]) < 1200, result
    assert lines[0].isprintable(), result
