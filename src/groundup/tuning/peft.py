"""Any method of PEFT, by its config."""

from __future__ import annotations

from typing import Any

from torch import nn

from groundup.core.errors import ModelError, RecipeError
from groundup.core.registry import METHODS, Card
from groundup.models import adapters
from groundup.models.language import LanguageModel
from groundup.models.lora import keep_only_trained


@METHODS.register(
    "peft",
    Card(
        summary="any method of PEFT that changes layers, by its config (IA3, LoHa, LoKr, OFT, VeRA, ...)",
        summary_zh="PEFT 中任意一种改造层的方法，用其配置指定（IA3、LoHa、LoKr、OFT、VeRA 等）",
        source="Mangrulkar et al., PEFT: State-of-the-art parameter-efficient fine-tuning methods, 2022",
        limits="language models; needs the extra groundup[peft]; LoRA and its kin are quicker with --method lora; no soft prompts",
    ),
)
def peft(model: nn.Module, config: dict[str, Any] | None = None) -> list[nn.Module]:
    """
    Args:
        config: as in PEFT's adapter_config.json; `peft_type` is needed, `target_modules` is all linear layers where it is left out.
    """
    if not config or "peft_type" not in config:
        raise RecipeError(
            "method.config needs a peft_type, as in PEFT's adapter_config.json",
            "method.config 需要 peft_type，写法同 PEFT 的 adapter_config.json",
            fix="--set method.config={{peft_type: IA3}}",
        )
    if not isinstance(model, LanguageModel):
        raise ModelError("method 'peft' is for language models", "方法 'peft' 用于语言模型", fix="--method head-first")
    if not adapters.present(model):  # a model that came with an adapter goes on with it
        adapters.inject(model, config)
    keep_only_trained(model)
    return adapters.still(model)
