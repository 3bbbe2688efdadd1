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
