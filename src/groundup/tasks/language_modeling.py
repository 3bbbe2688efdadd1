"""Text is continued: the model predicts each next token. Documents are packed into windows without loss, and never see each other."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core import console
from groundup.core.errors import DataError, RecipeError
from groundup.core.messages import say
from groundup.core.registry import TASKS, Card
from groundup.data import cache
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.data.tokenizers import (
    WORDS,
    Tokenizer,
    gpt2_for_comparison,
    open_tokenizer,
    pieces,
    train_bpe,
    train_characters,
    vocabulary_for,
)
from groundup.data.tokens import IGNORED, TokenStream, tokenize
from groundup.metrics import LanguageMetrics, MetricSet
from groundup.models.language import LanguageModel
from groundup.tasks.base import Batch, Encoded, Loss, Task
from groundup.tasks.token_loss import token_loss, token_scores

COMPARED = 1_000_000  # characters of text on which tokenizers are compared
PASSES = 40  # over one text, from which on more teach next to nothing (Muennighoff et al., arXiv 2305.16264, 6)


@dataclass
class TokenBatch(Batch):
    """Tokens and targets, int64 [B, T]; `documents` [B, T] numbers the documents of a row, None where each row holds one."""

    documents: Tensor | None = None


def _told(texts: Iterable[str], count: int, told: Callable[[str, float], None]) -> Iterator[str]:
    """The texts, with word of how many of them have been read."""
    for k, text in enumerate(texts):
        if k % 64 == 0:
            told(say("training a tokenizer on the text", "正在用这些文本训练分词器"), k / count)
        yield text


@dataclass
class EncodedText(Encoded):
    """A split as windows over its token stream, read where it lies on the disk."""

    stream: TokenStream
    context: int
    device: torch.device

    def __len__(self) -> int:
        return self.stream.windows(self.context)


@functools.lru_cache(maxsize=16)
def _share(seed: int, epoch: int) -> Tensor:
    """Where in a window an epoch's cuts begin, float32 in [0, 1)."""
    zero = torch.zeros(1, dtype=torch.int64)
    return CounterRandom(seed, zero + epoch, zero).uniform("cut")


@TASKS.register(
    "language-modeling",
    Card(
        summary="text is continued: a model predicts each next token",
        summary_zh="续写文本：模型预测每一个后续词元（token）",
        source="Bengio et al., A Neural Probabilistic Language Model, JMLR 3, 2003; Radford et al., GPT-2, 2019, 2",
        shapes="tokens int64 [B, context] -> logits [B, context, vocabulary]",
        limits="a document longer than the context is read in pieces that do not see each other",
    ),
)
class LanguageModeling(Task):
    """
    Args:
        context: tokens of a window: how far the model can look back.
        tokenizer: 'bpe' or 'char', trained on the training split; or a folder, tokenizer.json or hub:owner/name.
        vocabulary: its size, where it is trained; auto follows the size of the text.
        z_loss, logit_softcap: see `token_loss`.
        prompts: what samples begin with, at every evaluation; an empty list writes none.
        sample_tokens: how long samples are.
    """

    kind = "text"
    default_metric = "bits_per_byte"
    sample_temperature = 0.8

    def __init__(
        self,
        context: int = 256,
        tokenizer: str = "bpe",
        vocabulary: int | str = "auto",
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        prompts: Sequence[str] = ("",),
        sample_tokens: int = 64,
    ) -> None:
        if context < 2:
            raise RecipeError(
                "task.context = {n}: at least 2 tokens", "task.context = {n}：至少 2 个词元", n=context, fix="--set task.context=256"
            )
        if vocabulary != "auto" and (isinstance(vocabulary, bool) or not isinstance(vocabulary, int)):
            raise RecipeError(
                "task.vocabulary = {value}: a whole number or auto is expected",
                "task.vocabulary = {value}：应为整数或 auto",
                value=vocabulary,
                fix="--set task.vocabulary=4096",
            )
        if (logit_softcap is not None and not logit_softcap > 0) or not z_loss >= 0:
            raise RecipeError(
                "task.logit_softcap = {cap}, task.z_loss = {z}: a cap above 0 (or none) and a weight of 0 or more are expected",
                "task.logit_softcap = {cap}，task.z_loss = {z}：上限应大于 0（或不设），权重应不小于 0",
                cap=logit_softcap,
                z=z_loss,
                fix="--set task.logit_softcap=30 --set task.z_loss=1e-4",
            )
        if sample_tokens < 1:
            raise RecipeError(
                "task.sample_tokens = {n}: at least 1; no samples at all: task.prompts=[]",
                "task.sample_tokens = {n}：至少为 1；不需要样例则设 task.prompts=[]",
                n=sample_tokens,
                fix="--set task.sample_tokens=64",
            )
        self._set_context(context)
        self.wanted, self.vocabulary = tokenizer, vocabulary
        self.z_loss, self.softcap, self.prompts, self.sample_tokens = z_loss, logit_softcap, list(prompts), sample_tokens
        self.tokenizer: Tokenizer | None = None
        self.facts: dict[str, Any] = {}

    def _set_context(self, context: int) -> None:
        self.context = self.tokens_per_sample = context
        self.evaluation_batch = max(1, 16384 // context)

    def enough(self, encoded: Encoded, passes: float) -> None:
        """Whether there is text enough for a training that reads it `passes` times.

        Raises:
            RecipeError: a single window would be longer than the whole text: the step would be spent on padding.
        """
        if not isinstance(encoded, EncodedText):
            return
        if passes > PASSES:
            console.line(
                say(
                    "! the training text has only {n:,} tokens and would be read {passes:,.0f} times; what is read more than about {most} times teaches little "
                    "but itself: more text, or fewer steps (--set train.epochs={most})",
                    "! 训练文本只有 {n:,} 个词元，将被读 {passes:,.0f} 遍；超过约 {most} 遍后，模型基本只是在背诵：请增加文本，或减少步数（--set train.epochs={most}）",
                    n=encoded.stream.inputs,
                    passes=passes,
                    most=PASSES,
                ),
                style="yellow",
            )
        if self.context > max(4096, encoded.stream.inputs):
            raise RecipeError(
                "task.context = {context}: the whole training text has {n:,} tokens",
                "task.context = {context}：整个训练文本只有 {n:,} 个词元",
                context=self.context,
                n=encoded.stream.inputs,
                fix="--set task.context=1024",
            )

    # -- what is learned from the training split ---------------------------------------------------------------------------
    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        corpus = dataset.inputs
        if self.tokenizer is None:
            self.tokenizer = self._trained(dataset, train) if self.wanted in ("bpe", "char") else open_tokenizer(self.wanted)
            if self.tokenizer.end is None:
                raise DataError(
                    "the tokenizer '{name}' names no token for the end of a text",
                    "分词器 '{name}' 没有指定文本结束的词元",
                    name=self.wanted,
                    fix='name its folder, with a tokenizer_config.json beside tokenizer.json that has "eos_token" in it',
                    fix_zh='请给出目录，并在 tokenizer.json 旁放一个写有 "eos_token" 的 tokenizer_config.json',
                )
        if not self.facts:
            self.facts = self._compared(corpus.texts(train))

    def _trained(self, dataset: Dataset, train: NDArray[np.int64]) -> Tokenizer:
        corpus = dataset.inputs
        size = corpus.bytes_of("train")
        wanted = vocabulary_for(size) if self.vocabulary == "auto" else int(self.vocabulary)
        which = hashlib.sha256(
            repr((dataset.fingerprint, train.tobytes(), self.wanted, wanted, WORDS, cache.VERSION)).encode()
        ).hexdigest()[:32]
        folder = cache.cache_folder() / f"v{cache.VERSION}" / "tokenizers" / which
        if (folder / "tokenizer_config.json").is_file():
            return open_tokenizer(str(folder))
        console.line(say("training a tokenizer on the text", "正在用这些文本训练分词器"))
        if self.wanted == "char":
            made = train_characters(corpus.texts(train), 20_000 if self.vocabulary == "auto" else wanted)
        else:
            made = self._bpe(corpus, train, wanted)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made.save(folder, self.context)
        except OSError:
            pass  # a cache that cannot be written is only slower
        return made

    def _bpe(self, corpus: Any, train: NDArray[np.int64], wanted: int) -> Tokenizer:
        while True:
            try:
                with console.progress() as told:
                    return train_bpe(_told(corpus.texts(train), len(train), told), wanted, exact=self.vocabulary != "auto" or wanted > 512)
            except DataError:
                if self.vocabulary != "auto" or wanted <= 512:
                    raise
                wanted //= 2  # a text that says little for its size

    def _compared(self, texts: Any) -> dict[str, Any]:
        """Bytes per token on the training text, and GPT-2's on the same text where its tokenizer is on this machine."""
        assert self.tokenizer is not None
        sample: list[str] = []
        left = COMPARED
        for piece in (p for text in texts for p in pieces(text)):
            sample.append(piece[:left])
            left -= len(piece)
            if left <= 0:
                break
        size = sum(len(t.encode()) for t in sample)
        facts: dict[str, Any] = {
            "vocabulary": len(self.tokenizer),
            "bytes_per_token": size / max(1, sum(map(len, self.tokenizer.encode_batch(sample)))),
        }
        if (gpt2 := gpt2_for_comparison()) is not None:
            facts["bytes_per_token_gpt2"] = size / max(1, sum(map(len, gpt2.encode_batch(sample))))
        return facts

    def decisions(self) -> list[tuple[str, Any, str, str]]:
        """What was decided in `fit`: (name, value, reason, Chinese reason)."""
        found = self.facts
        against = f"; GPT-2's 50,257 tokens: {found['bytes_per_token_gpt2']:.2f}" if "bytes_per_token_gpt2" in found else ""
        against_zh = f"；GPT-2 的 50257 个词元：{found['bytes_per_token_gpt2']:.2f}" if against else ""
        own = self.wanted in ("bpe", "char")
        return [
            (
                "tokenizer",
                found,
                f"{'' if own else 'from '}{self.wanted}, {found['vocabulary']:,} tokens, {found['bytes_per_token']:.2f} bytes per token on this text{against}",
                f"分词器：{'' if own else '取自 '}{self.wanted}，{found['vocabulary']:,} 个词元，在该文本上每个词元 {found['bytes_per_token']:.2f} 字节{against_zh}",
            )
        ]

    def state(self) -> dict[str, Any]:
        return {"labels": [], "preprocessor": {"kind": "text", "context": self.context, "softcap": self.softcap, **self.facts}}

    def load_state(self, state: dict[str, Any]) -> None:
        kept = dict(state["preprocessor"])
        kept.pop("kind", None)
        self._set_context(kept.pop("context", self.context))
        self.softcap = kept.pop("softcap", self.softcap)
        self.facts = kept

    def own_state(self) -> dict[str, Any]:
        return {"context": self.context, **({} if self.softcap is None else {"softcap": self.softcap}), **self.facts}

    def write_files(self, folder: Path) -> None:
        assert self.tokenizer is not None
        self.tokenizer.save(folder, self.context)
        if self.softcap is not None:
            console.line(
                say(
                    "! task.logit_softcap = {cap} is kept here; transformers opens the folder without it, so its probabilities are sharper there",
                    "! task.logit_softcap = {cap} 只在本工具中生效；transformers 打开该目录时没有它，概率会更尖锐",
                    cap=self.softcap,
                ),
                style="yellow",
            )

    def read_files(self, folder: Path) -> None:
        self.tokenizer, self.wanted = open_tokenizer(str(folder)), str(folder)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.context,)

    @property
    def num_outputs(self) -> int:
        assert self.tokenizer is not None
        return max(int(self.facts.get("table") or 0), len(self.tokenizer))  # a model of others may have room for more

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
        corpus = dataset.inputs
        key = hashlib.sha256(
            f"{dataset.fingerprint} {hashlib.sha256(index.tobytes()).hexdigest()} {self.tokenizer.digest}".encode()
        ).hexdigest()[:40]
        offsets = corpus.offsets
        size = int((offsets[index + 1] - offsets[index]).sum())
        going_on = corpus.continues[index]
        going_on[:1] = False
        going_on[1:] &= index[1:] == index[:-1] + 1
        begins = index[~going_on]
        with console.progress() as told:
            stream = tokenize(lambda k: corpus.texts(index[k:]), len(index), size, self.tokenizer, key, told, going_on)
        if stream.inputs == 0:
            raise DataError("{name}: a split of the text holds no tokens", "{name}：文本的一个划分中没有词元", name=dataset.name)
        nothing = torch.zeros(0, device=device)

        def describe(i: int) -> str:
            return stream.describe(i, self.context, lambda k: corpus.describe(int(begins[k])))

        return EncodedText(nothing, nothing, describe, stream, self.context, device)

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        assert isinstance(encoded, EncodedText)
        shift: Any = 0
        if training and rng is not None:  # one cut for all windows of an epoch
            epochs = rng.epoch.tolist()
            cuts = {epoch: int(_share(rng.seed, epoch) * self.context) for epoch in set(epochs)}
            shift = np.array([cuts[epoch] for epoch in epochs])
        tokens, targets, documents = (
            None if a is None else torch.from_numpy(a).to(encoded.device)
            for a in encoded.stream.fetch(index.cpu().numpy(), encoded.context, shift)
        )
        assert tokens is not None and targets is not None
        return TokenBatch(tokens, targets, documents)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(batch, TokenBatch)
        count = int((batch.targets != IGNORED).sum())
        if not isinstance(model, LanguageModel):
            return Loss(
                F.cross_entropy(model(batch.inputs).flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"),
                count,
            )
        hidden = model.features(batch.inputs, batch.documents)
        total = token_loss(
            hidden.flatten(0, 1), model.output_weight, batch.targets.flatten(), z_loss=self.z_loss, softcap=self.softcap or model.softcap
        )
        auxiliary = getattr(model, "auxiliary", None)
        return Loss(total if auxiliary is None or not model.training else total + auxiliary * count, count)

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        assert isinstance(batch, TokenBatch)
        targets = batch.targets.flatten()
        if isinstance(model, LanguageModel):
            hidden = model.features(batch.inputs, batch.documents)
            loss, hit = token_scores(hidden.flatten(0, 1), model.output_weight, targets, self.softcap or model.softcap)
        else:
            logits = model(batch.inputs).flatten(0, 1).float()
            loss, hit = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none"), logits.argmax(1) == targets
        counted = targets != IGNORED
        unit, count = self._units(batch)
        rows = torch.zeros(count + 1, 3, dtype=torch.float64, device=loss.device)  # the last one takes what belongs to none
        rows = rows.index_add_(0, unit.flatten(), torch.stack([loss, counted, hit & counted], 1).double())[:count]
        metrics.update(rows, batch.targets, 0.0)
        return rows

    def _units(self, batch: TokenBatch) -> tuple[Tensor, int]:
        """What intervals are drawn over: the number of each position's unit, int64 [B, T], and how many there are. Here windows."""
        rows = len(batch.targets)
        return torch.arange(rows, device=batch.targets.device)[:, None].expand_as(batch.targets), rows

    def metrics(self) -> MetricSet:
        return LanguageMetrics(math.nan)

    def metrics_of(self, encoded: Encoded) -> MetricSet:
        assert isinstance(encoded, EncodedText)
        return LanguageMetrics(encoded.stream.bytes / max(1, encoded.stream.supervised))

    def _asked(self, prompt: str) -> list[int]:
        """The tokens that a sample goes on from."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_prompt(prompt)

    def samples(self, model: nn.Module) -> list[dict[str, str]]:
        from groundup.models.generation import Sampling, generate

        if not isinstance(model, LanguageModel) or self.tokenizer is None:
            return []
        rows = [self._asked(p)[: self.context - 1] for p in self.prompts]
        ends = self.tokenizer.turn_ends()
        how = Sampling(max_tokens=self.sample_tokens, temperature=self.sample_temperature, top_k=50, seed=0, stop_tokens=ends)
        texts = [self.tokenizer.decode(ids) for ids in generate(model, rows, how)] if rows else []
        return [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, texts)]

    # -- answering ---------------------------------------------------------------------------------------------------------
    def read(self, raw: Any) -> Tensor:
        """A text -> its last tokens, int64 [1, T] with T at most the context."""
        assert self.tokenizer is not None
        if isinstance(raw, bytes):
            raw = raw.decode("utf-8", "replace")
        return torch.tensor([self.tokenizer.encode_prompt(str(raw))[-self.context :]])

    def model_inputs(self, read: Tensor) -> Tensor:
        return read

    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Logits [B, T, vocabulary] -> the likeliest next tokens."""
        assert self.tokenizer is not None
        found = torch.softmax(outputs[:, -1].float(), -1).topk(min(top, outputs.shape[-1]))
        return [
            {"next": [{"token": self.tokenizer.decode([int(t)], special=True), "probability": float(p)} for t, p in zip(tokens, shares)]}
            for tokens, shares in zip(found.indices, found.values)
        ]
