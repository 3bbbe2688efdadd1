"""Mean squared and absolute error and R², from running sums in float64; several targets are averaged, as scikit-learn does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from groundup.metrics.streamed import RESAMPLES, MetricSet, percentile_interval, poisson_weights


class RegressionMetrics(MetricSet):
    """Outputs and targets [B, targets], scaled by `scale` and `offset` ([targets]) back to the units of the data.

    Sums are taken around each target's first value, so that R² stays exact for targets far from zero, and a constant target has a
    variance of exactly zero (the mean of equal numbers may be rounded).
    """

    higher_is_better = {"loss": False, "mse": False, "rmse": False, "mae": False, "r2": True}

    def __init__(self, names: list[str], scale: NDArray[np.float64], offset: NDArray[np.float64]) -> None:
        self.names, self.scale, self.offset = names, scale, offset
        self.random = np.random.default_rng(0)
        self.centre: NDArray[np.float64] | None = None
        # per target: squared error, absolute error, target, squared target; row 0 is the data, the others are the resamples.
        self.sums = np.zeros((RESAMPLES + 1, 4, len(names)))
        self.weight = np.zeros(RESAMPLES + 1)
        self.loss_sum = 0.0

    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        predicted = outputs.detach().cpu().double().numpy() * self.scale + self.offset
        true = targets.detach().cpu().double().numpy() * self.scale + self.offset
        if self.centre is None:
            self.centre = true[0]
        error, y = predicted - true, true - self.centre
        parts = np.stack([error**2, np.abs(error), y, y**2], 1)  # [B, 4, targets]
        self.sums[0] += parts.sum(0)
        self.weight[0] += len(true)
        self.loss_sum += loss_sum
        if self.resampling:
            weights = poisson_weights(self.random, len(true))
            self.sums[1:] += np.tensordot(weights, parts, axes=1)
            self.weight[1:] += weights.sum(1)

    def _values(self) -> dict[str, NDArray[np.float64]]:
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self.sums / self.weight[:, None, None]
            mse, mae = mean[:, 0], mean[:, 1]
            variance = mean[:, 3] - mean[:, 2] ** 2
            constant = ~(variance > 1e-14 * mean[:, 3])  # below it, what is left is rounding
            # A constant target: a perfect prediction counts 1, any other 0 (as scikit-learn).
            r2 = np.where(constant, np.where(mse == 0, 1.0, 0.0), 1 - mse / variance)
            # A resample that happens to hold one value of a target that varies, or nothing at all, has no R².
            r2[1:][constant[1:] & ~constant[0]] = np.nan
        return {"mse": mse.mean(1), "rmse": np.sqrt(mse).mean(1), "mae": mae.mean(1), "r2": r2.mean(1)}

    def compute(self) -> dict[str, float]:
        if not self.weight[0]:
            return dict.fromkeys(self.higher_is_better, float("nan"))
        return {"loss": self.loss_sum / self.weight[0] / len(self.names)} | {k: float(v[0]) for k, v in self._values().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {k: percentile_interval(v[1:]) for k, v in self._values().items()} if self.weight[0] and self.resampling else {}

    def details(self) -> dict[str, Any]:
        if not self.weight[0] or len(self.names) == 1:
            return {}
        mean = self.sums[0] / self.weight[0]
        return {"per_target": {n: {"mse": float(mean[0, i]), "mae": float(mean[1, i])} for i, n in enumerate(self.names)}}
