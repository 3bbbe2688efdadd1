"""The articles' MNIST program against `groundup train mnist-cnn` and `mnist-best`, on the same files: seconds until 97.8 % test accuracy.

    python benchmarks/mnist_time_to_accuracy.py [--quick]

The articles' side is their section 5.2 with the one correction that lets it run (the flattened size, 32 * 13 * 13): a network of 693,962
parameters, Adam 1e-3, batches of 64, 10 epochs, and pictures that pass one by one through PIL, ToTensor and Normalize as torchvision's MNIST
does it (written out here: torchvision is not needed). It runs as a process of its own; its clock stops while test accuracy is measured.

Their program ends, as published, with an evaluation of the test pictures through the same per-sample path.

Ours are whole processes too, `groundup train RECIPE`, with everything that a run does (checks, checkpoints, evaluation, report). Test accuracy
on the way is measured by a tracker that comes with this script; the recipes choose by the validation split alone and never see it. The clock of
the training is that of the loop, without the tracker's measuring. Each side is run for each of three seeds, in turn; costs are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.978  # the articles' figure
EPOCHS, BATCH = 10, 64
QUICK = 150  # steps of the articles' program in a quick run


# -- the articles' program (a process of its own) --------------------------------------------------------------------------------
def articles(limit: int, seed: int) -> None:
    """Prints one JSON line: seconds of training, seconds until TARGET, and the final test accuracy. `limit`: at most so many steps; 0, no limit."""
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn

    from groundup.data.builtin.idx_sets import mnist

    class SimpleCNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3, 1)
            self.relu = nn.ReLU()
            self.maxpool = nn.MaxPool2d(2)
            self.fc1 = nn.Linear(32 * 13 * 13, 128)
            self.fc2 = nn.Linear(128, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(self.relu(self.conv1(x)))
            x = x.view(x.size(0), -1)
            return self.fc2(self.relu(self.fc1(x)))

    class Pictures(torch.utils.data.Dataset):
        """One picture at a time, as torchvision's MNIST with ToTensor and Normalize((0.5,), (0.5,)) gives it."""

        def __init__(self, pixels: Any, labels: Any) -> None:
            self.pixels, self.labels = pixels, labels

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            picture = Image.fromarray(self.pixels[i].numpy())
            array = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(28, 28, 1).permute(2, 0, 1).contiguous()
            tensor = array.to(torch.get_default_dtype()).div(255).clone()
            mean, std = torch.as_tensor([0.5], dtype=tensor.dtype), torch.as_tensor([0.5], dtype=tensor.dtype)
            if (std == 0).any():
                raise ValueError("std is zero")
            return tensor.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)), int(self.labels[i])

    data = mnist()
    pixels, labels = torch.from_numpy(data.inputs.array[:, 0]), torch.from_numpy(data.target.astype("int64"))
    train, test = (Pictures(pixels[data.given[s]], labels[data.given[s]]) for s in ("train", "test"))
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    model, criterion = SimpleCNN(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    test_x = (test.pixels[:, None].float() / 255 - 0.5) / 0.5

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(test_x.split(1000), test.labels.split(1000)))
        model.train()
        return hits / len(test_x)

    clock, passed, step, measuring = 0.0, None, 0, 0.0
    model.train()
    begin = time.perf_counter()
    for _ in range(EPOCHS):
        running = 0.0
        for images, targets in loader:
            if limit and step >= limit:
                break
            optimizer.zero_grad()
            loss = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            running += loss.item()
            step += 1
            if step % 100 == 0 and passed is None:
                clock += time.perf_counter() - begin
                begin = time.perf_counter()
                if accuracy() >= TARGET:
                    passed = clock
                measuring += time.perf_counter() - begin
                begin = time.perf_counter()
    clock += time.perf_counter() - begin
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, targets in torch.utils.data.DataLoader(test, batch_size=BATCH):
            correct += (torch.max(model(images), 1)[1] == targets).sum().item()
    print(json.dumps({"train": clock, "passed": passed, "measuring": measuring, "accuracy": correct / len(test)}), flush=True)


# -- ours ------------------------------------------------------------------------------------------------------------------------
class TestAccuracy:
    """A tracker (watch.trackers): measures test accuracy on the way and writes the training's seconds at which it passed TARGET."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "passed.json"
        self.seconds = self.passed = None

    def begin(self, state: Any, plan: Any) -> None:
        import torch

        from groundup.data.builtin.idx_sets import mnist

        data = mnist()
        index = data.given["test"]
        card = json.loads((self.file.parent / "data.json").read_text(encoding="utf-8"))["statistics"]["pixels"]
        pixels = data.inputs.fetch(index).float() / 255
        self.x = (pixels - torch.tensor(card["mean"]).view(-1, 1, 1)) / torch.tensor(card["std"]).view(-1, 1, 1)
        self.y = torch.from_numpy(data.target[index].astype("int64"))
        self.every = max(1, state.total // 25)
        self.seconds, self.since = 0.0, time.perf_counter()

    def after_step(self, state: Any, report: Any) -> None:
        import torch

        if self.passed is None and report.step % self.every == 0:
            self.seconds += time.perf_counter() - self.since
            weights = state.ema if state.ema is not None else None
            own = {n: t.clone() for n, t in state.model.state_dict().items()}
            if weights is not None:
                state.model.load_state_dict(weights)
            state.model.eval()
            with torch.no_grad():
                hits = sum(int((state.model(x).argmax(1) == y).sum()) for x, y in zip(self.x.split(500), self.y.split(500)))
            state.model.train()
            state.model.load_state_dict(own)
            if hits / len(self.y) >= TARGET:
                self.passed = self.seconds
            self.since = time.perf_counter()

    def row(self, row: Any) -> None:
        pass

    def end(self) -> None:
        self.file.write_text(json.dumps({"passed": self.passed}), encoding="utf-8")


def ours(recipe: str, seed: int, folder: Path, *, watched: bool, extra: list[str]) -> dict[str, Any]:
    """One run: a whole process, timed; or one with the tracker, for the moment at which it passes TARGET."""
    out = folder / f"{recipe}-{seed}-{watched}"
    command = [sys.executable, "-m", "groundup", "train", recipe, "--out", str(out), "--json", "--set", f"train.seed={seed}", *extra]
    if watched:
        command += ["--set", f"watch.trackers=[{Path(__file__).resolve()}:TestAccuracy]"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    found = {
        "process": seconds,
        "train": result["seconds"]["train"],
        "accuracy": result["metrics"]["accuracy"],
        "parameters": result["parameters"],
    }
    if watched:
        found["passed"] = json.loads((out / "passed.json").read_text(encoding="utf-8"))["passed"]
    return found


def theirs(limit: int, seed: int) -> dict[str, Any]:
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--articles", str(limit), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": seconds - found.pop("measuring")}  # measuring on the way is not the articles' work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, the start of the articles' program and of mnist-best: shows that it runs, too little to judge by",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many; three take half an hour on two cores")
    parser.add_argument("--articles", nargs=2, metavar=("STEPS", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.articles:
        articles(int(arguments.articles[0]), int(arguments.articles[1]))
        return
    from groundup.core.errors import GroundupError
    from groundup.data.builtin.idx_sets import mnist

    os.environ["PYTHONWARNINGS"] = "ignore"
    seeds = [0] if arguments.quick else list(range(arguments.seeds))
    short = ["--set", "train.epochs=0.1"] if arguments.quick else []
    try:
        mnist()
    except GroundupError as error:
        raise SystemExit(str(error)) from error
    with tempfile.TemporaryDirectory() as place:
        rows: dict[str, list[dict[str, Any]]] = {"articles": [], "mnist-cnn": [], "mnist-cnn watched": [], "mnist-best": []}
        for seed in seeds:
            rows["mnist-cnn"].append(ours("mnist-cnn", seed, Path(place), watched=False, extra=[]))
            rows["articles"].append(theirs(QUICK if arguments.quick else 0, seed))
            rows["mnist-cnn watched"].append(ours("mnist-cnn", seed, Path(place), watched=True, extra=[]))
            rows["mnist-best"].append(ours("mnist-best", seed, Path(place), watched=False, extra=short))
            for name, found in rows.items():
                print(f"seed {seed}  {name:18}", json.dumps({k: v if v is None else round(v, 4) for k, v in found[-1].items()}), flush=True)

    def middle(name: str, key: str) -> float:
        found = [row[key] for row in rows[name]]
        return float("nan") if None in found else statistics.median(found)

    def mean(name: str) -> float:
        return statistics.mean(row["accuracy"] for row in rows[name])

    passed = middle("mnist-cnn watched", "passed")
    parts = [
        part("training until 97.8 %", passed, middle("articles", "train"), "s", 30),
        part("whole process", middle("mnist-cnn", "process"), middle("articles", "process"), "s", 20),
        part("until 97.8 %, both", passed, middle("articles", "passed"), "s", 5),
        reached("mnist-cnn, mean test accuracy", mean("mnist-cnn"), mean("articles"), 0.982),
        reached("mnist-best, mean test accuracy", mean("mnist-best"), mean("articles"), 0.994),
        part("mnist-best, training", middle("mnist-best", "train"), middle("articles", "train"), "s", 1),
    ]
    for p in parts:
        p["met"] = None if arguments.quick else p["met"]
        print(f"{p['name']:32} ours {p['ours']}  articles {p['peer']}  ratio {p['ratio']}  target {p['target']}  met {p['met']}")
    worst = min((p for p in parts if p["unit"] == "s"), key=lambda p: (p["ratio"] or 0) / p["target"])
    top = {key: worst[key] for key in ("ours", "peer", "unit", "ratio", "target")}
    print(json.dumps({"benchmark": "mnist_time_to_accuracy", **top, "met": None if arguments.quick else all(p["met"] for p in parts), "parts": parts}))


def part(name: str, ours: float, peer: float, unit: str, target: float) -> dict[str, Any]:
    ratio = peer / ours if ours == ours and peer == peer else None
    rounded = [None if v != v else round(v, 3) for v in (ours, peer)]
    return {"name": name, "ours": rounded[0], "peer": rounded[1], "unit": unit, "ratio": ratio and round(ratio, 2), "target": target,
            "met": ratio is not None and ratio >= target}  # fmt: skip


def reached(name: str, ours: float, peer: float, target: float) -> dict[str, Any]:
    return {
        "name": name,
        "ours": round(ours, 5),
        "peer": round(peer, 5),
        "unit": "accuracy",
        "ratio": None,
        "target": target,
        "met": ours >= target,
    }


if __name__ == "__main__":
    main()
