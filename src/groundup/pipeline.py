"""The stages joined: train, tune, evaluate, predict. Recipe in, run folder out; the only place that knows all parts.

From the command line to `loss.backward()`: `cli.main -> pipeline.train -> loop.train -> loop.step`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import groundup
from groundup import modelfolder
from groundup.core import console, device, files, units
from groundup.core.errors import DataError, GroundupError, RecipeError, RunError, TrainError, did_you_mean
from groundup.core.messages import say
from groundup.core.recipe import EXTENDABLE, RESUMABLE, Data, Named, Recipe, differences, load, override, shipped
from groundup.core.registry import METHODS, MODELS
from groundup.core.run import RunFolder, command_line, newest_finished, resolve_run
from groundup.data import statistics
from groundup.data.prepare import Prepared, absolute_source, prepare
from groundup.data.streaming import default_workers
from groundup.env import probe
from groundup.evaluation import card, report
from groundup.evaluation.evaluate import evaluate as evaluate_split
from groundup.evaluation.evaluate import summary
from groundup.models.base import build_model, count_parameters
from groundup.tasks.base import Encoded, Task
from groundup.training import loop
from groundup.training.batches import Batches
from groundup.training.checkpoint import Checkpoints, load_weights
from groundup.training.optim import build_optimizers
from groundup.training.signals import StopRequest
from groundup.training.state import TrainState, new_state
from groundup.training.watch import build_watchers

Overrides = Mapping[str, Any]


@dataclass
class Run:
    """A finished training: its folder and what it reported."""

    path: Path
    result: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.result["metrics"])

    @property
    def model(self) -> Path:
        return self.path / "model"

    def load(self, *, trust_code: bool = False) -> modelfolder.Loaded:
        return modelfolder.load(self.path, trust_code=trust_code)

    def evaluate(self, data: str | None = None, split: str | None = None, **options: Any) -> dict[str, Any]:
        return evaluate(self, data, split=split, **options)

    def predict(self, *inputs: Any, **options: Any) -> list[dict[str, Any]]:
        return predict(self, *inputs, **options)


@dataclass
class Job:
    """Everything of one training that is built before the loop."""

    recipe: Recipe
    run: RunFolder
    prepared: Prepared
    task: Task
    base: modelfolder.Loaded | None
    state: TrainState
    plan: loop.Plan
    batches: Batches
    keeper: loop.Keeper
    validation: Encoded | None
    resumed_from: int | None = None
    started: float = field(default_factory=time.monotonic)


# -- train ---------------------------------------------------------------------------------------------------------------------
def train(recipe: str | Path | Recipe | Mapping[str, Any] | None, overrides: Overrides | None = None, *, out: str | Path | None = None,
          resume: bool = False, extend: bool = False, trust_code: bool = False) -> Run:
    """Trains a recipe and returns the finished run.

    Args:
        recipe: a shipped recipe's name, a YAML file, a Recipe or a mapping; None with `resume` takes the run's own.
        overrides: dotted key -> value, as {'train.epochs': 1}.
        out: the run folder; default `runs/<name>-<utc>-<id>`.
        resume: continue what is in `out` (a run that is finished is returned as it is; with nothing there, it starts).
        extend: on resume, allow another `train.epochs` or `train.steps`.
        trust_code: run user code that comes with the model folder `init` names.

    Raises:
        UserError: (its subclasses) a mistake in the recipe, the data, the model, or the run folder.
        TrainError: the training had to stop.
        Stopped: SIGINT or SIGTERM; everything is saved.
    """
    begin = time.monotonic()
    resolved, run, done = _open_run(recipe, overrides or {}, Path(out).expanduser() if out is not None else None, resume=resume, extend=extend)
    if done is not None:
        console.line(say("{run} is finished already", "{run} 已经完成", run=run.path))
        return Run(run.path, done)
    watchers: list[loop.Watcher] = []
    try:
        with StopRequest() as stop:
            job = _build(resolved, run, stop, resume=resume, trust_code=trust_code)
            watchers = build_watchers(run, metric=job.plan.metric, tensorboard=resolved.watch.tensorboard, profile=resolved.watch.profile,
                                      trackers=resolved.watch.trackers)
            trained = time.monotonic()
            loop.train(job.state, job.batches, job.task, job.plan, job.keeper, job.validation, watchers, stop)
            seconds = {"train": time.monotonic() - trained}
            _close(watchers)
            return _finish(job, begin, seconds)
    except GroundupError as error:
        run.event("error", type=type(error).__name__, message=error.en)
        raise
    finally:
        _close(watchers)
        run.close()


def _close(watchers: list[loop.Watcher]) -> None:
    while watchers:
        watchers.pop().end()


def plan_only(recipe: str | Path | Recipe | Mapping[str, Any], overrides: Overrides | None = None) -> dict[str, Any]:
    """`--dry-run`: the resolved recipe, the data's splits and the model's size, with one rehearsed step and nothing kept."""
    with tempfile.TemporaryDirectory(prefix="groundup-dry-run-") as folder, StopRequest() as stop:
        resolved, run, _ = _open_run(recipe, overrides or {}, Path(folder) / "run", resume=False, extend=False)
        try:
            job = _build(resolved, run, stop, resume=False, trust_code=False)
            total, trainable = count_parameters(job.state.model)
            return {"recipe": resolved.model_dump(mode="json"), "decisions": run.decisions, "steps": job.state.total,
                    "splits": {name: len(index) for name, index in job.prepared.splits.items()},
                    "parameters": {"all": total, "trainable": trainable}, "step_seconds": round(run.decisions["step_seconds"]["value"], 4)}
        finally:
            run.close()


def _open_run(recipe: Any, overrides: Overrides, out: Path | None, *, resume: bool, extend: bool) -> tuple[Recipe, RunFolder, dict[str, Any] | None]:
    """The resolved recipe and its locked run folder; and the result, where that run is finished."""
    existing = resume and out is not None and (out / "recipe.yaml").is_file()
    if resume and out is None:
        raise RunError("--resume needs the run folder", "--resume 需要指定运行目录", fix="groundup train --resume --out RUN   (groundup runs list shows them)")
    if not existing:
        if recipe is None:
            if resume:
                raise RunError("{out} is not a run folder, and no recipe was given to start one", "{out} 不是运行目录，也没有给出用于新训练的 recipe",
                               out=out, fix="groundup train RECIPE --resume --out {out}")
            raise RecipeError("no recipe was given", "没有给出 recipe", fix="groundup recipes")
        resolved = _absolute(load(recipe, overrides))
        return resolved, RunFolder.create(resolved, out, command_line()), None
    assert out is not None
    run = RunFolder.open(out, lock=True)
    try:
        stored = run.recipe()
        if recipe is None:
            recipe = stored
        resolved = _absolute(load(recipe, overrides))
        differ = {k: v for k, v in differences(stored, resolved).items() if not k.startswith(RESUMABLE)}
        longer = {k for k in differ if k in EXTENDABLE}
        refused = {k: v for k, v in differ.items() if not (extend and k in longer)}
        if refused:
            listed = "\n".join(f"    {k}: {old!r} -> {new!r}" for k, (old, new) in refused.items())
            raise RunError(
                "{out} was started with another recipe; these fields differ (run -> now):\n{listed}", "{out} 是用另一份 recipe 开始的；以下字段不同（原来 -> 现在）：\n{listed}",
                out=out, listed=listed, fix="add --extend to train longer" if set(refused) <= set(EXTENDABLE) else "groundup train --resume --out {out}   (its own recipe)",
                fix_zh="加 --extend 以延长训练" if set(refused) <= set(EXTENDABLE) else "groundup train --resume --out {out}   （用它自己的 recipe）",
            )
        if (done := run.result()) is not None:
            if not longer:
                run.close()
                return resolved, run, done
            (out / "result.json").unlink()
        if differences(stored, resolved):
            files.write_text(out / "recipe.yaml", resolved.to_yaml())
    except BaseException:
        run.close()
        raise
    return resolved, run, None


def _absolute(recipe: Recipe) -> Recipe:
    """Paths made absolute, so that the run can be resumed from any folder; tokens refused where no task counts them."""
    if recipe.train.tokens is not None:
        raise RecipeError("train.tokens is for language models; task '{task}' counts samples", "train.tokens 用于语言模型；任务 '{task}' 按样本计数", task=recipe.task.name,
                          fix="--set train.epochs=3   or   --set train.steps=1000")

    def code(named: Named) -> Named:
        path, _, attribute = named.name.rpartition(":")
        return named.model_copy(update={"name": f"{Path(path).expanduser().resolve()}:{attribute}"}) if path.endswith(".py") else named

    init = recipe.init
    if init and Path(init).expanduser().exists():
        init = str(Path(init).expanduser().resolve())
    return recipe.model_copy(update={"data": absolute_source(recipe.data), "model": code(recipe.model), "task": code(recipe.task), "init": init})


def _build(recipe: Recipe, run: RunFolder, stop: StopRequest, *, resume: bool, trust_code: bool) -> Job:
    """Data, task, model, optimizers, state and plan of a run, with every `auto` decided; restored where there is a checkpoint."""
    console.line(say("run folder {path}", "运行目录 {path}", path=run.path))
    base = _open_base(recipe, run, trust_code)
    task = modelfolder.build_task(recipe.task.name, recipe.task.arguments)
    prepared = prepare(_like_base(recipe.data, base), classification=task.classification)
    _fit(task, prepared, base)
    _record_data(run, prepared, task, resumed=resume)

    where = run.decide("device", *_reasoned(device.choose_device(recipe.train.device)))
    precision = run.decide("precision", *_reasoned(device.choose_precision(recipe.train.precision, where)))
    threads = run.decide("threads", torch.get_num_threads(), "torch's own choice on this machine", "torch 在本机上的默认值")
    if recipe.train.deterministic and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # another thread count adds in another order: the promise holds for the recorded one
    device.set_deterministic(recipe.train.deterministic)
    device.seed_everything(recipe.train.seed)
    at = torch.device(where)

    if base is not None:
        model = base.model
        _new_head(model, task, base)
    else:
        model = build_model(recipe.model.name, recipe.model.arguments, task.input_shape, task.num_outputs)
    model.to(at)
    method = METHODS.get(recipe.method.name)
    frozen = method.target(model, **METHODS.build_arguments(method, recipe.method.arguments, "method"))
    optimizers = build_optimizers(model, recipe.optim, where)

    workers = recipe.data.workers if recipe.data.workers != "auto" else default_workers()
    on_restart = lambda why: run.event("worker_restart", why=why)  # noqa: E731
    encoded = {name: task.prepare(prepared.dataset, prepared.splits[name], at, workers=workers, on_restart=on_restart)
               for name in ("train", "validation") if name in prepared.splits}
    batch_size = _batch_size(recipe, run, len(encoded["train"]))
    seed = recipe.train.seed
    batches = Batches(task, encoded["train"], batch_size=batch_size, micro_batch_size=batch_size, seed=seed, device=at)
    total = recipe.train.steps if recipe.train.steps is not None else batches.order.steps(float(recipe.train.epochs or 1))
    assert isinstance(total, int)
    state = new_state(model, optimizers, total, at, ema=recipe.train.ema is not None, fp16=precision == "float16")

    metric_set = task.metrics()
    metric = recipe.evaluate.metric if recipe.evaluate.metric != "auto" else task.default_metric
    if metric not in metric_set.higher_is_better:
        hint, hint_zh = did_you_mean(metric, metric_set.higher_is_better)
        raise RecipeError("evaluate.metric = '{metric}' is not a metric of task '{task}'." + hint, "任务 '{task}' 没有指标 evaluate.metric = '{metric}'。" + hint_zh,
                          metric=metric, task=recipe.task.name)
    per_epoch = len(encoded["train"]) / batch_size
    save = recipe.train.save_every
    plan = loop.Plan(
        device=at, dtype=getattr(torch, precision), schedule=recipe.schedule, clip_norm=recipe.train.clip_norm, ema=recipe.train.ema,
        log_every=recipe.watch.log_every, steps_per_epoch=per_epoch, evaluate_every=per_epoch if recipe.evaluate.every == "epoch" else float(recipe.evaluate.every),
        metric=metric, higher_is_better=metric_set.higher_is_better[metric], early_stopping=recipe.train.early_stopping,
        save_steps=save if isinstance(save, int) else None, save_seconds=units.seconds(save) if isinstance(save, str) else None,
        keep=recipe.train.keep, frozen=frozen,
    )
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": where, "deterministic": recipe.train.deterministic,
             "world_size": 1, "fingerprint": prepared.fingerprint, "machine": _machine()}
    checkpoints = Checkpoints(run.checkpoints, facts)
    checkpoints.sweep()
    job = Job(recipe, run, prepared, task, base, state, plan, batches, loop.Keeper(checkpoints, run, plan), encoded.get("validation"))
    restored = checkpoints.load_newest(state) if resume else None
    if restored is None:
        _rehearse(job)
        run.event("started", groundup=groundup.__version__, steps=total)
    else:
        _resumed(job, restored.step, restored.facts, facts, restored.passed_over)
        state.total = total  # another one only with --extend
        state.stopped_early = state.stopped_early and restored.step >= total
        batches.micro_batch_size = run.decisions["micro_batch_size"]["value"]
        batches.per_step = -(-batch_size // batches.micro_batch_size)
        _compile(job, run.decisions["compile"]["value"])
    all_parameters, trainable = count_parameters(model)
    console.line(say("{task}: {name}, {n:,} parameters ({t:,} trained), {steps:,} steps of {batch} samples on {device}",
                     "{task}：{name}，{n:,} 个参数（训练 {t:,} 个），{steps:,} 步、每步 {batch} 个样本，设备 {device}",
                     task=recipe.task.name, name=recipe.model.name, n=all_parameters, t=trainable, steps=total, batch=batch_size, device=where))
    exact = recipe.train.deterministic
    console.line(say("resume promise: bit-exact on this machine with {t} threads", "恢复承诺：在本机以 {t} 个线程逐位一致", t=threads) if exact else
                 say("resume promise: same samples and batches, equal within floating-point tolerance (train.deterministic=true makes it bit-exact)",
                     "恢复承诺：样本与批次相同，结果在浮点误差内一致（train.deterministic=true 可做到逐位一致）"))
    return job


def _open_base(recipe: Recipe, run: RunFolder, trust_code: bool) -> modelfolder.Loaded | None:
    """The model that `init` names. `recipe:NAME` is the newest finished run of a shipped recipe, trained now where there is none."""
    if recipe.init is None:
        return None
    where = run.decisions["init"]["value"]["path"] if "init" in run.decisions else recipe.init
    if where.startswith("recipe:"):
        name = where.removeprefix("recipe:")
        if name not in shipped():
            hint, hint_zh = did_you_mean(name, shipped())
            raise RecipeError("init = recipe:{name} is not a shipped recipe." + hint, "init = recipe:{name} 不是自带的 recipe。" + hint_zh, name=name)
        found = newest_finished(Path("runs"), name)
        if found is None:
            console.line(say("'{name}' has no finished run here yet: training it first", "这里还没有 '{name}' 的训练结果：先训练它", name=name))
            where = str(train(name).path.resolve())
        else:
            where = str(found.path.resolve())
    base = modelfolder.load(where, trust_code=trust_code)
    if base.card["task"]["name"] != recipe.task.name:
        raise RecipeError("init is a model for task '{found}', the recipe's task is '{expected}'", "init 的模型属于任务 '{found}'，而 recipe 的任务是 '{expected}'",
                          found=base.card["task"]["name"], expected=recipe.task.name, fix="--set task={found}")
    architecture = files.read_json(base.path / "config.json")["architecture"]
    if architecture != recipe.model.name and ".py:" not in architecture:
        raise RecipeError("init is a '{found}', the recipe's model is '{expected}'", "init 的模型是 '{found}'，而 recipe 的模型是 '{expected}'",
                          found=architecture, expected=recipe.model.name, fix="--set model={found}")
    value = {"path": str(base.path.resolve()), "sha256": base.sha256}
    decided = run.decide("init", value, "the model to start from, with its weights' digest", "起始模型及其权重摘要")
    if decided["sha256"] != value["sha256"]:
        raise RunError("the model to start from has changed since this run began: {path}", "起始模型自本次训练开始后已改变：{path}", path=value["path"],
                       fix="start a new run with another --out", fix_zh="用另一个 --out 重新开始")
    return base


def _like_base(config: Data, base: modelfolder.Loaded | None) -> Data:
    """Pictures are brought to the base model's size where the recipe leaves it open."""
    if base is None or len(base.task.input_shape) != 3:
        return config
    channels, height, width = base.task.input_shape
    image = config.image.model_copy(update={
        "size": [height, width] if config.image.size == "auto" else config.image.size,
        "channels": channels if config.image.channels == "auto" else config.image.channels,
    })
    return config.model_copy(update={"image": image})


def _fit(task: Task, prepared: Prepared, base: modelfolder.Loaded | None) -> None:
    dataset = prepared.dataset
    if dataset.kind != task.kind:
        raise DataError("{name} holds {found}s; the task reads {expected}s", "{name} 是 {found} 数据；任务需要 {expected} 数据", name=dataset.name, found=dataset.kind,
                        expected=task.kind, fix="--set task=" + ("image-classification" if dataset.kind == "image" else "vector-classification"))
    if hasattr(task, "augment"):
        task.augment = prepared.config.augment
    task.fit(dataset, prepared.splits["train"])
    if base is not None:  # features were learned under the base's normalisation: new labels, old preprocessing
        task.load_state({"labels": task.state()["labels"], "preprocessor": base.task.state()["preprocessor"]})


def _new_head(model: nn.Module, task: Task, base: modelfolder.Loaded) -> None:
    """A fresh last layer where the labels are not the base's."""
    if task.state()["labels"] == base.task.state()["labels"] and task.num_outputs == base.task.num_outputs:
        return
    reset = getattr(model, "reset_head", None)
    if reset is None:
        raise RecipeError("the labels differ from the base model's, and {kind} has no reset_head(num_outputs)", "标签与起始模型不同，而 {kind} 没有 reset_head(num_outputs)",
                          kind=type(model).__name__, fix="derive it from groundup.models.Model", fix_zh="让它继承 groundup.models.Model")
    reset(task.num_outputs)


def _record_data(run: RunFolder, prepared: Prepared, task: Task, *, resumed: bool) -> None:
    """data.json and rejected.jsonl; on resume the data must be the same."""
    path = run.path / "data.json"
    if resumed and path.is_file():
        stored = files.read_json(path)
        if stored["fingerprint"] != prepared.fingerprint:
            now = prepared.dataset.files
            changed = sorted(n for n in {*stored["files"], *now} if stored["files"].get(n) != now.get(n))
            raise RunError("the data has changed since this run began: {what}", "数据自本次训练开始后已改变：{what}",
                           what=", ".join(changed[:5]) + (f" (+{len(changed) - 5})" if len(changed) > 5 else "") or prepared.dataset.name,
                           fix="put the old data back, or start a new run with another --out", fix_zh="恢复原来的数据，或用另一个 --out 重新开始")
    else:
        facts = statistics.describe(prepared, classification=task.classification)
        files.write_json(path, {"fingerprint": prepared.fingerprint, "files": prepared.dataset.files, "statistics": facts})
        files.write_json(run.path / "environment.json", probe.facts(quick=True) | {"groundup": groundup.__version__, "torch_version": torch.__version__})
        if prepared.dataset.kind == "image":
            (run.path / "plots").mkdir(exist_ok=True)
            statistics.sample_grid(prepared, run.path / "plots" / "samples.png")
        if prepared.dataset.rejected:
            files.write_text(run.path / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in prepared.dataset.rejected))
    for i, (en, zh) in enumerate(prepared.notes):
        run.decide(f"data.{i}", len(prepared.dataset), en, zh)
        console.line(say("data: {note}", "数据：{note}", note=say("{en}", "{zh}", en=en, zh=zh)))
    console.line(say("data: {name}, {splits}", "数据：{name}，{splits}", name=prepared.dataset.name,
                     splits=", ".join(f"{k} {len(v):,}" for k, v in prepared.splits.items())))


def _reasoned(decision: device.Decision) -> tuple[Any, str, str]:
    return decision.value, decision.reason, decision.reason_zh


def _batch_size(recipe: Recipe, run: RunFolder, n: int) -> int:
    wanted = recipe.train.batch_size
    if n >= wanted:
        return wanted
    chosen = run.decide("batch_size", n, f"the training split has {n} records, fewer than train.batch_size = {wanted}", f"训练集只有 {n} 条记录，少于 train.batch_size = {wanted}")
    return int(chosen)


def _machine() -> str:
    import platform

    return f"{platform.system()} {platform.machine()}"


def _rehearse(job: Job) -> None:
    """The dry step; and the choices that depend on it: the micro-batch that fits, and whether compiling pays."""
    recipe, run, batches = job.recipe, job.run, job.batches
    wanted = recipe.train.micro_batch_size
    batches.micro_batch_size = min(wanted, batches.batch_size) if wanted != "auto" else batches.batch_size
    while True:
        batches.per_step = -(-batches.batch_size // batches.micro_batch_size)
        try:
            seconds = loop.rehearse(job.state, batches, job.task, job.plan)
            break
        except torch.OutOfMemoryError as error:
            if wanted != "auto" or batches.micro_batch_size == 1:
                raise TrainError("a batch of {n} samples does not fit into the memory of {device}", "{device} 的内存放不下 {n} 个样本的批次", n=batches.micro_batch_size,
                                 device=job.plan.device, fix="--set train.micro_batch_size=auto   or a smaller model") from error
            batches.micro_batch_size //= 2
    whole = batches.micro_batch_size == batches.batch_size
    run.decide("micro_batch_size", batches.micro_batch_size, "asked for in the recipe" if wanted != "auto" else "the whole batch fits into memory" if whole else
               "the largest half of the batch that fits into memory", "由 recipe 指定" if wanted != "auto" else "整个批次能放进内存" if whole else "能放进内存的最大对半批次")
    run.decide("step_seconds", seconds, "measured in the rehearsal (forward and backward)", "在预演中测得（前向与反向）")
    estimate = seconds * job.state.total
    if recipe.train.compile != "auto":
        chosen, reason, reason_zh = recipe.train.compile, "asked for in the recipe", "由 recipe 指定"
    elif job.plan.device.type != "cuda" or not _has_triton():
        # On CPUs compiling these models gains a few per cent and costs a minute; it also needs a C++ compiler.
        chosen, reason, reason_zh = False, f"compiling pays on CUDA with Triton; this run is on {job.plan.device.type}", f"编译只在 CUDA + Triton 上划算；本次在 {job.plan.device.type} 上运行"
    else:
        chosen = estimate > 600
        reason = f"the run is estimated at {units.human_seconds(estimate)}; compiling takes about a minute"
        reason_zh = f"预计训练 {units.human_seconds(estimate)}；编译约需一分钟"
    _compile(job, run.decide("compile", chosen, reason, reason_zh))


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _compile(job: Job, on: bool) -> None:
    if on:
        job.state.model.compile()  # in place: the names of parameters stay those of the plain model


def _resumed(job: Job, step: int, then: dict[str, Any], now: dict[str, Any], passed_over: list[tuple[str, str]]) -> None:
    """Says where the run goes on from, what was damaged, and which promise holds."""
    run = job.run
    for name, reason in passed_over:
        run.event("damaged_checkpoint", checkpoint=name, reason=reason)
        console.line(say("! checkpoint {name} is damaged ({reason}) and is not used", "! 检查点 {name} 已损坏（{reason}），不使用", name=name, reason=reason), style="yellow")
        shutil.rmtree(run.checkpoints / name, ignore_errors=True)  # its step is written anew
    differ = {k: (then.get(k), now[k]) for k in ("torch", "threads", "device", "world_size", "machine") if then.get(k) != now[k]}
    exact = now["deterministic"] and not differ
    attempt = 1 + sum(1 for _ in (run.path / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines() if '"event": "resumed"' in _)
    marked = run.supersede(step, job.state.evaluated_at, attempt)
    run.event("resumed", step=step, attempt=attempt, superseded_rows=marked, promise="bit-exact" if exact else "tolerance", differs=differ)
    job.resumed_from, job.keeper.saved_at = step, step
    console.line(say("resumed from step {step}", "从第 {step} 步恢复", step=step))
    if differ:
        listed = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in differ.items())
        console.line(say("! not bit-exact any more: {listed}", "! 不再逐位一致：{listed}", listed=listed), style="yellow")


# -- the end of a training ---------------------------------------------------------------------------------------------------
def _finish(job: Job, begin: float, seconds: dict[str, float]) -> Run:
    """The best weights, evaluated; the model folder; the report. result.json is written last."""
    run, recipe, state = job.run, job.recipe, job.state
    weights, chosen = _final_weights(job)
    load_weights(state.model, weights)
    evaluated = time.monotonic()
    name = next((s for s in ("test", "validation", "train") if s in job.prepared.splits), "train")
    encoded = job.task.prepare(job.prepared.dataset, job.prepared.splits[name], job.plan.device)
    scores = evaluate_split(job.task, state.model, encoded, job.plan.device)
    assert scores is not None
    found = summary(scores)
    before_after = _before_after(job, encoded, found, name) if job.base is not None else None
    seconds["evaluate"] = time.monotonic() - evaluated
    result = {
        "run": str(run.path), "model": str(run.model), "name": recipe.name, "task": recipe.task.name, "architecture": recipe.model.name,
        "parameters": count_parameters(state.model)[0], "steps": state.step, "resumed_from": job.resumed_from, "split": name, "metric": job.plan.metric,
        "best_step": chosen, **found, "before_after": before_after,
    }
    data = files.read_json(run.path / "data.json")
    facts = {
        "source_run": recipe.name, "metrics": {name: found["metrics"]}, "intervals": {name: found["intervals"]}, "seed": recipe.train.seed,
        "data": {"spec": recipe.data.model_dump(mode="json"), "fingerprint": job.prepared.fingerprint},
        "parent": {"sha256": run.decisions["init"]["value"]["sha256"]} if "init" in run.decisions else None,
    }
    _save_model(job, weights, facts, card.model_card(recipe, result, data))
    seconds["total"] = time.monotonic() - begin
    result["seconds"] = {k: round(v, 3) for k, v in seconds.items()}
    try:
        report.write_report(run, result)
        files.write_json(run.path / "result.json", result)
    except OSError as error:
        console.line(say("! the model is saved, its report could not be written: {cause}", "! 模型已保存，但报告未能写入：{cause}", cause=error.strerror or error), style="yellow")
    run.event("finished", step=state.step)
    lost = run.metrics.dropped + run.events.dropped
    if lost:
        console.line(say("! {n} rows of metrics and events could not be written (full disk)", "! 有 {n} 行指标与事件未能写入（磁盘已满）", n=lost), style="yellow")
    return Run(run.path, result)


def _final_weights(job: Job) -> tuple[dict[str, Any], int]:
    """What goes into the model folder, and the step it is from."""
    state, keeper = job.state, job.keeper
    current = dict(state.ema if state.ema is not None else state.model.state_dict())
    if job.recipe.train.keep == "last" or job.validation is None or state.best_step in (-1, state.step):
        return current, state.step
    stored = keeper.best_weights or keeper.checkpoints.weights(state.best_step, ema=state.ema is not None)
    if stored is None:
        job.run.event("best_lost", step=state.best_step)
        console.line(say("! the best weights (step {step}) are not on the disk any more; the model is that of the last step",
                         "! 最好的权重（第 {step} 步）已不在磁盘上；模型取最后一步", step=state.best_step), style="yellow")
        return current, state.step
    return {k: v.to(job.plan.device) for k, v in stored.items()}, state.best_step


def _save_model(job: Job, weights: dict[str, Any], facts: dict[str, Any], readme: str) -> None:
    """The model folder; on a full disk a copy elsewhere and an error, never silence."""
    run = job.run
    arguments = {"model": job.state.model, "weights": weights, "task": job.task, "recipe": job.recipe, "facts": facts, "readme": readme}
    try:
        modelfolder.save(run.model, **arguments)
        return
    except OSError as error:
        cause = error.strerror or str(error)
    rescue: Path | None = Path(tempfile.gettempdir()) / f"groundup-rescued-{run.path.name}"
    try:
        assert rescue is not None
        modelfolder.save(rescue, **arguments)
    except OSError:
        rescue = None
    steps = job.keeper.checkpoints.steps()
    run.event("model_not_saved", cause=cause, rescued=rescue is not None)
    raise TrainError(
        "the training is done, but {model} could not be written ({cause}). " + ("The model was put into {rescue} instead. " if rescue else "") + "Last checkpoint: {last}",
        "训练已完成，但 {model} 无法写入（{cause}）。" + ("模型已改存到 {rescue}。" if rescue else "") + "最后的检查点：{last}",
        model=run.model, cause=cause, rescue=rescue, last=f"step {steps[-1]}" if steps else "none",
        fix=f"free at least {files.human_bytes(_model_bytes(job.state.model))}, then: groundup train --resume --out {run.path}",
        fix_zh=f"腾出至少 {files.human_bytes(_model_bytes(job.state.model))}，然后：groundup train --resume --out {run.path}",
    )


def _model_bytes(model: nn.Module) -> int:
    return 2 * sum(t.numel() * t.element_size() for t in model.state_dict().values()) + 2**20


def _before_after(job: Job, encoded: Encoded, found: dict[str, Any], split: str) -> dict[str, Any]:
    """Base against tuned: on the new data, and on the base's own data (what was forgotten)."""
    assert job.base is not None
    base = modelfolder.load(job.base.path, trust_code=True, device=str(job.plan.device))  # its code ran already in this process
    metric = job.plan.metric
    same = base.task.state()["labels"] == job.task.state()["labels"]
    row: dict[str, Any] = {"what": "new data", "what_zh": "新数据", "metric": metric, "before": None, "before_interval": None,
                           "after": found["metrics"][metric], "after_interval": found["intervals"].get(metric), "note": "", "note_zh": ""}
    if same:
        scores = evaluate_split(base.task, base.model, encoded, job.plan.device)
        assert scores is not None
        row |= {"before": scores.compute()[metric], "before_interval": list(scores.intervals().get(metric, (math.nan, math.nan)))}
    else:
        row |= {"note": "the base does not know these labels", "note_zh": "起始模型不认识这些标签"}
    rows = [row]
    try:
        config = Data.model_validate(base.card["data"]["spec"])
        old = prepare(_like_base(config, base), classification=base.task.classification)
        where = next(s for s in ("test", "validation", "train") if s in old.splits)
        old_encoded = base.task.prepare(old.dataset, old.splits[where], job.plan.device)
        before = evaluate_split(base.task, base.model, old_encoded, job.plan.device)
        if not same:  # the old head on the tuned features
            own = {k: v for k, v in job.state.model.state_dict().items()}
            head = _head_keys(base.model)
            base.model.load_state_dict({k: v if k in head else own[k] for k, v in base.model.state_dict().items()})
            model: nn.Module = base.model
        else:
            model = job.state.model
        after = evaluate_split(base.task, model, old_encoded, job.plan.device)
        assert before is not None and after is not None
        old_metric = metric if metric in before.compute() else base.task.default_metric
        rows.append({
            "what": "old data", "what_zh": "旧数据", "metric": old_metric, "before": before.compute()[old_metric], "before_interval": list(before.intervals()[old_metric]),
            "after": after.compute()[old_metric], "after_interval": list(after.intervals()[old_metric]),
            "note": "" if same else "with the base's own head put back on the tuned features", "note_zh": "" if same else "在微调后的特征上放回起始模型原来的输出层",
        })
    except (DataError, StopIteration, KeyError) as error:
        job.run.event("old_data_not_evaluated", why=str(error))
    return {"split": split, "rows": rows}


def _head_keys(model: nn.Module) -> set[str]:
    """Names of the last layer group's tensors."""
    groups = getattr(model, "layer_groups", None)
    if groups is None:
        return set()
    last = list(groups().values())[-1]
    inside = {id(t) for m in last for t in (*m.parameters(), *m.buffers())}
    return {n for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in inside}


# -- tune ----------------------------------------------------------------------------------------------------------------------
def tuning_recipe(model: str | Path | Run, data: str, method: str = "full", overrides: Overrides | None = None, *, trust_code: bool = False) -> Recipe:
    """The recipe of a fine-tuning run: the base model's task and architecture, new data, a method, gentler defaults than from scratch."""
    base = modelfolder.load(model, trust_code=trust_code)
    config = files.read_json(base.path / "config.json")
    METHODS.get(method)  # an unknown method is an error before anything is read

    def named(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        path, _, attribute = name.rpartition(":")
        return {"name": f"{base.path / 'code' / Path(path).name}:{attribute}" if path.endswith(".py") else name, **arguments}

    tree: dict[str, Any] = {
        "name": f"{base.card['source_run']}-{method}", "task": named(base.card["task"]["name"], base.card["task"]["arguments"]), "data": {"source": data},
        "model": named(config["architecture"], config["arguments"]), "init": str(base.path.resolve()), "method": {"name": method},
        "optim": {"lr": 1e-2 if method == "head" else 1e-3}, "schedule": {"warmup": 0.05},
        "train": {"epochs": 10, "batch_size": 64},
    }
    return load(override(tree, overrides or {}))


def tune(model: str | Path | Run, data: str, method: str = "full", overrides: Overrides | None = None, *, out: str | Path | None = None,
         resume: bool = False, extend: bool = False, trust_code: bool = False) -> Run:
    """Fine-tunes a model on new data: writes a recipe and trains it; the model tuned from is never changed. See `train`."""
    return train(tuning_recipe(model, data, method, overrides, trust_code=trust_code), out=out, resume=resume, extend=extend, trust_code=trust_code)


# -- evaluate and predict ------------------------------------------------------------------------------------------------------
def evaluate(model: str | Path | Run, data: str | None = None, *, split: str | None = None, overrides: Overrides | None = None,
             out: str | Path | None = None, trust_code: bool = False) -> dict[str, Any]:
    """The metrics of a model on its own data or on another set, with 95 % intervals.

    Args:
        data: a data SPEC; default: the data it was trained on, divided as it was then.
        split: 'train', 'validation', 'test' or 'all' (default: test where there is one, else validation; 'all' for other data without splits).
        overrides: keys of the data section, as {'data.classes': [...]}.
        out: a folder for report.html, plots and metrics.json.
    """
    begin = time.monotonic()
    loaded = modelfolder.load(model, trust_code=trust_code)
    own = Data.model_validate(loaded.card["data"]["spec"])
    config = own if data is None else Data(source=data, columns=own.columns, classes=None)
    if overrides:
        from groundup.core.recipe import build

        tree = {"name": "evaluate", "task": loaded.card["task"]["name"], "model": "linear", "data": config.model_dump(mode="json")}
        config = build(override(tree, overrides), "--set", overridden=overrides).data
    prepared = prepare(_like_base(config, loaded), classification=loaded.task.classification)
    splits = dict(prepared.splits)
    if data is not None and not prepared.dataset.given:
        # Another set without splits of its own is a test set as a whole: nothing of it was trained on.
        import numpy as np

        splits = {"all": np.arange(len(prepared.dataset))}
    name = split or next(s for s in ("test", "validation", "all", "train") if s in splits)
    if name == "all":
        import numpy as np

        splits["all"] = np.arange(len(prepared.dataset))
    if name not in splits:
        hint, hint_zh = did_you_mean(name, splits)
        raise DataError("{data} has no split '{split}'." + hint, "{data} 没有划分 '{split}'。" + hint_zh, data=prepared.dataset.name, split=name)
    at = torch.device(device.choose_device().value)
    loaded.model.to(at)
    encoded = loaded.task.prepare(prepared.dataset, splits[name], at, workers=default_workers())
    scores = evaluate_split(loaded.task, loaded.model, encoded, at)
    assert scores is not None
    result = {"model": str(loaded.path), "data": prepared.dataset.name, "fingerprint": prepared.fingerprint, "split": name, "records": len(encoded),
              "same_data_as_training": prepared.fingerprint == loaded.card["data"]["fingerprint"], "metric": loaded.task.default_metric,
              **summary(scores), "seconds": round(time.monotonic() - begin, 3)}
    if out is not None:
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "metrics.json", result)
        result["report"] = str(report.evaluation_report(folder, f"{loaded.card['source_run']} on {prepared.dataset.name}", result))
    return result


def predict(model: str | Path | Run | modelfolder.Loaded, *inputs: Any, trust_code: bool = False) -> list[dict[str, Any]]:
    """Answers to raw inputs: paths of pictures, folders of pictures, rows of numbers ('5.1,3.5,1.4,0.2'), or CSV files of rows."""
    loaded = model if isinstance(model, modelfolder.Loaded) else modelfolder.load(model, trust_code=trust_code)
    return [{"input": label, **loaded.predict(raw)} for item in inputs for label, raw in _expand(item, loaded.task)]


def _expand(item: Any, task: Task) -> list[tuple[str, Any]]:
    """One argument as one or several raw inputs with names for the answer."""
    from groundup.data.dataset import IMAGE_SUFFIXES
    from groundup.data.table import read_rows

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
        return [(f"{path.name} line {line}", dict(zip(header, row)) if not header[0].startswith("c0") else ",".join(row)) for line, row in rows]
    return [(str(item), item)]


def verify_run(text: str | Path) -> dict[str, Any]:
    """Every checkpoint and the model folder against their manifests, and the reference outputs replayed."""
    from groundup.training.checkpoint import damage

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
    return {"run": str(run.path), "ok": all(c["problem"] is None for c in checks) and bool(checks), "finished": run.result() is not None, "checks": checks}
