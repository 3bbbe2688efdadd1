"""The batches of a training: step -> micro-batches, as a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.data.order import CounterRandom, Order
from groundup.data.streaming import StreamedImages
from groundup.tasks.base import Batch, Encoded, Task
from groundup.training.parallel import Ranks


class Batches:
    """Cuts the sample order into optimizer steps and micro-batches.

    Args:
        batch_size: samples of an optimizer step; micro_batch_size: samples of one forward pass.
        classes, balance: see `Order`.
        ranks: each process takes its part of every step.
    """

    def __init__(
        self,
        task: Task,
        encoded: Encoded,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        device: torch.device,
        classes: NDArray[np.int64] | None = None,
        balance: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.task, self.encoded, self.device, self.seed = task, encoded, device, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.order = Order(len(encoded), batch_size, seed, classes, balance)
        self.per_step = -(-batch_size // micro_batch_size)

    def start(self, step: int) -> None:
        """Streamed inputs are read ahead from this step on."""
        if isinstance(self.encoded.inputs, StreamedImages):
            self.encoded.inputs.follow(self._plan, step * self.per_step)

    def _plan(self, k: int) -> NDArray[np.int64]:
        _, index = self.order.batch(k // self.per_step)
        index = index[self.ranks.part(self.batch_size)]
        start = k % self.per_step * self.micro_batch_size
        return index[start : start + self.micro_batch_size]

    def index(self, step: int) -> NDArray[np.int64]:
        """Positions in the training split of the samples of a step."""
        return self.order.batch(step)[1]

    def micro(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step, on the device."""
        mine = self.ranks.part(self.batch_size)
        epoch, index = (torch.from_numpy(a[mine]).to(self.device) for a in self.order.batch(step))
        for start in range(0, len(index), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            yield self.task.batch(self.encoded, index[part], training=True, rng=CounterRandom(self.seed, epoch[part], index[part]))

    def records(self, step: int) -> list[str]:
        """The names of the records of a step."""
        return [self.encoded.describe(int(i)) for i in self.index(step)]

    def unusable(self, step: int) -> list[str]:
        """The records of a step whose inputs or targets hold NaN or infinite values."""
        index, names = self.index(step)[self.ranks.part(self.batch_size)], []
        for start, batch in zip(range(0, len(index), self.micro_batch_size), self.micro(step)):
            bad = ~torch.isfinite(batch.inputs.float()).flatten(1).all(1)
            if batch.targets.is_floating_point():
                bad |= ~torch.isfinite(batch.targets).reshape(len(bad), -1).all(1)
            names += [self.encoded.describe(int(index[start + int(i)])) for i in bad.nonzero()[:, 0]]
        return names
