"""Several processes that train one model, each on its part of every batch (`torchrun -m groundup train ...`).

The gradient is summed over all processes before it is divided by the count of the whole step, so N processes take the step that one would take.
Rank 0 writes the run folder; the others compute what it computes and keep silent.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from groundup.training.signals import StopRequest


@dataclass
class Ranks:
    """This process among all. `wants_stop` is this rank's own request, `stopping` what the last step agreed on."""

    rank: int = 0
    world: int = 1
    wants_stop: bool = False
    stopping: bool = False

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks; those of one dtype travel as one."""
        for dtype in {t.dtype for t in tensors}:
            alike = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in alike])
            dist.all_reduce(flat)
            for t, part in zip(alike, flat.split([t.numel() for t in alike])):
                t.copy_(part.view_as(t))

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's rows [n, columns], on the CPU; n may differ."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(rows)]))
        padded = rows.new_zeros(max(int(n) for n in sizes), rows.shape[1])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return [part[: int(n)] for part, n in zip(found, sizes)]

    def agree(self, value: Any) -> Any:
        """Rank 0's value (of JSON kinds), on every rank."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode()
        size = torch.tensor([len(text)])
        dist.broadcast(size, src=0)
        held = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.rank == 0 else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(held, src=0)
        return json.loads(bytes(held.tolist()))

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """What is inside is done by rank 0 first; the others then find it in the cache."""
        if self.rank:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def part(self, count: int) -> slice:
        """This rank's share of `count` samples."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


def start() -> Ranks:
    """Joins the other processes that torchrun started; alone where it did not."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")  # words travel on the CPU
    return Ranks(dist.get_rank(), world)


class AgreedStop:
    """A stop request that all ranks see at the same step."""

    def __init__(self, own: StopRequest, ranks: Ranks) -> None:
        self.own, self.ranks = own, ranks

    @property
    def name(self) -> str | None:
        return self.own.name or ("SIGTERM" if self.ranks.stopping else None)

    @property
    def exit_status(self) -> int:
        return 130 if self.name == "SIGINT" else 143

    def __call__(self) -> bool:
        self.ranks.wants_stop = self.own()
        return self.ranks.stopping
