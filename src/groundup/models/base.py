"""What a model of ours offers beyond `forward`: its features and head apart, so that tuning works on every one of them alike.

A plain `torch.nn.Module` of a user needs none of this to be trained; `freeze`, `head` and new labels need `reset_head` and `layer_groups`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groundup.core.device import keep_freed_memory
from groundup.core.errors import ModelError
from groundup.core.registry import MODELS


class Model(nn.Module, ABC):
    """A model built for an input shape and a number of outputs.

    Args:
        input_shape: of one sample, as (channels, height, width) or (features,).
        num_outputs: classes, or target values.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.input_shape, self.num_outputs = tuple(input_shape), num_outputs

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Inputs [B, *input_shape] -> features [B, width]."""

    @abstractmethod
    def head(self, h: Tensor) -> Tensor:
        """Features [B, width] -> outputs [B, num_outputs]."""

    @abstractmethod
    def reset_head(self, num_outputs: int) -> None:
        """Puts a fresh last layer (see `fresh_head`) for another number of outputs."""

    @abstractmethod
    def layer_groups(self) -> dict[str, list[nn.Module]]:
        """Layers from the input to the head, by name; the last group is the head. Every parameter is in exactly one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def example_input(self, batch_size: int = 2) -> Tensor:
        """Zeros of the right shape, on the model's device."""
        return torch.zeros(batch_size, *self.input_shape, device=next(self.parameters()).device)


class Holder(nn.Module):
    """A bare parameter as a module, for layer groups."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def fresh_head(in_features: int, num_outputs: int) -> nn.Linear:
    """A new last layer, all zeros: the first updates then teach the head alone and do not disturb features through random weights
    (Kolesnikov et al., Big Transfer, arXiv 1912.11370, 3.3; Dosovitskiy et al., arXiv 2010.11929, 3.2)."""
    head = nn.Linear(in_features, num_outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def check_images(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """(channels, height, width), or a ModelError that says what the model needs."""
    if len(input_shape) != 3:
        raise ModelError(
            "model '{name}' takes pictures [channels, height, width]; the data is {shape}",
            "模型 '{name}' 的输入是图片 [通道, 高, 宽]；数据形状是 {shape}",
            name=name,
            shape=list(input_shape),
            fix="--set model.name=fcnn",
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ModelError(
            "model '{name}' needs pictures of at least {n}x{n} pixels; these are {h}x{w}",
            "模型 '{name}' 至少需要 {n}x{n} 像素的图片；现在是 {h}x{w}",
            name=name,
            n=smallest,
            h=height,
            w=width,
            fix="--set data.image.size={n}",
        )
    return channels, height, width


# Settings that count something: what is not there cannot be built.
SIZES = {"layers", "width", "widths", "heads", "kv_heads", "head_dim", "hidden"}


def build_model(name: str, arguments: dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Builds a registered model or a user's `path/to/file.py:Name`; the latter gets `input_shape` and `num_outputs` where it asks for them.

    Raises:
        ModelError: unknown name, or the constructor refused.
        RecipeError: an argument that the model does not have.
    """
    entry = MODELS.get(name)
    arguments = MODELS.build_arguments(entry, arguments, "model")
    for key in SIZES & set(arguments):
        values = arguments[key] if isinstance(arguments[key], list | tuple) else [arguments[key]]
        if any(isinstance(v, int) and v < 1 for v in values):
            raise ModelError(
                "model.{key} = {value}: at least 1 is expected", "model.{key} = {value}：至少为 1", key=key, value=arguments[key],
                fix="groundup models {name}   tells the settings and what they are without being set",
                fix_zh="groundup models {name}   列出各项设置及其默认值", name=name,
            )  # fmt: skip
    import inspect

    parameters = inspect.signature(entry.target).parameters
    facts = {k: v for k, v in {"input_shape": input_shape, "num_outputs": num_outputs}.items() if k in parameters}
    try:
        model = entry.target(**facts, **arguments)
    except ModelError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "model '{name}' could not be built with {arguments}: {cause}",
            "模型 '{name}' 无法用 {arguments} 构建：{cause}",
            name=name,
            arguments=arguments or "no arguments",
            cause=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            "'{name}' gave {kind}; a torch.nn.Module is expected",
            "'{name}' 返回了 {kind}；应为 torch.nn.Module",
            name=name,
            kind=type(model).__name__,
        )
    return model


class _Unfilled(TorchFunctionMode):
    """In here what would fill a parameter at random leaves it as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        return filled if func in RANDOM and isinstance(filled, nn.Parameter) else func(*args, **kwargs)


RANDOM = {
    nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_, Tensor.erfinv_,
}  # fmt: skip


def build_to_read(name: str, arguments: dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """As `build_model`, for weights that are read from a file next: the parameters are not drawn at random first, which takes longer than reading them."""
    with _Unfilled():
        return build_model(name, arguments, input_shape, num_outputs)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device; convolutions with the channels last in memory, in which they, and pooling even more, are faster."""
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type in ("cpu", "cuda") and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable)."""
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
