"""Decoded and augmented photographs per second from a folder: our streaming against a DataLoader with per-sample PIL transforms.

    python benchmarks/photo_loading.py [--quick]

Both sides read the same JPEG files (960 x 720, made for the run) with two worker processes and give normalised float batches of 64 in 224 x 224,
with a random resized crop, mirroring, and brightness, contrast and saturation. The DataLoader does it picture by picture in its workers, with PIL
as torchvision's transforms do on PIL pictures (RandomResizedCrop, RandomHorizontalFlip, ColorJitter, ToTensor, Normalize). Ours decodes in the
workers (a JPEG is decoded at the resolution that is needed) and augments whole batches in the main process. Two things are measured of ours:
decoding every time, which is compared, and reading the raw pixels that the cache keeps, which is what happens from the second epoch on.

The sides take turns, an epoch each; not in the timing: starting the workers, and the first batch.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from groundup.core import console
from groundup.core.device import keep_freed_memory
from groundup.core.recipe import Data
from groundup.data.order import CounterRandom, Order
from groundup.data.prepare import prepare
from groundup.modelfolder import build_task

SIZE, BATCH, WORKERS = 224, 64, 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
AUGMENT = {"resized_crop": 0.25, "flip": 0.5, "color": 0.3}


def make_photos(folder: Path, count: int) -> None:
    """Pictures with the smoothness and the detail of photographs, about 150 KB each."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((960, 720), Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.normal(0, 9, (720, 960, 1)).astype(np.int16)
        at = folder / "ab"[i % 2] / f"{i}.jpg"
        at.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(at, quality=88)


class PerSample(torch.utils.data.Dataset[torch.Tensor]):
    """One picture at a time, through PIL."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with open(self.paths[i], "rb") as file:
            picture = Image.open(file).convert("RGB")
        width, height = picture.size
        area, ratio = width * height * random.uniform(0.25, 1), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for change in random.sample([ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color], 3):
            picture = change(picture).enhance(random.uniform(0.7, 1.3))
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
        return (tensor - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def peer(paths: list[Path]) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(PerSample(paths), batch_size=BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    for batch in loader:
        yield len(batch)


def ours(folder: Path, epoch: int, cached: bool) -> Iterator[int]:
    config = Data.model_validate(
        {"source": str(folder), "in_memory": False, "cached": cached, "augment": AUGMENT, "split": {"validation": 0, "test": 0},
         "image": {"size": SIZE, "mean": MEAN, "std": STD}}
    )  # fmt: skip
    with console.muted():
        prepared = prepare(config, classification=True)
    task: Any = build_task("image-classification", {})
    task.configure(config)
    task.fit(prepared.dataset, prepared.splits["train"])
    encoded = task.prepare(prepared.dataset, prepared.splits["train"], torch.device("cpu"), workers=WORKERS)
    order = Order(len(encoded), BATCH, 0)
    steps = len(encoded) // BATCH
    encoded.inputs.ahead = steps
    encoded.inputs.follow(lambda k: order.batch(epoch * steps + k)[1], 0)
    for k in range(steps):
        drawn, index = (torch.from_numpy(a) for a in order.batch(epoch * steps + k))
        yield len(task.batch(encoded, index, training=True, rng=CounterRandom(0, drawn, index)).inputs)


def speed(batches: Iterator[int]) -> float:
    """Pictures per second after the first batch."""
    next(batches)
    begin, count = time.perf_counter(), 0
    for n in batches:
        count += n
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and one turn: shows that it runs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as every training does (for both sides: it is one process)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        make_photos(folder, 256 if quick else 1024)
        paths = sorted(folder.rglob("*.jpg"))
        rows: dict[str, list[float]] = {"ours": [], "peer": [], "ours, cached": []}
        for turn in range(1 if quick else 5):
            rows["ours"].append(speed(ours(folder, turn, cached=False)))
            rows["peer"].append(speed(peer(paths)))
            rows["ours, cached"].append(speed(ours(folder, turn, cached=True)))
            print(f"turn {turn}: " + ", ".join(f"{name} {values[-1]:,.0f}/s" for name, values in rows.items()), flush=True)
    ratio = statistics.median(a / b for a, b in zip(rows["ours"], rows["peer"]))
    middle = {name: round(statistics.median(values), 1) for name, values in rows.items()}
    parts = [
        {"name": "decoded each time", "ours": middle["ours"], "peer": middle["peer"], "unit": "pictures/s", "ratio": round(ratio, 3), "target": 1.5,
         "met": ratio >= 1.5},
        {"name": "from the cache", "ours": middle["ours, cached"], "peer": middle["peer"], "unit": "pictures/s",
         "ratio": round(middle["ours, cached"] / middle["peer"], 3), "target": None, "met": None},
    ]  # fmt: skip
    top = {key: parts[0][key] for key in ("ours", "peer", "unit", "ratio", "target", "met")}
    print(json.dumps({"benchmark": "photo_loading", **top, "parts": parts}))


if __name__ == "__main__":
    main()
