"""The collector's tables: devices, their reports, counts of predictions, events.

Lists and reports are kept as canonical JSON text, which every database stores alike. Times are Unix
seconds. The first two migrations make these tables; a test compares.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData()
HOUR = 3600
"""Seconds. Counts of predictions are kept by the hour."""


def _fact(name: str, kind: type[Text | BigInteger | Boolean]) -> Column[object]:
    """A fact that devices report: null until the first report."""
    return Column(name, kind)


devices = Table(
    "devices",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("name", Text, nullable=False),
    Column("public", String(64), nullable=False),
    Column("channel", Text, nullable=False),
    Column("groups", Text, nullable=False),
    Column("enrolled", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False, server_default="0"),  # of the newest report
    Column("silent", Boolean, nullable=False, server_default=false()),
    _fact("last_seen", BigInteger),  # when the newest report arrived, by the collector's clock
    _fact("gap", BigInteger),  # usual seconds between two reports
    _fact("online", Boolean),  # as the broker says
    _fact("time", BigInteger),  # of the newest report, by the device's clock
    _fact("lineage", Text),
    _fact("bundle", Text),
    _fact("state", Text),
    _fact("state_since", BigInteger),  # time of the first report with this state
    _fact("task", BigInteger),
    _fact("task_name", Text),
    _fact("revision", BigInteger),
    _fact("generation", BigInteger),
    _fact("packets", BigInteger),
    _fact("trust_version", BigInteger),
    _fact("waiting", Text),
    _fact("error_time", BigInteger),
    _fact("error_code", BigInteger),
    _fact("error_message", Text),
    _fact("damage", BigInteger),
    _fact("metadata_expired", Boolean),
    _fact("clock_behind", Boolean),
    _fact("report", Text),
    _fact("counted_hour", BigInteger),  # where the predictions of the newest report are counted
    _fact("counted_task", BigInteger),
)

reports = Table(
    "reports",
    metadata,
    Column("device", String(200), ForeignKey("devices.id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("received", BigInteger, nullable=False),
    Column("report", Text, nullable=False),
    Index("reports_received", "received"),
)

hours = Table(
    "hours",
    metadata,
    Column("device", String(200), ForeignKey("devices.id"), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("task", BigInteger, primary_key=True, autoincrement=False),
    Column("total", BigInteger, nullable=False),
    Column("unknown", BigInteger, nullable=False),
    Index("hours_hour", "hour"),
)

counts = Table(
    "counts",
    metadata,
    Column("device", String(200), ForeignKey("devices.id"), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String(200), primary_key=True),  # of a class; empty for all other classes
    Column("count", BigInteger, nullable=False),
    Index("counts_hour", "hour"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("channel", Text, nullable=False, server_default=""),
    Column("device", String(200), nullable=False, server_default=""),
    Column("packet", String(64), nullable=False, server_default=""),
    Column("task", BigInteger),  # that the device got to
    Column("message", Text, nullable=False),
    Column("command", Text, nullable=False, server_default=""),  # for a human to run
    Column("begun", BigInteger, nullable=False, server_default="0"),  # see driver.Evidence
    Index("events_time", "time"),
)
