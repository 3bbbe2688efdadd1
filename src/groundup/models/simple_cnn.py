"""The articles' first convolutional network, with the flatten size computed instead of guessed.

As published, `fc1` expects 1,152 features and receives 32 x 13 x 13 = 5,408 from a 28 x 28 picture: a 3 x 3 convolution without padding
leaves 26 x 26, pooling leaves 13 x 13.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, check_images, fresh_head


@MODELS.register(
    "simple_cnn",
    Card(
        summary="one 3x3 convolution, max pooling, two linear layers; any picture size from 4x4",
        summary_zh="一个 3x3 卷积、最大池化、两个线性层；支持 4x4 以上任意尺寸的图片",
        source="after LeCun et al., Gradient-based learning applied to document recognition, 1998, section II",
        shapes="[B, C, H, W] -> conv [B, channels, H-2, W-2] -> pool [B, channels, (H-2)//2, (W-2)//2] -> [B, hidden] -> [B, num_outputs]",
        limits="the first linear layer grows with the picture's area: past 64x64 take a deeper network",
    ),
)
class SimpleCNN(Model):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, channels: int = 32, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__(input_shape, num_outputs)
        in_channels, height, width = check_images("simple_cnn", input_shape, 4)
        self.conv1 = nn.Conv2d(in_channels, channels, 3)
        self.fc1 = nn.Linear(channels * ((height - 2) // 2) * ((width - 2) // 2), hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # the order of both does not matter, and this one has a quarter of the values
        return self.dropout(F.relu(self.fc1(x.flatten(1))))

    def head(self, h: Tensor) -> Tensor:
        return self.fc2(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc2, self.num_outputs = fresh_head(self.fc2.in_features, num_outputs), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"conv": [self.conv1], "fc1": [self.fc1], "head": [self.fc2]}
