"""A fully connected network (multilayer perceptron): linear layers with an activation between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, fresh_head

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}


@MODELS.register(
    "fcnn",
    Card(
        summary="fully connected layers with an activation between them",
        summary_zh="全连接网络：线性层之间加激活函数",
        source="Rumelhart, Hinton and Williams, Nature 323, 1986",
        shapes="[B, ...] flattened -> [B, hidden...] -> [B, num_outputs]",
        limits="knows nothing of neighbourhood in pictures",
    ),
)
class FCNN(Model):
    def __init__(
        self, input_shape: tuple[int, ...], num_outputs: int, hidden: Sequence[int] = (128,), activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__(input_shape, num_outputs)
        if activation not in ACTIVATIONS:
            raise ModelError(
                "model.activation = '{found}'; known: {known}",
                "model.activation = '{found}'；可用：{known}",
                found=activation,
                known=", ".join(ACTIVATIONS),
            )
        widths = [math.prod(input_shape), *([hidden] if isinstance(hidden, int) else hidden)]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:]):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(x.flatten(1))

    def head(self, h: Tensor) -> Tensor:
        return self.output(h)

    def reset_head(self, num_outputs: int) -> None:
        self.output, self.num_outputs = fresh_head(self.output.in_features, num_outputs), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"hidden": [self.hidden], "head": [self.output]}
