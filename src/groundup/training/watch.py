"""What watches a training: console, metrics.jsonl, TensorBoard, profiler. They read the rows that the loop hands out, nothing more."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch

from groundup.core import console, units
from groundup.core.device import memory_in_use
from groundup.core.errors import RecipeError
from groundup.core.messages import say
from groundup.core.registry import load_user_module
from groundup.core.run import RunFolder
from groundup.training.loop import Plan, Report, Watcher
from groundup.training.state import TrainState

WALL_CLOCK = ("samples_per_s", "tokens_per_s", "mfu", "seconds", "memory")  # the fields of a row that no two runs share


class Base:
    """A watcher that watches nothing; the others override what they need."""

    def begin(self, state: TrainState, plan: Plan) -> None:
        pass

    def after_step(self, state: TrainState, report: Report) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        pass

    def end(self) -> None:
        pass


class Timer(Base):
    """Adds speed, elapsed seconds and memory to training rows; first in the list, so that the others see them."""

    def begin(self, state: TrainState, plan: Plan) -> None:
        self.device = str(plan.device)
        self.start = self.last = time.monotonic()
        self.stepping = 0.0  # seconds of steps since the last row of training: evaluations and checkpoints are not training speed
        self.samples, self.tokens, self.plan = state.samples, state.tokens, plan

    def after_step(self, state: TrainState, report: Report) -> None:
        now = time.monotonic()
        self.stepping, self.last = self.stepping + now - self.last, now

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            took, self.stepping = max(self.stepping + time.monotonic() - self.last, 1e-9), 0.0  # with what the host waited for the device
            row["samples_per_s"] = round((row["samples"] - self.samples) / took, 1)
            row["seconds"], row["memory"] = round(time.monotonic() - self.start, 3), memory_in_use(self.device)
            self.samples = row["samples"]
            if "tokens" in row:
                row["tokens_per_s"] = round((row["tokens"] - self.tokens) / took, 1)
                self.tokens = row["tokens"]
                if self.plan.peak_flops:
                    row["mfu"] = round(row["tokens_per_s"] * self.plan.flops_per_token / self.plan.peak_flops, 4)
        self.last = time.monotonic()


class Jsonl(Base):
    """metrics.jsonl: one row per log and per evaluation."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] in ("train", "evaluate", "sample"):
            self.run.metrics.append(row)

    def end(self) -> None:
        self.run.metrics.close()


class Console(Base):
    """Live progress on a terminal or in a notebook; plain lines at growing distances elsewhere."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def begin(self, state: TrainState, plan: Plan) -> None:
        self.total, self.first, self.start = state.total, state.step, time.monotonic()
        self.paused = 0.0
        self.progress = console.Progress(say("training", "训练"), state.total, state.step)

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            done = row["step"] - self.first
            per_step = (time.monotonic() - self.start) / max(done, 1)
            eta = units.human_seconds(per_step * (self.total - row["step"])) if done >= 5 else "--"
            text = (
                f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  |g| {row['grad_norm']:.2f}  {self._speed(row)}  "
                f"{row['memory'] / 2**20:,.0f} MiB  eta {eta}"
            )
            self.progress.update(row["step"], text)
        elif row["kind"] == "evaluate":
            value = row[self.metric]
            best = say("  (best so far)", "  （目前最好）") if row["best"] else ""
            self.progress.line(
                say(
                    "step {step}: validation {metric} {value:.4f}, loss {loss:.4f}",
                    "第 {step} 步：验证集 {metric} {value:.4f}，损失 {loss:.4f}",
                    step=row["step"],
                    metric=self.metric,
                    value=value,
                    loss=row["loss"],
                )
                + best
            )
        elif row["kind"] == "sample":
            text = " ".join(f"{row['prompt']}{row['text']}".split())
            self.progress.line(say("  sample: {text}", "  样例：{text}", text=text[:200]))
        elif row["kind"] == "checkpoint_failed":
            self.progress.line(
                say(
                    "! checkpoint of step {step} could not be written: {cause}. Training goes on; the one before it is untouched.",
                    "! 第 {step} 步的检查点未能写入：{cause}。训练继续；上一个检查点完好。",
                    step=row["step"],
                    cause=row["cause"],
                ),
                important=True,
            )

    @staticmethod
    def _speed(row: dict[str, Any]) -> str:
        if "tokens_per_s" not in row:
            return f"{row['samples_per_s']:,.0f}/s"
        return f"{row['tokens_per_s']:,.0f} tok/s" + (f"  MFU {row['mfu']:.0%}" if row.get("mfu", 2) <= 1 else "")

    def end(self) -> None:
        if hasattr(self, "progress"):
            self.progress.close()


class TensorBoard(Base):
    """TensorBoard event files. The format is imported when the first row comes: it takes longer than many a first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self.broken = False

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] not in ("train", "evaluate") or self.broken:
            return
        # tensorboard's own record format and protocol buffers, written here at once: torch.utils.tensorboard takes two seconds to import,
        # and tensorboard's event writer has a thread that ends with a traceback when the disk is full.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            if self.writer is None:
                self.folder.mkdir(exist_ok=True)
                name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
                self.writer = RecordWriter(open(self.folder / name, "wb", buffering=0))
                self.writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            names = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "epoch", "best")}
            values = [Summary.Value(tag=f"{row['kind']}/{k}", simple_value=float(v)) for k, v in names.items()]
            self.writer.write(Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values)).SerializeToString())
        except OSError:
            self.broken = True  # a half record ends what TensorBoard reads of this file: nothing more is added to it

    def end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Profile(Base):
    """A profiler trace of the first steps after two warm ones: profile.json opens in Perfetto or chrome://tracing."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.profiler: Any = None
        self.seen = 0

    def after_step(self, state: TrainState, report: Report) -> None:
        self.seen += 1
        if self.seen == 2:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self.profiler.start()
        elif self.seen == 2 + self.steps:
            self._write()

    def _write(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler = None

    def end(self) -> None:
        self._write()


def user_watcher(spec: str, run: RunFolder) -> Watcher:
    """A tracker of the user's, `path/to/file.py:Name`: built with the run folder's path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise RecipeError(
            "watch.trackers: '{spec}' is not path/to/file.py:Name", "watch.trackers：'{spec}' 应写作 path/to/file.py:名字", spec=spec
        )
    target = getattr(load_user_module(Path(path)), name, None)
    if target is None:
        raise RecipeError("{path} has no '{name}'", "{path} 里没有 '{name}'", path=path, name=name)
    made: Watcher = target(run.path)
    return made


def build_watchers(run: RunFolder, *, metric: str, tensorboard: bool, profile: int, trackers: list[str]) -> list[Watcher]:
    """The watchers of a run, the timer first."""
    watchers: list[Watcher] = [Timer(), Jsonl(run), Console(metric)]
    if tensorboard and importlib.util.find_spec("tensorboard"):
        watchers.append(TensorBoard(run.path / "tensorboard"))
    if profile:
        watchers.append(Profile(run.path / "profile.json", profile))
    return watchers + [user_watcher(spec, run) for spec in trackers]
