"""Optimizer state in the host's memory: the device keeps weights and gradients only (Ren et al., ZeRO-Offload, arXiv 2101.06840, 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Offloaded(torch.optim.Optimizer):
    """An optimizer whose states, and the weights that it works on, are copies on the host.

    Args:
        make: builds the optimizer of parameter groups; it steps on the host.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
        super().__init__(groups, {})
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        copies = []
        for group in self.param_groups:
            own = [nn.Parameter(p.detach().to("cpu", copy=True)) for p in group["params"]]
            self.pairs += list(zip(group["params"], own))
            copies.append({**group, "params": own})
        self.inner = make(copies)
        self.defaults = {
            **self.inner.defaults,
            "fused": False,
        }  # the host waits for the gradients: it may as well read whether they are finite

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for mine, its in zip(self.param_groups, self.inner.param_groups):
            its["lr"] = mine["lr"]
        for parameter, copy in self.pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu", copy.dtype)
        self.inner.step()
        for parameter, copy in self.pairs:
            parameter.copy_(copy, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        with torch.no_grad():
            for parameter, copy in self.pairs:
                copy.copy_(parameter)
