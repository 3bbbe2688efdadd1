"""The decoder of today's open language models: RMSNorm, rotary positions, grouped queries, SwiGLU, optionally experts.

Parameter names are those of Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE in transformers, so that weights, adapters and folders fit both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models import fused, lora
from groundup.models.language import (
    AttentionPath,
    Cache,
    LanguageModel,
    RMSNorm,
    Seen,
    Spans,
    attend,
    attend_cached,
    positions_of,
    rope_frequencies,
    rotate,
    seen,
)

# One dial: the parameters of the layers (the table of tokens comes on top). layers, width, heads, kv_heads, hidden width of the MLP.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "1M": (5, 128, 4, 4, 352),
    "5M": (6, 256, 4, 4, 704),
    "15M": (8, 384, 6, 6, 1024),
    "50M": (10, 640, 10, 10, 1728),
    "125M": (13, 896, 14, 14, 2432),
    "350M": (18, 1280, 20, 20, 3456),
    "1B": (22, 2048, 16, 4, 5632),
    "3B": (28, 3072, 24, 8, 8192),
    "8B": (32, 4096, 32, 8, 14336),
    "70B": (80, 8192, 64, 8, 28672),
}


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = lora.together(x, (self.gate_proj, self.up_proj))
        return self.down_proj(fused.swiglu(gate, up) if fused.takes(gate, up) else F.silu(gate) * up)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A mixture of experts: a gate sends each token to its `top` best MLPs (Shazeer et al., arXiv 1701.06538, 2.1).

    `balance` holds the load-balancing loss of the last forward pass: experts * sum over experts of (share of tokens sent to it * mean gate
    probability), 1 times `top` when all are used alike (Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4-6).
    """

    def __init__(self, width: int, hidden: int, count: int, top: int, normalize: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(MLP(width, hidden) for _ in range(count))
        self.top, self.normalize = top, normalize
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probability = torch.softmax(self.gate(flat).float(), -1)
        weight, chosen = probability.topk(self.top, -1)
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        if self.training:
            sent = torch.zeros(len(self.experts), device=x.device).scatter_add_(
                0, chosen.flatten(), torch.ones(chosen.numel(), device=x.device)
            )
            self.balance = len(self.experts) * torch.dot(sent / len(flat), probability.mean(0))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if len(token) or self.training:  # an expert without tokens still gets its (zero) gradient
                out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None].to(flat.dtype))
        return out.view_as(x)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions, optionally RMSNorm on queries and keys."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, bias: str, qk_norm: bool, eps: float, window: int | None
    ) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias != "none")
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(heads * head_dim, width, bias=bias == "all")
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, may: Seen, path: AttentionPath, cache: Cache | None, layer: int
    ) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, self.head_dim) for y in lora.together(x, (self.q_proj, self.k_proj, self.v_proj)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is None and fused.takes(q, k, v, cos):
            q, k, v = fused.heads(q, k, v, cos, sin)
        else:
            q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is None:
            out = attend(q, k, v, may, path)
        else:
            out = attend_cached(q, cache.layers[layer], k, v, cache, self.window)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


# A layer's matrices and norms, in the order of fused.WEIGHTS.
WEIGHTS = (
    *("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm"),
    *("o_proj", "post_attention_layernorm", "gate_proj", "up_proj", "down_proj"),
)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, mlp: nn.Module, width: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(width, eps), attention
        self.post_attention_layernorm, self.mlp = RMSNorm(width, eps), mlp

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, may: Seen, path: AttentionPath, cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, may, path, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def bare_weights(self) -> fused.LayerWeights | None:
        """Its weights, where all of it is plain matrices without biases or experts, and nobody watches a part."""
        parts = self._modules | self.self_attn._modules | self.mlp._modules  # asked in every step: a module's attributes take longer
        weights: dict[str, Tensor | None] = {}
        for name, part in parts.items():
            if part is None:
                continue
            plain = type(part) in (Attention, MLP, RMSNorm) or (type(part) is nn.Linear and part._parameters["bias"] is None)
            if not plain or lora.watched(part):
                return None
            weights[name] = part._parameters.get("weight")
        return None if lora.watched(self) else tuple(weights.get(name) for name in WEIGHTS)


class Body(nn.Module):
    """Everything before the head."""

    def __init__(self, vocabulary: int, width: int, layers: list[Layer], eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width, eps)


@MODELS.register(
    "decoder",
    Card(
        summary="a language model of Llama's and Qwen3's form, any size by one dial: size=1M .. 70B",
        summary_zh="Llama、Qwen3 式的语言模型；用一个旋钮选大小：size=1M .. 70B",
        source="Touvron et al., LLaMA, arXiv 2302.13971, 2.2; Qwen3 Technical Report, arXiv 2505.09388, 2",
        shapes="tokens int64 [B, T] -> logits [B, T, vocabulary]",
        limits="size counts the layers without the table of tokens; settings given beside size replace the preset's",
    ),
)
class Decoder(LanguageModel):
    """
    Args:
        size: a preset of layers, width, heads, kv_heads and hidden (see SIZES).
        hidden: width inside the MLPs (of each expert, where there are experts).
        qk_norm: RMSNorm of queries and keys (steadier at high learning rates; Qwen3's form).
        tied: one table for tokens and head.
        bias: biases of the attention's matrices: none, qkv or all.
        window: tokens that a position looks back over, in the layers from `window_from` on; None: all.
        rope_scaling: see `rope_frequencies`.
        experts: MLPs per layer of which each token goes through `experts_per_token`; 0: one MLP. `balance` weighs their load-balancing loss.
    """

    frequency: Tensor
    separates = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        size: str | None = None,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden: int | None = None,
        qk_norm: bool = True,
        tied: bool = True,
        bias: str = "none",
        window: int | None = None,
        window_from: int = 0,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        norm_eps: float = 1e-6,
        experts: int = 0,
        experts_per_token: int = 2,
        normalize_experts: bool = True,
        balance: float = 0.01,
    ) -> None:
        super().__init__(input_shape, num_outputs)
        if size is not None and size not in SIZES:
            raise ModelError(
                "model.size = '{size}'; known: {known}",
                "model.size = '{size}'；可用：{known}",
                size=size,
                known=", ".join(SIZES),
                fix="--set model.size=5M",
            )
        preset = SIZES[size or "1M"]
        layers, width = layers or preset[0], width or preset[1]
        heads = heads or (preset[2] if width == preset[1] else max(1, width // 64))
        kv_heads = kv_heads or (preset[3] if heads == preset[2] else heads)
        hidden = hidden or (preset[4] if width == preset[1] else -(-width * 8 // 3 // 32) * 32)
        head_dim = head_dim or width // heads
        if bias not in ("none", "qkv", "all"):
            raise ModelError(
                "model.bias = '{bias}'; known: none, qkv, all", "model.bias = '{bias}'；可用：none、qkv、all", bias=bias, fix="--set model.bias=none"
            )
        if heads % kv_heads or head_dim % 2:
            raise ModelError(
                "{heads} heads, {kv} kv_heads and a head_dim of {dim}: heads must be a multiple of kv_heads, and head_dim (width / heads where it is not set) an even number",
                "{heads} 个头、{kv} 个 kv 头、head_dim {dim}：heads 应是 kv_heads 的倍数，head_dim（未设置时为 width / heads）应为偶数",
                heads=heads,
                kv=kv_heads,
                dim=head_dim,
                fix="--set model.kv_heads={heads}" if heads % kv_heads else "--set model.head_dim={even}",
                even=head_dim + head_dim % 2,
            )
        if experts < 0:
            raise ModelError(
                "model.experts = {n}: 0 (one MLP) or more", "model.experts = {n}：0（单个 MLP）或更多", n=experts, fix="--set model.experts=8"
            )
        if not (norm_eps > 0 and rope_theta > 0):
            raise ModelError(
                "model.norm_eps = {eps} and model.rope_theta = {theta}: both must be above 0",
                "model.norm_eps = {eps}，model.rope_theta = {theta}：两者都应大于 0",
                eps=norm_eps,
                theta=rope_theta,
                fix="--set model.norm_eps=1e-6 --set model.rope_theta=10000",
            )
        if window is not None and window < 1:
            raise ModelError("model.window = {n}: at least 1", "model.window = {n}：至少为 1", n=window, fix="--set model.window=256")
        if experts and not 0 < experts_per_token <= experts:
            raise ModelError(
                "model.experts_per_token = {top}: between 1 and {experts} (model.experts) is expected",
                "model.experts_per_token = {top}：应在 1 与 {experts}（model.experts）之间",
                top=experts_per_token,
                experts=experts,
                fix="--set model.experts_per_token=2",
            )
        self.width, self.heads, self.kv_heads, self.head_dim, self.hidden = width, heads, kv_heads, head_dim, hidden
        self.qk_norm, self.tied, self.bias, self.window, self.window_from = qk_norm, tied, bias, window, window_from
        self.rope_theta, self.rope_scaling, self.norm_eps = rope_theta, rope_scaling, norm_eps
        self.experts, self.experts_per_token, self.normalize_experts = experts, experts_per_token, normalize_experts
        self.balance = balance
        self.attention_path: AttentionPath = "sdpa"
        self.model = Body(
            num_outputs,
            width,
            [
                Layer(
                    Attention(width, heads, kv_heads, head_dim, bias, qk_norm, norm_eps, window if i >= window_from else None),
                    Experts(width, hidden, experts, experts_per_token, normalize_experts) if experts else MLP(width, hidden),
                    width,
                    norm_eps,
                )
                for i in range(layers)
            ],
            norm_eps,
        )
        self.lm_head = None if tied else nn.Linear(width, num_outputs, bias=False)
        frequency, self.rope_factor = rope_frequencies(head_dim, rope_theta, rope_scaling, self.context)
        self.register_buffer("frequency", frequency, persistent=False)
        self.auxiliary: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices by the width they read, outputs into the residual stream zero: every layer begins as the identity (Zhang et al., Fixup,
        arXiv 1901.09321, 3.2), so that depth needs no care at high learning rates."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
                if name.endswith(("o_proj", "down_proj")):
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def output_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def features(self, x: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        h = self.model.embed_tokens(x)
        if cache is not None:
            positions = cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
        else:
            positions = torch.arange(x.shape[1], device=x.device)[None] if documents is None else positions_of(documents)
        angles = positions[:, None, :, None].to(torch.float32) * self.frequency
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        spans = self.attends_itself(self.head_dim)
        whole = seen(documents, x.shape[1], None, x.device, spans) if cache is None else None
        near = seen(documents, x.shape[1], self.window, x.device, spans) if cache is None and self.window is not None else whole
        may = [whole if i < self.window_from else near for i in range(len(self.model.layers))]
        if weights := self._bare_weights(h, may):
            h = fused.layers(h, cos, sin, [m.first for m in may if isinstance(m, Spans)], self.heads, self.norm_eps, weights)
        else:
            run = self.kept_activations()
            for i, layer in enumerate(self.model.layers):
                h = run(layer, h, cos, sin, may[i], self.path, cache, i)
        if cache is not None:
            cache.advance(x.shape[1])
        if self.experts and self.training:
            losses = [m.balance for m in self.modules() if isinstance(m, Experts) and m.balance is not None]
            self.auxiliary = self.balance * torch.stack(losses).mean()
        return self.model.norm(h)  # type: ignore[no-any-return]

    def _bare_weights(self, x: Tensor, may: Sequence[Seen]) -> list[fused.LayerWeights]:
        """The weights of all layers, where they can go through as one function; empty where not."""
        if self.checkpointing != "none" or _has_any_global_hook() or not all(isinstance(m, Spans) for m in may):
            return []
        found = [w for layer in self.model.layers if isinstance(layer, Layer) and (w := layer.bare_weights())]
        return found if len(found) == len(self.model.layers) and fused.layers_take(x, found, self.head_dim) else []

    def new_cache(self, rows: int, capacity: int) -> Cache:
        like = self.output_weight
        shape = (rows, self.kv_heads, capacity, self.head_dim)
        layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.model.layers]
        return Cache(layers, torch.zeros(rows, dtype=torch.int64, device=like.device), 0)

    def reset_head(self, num_outputs: int) -> None:
        like, self.num_outputs, self.vocabulary = self.output_weight, num_outputs, num_outputs
        self.model.embed_tokens = nn.Embedding(num_outputs, self.width).to(like)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        if self.lm_head is not None:
            self.lm_head = nn.Linear(self.width, num_outputs, bias=False).to(like)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        head: list[nn.Module] = [self.model.norm, *([] if self.lm_head is None else [self.lm_head])]
        layers = {f"layer{i}": [layer] for i, layer in enumerate(self.model.layers)}
        return {"embedding": [self.model.embed_tokens], **layers, "head": head}

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of training on one token: 6 per weight of a matrix that it meets, and the attention over `length`
        positions, half of them in the future (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B)."""
        met = sum(m.weight.numel() for n, m in self.named_modules() if isinstance(m, nn.Linear) and ".experts." not in n)
        if self.experts:
            met += len(self.model.layers) * self.experts_per_token * 3 * self.width * self.hidden
        met += self.output_weight.numel() if self.tied else 0
        return 6.0 * met + 6.0 * len(self.model.layers) * self.heads * self.head_dim * min(length, self.window or length)
