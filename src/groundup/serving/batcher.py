"""Micro-batching: what arrives while the model computes is the next forward pass.

A pass waits for company only when company is known to come: inputs that are being decoded at this moment, and `max_wait` seconds at most. So a
single request on an idle server is answered at once, and under load the passes fill up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Answers = list[dict[str, Any]]


class Batcher:
    """Runs rows of many callers as one forward pass, in a thread of its own. Its methods belong to one event loop.

    Args:
        compute: rows [B, ...] and for each how many classes to list -> B answers; called in one thread only.
        max_batch: rows of one pass at most; more of one caller are several passes.
        max_wait: seconds.
        on_batch: told the rows of each pass.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, list[int]], Answers],
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.compute, self.max_batch, self.max_wait, self._on_batch = compute, max_batch, max_wait, on_batch
        self._waiting: deque[tuple[Tensor, int, asyncio.Future[Answers]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None
        self._company = asyncio.Event()
        self.rows = 0  # that wait for a pass
        self.coming = 0  # that are being decoded: the caller counts them up, and `arrived` down

    def arrived(self, rows: int) -> None:
        """`rows` that were coming are submitted next, or given up."""
        self.coming -= rows
        if not self.coming:
            self._company.set()

    async def submit(self, rows: Tensor, top: int) -> Answers:
        """The answers to `rows` [n, ...], in their order."""
        loop = asyncio.get_running_loop()
        futures = []
        for part in rows.split(self.max_batch) if len(rows) > self.max_batch else [rows]:
            futures.append(loop.create_future())
            self._waiting.append((part, top, futures[-1]))
        self.rows += len(rows)
        if self.rows >= self.max_batch:
            self._company.set()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        if len(futures) == 1:
            answers: Answers = await futures[0]
            return answers
        return [answer for part in await asyncio.gather(*futures) for answer in part]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                if self.coming and self.rows < self.max_batch:
                    self._company.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.max_wait):
                            await self._company.wait()
                taken, size = [], 0
                while self._waiting and size + len(self._waiting[0][0]) <= self.max_batch:
                    part = self._waiting.popleft()
                    self.rows -= len(part[0])
                    if not part[2].done():  # its caller may have gone
                        taken.append(part)
                        size += len(part[0])
                if taken:
                    self._on_batch(size)
                    for (_, _, future), result in zip(taken, await loop.run_in_executor(self._thread, self._run, taken)):
                        if future.done():
                            continue
                        if isinstance(result, Exception):
                            future.set_exception(result)
                        else:
                            future.set_result(result)
        finally:
            self._worker = None

    def _run(self, taken: list[tuple[Tensor, int, Any]]) -> list[Answers | Exception]:
        """In the model's thread. Where a pass of many fails, each caller gets a pass of its own: one must not fail for another."""
        try:
            rows = torch.cat([rows for rows, _, _ in taken]) if len(taken) > 1 else taken[0][0]
            answers = self.compute(rows, [top for rows, top, _ in taken for _ in range(len(rows))])
        except Exception as error:
            return [error] if len(taken) == 1 else [self._run([part])[0] for part in taken]
        found: list[Answers | Exception] = []
        for rows, _, _ in taken:
            found.append(answers[: len(rows)])
            answers = answers[len(rows) :]
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
