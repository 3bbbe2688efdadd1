"""What language models share: the interface, attention over packed documents, rotary positions, RMSNorm, the memory of what was read.

A language model is a `Model` whose inputs are token numbers. Several documents may stand in one row: `documents` numbers them, and no position
sees, or counts from, another document than its own.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from groundup.core.errors import ModelError, did_you_mean
from groundup.models import fused
from groundup.models.base import Model

AttentionPath = Literal["sdpa", "explicit"]
Checkpointing = Literal["none", "selective", "whole"]


@dataclass
class Cache:
    """What a model remembers of the tokens it has read, so that the next one costs one position.

    Args:
        layers: per layer, two tensors: keys and values [B, kv_heads, capacity, head_dim]; a recurrent model has its states [layers, B, width].
        lengths: int64 [B], tokens read so far of each row.
        same: the length of all rows where they are equal, else None.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    same: int | None

    def advance(self, tokens: int) -> None:
        self.lengths = self.lengths + tokens
        self.same = None if self.same is None else self.same + tokens

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[2]

    @classmethod
    def joined(cls, parts: list[Cache], order: Tensor) -> Cache:
        """Several caches as one, its rows taken in this order (int64) from all of theirs."""
        layers = [
            (torch.cat([p.layers[i][0] for p in parts])[order], torch.cat([p.layers[i][1] for p in parts])[order])
            for i in range(len(parts[0].layers))
        ]
        return cls(layers, torch.cat([p.lengths for p in parts])[order], None)

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows (int64)."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        self.lengths = self.lengths[rows]
        if self.same is None and len(rows) and bool((self.lengths == self.lengths[0]).all()):
            self.same = int(self.lengths[0])


class LanguageModel(Model):
    """Token numbers [B, T] -> logits of the next token [B, T, vocabulary].

    Args:
        input_shape: (context,), the number of tokens it was made for.
        num_outputs: the size of the vocabulary.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        if len(input_shape) != 1:
            raise ModelError(
                "model '{name}' reads tokens; the data is {shape}",
                "模型 '{name}' 读取词元（token）；数据形状是 {shape}",
                name=type(self).__name__.lower(),
                shape=list(input_shape),
                fix="--set task=language-modeling   for text; fcnn or simple_cnn for numbers and pictures",
                fix_zh="文本请用 --set task=language-modeling；数字与图片请用 fcnn 或 simple_cnn",
            )
        super().__init__(input_shape, num_outputs)
        self.context, self.vocabulary = input_shape[0], num_outputs
        self.checkpointing: Checkpointing = "none"
        self.softcap: float | None = None  # logits become softcap * tanh(logits / softcap)

    attention_path: AttentionPath  # of models that compute attention themselves
    separates = False  # whether a single row of documents costs no more than the documents do

    @abstractmethod
    def features(self, x: Tensor, documents: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Tokens int64 [B, T] -> the hidden states [B, T, width] that `head` turns into logits.

        Args:
            documents: int64 [B, T], numbers that rise from one document of a row to the next; None for one document per row.
            cache: read and extended: the tokens follow those that it holds.
        """

    @property
    def path(self) -> AttentionPath:
        """How attention is computed. The explicit way changes its products in place, which those that 'selective' keeps must not be."""
        return "sdpa" if self.checkpointing == "selective" else self.attention_path

    def attends_itself(self, head_dim: int) -> bool:
        """Whether attention is computed by our own kernel, which is what 'sdpa' means where there is one. 'selective' keeps the results of torch's."""
        return self.path == "sdpa" and self.checkpointing != "selective" and fused.attends(self.output_weight, head_dim)

    @property
    @abstractmethod
    def output_weight(self) -> Tensor:
        """The head's matrix [vocabulary, width]: logits = hidden @ output_weight.T. The loss works on it in chunks."""

    @abstractmethod
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens."""

    def recompute(self, kind: Checkpointing) -> None:
        """Which activations are computed again in the backward pass. Raises ModelError where the model has no layers that could be."""
        self.checkpointing = kind

    def kept_activations(self) -> Callable[..., Any]:
        """How a layer is run: `run(layer, *inputs)`. In training with `checkpointing` its activations are not kept but computed again in the backward pass
        (Chen et al., arXiv 1604.06174, 3): all of them ('whole'), or all but the results of matrix products and attention ('selective')."""
        if self.checkpointing == "none" or not (self.training and torch.is_grad_enabled()):
            return lambda layer, *inputs: layer(*inputs)
        options: dict[str, Any] = {"use_reentrant": False}
        if self.checkpointing == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _dear)
        return functools.partial(checkpoint, **options)

    def resize(self, vocabulary: int) -> None:
        """More rows in the tables of tokens: the new ones begin at the mean of the old ones, with a little noise so that they differ (Hewitt, Initializing
        new word embeddings for pretrained language models, 2021)."""
        random = torch.Generator().manual_seed(0)
        for module in self.modules():
            if not isinstance(module, nn.Embedding | nn.Linear) or module.weight.shape[0] != self.vocabulary:
                continue
            old = module.weight.detach()
            added = vocabulary - len(old)
            noise = torch.randn(added, old.shape[1], generator=random).to(old)
            rows = old.mean(0) + 0.02 * old.std(0) * noise
            module.weight = nn.Parameter(torch.cat([old, rows]), requires_grad=module.weight.requires_grad)
            if isinstance(module, nn.Embedding):
                module.num_embeddings = vocabulary
            else:
                module.out_features = vocabulary
                if module.bias is not None:
                    module.bias = nn.Parameter(torch.cat([module.bias.detach(), module.bias.detach().mean().expand(added)]))
        self.vocabulary = self.num_outputs = vocabulary

    def head(self, h: Tensor) -> Tensor:
        return capped(F.linear(h, self.output_weight), self.softcap)

    def example_input(self, batch_size: int = 2) -> Tensor:
        return torch.zeros(batch_size, min(self.context, 8), dtype=torch.int64, device=next(self.parameters()).device)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, 2); the logits themselves where there is no cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _dear(context: Any, operation: Any, *rest: Any, **more: Any) -> CheckpointPolicy:
    """Results that cost more to make again than to keep."""
    name = str(operation)
    keep = any(part in name for part in ("aten.mm.", "aten.bmm.", "aten.addmm.", "scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def positions_of(documents: Tensor) -> Tensor:
    """Positions that restart in each document: int64 [B, T]."""
    at = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(documents)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], at[:, 1:], 0)
    return at - starts.cummax(1).values


# -- rotary positions ------------------------------------------------------------------------------------------------------------
ROPE_KEYS = ("type", "factor", "original", "fast", "slow", "attention", "truncate", "low", "high")


def rope_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None, context: int) -> tuple[Tensor, float]:
    """Inverse wavelengths [head_dim / 2] and the factor of cosines and sines (Su et al., RoFormer, arXiv 2104.09864, 3.2).

    Args:
        scaling: `{type: linear, factor}` (positions divided), `{type: yarn, factor, original}` (Peng et al., arXiv 2309.00071, 3.2-3.4) or
            `{type: llama3, factor, low, high, original}` (long waves divided, Llama 3.1); None leaves positions as they are.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not scaling or (kind := scaling.get("type")) == "default":
        return frequency, 1.0
    if kind not in ("linear", "yarn", "llama3"):
        raise ModelError(
            "model.rope_scaling.type = '{kind}'; known: linear, yarn, llama3",
            "model.rope_scaling.type = '{kind}'；可用：linear、yarn、llama3",
            kind=kind,
            fix="--set 'model.rope_scaling={{type: linear, factor: 2}}'",
        )
    for key in scaling:
        if key not in ROPE_KEYS:
            hint, hint_zh = did_you_mean(str(key), ROPE_KEYS)
            raise ModelError(
                "model.rope_scaling has no '{key}'." + hint, "model.rope_scaling 没有 '{key}'。" + hint_zh, key=key,
                fix="--set 'model.rope_scaling={{type: yarn, factor: 4, original: 2048}}'",
            )  # fmt: skip
    try:
        factor = float(scaling["factor"])
        if not factor >= 1:
            raise ValueError(f"factor = {factor:g}")
        if kind == "linear":
            return frequency / factor, 1.0
        original = float(scaling.get("original") or context)
        if kind == "llama3":
            low, high = float(scaling["low"]), float(scaling["high"])
            turns = original * frequency / (2 * math.pi)  # full turns within the original context
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            return frequency * (smooth + (1 - smooth) / factor), 1.0

        def dimension(turns: float) -> float:
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension(float(scaling.get("fast") or 32)), dimension(float(scaling.get("slow") or 1))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = ((torch.arange(head_dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        given = scaling.get("attention")
        scale = float(given) if given is not None else 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return frequency * (1 - ramp) + frequency / factor * ramp, scale
    except (TypeError, ValueError) as error:
        raise ModelError(
            "model.rope_scaling of type {kind}: numbers are expected, and a factor of at least 1, not {found} ({cause})",
            "{kind} 类型的 model.rope_scaling：应为数字，且 factor 至少为 1，而不是 {found}（{cause}）",
            kind=kind,
            found=str(scaling),
            cause=str(error),
            fix="--set 'model.rope_scaling={{type: linear, factor: 2}}'",
        ) from None
    except KeyError as error:
        raise ModelError(
            "model.rope_scaling of type {kind} needs {key}",
            "{kind} 类型的 model.rope_scaling 需要 {key}",
            kind=kind,
            key=error.args[0],
            fix="--set 'model.rope_scaling={{type: {kind}, factor: 4}}'"
            if kind != "llama3"
            else "--set 'model.rope_scaling={{type: llama3, factor: 8, low: 1, high: 4, original: 8192}}'",
        ) from None


class _Rotate(torch.autograd.Function):
    """Halves (a, b) of each head turned by the position's angle: (a cos - b sin, b cos + a sin). Backward is the turn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(a, cos, out=out[..., :half])
    torch.mul(b, cos, out=out[..., half:])
    out[..., :half].addcmul_(b, sin, value=-way)
    out[..., half:].addcmul_(a, sin, value=way)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, heads, T, head_dim] with cos and sin [..., T, head_dim / 2], in the half-split layout of transformers."""
    return _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype)) if x.requires_grad else _turned(x, cos.to(x.dtype), sin.to(x.dtype), 1)  # type: ignore[no-any-return]


# -- RMSNorm ---------------------------------------------------------------------------------------------------------------------
class _RMSNorm(torch.autograd.Function):
    """On CPUs torch composes RMSNorm of seven operations that each save a copy; this one saves the normalised input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, weight, inverse = ctx.saved_tensors
        for_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(-normed.shape[-1])
        return grad.addcmul_(normed, along).mul_(inverse), for_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        if fused.takes(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


# -- attention -------------------------------------------------------------------------------------------------------------------
def allowed(documents: Tensor | None, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which positions a position may see, bool [B or 1, 1, T, T]; None where that is every earlier one."""
    if documents is None and (window is None or window >= length):
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    may = distance >= 0
    if window is not None:
        may &= distance < window
    if documents is None:
        return may[None, None]
    return (documents[:, None, :, None] == documents[:, None, None, :]) & may


class _Explicit(torch.autograd.Function):
    """Attention with all its probabilities in memory: at short contexts faster on CPUs than kernels that save them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, may: Tensor | None, scale: float) -> Tensor:
        b, heads, t, d = q.shape
        kv, groups = k.shape[1], heads // k.shape[1]
        q3, k3, v3 = q.reshape(b * kv, groups * t, d), k.reshape(b * kv, t, d), v.reshape(b * kv, t, d)
        p = torch.bmm(q3, k3.transpose(1, 2))
        ctx.fused, ctx.causal = fused.takes(p), may is None
        if may is None and not ctx.fused:
            may = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()[None, None]
        bias = None if may is None else torch.zeros(may.shape, dtype=q.dtype, device=q.device).masked_fill_(~may, -torch.inf)
        if ctx.fused:
            fused.softmax_(p, scale, bias, b)
        else:
            assert bias is not None
            p = torch.softmax(p.mul_(scale).view(b, kv, groups, t, t).add_(bias.unsqueeze(1)), -1).view(b * kv, groups * t, t)
        ctx.save_for_backward(q3, k3, v3, p)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape)
        return torch.bmm(p, v3).view(b, heads, t, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q3, k3, v3, p = ctx.saved_tensors
        shape, kv_shape = ctx.shapes
        g3 = grad.reshape(q3.shape)
        dv = torch.bmm(p.transpose(1, 2), g3)
        ds = torch.bmm(g3, v3.transpose(1, 2))
        if ctx.fused:
            fused.softmax_back_(p, ds, ctx.scale, ctx.causal)
        else:
            ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k3), torch.bmm(ds.transpose(1, 2), q3)
        return dq.view(shape), dk.view(kv_shape), dv.view(kv_shape), None, None


@dataclass
class Apart:
    """One row of several documents, whose attention is computed one by one: no work on what they may not see of each other.

    Args:
        sizes: their lengths; inside: what may be seen in each, see `allowed`.
    """

    sizes: list[int]
    inside: list[Tensor | None]

    @classmethod
    def of(cls, documents: Tensor, window: int | None) -> Apart:
        """documents: int64 [1, T]."""
        sizes = torch.unique_consecutive(documents[0], return_counts=True)[1].tolist()
        return cls(sizes, [allowed(None, n, window, documents.device) for n in sizes])


@dataclass
class Spans:
    """From which position on each one sees, int64 [1 or B, T]: what our own kernel needs instead of a mask."""

    first: Tensor

    @classmethod
    def of(cls, documents: Tensor | None, length: int, window: int | None, device: torch.device) -> Spans:
        at = torch.arange(length, device=device)[None]
        first = torch.zeros_like(at) if documents is None else at - positions_of(documents)
        return cls(first if window is None else torch.maximum(first, at - window + 1))

    def mask(self) -> Tensor:
        """The same as `allowed`."""
        at = torch.arange(self.first.shape[1], device=self.first.device)
        return ((at >= self.first[..., None]) & (at <= at[:, None]))[:, None]


Seen = Tensor | Apart | Spans | None  # what a position may see


def seen(documents: Tensor | None, length: int, window: int | None, device: torch.device, spans: bool = False) -> Seen:
    """As `allowed`; for a single row of several documents on the CPU they are told apart instead (elsewhere their lengths would be compiled anew).

    Args:
        spans: attention is computed by our own kernel.
    """
    if spans:
        return Spans.of(documents, length, window, device)
    if documents is not None and len(documents) == 1 and device.type == "cpu":
        return Apart.of(documents, window)
    return allowed(documents, length, window, device)


def attend(q: Tensor, k: Tensor, v: Tensor, may: Seen, path: AttentionPath) -> Tensor:
    """Causal softmax attention (Vaswani et al., arXiv 1706.03762, eq. 1), grouped queries where k and v have fewer heads than q.

    Args:
        q: [B, heads, T, head_dim]; k, v: [B, kv_heads, T, head_dim].
        may: what may be seen, see `seen`.
    """
    if isinstance(may, Spans):
        if fused.attends(q, q.shape[-1]) and fused.takes(k, v):
            return fused.attend(q, k, v, may.first).transpose(1, 2)
        may = may.mask()
    if isinstance(may, Apart):
        parts = zip(q.split(may.sizes, 2), k.split(may.sizes, 2), v.split(may.sizes, 2), may.inside)
        return torch.cat([attend(*part, path) for part in parts], 2)
    if path == "explicit":
        return _Explicit.apply(q, k, v, may, q.shape[-1] ** -0.5)  # type: ignore[no-any-return]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may, is_causal=may is None, enable_gqa=grouped)


def attend_cached(q: Tensor, layer: tuple[Tensor, Tensor], k: Tensor, v: Tensor, cache: Cache, window: int | None) -> Tensor:
    """Attention of new positions over the cache and themselves; their keys and values are written into it. [B, heads, T, head_dim]."""
    keys, values = layer
    b, heads, t, _ = q.shape
    if cache.same is not None:
        end = cache.same + t
        keys[:, :, cache.same : end], values[:, :, cache.same : end] = k, v
        if t == 1 and (window is None or end <= window):
            return _one(q, keys[:, :, :end], values[:, :, :end])
    else:
        rows = torch.arange(b, device=q.device)[:, None]
        at = cache.lengths[:, None] + torch.arange(t, device=q.device)
        keys[rows, :, at], values[rows, :, at] = k.transpose(1, 2), v.transpose(1, 2)
        end = int(cache.lengths.max()) + t
    at = cache.lengths[:, None] + torch.arange(t, device=q.device)  # [B, T] the position of each query
    seen = torch.arange(end, device=q.device)
    may = seen <= at[..., None]
    if window is not None:
        may &= seen > at[..., None] - window
    return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=may[:, None], enable_gqa=heads != k.shape[1])


def _one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A single query per row over all keys: two small products are quicker than a kernel made for many."""
    b, heads, _, d = q.shape
    q = q.view(b, keys.shape[1], -1, d)
    return torch.matmul(torch.softmax(torch.matmul(q * d**-0.5, keys.transpose(2, 3)), -1), values).view(b, heads, 1, d)
