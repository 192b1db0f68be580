"""Texts as a dataset: tables and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from texts_fixture import rows, write_folders, write_table

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.train import datasets, plan, splits
from sdlora_edge.train.config import resolve
from sdlora_edge.train.presets import preset
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.texts import texts_in
from sdlora_edge.train.unknown_images import find

LABELS = ["sport", "money"]


def counts(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for split, items in texts_in(path).items():
        for item in items:
            key = item.problem or item.label
            own = found.setdefault(split, {})
            own[key] = own.get(key, 0) + 1
    return found


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_has_a_text_and_a_class_in_each_row(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"all{suffix}", LABELS, 3)
    assert counts(path) == {"": {"sport": 3, "money": 3}}
    assert [item.open() for item in texts_in(path)[""]] == [row["text"] for row in rows(LABELS, 3)]


def test_json_lines_and_other_names_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    lines = [{"Utterance": "play a song", "intent": 7}, {"Utterance": "stop", "intent": "halt"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert counts(path) == {"": {"7": 1, "halt": 1}}


def test_json_is_a_list_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"label": "sport", "sentence": "a goal"}]))
    assert counts(path) == {"": {"sport": 1}}
    path.write_text('{"label": "sport", "sentence": "a goal"}')
    with pytest.raises(InputError, match="cannot be read as JSON: it is no list of objects"):
        texts_in(path)


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b"], "label": ["x", "y"]})
    parquet.write_table(table, tmp_path / "all.parquet")
    assert counts(tmp_path / "all.parquet") == {"": {"x": 1, "y": 1}}


def test_a_folder_of_tables_has_one_for_each_split(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", LABELS, 4)
    write_table(tmp_path / "Test.csv", LABELS, 2, seed=1)
    found = {"train": {"sport": 4, "money": 4}, "test": {"sport": 2, "money": 2}}
    assert counts(tmp_path) == found


def test_a_folder_of_text_files_for_each_class(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "set", LABELS, 2)
    (folder / "sport" / "picture.png").write_bytes(b"no text")
    assert counts(folder) == {"": {"sport": 2, "money": 2, "not a text": 1}}


def test_rows_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text('text,label\n"good",a\n" ",a\n"no class",\n"odd class","a/b"\n')
    problems = [item.problem for item in texts_in(path)[""]]
    assert problems == ["", "empty", "no class", "its class holds a path separator"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("words,label\na,b\n", "columns words, label, and none called text"),
        ("text,kind\na,b\n", "none called label"),
        ("", "no row"),
        ('text,label\n"a', "cannot be read as a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "all.csv").write_text(content)
    with pytest.raises(InputError, match=rf"all\.csv.*{said}"):
        texts_in(tmp_path / "all.csv")


def test_broken_json_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"text": "a", "label": "b"}\n{"text"\n')
    with pytest.raises(InputError, match=r"all\.jsonl cannot be read as JSON Lines"):
        texts_in(tmp_path / "all.jsonl")


def test_domains_come_from_a_column(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text("text,label,domain\nx,a,shop\ny,a,press\n")
    assert [item.domain for item in texts_in(path, domains=True)[""]] == ["shop", "press"]
    write_table(tmp_path / "plain.csv", LABELS, 1)
    with pytest.raises(InputError, match="none called domain"):
        texts_in(tmp_path / "plain.csv", domains=True)


def test_unknown_texts_are_found_in_both_layouts(tmp_path: Path) -> None:
    table = write_table(tmp_path / "all.csv", [*LABELS, "music"], 3)
    found = find(str(table), {"sport"}, 10**6, "text")
    assert (len(found.images), found.left_out) == (6, ("sport",))
    (tmp_path / "bare.csv").write_text("text\none\ntwo\n")
    assert len(find(str(tmp_path / "bare.csv"), {"sport"}, 10**6, "text").images) == 2
    folder = write_folders(tmp_path / "set", ["music"], 2)
    assert len(find(str(folder), {"sport"}, 10**6, "text").images) == 2
    with pytest.raises(InputError, match="all its texts are of known classes"):
        find(str(folder), {"music"}, 10**6, "text")


def test_texts_and_images_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digits holds images, and the backbone reads texts"):
        splits.load_for(Settings.of(backbone="micro_bert"))
    table = write_table(tmp_path / "all.csv", LABELS, 3)
    settings = {"backbone": "micro_bert", "data": str(table), "tasks": 1}
    for wrong in ({"base_classes": 2}, {"augment": "crop"}):
        with pytest.raises(UsageError, match="needs images, and micro_bert reads texts"):
            plan.new_run(Settings.of(**settings, **wrong), None)
    with pytest.raises(InputError, match="neither a folder nor a ZIP file"):
        splits.load_for(Settings.of(data=str(table), tasks=1))


@pytest.mark.parametrize("layout", ["CL_Benchmark/{}/{}", "{1}"])
def test_the_standard_cl_benchmark_is_learned_a_dataset_after_the_other(
    tmp_path: Path, layout: str
) -> None:
    own = {"dbpedia": ["Album", "Film"], "amazon": ["good", "bad"], "yahoo": ["Sports", "Health"],
           "agnews": ["World", "Sports"]}  # fmt: skip
    for name, labels in own.items():
        folder = tmp_path / layout.format("SC" if name == "amazon" else "TC", name)
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            lines = [{"label": c, "sentence": f"{c} {split} {i}"} for c in labels for i in range(3)]
            (folder / f"{split}.json").write_text(json.dumps(lines))
        (folder / "labels.json").write_text("[]")
    for number, order in enumerate(datasets.STANDARD_CL, 1):
        settings = resolve(None, preset(f"standard-cl-{number}"))
        settings = settings.changed(data_root=str(tmp_path))
        parts = splits.parts(splits.load_for(settings), settings)
        assert [part.name for part in parts] == list(order)
        assert [set(part.classes) for part in parts] == [set(own[name]) for name in order]
        assert all(len(items) == 3 for part in parts for items in part.test.values())
    images = Settings.of(data="standard-cl-1", data_root=str(tmp_path))
    with pytest.raises(UsageError, match="standard-cl-1 holds texts, and the backbone reads image"):
        splits.load_for(images)
