"""Passes over the activations of a training on a CPU as C kernels (train.c), each with its backward pass.

torch makes each of them of several operations, which read and write the same memory again; at the sizes that a CPU trains, that is a third of a step.
Where `takes` says no (another device, another precision, no compiler), the callers do the same with torch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.models import library

BLOCK, PIECE = 64, 2048  # rows and numbers that are summed together, as in train.c

# A forecast watches trainings of tensors without numbers: it is told of the bytes that a kernel
# would read and write and of its operations, and whether there would be kernels.
_forecast: Callable[[int, float], None] | Literal[False] | None = None


@contextmanager
def forecast(told: Callable[[int, float], None] | Literal[False]) -> Iterator[None]:
    """In here kernels only tell the bytes that they would read and write, and their operations in products; with False they are not used."""
    global _forecast
    before, _forecast = _forecast, told
    try:
        yield
    finally:
        _forecast = before


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on this CPU."""
    if torch.compiler.is_compiling() or _forecast is False:
        return False
    for x in tensors:
        if x.dtype != torch.float32 or not x.is_cpu or (_forecast is None and type(x) not in (Tensor, nn.Parameter)):
            return False
    return library.why_not("train") is None


def _call(name: str, *arguments: Any, operations: float = 0.0) -> None:
    if _forecast:
        _forecast(sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor)), operations)
        return
    found = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library.loaded("train"), f"groundup_{name}")(*found, torch.get_num_threads())


# -- RMSNorm ---------------------------------------------------------------------------------------------------------------------
class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("norm", inverse.numel(), width, eps, x, weight, y, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), inverse.numel(), x.shape[-1]
        for_x, for_weight, blocks = torch.empty_like(x), None, None
        if ctx.needs_input_grad[1]:
            for_weight, blocks = torch.empty_like(weight), x.new_empty(-(-rows // BLOCK), width)
        _call("norm_back", rows, width, grad, x, weight, inverse, for_x, blocks, for_weight)
        return for_x, for_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis."""
    return _Norm.apply(x, weight, eps)  # type: ignore[no-any-return]


# -- SwiGLU ----------------------------------------------------------------------------------------------------------------------
class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _call("swiglu", y.numel(), gate, up, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_back", gate.numel(), grad.contiguous(), gate, up, for_gate, for_up)
        return for_gate, for_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return]


# -- heads and their positions ---------------------------------------------------------------------------------------------------
class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "token")]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int, y: Tensor) -> None:
    """x and y: [B, heads, T, head_dim], in any order in memory but for the last axis."""
    b, heads, t, d = x.shape
    strides = [_Strides(*a.stride()[:3]) for a in (x, y)]
    at = [ctypes.addressof(s) for s in strides]
    _call("turn", b, heads, t, d // 2, x, at[0], cos, sin, len(cos), way, y, at[1])


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        made = []
        for x, way in ((q, 1), (k, 1), (v, 0)):
            x = x.transpose(1, 2)
            made.append(x.new_empty(x.shape))
            _turn(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, way, made[-1])
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        made = []
        for grad, way in zip(grads, (-1, -1, 0)):
            b, heads, t, d = grad.shape
            made.append(grad.new_empty(b, t, heads, d))
            _turn(grad if grad.stride(-1) == 1 else grad.contiguous(), cos, sin, way, made[-1].transpose(1, 2))
        return *made, None, None


def heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, T, heads, head_dim] turned by their positions, and values, each [B, heads, T, head_dim]; cos, sin: [1 or B, 1, T, head_dim / 2]."""
    return _Heads.apply(q, k, v, cos.contiguous(), sin.contiguous())  # type: ignore[no-any-return]


# -- attention -------------------------------------------------------------------------------------------------------------------
WIDTH = 32  # the heads' width is a multiple of it, as in train.c


def attends(x: Tensor, head_dim: int) -> bool:
    """Whether `attend` can work on heads of this width made from x."""
    return head_dim % WIDTH == 0 and takes(x)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        b, heads, t, d = q.shape
        y, tops, scratch = q.new_empty(b, t, heads, d), q.new_empty(b, heads, 2, -(-t // WIDTH) * WIDTH), _scratch(q)
        ctx.scale, ctx.sizes = scale, (b, heads, k.shape[1], t, d)
        _call("attend", *ctx.sizes, q, k, v, first, len(first), scale, y, tops, scratch, operations=2 * _product(q, first))
        ctx.save_for_backward(q, k, v, first, tops)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, first, tops = ctx.saved_tensors
        made = [torch.empty_like(x) for x in (q, k, v)]
        rest = (ctx.scale, grad.contiguous(), tops, *made, _scratch(q))
        _call("attend_back", *ctx.sizes, q, k, v, first, len(first), *rest, operations=5 * _product(q, first))
        return *made, None, None


def _product(q: Tensor, first: Tensor) -> float:
    """Operations of a product of all queries with the keys that they see; only forecasts ask."""
    b, heads, t, d = q.shape
    return 2.0 * b * heads * d * float((torch.arange(t) + 1 - first).sum()) / len(first) if _forecast else 0.0


def _scratch(q: Tensor) -> Tensor:
    t, d = q.shape[2:]
    return q.new_empty(torch.get_num_threads() * 2 * WIDTH * (t + d))


def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
    """Softmax attention of each query over the keys from `first` (int64 [1 or B, T], never falling) to its own, [B, T, heads, head_dim].

    q: [B, heads, T, head_dim]; k, v: [B, kv_heads, T, head_dim].
    """
    return _Attend.apply(q, k, v, first.contiguous(), q.shape[-1] ** -0.5)  # type: ignore[no-any-return]


# -- softmax of attention and of tokens ------------------------------------------------------------------------------------------
def softmax_(scores: Tensor, scale: float, bias: Tensor | None, sequences: int) -> None:
    """softmax(scale * scores + bias) in place. scores: [..., T] of `sequences` sequences, T queries after each other; bias: [1 or B, 1, T, T], causal
    without it."""
    t = scores.shape[-1]
    _call("softmax", sequences, scores.numel() // t, t, scores, scale, bias, 1 if bias is None else len(bias))


def softmax_back_(p: Tensor, grad: Tensor, scale: float, causal: bool) -> None:
    """The gradient of the probabilities p [..., T] becomes that of the scores, in place."""
    t = p.shape[-1]
    _call("softmax_back", p.numel() // t, t, p, grad, scale, causal)


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, *, back: bool) -> Tensor:
    """The cross-entropy of each row, float32 [N], and z_loss * log(Z)²; with `back` the logits [N, vocabulary] become its gradient."""
    loss = logits.new_empty(len(logits))
    _call("cross_entropy", *logits.shape, logits, targets.contiguous(), z_loss, loss, back)
    return loss


# -- layers of the decoder -------------------------------------------------------------------------------------------------------
LayerWeights = tuple[Tensor | None, ...]
WEIGHTS = ("norm", "q", "k", "v", "q_norm", "k_norm", "o", "second_norm", "gate", "up", "down")


class _Facts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "t", "width", "heads", "kv", "d", "hidden", "firsts", "angles")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("first", "cos", "sin", *WEIGHTS)),
    ]


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, eps: float, cos: Tensor, sin: Tensor, count: int, *each: Tensor | None) -> Tensor:
        ctx.settings, ctx.count, x = (heads, eps), count, x.contiguous()
        facts = _facts(x, heads, eps, cos, sin, each, count)
        sizes = [library.loaded("train").groundup_layer_kept(ctypes.addressof(f)) for f in facts]
        kept, y = [x.new_empty(size + x.numel()) for size in sizes], torch.empty_like(x)  # behind what a layer keeps, what it gives to the next one
        _run_layers("layers", facts, each, x, kept, y)
        ctx.save_for_backward(x, cos, sin, *kept, *each)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, cos, sin, *kept), each = ctx.saved_tensors[: 3 + ctx.count], ctx.saved_tensors[3 + ctx.count :]
        (heads, eps), needs = ctx.settings, ctx.needs_input_grad[6:]
        made = [torch.empty_like(w) if need and w is not None else None for w, need in zip(each[ctx.count :], needs[ctx.count :])]
        grad = grad.clone(memory_format=torch.contiguous_format)
        _run_layers("layers_back", _facts(x, heads, eps, cos, sin, each, ctx.count), each, x, kept, grad, made)
        return grad, None, None, None, None, None, *[None] * ctx.count, *made


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Where they are; a forecast only asks which are there."""
    return [None if t is None else 1 if _forecast else t.data_ptr() for t in tensors]


def _facts(x: Tensor, heads: int, eps: float, cos: Tensor, sin: Tensor, each: Sequence[Tensor | None], count: int) -> ctypes.Array[_Facts]:
    """Of each layer. each: the layers' `first`, then all their weights."""
    facts, at, (at_cos, at_sin) = (_Facts * count)(), _pointers(each), _pointers((cos, sin))
    for i in range(count):
        begin, first = count + i * len(WEIGHTS), each[i]
        end = begin + len(WEIGHTS)
        _, q, k, *_, gate, _, _ = each[begin:end]
        assert first is not None and q is not None and k is not None and gate is not None
        queries = q.size(0)
        sizes = (*x.shape, heads, k.size(0) * heads // queries, queries // heads, gate.size(0), first.size(0), cos.size(0))
        facts[i] = _Facts(*sizes, eps, at[i], at_cos, at_sin, *at[begin:end])
    return facts


def _run_layers(
    name: str, facts: ctypes.Array[_Facts], each: Sequence[Tensor | None], x: Tensor, kept: Sequence[Tensor], y: Tensor, made: Sequence[Tensor | None] = ()
) -> None:
    """Going back y is the gradient, and `made` are those of the weights."""
    back = name == "layers_back"
    scratch = x.new_empty(library.loaded("train").groundup_layer_scratch(ctypes.addressof(facts), back, torch.get_num_threads()))
    if _forecast:  # of each layer two operations for each weight and token, back twice as many, and attention
        operations = 2.0 * (1 + back) * x.shape[0] * x.shape[1] * sum(w.numel() for w in each[len(facts) :] if w is not None and w.ndim == 2)
        for f, first in zip(facts, each):
            assert first is not None
            operations += (5 if back else 2) * _product(x.new_empty(f.b, f.heads, f.t, f.d), first)
        _forecast(sum(t.numel() * t.element_size() for t in (x, y, scratch, *kept)), operations)
        return
    arrays = [(ctypes.c_void_p * len(a))(*_pointers(a)) for a in (kept, made)]
    at_kept, *at_made = [ctypes.addressof(a) for a in arrays[: 1 + back]]
    _call(name, ctypes.addressof(facts), len(facts), x, at_kept, y, *at_made, scratch)


NARROW = 192  # what a thread needs of wider layers falls out of its cache, and the products of torch's library are quicker


def layers_take(x: Tensor, weights: Sequence[LayerWeights], head_dim: int) -> bool:
    """Whether `layers` can work on these, and is quicker than its parts."""
    there = [w for layer in weights for w in layer if w is not None]
    if x.shape[-1] > NARROW or head_dim % WIDTH or torch.is_autocast_enabled("cpu") or any(n % WIDTH for w in there for n in w.shape):
        return False
    return takes(x, *there)


def layers(
    x: Tensor, cos: Tensor, sin: Tensor, firsts: Sequence[Tensor], heads: int, eps: float, weights: Sequence[LayerWeights]
) -> Tensor:
    """Of each layer x + attention(norm(x)), then x + mlp(norm(x)), on x [B, T, width]; cos, sin: [1 or B, 1, T, head_dim / 2].

    Args:
        firsts: of each layer, see `attend`.
        weights: of each layer, as WEIGHTS; q_norm and k_norm are None where queries and keys have no norms.
    """
    spans, flat = [f.contiguous() for f in firsts], [w for layer in weights for w in layer]
    return _Layers.apply(x, heads, eps, cos.contiguous(), sin.contiguous(), len(weights), *spans, *flat)  # type: ignore[no-any-return]


# -- a head and its loss ---------------------------------------------------------------------------------------------------------
TABLE = 2**18  # numbers of the largest head whose products are quicker here than in torch's library


def token_loss_takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `token_loss` can work on these, and is quicker than its parts."""
    return len(hidden) > 0 and weight.numel() <= TABLE and weight.shape[1] % WIDTH == 0 and takes(hidden, weight)


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, for_weight: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `cross_entropy_` gives of hidden @ weight.T, the gradient of hidden [N, width], and with `for_weight` that of weight [vocabulary, width]."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    n, (vocabulary, width) = len(hidden), weight.shape
    loss, for_hidden, made = hidden.new_empty(n), torch.empty_like(hidden), torch.empty_like(weight) if for_weight else None
    scratch = hidden.new_empty(library.loaded("train").groundup_token_loss_scratch(width, vocabulary, torch.get_num_threads()))
    sizes, operations = (n, width, vocabulary), (6.0 if for_weight else 4.0) * n * weight.numel()
    _call("token_loss", *sizes, hidden, weight, targets.contiguous(), z_loss, loss, for_hidden, made, scratch, operations=operations)
    return loss, for_hidden, made


# -- gradients of a whole model --------------------------------------------------------------------------------------------------
def adjust_(gradients: Sequence[Tensor], factor: float, most: float | None) -> Tensor:
    """Gradients times `factor`, and shortened to the norm `most` where they are longer, in place; their norm before that.

    As torch's get_total_norm and clip_grads_with_norm_ do it, in two passes in all.
    """
    sizes = [g.numel() for g in gradients]
    arrays = (ctypes.c_void_p * len(sizes))(*(g.data_ptr() for g in gradients))
    counts, square = (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_double()
    parts = torch.empty(sum(-(-n // PIECE) for n in sizes), dtype=torch.float64)
    at = (ctypes.addressof(arrays), ctypes.addressof(counts))
    _call("squares", len(sizes), *at, parts, ctypes.addressof(square))
    norm = abs(factor) * math.sqrt(square.value)
    scale = factor if most is None or not norm > most - 1e-6 else factor * most / (norm + 1e-6)
    if scale != 1.0:
        _call("scale", len(sizes), *at, scale)
    return torch.tensor(norm)


class _Adaptive(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("weight", "mean", "square", "steps", "grad")), ("size", ctypes.c_int64)]


def adamw_(parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
    """One step of AdamW, in place. parts: weight, running means of its gradient and of its square, the steps of both (float32 []), gradient."""
    if _forecast:
        _forecast(sum(t.numel() * t.element_size() for part in parts for t in part), 0.0)
        return
    arrays = (_Adaptive * len(parts))(*(_Adaptive(*(t.data_ptr() for t in part), part[0].numel()) for part in parts))
    _call("adamw", len(parts), ctypes.addressof(arrays), lr, *betas, eps, decay)
