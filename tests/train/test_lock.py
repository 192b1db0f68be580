"""One process writes to a run: a second one is refused at once, whatever it wants to write, and a
dead one holds nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Fleet, Result, make_images, snapshot

from sdlora_edge.errors import UsageError
from sdlora_edge.train import loop
from sdlora_edge.train.config import resolve
from sdlora_edge.train.folder import locked
from sdlora_edge.train.run import Run
from sdlora_edge.train.tasks import TaskResult

HOLD = "import sys; from pathlib import Path; from sdlora_edge.train.folder import locked\nwith locked(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"


@pytest.fixture
def holder(run_copy: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_at_once_and_changes_nothing(
    run_copy: Path,
    holder: subprocess.Popen[str],
    fleet: Fleet,
    tmp_path: Path,
    cli: Callable[..., Result],
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    more, before = make_images(tmp_path / "more", ["x", "y"], 4), snapshot(run_copy)
    build = (
        "packet",
        "build",
        "--run",
        run_copy,
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--out",
        tmp_path / "p",
    )
    for command in (
        ("train", "--run", run_copy),
        ("train", "--run", run_copy, "--data", more),
        ("packet", "from-peft", adapter, "--run", run_copy, "--data", more),
        (*build, "--task", 3, "--revision", 1),
    ):
        done = cli(*command)
        assert (done.code, "is in use: another process is training it" in done.err, done.out) == (
            2,
            True,
            "",
        ), done
    assert snapshot(run_copy) == before
    for call in (
        lambda: loop.resume(run_copy),
        lambda: loop.add_task(run_copy, str(more)),
        lambda: Run.open(run_copy).revise(3, 1),
    ):
        with pytest.raises(UsageError, match="is in use"):
            call()
    assert cli(*build).code == 0  # who only reads is let in
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert loop.resume(run_copy).states[-1].task == 3


def test_a_refused_second_train_leaves_the_folder_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between the making of the folder and the first lock."""
    begin = Run.begin

    def raced(path: Path, settings: object) -> None:
        begin(path, settings)  # type: ignore[arg-type]
        monkeypatch.setattr(loop, "locked", lambda _: locked(path / "nowhere"))

    monkeypatch.setattr(Run, "begin", raced)
    settings = resolve(None, {"base_epochs": 1, "epochs": 1})
    with pytest.raises(Exception, match="nowhere"):
        loop.train(settings, tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").is_file()


def test_a_task_that_another_process_has_recorded_is_not_said_to_be_in_the_way(
    run_copy: Path,
) -> None:
    shutil.rmtree(run_copy / "tasks" / "003")
    run = Run.open(run_copy)
    loop.resume(run_copy)
    update = Run.open(run_copy).updates[-1]
    with pytest.raises(UsageError, match="has learned task 3 since it was opened: open it again"):
        run.append(TaskResult(update, run.kept))


def test_a_folder_that_cannot_be_written_is_not_in_use(run_copy: Path) -> None:
    if os.geteuid() == 0:
        (run_copy / "run.lock").unlink()
        (run_copy / "run.lock").mkdir()
    else:
        run_copy.chmod(0o500)
    with pytest.raises(Exception, match="cannot be written"):
        loop.resume(run_copy)
