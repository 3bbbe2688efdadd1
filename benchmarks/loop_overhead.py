"""Our loop against a loop written by hand: the same model, batches and optimizer.

    python benchmarks/loop_overhead.py [--quick]

Both sides train the same network from the same weights on the same samples in the same order, with fused AdamW, a cosine learning rate,
gradient clipping and a loss read every ten steps; at the end their weights must agree. Ours runs with all its real watchers (console,
metrics.jsonl, TensorBoard), its finite check and its checkpoint policy. The sides take turns of twenty steps in one process; the ratio is
the median over turns of the hand-written loop's time over ours. Target: at most 2 % slower for a step of about 20 ms (ratio 0.98).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from groundup import jobs
from groundup.core import console
from groundup.core.recipe import load
from groundup.models.base import build_model
from groundup.training import loop
from groundup.training.signals import StopRequest
from groundup.training.watch import build_watchers

TURN = 20


class Ours:
    """The loop of the product, led through by turns: each call trains until the next multiple of TURN."""

    def __init__(self, folder: Path, overrides: dict) -> None:
        recipe, run, _ = jobs.open_run("digits-cnn", overrides, folder / "run", resume=False, extend=False)
        self.job = jobs.build(recipe, run, resume=False, trust_code=False, train_base=Path)
        self.total = self.job.state.total
        self.watchers = build_watchers(run, metric="accuracy", tensorboard=True, profile=0, trackers=[])
        self.initial = {k: v.clone() for k, v in self.job.state.model.state_dict().items()}

    def turn(self) -> float:
        job, target = self.job, self.job.state.step + TURN

        class UntilTarget(StopRequest):  # what a signal does, without its checkpoint: the loop itself is not touched
            def __call__(self) -> bool:
                return False

        original, finished = loop.step, []

        def counted(state, *rest):
            if state.step >= target:
                finished.append(time.perf_counter())
                raise StopIteration
            return original(state, *rest)

        loop.step = counted
        begin = time.perf_counter()
        try:
            loop.train(job.state, job.batches, job.task, job.plan, job.keeper, job.validation, self.watchers, UntilTarget())
            finished.append(time.perf_counter())
        except StopIteration:
            pass
        finally:
            loop.step = original
        return finished[0] - begin


class ByHand:
    """What a careful person writes."""

    def __init__(self, ours: Ours, lr: float, batch_size: int) -> None:
        job = ours.job
        self.model = build_model(job.recipe.model.name, job.recipe.model.arguments, job.task.input_shape, job.task.num_outputs)
        self.model.load_state_dict(ours.initial)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        spared = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        pixels, self.targets = job.batches.encoded.inputs, job.batches.encoded.targets
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (job.task.mean, job.task.std))
        self.inputs = pixels
        self.mean, self.std = mean, std
        self.order, self.lr, self.total, self.step, self.losses = job.batches.order, lr, ours.total, 0, []

    def turn(self) -> float:
        begin = time.perf_counter()
        for _ in range(TURN):
            self.model.train()
            lr = self.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.total))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            index = torch.from_numpy(self.order.batch(self.step)[1])
            x = (self.inputs[index].to(torch.float32) / 255 - self.mean) / self.std
            self.optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(self.model(x), self.targets[index])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 10 == 0:
                self.losses.append(loss.item())
        return time.perf_counter() - begin


def compare(name: str, turns: int, hidden: int, channels: int, batch_size: int) -> dict:
    """The medians of both sides per step, and of the ratio per pair of turns."""
    with tempfile.TemporaryDirectory(prefix="groundup-benchmark-") as folder:
        overrides = {
            "data.augment": None, "model.dropout": 0.0, "model.hidden": hidden, "model.channels": channels, "train.batch_size": batch_size,
            "train.steps": turns * TURN + TURN, "optim.lr": 1e-4, "schedule.warmup": 0.0, "evaluate.every": 10**6, "train.save_every": "10h",
        }  # fmt: skip
        ours = Ours(Path(folder), overrides)
        peer = ByHand(ours, 1e-4, batch_size)
        ours.turn(), peer.turn()  # warm: allocations, kernels, imports of the writers
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for k in range(turns):
            for side in ("ours", "peer") if k % 2 else ("peer", "ours"):
                times[side].append((ours if side == "ours" else peer).turn() / TURN)
        worst = max(float((a - b).abs().max()) for a, b in zip(ours.job.state.model.state_dict().values(), peer.model.state_dict().values()))
        if worst > 1e-4 or ours.job.state.step != peer.step:
            sys.exit(f"not the same work: weights differ by {worst:.1e} after {ours.job.state.step} and {peer.step} steps")
        ours.job.run.close()
    ratio = statistics.median(p / o for o, p in zip(times["ours"], times["peer"]))
    medians = {side: statistics.median(values) * 1e3 for side, values in times.items()}
    console.line(f"{name}: ours {medians['ours']:.2f} ms, by hand {medians['peer']:.2f} ms per step, ratio {ratio:.3f} ({turns} turns, weights agree to {worst:.0e})")
    return {"part": name, "ours": round(medians["ours"], 3), "peer": round(medians["peer"], 3), "ratio": round(ratio, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    turns = 12 if parser.parse_args().quick else 60
    with console.muted():
        pass
    step20 = compare("a step of about 20 ms", turns, hidden=1024, channels=64, batch_size=512)
    small = compare("a small step", turns, hidden=128, channels=32, batch_size=64)
    target = 0.98
    print(json.dumps({"benchmark": "loop_overhead", "ours": step20["ours"], "peer": step20["peer"], "unit": "ms per step", "ratio": step20["ratio"],
                      "target": target, "met": step20["ratio"] >= target, "parts": [step20 | {"target": target}, small | {"target": None}]}))  # fmt: skip


if __name__ == "__main__":
    main()
