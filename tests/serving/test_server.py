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
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from groundup import modelfolder, pipeline
from groundup.core.errors import GateError, UserError
from groundup.serving import server
from groundup.serving.batcher import Batcher, Busy
from groundup.serving.server import Limits, create_app, serve

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
    assert len(client.post("/predict?top_k=1", content=png(), headers={"Content-Type": "image/png"}).json()["predictions"][0]["top"]) == 1


def test_order_is_kept_and_a_bad_one_is_named(client, models):
    several = [png(i) for i in range(5)]
    expected = pipeline.predict(models / "digits", *several)
    reply = client.post("/predict", files=[("file", (f"{i}.png", p)) for i, p in enumerate(several)])
    assert all(near(a, b) for a, b in zip(reply.json()["predictions"], expected, strict=True))
    bad = client.post("/predict", files=[("file", ("good.png", png())), ("file", ("坏.png", b"not a picture"))])
    assert (
        bad.status_code == 422 and "file 1 (坏.png)" in bad.json()["error"]["message"] and "not a picture" in bad.json()["error"]["message"]
    )


def test_rows_of_numbers(models):
    with TestClient(create_app(modelfolder.load(models / "line")), base_url=BASE) as client:
        expected = pipeline.predict(models / "line", "1.5", "2")
        assert [p["value"] for p in client.post("/predict", json={"inputs": [[1.5], {"x": 2}]}).json()["predictions"]] == pytest.approx(
            [e["value"] for e in expected], abs=1e-5
        )
        for bad in ({"input": ["a"]}, {"input": [1, 2]}, {"input": 3}, {"inputs": [{"y": 1}]}, {"image": "x"}):
            reply = client.post("/predict", json=bad)
            assert reply.status_code == 422 and reply.json()["error"]["message"], bad
        nan = client.post("/predict", content='{"input": [NaN]}', headers={"Content-Type": "application/json"})
        assert nan.status_code == 400


@pytest.mark.parametrize(
    "body, content, status, told",
    [
        (b"", "application/json", 400, "empty"),
        (b"{", "application/json", 400, "not JSON"),
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
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 422, "no input"),
    ],
)
def test_mistakes_are_4xx_with_words(client, body, content, status, told):
    reply = client.post("/predict", content=body, headers={"Content-Type": content})
    assert reply.status_code in (status, 400, 422) and reply.status_code == status, reply.text
    assert told in reply.json()["error"]["message"]


def test_unknown_paths_and_verbs(client):
    assert client.get("/nowhere").json()["error"]["fix"] and client.get("/nowhere").status_code == 404
    assert client.get("/predict").status_code == 405 and "error" in client.get("/predict").json()


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


def test_bombs_are_refused_by_their_header(client):
    header = bytearray(png())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    reply = client.post("/predict", content=bytes(header), headers={"Content-Type": "image/png"})
    assert reply.status_code == 413 and "pixels" in reply.json()["error"]["message"]


def test_a_slow_decoder_ends_with_words(models, monkeypatch):
    app = create_app(modelfolder.load(models / "digits"), limits=Limits(seconds=0.2))
    monkeypatch.setattr(app.state.service, "_read", lambda name, raw: time.sleep(1))
    with TestClient(app, base_url=BASE) as client:
        reply = client.post("/predict", content=png(), headers={"Content-Type": "image/png"})
        assert reply.status_code == 422 and "decoding took more than" in reply.json()["error"]["message"]


# -- who may ask -------------------------------------------------------------------------------------------------------------------
def test_the_key(models):
    with TestClient(create_app(modelfolder.load(models / "digits"), api_key="密 key", hosts=None), base_url="http://example.org") as client:
        assert client.get("/health").status_code == 200 and client.get("/").status_code == 200
        for path in ("/model", "/metrics", "/ready", "/openapi.json"):
            reply = client.get(path)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", path
        assert client.post("/predict", json={}).status_code == 401
        for headers in ({"Authorization": "Bearer 密 key".encode()}, {"X-API-Key": "密 key".encode()}):
            reply = client.get("/model", headers=headers)
            assert reply.status_code in (200, 401)
    with TestClient(create_app(modelfolder.load(models / "digits"), api_key="secret", hosts=None), base_url="http://example.org") as client:
        assert client.get("/model", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/model", headers={"X-API-Key": "secret"}).status_code == 200
        assert client.get("/model", headers={"X-API-Key": "secre"}).status_code == 401


def test_a_name_that_points_here_is_not_enough(models):
    with TestClient(create_app(modelfolder.load(models / "digits")), base_url="http://evil.example") as client:
        reply = client.get("/model")
        assert reply.status_code == 421 and "evil.example" in reply.json()["error"]["message"]


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
    client.post("/predict", content=png(), headers={"Content-Type": "image/png"})
    text = client.get("/metrics").text
    assert 'groundup_requests_total{path="/predict",status="200"} 1' in text
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
    service, sizes = app.state.service, []
    forward, gate = service.batcher._forward, threading.Event()
    service.batcher._forward = lambda rows: (sizes.append(len(rows)), gate.wait(5), forward(rows))[2]

    async def all_of_them():
        tasks = [asyncio.create_task(service.predict([("x", png(i))], 5)) for i in range(9)]
        await asyncio.sleep(0.5)
        tasks[3].cancel()  # a client that goes away does not harm the others
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(all_of_them())
    assert sizes[0] <= 9 and len(sizes) <= 3 and sum(sizes) == 9
    expected = pipeline.predict(models / "digits", *[png(i) for i in range(9)])
    assert isinstance(found[3], asyncio.CancelledError)
    assert all(near(found[i][0], expected[i]) for i in range(9) if i != 3)


def test_a_full_queue_says_so_and_an_error_reaches_its_callers():
    import torch

    async def scene():
        started = threading.Event()
        release = threading.Event()

        def forward(rows):
            started.set()
            release.wait(5)
            if rows[0, 0] == 7:
                raise RuntimeError("broken")
            return rows * 2

        batcher = Batcher(forward, 2, 3, lambda n: None)
        first = asyncio.create_task(batcher.submit(torch.full((1, 1), 7.0)))
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        waiting = [asyncio.create_task(batcher.submit(torch.ones(1, 1))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await batcher.submit(torch.ones(1, 1))
        release.set()
        with pytest.raises(RuntimeError, match="broken"):
            await first
        assert [float(x) for x in await asyncio.gather(*waiting)] == [2, 2, 2]
        batcher.close()

    asyncio.run(scene())


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


def test_a_port_in_use(models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot be opened") as caught:
            serve(models / "digits", port=port)
    assert f"--port {port + 1}" in caught.value.fix


def started(models, *options):
    command = [sys.executable, "-m", "groundup", "serve", str(models / "digits"), "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    url = json.loads(line)["url"]
    for _ in range(100):
        try:
            if json.load(urllib.request.urlopen(f"{url}/ready", timeout=5))["ready"]:
                return process, url
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not get ready")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_what_was_accepted_is_answered_before_it_ends(models):
    process, url = started(models)
    try:
        replies = []

        def ask():
            request = urllib.request.Request(f"{url}/predict", data=png(), headers={"Content-Type": "image/png"})
            replies.append(json.load(urllib.request.urlopen(request, timeout=20)))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 143, err
        assert len(replies) >= 1 and all("predictions" in r for r in replies) and "Traceback" not in err
    finally:
        process.kill()


CHROMIUM = Path("/usr/bin/chromium")


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs /usr/bin/chromium")
def test_the_page_in_a_browser(models, tmp_path):
    """The page as a person sees it: a picture is dropped, and the answer stands there. The dropping is done by the page's own handlers, with a
    DataTransfer that a small frame around it makes."""
    process, url = started(models)
    browser = Browser(tmp_path / "profile")
    try:
        page = browser.open(url)
        drop = f"""(async () => {{
          const bytes = Uint8Array.from(atob("{b64(png())}"), c => c.charCodeAt(0));
          const data = new DataTransfer(); data.items.add(new File([bytes], "数字.png", {{ type: "image/png" }}));
          for (let i = 0; i < 50 && document.getElementById("drop").hidden; i++) await new Promise(r => setTimeout(r, 100));
          window.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, bubbles: true, cancelable: true }}));
          for (let i = 0; i < 50 && !document.querySelector(".answer h2"); i++) await new Promise(r => setTimeout(r, 100));
          return document.body.innerText; }})()"""
        text = page("Runtime.evaluate", expression=drop, awaitPromise=True)["result"]["value"]
        expected = pipeline.predict(models / "digits", png())[0]
        assert "digits-cnn" in text and "数字.png" in text and f"{100 * expected['probability']:.1f}%" in text
        picture = base64.b64decode(page("Page.captureScreenshot")["data"])
        Path(os.environ.get("GROUNDUP_SCREENSHOT", tmp_path / "page.png")).write_bytes(picture)
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 5
        bad = "document.getElementById('language').click(); document.body.innerText"
        assert "把图片拖到这里" in page("Runtime.evaluate", expression=bad)["result"]["value"]
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
