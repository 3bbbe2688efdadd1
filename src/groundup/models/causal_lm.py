"""Any causal language model of transformers, where our own decoder does not have its form (Gemma, Phi, OLMo, Falcon, Mamba, ...)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.language import Cache, Checkpointing, LanguageModel, capped, positions_of


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own progress bars would stand in the middle of what we tell."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass
class _Together:
    """Rows that were read together, and what transformers remembers of them.

    Args:
        rows: how many it remembers; alive: which of them still go on, int64.
    """

    past: Any
    rows: int
    alive: Tensor


@dataclass
class _Past(Cache):
    """transformers' own caches, whatever they hold. Rows of one length share one; those that are done are read on with the others and left out.

    Args:
        order: where each row stands among the living ones of all parts, int64 [B].
    """

    parts: list[_Together]
    order: Tensor

    @property
    def capacity(self) -> int:
        return 2**62

    def read(self, model: CausalLM, x: Tensor) -> Tensor:
        found = []
        for part, new in zip(self.parts, x[self.order.argsort()].split([len(p.alive) for p in self.parts])):
            tokens = new.new_zeros(part.rows, x.shape[1])
            tokens[part.alive] = new
            hidden, part.past = model._read_on(tokens, part.past)
            found.append(hidden[part.alive])
        return torch.cat(found)[self.order]

    @classmethod
    def joined(cls, parts: list[Cache], order: Tensor) -> Cache:
        orders, together, before = [], [], 0
        for part in parts:
            assert isinstance(part, _Past)
            orders.append(part.order + before)
            together += part.parts
            before += len(part.order)
        return cls([], torch.cat([p.lengths for p in parts])[order], None, together, torch.cat(orders)[order])

    def select(self, rows: Tensor) -> None:
        kept, before, left = self.order[rows], 0, []
        places = kept.sort().values
        for part in self.parts:
            end = before + len(part.alive)
            alive = part.alive[places[(places >= before) & (places < end)] - before]
            if len(alive):
                left.append(_Together(part.past, part.rows, alive))
            before = end
        self.parts, self.order, self.lengths = left, kept.argsort().argsort(), self.lengths[rows]


SCALES = ("logit_scale", "logits_scaling")  # settings by which some families multiply, or divide, their logits


@MODELS.register(
    "causal-lm",
    Card(
        summary="any causal language model of transformers, by its config",
        summary_zh="transformers 中任意一种因果语言模型，由其 config 指定",
        source="Wolf et al., Transformers, arXiv 1910.03771",
        shapes="tokens int64 [B, T] -> logits [B, T, vocabulary]",
        limits="slower than the decoder; no code of its own is run",
    ),
)
class CausalLM(LanguageModel):
    """
    Args:
        config: transformers' config.json.
    """

    inner = "net."  # before transformers' own names

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, config: dict[str, Any] | None = None) -> None:
        super().__init__(input_shape, num_outputs)
        if not config or "model_type" not in config:
            raise ModelError(
                "model 'causal-lm' needs transformers' config",
                "模型 'causal-lm' 需要 transformers 的 config",
                fix="groundup tune FOLDER --data FILE",
            )
        import transformers

        known = dict(config)
        try:
            made = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
            self.net = transformers.AutoModelForCausalLM.from_config(made)
        except ValueError as error:
            raise ModelError(
                "transformers {version} does not know language models of type '{kind}'",
                "transformers {version} 不认识 '{kind}' 类型的语言模型",
                version=transformers.__version__,
                kind=config["model_type"],
            ) from error
        facts = self.net.config
        self.softcap = getattr(facts, "final_logit_softcapping", None)
        multiply, divide = (float(getattr(facts, name, None) or 1.0) for name in SCALES)
        self.scale = multiply / divide
        self.positioned = "position_ids" in inspect.signature(self.net.base_model.forward).parameters
        self.packs: bool | None = None  # whether positions that restart keep documents apart: found out by trying
        self.remembers: bool | None = None  # whether its own cache gives what reading everything again does: likewise
        if self.net.get_output_embeddings() is None:
            raise ModelError("{kind} has no head over tokens", "{kind} 没有词元输出层", kind=type(self.net).__name__)

    @property
    def output_weight(self) -> Tensor:
        return self.net.get_output_embeddings().weight  # type: ignore[no-any-return]

    def features(self, x: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            return self._after(x, cache)
        if documents is None:
            return self._read(x, None)
        if self.packs is None:
            self.packs = self.positioned and self._keeps_apart(x.device)
        return self._read(x, positions_of(documents)) if self.packs else self._each(x, documents)

    def _read(self, x: Tensor, positions: Tensor | None) -> Tensor:
        more: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        hidden = self.net.base_model(input_ids=x, use_cache=False, **more)[0]
        return hidden if self.scale == 1.0 else hidden * self.scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def _keeps_apart(self, device: torch.device) -> bool:
        """Whether two short documents in a row come out as each does alone."""
        random = torch.Generator().manual_seed(0)
        x = torch.randint(0, self.vocabulary, (1, 12), generator=random).to(device)
        was = self.training
        self.eval()
        try:
            documents = (torch.arange(12, device=device) >= 5).long()[None]
            together = self._read(x, positions_of(documents))
            apart = torch.cat([self._read(x[:, :5], None), self._read(x[:, 5:], None)], 1)
            return bool(torch.allclose(together, apart, atol=1e-4 * float(apart.abs().max()) + 1e-6))
        finally:
            self.train(was)

    def _each(self, x: Tensor, documents: Tensor) -> Tensor:
        """Each document as a row of its own, for models that cannot keep them apart; padding stands after, where it is not seen."""
        pieces = [(r, d == documents[r]) for r in range(len(x)) for d in documents[r].unique()]
        rows = nn.utils.rnn.pad_sequence([x[r, where] for r, where in pieces], batch_first=True)
        hidden = self._read(rows, None)
        out = hidden.new_empty(*x.shape, hidden.shape[-1])
        for (r, where), row in zip(pieces, hidden):
            out[r, where] = row[: int(where.sum())]
        return out

    def _after(self, x: Tensor, cache: Cache) -> Tensor:
        if isinstance(cache, _Past):
            hidden = cache.read(self, x)
            cache.advance(x.shape[1])
            return hidden
        # The cache holds the tokens themselves: all of them are read again.
        kept = cache.layers[0][0]
        rows = torch.arange(len(x), device=x.device)[:, None]
        at = cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
        kept[rows, 0, at, 0] = x
        cache.advance(x.shape[1])
        return self._read(kept[:, 0, : int(cache.lengths.max()), 0], None)[rows, at]

    def _read_on(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Tokens after those that `past` remembers (None: nothing yet), and what is remembered then."""
        found = self.net.base_model(input_ids=x, past_key_values=past, use_cache=True)
        return found[0] if self.scale == 1.0 else found[0] * self.scale, found.past_key_values

    @torch.no_grad()
    def _keeps_past(self, device: torch.device) -> bool:
        x = torch.randint(0, self.vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
        was = self.training
        self.eval()
        try:
            whole, past, parts = self._read(x, None), None, []
            for part in (x[:, :7], x[:, 7:8], x[:, 8:]):
                hidden, past = self._read_on(part, past)
                parts.append(hidden)
            return bool(torch.allclose(torch.cat(parts, 1), whole, atol=1e-4 * float(whole.abs().max()) + 1e-6))
        except (AttributeError, TypeError, ValueError, NotImplementedError):  # another kind of memory, or none
            return False
        finally:
            self.train(was)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        device = self.output_weight.device
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        if self.remembers is None:
            self.remembers = self._keeps_past(device)
        if self.remembers:
            every = torch.arange(rows, device=device)
            return _Past([], lengths, 0, [_Together(None, rows, every)], every)
        tokens = torch.zeros(rows, 1, capacity, 1, dtype=torch.int64, device=device)
        return Cache([(tokens, tokens[:, :, :0])], lengths, 0)

    def head(self, h: Tensor) -> Tensor:
        return capped(F.linear(h, self.output_weight), self.softcap)

    def recompute(self, kind: Checkpointing) -> None:
        """transformers knows whole layers only."""
        super().recompute(kind)
        self.net.gradient_checkpointing_enable({"use_reentrant": False})

    def reset_head(self, num_outputs: int) -> None:
        self.resize(num_outputs)

    def resize(self, vocabulary: int) -> None:
        self.net.resize_token_embeddings(vocabulary, mean_resizing=True)
        self.vocabulary = self.num_outputs = vocabulary

    def read(self, folder: Path) -> None:
        """The weights of a folder of transformers, in float32.

        Raises:
            ModelError: they are not for this config.
        """
        import transformers

        try:
            with _without_bars():
                self.net, found = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, config=self.net.config, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                "{folder} cannot be opened: {why}", "无法打开 {folder}：{why}", folder=folder, why=str(error).splitlines()[0]
            ) from error
        if lacking := sorted(found["missing_keys"]):
            raise ModelError("{folder} lacks the tensor '{name}'", "{folder} 缺少张量 '{name}'", folder=folder, name=lacking[0])

    def write(self, folder: Path) -> None:
        """The weights and config.json, as transformers writes them."""
        with _without_bars():
            self.net.save_pretrained(folder, max_shard_size="1TB")

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        """The table of tokens, each layer, the rest."""
        layers = max((m for m in self.net.base_model.modules() if isinstance(m, nn.ModuleList)), key=len, default=None)
        inside = {id(p) for p in layers.parameters()} if layers is not None else set()
        table = self.net.get_input_embeddings()
        inside |= {id(p) for p in table.parameters()}
        rest = [m for m in self.modules() if (own := list(m.parameters(recurse=False))) and not any(id(p) in inside for p in own)]
        return {"embedding": [table], **{f"layer{i}": [m] for i, m in enumerate(layers if layers is not None else [])}, "head": rest}
