"""Order and randomness as pure functions: of (seed, epoch, position) for the data order, of (seed, epoch, index) for augmentation.

Nothing here has state, so a resumed run needs no replay, and the number of workers or micro-batches cannot matter. The mixing function
is splitmix64 (Steele, Lea and Flood, OOPSLA 2014, fig. 14), on int64 tensors whose products wrap around.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 2**64 - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


class CounterRandom:
    """Random numbers for a batch that depend only on (seed, epoch, index) of each sample.

    Args:
        seed: the run's seed.
        epoch: int64 [B], the epoch in which each sample is drawn.
        index: int64 [B], each sample's position in the training split.
    """

    def __init__(self, seed: int, epoch: Tensor, index: Tensor) -> None:
        self.seed, self.epoch, self._index = seed, epoch, index

    @functools.cached_property
    def _state(self) -> Tensor:
        """Made when first drawn from: most steps of most recipes draw nothing."""
        state = _mix(torch.full_like(self._index, _signed(self.seed * 2 + 1)))
        return _mix(_mix(state + self.epoch) + self._index)

    def uniform(self, name: str, count: int = 1) -> Tensor:
        """float32 [B, count] in [0, 1): the same numbers for the same name, whatever else is drawn."""
        stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        counters = torch.arange(count, device=self._index.device)
        bits = _mix(_mix(self._state + stream)[:, None] + counters)
        return _shift(bits, 40).to(torch.float32) * 2.0**-24


def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n records in an epoch: int64 [n], by the same mixing as above (in NumPy, which is faster on short arrays)."""

    def mix(x: NDArray[Any]) -> NDArray[Any]:
        x = x + np.uint64(_GAMMA & _MASK)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1 & _MASK)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2 & _MASK)
        return x ^ (x >> np.uint64(31))

    of_seed = mix(np.array([(seed * 2 + 1) & _MASK], np.uint64))
    of_epoch = mix(of_seed + np.array([(epoch * _GAMMA) & _MASK], np.uint64))
    keys = mix(of_epoch + np.arange(n, dtype=np.uint64))
    return np.argsort(keys.view(np.int64), kind="stable")


def hashed_order(digests: list[bytes], seed: int) -> NDArray[np.int64]:
    """Positions sorted by a keyed digest of each record's content: the same for the same records, however the files are ordered."""
    key = seed.to_bytes(8, "little", signed=True)
    keyed = [hashlib.blake2b(d, digest_size=8, key=key).digest() for d in digests]
    return np.array(sorted(range(len(keyed)), key=lambda i: (keyed[i], i)), dtype=np.int64)


class Order:
    """The stream of training samples: epoch after epoch, each a permutation, cut into batches of one size.

    Batches run across the end of an epoch, so that none is short and no record is dropped.

    Args:
        classes: int64 [n], each sample's class; with `balance` above 0 the classes are drawn more alike than they are, at 1 equally often.
            Each class is then a stream of its own, permutation after permutation: a rare one begins anew within an epoch, a frequent one goes
            on where the last epoch left it, and no record is drawn twice before all of its class were.
    """

    def __init__(self, n: int, batch_size: int, seed: int, classes: NDArray[np.int64] | None = None, balance: float = 0.0) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order, self._draws = -1, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._members: list[NDArray[np.int64]] = []
        if classes is not None and balance > 0:
            self._members = [np.flatnonzero(classes == c) for c in np.unique(classes)]
            shares = np.array([(1 - balance) * len(m) / n + balance / len(self._members) for m in self._members])
            bounds = np.round(np.cumsum(shares) * n).astype(np.int64)
            self._quota = np.diff(bounds, prepend=0)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(draw [B], index [B]) of the batch of step `step`, counted from 0. `draw` counts how often that record was drawn before: the
        epoch, unless classes are balanced."""
        first, offset = divmod(step * self.batch_size, self.n)
        if first == self._epoch and offset + self.batch_size <= self.n:  # within the epoch at hand: a slice of its order
            cut = slice(offset, offset + self.batch_size)
            return self._draws[cut], self._order[cut]
        last = ((step + 1) * self.batch_size - 1) // self.n
        parts = []
        for e in range(first, last + 1):  # one epoch's end and the next one's start; more where a batch holds whole epochs
            if e != self._epoch:
                self._epoch, (self._draws, self._order) = e, self._of_epoch(e)
            start = offset if e == first else 0
            cut = slice(start, start + (step + 1) * self.batch_size - e * self.n - start)
            parts.append((self._draws[cut], self._order[cut]))
        return np.concatenate([d for d, _ in parts]), np.concatenate([index for _, index in parts])

    def _of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = permutation(self.n, self.seed, epoch)
        if not self._members:
            return np.full(self.n, epoch), order
        draws, chosen = [], []
        for c, (members, quota) in enumerate(zip(self._members, self._quota)):
            position = np.arange(epoch * quota, (epoch + 1) * quota)
            cycle, place = np.divmod(position, len(members))
            draws.append(cycle)
            chosen.append(np.empty(quota, dtype=np.int64))
            for k in np.unique(cycle):
                here = cycle == k
                chosen[-1][here] = members[permutation(len(members), self.seed + 1 + c, int(k))[place[here]]]
        return np.concatenate(draws)[order], np.concatenate(chosen)[order]

    def steps(self, epochs: float) -> int:
        """Optimizer steps that cover this many epochs."""
        return max(1, -(-int(round(epochs * self.n * 1e6)) // (self.batch_size * 10**6)))
