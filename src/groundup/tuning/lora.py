"""Low-rank adapters are trained, the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from groundup.core.errors import ModelError, RecipeError
from groundup.core.registry import METHODS, Card
from groundup.models.language import LanguageModel
from groundup.models.lora import LoRALinear, adapted, attach, chosen


@METHODS.register(
    "lora",
    Card(
        summary="low-rank matrices beside the frozen ones are trained; the adapter is some per cent of the model's size",
        summary_zh="在冻结的矩阵旁训练低秩矩阵；适配器只有模型大小的百分之几",
        source="Hu et al., LoRA, arXiv 2106.09685",
        limits="linear layers only; the tuned folder holds the adapter and names its base",
    ),
)
def lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rs: bool = False,
    dora: bool = False,
) -> list[nn.Module]:
    """
    Args:
        alpha: default twice the rank.
        targets: see `chosen`.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise RecipeError(
            "method.rank = {rank}, method.dropout = {dropout}: a rank from 1 and a dropout from 0 to below 1 are expected",
            "method.rank = {rank}，method.dropout = {dropout}：rank 至少为 1，dropout 应在 0 与 1 之间",
            rank=rank,
            dropout=dropout,
            fix="--set method.rank=16",
        )
    if not isinstance(model, LanguageModel):
        raise ModelError(
            "method 'lora' is for language models, not for {kind}",
            "方法 'lora' 用于语言模型，不支持 {kind}",
            kind=type(model).__name__,
            fix="--method head-first",
        )
    names = chosen(model, targets)
    if not names:
        raise ModelError("the model has no linear layers", "模型没有线性层", fix="--method full")
    if not adapted(model):  # a model that came with an adapter goes on with it
        attach(model, names, rank, alpha if alpha is not None else 2.0 * rank, dropout, rs, dora)
    own = {
        id(p)
        for m in adapted(model).values()
        for p in (*m.lora_A.parameters(), *m.lora_B.parameters(), m.lora_magnitude_vector)
        if p is not None
    }
    leaves = [m for m in model.modules() if not isinstance(m, LoRALinear) and any(True for _ in m.parameters(recurse=False))]
    return [m for m in leaves if not any(id(p) in own for p in m.parameters(recurse=False))]
