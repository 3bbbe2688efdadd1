"""Low-rank adapters are trained, the model itself stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

from torch import nn

from groundup.core.errors import ModelError, RecipeError
from groundup.core.registry import METHODS, Card
from groundup.models.language import LanguageModel
from groundup.models.lora import LoRALinear, adapted, attach, chosen, keep_only_trained, quantize


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
    plus: float = 1.0,
    init: Literal["zero", "pissa"] = "zero",
    bits: Literal[4, 8] | None = None,
) -> list[nn.Module | nn.Parameter]:
    """
    Args:
        alpha: default twice the rank.
        targets: see `chosen`.
        plus: how many times A's learning rate B gets (Hayou et al., LoRA+, arXiv 2402.12354; there 16).
        init: where A and B begin; 'zero' changes nothing at first, 'pissa' takes over the base's largest directions.
        bits: the base is kept in so many bits (QLoRA), None as it is. See `quantize`.
    """
    if rank < 1 or not 0 <= dropout < 1 or not plus > 0:
        raise RecipeError(
            "method.rank = {rank}, method.dropout = {dropout}, method.plus = {plus}: a rank from 1, a dropout from 0 to below 1 and a plus above 0 are expected",
            "method.rank = {rank}，method.dropout = {dropout}，method.plus = {plus}：rank 至少为 1，dropout 应在 0 与 1 之间，plus 应大于 0",
            rank=rank,
            dropout=dropout,
            plus=plus,
            fix="--set method.rank=16",
        )
    if not isinstance(model, LanguageModel):
        raise ModelError(
            "method 'lora' is for language models, not for {kind}",
            "方法 'lora' 用于语言模型，不支持 {kind}",
            kind=type(model).__name__,
            fix="--method head-first",
        )
    if init == "pissa" and (bits is not None or dora or adapted(model)):
        raise RecipeError(
            "method.init = pissa changes the base's matrices: it goes with neither bits nor dora nor an adapter that is there already",
            "method.init = pissa 会改变基座矩阵：不能与 bits、dora 或已有的适配器同用",
            fix="--set method.init=zero",
        )
    if there := adapted(model):  # a model that came with an adapter goes on with it
        first = next(iter(there.values()))
        usual = {name: p.default for name, p in inspect.signature(lora).parameters.items()}
        has = {"rank": first.rank, "alpha": first.alpha, "rs": first.rs, "dora": first.lora_magnitude_vector is not None, "targets": "its own"}
        for name, given in {"rank": rank, "alpha": alpha, "rs": rs, "dora": dora, "targets": targets}.items():
            if given not in (usual[name], has[name]):
                raise RecipeError(
                    "method.{name} = {given}: the adapter that training goes on with has {own}",
                    "method.{name} = {given}：要继续训练的适配器是 {own}",
                    name=name,
                    given=given,
                    own=has[name],
                    fix="leave it out, or merge the adapter first: groundup export MODEL --merge",
                    fix_zh="不写这一项，或先合并适配器：groundup export MODEL --merge",
                )
        names = list(there)
        for layer in there.values():
            layer.dropout = dropout or layer.dropout  # its own where none is given
    else:
        names = chosen(model, targets)
        if not names:
            raise ModelError("the model has no linear layers", "模型没有线性层", fix="--method full")
        attach(model, names, rank, alpha if alpha is not None else 2.0 * rank, dropout, rs, dora)
    layers = adapted(model).values()
    for layer in layers:
        if init == "pissa":
            layer.start_from_principal()
        layer.lora_B.weight.lr_factor = plus  # type: ignore[attr-defined]
    if bits is not None:
        quantize(model, names, bits)
    own = {id(p) for m in layers for p in (*m.lora_A.parameters(), *m.lora_B.parameters(), m.lora_magnitude_vector) if p is not None}
    keep_only_trained(model)
    frozen: list[nn.Module | nn.Parameter] = []
    for module in model.modules():
        direct = list(module.parameters(recurse=False))
        if isinstance(module, LoRALinear) or not direct or any(id(p) in own for p in direct):
            continue
        if any(isinstance(m, LoRALinear) for m in module.modules()):  # adapters stand in it: only what is its own is frozen
            frozen += direct
        else:
            frozen.append(module)
    return frozen
