"""A recurrent language model: the comparison for the others, with a memory that does not grow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.language import Cache, Checkpointing, LanguageModel


@MODELS.register(
    "lstm",
    Card(
        summary="a recurrent language model (LSTM); its memory does not grow with the text",
        summary_zh="循环语言模型（LSTM）；其记忆不随文本增长",
        source="Hochreiter and Schmidhuber, Neural Computation 9(8), 1997; Zaremba et al., arXiv 1409.2329",
        shapes="tokens int64 [B, T] -> logits [B, T, vocabulary]",
        limits="reads one token after the other: slower to train than attention of the same size, and forgets sooner",
    ),
)
class LSTM(LanguageModel):
    def __init__(
        self, input_shape: tuple[int, ...], num_outputs: int, width: int = 256, layers: int = 2, dropout: float = 0.0, tied: bool = True
    ) -> None:
        super().__init__(input_shape, num_outputs)
        self.width = width
        self.embedding = nn.Embedding(num_outputs, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.norm = nn.LayerNorm(width)
        self.output = None if tied else nn.Linear(width, num_outputs, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02 if tied else 1.0)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.output is None else self.output.weight

    def recompute(self, kind: Checkpointing) -> None:
        raise ModelError(
            "train.checkpointing is for transformers, not for an lstm", "train.checkpointing 用于 transformer 模型，不支持 lstm",
            fix="--set train.checkpointing=none",
        )  # fmt: skip

    def features(self, x: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        h = self.embedding(x)
        if cache is not None:
            h, (hidden, cell) = self.lstm(h, cache.layers[0])
            cache.layers[0] = (hidden, cell)
            cache.advance(x.shape[1])
        elif documents is None or bool((documents == documents[:, :1]).all()):
            h, _ = self.lstm(h)
        else:
            h = self._each(h, documents)
        return self.norm(h)  # type: ignore[no-any-return]

    def _each(self, h: Tensor, documents: Tensor) -> Tensor:
        """Each document from an empty state: the pieces as rows of their own, filled up behind, where a causal model does not look."""
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        piece = begins.flatten().cumsum(0) - 1
        first = begins.flatten().nonzero()[:, 0]
        place = torch.arange(piece.numel(), device=h.device) - first[piece]
        rows = h.new_zeros(len(first), int(place.max()) + 1, self.width).index_put((piece, place), h.flatten(0, 1))
        return self.lstm(rows)[0][piece, place].view_as(h)  # type: ignore[no-any-return]

    def new_cache(self, rows: int, capacity: int) -> Cache:
        like = self.output_weight
        state = like.new_zeros(self.lstm.num_layers, rows, self.width)
        return _States([(state, state.clone())], torch.zeros(rows, dtype=torch.int64, device=like.device), 0)

    def reset_head(self, num_outputs: int) -> None:
        like, self.num_outputs, self.vocabulary = self.output_weight, num_outputs, num_outputs
        self.embedding = nn.Embedding(num_outputs, self.width).to(like)
        nn.init.normal_(self.embedding.weight, std=0.02 if self.output is None else 1.0)
        if self.output is not None:
            self.output = nn.Linear(self.width, num_outputs, bias=False).to(like)

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        head: list[nn.Module] = [self.norm, *([] if self.output is None else [self.output])]
        return {"embedding": [self.embedding], "recurrence": [self.lstm], "head": head}

    def flops_per_token(self, length: int) -> float:
        """6 per weight of the recurrence and the head; `length` does not matter."""
        return 6.0 * (sum(p.numel() for p in self.lstm.parameters()) + self.output_weight.numel())


class _States(Cache):
    """Recurrent states [layers, B, width] instead of keys and values."""

    @property
    def capacity(self) -> int:
        return 2**62

    @classmethod
    def joined(cls, parts: list[Cache], order: Tensor) -> Cache:
        hidden, cell = (torch.cat([p.layers[0][k] for p in parts], 1)[:, order] for k in (0, 1))
        return cls([(hidden, cell)], torch.cat([p.lengths for p in parts])[order], None)

    def select(self, rows: Tensor) -> None:
        self.layers = [(h[:, rows], c[:, rows]) for h, c in self.layers]
        self.lengths = self.lengths[rows]
