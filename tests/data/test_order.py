"""Order and randomness: pure functions of (seed, epoch, position)."""

import numpy as np
import pytest
import torch

from groundup.data.order import CounterRandom, Order, hashed_order, permutation


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_each_epoch_is_a_permutation(n, seed):
    for epoch in (0, 1, 10**6):
        assert sorted(permutation(n, seed, epoch)) == list(range(n))


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_first_places_are_roughly_uniform():
    first = np.bincount([permutation(10, 0, epoch)[0] for epoch in range(2000)], minlength=10)
    assert first.min() > 140 and first.max() < 260


@pytest.mark.parametrize("n, batch_size", [(10, 3), (10, 10), (10, 25), (1, 4), (7, 1)])
def test_batches_run_across_epochs(n, batch_size):
    order = Order(n, batch_size, seed=5)
    stream = np.concatenate([permutation(n, 5, e) for e in range(90)])
    index = np.concatenate([order.batch(step)[1] for step in range(20)])
    epoch = np.concatenate([order.batch(step)[0] for step in range(20)])
    assert np.array_equal(index, stream[: 20 * batch_size])
    assert np.array_equal(epoch, np.arange(20 * batch_size) // n)


def test_a_batch_does_not_depend_on_what_was_asked_before():
    forwards = Order(13, 4, seed=0)
    wanted = [forwards.batch(step) for step in range(30)]
    backwards = Order(13, 4, seed=0)
    for step in reversed(range(30)):
        assert all(np.array_equal(a, b) for a, b in zip(backwards.batch(step), wanted[step]))


def test_steps_cover_the_epochs():
    assert [Order(100, 10, 0).steps(e) for e in (1, 2.5, 0.01, 0.1)] == [10, 25, 1, 1]
    assert Order(101, 10, 0).steps(1) == 11 and Order(60_000, 256, 0).steps(3) == 704


def test_hashed_order_follows_the_content():
    digests = [bytes([i]) * 16 for i in range(30)]
    order = [digests[i] for i in hashed_order(digests, 3)]
    shuffled = digests[::-1]
    assert order == [shuffled[i] for i in hashed_order(shuffled, 3)] and order != digests
    assert order != [digests[i] for i in hashed_order(digests, 4)]


def uniform(index, *, seed=0, epoch=0, name="a", count=1):
    index = torch.as_tensor(index)
    return CounterRandom(seed, torch.full_like(index, epoch), index).uniform(name, count)


def test_randomness_does_not_depend_on_the_batch():
    whole = uniform(range(100), count=3)
    assert torch.equal(torch.cat([uniform(range(0, 37), count=3), uniform(range(37, 100), count=3)]), whole)
    assert torch.equal(uniform([99, 5, 5], count=3), whole[[99, 5, 5]])


def test_randomness_depends_on_seed_epoch_index_and_name():
    base = uniform(range(1000))
    for other in (uniform(range(1000), seed=1), uniform(range(1000), epoch=1), uniform(range(1, 1001)), uniform(range(1000), name="b")):
        assert abs(float(torch.corrcoef(torch.stack([base[:, 0], other[:, 0]]))[0, 1])) < 0.12


def test_randomness_is_roughly_uniform():
    values = uniform(range(20_000), count=2)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    for column in values.T:
        assert column.histc(10, 0, 1).min() > 1800 and column.histc(10, 0, 1).max() < 2200
    assert abs(float(torch.corrcoef(values.T)[0, 1])) < 0.03


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    uniform(range(10))
    permutation(10, 0, 0)
    Order(10, 3, 0).batch(5)
    assert torch.equal(torch.get_rng_state(), before)


# -- classes drawn alike -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balanced_classes_are_drawn_as_often_as_said(balance):
    classes = np.array([0] * 90 + [1] * 9 + [2])
    order = Order(100, 10, 0, classes, balance)
    drawn = [order.batch(step) for step in range(30)]
    index = np.concatenate([i for _, i in drawn])
    shares = np.bincount(classes[index], minlength=3) / len(index)
    assert np.allclose(shares, (1 - balance) * np.array([0.9, 0.09, 0.01]) + balance / 3, atol=0.011)
    pairs = {(int(d), int(i)) for d, i in zip(np.concatenate([d for d, _ in drawn]), index)}
    assert len(pairs) == len(index)  # each draw of a record has a number of its own, so it is augmented anew
    counts = np.bincount(index, minlength=100)
    assert counts[:90].max() - counts[:90].min() <= 1  # all of a class before one of it again


def test_balanced_order_is_a_function_of_the_step():
    classes = np.array([0, 0, 0, 0, 1, 1])
    a, b = (Order(6, 4, 3, classes, 1.0) for _ in range(2))
    wanted = [a.batch(s) for s in range(12)]
    for step in (11, 3, 7):
        assert all(np.array_equal(x, y) for x, y in zip(b.batch(step), wanted[step]))
