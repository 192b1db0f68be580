"""Every precision, and weights as constants: smaller, the same classes, and the same packets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.numpy
from conftest import Fleet, with_file
from sdlora_edge.export import onnx as exporting
from sdlora_edge.export import precision as precisions
from sdlora_edge.export.bundles import check_bundle, engine_logits, export_bundle
from sdlora_edge.export.parity import compare, host_logits
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, NotForThisDevice, UsageError
from sdlora_edge.formats.bundle import (
    CANARY_LOGITS,
    CLASSES,
    FACTORS,
    classes_json,
    load_tensors,
    open_bundle,
    read_classes,
)
from sdlora_edge.formats.canonical import dump_json, parse_json
from sdlora_edge.inputs import canary
from sdlora_edge.train.run import Run


def exported(fleet: Fleet, out: Path, task: int = 0, **options: object) -> Path:
    trust = [str(fleet.key.with_suffix(".pub"))]
    export_bundle(
        Run.open(fleet.run), out, task, trust, ExportOptions(min_agreement=0.9, **options)
    )  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("weights_as", ["inputs", "constants"])
@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_the_same_packets_reach_every_kind_of_bundle(
    fleet: Fleet, tmp_path: Path, precision: str, weights_as: str
) -> None:
    run = Run.open(fleet.run)
    bundle = exported(fleet, tmp_path / "bundle", precision=precision, weights_as=weights_as)
    device = Device.init(bundle, tmp_path / "store")
    inputs = canary.inputs(7, run.preprocessing, 8)
    bounds = precisions.named(precision)
    for task, packet in enumerate(fleet.packets, 1):
        device.apply(packet)
        found = compare(device.logits(inputs), host_logits(run, task, inputs)).require(
            bounds.tolerance, 0.5, bounds.unit, "device"
        )
        assert found.images == 8
    again = Device.open(tmp_path / "store")
    np.testing.assert_array_equal(again.logits(inputs), device.logits(inputs))
    manifest = device.bundle.manifest
    assert (manifest.precision, manifest.weights_as) == (precision, weights_as)
    assert manifest.tolerance == pytest.approx(bounds.tolerance, abs=2**-25)
    assert {entry["dtype"] for name, entry in manifest.weights.items() if name != "head.bias"} == {
        bounds.stored
    }
    device.rollback()
    np.testing.assert_allclose(
        device.logits(inputs), host_logits(run, 2, inputs), atol=10 * bounds.tolerance
    )


def test_what_is_lost_is_there_to_be_seen(fleet: Fleet, tmp_path: Path) -> None:
    """Lower precisions are not the fp32 model under another name."""
    run = Run.open(fleet.run)
    inputs = canary.inputs(7, run.preprocessing, 8)
    sizes, differences = [], []
    for precision in precisions.PRECISIONS:
        opened = open_bundle(exported(fleet, tmp_path / precision, precision=precision))
        sizes.append(opened.model_bytes)
        differences.append(
            compare(engine_logits(opened, inputs), host_logits(run, 0, inputs)).difference
        )
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]
    assert differences == sorted(differences)
    assert differences[0] < 1e-5 < differences[1] < differences[2]


def test_constants_are_constants_and_have_a_capacity(fleet: Fleet, tmp_path: Path) -> None:
    bundle = exported(fleet, tmp_path / "bundle", weights_as="constants", max_classes=7)
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    assert [i.name for i in model.graph.input] == ["pictures"]
    run = Run.open(fleet.run)
    device = Device.init(bundle, tmp_path / "store")
    counts = [len(run.states[t].classes) for t in range(4)]
    assert counts == [4, 6, 8, 10]
    device.apply(fleet.packets[0])
    assert device.logits(canary.inputs(1, run.preprocessing)).shape == (2, 6)
    before = sorted(p.name for p in (tmp_path / "store").rglob("*"))
    with pytest.raises(NotForThisDevice, match="capacity of 7"):
        device.apply(fleet.packets[1])
    assert sorted(p.name for p in (tmp_path / "store").rglob("*")) == before
    assert device.status().task == 1
    with pytest.raises(UsageError, match="--max-classes 3"):
        exported(fleet, tmp_path / "small", max_classes=3)


def test_unused_rows_never_win_even_in_another_program(fleet: Fleet, tmp_path: Path) -> None:

    bundle = exported(
        fleet, tmp_path / "bundle", weights_as="constants", max_classes=64, precision="fp16"
    )
    session = ort.InferenceSession(str(bundle / "model.onnx"))
    (logits,) = session.run(
        ["logits"],
        {"pictures": np.random.default_rng(0).normal(0, 50, (32, 3, 16, 16)).astype(np.float32)},
    )
    assert logits.shape == (32, 64)
    assert logits.argmax(axis=1).max() < 4
    assert np.isfinite(logits).all()


def test_a_large_model_keeps_its_constants_outside(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LIMIT", 1000)
    bundle = exported(fleet, tmp_path / "bundle")
    assert (
        (bundle / "model.onnx").stat().st_size < 60_000 < (bundle / exporting.REST).stat().st_size
    )
    assert exporting.REST in open_bundle(bundle).manifest.files
    device = Device.init(bundle, tmp_path / "store")
    device.apply(fleet.packets[0])
    data = bytearray((tmp_path / "store" / "bundle" / exporting.REST).read_bytes())
    data[1000] ^= 1
    (tmp_path / "store" / "bundle" / exporting.REST).write_bytes(data)
    with pytest.raises(InputError, match=exporting.REST):
        Device.open(tmp_path / "store")


def test_constants_bear_the_backbones_names(fleet: Fleet) -> None:
    model = onnx.load(str(fleet.bundle / "model.onnx"), load_external_data=False)
    names = {t.name for t in model.graph.initializer if np.prod(t.dims) >= 1000}
    assert {
        "blocks.0.attn.proj.weight.T",
        "blocks.3.mlp.fc2.weight.T",
        "blocks.1.attn.qkv.weight",
    } <= names
    assert not [n for n in names if n.startswith(("val_", "backbone."))]


def test_an_export_below_the_agreement_is_refused_and_can_be_checked_again(
    fleet: Fleet, tmp_path: Path, cli
) -> None:  # type: ignore[no-untyped-def]
    run = ("--run", fleet.run, "--trust", fleet.key.with_suffix(".pub"))
    result = cli(
        "export",
        *run,
        "--precision",
        "int8-dynamic",
        "--tolerance",
        "1e-6",
        "--out",
        tmp_path / "b",
    )
    assert result.code == 6
    assert "agreement" in result.err
    assert not (tmp_path / "b").exists()
    result = cli(
        "export",
        *run,
        "--precision",
        "int8",
        "--min-agreement",
        "0.9",
        "--out",
        tmp_path / "b",
        "--json",
    )
    assert result.code == 0
    value = parse_json(result.out.encode(), "x")
    assert value["precision"] == "int8"
    assert value["agreement"] >= 0.9
    assert value["images"] > 2
    checked = cli(
        "bundle", "check", *run[:2], "--bundle", tmp_path / "b", "--min-agreement", "0.9", "--json"
    )
    assert (
        parse_json(checked.out.encode(), "x")["largest_difference"] == value["largest_difference"]
    )
    assert cli(
        "bundle", "check", *run[:2], "--bundle", tmp_path / "b", "--min-agreement", "1"
    ).code in (0, 6)
    manifest = parse_json((tmp_path / "b" / "manifest.json").read_bytes(), "x")
    manifest["tolerance"] = 1
    (tmp_path / "b" / "manifest.json").write_bytes(dump_json(manifest))
    assert cli("bundle", "check", *run[:2], "--bundle", tmp_path / "b").code == 6


def test_a_manifest_that_says_something_else_than_the_run_is_found(
    fleet: Fleet, tmp_path: Path
) -> None:
    import shutil

    manifest = parse_json((fleet.bundle / "manifest.json").read_bytes(), "x")
    other = {
        "preprocessing": {**manifest["preprocessing"], "mean": [1 << 22, 1 << 23, 1 << 23]},
        "task_name": "other",
        "model": "other",
    }
    for field, value in other.items():
        shutil.copytree(fleet.bundle, tmp_path / field)
        (tmp_path / field / "manifest.json").write_bytes(dump_json({**manifest, field: value}))
        with pytest.raises(InputError, match=f"its {field} is not"):
            check_bundle(Run.open(fleet.run), tmp_path / field)


def test_files_that_say_something_else_than_the_run_are_found(fleet: Fleet, tmp_path: Path) -> None:
    classes = read_classes((fleet.bundle / CLASSES).read_bytes())
    tensors = load_tensors(fleet.bundle / FACTORS)
    logits = tensors[CANARY_LOGITS]
    strange = tensors | {"1.blocks.0.A": np.zeros((1, 1), np.float32)}
    other = {
        "classes": (CLASSES, classes_json([*classes[:2], *reversed(classes[2:])])),
        "canary": (FACTORS, safetensors.numpy.save(tensors | {CANARY_LOGITS: logits + 0.01})),
        "factors": (FACTORS, safetensors.numpy.save(strange)),
    }
    for what, (name, data) in other.items():
        wrong = with_file(fleet.bundle, tmp_path / what, name, data)
        with pytest.raises(InputError, match=f"was changed: .*{what}"):
            check_bundle(Run.open(fleet.run), wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 2.0}, "--tolerance 2"),
        ({"max_classes": 10**12}, "--max-classes 1000000000000"),
        ({"precision": "int3"}, "no precision 'int3': choose fp32"),
        ({"target": "tpu"}, "target 'tpu' is unknown"),
        ({"weights_as": "files"}, "choose inputs or constants"),
    ],
)
def test_options_that_make_no_sense(
    fleet: Fleet, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        exported(fleet, tmp_path / "b", **options)


def test_another_runs_bundle_is_not_checked(fleet: Fleet, run_copy: Path, tmp_path: Path) -> None:
    bundle = exported(fleet, tmp_path / "b", 1)
    import shutil

    shutil.rmtree(run_copy / "tasks" / "001")
    shutil.rmtree(run_copy / "tasks" / "002")
    shutil.rmtree(run_copy / "tasks" / "003")
    with pytest.raises((NotForThisDevice, UsageError)):
        check_bundle(Run.open(run_copy), bundle)


def test_weights_too_large_for_half_are_refused() -> None:
    with pytest.raises(UsageError, match="too large for float16"):
        precisions.to_half(np.array([7e4], np.float32), "w")


def test_a_blockwise_weight_is_as_near_as_eight_bits_allow() -> None:
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    random = np.random.default_rng(0)
    for columns in (64, 40):  # whole blocks, and none: one scale per channel
        matrix = random.standard_normal((columns, 32)).astype(np.float32)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])] , "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
            [numpy_helper.from_array(matrix, "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", exporting.OPSET)])
        precisions._weight_only(model, {"w"})
        (found,) = ReferenceEvaluator(model).run(None, {"x": np.eye(1, columns, dtype=np.float32)})
        assert 0 < np.abs(found[0] - matrix[0]).max() <= np.abs(matrix).max() / 127 / 2 * 1.01


def test_a_kernel_has_a_scale_for_each_output_and_zeros_stay_zeros() -> None:
    kernel = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    kernel[3] = 0
    packed, scale, how = precisions._pack(kernel)
    assert (scale.shape, how) == ((8,), {"axis": 0})
    np.testing.assert_allclose(
        packed * scale[:, None, None, None], kernel, atol=np.abs(kernel).max() / 127 / 2 * 1.01
    )
    assert not packed[3].any()


def test_the_model_says_what_it_is_and_an_adapter_comes_along(fleet: Fleet, tmp_path: Path) -> None:
    exported(fleet, tmp_path / "b", also="onnx-adapter")
    props = {
        p.key: p.value
        for p in onnx.load(
            str(tmp_path / "b" / "model.onnx"), load_external_data=False
        ).metadata_props
    }
    manifest = open_bundle(tmp_path / "b").manifest
    assert props["sdlora_edge.state"] == manifest.state
    assert parse_json(b'{"c":' + props["sdlora_edge.classes"].encode() + b"}", "x")["c"] == list(
        open_bundle(tmp_path / "b").state.classes
    )
    adapter = ort.AdapterFormat.read_adapter(str(tmp_path / "b.onnx_adapter"))
    np.testing.assert_array_equal(
        adapter.get_parameters()["head.bias"].numpy(), open_bundle(tmp_path / "b").state.head_bias
    )
    with pytest.raises(UsageError, match="--also onnx-adapter goes with"):
        exported(fleet, tmp_path / "c", also="onnx-adapter", weights_as="constants")
