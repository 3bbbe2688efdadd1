"""Low-rank adaptation: beside each chosen matrix W, which stays as it is, a product B A of two narrow ones is trained.

Adapters are written and read in PEFT's form (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.core import files
from groundup.core.errors import ModelError, RecipeError

PREFIX = "base_model.model."  # of names in PEFT's files


class LoRALinear(nn.Module):
    """x W' + b + scale * dropout(x) A' B' (Hu et al., LoRA, arXiv 2106.09685, 4.1); with `dora` the columns' norms of the sum are trained apart
    (Liu et al., DoRA, arXiv 2402.09353, 4).

    Args:
        rs: scale alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, rsLoRA, arXiv 2312.03732).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, rs: bool, dora: bool) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        facts: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A, self.lora_B = nn.Linear(base.in_features, rank, **facts), nn.Linear(rank, base.out_features, **facts)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha, self.rs, self.dropout = rank, alpha, rs, dropout
        self.scale = alpha / (math.sqrt(rank) if rs else rank)
        self.lora_magnitude_vector = nn.Parameter(base.weight.detach().norm(dim=1)) if dora else None

    @property
    def delta(self) -> Tensor:
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @property
    def weight(self) -> Tensor:
        """The matrix that does the same alone."""
        whole = self.base_layer.weight + self.delta
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / whole.norm(dim=1))[:, None]
        return whole

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        added = self.lora_B(self.lora_A(dropped)) * self.scale
        if self.lora_magnitude_vector is None:
            return self.base_layer(x) + added  # type: ignore[no-any-return]
        norm = (self.base_layer.weight + self.delta).norm(dim=1).detach()  # a constant in the backward pass (DoRA, 4.3)
        grow = self.lora_magnitude_vector / norm
        plain = F.linear(x if not (self.dropout and self.training) else dropped, self.base_layer.weight)
        return self.base_layer(x) + (grow - 1) * plain + grow * added  # type: ignore[no-any-return]


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def attach(model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float, rs: bool, dora: bool) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(model.get_submodule(name), rank, alpha, dropout, rs, dora))  # type: ignore[arg-type]


def merge(model: nn.Module) -> None:
    """Puts plain matrices in the adapters' place."""
    for name, module in adapted(model).items():
        parent, _, last = name.rpartition(".")
        base = module.base_layer
        with torch.no_grad():
            base.weight.copy_(module.weight.detach().clone())
        setattr(model.get_submodule(parent), last, base)


def chosen(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the linear layers that `targets` means: 'all-linear' (but the head), names' last parts, or patterns.

    Raises:
        RecipeError: a target that matches nothing.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head" and not n.endswith(".gate")]
    if targets == "all-linear":
        return linear
    found: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        hit = [n for n in linear if n == target or n.endswith("." + target) or fnmatch.fnmatch(n, target)]
        if not hit:
            known = sorted({n.rpartition(".")[2] for n in linear})
            raise RecipeError(
                "method.targets: '{target}' matches no linear layer; there are {known}",
                "method.targets：'{target}' 没有匹配任何线性层；可用：{known}",
                target=target,
                known=", ".join(known) or "none",
                fix="--set method.targets=all-linear",
            )
        found += hit
    return list(dict.fromkeys(found))


# -- PEFT's files ----------------------------------------------------------------------------------------------------------------
def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json of a model with adapters."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rs,
        "use_dora": first.lora_magnitude_vector is not None,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    found = {}
    for name, module in adapted(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.weight.detach()
        found[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.weight.detach()
        if module.lora_magnitude_vector is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = module.lora_magnitude_vector.detach()
    return found


def read_adapter(model: nn.Module, folder: Path) -> None:
    """Attaches the adapter of a folder in PEFT's form.

    Raises:
        ModelError: another kind of adapter, or one for another model.
    """
    config = files.read_json(folder / "adapter_config.json")
    odd = [
        k for k in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices") if config.get(k)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise ModelError(
            "{folder}: an adapter of type {kind}{odd} cannot be opened; plain LoRA, rsLoRA and DoRA can",
            "{folder}：无法打开 {kind} 类型{odd}的适配器；支持 LoRA、rsLoRA 与 DoRA",
            folder=folder,
            kind=config.get("peft_type"),
            odd=f" with {', '.join(odd)}" if odd else "",
        )
    weights = {k.removeprefix(PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    names = sorted({re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)$", "", k) for k in weights})
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not names or (unknown := [n for n in names if n not in linear]):
        raise ModelError(
            "{folder} is an adapter for another model: this one has no linear layer '{name}'",
            "{folder} 是另一个模型的适配器：这个模型没有线性层 '{name}'",
            folder=folder,
            name=unknown[0] if names else "(none)",
        )
    attach(
        model,
        names,
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout", 0.0),
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
    )
    for name, module in adapted(model).items():
        try:
            module.lora_A.load_state_dict({"weight": weights[f"{name}.lora_A.weight"]})
            module.lora_B.load_state_dict({"weight": weights[f"{name}.lora_B.weight"]})
            if module.lora_magnitude_vector is not None:
                value = weights.get(f"{name}.lora_magnitude_vector", weights.get(f"{name}.lora_magnitude_vector.weight"))
                module.lora_magnitude_vector.data.copy_(value)  # type: ignore[arg-type]
        except (KeyError, RuntimeError, TypeError) as error:
            raise ModelError(
                "{folder}: {name}: {why}", "{folder}：{name}：{why}", folder=folder, name=name, why=str(error).splitlines()[0]
            ) from error
