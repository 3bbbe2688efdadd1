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
        batch_size: samples of an optimizer step; micro_batch_size: samples of one forward pass, at most.
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
        self.tokens: int | None = None  # of one forward pass, at most, where samples differ in length
        self.order = Order(len(encoded), batch_size, seed, classes, balance)

    @property
    def per_step(self) -> int:
        """Forward passes of an optimizer step; where their number differs, of the first one."""
        mine = self.ranks.part(self.batch_size)
        if self.tokens is None:
            return -(-len(range(self.batch_size)[mine]) // self.micro_batch_size)
        return len(self._parts(self.index(0)[mine]))

    def _parts(self, index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Which samples of a step go through the model together, as places in `index`: with `tokens` as many as that allows, the longest first."""
        if self.tokens is None:
            return np.split(np.arange(len(index)), range(self.micro_batch_size, len(index), self.micro_batch_size))
        sizes = self.task.sizes(self.encoded, index)
        parts: list[list[int]] = []
        room: list[int] = []
        for k in np.argsort(-sizes, kind="stable"):
            fits = (p for p, left in enumerate(room) if left >= sizes[k] and len(parts[p]) < self.micro_batch_size)
            part = next(fits, None)
            if part is None:
                parts.append([])
                room.append(self.tokens)
                part = len(parts) - 1
            parts[part].append(int(k))
            room[part] -= int(sizes[k])
        return [np.array(p) for p in parts]

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
        epoch, index = (a[mine] for a in self.order.batch(step))
        for part in self._parts(index):
            epochs, samples = torch.from_numpy(epoch[part]).to(self.device), torch.from_numpy(index[part]).to(self.device)
            yield self.task.batch(self.encoded, samples, training=True, rng=CounterRandom(self.seed, epochs, samples))

    def records(self, step: int) -> list[str]:
        """The names of the records of a step."""
        return [self.encoded.describe(int(i)) for i in self.index(step)]

    def unusable(self, step: int) -> list[str]:
        """The records of a step whose inputs or targets hold NaN or infinite values."""
        index, names = self.index(step)[self.ranks.part(self.batch_size)], []
        for part, batch in zip(self._parts(index), self.micro(step)):
            bad = ~torch.isfinite(batch.inputs.float()).flatten(1).all(1)
            if batch.targets.is_floating_point():
                bad |= ~torch.isfinite(batch.targets).reshape(len(bad), -1).all(1)
            names += [self.encoded.describe(int(index[part[int(i)]])) for i in bad.nonzero()[:, 0]]
        return names
