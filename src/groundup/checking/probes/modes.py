"""Training and evaluation mode: what drops, what normalises, and when."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from torch import nn

from groundup.checking.findings import Finding
from groundup.checking.subject import Enough
from groundup.checking.tape import TORCH, Silence
from groundup.checking.trial import BATCH_NORM, BINARY, CLASSES, DROPOUT, REGRESSION, Trial

HIGH = 0.9


def probe(t: Trial) -> Iterator[Finding]:
    model, made = t.subject.model, t.step
    moody = [(n, m) for n, m in model.named_modules() if (isinstance(m, DROPOUT) and m.p > 0) or isinstance(m, BATCH_NORM)]
    names = ", ".join(dict.fromkeys("BatchNorm" if isinstance(m, BATCH_NORM) else "dropout" for _, m in moody))
    seen = False
    for name, module in model.named_modules():
        if isinstance(module, DROPOUT) and module.p >= HIGH:
            yield t.found("mode.dropout_rate", f"model.{name}", layer=f"model.{name}", p=module.p)
            seen = True
        elif isinstance(module, nn.RNNBase) and module.dropout >= HIGH:
            yield t.found("mode.dropout_rate", f"model.{name}", layer=f"model.{name}", p=float(module.dropout))
        elif isinstance(module, BATCH_NORM) and module.track_running_stats and module.momentum is not None and module.momentum <= 1e-4:
            yield t.found("mode.bn_stats_never_update", f"model.{name}", layer=f"model.{name}", momentum=module.momentum)
    for op in made.tape.ops:
        if "dropout" in op.name and not seen and op.module is not None and not op.file.startswith(TORCH):
            p = op.argument(1, "p", 0.5)
            if isinstance(p, (int, float)) and p >= HIGH and op.argument(2, "training", True):
                yield t.found("mode.dropout_rate", t.place(op), op, layer=op.name, p=float(p))
                break
    yield from _functional(t)
    yield from _output(t)
    yield from _frozen(t)
    yield from _training_in_eval(t, names, bool(moody))
    yield from _evaluation(t, names, bool(moody))


def _functional(t: Trial) -> Iterator[Finding]:
    if t.evaluated is None:
        return
    for op in t.evaluated[0].ops:
        if "dropout" in op.name and op.name != "native_dropout":
            p, on = op.argument(1, "p", 0.5), op.argument(2, "training", True)
        elif op.name == "scaled_dot_product_attention":
            p, on = op.argument(4, "dropout_p", 0.0), True
        else:
            continue
        if on and isinstance(p, (int, float)) and p > 0:
            yield t.found("mode.functional_dropout", t.place(op, "forward"), op, what=f"F.{op.name}", p=float(p), line=op.line)
            return


def _output(t: Trial) -> Iterator[Finding]:
    criterion = t.step.criterion
    if criterion is None or criterion.name not in BINARY | CLASSES | REGRESSION:
        return
    tape = t.step.tape
    source = tape.source(criterion)
    last = tape.origin(source) if source is not None else None
    module = t.subject.model.get_submodule(last.module) if last is not None and last.module else None
    if last is not None and "dropout" in last.name and (not isinstance(module, DROPOUT) or module.p > 0):
        yield t.found("mode.dropout_on_output", t.place(last, "forward"), last, layer=t.place(last, "forward"))


def _frozen(t: Trial) -> Iterator[Finding]:
    model = t.subject.model
    if not any(p.requires_grad for p in model.parameters()):
        return
    ran = {id(c.module): c for c in t.step.tape.calls}
    for name, module in model.named_modules():
        if not isinstance(module, BATCH_NORM) or not module.track_running_stats or id(module) not in ran or not ran[id(module)].training:
            continue
        own = list(module.parameters(recurse=False))
        parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
        around = own or (list(parent.parameters()) if parent is not None else [])
        if around and not any(p.requires_grad for p in around) and (module.momentum is None or module.momentum > 0):
            yield t.found("mode.frozen_bn_updating", f"model.{name}", layer=f"model.{name}")
            return


def _training_in_eval(t: Trial, names: str, moody: bool) -> Iterator[Finding]:
    s = t.subject
    if not moody:
        return
    if s.fit is not None or s.train_step is not None:
        pairs = list(zip(t.events.kinds, t.events.details))
        trained = [
            d for i, (k, d) in enumerate(pairs) if k == "forward" and d["grad"] and any(p[0] == "backward" for p in pairs[i + 1 : i + 4])
        ]
        wrong = [d for d in trained if not d["training"]]
        if trained and len(wrong) > 0.3 * len(trained):
            when = "from the first step on" if not trained[0]["training"] else "after the first evaluation"
            when_zh = "从第一步起" if not trained[0]["training"] else "第一次评估之后"
            yield t.found(
                "mode.train_in_eval",
                "fit" if s.fit is not None else "train_step" if trained[0]["training"] else "model",
                when=when,
                when_zh=when_zh,
                names=names,
            )
        return
    off = [
        m
        for _, m in s.model.named_modules()
        if ((isinstance(m, DROPOUT) and m.p > 0) or (isinstance(m, BATCH_NORM) and any(p.requires_grad for p in m.parameters())))
    ]
    if not s.model.training and off and not any(m.training for m in off) and any(p.requires_grad for p in s.model.parameters()):
        yield t.found("mode.train_in_eval", "model", when="from the first step on", when_zh="从第一步起", names=names)


def _evaluation(t: Trial, names: str, moody: bool) -> Iterator[Finding]:
    """The user's `evaluate`, called while the model trains: in which mode does it run the model, and in which does it leave it?"""
    s = t.subject
    functional = any("dropout" in op.name for op in t.step.tape.ops)
    if not moody and not functional:
        return
    if s.fit is not None:
        inside = [d for k, d in zip(t.events.kinds, t.events.details) if k == "forward" and not d["grad"]]
        if inside and all(d["training"] for d in inside):
            yield t.found("mode.eval_missing", "fit", names=names or "dropout")
            return
    loader = s.val_loader if s.val_loader is not None else s.train_loader
    if s.evaluate is None or loader is None:
        return
    modes: list[bool] = []

    def note(module: nn.Module, args: object) -> None:
        modes.append(module.training)
        if len(modes) > 64:
            raise Enough

    with s.kept(), Silence():
        s.model.train()
        handle = s.model.register_forward_pre_hook(note)
        try:
            wanted = len(inspect.signature(s.evaluate).parameters)
            s.evaluate(*(s.model, loader)[:wanted])
        except Enough:
            pass
        finally:
            handle.remove()
        left = not s.model.training
    if modes and all(modes):
        yield t.found("mode.eval_missing", "evaluate", names=names or "dropout")
    elif modes and left and s.fit is None and not _returns_to_training(t):
        yield t.found("mode.train_in_eval", "evaluate", when="after the first evaluation", when_zh="第一次评估之后", names=names)


def _returns_to_training(t: Trial) -> bool:
    """Whether the script's text calls `.train()` anywhere, or never evaluates between its epochs."""
    if t.subject.path is None:
        return True
    try:
        tree = ast.parse(t.subject.path.read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return True
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    if any(isinstance(c.func, ast.Attribute) and c.func.attr == "train" for c in calls):
        return True
    for loop in (n for n in ast.walk(tree) if isinstance(n, ast.For)):
        if any(isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id == "evaluate" for c in ast.walk(loop)):
            return False
    return True
