"""A run on texts, with a bundle and packets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Fleet
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import build_packets
from texts_fixture import SETTINGS, WORDS, write_table

from sdlora_edge.formats import signing
from sdlora_edge.train.loop import train
from sdlora_edge.train.settings import Settings

LABELS = list(WORDS)[:6]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A run of three tasks on texts, with a bundle of the first one and packets of the others."""
    root = tmp_path_factory.mktemp("texts")
    write_table(root / "data" / "train.csv", LABELS, 30)
    write_table(root / "data" / "test.csv", LABELS, 15, seed=1)
    run = train(Settings.of(data=str(root / "data"), **SETTINGS), root / "run")
    key, public = signing.new_key("factory", root / "keys")
    export_bundle(run, root / "bundle", 1, [str(public)])
    built = build_packets(run, root / "bundle", key, out=root / "packets")
    trust = signing.Trust((signing.load_public(public),), 1)
    return Fleet(run.path, root / "bundle", [packet.file for packet in built], key, trust)


@pytest.fixture
def text_run(texts: Fleet, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(texts.run, tmp_path / "run"))
