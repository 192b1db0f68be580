"""The whole loop with texts: train, export, packets, device, service, label. Nothing in it but `inputs` knows of texts."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from agents import agent, multipart
from conftest import Fleet, Result
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import build_packets
from texts_fixture import SETTINGS, rows, save_encoder, write_folders, write_table

from sdlora_edge.agent.unknowns import Unknowns
from sdlora_edge.device import Device
from sdlora_edge.device.answers import Asked
from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.formats import signing
from sdlora_edge.formats.bundle import open_bundle
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.text import TOKENIZER
from sdlora_edge.label.eyes import by_bundle, images_in
from sdlora_edge.selftest import checks
from sdlora_edge.selftest.kit import Kit
from sdlora_edge.train.evaluator import evaluate, host_logits
from sdlora_edge.train.loop import add_task, train
from sdlora_edge.train.report import write as write_report
from sdlora_edge.train.run import Run
from sdlora_edge.train.settings import Settings

Cli = Callable[..., Result]
LABELS = ["sport", "money", "music", "space", "rain", "wood"]
SAMPLES = [row["text"] for row in rows(LABELS, 1, seed=9)]


@pytest.fixture
def shelf(texts: Fleet, tmp_path: Path) -> Path:
    """A store in the last state."""
    device = Device.init(texts.bundle, tmp_path / "store")
    for path in texts.packets:
        device.apply(path)
    return tmp_path / "store"


def test_a_device_computes_what_the_host_computes_after_each_packet(
    texts: Fleet, tmp_path: Path
) -> None:
    run, device = Run.open(texts.run), Device.init(texts.bundle, tmp_path / "store")
    inputs = run.preprocessing.arrays(np.stack([run.preprocessing.item(t) for t in SAMPLES]))
    for task, path in enumerate(texts.packets, 2):
        assert device.apply(path).canary_difference < 1e-4
        np.testing.assert_allclose(device.logits(inputs), host_logits(run, task, inputs), atol=1e-4)
    answers = device.predict(SAMPLES)
    assert {a.label for a in answers} <= set(LABELS)
    assert device.predict(SAMPLES[0]).score == pytest.approx(answers[0].score, abs=1e-3)
    assert (texts.bundle / TOKENIZER).read_bytes() == run.preprocessing.files[TOKENIZER]


def test_the_run_learns_and_knows_its_texts_from_nonsense(texts: Fleet, tmp_path: Path) -> None:
    run = Run.open(texts.run)
    assert run.metrics[-1]["accuracy"][-1] > 0.7
    unknown = write_table(tmp_path / "new.csv", ["food"], 10)
    found = evaluate(run, Path(run.config.data.data), unknown=unknown)
    assert found.unknown.auroc > 0.5  # type: ignore[union-attr]
    assert found.total == 90
    write_report(texts.run, tmp_path / "report.html", thumbnails=True)
    page = (tmp_path / "report.html").read_text()
    assert "Confused texts" in page


@pytest.mark.parametrize(
    "precision",
    ["fp16", *(pytest.param(p, marks=pytest.mark.long) for p in ("int8", "int8-dynamic"))],
)
def test_other_precisions_stay_within_their_bounds(
    texts: Fleet, precision: str, tmp_path: Path
) -> None:
    from sdlora_edge.export.requests import ExportOptions

    public = [str(texts.key.with_suffix(".pub"))]
    options = ExportOptions(precision=precision)
    export_bundle(Run.open(texts.run), tmp_path / "bundle", 1, public, options)
    device = Device.init(tmp_path / "bundle", tmp_path / "store")
    assert device.apply(texts.packets[0]).task == 2


@pytest.mark.long
def test_executorch_takes_texts_of_any_length(texts: Fleet, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install executorch")
    from sdlora_edge.export.requests import ExportOptions

    run, public = Run.open(texts.run), [str(texts.key.with_suffix(".pub"))]
    export_bundle(run, tmp_path / "bundle", 1, public, ExportOptions(target="executorch"))
    device = Device.init(tmp_path / "bundle", tmp_path / "store")
    device.apply(texts.packets[0])
    inputs = run.preprocessing.arrays(np.stack([run.preprocessing.item(t) for t in SAMPLES]))
    np.testing.assert_allclose(device.logits(inputs), host_logits(run, 2, inputs), atol=1e-4)


def test_device_predict_takes_texts_a_file_and_standard_input(
    shelf: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [one.label for one in Device.open(shelf).predict(SAMPLES)]
    result = cli("device", "predict", *SAMPLES, "--store", shelf, "--json")
    found = json.loads(result.out)["predictions"]
    assert [one["top"][0]["class"] for one in found] == right
    assert [one["text"] for one in found] == SAMPLES
    (tmp_path / "lines.txt").write_text("\n\n".join(SAMPLES))
    again = cli("device", "predict", "--file", tmp_path / "lines.txt", "--store", shelf, "--json")
    assert json.loads(again.out) == json.loads(result.out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(SAMPLES).encode())))
    piped = cli("device", "predict", "--file", "-", "--store", shelf, "--json")
    assert json.loads(piped.out) == json.loads(result.out)
    shown = cli("device", "predict", SAMPLES[0], " ", "--store", shelf)
    assert (shown.code, shown.out.startswith(f"{SAMPLES[0]}: {right[0]}")) == (3, True)
    assert "is empty" in shown.err
    assert cli("device", "predict", "--store", shelf).code == 2


def test_bundle_show_says_what_it_reads(texts: Fleet, cli: Cli) -> None:
    assert (
        "texts of up to 64 tokens, of a vocabulary of 259"
        in cli("bundle", "inspect", "--bundle", texts.bundle).out
    )


def test_a_service_takes_texts_by_both_protocols(shelf: Path) -> None:
    right = [one.label for one in Device.open(shelf).predict(SAMPLES)]
    with agent(shelf) as running:
        one = running.ask("/v1/predict", SAMPLES[0].encode(), {"Content-Type": "text/plain"})
        assert one.json["predictions"][0]["top"][0]["class"] == right[0]
        body, headers = multipart(*((f"{i}", text.encode()) for i, text in enumerate(SAMPLES)))
        found = running.ask("/v1/predict", body, headers).json["predictions"]
        assert [p["top"][0]["class"] for p in found] == right
        assert [p["text"] for p in found] == [*"012345"]
        assert running.ask("/v1/predict", b"\xff").status == 400
        client = triton.InferenceServerClient(running.host)
        (described,) = client.get_model_metadata("sdlora-edge")["inputs"]
        assert described == {"name": "texts", "datatype": "BYTES", "shape": [-1]}
        for binary in (True, False):
            tensor = triton.InferInput("texts", [len(SAMPLES)], "BYTES")
            tensor.set_data_from_numpy(np.array(SAMPLES, object), binary_data=binary)
            answer = client.infer("sdlora-edge", [tensor])
            assert [name.decode() for name in answer.as_numpy("class")[:, 0]] == right
        client.close()
        wrong = {"inputs": [{"name": "texts", "datatype": "BYTES", "shape": [3], "data": ["a"]}]}
        answered = running.ask("/v2/models/sdlora-edge/infer", json.dumps(wrong).encode())
        assert (answered.status, answered.json["code"]) == (400, "malformed")
        for tail in (b"", b"\0", b"\2\0\0\0a", b"\1\0\0\0ab"):
            size = {"parameters": {"binary_data_size": len(tail)}}
            head = json.dumps(
                {"inputs": [{"name": "texts", "datatype": "BYTES", "shape": [1], **size}]}
            ).encode()
            length = {"Inference-Header-Content-Length": str(len(head))}
            cut = running.ask("/v2/models/sdlora-edge/infer", head + tail, length)
            assert (cut.status, cut.json["code"]) == (400, "malformed")


def test_unknown_texts_are_kept_and_labelled(texts: Fleet, tmp_path: Path) -> None:
    device = Device.init(texts.bundle, tmp_path / "other")
    keep = Unknowns(
        tmp_path / "kept",
        blur=lambda text: text.replace("goal", "***"),
        kind=lambda: type(device.preparation),
    )
    for answered, text in zip(device.answer_each(SAMPLES, Asked(threshold=1e6)), SAMPLES):
        keep(text, answered)  # type: ignore[arg-type]
    kept = sorted((tmp_path / "kept").glob("*.txt"))
    assert keep.kept == len(kept) >= 1
    assert not any("goal" in path.read_text() for path in kept)
    assert all(path.with_suffix(".json").is_file() for path in kept)
    again = Unknowns(tmp_path / "kept", kind=lambda: type(device.preparation))
    again._look()
    assert again._files.keys() == keep._files.keys()
    write_folders(tmp_path / "more", ["food"], 6)
    export_bundle(Run.open(texts.run), tmp_path / "later", 2, [str(texts.key.with_suffix(".pub"))])
    paths = images_in(tmp_path / "more", "text")
    seen = by_bundle(tmp_path / "later", paths)
    assert seen.texts == tuple(path.read_text() for path in seen.paths)
    assert seen.features.shape[0] == 6
    with pytest.raises(InputError, match="has no text"):
        images_in(texts.bundle, "text")


def test_a_week_from_files_of_ones_own_leaves_no_path_on_devices(tmp_path: Path, cli: Cli) -> None:
    """The encoder is a folder, each task a table; the table names the task."""
    folder = save_encoder(tmp_path / "my-encoder", 64)
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    data = write_table(tmp_path / "tickets.csv", LABELS[:3], 30)
    train(Settings.of(data=str(data), **SETTINGS | {"backbone": str(folder), "tasks": 1}), run)
    key, public = signing.new_key("factory", tmp_path / "keys")
    export_bundle(Run.open(run), bundle, 1, [str(public)])
    assert open_bundle(bundle).manifest.model == "my-encoder"
    new = write_table(tmp_path / "new_tickets.csv", LABELS[3:5], 20)
    assert cli("train", "--run", run, "--data", new).code == 0
    built = build_packets(Run.open(run), bundle, key, out=tmp_path / "packets")
    device = Device.init(bundle, tmp_path / "store")
    device.apply(built[0].file)
    assert device.status().task_name == "new_tickets"
    store = (tmp_path / "store").rglob("*")
    assert not [p for p in store if p.is_file() and str(folder).encode() in p.read_bytes()]


def test_selftest_runs_on_texts(texts: Fleet, tmp_path: Path, cli: Cli) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for i, text in enumerate(SAMPLES):
        (samples / f"{i}.txt").write_text(text)
    assert cli("expect", samples, "--run", texts.run, "--out", tmp_path / "expected").code == 0
    kit = Kit(texts.bundle, tuple(texts.packets), tmp_path, tmp_path / "expected")
    assert checks.parity(kit).images == len(SAMPLES)
    assert checks.unknown(kit).states == 3


def test_what_texts_cannot_do_is_refused(texts: Fleet, cli: Cli, tmp_path: Path) -> None:
    web = cli("export", "--run", texts.run, "--for", "web", "--out", tmp_path / "web")
    assert (web.code, "models that read images" in web.err) == (2, True)


def test_a_bundle_whose_tokenizer_was_changed_is_refused(texts: Fleet, tmp_path: Path) -> None:
    shutil.copytree(texts.bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / TOKENIZER
    path.write_bytes(path.read_bytes().replace(b"[CLS]", b"[XXX]"))
    with pytest.raises(InputError, match="is not the file the manifest names"):
        open_bundle(tmp_path / "bundle")


def test_the_canary_finds_a_model_that_ignores_the_mask(texts: Fleet) -> None:
    bundle = open_bundle(texts.bundle)
    run = Run.open(texts.run)
    inputs = canary.inputs(bundle.manifest.canary.seed, run.preprocessing)
    blind = {**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])}
    seen = [host_logits(run, 2, one) for one in (inputs, blind)]
    assert canary.largest_difference(*seen) > bundle.manifest.canary.tolerance


def test_a_class_that_comes_alone_gets_a_row(texts: Fleet, tmp_path: Path) -> None:
    shutil.copytree(texts.run, tmp_path / "run")
    run = add_task(tmp_path / "run", write_folders(tmp_path / "food", ["food"], 20), "food")
    assert run.states[-1].names[-1] == "food"
    found = evaluate(run, write_table(tmp_path / "test.csv", ["food"], 10, seed=5))
    assert found.recall["food"] >= 0.5


def test_settings_of_images_do_not_go_with_texts(tmp_path: Path) -> None:
    table = write_table(tmp_path / "all.csv", LABELS, 6)
    wrong = Settings.of(data=str(table), **{**SETTINGS, "mean": (0.5, 0.5, 0.5)})
    with pytest.raises(UsageError, match="mean and std are for images"):
        train(wrong, tmp_path / "run")
