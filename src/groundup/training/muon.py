"""Muon: momentum whose matrices are made orthogonal before they are applied; all matrices of one shape at once.

The numbers are those of `torch.optim.Muon` (which goes through the matrices one by one, in bfloat16 also where that is slow); torch's own cost more
than the whole forward and backward pass of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic whose fifth iterate maps singular values from 0..1 to about 1 (Jordan et al., Muon, 2024, "Newton-Schulz").
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(stack: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices [N, rows, columns], rows at most columns -> the nearest ones with orthonormal rows, roughly."""
    x = stack.to(torch.bfloat16) if stack.device.type == "cuda" else stack
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x.to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, of the size of AdamW's updates (Liu et al., arXiv 2502.16982, 2.2), decoupled weight decay.

    Args:
        params: matrices only.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            if not parameters:
                continue
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p, update in zip(parameters, updates):
                short, long = sorted(p.shape)
                alike.setdefault((short, long), []).append((p, update))
            for (short, long), pairs in alike.items():
                stack = torch.stack([u if u.shape == (short, long) else u.mT for _, u in pairs])
                made = orthogonalized(stack).mul_(-group["lr"] * 0.2 * long**0.5)
                torch._foreach_add_([p for p, _ in pairs], [m if p.shape == (short, long) else m.mT for m, (p, _) in zip(made, pairs)])
