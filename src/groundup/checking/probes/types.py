"""Types of numbers and devices: what a layer or a loss is given against what it takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.subject import first_tensor
from groundup.checking.tape import TORCH
from groundup.checking.trial import BINARY, CLASSES, Trial

WEIGHTED = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "matmul",
    "addmm",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "bilinear",
    "conv_transpose2d",
}
FACTORIES = {
    "zeros",
    "ones",
    "arange",
    "full",
    "rand",
    "randn",
    "eye",
    "linspace",
    "empty",
    "tensor",
    "randint",
    "randperm",
    "tril_indices",
    "triu_indices",
}


def probe(t: Trial) -> Iterator[Finding]:
    made = t.step
    op, error = made.tape.failed, str(made.error or "")
    x = first_tensor(t.subject.pair(t.batch)[0]) if t.batch is not None else None
    if op is not None and op.name not in CLASSES | BINARY:
        given = op.inputs[0].dtype if op.inputs else None
        if op.name == "embedding" and op.inputs and any(i.is_floating_point() for i in op.inputs[:1]):
            yield t.found("dtype.embedding_float_ids", t.place(op), op, layer=t.place(op), given=given)
        elif x is not None and given is not None and ("dtype" in error or "type" in error or "Float" in error or "Byte" in error):
            if x.dtype == torch.float64 and any(i.dtype in (torch.float32, torch.float16) for i in op.inputs):
                yield t.found("dtype.float64_inputs", "train_loader", op, layer=t.place(op), given=x.dtype)
            elif not x.is_floating_point() and any(i.is_floating_point() for i in op.inputs) and not given.is_floating_point:
                yield t.found("dtype.int_inputs", "train_loader", op, layer=t.place(op), given=x.dtype)
    op = made.criterion
    if op is None or len(op.inputs) < 2:
        return
    output, target = op.inputs[0], op.inputs[1]
    if op.name in CLASSES:
        if target.is_floating_point() and target.dim() == output.dim() - 1 and (output.dim() < 2 or target.shape[0] == output.shape[0]):
            yield t.found("dtype.class_labels_float", "train_loader", op, given=target.dtype, shape=target.shape)
        elif (
            not target.is_floating_point()
            and target.shape == output.shape
            and target.dim() > 1
            and output.shape[1] > 1
            and _one_hot(target)
        ):
            yield t.found("dtype.onehot_int_labels", "train_loader", op, shape=target.shape, given=target.dtype)
    elif op.name in BINARY and not target.is_floating_point():
        yield t.found("dtype.bce_int_targets", "train_loader", op, given=target.dtype, loss=op.name)
    elif made.error is not None and output.dtype != target.dtype and target.dtype == torch.float64:
        yield t.found("dtype.float64_inputs", "train_loader", op, layer="loss_fn", given=target.dtype)


def _one_hot(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all()) and bool((target.sum(1) == 1).all())


def devices(t: Trial) -> Iterator[Finding]:
    """What would fail or be lost on another device than the CPU."""
    made = t.step
    used = {id(i) for op in made.tape.ops for i in op.inputs}
    for name, module in t.subject.model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") and attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for tensor in _plain(value):
                if id(tensor) in used and not tensor.requires_grad and tensor.dim() and not isinstance(tensor, nn.Parameter) and not any(
                    tensor is b for b in t.subject.model.buffers()
                ):  # fmt: skip
                    place = f"model.{name}.{attribute}" if name else f"model.{attribute}"
                    yield t.found("device.tensor_not_buffer", place, name=attribute, shape=tensor.shape)
                    break
    seen: set[tuple[str, int]] = set()
    for op in made.tape.ops:
        if (
            op.name not in FACTORIES or op.module is None or "device" in op.kwargs or op.file.startswith(TORCH) or "site-packages" in op.file
            or (op.file, op.line) in seen or not op.outputs or op.outputs[0].dim() == 0 or _within(t, op)
        ):  # fmt: skip
            continue
        users = made.tape.users(op)
        if users and all(u.name in ("to", "type_as", "cuda", "__getitem__") or _only_index(u, op.outputs[0]) for u in users[:1]):
            continue
        seen.add((op.file, op.line))
        yield t.found("device.tensor_created_on_cpu", "forward", op, call=f"torch.{op.name}", line=op.line)


def _only_index(user: object, tensor: Tensor) -> bool:
    return getattr(user, "name", "") == "setitem_" and getattr(user, "inputs", [None])[0] is not tensor


def _within(t: Trial, op: object) -> bool:
    """Whether the line itself names the device, as `torch.arange(n).to(x.device)` or a default device."""
    file, line = getattr(op, "file", ""), getattr(op, "line", 0)
    try:
        with open(file, encoding="utf-8") as text:
            lines = text.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    shown = lines[line - 1] if 0 < line <= len(lines) else ""
    try:
        tree = ast.parse(shown.strip())
    except SyntaxError:
        return "device" in shown
    return any(
        (isinstance(n, ast.Attribute) and n.attr in ("device", "to", "type_as", "cuda"))
        or (isinstance(n, ast.keyword) and n.arg == "device")
        for n in ast.walk(tree)
    )


def _plain(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Tensor):
                yield part
    elif isinstance(value, dict):
        for part in value.values():
            if isinstance(part, Tensor):
                yield part
