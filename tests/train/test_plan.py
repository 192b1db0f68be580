"""What is asked of a new task before anything is trained."""

from __future__ import annotations

from pathlib import Path

from sdlora_edge.train.plan import _name_of


def test_a_task_is_called_as_its_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "week.2").mkdir()
    for name in ("week.3.ZIP", "new_tickets.csv"):
        (tmp_path / name).touch()
    found = [_name_of(str(path)) for path in sorted(tmp_path.iterdir())]
    assert found == ["new_tickets", "week.2", "week.3"]
    assert _name_of("in_data_root/cifar100.zip") == "cifar100"
    assert _name_of("digits") == "digits"
    assert _name_of(None) == "task"
