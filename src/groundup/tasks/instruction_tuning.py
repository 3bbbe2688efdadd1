"""A model learns to answer: conversations through the chat template, and only what the assistant says is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.core import console
from groundup.core.errors import RecipeError
from groundup.core.messages import say
from groundup.core.recipe import Data
from groundup.core.registry import TASKS, Card
from groundup.data.chat_tokens import LEFT_OUT_ZH, ConversationStream, template_for, tokenize_conversations
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.metrics import LanguageMetrics, MetricSet
from groundup.tasks.base import Batch, Encoded, Loss
from groundup.tasks.language_modeling import LanguageModeling, TokenBatch

ENOUGH = 512  # tokens of a forward pass on CPUs: twice as many are computed a few per cent quicker, and need twice the memory


@dataclass
class ConversationBatch(TokenBatch):
    """`owners` [B, T]: the number of each position's conversation, `conversations` for padding."""

    owners: Tensor | None = None
    conversations: int = 0


@dataclass
class EncodedConversations(Encoded):
    """A split's conversations, one record each; several share a row of a batch."""

    stream: ConversationStream
    device: torch.device

    def __len__(self) -> int:
        return len(self.stream)


@TASKS.register(
    "instruction-tuning",
    Card(
        summary="a language model learns to answer: only the assistant's turns are trained",
        summary_zh="语言模型学习回答：只训练助手的发言",
        source="Ouyang et al., InstructGPT, arXiv 2203.02155, 3.1; packing without contamination: Krell et al., arXiv 2107.02027",
        shapes="tokens int64 [rows, T] -> logits [rows, T, vocabulary]",
        limits="needs a model to start from (groundup tune MODEL --data FILE)",
    ),
)
class InstructionTuning(LanguageModeling):
    """
    Args:
        context: tokens of a conversation at most, 'auto' the model's; what is longer is cut at its end, and counted.
        template: 'auto' (the model's own chat template), 'chatml' or 'plain'; it is written into the tuned model's folder.
        train_on: 'assistant' (its turns with their ends) or 'all'.
        add_tokens: texts that become special tokens of their own; the model's tables grow.
        prompts: questions whose answers are sampled at every evaluation.
    """

    sample_temperature = 0.0  # the likeliest answer

    def __init__(
        self,
        context: int | str = "auto",
        template: str = "auto",
        train_on: Literal["assistant", "all"] = "assistant",
        add_tokens: Sequence[str] = (),
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        prompts: Sequence[str] = (),
        sample_tokens: int = 64,
    ) -> None:
        if context != "auto" and (isinstance(context, bool) or not isinstance(context, int)):
            raise RecipeError(
                "task.context = {value}: a whole number or auto is expected", "task.context = {value}：应为整数或 auto", value=context,
                fix="--set task.context=512",
            )  # fmt: skip
        super().__init__(2 if context == "auto" else int(context), "auto", "auto", z_loss, logit_softcap, prompts, sample_tokens)
        self.wanted_context, self.wanted_template, self.train_on = context, template, train_on
        self.template, self.template_name, self.added = "", "", list(add_tokens)
        self.told: set[str] = set()  # streams of which it was said what is lost

    def _set_context(self, context: int) -> None:
        super()._set_context(context)
        self.tokens_per_sample = 0  # conversations are of any length
        self.evaluation_batch = 16

    @staticmethod
    def reads(config: Data) -> Data:
        """Records as conversations. Examples of one kind resemble each other by nature: only those with all words alike are copies."""
        text: dict[str, Any] = {"document": "conversation"}
        if config.text.near_duplicates == "auto":
            text["near_duplicates"] = 1.0
        return config.model_copy(update={"text": config.text.model_copy(update=text)})

    def read_files(self, folder: Path) -> None:
        super().read_files(folder)
        assert self.tokenizer is not None
        if self.added:
            self.tokenizer.add(self.added)
        self.template, self.template_name = template_for(self.tokenizer, self.wanted_template)

    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        if self.tokenizer is None:
            raise RecipeError(
                "instruction-tuning needs a model to start from",
                "instruction-tuning 需要一个起始模型",
                fix="groundup tune MODEL --data FILE   or   --set init=MODEL",
                fix_zh="groundup tune MODEL --data FILE   或   --set init=MODEL",
            )

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.wanted_context != "auto":
            self._set_context(min(int(self.wanted_context), self.context))

    def own_state(self) -> dict[str, Any]:
        """The base's context stays, unless the recipe asks for another."""
        own: dict[str, Any] = {"template": self.template_name, "train_on": self.train_on}
        if self.softcap is not None:  # else the base's stays
            own["softcap"] = self.softcap
        return own if self.wanted_context == "auto" else {"context": int(self.wanted_context), **own}

    def decisions(self) -> list[tuple[str, Any, str, str]]:
        return [
            (
                "template",
                self.template_name,
                f"chat template: {self.template_name}; trained: {self.train_on}",
                f"对话模板：{'模型自带' if self.template_name == 'its own' else self.template_name}；训练对象：{self.train_on}",
            )
        ]

    def write_files(self, folder: Path) -> None:
        assert self.tokenizer is not None
        self.tokenizer.settings["chat_template"] = self.template
        self.tokenizer.save(folder, self.context)

    # -- training and evaluation -------------------------------------------------------------------------------------------
    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        assert self.tokenizer is not None
        facts = (dataset.fingerprint, index.tobytes(), self.tokenizer.digest, self.template, self.train_on, self.context)
        with console.progress() as told:
            stream = tokenize_conversations(
                lambda: dataset.inputs.texts(index), len(index), self.tokenizer, self.template,
                context=self.context, train_on=self.train_on, key=hashlib.sha256(repr(facts).encode()).hexdigest()[:40], progress=told,
            )  # fmt: skip
        if stream.key not in self.told:
            self.told.add(stream.key)
            for line in self._left_out(stream.facts, len(index)):
                console.line(line, style="yellow")
        nothing = torch.zeros(0, device=device)
        return EncodedConversations(nothing, nothing, lambda i: str(dataset.inputs.describe(int(index[stream.records[i]]))), stream, device)

    def _left_out(self, facts: dict[str, Any], count: int) -> Iterator[str]:
        if facts["cut"]:
            yield say(
                "! {cut} of {n} conversations are longer than {context} tokens and cut at their end ({lost:,} tokens lost)",
                "! {n} 条对话中有 {cut} 条超过 {context} 个词元，已截断末尾（丢失 {lost:,} 个词元）",
                cut=facts["cut"], n=count, context=self.context, lost=facts["lost_tokens"],
            )  # fmt: skip
        for why, out in facts["left_out"].items():
            yield say(
                "! {out} of {n} conversations {why}: left out",
                "! {n} 条对话中有 {out} 条{why_zh}，已略去",
                out=out, n=count, why=why, why_zh=LEFT_OUT_ZH[why],
            )  # fmt: skip

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        assert isinstance(encoded, EncodedConversations)
        tokens, targets, documents, owners = (torch.from_numpy(a).to(encoded.device) for a in encoded.stream.fetch(index.cpu().numpy()))
        alone = len(tokens) == len(index) and bool((documents <= 0).all())
        return ConversationBatch(tokens, targets, None if alone else documents, owners, len(index))

    def sizes(self, encoded: Encoded, index: NDArray[np.int64]) -> NDArray[np.int64]:
        assert isinstance(encoded, EncodedConversations)
        starts = encoded.stream.starts
        return starts[index + 1] - starts[index] - 1

    def computed_at_once(self, encoded: Encoded) -> int:
        longest = int(self.sizes(encoded, np.arange(len(encoded))).max())
        return min(max(longest, ENOUGH), 2 * ENOUGH)

    def evaluated_at_once(self, encoded: Encoded, device: torch.device) -> int:
        if device.type != "cpu":
            return self.evaluation_batch
        mean = self.sizes(encoded, np.arange(len(encoded))).mean()
        return max(1, min(self.evaluation_batch, round(2 * ENOUGH / mean)))

    def _laid_out(self, model: nn.Module, batch: Batch) -> Batch:
        """In one row without padding, for models that tell documents apart at no cost."""
        assert isinstance(batch, ConversationBatch) and batch.owners is not None
        if not getattr(model, "separates", False) or batch.inputs.device.type != "cpu":
            return batch
        keep = batch.owners < batch.conversations
        owners = batch.owners[keep][None]
        return replace(batch, inputs=batch.inputs[keep][None], targets=batch.targets[keep][None], documents=owners, owners=owners)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return super().loss(model, self._laid_out(model, batch))

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        return super().score(model, self._laid_out(model, batch), metrics)

    def _units(self, batch: TokenBatch) -> tuple[Tensor, int]:
        """Conversations, of which several may stand in a row."""
        assert isinstance(batch, ConversationBatch) and batch.owners is not None
        return batch.owners, batch.conversations

    def metrics_of(self, encoded: Encoded) -> MetricSet:
        assert isinstance(encoded, EncodedConversations)
        return LanguageMetrics(encoded.stream.bytes / max(1, encoded.stream.supervised))

    def _asked(self, prompt: str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.encode_rendered(self.tokenizer.render([{"role": "user", "content": prompt}], template=self.template))
