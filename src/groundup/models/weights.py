"""Weights from elsewhere into our models: state dicts (`.pth`, `.pt`, `.th`, read with weights_only) and safetensors, of torchvision and others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.core.errors import ModelError

HEADS = ("fc", "linear", "classifier", "head", "heads.head")  # what others call the last layer
SUFFIXES = (".pth", ".pt", ".th", ".safetensors")


def is_weights(name: str) -> bool:
    """Whether a recipe's `init` names a file of weights, not a model folder."""
    return name.endswith(SUFFIXES)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without the wrappings that training scripts leave (`state_dict`, `module.`).

    Raises:
        ModelError: no such file, damaged, or one that would have to run code to be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise ModelError("no weights file {path}", "找不到权重文件 {path}", path=path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError" and "weights_only" in str(error).lower():
            raise ModelError(
                "{path} holds more than tensors; it would have to run code to be read, and that is not done here",
                "{path} 中不只有张量；读取它需要运行其中的代码，这里不会这样做",
                path=path,
                fix="save the tensors alone: torch.save(model.state_dict(), FILE), best as safetensors",
                fix_zh="只保存张量：torch.save(model.state_dict(), FILE)，最好用 safetensors",
            ) from error
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError("{path} cannot be read: {cause}", "无法读取 {path}：{cause}", path=path, cause=cause) from error
    for key in ("state_dict", "model_state_dict", "model", "net", "ema"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping):
        raise ModelError("{path} holds no state dict", "{path} 中没有 state dict", path=path)
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod.", "model.", "backbone."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def load_into(model: nn.Module, path: Path) -> list[str]:
    """Puts a file's weights into a model; returns the names of what was left fresh: the head, where the classes are others.

    Raises:
        ModelError: tensors that are missing, left over or of another shape, with their names.
    """
    state = read_state(path)
    own = model.state_dict()
    head = next((name.rpartition(".")[0] for name in reversed(own) if name.endswith(".weight")), "")
    for other in HEADS:
        if f"{head}.weight" not in state and f"{other}.weight" in state:
            state = {name.replace(f"{other}.", f"{head}.", 1) if name.startswith(f"{other}.") else name: v for name, v in state.items()}
            break
    fresh = [n for n in (f"{head}.weight", f"{head}.bias") if n in own and (n not in state or state[n].shape != own[n].shape)]
    state = {name: value for name, value in state.items() if name not in fresh}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # old files lack them
    missing = [name for name in own if name not in state and name not in fresh and name not in counters]
    extra = [name for name in state if name not in own]
    shapes = [f"{n} {list(state[n].shape)} instead of {list(own[n].shape)}" for n in state if n in own and state[n].shape != own[n].shape]
    if missing or extra or shapes:
        raise ModelError(
            "the weights of {path} are not of this model: missing {missing}; left over {extra}; other shapes {shapes}",
            "{path} 的权重不属于该模型：缺少 {missing}；多出 {extra}；形状不同 {shapes}",
            path=path,
            missing=missing[:4] or "none",
            extra=extra[:4] or "none",
            shapes=shapes[:4] or "none",
            fix="choose the model and depth that the weights were saved from",
            fix_zh="请选择与权重一致的模型与深度",
        )
    model.load_state_dict(state, strict=False)
    return fresh
