"""Every parameter is trained."""

from __future__ import annotations

from torch import nn

from groundup.core.registry import METHODS, Card


@METHODS.register(
    "full",
    Card(
        summary="every parameter is trained",
        summary_zh="训练全部参数",
        source="Yosinski et al., arXiv 1411.1792",
        limits="forgets most; give old layers a lower rate with optim.groups",
    ),
)
def full(model: nn.Module) -> list[nn.Module]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return []
