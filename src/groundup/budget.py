"""`--budget 10min`: a language model's size, tokens and batch for the time there is, from this machine's measured speed.

About 20 tokens for each parameter of the layers use an amount of computation best (Hoffmann et al., arXiv 2203.15556, table 3); beyond four rounds over
the same text there is little left to learn (Muennighoff et al., arXiv 2305.16264, fig. 1).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from groundup import modelfolder
from groundup.core import device, units
from groundup.core.errors import RecipeError
from groundup.core.recipe import Recipe
from groundup.data.prepare import prepare
from groundup.data.tokenizers import vocabulary_for
from groundup.models.decoder import SIZES, Decoder
from groundup.tasks.language_modeling import LanguageModeling
from groundup.tasks.token_loss import token_loss
from groundup.training.optim import build_optimizers

TOKENS_PER_PARAMETER = 20
ROUNDS = 4
SHAPE = ("size", "layers", "width", "heads", "kv_heads", "hidden")  # what a size stands for
SPENT_ON_TRAINING = 0.85  # the rest is for evaluation, checkpoints and the beginning


@dataclass
class Choice:
    """What fits a budget, as overrides of the recipe, and why."""

    overrides: dict[str, Any]
    reason: str
    reason_zh: str


def choose(recipe: Recipe, budget: str, given: Collection[str] = ()) -> Choice:
    """Measures training steps for some seconds and picks the preset whose tokens in that time are nearest to 20 per parameter.

    Args:
        given: keys that stay as the recipe has them.

    Raises:
        RecipeError: not a duration, too short, or not the recipe of a decoder.
    """
    seconds = units.seconds(budget)
    if seconds < 20:
        raise RecipeError("--budget {budget}: at least 20s", "--budget {budget}：至少 20s", budget=budget)
    task = modelfolder.build_task(recipe.task.name, recipe.task.arguments)
    if recipe.model.name != "decoder" or not isinstance(task, LanguageModeling):
        raise RecipeError(
            "--budget is for recipes of model 'decoder'; this one trains '{name}'",
            "--budget 用于模型为 'decoder' 的 recipe；这份训练的是 '{name}'",
            name=recipe.model.name,
            fix="groundup train gpt-stdlib --budget 10min",
        )
    prepared = prepare(recipe.data, classification=False, kind="text")
    text = prepared.dataset.inputs.bytes_of("train")
    vocabulary = vocabulary_for(text) if task.vocabulary == "auto" else int(task.vocabulary)
    arguments = {k: v for k, v in recipe.model.arguments.items() if k not in SHAPE}
    at = torch.device(device.choose_device(recipe.train.device).value)
    speed = _speed(recipe, arguments, task.context, vocabulary, at)
    there = ROUNDS * text / 3.5  # tokens of about 3.5 bytes
    best: tuple[float, str, float, float] | None = None
    fixed = any(f"model.{k}" in given for k in SHAPE)
    for size in ["as given"] if fixed else SIZES:
        with torch.device("meta"):
            model = Decoder((task.context,), vocabulary, **(recipe.model.arguments if fixed else {**arguments, "size": size}))
        layers = sum(p.numel() for p in model.model.layers.parameters())
        tokens = min(there, seconds * SPENT_ON_TRAINING * speed / model.flops_per_token(task.context))
        ratio = tokens / layers
        distance = max(ratio / TOKENS_PER_PARAMETER, TOKENS_PER_PARAMETER / max(ratio, 1e-9))
        if best is None or distance < best[0]:
            best = (distance, size, tokens, seconds * SPENT_ON_TRAINING * speed / model.flops_per_token(task.context))
    assert best is not None
    distance, size, tokens, affordable = best
    # Batches grow with the square root of the tokens: 2048 of them per step at a million, and never under 1024, where the optimizer's share grows.
    batch = min(512, max(1, round(max(1024, 2048 * (tokens / 1e6) ** 0.5) / task.context)))
    limited = affordable > 1.05 * tokens
    why = f"{speed / 1e9:,.0f} GFLOP/s measured in training steps: {units.human_seconds(seconds)} are enough for {tokens:,.0f} tokens at size {size}"
    size_zh = "所给" if fixed else f" {size} "
    why_zh = f"训练步实测 {speed / 1e9:,.0f} GFLOP/s：{units.human_seconds(seconds)} 够{size_zh}大小的模型训练 {tokens:,.0f} 个词元"
    if limited:
        why += f" (more would go over the text of {text:,} bytes more than {ROUNDS} times)"
        why_zh += f"（再多就会把 {text:,} 字节的文本重复 {ROUNDS} 遍以上）"
    if distance > 10 and tokens < there:
        why += ", far too few for it: expect little"
        why_zh += "，远远不够：不要期望太高"
    overrides = {"model.size": size, "train.steps": None, "train.epochs": None, "train.tokens": int(tokens), "train.batch_size": batch, "optim.lr": "auto"}
    overrides |= {f"model.{k}": None for k in SHAPE[1:] if k in recipe.model.arguments}
    return Choice(
        {k: v for k, v in overrides.items() if k not in given and not (fixed and k.startswith("model."))},
        f"{why}; about {TOKENS_PER_PARAMETER} tokens per parameter use the time best",
        f"{why_zh}；每个参数约 {TOKENS_PER_PARAMETER} 个词元最划算",
    )


def _speed(recipe: Recipe, arguments: Mapping[str, Any], context: int, vocabulary: int, at: torch.device) -> float:
    """Floating-point operations per second of whole training steps (the optimizer's own not counted) of a small model here."""
    model = Decoder((context,), vocabulary, size="1M", **arguments).to(at)
    optimizers = build_optimizers(model, recipe.optim, str(at))
    model.attention_path = "explicit" if at.type == "cpu" and context <= 512 and not model.attends_itself(model.head_dim) else "sdpa"
    tokens = torch.randint(vocabulary, (max(1, 2048 // context), context), device=at)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        hidden = model.features(tokens)
        token_loss(hidden.flatten(0, 1), model.output_weight, tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if at.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return model.flops_per_token(context) * tokens.numel() / best
