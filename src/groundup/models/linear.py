"""One linear layer on the flattened input: the least that can learn, and the baseline that others must beat."""

from __future__ import annotations

import math

from torch import Tensor, nn

from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, fresh_head


@MODELS.register(
    "linear",
    Card(
        summary="one linear layer on the flattened input: softmax or linear regression",
        summary_zh="展平输入后的单个线性层：softmax 回归或线性回归",
        source="Bishop, Pattern Recognition and Machine Learning, 2006, 3.1 and 4.3.4",
        shapes="[B, ...] -> [B, num_outputs]",
        limits="classes must be separable by planes",
    ),
)
class Linear(Model):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.fc = nn.Linear(math.prod(input_shape), num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc, self.num_outputs = fresh_head(self.fc.in_features, num_outputs), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"head": [self.fc]}
