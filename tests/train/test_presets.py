"""Presets are settings that a run accepts, and those the paper and the authors' code name."""

from __future__ import annotations

import pytest

from sdlora_edge.errors import UsageError
from sdlora_edge.train import datasets
from sdlora_edge.train.config import resolve
from sdlora_edge.train.presets import PRESETS, preset
from sdlora_edge.train.settings import Settings

CLASSES = {"imagenet-r": 200, "imagenet-a": 200, "domainnet": 345, "cifar100": 100, "cub200": 200}


def differing(a: Settings, b: Settings) -> set[str]:
    one, other = a.flat(), b.flat()
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run_on_a_named_set(name: str) -> None:
    settings = resolve(None, preset(name))
    assert settings.data.data in datasets.NAMES
    models = {"image": "vit_base_patch16_224.augreg_in21k_ft_in1k", "text": "google-t5/t5-large"}
    assert settings.backbone.backbone == models[datasets.SETS[settings.data.data].kind]
    if settings.data.protocol == "class":
        assert CLASSES[settings.data.data] % settings.data.tasks == 0
        assert str(settings.data.tasks) in name.split("-")


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
    expected |= {f"standard-cl-{n}" for n in (1, 2, 3)}
    assert set(PRESETS) == expected
    epochs = {name: resolve(None, preset(name)).training.epochs for name in plain}
    assert epochs == dict(zip(plain, (30, 30, 30, 20, 10, 20, 20)))
    for name in plain:
        settings = resolve(None, preset(name))
        assert (
            settings.training.optimizer,
            settings.training.lr,
            settings.training.batch_size,
        ) == ("adam", 0.008, 128)
        assert (
            settings.method.rank,
            settings.method.head,
            settings.training.head_lr_factor,
            settings.method.absorb,
        ) == (
            "10",
            "paper",
            1.0,
            0.0,
        )
        assert (
            settings.method.magnitudes,
            settings.method.magnitude_init,
            settings.method.magnitude_norm,
        ) == (
            "carry",
            1.0,
            "direction",
        )


def test_a_variant_differs_in_nothing_but_its_point() -> None:
    base, rr, kd = (resolve(None, preset("cub200-10" + variant)) for variant in ("", "-rr", "-kd"))
    assert [rr.method.rank_of(t) for t in (1, 3, 4, 7, 8, 10)] == [10, 10, 8, 8, 6, 6]
    assert kd.method.absorb == 9e-4
    for variant, name in ((rr, "rank"), (kd, "absorb")):
        assert differing(base, variant) == {name}


def test_the_authors_code_differs_from_the_paper_where_it_does() -> None:
    paper, authors = (
        resolve(None, preset(prefix + "imagenet-r-10")) for prefix in ("", "authors-")
    )
    assert differing(paper, authors) == {
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
    assert (
        authors.method.magnitudes,
        authors.method.magnitude_init,
        authors.method.magnitude_norm,
    ) == (
        "reset",
        0.8,
        "factors",
    )
    assert (authors.training.optimizer, authors.training.lr, authors.training.epochs) == (
        "sgd",
        0.01,
        20,
    )
    assert (authors.backbone.mean, authors.backbone.std) == ((0.0,) * 3, (1.0,) * 3)


def test_faces_are_learned_domain_by_domain() -> None:
    settings = resolve(None, preset("face-antispoofing"))
    assert (settings.data.protocol, settings.data.data, settings.data.tasks) == (
        "domain",
        "fas",
        len(datasets.SETS["fas"].domains),
    )


def test_texts_are_learned_in_the_three_orders_of_o_lora() -> None:
    orders = [datasets.SETS[preset(f"standard-cl-{n}")["data"]].domains for n in (1, 2, 3)]
    assert orders == [
        ("dbpedia", "amazon", "yahoo", "agnews"),
        ("dbpedia", "amazon", "agnews", "yahoo"),
        ("yahoo", "amazon", "agnews", "dbpedia"),
    ]


def test_flags_win_over_a_preset_and_leave_it_alone() -> None:
    values = preset("cifar100-10")
    values["tasks"] = 20
    assert resolve(None, values).data.tasks == 20
    assert preset("cifar100-10")["tasks"] == 10


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'imagenet-r'.*imagenet-r-5.*face-antispoofing"):
        preset("imagenet-r")
