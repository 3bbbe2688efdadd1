"""A training step on tensors without contents: which memory stands when, and how much is computed.

Parameters and activations are fake tensors (shapes, strides, storages, no numbers); whole numbers (tokens, targets, masks) are real, so that code which
looks at them runs as it is. Every allocation and release of a storage is written down, with what was being done.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward)


@dataclass
class Work:
    """What was computed: floating-point operations by the dtype of their products, bytes that passed through memory, and kernels that were started."""

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: float = 0.0
    kernels: float = 0.0

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values())


class Trace(TorchDispatchMode):
    """Watches storages and counts work while it is entered.

    Args:
        vocabulary: float tensors with so many columns are logits.
    """

    def __init__(self, mode: FakeTensorMode, vocabulary: int | None = None) -> None:
        super().__init__()
        self.mode, self.vocabulary = mode, vocabulary
        self.phase = "weights"
        self.events: list[tuple[int, int]] = []  # (storage number, bytes added)
        self.owner: dict[int, str] = {}
        self.number: dict[int, int] = {}  # a storage's address -> its number, while it lives
        self.size: dict[int, int] = {}
        self.work: dict[str, Work] = defaultdict(Work)
        self.marks: dict[str, int] = {}
        self._references: dict[int, Any] = {}

    # -- storages ----------------------------------------------------------------------------------------------------------
    def see(self, tensor: Tensor, owner: str | None = None) -> None:
        """Writes down the storage of a tensor, where it is new; with `owner` whose it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.number:
            number = len(self.owner)
            self.number[key], self.size[number] = number, storage.nbytes()
            self.owner[number] = owner or self._owner(tensor)
            self.events.append((number, self.size[number]))
            self._references[key] = weakref.ref(storage, partial(self._gone, key))
        elif owner is not None:
            self.owner[self.number[key]] = owner

    def _gone(self, key: int, reference: Any) -> None:
        number = self.number.pop(key)
        del self._references[key]
        self.events.append((number, -self.size[number]))

    def _owner(self, tensor: Tensor) -> str:
        if self.phase in ("activations", "evaluation") and self.vocabulary and tensor.ndim and tensor.shape[-1] == self.vocabulary:
            return "logits"
        return self.phase

    def mark(self, name: str) -> None:
        self.marks[name] = len(self.events)

    # -- operations --------------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put) and isinstance(
            args[0], FakeTensor
        ):
            args = (args[0], _numbers(args[1]), *args[2:])
        if packet is aten.topk and isinstance(args[0], FakeTensor):
            out: Any = _topk(func, args, kwargs)
        elif packet is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            return 1.0  # a norm or a loss that the host looks at
        elif _makes_numbers(func, args, kwargs):
            with self.mode:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [t for t in tensors if t.untyped_storage()._cdata not in self.number]
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        for t in tensors:
            self.see(t)
        if fresh or func._schema.is_mutable:
            self._count(packet, args, kwargs, out, read, fresh)
        return out

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, read: list[Tensor], fresh: list[Tensor]) -> None:
        work = self.work[self.phase]
        work.kernels += 1
        moved = fresh or read[:1]
        work.bytes += sum(t.numel() * t.element_size() for t in (*read, *moved))
        if packet in ATTENTION:
            work.flops[_dtype(read[0])] += _attention_flops(packet, args)
        elif packet in flop_registry:
            work.flops[_dtype(read[0])] += flop_registry[packet](*args, **kwargs, out_val=out)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    # -- what came of it ---------------------------------------------------------------------------------------------------
    def peak(self, begin: str | None = None, end: str | None = None) -> tuple[int, dict[str, int]]:
        """The most bytes that stood at once between two marks, and whose they were."""
        first, last = self.marks.get(begin or "", 0), self.marks.get(end or "", len(self.events))
        at, most, now = 0, -1, 0
        for k, (_, change) in enumerate(self.events[:last]):
            now += change
            if k >= first - 1 and now > most:
                at, most = k, now
        live: dict[str, int] = defaultdict(int)
        for number, change in self.events[: at + 1]:
            live[self.owner[number]] += change
        return max(most, 0), {k: v for k, v in live.items() if v}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numbers(indices: Any) -> list[Any]:
    """Masks as the positions that they choose: how many is known, because masks are real."""
    found: list[Any] = []
    for index in indices:
        found += list(index.nonzero(as_tuple=True)) if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else [index]
    return found


def _makes_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this makes a float tensor out of nothing (an empty buffer, zeros)."""
    if any(isinstance(a, Tensor) for a in tree_flatten((args, kwargs))[0]) or not any(a.name == "dtype" for a in func._schema.arguments):
        return False
    return bool((kwargs.get("dtype") or torch.float32).is_floating_point) and func._overloadpacket is not aten.arange


def _topk(func: Any, args: Any, kwargs: Any) -> Any:
    """The best of unknown numbers: any, taken in turn, as a router that is balanced would."""
    values, chosen = func(*args, **kwargs)
    width, top = args[0].shape[-1], args[1]
    rows = chosen.numel() // top
    real = (torch.arange(rows)[:, None] * top + torch.arange(top)) % width
    return values, real.view(chosen.shape)


def _attention_flops(packet: Any, args: Any) -> float:
    """Products of fused attention: two in the forward pass, five in the backward pass; half of them where the future is masked."""
    q, k = (args[0], args[1]) if packet is ATTENTION[0] else (args[1], args[2])
    b, h, t, d = q.shape
    causal = any(a is True for a in args)
    return (2 if packet is ATTENTION[0] else 5) * 2.0 * b * h * t * k.shape[2] * d * (0.5 if causal else 1.0)


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A model of the same shapes without contents; whole-number buffers stay real."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, FakeTensor) and id(tensor) not in memo:
            made: Any = mode.from_tensor(tensor.detach())
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            memo[id(tensor)].__dict__.update(tensor.__dict__)
    return copy.deepcopy(model, memo)


def step(
    trace: Trace,
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    optimizers: list[torch.optim.Optimizer],
    *,
    clip: bool = True,
) -> None:
    """One optimizer step in the loop's order: micro-batches, clipping, update. Gradients are left standing, as the loop leaves them."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        with trace.doing("activations"):
            found = loss(batch)
        with trace.doing("workspace"):
            found.backward()
        del found
        for p in model.parameters():
            if p.grad is not None:
                trace.see(p.grad, "gradients")
    with trace.doing("workspace"):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip:
            torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], 1.0, norm)
    with trace.doing("update"):
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in tree_flatten(state)[0]:
                if isinstance(value, Tensor):
                    trace.see(value, "optimizer")
