"""Random changes of training pictures: whole batches at once, on the device, from counter-based randomness.

Each function takes x, float [B, C, H, W], and uniform numbers in [0, 1); it draws nothing itself, so the result depends only on
(seed, epoch, index) of each sample.
"""

from __future__ import annotations

import functools
import math

import numpy as np
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
    return _affine(x, theta)


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


def resized_crop(x: Tensor, least: float, u: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """A window of `least` to 1 of the area, ratio 3/4 to 4/3, enlarged to the whole (Szegedy et al., arXiv 1409.4842, 6). u: [B, 4].
    Where `mirrored`, bool [B], it is flipped as well: in the same pass that costs nothing."""
    area = least + (1 - least) * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    zero = torch.zeros_like(wide)
    middle_x, middle_y = (2 * u[:, 2] - 1) * (1 - wide), (2 * u[:, 3] - 1) * (1 - high)
    if mirrored is not None:
        wide = torch.where(mirrored, -wide, wide)
    return _affine(x, torch.stack([torch.stack([wide, zero, middle_x], 1), torch.stack([zero, high, middle_y], 1)], 1), "reflection")


def _affine(x: Tensor, theta: Tensor, padding: str = "zeros") -> Tensor:
    """Each picture seen through its matrix [B, 2, 3], which maps where a pixel goes to where it comes from, sides in [-1, 1]."""
    b, _, h, w = x.shape
    across = (
        2 * torch.arange(w, device=x.device) + 1 - w
    ) / w  # the middles of the pixels, as affine_grid has them, at a third of its time
    down = (2 * torch.arange(h, device=x.device) + 1 - h) / h
    grid = x.new_empty(b, h, w, 2)
    for k in (0, 1):
        at = theta[:, k].to(x.dtype)
        torch.add((at[:, 0, None] * across)[:, None, :], (at[:, 1, None] * down + at[:, 2, None])[:, :, None], out=grid[..., k])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _grey(x: Tensor) -> Tensor:
    """Luminance [B, 1, H, W] (ITU-R BT.601)."""
    return x if x.shape[1] == 1 else (x * x.new_tensor([0.299, 0.587, 0.114]).view(-1, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """From `base` (factor 0) through the picture (1) and beyond. factor: [B]."""
    return (base + (x - base) * factor[:, None, None, None]).clamp(0, 1)


def color(x: Tensor, strength: float, u: Tensor) -> Tensor:
    """Brightness, contrast and saturation, each by a factor of 1 - strength to 1 + strength. u: [B, 3]."""
    bright, contrast, saturation = (1 + strength * (2 * u - 1)).unbind(1)
    # All three are linear in the pixel: one matrix for each picture does them in one pass.
    b, c, h, w = x.shape
    flat = x.reshape(b, c, h * w)
    weights = flat.new_tensor([0.299, 0.587, 0.114] if c == 3 else [1.0])
    level = (flat.mean(2) * weights).sum(1) * bright
    matrix = torch.eye(c, device=x.device) * saturation[:, None, None] + (1 - saturation)[:, None, None] * weights
    matrix = matrix * (contrast * bright)[:, None, None]
    shift = ((1 - contrast) * level)[:, None, None].expand(b, c, 1)
    return torch.baddbmm(shift, matrix, flat).clamp_(0, 1).view(b, c, h, w)


def randaugment(x: Tensor, operations: int, magnitude: float, u: Tensor) -> Tensor:
    """`operations` times one of twelve changes, drawn for each picture (Cubuk et al., arXiv 1909.13719, 3; without equalize, which has no
    cheap form for a batch). u: [B, 3 * operations]: which one, which way, how much."""
    for which, way, much in zip(*(u[:, k::3].unbind(1) for k in range(3))):
        choice = (which * 12).long()
        amount = magnitude * (0.5 + 0.5 * much)
        signed = amount * torch.where(way < 0.5, -1.0, 1.0)
        # 0 to 4: one matrix does rotation, shear and shift, each where it was drawn.
        on = [(choice == k).to(x.dtype) for k in range(12)]
        angle, shear, move = signed * on[0] * math.radians(45), signed * 0.6, signed * 0.6
        cos, sin, (h, w) = angle.cos(), angle.sin(), x.shape[-2:]
        theta = torch.stack(
            [
                torch.stack([cos, -sin * h / w + shear * on[1], move * on[3]], 1),
                torch.stack([sin * w / h + shear * on[2], cos, move * on[4]], 1),
            ],
            1,
        )
        x = _affine(x, theta)
        # 5 to 8: brightness, contrast, saturation and sharpness are all a step away from, or towards, another picture.
        grey = _grey(x)
        kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(x.shape[1], 1, 3, 3)
        soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
        base = sum(o[:, None, None, None] * b for o, b in zip(on[6:9], (grey.mean((2, 3), keepdim=True), grey, soft)))
        blended = _blend(x, torch.as_tensor(base).expand_as(x), 1 + signed * 0.9)
        # 9 to 11: fewer levels, bright parts turned dark, contrast stretched.
        levels = torch.exp2(8 - torch.floor(amount * 4)).view(-1, 1, 1, 1)
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        changed = {9: torch.floor(x * 255 * levels / 256) * 256 / levels / 255}
        changed[10] = torch.where(x < 1 - amount.view(-1, 1, 1, 1), x, 1 - x)
        changed[11] = (x - low) / (high - low).clamp(min=1 / 255)
        pick = choice.view(-1, 1, 1, 1)
        x = torch.where((pick >= 5) & (pick <= 8), blended, x)
        for k, picture in changed.items():
            x = torch.where(pick == k, picture, x)
    return x


# The example tables of the JPEG standard (ITU-T T.81, annex K.1), for luminance and chrominance.
_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_CHROMINANCE = "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99 " + "99 " * 32


@functools.lru_cache(maxsize=8)
def _jpeg_constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cosine basis [8, 8], the two tables [2, 8, 8], RGB -> YCbCr [3, 3] and back."""
    k = torch.arange(8, dtype=torch.float64)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) * torch.where(k == 0, 0.5**0.5, 1.0)[:, None] / 2
    tables = torch.tensor([[float(v) for v in text.split()] for text in (_LUMINANCE, _CHROMINANCE)]).view(2, 8, 8)
    ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64)
    return basis.float().to(device), tables.to(device), ycc.float().to(device), torch.linalg.inv(ycc).float().to(device)


def jpeg(x: Tensor, least: int, u: Tensor) -> Tensor:
    """What a JPEG of quality `least` to 100 leaves of the picture: chroma at half the resolution, 8x8 cosine transform, rounding by the
    standard's tables (scaled as libjpeg does). u: [B, 1]."""
    basis, tables, ycc, rgb = _jpeg_constants(x.device)
    b, c, h, w = x.shape
    quality = least + (100 - least) * u[:, 0]
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1, 1, 1)
    pixels = F.pad(x * 255, (0, -w % 16, 0, -h % 16), mode="replicate")
    if c == 3:
        pixels = torch.einsum("oc,bchw->bohw", ycc, pixels)
        planes = [pixels[:, :1] - 128, F.avg_pool2d(pixels[:, 1:], 2)]
    else:
        planes = [pixels - 128]
    done = []
    for plane, table in zip(planes, tables):
        steps = (table * scale).round().clamp(1, 255)
        n, high, wide = plane.shape[1], plane.shape[2] // 8, plane.shape[3] // 8
        blocks = plane.view(b, n, high, 8, wide, 8).permute(0, 1, 2, 4, 3, 5).reshape(b, n, high * wide, 8, 8)
        rounded = (basis @ blocks @ basis.T / steps).round() * steps
        blocks = (basis.T @ rounded @ basis).view(b, n, high, wide, 8, 8).permute(0, 1, 2, 4, 3, 5)
        done.append(blocks.reshape(plane.shape))
    y = done[0] + 128
    if c == 3:  # decoders enlarge the chroma smoothly
        chroma = F.interpolate(done[1], scale_factor=2, mode="bilinear", align_corners=False)
        y = torch.einsum("oc,bchw->bohw", rgb, torch.cat([y, chroma], 1))
    return (y[:, :, :h, :w] / 255).clamp(0, 1)


@functools.lru_cache(maxsize=8)
def _beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at 0, 1/1024, ..., 1."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, 1025))).float()


def _beta(alpha: float, u: Tensor) -> Tensor:
    table = _beta_quantiles(alpha).to(u.device)
    at = u * 1024
    low = at.long().clamp(max=1023)
    return torch.lerp(table[low], table[low + 1], at - low)


def mix(x: Tensor, targets: Tensor, config: Augment, random: CounterRandom) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., arXiv 1710.09412, 2) and CutMix (Yun et al., arXiv 1905.04899, 3.1) of neighbours in the batch.

    The first and second picture of a batch are partners, the third and fourth, and so on: pairs stay together however the batch is cut
    into micro-batches of even size. Both take the random numbers of the first of them.

    Args:
        targets: float [B, classes], shares of each class.
    """
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner = torch.where(partner < len(x), partner, partner - 1)  # the last of an odd batch keeps to itself
    first = torch.arange(len(x), device=x.device) & ~1
    u = random.uniform("mix", 4)[first]
    cut = u[:, 3] < (0.5 if config.mixup and config.cutmix else 1.0 if config.cutmix else 0.0)
    own = torch.where(cut, _beta(config.cutmix or 1.0, u[:, 0]), _beta(config.mixup or 1.0, u[:, 0]))
    h, w = x.shape[-2:]
    side = (1 - own).sqrt()
    middle_y, middle_x = u[:, 1] * h, u[:, 2] * w
    top, bottom = ((middle_y + sign * side * h / 2).round().clamp(0, h) for sign in (-1, 1))
    left, right = ((middle_x + sign * side * w / 2).round().clamp(0, w) for sign in (-1, 1))
    y, z = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    inside = ((y >= top[:, None]) & (y < bottom[:, None]))[:, :, None] & ((z >= left[:, None]) & (z < right[:, None]))[:, None, :]
    # What share of each pixel comes from the partner: a constant for mixup, 0 or 1 for cutmix.
    foreign = torch.where(cut[:, None, None], inside.to(x.dtype), (1 - own).to(x.dtype)[:, None, None])
    share = foreign.mean((1, 2))[:, None]
    mixed = torch.lerp(x, x[partner], foreign[:, None])
    return mixed, torch.lerp(targets, targets[partner], share.to(targets.dtype))


def views(x: Tensor, flipped: bool, pixels: int) -> list[Tensor]:
    """The views of test-time augmentation: the picture itself, mirrored, and both moved by `pixels` in four directions."""
    found = [x, x.flip(3)] if flipped else [x]
    if pixels:
        h, w = x.shape[-2:]
        for base in list(found):
            padded = F.pad(base, (pixels,) * 4, mode="replicate")
            found += [padded[:, :, t : t + h, s : s + w] for t, s in ((0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels))]
    return found


def augment(x: Tensor, config: Augment, random: CounterRandom) -> Tensor:
    """All that the recipe asks for, geometry first; x: float [B, C, H, W] in 0..1. Mixing comes later, see `mix`."""
    if config.resized_crop:
        mirrored = random.uniform("flip")[:, 0] < config.flip
        x = resized_crop(x, config.resized_crop, random.uniform("resized_crop", 4), mirrored)
    elif config.flip:
        x = flip(x, config.flip, random.uniform("flip"))
    if config.rotate:
        x = rotate(x, config.rotate, random.uniform("rotate"))
    if config.shift:
        x = shift(x, config.shift, random.uniform("shift", 2))
    if config.crop:
        x = crop(x, config.crop, random.uniform("crop", 2))
    if config.color:
        x = color(x, config.color, random.uniform("color", 3))
    if config.randaugment:
        x = randaugment(x, config.randaugment, config.magnitude, random.uniform("randaugment", 3 * config.randaugment))
    if config.jpeg:
        x = jpeg(x, config.jpeg, random.uniform("jpeg"))
    if config.erase:
        x = erase(x, config.erase, random.uniform("erase", 5))
    return x
