"""Random changes of training pictures: whole batches at once, on the device, from counter-based randomness.

Each function takes x, float [B, C, H, W], and uniform numbers in [0, 1); it draws nothing itself, so the result depends only on
(seed, epoch, index) of each sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.core.recipe import Augment
from groundup.data.order import CounterRandom


def shift(x: Tensor, pixels: int, u: Tensor) -> Tensor:
    """Moves each picture by up to `pixels` in both directions; what comes in is 0. u: [B, 2]."""
    return crop(x, pixels, u)


def crop(x: Tensor, padding: int, u: Tensor) -> Tensor:
    """A window of the old size from the picture padded with zeros. u: [B, 2]."""
    b, _, h, w = x.shape
    top, left = (u * (2 * padding + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    padded = F.pad(x, (padding, padding, padding, padding))
    sample = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def rotate(x: Tensor, degrees: float, u: Tensor) -> Tensor:
    """Turns each picture around its centre by up to `degrees` either way, bilinear, corners 0. u: [B, 1]."""
    _, _, h, w = x.shape
    angle = (2 * u[:, 0] - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # In the grid's units both sides span [-1, 1], so a turn of a picture that is not square carries the ratio of its sides.
    theta = torch.stack([torch.stack([cos, -sin * h / w, zero], 1), torch.stack([sin * w / h, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)


def flip(x: Tensor, probability: float, u: Tensor) -> Tensor:
    """Mirrors pictures left to right with a probability. u: [B, 1]."""
    return torch.where((u[:, 0] < probability)[:, None, None, None], x.flip(3), x)


def erase(x: Tensor, probability: float, u: Tensor) -> Tensor:
    """Blanks one rectangle of 2 to 25 % of the area with a probability (Zhong et al., arXiv 1708.04896; ratio 0.3 to 3.3). u: [B, 5]."""
    _, _, h, w = x.shape
    area = (0.02 + 0.23 * u[:, 1]) * h * w
    ratio = torch.exp((2 * u[:, 2] - 1) * math.log(3.3))
    height = (area * ratio).sqrt().round().clamp(1, h)
    width = (area / ratio).sqrt().round().clamp(1, w)
    top, left = ((h - height + 1) * u[:, 3]).floor(), ((w - width + 1) * u[:, 4]).floor()
    y, z = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    inside_y = (y >= top[:, None]) & (y < (top + height)[:, None])
    inside_x = (z >= left[:, None]) & (z < (left + width)[:, None])
    hit = (u[:, 0] < probability)[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return x.masked_fill(hit[:, None], 0.0)


def augment(x: Tensor, config: Augment, random: CounterRandom) -> Tensor:
    """All that the recipe asks for, geometry first; x: float [B, C, H, W] in 0..1."""
    if config.flip:
        x = flip(x, config.flip, random.uniform("flip"))
    if config.rotate:
        x = rotate(x, config.rotate, random.uniform("rotate"))
    if config.shift:
        x = shift(x, config.shift, random.uniform("shift", 2))
    if config.crop:
        x = crop(x, config.crop, random.uniform("crop", 2))
    if config.erase:
        x = erase(x, config.erase, random.uniform("erase", 5))
    return x
