"""Only the last layer is trained, on features that stay as they are (a linear probe)."""

from __future__ import annotations

from torch import nn

from groundup.core.registry import METHODS, Card
from groundup.tuning.freeze import groups_of


@METHODS.register(
    "head",
    Card(
        summary="only the last layer is trained (a linear probe)",
        summary_zh="只训练最后一层（线性探测）",
        source="Alain and Bengio, arXiv 1610.01644",
        limits="cannot learn features that the base lacks; forgets nothing",
    ),
)
def head(model: nn.Module) -> list[nn.Module]:
    return [m for modules in list(groups_of(model, "head").values())[:-1] for m in modules]
