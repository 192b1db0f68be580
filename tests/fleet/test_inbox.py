"""What the collector takes, refuses, counts and forgets, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from cameras import NOW, Camera, digest, predicted
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.schema import CreateTable

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.fleet.collector import database as databases
from sdlora_edge.fleet.collector import inbox as boxes
from sdlora_edge.fleet.collector.database import Database
from sdlora_edge.fleet.collector.inbox import Inbox
from sdlora_edge.fleet.collector.lookups import (
    DeviceRow,
    Filter,
    Span,
    Tally,
    class_mix,
    device_rows,
    event_rows,
    report_count,
    unknown_rates,
)
from sdlora_edge.fleet.collector.registry import (
    BACK,
    DAY,
    MIXED,
    SILENT,
    UPDATED,
    enroll,
    find_silent,
    prune,
    set_online,
)
from sdlora_edge.fleet.collector.schema import HOUR, metadata
from sdlora_edge.fleet.report import PREFIX, SIZE_LIMIT
from sdlora_edge.fleet.sync_state import Failure
from sdlora_edge.formats.canonical import dump_json

SPAN = Span((NOW // HOUR - 23) * HOUR, HOUR, 25)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.debian)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fleet.db'}"
    found: str = request.getfixturevalue("postgresql")
    return found.replace("+psycopg", "")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database.open(url)
    yield opened
    opened.close()


class Desk:
    """An inbox whose clock a test sets."""

    def __init__(self, database: Database) -> None:
        self.database, self.now = database, float(NOW)
        self.inbox = Inbox(database, lambda: self.now)

    def takes(self, data: bytes) -> str:
        return self.inbox.take(data).kind

    def row(self, camera: Camera) -> DeviceRow:
        (found,) = device_rows(self.database, Filter(device=camera.id), self.now, None)
        return found


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


@pytest.fixture
def camera(desk: Desk) -> Camera:
    found = Camera("gate 3")
    enroll(desk.database, [found.identity], NOW)
    return found


def test_a_report_is_shown_and_its_history_is_kept(desk: Desk, camera: Camera) -> None:
    assert desk.row(camera).condition == "never reported"
    assert desk.takes(camera.sealed(waiting="the wave does not include it")) == boxes.STORED
    row = desk.row(camera)
    assert (row.condition, row.task, row.task_name, row.last_seen) == ("waiting", 2, "jam", NOW)
    assert desk.takes(camera.sealed(NOW + 60)) == boxes.STORED
    assert (desk.row(camera).condition, report_count(desk.database, camera.id)) == ("fine", 2)


def test_a_replay_is_refused_and_changes_nothing(desk: Desk, camera: Camera) -> None:
    first, second = camera.sealed(task=1), camera.sealed(task=2)
    assert desk.takes(second) == boxes.STORED
    assert [desk.takes(first), desk.takes(second)] == [boxes.STALE, boxes.STALE]
    assert (desk.row(camera).task, report_count(desk.database, camera.id)) == (2, 1)
    assert desk.inbox.refused[boxes.STALE] == 2
    assert desk.inbox.take(second, again=True).kind == boxes.STALE
    assert desk.inbox.refused[boxes.STALE] == 2, "the broker sends what it keeps: no replay"


def test_forged_reports_are_refused(desk: Desk, camera: Camera) -> None:
    other, stranger = Camera("gate 4"), Camera("nobody")
    enroll(desk.database, [other.identity], NOW)
    stolen = json.loads(camera.sealed())
    changed = {**stolen, "report": {**stolen["report"], "task": 9}}
    in_other_name = {**stolen["report"], "device": other.id}
    by_another_key = {
        "key": camera.identity.public,
        "report": in_other_name,
        "signature": camera.signer.sign(PREFIX + dump_json(in_other_name)).signature,
    }
    claims_key = {**by_another_key, "key": other.identity.public}
    for forged in (changed, by_another_key, claims_key):
        assert desk.takes(dump_json(forged)) == boxes.FORGED
    assert desk.takes(stranger.sealed()) == boxes.NOT_ENROLLED
    assert desk.takes(dump_json(stolen["report"])) == boxes.UNSIGNED
    assert desk.takes(b"\xff\x00") == boxes.UNSIGNED
    assert desk.takes(b'{"signature":1,"key":2,"report":[]}') == boxes.MALFORMED
    assert desk.takes(b" " * (SIZE_LIMIT + 1)) == boxes.TOO_LARGE
    assert desk.row(camera).last_seen is None
    assert desk.row(other).last_seen is None
    assert len(device_rows(desk.database, Filter(), NOW, None)) == 2
    assert desk.inbox.refused == {
        boxes.FORGED: 3,
        boxes.NOT_ENROLLED: 1,
        boxes.UNSIGNED: 2,
        boxes.MALFORMED: 1,
        boxes.TOO_LARGE: 1,
    }


def test_a_new_key_needs_a_human(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed())
    again = Camera("gate 3")
    assert again.id == camera.id
    with pytest.raises(UsageError, match="--replace"):
        enroll(desk.database, [Camera("new").identity, again.identity], NOW)
    assert len(device_rows(desk.database, Filter(), NOW, None)) == 1, "all of it or nothing"
    assert desk.takes(again.sealed()) == boxes.FORGED
    assert enroll(desk.database, [again.identity], NOW, replace=True).changed == (camera.id,)
    assert desk.takes(again.sealed()) == boxes.STORED
    assert desk.takes(camera.sealed()) == boxes.FORGED
    assert enroll(desk.database, [again.identity], NOW).known == (camera.id,)


def test_any_name_is_kept_as_it_is(desk: Desk) -> None:
    names = ["<script>alert(1)</script>", "検査 №1 ä", "%_' OR 1=1 --", "a" * 200]
    for i, name in enumerate(names):
        camera = Camera(name, groups=("100% _x", f"'{i}"))
        enroll(desk.database, [camera.identity], NOW)
        assert desk.takes(camera.sealed(task_name=name[:100])) == boxes.STORED
        assert desk.row(camera).name == name
        assert desk.row(camera).task_name == name[:100]
    assert len(device_rows(desk.database, Filter(group="100% _x"), NOW, None)) == 4
    assert len(device_rows(desk.database, Filter(group="100"), NOW, None)) == 0
    assert len(device_rows(desk.database, Filter(group="'2"), NOW, None)) == 1


def test_predictions_are_counted_once_by_hour_task_and_class(desk: Desk, camera: Camera) -> None:
    since = NOW - HOUR
    desk.takes(camera.sealed(NOW, predictions=predicted(since, 2, cat=7, dog=1)))
    # the answer was lost: the same period again, with more in it, an hour later
    desk.now += HOUR
    desk.takes(camera.sealed(NOW + HOUR, predictions=predicted(since, 3, cat=9, dog=8)))
    rates = unknown_rates(desk.database, Filter(), SPAN)
    assert {task: t for task, steps in rates.items() for t in steps.values() if t.total} == {
        2: Tally(20, 3)
    }
    mix = class_mix(desk.database, Filter(), SPAN)
    assert {name: sum(steps.values()) for name, steps in mix.items()} == {"cat": 9, "dog": 8}
    desk.takes(camera.sealed(NOW + HOUR, predictions=predicted(NOW + HOUR, 0, cat=1)))
    assert sum(t.total for t in unknown_rates(desk.database, Filter(), SPAN)[2].values()) == 21
    assert desk.row(camera).total == 21


def test_counts_of_a_period_with_an_update_are_of_no_task(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed(predictions=predicted(1, 0, cat=10)))
    new = {"task": 3, "state": digest("3")}
    desk.takes(camera.sealed(predictions=predicted(2, 5, cat=10), **new))
    desk.takes(camera.sealed(predictions=predicted(3, 1, cat=2), **new))
    rates = unknown_rates(desk.database, Filter(), SPAN)
    totals = {task: sum(steps.values(), Tally()) for task, steps in rates.items()}
    assert totals == {2: Tally(10, 0), MIXED: Tally(15, 5), 3: Tally(3, 1)}
    (event,) = event_rows(desk.database, Filter(), [UPDATED])
    assert (event.device, event.task) == (camera.id, 3)


def test_an_impossible_clock_is_not_believed(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed(0, predictions=predicted(0, 1, cat=1)))
    desk.takes(camera.sealed(NOW + 10 * DAY, predictions=predicted(1, 1, cat=1)))
    assert unknown_rates(desk.database, Filter(), SPAN)[2] == {23: Tally(4, 2)}


def test_an_error_stands_until_the_device_moves_on(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed(NOW))
    failed = (Failure(NOW + 5, 6, "the canary differs"),)
    desk.takes(camera.sealed(NOW + 10, errors=failed))
    assert (desk.row(camera).condition, desk.row(camera).failure) == (
        "failing",
        "the canary differs",
    )
    desk.takes(camera.sealed(NOW + 20, errors=failed, state=digest("3"), task=3))
    assert desk.row(camera).condition == "fine"
    passing = (Failure(NOW + 25, 8, "no space is left"),)
    desk.takes(camera.sealed(NOW + 30, errors=passing, state=digest("3"), task=3))
    assert desk.row(camera).condition == "failing"
    desk.takes(camera.sealed(NOW + 2 * DAY, errors=passing, state=digest("3"), task=3))
    assert desk.row(camera).condition == "fine", "a full disk of two days ago"
    desk.takes(camera.sealed(NOW + 2 * DAY, damage=1))
    assert desk.row(camera).condition == "failing"


def test_a_device_goes_silent_once_and_comes_back(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed())
    desk.now += 6 * HOUR
    desk.takes(camera.sealed())
    assert find_silent(desk.database, desk.now + 20 * HOUR, None) == []
    desk.now += 25 * HOUR
    assert find_silent(desk.database, desk.now, 26 * HOUR) == []
    assert find_silent(desk.database, desk.now, None) == [camera.id]
    assert find_silent(desk.database, desk.now, None) == [], "said once"
    assert desk.row(camera).condition == "silent"
    desk.takes(camera.sealed())
    assert desk.row(camera).condition == "fine"
    assert [e.kind for e in event_rows(desk.database, Filter())] == [BACK, SILENT]


def test_a_device_that_reports_weekly_is_not_silent_after_a_day(desk: Desk, camera: Camera) -> None:
    for _ in range(3):
        desk.takes(camera.sealed())
        desk.now += 7 * DAY
    assert find_silent(desk.database, desk.now, None) == []
    assert find_silent(desk.database, desk.now + 15 * DAY, None) == [camera.id]


def test_old_reports_and_counts_go_and_devices_stay(desk: Desk, camera: Camera) -> None:
    desk.takes(camera.sealed(predictions=predicted(1, 0, cat=5)))
    desk.now += 80 * DAY
    desk.takes(camera.sealed(int(desk.now), predictions=predicted(2, 0, cat=5)))
    assert prune(desk.database, desk.now, 90) == 0
    assert prune(desk.database, NOW + 91 * DAY, 90) == 3  # a report, an hour, a class
    assert report_count(desk.database, camera.id) == 1
    assert prune(desk.database, NOW + 400 * DAY, 90) == 3
    assert desk.row(camera).task == 2


def test_the_broker_says_who_is_online(desk: Desk, camera: Camera) -> None:
    assert desk.row(camera).online is None
    assert set_online(desk.database, camera.id, True)
    assert desk.row(camera).online is True
    assert not set_online(desk.database, "of nobody", True)


def test_the_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    found = inspect(database.engine)
    assert set(metadata.tables) == set(found.get_table_names()) - {"alembic_version"}
    for name, table in metadata.tables.items():
        made = {c["name"]: (str(c["type"]), c["nullable"]) for c in found.get_columns(name)}
        dialect = database.engine.dialect
        meant = {c.name: (c.type.compile(dialect=dialect), c.nullable) for c in table.columns}
        assert made == meant, CreateTable(table).compile(database.engine)
        assert {i["name"] for i in found.get_indexes(name)} == {i.name for i in table.indexes}
        keys = found.get_pk_constraint(name)["constrained_columns"]
        assert keys == [c.name for c in table.primary_key]


def test_a_database_of_an_older_version_is_brought_up_to_date(url: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "sdlora_edge.fleet.collector:migrations")
    engine = create_engine(databases._with_driver(url))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO devices (id, name, public, channel, groups, enrolled) "
                "VALUES (:id, 'gate 3', :key, 'line-3', '[]', 1)"
            ),
            {"id": Camera("gate 3").id, "key": (camera := Camera("gate 3")).identity.public},
        )
    engine.dispose()
    for _ in range(2):  # and once more: nothing is left to do
        database = Database.open(url)
        desk = Desk(database)
        assert desk.takes(camera.sealed(predictions=predicted(1, 0, cat=3))) == boxes.STORED
        assert desk.row(camera).total >= 3
        database.close()


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    Database.open(url).close()
    with sqlite3.connect(tmp_path / "fleet.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(InputError, match="update sdlora-edge"):
        Database.open(url)


def test_a_wrong_database_is_told(tmp_path: Path) -> None:
    for url in ("mysql://host/x", "fleet.db", ""):
        with pytest.raises(UsageError, match="sqlite:///FILE"):
            Database.open(url)
    with pytest.raises(InputError, match="cannot be used"):
        Database.open(f"sqlite:///{tmp_path / 'missing' / 'fleet.db'}")
    (tmp_path / "text").write_text("not a database, but a text that is long enough")
    with pytest.raises(InputError, match="cannot be used"):
        Database.open(f"sqlite:///{tmp_path / 'text'}")
    with pytest.raises(InputError) as caught:
        Database.open("postgresql://user:secret@127.0.0.1:1/fleet")
    assert "secret" not in str(caught.value)
