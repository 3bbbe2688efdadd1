"""What tasks with class labels share: label <-> position, the loss, the answer."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import DataError, RecipeError, did_you_mean
from groundup.data.dataset import Dataset
from groundup.data.prepare import labels_of, natural
from groundup.metrics import ClassificationMetrics, MetricSet
from groundup.tasks.base import Batch, Loss

LossName = Literal["auto", "cross_entropy", "bce"]


class ClassLabels:
    """One label per record.

    Cross-entropy over all classes; `bce` (the default for exactly two classes of vectors) uses one output for the second class.
    Label smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """

    classification = True

    def __init__(self, label_smoothing: float, loss: str, binary: str) -> None:
        if not 0 <= label_smoothing < 1:
            raise RecipeError(
                "task.label_smoothing = {value}: a share from 0 up to 1 is expected",
                "task.label_smoothing = {value}：应为 0 到 1 之间的比例",
                value=label_smoothing,
            )
        if loss not in ("auto", "cross_entropy", "bce"):
            raise RecipeError(
                "task.loss = '{value}'; known: auto, cross_entropy, bce",
                "task.loss = '{value}'；可用：auto、cross_entropy、bce",
                value=loss,
            )
        self.label_smoothing, self.loss_name, self.binary = label_smoothing, loss, binary
        self.labels: list[str] = []

    def fit_labels(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        labels = labels_of(dataset)
        self.labels = sorted(set(labels.tolist()), key=natural)
        if len(self.labels) < 2:
            raise DataError(
                "{name} has a single class, '{label}': nothing can be learned from it",
                "{name} 只有一个类别 '{label}'：无法学习",
                name=dataset.name,
                label=self.labels[0],
            )
        lacking = sorted(set(self.labels) - set(labels[train].tolist()), key=natural)
        if lacking:
            raise DataError(
                "the training split has no record of class '{label}' ({n} classes are missing there)",
                "训练集中没有类别 '{label}' 的记录（共缺 {n} 个类别）",
                label=lacking[0],
                n=len(lacking),
                fix="--set data.split.by=record   or a larger --set data.train_samples=N",
                fix_zh="--set data.split.by=record   或更大的 --set data.train_samples=N",
            )
        if self.loss_name == "bce" and len(self.labels) != 2:
            raise RecipeError(
                "task.loss = bce with one label of {n}; it is for two classes or several target columns",
                "task.loss = bce 只用于两个类别或多个目标列；这里有 {n} 个类别",
                n=len(self.labels),
                fix="--set task.loss=cross_entropy",
            )

    @property
    def one_output(self) -> bool:
        return len(self.labels) == 2 and (self.binary if self.loss_name == "auto" else self.loss_name) == "bce"

    @property
    def num_outputs(self) -> int:
        return 1 if self.one_output else len(self.labels)

    def encode_labels(self, dataset: Dataset, index: NDArray[np.int64], device: torch.device) -> Tensor:
        position = {label: i for i, label in enumerate(self.labels)}
        labels = labels_of(dataset)[index]
        for i, label in zip(index, labels):
            if label not in position:
                shared = [known for known in self.labels if known in set(labels.tolist())]
                hint, hint_zh = did_you_mean(str(label), self.labels)
                raise DataError(
                    "{record} has the label '{label}', which the model does not know." + hint,
                    "{record} 的标签 '{label}' 是模型不认识的。" + hint_zh,
                    record=dataset.describe(int(i)),
                    label=label,
                    fix="--set data.classes=[{shared}]" if shared else "tune the model to these labels: groundup tune MODEL --data SPEC",
                    fix_zh="--set data.classes=[{shared}]" if shared else "用这些标签微调模型：groundup tune MODEL --data SPEC",
                    shared=", ".join(shared),
                )
        return torch.tensor([position[label] for label in labels], dtype=torch.long, device=device)

    def label_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of logits [B, num_outputs] against int64 [B]."""
        outputs = outputs.float()
        if self.one_output:
            goal = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(outputs[:, 0], goal, reduction="sum")
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Logits [B, num_outputs] -> [B, classes]."""
        outputs = outputs.float()
        if self.one_output:
            p = outputs[:, 0].sigmoid()
            return torch.stack([1 - p, p], 1)
        return outputs.softmax(1)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self.label_loss(self.checked(model(batch.inputs), batch), batch.targets), len(batch.targets))

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> None:
        outputs = self.checked(model(batch.inputs), batch)
        metrics.update(outputs, batch.targets, float(self.label_loss(outputs, batch.targets)))

    def checked(self, outputs: Any, batch: Batch) -> Tensor:
        """The outputs, or an error that says which shape a user's model should give."""
        from groundup.core.errors import ModelError

        if not isinstance(outputs, Tensor) or outputs.shape != (len(batch.targets), self.num_outputs):
            found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(
                "the model gave {found} for inputs {inputs}; logits of shape {expected} are expected ({n} classes)",
                "模型对输入 {inputs} 给出了 {found}；应为形状 {expected} 的 logits（{n} 个类别）",
                found=found,
                inputs=list(batch.inputs.shape),
                expected=[len(batch.targets), self.num_outputs],
                n=len(self.labels),
            )
        return outputs

    def metrics(self) -> MetricSet:
        return ClassificationMetrics(self.labels)

    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Logits [B, num_outputs] -> of each row the label, its probability, and the `top` best ones."""
        p = self.probabilities(outputs).cpu()
        best = p.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
        found = []
        for row, order in zip(p.tolist(), best):
            ranking = [{"label": self.labels[i], "probability": row[i]} for i in order]
            found.append({**ranking[0], "top": ranking})
        return found
