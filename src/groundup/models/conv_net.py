"""A small convolutional network of conv-BatchNorm-ReLU layers in stages: much accuracy for few operations on small pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, check_images, fresh_head


class Layer(nn.Module):
    """Convolution, BatchNorm, ReLU (Ioffe and Szegedy, arXiv 1502.03167, 3.2: the norm before the non-linearity, no bias in the convolution)."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@MODELS.register(
    "conv_net",
    Card(
        summary="stages of 3x3 conv-BatchNorm-ReLU layers with max pooling between them; a strided 5x5 stem",
        summary_zh="多级 3x3 卷积-BatchNorm-ReLU，级间最大池化；开头是步长 2 的 5x5 卷积",
        source="after Simonyan and Zisserman, arXiv 1409.1556, 2.1, with the norms of Ioffe and Szegedy, arXiv 1502.03167",
        shapes="[B, C, H, W] -> [B, widths[0], H/2, W/2] -> each further stage halves the sides -> mean and maximum over pixels [B, 2 * widths[-1]]",
        limits="for pictures up to about 96x96; BatchNorm wants batches of 16 and more",
    ),
)
class ConvNet(Model):
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        widths: Sequence[int] = (32, 64, 96),
        layers: Sequence[int] = (2, 2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(input_shape, num_outputs)
        if len(widths) != len(layers) or not widths or min(*widths, *layers) < 1:
            raise ModelError(
                "model 'conv_net': widths {widths} and layers {layers} need one positive number for each stage",
                "模型 'conv_net'：widths {widths} 与 layers {layers} 应为每一级各给一个正数",
                widths=list(widths),
                layers=list(layers),
            )
        in_channels, _, _ = check_images("conv_net", input_shape, 2 ** len(widths))
        self.stages = nn.ModuleList()
        before = in_channels
        for i, (width, count) in enumerate(zip(widths, layers)):
            first = Layer(before, width, 5, 2) if i == 0 else Layer(before, width)
            self.stages.append(nn.Sequential(first, *(Layer(width, width) for _ in range(count - 1))))
            before = width
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * before, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
        return self.dropout(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc, self.num_outputs = fresh_head(self.fc.in_features, num_outputs).to(self.fc.weight), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {**{f"stage{i}": [stage] for i, stage in enumerate(self.stages, 1)}, "head": [self.fc]}
