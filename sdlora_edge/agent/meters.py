"""What Prometheus reads of the agent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..device.answers import Prediction
from ..device.device import Device
from ..device.watch.events import Emit
from ..errors import SdloraError
from ..fleet.closing import Closing
from ..fleet.counts import Counts
from ..fleet.tally import Tally, reports
from .batching import Batcher

UPDATES = "applied", "refused", "failed", "trouble"
"""events of a follower or watcher that are results"""
LATENCIES = 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10


class Counting(Closing):
    """Counts predictions, for Prometheus and for the device's reports.

    Noting one costs almost nothing; `settle` does the rest, and the disk's work, later.
    """

    def __init__(self) -> None:
        self.tally: Tally | None = None
        self._fresh: deque[Prediction] = deque()
        self._total = Counts()
        self._lock = threading.Lock()

    def note(self, predictions: Sequence[Prediction]) -> None:
        """Note predictions. Any thread may call it."""
        self._fresh.extend(predictions)

    def settle(self) -> Counts:
        """Count what was noted: all predictions since the beginning."""
        with self._lock:
            fresh = [self._fresh.popleft() for _ in range(len(self._fresh))]
            if fresh:
                self._total += Counts.of(fresh)
                if self.tally is not None:
                    self.tally.add(fresh)
            return self._total

    def keep(self, store: Path) -> None:
        """Write what is counted to the disk, if the device reports."""
        if self.tally is None and reports(store):
            self.tally = Tally(store)
        self.settle()
        if self.tally is not None:
            self.tally.flush()

    def close(self) -> None:
        """Count what is left, and end."""
        self.settle()
        if self.tally is not None:
            self.tally.close()


class Meters(Collector):
    """All metrics of one agent.

    Args:
        counting: Of predictions.
        device: Returns the device; raises while there is none.
    """

    def __init__(self, counting: Counting, device: Callable[[], Device]) -> None:
        self._counting, self._device = counting, device
        self._batcher: Batcher | None = None
        self._synced: float | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._seconds = Histogram(
            "sdlora_edge_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ["endpoint"],
            buckets=LATENCIES,
            registry=self._registry,
        )
        self._requests = Counter(
            "sdlora_edge_requests", "Answers.", ["endpoint", "status"], registry=self._registry
        )
        self._updates = Counter(
            "sdlora_edge_updates",
            "Packets that came into force, were refused, or failed; and troubles while looking.",
            ["result"],
            registry=self._registry,
        )
        for result in UPDATES:
            self._updates.labels(result)

    def watch(self, batcher: Batcher) -> None:
        """Show the queue of a batcher."""
        self._batcher = batcher

    def synced(self) -> None:
        """Note a look at the repository that went well."""
        self._synced = time.monotonic()

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self._seconds.labels(endpoint).observe(seconds)
        self._requests.labels(endpoint, str(status)).inc()

    def counted(self, emit: Emit) -> Emit:
        """The same, and each event counts as the result of an update."""

        def both(event: str, fields: dict[str, Any]) -> None:
            if event in UPDATES:
                self._updates.labels(event).inc(len(fields.get("packets", ("",))))
            emit(event, fields)

        return both

    def page(self) -> bytes:
        """The page that Prometheus reads, in its text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: so that registering it asks for nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What is known only when it is asked for."""
        counts = self._counting.settle()
        classes = CounterMetricFamily(
            "sdlora_edge_predictions", "Answers that name a class.", labels=["class"]
        )
        for name, count in counts.by_class.items():
            classes.add_metric([name], count)
        if counts.other:
            classes.add_metric([""], counts.other)
        yield classes
        yield CounterMetricFamily(
            "sdlora_edge_unknown", "Answers that say unknown.", value=counts.unknown
        )
        yield from self._serving()
        if self._batcher is not None:
            yield GaugeMetricFamily(
                "sdlora_edge_queue_images",
                "Number of images or texts that wait for an answer.",
                value=self._batcher.waiting,
            )
        if self._synced is not None:
            yield GaugeMetricFamily(
                "sdlora_edge_last_sync_age_seconds",
                "Seconds since the last look at the repository that went well.",
                value=time.monotonic() - self._synced,
            )

    def _serving(self) -> Iterator[Metric]:
        try:
            state = self._device().serves
        except SdloraError:
            state = None
        yield GaugeMetricFamily(
            "sdlora_edge_serving", "1 if a model is served.", value=int(state is not None)
        )
        if state is not None:
            yield GaugeMetricFamily(
                "sdlora_edge_generation", "Generation in force.", value=state.generation
            )
            yield GaugeMetricFamily("sdlora_edge_task", "Task in force.", value=state.task)
