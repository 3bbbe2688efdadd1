"""A picture gets one of several labels, or with `multi_label` any number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from groundup.core.registry import TASKS, Card
from groundup.data.augment import mix
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.tasks.base import Batch, Encoded, ImageInputs, Task
from groundup.tasks.labels import ClassLabels, ClassWeights


@TASKS.register(
    "image-classification",
    Card(
        summary="a picture gets one of several labels (cross-entropy), or any number of them (binary cross-entropy)",
        summary_zh="给图片分配多个标签之一（交叉熵），或任意多个标签（二元交叉熵）",
        source="Bishop, Pattern Recognition and Machine Learning, 2006, 4.3.4",
        shapes="pictures uint8 [B, C, H, W] -> logits [B, classes]",
        limits="without multi_label exactly one label per picture",
    ),
)
class ImageClassification(ClassLabels, ImageInputs, Task):
    kind = "image"

    def __init__(self, label_smoothing: float = 0.0, multi_label: bool = False, class_weights: ClassWeights = None) -> None:
        ClassLabels.__init__(self, label_smoothing, "auto", "cross_entropy", multi_label, class_weights)

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
        targets, rng = encoded.targets[index], rng if training else None
        inputs = self.normalised(encoded.take(index), rng=rng)
        if rng is not None and self.augment is not None and (self.augment.mixup or self.augment.cutmix):
            shares = targets if self.multi_label else F.one_hot(targets, len(self.labels)).to(inputs.dtype)
            return Batch(*mix(inputs, shares, self.augment, rng))
        return Batch(inputs, targets)
