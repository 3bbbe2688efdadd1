"""A model that is not here, as something to plan: its shape by name or from a config.json, and batches of tokens that stand for any text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from groundup import modelfolder
from groundup.core import files
from groundup.core.errors import ModelError, RecipeError
from groundup.core.recipe import load, override
from groundup.core.registry import METHODS
from groundup.data.tokenizers import train_characters
from groundup.models.base import build_model
from groundup.models.decoder import SIZES
from groundup.models.hub import fetch_config
from groundup.models.language import LanguageModel
from groundup.planning.forecast import Subject, changed_by_method
from groundup.planning.trace import fake_mode
from groundup.tasks.language_modeling import TokenBatch
from groundup.training.parallel import Ranks

CONTEXT, VOCABULARY = 2048, 32768  # of a size that is planned by name alone


class AssumedBatches:
    """As `Batches`, of whole rows of tokens."""

    encoded = None

    def __init__(self, batch_size: int, context: int) -> None:
        self.batch_size = self.micro_batch_size = batch_size
        self.tokens: int | None = None
        self.context, self.ranks = context, Ranks()

    @property
    def per_step(self) -> int:
        return -(-self.batch_size // (self.ranks.world * self.micro_batch_size))

    def micro(self, step: int) -> Iterator[TokenBatch]:
        mine = self.batch_size // self.ranks.world
        for start in range(0, mine, self.micro_batch_size):
            tokens = torch.zeros(min(self.micro_batch_size, mine - start), self.context, dtype=torch.int64)
            yield TokenBatch(tokens, tokens.clone(), None)


def config_of(name: str) -> dict[str, Any] | None:
    """The config.json that a name stands for: a file, a folder with one, or a repository of the hub (of which nothing else is fetched). None: no such."""
    if name.startswith("hub:"):
        return files.read_json(fetch_config(name.removeprefix("hub:")))
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.name.endswith(".json") and path.is_file():
        try:
            config = files.read_json(path)
        except ValueError as error:
            raise ModelError("{path} is not JSON: {why}", "{path} 不是 JSON：{why}", path=path, why=error) from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise ModelError(
                "{path} is not the config.json of a language model: it says no model_type",
                "{path} 不是语言模型的 config.json：缺少 model_type",
                path=path,
            )
        return config
    return None


def is_shape(name: str) -> bool:
    return name in SIZES or name.startswith("hub:") or config_of(name) is not None


def subject_of_shape(
    name: str, method: str = "full", overrides: dict[str, Any] | None = None, weights: str = "float32", replicas: int = 1
) -> Subject:
    """What is planned of a model without its weights and without data: AdamW, whole rows of `task.context` tokens.

    Args:
        name: a size (1M .. 70B), a config.json or the folder that has it, hub:owner/name.
        overrides: as of a recipe; task.vocabulary and task.context are the model's own where it has them.
        weights: the dtype in which weights, gradients and optimizer states are kept.
        replicas: what the batch is to be a multiple of, where none is given.

    Raises:
        UserError: no such model, or a setting that does not fit.
    """
    config = config_of(name) if name not in SIZES else None
    if config is None and name not in SIZES:
        raise ModelError(
            "'{name}' is neither a recipe, a model's folder or config.json, nor a size ({known})",
            "'{name}' 不是 recipe、模型目录或 config.json，也不是规模名（{known}）",
            name=name,
            known=", ".join(SIZES),
            fix="groundup plan 8B --device h100",
        )
    architecture, arguments, longest, vocabulary = (
        modelfolder.read_config(config) if config is not None else ("decoder", {"size": name}, 2**31, VOCABULARY)
    )
    tree = {
        "name": "plan-" + (re.sub(r"[^A-Za-z0-9.-]+", "-", Path(name).name).strip("-.") or "model"),
        "task": {"name": "language-modeling", "context": min(longest, CONTEXT)},
        "data": {"source": "stdlib"},
        "model": {"name": architecture, **({} if architecture == "causal-lm" else arguments)},
        "method": {"name": method},
        "optim": {"name": "adamw", "lr": 1e-4},
        "train": {"steps": 1000, "batch_size": max(1, 8 // replicas) * replicas},
    }
    overrides = dict(overrides or {})
    vocabulary = int(overrides.pop("task.vocabulary", vocabulary))
    recipe = load(override(tree, overrides))
    if recipe.task.name != "language-modeling":
        raise RecipeError(
            "task = {task}: a model without data is planned as language-modeling",
            "task = {task}：没有数据的模型只能按 language-modeling 规划",
            task=recipe.task.name,
            fix="groundup plan MODEL --data FILE",
        )
    task: Any = modelfolder.build_task("language-modeling", recipe.task.arguments)
    task.tokenizer = train_characters(["any text"])
    task.load_state({"labels": [], "preprocessor": {"table": vocabulary}})
    mode = fake_mode()
    arguments = recipe.model.arguments if architecture != "causal-lm" else arguments
    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, weights))
    try:
        with mode:
            model: Any = build_model(architecture, arguments, (max(task.context, min(longest, task.context)),), vocabulary)
    finally:
        torch.set_default_dtype(kept)
    if recipe.train.checkpointing != "none" and isinstance(model, LanguageModel):
        model.recompute(recipe.train.checkpointing)
    METHODS.get(recipe.method.name)
    changed_by_method(model, recipe, mode)
    batches: Any = AssumedBatches(recipe.train.batch_size, task.context)
    tokens = batches.batch_size * task.context
    steps = recipe.train.steps or -(-int(recipe.train.tokens or tokens * 1000) // tokens)
    return Subject(recipe, task, model, batches, int(steps), mode)
