"""A job: everything of one training that stands before the loop starts.

Data, task, model, optimizers, state and plan, with every `auto` decided and written down; restored where there is a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import groundup
from groundup import modelfolder
from groundup.automatic import batch_size_of, compile_model, flops_of, rehearse, take_path
from groundup.core import console, device, files, units
from groundup.core.errors import DataError, RecipeError, RunError, Stopped, did_you_mean
from groundup.core.messages import language, say, split_name
from groundup.core.recipe import EXTENDABLE, RESUMABLE, Data, Named, Recipe, differences, load, shipped
from groundup.core.registry import METHODS, MODELS, TASKS
from groundup.core.run import RunFolder, command_line, newest_finished, read_rows
from groundup.data import statistics
from groundup.data.prepare import Prepared, absolute_source, prepare
from groundup.data.streaming import default_workers
from groundup.env import probe
from groundup.models import library, lora
from groundup.models.base import build_model, count_parameters, placed
from groundup.models.language import LanguageModel
from groundup.models.weights import is_weights, load_into
from groundup.tasks.base import Encoded, Task
from groundup.training import loop
from groundup.training.batches import Batches
from groundup.training.checkpoint import Checkpoints
from groundup.training.optim import automatic_rate, build_optimizers
from groundup.training.parallel import Ranks
from groundup.training.state import TrainState, new_state
from groundup.tuning import stages_of

Overrides = Mapping[str, Any]
KINDS_ZH = {"image": "图片", "vector": "向量", "text": "文本"}


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


def open_run(
    recipe: Any, overrides: Overrides, out: Path | None, *, resume: bool, extend: bool
) -> tuple[Recipe, RunFolder, dict[str, Any] | None]:
    """The resolved recipe and its locked run folder; and the result, where that run is finished."""
    existing = resume and out is not None and (out / "recipe.yaml").is_file()
    if extend and not resume:
        raise RunError(
            "--extend makes a run longer that is there: it goes with --resume",
            "--extend 用于延长已有的运行：要与 --resume 同用",
            fix="groundup train RECIPE --resume --extend --out RUN --set train.epochs=20",
        )
    if resume and out is None:
        raise RunError(
            "--resume needs the run folder",
            "--resume 需要指定运行目录",
            fix="groundup train --resume --out RUN   (groundup runs list shows them)",
            fix_zh="groundup train --resume --out RUN   （groundup runs list 可列出）",
        )
    if not existing:
        if recipe is None:
            if resume:
                raise RunError(
                    "{out} is not a run folder, and no recipe was given to start one",
                    "{out} 不是运行目录，也没有给出用于新训练的 recipe",
                    out=out,
                    fix="groundup train RECIPE --resume --out {out}",
                )
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
                "{out} was started with another recipe; these fields differ (run -> now):\n{listed}",
                "{out} 是用另一份 recipe 开始的；以下字段不同（原来 -> 现在）：\n{listed}",
                out=out,
                listed=listed,
                fix="add --extend to train longer"
                if set(refused) <= set(EXTENDABLE)
                else "groundup train --resume --out {out}   (its own recipe)",
                fix_zh="加 --extend 以延长训练"
                if set(refused) <= set(EXTENDABLE)
                else "groundup train --resume --out {out}   （用它自己的 recipe）",
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


@contextlib.contextmanager
def removed_on_failure(run: RunFolder) -> Iterator[None]:
    """A run that fails before its first step leaves no folder behind: the corrected command can use the same --out."""
    fresh = not run.metrics.path.exists() and not run.checkpoints.exists()
    try:
        yield
    except BaseException as error:
        if fresh:
            run.close()
            shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(
                "stopped by Ctrl-C before the first step; what was prepared of the data is kept for the next start",
                "在第一步之前被 Ctrl-C 停止；已准备好的数据会留给下一次启动",
                exit_status=130,
                fix="the same command again" if fresh else "groundup train --resume --out {run}",
                fix_zh="重新运行同一条命令" if fresh else None,
                run=run.path,
            ) from error
        raise


def _absolute(recipe: Recipe) -> Recipe:
    """Paths made absolute, so that the run can be resumed from any folder; tokens refused where no task counts them."""
    if recipe.train.tokens is not None and not modelfolder.build_task(recipe.task.name, recipe.task.arguments).tokens_per_sample:
        raise RecipeError(
            "train.tokens is for language models; task '{task}' counts samples",
            "train.tokens 用于语言模型；任务 '{task}' 按样本计数",
            task=recipe.task.name,
            fix="--set train.epochs=3   or   --set train.steps=1000",
            fix_zh="--set train.epochs=3   或   --set train.steps=1000",
        )

    def code(named: Named) -> Named:
        path, _, attribute = named.name.rpartition(":")
        return named.model_copy(update={"name": f"{Path(path).expanduser().resolve()}:{attribute}"}) if path.endswith(".py") else named

    init = recipe.init
    if init and Path(init).expanduser().exists():
        init = str(Path(init).expanduser().resolve())
    evaluate = recipe.evaluate
    if evaluate.general not in ("auto", "none") and Path(evaluate.general).expanduser().exists():
        evaluate = evaluate.model_copy(update={"general": str(Path(evaluate.general).expanduser().resolve())})
    return recipe.model_copy(
        update={
            "evaluate": evaluate,
            "data": absolute_source(recipe.data),
            "model": code(recipe.model),
            "task": code(recipe.task),
            "init": init,
        }
    )


def build(
    recipe: Recipe,
    run: RunFolder,
    *,
    resume: bool,
    trust_code: bool,
    train_base: Callable[[str], Path],
    ranks: Ranks | None = None,
    checkpoints: Path | None = None,
) -> Job:
    """Data, task, model, optimizers, state and plan of a run, with every `auto` decided; restored where there is a checkpoint."""
    ranks = ranks or Ranks()
    run.agree = ranks.agree
    console.line(say("run folder {path}", "运行目录 {path}", path=run.path))
    base = _open_base(recipe, run, trust_code, train_base)
    task = modelfolder.build_task(recipe.task.name, recipe.task.arguments)
    check_settings(recipe, task, base)
    with ranks.first():
        prepared = prepare(like_base(task.reads(recipe.data), base), classification=task.classification, kind=task.kind)
        fit(task, prepared, base, recipe.keep_classes)
    _record_data(run, prepared, task, resumed=resume)
    for name, value, reason, reason_zh in task.decisions():
        run.decide(name, value, reason, reason_zh)
        console.line(f"{name}: {reason}" if language() == "en" else reason_zh)

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
        if recipe.method.name not in ("lora", "peft"):
            lora.merge(model)  # an adapter that the base came with
        _check_context(task, model)
        _new_head(model, task, base, recipe.keep_classes)
    else:
        model = build_model(recipe.model.name, recipe.model.arguments, task.input_shape, task.num_outputs)
        if recipe.init is not None:
            _load_weights(model, Path(recipe.init), run)
    if isinstance(model, LanguageModel):
        model.softcap = getattr(task, "softcap", None) or model.softcap
    if recipe.train.checkpointing != "none":
        if not isinstance(model, LanguageModel):
            raise RecipeError(
                "train.checkpointing is for language models, not for {kind}",
                "train.checkpointing 用于语言模型，不支持 {kind}",
                kind=type(model).__name__,
                fix="--set train.checkpointing=none",
            )
        model.recompute(recipe.train.checkpointing)
    method = METHODS.get(recipe.method.name)
    arguments = METHODS.build_arguments(method, recipe.method.arguments, "method")
    if not arguments.get("bits"):
        placed(model, at)
    made = method.target(model, **arguments)
    placed(model, at)  # a base in fewer bits goes to the device only so: whole it may not fit
    stages = stages_of(made)
    if (
        isinstance(model, LanguageModel)
        and base is not None
        and model.vocabulary > base.task.num_outputs
        and method.name in ("lora", "peft")
    ):
        raise RecipeError(
            "task.add_tokens: method '{method}' does not train the tables of tokens, so the new ones would stay as they begin",
            "task.add_tokens：方法 '{method}' 不训练词表，新词元将停留在初始值",
            method=method.name,
            fix="--method full",
        )
    stages[-1].enter(model)  # the one with the most to train: what the optimizers take, and what has to fit into memory
    _state_batch_norm(run, model, stages)
    if recipe.optim.lr == "auto":
        rate, counted = automatic_rate(model)
        run.decide("lr", rate, f"for {counted:,} parameters in the layers", f"对应各层共 {counted:,} 个参数")
    optimizers = build_optimizers(model, recipe.optim, where)

    workers = recipe.data.workers if recipe.data.workers != "auto" else default_workers()
    on_restart = lambda why: run.event("worker_restart", why=why)  # noqa: E731
    with ranks.first():
        encoded = {
            name: task.prepare(prepared.dataset, prepared.splits[name], at, workers=workers, on_restart=on_restart)
            for name in ("train", "validation")
            if name in prepared.splits
        }
    batch_size = batch_size_of(recipe, run, len(encoded["train"]))
    if batch_size < ranks.world:
        raise RecipeError(
            "train.batch_size = {n} cannot be divided among {world} processes",
            "train.batch_size = {n} 无法分给 {world} 个进程",
            n=batch_size,
            world=ranks.world,
            fix="--set train.batch_size={world}",
        )
    seed = recipe.train.seed
    balance = recipe.data.balance
    if balance and not task.classification:
        raise RecipeError("data.balance needs one label per record", "data.balance 需要每条记录只有一个标签", fix="--set data.balance=0")
    classes = encoded["train"].targets.cpu().numpy() if balance else None
    batches = Batches(
        task,
        encoded["train"],
        batch_size=batch_size,
        micro_batch_size=batch_size,
        seed=seed,
        device=at,
        classes=classes,
        balance=balance,
        ranks=ranks,
    )
    total = steps_of(recipe, batches)
    if (enough := getattr(task, "enough", None)) is not None:
        enough(encoded["train"], total * batch_size / len(encoded["train"]))
    state = new_state(model, optimizers, total, at, ema=recipe.train.ema is not None, fp16=precision == "float16")

    metric_set = task.metrics()
    metric = recipe.evaluate.metric if recipe.evaluate.metric != "auto" else task.default_metric
    if metric not in metric_set.higher_is_better:
        hint, hint_zh = did_you_mean(metric, metric_set.higher_is_better)
        raise RecipeError(
            "evaluate.metric = '{metric}' is not a metric of task '{task}'." + hint,
            "任务 '{task}' 没有指标 evaluate.metric = '{metric}'。" + hint_zh,
            metric=metric,
            task=recipe.task.name,
        )
    per_epoch = len(encoded["train"]) / batch_size
    save = recipe.train.save_every
    plan = loop.Plan(
        device=at,
        dtype=getattr(torch, precision),
        schedule=recipe.schedule,
        clip_norm=recipe.train.clip_norm,
        ema=recipe.train.ema,
        log_every=recipe.watch.log_every,
        steps_per_epoch=per_epoch,
        evaluate_every=per_epoch if recipe.evaluate.every == "epoch" else float(recipe.evaluate.every),
        metric=metric,
        higher_is_better=metric_set.higher_is_better[metric],
        early_stopping=recipe.train.early_stopping,
        save_steps=save if isinstance(save, int) else None,
        save_seconds=units.seconds(save) if isinstance(save, str) else None,
        keep=recipe.train.keep,
        stages=stages,
        ranks=ranks,
        **flops_of(task, model, run, at, precision),
    )
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": where,
        "deterministic": recipe.train.deterministic,
        "world_size": ranks.world,
        "kernels": library.version("train") if isinstance(model, LanguageModel) and at.type == "cpu" else None,
        "fingerprint": prepared.fingerprint,
        "machine": _machine(),
    }
    if (observe := getattr(task, "observe", None)) is not None:  # what it has to know of the model before the first step
        with ranks.first(), loop.mixed_precision(plan):
            every = {n: encoded[n] if n in encoded else task.prepare(prepared.dataset, index, at) for n, index in prepared.splits.items()}
            observe(model, every, (checkpoints or run.checkpoints).parent / "reference")
    stored = Checkpoints(checkpoints or run.checkpoints, facts)
    if ranks.rank == 0:
        stored.sweep()
    job = Job(recipe, run, prepared, task, base, state, plan, batches, loop.Keeper(stored, run, plan), encoded.get("validation"))
    with ranks.first():
        restored = stored.load_newest(state) if resume else None
    if restored is None:
        if resume:
            run.supersede(0, 0, attempt=1)  # killed before its first checkpoint: all of it is done again
        rehearse(job)
        run.event("started", groundup=groundup.__version__, steps=total)
    else:
        _resumed(job, restored.step, restored.facts, facts, restored.passed_over)
        state.total = total  # another one only with --extend
        state.stopped_early = state.stopped_early and restored.step >= total
        batches.micro_batch_size = run.decisions["micro_batch_size"]["value"]
        batches.tokens = run.decisions.get("micro_batch_tokens", {}).get("value")
        take_path(model, run)
        compile_model(job, run.decisions["compile"]["value"])
    device.give_back()  # what preparing and rehearsing took and the training does not
    all_parameters, trainable = count_parameters(model)
    console.line(
        say(
            "{task}: {name}, {n:,} parameters ({t:,} trained), {steps:,} steps of {batch} samples on {device}",
            "{task}：{name}，{n:,} 个参数（训练 {t:,} 个），{steps:,} 步、每步 {batch} 个样本，设备 {device}",
            task=recipe.task.name,
            name=recipe.model.name,
            n=all_parameters,
            t=trainable,
            steps=total,
            batch=batch_size,
            device=where,
        )
    )
    exact = recipe.train.deterministic
    console.line(
        say("resume promise: bit-exact on this machine with {t} threads", "恢复承诺：在本机以 {t} 个线程逐位一致", t=threads)
        if exact
        else say(
            "resume promise: same samples and batches, equal within floating-point tolerance (train.deterministic=true makes it bit-exact)",
            "恢复承诺：样本与批次相同，结果在浮点误差内一致（train.deterministic=true 可做到逐位一致）",
        )
    )
    return job


def steps_of(recipe: Recipe, batches: Batches) -> int:
    """The optimizer steps of a whole run."""
    total = recipe.train.steps if recipe.train.steps is not None else batches.order.steps(float(recipe.train.epochs or 1))
    if recipe.train.tokens is not None:
        total = -(-int(recipe.train.tokens) // (batches.batch_size * batches.task.tokens_per_sample))
    assert isinstance(total, int)
    return total


def _open_base(recipe: Recipe, run: RunFolder, trust_code: bool, train_base: Callable[[str], Path]) -> modelfolder.Loaded | None:
    """The model that `init` names. `recipe:NAME` is the newest finished run of a shipped recipe, trained now where there is none."""
    if recipe.init is None or is_weights(recipe.init):
        return None
    where = run.decisions["init"]["value"]["path"] if "init" in run.decisions else recipe.init
    if where.startswith("recipe:"):
        name = where.removeprefix("recipe:")
        if name not in shipped():
            hint, hint_zh = did_you_mean(name, shipped())
            raise RecipeError(
                "init = recipe:{name} is not a shipped recipe." + hint, "init = recipe:{name} 不是自带的 recipe。" + hint_zh, name=name
            )
        found = newest_finished(Path("runs"), name)
        if found is None:
            console.line(
                say("'{name}' has no finished run here yet: training it first", "这里还没有 '{name}' 的训练结果：先训练它", name=name)
            )
            where = str(train_base(name).resolve())
        else:
            where = str(found.path.resolve())
    base = modelfolder.load(where, trust_code=trust_code)
    tasks = [base.task.kind, TASKS.get(recipe.task.name).target.kind]
    if base.card["task"]["name"] != recipe.task.name and tasks != ["text", "text"]:
        raise RecipeError(
            "init is a model for task '{found}', the recipe's task is '{expected}'",
            "init 的模型属于任务 '{found}'，而 recipe 的任务是 '{expected}'",
            found=base.card["task"]["name"],
            expected=recipe.task.name,
            fix="--set task={found}",
        )
    architecture = base.architecture
    if architecture != recipe.model.name and ".py:" not in architecture:
        raise RecipeError(
            "init is a '{found}', the recipe's model is '{expected}'",
            "init 的模型是 '{found}'，而 recipe 的模型是 '{expected}'",
            found=architecture,
            expected=recipe.model.name,
            fix="--set model={found}",
        )
    _record_init(run, base.path, base.sha256)
    return base


def _record_init(run: RunFolder, path: Path, sha256: str) -> None:
    """Raises RunError where a resumed run finds another model or other weights than it began with."""
    value = {"path": str(path.resolve() if path.exists() else path), "sha256": sha256}
    decided = run.decide("init", value, "the model to start from, with its weights' digest", "起始模型及其权重摘要")
    if decided["sha256"] != value["sha256"]:
        raise RunError(
            "the model to start from has changed since this run began: {path}",
            "起始模型自本次训练开始后已改变：{path}",
            path=value["path"],
            fix="start a new run with another --out",
            fix_zh="用另一个 --out 重新开始",
        )


def _load_weights(model: nn.Module, path: Path, run: RunFolder) -> None:
    """Weights from a file of another system; a head for other classes stays fresh."""
    fresh = load_into(model, path)
    _record_init(run, path.expanduser(), files.sha256(path.expanduser()))
    left = say(", but for a new head", "，分类头除外") if fresh else ""
    console.line(say("weights from {path}{left}", "权重来自 {path}{left}", path=path, left=left))


def like_base(config: Data, base: modelfolder.Loaded | None) -> Data:
    """Pictures are brought to the base model's size, and in its way, where the recipe leaves it open."""
    if base is None or len(base.task.input_shape) != 3:
        return config
    channels, height, width = base.task.input_shape
    how = base.task.state()["preprocessor"].get("resize", {})
    image = config.image.model_copy(
        update={
            "size": [height, width] if config.image.size == "auto" else config.image.size,
            "channels": channels if config.image.channels == "auto" else config.image.channels,
            "resize": how.get("mode", "stretch"),
            "short_side": how.get("short_side") or "auto",
            "filter": how.get("filter", "bilinear"),
        }
    )
    return config.model_copy(update={"image": image})


def _state_batch_norm(run: RunFolder, model: nn.Module, stages: list[loop.Stage]) -> None:
    """Whether BatchNorm keeps the base's statistics is half of what fine-tuning does, and easily overlooked: it is said."""
    norms = {id(m) for m in model.modules() if isinstance(m, _BatchNorm)}
    if not norms:
        return
    still = [len(norms & {id(m) for frozen in stage.modules for m in frozen.modules()}) for stage in stages]
    value = "trained" if not any(still) else "frozen" if min(still) == len(norms) else "partly frozen"
    counts = ", ".join(f"{n}/{len(norms)}" for n in still)
    run.decide(
        "batch_norm",
        value,
        f"frozen BatchNorm layers of each stage: {counts} (method.batch_norm)",
        f"各阶段冻结的 BatchNorm 层数：{counts}（method.batch_norm）",
    )


def fit(task: Task, prepared: Prepared, base: modelfolder.Loaded | None, keep_classes: bool) -> None:
    """The task learns from the training split what it must know; a base's preprocessing stays."""
    dataset = prepared.dataset
    if dataset.kind != task.kind:
        raise DataError(
            "{name} holds {found}s; the task reads {expected}s",
            "{name} 是{found_zh}数据；任务需要{expected_zh}数据",
            name=dataset.name,
            found=dataset.kind,
            expected=task.kind,
            found_zh=KINDS_ZH[dataset.kind],
            expected_zh=KINDS_ZH[task.kind],
            fix="--set task=" + ("image-classification" if dataset.kind == "image" else "vector-classification"),
        )
    if configure := getattr(task, "configure", None):
        configure(prepared.config)
    if keep_classes:
        if base is None or not hasattr(task, "old_labels"):
            raise RecipeError(
                "keep_classes needs a model with classes to start from (init)",
                "keep_classes 需要一个带类别的起始模型（init）",
                fix="--set keep_classes=false",
            )
        task.old_labels = list(base.task.state()["labels"])
    if base is not None:
        task.read_files(base.companions)
    task.fit(dataset, prepared.splits["train"])
    if base is not None:  # features were learned under the base's normalisation: new labels, old preprocessing
        task.load_state({"labels": task.state()["labels"], "preprocessor": base.task.state()["preprocessor"] | task.own_state()})


def _new_head(model: nn.Module, task: Task, base: modelfolder.Loaded, keep_classes: bool) -> None:
    """A fresh last layer where the labels are not the base's; with `keep_classes` the rows of the old classes are put back into it."""
    if task.state()["labels"] == base.task.state()["labels"] and task.num_outputs == base.task.num_outputs:
        return
    if isinstance(model, LanguageModel):
        console.line(
            say(
                "new tokens: {n}; the tables grow from {old:,} to {new:,} rows",
                "新增 {n} 个词元：词表从 {old:,} 行增加到 {new:,} 行",
                n=task.num_outputs - model.vocabulary,
                old=model.vocabulary,
                new=task.num_outputs,
            )
        )
        model.resize(task.num_outputs)
        return
    reset = getattr(model, "reset_head", None)
    if reset is None:
        raise RecipeError(
            "the labels differ from the base model's, and {kind} has no reset_head(num_outputs)",
            "标签与起始模型不同，而 {kind} 没有 reset_head(num_outputs)",
            kind=type(model).__name__,
            fix="derive it from groundup.models.Model",
            fix_zh="让它继承 groundup.models.Model",
        )
    old = {name: value.clone() for name, value in model.state_dict().items()}
    reset(task.num_outputs)
    for name, value in model.state_dict().items() if keep_classes else ():
        if name in old and old[name].shape[1:] == value.shape[1:] and len(old[name]) < len(value):
            value[: len(old[name])] = old[name]


def _record_data(run: RunFolder, prepared: Prepared, task: Task, *, resumed: bool) -> None:
    """data.json and rejected.jsonl; on resume the data must be the same."""
    path = run.path / "data.json"
    if resumed and path.is_file():
        stored = files.read_json(path)
        if stored["fingerprint"] != prepared.fingerprint:
            now = prepared.dataset.files
            changed = sorted(n for n in {*stored["files"], *now} if stored["files"].get(n) != now.get(n))
            raise RunError(
                "the data has changed since this run began: {what}",
                "数据自本次训练开始后已改变：{what}",
                what=", ".join(changed[:5]) + (f" (+{len(changed) - 5})" if len(changed) > 5 else "") or prepared.dataset.name,
                fix="put the old data back, or start a new run with another --out",
                fix_zh="恢复原来的数据，或用另一个 --out 重新开始",
            )
    else:
        facts = statistics.describe(prepared, classification=task.classification)
        files.write_json(path, {"fingerprint": prepared.fingerprint, "files": prepared.dataset.files, "statistics": facts})
        files.write_json(
            run.path / "environment.json", probe.facts(quick=True) | {"groundup": groundup.__version__, "torch_version": torch.__version__}
        )
        if prepared.dataset.kind == "text" and prepared.dataset.inputs.rejected.is_file():
            with contextlib.suppress(OSError):
                shutil.copyfile(prepared.dataset.inputs.rejected, run.path / "rejected.jsonl")
        if prepared.dataset.kind == "image":
            (run.path / "plots").mkdir(exist_ok=True)
            statistics.sample_grid(prepared, run.path / "plots" / "samples.png")
        if prepared.dataset.rejected:
            files.write_text(
                run.path / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in prepared.dataset.rejected)
            )
    for i, (en, zh) in enumerate(prepared.notes):
        run.decide(f"data.{i}", len(prepared.dataset), en, zh)
        console.line(say("data: {note}", "数据：{note}", note=say("{en}", "{zh}", en=en, zh=zh)))
    console.line(
        say(
            "data: {name}, {splits}",
            "数据：{name}，{splits}",
            name=prepared.dataset.name,
            splits=", ".join(f"{split_name(k)} {len(v):,}" for k, v in prepared.splits.items()),
        )
    )


def _reasoned(decision: device.Decision) -> tuple[Any, str, str]:
    return decision.value, decision.reason, decision.reason_zh


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}"


def check_settings(recipe: Recipe, task: Task, base: modelfolder.Loaded | None) -> None:
    """Tells what is wrong with the model and the method whatever the data, before any of it is read: a language model is built without memory.

    Raises:
        UserError: (its subclasses) a name or a setting.
    """
    METHODS.build_arguments(METHODS.get(recipe.method.name), recipe.method.arguments, "method")
    if base is not None:
        return
    entry = MODELS.get(recipe.model.name)
    MODELS.build_arguments(entry, recipe.model.arguments, "model")
    if entry.file is None and isinstance(entry.target, type) and issubclass(entry.target, LanguageModel):
        with torch.device("meta"):
            build_model(recipe.model.name, recipe.model.arguments, (getattr(task, "context", 1),), 1)


def _check_context(task: Task, model: nn.Module) -> None:
    wanted = getattr(task, "context", task.tokens_per_sample)  # conversations are of any length up to it
    if isinstance(model, LanguageModel) and wanted > model.context:
        raise RecipeError(
            "task.context = {wanted}: the model that training starts from was made for {context} tokens",
            "task.context = {wanted}：起始模型只支持 {context} 个词元",
            wanted=wanted,
            context=model.context,
            fix="--set task.context={context}",
        )


def _resumed(job: Job, step: int, then: dict[str, Any], now: dict[str, Any], passed_over: list[tuple[str, str]]) -> None:
    """Says where the run goes on from, what was damaged, and which promise holds."""
    run = job.run
    for name, reason in passed_over:
        run.event("damaged_checkpoint", checkpoint=name, reason=reason)
        console.line(
            say(
                "! checkpoint {name} is damaged ({reason}) and is not used",
                "! 检查点 {name} 已损坏（{reason}），不使用",
                name=name,
                reason=reason,
            ),
            style="yellow",
        )
        shutil.rmtree(run.checkpoints / name, ignore_errors=True)  # its step is written anew
    differ = {k: (then.get(k), now[k]) for k in ("torch", "threads", "device", "world_size", "machine", "kernels") if then.get(k) != now[k]}
    exact = now["deterministic"] and not differ
    attempt = 1 + sum(row.get("event") == "resumed" for row in read_rows(run.path / "events.jsonl"))
    marked = run.supersede(step, job.state.evaluated_at, attempt)
    run.event("resumed", step=step, attempt=attempt, superseded_rows=marked, promise="bit-exact" if exact else "tolerance", differs=differ)
    job.resumed_from, job.keeper.saved_at = step, step
    console.line(say("resumed from step {step}", "从第 {step} 步恢复", step=step))
    if differ:
        listed = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in differ.items())
        console.line(say("! not bit-exact any more: {listed}", "! 不再逐位一致：{listed}", listed=listed), style="yellow")
