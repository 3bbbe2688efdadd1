"""Pictures that do not fit in memory, decoded ahead of the training by worker processes.

The batches are told in advance (their order is a pure function), so workers only save time: the same pictures come back for any number
of them, and a worker that dies is replaced and its batch decoded again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from groundup.core.errors import DataError
from groundup.data.pictures import FileImages

Plan = Callable[[int], NDArray[np.int64]]


class _Decoding(Dataset[Tensor | None]):
    """Item k is the decoded batch k of the plan; None where a picture cannot be read: the main process reads it again and says which."""

    def __init__(self, images: FileImages, batches: list[NDArray[np.int64]]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Tensor | None:
        try:
            return self.images.fetch(self.batches[k])
        except DataError:
            return None


def _start_worker(_: int) -> None:
    # A worker must end when its parent ends it; Ctrl-C is the parent's business.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _first(batch: list[Tensor | None]) -> Tensor | None:
    return batch[0]


class StreamedImages:
    """Pictures by index, read ahead along a plan.

    Args:
        images: the files.
        workers: processes that decode; 0 decodes in this one.
        on_restart: told once for every set of workers that had to be replaced.
    """

    ahead = 64  # batches handed to one set of workers; bounds what the main process holds of the plan

    def __init__(self, images: FileImages, workers: int, on_restart: Callable[[str], None] | None = None) -> None:
        # Raw pixels only have to be copied: handing them from process to process would cost more than it saves.
        self.images, self.workers, self.on_restart = images, 0 if images.pixels is not None else workers, on_restart
        self.shape = images.shape
        self._plan: Plan | None = None
        self._next = 0
        self._iterator: Iterator[Tensor | None] = iter(())
        self._queued: list[NDArray[np.int64]] = []

    def follow(self, plan: Plan, start: int) -> None:
        """Reads ahead the batches plan(start), plan(start + 1), ..."""
        self._plan, self._next, self._queued, self._iterator = plan, start, [], iter(())

    def fetch(self, index: NDArray[np.int64]) -> Tensor:
        """uint8 [B, C, H, W]."""
        if self._plan is None or self.workers == 0:
            return self.images.fetch(index)
        if not self._queued:
            self._queue()
        if not np.array_equal(self._queued[0], index):
            return self.images.fetch(index)  # asked out of order (the dry step): decoded here
        batch: Tensor | None = None
        for _ in range(3):
            try:
                batch = next(self._iterator)
                break
            except (RuntimeError, OSError, EOFError) as error:
                # A dead worker: torch noticed, or its end of the pipe closed while a batch came through.
                if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("exited unexpectedly", "killed by signal")):
                    raise
                if self.on_restart:
                    self.on_restart((str(error) or type(error).__name__).splitlines()[0])
                self._iterator = self._workers(self._queued)
        self._queued.pop(0)
        return self.images.fetch(index) if batch is None else batch

    def _queue(self) -> None:
        assert self._plan is not None
        self._queued = [self._plan(self._next + k) for k in range(self.ahead)]
        self._next += self.ahead
        self._iterator = self._workers(self._queued)

    def _workers(self, batches: list[NDArray[np.int64]]) -> Iterator[Tensor | None]:
        loader: DataLoader[Any] = DataLoader(
            _Decoding(self.images, list(batches)),
            batch_size=1,
            num_workers=self.workers,
            collate_fn=_first,
            worker_init_fn=_start_worker,
            # Its own generator: the default would draw from the global one, and with it change what dropout draws next.
            generator=torch.Generator().manual_seed(0),
        )
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        workers = iter(loader)
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            # torch would raise wherever the program happens to be when a worker dies, in the middle of a backward pass too; without its
            # handler the next batch that is waited for says so, in `fetch`.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return workers


def default_workers() -> int:
    """Worker processes for decoding: the cores that this process may use, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)
