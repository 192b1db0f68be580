"""What Prometheus reads: the state of the fleet at the time of the request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .driver import STANDS
from .inbox import REFUSALS, Inbox
from .lookups import DeviceRow, Filter, Tally
from .views import Views, Wave

AGES = 300, 3600, 6 * 3600, 24 * 3600, 72 * 3600, 7 * 24 * 3600
"""Seconds: the bounds of the histogram of ages."""
Metrics = Iterator[Metric]


class FleetCollector(Collector):
    """Computes every metric when it is asked for."""

    def __init__(self, views: Views, inbox: Inbox) -> None:
        self._views = views
        self._inbox = inbox

    def describe(self) -> list[Metric]:
        """Nothing: so that registering it asks no database."""
        return []

    def collect(self) -> Metrics:
        """All metrics."""
        rows = self._views.rows(Filter())
        yield from _devices(rows)
        yield _ages(rows, self._views.clock())
        yield from _unknown(rows)
        yield from _waves(self._views.waves() or ())
        stored = CounterMetricFamily("sdlora_edge_reports_stored", "Reports that were stored.")
        stored.add_metric([], self._inbox.stored)
        yield stored
        refused = CounterMetricFamily(
            "sdlora_edge_reports_refused", "Reports that were refused.", labels=["reason"]
        )
        for reason in REFUSALS:
            refused.add_metric([reason], self._inbox.refused[reason])
        yield refused


def metrics_page(views: Views, inbox: Inbox) -> bytes:
    """The page that Prometheus reads, in its text format."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(views, inbox))
    return generate_latest(registry)


def _devices(rows: list[DeviceRow]) -> Metrics:
    found = GaugeMetricFamily(
        "sdlora_edge_devices",
        "Enrolled devices by channel, task and condition.",
        labels=["channel", "task", "condition"],
    )
    tasks = ("" if row.task is None else str(row.task) for row in rows)
    counted = Counter((row.channel, task, row.condition) for row, task in zip(rows, tasks))
    for labels, count in sorted(counted.items()):
        found.add_metric(labels, count)
    yield found
    online = GaugeMetricFamily("sdlora_edge_devices_online", "Devices that the broker sees.")
    online.add_metric([], sum(row.online is True for row in rows))
    yield online


def _ages(rows: list[DeviceRow], clock: float) -> Metric:
    ages = [max(0.0, clock - row.last_seen) for row in rows if row.last_seen is not None]
    found = HistogramMetricFamily(
        "sdlora_edge_last_seen_age_seconds", "Ages of the newest reports of all devices."
    )
    buckets = [(str(bound), float(sum(age <= bound for age in ages))) for bound in AGES]
    found.add_metric([], [*buckets, ("+Inf", float(len(ages)))], sum_value=sum(ages))
    return found


def _unknown(rows: list[DeviceRow]) -> Metrics:
    by_task: dict[tuple[str, str], Tally] = {}
    for row in rows:
        key = (row.channel, "" if row.task is None else str(row.task))
        by_task[key] = by_task.get(key, Tally()) + Tally(row.total, row.unknown)
    labels = ["channel", "task"]
    total = GaugeMetricFamily(
        "sdlora_edge_predictions_day", "Predictions of the last 24 hours.", labels=labels
    )
    rate = GaugeMetricFamily(
        "sdlora_edge_unknown_ratio", "Share of them that was unknown.", labels=labels
    )
    for key, tally in sorted(by_task.items()):
        total.add_metric(key, tally.total)
        if tally.rate is not None:
            rate.add_metric(key, tally.rate)
    yield total
    yield rate


def _waves(waves: tuple[Wave, ...]) -> Metrics:
    labels = ["channel", "packet", "status"]
    percent = GaugeMetricFamily(
        "sdlora_edge_wave_percent", "Percentage of devices in the wave in force.", labels=labels
    )
    stands = GaugeMetricFamily(
        "sdlora_edge_wave_devices",
        "Enrolled devices of the wave in force.",
        labels=["channel", "packet", "stand"],
    )
    for wave in waves:
        packet = wave.step.packet[:12]
        percent.add_metric([wave.channel, packet, wave.step.status], wave.step.percent)
        for stand in STANDS:
            stands.add_metric([wave.channel, packet, stand], getattr(wave.evidence, stand))
    yield percent
    yield stands
