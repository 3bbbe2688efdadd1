"""The state of a training: exactly what a checkpoint holds, nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class TrainState:
    """Everything that the next step depends on, besides the recipe and the data.

    Args:
        step: finished optimizer steps; `total` is the schedule's end.
        samples, tokens: seen so far.
        best_step, best_value: of the chosen validation metric; ties keep the earliest.
        bad_evaluations: evaluations in a row without improvement (patience).
        evaluated_at: the step of the last evaluation, so that a resumed run does not evaluate twice.
        window: [summed loss, count] since the last logged row, on the device.
        first_bad: the first step with a non-finite loss or gradient, -1 while there is none; on the device.
        overflows: steps in a row that fp16 scaling skipped; `skipped` counts all of them.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    total: int
    window: Tensor
    first_bad: Tensor
    ema: dict[str, Tensor] | None = None
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_step: int = -1
    best_value: float = float("nan")
    bad_evaluations: int = 0
    evaluated_at: int = -1
    stopped_early: bool = False
    overflows: int = 0
    skipped: int = 0

    COUNTERS = (
        "total",
        "step",
        "samples",
        "tokens",
        "best_step",
        "best_value",
        "bad_evaluations",
        "evaluated_at",
        "stopped_early",
        "overflows",
        "skipped",
    )

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state besides the model's weights: named tensors, and numbers for JSON."""
        named: dict[str, Tensor] = {"window": self.window, "first_bad": self.first_bad}
        numbers: dict[str, Any] = {name: getattr(self, name) for name in self.COUNTERS}
        numbers["best_value"] = repr(self.best_value)  # NaN and infinity are not JSON
        numbers["optimizers"] = []
        for k, optimizer in enumerate(self.optimizers):
            scalars: dict[str, dict[str, Any]] = {}
            for i, slots in optimizer.state_dict()["state"].items():
                nested = {
                    f"{name}/{part}": v for name, value in slots.items() if isinstance(value, dict) for part, v in value.items()
                }  # bitsandbytes
                for name, value in ({n: v for n, v in slots.items() if not isinstance(v, dict)} | nested).items():
                    if isinstance(value, Tensor):
                        named[f"optimizer.{k}.{i}.{name}"] = value
                    else:
                        scalars.setdefault(str(i), {})[name] = value
            numbers["optimizers"].append(scalars)
        for name, value in (self.ema or {}).items():
            named[f"ema.{name}"] = value
        if self.scaler is not None:
            numbers["scaler"] = self.scaler.state_dict()
        named["rng.torch"] = torch.get_rng_state()
        for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            named[f"rng.cuda.{i}"] = torch.cuda.get_rng_state(i)
        version, internal, gauss = random.getstate()
        numbers["rng_python"] = [version, list(internal), gauss]
        kind, keys, position, has_gauss, cached = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
        numbers["rng_numpy"] = [kind, [int(v) for v in keys], int(position), int(has_gauss), float(cached)]
        return named, numbers

    def restore(self, named: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `tensors`, into objects built from the same recipe."""
        for name in self.COUNTERS:
            setattr(self, name, numbers[name])
        self.best_value = float(numbers["best_value"])
        self.window.copy_(named["window"])
        self.first_bad.copy_(named["first_bad"])
        for k, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, Any]] = {int(i): dict(s) for i, s in numbers["optimizers"][k].items()}
            prefix = f"optimizer.{k}."
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for name, value in named.items():
                if name.startswith(prefix):
                    index, _, slot = name.removeprefix(prefix).partition(".")
                    parameter = parameters[int(index)]
                    if value.shape == parameter.shape:
                        # In the parameter's order in memory (channels last, say): fused optimizers walk over both side by side.
                        value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                    slots.setdefault(int(index), {})[slot] = value
            for own in slots.values():
                for name in [n for n in own if "/" in n]:
                    outer, _, part = name.partition("/")
                    own.setdefault(outer, {})[part] = own.pop(name)
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, value in (self.ema or {}).items():
            value.copy_(named[f"ema.{name}"])
        if self.scaler is not None:
            self.scaler.load_state_dict(numbers["scaler"])
        torch.set_rng_state(named["rng.torch"])
        for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            if f"rng.cuda.{i}" in named:
                torch.cuda.set_rng_state(named[f"rng.cuda.{i}"], i)
        version, internal, gauss = numbers["rng_python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = numbers["rng_numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def new_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], total: int, device: torch.device, *, ema: bool, fp16: bool
) -> TrainState:
    """The state before the first step."""
    real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    averaged = {n: t.detach().clone() for n, t in model.state_dict().items()} if ema else None
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14) if fp16 else None
    return TrainState(
        model,
        optimizers,
        total,
        torch.zeros(2, dtype=real, device=device),
        torch.full((), -1, dtype=torch.int64, device=device),
        averaged,
        scaler,
    )


@torch.no_grad()
def update_ema(state: TrainState, decay: float) -> None:
    """Exponential moving average of the weights; buffers that are not real numbers are copied.

    The decay warms up as (1 + step) / (10 + step), so that the first weights do not linger (as in TensorFlow's ExponentialMovingAverage).
    """
    assert state.ema is not None
    keep = min(decay, (1 + state.step) / (10 + state.step))
    current = state.model.state_dict()
    real = [n for n, t in state.ema.items() if t.is_floating_point()]
    torch._foreach_lerp_([state.ema[n] for n in real], [current[n] for n in real], 1 - keep)
    for name, value in state.ema.items():
        if not value.is_floating_point():
            value.copy_(current[name])


@dataclass
class Snapshot:
    """A copy of what a forward pass may change, for undoing the rehearsal: buffers and random state."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    torch_rng: Tensor | None = None
    cuda_rng: list[Tensor] = field(default_factory=list)
    python_rng: Any = None
    numpy_rng: Any = None

    @classmethod
    def take(cls, model: nn.Module) -> Snapshot:
        return cls(
            {n: b.clone() for n, b in model.named_buffers()},
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            random.getstate(),
            np.random.get_state(),
        )

    def put_back(self, model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if name in self.buffers:
                buffer.data.copy_(self.buffers[name])
        assert self.torch_rng is not None
        torch.set_rng_state(self.torch_rng)
        if self.cuda_rng:
            torch.cuda.set_rng_state_all(self.cuda_rng)
        random.setstate(self.python_rng)
        np.random.set_state(self.numpy_rng)
