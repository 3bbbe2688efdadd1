"""Self-tests of a language model's training on the user's own model and data, before a long run: what is silently wrong in a tuning otherwise."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundup.checking.findings import Finding, Report
from groundup.core import console
from groundup.core.messages import say
from groundup.data.tokens import IGNORED
from groundup.evaluation.evaluate import evaluating
from groundup.jobs import Job
from groundup.models import lora
from groundup.models.language import LanguageModel
from groundup.tasks.language_modeling import TokenBatch
from groundup.training import loop
from groundup.training.state import Snapshot

SAMPLES = 4  # of the small batch that most tests look at
SECONDS = 15.0  # that driving down the loss of one batch may take
STEPS = 12
CLOSE = 2e-3  # gradients of two ways of adding, as a share of the gradient; half precision gets twenty times as much


def self_tests(job: Job) -> Report:
    """All of them, on a training that is about to begin. Weights, gradients and random state are left as they were."""
    begin = time.monotonic()
    report = Report()
    if not isinstance(job.state.model, LanguageModel) or job.task.kind != "text":
        return report
    tests: list[tuple[tuple[str, str], Callable[[_Bench], Iterator[Finding]]]] = [
        (("the vocabulary covers the token ids", "词表覆盖所有词元编号"), _vocabulary),
        (("labels are the next tokens", "标签就是下一个词元"), _alignment),
        (("the adapter changes nothing at step 0", "第 0 步时适配器不改变输出"), _neutral),
        (("every trained tensor gets a gradient and no frozen one does", "每个参与训练的张量都有梯度，冻结的都没有"), _gradients),
        (("accumulated gradients are those of the whole batch", "累积梯度等于整批梯度"), _accumulation),
        (("packed examples do not see each other", "打包在一起的样本互不影响"), _packing),
        (("the loss of one batch can be driven down", "单个批次的损失可以降下来"), _learns),
    ]
    with console.progress() as told, _undone(job) as bench:
        for number, (name, test) in enumerate(tests):
            told(say("self-tests: {what}", "自检：{what}", what=say(*name)), number / len(tests))
            try:
                found = list(test(bench))
            except _NotHere:
                continue
            except Exception as error:
                report.failed.append((name[0], f"{type(error).__name__}: {error}"))
                continue
            report.findings += found
            if not found:
                report.passed.append(name)
    report.seconds = time.monotonic() - begin
    return report


class _NotHere(Exception):
    """There is nothing to test: no adapter, nothing packed."""


class _Bench:
    """What the tests look at: a small batch of the training split, in evaluation mode unless a test asks otherwise."""

    def __init__(self, job: Job) -> None:
        self.job, self.task, self.plan = job, job.task, job.plan
        self.model: Any = job.state.model
        self.encoded = job.batches.encoded
        first = job.batches.index(0)
        shortest = np.argsort(job.task.sizes(self.encoded, first), kind="stable")  # what is tested does not depend on the length; time and memory do
        self.several = torch.from_numpy(first[shortest][: 4 * SAMPLES]).to(job.plan.device)
        self.index = self.several[:SAMPLES]
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.close = CLOSE * (1 if job.plan.dtype == torch.float32 else 20)

    def batch(self, index: Tensor | None = None) -> TokenBatch:
        made = self.task.batch(self.encoded, self.index if index is None else index, training=False, rng=None)
        assert isinstance(made, TokenBatch)
        return made

    def loss(self, batch: Any) -> tuple[Tensor, float]:
        with loop.mixed_precision(self.plan):
            found = self.task.loss(self.model, batch)
        return found.sum, float(found.count)

    def gradients(self, batches: list[Any]) -> dict[str, Tensor]:
        """Of the summed loss of these batches; the model's own are cleared."""
        self.model.zero_grad(set_to_none=True)
        for batch in batches:
            self.loss(batch)[0].backward()
        found = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found


@contextlib.contextmanager
def _undone(job: Job) -> Iterator[_Bench]:
    model = job.state.model
    before = Snapshot.take(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    modes = {m: m.training for m in model.modules()}
    stage = job.plan.stage(0, job.state.total)
    stage.enter(model)
    try:
        yield _Bench(job)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in weights:
                    p.copy_(weights[name])
        before.put_back(model)
        for module, mode in modes.items():
            module.training = mode


def _vocabulary(bench: _Bench) -> Iterator[Finding]:
    rows, stream = bench.model.vocabulary, getattr(bench.encoded, "stream", None)
    tokens = getattr(stream, "tokens", None)
    highest = max((int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24)), default=0) if tokens is not None else 0
    if highest >= rows:
        yield Finding(
            "lm.vocab_too_small", "error", "model.embed_tokens",
            (f"the largest token id is {highest}, the embedding table has {rows} rows", f"最大的词元编号是 {highest}，而嵌入表只有 {rows} 行"),
            (f"resize the table: model.resize({highest + 1})", f"扩大词表：model.resize({highest + 1})"), {"largest": highest, "rows": rows},
        )  # fmt: skip


def _alignment(bench: _Bench) -> Iterator[Finding]:
    batch = bench.batch()
    x, y = batch.inputs[:, 1:], batch.targets[:, :-1]
    inside = torch.ones_like(y, dtype=torch.bool) if batch.documents is None else batch.documents[:, 1:] == batch.documents[:, :-1]
    seen = inside & (y != IGNORED)
    total, right = int(seen.sum()), int((seen & (x == y)).sum())
    if not int((batch.targets != IGNORED).sum()):
        yield Finding(
            "lm.all_labels_masked", "error", "train_loader",
            ("all labels of a batch are masked (-100): the answers are cut away or not trained", "一个批次的标签全部被屏蔽（-100）：回答被截断或未参与训练"),
            ("--set task.context=...  (max_length), or shorter prompts", "--set task.context=...（max_length），或缩短提示"),
        )  # fmt: skip
    elif right < total:
        yield Finding(
            "lm.labels_not_shifted", "error", "task",
            (f"of {total} labels {right} are the next token: the labels are not shifted by one", f"{total} 个标签中只有 {right} 个是下一个词元：标签没有错开一位"),
            ("targets[t] = tokens[t + 1]", "targets[t] = tokens[t + 1]"), {"labels": total, "next": right},
        )  # fmt: skip


def _neutral(bench: _Bench) -> Iterator[Finding]:
    model = bench.model
    fresh = bench.job.base is None or not (bench.job.base.path / "adapter_config.json").is_file()
    arguments = bench.job.recipe.method.arguments
    if not lora.adapted(model) or not fresh or arguments.get("bits") or arguments.get("init", "zero") != "zero":
        raise _NotHere
    batch = bench.batch()
    with evaluating(model):
        with_it = model.features(batch.inputs, batch.documents)
        there = lora.detach(model)
        without = model.features(batch.inputs, batch.documents)
        lora.unmerge(model, there)
    difference = float((with_it - without).abs().max() / without.abs().max().clamp(min=1e-12))
    if difference > 1e-5:
        yield Finding(
            "lm.adapter_not_neutral", "error", "method",
            (f"the adapter changes the model before it is trained: by {difference:.1e} of its largest value", f"适配器在训练之前就改变了模型：相差最大值的 {difference:.1e}"),
            ("B begins at zero: nn.init.zeros_(lora_B.weight)", "B 应从零开始：nn.init.zeros_(lora_B.weight)"), {"difference": difference},
        )  # fmt: skip


def _gradients(bench: _Bench) -> Iterator[Finding]:
    bench.model.zero_grad(set_to_none=True)
    bench.loss(bench.batch())[0].backward()
    lacking = [n for n, p in bench.trained.items() if p.grad is None]
    broken = [n for n, p in bench.trained.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    frozen = [n for n, p in bench.model.named_parameters() if not p.requires_grad and p.grad is not None]
    silent = bool(bench.trained) and all(p.grad is None or not bool(p.grad.any()) for p in bench.trained.values())
    bench.model.zero_grad(set_to_none=True)
    for names, finding, en, zh in (
        (lacking, "grad.none", "gets no gradient although it is trained", "参与训练却没有梯度"),
        (broken, "grad.nonfinite", "gets a gradient that is not finite", "梯度不是有限值"),
        (frozen, "grad.frozen_gets_gradient", "is frozen and gets a gradient", "已冻结却得到了梯度"),
    ):
        if names:
            more, more_zh = (f" (and {len(names) - 1} more)", f"（另有 {len(names) - 1} 个）") if len(names) > 1 else ("", "")
            yield Finding(
                finding, "error", f"model.{names[0]}", (f"model.{names[0]}{more} {en}", f"model.{names[0]}{more_zh} {zh}"),
                ("check that it is used in forward, and method.targets", "检查它是否在 forward 中用到，以及 method.targets"), {"tensors": names[:20]},
            )  # fmt: skip
    if silent:
        both = bool(lora.adapted(bench.model))
        yield Finding(
            "lm.lora_both_zero" if both else "grad.all_zero", "error", "method" if both else "model",
            ("all gradients are zero" + (": both LoRA matrices are zero" if both else ""), "所有梯度都是零" + ("：两个 LoRA 矩阵都是零" if both else "")),
            ("A begins at random, B at zero" if both else "check the loss", "A 随机初始化，B 为零" if both else "检查损失"),
        )  # fmt: skip


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients over that of the first."""
    whole = sum(float(t.double().square().sum()) for t in a.values()) ** 0.5
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in a) ** 0.5 / max(whole, 1e-30)


def _accumulation(bench: _Bench) -> Iterator[Finding]:
    with evaluating(bench.model, gradients=True):  # dropout would make any two passes differ
        whole = bench.gradients([bench.batch()])
        parts = bench.gradients([bench.batch(i[None]) for i in bench.index])
    if (difference := _difference(whole, parts)) > bench.close:
        yield Finding(
            "optim.accumulation_not_scaled", "error", "train.micro_batch_size",
            (f"the gradient of {len(bench.index)} samples at once differs from their sum by {difference:.1e}", f"{len(bench.index)} 个样本一次算出的梯度与逐个累加相差 {difference:.1e}"),
            ("divide the summed loss by the tokens of the whole step", "把损失之和除以整步的词元数"), {"difference": difference},
        )  # fmt: skip


def _packing(bench: _Bench) -> Iterator[Finding]:
    """The first document of each row is changed; nothing of the others may move."""
    batch = bench.batch(bench.several)
    if batch.documents is None or not bool((batch.documents != batch.documents[:, :1]).any()):
        raise _NotHere
    first = batch.documents == batch.documents[:, :1]
    other = torch.where(first, (batch.inputs + 1) % bench.model.vocabulary, batch.inputs)
    with evaluating(bench.model):
        a, b = bench.model.features(batch.inputs, batch.documents), bench.model.features(other, batch.documents)
    moved = float((a - b)[~first].abs().max() / a.abs().max().clamp(min=1e-12))
    if moved > 1e-4:
        yield Finding(
            "lm.packing_mixes", "error", "model",
            (f"a packed example sees the one before it: its outputs move by {moved:.1e}", f"打包的样本能看到前一个样本：输出变化了 {moved:.1e}"),
            ("attention must be masked by document, and positions restart", "注意力须按文档屏蔽，位置重新计数"), {"moved": moved},
        )  # fmt: skip


def _learns(bench: _Bench) -> Iterator[Finding]:
    batch, begin = bench.batch(), time.monotonic()
    rate = max((g["base_lr"] for o in bench.job.state.optimizers for g in o.param_groups), default=1e-3)
    optimizer = torch.optim.AdamW(bench.trained.values(), lr=max(rate, 1e-4), weight_decay=0.0)
    losses: list[float] = []
    with evaluating(bench.model, gradients=True):  # dropout would make any two passes differ
        for _ in range(STEPS):
            total, count = bench.loss(batch)
            losses.append(float(total.detach()) / max(count, 1))
            optimizer.zero_grad(set_to_none=True)
            (total / max(count, 1)).backward()
            optimizer.step()
            if time.monotonic() - begin > SECONDS and len(losses) > 2:
                break
        losses.append(float(bench.loss(batch)[0].detach()) / max(count, 1))
    if not losses[-1] < losses[0]:
        yield Finding(
            "grad.does_not_learn", "error", "optimizer",
            (f"the loss of one batch does not go down: {losses[0]:.4f} before, {losses[-1]:.4f} after {len(losses) - 1} steps", f"单个批次的损失降不下来：之前 {losses[0]:.4f}，{len(losses) - 1} 步后 {losses[-1]:.4f}"),
            (f"--set optim.lr={rate / 10:g}", f"--set optim.lr={rate / 10:g}"), {"losses": [round(v, 4) for v in losses]},
        )  # fmt: skip
