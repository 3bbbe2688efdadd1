"""The interface between the loop and what is learned: records become tensors, outputs become a loss, an input becomes an answer."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.core.errors import DataError, RecipeError
from groundup.core.recipe import Augment, Data
from groundup.data.dataset import Dataset
from groundup.data.order import CounterRandom
from groundup.data.pictures import STRETCH, FileImages, Resize
from groundup.data.streaming import StreamedImages
from groundup.data.table import MISSING
from groundup.metrics import MetricSet

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std of ImageNet's channels, which most published weights expect


@dataclass
class Encoded:
    """A split as tensors: inputs (whole in memory on the device, or streamed) and targets.

    Args:
        inputs: uint8 [N, C, H, W] or float32 [N, features] on the device; or streamed pictures.
        targets: [N, ...] on the device.
        describe: position in the split -> the record's name for a person.
    """

    inputs: Tensor | StreamedImages
    targets: Tensor
    describe: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor) -> Tensor:
        """The inputs at `index` (int64 on the device)."""
        if isinstance(self.inputs, StreamedImages):
            return self.inputs.fetch(index.cpu().numpy()).to(self.targets.device, non_blocking=True)
        return self.inputs[index]


@dataclass
class Batch:
    """Inputs [B, ...] ready for the model, and targets [B, ...]."""

    inputs: Tensor
    targets: Tensor


@dataclass
class Loss:
    """A loss as a sum and the number of supervised items in it: the loop divides by the count of the whole optimizer step."""

    sum: Tensor
    count: int | Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """One task. `fit` learns from the training split what the task must know (labels, normalisation); `state` keeps it in the model folder.

    Args:
        kind: the data it reads, 'image', 'vector' or 'text'.
        default_metric: what the best checkpoint is chosen by.
        classification: whether the target is a class label.
    """

    kind: ClassVar[Literal["image", "vector", "text"]]
    default_metric: str
    classification: bool = False
    evaluation_batch: int = 1024  # records of one forward pass in evaluations
    tokens_per_sample: int = 0

    # -- what is learned from the training split and kept with the model ---------------------------------------------------
    @abstractmethod
    def fit(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        """Learns labels and normalisation from the training records. Raises DataError where they do not fit the task."""

    @staticmethod
    def reads(config: Data) -> Data:
        """The data section as this task wants its records read."""
        return config

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `fit` learned, JSON-able: {'labels': ..., 'preprocessor': ...}."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def write_files(self, folder: Path) -> None:
        """Files of a model folder besides `state` (a tokenizer)."""
        return

    def read_files(self, folder: Path) -> None:
        """The inverse of `write_files`."""
        return

    def own_state(self) -> dict[str, Any]:
        """What stays this task's own when the rest of the preprocessing is taken from a base model."""
        return {}

    def decisions(self) -> list[tuple[str, Any, str, str]]:
        """What `fit` decided: (name, value, reason, Chinese reason)."""
        return []

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def num_outputs(self) -> int: ...

    # -- training and evaluation -------------------------------------------------------------------------------------------
    @abstractmethod
    def prepare(
        self,
        dataset: Dataset,
        index: NDArray[np.int64],
        device: torch.device,
        *,
        workers: int = 0,
        on_restart: Callable[[str], None] | None = None,
    ) -> Encoded:
        """The records at `index` as tensors."""

    @abstractmethod
    def batch(self, encoded: Encoded, index: Tensor, *, training: bool, rng: CounterRandom | None) -> Batch:
        """The samples at `index`, whole batch at once, on the device; augmented when training."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """One forward pass and its loss."""

    def sizes(self, encoded: Encoded, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these samples."""
        return np.full(len(index), self.tokens_per_sample)

    def computed_at_once(self, encoded: Encoded) -> int | None:
        """Tokens that are work enough for a CPU at once, where more would only take more memory; None where the whole batch is quicker."""
        return None

    def evaluated_at_once(self, encoded: Encoded, device: torch.device) -> int:
        """Records of one forward pass in evaluations."""
        return self.evaluation_batch

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch, metrics: MetricSet) -> Tensor:
        """One forward pass, added to the metrics; gives the outputs."""

    @abstractmethod
    def metrics(self) -> MetricSet:
        """A fresh set of streamed metrics."""

    def metrics_of(self, encoded: Encoded) -> MetricSet:
        """The same for one split, where a metric needs a fact about it."""
        return self.metrics()

    def samples(self, model: nn.Module) -> list[dict[str, str]]:
        """What is written at every evaluation for a person to look at: {'prompt', 'text'} each."""
        return []

    # -- answering: prediction, service and export all go through these three -----------------------------------------------
    @abstractmethod
    def read(self, raw: Any) -> Tensor:
        """One raw input as a user has it (a path, bytes, a picture, a row of numbers) -> [1, ...], of one shape for every input.

        Raises:
            DataError: it is not such an input.
        """

    @abstractmethod
    def model_inputs(self, read: Tensor) -> Tensor:
        """What `read` gave, [B, ...] -> what the model takes, float32 [B, *input_shape]."""

    @abstractmethod
    def answers(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """The model's outputs [B, num_outputs] -> one JSON-able answer each; `top`: how many classes are listed."""

    @torch.no_grad()
    def answer(self, model: nn.Module, raw: Any) -> dict[str, Any]:
        """One raw input -> a JSON-able answer."""
        return self.answers(model(self.model_inputs(self.read(raw).to(next(model.parameters()).device))))[0]


class ImageInputs:
    """What image tasks share: pictures in 0..255 become normalised floats, augmented while training."""

    augment: Augment | None = None
    resize = STRETCH
    given_mean: Any = "auto"
    given_std: Any = "auto"

    def configure(self, config: Data) -> None:
        """What the recipe's data section says of pictures, before `fit`."""
        self.augment, self.resize = config.augment, Resize.of(config.image)
        self.given_mean, self.given_std = config.image.mean, config.image.std

    def model_inputs(self, read: Tensor) -> Tensor:
        return self.normalised(read)

    def fit_pixels(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        first, second = dataset.inputs.moments(train)
        own = (first / 255).tolist(), np.maximum(np.sqrt(np.maximum(second - first**2, 0)) / 255, 1e-3).tolist()
        self.shape = dataset.input_shape
        self.mean, self.std = (
            _channels(name, wanted, standard, measured, self.shape[0])
            for name, wanted, standard, measured in zip(("mean", "std"), (self.given_mean, self.given_std), IMAGENET, own)
        )

    def pixel_state(self) -> dict[str, Any]:
        return {
            "kind": "image",
            "shape": list(self.shape),
            "mean": self.mean,
            "std": self.std,
            "scale": "pixels / 255, minus mean, over std",
            "resize": self.resize.facts(),
        }

    def load_pixels(self, state: dict[str, Any]) -> None:
        self.shape, self.mean, self.std = tuple(state["shape"]), state["mean"], state["std"]
        self.resize = Resize(**state.get("resize", {}))

    def encode_pixels(
        self, dataset: Dataset, index: NDArray[np.int64], device: torch.device, workers: int, on_restart: Callable[[str], None] | None
    ) -> Tensor | StreamedImages:
        if dataset.input_shape != tuple(self.shape):
            raise DataError(
                "{name} has pictures of shape {found}; the model was made for {expected}",
                "{name} 的图片形状是 {found}；模型需要 {expected}",
                name=dataset.name,
                found=list(dataset.input_shape),
                expected=list(self.shape),
                fix=f"--set data.image.size=[{self.shape[1]},{self.shape[2]}] --set data.image.channels={self.shape[0]}",
            )
        images = dataset.inputs.select(index)
        if isinstance(images, FileImages):
            return StreamedImages(images, workers, on_restart)
        return torch.from_numpy(images.array).to(device)

    def normalised(self, pixels: Tensor, *, rng: CounterRandom | None = None) -> Tensor:
        """uint8 [B, C, H, W] -> float32, augmented where there is randomness to do it with."""
        from groundup.data.augment import augment

        x = pixels.to(torch.float32).div_(255)
        if rng is not None and self.augment is not None:
            x = augment(x, self.augment, rng)
        mean, std = _per_channel(tuple(self.mean), tuple(self.std), x.device)
        return x.sub_(mean).div_(std)

    def brightness(self, inputs: Tensor) -> Tensor:
        """The mean pixel of each picture that was normalised, float [B] on the scale 0..1."""
        mean, std = _per_channel(tuple(self.mean), tuple(self.std), inputs.device)
        return (inputs * std + mean).mean((1, 2, 3))

    def read(self, raw: Any) -> Tensor:
        """A path, bytes, a PIL picture or an array -> uint8 [1, C, H, W] in the model's size. Raises DataError."""
        from groundup.data.dataset import from_arrays, read_bytes
        from groundup.data.pictures import decode, picture_array, pil_picture, quiet_pillow, reason_zh

        channels, height, width = self.shape
        if isinstance(raw, str | Path):
            path = Path(raw).expanduser()
            if not path.is_file():
                raise DataError("no file {path}", "找不到文件 {path}", path=path)
            raw = read_bytes(path)
            where = where_zh = str(path)
        else:
            where, where_zh = "the input", "输入"
        if isinstance(raw, bytes):
            try:
                with quiet_pillow():
                    pixels = decode(raw, channels, (height, width), self.resize)
            except ValueError as error:
                raise DataError(
                    "{where} is not a picture that can be read: {error}",
                    "{where_zh} 不是可读取的图片：{error_zh}",
                    where=where,
                    where_zh=where_zh,
                    error=error,
                    error_zh=reason_zh(str(error)),
                ) from error
        else:
            from PIL import Image

            if not isinstance(raw, Image.Image):
                array = from_arrays("the input", np.asarray(raw)[None], ["?"]).inputs.array[0]
                raw = pil_picture(array)
            pixels = picture_array(raw, channels, (height, width), self.resize)
        return torch.from_numpy(np.array(pixels))[None]


def _channels(name: str, wanted: Any, standard: list[float], measured: list[float], channels: int) -> list[float]:
    """One number per channel: as the recipe gives it, ImageNet's, or measured on the training split."""
    if wanted == "auto":
        return measured
    values = standard if wanted == "imagenet" else [float(v) for v in wanted]
    values = (
        values
        if len(values) == channels
        else [sum(values) / len(values)]
        if channels == 1
        else values * channels
        if len(values) == 1
        else values
    )
    if len(values) != channels:
        raise RecipeError(
            "data.image.{name} has {found} numbers; the pictures have {channels} channels",
            "data.image.{name} 有 {found} 个数；图片有 {channels} 个通道",
            name=name,
            found=len(values),
            channels=channels,
        )
    return values


@functools.lru_cache(maxsize=16)
def _per_channel(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each, made once: on a GPU every copy from the host costs a step more than the arithmetic does."""
    return torch.tensor(mean, device=device).view(-1, 1, 1), torch.tensor(std, device=device).view(-1, 1, 1)


class VectorInputs:
    """What vector tasks share: features minus their mean over their standard deviation."""

    def model_inputs(self, read: Tensor) -> Tensor:
        return read  # normalised where it is read, in float64

    def fit_vectors(self, dataset: Dataset, train: NDArray[np.int64]) -> None:
        x = dataset.inputs[train]
        self.features = list(dataset.feature_names)
        self.mean = x.mean(0)
        std = x.std(0)
        self.std = np.where(std > 0, std, 1.0)

    def vector_state(self) -> dict[str, Any]:
        return {"kind": "vector", "features": self.features, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def load_vectors(self, state: dict[str, Any]) -> None:
        self.features, self.mean, self.std = state["features"], np.array(state["mean"]), np.array(state["std"])

    def encode_vectors(self, dataset: Dataset, index: NDArray[np.int64], device: torch.device) -> Tensor:
        if len(dataset.feature_names) != len(self.features):
            raise DataError(
                "{name} has {found} features; the model was made for {expected} ({names})",
                "{name} 有 {found} 个特征；模型需要 {expected} 个（{names}）",
                name=dataset.name,
                found=len(dataset.feature_names),
                expected=len(self.features),
                names=", ".join(self.features[:8]),
            )
        x = dataset.inputs[index]
        # Names that only count (x0, c0) say nothing; others say which number belongs where.
        if dataset.feature_names != self.features and not any(_counted(names) for names in (dataset.feature_names, self.features)):
            if lacking := [name for name in self.features if name not in dataset.feature_names]:
                raise DataError(
                    "{name} lacks the feature '{feature}' that the model was made for; it has: {found}",
                    "{name} 缺少模型所需的特征 '{feature}'；现有：{found}",
                    name=dataset.name,
                    feature=lacking[0],
                    found=", ".join(dataset.feature_names[:20]),
                )
            x = x[:, [dataset.feature_names.index(name) for name in self.features]]
        # Normalised in float64 before it becomes float32: large offsets would lose their small differences otherwise.
        return torch.from_numpy((x - self.mean) / self.std).to(torch.float32).to(device)

    def read(self, raw: Any) -> Tensor:
        """Numbers as a list, 'a,b,c' text, or a mapping by feature name -> float32 [1, features]. Raises DataError."""
        values: list[Any]
        if isinstance(raw, dict):
            lacking = [f for f in self.features if f not in raw]
            if lacking:
                raise DataError(
                    "the input lacks '{name}'; expected: {all}",
                    "输入缺少 '{name}'；应有：{all}",
                    name=lacking[0],
                    all=", ".join(self.features),
                )
            values = [raw[f] for f in self.features]
        else:
            values = str(raw).strip("[]() \n").replace("，", ",").split(",") if isinstance(raw, str) else list(np.ravel(raw))
        if len(values) != len(self.features):
            raise DataError(
                "{found} numbers were given; the model takes {expected}: {all}",
                "给了 {found} 个数；模型需要 {expected} 个：{all}",
                found=len(values),
                expected=len(self.features),
                all=", ".join(self.features),
            )
        row = np.empty(len(values))
        for i, (name, value) in enumerate(zip(self.features, values)):
            if isinstance(value, str) and value.strip().lower() in MISSING:
                raise DataError("no value for '{name}'", "'{name}' 缺值", name=name)
            try:
                row[i] = float(value)
            except (TypeError, ValueError) as error:
                raise DataError("'{name}' is '{value}': not a number", "'{name}' 是 '{value}'：不是数字", name=name, value=value) from error
            if not np.isfinite(row[i]):
                raise DataError("'{name}' is {value}: NaN or infinite", "'{name}' 是 {value}：NaN 或无穷大", name=name, value=row[i])
        return torch.from_numpy((row - self.mean) / self.std).to(torch.float32)[None]


def _counted(names: list[str]) -> bool:
    return any(names == [f"{letter}{i}" for i in range(len(names))] for letter in "xc")
