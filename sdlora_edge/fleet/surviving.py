"""Packets that kill the process that applies them must not restart a device for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..device.device import Device
from ..device.store import Store
from ..device.watch.memory import LOCK, Memory
from ..errors import UNWRITTEN, HealthError, InputError, SdloraError


@contextlib.contextmanager
def remembered(store: Store, tell: Callable[[SdloraError], object]) -> Iterator[Memory]:
    """What is known of packets that killed a process. No other process changes it meanwhile.

    Args:
        store: The device's.
        tell: Gets the error if a packet pauses from now on, or if the memory is malformed.

    Raises:
        UsageError: Another process applies packets.
        StorageError: The memory cannot be written.
    """
    memory = Memory(store)
    with store.lock(LOCK):
        try:
            memory.recollect()
        except UNWRITTEN:
            raise
        except (HealthError, InputError) as error:
            tell(error)
        yield memory


def apply_all(device: Device, files: Mapping[str, Path], memory: Memory) -> float | None:
    """Apply packets as one, or one by one if a process was killed over some of them.

    Args:
        device: The device.
        files: Digest to file, in their order.
        memory: What is remembered; its lock is held.

    Returns:
        The largest difference of the canary; None if no packet was applied.
    """
    digests, canary = [*files], None
    for some in [digests] if memory.may_go_together(digests) else [[one] for one in digests]:
        with memory.trying(some):
            canary = device.apply_all([files[digest] for digest in some]).canary_difference
    return canary
