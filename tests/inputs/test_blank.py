"""Images that show nothing."""

from __future__ import annotations

import numpy as np

from sdlora_edge.inputs.pictures import blank


def test_they_are_what_their_names_say_and_the_same_for_a_seed() -> None:
    found = blank(16, each=3, seed=5)
    assert {kind: images.shape for kind, images in found.items()} == dict.fromkeys(
        ("black", "white", "one colour", "noise", "grey noise"), (3, 16, 16, 3)
    )
    assert not found["black"][0].any()
    assert (found["white"][0] == 255).all()
    assert 0 < found["black"][1].max() < 50
    assert 205 < found["white"][2].min() < 255
    assert (found["one colour"].reshape(3, -1, 3).std(axis=1) == 0).all()
    assert found["noise"].std() > 60
    assert 20 < found["grey noise"].std() < 40
    again, other = blank(16, each=3, seed=5), blank(16, each=3, seed=6)
    assert all(np.array_equal(again[kind], images) for kind, images in found.items())
    assert not np.array_equal(other["noise"], found["noise"])
