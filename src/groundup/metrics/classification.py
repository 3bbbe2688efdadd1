"""Accuracy, precision, recall, F1 and the confusion matrix, from integer counts; equal to scikit-learn's (`zero_division=0`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.metrics.streamed import RESAMPLES, MetricSet, percentile_interval, poisson_weights, ratio, share_interval


def scores_of(confusion: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Scores of confusion matrices [..., true, predicted]; each value has the leading shape."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    total = support.sum(-1)
    precision, recall = ratio(hit, predicted), ratio(hit, support)
    f1 = ratio(2 * hit, support + predicted)
    weight = ratio(support, total[..., None])
    return {
        "accuracy": ratio(hit.sum(-1), total),
        "precision_macro": precision.mean(-1),
        "recall_macro": recall.mean(-1),
        "f1_macro": f1.mean(-1),
        "precision_weighted": (precision * weight).sum(-1),
        "recall_weighted": (recall * weight).sum(-1),
        "f1_weighted": (f1 * weight).sum(-1),
    }


BINS = 15


def expected_calibration_error(bins: NDArray[np.float64], confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the confidence is from the share of right answers, averaged over the records (Guo et al., arXiv 1706.04599, eq. 3; 15 bins of
    equal width).

    Args:
        bins, confidence: counts and summed confidences [..., (wrong, right), bins].
    """
    gap = np.abs(bins[..., 1, :] - confidence.sum(-2)).sum(-1)
    return ratio(gap, bins.sum((-2, -1)))


class ClassificationMetrics(MetricSet):
    """One label of several. Outputs are logits [B, classes], or [B, 1] for two classes (positive: the second); targets int64 [B]."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self.top5, self.loss_sum = 0, 0.0
        self.bins = np.zeros((2, BINS))  # records by confidence, wrong ones and right ones
        self.confidence = np.zeros((2, BINS))  # sums of it
        self.higher_is_better = dict.fromkeys(scores_of(np.zeros((1, 1))), True) | {"loss": False, "ece": False}
        if len(classes) > 5:
            self.higher_is_better["top5_accuracy"] = True

    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        outputs = outputs.float()
        predicted = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
        n = len(self.classes)
        self.confusion += torch.bincount(targets * n + predicted, minlength=n * n).reshape(n, n).cpu().numpy()
        if n > 5:
            self.top5 += int((outputs.topk(5, dim=1).indices == targets[:, None]).any(1).sum())
        self.loss_sum += loss_sum
        sure = (outputs[:, 0].abs().sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1).amax(1)).double().cpu().numpy()
        cell = (predicted == targets).cpu().numpy() * BINS + np.minimum((sure * BINS).astype(np.int64), BINS - 1)
        self.bins += np.bincount(cell, minlength=2 * BINS).reshape(2, BINS)
        self.confidence += np.bincount(cell, sure, minlength=2 * BINS).reshape(2, BINS)

    def compute(self) -> dict[str, float]:
        total = int(self.confusion.sum())
        if not total:
            return dict.fromkeys(self.higher_is_better, float("nan"))
        values = {"loss": self.loss_sum / total} | {k: float(v) for k, v in scores_of(self.confusion.astype(np.float64)).items()}
        values["ece"] = float(expected_calibration_error(self.bins, self.confidence))
        if len(self.classes) > 5:
            values["top5_accuracy"] = self.top5 / total
        return values

    def intervals(self) -> dict[str, tuple[float, float]]:
        total = int(self.confusion.sum())
        if not total:
            return {}
        random = np.random.default_rng(0)
        n = len(self.classes)
        cells = np.flatnonzero(self.confusion)
        share = self.confusion.reshape(-1)[cells] / total
        parts: dict[str, list[NDArray[np.float64]]] = {}
        chunk = max(1, min(RESAMPLES, 20_000_000 // (n * n)))  # resampled matrices are made in pieces of at most 160 MB
        for start in range(0, RESAMPLES, chunk):
            count = min(chunk, RESAMPLES - start)
            resampled = np.zeros((count, n * n))
            resampled[:, cells] = random.multinomial(total, share, size=count)
            for name, value in scores_of(resampled.reshape(count, n, n)).items():
                parts.setdefault(name, []).append(value)
        found = {name: percentile_interval(np.concatenate(v)) for name, v in parts.items()}
        # Within a bin, right or wrong, confidences are nearly equal: their mean stands for each.
        drawn = random.multinomial(total, self.bins.ravel() / total, size=RESAMPLES).reshape(-1, 2, BINS).astype(np.float64)
        found["ece"] = percentile_interval(expected_calibration_error(drawn, drawn * ratio(self.confidence, self.bins)))
        # Recall weighted by support is the accuracy.
        found["accuracy"] = found["recall_weighted"] = share_interval(int(np.trace(self.confusion)), total)
        if n > 5:
            found["top5_accuracy"] = share_interval(self.top5, total)
        return found

    def details(self) -> dict[str, Any]:
        c = self.confusion.astype(np.float64)
        hit, support, predicted = np.diagonal(c), c.sum(1), c.sum(0)
        columns = {"precision": ratio(hit, predicted), "recall": ratio(hit, support), "f1": ratio(2 * hit, support + predicted)}
        per_class = {
            name: {k: float(v[i]) for k, v in columns.items()} | {"support": int(support[i])} for i, name in enumerate(self.classes)
        }
        n, right = self.bins.sum(0), self.bins[1]
        calibration = {
            "records": n.astype(int).tolist(),
            "confidence": ratio(self.confidence.sum(0), n).tolist(),
            "accuracy": ratio(right, n).tolist(),
        }
        confusion = {"classes": self.classes, "rows_are": "true", "matrix": self.confusion.tolist()}
        return {"per_class": per_class, "confusion": confusion, "calibration": calibration}


class MultiLabelMetrics(MetricSet):
    """Any number of labels at once. Outputs are logits [B, labels], targets 0/1 floats [B, labels]; a label is predicted above 0."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.random = np.random.default_rng(0)
        self.counts = np.zeros((3, len(labels)), dtype=np.int64)  # true positive, false positive, false negative
        self.resampled = np.zeros((RESAMPLES, 3, len(labels)))
        self.exact = self.n = 0
        self.resampled_exact, self.resampled_n = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
        self.loss_sum = 0.0
        names = ("f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro", "subset_accuracy")
        self.higher_is_better = dict.fromkeys(names, True) | {"loss": False}

    def update(self, outputs: Tensor, targets: Tensor, loss_sum: float) -> None:
        predicted, true = (outputs > 0).cpu().numpy(), (targets > 0.5).cpu().numpy()
        parts = np.stack([predicted & true, predicted & ~true, ~predicted & true], 1).astype(np.int64)  # [B, 3, labels]
        whole = (predicted == true).all(1)
        self.counts += parts.sum(0)
        self.exact += int(whole.sum())
        self.n += len(true)
        self.loss_sum += loss_sum
        if not self.resampling:
            return
        weights = poisson_weights(self.random, len(true))
        self.resampled += np.tensordot(weights, parts, axes=1)
        self.resampled_exact += weights @ whole
        self.resampled_n += weights.sum(1)

    def _scores(self, counts: NDArray[np.float64], exact: NDArray[np.float64], n: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        tp, fp, fn = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
        f1, support = ratio(2 * tp, 2 * tp + fp + fn), tp + fn
        return {
            "f1_macro": f1.mean(-1),
            "f1_micro": ratio(2 * tp.sum(-1), (2 * tp + fp + fn).sum(-1)),
            "f1_weighted": ratio((f1 * support).sum(-1), support.sum(-1)),
            "precision_macro": ratio(tp, tp + fp).mean(-1),
            "recall_macro": ratio(tp, support).mean(-1),
            "subset_accuracy": ratio(exact, n),
        }

    def compute(self) -> dict[str, float]:
        if not self.n:
            return dict.fromkeys(self.higher_is_better, float("nan"))
        scores = self._scores(self.counts.astype(np.float64), np.array(float(self.exact)), np.array(float(self.n)))
        return {"loss": self.loss_sum / self.n / len(self.labels)} | {k: float(v) for k, v in scores.items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        if not (self.n and self.resampling):
            return {}
        scores = self._scores(self.resampled, self.resampled_exact, self.resampled_n)
        return {k: percentile_interval(v) for k, v in scores.items()} | {"subset_accuracy": share_interval(self.exact, self.n)}

    def details(self) -> dict[str, Any]:
        tp, fp, fn = self.counts.astype(np.float64)
        columns = {"precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn), "f1": ratio(2 * tp, 2 * tp + fp + fn)}
        return {
            "per_class": {
                name: {k: float(v[i]) for k, v in columns.items()} | {"support": int(tp[i] + fn[i])} for i, name in enumerate(self.labels)
            }
        }
