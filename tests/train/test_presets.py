"""Presets are settings that a run accepts, and those the paper and the authors' code name."""

from __future__ import annotations

import pytest

from sdlora_edge.errors import UsageError
from sdlora_edge.train import datasets
from sdlora_edge.train.config import resolve
from sdlora_edge.train.presets import PRESETS, preset

CLASSES = {"imagenet-r": 200, "imagenet-a": 200, "domainnet": 345, "cifar100": 100, "cub200": 200}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run_on_a_named_set(name: str) -> None:
    settings = resolve(None, preset(name))
    assert settings.data in datasets.NAMES
    assert settings.backbone == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    if settings.protocol == "class":
        assert CLASSES[settings.data] % settings.tasks == 0
        assert str(settings.tasks) in name.split("-")


def test_the_papers_experiments_are_all_there_each_with_its_variants() -> None:
    plain = (
        "imagenet-r-5",
        "imagenet-r-10",
        "imagenet-r-20",
        "imagenet-a-10",
        "domainnet-5",
        "cifar100-10",
        "cub200-10",
    )
    expected = {name + variant for name in plain for variant in ("", "-rr", "-kd")}
    expected |= {f"authors-imagenet-r-{n}" for n in (5, 10, 20)} | {"face-antispoofing"}
    assert set(PRESETS) == expected
    epochs = {name: resolve(None, preset(name)).epochs for name in plain}
    assert epochs == dict(zip(plain, (30, 30, 30, 20, 10, 20, 20)))
    for name in plain:
        settings = resolve(None, preset(name))
        assert (settings.optimizer, settings.lr, settings.batch_size) == ("adam", 0.008, 128)
        assert (settings.rank, settings.head, settings.head_lr_factor, settings.absorb) == (
            "10",
            "paper",
            1.0,
            0.0,
        )
        assert (settings.magnitudes, settings.magnitude_init, settings.magnitude_norm) == (
            "carry",
            1.0,
            "direction",
        )


def test_a_variant_differs_in_nothing_but_its_point() -> None:
    base, rr, kd = (resolve(None, preset("cub200-10" + variant)) for variant in ("", "-rr", "-kd"))
    assert [rr.rank_of(t) for t in (1, 3, 4, 7, 8, 10)] == [10, 10, 8, 8, 6, 6]
    assert kd.absorb == 9e-4
    for variant, name in ((rr, "rank"), (kd, "absorb")):
        assert {key for key in vars(base) if getattr(base, key) != getattr(variant, key)} == {name}


def test_the_authors_code_differs_from_the_paper_where_it_does() -> None:
    paper, authors = (
        resolve(None, preset(prefix + "imagenet-r-10")) for prefix in ("", "authors-")
    )
    differs = {name for name in vars(paper) if getattr(paper, name) != getattr(authors, name)}
    assert differs == {
        *(
            "magnitudes",
            "magnitude_init",
            "magnitude_norm",
            "optimizer",
            "lr",
            "epochs",
            "mean",
            "std",
            "augment",
            "seed",
        )
    }
    assert (authors.magnitudes, authors.magnitude_init, authors.magnitude_norm) == (
        "reset",
        0.8,
        "factors",
    )
    assert (authors.optimizer, authors.lr, authors.epochs) == ("sgd", 0.01, 20)
    assert (authors.mean, authors.std) == ((0.0,) * 3, (1.0,) * 3)


def test_faces_are_learned_domain_by_domain() -> None:
    settings = resolve(None, preset("face-antispoofing"))
    assert (settings.protocol, settings.data, settings.tasks) == (
        "domain",
        "fas",
        len(datasets.SETS["fas"].domains),
    )


def test_flags_win_over_a_preset_and_leave_it_alone() -> None:
    values = preset("cifar100-10")
    values["tasks"] = 20
    assert resolve(None, values).tasks == 20
    assert preset("cifar100-10")["tasks"] == 10


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'imagenet-r'.*imagenet-r-5.*face-antispoofing"):
        preset("imagenet-r")
