"""A device's status and its report, for the tests of the fleet."""

from __future__ import annotations

from securesystemslib.signer import CryptoSigner

from sdlora_edge.device.answers import Prediction
from sdlora_edge.fleet.identity import Identity
from sdlora_edge.fleet.report import Counted, Predictions, Surroundings, build
from sdlora_edge.fleet.sync_state import Failure, Progress, SyncState
from sdlora_edge.results import Status

SIGNER = CryptoSigner.generate_ed25519()
PUBLIC = SIGNER.public_key.keyval["public"]
DEVICE = "0123456789abcdef" * 2
KEYS = {DEVICE: PUBLIC}
WHO = Identity(DEVICE, "gate 3", "line-3", ("canary",), "", (), PUBLIC)
HERE = Surroundings(1_800_000_000, 3600, 10**9, {"sdlora-edge": "0.1", "python": "3.11"}, "Linux")
STATUS = Status(
    generation=3,
    task=2,
    task_name="jam",
    revision=1,
    highest_task=2,
    revoked=(),
    trust_version=1,
    state="a" * 64,
    lineage="b" * 64,
    bundle="c" * 64,
    model="vit",
    target="onnx",
    precision="fp32",
    classes=("cat", "dog"),
    temperature=1.0,
    threshold=0.5,
    packets=2,
    store_bytes={"bundle": 1000, "packets": 200},
    damage=(),
)
SYNC = SyncState(
    1_799_999_000,
    waiting="the wave does not include this device",
    step=Progress("d" * 64, 10, False),
    errors=(Failure(1_799_999_000, 6, "the canary differs"),),
    canary_1e9=1200,
)
COUNTS = Predictions(1_799_990_000, 120, 20, 9123, {"cat": 70, "dog": 30}, 0)
REPORT = build(STATUS, WHO, SYNC, Counted(7, COUNTS), HERE)


def predicted(name: str, probability: float = 0.5, known: bool = True) -> Prediction:
    """The answer for one image."""
    return Prediction(((name, probability), ("z", 0.1)), 1, known, 1.0, None)
