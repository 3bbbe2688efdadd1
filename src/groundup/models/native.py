"""The decoder's step for one token per row as a C kernel (decode.c); where `usable` says no, generation stays on torch."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.models import library
from groundup.models.decoder import Decoder
from groundup.models.language import Cache, capped

PANEL = 16
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}


def usable(model: Decoder) -> bool:
    """Whether the kernel can run this model, a decoder without experts."""
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters()) and library.why_not("decode") is None


# -- the weights -----------------------------------------------------------------------------------------------------------------
class Laid:
    """A model's weights laid out for generation, and the rotary positions.

    Laying the matrices out takes as long as some tokens, so it is kept for the next call, as long as the model lives and its weights stay.
    """

    kept: ClassVar[weakref.WeakKeyDictionary[Decoder, tuple[Any, Laid]]] = weakref.WeakKeyDictionary()
    any_rows: ClassVar[bool]  # whether one layout serves any number of rows

    @classmethod
    def of(cls, model: Decoder, rows: int, capacity: int, precision: str, *, keep: bool) -> Self:
        if any(p.is_inference() for p in model.parameters()):
            keep = False  # nobody counts the changes of such weights
        key = (
            cls,
            cls.any_rows or rows == 1,
            precision,
            [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()],
        )
        known, made = Laid.kept.get(model, (None, None))
        if not isinstance(made, cls) or known != key:
            Laid.kept.pop(model, None)  # before the next one is made: there is never more than one
            made = cls(model, rows, precision)
            if keep:
                Laid.kept[model] = (key, made)
        made.softcap = model.softcap
        made.reach(capacity)
        return made

    def __init__(self, model: Decoder, rows: int, precision: str) -> None:
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.frequency, self.factor, self.softcap = model.frequency, model.rope_factor, model.softcap
        self.cos = self.sin = model.frequency.new_zeros(0)

    def reach(self, capacity: int) -> None:
        """Rotary positions up to here."""
        if len(self.cos) < capacity:
            angles = torch.arange(capacity, device=self.frequency.device, dtype=torch.float32)[:, None] * self.frequency
            self.sin, self.cos = angles.sin() * self.factor, angles.cos() * self.factor  # in this order: other threads look at cos


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64)]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "q_norm", "k_norm", "second_norm")),
        *((name, _Matrix) for name in ("qkv", "attended", "gate_up", "down")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("norm_eps", "q_eps", "k_eps", "second_eps")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "table", "norm")),
        ("head", _Matrix),
        *((name, ctypes.c_int64) for name in ("depth", "width", "heads", "kv_heads", "head_dim", "hidden", "kind")),
        ("eps", ctypes.c_float),
    ]


def panels(weight: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """A matrix [outputs, inputs] in panels of 16 outputs as decode.c reads them, and int8's scale of each output."""
    weight = F.pad(weight.detach(), (0, 0, 0, -len(weight) % PANEL))
    count, inputs = len(weight) // PANEL, weight.shape[1]
    if precision == "float32":
        return weight.view(count, PANEL, inputs).transpose(1, 2).contiguous(), None
    if precision == "bfloat16":  # output j + 8 beside output j: the two halves of a word
        halves = weight.to(torch.bfloat16).view(count, 2, PANEL // 2, inputs)
        return halves.permute(0, 3, 2, 1).contiguous(), None
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    small = F.pad((weight / scale[:, None]).round().to(torch.int8), (0, inputs % 2))
    return small.view(count, PANEL, -1, 2).transpose(1, 2).contiguous(), scale


class Native(Laid):
    """The decoder's forward pass for one token per row, in C."""

    any_rows = True

    def __init__(self, model: Decoder, rows: int, precision: str) -> None:
        super().__init__(model, rows, precision)
        self.library, self.vocabulary = library.loaded("decode"), len(model.output_weight)
        self.alive: list[Any] = []  # what the structures point to

        def kept(t: Tensor | None) -> int | None:
            if t is None:
                return None
            self.alive.append(t.detach().contiguous())
            return int(self.alive[-1].data_ptr())

        def matrix(weight: Tensor, bias: Tensor | None = None) -> _Matrix:
            laid, scale = panels(weight, precision)
            bias = None if bias is None else F.pad(bias.detach(), (0, -len(bias) % PANEL))
            return _Matrix(kept(laid), kept(scale), kept(bias), weight.shape[1], weight.shape[0])

        def in_turns(gate: Tensor, up: Tensor) -> Tensor:
            """Panels of the two in turns, so that what is multiplied lies together."""
            both = torch.stack([F.pad(w.detach(), (0, 0, 0, -len(w) % PANEL)).view(-1, PANEL, w.shape[1]) for w in (gate, up)], 1)
            return both.view(-1, gate.shape[1])

        stack: Any = model.model.layers
        layers = []
        for layer in stack:
            a, m, first, second = layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
            qkv = (a.q_proj, a.k_proj, a.v_proj)
            normed = a.q_norm is not None and a.k_norm is not None
            layers.append(
                _Layer(
                    kept(first.weight), kept(a.q_norm.weight) if normed else None, kept(a.k_norm.weight) if normed else None, kept(second.weight),
                    matrix(torch.cat([p.weight for p in qkv]), None if a.q_proj.bias is None else torch.cat([p.bias for p in qkv])),
                    matrix(a.o_proj.weight, a.o_proj.bias), matrix(in_turns(m.gate_proj.weight, m.up_proj.weight)), matrix(m.down_proj.weight),
                    a.window or 0, first.eps, a.q_norm.eps if normed else 0.0, a.k_norm.eps if normed else 0.0, second.eps,
                )
            )  # fmt: skip
        array = (_Layer * len(layers))(*layers)
        self.alive.append(array)
        norm = model.model.norm
        self.model = _Model(
            ctypes.addressof(array), kept(model.model.embed_tokens.weight), kept(norm.weight), matrix(model.output_weight), len(layers), model.width,
            model.heads, model.kv_heads, model.head_dim, stack[0].mlp.down_proj.in_features, KINDS[precision], norm.eps,
        )  # fmt: skip

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] after one more token of each row, int64 [B]."""
        b, capacity, threads = len(tokens), cache.capacity, torch.get_num_threads()
        if not all(t.is_contiguous() for layer in cache.layers for t in layer):
            cache.layers = [(k.contiguous(), v.contiguous()) for k, v in cache.layers]
        tokens, lengths, cos, sin = tokens.contiguous(), cache.lengths.contiguous(), self.cos, self.sin  # kept here while C reads them
        if b and (int(lengths.max()) >= min(capacity, len(cos)) or int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary):
            raise IndexError("a token or a position is outside the table")  # C would not notice
        model, pointers = ctypes.addressof(self.model), ctypes.c_void_p * len(cache.layers)
        keys, values = (pointers(*(layer[i].data_ptr() for layer in cache.layers)) for i in (0, 1))
        logits = torch.empty(b, self.vocabulary)
        # New for every call: several threads may generate from one model.
        scratch = torch.empty(self.library.groundup_scratch(model, b, capacity, threads))
        self.library.groundup_step(
            model, b, capacity, threads, tokens.data_ptr(), lengths.data_ptr(), ctypes.addressof(keys), ctypes.addressof(values),
            cos.data_ptr(), sin.data_ptr(), scratch.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        cache.advance(1)
        return capped(logits, self.softcap)
