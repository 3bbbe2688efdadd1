"""What micro-batching gives: requests per second of `groundup serve` and of a plain FastAPI handler, for the same model and the same pictures.

    python benchmarks/serve_vision.py [--quick]

Both sides answer the same request (a picture of 32x32 colour pixels, PNG, as multipart/form-data) from the same model folder (resnet of depth 20,
random weights) with the five best labels. Ours is `groundup.serving.server.serve` as the command line runs it, all checks included. The plain
handler is what the FastAPI documentation leads to: `def predict(file: UploadFile)`, which FastAPI runs in its pool of 40 threads; it opens the
picture with Pillow, makes a tensor, normalises it, calls the model in inference mode and answers. It has no limits, no key and no counters.
Both run in uvicorn without access log, each in a process of its own. The plain one has torch's own number of threads; ours chooses (`_leave_a_core`).

One load generator (this process, raw sockets, keep-alive, each client sends its next request when its answer has come) asks both in turns; a turn
is some seconds, and the figure is the median over turns. The generator shares the machine's cores with the server. Before the turns, both sides
must give the same answers. Not in the timing: loading, warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = 2.0
CLIENTS = (1, 32)
LABELS = 10

PLAIN = """
import io, sys
import numpy as np, torch, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from groundup import modelfolder

loaded = modelfolder.load(sys.argv[1])
model, labels, state = loaded.model, loaded.card["labels"], loaded.task.state()["preprocessor"]
mean, std = (torch.tensor(state[k]).view(-1, 1, 1) for k in ("mean", "std"))
app = FastAPI()

@app.post("/predict")
def predict(file: UploadFile):
    picture = Image.open(file.file).convert("RGB").resize((32, 32))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        p = model(((x - mean) / std)[None]).softmax(1)[0]
    values, indices = p.topk(5)
    return {"predictions": [{"label": labels[i], "probability": v} for v, i in zip(values.tolist(), indices.tolist())]}

uvicorn.run(app, port=int(sys.argv[2]), log_level="error", access_log=False)
"""
OURS = """
import sys
from groundup.serving.server import serve
serve(sys.argv[1], port=int(sys.argv[2]))
"""


def make_model(folder: Path) -> None:
    """A model folder with random weights."""
    import torch

    from groundup import modelfolder
    from groundup.core.recipe import Recipe
    from groundup.models.base import build_model

    torch.manual_seed(0)
    task = modelfolder.build_task("image-classification", {})
    pixels = {"kind": "image", "shape": [3, 32, 32], "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
    task.load_state({"labels": [f"class {i}" for i in range(LABELS)], "preprocessor": pixels})
    model = build_model("resnet", {"depth": 20}, (3, 32, 32), LABELS).eval()
    recipe = Recipe.model_validate(
        {"name": "serve-vision", "task": "image-classification", "data": {"source": "digits"}, "model": {"name": "resnet", "depth": 20}}
    )
    facts = {"source_run": "serve-vision", "metrics": {}}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modelfolder.save(folder, model=model, weights=weights, task=task, recipe=recipe, facts=facts, readme="", model_arguments={})


def requests(count: int, port: int) -> list[bytes]:
    """Whole HTTP requests, each with a picture of its own."""
    import numpy as np
    from PIL import Image

    made, random = [], np.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        smooth.save(buffer, "PNG")
        head = f'--mark\r\nContent-Disposition: form-data; name="file"; filename="{i}.png"\r\nContent-Type: image/png\r\n\r\n'
        body = head.encode() + buffer.getvalue() + b"\r\n--mark--\r\n"
        lines = (
            f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=mark\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        made.append(lines.encode() + body)
    return made


class Client(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it is answered."""

    def __init__(self, bodies: list[bytes], first: int) -> None:
        self.bodies, self.next, self.seconds, self.got, self.asking = bodies, first, [], b"", True
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.begin = time.perf_counter()
        self.transport.write(self.bodies[self.next % len(self.bodies)])
        self.next += 1

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, found, body = self.got.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        assert head.startswith(b"HTTP/1.1 200"), self.got
        self.seconds.append(time.perf_counter() - self.begin)
        self.got, self.last = b"", body
        if self.asking:
            self.ask()
        else:
            self.transport.close()
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))


async def turn(port: int, clients: int, seconds: float) -> tuple[float, float]:
    """Requests per second, and the 95th percentile of their milliseconds."""
    loop, bodies, made = asyncio.get_running_loop(), requests(64, port), []
    begin = time.perf_counter()
    for i in range(clients):
        made.append((await loop.create_connection(lambda i=i: Client(bodies, i), "127.0.0.1", port))[1])
    await asyncio.sleep(seconds)
    for client in made:
        client.asking = False
    await asyncio.gather(*(client.ended for client in made))
    elapsed = time.perf_counter() - begin
    times = sorted(s for client in made for s in client.seconds)
    return len(times) / elapsed, 1e3 * times[int(0.95 * (len(times) - 1))]


@contextlib.contextmanager
def server(code: str, folder: Path, port: int) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(port)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                asyncio.run(turn(port, 1, 0.2))
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def one_answer(port: int, i: int) -> dict[str, float]:
    async def ask() -> Any:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(requests(64, port), i), "127.0.0.1", port)
        client.asking = False
        await client.ended
        return client.last

    found = json.loads(asyncio.run(ask()))["predictions"]
    return {p["label"]: p["probability"] for p in found[0].get("top", found)}


def free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns of a second: shows that it runs, too few to judge by")
    quick = parser.parse_args().quick
    turns, seconds = (2, 1.0) if quick else (7, 4.0)
    os.environ.pop("OMP_NUM_THREADS", None)  # torch's own choice, for both
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make_model(folder)
        with server(OURS, folder, free_port()) as ours, server(PLAIN, folder, free_port()) as peer:
            for i in range(8):
                a, b = one_answer(ours, i), one_answer(peer, i)
                assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-4, "the sides answer differently"
            parts = []
            for clients in CLIENTS:
                figures: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
                for port in (ours, peer):
                    asyncio.run(turn(port, clients, seconds / 2))  # warm, not counted
                for k in range(turns):
                    for name, port in (("ours", ours), ("peer", peer))[:: 1 if k % 2 else -1]:
                        figures[name].append(asyncio.run(turn(port, clients, seconds)))
                rates = {name: statistics.median(rate for rate, _ in found) for name, found in figures.items()}
                late = {name: statistics.median(p95 for _, p95 in found) for name, found in figures.items()}
                ratios = [own[0] / other[0] for own, other in zip(figures["ours"], figures["peer"])]
                ratio, target = statistics.median(ratios), TARGET if clients == 32 else None
                parts.append(
                    {
                        "name": f"{clients} clients",
                        "ours": round(rates["ours"], 1),
                        "peer": round(rates["peer"], 1),
                        "unit": "requests/s",
                        "ratio": round(ratio, 3),
                        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                        "target": target,
                        "met": None if target is None else ratio >= target,
                        "p95_ms": {name: round(value, 2) for name, value in late.items()},
                        "turns": turns,
                    }
                )
                print(
                    f"{clients} clients: ours {rates['ours']:.0f}/s (p95 {late['ours']:.1f} ms), plain {rates['peer']:.0f}/s "
                    f"(p95 {late['peer']:.1f} ms); ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
    top = {key: parts[-1][key] for key in ("ours", "peer", "unit", "ratio", "target", "met")}
    print(json.dumps({"benchmark": "serve_vision", **top, "parts": parts}))


if __name__ == "__main__":
    main()
