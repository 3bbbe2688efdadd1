"""Residual networks: the CIFAR form (depth 20, 32, 44, 56, 110) for small pictures, the ImageNet form (18, 34, 50) for larger ones.

The parameter names are torchvision's (`conv1`, `layer1.0.conv2`, `downsample.0`, `fc`), so that its state dicts fit; see `models/weights.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Model, check_images, fresh_head

CIFAR = {depth: (depth - 2) // 6 for depth in (20, 32, 44, 56, 110)}  # blocks in each of three stages
IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Pad(nn.Module):
    """Shortcut 'A' (He et al., 4.2): every second pixel, zeros for the new channels, no parameters."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        missing = self.planes - x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing - missing // 2))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., fig. 5 left)."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride, as in torchvision), 1x1, and a shortcut (He et al., fig. 5 right)."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


@MODELS.register(
    "resnet",
    Card(
        summary="residual network: depth 20, 32, 44, 56 or 110 (CIFAR form) or 18, 34, 50 (ImageNet form)",
        summary_zh="残差网络：深度 20、32、44、56、110（CIFAR 形式）或 18、34、50（ImageNet 形式）",
        source="He et al., Deep residual learning for image recognition, arXiv 1512.03385, 3.3 and 4.2",
        shapes="[B, C, H, W] -> stages of 16, 32, 64 (CIFAR) or 64 to 512 (x4 at depth 50) channels -> mean over pixels -> [B, num_outputs]",
        limits="BatchNorm wants batches of 16 and more; the ImageNet form wants 64x64 pixels and more",
    ),
)
class ResNet(Model):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, depth: int = 20, dropout: float = 0.0) -> None:
        super().__init__(input_shape, num_outputs)
        if depth not in CIFAR and depth not in IMAGENET:
            raise ModelError(
                "model 'resnet' has no depth {depth}; there are {known}",
                "模型 'resnet' 没有深度 {depth}；可选 {known}",
                depth=depth,
                known=", ".join(str(d) for d in sorted([*CIFAR, *IMAGENET])),
                fix="--set model.depth=20",
            )
        in_channels, _, _ = check_images("resnet", input_shape, 4 if depth in CIFAR else 32)
        self.dropout = nn.Dropout(dropout)
        if depth in CIFAR:
            self.planes = 16
            self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
            stages = [(CIFAR[depth], 16, 1), (CIFAR[depth], 32, 2), (CIFAR[depth], 64, 2)]
            block: type[Basic] | type[Bottleneck] = Basic
        else:
            self.planes = 64
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            stages = [(n, 64 * 2**i, 1 if i == 0 else 2) for i, n in enumerate(IMAGENET[depth])]
            block = Bottleneck if depth == 50 else Basic
        self.bn1 = nn.BatchNorm2d(self.planes)
        self.stages = len(stages)
        for i, (blocks, planes, stride) in enumerate(stages, 1):
            setattr(self, f"layer{i}", self._stage(block, blocks, planes, stride, padded=depth in CIFAR))
        self.fc = nn.Linear(self.planes, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: type[Basic] | type[Bottleneck], blocks: int, planes: int, stride: int, padded: bool) -> nn.Sequential:
        made = []
        for i in range(blocks):
            step, out = stride if i == 0 else 1, planes * block.expansion
            downsample: nn.Module | None = None
            if step != 1 or self.planes != out:
                projected = nn.Sequential(nn.Conv2d(self.planes, out, 1, step, bias=False), nn.BatchNorm2d(out))
                downsample = Pad(out) if padded else projected
            made.append(block(self.planes, planes, step, downsample))
            self.planes = out
        return nn.Sequential(*made)

    def _layers(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i}") for i in range(1, self.stages + 1)]

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for layer in self._layers():
            x = layer(x)
        return self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc, self.num_outputs = fresh_head(self.fc.in_features, num_outputs).to(self.fc.weight), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {"stem": [self.conv1, self.bn1], **{f"layer{i}": [layer] for i, layer in enumerate(self._layers(), 1)}, "head": [self.fc]}
