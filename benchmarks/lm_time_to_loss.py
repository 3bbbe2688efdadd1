"""Seconds of training until nanoGPT's final validation loss, on Tiny Shakespeare letter by letter, beside nanoGPT itself.

    python benchmarks/lm_time_to_loss.py --nanogpt FOLDER --text FILE [--seeds 3] [--quick]

FOLDER is a checkout of nanoGPT (its model.py is used), FILE the 1,115,394 bytes of Tiny Shakespeare. The peer is the setting that its README gives for
CPUs: 4 layers, 4 heads, width 128, context 64, batch 12, 2000 iterations, no dropout; its own model, optimizer groups, schedule and sampling of
batches, in a loop without logging. Ours is the shipped recipe shakespeare-char, which may have at most as many parameters.

Both train on the first 90 % of the text and are measured on the same 200 batches of 12 windows, drawn at random from the rest. For each seed nanoGPT
trains first; its final loss is the target, and ours is measured every few steps until it is reached. Clocks run from the first step on and stand still
during the measurements; imports, data and tokens are prepared before. After that the recipe trains once more, for as long as nanoGPT took, to
compare bits per byte after the same time. `ratio`: nanoGPT's seconds over ours; target 8.
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
from typing import Any

import torch
from torch.nn import functional as F

from groundup import jobs
from groundup.core import console
from groundup.training import loop
from groundup.training.signals import StopRequest
from groundup.training.watch import Base

CONTEXT, BATCH, ITERATIONS, BATCHES, TARGET = 64, 12, 2000, 200, 8.0


class Validation:
    """200 batches of windows of the text's last tenth, always the same ones."""

    def __init__(self, tokens: torch.Tensor) -> None:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCHES, BATCH), generator=torch.Generator().manual_seed(1))
        self.windows = tokens[starts[..., None] + torch.arange(CONTEXT + 1)]

    @torch.no_grad()
    def loss(self, logits: Any) -> float:
        """Mean over the batches; `logits` maps tokens [B, T] to [B, T, vocabulary]."""
        found = [F.cross_entropy(logits(w[:, :-1].contiguous()).flatten(0, 1), w[:, 1:].flatten()) for w in self.windows]
        return float(torch.stack(found).mean())


def nanogpt(folder: Path, train: torch.Tensor, validation: Validation, vocabulary: int, seed: int, iterations: int) -> dict[str, Any]:
    """Its train.py's default settings where the README's command does not replace them."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=CONTEXT, vocab_size=vocabulary, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    began = time.perf_counter()
    for k in range(iterations):
        share = (k - 100) / (iterations - 100)
        lr = 1e-3 * (k + 1) / 101 if k < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        x = torch.stack([train[i : i + CONTEXT] for i in starts])
        y = torch.stack([train[i + 1 : i + 1 + CONTEXT] for i in starts])
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    model.eval()

    def logits(x: torch.Tensor) -> torch.Tensor:
        return model(x, x)[0]  # with targets it gives the logits of every position

    return {"seconds": seconds, "loss": validation.loss(logits), "parameters": sum(p.numel() for p in model.parameters())}


class UntilLoss(Base):
    """Times the steps, and measures the model between them with the clock stopped."""

    def __init__(self, validation: Validation, target: float | None) -> None:
        self.validation, self.target = validation, target
        self.seconds, self.reached, self.loss = 0.0, None, math.nan

    def begin(self, state: Any, plan: Any) -> None:
        self.state, self.began = state, time.perf_counter()

    def after_step(self, state: Any, report: Any) -> None:
        self.seconds += time.perf_counter() - self.began
        sought = self.target is not None and self.reached is None and report.step % 5 == 0 and report.step * 2 >= state.total
        if sought or report.step == state.total:
            state.model.eval()
            self.loss = self.validation.loss(state.model)
            state.model.train()
            if self.target is not None and self.reached is None and self.loss <= self.target:
                self.reached = self.seconds
        self.began = time.perf_counter()


def ours(text: Path, validation: Validation | None, seed: int, steps: int | None, target: float | None, folder: Path) -> dict[str, Any]:
    """The shipped recipe; without `validation` the tokens of both splits, and nothing is trained."""
    changes: dict[str, Any] = {"data.source": str(text), "train.seed": seed, "watch.tensorboard": False, "task.sample_tokens": 1}
    if steps is not None:
        changes["train.steps"] = steps
    with console.muted(), StopRequest() as stop:
        resolved, run, _ = jobs.open_run("shakespeare-char", changes, folder / f"run-{time.monotonic_ns()}", resume=False, extend=False)
        job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=Path)
        if validation is None:
            run.close()
            streams: dict[str, Any] = {"train": job.batches.encoded, "validation": job.validation}
            return {name: torch.from_numpy(part.stream.tokens[1:-1].astype("int64")) for name, part in streams.items()}  # without separators
        watch = UntilLoss(validation, target)
        loop.train(job.state, job.batches, job.task, job.plan, job.keeper, None, [watch], stop)
        run.close()
    parameters = sum(p.numel() for p in job.state.model.parameters())
    return {"seconds": watch.seconds, "reached": watch.reached, "loss": watch.loss, "steps": job.state.step, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a folder with nanoGPT's model.py")
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of both trainings, one seed: shows that it runs")
    given = parser.parse_args()
    share = 10 if given.quick else 1
    rows = []
    with tempfile.TemporaryDirectory(prefix="groundup-lm-") as name:
        folder = Path(name)
        found = ours(given.text.resolve(), None, 0, 1, None, folder)
        letters = torch.unique(torch.cat(list(found.values())))  # nanoGPT numbers them from 0; ours has tokens for unseen bytes, too
        theirs = {split: torch.searchsorted(letters, tokens) for split, tokens in found.items()}
        validation, validation_theirs = Validation(found["validation"]), Validation(theirs["validation"])
        print(f"{len(found['train']):,} and {len(found['validation']):,} tokens, {len(letters)} letters; {torch.get_num_threads()} threads")
        for seed in range(1 if given.quick else given.seeds):
            peer = nanogpt(given.nanogpt, theirs["train"], validation_theirs, len(letters), seed, ITERATIONS // share)
            mine = ours(given.text.resolve(), validation, seed, 200 // share if given.quick else None, peer["loss"], folder)
            rows.append((peer, mine))
            when = "not reached" if mine["reached"] is None else f"reached after {mine['reached']:.1f} s"
            print(
                f"seed {seed}: nanoGPT {peer['seconds']:.1f} s, loss {peer['loss']:.4f} ({peer['parameters']:,} parameters); ours {when}, "
                f"all {mine['steps']} steps {mine['seconds']:.1f} s, loss {mine['loss']:.4f} ({mine['parameters']:,} parameters)",
                flush=True,
            )
        peer, mine = rows[0]
        longer = ours(given.text.resolve(), validation, 0, int(mine["steps"] * peer["seconds"] / mine["seconds"]), None, folder)
        print(
            f"after the same time: nanoGPT {peer['loss'] / math.log(2):.4f} bits per byte in {peer['seconds']:.1f} s, ours "
            f"{longer['loss'] / math.log(2):.4f} in {longer['seconds']:.1f} s ({longer['steps']} steps)"
        )
    assert all(m["parameters"] <= p["parameters"] for p, m in rows), "the recipe has more parameters than nanoGPT"
    reached = all(m["reached"] is not None for _, m in rows)
    ratios = [p["seconds"] / m["reached"] if m["reached"] else 0.0 for p, m in rows]
    parts = [
        {
            "name": f"seed {k}", "ours": m["reached"] and round(m["reached"], 2), "peer": round(p["seconds"], 2), "unit": "s", "ratio": round(r, 3),
            "target": TARGET, "met": r >= TARGET, "loss": round(p["loss"], 4), "our_final_loss": round(m["loss"], 4),
        }
        for k, ((p, m), r) in enumerate(zip(rows, ratios))
    ]  # fmt: skip
    bits = {
        "name": "bits per byte after the same time", "ours": round(longer["loss"] / math.log(2), 4), "peer": round(peer["loss"] / math.log(2), 4),
        "unit": "bits/byte", "ratio": round(peer["loss"] / longer["loss"], 3), "target": None, "met": None,
    }  # fmt: skip
    ratio = statistics.median(ratios)
    print(json.dumps({
        "benchmark": "lm_time_to_loss", "ours": round(statistics.median([m["reached"] or m["seconds"] for _, m in rows]), 2),
        "peer": round(statistics.median([p["seconds"] for p, _ in rows]), 2), "unit": "s", "ratio": round(ratio, 3), "target": TARGET,
        "met": reached and ratio >= TARGET, "parts": [*parts, bits],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
