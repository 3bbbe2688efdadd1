"""Shapes: what a layer expects against what reaches it, what the loss is given, and whether samples stay apart."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.subject import first_tensor
from groundup.checking.tape import Op, Tape, tensors
from groundup.checking.trial import BINARY, CLASSES, NORMS, REGRESSION, Traced, Trial

CONV = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
POOL = {"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "boolean_dispatch", "fn"}
NORM_OPS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
SEQUENCE = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer)


def probe(t: Trial) -> Iterator[Finding]:
    if t.batch is None:
        return
    if single := _single(t):
        yield single
        return
    made = t.step
    found = list(_order(t, made)) + list(_views(t, made))
    yield from found
    if made.error is not None and made.tape.failed is not None and not found:
        yield from _failed(t, made, made.tape.failed)
    yield from _rows(t, made)
    yield from _loss(t, made)
    if made.loss is not None and made.loss.numel() > 1 and (not made.backward or "scalar outputs" in str(made.error)):
        yield t.found("loss.not_scalar", t.outside(), shape=made.loss.shape)


def _single(t: Trial) -> Finding | None:
    """The loader gives samples one by one, without an axis for the batch."""
    x, y = t.subject.pair(t.batch)
    x = first_tensor(x)
    loader = t.subject.train_loader
    if x is None or not isinstance(y, Tensor):
        return None
    unbatched = getattr(loader, "batch_size", 0) is None or not isinstance(loader, torch.utils.data.DataLoader)
    if y.dim() == 0 or (unbatched and y.dim() == 1 and x.dim() and x.shape[0] != y.shape[0]):
        return t.found("shape.missing_batch_dim", "train_loader", x=x.shape, y=y.shape)
    return None


def _failed(t: Trial, made: Traced, op: Op) -> Iterator[Finding]:
    """An operation refused its inputs: which layer, what it expects, what reaches it and where that came from."""
    layer = next((c for c in reversed(made.tape.stack or made.tape.failed_in) if c.path is not None), None)
    module = layer.module if layer is not None else None
    place = t.place(op)
    x = op.inputs[0] if op.inputs else None
    if x is None:
        return
    if op.name in ("linear", "matmul", "addmm") and len(op.inputs) > 1 and x.dtype == op.inputs[1].dtype:
        yield from _linear(t, made, op, module, place, x)
    elif op.name in CONV and isinstance(module, nn.modules.conv._ConvNd) and x.dtype == module.weight.dtype:
        channels = x.shape[1] if x.dim() > 2 else x.shape[0]
        spatial = tuple(x.shape[2:])
        if channels != module.in_channels:
            if x.shape[-1] == module.in_channels and _untouched(made.tape, op):
                yield t.found("shape.channels_last", "train_loader", op, layer=place, shape=x.shape, channels=module.in_channels)
            else:
                yield t.found(
                    "shape.conv_in_channels", place, op, layer=place, expected=module.in_channels, received=channels, shape=x.shape,
                    write=_written(module, in_channels=channels),
                )  # fmt: skip
        else:
            yield t.found("shape.kernel_too_large", place, op, layer=place, size="x".join(map(str, spatial)), kernel=module.kernel_size)
    elif op.name in POOL or "pool" in op.name or isinstance(module, (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)):
        kernel = getattr(module, "kernel_size", None) or op.argument(1, "kernel_size")
        size = "x".join(map(str, x.shape[2:]))
        yield t.found("shape.kernel_too_large", place, op, layer=place, size=size, kernel=kernel)
    elif op.name in NORM_OPS or isinstance(module, NORMS):
        expected: Any = next((getattr(module, n) for n in ("num_features", "normalized_shape", "num_channels") if hasattr(module, n)), "?")
        real = x.shape[-1] if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else x.shape[1] if x.dim() > 1 else x.shape[0]
        if not (t.size == 1 and "more than 1 value" in str(made.error)):
            yield t.found("shape.norm_features", place, op, layer=place, expected=expected, received=real, shape=x.shape)
    elif op.name in ("add", "add_", "sub") and len(op.inputs) > 1 and not _position(made.tape, op):
        a, b = op.shapes[0], op.shapes[1]
        outer = t.place(op)
        yield t.found("shape.residual_mismatch", outer, op, layer=outer, a=a, b=b, channels=_differ(a, b))
    elif isinstance(module, nn.RNNBase) and x.shape[-1] != module.input_size:
        yield t.found(
            "shape.linear_in_features", place, op, layer=place, expected=module.input_size, received=x.shape[-1], shape=x.shape,
            because="", because_zh="", write=f"input_size={x.shape[-1]}",
        )  # fmt: skip


def _position(tape: Tape, op: Op) -> bool:
    """Whether one side of this sum is a table of positions: a parameter or buffer, or a slice or a look-up of one."""
    for tensor, source in zip(op.inputs, op.sources):
        made = tape.ops[source] if source is not None else None
        made = tape.origin(made) if made is not None else None
        own = source is None and isinstance(tensor, nn.Parameter)
        if own or (source is not None and made is None and _from_table(tape, tape.ops[source])):
            return True
    return False


def _from_table(tape: Tape, op: Op) -> bool:
    while op.sources and op.sources[0] is not None:
        op = tape.ops[op.sources[0]]
    kept = {id(p) for p in [*tape.model.parameters(), *tape.model.buffers()]}
    return bool(op.inputs) and id(op.inputs[0]) in kept


def _differ(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    return ", ".join(f"{p} / {q}" for p, q in zip(a, b) if p != q) or f"{a} / {b}"


def _untouched(tape: Tape, op: Op) -> bool:
    return op.sources[0] is None or tape.origin(tape.ops[op.sources[0]]) is None


def _written(module: nn.Module, **changed: Any) -> str:
    """The layer as one would write it, with other arguments."""
    if isinstance(module, nn.Linear):
        return f"nn.Linear({changed.get('in_features', module.in_features)}, {module.out_features})"
    if isinstance(module, nn.modules.conv._ConvNd):
        size = module.kernel_size[0] if len(set(module.kernel_size)) == 1 else module.kernel_size
        return f"nn.{type(module).__name__}({changed.get('in_channels', module.in_channels)}, {module.out_channels}, {size})"
    return type(module).__name__


def _linear(t: Trial, made: Traced, op: Op, module: nn.Module | None, place: str, x: Tensor) -> Iterator[Finding]:
    expected = module.in_features if isinstance(module, nn.Linear) else op.inputs[1].shape[-1 if op.name == "linear" else 0]
    received, n = x.shape[-1], t.size
    flat = prod(x.shape[1:])
    write = _written(module, in_features=received) if isinstance(module, nn.Linear) else ""
    view = _moved(made.tape, op, n)
    if view is not None and x.dim() == 2 and x.shape[0] != n:
        yield t.found("shape.batch_dim_changed", "forward", view, layer=place, view=view.name, before=n, after=x.shape[0], shape=x.shape)
        return
    if x.dim() > 2 and (flat == expected or _image(made.tape, op, x)):
        yield t.found("shape.missing_flatten", place, op, layer=place, shape=x.shape, expected=expected, flat=flat, received=received)
        return
    because, because_zh = _arithmetic(made, op)
    yield t.found(
        "shape.linear_in_features", place, op, layer=place, expected=expected, received=received, shape=x.shape, because=because, because_zh=because_zh,
        write=write or f"in_features={received}",
    )  # fmt: skip


def _image(tape: Tape, op: Op, x: Tensor) -> bool:
    """Feature maps or pictures as they are, not sequences of features."""
    if x.dim() >= 4:
        return True
    source = tape.source(op)
    origin = tape.origin(source) if source is not None else None
    return origin is not None and (origin.name in CONV or "pool" in origin.name)


def _moved(tape: Tape, op: Op, n: int) -> Op | None:
    """The view that took the batch axis into another one, among what led to this operation."""
    number = op.sources[0]
    numbers = sorted(tape.ancestors(tape.ops[number])) if number is not None else []
    for i in numbers:
        made = tape.ops[i]
        if made.name in ("view", "reshape", "flatten") and made.shapes[0][:1] == (n,) and made.outputs[0].shape[:1] != (n,):
            return made
    return None


def _arithmetic(made: Traced, op: Op) -> tuple[str, str]:
    """'5408 = 32 x 13 x 13 (conv1 makes 26 x 26, pool makes 13 x 13)': where a number of features comes from."""
    x = op.inputs[0]
    flattened = made.tape.ops[op.sources[0]] if op.sources[0] is not None else None
    if flattened is None or flattened.name not in ("view", "reshape", "flatten") or len(flattened.shapes[0]) < 3:
        rnn = made.tape.origin(flattened) if flattened is not None else None
        if rnn is not None and rnn.name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return " (a bidirectional layer gives both directions side by side)", "（双向层会把两个方向拼在一起）"
        return "", ""
    shape = flattened.shapes[0][1:]
    steps = []
    for call in made.tape.calls:
        out = call.output
        if call.end >= 0 and call.path and isinstance(out, Tensor) and out.dim() > 2 and not list(call.module.children()) and (
            isinstance(call.module, nn.modules.conv._ConvNd) or "Pool" in type(call.module).__name__
        ):  # fmt: skip
            steps.append((call.path, " x ".join(map(str, out.shape[2:]))))
    made_en = ", ".join(f"{p} makes {s}" for p, s in steps)
    made_zh = "，".join(f"{p} 得到 {s}" for p, s in steps)
    sum_ = f" = {' x '.join(map(str, shape))}" if prod(shape) == x.shape[-1] else ""
    return sum_ + (f" ({made_en})" if steps else ""), sum_ + (f"（{made_zh}）" if steps else "")


def _order(t: Trial, made: Traced) -> Iterator[Finding]:
    """Recurrent and attention layers that take the first axis for time while it is the batch."""
    n = t.size
    for call in made.tape.calls:
        module = call.module
        if not isinstance(module, SEQUENCE) or call.path is None or n < 2:
            continue
        attention = module if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) else next(
            (m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None
        )  # fmt: skip
        x = next(tensors(call.args), None)
        if attention is None or attention.batch_first or x is None or x.dim() != 3 or x.shape[0] != n:
            continue
        if x.shape[1] == n and not _batch_axis_first(t, made, x):
            continue
        yield t.found("shape.batch_first", f"model.{call.path}", layer=f"model.{call.path}", shape=x.shape, kind=type(module).__name__)
        return


def _batch_axis_first(t: Trial, made: Traced, x: Tensor) -> bool:
    """As many samples as steps: nothing has swapped the two axes since they left the loader."""
    op = made.tape.made(x)
    numbers = made.tape.ancestors(op) if op is not None else set()
    return not any(made.tape.ops[i].name in ("transpose", "permute", "movedim", "T", "swapdims") for i in numbers)


def _views(t: Trial, made: Traced) -> Iterator[Finding]:
    """`view` or `reshape` that gives the axes another order: the numbers stay where they are, their meaning moves."""
    for op in made.tape.ops:
        if op.name not in ("view", "reshape") or not op.outputs or op.module is None:
            continue
        module = t.subject.model.get_submodule(op.module)
        if type(module).__module__.startswith("torch."):
            continue
        before, after = op.shapes[0], tuple(op.outputs[0].shape)
        if _reorders(before, after):
            yield t.found("shape.view_as_permute", t.place(op, "forward"), op, view=op.name, before=before, after=after)
            return


def _reorders(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether an axis of the same size stands behind another amount of numbers than before, in the finest groups that the two shapes share."""
    a, b = [s for s in before if s > 1], [s for s in after if s > 1]
    i = j = 0
    while i < len(a) and j < len(b):
        left, right, p, q = [a[i]], [b[j]], a[i], b[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                if i == len(a):
                    return False
                p *= a[i]
                left.append(a[i])
                i += 1
            else:
                if j == len(b):
                    return False
                q *= b[j]
                right.append(b[j])
                j += 1
        if len(left) > 1 and len(right) > 1:
            for size in set(left) & set(right):
                if left.count(size) == right.count(size) == 1 and prod(left[: left.index(size)]) != prod(right[: right.index(size)]):
                    return True
    return False


def _rows(t: Trial, made: Traced) -> Iterator[Finding]:
    """The model gives another number of rows than the batch has, after a view."""
    root = made.tape.root()
    x = next(tensors(root.args), None) if root is not None else None
    out = next(tensors(root.output), None) if root is not None and root.end >= 0 else None
    if root is None or x is None or out is None or not out.dim() or out.shape[0] == x.shape[0]:
        return
    last = made.tape.made(out)
    n = x.shape[0]
    for i in sorted(made.tape.ancestors(last)) if last is not None else ():
        op = made.tape.ops[i]
        if op.name in ("view", "reshape", "flatten") and op.shapes[0][:1] == (n,) and op.outputs[0].shape[:1] != (n,):
            after = out.shape[0]
            target = t.subject.pair(t.batch)[1]
            if isinstance(target, Tensor) and target.dim() and (target.numel() == after or target.shape[0] == after):
                continue  # the target has as many rows: tokens or pixels in one long axis
            layer = next((f"model.{c.path}" for c in made.tape.calls if c.at >= i and c.path), "forward")
            yield t.found("shape.batch_dim_changed", "forward", op, layer=layer, view=op.name, before=n, after=after, shape=out.shape)
            return


def _loss(t: Trial, made: Traced) -> Iterator[Finding]:
    op = made.criterion
    if op is None or len(op.inputs) < 2:
        yield from _differences(t, made)
        return
    x, y = op.inputs[0], op.inputs[1]
    a, b = op.shapes[0], op.shapes[1]
    place = "loss_fn" if t.subject.loss_fn is not None else t.outside(op)
    if op.name in REGRESSION | BINARY and a != b and _broadcasts(a, b):
        yield t.found(
            "shape.loss_broadcast", place, op, a=a, b=b, write="output.squeeze(-1)" if len(a) > len(b) else "target.unsqueeze(-1)"
        )
    elif op.name in CLASSES and not y.is_floating_point():
        if x.dim() == y.dim() and x.dim() > 1 and y.shape[1] == 1 and x.shape[0] == y.shape[0] and (x.shape[1] > 1):
            yield t.found("shape.target_ndim", "train_loader", op, target=b, output=a)
        elif x.dim() == y.dim() + 1 and x.dim() > 2 and a[:-1] == b and _classes_last(made.tape, op, a):
            yield t.found("shape.seq_logits_layout", t.outside(op), op, output=a, target=b, classes=a[-1])


def _classes_last(tape: Tape, op: Op, a: tuple[int, ...]) -> bool:
    if a[1] != a[-1]:
        return True
    source = tape.source(op)
    return source is not None and source.name == "linear"


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(a, b)
    except RuntimeError:
        return False
    return True


def _differences(t: Trial, made: Traced) -> Iterator[Finding]:
    """A loss written by hand: output minus target where one has (N, 1) and the other (N,)."""
    for op in made.tape.ops:
        if op.name in ("sub", "mul") and op.module is None and len(op.inputs) == 2 and op.outputs:
            a, b = op.shapes
            n = max(a[:1] + b[:1], default=0)
            if {len(a), len(b)} == {1, 2} and n > 1 and tuple(op.outputs[0].shape) == (n, n) and 1 in a + b:
                yield t.found("shape.loss_broadcast", t.outside(op), op, a=a, b=b, write="output.squeeze(-1)")
                return


# -- independence --------------------------------------------------------------------------------------------------------------
MIXING = {
    "softmax": (1, "dim"), "log_softmax": (1, "dim"), "mean": (1, "dim"), "sum": (1, "dim"), "std": (1, "dim"), "var": (1, "dim"), "normalize": (2, "dim"),
    "cumsum": (1, "dim"), "max": (1, "dim"), "amax": (1, "dim"), "norm": (2, "dim"), "roll": (2, "dims"), "flip": (1, "dims"), "sort": (1, "dim"),
}  # fmt: skip


def independence(t: Trial) -> Iterator[Finding]:
    """One sample is changed: the outputs of the others may not move (A. Karpathy, A Recipe for Training Neural Networks, 2019)."""
    if t.inputs is None or t.evaluated is None or any(f.finding_id == "shape.batch_first" for f in _order(t, t.step)):
        return
    args, kwargs = t.inputs
    tape, output = t.evaluated
    n = t.size
    out = next((o for o in tensors(output) if o.is_floating_point()), None)
    x = next((a for a in tensors((args, kwargs)) if a.dim() and a.shape[0] == n), None)
    if out is None or x is None or n < 3 or not out.dim() or out.shape[0] != n or any(
        a.dim() == 2 and a.shape[0] == a.shape[1] == n for a in tensors((args, kwargs))
    ):  # fmt: skip
        return
    # The loader's other tensors (masks, lengths) stay: only the first is changed, to another sample's values.
    changed = x.clone()
    changed[0] = x[n // 2] if not torch.equal(x[0], x[n // 2]) else x[n - 1]
    if torch.equal(changed[0], x[0]):
        return
    swap = {id(x): changed}
    other, moved = t.forward(*_replaced((args, kwargs), swap), tape=True)
    result = next(o for o in tensors(moved) if o.is_floating_point())
    scale = float(out.abs().max()) + 1e-12
    difference = (out - result)[1:].abs().flatten(1).amax(1) if out.dim() > 1 else (out - result)[1:].abs()
    if float(difference.max()) <= 1e-4 * scale or not bool(out.isfinite().all()):
        return
    _, again = t.forward(args, kwargs, tape=True)
    if float((next(o for o in tensors(again) if o.is_floating_point()) - out).abs().max()) > 1e-5 * scale:
        return  # random in itself
    culprit = next((p for p, q in zip(tape.ops, other.ops) if p.name == q.name and _mixes(p, q, n)), None)
    if culprit is None or (
        culprit.name in ("batch_norm", "matmul", "mm", "index_add", "scatter_add") and not t.place(culprit).endswith("forward")
    ):
        return
    dim = culprit.argument(*MIXING[culprit.name]) if culprit.name in MIXING else None
    shown = f"{culprit.name}(dim={dim})" if dim is not None else culprit.name
    yield t.found("shape.batch_mixing", t.place(culprit), culprit, what=shown, moved=int((difference > 1e-4 * scale).sum()), others=n - 1)


def _replaced(value: Any, swap: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, dict):
        return {k: _replaced(v, swap) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_replaced(v, swap) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _mixes(a: Op, b: Op, n: int) -> bool:
    """Whether rows of this operation's result moved that belong to other samples."""
    for p, q in zip(a.outputs, b.outputs):
        if p.is_floating_point() and p.shape == q.shape and p.dim() and p.shape[0] == n:
            moved = (p - q)[1:].abs()
            if float(moved.max() if moved.numel() else 0.0) > 1e-5 * (float(p.abs().max()) + 1e-12):
                return True
            continue
        # The batch axis has gone: a statistic over it.
        over = p.is_floating_point() and any(i.is_floating_point() and i.dim() and i.shape[0] == n for i in a.inputs)
        if over and p.shape == q.shape and p.dim() and p.numel() and n not in p.shape and not torch.equal(p, q):
            return True
    return False
