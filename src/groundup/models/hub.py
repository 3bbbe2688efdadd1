"""Image classifiers of transformers and timm, with their own preprocessing: from the hub, from a local folder, or from timm's catalogue.

Opened by `hub:owner/name[@revision]`, a folder with transformers' `config.json`, or `timm:name`. Nothing is fetched but what is named so, and code
from a repository is never run.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.core.errors import ModelError
from groundup.core.registry import MODELS, Card
from groundup.models.base import Holder, Model, fresh_head

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json holds them


@dataclass
class Foreign:
    """An opened model of another system.

    Args:
        architecture, arguments: how `build_model` makes it again, without its weights.
        preprocessor: as an image task keeps it.
        weights: the files that its weights came from.
        headless: whether the weights have no classifier: it can be tuned, and not asked.
    """

    model: Model
    architecture: str
    arguments: dict[str, Any]
    labels: list[str]
    preprocessor: dict[str, Any]
    name: str
    path: Path
    weights: list[Path] = field(default_factory=list)
    headless: bool = False


class Wrapped(Model):
    """A network of another library, with the parts that tuning needs found in it: its last linear layer, and its list of blocks.

    Args:
        head_name: the path of the last linear layer.
    """

    def __init__(self, net: nn.Module, head_name: str, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.net, self.head_name = net, head_name

    @property
    def last(self) -> nn.Linear:
        found = self.net.get_submodule(self.head_name)
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, x: Tensor) -> Tensor:
        given = self.net(x)
        return given if isinstance(given, Tensor) else given.logits

    def features(self, x: Tensor) -> Tensor:
        """What goes into the last linear layer, [B, width]."""
        seen: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self(x)
        finally:
            handle.remove()
        return seen[0]

    def head(self, h: Tensor) -> Tensor:
        return self.last(h)

    def reset_head(self, num_outputs: int) -> None:
        old = self.last
        parent, _, name = self.head_name.rpartition(".")
        setattr(self.net.get_submodule(parent), name, fresh_head(old.in_features, num_outputs).to(old.weight))
        self.num_outputs = num_outputs

    def layer_groups(self) -> dict[str, list[nn.Module]]:
        """What comes before the blocks ('stem'), each block, what comes after them ('top', where there is something), and the head."""
        blocks = next((m for m in self.net.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and _is_stack(m, self.last)), None)
        before: list[nn.Module] = []
        after: list[nn.Module] = []
        place = before

        def walk(module: nn.Module) -> None:
            nonlocal place
            for parameter in module.parameters(recurse=False):
                place.append(Holder(parameter))
            for child in module.children():
                inside = set(child.modules())
                if child is blocks:
                    place = after
                elif child is self.last:
                    continue
                elif blocks in inside or self.last in inside:
                    walk(child)
                elif next(child.parameters(), None) is not None:
                    place.append(child)

        walk(self.net)
        groups = {"stem": before} if before else {}
        groups |= {f"layer{i}": [block] for i, block in enumerate(blocks.children(), 1)} if blocks is not None else {}
        return groups | ({"top": after} if after else {}) | {"head": [self.last]}


def _is_stack(module: nn.Module, last: nn.Module) -> bool:
    children = list(module.children())
    blocks = all(next(c.parameters(), None) is not None and next(c.children(), None) is not None for c in children)  # not single layers
    return len(children) > 1 and last not in set(module.modules()) and blocks


def last_linear(net: nn.Module, outputs: int) -> str:
    """The path of the last linear layer with so many outputs. Raises ModelError."""
    found = [name for name, module in net.named_modules() if isinstance(module, nn.Linear) and module.out_features == outputs]
    if not found:
        raise ModelError(
            "{kind} has no linear layer with {n} outputs at its end: it is not a classifier of the usual form",
            "{kind} 的末端没有 {n} 个输出的线性层：不是通常形式的分类器",
            kind=type(net).__name__,
            n=outputs,
        )
    return found[-1]


# -- transformers --------------------------------------------------------------------------------------------------------------
@MODELS.register(
    "transformers",
    Card(
        summary="any image classifier of transformers, from hub:owner/name or a local folder",
        summary_zh="transformers 的任意图片分类模型，来自 hub:owner/name 或本地文件夹",
        source="Wolf et al., Transformers: State-of-the-art natural language processing, EMNLP 2020 (demos)",
        shapes="[B, 3, H, W] in the size of its preprocessor -> [B, num_outputs]",
        limits="made by `groundup tune hub:owner/name --data ...`, not by a recipe alone; one linear layer at its end",
    ),
)
class Transformers(Wrapped):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, config: dict[str, Any] | None = None) -> None:
        if config is None:
            raise ModelError(
                "model 'transformers' is opened from weights",
                "模型 'transformers' 需要从已有权重打开",
                fix="groundup tune hub:owner/name --data SPEC",
            )
        net = _library().AutoModelForImageClassification.from_config(_config(config, num_outputs))
        super().__init__(net, last_linear(net, num_outputs), input_shape, num_outputs)


def _library() -> Any:
    """transformers, without what it prints."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _config(facts: dict[str, Any], num_outputs: int) -> Any:
    made = _library().AutoConfig.for_model(**{k: v for k, v in facts.items() if k not in ("id2label", "label2id", "num_labels")})
    made.num_labels = num_outputs
    return made


def open_transformers(folder: Path, name: str) -> Foreign:
    """A folder as `save_pretrained` of transformers writes it.

    Raises:
        ModelError: not an image classifier, or files are missing or damaged.
    """
    library = _library()
    facts = _json(folder / "config.json")
    if "auto_map" in facts:
        raise ModelError(
            "{name} comes with code of its own, which is not run here",
            "{name} 自带代码，这里不会运行",
            name=name,
            fix="choose a model whose architecture is in transformers",
            fix_zh="请选择 transformers 内置架构的模型",
        )
    weights = sorted({p for pattern in WEIGHTS[::2] for p in folder.glob(pattern)})
    weights = [p for p in weights if p.suffix == ".safetensors"] or weights
    if not weights:
        raise ModelError(
            "{name} holds no weights ({patterns})", "{name} 中没有权重（{patterns}）", name=name, patterns=", ".join(WEIGHTS[::2])
        )
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        net, loading = library.AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
            weights_only=True,
        )
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            "{name} cannot be opened as an image classifier of transformers: {cause}",
            "无法把 {name} 作为 transformers 的图片分类模型打开：{cause}",
            name=name,
            cause=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}",
        ) from error
    outputs = int(config.num_labels)
    head = last_linear(net, outputs)
    missing = [k for k in loading["missing_keys"] if not k.startswith(head)]
    if missing:
        raise ModelError(
            "{name}: its weights lack {n} tensors of the model, as {first}",
            "{name}：权重缺少模型的 {n} 个张量，例如 {first}",
            name=name,
            n=len(missing),
            first=missing[0],
        )
    labels = [str(config.id2label[i]) for i in range(outputs)]
    labels = labels if len(set(labels)) == outputs else [f"{i} {label}" for i, label in enumerate(labels)]
    preprocessor = transformers_preprocessor(folder, facts)
    model = Wrapped(net, head, tuple(preprocessor["shape"]), outputs)
    plain = {
        k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "_name_or_path", "transformers_version", "dtype")
    }
    arguments = {"config": json.loads(json.dumps(plain, default=str))}
    return Foreign(model, "transformers", arguments, labels, preprocessor, name, folder, weights, bool(loading["missing_keys"]))


def transformers_preprocessor(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What preprocessor_config.json (or processor_config.json) asks for, in our words.

    Raises:
        ModelError: a step that we do not do.
    """
    path = next((folder / n for n in ("preprocessor_config.json", "processor_config.json") if (folder / n).is_file()), None)
    facts = _json(path) if path is not None else {}
    facts = facts.get("image_processor", facts)
    channels = int(config.get("num_channels", 3))
    side = config.get("image_size", 224)
    wanted = facts.get("size", side if isinstance(side, int | list) else 224)
    resize: dict[str, Any] = {"mode": "stretch", "short_side": None, "filter": FILTERS.get(facts.get("resample", 2), "bilinear")}
    if not facts.get("do_rescale", True) or abs(facts.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ModelError(
            "{folder}: its preprocessor does not bring pixels to 0..1 (rescale_factor {factor})",
            "{folder}：其预处理没有把像素缩放到 0..1（rescale_factor {factor}）",
            folder=folder,
            factor=facts.get("rescale_factor"),
        )
    if isinstance(wanted, dict) and "shortest_edge" in wanted:
        short = int(wanted["shortest_edge"])
        crop = facts.get("crop_size", short)
        size = _sides(crop)
        if "crop_pct" in facts:  # ConvNeXt's: below 384 the picture is cropped, from there on stretched
            size = (short, short)
            resize |= {"mode": "crop", "short_side": int(short / facts["crop_pct"])} if short < 384 else {}
        else:
            resize |= {"mode": "crop", "short_side": short}
    else:
        size = _sides(wanted)
        if facts.get("do_center_crop") and "crop_size" in facts and _sides(facts["crop_size"]) != size:
            raise ModelError(
                "{folder}: its preprocessor stretches to {size} and then crops {crop}, which is not done here",
                "{folder}：其预处理先拉伸到 {size} 再裁剪 {crop}，这里不支持",
                folder=folder,
                size=size,
                crop=facts["crop_size"],
            )
    normalise = facts.get("do_normalize", bool(facts))
    mean, std = (facts.get(k, d) if normalise else n for k, d, n in (("image_mean", [0.5], [0.0]), ("image_std", [0.5], [1.0])))
    mean, std = (v if isinstance(v, list) else [v] for v in (mean, std))
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    return {
        "kind": "image",
        "shape": [channels, *size],
        "mean": [float(v) for v in mean],
        "std": [float(v) for v in std],
        "scale": "pixels / 255, minus mean, over std",
        "resize": resize,
    }


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size[0]), int(size[-1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        cause: Any = "not an object"
    except (OSError, ValueError) as error:
        cause = error
    raise ModelError("{path} cannot be read: {cause}", "无法读取 {path}：{cause}", path=path, cause=cause)


def fetch_config(spec: str) -> Path:
    """The config.json of a hub repository, `owner/name[@revision]`, and nothing else of it. Raises ModelError where it is neither here nor there."""
    from huggingface_hub import hf_hub_download

    name, _, revision = spec.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision or None))
    except Exception as error:  # offline, unknown, gated: the hub's client has a kind for each, and looks into its cache by itself
        raise _not_to_be_had(name, error) from error


def fetch(spec: str) -> Path:
    """The local copy of a hub repository, `owner/name[@revision]`; fetched where it is not there yet and the hub can be reached.

    Raises:
        ModelError: it is neither here nor there.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.partition("@")
    try:
        listed = snapshot_download(
            name, revision=revision or None, allow_patterns=["*.json", "*.txt", "*.jinja", "tokenizer.model", *WEIGHTS]
        )
        return Path(listed)
    except Exception as error:  # offline, unknown, gated: the hub's client has a kind for each
        try:
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        except Exception:
            raise _not_to_be_had(name, error) from error


def _not_to_be_had(name: str, error: Exception) -> ModelError:
    return ModelError(
        "hub:{name} cannot be had, and there is no copy here: {cause}",
        "无法取得 hub:{name}，本地也没有副本：{cause}",
        name=name,
        cause=(str(error).strip() or type(error).__name__).splitlines()[0],
        fix="check the name and the network (HF_ENDPOINT names a mirror), or give a local folder",
        fix_zh="检查名称与网络（HF_ENDPOINT 可指定镜像），或给出本地文件夹",
    )


# -- timm ----------------------------------------------------------------------------------------------------------------------
@MODELS.register(
    "timm",
    Card(
        summary="any classifier of timm by its name, where timm is installed",
        summary_zh="timm 的任意分类模型（需已安装 timm）",
        source="Wightman, PyTorch image models, doi 10.5281/zenodo.4414861",
        shapes="[B, C, H, W] -> [B, num_outputs]",
        limits="needs timm, and with it a torchvision that fits torch; `groundup tune timm:NAME` starts from its weights",
    ),
)
class Timm(Wrapped):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, architecture: str = "resnet18") -> None:
        net = _timm(architecture, num_classes=num_outputs, in_chans=input_shape[0])
        super().__init__(net, last_linear(net, num_outputs), input_shape, num_outputs)


def _timm(architecture: str, **arguments: Any) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelError(
            "timm cannot be imported: {cause}",
            "无法导入 timm：{cause}",
            cause=f"{type(error).__name__}: {error}",
            fix="pip install timm   (it needs the torchvision of this torch: groundup env plan)",
            fix_zh="pip install timm   （它需要与 torch 匹配的 torchvision：groundup env plan）",
        ) from error
    try:
        made: nn.Module = timm.create_model(architecture, **arguments)
    except Exception as error:
        raise ModelError(
            "timm has no model '{name}' to give: {cause}",
            "timm 无法给出模型 '{name}'：{cause}",
            name=architecture,
            cause=(str(error).strip() or type(error).__name__).splitlines()[0],
        ) from error
    return made


def open_timm(spec: str) -> Foreign:
    """A pretrained model of timm by name, with the preprocessing it was trained with."""
    net = _timm(spec, pretrained=True)
    facts: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    channels, height, width = facts.get("input_size", (3, 224, 224))
    outputs = int(facts.get("num_classes", 1000))
    share = float(facts.get("crop_pct", 0.875))
    crop = facts.get("crop_mode", "center") != "squash"
    resize = {
        "mode": "crop" if crop else "stretch",
        "short_side": int(min(height, width) / share) if crop else None,
        "filter": facts.get("interpolation", "bilinear"),
    }
    preprocessor = {
        "kind": "image",
        "shape": [channels, height, width],
        "mean": list(facts.get("mean", [0.485, 0.456, 0.406])),
        "std": list(facts.get("std", [0.229, 0.224, 0.225])),
        "scale": "pixels / 255, minus mean, over std",
        "resize": resize,
    }
    labels = [str(n) for n in facts.get("label_names") or range(outputs)]
    model = Wrapped(net, last_linear(net, outputs), (channels, height, width), outputs)
    return Foreign(model, "timm", {"architecture": spec}, labels, preprocessor, f"timm-{spec}", Path(f"timm:{spec}"))


def is_foreign(name: str) -> bool:
    """Whether a model is named in another system's way, or is a folder of transformers."""
    return name.startswith(("hub:", "timm:")) or _is_folder(Path(name).expanduser())


def _is_folder(path: Path) -> bool:
    try:
        return (path / "config.json").is_file() and not (path / "groundup.json").is_file() and not (path / "recipe.yaml").is_file()
    except OSError:
        return False


def open_foreign(name: str) -> Foreign:
    """Opens what `is_foreign` recognises. Raises ModelError."""
    if name.startswith("timm:"):
        return open_timm(name.removeprefix("timm:"))
    if name.startswith("hub:"):
        spec = name.removeprefix("hub:")
        return open_transformers(fetch(spec), spec.partition("@")[0].rpartition("/")[2])
    folder = Path(name).expanduser()
    return open_transformers(folder, re.sub(r"[^\w.\-]+", "-", folder.resolve().name))  # runs are called after it
