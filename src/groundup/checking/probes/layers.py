"""The model by itself: layers that follow each other, initial weights, what is registered and what is shared."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.probes.labels import classes_of
from groundup.checking.tape import VIEWS, Op
from groundup.checking.trial import BATCH_NORM, Trial

LINEAR = {"linear", "conv1d", "conv2d", "conv3d", "addmm", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
HARMLESS = VIEWS | {"dropout", "dropout2d", "dropout1d", "feature_dropout", "batch_norm", "layer_norm", "group_norm", "avg_pool2d", "adaptive_avg_pool2d",
                    "avg_pool1d", "adaptive_avg_pool1d"}  # fmt: skip


def _layer(t: Trial, op: Op) -> nn.Module | None:
    return t.subject.model.get_submodule(op.module) if op.module is not None else None


def architecture(t: Trial) -> Iterator[Finding]:
    made = t.step
    reported = False
    for op in made.tape.ops:
        if op.module is None or not op.inputs:
            continue
        module = _layer(t, op)
        source = made.tape.source(op)
        if op.name in LINEAR and source is not None and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not reported:
            before = made.tape.origin(source, HARMLESS)
            if before is not None and before.name in LINEAR and before is not op and len(made.tape.users(before)) == 1:
                first = _layer(t, before)
                if isinstance(first, (nn.Linear, nn.modules.conv._ConvNd)) and first is not module and not _factored(first, module):
                    a, b = f"model.{before.module}", f"model.{op.module}"
                    yield t.found("model.missing_nonlinearity", b, op, first=a, second=b)
                    reported = True
        if (
            op.name in ("batch_norm", "instance_norm")
            and source is not None
            and isinstance(module, (BATCH_NORM, nn.modules.instancenorm._InstanceNorm))
        ):
            before = made.tape.origin(source)
            first = _layer(t, before) if before is not None and before.name in LINEAR else None
            if before is None or not isinstance(first, (nn.Linear, nn.modules.conv._ConvNd)) or first.bias is None:
                continue
            if first.bias.requires_grad and (module.training or module.running_mean is None) and len(made.tape.users(before)) == 1:
                layer = f"model.{before.module}"
                yield t.found("model.bias_before_norm", layer, op, layer=layer, norm=f"model.{op.module}")


def _factored(first: nn.Module, second: nn.Module) -> bool:
    """A product of two thin matrices, or a depthwise and a pointwise convolution: meant to be linear."""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.out_features < first.in_features and second.in_features < second.out_features
    for layer in (first, second):
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
            return True
    if isinstance(first, nn.modules.conv._ConvNd) and isinstance(second, nn.modules.conv._ConvNd):
        return first.out_channels < first.in_channels and second.in_channels < second.out_channels
    return False


# -- initial weights -------------------------------------------------------------------------------------------------------------
def _rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt()) if x.numel() else 0.0


def initial(t: Trial) -> Iterator[Finding]:
    made = t.step
    if made.error is not None:
        return
    model = t.subject.model
    ran = {id(c.module) for c in made.tape.calls}
    # Matrices of layers that somebody wrote: what inputs are multiplied with, also turned around.
    multiplied = {id(i) for o in made.tape.ops if o.name in LINEAR | {"matmul", "T", "t", "mT", "transpose", "einsum"} for i in o.inputs}
    for name, p in model.named_parameters():
        if p.dim() < 2 or not p.requires_grad or "lora" in name.lower():
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        layered = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention))
        if id(owner) not in ran or not (layered or id(p) in multiplied):
            continue
        w, g = p.detach(), made.grads.get(name)
        layer = f"model.{name.rpartition('.')[0]}" if "." in name else "model"
        if not bool(w.any()):
            # Behind an output layer of zeros, which is common, gradients are zero in the first step only.
            if (g is not None and not bool(g.any()) and name in t.trained.unchanged) or _many_zero(model):
                yield t.found("init.zeros", layer, layer=layer, name=name)
                return
        elif (w.shape[0] > 1 and bool((w == w.flatten()[0]).all()) and g is not None and _same_rows(g)) or (
            w.shape[0] > 1 and bool((w == w[:1]).all()) and g is not None and _same_rows(g)
        ):
            yield t.found("init.constant", layer, layer=layer, name=name, value=float(w.flatten()[0]))
            return
    yield from _gains(t)


def _many_zero(model: nn.Module) -> bool:
    """All matrices of the model are zero."""
    found = [p for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad]
    return len(found) > 1 and not any(bool(p.any()) for p in found)


def _same_rows(g: Tensor) -> bool:
    flat = g.flatten(1)
    return bool(torch.allclose(flat, flat[:1].expand_as(flat), rtol=1e-4, atol=1e-7))


def _gains(t: Trial) -> Iterator[Finding]:
    made = t.step
    gains: list[tuple[str, Op, float, float]] = []
    for op in made.tape.ops:
        weighted = any(isinstance(i, nn.Parameter) and i.dim() > 1 for i in op.inputs[1:])
        if op.name in LINEAR and op.module is not None and op.outputs and weighted:
            into, out = _rms(op.inputs[0]), _rms(op.outputs[0])
            gains.append((op.module, op, out / into if into > 0 else 1.0, out))
    criterion = made.criterion
    if not gains:
        return
    if any(not math.isfinite(g[3]) for g in gains):
        gains = [g for g in gains if math.isfinite(g[3])]
    scales = {
        g[1].number: float(_weight(t, g[1]).std()) * _weight(t, g[1])[0].numel() ** 0.5 for g in gains if _weight(t, g[1]).numel() > 1
    }
    high = [g for g in gains if g[2] > 2.2 and scales.get(g[1].number, 0.0) > 2.2]
    chained = not any(
        o.name in ("add", "add_", "layer_norm", "batch_norm", "group_norm", "rms_norm") and o.module is not None for o in made.tape.ops
    )
    low = [g for g in gains if min(g[2], scales.get(g[1].number, 1.0)) < (0.12 if chained else 0.03)]
    top = max(g[3] for g in gains) if gains else 0.0
    data = _rms(gains[0][1].inputs[0]) if gains else 1.0
    if (len(high) >= 2 or any(g[2] > 5 for g in high[:1] if g is not gains[-1])) and top > 10 * max(1.0, data):
        yield t.found(
            "init.exploding", f"model.{high[0][0]}", high[0][1], layer=f"model.{high[0][0]}", gain=high[0][2], top=top,
            std=float(_weight(t, high[0][1]).std()), layers=len(high),
        )  # fmt: skip
    elif len(low) >= 2 and len(low) >= 0.5 * len(gains) and data > 1e-2:
        bottom = min(g[3] for g in gains)
        yield t.found(
            "init.vanishing", f"model.{low[0][0]}", low[0][1], layer=f"model.{low[0][0]}", gain=low[0][2], bottom=bottom,
            std=float(_weight(t, low[0][1]).std()), layers=len(low),
        )  # fmt: skip
    if criterion is not None and criterion.outputs and criterion.name in ("cross_entropy", "binary_cross_entropy_with_logits"):
        outputs = classes_of(criterion) if criterion.name == "cross_entropy" else 2
        expected, value = math.log(max(outputs, 2)), criterion.outputs[0].detach().float()
        first = float(value.mean())
        plain = (
            criterion.kwargs.get("reduction", "mean") != "sum"
            and criterion.kwargs.get("weight") is None
            and criterion.kwargs.get("pos_weight") is None
        )
        last = made.tape.origin(made.tape.source(criterion)) if made.tape.source(criterion) is not None else None
        if plain and math.isfinite(first) and first > 1.5 * expected + 1.0:
            yield t.found("init.initial_loss", t.place(last, "model"), last, first=first, expected=expected, classes=outputs)


def _weight(t: Trial, op: Op) -> Tensor:
    return next((i.detach() for i in op.inputs[1:] if i.dim() > 1), op.inputs[0].detach())


# -- registration ----------------------------------------------------------------------------------------------------------------
def registration(t: Trial) -> Iterator[Finding]:
    model = t.subject.model
    known = {id(p) for p in model.parameters()}
    modules = {id(m) for m in model.modules()}
    made = t.step
    used = {id(i) for op in made.tape.ops for i in op.inputs}
    for name, module in model.named_modules():
        at = f"model.{name}" if name else "model"
        for attribute, value in list(vars(module).items()):
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            lost = [v for v in _inside(value) if _lost(v, known)]
            if lost:
                count = sum(p.numel() for v in lost for p in (v.parameters() if isinstance(v, nn.Module) else [v]))
                kind = "nn.ModuleDict" if isinstance(value, dict) else "nn.ModuleList"
                if all(isinstance(v, nn.Parameter) for v in lost):
                    kind = "nn.ParameterDict" if isinstance(value, dict) else "nn.ParameterList"
                yield t.found(
                    "grad.unregistered_modules", f"{at}.{attribute}", attribute=attribute, kind=kind, count=count, held=type(value).__name__
                )
            elif (
                isinstance(value, Tensor)
                and value.requires_grad
                and id(value) not in known
                and (id(value) in used or value.grad_fn is not None)
            ):
                if value.grad_fn is not None and id(value) not in used:
                    continue
                if isinstance(value, nn.Parameter):
                    continue
                yield t.found(
                    "grad.parameter_not_registered",
                    f"{at}.{attribute}",
                    attribute=attribute,
                    made=str(value.grad_fn).split("Backward")[0].strip("<"),
                )
        children = list(module.children())
        held = [c for c in module._modules.values() if c is not None and any(True for _ in c.parameters())]
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and len({id(c) for c in held}) < len(held):
            yield t.found(
                "grad.shared_module", at, container=at, entries=len(held), objects=len({id(c) for c in held}), children=len(children)
            )
    created = [
        c
        for c in made.tape.calls
        if id(c.module) not in modules and c.path is None and c.at >= 0 and any(True for _ in c.module.parameters())
    ]
    yield from _created(t, created)
    yield from _tied(t)
    yield from _converted(t)


def _inside(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, (list, tuple, set)):
        for part in value:
            if isinstance(part, (nn.Module, nn.Parameter)):
                yield part
            elif depth < 2:
                yield from _inside(part, depth + 1)
    elif isinstance(value, dict):
        yield from _inside(list(value.values()), depth)
    elif depth == 0 and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and type(value).__module__.split(".")[0] not in (
        "torch", "transformers", "lightning", "pytorch_lightning"
    ):  # fmt: skip
        yield from (v for v in vars(value).values() if isinstance(v, (nn.Module, nn.Parameter)))


def _lost(value: Any, known: set[int]) -> bool:
    if isinstance(value, nn.Parameter):
        return id(value) not in known and value.requires_grad
    parameters = list(value.parameters())
    return bool(parameters) and not any(id(p) in known for p in parameters) and any(p.requires_grad for p in parameters)


def _created(t: Trial, calls: list[Any]) -> Iterator[Finding]:
    """Layers that run in the forward pass, belong to nobody, and are other objects the next time."""
    root = t.step.tape.root()
    if root is None or not calls or root.end < 0:
        return
    inside = [c for c in calls if root.at <= c.at <= root.end]
    if not inside or t.evaluated is None:
        return
    again = {id(c.module) for c in t.evaluated[0].calls}
    fresh = [c for c in inside if id(c.module) not in again]
    held = {id(v) for m in t.subject.model.modules() for value in vars(m).values() for v in _inside([value])}
    fresh = [c for c in fresh if id(c.module) not in held]
    if fresh:
        op = next((o for o in t.step.tape.ops[fresh[0].at :]), None)
        yield t.found("grad.module_created_in_forward", "forward", op, kind=type(fresh[0].module).__name__)


def _tied(t: Trial) -> Iterator[Finding]:
    named = [(n, p) for n, p in t.subject.model.named_parameters() if p.dim() == 2 and p.requires_grad and p.numel() >= 8]
    shapes: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
    for n, p in named:
        shapes.setdefault(tuple(sorted(p.shape)), []).append((n, p))
    for group in shapes.values():
        for i, (a, p) in enumerate(group):
            for b, q in group[i + 1 :]:
                if float(p.detach().std()) < 1e-8 or p.data_ptr() == q.data_ptr() or _siblings(a, b):
                    continue
                same = p.shape == q.shape and torch.equal(p, q)
                turned = p.shape == q.shape[::-1] and torch.equal(p, q.T)
                if same or turned:
                    left, right = f"model.{a.rpartition('.')[0]}", f"model.{b.rpartition('.')[0]}"
                    yield t.found(
                        "grad.tie_broken",
                        left,
                        first=left,
                        second=right,
                        write=f"{right}.{b.rpartition('.')[2]} = {left}.{a.rpartition('.')[2]}",
                    )
                    return


def _siblings(a: str, b: str) -> bool:
    """Copies of a layer in a numbered list, which torch's own containers make: 'layers.0.x' and 'layers.1.x'."""
    p, q = a.split("."), b.split(".")
    return len(p) == len(q) and all(x == y or (x.isdigit() and y.isdigit()) for x, y in zip(p, q))


def _converted(t: Trial) -> Iterator[Finding]:
    """`self.scale = nn.Parameter(...).to(device)`: on another device or type this is no parameter any more."""
    seen: set[type] = set()
    for name, module in t.subject.model.named_modules():
        kind = type(module)
        if kind in seen or kind.__module__.startswith(("torch.", "transformers.")):
            continue
        seen.add(kind)
        tree = t.subject.source(kind.__init__)
        for node in ast.walk(tree) if tree is not None else ():
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)):
                continue
            call, target = node.value.func, node.targets[0]
            inner = call.value
            if (
                call.attr in ("to", "cuda", "half", "double", "float") and isinstance(inner, ast.Call) and isinstance(target, ast.Attribute)
                and ast.unparse(inner.func).endswith("Parameter")
            ):  # fmt: skip
                at = f"model.{name}.{target.attr}" if name else f"model.{target.attr}"
                held = getattr(module, target.attr, None)
                if not (isinstance(held, Tensor) and held.grad_fn is not None):
                    yield t.found("grad.parameter_not_registered", at, attribute=target.attr, made=f".{call.attr}()")
