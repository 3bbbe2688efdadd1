"""What `auto` stands for in a training: chosen by measuring or by a rule before the loop starts, and written down with its reason."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from groundup.core import device, units
from groundup.core.errors import RecipeError, TrainError
from groundup.core.recipe import Recipe
from groundup.core.run import RunFolder
from groundup.tasks.base import Task
from groundup.training import loop

if TYPE_CHECKING:
    from groundup.jobs import Job


def batch_size_of(recipe: Recipe, run: RunFolder, n: int) -> int:
    wanted = recipe.train.batch_size
    if n >= wanted:
        return wanted
    chosen = run.decide(
        "batch_size",
        n,
        f"train.batch_size = {wanted} samples, and the training split has only {n}",
        f"train.batch_size = {wanted} 个样本，而训练集只有 {n} 个",
    )
    return int(chosen)


def rehearse(job: Job) -> None:
    """The dry step; and the choices that depend on it: the micro-batch that fits, and whether compiling pays."""
    recipe, run, batches = job.recipe, job.run, job.batches
    wanted = recipe.train.micro_batch_size
    batches.micro_batch_size = batches.batch_size if wanted == "auto" else min(wanted, batches.batch_size)
    if wanted == "auto" and job.plan.device.type == "cpu" and (enough := job.task.computed_at_once(batches.encoded)) is not None:
        batches.tokens = run.decide(
            "micro_batch_tokens",
            enough,
            "tokens of a forward pass: on CPUs as quick as the whole batch, in less memory",
            "一次前向的词元数：在 CPU 上与整批同样快，占用内存更少",
        )
    augment = recipe.data.augment
    pairs = augment is not None and bool(augment.mixup or augment.cutmix)
    if pairs and batches.micro_batch_size % 2 and batches.micro_batch_size < batches.batch_size:
        raise RecipeError(
            "train.micro_batch_size = {n}: mixup and cutmix mix pairs of pictures, which an odd number would divide",
            "train.micro_batch_size = {n}：mixup 与 cutmix 成对混合图片，奇数会把一对拆开",
            n=batches.micro_batch_size,
            fix=f"--set train.micro_batch_size={batches.micro_batch_size + 1}",
        )
    while True:
        try:
            seconds = loop.rehearse(job.state, batches, job.task, job.plan)
            break
        except torch.OutOfMemoryError as error:
            if wanted != "auto" or batches.micro_batch_size <= (2 if pairs else 1):
                raise TrainError(
                    "a batch of {n} samples does not fit into the memory of {device}",
                    "{device} 的内存放不下 {n} 个样本的批次",
                    n=batches.micro_batch_size,
                    device=job.plan.device,
                    fix="--set train.micro_batch_size=auto   or a smaller model",
                    fix_zh="--set train.micro_batch_size=auto   或换更小的模型",
                ) from error
            batches.micro_batch_size //= 2
            batches.micro_batch_size += pairs and batches.micro_batch_size % 2
    seconds = _choose_path(job, seconds)
    whole = batches.micro_batch_size == batches.batch_size
    run.decide(
        "micro_batch_size",
        batches.micro_batch_size,
        "asked for in the recipe"
        if wanted != "auto"
        else "the whole batch, as far as the tokens allow"
        if batches.tokens is not None and whole
        else "the whole batch fits into memory"
        if whole
        else "the largest half of the batch that fits into memory",
        "由 recipe 指定"
        if wanted != "auto"
        else "整批，受词元数限制"
        if batches.tokens is not None and whole
        else "整个批次能放进内存"
        if whole
        else "能放进内存的最大对半批次",
    )
    run.decide("step_seconds", seconds, "measured in the rehearsal (forward and backward)", "在预演中测得（前向与反向）")
    estimate = seconds * job.state.total
    if recipe.train.compile != "auto":
        chosen, reason, reason_zh = recipe.train.compile, "asked for in the recipe", "由 recipe 指定"
    elif job.plan.device.type != "cuda" or not _has_triton():
        # On CPUs compiling these models gains a few per cent and costs a minute; it also needs a C++ compiler.
        chosen, reason, reason_zh = (
            False,
            f"compiling pays on CUDA with Triton; this run is on {job.plan.device.type}",
            f"编译只在 CUDA + Triton 上划算；本次在 {job.plan.device.type} 上运行",
        )
    else:
        chosen = estimate > 600
        reason = f"the run is estimated at {units.human_seconds(estimate)}; compiling takes about a minute"
        reason_zh = f"预计训练 {units.human_seconds(estimate)}；编译约需一分钟"
    compile_model(job, run.decide("compile", chosen, reason, reason_zh))


def _choose_path(job: Job, seconds: float) -> float:
    """How attention is computed, where the model leaves it open: the faster way of a rehearsed step. A deterministic run takes the rule instead,
    since a measurement can come out differently another time. Returns the seconds of a step."""
    model: Any = job.state.model
    if not hasattr(model, "attention_path"):
        return seconds
    context = getattr(job.task, "context", 0)
    if job.plan.device.type != "cpu":
        chosen, reason, reason_zh = (
            "sdpa",
            f"torch's fused kernel on {job.plan.device.type}",
            f"{job.plan.device.type} 上使用 torch 的融合内核",
        )
    elif model.attends_itself(model.head_dim):
        chosen, reason, reason_zh = "sdpa", "our own kernel", "自有内核"
    elif job.recipe.train.deterministic:
        chosen = "explicit" if context <= 256 else "sdpa"
        reason, reason_zh = "by the context's length: a measurement may differ between runs", "按上下文长度选择：实测结果可能随运行而变"
    else:
        took = {"sdpa": seconds}
        if context <= 1024:
            model.attention_path = "explicit"
            took["explicit"] = loop.rehearse(job.state, job.batches, job.task, job.plan)
        chosen = "explicit" if took.get("explicit", seconds) < 0.9 * seconds else "sdpa"
        listed = ", ".join(f"{k} {v * 1000:.1f} ms" for k, v in took.items())
        reason = f"measured on a step: {listed}; explicit keeps more memory, so it has to be a tenth quicker"
        reason_zh = f"实测一步：{listed}；explicit 占用更多内存，须快一成以上才选用"
        seconds = took[chosen]
    job.run.decide("attention", chosen, reason, reason_zh)
    take_path(model, job.run)
    return seconds


def take_path(model: nn.Module, run: RunFolder) -> None:
    if hasattr(model, "attention_path") and "attention" in run.decisions:
        model.attention_path = run.decisions["attention"]["value"]


def flops_of(task: Task, model: Any, run: RunFolder, at: torch.device, precision: str) -> dict[str, float]:
    """What the MFU of a language model is counted from: its operations per token, and the peak of this device's matrix products."""
    if not task.tokens_per_sample or not hasattr(model, "flops_per_token"):
        return {}
    peak = (
        device.matmul_peak(at, getattr(torch, precision)) if "matmul_peak" not in run.decisions else run.decisions["matmul_peak"]["value"]
    )
    run.decide(
        "matmul_peak",
        peak,
        f"{peak / 1e9:,.0f} GFLOP/s, measured with a {precision} product of 1024 x 1024 matrices (8192 on GPUs)",
        f"{peak / 1e9:,.0f} GFLOP/s，由 1024 x 1024（GPU 上 8192）的 {precision} 矩阵乘法测得",
    )
    return {"flops_per_token": model.flops_per_token(task.tokens_per_sample), "peak_flops": peak}


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def compile_model(job: Job, on: bool) -> None:
    if on:
        job.state.model.compile()  # in place: the names of parameters stay those of the plain model
