"""The report: the numbers it promises, nothing from outside, no image unless asked for, and no text of the data as HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, Result

from sdlora_edge.errors import InputError
from sdlora_edge.train.evaluator import evaluate
from sdlora_edge.train.report import summary as numbers
from sdlora_edge.train.report.html import page
from sdlora_edge.train.run import Run

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def made_up(**changed: Any) -> dict[str, Any]:
    """A summary of three tasks, by hand: R = [[0.9], [0.5, 0.8], [0.7, None, 1.0]]."""
    tasks = [
        {
            "task": t,
            "name": f"line {t}",
            "classes": ["a", "b"],
            "domain": "",
            "training_images": 40 + t,
            "seconds": 1.5,
        }
        | {
            "test_images": 10,
            "accuracy": a,
            "frozen": f,
            "rank": 8,
            "absorbed": t == 1,
            "packet_bytes": b,
        }
        for t, a, f, b in ((0, 0.9, 0.81, None), (1, 0.65, 0.62, 4321), (2, None, None, 8765))
    ]
    return {
        "path": "runs/made-up",
        "lineage": "ab" * 32,
        "scores": {
            "last": 0.7512,
            "average_anytime": 0.8123,
            "forgetting": 0.0734,
            "backward_transfer": -0.0245,
        },
        "unreadable": [],
        "task_count": 2,
        "classes": ["a", "b", "c"],
        "model_bytes": 87650,
        "matrix": [[0.9], [0.5, 0.8], [0.7, None, 1.0]],
        "accuracy": [0.9, 0.65, None],
        "frozen": [0.81, 0.62, None],
        "tasks": tasks,
        "magnitudes": [[[1.25, 1.25, 1.25]], [[1.1, 0.7, 1.5], [0.4, 0.4, 0.4]]],
        "per_class": [["c", 1, 8], ["a", 7, 8]],
        "confusions": [["c", "a", 5], ["a", "b", 1]],
        "domains": [
            {"domain": "OULU-NPU", "hter": 0.1234, "far": 0.1, "frr": 0.1468, "threshold": 0.25}
        ],
        "config": {"Data": {"data": "digits", "seed": 1993}, "Backbone": {"backbone": "micro_vit"}},
        "versions": {"torch": "9.8.7"},
        **changed,
    }


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", html)


def test_the_page_holds_every_number_it_promises() -> None:
    html = page(made_up())
    for shown in (
        "75.12 %",
        "81.23 %",
        "7.34 %",
        "-2.45 %",
        "8.8 kB",
        "8765 bytes",
        "10 % of the model",
        "87.7 kB",
        "9.8.7",
    ):
        assert shown in html, shown
    matrix = cells(html[html.index('aria-label="Accuracy matrix"') :].split("</table>")[0])
    assert matrix == ["90.0", "", "", "50.0", "80.0", "", "70.0", "–", "100.0"]
    magnitudes = cells(html[html.index('aria-label="Magnitudes') :].split("</table>")[0])
    assert magnitudes == ["1.25", "", "1.10", "0.40"]
    assert "0.7 to 1.5 over the projections" in html
    assert "this run after task 1: 65.0 %" in html
    assert "after task 0: 81.0 %" in html
    for shown in ("12.34", "14.68", "OULU-NPU", "1 of 8", "12.5", "62 %", "4321", "1993", "yes"):
        assert f">{shown}<" in html, shown
    assert html.index("1 of 8") < html.index("7 of 8")


def test_old_runs_say_what_they_lack() -> None:
    bare = {
        "scores": {},
        "frozen": None,
        "per_class": None,
        "confusions": None,
        "domains": [],
        "versions": {},
        "unreadable": [1],
    }
    tasks = [
        task | {"packet_bytes": None, "absorbed": None, "rank": None, "frozen": None}
        for task in made_up()["tasks"]
    ]
    html = page(made_up(**bare, tasks=tasks))
    assert "are not known: at some scoring, the test images of task 1 could not be read" in html
    assert "this run did not record one" in html
    assert html.count("sdlora-edge eval --run runs/made-up --data FOLDER") == 2
    for absent in ("Packets", "Domains", "absorbed", "with its own aligned head"):
        assert absent not in html, absent


def test_text_of_the_data_is_never_html() -> None:
    evil = made_up()
    evil["path"] = f"runs/{EVIL}"
    evil["tasks"] = [task | {"name": EVIL, "domain": EVIL} for task in evil["tasks"]]
    evil["per_class"] = [[EVIL, 1, 8]]
    evil["confusions"] = [[EVIL, EVIL, 5]]
    evil["domains"][0]["domain"] = EVIL
    evil["config"]["Data"] |= {"data": EVIL, EVIL: [EVIL]}
    evil["versions"] = {EVIL: EVIL}
    evil["thumbnails"] = [{"truth": EVIL, "predicted": EVIL, "images": [(EVIL, EVIL)]}]
    html = page(evil)
    assert "&lt;script&gt;alert(1)" in html

    tags: dict[str, set[str]] = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.setdefault(tag, set()).update(name for name, _ in attrs)

    Reader().feed(html)
    assert "script" not in tags
    assert tags["img"] == {"src", "width", "height", "alt", "title"}
    assert not [name for names in tags.values() for name in names if name.startswith("on")]
    assert "<script" not in page(made_up(per_class=None, path=EVIL))


def test_the_page_needs_nothing_else() -> None:
    html = page(made_up())
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"https?://|\bsrc=|\bhref=|<link|<script|@import|url\(", html)
    assert "default-src 'none'" in html


def test_many_tasks_and_no_magnitudes_do_not_stop_it() -> None:
    task = made_up()["tasks"][1]
    rows = [[0.5] * (i + 1) for i in range(40)]
    html = page(
        made_up(
            tasks=[task | {"task": i} for i in range(40)],
            matrix=rows,
            accuracy=[0.5] * 40,
            frozen=None,
            magnitudes=[],
        )
    )
    assert html.count("this run after task") == 40
    assert "Magnitudes" not in html


def test_the_command_writes_the_runs_own_numbers_and_no_image(
    run_copy: Path, cli: Callable[..., Result]
) -> None:
    done = cli("report", "--run", run_copy, "--json")
    assert done.code == 0, done.err
    value, html = json.loads(done.out), (run_copy / "report.html").read_text()
    last = Run.open(run_copy).metrics[-1]
    assert value["bytes"] == len(html.encode())
    assert value["matrix"] == [
        [c / n for c, n in zip(row, last["totals"])] for row in last["correct"]
    ]
    assert value["accuracy"] == pytest.approx(last["accuracy"])
    assert value["scores"]["last"] == last["last"]
    assert f"{100 * last['last']:.2f} %" in html
    assert set(value["config"]) == {"Data", "Backbone", "Method", "Training"}
    assert "data:image" not in html


def test_out_and_errors(run_copy: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert cli("report", "--run", run_copy, "--out", tmp_path / "page.html").out.startswith(
        f"report: {tmp_path / 'page.html'}"
    )
    assert (tmp_path / "page.html").is_file()
    assert not (run_copy / "report.html").exists()
    assert cli("report", "--run", tmp_path).code == 3


def test_thumbnails_are_the_confused_images(run_copy: Path) -> None:
    run = Run.open(run_copy)
    own = evaluate(run, "digits")
    run.metrics[-1] |= {"per_class": own["per_class"], "confusions": own["confusions"]}
    value = numbers.write(run, run_copy / "with.html", thumbnails=True)
    shown = numbers.confused_images(run, own["confusions"])
    assert "thumbnails" not in value
    assert [(pair["truth"], pair["predicted"]) for pair in shown] == [
        tuple(c[:2]) for c in own["confusions"][: numbers.PAIRS]
    ]
    assert [len(pair["images"]) for pair in shown] == [
        min(c[2], numbers.IMAGES) for c in own["confusions"][: numbers.PAIRS]
    ]
    html = (run_copy / "with.html").read_text()
    assert html.count('src="data:image/jpeg;base64,') == sum(len(pair["images"]) for pair in shown)
    numbers.write(run, run_copy / "without.html")
    assert "data:image" not in (run_copy / "without.html").read_text()


def test_a_task_whose_images_are_gone_is_named(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    last = run.metrics[-1]
    last["correct"][-1][1] = None
    for name in (*numbers.SCORES, "accuracy"):
        del last[name]
    value = numbers.summary(run)
    assert value["unreadable"] == [run.metrics[1]["task"]]
    assert value["accuracy"][-1] is None
    assert value["accuracy"][0] is not None
    assert value["scores"] == {}


def test_magnitudes_of_each_projection_are_summed_up(fleet: Fleet) -> None:
    assert numbers._spread(np.array([[1.0, 3.0], [2.0, 2.0]])) == [[2.0, 1.0, 3.0], [2.0, 2.0, 2.0]]
    assert numbers._spread(np.array([0.5, 1.5])) == [[0.5, 0.5, 0.5], [1.5, 1.5, 1.5]]
    assert len(numbers.summary(Run.open(fleet.run))["magnitudes"]) == 3


def test_a_run_without_a_score_is_an_error(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    run.metrics = []
    with pytest.raises(InputError, match="no scored task"):
        numbers.summary(run)
