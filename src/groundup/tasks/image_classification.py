"""A picture gets one of several labels."""

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
from groundup.tasks.base import Batch, Encoded, ImageInputs, Task
from groundup.tasks.labels import ClassLabels


@TASKS.register(
    "image-classification",
    Card(
        summary="a picture gets one of several labels; cross-entropy",
        summary_zh="给图片分配多个标签之一；交叉熵损失",
        source="Bishop, Pattern Recognition and Machine Learning, 2006, 4.3.4",
        shapes="pictures uint8 [B, C, H, W] -> logits [B, classes]",
        limits="exactly one label per picture",
    ),
)
class ImageClassification(ClassLabels, ImageInputs, Task):
    kind = "image"
    default_metric = "accuracy"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        ClassLabels.__init__(self, label_smoothing, "auto", binary="cross_entropy")

    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        self.fit_labels(dataset, train)
        self.fit_pixels(dataset, train)

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "preprocessor": self.pixel_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]
        self.load_pixels(state["preprocessor"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.shape)

    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        inputs = self.encode_pixels(dataset, index, device, workers, on_restart)
        return Encoded(inputs, self.encode_labels(dataset, index, device), lambda i: dataset.describe(int(index[i])))

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        return Batch(self.normalised(encoded.take(index), rng=rng if training else None), encoded.targets[index])
