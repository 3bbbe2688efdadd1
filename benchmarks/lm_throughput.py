"""Tokens per second of training a language model: ours, transformers' Trainer, and a bare PyTorch loop, on Llamas of one shape.

    python benchmarks/lm_throughput.py [--sizes 1M,15M,125M] [--busy 2] [--quick]

The same layers, width, heads, vocabulary and tied table; the same windows of the standard library's source; AdamW with decay, clipping at 1 and a
cosine schedule on all sides. The bare loop and the Trainer train transformers' LlamaForCausalLM; the Trainer has its own defaults otherwise (it logs
every 10 steps as we do; no checkpoints, no evaluation). Ours is `groundup train` with all its watchers, on our own decoder in Llama's form.

Each turn is a fresh process; sides take turns, and the median step of a turn counts (warm-up steps left out). In our turns the peak of this machine's
matrix products is measured between the steps; the FLOPs of a token are 6 per weight of a matrix plus attention's.

    targets: 2 x the Trainer at 1M; never below the bare loop; at 125M at least 65 % of the measured peak

    pip install accelerate      (for the Trainer's side; without it that side is left out)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

# batch, context, vocabulary, counted steps of a turn, warm-up steps, turns
CASES = {"1M": (12, 64, 1024, 200, 20, 5), "15M": (8, 256, 4096, 6, 2, 3), "125M": (4, 512, 8192, 2, 1, 3)}
SIDES = ("ours", "bare", "trainer")
LR, DECAY, CLIP = 3e-4, 0.1, 1.0


def write_text(path: Path, size: int = 6_000_000) -> None:
    """Source of the standard library, always the same."""
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            with contextlib.suppress(UnicodeDecodeError):
                size -= file.write(source.read_text(encoding="utf-8"))
            if size < 0:
                return


def job_of(size: str, folder: Path, steps: int) -> Any:
    from groundup import jobs
    from groundup.core import console

    batch, context, vocabulary, *_ = CASES[size]
    recipe = {
        "name": f"lm-throughput-{size}",
        "task": {"name": "language-modeling", "context": context, "vocabulary": vocabulary, "prompts": []},
        "data": {"source": str(folder / "text.txt"), "split": {"validation": 0.05, "test": 0.0, "by": "contiguous"}, "text": {"near_duplicates": None}},
        "model": {"name": "decoder", "size": size, "qk_norm": False},
        "optim": {"name": "adamw", "lr": LR, "weight_decay": DECAY},
        "schedule": {"name": "cosine", "warmup": 0.0},
        "train": {"steps": steps, "batch_size": batch, "micro_batch_size": batch, "clip_norm": CLIP, "device": "cpu", "save_every": "10h", "keep": "last"},
        "evaluate": {"every": 10**9},
    }  # fmt: skip
    with console.muted():
        resolved, run, _ = jobs.open_run(recipe, {}, folder / f"run-{time.monotonic_ns()}", resume=False, extend=False)
        return jobs.build(resolved, run, resume=False, trust_code=False, train_base=Path)


def llama(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.width, intermediate_size=model.hidden, num_hidden_layers=len(model.model.layers),
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, max_position_embeddings=model.context, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windows_of(job: Any, count: int) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(job.batches.encoded.stream.fetch(np.arange(count), job.task.context)[0])


def ours(job: Any, warm: int) -> dict[str, Any]:
    import torch

    from groundup.core import console, device
    from groundup.training import loop
    from groundup.training.signals import StopRequest
    from groundup.training.watch import Base, build_watchers

    class Clock(Base):
        """A step's time, from one `after_step` to the next; now and then the machine's peak, with the clock stopped."""

        times: list[float] = []
        peaks: list[float] = []

        def begin(self, state: Any, plan: Any) -> None:
            self.began = time.perf_counter()

        def after_step(self, state: Any, report: Any) -> None:
            self.times.append(time.perf_counter() - self.began)
            if report.step % max(1, state.total // 4) == 0:
                self.peaks.append(device.matmul_peak(torch.device("cpu"), torch.float32))
            self.began = time.perf_counter()

    clock = Clock()
    with console.muted(), StopRequest() as stop:
        watchers = [*build_watchers(job.run, metric=job.plan.metric, tensorboard=True, profile=0, trackers=[]), clock]
        loop.train(job.state, job.batches, job.task, job.plan, job.keeper, None, watchers, stop)
        for watcher in watchers:
            watcher.end()
    return {"times": clock.times[warm:], "peak": statistics.median(clock.peaks), "flops": job.plan.flops_per_token}


def bare(job: Any, warm: int) -> dict[str, Any]:
    import torch

    model, steps, batch = llama(job.state.model), job.state.total, job.batches.batch_size
    windows = windows_of(job, min(steps * batch, len(job.batches.encoded)))
    matrices, rest = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LR, fused=True)
    times = []
    model.train()
    for step in range(steps):
        began = time.perf_counter()
        x = windows[torch.arange(step * batch, (step + 1) * batch) % len(windows)]
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter() - began)
    return {"times": times[warm:]}


def trainer(job: Any, warm: int) -> dict[str, Any]:
    import transformers

    windows = windows_of(job, min(job.state.total * job.batches.batch_size, len(job.batches.encoded)))
    rows = [{"input_ids": row, "labels": row} for row in windows]

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.times.append(now - self.began)
            self.began = now

    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="groundup-trainer-"), per_device_train_batch_size=job.batches.batch_size, max_steps=job.state.total,
        learning_rate=LR, weight_decay=DECAY, max_grad_norm=CLIP, lr_scheduler_type="cosine", logging_steps=10, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        transformers.Trainer(llama(job.state.model), arguments, train_dataset=rows, callbacks=[clock]).train()
    return {"times": clock.times[warm:]}


def turn(side: str, size: str, folder: Path, share: int) -> dict[str, Any]:
    """One side in a process of its own: its median step in seconds."""
    command = [sys.executable, __file__, "--turn", side, "--sizes", size, "--folder", str(folder), "--share", str(share)]
    environment = {**os.environ, "GROUNDUP_CACHE": str(folder / "cache"), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    if side != "ours":
        environment.setdefault("GOMP_SPINCOUNT", "300000")  # GNU OpenMP's own, which others have: importing groundup sets a smaller one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the turn of {side} at {size} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, folder: Path, quick: bool, turns: int | None) -> dict[str, Any]:
    batch, context, *_, usual = CASES[size]
    sides = [s for s in SIDES if s != "trainer" or _has_accelerate()]
    steps: dict[str, list[float]] = {s: [] for s in sides}
    shares = []
    for _ in range(1 if quick else turns or usual):
        for side in sides:
            found = turn(side, size, folder, 20 if quick else 1)
            steps[side].append(statistics.median(found["times"]))
            if side == "ours":
                shares.append(found["flops"] * batch * context / steps[side][-1] / found["peak"])
    rate = {s: batch * context / statistics.median(t) for s, t in steps.items()}
    mfu = statistics.median(shares)
    print(f"{size}: " + ", ".join(f"{s} {r:,.0f} tokens/s" for s, r in rate.items()) + f"; ours {mfu:.0%} of the matmul peak", flush=True)
    facts = {"ours_tokens_per_s": round(rate["ours"], 1), "share_of_matmul_peak": round(mfu, 3)}
    parts = []
    for side in sides[1:]:
        ratio = statistics.median(p / o for p, o in zip(steps[side], steps["ours"]))
        target = 2.0 if (side, size) == ("trainer", "1M") else 1.0
        parts.append({"name": f"{size}, {side}", "ours": round(statistics.median(steps["ours"]), 4), "peer": round(statistics.median(steps[side]), 4),
                      "unit": "s/step", "ratio": round(ratio, 3), "target": target, "met": ratio >= target, **facts})  # fmt: skip
    if size == "125M":
        parts.append({"name": "125M, share of the matmul peak", "ours": round(mfu, 3), "peer": None, "unit": "share", "ratio": round(mfu, 3), "target": 0.65,
                      "met": mfu >= 0.65})  # fmt: skip
    return {"parts": parts}


def _has_accelerate() -> bool:
    import importlib.util

    return importlib.util.find_spec("accelerate") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(CASES))
    parser.add_argument("--quick", action="store_true", help="a few steps at 1M: shows that it runs, too few to judge by")
    parser.add_argument("--turns", type=int, help="of each side")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other processes that want a core at the same time")
    parser.add_argument("--turn", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        *_, counted, warm, _ = CASES[given.sizes]
        job = job_of(given.sizes, given.folder, warm + max(4, counted // given.share) if counted > 4 else warm + counted)
        print(json.dumps({"ours": ours, "bare": bare, "trainer": trainer}[given.turn](job, warm)))
        return
    if not _has_accelerate():
        print("the Trainer's side is left out: pip install accelerate")
    with tempfile.TemporaryDirectory(prefix="groundup-lm-") as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        beside = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"]) for _ in range(given.busy)]
        try:
            parts = [part for size in (["1M"] if given.quick else given.sizes.split(",")) for part in measure(size, folder, given.quick, given.turns)["parts"]]
        finally:
            for other in beside:
                other.kill()
    worst = min(parts, key=lambda p: p["ratio"] / p["target"])
    top = {k: worst[k] for k in ("ours", "peer", "unit", "ratio", "target")}
    print(json.dumps({"benchmark": "lm_throughput", **top, "met": all(p["met"] for p in parts), "parts": parts}))


if __name__ == "__main__":
    main()
