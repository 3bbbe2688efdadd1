"""The head first, the layers below it later: all at once, or one group after the other from the head down."""

from __future__ import annotations

from torch import nn

from groundup.core.errors import RecipeError
from groundup.core.registry import METHODS, Card
from groundup.training.loop import Stage
from groundup.tuning.freeze import BatchNorm, batch_norms, groups_of


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise RecipeError(
            "method.{name} = {value}: a share of the run between 0 and 1 is expected",
            "method.{name} = {value}：应为 0 与 1 之间的比例（占整个训练）",
            name=name,
            value=value,
        )
    return value


@METHODS.register(
    "head-first",
    Card(
        summary="first only the head is trained, then everything",
        summary_zh="先只训练输出层，再训练全部参数",
        source="Kumar et al., arXiv 2202.10054, 3.4 (linear probing, then full fine-tuning)",
        limits="`share` of the run goes to the head alone; the learning rate is the same for both parts (optim.layer_decay lowers it below)",
    ),
)
def head_first(model: nn.Module, share: float = 0.2, batch_norm: BatchNorm = "trained") -> list[Stage]:
    groups = list(groups_of(model, "head-first").values())
    still = batch_norms(model, batch_norm)
    return [Stage(0.0, [m for modules in groups[:-1] for m in modules] + still), Stage(_share("share", share), still)]


@METHODS.register(
    "gradual",
    Card(
        summary="gradual unfreezing: the head first, then one layer group more after the other",
        summary_zh="逐层解冻：先输出层，再自上而下逐组解冻",
        source="Howard and Ruder, arXiv 1801.06146, 3.3",
        limits="all groups are trained after `over` of the run",
    ),
)
def gradual(model: nn.Module, over: float = 0.5, batch_norm: BatchNorm = "trained") -> list[Stage]:
    groups = list(groups_of(model, "gradual").values())
    still, parts = batch_norms(model, batch_norm), max(len(groups) - 1, 1)
    begin = [_share("over", over) * k / parts for k in range(len(groups))]
    return [Stage(b, [m for modules in groups[: len(groups) - 1 - k] for m in modules] + still) for k, b in enumerate(begin)]
