"""Part of the model stays as it is: its parameters are not trained, its BatchNorm statistics and dropout are off."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundup.core.errors import ModelError, RecipeError, did_you_mean
from groundup.core.registry import METHODS, Card

BatchNorm = Literal["trained", "frozen"]


def groups_of(model: nn.Module, method: str) -> dict[str, list[nn.Module]]:
    """The model's layer groups. Raises ModelError for a model that has none."""
    groups = getattr(model, "layer_groups", None)
    if groups is None:
        raise ModelError(
            "method '{method}' needs to know the model's layers, and {kind} has no layer_groups()",
            "方法 '{method}' 需要知道模型的层，而 {kind} 没有 layer_groups()",
            method=method,
            kind=type(model).__name__,
            fix="derive it from groundup.models.Model, or use --method full",
            fix_zh="让它继承 groundup.models.Model，或使用 --method full",
        )
    found: dict[str, list[nn.Module]] = groups()
    return found


def batch_norms(model: nn.Module, wanted: BatchNorm) -> list[nn.Module]:
    """The BatchNorm layers to freeze besides those in frozen groups. Their statistics are those of the base's data: with small batches, or
    little data, new ones are worse (the usual setting of detection models, as in He et al., arXiv 1703.06870, 3.1)."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)] if wanted == "frozen" else []


@METHODS.register(
    "freeze",
    Card(
        summary="the first layer groups are frozen, the rest is trained",
        summary_zh="冻结前面的层组，训练其余部分",
        source="Yosinski et al., arXiv 1411.1792",
        limits="needs layer_groups(); `layers` takes group names or patterns (default: all but the last two groups)",
    ),
)
def freeze(model: nn.Module, layers: Sequence[str] | None = None, batch_norm: BatchNorm = "trained") -> list[nn.Module]:
    groups = groups_of(model, "freeze")
    names = list(groups)
    if layers is None:
        chosen = names[:-2] if len(names) > 2 else names[:-1]
    else:
        chosen = []
        for pattern in [layers] if isinstance(layers, str) else layers:
            hit = fnmatch.filter(names, pattern)
            if not hit:
                hint, hint_zh = did_you_mean(pattern, names)
                raise RecipeError(
                    "method.layers: '{pattern}' matches no layer group." + hint,
                    "method.layers：'{pattern}' 没有匹配任何层组。" + hint_zh,
                    pattern=pattern,
                )
            chosen += hit
    return [m for name in dict.fromkeys(chosen) for m in groups[name]] + batch_norms(model, batch_norm)
