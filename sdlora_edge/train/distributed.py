"""Several processes train one model: `torchrun -m sdlora_edge train ...`.

Each reads the same images and trains on its share of every batch. The first alone scores and
writes. Without torchrun there is one process, which is the first.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UsageError

TIMEOUT = timedelta(hours=12)
"""how long the other processes wait while the first one scores"""


def begin(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if any. Returns the device of this one."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) < 2:
        return device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Tell whether this is the first process, which alone scores and writes."""
    return size() == 1 or dist.get_rank() == 0


def share(count: int) -> slice:
    """Return which of a batch's images are this process's: every size()-th.

    Raises UsageError if there is none for it.
    """
    if count < size():
        raise UsageError(
            f"a batch of {count} cannot be shared by {size()} processes: give a larger --batch-size"
        )
    return slice(0, count) if size() == 1 else slice(dist.get_rank(), count, size())


def summed(value: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def agreed(text: str) -> str:
    """Return the first process's text on every process."""
    found = [text]
    if size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def wait() -> None:
    """Wait until every process is here."""
    if size() > 1:
        dist.barrier()
