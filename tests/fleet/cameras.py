"""Devices that report, each with a real key."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from reported import REPORT
from securesystemslib.signer import CryptoSigner

from sdlora_edge.fleet.identity import Identity
from sdlora_edge.fleet.report import Predictions, Report, seal

NOW = 1_800_000_000
TOKEN = "0123456789abcdef-of-a-test"  # noqa: S105


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


@dataclass
class Camera:
    """A device. `report` makes its next report, which differs from the usual one in `changes`."""

    name: str
    channel: str = "line-3"
    groups: tuple[str, ...] = ()
    number: int = 0
    signer: CryptoSigner = field(default_factory=CryptoSigner.generate_ed25519)

    @property
    def id(self) -> str:
        return digest(self.name)[:32]

    @property
    def identity(self) -> Identity:
        public = self.signer.public_key.keyval["public"]
        return Identity(self.id, self.name, self.channel, self.groups, "", (), public)

    def report(self, time: int = NOW, **changes: Any) -> Report:
        self.number += 1
        own = {"device": self.id, "name": self.name, "channel": self.channel, "groups": self.groups}
        usual = {"errors": (), "waiting": "", "step": None, "predictions": Predictions(time)}
        return replace(REPORT, **own, number=self.number, time=time, **{**usual, **changes})

    def sealed(self, time: int = NOW, **changes: Any) -> bytes:
        return seal(self.report(time, **changes), self.signer)

    def file(self, folder: Path) -> Path:
        """What `device identity --json` prints."""
        path = folder / f"{self.id}.json"
        path.write_text(json.dumps(self.identity.to_dict()))
        return path


def predicted(since: int, unknown: int = 0, **by_class: int) -> Predictions:
    """Counts of a period."""
    return Predictions(since, sum(by_class.values()) + unknown, unknown, 9000, by_class, 0)


@contextlib.contextmanager
def collector(folder: Path, *options: str, token: str = TOKEN) -> Iterator[str]:
    """The URL of a real `fleet serve` on a free port."""
    environment = {**os.environ, "SDLORA_EDGE_FLEET_TOKEN": token, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sdlora_edge", "fleet", "serve", "--port", "0", *options]
    with (folder / "serve.log").open("ab") as log:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with child:  # closes its output
            assert child.stdout
            try:
                line = child.stdout.readline()
                assert line.startswith("fleet: "), (folder / "serve.log").read_text()
                yield line.removeprefix("fleet: ").strip()
            finally:
                child.send_signal(signal.SIGTERM)
                code = child.wait(20)
        assert code == 0, (folder / "serve.log").read_text()


def eventually(check: Any, seconds: float = 15) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
