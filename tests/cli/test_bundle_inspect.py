"""`bundle inspect` shows what a bundle holds, once every file is the one that the manifest names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import Fleet, Result

from sdlora_edge.cli.bundle import _summary
from sdlora_edge.formats.bundle import open_bundle

Cli = Callable[..., Result]


def test_it_shows_all_that_the_manifest_says(fleet: Fleet, cli: Cli) -> None:
    bundle, shown = (
        open_bundle(fleet.bundle),
        cli("bundle", "inspect", "--bundle", fleet.bundle, "--all"),
    )
    assert shown.code == 0, shown
    manifest = json.loads((fleet.bundle / "manifest.json").read_bytes())
    for word in (
        bundle.id,
        manifest["states"][0],
        manifest["states"][-1],
        "micro_vit",
        *bundle.state.classes,
        fleet.trust.keys[0].keyid,
    ):
        assert word in shown.out
    for p in manifest["projections"]:
        row = next(line for line in shown.out.splitlines() if line.split()[:1] == [p["name"]])
        assert row.split()[1:] == [p["tensor"], "{}..{}".format(*p["rows"]), "64", "x", "64"]
    for path in fleet.bundle.iterdir():
        if path.name != "manifest.json":
            assert f"{path.stat().st_size:,}" in next(
                line for line in shown.out.splitlines() if line.startswith(path.name)
            )
    value = json.loads(cli("bundle", "inspect", "--bundle", fleet.bundle, "--json").out)
    fractions = {"tolerance", "min_agreement", "magnitudes", "canary"}
    for name in manifest.keys() - fractions:
        assert value[name] == manifest[name]
    assert (value["tolerance"], value["min_agreement"]) == (bundle.manifest.tolerance, 1.0)
    assert value["classes"] == list(bundle.state.classes)
    assert value["canary"] == {
        "seed": manifest["canary"]["seed"],
        "images": manifest["canary"]["count"],
    }
    assert (value["id"], value["trust"]["threshold"], value["trust"]["keys"]) == (
        bundle.id,
        1,
        [fleet.trust.keys[0].keyid],
    )


def test_it_shows_nothing_of_a_bundle_that_was_changed(
    fleet: Fleet, cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(fleet.bundle, tmp_path / "bundle")
    data = bytearray((tmp_path / "bundle" / "factors.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bundle" / "factors.safetensors").write_bytes(data)
    result = cli("bundle", "inspect", "--bundle", tmp_path / "bundle")
    assert (result.code, result.out) == (3, "")
    assert "factors.safetensors is not the file the manifest names" in result.err
    assert cli("bundle", "inspect", "--bundle", tmp_path).code == 3
    assert cli("bundle", "inspect", "--help").code == 0


def test_the_summary_of_a_large_bundle_fits_on_a_screen(fleet: Fleet, cli: Cli) -> None:
    """24 lines of 80 columns, and nothing of it is what --all alone shows."""
    value = json.loads(cli("bundle", "inspect", "--bundle", fleet.bundle, "--json").out)
    short = cli("bundle", "inspect", "--bundle", fleet.bundle).out
    for word in (value["id"], value["lineage"], value["state"], "model.onnx", "--all"):
        assert word in short
    value["projections"] = [
        {"name": f"blocks.{i}.attn.{part}", "tensor": "x", "rows": [0, 768], "shape": [768, 768]}
        for i in range(12)
        for part in ("q", "v")
    ]
    value["classes"] = [f"a class with a long name {i}" for i in range(200)]
    value["trust"] = {"threshold": 3, "keys": ["0123456789abcdef" * 4] * 16}
    value["bundle"] = "/var/lib/" + "very-long-folder/" * 9
    lines = [
        row
        for line in _summary(value)
        for row in ([line] if isinstance(line, str) else line.plain())
    ]
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
