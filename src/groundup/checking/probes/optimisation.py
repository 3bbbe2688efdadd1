"""The optimizer, its parameters and the loop around it."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.subject import Subject
from groundup.checking.trial import NORMS, Events, Trained, Trial

ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)
COUPLED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.NAdam,
    torch.optim.RAdam,
)


def parameters(t: Trial) -> Iterator[Finding]:
    s = t.subject
    named = dict(s.model.named_parameters())
    trained = {n: p for n, p in named.items() if p.requires_grad}
    adapters = [n for n in named if "lora" in n.lower()]
    if named and not trained:
        if adapters:
            yield t.found("lm.lora_all_frozen", "model", names=adapters[:4])
        else:
            yield t.found("optim.all_frozen", "model", count=len(named))
        return
    if adapters and not any(n in trained for n in adapters):
        yield t.found("lm.lora_all_frozen", "model", names=adapters[:4])
    if s.optimizer is None:
        return
    held = {id(p) for o in s.optimizers for g in o.param_groups for p in g["params"]}
    own = {id(p) for p in named.values()}
    grads = t.step.grads
    foreign = [
        p
        for o in s.optimizers
        for g in o.param_groups
        for p in g["params"]
        if id(p) not in own and p.requires_grad and not _belongs(s, p, t)
    ]
    missing = [n for n, p in trained.items() if id(p) not in held and (n in grads or t.step.error is not None)]
    if foreign or (missing and any("lora" in n.lower() for n in missing)):
        names = missing[:6] or [f"{tuple(p.shape)}" for p in foreign[:4]]
        yield t.found("optim.stale_params", "optimizer", names=names, foreign=len(foreign), missing=len(missing))
    elif missing:
        parts = sorted({n.split(".")[0] for n in missing})
        yield t.found("optim.params_missing", "optimizer", names=[f"model.{n}" for n in missing[:6]], count=len(missing), parts=parts)
    yield from _groups(t)


def _belongs(s: Subject, parameter: Tensor, t: Trial) -> bool:
    """Whether a parameter from outside of the model is used all the same: it belongs to the loss, or stands by itself in the script."""
    if isinstance(s.loss_fn, nn.Module) and any(p is parameter for p in s.loss_fn.parameters()):
        return True
    if any(id(i) == id(parameter) for op in t.step.tape.ops for i in op.inputs):
        return True
    others = [v for k, v in s.namespace.items() if isinstance(v, nn.Module) and v is not s.model]
    return any(p is parameter for m in others for p in m.parameters()) and s.train_step is not None


def _groups(t: Trial) -> Iterator[Finding]:
    s = t.subject
    names = s.names()
    norm = {id(p) for m in s.model.modules() if isinstance(m, (*NORMS, nn.RMSNorm)) for p in m.parameters(recurse=False)}
    norm |= {id(p) for n, p in s.model.named_parameters() if p.dim() == 1 and ("norm" in n.lower() or n.endswith(("gain", "gamma")))}
    biases = {id(p) for n, p in s.model.named_parameters() if n.endswith("bias")}
    for optimizer in s.optimizers:
        for group in optimizer.param_groups:
            decay, rate = float(group.get("weight_decay", 0) or 0), float(group.get("initial_lr", group["lr"]))
            momentum = group.get("momentum", group.get("betas", (0,))[0])
            if float(momentum) >= 0.995:
                yield t.found(
                    "optim.momentum_too_high",
                    "optimizer",
                    momentum=float(momentum),
                    steps=round(1 / max(1e-9, 1 - float(momentum))) if momentum < 1 else "endless",
                )
            decoupled = not isinstance(optimizer, COUPLED) or bool(group.get("decoupled_weight_decay", False))
            if decay > 0:
                if decay != 0.01 and any(id(p) in norm for p in group["params"]):
                    which = [names.get(id(p), "?") for p in group["params"] if id(p) in norm or id(p) in biases]
                    yield t.found("optim.weight_decay_on_norm", "optimizer", names=which[:4], count=len(which), decay=decay)
                if (
                    (decoupled and rate * decay > 4e-3)
                    or (not decoupled and _overwhelms(t, group, decay))
                    or (decay >= 0.05 and _better_without(t))
                ):
                    yield t.found("optim.weight_decay_too_large", "optimizer", decay=decay, lr=rate)


def _overwhelms(t: Trial, group: dict[str, Any], decay: float) -> bool:
    names = t.subject.names()
    ratios = []
    for p in group["params"]:
        g = t.step.grads.get(names.get(id(p), ""))
        if p.dim() > 1 and g is not None:
            ratios.append(float((decay * p.detach()).norm()) / max(float(g.norm()), 1e-12))
    return bool(ratios) and sorted(ratios)[len(ratios) // 2] > 2.5 and decay >= 0.03


def _better_without(t: Trial) -> bool:
    """Whether the same short training comes much lower without weight decay, and hardly falls with it."""
    if t.step.error is not None or t.trained.error is not None or t.trained.bad_step >= 0 or t.trained.steps < 8 or t.left < 3:
        return False
    free = t.train(decay=False, steps=t.trained.steps, seconds=1.5)
    return free.error is None and free.bad_step < 0 and _end(free) < 0.6 * free.losses[0] and _end(t.trained) > 0.85 * t.trained.losses[0]


# -- the loop --------------------------------------------------------------------------------------------------------------------
def loop(t: Trial) -> Iterator[Finding]:
    s = t.subject
    if s.fit is None and s.train_step is None:
        return
    e, place = t.events, "fit" if s.fit is not None else "train_step"
    backward, steps, kinds = e.of("backward"), e.of("step"), e.kinds
    if backward and not steps and s.optimizer is not None and not e.changed and any(b["norm"] > 0 for b in backward):
        yield t.found("optim.step_missing", place, backward=len(backward))
        return
    if len(backward) > 1 and sum(b["left"] for b in backward[1:]) >= max(1, 0.5 * (len(steps) - 1)) and len(steps) > 1:
        yield t.found("optim.zero_grad_missing", place, steps=len(steps))
    if steps and backward and all(d["norm"] == 0 for d in steps) and any(b["norm"] > 0 for b in backward):
        yield t.found("optim.zero_grad_before_step", place, steps=len(steps))
    yield from _clip(t, e, place)
    yield from _accumulated(t, e, place)
    if "schedule" in kinds and "step" in kinds and kinds.index("schedule") < kinds.index("step"):
        yield t.found("optim.scheduler_order", place)
    yield from _schedule(t, e, place)
    if e.held >= 3 or _history(e.result):
        yield t.found("grad.loss_history_kept", place, held=max(e.held, len(backward)))
    elif (line := _sums_losses(s)) is not None:
        yield t.found("grad.loss_history_kept", place, held=line)


def _history(result: Any) -> bool:
    return isinstance(result, (list, tuple)) and sum(isinstance(v, Tensor) and v.grad_fn is not None for v in result) >= 2


def _clip(t: Trial, e: Events, place: str) -> Iterator[Finding]:
    if "clip" not in e.kinds or "step" not in e.kinds:
        return
    order = [k for k in e.kinds if k in ("backward", "clip", "step")]
    useful = any(
        order[i] == "clip" and order[i + 1 : i + 2] == ["step"] and "backward" in order[max(0, i - 8) : i] for i in range(1, len(order))
    )
    if not useful:
        where = "before" if order.index("clip") < order.index("backward") else "after"
        yield t.found("optim.clip_no_effect", place, where="before backward()" if where == "before" else "after optimizer.step()")


def _accumulated(t: Trial, e: Events, place: str) -> Iterator[Finding]:
    """Several backward passes to one step: are their losses divided by how many they are?"""
    order = [(k, d) for k, d in zip(e.kinds, e.details) if k in ("backward", "step", "zero_grad")]
    runs, run = [], 0
    for kind, _ in order:
        if kind == "backward":
            run += 1
        else:  # what was gathered is taken, or thrown away (a second look at the same batch, as in SAM)
            if kind == "step":
                runs.append(run)
            run = 0
    full = [r for r in runs if r > 1]
    if not full or len(full) < 0.5 * len(runs):
        return
    count = max(set(full), key=full.count)
    trees = [t.subject.source(f) for f in (t.subject.fit, t.subject.train_step, t.subject.compute_loss)]
    if any(tree is not None and _divides(tree) for tree in trees):
        return
    criterion = t.step.criterion
    if criterion is None or criterion.kwargs.get("reduction", "mean") == "sum":
        return
    op = t.step.tape.made(t.step.loss) if t.step.loss is not None else None
    if op is not None and op.name in ("div", "div_", "mul", "mul_") and any(not isinstance(a, Tensor) for a in op.args):
        return
    yield t.found("optim.accumulation_not_scaled", place, op, steps=count)


def _divides(tree: ast.AST) -> bool:
    """A loss or gradient that is divided in this function."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    backward = [c.func.value for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "backward"]
    names = {ast.unparse(v) for v in backward}

    def scaled(node: ast.AST) -> bool:
        return any(isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Div, ast.Mult)) for n in ast.walk(node))

    if any(scaled(v) for v in backward):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(ast.unparse(t) in names for t in node.targets) and scaled(node.value):
            return True
        if (
            isinstance(node, ast.AugAssign)
            and isinstance(node.op, (ast.Div, ast.Mult))
            and (ast.unparse(node.target) in names or ".grad" in ast.unparse(node.target))
        ):
            return True
    return any(
        isinstance(c.func, ast.Attribute) and c.func.attr in ("div_", "mul_") and ".grad" in ast.unparse(c.func.value) for c in calls
    )


def _sums_losses(s: Subject) -> int | None:
    """`total += loss` with its graph: the line, None where the loss is taken as a number or nothing is summed."""
    for function in (s.fit, s.train_step):
        tree = s.source(function)
        if tree is None:
            continue
        called = {
            ast.unparse(n.func.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "backward"
        }
        plain = {
            ast.unparse(n.targets[0]) for n in ast.walk(tree)
            if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call) and isinstance(n.value.func, ast.Attribute) and n.value.func.attr in ("item", "detach")
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and ast.unparse(node.value).split(" ")[0] in called - plain:
                total = ast.unparse(node.target)
                if total not in called:
                    return node.lineno
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.Add):
                total, sides = ast.unparse(node.targets[0]), {ast.unparse(node.value.left), ast.unparse(node.value.right)}
                if total in sides and sides & (called - plain) and total not in called:
                    return node.lineno
    return None


def _epochs(s: Subject) -> int | None:
    """How many epochs the script itself would train, as far as its text says so."""
    if s.path is None:
        return None
    try:
        tree = ast.parse(s.path.read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    constants = {
        n.targets[0].id: n.value.value for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, int)
    }  # fmt: skip

    def number(node: ast.AST | None) -> int | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        return constants.get(node.id) if isinstance(node, ast.Name) else None

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fit":
            found.append(number(node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "epochs"), None)))
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            for inner in ast.walk(node):
                if (
                    isinstance(inner, ast.For)
                    and isinstance(inner.iter, ast.Call)
                    and ast.unparse(inner.iter.func) == "range"
                    and "epoch" in ast.unparse(inner.target)
                ):
                    found.append(number(inner.iter.args[-1] if len(inner.iter.args) < 3 else inner.iter.args[1]))
    known = [f for f in found if f]
    return max(known) if known else next((v for k, v in constants.items() if "epoch" in k.lower()), None)


def _schedule(t: Trial, e: Events, place: str) -> Iterator[Finding]:
    """The schedule is run by itself, as often as the loop steps it in a whole training: what becomes of the learning rate?"""
    s = t.subject
    scheduler, steps, calls = s.scheduler, len(e.of("step")), len(e.of("schedule"))
    if scheduler is None or not calls or not steps or not hasattr(scheduler, "state_dict"):
        return
    sizes = t.data.sizes
    batches = len(sizes) if t.data.whole else 0
    if not batches:
        return
    ratio = calls / steps
    per_batch = ratio > 0.5
    accumulation = max(1, round(len(e.of("backward")) / steps))
    epochs = _epochs(s) or 20
    total = max(1, round(epochs * batches / accumulation)) if per_batch else epochs
    rates = _rates(s, min(total, 20000))
    if not rates:
        return
    top = max(rates)
    if per_batch and batches > 1:
        horizon = _horizon(scheduler)
        dead = sum(r < 0.05 * top for r in rates) / len(rates)
        if (horizon is not None and horizon * 2.5 <= total and (horizon <= 2 * epochs or horizon < batches)) or dead > 0.3:
            yield t.found(
                "optim.scheduler_per_batch",
                place,
                what="every batch",
                what_zh="每个批次",
                calls=total,
                horizon=horizon or "-",
                epochs=epochs,
                last=rates[-1],
                top=top,
            )
    elif not per_batch:
        size = getattr(scheduler, "step_size", None)
        horizon = float(size) if isinstance(size, int) else _horizon(scheduler)
        made = getattr(scheduler, "total_steps", None)
        if (
            (horizon is not None and horizon >= 3 * epochs and horizon >= 0.5 * batches * epochs)
            or (made and made >= 3 * epochs)
            or _still_warming(rates, scheduler)
        ):
            yield t.found(
                "optim.scheduler_per_batch",
                place,
                what="once per epoch",
                what_zh="每个 epoch 一次",
                calls=total,
                horizon=horizon or made or "-",
                epochs=epochs,
                last=rates[-1],
                top=top,
            )


def _still_warming(rates: list[float], scheduler: Any) -> bool:
    base = max((float(v) for v in getattr(scheduler, "base_lrs", [])), default=0.0)
    return base > 0 and len(rates) > 4 and max(rates) < 0.3 * base and rates[-1] >= rates[0]


def _horizon(scheduler: Any) -> float | None:
    """Steps after which a schedule has done what it is meant for."""
    for name in ("T_max", "total_steps", "total_iters", "T_0"):
        if isinstance(getattr(scheduler, name, None), int):
            return float(getattr(scheduler, name))
    if getattr(scheduler, "milestones", None):
        return float(max(scheduler.milestones))
    if isinstance(getattr(scheduler, "step_size", None), int):
        rate = float(getattr(scheduler, "gamma", 0.1))
        return 3.0 * scheduler.step_size * max(1.0, math.log(0.1) / math.log(rate)) if 0 < rate < 1 else None
    gamma = getattr(scheduler, "gamma", None)
    return math.log(0.01) / math.log(gamma) if isinstance(gamma, float) and 0 < gamma < 1 else None


def _rates(s: Subject, steps: int) -> list[float]:
    """The learning rate over so many steps of the schedule."""
    scheduler = s.scheduler
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return []
    rates = []
    import warnings

    with s.kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = copy.deepcopy(scheduler.state_dict())
        try:
            for _ in range(steps):
                rates.append(max(float(g["lr"]) for g in scheduler.optimizer.param_groups))
                scheduler.step()
        except Exception:
            return rates
        finally:
            scheduler.load_state_dict(state)
    return rates


# -- learning rate ---------------------------------------------------------------------------------------------------------------
def rates(t: Trial) -> Iterator[Finding]:
    """The user's own rate, a tenth and a hundredth of it, over the same batches (after L. Smith, Cyclical Learning Rates, 2017, section 3.3)."""
    s = t.subject
    if s.optimizer is None or t.step.error is not None or s.train_loader is None:
        return
    if isinstance(s.optimizer, torch.optim.LBFGS):  # its rate is a share of a step whose length it finds itself, on one batch at a time
        return
    own = t.trained
    lr = max(float(g.get("initial_lr", g["lr"])) for g in s.optimizer.param_groups)
    if own.error is not None or own.steps < 4:
        return
    if own.moved < 3e-6 and any(bool(g.any()) for g in t.step.grads.values()) and lr > 0:
        yield t.found("optim.lr_too_low", "optimizer", lr=lr, moved=own.moved, steps=own.steps)
        return
    if s.scheduler is not None and lr > 0 and (planned := _rates(s, own.steps)) and own.moved * max(planned) / lr < 3e-6:
        yield t.found("optim.lr_too_low", "optimizer", lr=max(planned), moved=own.moved * max(planned) / lr, steps=own.steps)
        return
    if own.bad_step >= 0 or not _falls(own):
        for factor in (0.1, 0.01, 0.001):
            slower = t.train(rate=factor, steps=max(own.steps, 30), seconds=1.5)
            if slower.error is None and slower.bad_step < 0 and slower.steps >= 4 and _better(slower, own):
                yield t.found(
                    "optim.lr_too_high", "optimizer", lr=lr, first=own.losses[0], last=own.losses[-1], lower=lr * factor, then=_end(slower)
                )
                return
    elif isinstance(s.optimizer, ADAPTIVE) and lr >= 0.2 and sum(p.dim() > 1 and p.requires_grad for p in s.model.parameters()) > 1:
        # Each weight moves by about lr in each step, whatever its gradient: far more than weights of hidden layers are large.
        slower = t.train(rate=1e-3 / lr, steps=own.steps, seconds=1.5)
        end = _end(slower) if slower.losses else "-"
        yield t.found("optim.lr_too_high", "optimizer", lr=lr, first=own.losses[0], last=max(own.losses), lower=1e-3, then=end)
    elif t.left > 2 and _jumps(own):
        slower = t.train(rate=0.03, steps=own.steps, seconds=1.5)
        if (
            slower.error is None
            and slower.bad_step < 0
            and slower.steps >= 4
            and _end(slower) < 0.6 * _end(own)
            and max(slower.losses) < 0.5 * max(own.losses)
        ):
            yield t.found(
                "optim.lr_too_high", "optimizer", lr=lr, first=own.losses[0], last=own.losses[-1], lower=lr * 0.03, then=_end(slower)
            )


def _end(run: Trained) -> float:
    tail = run.losses[-max(1, len(run.losses) // 4) :]
    return sum(tail) / len(tail)


def _falls(run: Trained) -> bool:
    head = run.losses[: max(1, min(3, len(run.losses) // 4))]
    first = sum(head) / len(head)
    return _end(run) <= first + 0.02 * abs(first)


def _jumps(run: Trained) -> bool:
    return max(run.losses[1:]) > 2.5 * max(run.losses[0], 1e-3)


def _better(slower: Trained, own: Trained) -> bool:
    if own.bad_step >= 0:
        return _end(slower) <= 1.02 * slower.losses[0]
    return _end(slower) < 0.9 * slower.losses[0] and _end(slower) < 0.7 * _end(own)
