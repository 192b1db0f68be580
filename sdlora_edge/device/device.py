"""The device: the public class, and its life cycle."""

from __future__ import annotations

from pathlib import Path

from ..errors import HealthError, NothingToDo
from ..formats.bundle import open_bundle
from ..results import Status, Verification
from ..shortage import noticed
from . import trial
from .applying import Intake
from .serving import DOUBLE_BUFFER, IN_PLACE
from .store import Store
from .verify import verified

__all__ = ["DOUBLE_BUFFER", "IN_PLACE", "Device", "open_store"]


class Device(Intake):
    """A device's model. Any number of threads may call `predict` while one thread calls `apply`."""

    @classmethod
    def init(
        cls,
        bundle: Path | str,
        store: Path | str,
        unproved: bool = False,
        group: str | None = None,
        provider: str = "",
    ) -> Device:
        """Make a store from a bundle, if this device computes what the host computed.

        Args:
            bundle: The bundle's folder.
            store: The new store; it belongs to this user alone.
            unproved: As for `open`.
            group: Name or number of a group whose members may read the store, and so predict.
            provider: As for `open`. The store does not remember it.

        Raises:
            InputError: The bundle is damaged.
            UsageError: The store exists, or the group does not.
            HealthError: The canary fails, or the model crashes.
        """
        opened = open_bundle(Path(bundle))
        Store.create(
            Path(store),
            opened,
            lambda new: cls.open(
                trial.tried(new, unproved, open_store, provider),
                unproved=unproved,
                provider=provider,
            ),
            group,
        )
        return cls.open(store, unproved=unproved, provider=provider)

    @classmethod
    @noticed("while the store was opened")
    def open(
        cls,
        store: Path | str,
        threads: int = 0,
        unproved: bool = False,
        swap: str = DOUBLE_BUFFER,
        provider: str = "",
    ) -> Device:
        """Open a store in the generation in force. Verifies every file and runs the canary.

        If a packet is damaged or unreadable, or the canary fails, the longest intact and healthy
        prefix of the generation is served instead, and `status().damage` says so. What has been
        confirmed stays confirmed: apply the damaged packet again to repair the store.

        Opening writes nothing and takes no lock, so everyone who may read the store can open it.
        One exception: an ExecuTorch pair that was not published yet is published, if possible.

        Args:
            store: The store's folder.
            threads: Threads of the engine; 0 leaves the number to the engine.
            unproved: The engine's runtime is not installed (`engines.Engine.runs`). Updates are
                verified, merged and published; the program that loads them must try the canary.
            swap: DOUBLE_BUFFER builds an update beside the weights that serve, and no prediction
                ever waits. IN_PLACE frees those first, for a device without memory for both:
                predictions wait until the new weights are proved, or the old ones are back.
            provider: ONNX Runtime's execution provider: cpu, cuda, tensorrt, openvino, coreml or
                qnn. Default: that of SDLORA_EDGE_ONNX_PROVIDER in the environment, else cpu.

        Raises:
            InputError, TrustError, HealthError: Nothing can be served.
            ResourceError: Memory ran out.
            UsageError: There is no such provider.
        """
        opened = Store(Path(store))
        device = cls(opened, open_bundle(opened.path / "bundle"), threads, unproved, swap, provider)
        device._publish()
        return device

    @staticmethod
    def verify(store: Path | str, unproved: bool = False) -> Verification:
        """Compare every byte of a store with what it should be, and write nothing."""
        return verified(
            Store(Path(store)),
            lambda opened: Device(opened, open_bundle(opened.path / "bundle"), unproved=unproved),
        )

    def refresh(self) -> bool:
        """Take over what another process has committed to this store. True if there was anything.

        If there was nothing, it reads only two small files. Otherwise it builds new weights as
        `apply` does: call it between images, or from a thread of its own. If it raises InputError
        or HealthError, the previous generation stays in force here.
        """
        if not self._changing.acquire(blocking=False):  # another thread is doing it
            return False
        try:
            before = self._live
            with noticed(f"while an update was taken over, {self._need}"):
                self._follow_store()
            return self._live is not before
        finally:
            self._changing.release()

    def rollback(self) -> Status:
        """Go back by one packet for good. If packets are damaged, keep those that are intact.

        If the canary fails there, go back by one more, and so on: a state in the middle of what
        `apply_all` applied as one was never proved.

        Raises:
            NothingToDo: The device is in the bundle's own state.
            HealthError: The canary fails in every earlier state.
        """
        doing = noticed(f"while the generation before was loaded, {self._need}")
        with doing, self._store.lock(), self._changing:
            self._follow_store()
            record = self._store.current()
            if not record.packets:
                raise NothingToDo(
                    "nothing to roll back: this device is in the state it was flashed with"
                )
            if self._store.damaged(record.digests):
                # Damaged since this program read them: it cannot go back to them either.
                self._restore(record)
            lost = len(record.packets) - len(self._live.packets)
            for count in range(lost or 1, len(record.packets) + 1):
                try:
                    self._commit(record.without(count), self._generations.build)
                    break
                except HealthError:
                    if count == len(record.packets):
                        raise
        return self.status()


def open_store(store: str, provider: str = "") -> None:
    """Load the model and run its canary: what the child process of `trial` does."""
    print(trial.BEGUN, flush=True)
    Device(Store(Path(store)), open_bundle(Path(store) / "bundle"), provider=provider)
