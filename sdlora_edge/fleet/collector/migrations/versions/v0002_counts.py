"""Counts of predictions by device and hour. They begin empty: the next reports fill them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables of counts."""
    for name in ("counted_hour", "counted_task"):
        op.add_column("devices", sa.Column(name, sa.BigInteger))
    op.create_table(
        "hours",
        *_of_device(),
        sa.Column("task", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("unknown", sa.BigInteger, nullable=False),
    )
    op.create_index("hours_hour", "hours", ["hour"])
    op.create_table(
        "counts",
        *_of_device(),
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.create_index("counts_hour", "counts", ["hour"])


def _of_device() -> tuple[sa.Column[str], sa.Column[int]]:
    return (
        sa.Column("device", sa.String(200), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
    )
