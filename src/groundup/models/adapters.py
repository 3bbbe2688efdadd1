"""What lies beside a base model: our own LoRA, or any method of PEFT. Folders are PEFT's (adapter_config.json, adapter_model.safetensors)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.core import files
from groundup.core.errors import ModelError, RecipeError
from groundup.models import lora


def present(model: nn.Module) -> bool:
    return bool(lora.adapted(model)) or hasattr(model, "peft_config")


def still(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own, none of which is trained."""
    own = [(m, list(m.parameters(recurse=False))) for m in model.modules()]
    return [m for m, parameters in own if parameters and not any(p.requires_grad for p in parameters)]


def inject(model: nn.Module, config: dict[str, Any]) -> None:
    """Puts a method of PEFT into the model, by its config.

    Raises:
        ModelError: PEFT is not installed. RecipeError: it does not take this config for this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "this adapter needs PEFT, which is not installed", "该适配器需要 PEFT，尚未安装", fix="pip install 'groundup[peft]'"
        )
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(config["peft_type"]).upper()
    try:
        known: dict[str, Any] = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        given = {k: v for k, v in config.items() if k != "peft_type"}
        if not given.get("target_modules") or given["target_modules"] == "all-linear":
            given["target_modules"] = lora.chosen(model, "all-linear")
        if kind == "IA3" and not given.get("feedforward_modules"):
            given["feedforward_modules"] = []
        made = known[kind](
            **{"task_type": "CAUSAL_LM", "inference_mode": False} | {k: v for k, v in given.items() if k != "inference_mode"}
        )
        peft.inject_adapter_in_model(made, model)
        model.peft_config = {"default": made}  # type: ignore[assignment]
    except KeyError as error:
        raise RecipeError(
            "method.config.peft_type = '{kind}'; PEFT {version} knows {known}",
            "method.config.peft_type = '{kind}'；PEFT {version} 支持 {known}",
            kind=kind,
            version=peft.__version__,
            known=", ".join(sorted(known)),
        ) from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RecipeError(
            "PEFT does not take this config: {why}",
            "PEFT 不接受这个配置：{why}",
            why=str(error).splitlines()[0],
            fix="--set method.config={{peft_type: IA3}}",
        ) from error


def described(model: nn.Module, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors."""
    if lora.adapted(model):
        return lora.adapter_config(model, base), lora.adapter_tensors(model)
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"]  # type: ignore[index]
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    plain = {k: v for k, v in facts.items() if isinstance(v, str | int | float | bool | list | dict | type(None))}
    kind = getattr(config.peft_type, "value", config.peft_type)
    tensors = {
        lora.PREFIX + name.removeprefix(lora.inner(model)): value.detach() for name, value in get_peft_model_state_dict(model).items()
    }
    return plain | {"peft_type": str(kind), "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}, tensors


def read(model: nn.Module, folder: Path) -> None:
    """Attaches the adapter of a folder in PEFT's form.

    Raises:
        ModelError: it is for another model.
    """
    config = files.read_json(folder / "adapter_config.json")
    if lora.is_ours(config):
        lora.read_adapter(model, folder, config)
        return
    inject(model, config)
    from peft import set_peft_model_state_dict

    weights = {lora.inner(model) + k.removeprefix(lora.PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    found: Any = set_peft_model_state_dict(model, weights)
    if found.unexpected_keys:
        raise ModelError(
            "{folder} is an adapter for another model: this one has no '{name}'",
            "{folder} 是另一个模型的适配器：这个模型没有 '{name}'",
            folder=folder,
            name=found.unexpected_keys[0],
            fix="it may also train tables or a tied head, which is not read here: merge it with PEFT's merge_and_unload, and take the merged folder",
            fix_zh="它也可能训练了词表或绑定的输出层，这里不支持：先用 PEFT 的 merge_and_unload 合并，再使用合并后的文件夹",
        )
