"""Gradients: which parameters get none and where the graph was cut, what never fires, what vanishes or explodes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.tape import TORCH, Op, Tape
from groundup.checking.trial import Traced, Trial

CUTS = {"detach", "detach_", "numpy", "item", "tolist", "data"}
HARD = {
    "argmax",
    "argmin",
    "eq",
    "ne",
    "gt",
    "lt",
    "ge",
    "le",
    "bool",
    "long",
    "int",
    "argsort",
    "multinomial",
    "bernoulli",
    "one_hot",
    "isclose",
}
FLAT = {"round", "sign", "floor", "ceil", "trunc", "heaviside", "sgn", "fix", "round_", "sign_", "floor_divide", "div"}
SATURATE = {"sigmoid", "tanh", "sigmoid_", "tanh_", "hardtanh", "hardsigmoid", "softsign", "rnn_tanh"}


def probe(t: Trial) -> Iterator[Finding]:
    made = t.step
    model = t.subject.model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained or t.batch is None:
        return
    yield from _data_attribute(t, made)
    if made.error is not None:
        if "scalar outputs" in str(made.error):
            return
        yield from _errors(t, made)
    if any("None of the inputs have requires_grad" in w for w in made.warnings):
        op = next((o for o in made.tape.ops if not o.grad_enabled and o.module is not None), None)
        names = [n for n in trained if n not in made.grads]
        if names:
            yield t.found("lm.checkpoint_no_grad", "forward", op, names=[f"model.{n}" for n in names[:4]])
            return
    if made.error is not None and not made.backward and made.loss is None:
        return
    silent = [n for n in trained if n not in made.grads]
    zero = made.grads and all(not bool(g.any()) for g in made.grads.values())
    if made.loss is not None and (len(silent) == len(trained) or not made.loss.requires_grad):
        yield from _cut_off(t, made, made.loss)
    elif zero and (hard := _flat(made)) is not None:
        yield t.found("grad.non_differentiable", t.place(hard), hard, what=hard.name)
    elif silent and made.error is None:
        yield from _silent(t, made, silent)
    if made.error is None:
        yield from _dead(t)
        yield from _sizes(t, made)
    yield from _second(t)


def _last_loss(made: Traced) -> Op | None:
    return made.tape.made(made.loss) if made.loss is not None else None


def _cut_off(t: Trial, made: Traced, loss: Tensor) -> Iterator[Finding]:
    """The loss reaches no parameter: what is between them?"""
    tape = made.tape
    carries = {id(o) for op in tape.ops for o in op.outputs if o.requires_grad}
    last = _last_loss(made)
    ancestors = sorted(tape.ancestors(last), reverse=True) if last is not None else []
    outside = [op for op in tape.ops if op.name in ("tensor", "as_tensor", "from_numpy", "FloatTensor") and not op.file.startswith(TORCH)]
    for number in ancestors:
        op = tape.ops[number]
        lost = any(i.requires_grad and id(i) in carries for i in op.inputs) and op.outputs and not op.outputs[0].requires_grad
        if lost and op.grad_enabled:
            if op.name in HARD:
                yield t.found("grad.non_differentiable", t.place(op), op, what=op.name)
            elif op.name in CUTS:
                yield from _cut(t, made, op)
            elif op.name in ("tensor", "as_tensor"):
                yield t.found("grad.graph_rewrapped", t.place(op), op)
            else:
                yield t.found("grad.non_differentiable", t.place(op), op, what=op.name)
            return
    numbers = [
        op
        for op in tape.ops
        if op.name in ("item", "tolist", "numpy", "__float__", "detach", "data") and any(i.requires_grad for i in op.inputs)
    ]
    if outside and (last is None or any(o.number in ancestors for o in outside)):
        yield t.found("grad.graph_rewrapped", t.place(outside[-1], t.outside()), outside[-1])
    elif blind := next((c for c in tape.calls if not c.grad_enabled and any(p.requires_grad for p in c.module.parameters())), None):
        yield t.found(
            "mode.no_grad_in_training",
            t.outside() if blind.path == "" else "forward",
            next(iter(tape.ops[blind.at :]), None),
            module=f"model.{blind.path}" if blind.path else "model",
            names=[],
        )
    elif numbers:
        yield from _cut(t, made, numbers[-1])
    else:
        yield t.found("grad.detached", t.outside(last), last, what="the loss", cut=last.name if last is not None else "?", names=[])


def _cut(t: Trial, made: Traced, op: Op) -> Iterator[Finding]:
    names = [f"model.{n}" for n, p in t.subject.model.named_parameters() if p.requires_grad and n not in made.grads]
    yield t.found(
        "grad.detached",
        t.place(op),
        op,
        what=op.module or "model",
        cut=f".{op.name}" if op.name == "data" else f"{op.name}()",
        names=names[:4],
    )


def _flat(made: Traced) -> Op | None:
    for op in reversed(made.tape.ops):
        if op.name in FLAT and any(i.requires_grad for i in op.inputs) and (op.name != "div" or op.kwargs.get("rounding_mode")):
            return op
    return None


def _silent(t: Trial, made: Traced, silent: list[str]) -> Iterator[Finding]:
    """Some parameters get no gradient: their module never ran, ran without gradients, or its output was cut off."""
    model, tape = t.subject.model, made.tape
    used = {id(i) for op in tape.ops for i in op.inputs}
    ran = {id(c.module): c for c in tape.calls}
    unused: list[str] = []
    blind: list[str] = []
    cut: list[str] = []
    for name in silent:
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        parameter = model.get_parameter(name)
        call = ran.get(id(module))
        if call is None and id(parameter) not in used:
            unused.append(name)
        elif _blind(tape, module, parameter):
            blind.append(name)
        else:
            cut.append(name)
    if blind:
        first = blind[0].rpartition(".")[0]
        call = ran.get(id(model.get_submodule(first)))
        op = tape.ops[call.at] if call is not None and call.at < len(tape.ops) else None
        yield t.found("mode.no_grad_in_training", "forward", op, module=f"model.{first}", names=[f"model.{n}" for n in blind[:4]])
    if cut:
        places = [op for op in tape.ops if op.name in CUTS and any(i.requires_grad for i in op.inputs) and not op.file.startswith(TORCH)]
        lists = any(op.name in ("item", "tolist") and op.module is not None and any(i.requires_grad for i in op.inputs) for op in tape.ops)
        rewrapped = [
            op for op in tape.ops
            if op.name in ("tensor", "as_tensor") and op.module is not None and ((lists and not op.inputs) or any(i.requires_grad for i in op.inputs))
        ]  # fmt: skip
        shown = [f"model.{n}" for n in cut[:4]]
        first = cut[0].rpartition(".")[0]
        if rewrapped:
            yield t.found("grad.graph_rewrapped", t.place(rewrapped[0]), rewrapped[0])
        elif places:
            op = places[-1]
            yield t.found(
                "grad.detached",
                f"model.{first}",
                op,
                what=f"model.{first}",
                cut=f".{op.name}" if op.name == "data" else f"{op.name}()",
                names=shown,
            )
        elif (
            hard := next(
                (op for op in tape.ops if op.name in HARD and op.module is not None and any(i.requires_grad for i in op.inputs)), None
            )
        ) is not None:
            yield t.found("grad.non_differentiable", t.place(hard), hard, what=hard.name)
        else:
            unused += cut
    # A part that only some batches use (an expert, a random layer) is not unused.
    unused = [n for n in unused if "lora" not in n.lower() or id(model.get_parameter(n)) not in used]
    trained = sum(p.requires_grad for p in model.parameters())
    # A step that uses nothing of the model runs it where this probe does not look (a closure of LBFGS).
    if unused and len(unused) < trained and not _used_later(t, unused):
        modules = sorted({n.rpartition(".")[0] for n in unused}, key=len)
        first = modules[0]
        yield t.found("grad.unused_module", f"model.{first}" if first else f"model.{unused[0]}", names=[f"model.{n}" for n in unused[:4]],
                      module=f"model.{first or unused[0]}")  # fmt: skip


def _blind(tape: Tape, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Every operation with this parameter ran without gradients."""
    ops = [op for op in tape.ops if any(i is parameter for i in op.inputs)]
    if ops:
        return all(not op.grad_enabled for op in ops)
    calls = tape.runs(module)
    return bool(calls) and all(not c.grad_enabled for c in calls)


def _used_later(t: Trial, names: list[str]) -> bool:
    for batch in t.data.batches[1:4]:
        if t.subject.fit is not None or t.left < 0:
            return False
        grads = t.trace(batch).grads
        if any(n in grads and bool(grads[n].any()) for n in names):
            return True
    return False


def _data_attribute(t: Trial, made: Traced) -> Iterator[Finding]:
    for op in made.tape.ops:
        if (
            op.name in ("data", "data.set")
            and op.inputs
            and op.inputs[0].requires_grad
            and op.inputs[0].grad_fn is not None
            and not op.file.startswith(TORCH)
        ):
            users = made.tape.users(op)
            if op.name == "data.set" or any(u.inplace or u.outputs for u in users):
                yield t.found("grad.data_attribute", t.place(op), op)
                return


def _errors(t: Trial, made: Traced) -> Iterator[Finding]:
    text = str(made.error)
    if "inplace" in text or "in-place" in text:
        inplace = [op for op in made.tape.ops if op.inplace and not op.file.startswith(TORCH)]
        if made.tape.failed is not None and made.tape.failed.inplace:
            inplace = [made.tape.failed]
        carried = [op for op in inplace if any(i.requires_grad for i in op.inputs)] or inplace
        op = _spoils(made, carried) or (carried[-1] if carried else None)
        yield t.found(
            "grad.inplace_error", t.place(op), op, what=op.name if op is not None else "?", line=op.line if op is not None else "?"
        )
    elif "second time" in text:
        yield t.found("grad.graph_reused", t.outside())


def _spoils(made: Traced, inplace: list[Op]) -> Op | None:
    """The in-place operation on what an activation or product before it keeps for its gradient."""
    keeps = {
        "sigmoid",
        "tanh",
        "relu",
        "exp",
        "softmax",
        "sqrt",
        "log_softmax",
        "mul",
        "div",
        "matmul",
        "linear",
        "pow",
        "silu",
        "gelu",
        "elu",
        "norm",
    }
    for op in inplace:
        source = made.tape.source(op)
        if source is not None and source.name in keeps:
            return op
    return None


def _second(t: Trial) -> Iterator[Finding]:
    """A step that fails only from the second one on: something of the graph was made once and is used again."""
    if t.step.error is not None or t.subject.train_loader is None:
        return
    error = t.events.error if t.subject.fit is not None else t.trained.error
    if error is None:
        return
    text = str(error)
    if "second time" in text or ("inplace operation" in text and t.step.error is None):
        yield t.found("grad.graph_reused", t.outside())


# -- sizes -----------------------------------------------------------------------------------------------------------------------
def _dead(t: Trial) -> Iterator[Finding]:
    """Units of a ReLU that no sample of several batches turns on."""
    if t.subject.fit is not None and t.subject.loss_fn is None:
        return
    relus = [op for op in t.step.tape.ops if op.name in ("relu", "relu_", "clamp_min") and op.outputs and op.outputs[0].dim() >= 2]
    if not relus:
        return
    alive: dict[int, Tensor] = {}
    batches = [None, *t.data.batches[1:4]]
    for batch in batches:
        if batch is not None and (t.subject.fit is not None or t.left < 1):
            break
        tape = t.step.tape if batch is None else t.trace(batch).tape
        found = [op for op in tape.ops if op.name in ("relu", "relu_", "clamp_min") and op.outputs and op.outputs[0].dim() >= 2]
        for i, op in enumerate(found[: len(relus)]):
            out = op.outputs[0].detach()
            axis = 1 if out.dim() >= 4 or (out.dim() == 3 and op.module is not None and _convolved(tape, op)) else out.dim() - 1
            on = (out > 0).transpose(0, axis).flatten(1).any(1)
            alive[i] = on if i not in alive or alive[i].shape != on.shape else alive[i] | on
    for i, on in alive.items():
        dead = float((~on).float().mean())
        if dead > 0.6 and (len(on) >= 4 or dead == 1):
            op = relus[i]
            before = t.step.tape.origin(t.step.tape.source(op)) if t.step.tape.source(op) is not None else None
            place = t.place(before) if before is not None and before.module is not None else t.place(op)
            yield t.found("grad.dead_relu", place, op, layer=place, dead=int((~on).sum()), units=len(on))
            return


def _convolved(tape: Tape, op: Op) -> bool:
    source = tape.source(op)
    origin = tape.origin(source) if source is not None else None
    return origin is not None and origin.name.startswith("conv")


def _sizes(t: Trial, made: Traced) -> Iterator[Finding]:
    model = t.subject.model
    order: list[str] = []
    for call in made.tape.calls:
        if call.path and call.path not in order and any(p.dim() > 1 and p.requires_grad for p in call.module.parameters(recurse=False)):
            order.append(call.path)
    sizes: list[tuple[str, float]] = []
    for path in order:
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding) or "lora" in path.lower():
            continue
        matrices = [(n, p) for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.requires_grad]
        found = [made.grads[f"{path}.{n}"] for n, _ in matrices if f"{path}.{n}" in made.grads]
        if found:
            sizes.append((path, max(float(g.float().square().mean().sqrt()) for g in found)))
    if not sizes:
        return
    loss = abs(float(made.loss.detach().float().mean())) if made.loss is not None else 1.0
    path, largest = max(sizes, key=lambda s: s[1])
    recurrent = [c for c in made.tape.calls if isinstance(c.module, (nn.RNNBase, nn.RNNCellBase)) and c.path]
    repeated = {c.path for c in made.tape.calls if c.path and len(made.tape.runs(c.module)) >= 8}
    named = next((f"model.{c.path}" for c in recurrent), None) or next((f"model.{p}" for p in sorted(repeated)), None)
    grown = _growth(made)
    if named is not None and (largest > 1e3 or grown > 1e3 or not math.isfinite(largest) or not math.isfinite(loss)):
        yield t.found("grad.exploding", named, layer=named, size=largest, grown=grown, name="weight_hh")
    elif (largest > 1e4 and loss < 1e4) or (named is None and len(sizes) >= 6 and largest > 1e3 * max(loss, 1.0)):
        yield t.found("grad.exploding", f"model.{path}", layer=f"model.{path}", size=largest, grown=grown, name="weight")
    if len(sizes) >= 4:
        # Of the first quarter the largest: queries and keys of a new transformer have next to none, beside others that learn.
        first, last = max(sizes[: max(1, len(sizes) // 4)], key=lambda s: s[1]), sizes[-1]
        late = max(s for _, s in sizes[len(sizes) // 2 :])
        saturating = [op for op in made.tape.ops if op.name in SATURATE]
        if late > 0 and 0 < first[1] < 1e-3 * late and len(saturating) > 1:
            yield t.found("grad.vanishing", f"model.{first[0]}", layer=f"model.{first[0]}", size=first[1], last=f"model.{last[0]}", late=late,
                          activation=saturating[0].name, ratio=late / first[1])  # fmt: skip


def _growth(made: Traced) -> float:
    """How much larger a recurrent state is at the end of the sequence than at its beginning."""
    most = 1.0
    for call in made.tape.calls:
        if (
            isinstance(call.module, nn.RNNBase)
            and isinstance(call.output, tuple)
            and isinstance(call.output[0], Tensor)
            and call.output[0].dim() == 3
        ):
            out = call.output[0].detach().float()
            time = out if not call.module.batch_first else out.transpose(0, 1)
            if len(time) >= 8:
                first = float(time[: max(1, len(time) // 8)].abs().mean())
                last = float(time[-max(1, len(time) // 8) :].abs().mean())
                most = max(most, last / max(first, 1e-12) if math.isfinite(last) else float("inf"))
    runs: dict[int, list[Tensor]] = {}
    for call in made.tape.calls:
        if (
            isinstance(call.output, Tensor)
            and call.output.is_floating_point()
            and not list(call.module.children())
            and any(True for _ in call.module.parameters())
        ):
            runs.setdefault(id(call.module), []).append(call.output.detach())
    for outputs in runs.values():
        if len(outputs) >= 8:
            first, last = float(outputs[1].float().abs().mean()), float(outputs[-1].float().abs().mean())
            most = max(most, last / max(first, 1e-12) if math.isfinite(last) else float("inf"))
    return most
