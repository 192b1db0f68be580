"""What is asked of a new task before anything is trained."""

from __future__ import annotations

import pytest

from sdlora_edge.train.plan import _name_of


@pytest.mark.parametrize(
    ("images", "name"),
    [("in/week.2", "week.2"), ("in/week.2.ZIP", "week.2"), ("cups", "cups"), (None, "task")],
)
def test_a_task_is_called_as_its_images(images: str | None, name: str) -> None:
    assert _name_of(images) == name
