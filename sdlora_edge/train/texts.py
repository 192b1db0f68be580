"""Texts as items of a dataset: tables (CSV, TSV, JSON, Parquet) and folders of .txt files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError, UsageError
from ..formats.packet import name_problem
from ..inputs.image_files import reading
from ..inputs.modality import Preparation
from ..inputs.text import MAX_CHARACTERS, Tokenization
from ..storage import atomic
from .files import Format, files_in, shown
from .folders import SPLITS, labelled, unlabelled
from .items import Item

TEXT_COLUMNS = ("text", "sentence", "utterance", "query", "content")
LABEL_COLUMNS = ("label", "class", "category", "intent")
DOMAIN_COLUMN = "domain"
NO_CLASS = "no class"
PIXELS_PER_CHARACTER = 100
"""what reading a text costs, beside an image"""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextItem(Item):
    """One text of a source."""

    noun: ClassVar[str] = Tokenization.noun

    def array(self, prepare: Preparation) -> np.ndarray:
        with reading(self.name, "a text"):
            return prepare.item(self.open())

    def examine(self, decode: bool) -> int:
        with reading(self.name, "a text"):
            text = self.open()
            if not text.strip():
                raise ValueError("it is empty")
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
            return PIXELS_PER_CHARACTER * len(text)


def _open(file: str | io.BytesIO) -> str:
    return Tokenization.text(Path(file) if isinstance(file, str) else file.getvalue())


def _problem(suffix: str) -> str:
    return "" if suffix == ".txt" else TEXTS.no_item


TEXTS = Format(TextItem, _open, _problem)


def texts_in(path: Path, domains: bool = False) -> dict[str, list[Item]]:
    """Return the texts of a dataset by split: "train", "test", "val", or "" without one.

    A table has a column with the text (TEXT_COLUMNS) and one with the class (LABEL_COLUMNS). A
    folder of tables has one for each split, such as train.csv and test.csv. Any other folder, or a
    ZIP, has a folder of .txt files for each class.

    Args:
        path: The table, folder or ZIP.
        domains: Whether a column, or the outermost folders, are domains.

    Raises:
        InputError: There is no such dataset, or no class in it.
    """
    tables = {path: ""} if path.suffix.lower() in READERS and path.is_file() else _tables(path)
    if not tables:
        return labelled(str(path), files_in(path, TEXTS), TEXTS, domains)
    found: dict[str, list[Item]] = {}
    for table, split in tables.items():
        found.setdefault(split, []).extend(_items(table, domains))
    return found


def unlabelled_texts(path: Path) -> Iterator[tuple[Iterable[str], Item]]:
    """Yield every text of a dataset, and the classes that it may be of.

    Raises InputError if there is no such dataset.
    """
    if path.suffix.lower() in READERS or _tables(path):
        for table in {path: ""} if path.is_file() else _tables(path):
            for item in _items(table, domains=False, need_label=False):
                yield [item.label], item
    else:
        yield from unlabelled(str(path), files_in(path, TEXTS), TEXTS)


def _tables(path: Path) -> dict[Path, str]:
    """The tables of a folder that are called like a split: {table: split}."""
    if not path.is_dir():
        return {}
    with atomic.reading(path):
        files = sorted(path.iterdir())
    return {
        file: SPLITS[file.stem.casefold()]
        for file in files
        if file.suffix.lower() in READERS and file.stem.casefold() in SPLITS
    }


def _items(path: Path, domains: bool, need_label: bool = True) -> Iterator[Item]:
    """Raises InputError if the table cannot be read, or lacks a column."""
    text = label = ""
    number = 0
    for number, row in enumerate(READERS[path.suffix.lower()](path), 1):
        if not text:
            text = _column(path, row, TEXT_COLUMNS)
            label = _column(path, row, LABEL_COLUMNS) if need_label else _label(row)
            if domains:
                _column(path, row, (DOMAIN_COLUMN,))
        item = _item(path, number, (row.get(text), row.get(label), row.get(DOMAIN_COLUMN)), domains)
        yield item if need_label or item.problem != NO_CLASS else replace(item, problem="")
    if not number:
        raise InputError(f"{path} has no row: give a table with texts and classes")


def _label(row: Row) -> str:
    """The column with the class; "" if there is none."""
    return next((str(c) for c in row if str(c).casefold() in LABEL_COLUMNS), "")


def _column(path: Path, row: Row, names: Iterable[str]) -> str:
    there = {str(column).casefold(): str(column) for column in row}
    for name in names:
        if name in there:
            return there[name]
    raise InputError(
        f"{path} has the columns {', '.join(map(str, row)) or 'none'}, and none called "
        f"{' or '.join(names)}: rename one"
    )


def _item(path: Path, number: int, cells: tuple[Any, Any, Any], domains: bool) -> Item:
    text, label, domain = ("" if cell is None else str(cell) for cell in cells)
    label, domain = label.strip(), domain.strip() if domains else ""
    item = TextItem(shown(f"{path}:{number}"), label, partial(str, text), domain)
    if problem := name_problem(label) or (domain and name_problem(domain)):
        return replace(
            item, label=shown(label), problem=f"its class {problem}" if label else NO_CLASS
        )
    return item if text.strip() else replace(item, problem="empty")


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with reading(str(path), "a table"), open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(4 * MAX_CHARACTERS)
        yield from csv.DictReader(file, delimiter=delimiter, strict=True)


def _jsonl(path: Path) -> Iterator[Row]:
    with reading(str(path), "JSON Lines"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                yield row


def _json(path: Path) -> Iterator[Row]:
    with reading(str(path), "JSON"):
        rows = json.loads(path.read_bytes())
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("it is no list of objects")
        yield from rows


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{path} needs the package pyarrow: pip install pyarrow, or save it as CSV"
        ) from error
    with reading(str(path), "Parquet"):
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()


READERS = {
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
