"""Devices, their reports, and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_FACTS = {
    "last_seen": sa.BigInteger,
    "gap": sa.BigInteger,
    "online": sa.Boolean,
    "time": sa.BigInteger,
    "lineage": sa.Text,
    "bundle": sa.Text,
    "state": sa.Text,
    "state_since": sa.BigInteger,
    "task": sa.BigInteger,
    "task_name": sa.Text,
    "revision": sa.BigInteger,
    "generation": sa.BigInteger,
    "packets": sa.BigInteger,
    "trust_version": sa.BigInteger,
    "waiting": sa.Text,
    "error_time": sa.BigInteger,
    "error_code": sa.BigInteger,
    "error_message": sa.Text,
    "damage": sa.BigInteger,
    "metadata_expired": sa.Boolean,
    "clock_behind": sa.Boolean,
    "report": sa.Text,
}


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "devices",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("public", sa.String(64), nullable=False),
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("groups", sa.Text, nullable=False),
        sa.Column("enrolled", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("silent", sa.Boolean, nullable=False, server_default=sa.false()),
        *(sa.Column(name, kind) for name, kind in _FACTS.items()),
    )
    op.create_table(
        "reports",
        sa.Column("device", sa.String(200), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
    )
    op.create_index("reports_received", "reports", ["received"])
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("channel", sa.Text, nullable=False, server_default=""),
        sa.Column("device", sa.String(200), nullable=False, server_default=""),
        sa.Column("packet", sa.String(64), nullable=False, server_default=""),
        sa.Column("task", sa.BigInteger),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("command", sa.Text, nullable=False, server_default=""),
        sa.Column("begun", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_index("events_time", "events", ["time"])
