"""Low-rank adaptation: beside each chosen matrix W, which stays as it is, a product B A of two narrow ones is trained.

Adapters are written and read in PEFT's form (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import fnmatch
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from groundup.core.errors import ModelError, RecipeError

PREFIX = "base_model.model."  # of names in PEFT's files


class _LowRank(torch.autograd.Function):
    """x W' + b + scale * x A' B' for several (W, b, A, B) and the same x, where W and b are not trained: the narrow products of all are one, and what
    they add is added in the pass of the wide ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *matrices: Any) -> tuple[Tensor, ...]:
        weights, biases, many_a, many_b = (matrices[k::4] for k in range(4))
        flat, a = x.flatten(0, -2), torch.cat(many_a) if len(many_a) > 1 else many_a[0]
        low = flat @ a.t()
        outs = [F.linear(flat, w, bias) for w, bias in zip(weights, biases)]
        for out, part, b in zip(outs, low.split([len(a) for a in many_a], 1), many_b):
            out.addmm_(part, b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, a, *weights, *many_b)
        ctx.scale, ctx.ranks = scale, [len(a) for a in many_a]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, low, a, *rest = ctx.saved_tensors
        count, scale = len(ctx.ranks), ctx.scale
        weights, many_b, flats = rest[:count], rest[count:], [g.flatten(0, -2) for g in grads]
        for_low = torch.empty_like(low)
        for g, part, b in zip(flats, for_low.split(ctx.ranks, 1), many_b):
            torch.mm(g, b, out=part)
        for_low.mul_(scale)
        for_a = (for_low.t() @ flat).split(ctx.ranks)
        low = scale * low  # and few rows times many columns is the quicker way round
        for_b = [(part.t() @ g).t() for g, part in zip(flats, low.split(ctx.ranks, 1))]
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = flats[0] @ weights[0]
            for g, w in zip(flats[1:], weights[1:]):
                for_x.addmm_(g, w)
            for_x = for_x.addmm_(for_low, a).view(*grads[0].shape[:-1], -1)
        return for_x, None, *(t for pair in zip(for_a, for_b) for t in (None, None, *pair))


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
        self.start: tuple[Tensor, Tensor] | None = None  # what PiSSA took out of the base

    def start_from_principal(self) -> None:
        """A and B begin as the largest singular directions of the base, which keeps the rest (Meng et al., PiSSA, arXiv 2404.02948, 3)."""
        with torch.no_grad():
            u, s, v = torch.linalg.svd(self.base_layer.weight.float(), full_matrices=False)
            root = (s[: self.rank] / self.scale).sqrt()
            self.lora_A.weight.copy_(root[:, None] * v[: self.rank])
            self.lora_B.weight.copy_(u[:, : self.rank] * root)
            self.start = self.lora_A.weight.clone(), self.lora_B.weight.clone()
            self.base_layer.weight -= self.delta

    @property
    def base_weight(self) -> Tensor:
        return dequantized(self.base_layer.weight)

    @property
    def delta(self) -> Tensor:
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @property
    def weight(self) -> Tensor:
        """The matrix that does the same alone."""
        whole = self.base_weight + self.delta
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / whole.norm(dim=1))[:, None]
        return whole

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def is_bare(self, x: Tensor) -> bool:
        """Whether nothing stands between the products: no dropout, no norms, no other numbers than x has, nobody who watches a part."""
        parts = (self.base_layer, self.lora_A, self.lora_B)
        return (
            self.lora_magnitude_vector is None
            and not (self.dropout and self.training)
            and all(type(m) is nn.Linear and is_plain(m) and m.weight.dtype == x.dtype and not watched(m) for m in parts)
            and not any(p.requires_grad for p in self.base_layer.parameters())
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.is_bare(x):
            return _low_rank(x, [self])[0]
        dropped = F.dropout(x, self.dropout, self.training)
        low = self.lora_A(dropped) * self.scale
        if self.lora_magnitude_vector is None:
            out = self.base_layer(x)  # the rest is added in the product's own pass
            return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.lora_B.weight.t()).view_as(out)
        added = self.lora_B(low)
        base = self.base_weight
        norm = (base + self.delta).norm(dim=1).detach()  # a constant in the backward pass (DoRA, 4.3)
        grow = self.lora_magnitude_vector / norm
        plain = F.linear(x if not (self.dropout and self.training) else dropped, base)
        return self.base_layer(x) + (grow - 1) * plain + grow * added  # type: ignore[no-any-return]


def watched(module: nn.Module) -> bool:
    """Whether anybody asked to be told when this module runs."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _low_rank(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[Tensor, ...]:
    matrices = [t for m in layers for t in (m.base_layer.weight, m.base_layer.bias, m.lora_A.weight, m.lora_B.weight)]
    return _LowRank.apply(x, layers[0].scale, *matrices)  # type: ignore[no-any-return]


def together(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """What each of these layers makes of the same x."""
    bare = [m for m in layers if isinstance(m, LoRALinear) and m.scale == layers[0].scale and m.is_bare(x) and not watched(m)]
    return _low_rank(x, bare) if len(bare) == len(layers) else [m(x) for m in layers]


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def attach(model: nn.Module, names: Sequence[str], rank: int, alpha: float, dropout: float, rs: bool, dora: bool) -> None:
    for name in names:
        _replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha, dropout, rs, dora))  # type: ignore[arg-type]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def merge(model: nn.Module) -> dict[str, LoRALinear]:
    """Puts plain matrices in the adapters' place; gives what stood there, for `unmerge`."""
    found = adapted(model)
    for name, module in found.items():
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        plain.bias = module.bias  # type: ignore[assignment]
        _replace(model, name, plain.train(module.training))
    for hook in getattr(model, "only_trained", ()):
        hook.remove()
    return found


def detach(model: nn.Module) -> dict[str, LoRALinear]:
    """Takes the adapters off, so that the base alone answers; gives them, for `unmerge`."""
    found = adapted(model)
    for name, module in found.items():
        _replace(model, name, module.base_layer)
    return found


def unmerge(model: nn.Module, found: dict[str, LoRALinear]) -> None:
    """The inverse of `merge` and `detach`, exactly."""
    for name, module in found.items():
        _replace(model, name, module)


def keep_only_trained(model: nn.Module) -> None:
    """Leaves all that is not trained out of the model's state: a checkpoint need not hold what the base's folder holds."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        trained = {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        for name in [n for n in state if n.removeprefix(prefix) not in trained]:
            del state[name]

    model.only_trained = [model.register_state_dict_post_hook(leave_out)]  # type: ignore[assignment]


# -- quantised bases -------------------------------------------------------------------------------------------------------------
def quantize(model: nn.Module, names: Sequence[str], bits: int) -> None:
    """Stores the weights of these layers in fewer bits: 4 are NF4 with its scales quantised again (Dettmers et al., QLoRA, arXiv 2305.14314, 3; through
    bitsandbytes), 8 are integers with a scale per output (through torchao).

    Raises:
        ModelError: the library is not installed.
    """
    library = {4: "bitsandbytes", 8: "torchao"}[bits]
    model.base_bits = bits  # type: ignore[assignment]
    names = [n for n in names if is_plain(model.get_submodule(n))]
    if importlib.util.find_spec(library) is None:
        raise ModelError(
            "a base in {bits} bits needs {library}, which is not installed",
            "{bits} 位基座需要 {library}，尚未安装",
            bits=bits,
            library=library,
            fix="pip install 'groundup[quant]'",
        )
    if bits == 8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        wanted = {*names, *(f"{n}.base_layer" for n in names)}
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in wanted and isinstance(module, nn.Linear))
        return
    import bitsandbytes

    for name in names:
        holder = model.get_submodule(name)
        path, plain = (f"{name}.base_layer", holder.base_layer) if isinstance(holder, LoRALinear) else (name, holder)
        assert isinstance(plain, nn.Linear)
        made = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=plain.bias is not None, quant_type="nf4", compute_dtype=plain.weight.dtype
        )
        # On CPUs with AVX512-BF16 an evaluation would put the matrix into another layout, which fails for narrow ones and which merging cannot read.
        made.support_avx512bf16_for_cpu = False
        made.load_state_dict(plain.state_dict())
        _replace(model, path, made.to(plain.weight.device))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's matrix is stored as plain numbers."""
    weight = getattr(layer, "base_layer", layer).weight
    return type(weight) in (Tensor, nn.Parameter, FakeTensor) and bool(weight.is_floating_point())  # type: ignore[operator, union-attr]


def dequantized(weight: Tensor) -> Tensor:
    """A matrix that `quantize` may have stored, as plain numbers."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional

        return bitsandbytes.functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    return weight.dequantize() if type(weight) not in (Tensor, nn.Parameter) else weight  # type: ignore[no-untyped-call, no-any-return]


STATE_SPACES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def chosen(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the linear layers that `targets` means: 'all-linear' (but the head), names' last parts, or patterns.

    Raises:
        RecipeError: a target that matches nothing.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head") and not n.endswith(".gate")]
    if targets == "all-linear":
        kind = getattr(getattr(getattr(model, "net", None), "config", None), "model_type", "")
        # Their kernels read this matrix themselves, past an adapter; PEFT does not open adapters on it.
        return [n for n in linear if not (kind in STATE_SPACES and n.endswith("out_proj"))]
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


def inner(model: nn.Module) -> str:
    """What stands before transformers' own names in ours."""
    return str(getattr(model, "inner", ""))


# -- PEFT's files ----------------------------------------------------------------------------------------------------------------
def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json of a model with adapters."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    twice = 1 if first.start is None else 2  # see adapter_tensors
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": twice * first.rank,
        "lora_alpha": first.alpha * (math.sqrt(twice) if first.rs else twice),
        "lora_dropout": first.dropout,
        "use_rslora": first.rs,
        "use_dora": first.lora_magnitude_vector is not None,
        "target_modules": sorted(name.removeprefix(inner(model)) for name in layers),
        "bias": "none",
        "fan_in_fan_out": bool(getattr(model, "fan_in_fan_out", False)),
        "inference_mode": True,
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names. What PiSSA took out of the base is given back with it, by twice the rank: B A - B0 A0 on the base as it was."""
    found = {}
    for name, module in adapted(model).items():
        a, b = module.lora_A.weight.detach(), module.lora_B.weight.detach()
        if module.start is not None:
            a, b = torch.cat([a, module.start[0]]), torch.cat([b, -module.start[1]], 1)
        theirs = PREFIX + name.removeprefix(inner(model))
        found[f"{theirs}.lora_A.weight"], found[f"{theirs}.lora_B.weight"] = a, b
        if module.lora_magnitude_vector is not None:
            found[f"{theirs}.lora_magnitude_vector"] = module.lora_magnitude_vector.detach()
    return found


def is_ours(config: dict[str, Any]) -> bool:
    """Whether an adapter's config is plain LoRA, rsLoRA or DoRA of one rank, which `LoRALinear` does."""
    odd = ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices")
    return config.get("peft_type") == "LORA" and config.get("bias", "none") == "none" and not any(config.get(k) for k in odd)


def read_adapter(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Attaches the adapter of a folder in PEFT's form, whose config `is_ours`.

    Raises:
        ModelError: it is for another model.
    """
    weights = {inner(model) + k.removeprefix(PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    names = sorted({re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)$", "", k) for k in weights})
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not names or (unknown := [n for n in names if n not in linear]):
        raise ModelError(
            "{folder} is an adapter for another model: this one has no linear layer '{name}'",
            "{folder} 是另一个模型的适配器：这个模型没有线性层 '{name}'",
            folder=folder,
            name=unknown[0] if names else "(none)",
            fix="it may also train tables or a tied head, which is not read here: merge it with PEFT's merge_and_unload, and take the merged folder",
            fix_zh="它也可能训练了词表或绑定的输出层，这里不支持：先用 PEFT 的 merge_and_unload 合并，再使用合并后的文件夹",
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
