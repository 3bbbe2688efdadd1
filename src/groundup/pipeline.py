"""The stages joined: train, tune, evaluate, predict. Recipe in, run folder out; the only place that knows all parts.

From the command line to `loss.backward()`: `cli.main -> pipeline.train -> loop.train -> loop.step`.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from groundup import jobs, modelfolder
from groundup.before_after import as_conversations, compare, measure_before, rows_of
from groundup.budget import Choice
from groundup.budget import choose as for_budget
from groundup.checking import Report
from groundup.checking.examine import examine
from groundup.checking.recipes import check_job
from groundup.checking.script import LIMIT, check_script
from groundup.checking.selftests import self_tests
from groundup.checking.subject import from_objects
from groundup.core import console, device, files, units
from groundup.core.errors import DataError, GateError, GroundupError, ModelError, RecipeError, Stopped, TrainError, did_you_mean
from groundup.core.messages import cause_of, say, typed
from groundup.core.recipe import Columns, Data, Picture, Recipe, Split, build, load, override, shipped
from groundup.core.registry import METHODS, TASKS
from groundup.core.run import RunFolder, resolve_run
from groundup.data import conversations
from groundup.data.pictures import IMAGE_SUFFIXES, pil_picture
from groundup.data.prepare import Prepared, prepare
from groundup.data.streaming import default_workers
from groundup.data.table import read_rows
from groundup.data.tokenizers import Tokenizer
from groundup.evaluation import card, report
from groundup.evaluation.evaluate import evaluate as evaluate_split
from groundup.evaluation.evaluate import summary
from groundup.evaluation.records import Records, paired, shown_pictures, slices
from groundup.evaluation.views import viewed
from groundup.examples import task_for
from groundup.jobs import Job, Overrides, like_base, open_run
from groundup.metrics import MetricSet
from groundup.metrics.language import SummedMetrics
from groundup.models import adapters
from groundup.models.base import count_parameters
from groundup.models.decoder import SIZES
from groundup.models.generation import Sampling, write
from groundup.models.language import LanguageModel
from groundup.tasks.base import Encoded, Task
from groundup.tasks.language_modeling import LanguageModeling
from groundup.training import loop, parallel
from groundup.training.checkpoint import Checkpoints, damage, load_weights
from groundup.training.signals import StopRequest
from groundup.training.watch import build_watchers

SHORT, LONG = 20.0, 120.0  # seconds of training from which on probes of one step, and self-tests as well, are worth their time
CALIBRATION = 4.0  # seconds of real steps that `plan` measures
OPENED = ("transformers", "timm", "causal-lm")  # architectures whose arguments come with their weights, not from a recipe


@dataclass
class Run:
    """A finished training: its folder and what it reported."""

    path: Path
    result: dict[str, Any]
    follower: bool = False  # one of torchrun's processes but the first: it has no result of its own

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.result["metrics"])

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def folder(self) -> RunFolder:
        return RunFolder.open(self.path)

    def load(self, *, trust_code: bool = False) -> modelfolder.Loaded:
        return modelfolder.load(self.path, trust_code=trust_code)

    def evaluate(self, data: str | None = None, split: str | None = None, **options: Any) -> dict[str, Any]:
        return evaluate(self, data, split=split, **options)

    def predict(self, *inputs: Any, **options: Any) -> list[dict[str, Any]]:
        return predict(self, *inputs, **options)

    def generate(self, *prompts: str, **options: Any) -> list[str]:
        return generate(self, *prompts, **options)


# -- train ---------------------------------------------------------------------------------------------------------------------
def train(
    recipe: str | Path | Recipe | Mapping[str, Any] | None,
    overrides: Overrides | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    extend: bool = False,
    trust_code: bool = False,
    budget: str | None = None,
    check: bool = True,
) -> Run:
    """Trains a recipe and returns the finished run.

    Args:
        recipe: a shipped recipe's name, a YAML file, a Recipe or a mapping; None with `resume` takes the run's own.
        overrides: dotted key -> value, as {'train.epochs': 1}.
        out: the run folder; default `runs/<name>-<utc>-<id>`.
        resume: continue what is in `out` (a run that is finished is returned as it is; with nothing there, it starts).
        extend: on resume, allow another `train.epochs` or `train.steps`.
        trust_code: run user code that comes with the model folder `init` names.
        check: before a run of some length the probes of one step, and a language model's self-tests, are made; an error stops it. See `checking`.
        budget: a duration ('10min'): size, tokens and batch of a language model are chosen for it.

    Raises:
        UserError: (its subclasses) a mistake in the recipe, the data, the model, or the run folder.
        TrainError: the training had to stop.
        Stopped: SIGINT or SIGTERM; everything is saved.
    """
    begin = time.monotonic()
    ranks = parallel.start()
    chosen = None
    if budget is not None and recipe is not None and not ranks.rank:
        chosen, overrides = _within(budget, recipe, overrides or {})
    if ranks.rank:
        return _follow(ranks, recipe, overrides or {}, resume=resume, extend=extend, trust_code=trust_code)
    resolved, run, done = open_run(
        recipe, overrides or {}, Path(out).expanduser() if out is not None else None, resume=resume, extend=extend
    )
    ranks.agree(None if done is not None else {"path": str(run.path.resolve()), "decisions": run.decisions})
    if done is not None:
        console.line(say("{run} is finished already", "{run} 已经完成", run=run.path))
        return Run(run.path, done)
    watchers: list[loop.Watcher] = []
    try:
        if chosen is not None and "budget" not in run.decisions:
            run.decisions["budget"] = {"value": chosen.overrides, "reason": chosen.reason, "reason_zh": chosen.reason_zh}
        with jobs.removed_on_failure(run):
            job = jobs.build(resolved, run, resume=resume, trust_code=trust_code, train_base=lambda name: train(name).path, ranks=ranks)
            if job.resumed_from is None:
                _tell_plan(job)
            if check and job.resumed_from is None and ranks.world == 1 and _seconds(job) > SHORT:
                report = check_job(job, fast=True)
                _stop_at_errors(report.joined(self_tests(job)) if _seconds(job) > LONG else report)
            measure_before(job)
            device.give_back()
        watch = resolved.watch
        watchers = build_watchers(
            run, metric=job.plan.metric, tensorboard=watch.tensorboard, profile=watch.profile, trackers=watch.trackers
        )
        trained = time.monotonic()
        with StopRequest() as stop:  # before and after the loop nothing is lost by leaving at once
            loop.train(job.state, job.batches, job.task, job.plan, job.keeper, job.validation, watchers, stop)
        seconds = {"train": time.monotonic() - trained - job.keeper.evaluating, "evaluate": job.keeper.evaluating}
        _close(watchers)
        return _finish(job, begin, seconds)
    except KeyboardInterrupt as error:
        raise Stopped(
            "stopped by Ctrl-C behind the last step; its checkpoint is saved",
            "在最后一步之后被 Ctrl-C 停止；检查点已保存",
            exit_status=130,
            fix="groundup train --resume --out {run}",
            run=run.path,
        ) from error
    except GroundupError as error:
        run.event("error", type=type(error).__name__, message=error.en, message_zh=error.zh)
        raise
    finally:
        _close(watchers)
        run.close()


def check(
    target: Any,
    loss_fn: Any = None,
    optimizer: Any = None,
    train_loader: Any = None,
    *,
    overrides: Overrides | None = None,
    names: dict[str, str] | None = None,
    limit: float = LIMIT,
    **others: Any,
) -> Report:
    """Looks for classic mistakes, and leaves everything as it was.

        groundup.check(model, loss_fn, optimizer, train_loader, val_loader=val_loader)
        groundup.check("train.py")
        groundup.check("digits-cnn")

    Args:
        target: a model with its loss, optimizer and batches (a Lightning module brings the first two itself); a script that builds them; or a recipe.
        names: what a script calls its model, loss_fn, ...; limit: seconds for a script.
        others: val_loader, compute_loss, train_step, fit, evaluate, scheduler, tokenizer, lora_targets, added_token_ids.

    Raises:
        UserError: what is named is not there or cannot be built.
    """
    if isinstance(target, nn.Module):
        with console.progress() as told:
            return examine(
                from_objects(target, loss_fn, optimizer, train_loader, **others),
                lambda en, zh, share: told(say("check: {what}", "检查：{what}", what=say(en, zh)), share),
            )
    if isinstance(target, (str, Path)) and str(target).endswith(".py"):
        return check_script(Path(target).expanduser(), names, limit)
    return _check_recipe(target, overrides)


def plan(
    target: str | Path | Recipe | Mapping[str, Any],
    overrides: Overrides | None = None,
    *,
    method: str = "full",
    device: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    sharding: str = "fsdp",
    price: float | None = None,
    calibrate: bool = True,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Whether a training fits, how long it takes and what it costs, from steps on tensors without contents.

    Args:
        target: a recipe; or a language model without its weights: a size ('8B'), a config.json or its folder, hub:owner/name.
        method: for a model: how it is to be tuned.
        device: a name of `planning.devices.DEVICES` or 'cpu'; None is this machine's.
        gpus: of each node; sharding: see `forecast`. price: of one device for an hour.
        calibrate: on this machine's own device three real steps are measured, where that takes less than a minute.

    Returns: see `Forecast.as_json`; where it does not fit, `advice` lists changes of the recipe, each with its own peak.
    """
    from groundup.planning import devices, forecast, shapes

    begin = time.monotonic()
    if gpus < 1 or nodes < 1:
        raise RecipeError(
            "--gpus {gpus} --nodes {nodes}: at least 1 is expected", "--gpus {gpus} --nodes {nodes}：至少应为 1", gpus=gpus, nodes=nodes
        )
    if price is not None and not price >= 0:
        raise RecipeError("--price {x}: 0 or more is expected", "--price {x}：应不小于 0", x=price)
    on = devices.find(device)
    if gpus * nodes > 1 and not on.gpu:
        raise RecipeError(
            "{n} devices are GPUs, and this machine has none: name one of the table",
            "{n} 个设备应为 GPU，而本机没有：请指定表中的一种",
            n=gpus * nodes,
            fix="--device h100",
        )
    method, overrides = _named(method, overrides, bits=4 if on.gpu else None)
    shape = isinstance(target, (str, Path)) and not _is_recipe(str(target)) and shapes.is_shape(str(target))

    def subject(changes: Overrides) -> forecast.Subject:
        if shape:
            named = {k: v for k, v in changes.items() if k != "method.name"}
            replicas = nodes if sharding == "tensor" else gpus * nodes
            return shapes.subject_of_shape(str(target), changes.get("method.name", method), overrides | named, replicas=replicas)
        return forecast.subject_of(load(given, changes), trust_code)

    given: Any = target if shape else load(target, overrides)
    planned = subject({})
    if shape and str(target) in SIZES:
        console.line(
            say(
                "with a vocabulary of {n:,} tokens; another: --set task.vocabulary=N",
                "按 {n:,} 个词元的词表规划；改用其他大小：--set task.vocabulary=N",
                n=planned.task.num_outputs,
            )
        )
    resolved = planned.recipe
    steps = None
    found = forecast.forecast(planned, on, gpus * nodes, sharding, nodes)
    if calibrate and not shape and device is None and gpus * nodes == 1 and found.fits and 6 * found.step_seconds[1] < 60:
        steps = _real_steps(resolved, trust_code)
        if steps["attention"] is not None:
            planned.model.attention_path = steps["attention"]
        found = forecast.forecast(planned, on)
        found.calibrated, found.step_seconds = steps["seconds"], (0.9 * steps["seconds"], 1.15 * steps["seconds"])
        if steps["memory"] is not None:
            found.libraries = forecast.CODE + max(0, steps["memory"] - found.peak)
    changes = [] if found.fits else forecast.advice(resolved, subject, on, found, sharding)
    return {"name": resolved.name, **found.as_json(price), "advice": changes, "seconds": round(time.monotonic() - begin, 2)}


def _is_recipe(name: str) -> bool:
    return name in shipped() or name.endswith((".yaml", ".yml"))


def _real_steps(recipe: Recipe, trust_code: bool) -> dict[str, Any]:
    """Real steps of a training that is thrown away, three at least: their median seconds, how attention is computed, the process's memory at most."""
    with console.muted(), tempfile.TemporaryDirectory(prefix="groundup-plan-") as folder:
        device.give_back()
        before, mapped = device.status_bytes("VmRSS"), device.status_bytes("RssFile")
        resolved, run, _ = open_run(recipe, {}, Path(folder) / "run", resume=False, extend=False)
        try:
            job = jobs.build(resolved, run, resume=False, trust_code=trust_code, train_base=lambda name: train(name).path)
            job.plan.stage(0, job.state.total).enter(job.state.model)
            device.forget_peak()
            took: list[float] = []
            while len(took) < 4 or (sum(took[1:]) < CALIBRATION and len(took) < 60):
                began = time.perf_counter()
                loop.step(job.state, job.batches, job.task, job.plan)
                if job.plan.device.type == "cuda":
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
            grown = device.status_bytes("VmHWM") - before - (device.status_bytes("RssFile") - mapped)
            return {
                "seconds": statistics.median(took[1:]),
                "attention": getattr(job.state.model, "attention_path", None),
                "memory": grown if before else None,
            }
        finally:
            run.close()


def _tell_plan(job: Job) -> None:
    """Three lines before a training begins: memory, time, disk. What cannot be planned stops nothing."""
    run, size, seconds = job.run, files.human_bytes, _seconds(job)
    kept = job.state.model.state_dict().values()
    disk = 3 * sum(t.numel() * t.element_size() for t in kept)
    here = device.available_memory()
    owners = ""
    try:
        if job.plan.device.type == "cpu" and seconds > LONG:  # tracing takes some seconds by itself
            from groundup.planning import forecast

            found = forecast.of_job(job)
            need, disk = max(found.peak, found.evaluation), 3 * found.checkpoint
            largest = sorted(found.memory.items(), key=lambda pair: -pair[1])[:3]
            owners = ", ".join(f"{say('{en}', '{zh}', en=k, zh=forecast.OWNERS_ZH.get(k, k))} {size(v)}" for k, v in largest)
        else:
            owners = say("measured in the rehearsal", "在预演中测得")
            need = device.memory_in_use(str(job.plan.device))
            here = torch.cuda.mem_get_info()[1] if job.plan.device.type == "cuda" else here
    except Exception as error:  # unusual models: the training itself does not depend on it
        need, owners = 0, f"{type(error).__name__}: {error}".splitlines()[0][:80]
    if need:
        console.line(
            say(
                "plan: memory {need} of {here}: {owners}",
                "规划：需要内存 {need}（可用 {here}）：{owners}",
                need=size(need),
                here=size(here),
                owners=owners,
            )
        )
    else:
        console.line(say("plan: memory could not be told ({why})", "规划：无法估计内存（{why}）", why=owners))
    console.line(
        say(
            "plan: about {time} for {n:,} steps, evaluations apart",
            "规划：{n:,} 步约需 {time}，评估另计",
            time=units.human_seconds(seconds),
            n=job.state.total,
        )
    )
    free = shutil.disk_usage(run.path).free
    console.line(
        say(
            "plan: disk {disk} for checkpoints and model, {free} free",
            "规划：检查点与模型需 {disk} 磁盘，剩余 {free}",
            disk=size(disk),
            free=size(free),
        ),
        style="red" if disk > free else "",
    )
    if disk > free:
        console.line(
            say(
                "! the disk is too full: checkpoints will fail. Make room, give another --out, or --set train.keep=last",
                "! 磁盘空间不足：检查点将写入失败。请腾出空间、换一个 --out，或用 --set train.keep=last",
            ),
            style="red",
        )
    run.event("planned", memory=need, seconds=round(seconds, 1), disk=disk)


def _check_recipe(recipe: str | Path | Recipe | Mapping[str, Any] | None, overrides: Overrides | None) -> Report:
    """Everything of a training is built, put to the probes and self-tests, and thrown away."""
    with tempfile.TemporaryDirectory(prefix="groundup-check-") as folder:
        resolved, run, _ = open_run(recipe, overrides or {}, Path(folder) / "run", resume=False, extend=False)
        try:
            job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=lambda name: train(name).path)
            return check_job(job).joined(self_tests(job))
        finally:
            run.close()


def _seconds(job: Job) -> float:
    """That the training will take, by its rehearsed step."""
    return float(job.run.decisions["step_seconds"]["value"]) * job.state.total


def _stop_at_errors(report: Report) -> None:
    """Raises GateError where a self-test found an error; says in one line that there is none."""
    for finding in report.findings:
        facts = finding.as_json()
        console.line(f"{finding.severity}: {facts['location']}: {facts['message']}  {facts['fix']}", style="red")
    if report.errors:
        raise GateError(
            "the check found {n} errors: the training would be wrong",
            "检查发现 {n} 个错误：这样训练会出错",
            n=len(report.errors),
            fix="repair what is named above, or train all the same with --no-check",
            fix_zh="修复上面指出的问题，或用 --no-check 强行训练",
        )
    if report.passed:
        console.line(
            say(
                "check: {n} probes found nothing in {s:.1f} s",
                "检查：{n} 项未发现问题，用时 {s:.1f} 秒",
                n=len(report.passed),
                s=report.seconds,
            )
        )


def _follow(ranks: parallel.Ranks, recipe: Any, overrides: Overrides, *, resume: bool, extend: bool, trust_code: bool) -> Run:
    """What every rank but the first does: the same training, in silence, with a run folder of its own that is thrown away."""
    with console.muted(), tempfile.TemporaryDirectory(prefix="groundup-rank-") as folder:
        real = ranks.agree(None)
        if real is None:
            return Run(Path(), {}, follower=True)
        leader = RunFolder.open(Path(real["path"]))
        run = RunFolder.create(leader.recipe(), Path(folder) / "run", "")
        try:
            run.decisions = real["decisions"]
            job = jobs.build(
                leader.recipe(),
                run,
                resume=resume,
                trust_code=trust_code,
                train_base=lambda name: train(name).path,
                ranks=ranks,
                checkpoints=leader.checkpoints,
            )
            with StopRequest() as stop:
                loop.train(job.state, job.batches, job.task, job.plan, job.keeper, job.validation, [], stop)
        finally:
            run.close()
        return Run(leader.path, {"run": real["path"]}, follower=True)


def _close(watchers: list[loop.Watcher]) -> None:
    while watchers:
        watchers.pop().end()


def _within(budget: str, recipe: Any, overrides: Overrides) -> tuple[Choice, dict[str, Any]]:
    """What a training time allows, told, and the overrides with it."""
    if given := sorted({"train.steps", "train.tokens", "train.epochs"} & overrides.keys()):
        raise RecipeError(
            "--budget {budget} picks the length of the training, and {given} gives another one",
            "--budget {budget} 会决定训练长度，而 {given} 又给出了一个长度",
            budget=budget,
            given=", ".join(given),
            fix="leave one of both out",
            fix_zh="两者只留一个",
        )
    chosen = for_budget(load(recipe, overrides), budget, overrides)
    console.line(say("budget: {en}", "预算：{zh}", en=chosen.reason, zh=chosen.reason_zh))
    return chosen, {**overrides, **chosen.overrides}


def plan_only(
    recipe: str | Path | Recipe | Mapping[str, Any] | None, overrides: Overrides | None = None, budget: str | None = None
) -> dict[str, Any]:
    """`--dry-run`: the resolved recipe, the data's splits and the model's size, with one rehearsed step and nothing kept."""
    if budget is not None and recipe is not None:
        overrides = _within(budget, recipe, overrides or {})[1]
    with tempfile.TemporaryDirectory(prefix="groundup-dry-run-") as folder:
        resolved, run, _ = open_run(recipe, overrides or {}, Path(folder) / "run", resume=False, extend=False)
        try:
            job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=lambda name: train(name).path)
            total, trainable = count_parameters(job.state.model)
            return {
                "recipe": resolved.model_dump(mode="json"),
                "decisions": run.decisions,
                "steps": job.state.total,
                "splits": {name: len(index) for name, index in job.prepared.splits.items()},
                "parameters": {"all": total, "trainable": trainable},
                "step_seconds": round(run.decisions["step_seconds"]["value"], 4),
            }
        finally:
            run.close()


# -- the end of a training ---------------------------------------------------------------------------------------------------
def _finish(job: Job, begin: float, seconds: dict[str, float]) -> Run:
    """The best weights, evaluated; the model folder; the report. result.json is written last."""
    run, recipe, state = job.run, job.recipe, job.state
    weights, chosen = _final_weights(job)
    load_weights(state.model, weights)
    evaluated = time.monotonic()
    name = next((s for s in ("test", "validation", "train") if s in job.prepared.splits), "train")
    encoded = job.task.prepare(job.prepared.dataset, job.prepared.splits[name], job.plan.device, workers=default_workers())
    records, views = Records(), recipe.evaluate.views
    last = job.keeper.scores
    if name == "validation" and job.task.kind == "text" and last is not None and last[0] == chosen:
        scores: MetricSet | None = last[1]  # of these very weights
    else:
        scores = evaluate_split(job.task, viewed(state.model, views), encoded, job.plan.device, records=records)
    assert scores is not None
    found = summary(scores) | _by_record(job.task, job.prepared, job.prepared.splits[name], records, encoded, run.path / "plots")
    before_after = compare(job, encoded, found, name, scores)
    seconds["evaluate"] += time.monotonic() - evaluated
    result = {
        "run": str(run.path),
        "model": str(run.model),
        "name": recipe.name,
        "task": recipe.task.name,
        "architecture": recipe.model.name,
        "parameters": count_parameters(state.model)[0],
        "steps": state.step,
        "resumed_from": job.resumed_from,
        "split": name,
        "metric": job.plan.metric,
        "best_step": chosen,
        **found,
        "before_after": before_after,
    }
    data = files.read_json(run.path / "data.json")
    facts = {
        "source_run": recipe.name,
        "metrics": {name: found["metrics"]},
        "intervals": {name: found["intervals"]},
        "seed": recipe.train.seed,
        "data": {"spec": recipe.data.model_dump(mode="json"), "fingerprint": job.prepared.fingerprint, "contents": job.prepared.contents},
        "views": views.model_dump() if views else None,
        "parent": _parent(job),
    }
    _save_model(job, weights, facts, card.model_card(recipe, result, data))
    seconds["total"] = time.monotonic() - begin
    result["seconds"] = {k: round(v, 3) for k, v in seconds.items()}
    run.event("finished", step=state.step)
    try:
        if recipe.watch.report:
            report.write_report(run, result)
        files.write_json(run.path / "result.json", result)
    except OSError as error:
        console.line(
            say(
                "! the model is saved, its report could not be written: {cause}",
                "! 模型已保存，但报告未能写入：{cause}",
                cause=error,
            ),
            style="yellow",
        )
    lost = run.metrics.dropped + run.events.dropped
    if lost:
        console.line(
            say("! {n} rows of metrics and events could not be written (full disk)", "! 有 {n} 行指标与事件未能写入（磁盘已满）", n=lost),
            style="yellow",
        )
    return Run(run.path, result)


def _parent(job: Job) -> dict[str, Any] | None:
    """The model that training began with; of an adapter the one that it is for, with its place."""
    if "init" not in job.run.decisions:
        return None
    value: dict[str, Any] = job.run.decisions["init"]["value"]
    if not adapters.present(job.state.model):
        return {"sha256": value["sha256"]}
    assert job.base is not None
    return job.base.card["parent"] if (job.base.path / modelfolder.ADAPTER).is_file() else value


def _by_record(
    task: Task, prepared: Prepared, index: NDArray[np.int64], records: Records, encoded: Encoded, pictures: Path | None
) -> dict[str, Any]:
    """Slices of the split; and, into the folder `pictures`, the worst and most confused ones."""
    if not records:
        return {}
    found: dict[str, Any] = {"slices": slices(records, {name: column[index] for name, column in prepared.dataset.meta.items()})}
    if pictures is not None and task.kind == "image":
        with contextlib.suppress(OSError):  # a full disk: the model itself matters, and is still to be written
            pictures.mkdir(exist_ok=True)
            found |= shown_pictures(records, task.state()["labels"], encoded, pil_picture, pictures)
    return found


def _final_weights(job: Job) -> tuple[dict[str, Any], int]:
    """What goes into the model folder, and the step it is from."""
    state, keeper = job.state, job.keeper
    current = dict(state.ema if state.ema is not None else state.model.state_dict())
    if job.recipe.train.keep == "last" or job.validation is None or state.best_step in (-1, state.step):
        return current, state.step
    stored = keeper.best_weights or keeper.checkpoints.weights(state.best_step, ema=state.ema is not None)
    if stored is None:
        job.run.event("best_lost", step=state.best_step)
        console.line(
            say(
                "! the best weights (step {step}) are not on the disk any more; the model is that of the last step",
                "! 最好的权重（第 {step} 步）已不在磁盘上；模型取最后一步",
                step=state.best_step,
            ),
            style="yellow",
        )
        return current, state.step
    return {k: v.to(job.plan.device) for k, v in stored.items()}, state.best_step


def _save_model(job: Job, weights: dict[str, Any], facts: dict[str, Any], readme: str) -> None:
    """The model folder; on a full disk a copy elsewhere and an error, never silence."""
    run = job.run
    arguments: dict[str, Any] = {
        "model": job.state.model,
        "weights": weights,
        "task": job.task,
        "recipe": job.recipe,
        "facts": facts,
        "readme": readme,
        "model_arguments": job.base.arguments if job.base is not None and job.base.architecture in OPENED else {},
    }
    try:
        modelfolder.save(run.model, **arguments)
        return
    except OSError as error:
        cause = error
    rescue: Path | None = Path(tempfile.gettempdir()) / f"groundup-rescued-{run.path.name}"
    try:
        assert rescue is not None
        modelfolder.save(rescue, **arguments)
    except OSError:
        rescue = None
    steps = job.keeper.checkpoints.steps()
    run.event("model_not_saved", cause=cause_of(cause, "en"), rescued=rescue is not None)
    raise TrainError(
        "the training is done, but {model} could not be written ({cause}). "
        + ("The model was put into {rescue} instead. " if rescue else "")
        + "Last checkpoint: {last}",
        "训练已完成，但 {model} 无法写入（{cause}）。" + ("模型已改存到 {rescue}。" if rescue else "") + "最后的检查点：{last_zh}",
        model=run.model,
        cause=cause,
        rescue=rescue,
        last=f"step {steps[-1]}" if steps else "none",
        last_zh=f"第 {steps[-1]} 步" if steps else "无",
        fix=f"free at least {files.human_bytes(_model_bytes(job.state.model))}, then: groundup train --resume --out {typed(run.path)}",
        fix_zh=f"腾出至少 {files.human_bytes(_model_bytes(job.state.model))}，然后：groundup train --resume --out {run.path}",
    )


def _model_bytes(model: nn.Module) -> int:
    return 2 * sum(int(t.numel() * t.element_size()) for t in model.state_dict().values()) + 2**20


# -- tune ----------------------------------------------------------------------------------------------------------------------
def _named(method: str, overrides: Overrides | None, bits: int | None = None) -> tuple[str, dict[str, Any]]:
    """The method and settings that a name stands for: kinds of lora; qlora's base is in few bits (4 on GPUs; 8 on CPUs, where 4 are slow)."""
    kinds: dict[str, dict[str, Any]] = {
        "qlora": {"method.bits": bits or (4 if torch.cuda.is_available() else 8)},
        "rslora": {"method.rs": True},
        "dora": {"method.dora": True},
        "pissa": {"method.init": "pissa"},
    }
    if method not in kinds:
        return method, dict(overrides or {})
    return "lora", kinds[method] | dict(overrides or {})


def tuning_recipe(
    model: str | Path | Run,
    data: str,
    method: str = "full",
    overrides: Overrides | None = None,
    *,
    keep_classes: bool = False,
    rehearse: int = 0,
    trust_code: bool = False,
) -> Recipe:
    """The recipe of a fine-tuning run: the base model's task and architecture, new data, a method, gentler defaults than from scratch.

    Args:
        keep_classes: the base's classes stay, the new data's are added.
        rehearse: so many records of the base's own data are mixed in, against forgetting.
    """
    method, overrides = _named(method, overrides)
    base = modelfolder.load(model, trust_code=trust_code)
    METHODS.get(method)  # an unknown method is an error before anything is read

    def named(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        path, _, attribute = name.rpartition(":")
        return {"name": f"{base.path / 'code' / Path(path).name}:{attribute}" if path.endswith(".py") else name, **arguments}

    tree: dict[str, Any] = {
        "name": f"{base.card['source_run']}-{method}",
        "task": named(base.card["task"]["name"], base.card["task"]["arguments"]),
        "data": {"source": data},
        "model": named(base.architecture, {} if base.architecture in OPENED else base.arguments),
        "init": str(model) if str(model).startswith(("hub:", "timm:")) else str(base.path.resolve()),
        "method": {"name": method},
        "optim": {"lr": 1e-2 if method == "head" else 1e-3},
        "schedule": {"warmup": 0.05},
        "train": {"epochs": 10, "batch_size": 64},
    }
    if base.task.kind == "text":
        small, adapts = count_parameters(base.model)[0] < 50_000_000, method in ("lora", "peft")
        rate, epochs = (2e-3 if small else 2e-4) if adapts else (5e-4 if small else 2e-5), 3
        own_task = "task" in {k.partition(".")[0] for k in overrides}
        answers = not own_task and overrides.get("data.columns.target") is not None
        if (task := task_for(data) or ("instruction-tuning" if answers else None)) is not None:
            own = base.card["task"]["arguments"] if base.card["task"]["name"] == task else {}
            tree["task"] = {"name": task, **own}
            if task == "preference-tuning":  # gentle: far from the reference its likelihoods mean nothing
                rate, epochs = rate / 40, 1
        elif not own_task:
            console.line(
                say(
                    "read as plain text, no examples of questions and answers: the model goes on learning from text. Examples are: {formats}; {more}",
                    "按普通文本读取（不是问答样本）：模型继续从文本学习。样本格式有：{formats}；{more}",
                    formats=conversations.FORMATS,
                    more=conversations.PREFERENCES,
                )
            )
        tree["optim"] = {"name": "adamw", "lr": rate, "weight_decay": 0.0}
        tree["train"] = {"epochs": epochs, "batch_size": 8, "clip_norm": 1.0}
    if keep_classes:
        tree["keep_classes"] = True
    overrides = dict(overrides or {})
    general = str(overrides.get("evaluate.general", "auto"))
    if base.task.kind == "text" and Path(general).suffix and "://" not in general and ":" not in general and not Path(general).expanduser().exists():
        raise DataError("--general {file}: no such file", "--general {file}：没有这个文件", file=general, fix="--general none, or leave it out", fix_zh="--general none，或不写")
    if rehearse:
        if "data" not in base.card or not isinstance(base.card["data"]["spec"]["source"], str):
            raise DataError(
                "{model} does not come with one data set of its own to rehearse",
                "{model} 没有可供复习的单一数据集",
                model=base.card["source_run"],
            )
        old = base.card["data"]["spec"]
        classes = overrides.pop("data.classes", None)
        tree["data"]["source"] = [
            {"source": data, "classes": classes, "weight": None},
            {"source": f"{old['source']}#{rehearse}", "classes": old["classes"], "weight": None},
        ]
    return load(override(tree, overrides))


def tune(
    model: str | Path | Run,
    data: str,
    method: str = "full",
    overrides: Overrides | None = None,
    *,
    keep_classes: bool = False,
    rehearse: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    extend: bool = False,
    trust_code: bool = False,
    check: bool = True,
) -> Run:
    """Fine-tunes a model on new data: writes a recipe and trains it; the model tuned from is never changed. See `train`, `tuning_recipe`."""
    recipe = tuning_recipe(model, data, method, overrides, keep_classes=keep_classes, rehearse=rehearse, trust_code=trust_code)
    return train(recipe, out=out, resume=resume, extend=extend, trust_code=trust_code, check=check)


# -- evaluate and predict ------------------------------------------------------------------------------------------------------
def evaluate(
    model: str | Path | Run,
    data: str | None = None,
    *,
    split: str | None = None,
    overrides: Overrides | None = None,
    out: str | Path | None = None,
    against: str | Path | Run | None = None,
    views: str | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """The metrics of a model on its own data or on another set, with 95 % intervals.

    Args:
        data: a data SPEC; default: the data it was trained on, divided as it was then.
        split: 'train', 'validation', 'test' or 'all' (default: test where there is one, else validation; 'all' for other data without splits).
        overrides: keys of the data section, as {'data.classes': [...]}.
        out: a folder for report.html, plots and metrics.json.
        against: another model, compared on the same records by a paired test.
        views: test-time augmentation, as 'flip,shift=1' or 'none' (default: what the model was made with).
    """
    begin = time.monotonic()
    loaded = modelfolder.load(model, trust_code=trust_code)
    _can_answer(loaded)
    loaded.look_through(views)
    _reads_examples(loaded, data)
    own = Data.model_validate(loaded.card["data"]["spec"]) if "data" in loaded.card else None
    if own is None and data is None:
        raise DataError(
            "{model} does not come with data of its own", "{model} 没有自带数据", model=loaded.card["source_run"], fix="--data SPEC"
        )
    config = own if data is None else Data(source=data, columns=own.columns if own else Columns(), classes=None)
    if data is not None and loaded.task.kind == "text" and config is not None:
        config = config.model_copy(update={"split": Split(validation=0.0, test="auto")})
    assert config is not None
    if overrides:
        tree = {"name": "evaluate", "task": loaded.card["task"]["name"], "model": "linear", "data": config.model_dump(mode="json")}
        config = build(override(tree, overrides), "--set", overridden=overrides).data
    prepared = prepare(like_base(loaded.task.reads(config), loaded), classification=loaded.task.classification, kind=loaded.task.kind)
    splits = dict(prepared.splits)
    if data is not None and not prepared.dataset.given:
        # Another set without splits of its own is a test set as a whole: nothing of it was trained on.
        splits = {"all": np.arange(len(prepared.dataset))}
    name = split or next(s for s in ("test", "validation", "all", "train") if s in splits)
    if name == "all":
        splits["all"] = np.arange(len(prepared.dataset))
    if name not in splits:
        hint, hint_zh = did_you_mean(name, splits)
        raise DataError(
            "{data} has no split '{split}'." + hint, "{data} 没有划分 '{split}'。" + hint_zh, data=prepared.dataset.name, split=name
        )
    at = torch.device(device.choose_device().value)
    folder = Path(out).expanduser() if out is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    loaded.model.to(at)
    encoded = loaded.task.prepare(prepared.dataset, splits[name], at, workers=default_workers())
    records = Records()
    scores = evaluate_split(loaded.task, loaded.answering, encoded, at, records=records)
    assert scores is not None
    found = summary(scores) | _by_record(loaded.task, prepared, splits[name], records, encoded, folder and folder / "plots")
    if against is not None and isinstance(scores, SummedMetrics):
        found["against"] = _text_against(against, loaded, prepared, splits[name], data, scores, at, trust_code)
    elif against is not None:
        found["against"] = _against(against, loaded, prepared, splits[name], records, at, trust_code, views)
    result = {
        "model": str(loaded.path),
        "data": prepared.dataset.name,
        "fingerprint": prepared.fingerprint,
        "split": name,
        "records": len(encoded),
        "same_data_as_training": prepared.is_that_of(loaded.card),
        "metric": loaded.task.default_metric,
        "views": loaded.card.get("views"),
        **found,
        "seconds": round(time.monotonic() - begin, 3),
    }
    if folder is not None:
        files.write_json(folder / "metrics.json", result)
        result["report"] = str(report.evaluation_report(folder, f"{loaded.card['source_run']} on {prepared.dataset.name}", result))
    return result


def evaluate_harness(
    model: str | Path | Run, tasks: Sequence[str], *, limit: int | None = None, chat: bool = False, trust_code: bool = False
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness. See `evaluation.harness`."""
    from groundup.evaluation.harness import harness

    begin = time.monotonic()
    loaded, tokenizer = language_model(model, trust_code=trust_code)
    assert isinstance(loaded.model, LanguageModel)
    found = harness(loaded.model, tokenizer, tasks, limit=limit, chat=chat)
    return {"model": str(loaded.path), "harness": found, "seconds": round(time.monotonic() - begin, 3)}


def _reads_examples(loaded: modelfolder.Loaded, data: str | None) -> None:
    """A language model that was trained on plain text reads a file of examples as a tuning would, through its chat template."""
    if data is None or type(loaded.task) is not LanguageModeling or loaded.task.tokenizer is None or task_for(data) != "instruction-tuning":
        return
    loaded.task = as_conversations(loaded.task)
    console.line(
        say(
            "read as conversations, through the template: {template}; what counts are the assistant's turns",
            "按对话读取，对话模板：{template_zh}；只计入助手的发言",
            template=loaded.task.template_name,
            template_zh="模型自带" if loaded.task.template_name == "its own" else loaded.task.template_name,
        )
    )


def _text_against(
    other: Any,
    loaded: modelfolder.Loaded,
    prepared: Prepared,
    index: NDArray[np.int64],
    data: str | None,
    scores: SummedMetrics,
    at: torch.device,
    trust_code: bool,
) -> dict[str, Any]:
    """Another language model on the same records: each metric of both, and the interval of the difference over the same resamples."""
    second = modelfolder.load(other, trust_code=trust_code)
    _can_answer(second)
    _reads_examples(second, data)
    mine, theirs = (getattr(m.task, "tokenizer", None) for m in (loaded, second))
    context = getattr(loaded.task, "context", 0)
    if isinstance(second.task, LanguageModeling) and getattr(second.model, "context", 0) >= context:
        second.task._set_context(context)  # both read each record as far as this one does
    differs = {
        ("tokenizers", "分词器"): mine is None or theirs is None or mine.core.to_str() != theirs.core.to_str(),
        ("tasks", "任务"): type(loaded.task) is not type(second.task),
        ("chat templates", "对话模板"): getattr(loaded.task, "template", None) != getattr(second.task, "template", None),
        ("contexts", "上下文长度"): context != getattr(second.task, "context", 0),
    }
    if any(differs.values()):
        raise ModelError(
            "{a} and {b} cannot be compared record by record: their {what} differ",
            "{a} 与 {b} 无法逐条比较：{what_zh}不同",
            a=loaded.path,
            b=second.path,
            what=" and ".join(en for (en, _), other in differs.items() if other),
            what_zh="、".join(zh for (_, zh), other in differs.items() if other),
            fix="compare the bits_per_byte of two evaluations, or --harness",
            fix_zh="分别评估后比较 bits_per_byte，或使用 --harness",
        )
    second.model.to(at)
    its = evaluate_split(second.task, second.answering, second.task.prepare(prepared.dataset, index, at, workers=default_workers()), at)
    assert isinstance(its, SummedMetrics)
    return {"model": str(second.path), "rows": rows_of(its, scores)}


def _against(
    other: Any,
    loaded: modelfolder.Loaded,
    prepared: Prepared,
    index: NDArray[np.int64],
    records: Records,
    at: torch.device,
    trust_code: bool,
    views: str | None,
) -> dict[str, Any]:
    """Another model on the same records, the difference tested in pairs."""
    second = modelfolder.load(other, trust_code=trust_code)
    second.look_through(views)
    if not records or second.task.state()["labels"] != loaded.task.state()["labels"]:
        raise ModelError(
            "{a} and {b} cannot be compared: a paired test needs two models for the same labels",
            "{a} 与 {b} 无法比较：配对检验要求两个模型的标签相同",
            a=loaded.path,
            b=second.path,
        )
    if second.task.state()["preprocessor"]["shape"] != loaded.task.state()["preprocessor"]["shape"]:  # each sees pictures in its own size
        prepared = prepare(
            like_base(prepared.config.model_copy(update={"image": Picture()}), second), classification=second.task.classification
        )
    second.model.to(at)
    seen = Records()
    encoded = second.task.prepare(prepared.dataset, index, at, workers=default_workers())
    scores = evaluate_split(second.task, second.answering, encoded, at, records=seen)
    assert scores is not None
    return {"model": str(second.path), "accuracy": float(seen.right.mean()), **paired(records, seen)}


def predict(
    model: str | Path | Run | modelfolder.Loaded, *inputs: Any, views: str | None = None, trust_code: bool = False
) -> list[dict[str, Any]]:
    """Answers to raw inputs: paths of pictures, folders of pictures, rows of numbers ('5.1,3.5,1.4,0.2'), or CSV files of rows.

    What cannot be read among several has an `error` instead of an answer.

    Raises:
        DataError: none could be read.
    """
    loaded = model if isinstance(model, modelfolder.Loaded) else modelfolder.load(model, trust_code=trust_code)
    _can_answer(loaded)
    loaded.look_through(views)
    answers: list[dict[str, Any]] = []
    failed: list[tuple[str, DataError]] = []
    for label, raw in (pair for item in inputs for pair in _expand(item, loaded.task)):
        try:
            answers.append({"input": label, **loaded.predict(raw)})
        except DataError as error:
            failed.append((label, error))
            answers.append({"input": label, "error": error.message})
    if failed and len(failed) == len(answers):
        label, first = failed[0]
        if label in first.en or label in map(str, inputs):
            raise first
        raise DataError("{label}: {why}", "{label}：{why_zh}", label=label, why=first.en, why_zh=first.zh) from first  # a row of a file
    return answers


def language_model(model: str | Path | Run | modelfolder.Loaded, *, trust_code: bool = False) -> tuple[modelfolder.Loaded, Tokenizer]:
    """A language model that can write, and its tokenizer, on the best device here. Raises ModelError for any other model."""
    loaded = model if isinstance(model, modelfolder.Loaded) else modelfolder.load(model, trust_code=trust_code)
    tokenizer = getattr(loaded.task, "tokenizer", None)
    if tokenizer is None or not isinstance(loaded.model, LanguageModel):
        raise ModelError(
            "{model} is a model for '{task}': it answers inputs, it does not write text",
            "{model} 是用于 '{task}' 的模型：它回答输入，但不会生成文本",
            model=loaded.card["source_run"],
            task=loaded.card["task"]["name"],
            fix="groundup predict MODEL INPUT",
        )
    loaded.model.to(torch.device(device.choose_device().value))
    return loaded, tokenizer


def generate(model: str | Path | Run | modelfolder.Loaded, *prompts: str, trust_code: bool = False, **sampling: Any) -> list[str]:
    """The continuation of each prompt.

    Args:
        sampling: see `Sampling`: max_tokens, temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty, seed, stop, precision.
    """
    loaded, tokenizer = language_model(model, trust_code=trust_code)
    assert isinstance(loaded.model, LanguageModel)
    how = Sampling(**sampling)
    how.stop_tokens = [*how.stop_tokens, *tokenizer.turn_ends()]
    texts = [""] * len(prompts)
    for i, piece in write(loaded.model, tokenizer, [tokenizer.encode_prompt(p) for p in prompts], how, continued=True):
        texts[i] += piece
    return texts


def _can_answer(loaded: modelfolder.Loaded) -> None:
    if loaded.task.kind == "image" and not loaded.task.state()["labels"]:
        raise ModelError(
            "{model} has no classifier: its weights are features only",
            "{model} 没有分类器：其权重只有特征部分",
            model=loaded.card["source_run"],
            fix="groundup tune MODEL --data SPEC   gives it one",
            fix_zh="groundup tune MODEL --data SPEC   可为它训练一个",
        )


def _expand(item: Any, task: Task) -> list[tuple[str, Any]]:
    """One argument as one or several raw inputs with names for the answer."""
    if not isinstance(item, str | Path):
        return [("input", item)]
    path = Path(item).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError:  # a row of numbers can be longer than a file name may be
        folder = file = False
    if task.kind == "image" and folder:
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not pictures:
            raise DataError("{path}: no pictures found", "{path}：没有找到图片", path=path)
        return [(str(p), p) for p in pictures]
    if task.kind == "vector" and file:
        header, rows = read_rows(path)
        return [
            (f"{path.name} line {line}", dict(zip(header, row)) if not header[0].startswith("c0") else ",".join(row)) for line, row in rows
        ]
    return [(str(item), item)]


# -- export and serve ----------------------------------------------------------------------------------------------------------
def export(
    model: str | Path | Run, to: str, out: str | Path | None = None, *, force: bool = False, trust_code: bool = False
) -> dict[str, Any]:
    """Writes a model in another format behind the parity gate. See `exporting.export.export`."""
    name = str(getattr(model, "path", model))
    if to == "merged":
        from groundup.exporting.merge import merge

        return merge(name, out, force=force, trust_code=trust_code)
    _not_for_text(model, "exported", "导出")
    from groundup.exporting.export import export as write

    return write(name, to, out, force=force, trust_code=trust_code)


def serve(model: str | Path | Run, **options: Any) -> None:
    """Serves a model over HTTP until it is stopped. See `serving.server.serve`."""
    _not_for_text(model, "served", "提供服务")
    from groundup.serving.server import serve as run

    run(str(getattr(model, "path", model)), **options)


def _not_for_text(model: Any, what: str, what_zh: str) -> None:
    name = str(getattr(model, "path", model))
    task = modelfolder.task_name(name)
    if task is not None and ".py:" not in task and TASKS.get(task).target.kind == "text":
        raise ModelError(
            "language models cannot be {what} yet; their folder opens in transformers and vLLM as it is",
            "语言模型暂时还不能{what_zh}；其目录可直接用 transformers 与 vLLM 打开",
            what=what,
            what_zh=what_zh,
            fix="groundup generate MODEL PROMPT",
        )


def verify_run(text: str | Path) -> dict[str, Any]:
    """Every checkpoint and the model folder against their manifests, and the reference outputs replayed."""
    run = resolve_run(text)
    checks: list[dict[str, Any]] = []
    checkpoints = Checkpoints(run.checkpoints, {})
    for step in checkpoints.steps():
        checks.append({"what": checkpoints.path(step).name, "problem": damage(checkpoints.path(step))})
    if run.model.is_dir():
        problem = damage(run.model)
        if problem is None:
            try:
                difference = modelfolder.replay(modelfolder.load(run.path))
                problem = None if difference <= 1e-4 else f"reference outputs differ by {difference:.2e}"
            except GroundupError as error:
                problem = error.en
        checks.append({"what": "model", "problem": problem})
    elif run.result() is not None:
        checks.append({"what": "model", "problem": "the run is finished and its model folder is missing"})
    return {
        "run": str(run.path),
        "ok": all(c["problem"] is None for c in checks) and bool(checks),
        "finished": run.result() is not None,
        "checks": checks,
    }
