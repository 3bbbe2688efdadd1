"""A small ConvNeXt: depthwise 7x7 convolutions, layer norm over channels, inverted bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, check_images, fresh_head


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, norm, two pointwise layers, a learned scale, a shortcut (Liu et al., fig. 4; scale: Touvron et al., 2103.17239)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


@MODELS.register(
    "convnext",
    Card(
        summary="small ConvNeXt: depthwise 7x7 convolutions with layer norm",
        summary_zh="小型 ConvNeXt：7x7 深度卷积与层归一化",
        source="Liu et al., A ConvNet for the 2020s, arXiv 2201.03545, section 2",
        shapes="[B, C, H, W] -> stem, stride `stem` -> stages, each halving the picture -> mean over pixels -> [B, num_outputs]",
        limits="slower per parameter than resnet on a CPU (depthwise convolutions); no BatchNorm, so small batches do",
    ),
)
class ConvNeXt(Model):
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        depths: Sequence[int] = (2, 2, 2),
        channels: Sequence[int] = (32, 64, 128),
        stem: int = 2,
    ) -> None:
        super().__init__(input_shape, num_outputs)
        if len(depths) != len(channels) or not depths:
            raise ModelError(
                "model 'convnext': depths {depths} and channels {channels} must be of one length",
                "模型 'convnext'：depths {depths} 与 channels {channels} 的长度必须相同",
                depths=list(depths),
                channels=list(channels),
                fix="--set model.depths=[2,2,2] --set model.channels=[32,64,128]",
            )
        in_channels, _, _ = check_images("convnext", input_shape, stem * 2 ** (len(depths) - 1))
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels[0], stem, stem), ChannelNorm(channels[0]))
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, channels)):
            shrink = [ChannelNorm(channels[i - 1]), nn.Conv2d(channels[i - 1], width, 2, 2)] if i else []
            self.stages.append(nn.Sequential(*shrink, *(Block(width) for _ in range(depth))))
        self.norm = nn.LayerNorm(channels[-1])
        self.fc = nn.Linear(channels[-1], num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean((2, 3)))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc, self.num_outputs = fresh_head(self.fc.in_features, num_outputs).to(self.fc.weight), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"stem": [self.stem], **{f"stage{i}": [stage] for i, stage in enumerate(self.stages)}, "head": [self.norm, self.fc]}
