"""What tasks with class labels share: label <-> position, the loss, the answer."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import DataError, RecipeError, did_you_mean
from groundup.data.dataset import Dataset
from groundup.data.prepare import labels_of, natural, numeric_target
from groundup.metrics import ClassificationMetrics, MetricSet, MultiLabelMetrics
from groundup.tasks.base import Batch, Loss

ClassWeights = dict[str, float] | Literal["balanced"] | None


class ClassLabels:
    """One label per record, or with `multi_label` any number of them (targets are then columns of 0 and 1).

    Cross-entropy over all classes; `bce` (the default for exactly two classes of vectors, and for several labels at once) uses one output
    for each label, or one for the second class of two. Label smoothing: Szegedy et al., arXiv 1512.00567, section 7.

    Args:
        class_weights: 'balanced' weighs each record with n / (classes * records of its class), a mapping with its numbers (King and Zeng,
            Logistic regression in rare events data, 2001, 4.2); with several labels it weighs what is there against what is not.
    """

    def __init__(
        self, label_smoothing: float, loss: str, binary: str, multi_label: bool = False, class_weights: ClassWeights = None
    ) -> None:
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
        self.multi_label, self.classification = multi_label, not multi_label
        self.default_metric = "f1_macro" if multi_label else "accuracy"
        self.labels: list[str] = []
        self.old_labels: list[str] = []  # of the model that is tuned, where its classes are kept: they stay in front
        self.class_weights = class_weights
        self._weight_of: dict[str, float] = {}
        self._weights: Tensor | None = None  # the same as float [labels], on the device

    def fit_labels(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        """Learns the labels and their weights from the data. Raises DataError where the target does not fit."""
        if self.multi_label:
            columns = dataset.target.shape[1] if dataset.target.ndim == 2 else 1
            self.labels = self._with_old(dataset.target_names or [f"label{i}" for i in range(columns)])
            self._zeros_and_ones(dataset)
        else:
            self._one_each(dataset, train)
        self._fit_weights(dataset, train)

    def _fit_weights(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        if self.class_weights is None:
            return
        if self.one_output:
            raise RecipeError(
                "task.class_weights is for cross-entropy or several labels",
                "task.class_weights 用于交叉熵或多标签",
                fix="--set task.loss=cross_entropy",
            )
        if self.class_weights == "balanced":
            if self.multi_label:
                there = self._zeros_and_ones(dataset)[train].sum(0)
                weights = (len(train) - there) / np.maximum(there, 1)
            else:
                count = Counter(labels_of(dataset)[train].tolist())
                weights = np.array([len(train) / (len(self.labels) * max(count[label], 1)) for label in self.labels])
            weights = np.where(weights > 0, weights, 1.0)
        else:
            for label in self.class_weights:
                if label not in self.labels:
                    hint, hint_zh = did_you_mean(label, self.labels)
                    raise RecipeError(
                        "task.class_weights: there is no label '{label}'." + hint,
                        "task.class_weights：没有标签 '{label}'。" + hint_zh,
                        label=label,
                    )
            weights = np.array([self.class_weights.get(label, 1.0) for label in self.labels])
            if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
                raise RecipeError("task.class_weights: weights from 0 up are expected", "task.class_weights：权重应不小于 0")
        self._weight_of = dict(zip(self.labels, weights.tolist()))

    def _with_old(self, found: list[str]) -> list[str]:
        return [*self.old_labels, *(label for label in found if label not in self.old_labels)]

    def _zeros_and_ones(self, dataset: Dataset) -> NDArray[np.float64]:
        """The target as float64 [N, labels] of 0 and 1; columns are found by their names. Raises DataError."""
        if dataset.kind == "image" and dataset.target.ndim == 1:
            raise DataError(
                "{name} has one label per picture; several labels at once are a list in JSON lines, columns of 0 and 1, or a text with a separator",
                "{name} 每张图片只有一个标签；多标签应为 JSON 行中的列表、若干 0/1 列，或用分隔符隔开的文本",
                name=dataset.name,
                fix="--set data.columns.separator=';'   or   --set data.columns.target=[a,b,c]   or   --set task.multi_label=false",
                fix_zh="--set data.columns.separator=';'   或   --set data.columns.target=[a,b,c]   或   --set task.multi_label=false",
            )
        rows = numeric_target(dataset)
        if dataset.target_names and set(dataset.target_names) <= set(self.labels) and dataset.kind == "image":
            wide = np.zeros((len(rows), len(self.labels)))  # a label that no picture of another set has is simply absent there
            wide[:, [self.labels.index(n) for n in dataset.target_names]] = rows
            rows = wide
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

    def _one_each(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        labels = labels_of(dataset)
        found = sorted(set(labels.tolist()), key=natural)
        self.labels = self._with_old(found)
        if len(self.labels) < 2:
            raise DataError(
                "{name} has a single class, '{label}': nothing can be learned from it",
                "{name} 只有一个类别 '{label}'：无法学习",
                name=dataset.name,
                label=self.labels[0],
            )
        lacking = sorted(set(found) - set(labels[train].tolist()), key=natural)
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
        return not self.multi_label and len(self.labels) == 2 and (self.binary if self.loss_name == "auto" else self.loss_name) == "bce"

    @property
    def num_outputs(self) -> int:
        return 1 if self.one_output else len(self.labels)

    def encode_labels(self, dataset: Dataset, index: NDArray[np.int64], device: torch.device) -> Tensor:
        """int64 [N], or float32 [N, labels] of 0 and 1 for several labels. Raises DataError for a label that the model does not know."""
        if self.multi_label:
            return torch.from_numpy(self._zeros_and_ones(dataset)[index]).to(torch.float32).to(device)
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

    def label_loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed loss of logits [B, num_outputs] against int64 [B], shares float [B, classes] (mixed pictures), or 0/1 float [B, labels]."""
        outputs = outputs.float()
        if self.multi_label:
            goal = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(outputs, goal, reduction="sum", pos_weight=weights)
        if self.one_output:
            goal = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(outputs[:, 0], goal, reduction="sum")
        return F.cross_entropy(outputs, targets, weights, reduction="sum", label_smoothing=self.label_smoothing)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Logits [B, num_outputs] -> [B, classes]; with several labels each has a probability of its own."""
        outputs = outputs.float()
        if self.multi_label:
            return outputs.sigmoid()
        if self.one_output:
            p = outputs[:, 0].sigmoid()
            return torch.stack([1 - p, p], 1)
        return outputs.softmax(1)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        targets = batch.targets
        if self._weight_of and (self._weights is None or self._weights.device != targets.device):
            self._weights = torch.tensor([self._weight_of.get(n, 1.0) for n in self.labels], device=targets.device)
        weights = self._weights
        total = self.label_loss(self.checked(model(batch.inputs), batch), targets, weights)
        if self.multi_label:
            return Loss(total, targets.numel())
        if weights is None:
            return Loss(total, len(targets))
        return Loss(total, weights[targets].sum() if targets.ndim == 1 else (targets * weights).sum())

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        outputs = self.checked(model(batch.inputs), batch)
        metrics.update(outputs, batch.targets, float(self.label_loss(outputs, batch.targets)))
        return outputs

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What is kept of each record of an evaluation, see `evaluation.records`."""
        p = self.probabilities(outputs)
        if self.multi_label:
            loss = F.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="none").mean(1)
            several = torch.full((len(p),), -1)
            right = ((p > 0.5) == (targets > 0.5)).all(1)
            return {"right": right, "loss": loss, "predicted": several, "true": several, "probability": torch.maximum(p, 1 - p).amin(1)}
        best, predicted = p.max(1)
        loss = -p.gather(1, targets[:, None])[:, 0].clamp(min=1e-30).log()
        return {"right": predicted == targets, "loss": loss, "predicted": predicted, "true": targets, "probability": best}

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
        return MultiLabelMetrics(self.labels) if self.multi_label else ClassificationMetrics(self.labels)

    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Logits [B, num_outputs] -> of each row the label, its probability, and the `top` best ones."""
        p = self.probabilities(outputs).cpu()
        if self.multi_label:
            named = [dict(zip(self.labels, row)) for row in p.tolist()]
            return [{"labels": [n for n, v in row.items() if v > 0.5], "probabilities": row} for row in named]
        best = p.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
        found = []
        for row, order in zip(p.tolist(), best):
            ranking = [{"label": self.labels[i], "probability": row[i]} for i in order]
            found.append({**ranking[0], "top": ranking})
        return found
