"""Numbers that are not finite: the operation that made the first of them, forward or backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from groundup.checking.findings import Finding
from groundup.checking.tape import VIEWS, Op, Tape
from groundup.checking.trial import Traced, Trial

LOGS = {"log", "log2", "log10", "log1p", "log_", "logit"}
EXPS = {"exp", "exp_", "expm1", "cosh", "sinh", "exp2"}
ROOTS = {
    "sqrt",
    "rsqrt",
    "norm",
    "vector_norm",
    "std",
    "var",
    "dist",
    "cdist",
    "pow",
    "pow_",
    "sqrt_",
    "pairwise_distance",
    "normalize",
    "acos",
    "asin",
    "hypot",
    "linalg_norm",
    "std_mean",
    "cosine_similarity",
}
SELECTS = {
    "where",
    "masked_fill",
    "masked_fill_",
    "nan_to_num",
    "masked_select",
    "__getitem__",
    "setitem_",
    "mul",
    "maximum",
    "minimum",
    "clamp",
    "nanmean",
    "nansum",
}
MASKS = {
    "masked_fill",
    "masked_fill_",
    "full",
    "new_full",
    "tensor",
    "where",
    "full_like",
    "triu",
    "triu_",
    "fill_",
    "zeros_like",
    "setitem_",
    "generate_square_subsequent_mask",
    "float",
}


def probe(t: Trial) -> Iterator[Finding]:
    s = t.subject
    if t.batch is None:
        return
    half = [n for n, p in s.model.named_parameters() if p.dtype == torch.float16 and p.requires_grad]
    held = {id(p) for o in s.optimizers for g in o.param_groups for p in g["params"]}
    if half and any(id(p) in held for n, p in s.model.named_parameters() if n in half):
        yield t.found(
            "numerics.pure_fp16", "optimizer", names=[f"model.{n}" for n in half[:3]], kind=type(s.optimizer).__name__, count=len(half)
        )
    made = t.step
    if made.error is not None:
        op, text = made.tape.failed, str(made.error)
        if op is not None and "without overflow" in text:
            yield t.found("numerics.fp16_mask_value", t.place(op), op, what=op.name, value=_value(op))
        return
    yield from _masked(t, made)
    if _clean(made) and s.fit is None and s.train_loader is not None:
        run = t.trained
        if run.bad_step < 0 or run.error is not None:
            run_all = _others(t)
            if run_all is None:
                return
            made = run_all
        else:
            made = t.trace_step(run.bad_step)
            rate_grows = (
                run.bad_step > 0
                and run.losses[0] > 0
                and run.bad_step < len(run.losses)
                and any(abs(v) > 1e3 * (abs(run.losses[0]) + 1e-9) for v in run.losses[:-1])
            )
            if rate_grows:
                return  # it diverged: that is the learning rate's finding
    if not _clean(made):
        yield from _first(t, made)


def _value(op: Op) -> str:
    return next((f"{a:g}" for a in (*op.args, *op.kwargs.values()) if isinstance(a, (int, float)) and abs(a) > 65504), "-1e9")


def _clean(made: Traced) -> bool:
    loss = made.loss is None or bool(made.loss.detach().isfinite().all())
    return loss and all(bool(g.isfinite().all()) for g in made.grads.values())


def _others(t: Trial) -> Traced | None:
    """A later batch of the data whose loss or gradients are not finite with the first weights."""
    if t.subject.train_step is not None:
        return None
    for batch in t.data.batches[1:24]:
        if t.left < 4:
            return None
        made = t.trace(batch, values=True)
        if made.error is None and not _clean(made):
            return made
    return None


def _inputs_finite(tape: Tape, op: Op) -> bool:
    return all(not i.is_floating_point() or bool(i.detach().isfinite().all()) for i in op.inputs)


def _masked(t: Trial, made: Traced) -> Iterator[Finding]:
    """Attention rows in which every key is masked."""
    for op in made.tape.ops:
        if op.name == "multi_head_attention_forward":
            mask = op.kwargs.get("key_padding_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2 and bool((off := ignored(mask)).all(1).any()):
                yield t.found("numerics.fully_masked_row", t.place(op), op, count=int(off.all(1).sum()), rows=len(mask))
                return
        if op.name == "scaled_dot_product_attention":
            mask = op.kwargs.get("attn_mask", op.args[3] if len(op.args) > 3 else None)
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and bool((~mask.any(-1)).any()):
                yield t.found("numerics.fully_masked_row", t.place(op), op, count=int((~mask.any(-1)).sum()), rows=mask[..., 0].numel())
                return


def ignored(mask: Tensor) -> Tensor:
    """Where a padding mask of torch's attention leaves a key out: True, or minus infinity."""
    return mask if mask.dtype == torch.bool else mask < -1e4


def _first(t: Trial, made: Traced) -> Iterator[Finding]:
    tape = made.tape
    target = made.loss
    last = tape.made(target) if target is not None else None
    ancestors = tape.ancestors(last) if last is not None else {o.number for o in tape.ops}
    if any(bool((~i.isfinite()).any()) for i in made_inputs(t, made)):
        return  # the data's own: that is the data's finding
    loss_bad = target is not None and not bool(target.detach().isfinite().all())
    for number in sorted(ancestors):
        op = tape.ops[number]
        if op.finite or (op.name in MASKS - {"where"} and not _halved(op)) or not loss_bad or (op.inplace and op.name != "div_"):
            continue
        fresh = _inputs_finite(tape, op)
        if op.name == "softmax" and not fresh and _row_all_masked(op):
            yield t.found("numerics.fully_masked_row", t.place(op), op, count=_row_all_masked(op), rows=op.inputs[0][..., 0].numel())
            return
        if not fresh or (op.name in VIEWS and not _halved(op)):
            continue
        if op.name == "masked_fill" or op.name == "where":
            continue
        yield from _named(t, tape, op)
        return
    if loss_bad:
        criterion = made.criterion
        if criterion is not None and len(criterion.inputs) > 1 and not criterion.inputs[1].is_floating_point():
            return  # a mean over no label at all: the labels' finding
        return
    yield from _backward(t, made)


def made_inputs(t: Trial, made: Traced) -> Iterator[Tensor]:
    from groundup.checking.tape import tensors

    return (i for i in tensors(made.batch) if i.is_floating_point())


def _halved(op: Op) -> bool:
    return any(o.dtype == torch.float16 for o in op.outputs)


def _row_all_masked(op: Op) -> int:
    x, dim = op.inputs[0].detach(), op.argument(1, "dim", -1)
    return int((x == float("-inf")).all(dim if isinstance(dim, int) else -1).sum())


def _named(t: Trial, tape: Tape, op: Op) -> Iterator[Finding]:
    x = op.inputs[0].detach() if op.inputs else None
    place = t.place(op)
    if _halved(op) and any(isinstance(a, (int, float)) and -math.inf < a < -65504 for a in (*op.args, *op.kwargs.values())):
        yield t.found("numerics.fp16_mask_value", place, op, what=op.name, value=_value(op))
    elif _halved(op) and any(bool(o.detach().isinf().any()) or bool(o.detach().isnan().any()) for o in op.outputs):
        largest = max((float(i.detach().float().abs().max()) for i in op.inputs if i.numel()), default=math.nan)
        yield t.found("numerics.fp16_overflow", place, op, what=op.name, largest=largest)
    elif op.name in LOGS and x is not None:
        yield t.found("numerics.log_zero", place, op, what=op.name, lowest=float(x.min()), count=int((x <= 0).sum()))
    elif op.name in EXPS and x is not None:
        yield t.found("numerics.exp_overflow", place, op, what=op.name, largest=float(x.max()))
    elif op.name in ("div", "div_", "reciprocal", "rsqrt") and op.inputs:
        below = op.inputs[-1]
        source = tape.ops[op.sources[-1]] if op.sources[-1] is not None else None
        origin = tape.origin(source, VIEWS | {"clamp", "add"}) if source is not None else None
        name = origin.name if origin is not None else "the divisor"
        if (
            op.name == "div"
            and source is not None
            and (
                (origin is not None and origin.name == "exp")
                or (source.name == "sum" and "exp" in {tape.ops[i].name for i in tape.ancestors(source)})
            )
        ):
            yield t.found(
                "numerics.exp_overflow", place, op, what="exp", largest=float(x.detach().abs().max()) if x is not None else math.nan
            )
        else:
            yield t.found("numerics.div_by_zero_std", place, op, what=name, zeros=int((below.detach() == 0).sum()))
    elif op.name in ("softmax", "scaled_dot_product_attention"):
        yield t.found("numerics.fully_masked_row", place, op, count=1, rows=1)
    elif op.name in ("sqrt", "pow", "norm"):
        yield t.found("numerics.sqrt_zero_grad", place, op, what=op.name, zeros=int((x <= 0).sum()) if x is not None else 0)
    elif op.name in ("sum", "mul", "cumsum", "matmul", "square", "prod") and x is not None:
        yield t.found("numerics.exp_overflow", place, op, what=op.name, largest=float(x.abs().max()))


def _backward(t: Trial, made: Traced) -> Iterator[Finding]:
    """The loss is finite, a gradient is not: the last operation in which the gradient was still finite behind it."""
    culprit, tape = _gradient_culprit(t, made)
    if culprit is None:
        return
    hidden = _hidden(tape, culprit)
    x = culprit.inputs[0].detach() if culprit.inputs else None
    place = t.place(culprit)
    if _halved(culprit):
        yield t.found(
            "numerics.fp16_overflow", place, culprit, what=culprit.name, largest=float(x.float().abs().max()) if x is not None else math.nan
        )
    elif hidden is not None:
        yield t.found("numerics.where_nan_grad", t.place(hidden), hidden, what=culprit.name, mask=hidden.name)
    elif culprit.name in ROOTS:
        zeros = int((culprit.outputs[0].detach() == 0).sum()) if culprit.outputs else 0
        yield t.found("numerics.sqrt_zero_grad", place, culprit, what=culprit.name, zeros=zeros)
    elif culprit.name in LOGS and x is not None:
        yield t.found("numerics.log_zero", place, culprit, what=culprit.name, lowest=float(x.min()), count=int((x <= 0).sum()))
    elif culprit.name in ("div", "div_"):
        yield t.found("numerics.div_by_zero_std", place, culprit, what="the divisor", zeros=int((culprit.inputs[-1].detach() == 0).sum()))
    elif culprit.name in EXPS and x is not None:
        yield t.found("numerics.exp_overflow", place, culprit, what=culprit.name, largest=float(x.max()))


def _hidden(tape: Tape, op: Op) -> Op | None:
    """The selection that hides what is not finite in this operation's result from the loss."""
    bad = not op.finite or any(bool((~o.detach().isfinite()).any()) for o in op.outputs)
    todo, seen = [op], set()
    while todo:
        one = todo.pop(0)
        for user in tape.users(one):
            if user.number in seen:
                continue
            seen.add(user.number)
            if user.name in SELECTS and user.finite and (bad or user.name in ("where", "masked_fill", "masked_fill_", "nan_to_num")):
                return user
            if not user.finite or user.name in VIEWS or user.name in ("mul", "add", "sub", "neg", "div"):
                todo.append(user)
        if len(seen) > 40:
            break
    return None


def _gradient_culprit(t: Trial, made: Traced) -> tuple[Op | None, Tape]:
    """The step again, with the gradient of every result looked at."""
    s = t.subject
    fine: dict[int, bool] = {}
    tape = Tape(s.model, values=True)
    from groundup.checking.tape import Silence

    with s.kept(), Silence():
        s.model.zero_grad(set_to_none=True)
        try:
            with tape:
                loss = s.train_step(s.model, made.batch, s.loss_fn, s.optimizer) if s.train_step is not None else s.loss(made.batch)
            if s.train_step is not None or not isinstance(loss, Tensor):
                return _guess(made), made.tape
            for op in tape.ops:
                for o in op.outputs:
                    if o.requires_grad and o.grad_fn is not None and not op.inplace:
                        o.register_hook(lambda g, n=op.number: fine.__setitem__(n, bool(g.isfinite().all())))
            leaves = {id(p): n for n, p in s.model.named_parameters()}
            loss.backward()
        except Exception:
            return None, tape
        suspects = []
        for op in reversed(tape.ops):
            if fine.get(op.number) is True:
                sources = [fine[n] for n in op.sources if n is not None and n in fine]
                direct = [p.grad for p in op.inputs if id(p) in leaves and p.grad is not None]
                if not all(sources) or (any(not bool(g.isfinite().all()) for g in direct) and op.name not in ("linear", "matmul")):
                    suspects.append(op)
        # An input may have its bad gradient from another of its uses: what can make one comes first.
        able = [op for op in suspects if op.name in ROOTS | LOGS | EXPS | {"div", "div_"}]
        if suspects:
            return (able or suspects)[0], tape
    return _guess(made), tape


def _guess(made: Traced) -> Op | None:
    return next(
        (
            op
            for op in made.tape.ops
            if op.name in ROOTS | LOGS and op.outputs and bool(((op.outputs[0].detach() == 0) | ~op.outputs[0].detach().isfinite()).any())
        ),
        None,
    )
