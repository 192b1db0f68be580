"""Requests to a real agent: each gets the answer of the device, or an honest refusal."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from agents import Running, UnixConnection, agent, encoded, multipart, request
from conftest import Fleet
from PIL import Image

from sdlora_edge.agent import open_inference, room
from sdlora_edge.agent.room import Room
from sdlora_edge.device import Device
from sdlora_edge.errors import LimitError, UsageError
from sdlora_edge.inputs.image import Preprocessing

MODEL = "/v2/models/sdlora-edge"
LIMITS = ("--max-body", 1, "--max-megapixels", 1, "--queue", 6)


@pytest.fixture(scope="module")
def store(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent") / "store"
    Device.init(fleet.bundle, folder)
    return folder


@pytest.fixture(scope="module")
def device(store: Path) -> Device:
    return Device.open(store)


@pytest.fixture(scope="module")
def running(store: Path) -> Iterator[Running]:
    socket = store.with_name("agent.sock")
    with contextlib.closing(__import__("socket").socket(1, 1)) as left_over:
        left_over.bind(str(socket))  # as a killed agent leaves it
    with agent(store, "--socket", socket, *LIMITS) as running:
        running.wait("serving", address=f"unix:{socket}")
        yield running
    assert not socket.exists()


def close(ours: Any, theirs: Any) -> None:
    """The same answer, but for the last bits of floating-point numbers."""
    assert [top["class"] for top in ours["top"]] == [top["class"] for top in theirs["top"]]
    assert [top["probability"] for top in ours["top"]] == pytest.approx(
        [top["probability"] for top in theirs["top"]], abs=1e-5
    )
    for name in ("known", "threshold", "generation"):
        assert ours[name] == theirs[name]
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_gets_the_answer_of_the_device(
    running: Running, device: Device, kind: str
) -> None:
    data = encoded(3, kind)
    found = running.ask("/v1/predict?top=3&threshold=0.5", data)
    assert (found.status, len(found.json["predictions"])) == (200, 1)
    close(found.json["predictions"][0], device.predict(data, top=3, threshold=0.5).to_dict())
    one = running.ask("/v1/predict", data).json["predictions"][0]
    close(one, device.predict(data).to_dict())


def test_several_images_are_answered_in_order_and_each_for_itself(
    running: Running, device: Device
) -> None:
    images = [encoded(seed) for seed in range(4)]
    body, headers = multipart(
        *((f"{i}.png", data) for i, data in enumerate(images)), ("x.png", b"no image")
    )
    found = running.ask("/v1/predict?top=2", body, headers)
    assert found.status == 200
    *good, bad = found.json["predictions"]
    for i, data in enumerate(images):
        assert good[i].pop("image") == f"{i}.png"
        close(good[i], device.predict(data, top=2).to_dict())
    assert (bad["image"], bad["code"]) == ("x.png", "unreadable")


def refusal(running: Running, path: str, body: bytes | None, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    found = running.ask(path, body, named)
    assert found.json.keys() == {"error", "code"}
    assert found.json["error"]
    return found.status, found.json["code"]


def test_what_cannot_be_answered_is_refused_as_json(running: Running) -> None:
    image, predict = encoded(), "/v1/predict"
    assert refusal(running, predict, b"") == (400, "malformed")
    assert refusal(running, predict, b"no image") == (400, "unreadable")
    assert refusal(running, predict, image[:-40]) == (400, "unreadable")
    assert refusal(running, predict, encoded(size=(1001, 1000))) == (413, "too_large")
    flat = io.BytesIO()
    Image.new("L", (1001, 1000)).save(flat, "PNG")
    assert refusal(running, predict, flat.getvalue()) == (400, "unreadable"), "too many pixels"
    for query in ("top=0", "top=x", "threshold=x", "threshold=nan", "tops=1"):
        assert refusal(running, f"{predict}?{query}", image) == (400, "malformed"), query
    many, kind = multipart(*[("x.png", image)] * 7)
    assert refusal(running, predict, many, **{"Content_Type": kind["Content-Type"]})[0] == 400
    for body in (b"", b"--edge\r\n\r\n", many[:-20], many.replace(b"filename", b"fullname")):
        assert refusal(running, predict, body, **{"Content_Type": kind["Content-Type"]}) == (
            400,
            "malformed",
        )
    assert refusal(running, "/nothing", None) == (404, "not_found")
    assert refusal(running, f"{predict}/", image) == (404, "not_found")
    assert refusal(running, predict, None) == (405, "method_not_allowed")
    packed = {"Content_Encoding": "gzip"}
    assert refusal(running, f"{MODEL}/infer", image, **packed) == (415, "compressed")
    assert running.ask(predict, image).status == 200
    assert "--max" not in "".join(str(event) for event in running.events())


def test_a_body_without_a_length_is_bounded_too(running: Running) -> None:
    image = encoded()
    with contextlib.closing(running.connection()) as connection:
        connection.request("POST", "/v1/predict", iter([image[:100], image[100:]]))
        assert connection.getresponse().status == 200
    with contextlib.closing(running.connection()) as connection:
        connection.request("POST", "/v1/predict", iter([bytes(400_000)] * 3))
        assert connection.getresponse().status == 413


def test_a_client_that_goes_away_harms_nobody(running: Running) -> None:
    host, port = running.host.split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx")
    assert running.ask("/v1/predict", encoded()).status == 200
    assert not [e for e in running.events() if "failed" in str(e.get("message"))]


def test_an_answer_on_a_kept_connection_is_not_delayed(running: Running) -> None:
    """TCP would keep the end of an answer back for 40 ms, if it were not told to send it."""
    spent = []
    with contextlib.closing(running.connection()) as connection:
        for _ in range(20):
            begin = time.perf_counter()
            assert request(connection, "/healthz").status == 200
            spent.append(time.perf_counter() - begin)
    assert min(spent) < 0.03


def test_the_unix_socket_serves_the_same(running: Running, store: Path, device: Device) -> None:
    path = store.with_name("agent.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with contextlib.closing(UnixConnection(path)) as connection:
        found = request(connection, "/v1/predict", encoded())
    close(found.json["predictions"][0], device.predict(encoded()).to_dict())


def test_a_web_page_of_another_site_gets_nothing(running: Running) -> None:
    image = encoded()
    for name in ("evil.example", "127.0.0.1.evil.example", "128.0.0.1", ""):
        assert refusal(running, "/v1/predict", image, Host=name) == (403, "forbidden"), name
    for name in ("127.0.0.2:8080", "[::1]:8080", "localhost"):  # --listen takes these too
        assert running.ask("/v1/predict", image, {"Host": name}).status == 200, name
    assert refusal(running, "/v1/predict", image, Origin="http://evil.example") == (
        403,
        "forbidden",
    )
    for odd in ("null", "http://[", "http://" + running.host + ".evil.example"):
        assert refusal(running, "/v1/predict", image, Origin=odd) == (403, "forbidden"), odd
    assert running.ask("/v1/predict", image, {"Origin": running.url}).status == 200


def test_triton_clients_work_as_they_are(running: Running, device: Device) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.uint8)
    expected = [one.to_dict() for one in device.predict(pixels, top=2)]
    with contextlib.closing(triton.InferenceServerClient(running.host)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("sdlora-edge")
        assert client.is_model_ready("sdlora-edge", "1")
        assert not client.is_model_ready("another")
        assert client.get_server_metadata()["name"] == "sdlora-edge"
        metadata = client.get_model_metadata("sdlora-edge")
        (image,) = metadata["inputs"]
        assert metadata["versions"] == ["1"]
        for binary in (True, False):
            tensor = triton.InferInput(image["name"], list(pixels.shape), image["datatype"])
            tensor.set_data_from_numpy(pixels, binary_data=binary)
            outputs = [
                triton.InferRequestedOutput(output["name"], binary_data=binary)
                for output in metadata["outputs"]
            ]
            found = client.infer(
                "sdlora-edge", [tensor], outputs=outputs, parameters={"top": 2}, request_id="7"
            )
            assert found.get_response()["id"] == "7"
            assert found.get_response()["model_version"] == "1"
            classes = found.as_numpy("class")
            names = [[c.decode() if isinstance(c, bytes) else c for c in row] for row in classes]
            assert names == [[t["class"] for t in one["top"]] for one in expected]
            assert found.as_numpy("probability")[:, 0] == pytest.approx(
                [one["top"][0]["probability"] for one in expected], abs=1e-5
            )
            assert found.as_numpy("known").tolist() == [one["known"] for one in expected]
            assert found.as_numpy("score") == pytest.approx(
                [one["score"] for one in expected], abs=1e-4
            )
        plain = client.infer("sdlora-edge", [tensor], parameters={"threshold": 1e9})
        assert not plain.as_numpy("known").any()
        with pytest.raises(triton.InferenceServerException, match="only version 1"):
            client.infer("sdlora-edge", [tensor], model_version="2")


TENSOR: dict[str, Any] = {
    "name": "images",
    "shape": [1, 2, 2, 3],
    "datatype": "UINT8",
    "data": [7] * 12,
}


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        {},
        {"inputs": []},
        {"inputs": [TENSOR, TENSOR]},
        {"inputs": [{**TENSOR, "name": "x"}]},
        {"inputs": [{**TENSOR, "datatype": "FP32"}]},
        {"inputs": [{**TENSOR, "shape": [1, 2, 2]}]},
        {"inputs": [{**TENSOR, "shape": [1, 2, 2, -3]}]},
        {"inputs": [{**TENSOR, "shape": [0, 2, 2, 3]}]},
        {"inputs": [{**TENSOR, "shape": [2, 2, 2, 3]}]},
        {"inputs": [{**TENSOR, "shape": [10**30, 2, 2, 3]}]},
        {"inputs": [{**TENSOR, "data": [256] * 12}]},
        {"inputs": [{**TENSOR, "data": [0.5] * 12}]},
        {"inputs": [{**TENSOR, "data": "x"}]},
        {"inputs": [{**TENSOR, "data": [[1, 2], [3]]}]},
        {"inputs": [{**TENSOR, "parameters": {"binary_data_size": 12}}]},
        {"inputs": [TENSOR], "outputs": [{"name": "x"}]},
        {"inputs": [TENSOR], "outputs": [7]},
        {"inputs": [TENSOR], "parameters": {"top": 0}},
        {"inputs": [TENSOR], "parameters": {"top": "all"}},
        {"inputs": [TENSOR], "parameters": {"threshold": "x"}},
        {"inputs": [{**TENSOR, "shape": [7, 1, 1, 3], "data": [7] * 21}]},
        {"inputs": [TENSOR], "id": float("nan")},
        {"inputs": [TENSOR], "id": [[]]},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_a_malformed_tensor_is_refused(running: Running, wrong: Any) -> None:
    body = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    assert refusal(running, f"{MODEL}/infer", body) == (400, "malformed")


def test_a_wrong_length_of_the_header_is_refused(running: Running) -> None:
    described = {**TENSOR, "parameters": {"binary_data_size": 12}}
    del described["data"]
    head = json.dumps({"inputs": [described]}).encode()
    body, name = head + bytes(12), "Inference_Header_Content_Length"
    good = running.ask(f"{MODEL}/infer", body, {name.replace("_", "-"): str(len(head))})
    assert good.status == 200
    for length in ("x", "-1", str(len(head) - 1), str(len(head) + 1), str(len(body) + 9)):
        assert refusal(running, f"{MODEL}/infer", body, **{name: length}) == (400, "malformed")


def test_long_json_and_a_tensor_of_many_images_cost_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parsed, 16 MB of `[]` are 500 MB, and as many bytes of 1 x 1 images were 900 MB."""
    body = json.dumps({"inputs": [TENSOR]}).encode()
    most = open_inference.Most(1, len(body), Preprocessing.tensor)
    assert len(open_inference.read(body, None, most).images) == 1
    with pytest.raises(LimitError, match="send the tensor as binary"):
        open_inference.read(body + b" ", None, most)
    described = {**TENSOR, "shape": [2, 1, 1, 3], "parameters": {"binary_data_size": 6}}
    head = json.dumps({"inputs": [described]}).encode()
    with pytest.raises(UsageError, match="2 images at once: send at most 1"):
        open_inference.read(
            head + bytes(6), str(len(head)), open_inference.Most(1, 999, Preprocessing.tensor)
        )
    monkeypatch.setattr(room, "MALLOPT", {})
    monkeypatch.setenv(room.ARENA, "0")
    little = Room(1, 1, 1)
    assert little.text == room.MB, "a small device parses no more"


def test_strings_are_packed_as_triton_packs_them(running: Running, device: Device) -> None:
    body = {"inputs": [TENSOR], "outputs": [{"name": "class", "parameters": {"binary_data": True}}]}
    found = running.ask(f"{MODEL}/infer", json.dumps(body).encode())
    length = int(found.headers["inference-header-content-length"])
    (size,) = struct.unpack("<I", found.data[length : length + 4])
    best = device.predict(np.full((2, 2, 3), 7, np.uint8)).label
    assert found.data[length + 4 :].decode() == best
    assert size == len(best)


def test_the_health_check_of_the_container_passes_and_fails(running: Running) -> None:
    file = Path(__file__).resolve().parents[2] / "examples" / "device.Dockerfile"
    (line,) = [x for x in file.read_text().splitlines() if x.strip().startswith('CMD ["python')]
    _, *rest = json.loads(line.strip().removeprefix("CMD "))

    def check(host: str) -> int:
        words = [word.replace("127.0.0.1:8080", host) for word in rest]
        return subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode

    assert check(running.host) == 0
    assert check("127.0.0.1:9") != 0


def test_prometheus_sees_what_was_answered(running: Running) -> None:
    before, image = running.metrics(), encoded(9)
    label = running.ask("/v1/predict", image).json["predictions"][0]["top"][0]["class"]
    running.ask("/v1/predict?threshold=1e9", image)
    after = running.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more(f'sdlora_edge_predictions_total{{class="{label}"}}') == 1
    assert more("sdlora_edge_unknown_total") == 1
    assert more('sdlora_edge_requests_total{endpoint="predict",status="200"}') == 2
    assert more('sdlora_edge_request_seconds_count{endpoint="predict"}') == 2
    assert (after["sdlora_edge_serving"], after["sdlora_edge_generation"]) == (1, 1)
    assert after["sdlora_edge_queue_images"] == 0
    assert after["process_resident_memory_bytes"] > 0


def test_the_page_is_served_to_those_who_may_ask(store: Path, tmp_path: Path) -> None:
    """With the types without which a browser runs nothing, and nothing from outside the folder."""
    page = tmp_path / "page"
    page.mkdir()
    types = {
        "index.html": "text/html",
        "page.js": "javascript",
        "ort.mjs": "javascript",
        "ort.wasm": "application/wasm",
    }
    for name in types:
        (page / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (page / "link").symlink_to(tmp_path / "secret")
    with agent(store, "--page", page) as running:
        for name, kind in types.items():
            answer = running.ask(f"/{name}")
            assert (answer.status, answer.data.decode()) == (200, name)
            assert kind in answer.headers["content-type"]
        assert running.ask("/").data == b"index.html"
        assert running.ask("/healthz").json["status"] == "ok"
        assert [running.ask(path).status for path in ("/x", "/../secret", "/link")] == [404] * 3
        assert refusal(running, "/", None, Host="elsewhere.example") == (403, "forbidden")
