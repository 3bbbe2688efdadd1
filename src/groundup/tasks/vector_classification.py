"""A row of numbers gets one label of several, one of two (binary), or any number of labels at once (several 0/1 target columns)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.core.registry import TASKS, Card
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.tasks.base import Batch, Encoded, Task, VectorInputs
from groundup.tasks.labels import ClassLabels, ClassWeights


@TASKS.register(
    "vector-classification",
    Card(
        summary="a row of numbers gets one label; two classes and several target columns use binary cross-entropy",
        summary_zh="给一行数字分配标签；两个类别或多个目标列时用二元交叉熵",
        source="Bishop, Pattern Recognition and Machine Learning, 2006, 4.3.2 and 4.3.4",
        shapes="float [B, features] -> logits [B, classes]; [B, 1] for two; [B, labels] for several",
        limits="missing values are not filled in: rows that have them stop the run or are skipped",
    ),
)
class VectorClassification(ClassLabels, VectorInputs, Task):
    kind = "vector"

    def __init__(
        self, label_smoothing: float = 0.0, loss: str = "auto", multi_label: bool = False, class_weights: ClassWeights = None
    ) -> None:
        ClassLabels.__init__(self, label_smoothing, loss, "bce", multi_label, class_weights)

    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        self.fit_labels(dataset, train)
        self.fit_vectors(dataset, train)

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "preprocessor": self.vector_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]
        self.load_vectors(state["preprocessor"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.features),)

    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        targets = self.encode_labels(dataset, index, device)
        return Encoded(self.encode_vectors(dataset, index, device), targets, lambda i: dataset.describe(int(index[i])))

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        return Batch(encoded.take(index), encoded.targets[index])
