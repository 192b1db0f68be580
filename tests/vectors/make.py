"""Writes the test vectors of docs/packet.md beside itself: python tests/vectors/make.py. They change only with the format.

bundle/                  a tiny ViT on digits, four classes, packets in fp16, 1 key; exported before the first task
1.sdlora                 task 1
keys.sdlora              from the key `a` to `b` and `c`, both of which must sign
2.sdlora                 task 2, signed by b and c; the aligned head changes rows of known classes
recall.sdlora            takes task 2 back
squash.sdlora            tasks 2 and 3, revision 1
int8.sdlora, int4.sdlora task 1 in the lineages of these encodings, signed by a
a.pub, b.pub, c.pub      public keys (the private ones were thrown away)
expected.json            what comes out: see `expected`
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import host_logits

from sdlora_edge import orders, packet, signing
from sdlora_edge.canonical import tensors_digest
from sdlora_edge.device import canary
from sdlora_edge.orders import Recalled
from sdlora_edge.state import TaskState
from sdlora_edge.train.config import resolve
from sdlora_edge.train.run import Run
from sdlora_edge.train.trainer import train

FOLDER = Path(__file__).resolve().parent
SMALL = {"base_epochs": 3, "epochs": 2, "lr": 0.05, "rank": "2", "head": "aligned"}


def main() -> None:
    for path in FOLDER.iterdir():
        if path.name not in ("make.py", "__pycache__"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = train(resolve(None, SMALL), folder / "run")
        pairs = {name: signing.new_key(name, folder) for name in "abc"}
        signers = {name: signing.load_signer(private) for name, (private, _) in pairs.items()}
        for _, public in pairs.values():
            shutil.copy(public, FOLDER)
        export_bundle(Run.open(run.path), FOLDER / "bundle", 0, [str(pairs["a"][1])])

        def sign(names: str) -> Any:
            return lambda payload: signing.sign(payload, [signers[name] for name in names])

        def build(view: Run, tasks: list[int], names: str, revision: int = 0) -> bytes:
            logits = host_logits(view, tasks[-1], canary.inputs(tasks[-1], view.preprocessing))
            updates = [view.updates[t - 1] for t in tasks]
            before = view.states[tasks[0] - 1]
            revisions = [revision] * len(tasks)
            return packet.build(updates, before, view.lineage, tasks[-1], logits, sign(names), view.config.encoding, revisions)

        trust = signing.Trust(tuple(signers[name].public_key for name in "bc"), 2, 2)
        made = {
            "1": build(run, [1], "a"),
            "keys": orders.build_trust(trust, sign("abc")),
            "2": build(run, [2], "bc"),
            "recall": orders.build_recall(run.lineage, Recalled(2, 0), sign("bc")),
            "squash": build(run, [2, 3], "bc", 1),
            **{encoding: build(run.encoded(encoding), [1], "a") for encoding in ("int8", "int4")},
        }
        for name, data in made.items():
            (FOLDER / f"{name}{packet.SUFFIX}").write_bytes(data)
        values = {"1": expected(run, 1), "2": expected(run, 2), "squash": expected(run, 3)}
        values |= {encoding: expected(run.encoded(encoding), 1) for encoding in ("int8", "int4")}
        (FOLDER / "expected.json").write_text(json.dumps(values, indent=1) + "\n")


def expected(run: Run, task: int) -> dict[str, Any]:
    """After a packet: the state; digests of what is equal to the bit everywhere (the head, and every decoded factor of the packet's
    last task); and of each adapted weight, the sum, the sum of squares and the first four numbers of row 1, computed in float64.
    """
    state: TaskState = run.states[task]
    head = {"head.weight": state.head_weight, "head.bias": state.head_bias}
    factors = {f"{n}.{part}": np.ascontiguousarray(getattr(f, part), np.float32) for n, f in state.factors.items() for part in "AB"}
    weights = {name: w.astype(np.float64) for name, w in run.base_weights.items()}
    for p in run.projections:
        for alpha, f in zip(state.magnitudes, run.factors(task), strict=True):
            product = f[p.name].B.astype(np.float64) @ f[p.name].A.astype(np.float64)
            weights[p.tensor][p.start : p.stop] += float(np.float32(alpha)) * product
    sums = {name: [float(w.sum()), float((w**2).sum()), *w[1, :4].tolist()] for name, w in weights.items()}
    return {
        "state": state.digest,
        "classes": list(state.classes),
        "head": tensors_digest(head),
        "factors": tensors_digest(factors),
        "weights": sums,
    }


if __name__ == "__main__":
    main()
