"""A vision transformer that is small enough to train on one's own pictures: pre-norm blocks, learned positions, mean over patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Holder, Model, check_images, fresh_head


class Block(nn.Module):
    """Self-attention and a two-layer MLP, each with a norm before and a shortcut around (Dosovitskiy et al., eq. 2 and 3)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + F.dropout(self.proj(attended), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


@MODELS.register(
    "vit",
    Card(
        summary="vision transformer: patches, self-attention, mean over patches",
        summary_zh="视觉 Transformer：图块、自注意力、对图块取平均",
        source="Dosovitskiy et al., arXiv 2010.11929, 3.1; mean instead of a class token: Beyer et al., arXiv 2205.01580",
        shapes="[B, C, H, W] -> patches [B, ceil(H/patch) * ceil(W/patch), width] -> mean [B, width] -> [B, num_outputs]",
        limits="learns from few pictures less well than a convolutional network; attention grows with the square of the number of patches",
    ),
)
class ViT(Model):
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(input_shape, num_outputs)
        in_channels, height, wide = check_images("vit", input_shape, patch)
        if width % heads:
            raise ModelError(
                "model 'vit': width {width} cannot be divided among {heads} heads",
                "模型 'vit'：宽度 {width} 不能平分给 {heads} 个注意力头",
                width=width,
                heads=heads,
                fix=f"--set model.width={width // heads * heads + heads}",
            )
        self.patch = patch
        patches = -(-height // patch) * -(-wide // patch)
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))  # a picture that is no whole number of patches gets a border
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean(1))

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h)

    def reset_head(self, num_outputs: int) -> None:
        self.fc, self.num_outputs = fresh_head(self.fc.in_features, num_outputs).to(self.fc.weight), num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        return {
            "embed": [self.embed, Holder(self.position)],
            **{f"block{i}": [block] for i, block in enumerate(self.blocks)},
            "head": [self.norm, self.fc],
        }
