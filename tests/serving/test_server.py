"""The service: one answer however it is asked and whatever it is batched with, limits before work, 4xx with words, and an orderly end."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from groundup import modelfolder, pipeline
from groundup.core.errors import GateError, UserError
from groundup.serving import server
from groundup.serving.batcher import Batcher
from groundup.serving.inputs import Asked
from groundup.serving.limits import Limits, Refusal
from groundup.serving.server import create_app, serve

BASE = "http://127.0.0.1:8000"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    options = {"train.steps": 30, "watch.report": False, "watch.tensorboard": False}
    pipeline.train("digits-cnn", options, out=place / "digits")
    pipeline.train("line-regression", options, out=place / "line")
    return place


@pytest.fixture
def client(models):
    with TestClient(create_app(modelfolder.load(models / "digits")), base_url=BASE) as made:
        yield made


def png(seed=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def near(a, b):
    return a["label"] == b["label"] and a["probability"] == pytest.approx(b["probability"], abs=1e-5)


# -- answers ---------------------------------------------------------------------------------------------------------------------
def test_the_same_answer_however_it_is_asked(client, models):
    expected = pipeline.predict(models / "digits", png())[0]
    asked = [
        client.post("/predict", files={"file": ("数字.png", png(), "image/png")}),
        client.post("/predict", json={"image": b64(png())}),
        client.post("/predict", json={"images": ["data:image/png;base64," + b64(png())], "top_k": 3}),
        client.post("/predict", content=png(), headers={"Content-Type": "image/png"}),
    ]
    for reply in asked:
        assert reply.status_code == 200, reply.text
        assert near(reply.json()["predictions"][0], expected) and reply.json()["model"] == "digits-cnn"
    assert len(asked[2].json()["predictions"][0]["top"]) == 3
    for body, top in ((png(), 1), (png(), 10), (png(), 99999)):
        reply = client.post(f"/predict?top_k={top}", content=body, headers={"Content-Type": "image/png"})
        assert len(reply.json()["predictions"][0]["top"]) == min(top, 10)


def test_order_is_kept_and_a_bad_one_is_named(client, models):
    several = [png(i) for i in range(5)]
    expected = pipeline.predict(models / "digits", *several)
    reply = client.post("/predict", files=[("file", (f"{i}.png", p)) for i, p in enumerate(several)])
    assert all(near(a, b) for a, b in zip(reply.json()["predictions"], expected, strict=True))
    bad = client.post("/predict", files=[("file", ("good.png", png())), ("file", ("坏.png", b"not a picture"))])
    assert (
        bad.status_code == 422 and "file 1 (坏.png)" in bad.json()["error"]["message"] and "not a picture" in bad.json()["error"]["message"]
    )
    assert bad.json()["error"]["index"] == 1


def test_errors_in_the_language_of_the_client(client):
    reply = client.post("/predict", files={"file": ("x.png", b"no")}, headers={"Accept-Language": "zh-CN,zh;q=0.9"})
    assert "不是图片" in reply.json()["error"]["message"] and reply.json()["error"]["type"] == "BadInput"


def test_rows_of_numbers(models):
    with TestClient(create_app(modelfolder.load(models / "line")), base_url=BASE) as client:
        expected = pipeline.predict(models / "line", "1.5", "2")
        assert [p["value"] for p in client.post("/predict", json={"inputs": [[1.5], {"x": 2}]}).json()["predictions"]] == pytest.approx(
            [e["value"] for e in expected], abs=1e-5
        )
        for bad in (
            {"input": ["a"]}, {"input": ["1"]}, {"input": [True]}, {"input": [None]}, {"input": [[1]]}, {"input": [1, 2]}, {"input": []}, {"input": 3},
            {"input": [10**400]}, {"inputs": [{"y": 1}]}, {"inputs": [{"x": 1, "y": 1}]}, {"inputs": [[1], [1, [2]]]}, {"inputs": []}, {"image": "x"},
        ):  # fmt: skip
            reply = client.post("/predict", json=bad)
            assert reply.status_code == 422 and reply.json()["error"]["message"], bad
        assert client.post("/predict", content='{"input": [1e999]}', headers={"Content-Type": "application/json"}).status_code == 422
        assert client.post("/predict", json={"inputs": [[i] for i in range(500)]}).status_code == 200
        assert client.post("/predict", json={"inputs": [[i] for i in range(600)]}).status_code == 413
        assert client.post("/predict", content=png(), headers={"Content-Type": "image/png"}).status_code == 415
        nan = client.post("/predict", content='{"input": [NaN]}', headers={"Content-Type": "application/json"})
        assert nan.status_code == 400


@pytest.mark.parametrize(
    "body, content, status, told",
    [
        (b"", "application/json", 400, "empty"),
        (b"{", "application/json", 400, "not JSON"),
        (b"\xff\xfe{", "application/json", 400, "not JSON"),
        (b'{"image": NaN}', "application/json", 400, "not JSON"),
        (b'{"image": ' + b"9" * 5000 + b"}", "application/json", 400, "not JSON"),
        (b'{"\\ud800": 1}', "application/json", 422, "unknown field"),
        (b'{"image": "AAAA", "images": []}', "application/json", 422, "give 'image' or 'images'"),
        (b'{"image": "AAAA", "top_k": 1.5}', "application/json", 422, "top_k"),
        (b'{"image": "AAAA", "top_k": true}', "application/json", 422, "top_k"),
        (b'{"image": "AAAA", "top_k": [1]}', "application/json", 422, "top_k"),
        (b'{"image": ""}', "application/json", 422, "empty"),
        (b'{"images": ["AAAA", null]}', "application/json", 422, "images[1]"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"[1]", "application/json", 422, "object is expected"),
        (b"{}", "application/json", 422, "give 'image' or 'images'"),
        (b'{"image": 3}', "application/json", 422, "base64 text is expected"),
        (b'{"image": "%%%"}', "application/json", 422, "not base64"),
        (b'{"images": "x"}', "application/json", 422, "is a list"),
        (b'{"images": []}', "application/json", 422, "no input"),
        (b'{"picture": "x"}', "application/json", 422, "unknown field 'picture'"),
        (b'{"image": "AAAA", "top_k": 0}', "application/json", 422, "top_k"),
        (b'{"image": "AAAA", "top_k": "many"}', "application/json", 422, "top_k"),
        (b'{"image": "AAAA"}', "application/json", 422, "not a picture"),
        (b"hello", "text/plain", 415, "is not read here"),
        (b"hello", "multipart/form-data", 400, "form cannot be read"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 400, "its end is missing"),
        (b"--x\r\nbroken\r\n--x--", "multipart/form-data; boundary=x", 400, "without a name"),
        (b"--x--", "multipart/form-data; boundary=x", 422, "no input"),
        (b"hello", "multipart/form-data; boundary=" + "x" * 100, 400, "no boundary"),
        (b'--x\r\nContent-Disposition: form-data; name="color"\r\n\r\nred\r\n--x--', "multipart/form-data; boundary=x", 422, "unknown field 'color'"),
        (b'--x\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n\r\n--x--', "multipart/form-data; boundary=x", 422, "file 0 ()"),
        (b"--x\r\n" + b"\r\n--x" * 100_000, "multipart/form-data; boundary=x", 413, "too many inputs"),
    ],
)  # fmt: skip
def test_mistakes_are_4xx_with_words(client, body, content, status, told):
    reply = client.post("/predict", content=body, headers={"Content-Type": content})
    assert reply.status_code == status, reply.text
    assert told in reply.json()["error"]["message"] and set(reply.json()["error"]) <= {"type", "message", "fix", "index"}


def test_a_wrong_parameter_is_told(client):
    reply = client.post("/predict?topk=3", content=png(), headers={"Content-Type": "image/png"})
    assert reply.status_code == 422 and "unknown parameter 'topk'" in reply.json()["error"]["message"]


def test_forms_as_browsers_and_curl_write_them(client, models):
    """A quoted boundary, quotes and paths in names, line ends in the data, text after the end; top_k in the form."""
    expected = pipeline.predict(models / "digits", png())[0]
    head = b'Content-Disposition: form-data; name="file"; filename="a\\"b;c.png"\r\nContent-Type: image/png\r\n\r\n'
    body = (
        b"preamble\r\n--a b\r\n" + head + png() + b"\r\n--a b\r\ncontent-disposition: form-data; name=top_k\r\n\r\n2\r\n--a b--\r\nepilogue"
    )
    reply = client.post("/predict", content=body, headers={"Content-Type": 'multipart/form-data; boundary="a b"'})
    assert reply.status_code == 200 and near(reply.json()["predictions"][0], expected) and len(reply.json()["predictions"][0]["top"]) == 2


def test_an_error_of_the_server_is_told_as_one(models, caplog):
    app = create_app(modelfolder.load(models / "digits"))
    app.state.service.batcher.compute = lambda rows, tops: 1 / 0
    with TestClient(app, base_url=BASE) as client:
        reply = client.post("/predict", content=png(), headers={"Content-Type": "image/png"})
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "InternalError" and "division" not in reply.text
        assert 'path="/predict",status="500"} 1' in client.get("/metrics").text
    assert "ZeroDivisionError" in caplog.text


def test_unknown_paths_and_verbs(client):
    assert client.get("/nowhere").json()["error"]["fix"] and client.get("/nowhere").status_code == 404
    reply = client.get("/predict")
    assert reply.status_code == 405 and reply.headers["allow"] == "POST" and "error" in reply.json()
    assert client.get("/model/", follow_redirects=False).status_code == 404


# -- limits ----------------------------------------------------------------------------------------------------------------------
def test_bodies_and_counts_are_bounded(models):
    limits = Limits(body=20_000, files=3)
    with TestClient(create_app(modelfolder.load(models / "digits"), limits=limits), base_url=BASE) as client:
        large = client.post("/predict", content=bytes(30_000), headers={"Content-Type": "image/png"})
        assert large.status_code == 413 and "20,000 bytes" in large.json()["error"]["message"]

        def pieces():  # no Content-Length
            for _ in range(30):
                yield bytes(1000)

        assert client.post("/predict", content=pieces(), headers={"Content-Type": "image/png"}).status_code == 413
        many = client.post("/predict", json={"images": [b64(png())] * 4})
        assert many.status_code == 413 and "at most 3" in many.json()["error"]["message"]


def claiming(width, height):
    header = bytearray(png())
    header[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    return bytes(header)


@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000), (2**31 - 1, 1), (50_000_001, 1)])
def test_bombs_are_refused_by_their_header(client, size):
    reply = client.post("/predict", files=[("file", ("good.png", png())), ("file", ("bomb.png", claiming(*size)))])
    assert (
        reply.status_code == 413
        and "pixels" in reply.json()["error"]["message"]
        and "file 1 (bomb.png)" in reply.json()["error"]["message"]
    )


def test_pictures_that_hold_up_everybody_may_be_smaller(models):
    pictures = {mode: io.BytesIO() for mode in ("L", "RGBA", "I;16", "WEBP")}
    for mode, buffer in pictures.items():
        Image.new("RGB" if mode == "WEBP" else mode, (20, 20)).save(buffer, "WEBP" if mode == "WEBP" else "PNG")
    with TestClient(create_app(modelfolder.load(models / "digits"), limits=Limits(pixels=400)), base_url=BASE) as client:
        for mode, buffer in pictures.items():
            reply = client.post("/predict", files={"file": ("x", buffer.getvalue())})
            assert reply.status_code == (200 if mode == "L" else 413), mode


def test_only_formats_of_the_web_are_opened(client):
    """Pillow would open EPS, too, by starting Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    reply = client.post("/predict", files={"file": ("x.png", eps)})
    assert reply.status_code == 422 and "EPS pictures are not read here" in reply.json()["error"]["message"]


def test_a_jpeg_of_a_thousand_scans_is_refused(models):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    with TestClient(create_app(modelfolder.load(models / "digits"), limits=Limits(pixels=64 * 64)), base_url=BASE) as client:
        assert client.post("/predict", files={"file": ("good.jpg", data)}).status_code == 200
        reply = client.post("/predict", files={"file": ("evil.jpg", data[:-2] + last * 1000 + data[-2:])})
        assert reply.status_code == 413 and "too many scans" in reply.json()["error"]["message"]


def test_a_slow_picture_harms_nobody_else(models):
    app = create_app(modelfolder.load(models / "digits"), limits=Limits(decode_seconds=0.3))
    service, release = app.state.service, threading.Event()
    check = service._check_picture
    service._check_picture = lambda data: release.wait(10) if data == b"slow" else check(data)
    with TestClient(app, base_url=BASE) as client:
        for _ in range(10):  # more than there are threads
            reply = client.post("/predict", files=[("file", ("good.png", png())), ("file", ("slow.png", b"slow"))])
            assert reply.status_code == 422 and "file 1 (slow.png): decoding took more than" in reply.json()["error"]["message"]
        assert client.post("/predict", content=png(), headers={"Content-Type": "image/png"}).status_code == 200
        release.set()


def test_memory_and_queue_are_bounded(models):
    data = png(size=(100, 100))
    with TestClient(create_app(modelfolder.load(models / "digits"), limits=Limits(memory=5000)), base_url=BASE) as client:
        reply = client.post("/predict", content=data, headers={"Content-Type": "image/png"})
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1" and reply.json()["error"]["type"] == "Busy"
        assert client.post("/predict", content=png(), headers={"Content-Type": "image/png"}).status_code == 200, "and is given back"


# -- who may ask -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["secret", "密 key"])
def test_the_key(models, key):
    with TestClient(create_app(modelfolder.load(models / "digits"), api_key=key), base_url="http://example.org") as client:
        for path in ("/", "/docs", "/health", "/ready"):
            assert client.get(path).status_code == 200
        for path in ("/model", "/metrics", "/openapi.json", "/nowhere"):
            reply = client.get(path)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", path
        assert client.post("/predict", content=png(), headers={"Content-Type": "image/png"}).status_code == 401
        for wrong in (
            {"X-API-Key": key[:-1].encode()},
            {"X-API-Key": "é".encode()},
            {"Authorization": b"Basic " + key.encode()},
            {"X-API-Key": ""},
        ):
            assert client.get("/model", headers=wrong).status_code == 401
        for right in ({"Authorization": b"Bearer " + key.encode()}, {"X-API-Key": key.encode()}):
            assert client.get("/model", headers=right).status_code == 200
        assert client.get("/openapi.json", headers=right).json()["security"] == [{"bearer": []}, {"key": []}]


def test_a_name_that_points_here_is_not_enough(models):
    with TestClient(create_app(modelfolder.load(models / "digits")), base_url="http://evil.example") as client:
        reply = client.get("/model")
        assert reply.status_code == 421 and "evil.example" in reply.json()["error"]["message"]
        for host in ("localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/model", headers={"Host": host}).status_code == 200, host
        for host in (
            "",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "[::1].evil.example",
            "localhost:80@evil.example",
            "192.168.0.1",
        ):
            assert client.get("/model", headers={"Host": host}).status_code == 421, host


def test_a_page_of_another_site_is_refused(client):
    for origin, status in (("http://127.0.0.1:8000", 200), ("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)):
        reply = client.post("/predict", content=png(), headers={"Content-Type": "image/png", "Origin": origin})
        assert reply.status_code == status and "access-control-allow-origin" not in reply.headers, origin


def test_other_addresses_need_a_key_or_a_word(models, monkeypatch):
    monkeypatch.delenv("GROUNDUP_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "myhost"):
        with pytest.raises(UserError, match="can be reached from other machines"):
            serve(models / "digits", host=host, port=0)
    assert all(server._is_loopback(h) for h in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))


# -- what it says of itself ------------------------------------------------------------------------------------------------------
def test_cards_counters_and_description(client, models):
    assert client.get("/health").json() == {"status": "alive"} and client.get("/ready").json() == {"ready": True}
    card = client.get("/model").json()
    assert card["labels"] == [str(i) for i in range(10)] and card["sha256"] == modelfolder.load(models / "digits").sha256
    assert {"task", "labels", "input_shape", "preprocessor", "architecture", "parameters", "sha256", "versions", "metrics"} <= set(card)
    assert str(models) not in json.dumps(card)
    client.post("/predict", content=png(), headers={"Content-Type": "image/png"})
    text = client.get("/metrics").text
    assert 'groundup_requests_total{path="/predict",status="200"} 1' in text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'groundup_batch_rows_bucket{le="1"} 1' in text and "groundup_request_seconds_count 1" in text
    paths = client.get("/openapi.json").json()["paths"]
    assert "multipart/form-data" in paths["/predict"]["post"]["requestBody"]["content"] and {"/model", "/metrics"} < set(paths)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_fetch_nothing_from_elsewhere(client, path):
    reply = client.get(path)
    assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", reply.text), "an address of another host"
    assert not re.search(r"\son\w+=|style=\"", reply.text), "the policy forbids inline handlers and styles"
    policy = reply.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy and reply.text.count(f'nonce="{nonce}"') == 2
    assert client.get(path).headers["content-security-policy"] != policy


# -- batches ---------------------------------------------------------------------------------------------------------------------
def test_requests_that_arrive_together_share_a_pass(models):
    app = create_app(modelfolder.load(models / "digits"))
    service, sizes, gate = app.state.service, [], threading.Event()
    compute = service.batcher.compute
    service.batcher.compute = lambda rows, tops: (sizes.append(len(rows)), gate.wait(5), compute(rows, tops))[2]

    async def all_of_them():
        tasks = [asyncio.create_task(service.predict(Asked([png(i)], ["x"]), 1 + i)) for i in range(9)]
        await asyncio.sleep(0.3)
        tasks[3].cancel()  # a client that goes away does not harm the others
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(all_of_them())
    assert len(sizes) <= 2 and sum(sizes) in (8, 9), "what was being decoded when the first arrived is in its pass"
    expected = pipeline.predict(models / "digits", *[png(i) for i in range(9)])
    assert isinstance(found[3], asyncio.CancelledError)
    assert all(near(found[i][0], expected[i]) and len(found[i][0]["top"]) == 1 + i for i in range(9) if i != 3)
    service.close()


def test_one_alone_waits_for_nobody(models):
    app = create_app(modelfolder.load(models / "digits"), max_wait_ms=60_000)
    with TestClient(app, base_url=BASE) as client:
        begin = time.monotonic()
        assert client.post("/predict", content=png(), headers={"Content-Type": "image/png"}).status_code == 200
        assert time.monotonic() - begin < 5


def test_no_pass_is_larger_than_max_batch(models):
    app, sizes = create_app(modelfolder.load(models / "digits"), max_batch=3), []
    compute = app.state.service.batcher.compute
    app.state.service.batcher.compute = lambda rows, tops: (sizes.append(len(rows)), compute(rows, tops))[1]
    with TestClient(app, base_url=BASE) as client:
        reply = client.post("/predict", json={"images": [b64(png(i)) for i in range(8)]})
    expected = pipeline.predict(models / "digits", *[png(i) for i in range(8)])
    assert all(near(a, b) for a, b in zip(reply.json()["predictions"], expected, strict=True)) and sizes == [3, 3, 2]


def test_where_a_pass_fails_each_caller_gets_one_of_its_own():
    async def scene():
        started, release = threading.Event(), threading.Event()

        def compute(rows, tops):
            started.set()
            release.wait(5)
            if (rows == 7).any():
                raise RuntimeError("broken")
            return [{"value": float(row)} for row in rows]

        batcher = Batcher(compute, 8, 0.01)
        first = asyncio.create_task(batcher.submit(torch.tensor([0.0]), 1))
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        others = [asyncio.create_task(batcher.submit(torch.tensor([float(v)]), 1)) for v in (1, 7, 2)]
        await asyncio.sleep(0)
        assert batcher.rows == 3
        release.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert [f[0]["value"] for f in (found[0], found[1], found[3])] == [0, 1, 2] and str(found[2]) == "broken" and batcher.rows == 0
        batcher.close()

    asyncio.run(scene())


def test_a_full_queue_says_so(models):
    service = create_app(modelfolder.load(models / "digits"), limits=Limits(queue=3)).state.service
    started, release, compute = threading.Event(), threading.Event(), service.batcher.compute
    service.batcher.compute = lambda rows, tops: (started.set(), release.wait(5), compute(rows, tops))[2]

    async def scene():
        one = Asked([png()], ["x"])
        first = asyncio.create_task(service.predict(one, 1))
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        waiting = [asyncio.create_task(service.predict(one, 1)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="too many inputs are waiting") as caught:
            await service.predict(one, 1)
        assert caught.value.status == 503 and caught.value.headers == {"Retry-After": "1"}
        release.set()
        assert len(await asyncio.gather(first, *waiting)) == 4

    asyncio.run(scene())
    service.close()


# -- the process -----------------------------------------------------------------------------------------------------------------
def test_the_gate_at_the_start(models, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(models / "digits" / "model", folder)
    reference = json.loads((folder / "reference.json").read_text())
    reference["outputs"][0][0] += 0.01
    (folder / "reference.json").write_text(json.dumps(reference))
    from groundup.training.checkpoint import write_manifest

    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(GateError, match="does not compute here") as caught:
        serve(folder, port=0)
    assert caught.value.exit_status == 3


@pytest.mark.parametrize("alone, chosen", [(0.001, 1), (0.01, 2)])
def test_a_core_is_left_where_it_costs_little(models, monkeypatch, alone, chosen):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    loaded = modelfolder.load(models / "digits")
    loaded.model.forward = lambda x: time.sleep(alone if torch.get_num_threads() == 1 else 0.002)
    torch.set_num_threads(2)
    server._leave_a_core(loaded)
    assert torch.get_num_threads() == chosen


def test_a_folder_without_reference_outputs_says_so(models, tmp_path, capsys):
    loaded = modelfolder.load(models / "digits")
    loaded.path = tmp_path
    server._gate(loaded)
    assert "no reference outputs to replay" in capsys.readouterr().out


def test_a_port_in_use(models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot be opened") as caught:
            serve(models / "digits", port=port)
    assert f"--port {port + 1}" in caught.value.fix


SLOW = """
import sys, time
from groundup.serving import server, service
compute = service.Service._compute
service.Service._compute = lambda self, rows, tops: (time.sleep(1.5), compute(self, rows, tops))[1]
server.Patient.SECONDS = 0.3
server.serve(sys.argv[1], port=0, as_json=True, max_body_mb=1)
"""


def started(*command):
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    ready = next((json.loads(line) for line in lines if line.startswith("{")), None)  # without --json its sentences are there, too
    assert ready is not None, process.communicate()
    assert ready["event"] == "ready"
    return process, ready["url"]


def asked(url, data=None, content="image/png"):
    """Status and answer."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": content})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@posix
def test_what_was_accepted_is_answered_before_it_ends(models):
    process, url = started("-c", SLOW, models / "digits")
    try:
        assert asked(f"{url}/ready") == (200, {"ready": True}), "it says so when it is so"
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(asked(f"{url}/predict", png()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for path, data in (("predict", png()), ("ready", None)):
            status, reply = asked(f"{url}/{path}", data)
            assert status == 503 and reply["error"]["type"] == "Stopping"
        assert asked(f"{url}/health")[0] == 200
        for thread in threads:
            thread.join()
        out, err = process.communicate(timeout=20)
        assert [status for status, _ in replies] == [200] * 4 and all(len(reply["predictions"]) == 1 for _, reply in replies)
        assert json.loads([line for line in out.splitlines() if line.startswith("{")][-1]) == {"event": "stopped", "url": url}
        assert process.returncode == 0 and "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


@posix
def test_a_second_signal_ends_it_at_once(models):
    process, url = started("-c", SLOW, models / "digits")
    try:

        def cut_off():
            with pytest.raises(OSError):
                asked(f"{url}/predict", png())

        thread = threading.Thread(target=cut_off)
        thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and time.monotonic() - begin < 0.8
        thread.join()
    finally:
        process.kill()
        process.communicate()


def test_clients_that_are_slow_rude_or_too_large(models):
    process, url = started("-c", SLOW, models / "digits")
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        with socket.create_connection(address, timeout=10) as half:
            half.sendall(b"POST /predict HTTP/1.1\r\nHost:")
            assert half.recv(100) == b"", "half a head: closed"
        status, reply = asked(f"{url}/predict", bytes(3_000_000))  # the answer arrives although it comes before the body's end
        assert status == 413 and "1,048,576 bytes" in reply["error"]["message"]
        for head in (b"nonsense\r\n\r\n", b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n"):
            with socket.create_connection(address, timeout=10) as rude:
                rude.sendall(head)
                assert rude.recv(100).startswith(b"HTTP/1.1 400")
        data = png()
        for sent in (len(data), len(data) // 2):  # gone while it waits for the answer, and in the middle of sending
            with socket.create_connection(address) as gone:
                gone.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(data)
                )
                gone.sendall(data[:sent])
                time.sleep(0.2)
        assert asked(f"{url}/predict", data)[0] == 200
        counted = urllib.request.urlopen(f"{url}/metrics", timeout=5).read().decode()
        assert 'status="499"} 1' in counted and 'status="500"' not in counted
    finally:
        process.terminate()
        assert "Traceback" not in process.communicate(timeout=20)[1]


@posix
def test_the_command_line(models):
    process, url = started("-m", "groundup", "serve", models / "digits", "--port", "0", "--json")
    try:
        assert asked(f"{url}/predict", png())[0] == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and json.loads(out) == {"event": "stopped", "url": url} and "curl -F file=@photo.jpg" in err
    finally:
        process.kill()
        process.communicate()


CHROMIUM = Path("/usr/bin/chromium")


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs /usr/bin/chromium")
def test_the_page_in_a_browser(models, tmp_path):
    """The page as a person sees it: the key is entered, pictures are dropped, one of them is none, and the answers stand there in their order. The
    dropping is done to the page's own handlers."""
    process, url = started("-m", "groundup", "serve", models / "digits", "--port", "0", "--json", "--api-key", "密 key")
    browser = Browser(tmp_path / "profile")
    try:
        page = browser.open(url)
        script = """(async () => {
          const until = async found => { for (let i = 0; i < 80 && !found(); i++) await new Promise(r => setTimeout(r, 100)); };
          const $ = id => document.getElementById(id);
          await until(() => !$("key").hidden);
          $("keytext").value = "密 key";
          $("key").requestSubmit();
          await until(() => !$("drop").hidden);
          const data = new DataTransfer();
          for (const [name, text] of FILES) data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, { type: "image/png" }));
          window.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
          await until(() => document.querySelectorAll(".answer h2, .answer .error").length === 3);
          return document.body.innerText; })()"""
        files = [["数字.png", b64(png())], ["bad.png", b64(b"none")], ["second.png", b64(png(1))]]
        text = page("Runtime.evaluate", expression=script.replace("FILES", json.dumps(files)), awaitPromise=True)["result"]["value"]
        assert "digits-cnn" in text and text.index("数字.png") < text.index("bad.png") < text.index("second.png")
        for answer in pipeline.predict(models / "digits", png(), png(1)):
            assert f"{answer['label']} · {100 * answer['probability']:.1f} %" in text
        assert "not a picture" in text
        picture = base64.b64decode(page("Page.captureScreenshot")["data"])
        Path(os.environ.get("GROUNDUP_SCREENSHOT", tmp_path / "page.png")).write_bytes(picture)
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 5
        chinese = "document.getElementById('language').click(); document.body.innerText"
        assert "把图片拖到这里" in page("Runtime.evaluate", expression=chinese)["result"]["value"]
        page("Runtime.evaluate", expression="location.href = 'docs'")
        for _ in range(50):
            # Between two pages there is a moment without a body.
            text = page("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")["result"].get("value", "")
            if "/predict" in text:
                break
            time.sleep(0.1)
        assert "curl -H 'X-API-Key: KEY' -F file=@photo.jpg" in text and "/metrics" in text
    finally:
        browser.close()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


class Browser:
    """The few commands of the DevTools protocol that are needed, over the browser's pipe: JSON that ends with a zero byte."""

    def __init__(self, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--window-size=900,760", "--remote-debugging-pipe"]  # fmt: skip
        command = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-", str(CHROMIUM), *options, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.number, self.rest = 0, b""

    def __call__(self, method, session=None, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.read, 65536)
            line, _, self.rest = self.rest.partition(b"\0")
            reply = json.loads(line)
            if reply.get("id") == self.number:
                if "navigated" in reply.get("error", {}).get("message", ""):
                    return {"result": {}}  # asked between two pages
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, url):
        """Opens a page; returns a function that sends commands to it."""
        target = self("Target.createTarget", url=url)["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for _ in range(100):
            found = self("Runtime.evaluate", session, expression="document.readyState + location.href")
            if found["result"].get("value", "").startswith(f"complete{url}"):
                break
            time.sleep(0.1)
        return lambda method, **parameters: self(method, session, **parameters)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
