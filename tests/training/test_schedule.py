import math

import pytest
import torch

from groundup.core.recipe import Schedule
from groundup.training.schedule import factor


def curve(total=100, **config):
    return [factor(Schedule(**config), step, total) for step in range(total)]


def test_constant_is_one():
    assert set(curve(name="constant")) == {1.0}


def test_cosine_equals_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    for ours in curve(name="cosine", floor=0.1):
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        peer.step()


def test_step_decays_by_gamma_at_each_third():
    values = curve(total=99, name="step", gamma=0.1)
    assert [values[0], values[32], values[33], values[66]] == pytest.approx([1, 1, 0.1, 0.01])


def test_wsd_is_flat_then_falls_linearly_to_the_floor():
    values = curve(name="wsd", decay=0.2, warmup=0.1)
    assert values[9] == 1.0 and set(values[10:80]) == {1.0}
    falling = values[80:]
    steps = [a - b for a, b in zip(falling, falling[1:])]
    assert steps == pytest.approx([0.05] * 19) and falling[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "wsd"])
def test_warmup_rises_linearly_from_the_first_step(name):
    values = curve(name=name, warmup=0.1)
    assert values[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])


def test_one_cycle_rises_then_falls():
    values = curve(name="one-cycle")
    peak = values.index(max(values))
    assert 28 <= peak <= 31 and values[0] < 0.1 and values[-1] < 0.01
    assert values[:peak] == sorted(values[:peak]) and values[peak:] == sorted(values[peak:], reverse=True)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "one-cycle", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 1000])
def test_any_length_gives_finite_factors_up_to_one(name, total):
    values = curve(total=total, name=name, warmup=0.3)
    assert all(math.isfinite(v) and 0 <= v <= 1 for v in values)
