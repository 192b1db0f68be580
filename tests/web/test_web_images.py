"""The images that Node prepares (web/test/image.test.js) are those that Pillow prepares."""

from __future__ import annotations

from image_cases import PLACE, text


def test_the_digests_are_those_of_pillow() -> None:
    assert PLACE.read_text() == text(), "run python tests/web/image_cases.py"
