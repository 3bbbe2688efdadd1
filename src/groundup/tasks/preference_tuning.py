"""A model learns which of two answers is the better one (direct preference optimization)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core import console, files
from groundup.core.errors import DataError, ModelError, RecipeError
from groundup.core.messages import say, split_name
from groundup.core.recipe import Data
from groundup.core.registry import TASKS, Card
from groundup.data.order import CounterRandom
from groundup.data.tokens import IGNORED
from groundup.metrics import MetricSet, PreferenceMetrics
from groundup.models.language import LanguageModel
from groundup.tasks.base import Batch, Encoded, Loss
from groundup.tasks.instruction_tuning import ConversationBatch, EncodedConversations, InstructionTuning
from groundup.tasks.token_loss import token_nll


@dataclass
class EncodedPairs(EncodedConversations):
    """Pairs of answers: conversations 2i and 2i + 1 are the better and the worse one of pair i.

    Args:
        reference: float32 [2 * pairs], log-probabilities of the answers under the model that training began with; None where it is not known.
    """

    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.stream) // 2


@dataclass
class PairBatch(ConversationBatch):
    """`reference` [2 * pairs]: see `EncodedPairs`; NaN where it is not known. `records` [pairs]: the list or pair of the data that each is of."""

    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    records: Tensor = field(default_factory=lambda: torch.zeros(0))


@TASKS.register(
    "preference-tuning",
    Card(
        summary="a language model learns which of two answers is better, without a reward model (DPO)",
        summary_zh="语言模型学习两个回答中哪个更好，无需奖励模型（DPO）",
        source="Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, eq. 7",
        shapes="tokens int64 [rows, T] -> logits [rows, T, vocabulary]",
        limits="needs a model to start from, best one that answers already; answers are compared with that model's own",
    ),
)
class PreferenceTuning(InstructionTuning):
    """
    Args:
        context, template, prompts: see `InstructionTuning`; a pair of which an answer is cut off whole is left out, and counted.
        beta: how dear it is to move away from the model that training began with.
        label_smoothing: the share of pairs that are taken to be the wrong way round (conservative DPO, Mitchell, 2023).
    """

    default_metric = "accuracy"

    def __init__(
        self,
        context: int | str = "auto",
        template: str = "auto",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        logit_softcap: float | None = None,
        prompts: Any = (),
        sample_tokens: int = 64,
    ) -> None:
        if not beta > 0 or not 0 <= label_smoothing < 0.5:
            raise RecipeError(
                "task.beta = {beta}, task.label_smoothing = {smoothing}: a beta above 0 and a smoothing from 0 to below 0.5 are expected",
                "task.beta = {beta}，task.label_smoothing = {smoothing}：beta 应大于 0，smoothing 应在 0 与 0.5 之间",
                beta=beta,
                smoothing=label_smoothing,
                fix="--set task.beta=0.1",
            )
        super().__init__(context, template, "assistant", (), 0.0, logit_softcap, prompts, sample_tokens)
        self.beta, self.smoothing = beta, label_smoothing
        self.references: dict[str, Tensor] = {}

    def _set_context(self, context: int) -> None:
        super()._set_context(context)
        self.evaluation_batch = 8

    @staticmethod
    def reads(config: Data) -> Data:
        read = InstructionTuning.reads(config)
        return read.model_copy(update={"text": read.text.model_copy(update={"document": "preference"})})

    def prepare(self, *args: Any, **options: Any) -> Encoded:
        encoded = super().prepare(*args, **options)
        assert isinstance(encoded, EncodedConversations)
        describe = encoded.describe
        return EncodedPairs(
            encoded.inputs,
            encoded.targets,
            lambda i: describe(2 * i),
            encoded.stream,
            encoded.device,
            self.references.get(encoded.stream.key),
        )

    def observe(self, model: nn.Module, encoded: dict[str, Encoded], folder: Path) -> None:
        """Keeps the log-probabilities of all answers under the model as it is now, in `folder`, from which a resumed run takes them."""
        assert self.tokenizer is not None
        if not isinstance(model, LanguageModel):
            raise ModelError("preference-tuning needs a language model", "preference-tuning 需要语言模型")
        was = model.training
        model.eval()
        for name, split in encoded.items():
            assert isinstance(split, EncodedPairs)
            path = folder / f"{name}.safetensors"
            if path.is_file() and (stored := load_file(path)["reference"]).shape == (2 * len(split),):
                split.reference = stored.to(split.device)
            else:
                console.line(say("the model's own view of the pairs: {split}", "模型对偏好对的原有评分：{split}", split=split_name(name)))
                cuts = torch.arange(len(split), device=split.device).split(self.evaluation_batch)
                with torch.no_grad():
                    found = [self._likelihoods(model, self.batch(split, cut, training=False, rng=None))[0] for cut in cuts]
                split.reference = torch.cat(found)
                folder.mkdir(parents=True, exist_ok=True)
                files.write_bytes(path, save({"reference": split.reference.cpu()}))
            self.references[split.stream.key] = split.reference
        model.train(was)

    def sizes(self, encoded: Encoded, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return super().sizes(encoded, 2 * index) + super().sizes(encoded, 2 * index + 1)

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        assert isinstance(encoded, EncodedPairs)
        both = torch.stack([2 * index, 2 * index + 1], 1).flatten()
        made = super().batch(encoded, both, training=training, rng=rng)
        assert isinstance(made, ConversationBatch)
        known = encoded.reference
        reference = torch.full((len(both),), math.nan, device=encoded.device) if known is None else known[both]
        records = torch.from_numpy(encoded.stream.records[2 * index.cpu().numpy()])
        return PairBatch(made.inputs, made.targets, made.documents, made.owners, made.conversations, reference, records)

    def _likelihoods(self, model: LanguageModel, batch: Any) -> tuple[Tensor, Tensor]:
        """Of each answer of a batch its log-probability, and how many tokens it has: float32 [2 * pairs]."""
        batch = self._laid_out(model, batch)
        targets = batch.targets.flatten()
        keep = targets != IGNORED
        hidden = model.features(batch.inputs, batch.documents).flatten(0, 1)[keep]
        nll = token_nll(hidden, model.output_weight, targets[keep], self.softcap or model.softcap)
        owner = batch.owners.flatten()[keep]
        nothing = torch.zeros(batch.conversations, device=nll.device)
        return nothing.index_add(0, owner, -nll), nothing.index_add(0, owner, torch.ones_like(nll))

    def _pairs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair: the loss, the margin (nats, by how much the better answer gained more), whether it is the likelier one per token."""
        assert isinstance(model, LanguageModel)
        said, tokens = self._likelihoods(model, batch)
        gain = (said - batch.reference).view(-1, 2)
        margin = gain[:, 0] - gain[:, 1]
        loss = -F.logsigmoid(self.beta * margin)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss - self.smoothing * F.logsigmoid(-self.beta * margin)
        per_token = (said / tokens).view(-1, 2)
        return loss, margin, per_token[:, 0] > per_token[:, 1]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss, _, _ = self._pairs(model, batch)
        return Loss(loss.sum(), len(loss))

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        assert isinstance(batch, PairBatch)
        loss, margin, ranked = self._pairs(model, batch)
        equal = margin.abs() < 1e-3  # no more than rounding
        won = torch.where(margin.isnan(), margin, torch.where(equal, 0.5, (margin > 0).to(margin)))
        rows = torch.stack([loss, won, margin, ranked, torch.ones_like(loss)], 1).double()
        metrics.update(torch.cat([rows.cpu(), batch.records[:, None].double()], 1), batch.targets, 0.0)
        return rows

    def metrics(self) -> MetricSet:
        return PreferenceMetrics()

    def metrics_of(self, encoded: Encoded) -> MetricSet:
        if not len(encoded):
            raise DataError("there are no pairs of answers", "没有偏好对", fix="groundup data check FILE --model MODEL")
        return PreferenceMetrics()
