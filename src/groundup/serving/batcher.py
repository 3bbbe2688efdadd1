"""Micro-batching: what arrives while the model computes is the next batch.

Nothing waits for company. An idle server answers a single request at once; under load the queue fills during each forward pass, and the
next pass takes all of it. So latency is never traded for throughput, and there is nothing to tune.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Busy(Exception):
    """The queue is full."""


class Batcher:
    """Runs rows of many callers as one forward pass, in a thread of its own.

    Args:
        forward: [B, ...] -> [B, outputs], called in one thread only.
        max_batch: rows of one pass (a single request may be larger).
        max_queue: rows that may wait; more raise `Busy`.
        on_batch: told the rows of each pass.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], max_batch: int, max_queue: int, on_batch: Callable[[int], None]) -> None:
        self._forward, self._max_batch, self._max_queue, self._on_batch = forward, max_batch, max_queue, on_batch
        self._waiting: deque[tuple[Tensor, asyncio.Future[Tensor]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None
        self.rows = 0  # in the queue

    async def submit(self, rows: Tensor) -> Tensor:
        """The outputs of `rows` [n, ...]. Raises Busy."""
        if self.rows + len(rows) > self._max_queue and self._waiting:
            raise Busy
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future))
        self.rows += len(rows)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft()]
            size = len(taken[0][0])
            while self._waiting and size + len(self._waiting[0][0]) <= self._max_batch:
                taken.append(self._waiting.popleft())
                size += len(taken[-1][0])
            self.rows -= size
            self._on_batch(size)
            try:
                batch = torch.cat([rows for rows, _ in taken]) if len(taken) > 1 else taken[0][0]
                outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, batch)
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), part in zip(taken, outputs.split([len(rows) for rows, _ in taken])):
                if not future.done():  # its client may have gone
                    future.set_result(part)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
