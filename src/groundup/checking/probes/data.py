"""The data by themselves: ranges, order, duplicates, labels that fit, validation against training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from groundup.checking.findings import Finding
from groundup.checking.probes.layers import LINEAR
from groundup.checking.subject import first_tensor, rows
from groundup.checking.tape import Silence, tensors
from groundup.checking.trial import BATCH_NORM, BINARY, CLASSES, REGRESSION, Data, Trial

TABLE = 200  # columns up to which every one is looked at
FIRST = LINEAR | {"lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward", "rnn_tanh_cell", "gru_cell", "lstm_cell"}


def probe(t: Trial) -> Iterator[Finding]:
    d = t.data
    if t.batch is None or not d.x:
        return
    x, y = d.inputs, d.targets
    first = d.x[0]
    if any(b.is_floating_point() and not bool(b.isfinite().all()) for b in d.x):
        yield _nan(t)
    elif first.is_floating_point() and x is not None:
        yield from _scale(t, x)
        yield from _columns(t, x, y)
    yield from _order(t)
    yield from _balance(t)
    yield from _targets(t)
    yield from _repeated(t, x, y)
    yield from _batch_norm(t)
    if x is not None and y is not None and len(x) == len(y) and first.is_floating_point():
        yield from _aligned(t, x, y)


def _nan(t: Trial) -> Finding:
    bad = [b for b in t.data.x if not bool(b.isfinite().all())]
    columns = sorted({int(c) for b in bad if b.dim() == 2 for c in (~b.isfinite()).any(0).nonzero().flatten()})
    where = f"column {columns[0]}" if len(columns) == 1 else f"columns {columns[:6]}" if columns else "the inputs"
    return t.found("data.nan_inputs", "train_loader", where=where, count=sum(int((~b.isfinite()).any(-1).sum()) for b in bad))


def _scale(t: Trial, x: Tensor) -> Iterator[Finding]:
    """What the first layer with weights sees: a model may normalise by itself."""
    made = t.step
    seen = x.float()
    op = next((o for o in made.tape.ops if o.name in FIRST and o.module is not None and o.inputs), None)
    norm = next(
        (
            o
            for o in made.tape.ops
            if o.module is not None and o.name in ("batch_norm", "layer_norm", "group_norm", "instance_norm") and o.inputs
        ),
        None,
    )
    if norm is not None and (op is None or norm.number < op.number):
        return
    raw = t.batch
    given = first_tensor(t.subject.pair(raw)[0])
    if op is not None and given is not None and op.sources[0] is not None and made.tape.origin(made.tape.ops[op.sources[0]]) is not None:
        if any(o.name == "embedding" for o in made.tape.ops[: op.number]):
            return
        seen = op.inputs[0].detach().float()  # it has been changed on the way
    if not bool(seen.isfinite().all()) or not seen.numel():
        return
    low, high, mean, std = float(seen.min()), float(seen.max()), float(seen.mean()), float(seen.std()) if seen.numel() > 1 else 0.0
    rms = (mean * mean + std * std) ** 0.5
    everywhere = seen.dim() != 2 or float(seen.max(0).values.median()) > 30
    if (low < 0 and low > -6 and high > 30 and std > 6 and -low < 0.06 * high and everywhere) or (
        std < 0.06 and abs(mean) > 0.25 and seen[0].numel() > 16
    ):
        yield t.found("data.wrong_norm_stats", "train_loader", op, low=low, high=high, mean=mean, std=std)
    elif 0 < rms < 0.02:
        yield t.found("data.inputs_too_small", "train_loader", op, low=low, high=high, std=std)
    elif seen.dim() == 2 and 2 <= seen.shape[1] <= TABLE:
        means, stds = seen.mean(0), seen.std(0)
        off = ((means.abs() > 8) | (stds > 8)) & ((stds > 1e-9) | (means.abs() > 8))
        if bool(off.any()):
            column = int((means.abs() + stds).argmax())
            yield t.found("data.unnormalised_inputs", "train_loader", op, what=f"column {column}", what_zh=f"第 {column} 列", low=float(seen[:, column].min()),
                          high=float(seen[:, column].max()), mean=float(means[column]), std=float(stds[column]), columns=off.nonzero().flatten().tolist())  # fmt: skip
    elif abs(mean) > 8 or std > 8:
        yield t.found(
            "data.unnormalised_inputs",
            "train_loader",
            op,
            what="the inputs",
            what_zh="输入",
            low=low,
            high=high,
            mean=mean,
            std=std,
            columns=[],
        )


def _columns(t: Trial, x: Tensor, y: Tensor | None) -> Iterator[Finding]:
    if x.dim() != 2 or not 2 <= x.shape[1] <= TABLE or len(x) < 24:
        return
    values = x.double()
    constant = ((values.max(0).values - values.min(0).values) == 0).nonzero().flatten().tolist()
    if constant and len(constant) <= x.shape[1] // 2:
        yield t.found("data.constant_feature", "train_loader", columns=constant, count=len(constant), value=float(values[0, constant[0]]))
    if y is None or len(y) != len(x) or y.numel() != len(y) or y.dtype == torch.bool:
        return
    label = y.double().flatten()
    if not bool(label.isfinite().all()) or float(label.std()) == 0:
        return
    spread = values.std(0, unbiased=False)
    centred = (values - values.mean(0)) / spread.clamp(min=1e-12)
    r = (centred * ((label - label.mean()) / label.std(unbiased=False))[:, None]).mean(0).abs()
    r[spread == 0] = 0
    classes = torch.unique(label)
    leaks = (r > 0.999).nonzero().flatten().tolist()
    if not leaks and 2 < len(classes) <= 50:  # a column that takes another value for each class
        for c in range(x.shape[1]):
            column = values[:, c]
            if 2 <= len(torch.unique(column)) <= 2 * len(classes) and all(
                len(torch.unique(label[column == v])) == 1 for v in torch.unique(column)
            ) and len(torch.unique(column)) >= len(classes):  # fmt: skip
                leaks.append(c)
    if leaks:
        c = leaks[0]
        yield t.found("data.target_leakage", "train_loader", column=c, columns=leaks, correlation=float(r[c]))


def _labels(t: Trial) -> list[Tensor] | None:
    """The class of each sample, batch by batch; None where the targets are no classes."""
    op = t.step.criterion
    found: list[Tensor] = []
    for y in t.data.y:
        flat = y.squeeze(-1) if y.dim() == 2 and y.shape[1] == 1 else y
        if flat.dim() != 1:
            return None
        if flat.is_floating_point():
            if op is None or (op.name not in BINARY and op.name not in CLASSES):
                return None
            if not bool(flat.isfinite().all()) or not bool((flat == flat.round()).all()):
                return None
        found.append(flat.long())
    if op is not None and op.name in REGRESSION:
        return None
    return found or None


def _order(t: Trial) -> Iterator[Finding]:
    batches = _labels(t)
    if batches is None or len(batches) < 3:
        return
    labels = torch.cat(batches)
    classes, counts = torch.unique(labels, return_counts=True)
    if len(classes) < 2 or len(labels) < 24 or len(classes) > len(labels) // 4:
        return
    share = counts.double() / len(labels)
    expected = (len(labels) - 1) * float(1 - share.square().sum())
    changes = int((labels[1:] != labels[:-1]).sum())
    if expected > 6 and changes < 0.25 * expected:
        runs = len(labels) / (changes + 1)
        yield t.found("data.not_shuffled", "train_loader", changes=changes, expected=round(expected), run=runs)


def _balance(t: Trial) -> Iterator[Finding]:
    batches, op = _labels(t), t.step.criterion
    if batches is None or (op is not None and (
        isinstance(op.argument(2, "weight"), Tensor) or isinstance(op.kwargs.get("pos_weight"), Tensor) or op.kwargs.get("reduction") == "none"
    )):  # fmt: skip
        return
    if t.subject.compute_loss is not None and op is None:
        return
    labels = torch.cat(batches)
    classes, counts = torch.unique(labels, return_counts=True)
    if len(classes) < 2 or len(labels) < 40:
        return
    share = counts.double() / len(labels)
    top = int(share.argmax())
    if float(share.max()) >= 0.9 or (float(share.max()) >= 0.75 and float(share.min()) < 0.03 and len(classes) > 2):
        rare = int(share.argmin())
        yield t.found("data.class_imbalance", "train_loader", common=int(classes[top]), share=100 * float(share[top]), rare=int(classes[rare]),
                      low=100 * float(share[rare]), weight=round(float(share[top] / share[rare]), 1))  # fmt: skip


def _targets(t: Trial) -> Iterator[Finding]:
    op = t.step.criterion
    if op is None or op.name not in REGRESSION or len(op.inputs) < 2:
        return
    given = t.subject.pair(t.batch)[1]
    y = op.inputs[1].detach().float()
    if isinstance(given, Tensor) and given.shape == y.shape and t.data.targets is not None and t.data.targets.shape[1:] == y.shape[1:]:
        y = t.data.targets.float()
    y = y[y.isfinite()]
    if y.numel() < 8:
        return
    rms = float(y.square().mean().sqrt())
    if rms > 50 or 0 < rms < 5e-3 or float(y.std()) > 30:
        yield t.found(
            "data.unscaled_targets", "train_loader", op, low=float(y.min()), high=float(y.max()), mean=float(y.mean()), std=float(y.std())
        )


# -- duplicates ------------------------------------------------------------------------------------------------------------------
def keys(x: Tensor) -> list[bytes]:
    rows_ = x.detach().cpu().contiguous().flatten(1).numpy()
    return [r.tobytes() for r in rows_]


def _all_keys(d: Data) -> list[bytes]:
    return [k for x in d.x if x.dim() for k in keys(x if x.dim() > 1 else x[:, None])]


def _repeated(t: Trial, x: Tensor | None, y: Tensor | None) -> Iterator[Finding]:
    if x is None or x.dim() < 1 or len(x) < 8:
        return
    # A sampler may draw a sample several times; the data set itself is asked where it can be.
    found = keys(x if x.dim() > 1 else x[:, None])
    distinct = len(set(found))
    one = all(len(b) < 4 or len(set(keys(b if b.dim() > 1 else b[:, None]))) == 1 for b in t.data.x) and max(map(len, t.data.x)) >= 4
    if x[0].numel() > 1 and (distinct <= max(1, len(found) // 64) or one):
        yield t.found("data.same_sample", "train_loader", samples=len(found), distinct=distinct)
        return
    if y is None or len(y) != len(x) or y.dim() > 2 or (y.dim() == 2 and y.shape[1] != 1) or x[0].numel() < 2:
        return
    op = t.step.criterion
    if (op is not None and op.name in REGRESSION) or (y.is_floating_point() and not bool((y == y.round()).all())):
        return
    groups: dict[bytes, set[float]] = {}
    for key, label in zip(found, y.flatten().tolist()):
        groups.setdefault(key, set()).add(label)
    clash = {k for k, labels in groups.items() if len(labels) > 1}
    blank = {k for k in clash if not any(k)}
    samples = sum(k in clash for k in found)
    if clash - blank and samples >= max(3, 0.02 * len(found)):
        yield t.found("data.conflicting_labels", "train_loader", samples=samples, total=len(found), inputs=len(clash))


def _batch_norm(t: Trial) -> Iterator[Finding]:
    ran = {id(c.module): c for c in t.step.tape.calls}
    norms = [n for n, m in t.subject.model.named_modules() if isinstance(m, BATCH_NORM) and (m.training or t.subject.fit is not None)]
    if not norms:
        return
    sizes = t.data.sizes
    inner = [c for c in ran.values() if isinstance(c.module, BATCH_NORM)]
    flat = any((x := next(tensors(c.args), None)) is not None and x.dim() == 2 for c in inner) or any(
        isinstance(t.subject.model.get_submodule(n), nn.BatchNorm1d) for n in norms
    )
    if sizes and max(sizes) == 1:
        yield t.found("data.batch_size_one_norm", "train_loader", layer=f"model.{norms[0]}")
    elif t.data.whole and len(sizes) > 1 and sizes[-1] == 1 and (flat or min(sizes[:-1]) > 1):
        yield t.found("data.last_batch_of_one", "train_loader", samples=sum(sizes), size=sizes[0], layer=f"model.{norms[0]}")


# -- do the labels belong to the inputs? -----------------------------------------------------------------------------------------
def _aligned(t: Trial, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Neighbours should carry the same label. They do not, though the inputs lie in clear groups (or the validation's labels fit): the labels are of others."""
    batches = _labels(t)
    if batches is None or len(x) < 60:
        return
    labels = torch.cat(batches)[:1500]
    points = x[:1500].float().flatten(1)
    classes = torch.unique(labels)
    if not 2 <= len(classes) <= 20 or points.shape[1] < 2 or not bool(points.isfinite().all()):
        return
    points = (points - points.mean(0)) / points.std(0).clamp(min=1e-6)
    hits, chance, error = _neighbours(points, labels, points, labels, same=True)
    if hits > chance + 3 * error:
        return
    held_x, held_y = t.validation.inputs, t.validation.targets
    fits = False
    if held_x is not None and held_y is not None and len(held_x) >= 40 and not held_y.is_floating_point() and held_y.dim() == 1:
        other = held_x.float().flatten(1)
        other = (other - other.mean(0)) / other.std(0).clamp(min=1e-6)
        good, low, wide = _neighbours(other, held_y.long(), other, held_y.long(), same=True)
        fits = good > low + 6 * wide
    if fits or _grouped(points, len(classes)):
        yield t.found("data.label_misaligned", "train_loader", accuracy=100 * hits, chance=100 * chance)


def _neighbours(a: Tensor, la: Tensor, b: Tensor, lb: Tensor, *, same: bool) -> tuple[float, float, float]:
    """(agreement with the nearest neighbours' label, agreement by chance, its standard error)."""
    distance = torch.cdist(a, b)
    if same:
        distance.fill_diagonal_(float("inf"))
    near = distance.topk(min(5, len(b) - 1), largest=False).indices
    hits = float((lb[near] == la[:, None]).float().mean())
    share = torch.unique(lb, return_counts=True)[1].double() / len(lb)
    chance = float(share.square().sum())
    return hits, chance, (chance * (1 - chance) / len(a)) ** 0.5


def _grouped(points: Tensor, classes: int) -> bool:
    """Whether the inputs fall into clear groups: as many means as classes explain far more than they would of a cloud of the same covariance."""
    generator = torch.Generator().manual_seed(0)
    centred = points - points.mean(0)
    v = torch.linalg.svd(centred, full_matrices=False).Vh
    keep = min(10, v.shape[0])
    flat = centred @ v[:keep].T
    cloud = torch.randn(flat.shape, generator=generator) * flat.std(0)
    return _left(flat, classes, generator) < 0.8 * _left(cloud, classes, generator)


def _left(points: Tensor, k: int, generator: torch.Generator) -> float:
    """The share of the variance that k means leave (S. Lloyd, 1982), the best of some starts."""
    best = 1.0
    for _ in range(6):
        means = points[torch.randperm(len(points), generator=generator)[:k]].clone()
        for _ in range(12):
            owner = torch.cdist(points, means).argmin(1)
            for c in range(k):
                if bool((owner == c).any()):
                    means[c] = points[owner == c].mean(0)
        best = min(best, float((points - means[owner]).square().sum() / points.square().sum().clamp(min=1e-12)))
    return best


# -- training against validation -------------------------------------------------------------------------------------------------
def both(t: Trial) -> Iterator[Finding]:
    s, d, v = t.subject, t.data, t.validation
    if s.val_loader is None or not v.x or not d.x:
        return
    train, held = d.inputs, v.inputs
    a, b = _all_keys(d), _all_keys(v)
    counts: dict[bytes, int] = {}
    for key in a:
        counts[key] = counts.get(key, 0) + 1
    own = {k for k, n in counts.items() if n <= 2 or d.x[0].is_floating_point()}
    shared = sum(k in own and any(k) for k in b)
    indices = _indices(s.train_loader) & _indices(s.val_loader) if _same_dataset(s.train_loader, s.val_loader) else set()
    discrete = not d.x[0].is_floating_point()
    repeats = 1 - len(counts) / max(1, len(a))
    if indices or (shared and (shared >= max(2, 0.01 * len(b)) and (not discrete or (shared > 0.05 * len(b) and repeats < 0.05)))):
        yield t.found("data.train_val_overlap", "val_loader", count=max(shared, len(indices)), total=len(b))
    if train is not None and held is not None and train.is_floating_point() and held.is_floating_point() and len(held) >= 16:
        yield from _statistics(t, train.float(), held.float())
    elif d.x[0].dtype != v.x[0].dtype and d.x[0].is_floating_point() != v.x[0].is_floating_point():
        yield t.found("data.train_val_stats_mismatch", "val_loader", a=float(d.x[0].float().mean()), b=float(v.x[0].float().mean()),
                      c=float(d.x[0].float().std()), e=float(v.x[0].float().std()), what="the inputs")  # fmt: skip
    again = t.scan(s.val_loader, seed=1)
    if again.x and d.x[0].is_floating_point():
        second = set(_all_keys(again))
        moved = sum(k not in second for k in b)
        if moved > 0.5 * len(b) and again.whole and v.whole:
            yield t.found("data.augmentation_on_val", "val_loader", moved=moved, total=len(b))


def _same_dataset(a: Any, b: Any) -> bool:
    x, y = getattr(a, "dataset", None), getattr(b, "dataset", None)
    return isinstance(x, Subset) and isinstance(y, Subset) and x.dataset is y.dataset


def _indices(loader: Any) -> set[int]:
    return {int(i) for i in loader.dataset.indices}


def _statistics(t: Trial, train: Tensor, held: Tensor) -> Iterator[Finding]:
    if not bool(train.isfinite().all()) or not bool(held.isfinite().all()):
        return
    mean, std, other, spread = float(train.mean()), float(train.std()), float(held.mean()), float(held.std())
    worst = "the inputs"
    off = abs(mean - other) > 0.5 * std or not 0.5 < (spread + 1e-12) / (std + 1e-12) < 2.0
    if not off and train.dim() == 2 and train.shape[1] <= TABLE and len(held) >= 32:
        m, s_, o, p = train.mean(0), train.std(0), held.mean(0), held.std(0)
        columns = ((m - o).abs() > 1.0 * s_.clamp(min=1e-6)) & (s_ > 1e-6)
        if bool(columns.any()):
            c = int(columns.nonzero()[0])
            off, worst, mean, std, other, spread = True, f"column {c}", float(m[c]), float(s_[c]), float(o[c]), float(p[c])
    if off:
        yield t.found("data.train_val_stats_mismatch", "val_loader", what=worst, a=mean, b=other, c=std, e=spread)


# -- workers ---------------------------------------------------------------------------------------------------------------------
def workers(t: Trial) -> Iterator[Finding]:
    """Each worker is asked for the same sample: random augmentation that gives the same in all of them has one random state."""
    loader = t.subject.train_loader
    if (
        not isinstance(loader, DataLoader)
        or loader.num_workers < 2
        or isinstance(loader.dataset, IterableDataset)
        or not hasattr(loader.dataset, "__getitem__")
    ):
        return
    dataset = loader.dataset
    kind = type(dataset)
    same = copy.copy(dataset)
    one = type(
        kind.__name__, (kind,), {"__getitem__": lambda self, i: kind.__getitem__(self, 0), "__len__": lambda self: 8 * loader.num_workers}
    )
    try:
        same.__class__ = one
    except TypeError:
        return
    with t.subject.kept(), Silence():
        a, b = first_tensor(dataset[0]), first_tensor(dataset[0])
        if a is None or b is None or torch.equal(a, b):
            return  # nothing random
        probe_loader = DataLoader(
            same, batch_size=4, num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn, collate_fn=loader.collate_fn, generator=loader.generator,
            multiprocessing_context=loader.multiprocessing_context,
        )  # fmt: skip
        batches = []
        for batch in probe_loader:
            batches.append(first_tensor(batch))
            if len(batches) == loader.num_workers:
                break
    first, second = batches[0], batches[1]
    if first is not None and second is not None and first.shape == second.shape and rows(first) and torch.equal(first, second):
        yield t.found("data.worker_rng_duplicated", "train_loader", workers=loader.num_workers)
