"""A task over a split: whole batches, metrics streamed, nothing kept of the records."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from groundup.core import console
from groundup.core.messages import say
from groundup.data.streaming import StreamedImages
from groundup.evaluation.records import Records, judge
from groundup.metrics import MetricSet, SummedMetrics
from groundup.tasks.base import Batch, Encoded, Task


class Sharers(Protocol):
    """The processes of a training (`training.parallel.Ranks`)."""

    rank: int
    world: int

    def gather(self, rows: Tensor) -> list[Tensor]: ...


def in_order(task: Task, encoded: Encoded, batch_size: int, device: torch.device, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Every record once, in order, not augmented: for evaluation. With several processes each has one of `world` batches in turn, at the end the last one,
    so that all have equally many."""
    cuts = [np.arange(s, min(s + batch_size, len(encoded))) for s in range(0, len(encoded), batch_size)]
    cuts = [cuts[min(k + rank, len(cuts) - 1)] for k in range(0, len(cuts), world)]
    if isinstance(encoded.inputs, StreamedImages):
        nothing: Any = np.zeros(0, dtype=np.int64)
        encoded.inputs.follow(lambda k: cuts[k] if k < len(cuts) else nothing, 0)
    for cut in cuts:
        yield task.batch(encoded, torch.from_numpy(cut).to(device), training=False, rng=None)


@contextlib.contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, without gradients unless asked for; every module's own mode is put back (frozen parts stay in evaluation mode)."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(
    task: Task,
    model: nn.Module,
    encoded: Encoded,
    device: torch.device,
    *,
    batch_size: int | None = None,
    intervals: bool = True,
    stop: Callable[[], bool] = lambda: False,
    records: Records | None = None,
    sharers: Sharers | None = None,
) -> MetricSet | None:
    """The metrics of a split, or None where `stop` asked to leave in the middle.

    Args:
        batch_size: records of one forward pass (default: the task's own number); the values do not depend on it beyond rounding.
        intervals: also gather what confidence intervals need.
        records: filled with what is kept of each record.
        sharers: processes that do this at the same time; of metrics that are sums each computes a part, and all have the whole.
    """
    metrics = task.metrics_of(encoded)
    metrics.resampling = intervals
    size, begin, bar = batch_size or task.evaluated_at_once(encoded, device), time.monotonic(), None
    rank, world = (sharers.rank, sharers.world) if sharers and isinstance(metrics, SummedMetrics) else (0, 1)
    with evaluating(model), contextlib.ExitStack() as stack:
        for k, batch in enumerate(in_order(task, encoded, size, device, rank, world)):
            if stop():
                return None
            if sharers and world > 1 and isinstance(metrics, SummedMetrics):
                metrics.gather = functools.partial(_of_this_turn, sharers, -(-len(encoded) // size) - k * world)
            if bar is None and time.monotonic() - begin > 2:
                bar = console.Progress(say("evaluating", "正在评估"), len(encoded))
                stack.callback(bar.close)
            if bar is not None:
                bar.update(k * world * size, "")
            outputs = task.score(model, batch, metrics)
            if records is not None and (judged := judge(task, outputs, batch)) is not None:
                records.add(judged)
    return metrics


def _of_this_turn(sharers: Sharers, batches: int, rows: Tensor) -> list[Tensor]:
    """Of so many batches that were left, so that in the last turn none counts twice."""
    return sharers.gather(rows)[:batches]


def summary(metrics: MetricSet) -> dict[str, Any]:
    """Values, 95 % intervals and tables, JSON-able."""
    return {"metrics": metrics.compute(), "intervals": {k: list(v) for k, v in metrics.intervals().items()}, **metrics.details()}
