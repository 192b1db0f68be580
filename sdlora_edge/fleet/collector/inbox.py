"""The one door for reports: whatever brings them, here they are checked, counted and stored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ...errors import InputError, LimitError, TrustError
from ...results import Result
from ..report import unseal
from .database import Database
from .registry import StaleReport, key_of, store

STORED, STALE, TOO_LARGE, MALFORMED = "stored", "stale", "too large", "malformed"
FORGED, NOT_ENROLLED, UNSIGNED = "forged", "not enrolled", "unsigned"
REFUSALS = STALE, TOO_LARGE, MALFORMED, FORGED, NOT_ENROLLED, UNSIGNED


@dataclass(frozen=True)
class Outcome(Result):
    """What became of a report: STORED, or one of REFUSALS and the reason."""

    kind: str
    reason: str = ""


class Inbox:
    """Takes sealed reports, from any thread.

    Attributes:
        database: Where good ones are stored.
        refused: Number of reports by kind of refusal, since the start. Those of devices that are
            not enrolled are only counted: nobody without a key makes the database grow.
        stored: Number of stored reports since the start.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self.database = database
        self.refused: Counter[str] = Counter()
        self.stored = 0
        self._clock = clock
        self._lock = threading.Lock()

    def take(self, data: bytes, again: bool = False) -> Outcome:
        """Check and store a report.

        Args:
            data: As it came.
            again: The broker sends what it keeps: a report that is known already is no news.

        Raises:
            ResourceError: The database does not answer.
        """
        outcome = self._try(data)
        if not (again and outcome.kind == STALE):
            self.count(outcome.kind)
        return outcome

    def count(self, kind: str) -> None:
        """Count a report."""
        with self._lock:
            if kind == STORED:
                self.stored += 1
            else:
                self.refused[kind] += 1

    def _try(self, data: bytes) -> Outcome:
        keys = _Keys(self.database)
        try:
            store(self.database, unseal(data, keys), self._clock())
        except LimitError as error:
            return Outcome(TOO_LARGE, str(error))
        except InputError as error:
            return Outcome(MALFORMED if b'"signature"' in data else UNSIGNED, str(error))
        except TrustError as error:
            return Outcome(NOT_ENROLLED if keys.missed else FORGED, str(error))
        except StaleReport as error:
            return Outcome(STALE, str(error))
        return Outcome(STORED)


class _Keys(Mapping[str, str]):
    """The keys of enrolled devices. Each is looked up once, when it is asked for.

    Attributes:
        missed: Whether a device was asked for that is not enrolled.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, str | None] = {}
        self.missed = False

    def __getitem__(self, device: str) -> str:
        if device not in self._known:
            self._known[device] = key_of(self._database, device)
        if (key := self._known[device]) is None:
            self.missed = True
            raise KeyError(device)
        return key

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
