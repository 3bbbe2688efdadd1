"""The articles' second network, "BigModel": a padded convolution straight into a wide linear layer.

As published, its input is pooled away before `fc1` (64 x 10 against 7,840 x 500), or never flattened; here the convolution's output is
flattened, with an activation after each layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, check_images, fresh_head


@MODELS.register(
    "big_model",
    Card(
        summary="one padded 3x3 convolution, a wide linear layer, a head; 3.9 million parameters",
        summary_zh="一个带填充的 3x3 卷积、一个宽线性层和输出层；28x28 输入时有 390 万参数",
        source="after LeCun et al., Gradient-based learning applied to document recognition, 1998, section II",
        shapes="[B, C, H, W] -> conv [B, channels, H, W] -> flatten -> [B, hidden] -> [B, num_outputs]",
        limits="without pooling nearly all parameters sit in fc1: it overfits small data",
    ),
)
class BigModel(Model):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, channels: int = 10, hidden: int = 500, dropout: float = 0.0) -> None:
        super().__init__(input_shape, num_outputs)
        in_channels, height, width = check_images("big_model", input_shape, 1)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.fc1 = nn.Linear(channels * height * width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.fc1(F.relu(self.conv1(x)).flatten(1))))

    def head(self, h: Tensor) -> Tensor:
        return self.fc2(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc2, self.num_outputs = fresh_head(self.fc2.in_features, num_outputs), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"conv": [self.conv1], "fc1": [self.fc1], "head": [self.fc2]}
