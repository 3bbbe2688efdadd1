"""A row of numbers gets one real number, or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core.errors import DataError, ModelError, RecipeError
from groundup.core.registry import TASKS, Card
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.data.prepare import numeric_target
from groundup.metrics import MetricSet, RegressionMetrics
from groundup.tasks.base import Batch, Encoded, Loss, Task, VectorInputs


@TASKS.register(
    "vector-regression",
    Card(
        summary="a row of numbers gets one or several real numbers; squared, absolute or Huber loss",
        summary_zh="由一行数字预测一个或多个实数；平方、绝对值或 Huber 损失",
        source="Bishop, Pattern Recognition and Machine Learning, 2006, 3.1; Huber, Annals of Mathematical Statistics 35, 1964",
        shapes="float [B, features] -> float [B, targets]",
        limits="targets are scaled to unit variance while training; metrics are in the data's units",
    ),
)
class VectorRegression(VectorInputs, Task):
    kind = "vector"
    default_metric = "mse"

    def __init__(self, loss: str = "mse", delta: float = 1.0) -> None:
        if loss not in ("mse", "mae", "huber"):
            raise RecipeError("task.loss = '{value}'; known: mse, mae, huber", "task.loss = '{value}'；可用：mse、mae、huber", value=loss)
        if delta <= 0:
            raise RecipeError(
                "task.delta = {value}: a positive number is expected (in standard deviations of the target)",
                "task.delta = {value}：应为正数（以目标的标准差为单位）",
                value=delta,
            )
        self.loss_name, self.delta = loss, delta

    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        y = numeric_target(dataset)[train]
        self.fit_vectors(dataset, train)
        self.targets = dataset.target_names or ["target" if y.shape[1] == 1 else f"target{i}" for i in range(y.shape[1])]
        self.offset, std = y.mean(0), y.std(0)
        self.scale = np.where(std > 0, std, 1.0)

    def state(self) -> dict[str, Any]:
        target = {"names": self.targets, "offset": self.offset.tolist(), "scale": self.scale.tolist()}
        return {"labels": None, "preprocessor": self.vector_state() | {"target": target}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.load_vectors(state["preprocessor"])
        target = state["preprocessor"]["target"]
        self.targets, self.offset, self.scale = target["names"], np.array(target["offset"]), np.array(target["scale"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.features),)

    @property
    def num_outputs(self) -> int:
        return len(self.targets)

    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        y = numeric_target(dataset)
        if y.shape[1] != len(self.targets):
            raise DataError(
                "{name} has {found} target columns; the model predicts {expected}",
                "{name} 有 {found} 个目标列；模型预测 {expected} 个",
                name=dataset.name,
                found=y.shape[1],
                expected=len(self.targets),
            )
        targets = torch.from_numpy((y[index] - self.offset) / self.scale).to(torch.float32).to(device)
        return Encoded(self.encode_vectors(dataset, index, device), targets, lambda i: dataset.describe(int(index[i])))

    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        return Batch(encoded.take(index), encoded.targets[index])

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch.inputs)
        if not isinstance(outputs, Tensor) or outputs.shape != batch.targets.shape:
            raise ModelError(
                "the model gave {found} for inputs {inputs}; {expected} is expected",
                "模型对输入 {inputs} 给出了 {found}；应为 {expected}",
                found=list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__,
                inputs=list(batch.inputs.shape),
                expected=list(batch.targets.shape),
            )
        return outputs.float()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss_name == "mse":
            return F.mse_loss(outputs, targets, reduction="sum")
        if self.loss_name == "mae":
            return F.l1_loss(outputs, targets, reduction="sum")
        return F.huber_loss(outputs, targets, reduction="sum", delta=self.delta)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self._loss(self._outputs(model, batch), batch.targets), batch.targets.numel())

    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        outputs = self._outputs(model, batch)
        metrics.update(outputs, batch.targets, float(self._loss(outputs, batch.targets)))
        return outputs

    def metrics(self) -> MetricSet:
        return RegressionMetrics(self.targets, self.scale, self.offset)

    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        rows = outputs.double().cpu().numpy() * self.scale + self.offset
        named = [{n: float(v) for n, v in zip(self.targets, row)} for row in rows]
        return [{"value": next(iter(v.values()))} if len(v) == 1 else {"values": v} for v in named]
