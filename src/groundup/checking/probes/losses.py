"""The loss against what it is given: activations before it, targets, weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from groundup.checking.findings import Finding
from groundup.checking.tape import Op
from groundup.checking.trial import BINARY, CLASSES, REGRESSION, Trial

ACTIVATIONS = {
    "relu", "relu_", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "softplus", "tanh", "hardtanh", "sigmoid", "hardsigmoid", "hardswish",
    "mish", "clamp", "clamp_min", "rrelu", "prelu", "threshold", "tanh_", "sigmoid_", "hardshrink", "softsign", "abs", "logsigmoid",
}  # fmt: skip
RANGES = {
    "sigmoid": (0.0, 1.0), "sigmoid_": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "tanh": (-1.0, 1.0), "tanh_": (-1.0, 1.0),
    "hardtanh": (-1.0, 1.0), "relu": (0.0, float("inf")), "relu_": (0.0, float("inf")), "softplus": (0.0, float("inf")), "relu6": (0.0, 6.0),
    "softsign": (-1.0, 1.0), "abs": (0.0, float("inf")), "exp": (0.0, float("inf")),
}  # fmt: skip


def probe(t: Trial) -> Iterator[Finding]:
    made = t.step
    op = made.criterion
    if op is None or not op.inputs:
        return
    tape = made.tape
    x = op.inputs[0].detach()
    y = op.inputs[1].detach() if len(op.inputs) > 1 else None
    last = tape.origin(tape.source(op)) if tape.source(op) is not None else None
    place = "loss_fn" if t.subject.loss_fn is not None else t.outside(op)
    layer = t.place(last, "model") if last is not None else "model"
    if last is not None and last.name == "softmax" and last.outputs and _size_along(last) == 1 and t.size > 1:
        yield t.found("loss.softmax_single_output", layer, last, layer=layer)
        return
    if op.name == "cross_entropy":
        yield from _cross_entropy(t, op, x, y, last, place, layer)
    elif op.name in ("nll_loss", "nll_loss_nd") and x.dim() > 1 and x.is_floating_point() and bool(x.isfinite().all()):
        if _probabilities(x):
            yield t.found("loss.nll_on_probs", place, op, layer=layer, activation=_called(last, "softmax"))
        elif not _log_probabilities(x):
            yield t.found("loss.nll_on_logits", place, op, layer=layer, low=float(x.min()), high=float(x.max()))
    elif (
        op.name == "binary_cross_entropy_with_logits"
        and last is not None
        and last.name in ("sigmoid", "sigmoid_", "softmax", "hardsigmoid")
    ):
        yield t.found("loss.sigmoid_before_bce_logits", layer, last, layer=layer, activation=last.name, place=place)
    elif op.name == "binary_cross_entropy" and (
        float(x.min()) < 0 or float(x.max()) > 1 or (last is not None and last.name in ("linear", "addmm", "conv2d", "conv1d"))
    ):
        yield t.found("loss.bce_on_logits", place, op, layer=layer, low=float(x.min()), high=float(x.max()))
    elif op.name == "kl_div" and x.dim() > 1 and not op.kwargs.get("_", False) and not _log_probabilities(x):
        yield t.found("loss.kldiv_input_not_log", place, op, layer=layer, low=float(x.min()), high=float(x.max()))
    if op.name in BINARY | CLASSES and last is not None:
        own = {"sigmoid", "sigmoid_", "hardsigmoid", "logsigmoid"} if op.name != "cross_entropy" else set()  # other findings
        if last.name in ACTIVATIONS - own and op.name != "binary_cross_entropy":
            yield t.found("loss.activation_on_logits", layer, last, layer=layer, activation=last.name)
    if op.name in REGRESSION and y is not None:
        yield from _regression(t, op, x, y, last, place, layer)
    yield from _weight(t, op, x, place)


def _called(op: Op | None, default: str) -> str:
    return op.name if op is not None else default


def _size_along(op: Op) -> int:
    dim = op.argument(1, "dim")
    shape = op.outputs[0].shape
    return int(shape[dim]) if isinstance(dim, int) and len(shape) else 0


def _probabilities(x: Tensor) -> bool:
    sums = x.float().sum(1)
    return x.shape[1] > 1 and float(x.min()) >= 0 and float((sums - 1).abs().max()) < 1e-3


def _log_probabilities(x: Tensor) -> bool:
    return float(x.max()) <= 1e-4 and min(float(x.float().logsumexp(d).abs().max()) for d in (1, -1)) < 1e-2


def _cross_entropy(t: Trial, op: Op, x: Tensor, y: Tensor | None, last: Op | None, place: str, layer: str) -> Iterator[Finding]:
    if x.dim() > 1 and x.shape[1] == 1:
        head = t.step.tape.origin(t.step.tape.source(op)) if t.step.tape.source(op) is not None else None
        yield t.found("loss.ce_single_output", t.place(head, place), op, layer=t.place(head, "model"))
        return
    if x.dim() < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
        return
    if (last is not None and last.name == "softmax") or (
        (last is None or last.name not in ("linear", "log_softmax")) and _probabilities(x)
    ):
        yield t.found("loss.softmax_before_ce", layer if last is not None and last.module is not None else place, last or op, layer=layer)
    elif (last is not None and last.name == "log_softmax") or (last is not None and last.name == "sub" and _log_probabilities(x)):
        yield t.found("loss.log_softmax_before_ce", layer, last, layer=layer)
    if y is not None and y.is_floating_point() and y.shape == x.shape and bool(((y == 0) | (y == 1)).all()):
        sums = y.sum(1)
        if bool((sums > 1).any()):
            yield t.found("loss.ce_on_multilabel", place, op, most=int(sums.max()), mean=float(sums.mean()))


def _regression(t: Trial, op: Op, x: Tensor, y: Tensor, last: Op | None, place: str, layer: str) -> Iterator[Finding]:
    # What the loss is given itself, and further targets of the data where they are the same thing.
    values = [y.float().flatten()]
    given = t.subject.pair(t.batch)[1]
    if isinstance(given, Tensor) and given.shape == y.shape:
        values += [v.float().flatten() for v in t.data.y[1:]]
    target = torch.cat(values)
    target = target[target.isfinite()]
    if not len(target):
        return
    low, high = float(target.min()), float(target.max())
    if last is not None and last.name in RANGES:
        floor, top = RANGES[last.name]
        if last.name == "hardtanh":
            floor, top = float(last.argument(1, "min_val", -1.0)), float(last.argument(2, "max_val", 1.0))
        slack = 0.02 * (min(top, high) - max(floor, low)) if high > low else 0.0
        if low < floor - max(slack, 1e-3) or high > top + max(slack, 1e-3):
            shown = f"({floor:g}, {top:g})" if top < float("inf") else f">= {floor:g}"
            outside = float(((target < floor) | (target > top)).float().mean())
            yield t.found(
                "loss.bounded_output",
                layer,
                last,
                layer=layer,
                activation=last.name,
                range=shown,
                low=low,
                high=high,
                outside=100 * outside,
            )
    found = torch.unique(target)
    single = x.dim() == 1 or x.shape[-1] == 1
    if (
        single
        and 3 <= len(found) <= 50
        and torch.equal(found, torch.arange(len(found), dtype=found.dtype))
        and len(target) >= 4 * len(found)
    ):
        shares = torch.bincount(target.long(), minlength=len(found)).float() / len(target)
        if float(shares.min()) > 0.4 / len(found) and float(shares.max()) < 2.0 / len(found):
            yield t.found("loss.mse_on_class_ids", place, op, classes=len(found), loss=op.name, outputs=1)


def _weight(t: Trial, op: Op, x: Tensor, place: str) -> Iterator[Finding]:
    weight = op.argument(2, "weight") if op.name in CLASSES else op.kwargs.get("pos_weight") if op.name in BINARY else None
    if isinstance(weight, Tensor) and weight.dim() == 1 and x.dim() > 1:
        outputs = x.shape[1] if op.name in CLASSES else x.shape[-1]
        if weight.numel() != outputs and not (op.name in BINARY and weight.numel() == 1):
            yield t.found("loss.class_weight_shape", place, op, weight=weight.numel(), outputs=outputs)
