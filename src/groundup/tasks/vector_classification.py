"""A row of numbers gets one label of several, one of two (binary), or any number of labels at once (several 0/1 target columns)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import DataError
from groundup.core.registry import TASKS, Card
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.data.prepare import numeric_target
from groundup.metrics import MetricSet, MultiLabelMetrics
from groundup.tasks.base import Batch, Encoded, Loss, Task, VectorInputs
from groundup.tasks.labels import ClassLabels


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

    def __init__(self, label_smoothing: float = 0.0, loss: str = "auto", multi_label: bool = False) -> None:
        ClassLabels.__init__(self, label_smoothing, loss, binary="bce")
        self.multi_label = multi_label
        self.classification = not multi_label
        self.default_metric = "f1_macro" if multi_label else "accuracy"

    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        if self.multi_label:
            self.labels = dataset.target_names or [f"label{i}" for i in range(dataset.target.shape[1] if dataset.target.ndim == 2 else 1)]
            self._zeros_and_ones(dataset)
        else:
            self.fit_labels(dataset, train)
        self.fit_vectors(dataset, train)

    def _zeros_and_ones(self, dataset: Dataset) -> NDArray[np.float64]:
        rows = numeric_target(dataset)
        if rows.shape[1] != len(self.labels):
            raise DataError(
                "{name} has {found} target columns; the model knows {expected} labels",
                "{name} 有 {found} 个目标列；模型有 {expected} 个标签",
                name=dataset.name,
                found=rows.shape[1],
                expected=len(self.labels),
            )
        wrong = np.argwhere((rows != 0) & (rows != 1))
        if len(wrong):
            i, j = wrong[0]
            raise DataError(
                "{record}: label '{label}' is {value}; several labels at once are columns of 0 and 1",
                "{record}：标签 '{label}' 的值是 {value}；多标签的列只能是 0 和 1",
                record=dataset.describe(int(i)),
                label=self.labels[int(j)],
                value=rows[i, j],
            )
        return rows

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "preprocessor": self.vector_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]
        self.load_vectors(state["preprocessor"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.features),)

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.multi_label else ClassLabels.num_outputs.fget(self)  # type: ignore[attr-defined]

    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        if self.multi_label:
            targets = torch.from_numpy(self._zeros_and_ones(dataset)[index]).to(torch.float32).to(device)
        else:
            targets = self.encode_labels(dataset, index, device)
        return Encoded(self.encode_vectors(dataset, index, device), targets, lambda i: dataset.describe(int(index[i])))

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        return Batch(encoded.take(index), encoded.targets[index])

    def label_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self.multi_label:
            return super().label_loss(outputs, targets)
        goal = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs.float(), goal, reduction="sum")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self.label_loss(self.checked(model(batch.inputs), batch), batch.targets), batch.targets.numel())

    def metrics(self) -> MetricSet:
        return MultiLabelMetrics(self.labels) if self.multi_label else super().metrics()

    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        if not self.multi_label:
            return super().answers(outputs, top)
        rows = outputs.float().sigmoid().tolist()
        return [{"labels": [n for n, v in zip(self.labels, p) if v > 0.5], "probabilities": dict(zip(self.labels, p))} for p in rows]
