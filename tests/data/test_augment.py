"""Augmentation: each operation against values worked out by hand, and independence of the batch."""

import pytest
import torch

from groundup.core.recipe import Augment
from groundup.data import augment as ops
from groundup.data.order import CounterRandom

PICTURE = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)


def u(*values):
    return torch.tensor([values])


@pytest.mark.parametrize(
    "values, expected",
    [
        ((0.5, 0.5), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ((0.0, 0.5), [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),
        ((0.99, 0.99), [[5, 6, 0], [8, 9, 0], [0, 0, 0]]),
        ((0.5, 0.0), [[0, 1, 2], [0, 4, 5], [0, 7, 8]]),
    ],
)
@pytest.mark.parametrize("operation", [ops.shift, ops.crop])
def test_shift_and_crop(operation, values, expected):
    assert operation(PICTURE, 1, u(*values))[0, 0].tolist() == expected


def test_flip():
    assert ops.flip(PICTURE, 0.5, u(0.4))[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert torch.equal(ops.flip(PICTURE, 0.5, u(0.5)), PICTURE)


@pytest.mark.parametrize("shape", [(1, 2, 5, 5), (1, 1, 4, 8)])
def test_rotate_by_half_a_turn(shape):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    turned = ops.rotate(x, 180, u(1.0 - 2**-24))
    assert torch.allclose(turned, x.flip(2, 3), atol=1e-3)
    assert torch.allclose(ops.rotate(x, 180, u(0.5)), x, atol=1e-4)


def test_rotate_by_a_quarter_turn():
    turned = ops.rotate(PICTURE, 90, u(1.0 - 2**-24))[0, 0]
    assert torch.allclose(turned, torch.rot90(PICTURE[0, 0], 1), atol=1e-4) or torch.allclose(
        turned, torch.rot90(PICTURE[0, 0], -1), atol=1e-4
    )


def test_a_quarter_turn_keeps_the_shape_of_what_is_turned():
    """A bar 1 pixel wide in a picture that is not square is still 1 wide and as long after a quarter turn."""
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 2, 2:7] = 1
    turned = ops.rotate(x, 90, u(1.0 - 2**-24))[0, 0]
    assert torch.allclose(turned[:, 4], torch.ones(5), atol=1e-3) and turned.sum() == pytest.approx(5, abs=1e-2)


def test_erase():
    x = torch.ones(1, 2, 10, 10)
    blanked = ops.erase(x, 1.0, u(0.0, 1.0, 0.5, 0.0, 0.0))[0]  # 25 % of the area, square, at the top left
    assert blanked[:, :5, :5].sum() == 0 and blanked.sum() == 2 * 75
    assert torch.equal(ops.erase(x, 0.3, u(0.3, 1.0, 0.5, 0.0, 0.0)), x)
    corner = ops.erase(x, 1.0, u(0.0, 1.0, 0.5, 0.999, 0.999))[0]
    assert corner[:, 5:, 5:].sum() == 0
    assert ops.erase(torch.ones(1, 1, 1, 1), 1.0, u(0.0, 0.0, 0.0, 0.0, 0.0)).sum() == 0


@pytest.mark.parametrize("operation, extra", [(ops.flip, 1), (ops.erase, 5)])
def test_probability(operation, extra):
    x = torch.arange(1.0, 26.0).reshape(1, 1, 5, 5).expand(4000, 1, 5, 5)
    index = torch.arange(4000)
    draws = CounterRandom(0, torch.zeros_like(index), index).uniform("p", extra)
    changed = (operation(x, 0.3, draws) != x).flatten(1).any(1).float().mean()
    assert changed == pytest.approx(0.3, abs=0.03)


EVERYTHING = Augment(shift=2, rotate=15, flip=0.5, crop=1, erase=0.5)


def test_each_sample_is_changed_by_itself():
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    epoch, index = torch.arange(12) // 5, torch.arange(12) * 3
    whole = ops.augment(x, EVERYTHING, CounterRandom(1, epoch, index))
    parts = [ops.augment(x[s], EVERYTHING, CounterRandom(1, epoch[s], index[s])) for s in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole)
    alone = ops.augment(x[7:8], EVERYTHING, CounterRandom(1, epoch[7:8], index[7:8]))
    assert torch.equal(alone[0], whole[7])


def test_epochs_differ_and_nothing_is_nothing():
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(6)
    first, second = (ops.augment(x, EVERYTHING, CounterRandom(0, torch.full_like(index, e), index)) for e in (0, 1))
    assert not torch.equal(first, second) and first.shape == x.shape
    assert torch.equal(ops.augment(x, Augment(), CounterRandom(0, index, index)), x)


# -- photographs -----------------------------------------------------------------------------------------------------------------
def rng(n, epoch=0, seed=0):
    return CounterRandom(seed, torch.full((n,), epoch), torch.arange(n))


def photo(n=4, c=3, side=24):
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack([x, y, (x + y) / 2][:c])[None].repeat(n, 1, 1, 1)


def test_a_resized_crop_of_the_whole_is_the_picture():
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(ops.resized_crop(x, 1.0, torch.tensor([[0.3, 0.5, 0.2, 0.9]] * 3)), x, atol=1e-5)
    small = ops.resized_crop(photo(), 0.25, torch.tensor([[0.0, 0.5, 0.0, 0.0]] * 4))  # a quarter, from the top left corner
    assert small[0, 0].max() < 0.55 and small[0, 1].max() < 0.55 and small.shape == photo().shape


def test_color_changes_what_it_says():
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert torch.allclose(ops.color(grey, 0.4, u(1.0, 0.5, 0.5)), torch.full_like(grey, 0.7), atol=1e-6)
    assert torch.allclose(ops.color(grey, 0.4, u(0.5, 1.0, 1.0)), grey, atol=1e-6)  # an even grey has no contrast and no colour
    x = photo(1)
    assert torch.allclose(ops.color(x, 0.4, u(0.5, 0.5, 0.5)), x, atol=1e-6)
    assert ops.color(x[:, :1], 0.4, u(0.9, 0.1, 0.7)).shape == (1, 1, 24, 24)


@pytest.mark.parametrize("c", [1, 3])
def test_randaugment_changes_pictures_and_stays_in_range(c):
    x = photo(64, c)
    out = ops.randaugment(x, 2, 0.8, rng(64).uniform("r", 6))
    assert out.shape == x.shape and float(out.min()) >= -1e-5 and float(out.max()) <= 1 + 1e-5
    changed = (out - x).abs().flatten(1).amax(1) > 0.02
    assert changed.float().mean() > 0.8
    assert torch.allclose(ops.randaugment(x, 1, 0.0, rng(64).uniform("r", 3)), x, atol=0.05) or c  # strength 0: nearly nothing


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_near_what_pillow_does(quality):
    import io

    import numpy as np
    from PIL import Image

    pixels = (photo(1, side=32)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    pixels[8:20, 10:22] = (200, 30, 60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
    real = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    ours = ops.jpeg(x, quality, torch.zeros(1, 1))[0]
    assert (ours - real).abs().mean() < 0.012 and (ours - real).abs().mean() < 0.6 * max((x[0] - real).abs().mean(), 0.012)
    assert ops.jpeg(x[:, :1, :13, :9], quality, torch.zeros(1, 1)).shape == (1, 1, 13, 9)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_keeps_pictures_and_targets_together(settings):
    """Each picture is of one value, so that the mean of the mixed one tells its share."""
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 16, 16)
    targets = torch.eye(6)
    mixed, shares = ops.mix(x, targets, Augment(**settings), rng(6, epoch=3))
    assert torch.allclose(shares.sum(1), torch.ones(6))
    assert torch.allclose((shares * torch.arange(6.0)).sum(1), mixed.mean((1, 2, 3)), atol=1e-4)
    for first in (0, 2, 4):  # partners share their numbers: what one gives away it gets
        assert torch.allclose(shares[first, first], shares[first + 1, first + 1])
    if "mixup" not in settings:
        assert set(mixed.unique().tolist()) <= set(range(6))


def test_mixing_does_not_depend_on_the_cut_into_micro_batches():
    x, targets = torch.rand(8, 1, 6, 6), torch.eye(8)
    config, whole = Augment(mixup=0.3, cutmix=0.5), rng(8)
    together = ops.mix(x, targets, config, whole)
    for start in range(0, 8, 2):
        part = CounterRandom(0, torch.zeros(2, dtype=torch.long), torch.arange(start, start + 2))
        alone = ops.mix(x[start : start + 2], targets[start : start + 2], config, part)
        assert torch.equal(alone[0], together[0][start : start + 2]) and torch.equal(alone[1], together[1][start : start + 2])


def test_views():
    x = photo(2, 1, 6)
    assert len(ops.views(x, True, 0)) == 2 and len(ops.views(x, True, 1)) == 10 and len(ops.views(x, False, 0)) == 1
    moved = ops.views(x, False, 2)
    assert all(v.shape == x.shape for v in moved)
    assert torch.equal(moved[2][:, :, :-2], x[:, :, 2:])  # seen two pixels lower
