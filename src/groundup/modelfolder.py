"""The model folder: a self-sufficient model. Weights, config, task card, preprocessing, reference outputs, model card, user code.

model.safetensors   config.json   groundup.json   preprocessor.json   reference.json   README.md   code/   manifest.json
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import groundup
from groundup.core import console, files
from groundup.core.errors import ModelError, did_you_mean_path
from groundup.core.messages import say
from groundup.core.recipe import Recipe, Views
from groundup.core.registry import MODELS, TASKS
from groundup.data.order import CounterRandom
from groundup.evaluation.evaluate import evaluating
from groundup.evaluation.views import parse, viewed
from groundup.models import adapters, lora
from groundup.models.base import build_to_read, placed
from groundup.models.causal_lm import CausalLM
from groundup.models.decoder import Decoder
from groundup.models.gpt2 import GPT2
from groundup.models.hub import fetch, is_foreign, open_foreign
from groundup.models.language import LanguageModel
from groundup.models.language_files import (
    family_of,
    is_language_folder,
    read_back,
    read_config,
    read_weights,
    theirs,
    weight_files,
    write_config,
)
from groundup.tasks.base import Task
from groundup.training.checkpoint import commit, damage, load_weights, system_error, unique_tensors, write_manifest

ADAPTER = "adapter_model.safetensors"


@dataclass
class Loaded:
    """A model with its task, ready to answer."""

    model: nn.Module
    task: Task
    card: dict[str, Any]
    path: Path
    architecture: str
    arguments: dict[str, Any]
    weights: list[Path]

    def __post_init__(self) -> None:
        if isinstance(self.model, LanguageModel) and (cap := getattr(self.task, "softcap", None)) is not None:
            self.model.softcap = cap

    @property
    def answering(self) -> nn.Module:
        """The model with the views (test-time augmentation) that its card asks for: what answers and evaluations use."""
        views = self.card.get("views")
        return viewed(self.model, Views(**views) if views else None)

    def look_through(self, views: str | None) -> None:
        """Other views than the card's, as 'flip,shift=1' or 'none'; None leaves them. Raises UserError."""
        if views is not None:
            chosen = parse(views)
            self.card["views"] = chosen.model_dump() if chosen else None

    @property
    def companions(self) -> Path:
        """Where its other files lie (a tokenizer): its own folder, or its base's where PEFT saved an adapter alone."""
        alone = is_bare_adapter(self.path) and not (self.path / "tokenizer.json").is_file()
        return self.weights[0].parent if alone else self.path

    @property
    def sha256(self) -> str:
        if len(self.weights) == 1:
            return files.sha256(self.weights[0])
        return hashlib.sha256("".join(files.sha256(p) for p in self.weights).encode()).hexdigest()

    def predict(self, raw: Any) -> dict[str, Any]:
        """The answer to one raw input: a picture's path, or a row of numbers."""
        with evaluating(self.model):
            return self.task.answer(self.answering, raw)


def build_task(name: str, arguments: dict[str, Any]) -> Task:
    """A registered task, or a user's `path/to/file.py:Name`."""
    entry = TASKS.get(name)
    task: Task = entry.target(**TASKS.build_arguments(entry, arguments, "task"))
    return task


def reference_inputs(input_shape: tuple[int, ...], count: int = 4, vocabulary: int | None = None) -> Tensor:
    """Fixed inputs after preprocessing, float32 [count, *input_shape] in [-1, 1): made, not stored, so that pictures of any size fit.

    With a vocabulary: tokens int64 [count, T] below it, at most 32 of them.
    """
    if vocabulary is not None:
        return ((reference_inputs((min(input_shape[0], 32),), count) + 1) / 2 * vocabulary).long()
    width = int(torch.tensor(input_shape).prod())
    index = torch.arange(count)
    return CounterRandom(0, torch.zeros_like(index), index).uniform("reference", width).reshape(count, *input_shape) * 2 - 1


def save(
    path: Path,
    *,
    model: nn.Module,
    weights: dict[str, Tensor],
    task: Task,
    recipe: Recipe,
    facts: dict[str, Any],
    readme: str,
    model_arguments: dict[str, Any],
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
        weights: what to store (they may be averaged ones); the model is left with them loaded.
        facts: for groundup.json (metrics, data, parent).
        model_arguments: what builds the model besides the recipe's arguments (the config of a model of transformers).

    Raises:
        OSError: it could not be written.
    """
    temporary = files.temporary_sibling(path)
    try:
        temporary.mkdir(parents=True)
        load_weights(model, unique_tensors(weights))
        adapter = adapters.present(model)
        if adapter:
            described, tensors = adapters.described(model, facts["parent"]["path"])
            save_file(unique_tensors(tensors), temporary / ADAPTER, metadata={"format": "pt"})
            files.write_json(temporary / "adapter_config.json", described)
        elif isinstance(model, CausalLM):
            model.write(temporary)
        else:
            tensors = unique_tensors(model.state_dict())
            if isinstance(model, Decoder | GPT2):
                tensors = theirs(tensors, family_of(model))
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        state = task.state()
        arguments = recipe.model.arguments | model_arguments
        config: dict[str, Any] = {
            "architecture": recipe.model.name,
            "arguments": arguments,
            "input_shape": [model.context] if isinstance(model, LanguageModel) else list(task.input_shape),
            "num_outputs": task.num_outputs,
        }
        code = {}
        for registry, name in ((MODELS, recipe.model.name), (TASKS, recipe.task.name)):
            if ".py:" in name:
                entry = registry.get(name)
                assert entry.file is not None
                (temporary / "code").mkdir(exist_ok=True)
                shutil.copyfile(entry.file, temporary / "code" / entry.file.name)
                code[entry.file.name] = files.sha256(entry.file)
        card = {
            "format": 1,
            "task": {"name": recipe.task.name, "arguments": recipe.task.arguments},
            "labels": state["labels"],
            "code": code,
            "versions": {"groundup": groundup.__version__, "torch": torch.__version__, "python": platform.python_version()},
            **facts,
        }
        task.write_files(temporary)
        if adapter:
            card["model"], card["base_bits"] = config, getattr(model, "base_bits", None)
        elif isinstance(model, Decoder | GPT2):
            card["model"], config = config, _language_config(model, task, temporary)
        elif isinstance(model, CausalLM):
            card["model"] = config
        if not adapter and not isinstance(model, CausalLM):
            files.write_json(temporary / "config.json", config)
        files.write_json(temporary / "groundup.json", card)
        files.write_json(temporary / "preprocessor.json", state["preprocessor"])
        files.write_json(temporary / "reference.json", _reference(model, task))
        files.write_text(temporary / "README.md", readme)
        write_manifest(temporary)
        commit(temporary, path)
    except SafetensorError as error:
        raise system_error(error) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _language_config(model: nn.Module, task: Task, folder: Path) -> dict[str, Any]:
    """transformers' config.json, and its generation_config.json beside it."""
    tokenizer = getattr(task, "tokenizer", None)
    special = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad} if tokenizer else {}
    files.write_json(folder / "generation_config.json", {"max_length": task.input_shape[0], **special})
    return write_config(model, special)


def _reference_outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs on fixed inputs; of a language model those after the last token, some thousand of them."""
    with evaluating(model):
        outputs = model(inputs.to(next(model.parameters()).device)).float().cpu()
    return outputs[:, -1, :: max(1, outputs.shape[-1] // 1000)] if inputs.dtype == torch.int64 else outputs


def _reference(model: nn.Module, task: Task) -> dict[str, Any]:
    inputs = reference_inputs(task.input_shape, vocabulary=task.num_outputs if task.kind == "text" else None)
    outputs = _reference_outputs(model, inputs)
    digest = hashlib.sha256(inputs.numpy().tobytes()).hexdigest()
    return {
        "inputs": {"made_by": "groundup.modelfolder.reference_inputs", "shape": list(inputs.shape), "sha256": digest},
        "outputs": outputs.tolist(),
    }


def find(path: str | Path) -> Path:
    """The model folder of a model folder or a run folder (or a run's name under runs/).

    Raises:
        ModelError: there is none, or the run is not finished.
    """
    from groundup.core.errors import RunError
    from groundup.core.run import resolve_run

    folder = Path(path).expanduser()
    if (folder / "groundup.json").is_file() or is_bare_adapter(folder):
        return folder
    if not (folder / "recipe.yaml").is_file():
        if folder.exists():
            raise ModelError(
                "{path} is neither a model folder nor a run folder",
                "{path} 既不是模型目录，也不是运行目录",
                path=path,
                fix="groundup runs list",
            )
        try:
            folder = resolve_run(path).path
        except RunError as error:
            hint, hint_zh = did_you_mean_path(folder)
            like_hub = re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", str(path)) and "?" not in hint
            raise ModelError(
                "no model '{path}': no such folder, and no run of that name." + hint,
                "没有模型 '{path}'：没有这个目录，也没有这个名字的运行。" + hint_zh,
                path=path,
                fix="hub:{path}   fetches it from the Hugging Face hub" if like_hub else "groundup runs list",
                fix_zh="hub:{path}   从 Hugging Face hub 下载" if like_hub else None,
            ) from error
    if not (folder / "model" / "groundup.json").is_file():
        raise ModelError(
            "{path} has no model yet: its training did not finish",
            "{path} 还没有模型：训练尚未完成",
            path=folder,
            fix="groundup train --resume --out {path}",
        )
    return folder / "model"


def is_bare_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT saves it, without a card of ours."""
    return (folder / "adapter_config.json").is_file() and not (folder / "groundup.json").is_file()


def task_name(name: str) -> str | None:
    """The task of a model folder, a run, or a folder of transformers, found without opening its weights; None for what is not here."""
    folder = Path(name).expanduser()
    if is_foreign(name):
        return "language-modeling" if is_language_folder(folder) else "image-classification"
    if is_bare_adapter(folder):
        return "language-modeling"
    return str(files.read_json(find(name) / "groundup.json")["task"]["name"])


def load(path: Any, *, trust_code: bool = False, device: str = "cpu") -> Loaded:
    """Opens a model folder or a run folder, every byte checked against its manifest.

    Args:
        trust_code: run the user code that lies in the folder; without it such a folder is refused.

    Raises:
        ModelError: no model there, damaged, or with code that is not trusted.
    """
    if is_foreign(name := str(getattr(path, "path", path))):
        return _foreign(name, device)
    folder = find(name)
    if is_bare_adapter(folder):
        return _bare_adapter(folder, trust_code, device)
    if (reason := damage(folder)) is not None:
        raise ModelError(
            "{folder} is damaged: {reason}",
            "{folder} 已损坏：{reason}",
            folder=folder,
            reason=reason,
            fix="groundup runs verify RUN, or take the folder from a copy",
            fix_zh="运行 groundup runs verify RUN，或从备份恢复",
        )
    card = files.read_json(folder / "groundup.json")
    config = card.get("model") or files.read_json(folder / "config.json")
    names = {"model": config["architecture"], "task": card["task"]["name"]}
    for kind, name in names.items():
        if ".py:" in name:
            code = folder / "code" / Path(name.rpartition(":")[0]).name
            if not trust_code:
                raise ModelError(
                    "{folder} comes with its own code ({code}), which is run only when you trust it",
                    "{folder} 自带代码（{code}），只有在你信任它时才会运行",
                    folder=folder,
                    code=f"code/{code.name}",
                    fix="read it, then add --trust-code",
                    fix_zh="先阅读代码，再加 --trust-code",
                )
            names[kind] = f"{code}:{name.rpartition(':')[2]}"
    task = build_task(names["task"], card["task"]["arguments"])
    task.load_state({"labels": card["labels"], "preprocessor": files.read_json(folder / "preprocessor.json")})
    task.read_files(folder)
    if (folder / ADAPTER).is_file():
        return _adapter(folder, task, card, trust_code, device)
    model = build_to_read(names["model"], config["arguments"], tuple(config["input_shape"]), config["num_outputs"])
    if isinstance(model, CausalLM):
        model.read(folder)
    else:
        weights = load_file(folder / "model.safetensors")
        if isinstance(model, Decoder | GPT2):
            weights = read_back(weights, family_of(model))
        load_weights(model, weights)
    return Loaded(
        placed(model, torch.device(device)).eval(),
        task,
        card,
        folder,
        config["architecture"],
        config["arguments"],
        [folder / "model.safetensors"],
    )


def _adapter(folder: Path, task: Task, card: dict[str, Any], trust_code: bool, device: str) -> Loaded:
    """A base model with the adapter of a folder on it.

    Raises:
        ModelError: the base is not there any more, or is another one.
    """
    parent = card["parent"]
    if not parent["path"].startswith(("hub:", "timm:")) and not Path(parent["path"]).expanduser().exists():
        raise ModelError(
            "{folder} is an adapter for {path}, which is not there any more",
            "{folder} 是 {path} 的适配器，但它已不在那里",
            folder=folder,
            path=parent["path"],
            fix="put it back; or groundup export MODEL --merge, before a base goes, makes a model that needs none",
            fix_zh="把它放回原处；或在移走基座之前用 groundup export MODEL --merge 得到不需要基座的模型",
        )
    base = load(parent["path"], trust_code=trust_code, device=device)
    if base.sha256 != parent["sha256"]:
        raise ModelError(
            "{folder} is an adapter for {path}, and the weights there have changed",
            "{folder} 是 {path} 的适配器，但那里的权重已改变",
            folder=folder,
            path=parent["path"],
            fix="put the weights back that it was trained on, or tune again",
            fix_zh="恢复训练它时的基座权重，或重新微调",
        )
    adapters.read(base.model, folder)
    if bits := card.get("base_bits"):
        lora.quantize(base.model, list(lora.adapted(base.model)), bits)
    return Loaded(base.model.eval(), task, card, folder, base.architecture, base.arguments, [*base.weights, folder / ADAPTER])


def _bare_adapter(folder: Path, trust_code: bool, device: str) -> Loaded:
    """An adapter that PEFT saved, on the base that it names: a folder, as it stands there or beside the adapter, or a model of the hub."""
    named = str(files.read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    places = [path for path in (Path(named).expanduser(), folder / named) if named and path.is_dir()]
    if not places and not re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        raise ModelError(
            "{folder} is an adapter for '{base}', which is not there",
            "{folder} 是 '{base}' 的适配器，但它不在那里",
            folder=folder,
            base=named,
            fix="write where it is now as base_model_name_or_path in {folder}/adapter_config.json",
            fix_zh="在 {folder}/adapter_config.json 的 base_model_name_or_path 中写明它现在的位置",
        )
    where = str(places[0].resolve()) if places else f"hub:{named}"
    if not places:
        console.line(
            say(
                "{folder} is an adapter for {base} of the Hugging Face hub: getting that",
                "{folder} 是 Hugging Face hub 上 {base} 的适配器：正在获取该基座",
                folder=folder,
                base=named,
            )
        )
    base = load(where, trust_code=trust_code, device=device)
    card = base.card | {"source_run": folder.resolve().name, "parent": {"path": where, "sha256": base.sha256}}
    adapters.read(base.model, folder)
    return Loaded(base.model.eval(), base.task, card, folder, base.architecture, base.arguments, [*base.weights, folder / ADAPTER])


def _foreign(name: str, device: str) -> Loaded:
    """An image classifier of transformers or timm, with a card made for it. What has no classifier has no labels: it can only be tuned."""
    folder = fetch(name.removeprefix("hub:")) if name.startswith("hub:") else Path(name).expanduser()
    if is_language_folder(folder):
        return _foreign_language(folder, name, device)
    opened = open_foreign(name)
    task = build_task("image-classification", {})
    labels = [] if opened.headless else opened.labels
    task.load_state({"labels": labels, "preprocessor": opened.preprocessor})
    card = {
        "task": {"name": "image-classification", "arguments": {}},
        "labels": labels,
        "source_run": opened.name,
        "versions": {},
        "metrics": {},
    }
    return Loaded(
        placed(opened.model, torch.device(device)).eval(), task, card, opened.path, opened.architecture, opened.arguments, opened.weights
    )


def _foreign_language(folder: Path, name: str, device: str) -> Loaded:
    """A language model in transformers' form, with its own tokenizer."""
    config = files.read_json(folder / "config.json")
    architecture, arguments, context, vocabulary = read_config(config)
    model = build_to_read(architecture, arguments, (context,), vocabulary)
    read_weights(model, folder, config["model_type"])
    task: Any = build_task("language-modeling", {"context": context, "tokenizer": str(folder.resolve())})
    task.read_files(folder)
    task.load_state({"labels": [], "preprocessor": {"table": vocabulary}})
    if len(task.tokenizer) > vocabulary:
        raise ModelError(
            "{folder}: the tokenizer has {tokens} tokens, the model a table for {vocabulary}",
            "{folder}：分词器有 {tokens} 个词元，而模型的词表只有 {vocabulary}",
            folder=folder,
            tokens=len(task.tokenizer),
            vocabulary=vocabulary,
        )
    source = re.sub(r"[^\w.\-]+", "-", name.removeprefix("hub:").partition("@")[0].rpartition("/")[2] or folder.resolve().name)
    card = {
        "task": {"name": "language-modeling", "arguments": {"context": context}},
        "labels": [],
        "source_run": source,
        "versions": {},
        "metrics": {},
    }
    return Loaded(placed(model, torch.device(device)).eval(), task, card, folder, architecture, arguments, weight_files(folder))


def replay(loaded: Loaded) -> float:
    """The largest difference between the model's outputs on the reference inputs and the stored ones (the parity gate)."""
    stored = files.read_json(loaded.path / "reference.json")
    vocabulary = loaded.task.num_outputs if loaded.task.kind == "text" else None
    inputs = reference_inputs(tuple(stored["inputs"]["shape"])[1:], stored["inputs"]["shape"][0], vocabulary)
    outputs = _reference_outputs(loaded.model, inputs)
    return float((outputs - torch.tensor(stored["outputs"])).abs().max())
