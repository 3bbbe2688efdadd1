"""Observations of a subject that the probes share: one traced step, the gradients, a pass over the data, a short training. Each is made once, when asked for."""

from __future__ import annotations

import itertools
import random
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundup.checking.catalogue import CATALOGUE
from groundup.checking.findings import Finding
from groundup.checking.subject import Enough, Subject, first_tensor, rows
from groundup.checking.tape import Op, Silence, Tape, tensors

SAMPLES, SECONDS = 8192, 3.0  # of the data that are looked at
STEPS, TRAINING = 120, 2.5  # of the short training
LOSSES = {
    "cross_entropy", "nll_loss", "nll_loss_nd", "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss",
    "huber_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss", "hinge_embedding_loss", "multi_margin_loss", "multilabel_margin_loss",
    "soft_margin_loss", "multilabel_soft_margin_loss", "cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss",
}  # fmt: skip
REGRESSION = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
CLASSES = {"cross_entropy", "nll_loss", "nll_loss_nd"}
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
BATCH_NORM = nn.modules.batchnorm._BatchNorm
DROPOUT = nn.modules.dropout._DropoutNd


@dataclass
class Traced:
    """One step on a tape.

    Args:
        loss: what backward was called on; grads: name -> gradient after it (clones), for parameters that have one.
        error: the exception that ended it, with `backward` telling where.
        slope: of the loss with respect to the model's whole output, where it is one floating point tensor.
    """

    tape: Tape
    batch: Any
    loss: Tensor | None = None
    error: Exception | None = None
    backward: bool = False
    grads: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    output: Tensor | None = None
    slope: Tensor | None = None

    @cached_property
    def losses(self) -> list[Op]:
        return [op for op in self.tape.ops if op.name in LOSSES]

    @property
    def criterion(self) -> Op | None:
        """The loss function's own call, also one that failed."""
        if self.losses:
            return self.losses[0]
        failed = self.tape.failed
        return failed if failed is not None and failed.name in LOSSES else None


@dataclass
class Data:
    """A pass over a loader: inputs and targets of each batch, on the CPU."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    whole: bool = False
    error: Exception | None = None

    @cached_property
    def inputs(self) -> Tensor | None:
        """All inputs as one tensor, None where they have different shapes."""
        return _joined(self.x)

    @cached_property
    def targets(self) -> Tensor | None:
        return _joined(self.y)


@dataclass
class Trained:
    """A short training with the user's own step."""

    losses: list[float] = field(default_factory=list)
    error: Exception | None = None
    bad_step: int = -1  # the first whose loss or gradients are not finite, or that raised
    moved: float = 0.0  # largest change of a trained tensor over its size, per step
    unchanged: set[str] = field(default_factory=set)  # trained parameters that are what they were
    steps: int = 0


@dataclass
class Events:
    """What a loop of the user's called, in its order: 'forward', 'backward', 'step', 'zero_grad', 'clip', 'schedule'."""

    kinds: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None
    result: Any = None
    changed: bool = False
    held: int = 0  # losses of earlier steps that are still held with their graph

    def add(self, kind: str, **detail: Any) -> None:
        self.kinds.append(kind)
        self.details.append(detail)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [d for k, d in zip(self.kinds, self.details) if k == kind]


class Trial:
    """A subject and what has been observed of it so far."""

    def __init__(self, subject: Subject, seconds: float = 14.0) -> None:
        self.subject = subject
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    # -- findings --------------------------------------------------------------------------------------------------------------
    def found(self, finding_id: str, location: str, op: Op | None = None, **values: Any) -> Finding:
        """The catalogue's text with these values. `op`: the line that did it."""
        entry = CATALOGUE[finding_id]
        shown = {k: _shown(v) for k, v in values.items()}
        evidence: dict[str, Any] = dict(shown)
        if op is not None and op.file:
            evidence["source"] = f"{op.file.rsplit('/', 1)[-1]}:{op.line}"
        return Finding(
            finding_id,
            entry["severity"],
            location,
            (_filled(entry["says"][0] + " " + entry["why"][0], shown), _filled(entry["says"][1] + entry["why"][1], shown)),
            (_filled(entry["fix"][0], shown), _filled(entry["fix"][1], shown)),
            evidence,
        )

    def place(self, op: Op | None, default: str = "forward") -> str:
        """'model.fc1' for what torch's own layers do, 'model.block.forward' for the user's, 'loss_fn' or 'compute_loss' outside of the model."""
        if op is None:
            return default
        if op.module is None:
            return self.outside(op)
        module = self.subject.model.get_submodule(op.module)
        name = f"model.{op.module}" if op.module else "model"
        return name if type(module).__module__.startswith("torch.") else f"{name}.forward"

    def outside(self, op: Op | None = None) -> str:
        s = self.subject
        if op is not None and op.function in ("compute_loss", "train_step", "fit", "evaluate", "forward"):
            return op.function
        if s.compute_loss is not None:
            return "compute_loss"
        return "loss_fn" if s.loss_fn is not None else "train_step" if s.train_step is not None else "fit"

    # -- one step --------------------------------------------------------------------------------------------------------------
    @cached_property
    def batch(self) -> Any:
        """The first batch of the training data."""
        loader = self.subject.train_loader
        if loader is None:
            return None
        with self.subject.kept(), Silence():
            for batch in loader:
                return batch
        return None

    @cached_property
    def step(self) -> Traced:
        """One training step on the first batch, as the user makes it but for the optimizer's own step."""
        return self.trace(self.batch, values=True)

    def trace(self, batch: Any, *, values: bool = False, training: bool | None = None, restore: bool = True) -> Traced:
        s = self.subject
        made = Traced(Tape(s.model, values=values), batch)
        with s.kept(), Silence() as silence:
            for o in s.optimizers:
                o.zero_grad(set_to_none=True)
            s.model.zero_grad(set_to_none=True)
            if training is not None:
                s.model.train(training)
            whole = s.fit if s.fit is not None else s.train_step
            try:
                with made.tape, _Watched(s, made):
                    if s.fit is not None and restore:
                        s.fit(1) if _takes_epochs(s.fit) else s.fit()
                    elif whole is not None and s.train_step is not None:
                        s.train_step(s.model, batch, s.loss_fn, s.optimizer)
                    else:
                        loss = s.loss(batch)
                        if made.loss is None:
                            made.loss = loss if isinstance(loss, Tensor) else None
                        if isinstance(loss, Tensor):
                            loss.backward()
            except Enough:
                pass
            except Exception as error:
                made.error = error
                if not made.grads:
                    made.grads = _grads(s.model)
        made.warnings = silence.kept
        return made

    @cached_property
    def evaluated(self) -> tuple[Tape, Any] | None:
        """The model's forward pass in evaluation mode on what its first run in the step was given: (tape, output)."""
        root = self.step.tape.root()
        if root is None or root.end < 0:
            return None
        try:
            return self.forward(root.args, root.kwargs, tape=True)
        except Exception:  # the step's own finding, or a model that only trains
            return None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, tape: bool = False) -> tuple[Tape, Any]:
        """The model in evaluation mode without gradients."""
        s = self.subject
        recorder = Tape(s.model)
        with s.kept(), Silence(), torch.no_grad():
            torch.manual_seed(0)
            s.model.eval()
            if not tape:
                return recorder, s.model(*args, **kwargs)
            with recorder:
                return recorder, s.model(*args, **kwargs)

    @cached_property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the model itself is called with; None where its parts are called one by one."""
        root = self.step.tape.root()
        return None if root is None or root.output is None else (root.args, root.kwargs)

    @cached_property
    def size(self) -> int:
        return rows(self.batch)

    # -- data ------------------------------------------------------------------------------------------------------------------
    def scan(self, loader: Any, seed: int | None = None) -> Data:
        """`seed`: another random state than that of the script."""
        found, begin = Data(), time.monotonic()
        if loader is None:
            return found
        with self.subject.kept(), Silence():
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
            try:
                samples = 0
                for batch in loader:
                    x, y = self.subject.pair(batch)
                    if (t := first_tensor(x)) is not None:
                        found.x.append(t.detach())
                    if isinstance(y, Tensor):
                        found.y.append(y.detach())
                    found.sizes.append(rows(batch))
                    found.batches.append(batch)
                    samples += found.sizes[-1]
                    if samples >= SAMPLES or time.monotonic() - begin > SECONDS:
                        return found
                found.whole = True
            except Exception as error:
                found.error = error
        return found

    @cached_property
    def data(self) -> Data:
        return self.scan(self.subject.train_loader)

    @cached_property
    def validation(self) -> Data:
        return self.scan(self.subject.val_loader)

    # -- training --------------------------------------------------------------------------------------------------------------
    def train(self, *, rate: float = 1.0, steps: int | None = None, seconds: float = TRAINING, decay: bool = True) -> Trained:
        """A short training by the user's own step; everything is put back. `rate`: times the learning rate."""
        s, found = self.subject, Trained()
        begin = time.monotonic()
        with s.kept(), Silence():
            for o in s.optimizers:
                for group in o.param_groups:
                    group["lr"] = rate * group.get("initial_lr", group["lr"])
                    if not decay and "weight_decay" in group:
                        group["weight_decay"] = 0.0
            first = {n: p.detach().clone() for n, p in s.model.named_parameters() if p.requires_grad}
            try:
                for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(_Batches(s.train_loader))), steps or STEPS):
                    value = s.step(batch)
                    loss = float(value.detach().float().mean()) if isinstance(value, Tensor) else float(value)
                    found.losses.append(loss)
                    if loss != loss or abs(loss) == float("inf") or not _finite(s.model):
                        found.bad_step = len(found.losses) - 1
                        break
                    if time.monotonic() - begin > seconds or self.left < 0:
                        break
            except Exception as error:
                found.error, found.bad_step = error, len(found.losses)
            found.steps = len(found.losses)
            found.unchanged = {n for n, p in s.model.named_parameters() if n in first and torch.equal(p.detach(), first[n])}
            sizes = {n: float(t.norm()) for n, t in first.items()}
            change = {n: float((p.detach() - first[n]).norm()) for n, p in s.model.named_parameters() if n in first}
            found.moved = max((change[n] / sizes[n] for n in change if sizes[n] > 0), default=0.0) / max(1, found.steps)
        return found

    @cached_property
    def trained(self) -> Trained:
        return self.train()

    def trace_step(self, number: int) -> Traced:
        """The same short training again up to a step, and that one on a tape with all its values."""
        s = self.subject
        with s.kept(), Silence():
            batch = None
            for i, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(_Batches(s.train_loader)))):
                if i == number:
                    break
                s.step(batch)
            return self.trace(batch, values=True, restore=False)

    # -- the user's own loop ---------------------------------------------------------------------------------------------------
    @cached_property
    def events(self) -> Events:
        """What `fit` (two epochs) or `train_step` (over some batches) calls, in its order."""
        s, events = self.subject, Events()
        if s.fit is None and s.train_step is None:
            return events
        with s.kept(), Silence():
            before = {n: p.detach().clone() for n, p in s.model.named_parameters()}
            try:
                with _Recorded(s, events):
                    if s.fit is not None:
                        events.result = s.fit(2) if _takes_epochs(s.fit) else s.fit()
                    else:
                        assert s.train_step is not None
                        for batch in itertools.islice(iter(s.train_loader or ()), 24):
                            events.add("batch")
                            s.train_step(s.model, batch, s.loss_fn, s.optimizer)
            except Enough:
                pass
            except Exception as error:
                events.error = error
            events.changed = any(not torch.equal(p, before[n]) for n, p in s.model.named_parameters() if n in before)
        return events


class _Batches:
    """A loader that can be chained: each iteration is an epoch, and an empty one ends the training."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        none = True
        for batch in self.loader:
            none = False
            yield batch
        if none:
            raise ValueError("train_loader yields no batch")


def _takes_epochs(fit: Callable[..., Any]) -> bool:
    import inspect

    try:
        return bool(inspect.signature(fit).parameters)
    except (TypeError, ValueError):
        return False


def _finite(model: nn.Module) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


class _Watched:
    """While a step is traced: takes the gradients as soon as they are there, and stops before the optimizer changes anything."""

    def __init__(self, subject: Subject, made: Traced) -> None:
        self.s, self.made = subject, made

    def __enter__(self) -> None:
        self.real = real = Tensor.backward
        begin = time.monotonic()

        # Of the step it knows nothing but through this object: torch may keep whatever it finds as Tensor.backward for good.
        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            made, s = self.made, self.s
            made.loss, made.backward = tensor, True
            root = made.tape.root()
            whole = next((t for t in tensors(root.output) if t.is_floating_point() and t.requires_grad and t.dim()), None) if root else None
            logits = getattr(root.output, "logits", None) if root else None
            made.output = logits if isinstance(logits, Tensor) else whole
            if made.output is not None and made.output.requires_grad:
                made.output.retain_grad()
            try:
                real(tensor, *args, **kwargs)
            finally:
                made.tape._busy = True
                made.grads = _grads(s.model)
                if made.output is not None and made.output.requires_grad:
                    made.slope = made.output.grad
                made.tape._busy = False
            if time.monotonic() - begin > 5:
                raise Enough

        def stop(*_: Any) -> None:
            raise Enough

        Tensor.backward = backward  # type: ignore[method-assign,assignment]
        # Other optimizers (of a critic, of a loss) step before: only the model's own ends it.
        optimizer = self.s.optimizer
        self.handles = [optimizer.register_step_pre_hook(stop)] if optimizer is not None else []

    def __exit__(self, *error: Any) -> None:
        Tensor.backward = self.real  # type: ignore[method-assign]
        for handle in self.handles:
            handle.remove()
        del self.made, self.s


class _Recorded:
    """While the user's loop runs: the calls that matter become events. It ends after 8 s or 400 forward passes."""

    def __init__(self, subject: Subject, events: Events) -> None:
        self.s, self.events = subject, events

    def __enter__(self) -> None:
        s, events = self.s, self.events
        begin = time.monotonic()
        self.undo: list[Callable[[], None]] = []
        real = Tensor.backward
        kept: list[weakref.ref[Tensor]] = []
        applied: dict[int, Tensor] = {}
        trained = [p for o in s.optimizers for g in o.param_groups for p in g["params"]]

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            left = bool(applied) and all(p.grad is not None and torch.equal(p.grad, applied[id(p)]) for p in trained if id(p) in applied)
            events.held = max(events.held, sum(1 for r in kept if (t := r()) is not None and t.grad_fn is not None))
            events.add("backward", left=left, norm=0.0)
            kept.append(weakref.ref(tensor))
            real(tensor, *args, **kwargs)
            events.details[-1]["norm"] = _norm(trained)

        def before_step(*_: Any) -> None:
            events.add("step", norm=_norm(trained), lr=s.optimizer.param_groups[0]["lr"] if s.optimizer else 0.0)
            applied.clear()
            applied.update({id(p): p.grad.clone() for p in trained if p.grad is not None and bool(p.grad.any())})

        def forward(module: nn.Module, args: Any) -> None:
            events.add("forward", training=module.training, grad=torch.is_grad_enabled())
            if time.monotonic() - begin > 6 or len(events.kinds) > 3000:
                raise Enough

        Tensor.backward = backward  # type: ignore[method-assign,assignment]
        self.undo.append(lambda: setattr(Tensor, "backward", real))
        self.undo += [o.register_step_pre_hook(before_step).remove for o in s.optimizers]
        self.undo.append(s.model.register_forward_pre_hook(forward).remove)
        for o in s.optimizers:
            self._swap(o, "zero_grad", "zero_grad")
        self._swap(s.model, "zero_grad", "zero_grad")
        if s.scheduler is not None:
            self._swap(s.scheduler, "step", "schedule")
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            function = getattr(nn.utils, name)

            def clip(*args: Any, _real: Any = function, **kwargs: Any) -> Any:
                events.add("clip", norm=_norm(trained))
                return _real(*args, **kwargs)

            for owner in (nn.utils, nn.utils.clip_grad):
                self.undo.append(partial(setattr, owner, name, getattr(owner, name)))
                setattr(owner, name, clip)
            for key, value in list(s.namespace.items()):
                if value is function:
                    s.namespace[key] = clip

    def _swap(self, owner: Any, name: str, kind: str) -> None:
        real, events = getattr(owner, name), self.events

        def called(*args: Any, **kwargs: Any) -> Any:
            events.add(kind)
            return real(*args, **kwargs)

        had = name in vars(owner)
        object.__setattr__(owner, name, called)
        self.undo.append(lambda: object.__setattr__(owner, name, real) if had else object.__delattr__(owner, name))

    def __exit__(self, *error: Any) -> None:
        for undo in reversed(self.undo):
            undo()


def _norm(parameters: list[Tensor]) -> float:
    return sum(float(p.grad.detach().float().norm()) ** 2 for p in parameters if p.grad is not None) ** 0.5


def _joined(parts: list[Tensor]) -> Tensor | None:
    if not parts or any(p.dim() == 0 or p.shape[1:] != parts[0].shape[1:] or p.dtype != parts[0].dtype for p in parts):
        return None
    return torch.cat(parts)


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, (torch.Size, tuple)):
        return "(" + ", ".join(str(v) for v in value) + ")"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list):
        return ", ".join(str(v) for v in value[:8]) + (f", ... ({len(value)})" if len(value) > 8 else "")
    return value


def _filled(template: str, values: dict[str, Any]) -> str:
    return template.format_map(values)
