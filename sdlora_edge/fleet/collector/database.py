"""The collector's database: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from ...errors import InputError, ResourceError, UsageError

DEFAULT = "sqlite:///fleet.db"
DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
WAIT = 30_000
"""Milliseconds that a writer of SQLite waits for another."""


class Database:
    """A database whose tables are up to date."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect, make the tables, and bring those of an older version up to date.

        Raises:
            UsageError: The URL is of no known database.
            InputError: The database cannot be used, or is of a newer version.
        """
        engine = create_engine(_with_driver(url), pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
        try:
            _migrate(engine)
        except SQLAlchemyError as error:
            engine.dispose()
            raise InputError(
                f"database {_shown(url)} cannot be used: {_cause(error)}: check that it exists and "
                "that this user may write it"
            ) from error
        return cls(engine)

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction. Raises ResourceError if the database does not take it for now."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise ResourceError(
                f"the database does not answer: {_cause(error)}: try again"
            ) from error


def put(connection: Connection, table: Table, key: dict[str, Any], add: dict[str, int]) -> None:
    """Insert a row of counts, or add to the one with this key."""
    make: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}.get(
        connection.dialect.name, insert
    )
    statement = make(table).values(**key, **add)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(key),
            set_={name: table.c[name] + statement.excluded[name] for name in add},
        )
    )


def _with_driver(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    kind = scheme.partition("+")[0]
    if not separator or kind not in DRIVERS:
        raise UsageError(
            f"database {_shown(url)}: use sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    full = f"{DRIVERS[kind]}://{rest}"
    try:
        make_url(full)
    except (ArgumentError, ValueError) as error:
        raise UsageError(f"database {_shown(url)} is not a URL: {error}") from error
    if kind != "sqlite":
        from ..extras import need

        try:
            need("psycopg", "fleet")
        except UsageError as error:
            raise UsageError(
                "PostgreSQL needs psycopg, which is not installed: "
                "run pip install 'psycopg[binary]'"
            ) from error
    return full


def _shown(url: str) -> str:
    """A URL without its password."""
    before, at, host = url.rpartition("@")
    scheme, separator, user = before.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}@{host}" if at else url


def _cause(error: SQLAlchemyError) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Readers do not wait for a writer (WAL); a power cut loses at most the newest reports."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA busy_timeout={WAIT}")


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", f"{__package__}:migrations")
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two collectors may start at once
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(774002)")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise InputError(
                f"the database is not one of this version ({error}): update sdlora-edge"
            ) from error
