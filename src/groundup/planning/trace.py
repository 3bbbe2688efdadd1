"""A training step on tensors without contents: which memory stands when, and how much is computed.

Parameters and activations are fake tensors (shapes, strides, storages, no numbers); whole numbers (tokens, targets, masks) are real, so that code which
looks at them runs as it is. Every allocation and release of a storage is written down, with what was being done.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from groundup.models import fused
from groundup.tasks import token_loss

if TYPE_CHECKING:
    from groundup.planning.forecast import Subject

LOOKED_AT = 16  # steps among whose micro-batches the largest is looked for

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
        here: this machine's CPU is meant: its library is asked how much memory the backward passes of convolutions take for themselves.
    """

    def __init__(self, mode: FakeTensorMode, vocabulary: int | None = None, here: bool = False) -> None:
        super().__init__()
        self.mode, self.vocabulary, self.here = mode, vocabulary, here
        self.scratch: dict[str, int] = {}
        self.phase = "weights"
        self.times = 1  # how often what is done now would be done
        self.events: list[tuple[int, int, str]] = []  # (storage number, bytes added, what was being done)
        self.owner: dict[int, str] = {}
        self.number: dict[int, int] = {}  # a storage's address -> its number, while it lives
        self.size: dict[int, int] = {}
        self.work: dict[str, Work] = defaultdict(Work)
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
            self.events.append((number, self.size[number], self.phase))
            self._references[key] = weakref.ref(storage, partial(self._gone, key))
        elif owner is not None:
            self.owner[self.number[key]] = owner

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that is known has another size now, without an operation (FSDP frees what it gathered so)."""
        number = self.number.get(storage._cdata)
        if number is not None and (change := storage.nbytes() - self.size[number]):
            self.size[number] += change
            self.events.append((number, change, self.phase))

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether a copy of it in another dtype is what mixed precision makes of weights."""
        number = self.number.get(tensor.untyped_storage()._cdata)
        return number is not None and self.owner[number] in ("weights", "adapters") and tensor.is_floating_point()

    def _gone(self, key: int, reference: Any) -> None:
        number = self.number.pop(key)
        del self._references[key]
        self.events.append((number, -self.size[number], self.phase))

    def _owner(self, tensor: Tensor) -> str:
        if self.phase in ("activations", "evaluation") and self.vocabulary and tensor.ndim and tensor.shape[-1] == self.vocabulary:
            return "logits"
        return self.phase

    def __enter__(self) -> Any:
        self._kernels = fused.forecast(self._kernel if self.here else False)
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kernels.__exit__(*error)

    def _kernel(self, moved: int, operations: float) -> None:
        """One of our own kernels, which reads and writes so many bytes, and is no operation of torch."""
        work = self.work[self.phase]
        work.kernels += self.times
        work.bytes += self.times * moved
        work.flops["float32"] += self.times * operations

    # -- operations --------------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at every turn
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
        tensors = list(_tensors(out))
        fresh = [t for t in tensors if t.untyped_storage()._cdata not in self.number]
        read = [*_tensors(args), *_tensors(kwargs)]
        for t in tensors:
            self.see(t, "cast" if packet is aten._to_copy and fresh and self._is_weight(args[0]) else None)
        if fresh or func._schema.is_mutable:
            self._count(packet, args, kwargs, out, read, fresh)
        if self.here and packet is aten.convolution_backward:
            self._lend(func, args)
        return out

    def _lend(self, func: Any, args: Any) -> None:
        """Writes down what a kernel takes while it runs and gives back, as a real run of it shows; each shape is run once."""
        shapes = str([(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args])
        if shapes not in self.scratch:
            with _disable_current_modes():
                real = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).zero_() if isinstance(a, Tensor) else a for a in args]
                with torch.autograd.profiler.profile(profile_memory=True) as profile:
                    func(*real)
                found: Any = profile.kineto_results
                changes = [e.nbytes() for e in sorted(found.events(), key=lambda e: e.start_ns()) if e.name() == "[memory]"]
            self.scratch[shapes] = max(itertools.accumulate(changes), default=0) - sum(changes)
        number = len(self.owner)
        self.owner[number] = self.phase
        self.events += [(number, self.scratch[shapes], self.phase), (number, -self.scratch[shapes], self.phase)]

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, read: list[Tensor], fresh: list[Tensor]) -> None:
        work = self.work[self.phase]
        work.kernels += self.times
        moved = fresh or read[:1]
        work.bytes += self.times * sum(t.numel() * t.element_size() for t in (*read, *moved))
        if packet in ATTENTION:
            work.flops[_dtype(read[0])] += self.times * _attention_flops(packet, args)
        elif packet in flop_registry:
            work.flops[_dtype(read[0])] += self.times * flop_registry[packet](*args, **kwargs, out_val=out)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    @contextmanager
    def few_chunks(self) -> Iterator[None]:
        """A loss that is computed in chunks takes two of them, the second one for all others: memory is the same, and a large vocabulary has hundreds."""
        all_chunks = token_loss._chunks

        def two(rows: int, vocabulary: int) -> Iterator[slice]:
            cuts = all_chunks(rows, vocabulary)
            yield from cuts[:1]
            if cuts[1:]:
                self.times = len(cuts) - 1
                yield cuts[1]
                self.times = 1

        token_loss._chunks = two  # type: ignore[assignment]
        try:
            yield
        finally:
            token_loss._chunks, self.times = all_chunks, 1

    # -- what came of it ---------------------------------------------------------------------------------------------------
    def peaks(self) -> dict[str, dict[str, int]]:
        """For each phase the moment at which most bytes stood, and whose they were."""
        now, most, at = 0, dict[str, int](), dict[str, int]()
        for k, (_, change, phase) in enumerate(self.events):
            now += change
            if now > most.get(phase, -1) and phase != "first":
                most[phase], at[phase] = now, k
        found = {}
        for phase, last in at.items():
            live: dict[str, int] = defaultdict(int)
            for number, change, _ in self.events[: last + 1]:
                live[self.owner[number]] += change
            found[phase] = {k: v for k, v in live.items() if v}
        return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    """As torch's tree_flatten, which takes longer than the operation that is looked at."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)


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
    if next(_tensors(args), None) is not None or not any(a.name == "dtype" for a in func._schema.arguments):
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
    parameters: list[nn.Parameter],
    gradients: Callable[[], list[nn.Parameter]],
    *,
    clip: bool = True,
) -> None:
    """One optimizer step in the loop's order: micro-batches, clipping, update. Gradients are left standing, as the loop leaves them.

    Args:
        parameters: what the optimizers work on. gradients: puts their gradients there, where they are parts of the model's.
    """
    for batch in batches:
        with trace.doing("activations"):
            found = loss(batch)
        with trace.doing("workspace"):
            found.backward()
        del found
        gradients()
        for p in parameters:
            if p.grad is not None:
                trace.see(p.grad, "gradients")
    with trace.doing("workspace"):
        trained = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
    with trace.doing("update"):
        for optimizer in optimizers:
            optimizer.step()


def training_step(
    trace: Trace,
    subject: Subject,
    optimizers: list[torch.optim.Optimizer],
    cast: Any,
    parts: Callable[[], list[nn.Parameter]] | None = None,
) -> None:
    """An optimizer step of a subject that meets the optimizer's state, as all but the first do; `trace` is entered. See `step`.

    Args:
        parts: brings the gradients of the model's parameters to what the optimizers work on, and gives that, where it is not the same.
    """
    task, model, total = subject.task, subject.model, subject.batches.batch_size
    parameters = list(model.parameters()) if parts is None else parts()

    def loss(batch: Any) -> Tensor:
        with cast:
            return task.loss(model, batch).sum / total

    for p in parameters:
        trace.see(p, "adapters" if p.requires_grad and adapts(model) else "weights")
    for b in model.buffers():
        trace.see(b, "weights")
    _first_update(trace, parameters, optimizers)
    model.zero_grad(set_to_none=True)
    clip = subject.recipe.train.clip_norm is not None
    step(trace, model, loss, micro_batches(trace, subject), optimizers, parameters, parts or (lambda: parameters), clip=clip)


def _first_update(trace: Trace, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
    """The optimizers make their states, from gradients that nothing was computed for."""
    with trace.doing("first"):
        for p in parameters:
            p.grad = torch.empty_like(p) if p.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in _tensors(state):
                trace.see(value, "optimizer")
        optimizer.zero_grad(set_to_none=True)


def evaluation(trace: Trace, subject: Subject, cast: Any) -> None:
    """A batch of an evaluation; `trace` is entered."""
    subject.model.eval()
    with trace.doing("evaluation"), torch.no_grad(), cast:
        for batch in micro_batches(trace, subject, evaluating=True):
            subject.task.loss(subject.model, batch)
    subject.model.train()


def micro_batches(trace: Trace, subject: Subject, evaluating: bool = False) -> Iterator[Any]:
    """The first micro-batches, two at most: of more, the memory is the same. In evaluations the batch has the task's own size.

    In trainings on text the last one is instead the largest of the first ones: examples differ in length, and only some rows hold several documents,
    whose masks are kept.
    """
    batches = copy.copy(subject.batches)
    if evaluating:
        at = torch.device("cpu" if trace.here else "cuda")
        batches.micro_batch_size, batches.tokens = min(batches.batch_size, subject.task.evaluated_at_once(batches.encoded, at)), None
    with _disable_current_modes():
        found = list(itertools.islice(batches.micro(0), 1 if evaluating else 2))
        if not evaluating and subject.task.kind == "text":
            first = (b for k in range(LOOKED_AT) for b in batches.micro(k))
            found[-1] = max(first, key=lambda b: sum(t.nbytes for t in _tensors(vars(b))))
    for batch in found:
        if batch.inputs.is_floating_point():
            batch.inputs = subject.mode.from_tensor(batch.inputs)
        trace.see(batch.inputs, "data")
        trace.see(batch.targets, "data")
        yield batch


def adapts(model: nn.Module) -> bool:
    return any("lora_A" in n for n, _ in model.named_parameters())


def stack_of(model: nn.Module, more_than: int = 0) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The module that holds the layers of a model with more than so many, its attribute, and the layers. Lists inside of layers (experts) do not count."""
    found = [(path, m, n, c) for path, m in model.named_modules() for n, c in m.named_children() if isinstance(c, nn.ModuleList)]
    lists = [f"{path}.{n}." for path, _, n, _ in found]
    outer = [(m, n, c) for path, m, n, c in found if not any(f"{path}.".startswith(other) for other in lists)]
    alike = [f for f in outer if len(f[2]) > more_than and len({type(layer) for layer in f[2]}) == 1]
    return max(alike, key=lambda f: len(f[2]), default=None)
