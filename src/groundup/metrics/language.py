"""Loss, perplexity, bits per byte and token accuracy of a language model, with intervals over windows of text."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from groundup.metrics.streamed import RESAMPLES, MetricSet, percentile_interval, poisson_weights


class LanguageMetrics(MetricSet):
    """Sums over windows: nats, tokens, right ones.

    Args:
        bytes_per_token: UTF-8 bytes of the split's text over its predicted tokens; bits per byte compares models of different vocabularies.
    """

    higher_is_better = {"loss": False, "perplexity": False, "bits_per_byte": False, "token_accuracy": True}

    def __init__(self, bytes_per_token: float) -> None:
        self.bytes_per_token = bytes_per_token
        self.random = np.random.default_rng(0)
        self.sums = np.zeros((RESAMPLES + 1, 3))

    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        """`outputs`: [B, 3], nats, tokens and right ones of each window."""
        rows = outputs.detach().cpu().double().numpy()
        self.sums[0] += rows.sum(0)
        if self.resampling:
            self.sums[1:] += poisson_weights(self.random, len(rows)) @ rows

    def _values(self) -> dict[str, NDArray[np.float64]]:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = self.sums[:, 0] / self.sums[:, 1]
            return {
                "loss": loss,
                "perplexity": np.exp(loss),
                "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
                "token_accuracy": self.sums[:, 2] / self.sums[:, 1],
            }

    def compute(self) -> dict[str, float]:
        return {k: float(v[0]) for k, v in self._values().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {k: percentile_interval(v[1:]) for k, v in self._values().items()} if self.resampling else {}
