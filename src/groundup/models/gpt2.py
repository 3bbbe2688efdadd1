"""GPT-2: learned positions, LayerNorm, GELU. Parameter names and folders are those of transformers' `gpt2`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.language import AttentionPath, Cache, LanguageModel, Seen, attend, attend_cached, positions_of, seen


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, may: Seen, path: AttentionPath, cache: Cache | None, layer: int) -> Tensor:
        b, t, width = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.c_attn(x).split(width, -1))
        out = attend(q, k, v, may, path) if cache is None else attend_cached(q, cache.layers[layer], k, v, cache, None)
        return self.c_proj(out.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width, eps), MLP(width, hidden)

    def forward(self, x: Tensor, may: Seen, path: AttentionPath, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), may, path, cache, layer)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


@MODELS.register(
    "gpt2",
    Card(
        summary="GPT-2: learned positions, LayerNorm, GELU",
        summary_zh="GPT-2：可学习的位置、LayerNorm、GELU",
        source="Radford et al., Language Models are Unsupervised Multitask Learners, 2019, 2.3",
        shapes="tokens int64 [B, T], T at most the context -> logits [B, T, vocabulary]",
        limits="cannot go beyond its context; kept for its checkpoints and for comparisons, `decoder` learns faster",
    ),
)
class GPT2(LanguageModel):
    separates = True
    fan_in_fan_out = True  # transformers keeps its matrices the other way round, and PEFT's files say so

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        hidden: int | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(input_shape, num_outputs)
        if width % heads:
            raise ModelError(
                "width {width} cannot be divided into {heads} heads",
                "宽度 {width} 不能分成 {heads} 个头",
                width=width,
                heads=heads,
                fix="--set model.heads=4",
            )
        self.width, self.heads, self.hidden, self.norm_eps = width, heads, hidden or 4 * width, norm_eps
        self.head_dim = width // heads
        self.attention_path: AttentionPath = "sdpa"
        self.drop = nn.Dropout(dropout)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(num_outputs, width),
                "wpe": nn.Embedding(self.context, width),
                "h": nn.ModuleList(Block(width, heads, self.hidden, norm_eps) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, norm_eps),
            }
        )
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(p)
            if p.ndim == 2:  # outputs into the residual stream smaller by the square root of their number (Radford et al., 2.3)
                nn.init.normal_(p, std=0.02 * ((2 * layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0))

    @property
    def output_weight(self) -> Tensor:
        return self.transformer["wte"].weight  # type: ignore[return-value]

    def features(self, x: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        positions = cache.lengths[:, None] + at if cache is not None else at if documents is None else positions_of(documents)
        end = x.shape[1] + (0 if cache is None else int(cache.lengths.max())) if documents is None else int(positions.max()) + 1
        if end > self.context:
            raise ModelError(
                "{n} tokens; this model has positions for {context}",
                "共 {n} 个词元；该模型只有 {context} 个位置",
                n=end,
                context=self.context,
                fix="a shorter prompt, or fewer new tokens",
                fix_zh="缩短提示，或减少生成的词元数",
            )
        h = self.drop(self.transformer["wte"](x) + self.transformer["wpe"](positions))
        spans = self.attends_itself(self.head_dim)
        may = seen(documents, x.shape[1], None, x.device, spans) if cache is None else None
        run = self.kept_activations()
        for i, block in enumerate(self.transformer["h"]):  # type: ignore[arg-type,var-annotated]
            h = run(block, h, may, self.path, cache, i)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.transformer["ln_f"](h)  # type: ignore[no-any-return]

    def new_cache(self, rows: int, capacity: int) -> Cache:
        like, blocks = self.output_weight, len(self.transformer["h"])  # type: ignore[arg-type]
        shape = (rows, self.heads, capacity, self.width // self.heads)
        layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(blocks)]
        return Cache(layers, torch.zeros(rows, dtype=torch.int64, device=like.device), 0)

    def reset_head(self, num_outputs: int) -> None:
        like, self.num_outputs, self.vocabulary = self.output_weight, num_outputs, num_outputs
        self.transformer["wte"] = nn.Embedding(num_outputs, self.width).to(like)
        nn.init.normal_(self.transformer["wte"].weight, std=0.02)  # type: ignore[arg-type]

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        t = self.transformer
        blocks = {f"layer{i}": [block] for i, block in enumerate(t["h"])}  # type: ignore[arg-type,var-annotated]
        return {"embedding": [t["wte"], t["wpe"]], **blocks, "head": [t["ln_f"]]}

    def flops_per_token(self, length: int) -> float:
        """As `Decoder.flops_per_token`."""
        met = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)) + self.output_weight.numel()
        return 6.0 * met + 6.0 * len(self.transformer["h"]) * self.width * length  # type: ignore[arg-type]
