"""Cross-entropy of next tokens straight from hidden states, in chunks: the logits of all positions never stand in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.data.tokens import IGNORED
from groundup.models import fused

CHUNK = 2**22  # logits that stand in memory at once


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0, softcap: float | None = None) -> Tensor:
    """The summed cross-entropy of logits = hidden @ weight.T, with its gradient found in the same pass.

    Args:
        hidden: [N, width]; weight: [vocabulary, width]; targets: int64 [N], IGNORED where there is none.
        z_loss: weight of log(Z)², which keeps the logits from drifting (Chowdhery et al., PaLM, arXiv 2204.02311, 5).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, 2).
    """
    keep = targets != IGNORED
    if not bool(keep.all()):
        hidden, targets = hidden[keep], targets[keep]
    return _TokenLoss.apply(hidden, weight, targets, z_loss, softcap)  # type: ignore[no-any-return]


@contextmanager
def _unseen() -> Iterator[None]:
    """What happens in here is one operation: whoever writes down a step's operations with their tensors (`check` does) would keep all chunks."""
    with torch._C.DisableTorchFunction():
        yield


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(64, CHUNK // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _gradients(grad: Tensor, h: Tensor, w: Tensor, for_h: Tensor, for_weight: Tensor | None) -> None:
    """From the gradient of a chunk's logits."""
    torch.mm(grad, w, out=for_h)
    if for_weight is None:
        return
    if for_weight.dtype == grad.dtype:
        for_weight.addmm_(grad.t(), h)
    else:
        for_weight += grad.t() @ h


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    @_unseen()
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, softcap: float | None) -> Tensor:
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if need and softcap is None and fused.token_loss_takes(hidden, weight):
            loss, *found = fused.token_loss(hidden, weight, targets, z_loss, ctx.needs_input_grad[1])
            ctx.found = tuple(found)
            return loss.sum()
        w = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        for_hidden = torch.empty_like(hidden) if need else None
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for cut in _chunks(len(hidden), len(weight)):
            h, target = hidden[cut], targets[cut, None]
            logits = (h @ w.t()).float()
            if softcap is None and fused.takes(logits):
                total += fused.cross_entropy_(logits, targets[cut], z_loss, back=need).sum()
                if for_hidden is not None:
                    _gradients(logits, h, w, for_hidden[cut], for_weight)
                continue
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_p = torch.log_softmax(logits, 1)
            right = log_p.gather(1, target)
            total -= right.sum()
            log_z = logits[:, :1] - log_p[:, :1] if z_loss else None
            if log_z is not None:
                total += z_loss * log_z.square().sum()
            if for_hidden is None:
                continue
            capped = 1 - (logits / softcap).square() if softcap is not None else None
            grad = log_p.exp_()
            if log_z is not None:
                grad.mul_(1 + 2 * z_loss * log_z)
            grad.scatter_add_(1, target, torch.full_like(right, -1.0))
            if capped is not None:
                grad.mul_(capped)
            _gradients(grad.to(hidden.dtype), h, w, for_hidden[cut], for_weight)
        ctx.found = (for_hidden, for_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        (for_hidden, for_weight), ctx.found = ctx.found, None
        return (
            None if for_hidden is None else for_hidden.mul_(grad),
            None if for_weight is None else for_weight.mul_(grad),
            None,
            None,
            None,
        )


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """The cross-entropy of each position, float32 [N], for losses that weigh positions: the gradient makes the chunks' logits a second time."""
    return _TokenNLL.apply(hidden, weight, targets, softcap)  # type: ignore[no-any-return]


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    @_unseen()
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.softcap = softcap
        return token_scores(hidden, weight, targets, softcap)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        for_hidden, for_weight = torch.empty_like(hidden), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for cut in _chunks(len(hidden), len(weight)):
            h, target = hidden[cut], targets[cut, None]
            logits = (h @ w.t()).float()
            if ctx.softcap is not None:
                logits.div_(ctx.softcap).tanh_().mul_(ctx.softcap)
            share = torch.softmax(logits, 1)
            share.scatter_add_(1, target, torch.full_like(share[:, :1], -1.0))
            if ctx.softcap is not None:
                share.mul_(1 - (logits / ctx.softcap).square())
            share = share.mul_(grad[cut, None]).to(hidden.dtype)
            torch.mm(share, w, out=for_hidden[cut])
            if for_weight is not None:
                for_weight += share.t() @ h
        return for_hidden, for_weight, None, None


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Of each position [N]: the cross-entropy in nats (0 where there is no target), and whether the likeliest token was the right one."""
    loss, hit = hidden.new_zeros(len(hidden), dtype=torch.float32), torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    keep = targets != IGNORED
    if not bool(keep.all()):
        loss[keep], hit[keep] = token_scores(hidden[keep], weight, targets[keep], softcap)
        return loss, hit
    for cut in _chunks(len(hidden), len(weight)):
        logits = (hidden[cut] @ weight.to(hidden.dtype).t()).float()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        target = targets[cut]
        loss[cut] = fused.cross_entropy_(logits, target, 0.0, back=False) if fused.takes(logits) else F.cross_entropy(logits, target, reduction="none")
        hit[cut] = logits.argmax(1) == target
    return loss, hit
