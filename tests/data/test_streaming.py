"""Streamed pictures: the batches of any number of workers are those of memory."""

import os
import signal

import numpy as np
import pytest
import torch

from groundup.core.errors import DataError
from groundup.data.order import Order
from groundup.data.pictures import ArrayImages, FileImages
from groundup.data.streaming import StreamedImages, default_workers


def plan_of(n, batch_size=5):
    order = Order(n, batch_size, seed=0)
    return lambda step: order.batch(step)[1]


def test_streamed_equals_memory(folder, prepared):
    memory, files = (prepared(folder, in_memory=m, cached=False) for m in (True, False))
    assert isinstance(memory.dataset.inputs, ArrayImages) and isinstance(files.dataset.inputs, FileImages)
    assert memory.fingerprint == files.fingerprint
    assert torch.equal(memory.dataset.inputs.fetch(range(24)), files.dataset.inputs.fetch(range(24)))
    assert np.array_equal(files.dataset.inputs.load().array, memory.dataset.inputs.array)
    index = memory.splits["train"]
    for a, b in zip(memory.dataset.inputs.moments(index), files.dataset.inputs.moments(index)):
        assert np.allclose(a, b, rtol=1e-12)


def test_any_number_of_workers_gives_the_same_batches(folder, prepared):
    data = prepared(folder, in_memory=False, cached=False)
    train, memory = data.splits["train"], prepared(folder, in_memory=True).dataset.inputs
    plan = plan_of(len(train))
    wanted = [memory.select(train).fetch(plan(step)) for step in range(3, 9)]
    before = torch.get_rng_state()
    for workers in (0, 2):
        streamed = StreamedImages(data.dataset.inputs.select(train), workers)
        streamed.ahead = 4
        streamed.follow(plan, 3)
        assert all(torch.equal(streamed.fetch(plan(step)), batch) for step, batch in zip(range(3, 9), wanted))
        if workers:  # out of order, as the rehearsal asks
            assert torch.equal(streamed.fetch(np.array([1, 0])), memory.select(train).fetch([1, 0]))
            assert torch.equal(streamed.fetch(plan(9)), memory.select(train).fetch(plan(9)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_worker_is_replaced(folder, prepared):
    images = prepared(folder, in_memory=False, cached=False).dataset.inputs
    told: list[str] = []
    streamed = StreamedImages(images, 2, told.append)
    plan = plan_of(24)
    streamed.follow(plan, 0)
    batches = [streamed.fetch(plan(0))]
    for worker in streamed._iterator._workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    batches += [streamed.fetch(plan(step)) for step in range(1, 70)]
    assert all(torch.equal(batch, images.fetch(plan(step))) for step, batch in enumerate(batches))
    assert len(told) >= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_vanishes_is_named(folder, prepared, workers):
    images = prepared(folder, in_memory=False, cached=False).dataset.inputs
    (images.tree.root / images.names[3]).write_bytes(b"overwritten")
    (images.tree.root / images.names[4]).unlink()
    told: list[str] = []
    streamed = StreamedImages(images, workers, told.append)
    streamed.follow(lambda step: np.array([2 * step, 2 * step + 1]), 0)
    assert streamed.fetch(np.array([0, 1])).shape == (2, 3, 6, 8)
    with pytest.raises(DataError, match=r"图 03.png could be read when the run began and cannot be now"):
        streamed.fetch(np.array([2, 3]))
    assert told == []


def test_default_workers():
    assert 1 <= default_workers() <= 8
