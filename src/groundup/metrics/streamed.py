"""What every set of metrics offers, and the intervals.

Intervals are 95 % percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13) over the records, computed
from counts or from running sums: the records themselves are not kept. Drawing n records with replacement and counting them by cell is one
multinomial draw over the cells, so for metrics that are functions of counts the bootstrap here is exact. For sums over records the weights
of a resample are independent Poisson(1) draws (Chamandy et al., Estimating uncertainty for massive data streams, 2012).
Shares of records (accuracy, top-5) have a closed form that stays honest where the bootstrap does not: 10 right of 10 would give [1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000


class MetricSet(ABC):
    """Metrics of one task, updated batch by batch.

    `higher_is_better` lists the direction of each value of `compute`, for choosing the best checkpoint.
    """

    higher_is_better: dict[str, bool]
    resampling = True  # off while training: the running bootstrap costs more than the metrics, and only final figures need intervals

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        """Adds a batch: the model's raw outputs, the encoded targets, and the summed loss."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values so far, plain floats. An empty set gives NaN."""

    @abstractmethod
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of the values that have one."""

    def details(self) -> dict[str, Any]:
        """Tables that belong to the values (per class, confusion), JSON-able."""
        return {}


FEW = 5  # records below which resamples of them tell nothing


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of bootstrap values, undefined ones left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def share_interval(hits: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of records (Wilson, Probable inference, 1927): never of width zero, also at 0 and 1."""
    z2 = 1.959963984540054**2
    p = hits / total
    middle, half = p + z2 / (2 * total), (z2 * (p * (1 - p) / total + z2 / (4 * total**2))) ** 0.5
    # Rounding must not put the value itself outside.
    return max(0.0, min((middle - half) / (1 + z2 / total), p)), min(1.0, max((middle + half) / (1 + z2 / total), p))


def poisson_weights(random: np.random.Generator, records: int) -> NDArray[np.float64]:
    """How often each record stands in each resample, [RESAMPLES, records]; drawn record by record, so that intervals do not depend on
    how the records are cut into batches."""
    return random.poisson(1.0, size=(records, RESAMPLES)).T.astype(np.float64)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Division where 0/0 is 0, as scikit-learn counts an undefined precision or recall."""
    return np.divide(numerator, denominator, out=np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape)), where=denominator != 0)
