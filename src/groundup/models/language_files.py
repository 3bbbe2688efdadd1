"""Folders of language models as transformers writes them: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Mixtral and GPT-2, both ways.

Weights are read by name, without conversion: our decoder has the names of transformers (Mixtral's experts have other ones, which are mapped).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from groundup.core import files
from groundup.core.errors import ModelError
from groundup.models.causal_lm import CausalLM
from groundup.models.decoder import Decoder
from groundup.models.gpt2 import GPT2

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2")
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
MIXTRAL = (("block_sparse_moe.", "mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))
ROPE = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "original": "original_max_position_embeddings",
        "fast": "beta_fast", "slow": "beta_slow", "attention": "attention_factor", "truncate": "truncate"}  # fmt: skip


def is_language_folder(path: Path) -> bool:
    """Whether a folder holds a language model in transformers' form."""
    try:
        config = files.read_json(path / "config.json")
        return config.get("model_type") in FAMILIES or any(str(a).endswith("ForCausalLM") for a in config.get("architectures") or [])
    except (OSError, ValueError, AttributeError):
        return False


def read_config(config: dict[str, Any]) -> tuple[str, dict[str, Any], int, int]:
    """transformers' config -> (our architecture, its arguments, context, vocabulary). What ours do not have goes through transformers itself.

    Raises:
        ModelError: a setting that is missing.
    """
    try:
        return _read_config(config)
    except ModelError:
        if not any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in config.get("architectures") or []) or "vocab_size" not in config:
            raise
        context = next(
            (int(config[k]) for k in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length") if config.get(k)), 2048
        )
        return "causal-lm", {"config": config}, context, int(config["vocab_size"])
    except KeyError as missing:
        raise ModelError(
            "config.json of a '{family}' model does not say {key}",
            "config.json（'{family}' 模型）缺少 {key}",
            family=config.get("model_type"),
            key=missing.args[0],
        ) from missing


def _read_config(config: dict[str, Any]) -> tuple[str, dict[str, Any], int, int]:
    family = config.get("model_type")
    if family == "gpt2":
        settings = {"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "tie_word_embeddings": True}
        for key, plain in settings.items():
            _only(config, key, plain)
        arguments = {
            "layers": config["n_layer"],
            "width": config["n_embd"],
            "heads": config["n_head"],
            "hidden": config.get("n_inner"),
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        }
        return "gpt2", arguments, config["n_positions"], config["vocab_size"]
    if family not in FAMILIES:
        raise ModelError(
            "a language model of type '{family}' is not among those that can be opened: {known}",
            "无法打开 '{family}' 类型的语言模型；可用：{known}",
            family=family,
            known=", ".join(FAMILIES),
        )
    for key, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        _only(config, key, plain)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    window, since = config.get("sliding_window") if family != "llama" else None, 0  # transformers' Llama has none, whatever its config says
    if family.startswith("qwen"):
        window = window if config.get("use_sliding_window") else None
        since = config.get("max_window_layers", 0) if family != "qwen3_moe" else 0
        kinds = config.get("layer_types")
        if window is not None and kinds:
            since = sum(k == "full_attention" for k in kinds)
            if kinds != ["full_attention"] * since + ["sliding_attention"] * (layers - since):
                raise ModelError("layers of full and of sliding attention take turns: not among what can be opened",
                                 "全注意力层与滑动窗口层交替出现：无法打开")  # fmt: skip
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "yarn", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("mscale"):
        raise ModelError(
            "rotary positions of type '{kind}' are not among what can be opened", "无法打开 '{kind}' 类型的旋转位置编码", kind=kind
        )
    scaling = None if kind == "default" else {"type": kind, **{ours: rope[theirs] for ours, theirs in ROPE.items() if theirs in rope}}
    biased = bool(config.get("attention_bias", False))
    arguments = {
        "layers": layers,
        "width": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden": config["moe_intermediate_size"] if family == "qwen3_moe" else config["intermediate_size"],
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "bias": "qkv" if family == "qwen2" else "all" if biased else "none",
        "window": window,
        "window_from": since,
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope_scaling": scaling,
        "norm_eps": config.get("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),  # what transformers assumes
    }
    if family in ("qwen3_moe", "mixtral"):
        arguments |= {
            "experts": config.get("num_local_experts") or config["num_experts"],
            "experts_per_token": config["num_experts_per_tok"],
            "normalize_experts": family == "mixtral" or bool(config.get("norm_topk_prob", False)),
            "balance": config.get("router_aux_loss_coef", 0.01),
        }
    return "decoder", arguments, config["max_position_embeddings"], config["vocab_size"]


def _only(config: dict[str, Any], key: str, plain: Any) -> None:
    if config.get(key, plain) != plain:
        raise ModelError(
            "config.json: {key} = {value} is not among what can be opened ({plain} is)",
            "config.json：{key} = {value} 无法打开（只支持 {plain}）",
            key=key,
            value=config[key],
            plain=plain,
        )


def family_of(model: nn.Module) -> str:
    """The family of transformers whose form a model has.

    Raises:
        ModelError: none has this combination of options.
    """
    if isinstance(model, GPT2):
        return "gpt2"
    if not isinstance(model, Decoder):
        raise ModelError("{kind} has no form in transformers", "{kind} 在 transformers 中没有对应的形式", kind=type(model).__name__)
    if model.experts and model.bias == "none":
        if model.qk_norm:
            return "qwen3_moe"
        if model.normalize_experts and model.window_from == 0:
            return "mixtral"
    elif not model.experts:
        if model.qk_norm and model.bias in ("none", "all"):
            return "qwen3"
        if not model.qk_norm and model.bias == "qkv":
            return "qwen2"
        if not model.qk_norm and model.window is not None and model.bias == "none" and model.window_from == 0:
            return "mistral"
        if not model.qk_norm and model.window is None:
            return "llama"
    raise ModelError(
        "no family of transformers has these options together: qk_norm={qk_norm}, bias={bias}, window={window}, experts={experts}",
        "transformers 中没有同时具备这些选项的模型：qk_norm={qk_norm}、bias={bias}、window={window}、experts={experts}",
        qk_norm=model.qk_norm,
        bias=model.bias,
        window=model.window,
        experts=model.experts,
        fix="--set model.qk_norm=true --set model.bias=none   (Qwen3's form)",
    )


def write_config(model: nn.Module, special: dict[str, int | None]) -> dict[str, Any]:
    """A config.json with which transformers opens the model's weights.

    Args:
        special: bos_token_id, eos_token_id, pad_token_id of the tokenizer.
    """
    family = family_of(model)
    common = {"architectures": [CLASSES[family]], "model_type": family, "dtype": "float32", **special}
    if isinstance(model, GPT2):
        return common | {
            "vocab_size": model.vocabulary,
            "n_positions": model.context,
            "n_embd": model.width,
            "n_layer": len(model.transformer["h"]),  # type: ignore[arg-type]
            "n_head": model.heads,
            "n_inner": model.hidden,
            "layer_norm_epsilon": model.norm_eps,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": True,
        }
    assert isinstance(model, Decoder)
    layers = len(model.model.layers)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= {theirs: model.rope_scaling[ours] for ours, theirs in ROPE.items() if ours in model.rope_scaling}
        rope["rope_type"] = model.rope_scaling["type"]
        if rope["rope_type"] in ("yarn", "llama3"):
            rope.setdefault("original_max_position_embeddings", model.context)
    config = common | {
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "attention_bias": model.bias == "all",
        "rope_parameters": rope,
    }
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = model.window
    if family.startswith("qwen"):
        config |= {"use_sliding_window": model.window is not None, "sliding_window": model.window, "max_window_layers": model.window_from}
        if family != "qwen3_moe":
            full = model.window_from if model.window is not None else layers
            config["layer_types"] = ["full_attention"] * min(full, layers) + ["sliding_attention"] * max(0, layers - full)
    if model.experts:
        config |= {
            "num_experts_per_tok": model.experts_per_token,
            "router_aux_loss_coef": model.balance,
            "num_local_experts": model.experts,
        }
        if family == "qwen3_moe":
            config |= {
                "num_experts": model.experts,
                "moe_intermediate_size": model.hidden,
                "norm_topk_prob": model.normalize_experts,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ModelError where there are none."""
    index = path / "model.safetensors.index.json"
    names = sorted(set(files.read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found = [path / str(name) for name in names]
    lacking = [f.name for f in found if not f.is_file() or f.parent != path]
    if lacking:
        raise ModelError(
            "{path} lacks {file}; weights are read from safetensors only",
            "{path} 缺少 {file}；权重只从 safetensors 读取",
            path=path,
            file=lacking[0],
            fix="save the model with transformers' save_pretrained, which writes safetensors",
            fix_zh="用 transformers 的 save_pretrained 重新保存，它会写出 safetensors",
        )
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ModelError(
            "{file} is damaged or was not fetched whole ({cause})",
            "{file} 已损坏或下载不完整（{cause}）",
            file=file,
            cause=str(error),
            fix="fetch or copy it again",
            fix_zh="重新下载或复制该文件",
        ) from error


def read_weights(model: nn.Module, path: Path, family: str) -> None:
    """Fills a model from the folder's files, in float32, one tensor at a time. Those of families that are not ours, transformers itself reads.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape.
    """
    if isinstance(model, CausalLM):
        model.read(path)
        return
    own = dict(model.state_dict())
    missing = set(own)
    for file in weight_files(path):
        with _opened(file) as stored:
            for theirs in stored.keys():  # noqa: SIM118
                name = ours(theirs, family)
                if name not in own:
                    if name in ("lm_head.weight",) or name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
                        continue  # a tied head that was written all the same; masks and frequencies that old versions stored
                    raise ModelError("{file}: unknown tensor '{name}'", "{file}：未知的张量 '{name}'", file=file.name, name=theirs)
                value = stored.get_tensor(theirs)
                value = value.t() if _turned(name, family) else value
                if value.shape != own[name].shape:
                    raise ModelError(
                        "{file}: '{name}' has shape {found}; config.json says {expected}",
                        "{file}：'{name}' 的形状是 {found}；按 config.json 应为 {expected}",
                        file=file.name,
                        name=theirs,
                        found=list(value.shape),
                        expected=list(own[name].shape),
                    )
                with torch.no_grad():
                    own[name].copy_(value)
                missing.discard(name)
    if missing:
        raise ModelError("{path} lacks the tensor '{name}'", "{path} 缺少张量 '{name}'", path=path, name=min(missing))


def ours(name: str, family: str) -> str:
    """transformers' name of a tensor -> ours."""
    if family == "gpt2" and not name.startswith(("transformer.", "lm_head")):
        name = "transformer." + name  # OpenAI's own folder leaves the prefix out
    if family == "mixtral":
        for theirs, mine in MIXTRAL:
            name = name.replace(theirs, mine)
    return name


def read_back(weights: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The inverse of `theirs`."""
    return {ours(name, family): value.t() if _turned(name, family) else value for name, value in weights.items()}


def _turned(name: str, family: str) -> bool:
    """Whether transformers keeps this matrix as [inputs, outputs]."""
    return family == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def theirs(weights: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our tensors under transformers' names, and the way round that it has them."""
    if family == "gpt2":
        return {name: value.t().contiguous() if _turned(name, family) else value for name, value in weights.items()}
    if family != "mixtral":
        return weights

    def renamed(name: str) -> str:
        if re.search(r"\.mlp\.(gate|experts)\.", name):
            for other, mine in MIXTRAL:
                name = name.replace(mine, other)
        return name

    return {renamed(name): value for name, value in weights.items()}
