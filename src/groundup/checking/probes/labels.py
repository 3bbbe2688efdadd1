"""Labels against what the loss and the model's outputs can mean by them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.tape import Op
from groundup.checking.trial import BINARY, CLASSES, Data, Trial


def probe(t: Trial) -> Iterator[Finding]:
    if t.batch is None:
        return
    if any(y.is_floating_point() and not bool(y.isfinite().all()) for y in t.data.y):
        bad = sum(int((~y.isfinite()).sum()) for y in t.data.y if y.is_floating_point())
        yield t.found("label.nan", "train_loader", bad=bad, total=sum(y.numel() for y in t.data.y))
    op = t.step.criterion
    if op is None or len(op.inputs) < 2:
        return
    if op.name in BINARY:
        y = _everything(t, op)
        if y is not None and y.numel() and bool(y.isfinite().all()) and (float(y.min()) < 0 or float(y.max()) > 1):
            yield t.found("label.binary_not_zero_one", "train_loader", op, values=_few(y), lowest=float(y.min()), highest=float(y.max()))
    elif op.name in CLASSES:
        yield from _classes(t, op)


def _everything(t: Trial, op: Op) -> Tensor | None:
    """All targets of the data where the loss takes them as the loader gives them; else those of the batch."""
    target = op.inputs[1].detach()
    same = [y for y in t.data.y if y.dim() == target.dim() and y.shape[1:] == target.shape[1:]]
    return torch.cat([y.flatten() for y in same]) if same and len(same) == len(t.data.y) else target.flatten()


def _few(values: Tensor) -> list[float | int]:
    found = torch.unique(values)
    return [v if isinstance(v, int) else round(v, 4) for v in found[:6].tolist()]


def classes_of(op: Op) -> int:
    x = op.inputs[0]
    return int(x.shape[1] if x.dim() > 1 else x.shape[0])


def _classes(t: Trial, op: Op) -> Iterator[Finding]:
    target = op.inputs[1]
    outputs = classes_of(op)
    if target.is_floating_point() or outputs < 2:
        return
    ignored = int(op.argument(4, "ignore_index", -100))
    y = _everything(t, op)
    if y is None or not y.numel():
        return
    found = torch.unique(y)
    real = found[found != ignored]
    if not len(real):
        return
    low, high = int(real.min()), int(real.max())
    inside = real[(real >= 0) & (real < outputs)]
    outside = real[(real < 0) | (real >= outputs)]
    place = "loss_fn" if t.subject.loss_fn is not None else t.outside(op)
    if len(outside) == 1 and (low < 0 or int(outside[0]) == 255) and len(inside) >= 2:
        yield t.found("label.ignore_index_mismatch", place, op, value=int(outside[0]), ignored=ignored)
    elif low >= 1 and high == outputs and len(outside) == 1:
        yield t.found("label.one_based", "train_loader", op, low=low, high=high, outputs=outputs)
    elif len(outside):
        yield t.found(
            "label.out_of_range", "train_loader", op, low=low, high=high, outputs=outputs, top=outputs - 1, values=real[:8].tolist()
        )
    elif 0 <= ignored < outputs and ignored in found and not _is_padding(t, op, ignored):
        share = float((y == ignored).float().mean())
        yield t.found("label.ignore_index_drops_class", place, op, ignored=ignored, share=100 * share)
    elif t.data.whole and len(outside) == 0 and _not_tokens(t, outputs) and _given(t, target):
        yield from _missing(t, op, {int(v) for v in real}, outputs, y)


def _is_padding(t: Trial, op: Op, ignored: int) -> bool:
    """Whether the ignored label stands where the inputs are padding: at one token, which stands nowhere else."""
    target = op.inputs[1]
    x = next((i for i in t.data.x if not i.is_floating_point() and i.numel() == target.numel()), None)
    if target.dim() < 2 and x is None:
        return t.subject.compute_loss is not None and any(isinstance(m, nn.Embedding) for m in t.subject.model.modules())
    if x is None:
        return False
    first = t.data.y[0] if t.data.y else target
    if first.numel() != x.numel():
        return True
    at = x.flatten()[(first == ignored).flatten()]
    return bool(len(torch.unique(at)) <= 1)


def _given(t: Trial, target: Tensor) -> bool:
    """Whether the loss compares with the labels of the data, not with something made in the step (pairs of a contrastive loss)."""
    y = t.subject.pair(t.batch)[1]
    return isinstance(y, Tensor) and y.numel() == target.numel() and bool((y.flatten().long() == target.flatten()).all())


def _not_tokens(t: Trial, outputs: int) -> bool:
    return t.subject.tokenizer is None and not any(
        isinstance(m, nn.Embedding) and m.num_embeddings == outputs and outputs > 2 for m in t.subject.model.modules()
    )


def _missing(t: Trial, op: Op, real: set[int], outputs: int, y: Tensor) -> Iterator[Finding]:
    held = _set(t.validation)
    real = real - _rare(t, y)
    if held and (gap := sorted(held - real)):
        if len(real - held) >= 1 and len(real & held) <= max(1, min(len(real), len(held)) // 2):
            yield t.found("data.split_class_gap", "train_loader", classes=gap, train=sorted(real), val=sorted(held))
        else:
            yield t.found("label.missing_class", "train_loader", op, classes=gap, outputs=outputs)
        return
    absent = [c for c in range(outputs) if c not in real]
    if len(y) < 8 * outputs and len(absent) < outputs // 2:
        return  # too few samples to tell
    known = max(real) + 1
    if absent and outputs >= 2 * known and outputs - known >= 3:
        yield t.found(
            "label.unused_outputs", t.place(t.step.tape.origin(t.step.tape.source(op)), "model"), op, outputs=outputs, classes=len(real)
        )
    elif absent:
        yield t.found("label.missing_class", "train_loader", op, classes=absent, outputs=outputs)


def _rare(t: Trial, y: Tensor) -> set[int]:
    """Classes of which the training has next to nothing, measured by the validation."""
    known = [v.flatten() for v in t.validation.y if not v.is_floating_point()]
    if not known:
        return set()
    held, (classes, counts) = torch.cat(known), torch.unique(y, return_counts=True)
    share = {int(c): float(n) / y.numel() for c, n in zip(classes, counts)}
    return {c for c in share if int((held == c).sum()) >= 5 and share[c] < 0.05 * float((held == c).float().mean())}


def _set(data: Data) -> set[int]:
    return {int(v) for y in data.y if not y.is_floating_point() for v in torch.unique(y) if v >= 0}
