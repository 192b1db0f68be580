"""The report: the numbers it promises, nothing from outside, no image unless asked for, and no
text of the data as HTML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, Result

from sdlora_edge.errors import InputError
from sdlora_edge.train import folder
from sdlora_edge.train.evaluator import evaluate
from sdlora_edge.train.reliability import Acceptance, Bin, Calibration
from sdlora_edge.train.report import charts, diagrams, heatmaps, summary, tables, thumbnails, write
from sdlora_edge.train.report.page import render
from sdlora_edge.train.report.summary import (
    ClassScore,
    Confusion,
    DomainErrors,
    SkippedFile,
    Spread,
    Summary,
    TaskRow,
)
from sdlora_edge.train.report.thumbnails import Confused, Shot
from sdlora_edge.train.run import Run

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def row(task: int, accuracy: float | None, frozen: float | None, size: int | None) -> TaskRow:
    return TaskRow(
        task=task,
        name=f"line {task}",
        classes=("a", "b"),
        domain="",
        training_images=40 + task,
        test_images=10,
        seconds=1.5,
        accuracy=accuracy,
        frozen=frozen,
        images=10 * (task + 1),
        losses=(1.5, 0.25) if task else (),
        ece=0.0312 if task else None,
        accepted=0.947 if task else None,
        rank=8,
        absorbed=task == 1,
        residual=None,
        packet_bytes=size,
    )


CALIBRATED = (
    *[Bin(0, 0.0, 0.0)] * 9,
    Bin(4, 0.63, 0.25),
    *[Bin(0, 0.0, 0.0)] * 4,
    Bin(16, 0.98, 0.75),
)


def made_up(**changed: Any) -> Summary:
    """A summary of three tasks, by hand: R = [[0.9], [0.5, 0.8], [0.7, None, 1.0]]."""
    made = Summary(
        path=Path("runs/made-up"),
        state="ab" * 32,
        scores={
            "last": 0.7512,
            "average_anytime": 0.8123,
            "forgetting": 0.0734,
            "backward_transfer": -0.0245,
        },
        unreadable=(),
        task_count=2,
        classes=("a", "b", "c"),
        model_bytes=87650,
        matrix=((0.9,), (0.5, 0.8), (0.7, None, 1.0)),
        counted=((10,), (10, 10), (10, 10, 10)),
        tasks=(row(0, 0.9, 0.81, None), row(1, 0.65, 0.62, 4321), row(2, None, None, 8765)),
        magnitudes=((Spread(1.25, 1.25, 1.25),), (Spread(1.1, 0.7, 1.5), Spread(0.4, 0.4, 0.4))),
        per_class=(ClassScore("c", 1, 8, 4), ClassScore("a", 7, 8), ClassScore("b", 11, 12, 30)),
        confusions=(Confusion("c", "a", 5), Confusion("a", "b", 1)),
        calibration=Calibration(0.0421, 1.375, CALIBRATED),
        unknown=Acceptance(0.9513, -3.25),
        domains=(DomainErrors("OULU-NPU", 0.1234, 0.1, 0.1468, 0.25),),
        skipped={"unreadable": 3},
        skipped_files=(SkippedFile("a/torn.png", "a", "unreadable", "it ends too early"),),
        settings={
            "data": {"data": "digits", "std": (0.5, 0.5)},
            "backbone": {"backbone": "micro_vit", "weights": ""},
            "training": {"seed": 1993},
        },
        versions={"torch": "9.8.7"},
    )
    return replace(made, **changed)


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", html)


def part(html: str, label: str) -> str:
    return html[html.index(f'aria-label="{label}"') :].split("</table>")[0]


def tags(html: str) -> dict[str, set[str]]:
    """The attributes of each tag."""
    found: dict[str, set[str]] = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.setdefault(tag, set()).update(name for name, _ in attrs)

    Reader().feed(html)
    return found


def test_the_page_holds_every_number_it_promises() -> None:
    html = render(made_up())
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
        "30 test images",
        "3 unreadable",
        "0.5, 0.5",
        "state abababababab",
    ):
        assert shown in html, shown
    shown = cells(part(html, "Accuracy matrix"))
    assert shown == ["90.0", "", "50.0", "80.0", "", "70.0", "–", "100.0"]
    assert cells(part(html, "Magnitudes over tasks")) == ["1.25", "", "1.10", "0.40"]
    assert "0.7 to 1.5 over the projections" in html
    assert "this run after task 1: 65.0 % of 20 test images" in html
    assert "aligned head after task 0: 81.0 %" in html
    for shown in ("12.34", "14.68", "OULU-NPU", "1 of 8", "12.5", "62 %", "4321", "1993", "yes"):
        assert f">{shown}<" in html, shown
    assert html.index("1 of 8") < html.index("7 of 8")
    assert "it ends too early" in part(html, "Skipped files")


def test_each_accuracy_of_a_task_stands_beside_its_number_of_test_images() -> None:
    html = part(render(made_up()), "Tasks")
    head = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', html)
    assert head[2:5] == ["accuracy %", "of images", "frozen %"]
    assert cells(html)[1:4] == ["90.0", "10", "81.0"]


def test_losses_are_a_line_for_each_task_that_has_them() -> None:
    html = render(made_up())
    assert "Task 1: 1.5 in the first epoch, 0.25 in the last of 2" in html
    assert "task 2, epoch 2: loss 0.25" in html
    assert "Task 0: " not in html
    assert ">0.25<" in part(html, "Tasks")
    old = render(made_up(tasks=tuple(replace(task, losses=()) for task in made_up().tasks)))
    assert "Training loss" not in old
    assert "last loss" not in old


def test_old_runs_say_what_they_lack() -> None:
    lacking: dict[str, Any] = {
        "scores": {},
        "per_class": None,
        "confusions": None,
        "calibration": None,
        "unknown": None,
        "domains": (),
        "versions": {},
        "unreadable": (1,),
        "skipped": {},
        "skipped_files": (),
    }
    tasks = tuple(
        replace(
            task, packet_bytes=None, absorbed=None, rank=None, frozen=None, ece=None, accepted=None
        )
        for task in made_up().tasks
    )
    html = render(made_up(**lacking, tasks=tasks))
    words = " ".join(html.split())
    assert "not known: at some scoring, the test images of task 1 could not be read" in words
    assert "did not record a frozen reference" in words
    assert words.count("sdlora-edge eval --run runs/made-up --data FOLDER") == 2
    for absent in (
        "Packets",
        "Domains",
        "absorbed",
        "aligned head",
        "Skipped",
        "Confusion matrix",
        "alibration",
        "ECE",
        "accepted",
        "unknown",
    ):
        assert absent not in html, absent


def test_text_of_the_data_is_never_html() -> None:
    evil = made_up(
        path=Path(f"runs/{EVIL}"),
        tasks=tuple(replace(task, name=EVIL, domain=EVIL) for task in made_up().tasks),
        per_class=(ClassScore(EVIL, 1, 8),),
        confusions=(Confusion(EVIL, EVIL + "2", 5),),
        domains=(DomainErrors(EVIL, 0.1, 0.1, 0.1, 0.1),),
        skipped={EVIL: 1},
        skipped_files=(SkippedFile(EVIL, EVIL, EVIL, EVIL),),
        settings={EVIL: {"data": EVIL, "backbone": EVIL, "seed": EVIL, EVIL: [EVIL]}},
        versions={EVIL: EVIL},
    )
    html = render(evil, [Confused(EVIL, EVIL, (Shot(EVIL, EVIL),))])
    assert "&lt;script&gt;alert(1)" in html
    found = tags(html)
    assert "script" not in found
    assert found["img"] == {"src", "width", "height", "alt", "title"}
    assert not [name for names in found.values() for name in names if name.startswith("on")]
    assert "<script" not in render(replace(evil, per_class=None, confusions=None))


def test_the_page_needs_nothing_else_and_allows_nothing_else() -> None:
    html = render(made_up())
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"https?://|\bsrc=|\bhref=|<link|<script|@import|url\(", html)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src 'none'; style-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert not [tag for tag, names in tags(html).items() if "style" in names]


def test_charts_have_a_title_and_a_text_alternative() -> None:
    html = render(made_up())
    assert html.count('role="img"') == 3
    assert "<title>Accuracy over tasks</title><desc>this run: task 0 90.0 %, task 1 65.0 %" in html
    assert "<title>Training loss</title><desc>" in html


def test_calibration_and_known_images_are_shown_with_their_numbers() -> None:
    html = render(made_up())
    for shown in ("4.21 %", "95.13 %", "The temperature is 1.38", "at least -3.25"):
        assert shown in html, shown
    shown = cells(part(html, "Calibration"))
    assert shown == ["16", "98.0", "75.0", "4", "63.0", "25.0"]
    head = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', part(html, "Tasks"))
    assert head[4:7] == ["frozen %", "ECE %", "accepted %"]
    assert cells(part(html, "Tasks"))[4:5] == ["–"]
    assert ">3.1<" in part(html, "Tasks")
    assert ">94.7<" in part(html, "Tasks")
    none = " ".join(render(made_up(unknown=None)).split())
    assert "never answers <i>unknown</i>: it has no threshold" in none


def test_the_reliability_diagram_has_a_bar_for_each_bin_with_images() -> None:
    drawn = diagrams.reliability_diagram(Calibration(0.0421, 1.375, CALIBRATED))
    low, high = drawn.accuracy
    assert (low.x, low.width) == (pytest.approx(60), pytest.approx(100 / 15))
    assert (low.height, low.y) == (charts.HEIGHT / 4, charts.HEIGHT * 3 / 4)
    assert (high.height, high.y) == (charts.HEIGHT * 3 / 4, charts.HEIGHT / 4)
    assert (low.style, high.style, drawn.few) == ("few", "own", True)
    assert [bar.height for bar in drawn.counts] == [diagrams.COUNTS / 4, diagrams.COUNTS]
    assert all(bar.y + bar.height == pytest.approx(drawn.foot) for bar in drawn.counts)
    assert drawn.most == 16
    html = render(made_up())
    assert "<title>Reliability diagram</title><desc>mean probability 63.0 %: 25.0 % of 4" in html
    assert html.count('class="column own" x="93.33%" width="6.67%"') == 2
    assert "of fewer than 10 images" in html
    sure = tuple(replace(one, count=10 * one.count) for one in CALIBRATED)
    assert "of fewer than 10 images" not in render(made_up(calibration=Calibration(0.04, 1, sure)))


def test_classes_with_few_images_are_marked() -> None:
    html = render(made_up())
    shown = cells(part(html, "Recall by class"))
    assert shown == [
        *("12.5", "1 of 8", "8 test, 4 training"),
        *("87.5", "7 of 8", "8 test"),
        *("91.7", "11 of 12", ""),
    ]
    assert "With fewer than 10 test images, recall is coarse" in html
    enough = render(made_up(per_class=(ClassScore("a", 7, 10, 10),)))
    assert "few images" not in enough
    assert "recall is coarse" not in enough


def test_many_tasks_and_no_magnitudes_do_not_stop_it() -> None:
    tasks = tuple(row(i, 0.5, None, None) for i in range(40))
    matrix = tuple((0.5,) * (i + 1) for i in range(40))
    html = render(made_up(tasks=tasks, matrix=matrix, counted=matrix, magnitudes=()))
    assert html.count("this run after task") == 40
    assert "Magnitudes" not in html


def test_the_axis_has_fewer_labels_on_a_narrow_page() -> None:
    scale = charts.fractions([0.5])
    made = charts.chart(charts.Texts("", "", ""), range(1, 101), scale, [])
    narrow = [tick.label for tick in made.x_ticks if tick.shown != "wide"]
    wide = [tick.label for tick in made.x_ticks if tick.shown != "narrow"]
    assert (narrow, wide[:3], len(wide)) == (["20", "40", "60", "80", "100"], ["5", "10", "15"], 20)
    assert made.x_ticks[-1].at == 100.0


def test_a_gap_breaks_the_line() -> None:
    series = charts.Series("run", "own", (1.0, None, 0.0), ("a", "b", "c"))
    made = charts.chart(charts.Texts("", "", ""), [1, 2, 3], charts.Scale(0, 1, ()), [series])
    assert made.lines[0].path == f"M0.00 0.0 M100.00 {charts.HEIGHT}.0"
    assert [point.tip for point in made.lines[0].points] == ["a", "c"]


@pytest.mark.parametrize(
    ("highest", "levels"),
    [(2.83, ["0", "1", "2", "3"]), (0.04, ["0", "0.01", "0.02", "0.03", "0.04"]), (0.0, None)],
)
def test_a_scale_from_zero_has_round_levels(highest: float, levels: list[str] | None) -> None:
    scale = charts.from_zero([highest])
    assert scale.high >= highest
    assert levels is None or [label for _, label in scale.levels] == levels


def test_the_confusion_matrix_counts_every_image_of_its_rows() -> None:
    scores = [ClassScore("c", 1, 8), ClassScore("a", 7, 8), ClassScore("d", 8, 8)]
    confusions = [Confusion("c", "a", 5), Confusion("a", "b", 1)]  # two answers of "c" not recorded
    found = heatmaps.confusion_matrix(scores, confusions)
    assert [column.text for column in found.columns] == ["c", "a", "b", "d", "other"]
    shown = {header.text: [cell.text for cell in cells] for header, cells in found.rows}
    assert shown == {
        "c": ["1", "5", "", "", "2"],
        "a": ["", "7", "1", "", ""],
        "b": ["", "", "", "", ""],
        "d": ["", "", "", "8", ""],
    }
    styles = {cell.style.split()[0] for _, cells in found.rows for cell in cells}
    assert styles == {"right", "wrong", "zero"}


def test_a_large_confusion_matrix_keeps_the_most_confused_classes() -> None:
    scores = [ClassScore(f"c{i}", 5, 8) for i in range(100)]
    confusions = [Confusion(f"c{i}", f"c{i + 1}", 3) for i in range(0, 100, 2)]
    found = heatmaps.confusion_matrix(scores, confusions, most=10)
    assert [header.text for header, _ in found.rows] == [f"c{i}" for i in range(10)]
    assert found.columns[-1].text == "other"
    html = render(made_up(per_class=tuple(scores), confusions=tuple(confusions)))
    assert "The 20 most confused of 100 classes" in html


def test_the_command_writes_the_runs_own_numbers_and_no_image(
    run_copy: Path, cli: Callable[..., Result]
) -> None:
    done = cli("report", "--run", run_copy, "--json")
    assert done.code == 0, done.err
    value, html = json.loads(done.out), (run_copy / "report.html").read_text()
    last = folder.metrics(run_copy)[-1]
    assert value["report"] == str(run_copy / "report.html")
    assert value["bytes"] == len(html.encode())
    shown = value["summary"]
    assert shown["matrix"] == [
        [c / n for c, n in zip(row, last["totals"])] for row in last["correct"]
    ]
    assert [task["accuracy"] for task in shown["tasks"]] == pytest.approx(last["accuracy"])
    assert shown["scores"]["last"] == last["last"]
    assert f"{100 * last['last']:.2f} %" in html
    assert shown["tasks"][-1]["losses"] == last["losses"]
    assert shown["calibration"] == last["calibration"]
    assert shown["tasks"][-1]["ece"] == last["calibration"]["ece"]
    assert "<title>Reliability diagram</title>" in html
    training = {score["name"]: score["training"] for score in shown["per_class"]}
    assert sum(training.values()) == sum(task["training_images"] for task in shown["tasks"])
    assert "Training loss" in html
    assert "data:image" not in html


def test_the_numbers_that_are_read_without_the_model_are_the_models(fleet: Fleet) -> None:
    run, found = Run.open(fleet.run), summary.read(fleet.run)
    state = run.states[-1]
    tensors = run.backbone.state_dict().values()
    head = state.head_weight.nbytes + state.head_bias.nbytes
    assert found.model_bytes == sum(t.numel() * t.element_size() for t in tensors) + head
    assert found.classes == state.classes
    assert found.state == state.digest
    for before, spreads in zip(run.states[1:], found.magnitudes, strict=True):
        means = before.magnitudes.reshape(len(before.magnitudes), -1).mean(axis=1)
        assert [spread.mean for spread in spreads] == means.tolist()


def test_a_report_loads_no_torch(run_copy: Path) -> None:
    program = (
        "import sys; from sdlora_edge.cli import main;"
        " code = main(['report', '--run', sys.argv[1]]);"
        " raise SystemExit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, run_copy], check=True, capture_output=True)


def test_out_and_errors(run_copy: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    assert cli("report", "--run", run_copy, "--out", tmp_path / "page.html").out.startswith(
        f"report: {tmp_path / 'page.html'}"
    )
    assert (tmp_path / "page.html").is_file()
    assert not (run_copy / "report.html").exists()
    assert cli("report", "--run", tmp_path).code == 3


def test_thumbnails_are_the_confused_images(run_copy: Path) -> None:
    own = evaluate(Run.open(run_copy), "digits").to_dict()
    file = run_copy / "tasks" / "003" / folder.METRICS
    known = json.loads(file.read_text())
    known |= {"per_class": own["per_class"], "confusions": own["confusions"]}
    file.write_text(json.dumps(known))
    done = write(run_copy, run_copy / "with.html", thumbnails=True)
    wanted = own["confusions"][: thumbnails.PAIRS]
    shown = thumbnails.confused(run_copy, done.summary.confusions or ())
    assert [(pair.truth, pair.predicted) for pair in shown] == [tuple(c[:2]) for c in wanted]
    counts = [min(c[2], thumbnails.IMAGES) for c in wanted]
    assert [len(pair.images) for pair in shown] == counts
    html = (run_copy / "with.html").read_text()
    assert html.count('src="data:image/jpeg;base64,') == sum(counts)
    write(run_copy, run_copy / "without.html")
    assert "data:image" not in (run_copy / "without.html").read_text()


def changed_metrics(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = run / "tasks" / "003" / folder.METRICS
    known = json.loads(file.read_text())
    change(known)
    file.write_text(json.dumps(known))


def test_a_task_whose_images_are_gone_is_named(run_copy: Path) -> None:
    def forget(last: dict[str, Any]) -> None:
        last["correct"][-1][1] = None
        for name in (*summary.SCORES, "accuracy"):
            del last[name]

    changed_metrics(run_copy, forget)
    found = summary.read(run_copy)
    assert found.unreadable == (folder.metrics(run_copy)[1]["task"],)
    assert found.tasks[-1].accuracy is None
    assert found.tasks[0].accuracy is not None
    assert found.scores == {}


def test_retired_classes_no_longer_count(run_copy: Path) -> None:
    def retire(last: dict[str, Any]) -> None:
        totals = last["totals"]
        last["counted"] = [totals[: i + 1] for i in range(len(totals))]
        last["counted"][-1] = [totals[0], 0, *totals[2:]]
        last["correct"][-1][1] = 0
        last["correct"][-1][0] = totals[0]

    changed_metrics(run_copy, retire)
    found, totals = summary.read(run_copy), folder.metrics(run_copy)[-1]["totals"]
    assert found.matrix[-1][:2] == (1.0, None)
    assert found.matrix[-2][1] is not None
    assert found.tasks[-1].images == sum(totals) - totals[1]
    assert found.tasks[-1].accuracy is not None


def test_losses_and_skipped_files_are_read_if_the_run_has_them(run_copy: Path) -> None:
    changed_metrics(run_copy, lambda last: last.update(losses=[2.0, 1.5]))
    skipped = "".join(f'{i}.png,a,unreadable,"it ends, too early"\n' for i in range(300))
    (run_copy / folder.SKIPPED).write_text("file,class,reason,detail\n" + skipped)
    found = summary.read(run_copy)
    assert found.tasks[-1].losses == (2.0, 1.5)
    assert found.skipped == {"unreadable": 300}
    assert len(found.skipped_files) == summary.SHOWN_SKIPPED
    assert found.skipped_files[0] == SkippedFile("0.png", "a", "unreadable", "it ends, too early")
    assert "The first 200." in render(found)


def test_magnitudes_of_each_projection_are_summed_up() -> None:
    deltas = [[[1.0, 3.0]], [[0.5, 0.5], [2.0, 2.0]]]
    assert summary._magnitudes(deltas) == (
        (Spread(2.0, 1.0, 3.0),),
        (Spread(2.5, 1.5, 3.5), Spread(2.0, 2.0, 2.0)),
    )
    assert summary._magnitudes([np.array([0.5])]) == ((Spread(0.5, 0.5, 0.5),),)


def test_a_run_without_a_score_is_an_error(run_copy: Path) -> None:
    for file in run_copy.glob("tasks/*/" + folder.METRICS):
        file.unlink()
    with pytest.raises(InputError, match="no scored task"):
        summary.read(run_copy)


def test_a_long_name_loses_its_middle() -> None:
    assert tables.short("Balinese", 8) == "Balinese"
    assert tables.short("Balinese.character07", 11) == "Balin…ter07"
