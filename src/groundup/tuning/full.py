"""Every parameter is trained."""

from __future__ import annotations

from torch import nn

from groundup.core.registry import METHODS, Card
from groundup.tuning.freeze import BatchNorm, batch_norms


@METHODS.register(
    "full",
    Card(
        summary="every parameter is trained",
        summary_zh="训练全部参数",
        source="Yosinski et al., arXiv 1411.1792",
        limits="forgets most; give old layers a lower rate with optim.layer_decay or optim.groups",
    ),
)
def full(model: nn.Module, batch_norm: BatchNorm = "trained") -> list[nn.Module]:
    return batch_norms(model, batch_norm)
