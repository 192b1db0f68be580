"""The generation that a device serves, and how another one takes its place.

Its threads share one reference, `_live`: an update swaps it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import HealthError, InputError, ResourceError, UsageError
from ..formats.bundle import MANIFEST, Bundle
from ..formats.signing import Trust
from ..results import Served, Status
from ..shortage import noticed, require_memory
from ..state import TaskState
from .answers import Predictor
from .engines import open_engine
from .gate import Gate, let_go
from .generation import Generations, Live
from .records import Generation
from .store import Store

log = logging.getLogger("sdlora_edge")
DOUBLE_BUFFER, IN_PLACE = "double_buffer", "in_place"
"""how new weights replace the old ones: built beside them, or after the old ones have been given
up"""
ENGINE = 80 << 20
"""bytes of address space that an engine takes beside its model: with less, ONNX Runtime may end the
process"""
PUBLISHING = 10.0
"""seconds that an update waits for another process to publish"""


class Serving(Predictor):
    """The generation in force. One thread at a time may replace it."""

    def __init__(
        self,
        store: Store,
        bundle: Bundle,
        threads: int = 0,
        unproved: bool = False,
        swap: str = DOUBLE_BUFFER,
        provider: str = "",
    ) -> None:
        if swap not in (DOUBLE_BUFFER, IN_PLACE):
            raise UsageError(f"swap {swap!r} is unknown: choose {DOUBLE_BUFFER} or {IN_PLACE}")
        self.bundle = bundle
        self._store = store
        self._changing = threading.Lock()  # held by the one thread that may set `_live`
        self._gate: Gate | None = None
        self._need = f"which needs about {(ENGINE + 2 * bundle.model_bytes) >> 20} MB"
        record = store.current()
        if record.bundle != bundle.id:
            raise InputError(
                f"{bundle.path / MANIFEST} is not the one this store was made with: "
                "flash the device again"
            )
        with noticed(f"while the model was loaded, {self._need}"):
            require_memory(ENGINE + bundle.model_bytes)
            self._engine = open_engine(bundle, threads, store.workspace, unproved, provider)
            self._generations = Generations(store, bundle, self._engine)
            self._prepare = self._generations.prepare
            self._live = self._generations.longest(record)
        if swap == IN_PLACE:
            self._gate, self._generations.replaced = Gate(), self._live
        for line in self.status().damage:
            log.warning("%s", line)

    @property
    def trust(self) -> Trust:
        """The keys that must sign the next packet."""
        return self._live.trust

    @property
    def states(self) -> tuple[str, ...]:
        """Digests of all states that led to the one in force, S_0 first."""
        return tuple(self._live.state.states)

    @property
    def serves(self) -> Served:
        """The generation and the task that answer now. Reads no file, unlike `status`.

        Raises:
            HealthError: There is none.
        """
        live = _loaded(self._live)
        return Served(live.counter, live.state.task)

    @property
    def is_changing(self) -> bool:
        """Whether an update, a rollback or a refresh is under way in this process."""
        return self._changing.locked()

    def current(self) -> tuple[TaskState, dict[str, np.ndarray]]:
        """The state in force, and its merged weights and head, float32, computed on each call."""
        live = self._live
        return live.state, dict(self.bundle.merged(live.state, live.factors))

    def _commit(self, record: Generation, build: Callable[[Generation], Live]) -> float | None:
        """Put a record in force if its canary passes: the largest difference.

        The order is what makes a power cut harmless. The new generation is complete and proved
        before `replacing` confirms its record; only then do this process (`_live`) and others
        (`_publish`) switch to it.
        """
        self._engine.require_publishing()
        with self._swapping():
            new = None
            try:
                with self._store.replacing(record) as generation:
                    new = build(generation)
                    difference = self._generations.check_canary(new)
            except BaseException:
                if new is not None:
                    new.loaded = None  # its memory may be needed, and the error still refers to it
                raise
            self._live = new
        self._publish(PUBLISHING)
        return difference

    @contextlib.contextmanager
    def _serving(self) -> Iterator[Live]:
        """The generation to answer with. Raises HealthError if there is none."""
        with self._gate.inside() if self._gate else contextlib.nullcontext():
            yield _loaded(self._live)

    @contextlib.contextmanager
    def _swapping(self) -> Iterator[None]:
        """Around whatever sets `_live`.

        With IN_PLACE, predictions wait; if an update fails, the old weights are loaded again.
        """
        if self._gate is None:
            yield
            return
        with self._gate.closed():
            try:
                yield
                self._generations.replaced = self._live
            except BaseException as error:
                let_go(error)
                if (live := self._live).loaded is None:
                    live.loaded = self._generations.load(live.state, live.factors)
                raise

    def status(self) -> Status:
        """Where this device stands. A disk that does not answer is part of the damage."""
        size: dict[str, int] = {}
        damage: list[str] = []
        try:
            size = self._store.size()
            damage += self._store.damage()
        except InputError as error:
            damage.append(str(error))
        return self._live.status(self.bundle, size, damage)

    def _publish(self, wait: float = 0.0) -> None:
        """Let the engine tell other programs, unless they know already or another process went on.

        The generation is in force without it. If publishing fails, it is done again when the store
        is next opened.
        """
        live = self._live
        if self._engine.published(live.loaded, live.state):
            return
        try:
            with self._store.lock("publish.lock", wait):
                if self._serves(self._store.current()):
                    self._engine.publish(live.loaded, live.state)
        except (InputError, ResourceError, UsageError) as error:  # of the disk
            log.warning("generation %d is in force, but not published: %s", live.counter, error)

    def _follow_store(self) -> None:
        """Serve the generation in force, if it is another one or if damage has been repaired."""
        record, live = self._store.current(), self._live
        if record.counter < live.record.counter:
            # Both newest copies are gone. To go on in silence would commit on top of a past that
            # this process knows is over.
            raise InputError(
                "the store has lost its newest generation record: "
                "open it again to go on from the one before it"
            )
        if not self._serves(record) or live.loaded is None:
            self._restore(record)

    def _serves(self, record: Generation) -> bool:
        """Whether nothing was committed or repaired since.

        Compares the whole record, not its counter: after a record was lost, the next one gets the
        same number again.
        """
        live = self._live
        return record == live.record and self._store.damaged(live.damaged) == live.damaged

    def _restore(self, record: Generation) -> None:
        with self._swapping():
            self._live = self._generations.longest(record)


def _loaded(live: Live) -> Live:
    if live.loaded is None:
        raise HealthError(
            "no model is loaded: the update and the previous generation both failed "
            "to load; call refresh()"
        )
    return live
