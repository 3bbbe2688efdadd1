"""The loop: one for everything.

    while True:
        evaluate, where it is due       decides the best weights and early stopping
        save, where it is due           a checkpoint is exactly the TrainState
        leave, when done or asked to
        step                            micro-batches -> loss / count -> backward -> clip -> finite? -> update -> average
        log, where it is due            the only place where numbers leave the device

Methods (frozen parts, adapters) change the model before the loop, tasks give the loss, watchers read. Nothing else takes part.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from groundup.core import files
from groundup.core.errors import GroundupError, Stopped, TrainError
from groundup.core.messages import cause_of, language, say
from groundup.core.recipe import EarlyStopping, Schedule
from groundup.core.run import RunFolder
from groundup.evaluation.evaluate import evaluate
from groundup.metrics import MetricSet
from groundup.models import fused
from groundup.models.language import LanguageModel
from groundup.tasks.base import Encoded, Task
from groundup.training.batches import Batches
from groundup.training.checkpoint import Checkpoints, load_weights
from groundup.training.optim import masked_step, set_learning_rate
from groundup.training.parallel import AgreedStop, Ranks
from groundup.training.schedule import factor
from groundup.training.signals import StopRequest
from groundup.training.state import Snapshot, TrainState, update_ema

OVERFLOWS = 30  # fp16 updates skipped in a row before the run stops: the scale has fallen by 2**30 by then


@dataclass
class Stage:
    """A part of the run with its own frozen parts.

    Args:
        begin: the share of the run at which it begins.
        frozen: modules that are not trained, and stay in evaluation mode (their BatchNorm statistics and dropout are off); and single
            parameters, whose modules hold others that are trained.
    """

    begin: float
    frozen: Sequence[nn.Module | nn.Parameter] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """The frozen modules."""
        return [part for part in self.frozen if isinstance(part, nn.Module)]

    def enter(self, model: nn.Module) -> None:
        """Trains everything but the frozen parts."""
        still = {id(p) for part in self.frozen for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in still)
        model.train()
        for module in self.modules:
            module.eval()


@dataclass
class Plan:
    """What the loop needs of the recipe, with every `auto` resolved.

    Args:
        evaluate_at: steps at which the validation split is evaluated; the last step always is.
        save_steps, save_seconds: one of both, how often a checkpoint is due.
        stages: what is frozen when, by rising `begin`; a function of the step, so that a resumed run needs nothing else.
        flops_per_token: of training a language model; peak_flops: what the device does at most, per second; their ratio is the MFU.
    """

    device: torch.device
    dtype: torch.dtype
    schedule: Schedule
    clip_norm: float | None
    ema: float | None
    log_every: int
    steps_per_epoch: float
    evaluate_every: float
    metric: str
    higher_is_better: bool
    early_stopping: EarlyStopping | None
    save_steps: int | None
    save_seconds: float | None
    keep: str
    stages: Sequence[Stage] = (Stage(0.0),)
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    ranks: Ranks = field(default_factory=Ranks)

    def stage(self, step: int, total: int) -> Stage:
        return [s for s in self.stages if s.begin * total <= step + 1e-9][-1]

    def evaluates(self, step: int, total: int) -> bool:
        """Whether `step` is the first one at or past a multiple of `evaluate_every`."""
        return step > 0 and (
            step >= total or math.floor(step / self.evaluate_every + 1e-9) > math.floor((step - 1) / self.evaluate_every + 1e-9)
        )


@dataclass
class Report:
    """One step, still on the device: reading a tensor here makes the host wait."""

    step: int
    lr: float
    grad_norm: Tensor
    loss_sum: Tensor
    count: int | Tensor


class Watcher(Protocol):
    """Reads what happens; never writes state."""

    def begin(self, state: TrainState, plan: Plan) -> None: ...
    def after_step(self, state: TrainState, report: Report) -> None: ...
    def row(self, row: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass
class Keeper:
    """Writes checkpoints when they are due, and survives a disk that is full.

    `best_weights` holds the best weights in memory where their checkpoint could not be written; `scores` are those of the last evaluation and its step, `evaluating` the seconds
    that all of them took.
    """

    checkpoints: Checkpoints
    run: RunFolder
    plan: Plan
    saved_at: int = -1
    failed_at: int = -1
    failure: str | None = None
    best_weights: dict[str, Tensor] | None = None
    scores: tuple[int, MetricSet] | None = None
    evaluating: float = 0.0  # seconds
    _time: float = field(default_factory=time.monotonic)

    def due(self, state: TrainState, done: bool, improved: bool) -> bool:
        if state.step in (self.saved_at, self.failed_at) or state.step == 0:
            return False
        if done or (improved and self.plan.keep == "best"):
            return True
        if self.plan.save_steps is not None:
            return state.step % self.plan.save_steps == 0
        return time.monotonic() - self._time >= (self.plan.save_seconds or 60.0)

    def save(self, state: TrainState, watchers: Sequence[Watcher]) -> bool:
        """Returns whether it was written; a failure is an event and a warning, and the training goes on."""
        if self.plan.ranks.rank:
            self.saved_at = state.step
            return True
        begin = self._time = time.monotonic()
        try:
            self.checkpoints.save(state)
        except OSError as error:
            self.failure, self.failed_at = cause_of(error, language()), state.step
            with contextlib.suppress(OSError):
                needed = sum(t.numel() * t.element_size() for t in (*state.model.state_dict().values(), *state.tensors()[0].values()))
                free = shutil.disk_usage(self.run.path).free
                self.failure += say("; it needs {n}, {m} are free", "；需要 {n}，剩余 {m}", n=files.human_bytes(needed), m=files.human_bytes(free))
            if state.best_step == state.step:
                self.best_weights = {n: t.clone() for n, t in (state.ema or state.model.state_dict()).items()}
            self._tell(state, watchers, "checkpoint_failed", cause=self.failure)
            return False
        if state.best_step == state.step:
            self.best_weights = None
        self.saved_at, self.failure = state.step, None
        self._tell(state, watchers, "checkpoint", seconds=round(time.monotonic() - begin, 3))
        return True

    def _tell(self, state: TrainState, watchers: Sequence[Watcher], kind: str, **facts: Any) -> None:
        self.run.event(kind, step=state.step, **facts)
        for watcher in watchers:
            watcher.row({"kind": kind, "step": state.step, **facts})


@contextlib.contextmanager
def _long_lived() -> Iterator[None]:
    """What is there now stays to the end: looking through it for garbage would take longer than a short step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_long_lived()
def train(
    state: TrainState,
    batches: Batches,
    task: Task,
    plan: Plan,
    keeper: Keeper,
    validation: Encoded | None,
    watchers: Sequence[Watcher],
    stop: StopRequest,
) -> TrainState:
    """Trains until the schedule's end, early stopping, or a request to stop (after saving).

    Raises:
        TrainError: a non-finite loss or gradient; the weights are those before it.
        Stopped: SIGINT or SIGTERM, with a checkpoint of this step on the disk.
    """
    if plan.ranks.world > 1:
        stop = AgreedStop(stop, plan.ranks)  # type: ignore[assignment]
    batches.start(state.step)
    recent: deque[int] = deque(maxlen=max(plan.log_every, 1) + 1)  # the steps since the host last read, for naming a bad batch
    for watcher in watchers:
        watcher.begin(state, plan)
    stage: Stage | None = None  # entered once: an evaluation puts every module's mode back
    while True:
        last = state.step >= state.total
        improved = False
        if validation is not None and plan.evaluates(state.step, state.total) and state.evaluated_at != state.step and not stop():
            began = time.monotonic()
            metrics = _evaluate(state, task, plan, validation, stop, watchers)
            keeper.evaluating += time.monotonic() - began
            if metrics is not None:
                keeper.scores = (state.step, metrics)
                improved = _judge(state, plan, metrics, watchers)
        done = last or state.stopped_early
        if (keeper.due(state, done, improved) or stop()) and state.step > 0 and state.step != keeper.saved_at:
            _raise_if_bad(state, batches, recent, keeper)
            keeper.save(state, watchers)
        if done:
            return state
        if stop():
            raise _stopped(state, stop, keeper)
        if (now := plan.stage(state.step, state.total)) is not stage:
            stage = now
            stage.enter(state.model)
        report = step(state, batches, task, plan)
        recent.append(report.step)
        if plan.device.type == "cpu" or report.step % plan.log_every == 0:  # on the CPU reading costs nothing
            _raise_if_bad(state, batches, recent, keeper)
        for watcher in watchers:
            watcher.after_step(state, report)
        if report.step % plan.log_every == 0 or report.step == state.total:
            _log(state, plan, report, watchers)


def step(state: TrainState, batches: Batches, task: Task, plan: Plan) -> Report:
    """One optimizer step: all its micro-batches, one update.

    The gradient is that of (sum of all losses) / (count of all supervised items of the step), however it is cut into micro-batches; only the loss that
    balances experts is of each micro-batch by itself.
    """
    model = state.model
    lr = set_learning_rate(state.optimizers, factor(plan.schedule, state.step, state.total))
    trained = [p for optimizer in state.optimizers for group in optimizer.param_groups for p in group["params"]]
    for p in trained:
        p.grad = None
    loss_sum: Tensor | None = None
    count: int | Tensor = 0
    for batch in batches.micro(state.step):
        with mixed_precision(plan):
            loss = task.loss(model, batch)
        # The count of the whole step is not known yet: divide by the samples, and correct below where the count is another.
        scaled = loss.sum / batches.batch_size
        (scaled if state.scaler is None else state.scaler.scale(scaled)).backward()
        loss_sum = loss.sum.detach() if loss_sum is None else loss_sum + loss.sum.detach()
        count = count + loss.count
    assert loss_sum is not None

    if plan.ranks.world > 1:
        loss_sum, count = _over_ranks(model, plan.ranks, loss_sum, count)
    if state.scaler is not None:
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
    norm = _adjust(model, trained, batches.batch_size, count, plan.clip_norm)
    if state.scaler is not None or plan.device.type == "cpu":  # the host decides: fp16 scaling waits anyway, on the CPU reading is free
        finite = math.isfinite(float(norm)) and math.isfinite(float(loss_sum))
        if state.scaler is not None:
            _scaled_step(state, finite)
        elif finite:
            for optimizer in state.optimizers:
                optimizer.step()
        else:
            state.first_bad.fill_(state.step + 1)
        if finite:
            state.window += state.window.new_tensor([float(loss_sum), float(count)])
    else:  # the device decides, and the host does not wait
        good = torch.isfinite(norm) & torch.isfinite(loss_sum)
        masked_step(state.optimizers, good)
        state.first_bad.copy_(torch.where((state.first_bad < 0) & ~good, state.step + 1, state.first_bad))
        state.window += torch.where(good, torch.stack([loss_sum.to(state.window), torch.as_tensor(count).to(state.window)]), 0)
    state.step += 1
    state.samples += batches.batch_size
    state.tokens += batches.batch_size * task.tokens_per_sample
    if plan.ema is not None:
        update_ema(state, plan.ema)
    return Report(state.step, lr, norm, loss_sum, count)


def _adjust(model: nn.Module, trained: list[nn.Parameter], assumed: int, count: int | Tensor, most: float | None) -> Tensor:
    """Gradients per item instead of per `assumed` items, shortened to the norm `most`; returns the norm before that. Without items they are zero."""
    count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    parameters = [p for p in trained if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Language models have use for the kernels anyway: for others they would be compiled for this alone.
    kernels = isinstance(model, LanguageModel) and isinstance(count, int) and all(g.is_contiguous() for g in gradients)
    if kernels and fused.takes(*gradients):
        assert isinstance(count, int)
        return fused.adjust_(gradients, assumed / count, most)
    if isinstance(count, Tensor) or count != assumed:
        torch._foreach_mul_(gradients, assumed / count)
    norm = torch.nn.utils.get_total_norm(gradients)
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def _over_ranks(model: nn.Module, ranks: Ranks, loss_sum: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Gradients, loss and count summed over all ranks, and whether one of them was asked to stop."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    facts = torch.stack(
        [loss_sum.float(), torch.as_tensor(count).to(loss_sum).float(), loss_sum.new_full((), float(ranks.wants_stop)).float()]
    )
    ranks.sum_([p.grad for p in model.parameters() if p.grad is not None] + [facts])
    ranks.stopping = bool(facts[2] > 0)
    return facts[0], facts[1]


def mixed_precision(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """Autocast to the plan's precision; nothing at all for float32."""
    return contextlib.nullcontext() if plan.dtype == torch.float32 else torch.autocast(plan.device.type, plan.dtype)


def _scaled_step(state: TrainState, finite: bool) -> None:
    """fp16: an overflow of the scaled gradients skips the update and lowers the scale; many in a row stop the run."""
    assert state.scaler is not None
    for optimizer in state.optimizers:
        state.scaler.step(optimizer)  # skips by itself where its gradients overflowed
    state.scaler.update()
    if finite:
        state.overflows = 0
        return
    state.overflows += 1
    state.skipped += 1
    if state.overflows >= OVERFLOWS:
        state.first_bad.fill_(state.step + 1)


def rehearse(state: TrainState, batches: Batches, task: Task, plan: Plan) -> float:
    """One full-size forward and backward pass before step 1, then everything is put back: errors of memory and shape come in the first
    seconds. Returns the seconds of a step by a second pass (the first one also allocates); of several micro-batches one stands for all."""
    before = Snapshot.take(state.model)
    elapsed = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        state.model.train()
        with mixed_precision(plan):
            loss = task.loss(state.model, next(batches.micro(state.step)))
        loss.sum.backward()
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = (time.perf_counter() - begin) * batches.per_step
    state.model.zero_grad(set_to_none=True)
    before.put_back(state.model)
    return elapsed


def _evaluate(
    state: TrainState, task: Task, plan: Plan, validation: Encoded, stop: StopRequest, watchers: Sequence[Watcher]
) -> MetricSet | None:
    """Metrics and samples of the weights that would be kept: the averaged ones where there are any."""
    own = None if state.ema is None else {n: t.clone() for n, t in state.model.state_dict().items()}
    if state.ema is not None:
        load_weights(state.model, state.ema)
    try:
        metrics = evaluate(task, state.model, validation, plan.device, intervals=task.kind == "text", stop=stop, sharers=plan.ranks)
        for sample in task.samples(state.model) if metrics is not None else ():
            for watcher in watchers:
                watcher.row({"kind": "sample", "step": state.step, **sample})
        return metrics
    finally:
        if own is not None:
            load_weights(state.model, own)


def _judge(state: TrainState, plan: Plan, metrics: MetricSet, watchers: Sequence[Watcher]) -> bool:
    """Writes the evaluation's row, remembers the best, decides on early stopping. Returns whether this is the best so far."""
    values = metrics.compute()
    spread = {f"{k}_interval": list(v) for k, v in metrics.intervals().items() if k == plan.metric}
    state.evaluated_at = state.step
    value = values[plan.metric]
    sign = 1 if plan.higher_is_better else -1
    improved = not math.isnan(value) and (state.best_step < 0 or math.isnan(state.best_value) or sign * value > sign * state.best_value)
    delta = plan.early_stopping.min_delta if plan.early_stopping else 0.0
    enough = improved and (state.best_step < 0 or sign * (value - state.best_value) > delta)
    state.bad_evaluations = 0 if enough else state.bad_evaluations + 1
    if improved:
        state.best_step, state.best_value = state.step, value
    if plan.early_stopping and state.bad_evaluations >= plan.early_stopping.patience:
        state.stopped_early = True
    row = {
        "kind": "evaluate",
        "step": state.step,
        "epoch": round(state.step / plan.steps_per_epoch, 4),
        "split": "validation",
        **values,
        **spread,
        "best": improved,
    }
    for watcher in watchers:
        watcher.row(row)
    return improved


def _log(state: TrainState, plan: Plan, report: Report, watchers: Sequence[Watcher]) -> None:
    loss_sum, count = state.window.tolist()
    state.window.zero_()
    row = {
        "kind": "train",
        "step": state.step,
        "epoch": round(state.step / plan.steps_per_epoch, 4),
        "samples": state.samples,
        "loss": loss_sum / count if count else float("nan"),
        "lr": report.lr,
        "grad_norm": float(report.grad_norm),
    }
    if state.tokens:
        row["tokens"] = state.tokens
    if state.scaler is not None:
        row |= {"scale": state.scaler.get_scale(), "skipped": state.skipped}
    for watcher in watchers:
        watcher.row(row)


def _raise_if_bad(state: TrainState, batches: Batches, recent: deque[int], keeper: Keeper) -> None:
    """Stops at a non-finite loss or gradient. The update was not made; the batch is named."""
    bad = int(state.first_bad)
    if bad < 0:
        return
    run, records, culprits = keeper.run, batches.records(bad - 1), batches.unusable(bad - 1)
    report = run.path / f"nonfinite-{bad:06d}.json"
    facts = {
        "step": bad,
        "records": records,
        "records_with_nonfinite_values": culprits,
        "recent_steps": list(recent),
        "lr_factor_of_step": bad - 1,
    }
    run.event("nonfinite", step=bad, records=culprits or records[:10])
    try:
        files.write_json(report, facts)
    except OSError:
        report = run.path / "events.jsonl"
    overflow = state.scaler is not None
    named = culprits or records
    raise TrainError(
        "the loss or its gradient is not finite at step {step}, whose update was not made; {last}; {kept}. "
        + ("Records with NaN or infinite values: " if culprits else "The batch: ")
        + "{named}",
        "第 {step} 步的损失或梯度不是有限值，这一步没有更新权重；{last_zh}；{kept_zh}。"
        + ("含 NaN 或无穷大的记录：" if culprits else "该批次：")
        + "{named}",
        step=bad,
        kept=f"the last checkpoint is of step {keeper.saved_at}" if keeper.saved_at > 0 else "there is no checkpoint yet",
        kept_zh=f"最近的检查点是第 {keeper.saved_at} 步" if keeper.saved_at > 0 else "还没有检查点",
        last=f"{OVERFLOWS} fp16 updates in a row overflowed" if overflow else f"all of the batch is in {report}",
        last_zh=f"连续 {OVERFLOWS} 次 fp16 更新溢出" if overflow else f"整个批次见 {report}",
        named=", ".join(named[:5]) + (", ..." if len(named) > 5 else ""),
        fix="groundup data check on the records above; or a lower --set optim.lr=..., --set train.clip_norm=1, --set train.precision=float32",
        fix_zh="先用 groundup data check 检查上述记录；或减小 --set optim.lr=...，--set train.clip_norm=1，--set train.precision=float32",
    )


def _stopped(state: TrainState, stop: StopRequest, keeper: Keeper) -> GroundupError:
    keeper.run.event("stopped", signal=stop.name, step=state.step)
    saved = keeper.saved_at == state.step
    if state.step and not saved:
        steps = keeper.checkpoints.steps()
        where = f"step {steps[-1]}" if steps else "the beginning"
        where_zh = f"第 {steps[-1]} 步" if steps else "开头"
        return Stopped(
            "stopped by {signal} at step {step}; its checkpoint could NOT be written ({cause}), so resuming starts from {where}",
            "在第 {step} 步被 {signal} 停止；检查点未能写入（{cause}），恢复时将从{where_zh}继续",
            exit_status=stop.exit_status,
            signal=stop.name,
            step=state.step,
            cause=keeper.failure,
            where=where,
            where_zh=where_zh,
            fix="groundup train --resume --out {folder}",
            folder=keeper.run.path,
        )
    return Stopped(
        "stopped by {signal} at step {step} of {total}; everything up to here is saved",
        "在第 {step}/{total} 步被 {signal} 停止；到此为止的进度都已保存",
        exit_status=stop.exit_status,
        signal=stop.name,
        step=state.step,
        total=state.total,
        fix="groundup train --resume --out {folder}",
        folder=keeper.run.path,
    )
