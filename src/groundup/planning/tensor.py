"""One device of a group that shares every layer: heads, the MLPs' width and the vocabulary are divided, what lies between them is whole on each
(tensor parallelism: Shoeybi et al., Megatron-LM, arXiv 1909.08053, 3)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from groundup.core.errors import RecipeError
from groundup.models.decoder import MLP, Decoder
from groundup.planning.forecast import Subject
from groundup.planning.sharded import copied


def part_of(subject: Subject, parts: int) -> Subject:
    """The same training with the model that one of `parts` devices holds: a decoder with fewer heads and narrower matrices.

    Raises:
        RecipeError: not a decoder without experts, or heads and widths that cannot be divided so.
    """
    model: Any = subject.model
    plain = isinstance(model, Decoder) and all(isinstance(layer.mlp, MLP) for layer in model.model.layers)
    if not plain or model.heads % parts or model.kv_heads % parts or model.hidden % parts:
        shape = f"{model.heads} / {model.kv_heads} / {model.hidden}" if plain else type(model).__name__
        raise RecipeError(
            "--sharding tensor: {n} GPUs cannot share every layer of this model ({shape}): a decoder without experts is expected, whose heads, kv_heads "
            "and hidden are multiples of it",
            "--sharding tensor：{n} 个 GPU 无法共享该模型的每一层（{shape}）：应为不带专家的解码器，且 heads、kv_heads、hidden 都是它的倍数",
            n=parts,
            shape=shape,
            fix="--sharding fsdp",
        )
    model = copied(model, subject.mode)
    rows = -(-model.vocabulary // parts)
    with subject.mode:
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            for matrix in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj):
                _cut(matrix, parts, 1)
            for matrix in (a.o_proj, m.down_proj):
                _cut(matrix, 1, parts)
        table = model.model.embed_tokens
        table.weight = _of_shape(table.weight, rows, model.width)
        if not model.tied:
            model.lm_head.weight = _of_shape(model.lm_head.weight, rows, model.width)
    model.heads, model.kv_heads, model.hidden, model.vocabulary = model.heads // parts, model.kv_heads // parts, model.hidden // parts, rows
    return replace(subject, model=model, batches=copy.copy(subject.batches))


def traffic_of(subject: Subject, parts: int, replicas: int, width: int) -> float:
    """Bytes that each device sends in an optimizer step: two sums over the group in every layer's forward and two in its backward pass, one at the table
    and one at the head (Megatron-LM, figure 4); recomputing repeats the forward ones.

    Args:
        width: bytes of a number of what is summed.
    """
    model: Any = subject.model
    tokens = subject.batches.batch_size // replicas * min(model.context, int(subject.recipe.task.arguments.get("context", model.context)))
    forward = 2 if subject.recipe.train.checkpointing == "none" else 4
    return ((forward + 2) * len(model.model.layers) + 2) * 2 * (parts - 1) / parts * tokens * model.width * width


def _cut(matrix: Any, outputs: int, inputs: int) -> None:
    """A linear layer's share: its outputs or its inputs divided by so many, and those of its adapter with them."""
    base = getattr(matrix, "base_layer", matrix)
    base.weight = _of_shape(base.weight, base.weight.shape[0] // outputs, base.weight.shape[1] // inputs)
    if base.bias is not None:
        base.bias = _of_shape(base.bias, base.bias.shape[0] // outputs)
    if base is not matrix:
        a, b = matrix.lora_A, matrix.lora_B
        a.weight, b.weight = _of_shape(a.weight, a.weight.shape[0], a.weight.shape[1] // inputs), _of_shape(b.weight, b.weight.shape[0] // outputs, b.weight.shape[1])  # fmt: skip
        if matrix.lora_magnitude_vector is not None:
            matrix.lora_magnitude_vector = _of_shape(matrix.lora_magnitude_vector, base.weight.shape[0])


def _of_shape(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype), parameter.requires_grad)
