"""AdamW whose step is one pass over memory where the kernels of models/fused.py can be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from groundup.models import fused

_torch_step = inspect.unwrap(torch.optim.AdamW.step)  # what wraps it would import torch's compiler


class AdamW(torch.optim.AdamW):
    """torch's, which also makes the states, in its first step."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        parts = [[(p, self.state[p], p.grad) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        flat = [part for found in parts for part in found]
        masked = getattr(self, "found_inf", None) is not None
        if masked or not all(state and grad.is_contiguous() for _, state, grad in flat) or not fused.takes(*(p for p, _, _ in flat)):
            _torch_step(self, closure)
            return
        for group, found in zip(self.param_groups, parts):
            moving = [(p, state["exp_avg"], state["exp_avg_sq"], state["step"], grad) for p, state, grad in found]
            fused.adamw_(moving, group["lr"], group["betas"], group["eps"], group["weight_decay"])
