"""`device configure`, `identity`, `report`, and what `predict` and `watch --from` do for reports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Fleet, Result

from sdlora_edge.device import Device
from sdlora_edge.fleet import follow, ledger
from sdlora_edge.fleet.identity import Changes, configure, identity
from sdlora_edge.fleet.report import unseal

Cli = Callable[..., Result]


def sent(path: Path, store: Path) -> object:
    who = identity(store)
    return unseal(path.read_bytes(), {who.id: who.public})


def test_a_device_is_configured_shown_and_reports(cli: Cli, store: Path, tmp_path: Path) -> None:
    result = cli("device", "identity", "--store", store)
    assert (result.code, result.out) == (3, "")
    assert "sdlora-edge device configure" in result.err
    out = tmp_path / "out.json"
    given = ("--name", "gate 3", "--channel", "line-3", "--group", "a", "--group", "b")
    assert cli("device", "configure", "--store", store, *given, "--report-to", out).code == 0
    shown = json.loads(cli("device", "identity", "--store", store, "--json").out)
    assert shown == identity(store).to_dict()
    assert (shown["groups"], shown["report_to"]) == (["a", "b"], [str(out)])
    tried = json.loads(cli("device", "report", "--store", store, "--dry-run", "--json").out)
    assert not out.exists()
    assert tried["device"] == shown["id"]
    assert tried["state"] == Device.open(store, threads=1).status().state
    result = cli("device", "report", "--store", store)
    assert result.code == 0
    assert f"{out}: delivered" in result.out
    assert sent(out, store).number >= tried["number"]  # type: ignore[attr-defined]
    extra = tmp_path / "extra.json"
    assert cli("device", "report", "--store", store, "--to", extra).code == 0
    assert extra.exists()
    assert cli("device", "configure", "--store", store, "--report-to", "").code == 0
    result = cli("device", "report", "--store", store)
    assert result.code == 2
    assert "--report-to" in result.err


def test_a_report_that_does_not_arrive_is_an_error(cli: Cli, store: Path) -> None:
    configure(store, Changes())
    result = cli("device", "report", "--store", store, "--to", "http://127.0.0.1:1", "--json")
    found = json.loads(result.out)
    assert result.code == found["refused"][0]["exit_code"] == 8
    assert "cannot be reached" in result.err


def test_predict_counts_if_the_device_reports(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path, images: Path
) -> None:
    def counted() -> int:
        return ledger.preview(store, 0).predictions.total

    predict = ("device", "predict", images, "--store", store)
    assert cli(*predict).code == 0
    assert not (store / "fleet").exists()
    assert cli(*predict, "--count").code == 0
    once = counted()
    assert once > 0
    configure(store, Changes(report_to=(str(tmp_path / "out.json"),)))
    assert cli(*predict).code == 0
    assert counted() == 2 * once
    assert cli(*predict, "--no-count").code == 0
    assert counted() == 2 * once
    assert cli("device", "report", "--store", store).code == 0
    found = sent(tmp_path / "out.json", store)
    assert found.predictions.total == 2 * once  # type: ignore[attr-defined]
    assert counted() == 0


@pytest.fixture
def images(fleet: Fleet, tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i * 80, 10, 10)).save(folder / f"{i}.png")
    return folder


def test_a_device_that_serves_nothing_still_reports(cli: Cli, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    configure(store, Changes(report_to=(str(out),)))
    (store / "bundle" / "factors.safetensors").write_bytes(b"")
    assert cli("device", "status", "--store", store).code == 3
    assert cli("device", "report", "--store", store).code == 0
    report = sent(out, store)
    assert report.state == ""  # type: ignore[attr-defined]
    assert report.errors[-1].code == 3  # type: ignore[attr-defined]


def test_a_follower_reports_changes_and_then_regularly(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(follow.time, "monotonic", lambda: now)
    out = tmp_path / "out.json"
    configure(store, Changes(report_to=(str(out),)))
    with contextlib.closing(follow.Telling(store, 3600.0)) as telling:
        telling(None)
        first = sent(out, store)
        telling(None)
        assert sent(out, store) == first  # nothing is due
        now = 3700.0
        telling(None)
        assert sent(out, store).number == first.number + 1  # type: ignore[attr-defined]
        configure(store, Changes(channel="line-4"))
        telling(None)
        assert sent(out, store).channel == "line-4"  # type: ignore[attr-defined]
