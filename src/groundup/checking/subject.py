"""What is checked: a model with its loss, optimizer and data, as a script names them or a notebook hands them over."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import inspect
import random
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from groundup.checking.tape import tensors
from groundup.core.errors import UserError, did_you_mean

NAMES = (
    "model", "loss_fn", "optimizer", "train_loader", "val_loader", "compute_loss", "train_step", "fit", "evaluate", "scheduler", "tokenizer",
    "lora_targets", "added_token_ids",
)  # fmt: skip
# What people call the same things.
OTHERS = {
    "model": ("net", "network", "classifier"),
    "loss_fn": ("criterion", "loss_function", "loss_func"),
    "optimizer": ("opt", "optim", "optimiser"),
    "train_loader": ("train_dataloader", "train_dl", "trainloader", "dataloader", "loader"),
    "val_loader": ("valid_loader", "validation_loader", "val_dataloader", "test_loader", "testloader", "eval_loader"),
    "scheduler": ("lr_scheduler",),
}


class Enough(BaseException):
    """Ends a loop of the user's that has shown what was to be seen."""


@dataclass
class Subject:
    """Everything that one training step needs, and what belongs to it.

    Args:
        train_loader, val_loader: iterables of batches.
        compute_loss: (model, batch) -> loss, in place of `loss_fn(model(x), y)`; train_step: (model, batch, loss_fn, optimizer) -> loss.
        namespace: the script's names, for what the user's own functions use.
        path: the script's file, for places in it.
        light: nothing will be trained: weights and the optimizer's state need not be copied.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    train_loader: Iterable[Any] | None = None
    val_loader: Iterable[Any] | None = None
    compute_loss: Callable[..., Any] | None = None
    train_step: Callable[..., Any] | None = None
    fit: Callable[..., Any] | None = None
    evaluate: Callable[..., Any] | None = None
    scheduler: Any = None
    tokenizer: Any = None
    lora_targets: Any = None
    added_token_ids: Any = None
    namespace: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    light: bool = False

    # -- one training step -----------------------------------------------------------------------------------------------------
    def loss(self, batch: Any) -> Any:
        """Forward pass and loss of a batch, by `compute_loss` or by `loss_fn(model(x), y)`."""
        if self.compute_loss is not None:
            return self.compute_loss(self.model, batch)
        if self.loss_fn is None:
            output = self.model(**batch) if isinstance(batch, dict) else self.model(*batch)
            return output["loss"] if isinstance(output, dict) else output.loss
        x, y = self.pair(batch)
        return self.loss_fn(self.model(x), y)

    @staticmethod
    def pair(batch: Any) -> tuple[Any, Any]:
        """Input and target of a batch."""
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        if hasattr(batch, "inputs") and hasattr(batch, "targets"):
            return batch.inputs, batch.targets
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            return tuple(batch[:-1]), batch[-1]
        if isinstance(batch, dict):
            target = next((k for k in ("labels", "label", "y", "target", "targets") if k in batch), None)
            return {k: v for k, v in batch.items() if k != target}, batch.get(target) if target else None
        return batch, None

    def step(self, batch: Any) -> Any:
        """One whole step as the user makes it; without `train_step` the usual one."""
        if self.train_step is not None:
            return self.train_step(self.model, batch, self.loss_fn, self.optimizer)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        found = [self.optimizer] if self.optimizer is not None else []
        found += [v for v in self.namespace.values() if isinstance(v, torch.optim.Optimizer) and all(v is not o for o in found)]
        return found

    def names(self) -> dict[int, str]:
        """id of a parameter -> its name."""
        return {id(p): n for n, p in self.model.named_parameters()}

    # -- its text --------------------------------------------------------------------------------------------------------------
    def source(self, function: Callable[..., Any] | None) -> ast.AST | None:
        """The syntax tree of a function, with the line numbers of its file; None where its text is not to be had."""
        if function is None:
            return None
        try:
            lines, first = inspect.getsourcelines(inspect.unwrap(function))
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            return None
        return ast.increment_lineno(tree, first - 1)

    def forwards(self) -> Iterator[tuple[str, ast.AST]]:
        """(path, tree) of the `forward` of every class of the user's own among the modules."""
        seen: set[type] = set()
        for name, module in self.model.named_modules():
            kind = type(module)
            if kind in seen or kind.__module__.startswith("torch."):
                continue
            seen.add(kind)
            if (tree := self.source(kind.forward)) is not None:
                yield name, tree

    # -- nothing is left behind ------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Weights, buffers, gradients, modes, optimizer, schedule and random state are put back at the end."""
        model = self.model
        whole = [] if self.light else list(model.named_parameters())
        weights = {n: t.detach().clone() for n, t in [*whole, *model.named_buffers()]}
        flags = {n: (p, p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
        attributes = [(m, dict(vars(m))) for m in model.modules()]
        inner = [(m, dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
        changing = [] if self.light else self.optimizers
        states = [(o, copy.deepcopy(o.state_dict())) for o in changing]
        loose = [(p, p.detach().clone(), p.grad) for o in changing for g in o.param_groups for p in g["params"]]
        plans = [(s, copy.deepcopy(s.state_dict())) for s in [self.scheduler] if hasattr(s, "state_dict")]
        names = dict(self.namespace)
        generators = [(g, g.get_state()) for g in self._generators()]
        rng = torch.get_rng_state(), np.random.get_state(), random.getstate()
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            for module, parameters, buffers, children in inner:
                for own, then in ((module._parameters, parameters), (module._buffers, buffers), (module._modules, children)):
                    own.clear()
                    own.update(then)  # type: ignore[arg-type]
            for module, then_attributes in attributes:
                own_attributes = vars(module)
                for name in [n for n in own_attributes if n not in then_attributes]:
                    del own_attributes[name]
                own_attributes.update(then_attributes)
            with torch.no_grad():
                for n, t in [*model.named_parameters(), *model.named_buffers()]:
                    if n in weights and t.shape == weights[n].shape:
                        t.data.copy_(weights[n])
                for p, value, gradient in loose:
                    p.data.copy_(value)
                    p.grad = gradient
            for p, flag, gradient in flags.values():
                if p.is_leaf:
                    p.requires_grad_(flag)
                p.grad = gradient
            for optimizer, state in states:
                optimizer.load_state_dict(state)
            for schedule, state in plans:
                schedule.load_state_dict(state)
            self.namespace.update(names)
            for generator, told in generators:
                generator.set_state(told)
            torch.set_rng_state(rng[0])
            np.random.set_state(rng[1])
            random.setstate(rng[2])

    def _generators(self) -> list[torch.Generator]:
        found: list[torch.Generator] = []
        for loader in (self.train_loader, self.val_loader):
            for owner in (loader, getattr(loader, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
                    found.append(generator)
        return found


def rows(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor that has one."""
    return next((t.shape[0] for t in tensors(batch) if t.dim()), 1)


def first_tensor(x: Any) -> Tensor | None:
    """The tensor that holds a batch's inputs: token ids of a dict, else the first one."""
    if isinstance(x, dict):
        for name in ("input_ids", "ids", "pixel_values", "x", "image", "images", "inputs", "input", "tokens"):
            if isinstance(x.get(name), Tensor):
                return x[name]  # type: ignore[no-any-return]
    return next(tensors(x), None)


def from_script(path: Path, names: dict[str, str]) -> Subject:
    """Runs a script (not its `__main__` part) and takes its names.

    Args:
        names: contract name -> name in the script, for those that are called otherwise.

    Raises:
        UserError: the file is not there, fails, or has no model.
    """
    if not path.is_file():
        raise UserError("there is no file {path}", "没有文件 {path}", path=path, fix="name the script that builds model and train_loader",
                        fix_zh="给出构建 model 与 train_loader 的脚本")  # fmt: skip
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("groundup_checked", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["groundup_checked"] = module
    sys.argv = [str(path)]
    spec.loader.exec_module(module)
    space = vars(module)
    for name, given in names.items():
        hint, hint_zh = did_you_mean(name, NAMES)
        if name not in NAMES:
            raise UserError("--name {name}={given}: nothing is called {name}." + hint, "--name {name}={given}：没有 {name} 这一项。" + hint_zh,
                            name=name, given=given, fix="groundup check --help")  # fmt: skip
        if name != "model" and given not in space:
            raise UserError("--name {name}={given}: the script has no '{given}' at its top level", "--name {name}={given}：脚本的顶层没有 '{given}'",
                            name=name, given=given, fix="groundup check --help")  # fmt: skip
    found: dict[str, Any] = {}
    for name in NAMES:
        for candidate in (names.get(name, name), *OTHERS.get(name, ())):
            if candidate in space:
                found[name] = space[candidate]
                break
    if ("model" in names and names["model"] not in space) or "model" not in found:
        wanted = names.get("model", "model")
        raise UserError(
            "{path} has no '{name}' at its top level", "{path} 的顶层没有 '{name}'", path=path.name, name=wanted,
            fix="build the model outside of `if __name__ == \"__main__\":`, or name it: groundup check --model {path}:net",
            fix_zh="把模型写在 `if __name__ == \"__main__\":` 之外，或指出它的名字：groundup check --model {path}:net",
        )  # fmt: skip
    return from_objects(**found, namespace=space, path=path)


def from_objects(model: Any, loss_fn: Any = None, optimizer: Any = None, train_loader: Any = None, **others: Any) -> Subject:
    """Of plain objects, or of a Lightning module, which brings its own step and optimizer."""
    if not isinstance(model, nn.Module):
        raise UserError("model is a {kind}, not an nn.Module", "model 是 {kind}，不是 nn.Module", kind=type(model).__name__)
    if hasattr(model, "training_step") and hasattr(model, "configure_optimizers"):
        others.setdefault("compute_loss", _lightning_loss)
        if optimizer is None:
            made: Any = cast(Any, model).configure_optimizers()
            made = made.get("optimizer") if isinstance(made, dict) else made
            while isinstance(made, (list, tuple)) and made:
                made = made[0]
            optimizer = made
    return Subject(model, loss_fn, optimizer, train_loader, **{k: v for k, v in others.items() if v is not None})


def _lightning_loss(model: Any, batch: Any) -> Any:
    found = model.training_step(batch, 0)
    return found["loss"] if isinstance(found, dict) else found
