"""What our loop costs: the same training in a hand-written PyTorch loop and in `groundup.training.loop.train`, side by side.

    python benchmarks/loop_overhead.py [--quick]

Both sides train the same network from the same weights on the same batches (scikit-learn's digits, uint8 in memory), with the same fused
AdamW, clipping and cosine schedule. Ours is what `groundup train` runs: `jobs.build` makes the job, the loop has all its watchers
(console, metrics.jsonl, TensorBoard) and its finite check. The hand-written loop is what a careful person would write, and no more:
it logs the loss every 10 steps, has its sample order computed beforehand, and does not look for non-finite values.

The sides take turns of 10 steps in one process: a watcher of ours runs the other side between two of our steps. A turn of ours is
compared with the mean of the turns just before and after it; the ratio is the median of these. At the end the weights of both sides
must agree. Not in the timing: building the job, the warm-up turns, evaluation and checkpoints (none is due while turns are taken).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from groundup import jobs
from groundup.core import console
from groundup.data.order import permutation
from groundup.training import loop
from groundup.training.signals import StopRequest
from groundup.training.watch import Base, build_watchers

TURN = 10  # steps
WARM_UP = 4  # turns
LR, WEIGHT_DECAY, CLIP_NORM, SEED = 1e-4, 0.01, 1.0, 0


@dataclass
class Case:
    """Args: target: the least ratio of the hand-written loop's time to ours; None is for information."""

    name: str
    hidden: list[int]
    batch_size: int
    turns: int
    target: float | None


class HandWritten:
    """A plain PyTorch training loop over the job's data, from the job's weights."""

    def __init__(self, job: jobs.Job) -> None:
        self.model = copy.deepcopy(job.state.model)
        self.inputs, self.targets = job.batches.encoded.inputs, job.batches.encoded.targets
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (job.task.mean, job.task.std))
        self.total, self.batch_size = job.state.total, job.batches.batch_size
        n = len(self.targets)
        epochs = -(-self.total * self.batch_size // n)
        self.order = torch.cat([torch.from_numpy(permutation(n, SEED, epoch)) for epoch in range(epochs)])
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        spared = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
        self.log: list[dict[str, float]] = []

    def train(self, first: int, last: int) -> None:
        """The steps from `first` up to, not including, `last`."""
        self.model.train()
        for step in range(first, last):
            index = self.order[step * self.batch_size : (step + 1) * self.batch_size]
            x, y = (self.inputs[index].float() / 255 - self.mean) / self.std, self.targets[index]
            lr = LR * 0.5 * (1 + math.cos(math.pi * step / self.total))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            if (step + 1) % 10 == 0:
                self.log.append({"step": step + 1, "loss": loss.item(), "lr": lr})


class Turns(Base):
    """Times our turns and runs the other side between them."""

    def __init__(self, other: HandWritten) -> None:
        self.other = other
        self.ours: list[float] = []
        self.others: list[float] = []

    def begin(self, state: Any, plan: Any) -> None:
        self.began = time.perf_counter()

    def after_step(self, state: Any, report: Any) -> None:
        if report.step % TURN == 0:
            now = time.perf_counter()
            self.ours.append((now - self.began) / TURN)
            self.other.train(report.step - TURN, report.step)
            self.began = time.perf_counter()
            self.others.append((self.began - now) / TURN)


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds per step of both sides, and the ratio."""
    recipe = {
        "name": "loop-overhead",
        "task": "image-classification",
        "data": {"source": "digits"},
        "model": {"name": "fcnn", "hidden": case.hidden},
        "optim": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY},
        "schedule": {"name": "cosine", "warmup": 0.0},
        "train": {
            "steps": TURN * (WARM_UP + case.turns),
            "batch_size": case.batch_size,
            "clip_norm": CLIP_NORM,
            "seed": SEED,
            "device": "cpu",
            "precision": "float32",
            "save_every": "1h",
            "keep": "last",
        },
        "evaluate": {"every": 10**9},
    }
    with tempfile.TemporaryDirectory() as folder, console.muted(), StopRequest() as stop:
        resolved, run, _ = jobs.open_run(recipe, {}, Path(folder) / "run", resume=False, extend=False)
        job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=Path)
        turns = Turns(HandWritten(job))
        watchers = [*build_watchers(run, metric=job.plan.metric, tensorboard=True, profile=0, trackers=[]), turns]
        loop.train(job.state, job.batches, job.task, job.plan, job.keeper, job.validation, watchers, stop)
        for watcher in watchers:
            watcher.end()
        run.close()

    pairs = zip(job.state.model.state_dict().values(), turns.other.model.state_dict().values())
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    assert apart <= 1e-5, f"the two sides did not do the same work: their weights differ by {apart:.1e}"
    ours, peer = turns.ours[WARM_UP:], turns.others[WARM_UP:]
    ratios = [(before + after) / 2 / own for before, own, after in zip(turns.others[WARM_UP - 1 :], ours, peer)]
    low, _, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios))  # of a median, as if the ratios were normal
    ratio = statistics.median(ratios)
    part = {
        "name": case.name,
        "ours": round(statistics.median(ours) * 1e3, 4),
        "peer": round(statistics.median(peer) * 1e3, 4),
        "unit": "ms per step",
        "ratio": round(ratio, 4),
        "target": case.target,
        "met": None if case.target is None else ratio >= case.target,
        "standard_error": round(error, 4),
        "turns": len(ratios),
        "weights_apart": apart,
    }
    print(
        f"{case.name}: ours {part['ours']:.3f} ms, hand-written {part['peer']:.3f} ms per step; ratio {ratio:.4f} +- {error:.4f} "
        f"(median of {len(ratios)} turns); largest difference of the weights {apart:.1e}",
        flush=True,
    )
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few turns, under 20 s: shows that it runs, too few to judge by")
    quick = parser.parse_args().quick
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    parts = [
        measure(Case("step of 20 ms", [1024, 1024], 256, 12 if quick else 300, 0.98)),
        measure(Case("step of 2 ms", [128], 64, 40 if quick else 600, None)),
    ]
    worst = min((p for p in parts if p["target"] is not None), key=lambda p: p["ratio"] / p["target"])
    top = {key: worst[key] for key in ("ours", "peer", "unit", "ratio", "target", "met")}
    print(json.dumps({"benchmark": "loop_overhead", **top, "parts": parts}))


if __name__ == "__main__":
    main()
