"""Metrics of language models, with intervals over windows, conversations or pairs of answers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from groundup.metrics.streamed import FEW, RESAMPLES, MetricSet, percentile_interval, poisson_weights


class SummedMetrics(MetricSet):
    """Metrics that are functions of sums over records. The resamples' weights depend on a record's number alone: two models on the same records stand on
    the same resamples, and their difference is a paired one."""

    columns: int
    gather: Callable[[Tensor], list[Tensor]] | None = None  # of several processes that each see a part of the records: rows -> those of all, in order

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.sums = np.zeros((RESAMPLES + 1, self.columns))
        self.records = 0

    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        """`outputs`: [B, columns], what each record adds to the sums."""
        rows = outputs.detach().cpu().double()
        for part in [rows] if self.gather is None else self.gather(rows):
            self.add(part.numpy())

    def add(self, rows: NDArray[np.float64]) -> None:
        """Rows as `update` gets them; those of all processes come here in the order of the records."""
        self.sums[0] += rows.sum(0)
        self.records += len(rows)
        if self.resampling:
            self.sums[1:] += poisson_weights(self.random, len(rows)) @ rows

    @abstractmethod
    def values(self) -> dict[str, NDArray[np.float64]]:
        """Each metric of the records, then of each resample: [1 + RESAMPLES]."""

    def compute(self) -> dict[str, float]:
        return {k: float(v[0]) for k, v in self.values().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        if self.records < FEW:
            return dict.fromkeys(self.values(), (math.nan, math.nan)) if self.resampling else {}
        return {k: percentile_interval(v[1:]) for k, v in self.values().items()} if self.resampling else {}

    def stored(self) -> dict[str, Any]:
        """JSON-able; the inverse is `restore`."""
        return {"sums": self.sums.tolist(), "records": self.records}

    def restore(self, stored: dict[str, Any]) -> None:
        self.sums, self.records = np.array(stored["sums"]), int(stored.get("records", FEW))


class LanguageMetrics(SummedMetrics):
    """Loss, perplexity, bits per byte and token accuracy. Sums: nats, tokens, right ones.

    Args:
        bytes_per_token: UTF-8 bytes of the split's text over its predicted tokens; bits per byte compares models of different vocabularies.
    """

    higher_is_better = {"loss": False, "perplexity": False, "bits_per_byte": False, "token_accuracy": True}
    columns = 3

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token

    def values(self) -> dict[str, NDArray[np.float64]]:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = self.sums[:, 0] / self.sums[:, 1]
            return {
                "loss": loss,
                "perplexity": np.exp(loss),
                "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
                "token_accuracy": self.sums[:, 2] / self.sums[:, 1],
            }


class PreferenceMetrics(SummedMetrics):
    """Of pairs of answers: the loss, the share whose better answer gained more than the other since training began (`accuracy`; equal gains count half),
    by how much (`margin`, nats), and the share whose better answer is the likelier one per token (`ranking`).

    A ranked list gives several pairs, which are drawn together: intervals are over lists.
    """

    higher_is_better = {"loss": False, "accuracy": True, "margin": True, "ranking": True}
    columns = 5

    def __init__(self) -> None:
        super().__init__()
        self.last, self.drawn = math.nan, np.zeros((RESAMPLES, 0))  # the record that the last pair was of, and its weights

    def add(self, rows: NDArray[np.float64]) -> None:
        """`rows`: [pairs, columns + 1], in the end the number of the record that a pair is of; pairs of one record follow each other."""
        for record in dict.fromkeys(rows[:, -1].tolist()):
            of = rows[rows[:, -1] == record, :-1].sum(0)
            if record != self.last:
                self.last, self.drawn = record, poisson_weights(self.random, 1)
                self.records += 1
            self.sums[0] += of
            if self.resampling:
                self.sums[1:] += self.drawn * of

    def values(self) -> dict[str, NDArray[np.float64]]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: self.sums[:, i] / self.sums[:, 4] for i, name in enumerate(self.higher_is_better)}
