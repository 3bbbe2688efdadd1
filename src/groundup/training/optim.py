"""Optimizers and their parameter groups.

Weight decay spares norms and biases (every parameter with fewer than two dimensions). Muon takes hidden matrices, AdamW the rest (tables of tokens among it).
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from groundup.core.errors import RecipeError, did_you_mean
from groundup.core.recipe import Optim
from groundup.models.language import LanguageModel
from groundup.training.adamw import AdamW
from groundup.training.muon import Muon
from groundup.training.offload import Offloaded


def group_of_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter name -> layer group, for models that have groups."""
    groups = getattr(model, "layer_groups", None)
    if groups is None:
        return {}
    owner = {id(p): name for name, modules in groups().items() for m in modules for p in m.parameters()}
    return {name: owner[id(p)] for name, p in model.named_parameters() if id(p) in owner}


def learning_rate_factors(model: nn.Module, groups: dict[str, float], layer_decay: float | None = None) -> dict[str, float]:
    """Parameter name -> factor of the learning rate: `layer_decay` to the power of the layer groups above it, times what `groups` says.

    Raises:
        RecipeError: a pattern that is neither a layer group nor matches a parameter.
    """
    names = [n for n, _ in model.named_parameters()]
    owner = group_of_parameters(model)
    factors = {n: float(getattr(p, "lr_factor", 1.0)) for n, p in model.named_parameters()}  # a method's own wish (LoRA+)
    if layer_decay is not None:
        if not owner:
            raise RecipeError(
                "optim.layer_decay needs to know the model's layers, and {kind} has no layer_groups()",
                "optim.layer_decay 需要知道模型的层，而 {kind} 没有 layer_groups()",
                kind=type(model).__name__,
            )
        depth = {group: k for k, group in enumerate(reversed(list(model.layer_groups())))}  # type: ignore[operator]
        factors |= {name: factors[name] * layer_decay ** depth[group] for name, group in owner.items()}
    for pattern, value in groups.items():
        hit = [n for n in names if owner.get(n) == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not hit:
            hint, hint_zh = did_you_mean(pattern, {*owner.values(), *names})
            raise RecipeError(
                "optim.groups: '{pattern}' matches no layer group and no parameter." + hint,
                "optim.groups：'{pattern}' 没有匹配任何层组或参数。" + hint_zh,
                pattern=pattern,
            )
        factors |= {name: factors[name] * value for name in hit}
    return factors


def _without_the_compiler() -> None:
    """torch wraps four methods of its optimizers so that torch.compile leaves them alone, and the wrapper imports the whole compiler when one of
    them is first called: two seconds, at the start of every training. We compile models, never optimizers: the wrapper is told that it has
    nothing to do, in the place where it keeps what it made."""
    for name in ("zero_grad", "state_dict", "load_state_dict", "add_param_group"):
        inner = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if inner is not None and getattr(inner, "__dynamo_disable", None) is None:
            inner.__dynamo_disable = inner


def _plain_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same for `step`, whose wrapper imports the compiler to mark where a graph ends: what it wraps, without gradients, with its hooks."""
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = MethodType(torch.optim.Optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]
    return optimizer


def build_optimizers(model: nn.Module, config: Optim, device: str) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, each group carrying `base_lr` for the schedule to scale.

    Raises:
        RecipeError: settings that do not go together, or nothing to train.
    """
    _without_the_compiler()
    made = [_plain_step(optimizer) for optimizer in _build(model, config, "cpu" if config.offload else device)]
    if not config.offload:
        return made
    return [Offloaded(optimizer.param_groups, functools.partial(_anew, optimizer)) for optimizer in made]


def _anew(like: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of the same kind and settings for other parameters."""
    known = inspect.signature(type(like)).parameters
    return _plain_step(type(like)(groups, **{k: v for k, v in like.defaults.items() if k in known}))


def automatic_rate(model: nn.Module) -> tuple[float, int]:
    """A learning rate for Muon and AdamW on a language model, and the parameters of its layers that it follows: 0.01 at a million, falling by their
    power 0.4, which passes through what is used at 125M (1.5e-3) and 1B (6e-4)."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    layers = max(1, sum(p.numel() for p in model.parameters()) - tables)
    return float(f"{0.01 * (layers / 1e6) ** -0.4:.1e}"), layers


def _build(model: nn.Module, config: Optim, device: str) -> list[torch.optim.Optimizer]:
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise RecipeError("no parameter of the model is trainable", "模型没有任何可训练的参数", fix="--set method=full")
    if config.nesterov and not config.momentum:
        raise RecipeError("optim.nesterov = true needs a momentum", "optim.nesterov = true 需要动量", fix="--set optim.momentum=0.9")
    rate = automatic_rate(model)[0] if config.lr == "auto" else float(config.lr)
    factors = learning_rate_factors(model, config.groups, config.layer_decay)
    owner = group_of_parameters(model)
    last = list(dict.fromkeys(owner.values()))[-1:] or [""]

    def grouped(pairs: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        found: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, p in pairs:
            found.setdefault((p.ndim >= 2, factors[name]), []).append(p)
        return [
            {
                "params": params,
                "lr": rate * factor,
                "base_lr": rate * factor,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (decayed, factor), params in found.items()
        ]

    fused = device.split(":")[0] in ("cpu", "cuda") and all(p.dtype in (torch.float32, torch.float64, torch.bfloat16) for _, p in trainable)
    if config.name == "sgd":
        return [torch.optim.SGD(grouped(trainable), lr=rate, momentum=config.momentum or 0.0, nesterov=config.nesterov, fused=fused)]
    if config.name == "rmsprop":
        return [torch.optim.RMSprop(grouped(trainable), lr=rate, momentum=config.momentum or 0.0, eps=config.eps)]
    if config.name == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise RecipeError(
                "optim.name = adamw8bit needs bitsandbytes, which is not installed",
                "optim.name = adamw8bit 需要 bitsandbytes，尚未安装",
                fix="pip install 'groundup[quant]'",
            )
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(grouped(trainable), lr=rate, betas=config.betas, eps=config.eps)]
    adamw = AdamW if isinstance(model, LanguageModel) else torch.optim.AdamW  # for others kernels would be compiled for this alone
    kind = torch.optim.Adam if config.name == "adam" else adamw
    if config.name != "muon":
        return [kind(grouped(trainable), lr=rate, betas=config.betas, eps=config.eps, fused=fused)]
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    hidden = [(n, p) for n, p in trainable if p.ndim == 2 and owner.get(n) != last[0] and id(p) not in tables]
    taken = {n for n, _ in hidden}
    rest = [(n, p) for n, p in trainable if n not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:  # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both (Liu et al., arXiv 2502.16982, 2.2)
        momentum = 0.95 if config.momentum is None else config.momentum
        optimizers.append(Muon(grouped(hidden), lr=rate, momentum=momentum))
    if rest:
        optimizers.append(adamw(grouped(rest), lr=rate, betas=config.betas, eps=config.eps, fused=fused))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Scales every group's base learning rate; returns the highest one in force."""
    highest = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            highest = max(highest, group["lr"])
    return highest


def masked_step(optimizers: list[torch.optim.Optimizer], finite: Tensor) -> None:
    """One update, or none where `finite` (a bool tensor on the device) is False.

    Fused optimizers read the flag on the device, so the host does not wait; for the others the host reads it.
    """
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            # The two attributes through which torch.amp.GradScaler itself tells fused optimizers to skip an update.
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif bool(finite):
            optimizer.step()
