"""The recipe: one YAML file, one strict schema, everything that a run needs.

Unknown keys are errors with the nearest name and the line; a value of the wrong type names what was expected. `auto` is a value
that is resolved once, when the run starts, and written to `decisions.json` with its reason.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from groundup.core import units
from groundup.core.errors import RecipeError, did_you_mean
from groundup.core.problems import expectations, explain

Auto = Literal["auto"]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise RecipeError("a number is expected, not true or false", "应为数字，而不是 true 或 false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Int, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Seed = Annotated[Int, Field(ge=0, lt=2**62)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Named(BaseModel):
    """A registered thing with its own arguments: `fcnn`, or `{name: fcnn, hidden: [128]}`."""

    model_config = ConfigDict(extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return _by_name(value)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Mixed(Section):
    """One source of a mixture, or only some of its classes; weight null takes every record of it."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # a folder may be called 2024
    source: str
    classes: list[str] | None = None
    weight: Annotated[Float, Field(gt=0)] | None = 1.0


class Split(Section):
    """How records are divided. Exact duplicates never stand on two sides."""

    validation: Fraction | Literal["given"] = 0.1
    test: Fraction | Literal["given"] | Auto = "auto"
    by: Literal["record", "document", "group", "contiguous"] = "record"
    seed: Seed = 0

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Split:
        shares = [float(s) for s in (self.validation, self.test) if not isinstance(s, str)]
        if sum(shares) >= 1:
            raise RecipeError(
                "validation and test take {all:g} of the records together; less than 1 is expected, so that some are left to train on",
                "validation 与 test 合计占 {all:g}；应小于 1，否则没有记录可用于训练",
                all=sum(shares),
            )
        return self


class Columns(Section):
    """Role -> column of a table, where it is not recognised. `separator` divides a text of several labels, as in 'cat;dog'."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    target: str | list[str] | None = None
    features: list[str] | None = None
    ignore: list[str] = []
    image: str | None = None
    group: str | None = None
    split: str | None = None
    separator: str | None = None


class Augment(Section):
    """Random changes of training pictures, whole batches at once.

    shift: pixels; rotate: degrees; flip: probability of left-right mirroring; crop: pixels of padding from which a window of the
    old size is cut; erase: probability of blanking a rectangle; resized_crop: least share of the area of a window that is enlarged to the
    whole; color: strength of random brightness, contrast and saturation; randaugment: number of operations drawn for each picture, of strength
    `magnitude`; jpeg: least quality of a JPEG compression that is imitated; mixup, cutmix: the alpha of their mixing of two pictures (with
    both given, each batch pair draws one of them).
    """

    shift: Annotated[Int, Field(ge=0)] = 0
    rotate: Annotated[Float, Field(ge=0, le=180)] = 0.0
    flip: Annotated[Float, Field(ge=0, le=1)] = 0.0
    crop: Annotated[Int, Field(ge=0)] = 0
    erase: Annotated[Float, Field(ge=0, le=1)] = 0.0
    resized_crop: Annotated[Float, Field(gt=0, le=1)] | None = None
    color: Annotated[Float, Field(ge=0, le=1)] = 0.0
    randaugment: Annotated[Int, Field(ge=0, le=8)] = 0
    magnitude: Annotated[Float, Field(ge=0, le=1)] = 0.5
    jpeg: Annotated[Int, Field(ge=1, le=100)] | None = None
    mixup: Annotated[Float, Field(ge=0)] = 0.0
    cutmix: Annotated[Float, Field(ge=0)] = 0.0


class Views(Section):
    """Test-time augmentation: the outputs of several views of a picture are averaged. flip: also mirrored; shift: also moved by so many
    pixels each way."""

    flip: bool = False
    shift: Annotated[Int, Field(ge=0)] = 0


class Picture(Section):
    """What every picture is brought to; `auto` follows the data (when tuning: the base model).

    resize: 'stretch' both sides to the size, or 'crop' the centre after the shorter side was brought to `short_side` (auto: the size's shorter
    one). mean, std: of each channel on the scale 0..1; 'imagenet' stands for the values that most published weights were trained with.
    """

    size: Positive | list[Positive] | Auto = "auto"
    channels: Literal[1, 3] | Auto = "auto"
    resize: Literal["stretch", "crop"] = "stretch"
    short_side: Positive | Auto = "auto"
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: list[Float] | Literal["auto", "imagenet"] = "auto"
    std: list[Annotated[Float, Field(gt=0)]] | Literal["auto", "imagenet"] = "auto"


class Text(Section):
    """How text becomes documents, and which of them are left out; what is left out is written to rejected.jsonl with its reason.

    document: what one document is: a whole file, a line, or a paragraph (between blank lines); records of JSON lines and tables always are one
    each, and `conversation` reads them as examples of questions and answers (instruction tuning asks for it by itself). column: the field of records that holds the text. normalize: the Unicode form. languages: only these (ISO 639-1), as far as a document
    shows what it is. repetition: greatest share of characters in repeated lines and phrases. near_duplicates: the Jaccard similarity of 5-word (in
    scripts without spaces: 5-character) shingles from which a document counts as a copy, 'auto' for 0.8 and for examples, which resemble each other by
    nature, 1; null keeps copies, always on one side of the split.
    """

    column: str | None = None
    document: Literal["file", "line", "paragraph", "conversation", "preference"] | Auto = "auto"
    encoding: str = "auto"
    normalize: Literal["nfc", "nfkc"] | None = "nfc"
    languages: list[str] | None = None
    min_chars: Annotated[Int, Field(ge=1)] = 1
    max_chars: Positive | None = None
    repetition: Annotated[Float, Field(gt=0, le=1)] | None = None
    near_duplicates: Annotated[Float, Field(gt=0, le=1)] | Auto | None = "auto"


class Data(Section):
    """`balance`: how far the classes are drawn alike in training, from 0 (as often as they are) to 1 (equally often). `in_memory`, `cached`:
    where decoded pictures are kept, in memory or as raw pixels on the disk; else they are decoded each time, by `workers` processes."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    source: str | list[Mixed]
    split: Split = Split()
    columns: Columns = Columns()
    classes: list[str] | None = None
    train_samples: Positive | None = None
    balance: Annotated[Float, Field(ge=0, le=1)] = 0.0
    image: Picture = Picture()
    text: Text = Text()
    augment: Augment | None = None
    on_bad_record: Literal["stop", "skip"] | Auto = "auto"
    in_memory: bool | Auto = "auto"
    cached: bool | Auto = "auto"
    workers: Annotated[Int, Field(ge=0)] | Auto = "auto"

    @field_validator("classes", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return [str(v) for v in value] if isinstance(value, list) else value


class Optim(Section):
    """The optimizer. lr: auto follows the size of a language model's layers. `adamw8bit` keeps AdamW's states in eight bits (Dettmers et al., arXiv
    2110.02861; bitsandbytes); `offload` keeps any optimizer's states in the host's memory. `groups` multiplies the learning rate of layer groups or of parameter name patterns: {features: 0.1}; `layer_decay`
    multiplies it once more for each layer group that lies between a layer and the head (Howard and Ruder, arXiv 1801.06146, 3.2)."""

    name: Literal["sgd", "adam", "adamw", "adamw8bit", "rmsprop", "muon"] = "adamw"
    lr: Annotated[Float, Field(gt=0)] | Auto = 1e-3
    weight_decay: Annotated[Float, Field(ge=0)] = 0.01
    momentum: Fraction | None = None
    nesterov: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    offload: bool = False
    groups: dict[str, Annotated[Float, Field(ge=0)]] = {}
    layer_decay: Annotated[Float, Field(gt=0, le=1)] | None = None
    _short = model_validator(mode="before")(_by_name)


class Schedule(Section):
    """The learning rate as a closed form of (step, total). Shares are of the whole run."""

    name: Literal["constant", "step", "cosine", "one-cycle", "wsd"] = "cosine"
    warmup: Fraction = 0.0
    floor: Fraction = 0.0
    step_every: Annotated[Float, Field(gt=0, le=1)] = 1 / 3
    gamma: Annotated[Float, Field(gt=0, le=1)] = 0.1
    decay: Annotated[Float, Field(gt=0, le=1)] = 0.2
    _short = model_validator(mode="before")(_by_name)


class EarlyStopping(Section):
    patience: Positive = 5
    min_delta: Annotated[Float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"patience": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Train(Section):
    epochs: Annotated[Float, Field(gt=0)] | None = None
    steps: Positive | str | None = None
    tokens: Positive | str | None = None
    batch_size: Positive = 256
    micro_batch_size: Positive | Auto = "auto"
    precision: Literal["float32", "bfloat16", "float16"] | Auto = "auto"
    compile: bool | Auto = "auto"
    checkpointing: Literal["none", "selective", "whole"] = "none"
    clip_norm: Annotated[Float, Field(gt=0)] | None = 1.0
    ema: Annotated[Float, Field(gt=0, lt=1)] | None = None
    early_stopping: EarlyStopping | None = None
    seed: Seed = 0
    deterministic: bool = False
    device: str = "auto"
    save_every: Positive | str = "60s"
    keep: Literal["best", "last"] = "best"

    @field_validator("save_every")
    @classmethod
    def _duration(cls, value: int | str) -> int | str:
        if isinstance(value, str):
            if value.isdecimal():
                return units.count(value)
            units.seconds(value)
        return value

    @field_validator("steps", "tokens")
    @classmethod
    def _count(cls, value: int | str | None) -> int | None:
        return None if value is None else units.count(value)

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        given = [n for n in ("epochs", "steps", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise RecipeError(
                "give one of epochs, steps and tokens, not {given}",
                "epochs、steps、tokens 只能给一个，这里给了 {given_zh}",
                given=" and ".join(given),
                given_zh=" 和 ".join(given),
            )
        if not given:
            self.epochs = 3
        return self


class Evaluate(Section):
    """How a run is measured.

    Args:
        views: test-time augmentation of the final evaluation, kept with the model for its answers.
        general: of tuned language models, general questions on which forgetting is measured: 'auto' (ours, English and Chinese), a file of one's own,
            or 'none'.
        answers: how many questions of the held-out split are answered before and after tuning; 'auto' as many as 20 seconds allow, at most 100.
        run_code: whether the code in answers is run where the data has `tests` (pass@1). It is code that a model wrote.
    """

    every: Literal["epoch"] | Positive = "epoch"
    metric: str = "auto"
    views: Views | None = None
    general: str = "auto"
    answers: Annotated[Int, Field(ge=0)] | Auto = "auto"
    run_code: bool = False


class Watch(Section):
    """What is written while training. `profile`: a profiler trace of that many steps. `trackers`: `path/to/file.py:Name`."""

    log_every: Positive = 10
    tensorboard: bool = True
    report: bool = True
    profile: Annotated[Int, Field(ge=0)] = 0
    trackers: list[str] = []


class RecipeCard(Section):
    summary: str = ""
    summary_zh: str = ""
    result: str = ""
    result_zh: str = ""


class Recipe(Section):
    """`init`: what to start from, a model folder, run, hub model or file of weights. `keep_classes`: its classes stay in the head, and those of
    the new data are added behind them."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    card: RecipeCard = RecipeCard()
    task: Named
    data: Data
    model: Named
    init: str | None = None
    keep_classes: bool = False
    method: Named = Named(name="full")
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    watch: Watch = Watch()

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, for comparing two recipes."""
        return dict(_flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# What may differ when a run is resumed; epochs and steps only with --extend.
RESUMABLE = ("watch.", "card.", "data.workers", "data.in_memory", "data.cached", "train.save_every")
EXTENDABLE = ("train.epochs", "train.steps")

# Names that people bring from other systems -> ours.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "momentum": "optim.momentum",
    "optimizer": "optim.name",
    "per_device_train_batch_size": "train.batch_size",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "save_steps": "train.save_every",
    "logging_steps": "watch.log_every",
    "eval_steps": "evaluate.every",
    "dtype": "train.precision",
    "amp": "train.precision",
    "warmup_ratio": "schedule.warmup",
    "lr_scheduler_type": "schedule.name",
    "scheduler": "schedule.name",
    "num_workers": "data.workers",
    "dataset": "data.source",
    "pretrained": "init",
    "arch": "model.name",
    "patience": "train.early_stopping",
}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `Augment | None`."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        return next((s for a in get_args(annotation) if (s := _section_of(a))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if inner := _section_of(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _hint(key: str) -> tuple[str, str]:
    """The key that was probably meant: a synonym from elsewhere, the same last word in another section, or a near spelling."""
    key = _unnumbered(key)
    last, keys = key.rpartition(".")[2], known_keys()
    if last in SYNONYMS:
        found = [SYNONYMS[last]]
    elif same := [k for k in keys if k.rpartition(".")[2] == last]:
        found = same
    else:
        by_last: dict[str, list[str]] = {}
        for k in keys:
            by_last.setdefault(k.rpartition(".")[2], []).append(k)
        parent = key.rpartition(".")[0]
        close = difflib.get_close_matches(last, [*by_last, *SYNONYMS], n=3, cutoff=0.6)
        found = [k for c in close for k in by_last.get(c, [SYNONYMS.get(c, "")])]
        found.sort(key=lambda k: k.rpartition(".")[0] != parent)
        if not found:
            siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
            listed = ", ".join(siblings)
            return (f" Keys here: {listed}.", f"这里可用的键：{listed}。") if siblings else ("", "")
    named = [f"'{k}'" for k in dict.fromkeys(found)][:3]
    return f" Did you mean {', '.join(named)}?", f"是不是 {'、'.join(named)}？"


def _unnumbered(key: str) -> str:
    """'data.source.0.weight' -> 'data.source.weight'."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: 1e-3 is a number; yes, off, 010, 1:30 and 2024-01-31 are text, as a label may be."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL", "~nN"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML version, or `_Loader`, would read as something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"), [*"-+.0123456789"])


def _lines(text: str) -> dict[str, int]:
    """Dotted key -> line of a YAML text. Raises RecipeError for a key that stands twice: YAML would silently keep the last."""
    places: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
                if dotted in places:
                    raise RecipeError(
                        "'{key}' is given twice, in lines {first} and {second}",
                        "'{key}' 出现了两次：第 {first} 行和第 {second} 行",
                        key=dotted,
                        first=places[dotted],
                        second=key.start_mark.line + 1,
                    )
                places[dotted] = key.start_mark.line + 1
                walk(value, dotted)

    walk(yaml.compose(text, Loader=_Loader), "")
    return places


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """A YAML mapping, or a RecipeError that names the line."""
    text = text.removeprefix("\ufeff")
    try:
        value = yaml.load(text, Loader=_Loader)
        _lines(text)
    except RecipeError as error:
        raise RecipeError("{origin}: {why}", "{origin}：{why_zh}", origin=origin, why=error.en, why_zh=error.zh) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(
            "{origin}, line {line}: not valid YAML: {problem}",
            "{origin} 第 {line} 行：YAML 格式有误：{problem}",
            origin=origin,
            line=mark.line + 1 if mark else "?",
            problem=getattr(error, "problem", None) or error,
        ) from error
    if not isinstance(value, dict):
        raise RecipeError(
            "{origin}: a recipe is a mapping of keys, this is {kind}",
            "{origin}：recipe 应是键值映射，这里却是{kind_zh}",
            origin=origin,
            kind="empty" if value is None else f"a {type(value).__name__}",
            kind_zh="空的" if value is None else f" {type(value).__name__}",
            fix="groundup recipes digits-cnn   shows one",
            fix_zh="groundup recipes digits-cnn   可查看示例",
        )
    return value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        inner = tree.get(part)
        if isinstance(inner, str) and part in ("model", "task", "method"):
            inner = {"name": inner}
        if not isinstance(inner, dict):
            inner = {}
        tree[part] = inner
        tree = inner
    if last in ("model", "task", "method") and isinstance(value, str) and not parents:
        value = {"name": value}
    if last in ("optim", "schedule") and isinstance(value, str) and not parents:  # the other settings stay
        there = tree.get(last)
        value = {**(there if isinstance(there, dict) else {}), "name": value}
    tree[last] = value


def parse_set(assignment: str) -> tuple[str, Any]:
    """'optim.lr=3e-4' -> ('optim.lr', 0.0003): numbers, true, false, null, [lists] and {mappings} as in YAML, all else is text.

    A path is text whatever is in it: `*.csv`, `photos #2` and `C: drive` would be an alias, a comment and a mapping in YAML.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            "--set {assignment}: write KEY=VALUE, as --set optim.lr=3e-4",
            "--set {assignment}：应写作 键=值，例如 --set optim.lr=3e-4",
            assignment=assignment,
        )
    text = text.strip()
    structured = text[:1] in ("[", "{", "'", '"')
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        if not structured:
            return key.strip(), text
        raise RecipeError(
            "--set {assignment}: the value is not valid YAML", "--set {assignment}：等号后的值不是合法的 YAML", assignment=assignment
        ) from error
    plain = isinstance(value, bool | int | float | None) and "#" not in text
    return key.strip(), value if structured or plain else text


def override(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe tree with dotted overrides put in. A new length (epochs, steps, tokens) replaces the old one."""
    lengths = {"train.epochs", "train.steps", "train.tokens"}
    if lengths & overrides.keys() and isinstance(tree.get("train"), dict):
        tree["train"] = {k: v for k, v in tree["train"].items() if f"train.{k}" not in lengths}
    for key, value in overrides.items():
        _set(tree, key, copy.deepcopy(value))
    return tree


def _place(loc: tuple[int | str, ...], known: set[str]) -> str:
    """The dotted key of a problem; what pydantic adds to tell the members of a union apart ('list[Mixed]', 'str') is left out."""
    key = ""
    for n, part in enumerate(loc):
        longer = f"{key}.{part}" if key else str(part)
        if longer in known or isinstance(part, int) or n == len(loc) - 1:
            key = longer
    return key


def build(tree: dict[str, Any], origin: str, *, text: str = "", overridden: Mapping[str, Any] = types.MappingProxyType({})) -> Recipe:
    """Checks a tree against the schema; every problem is listed, each with its place and the nearest name.

    Raises:
        RecipeError: unknown keys, wrong types, values out of range.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        lines = _lines(text.removeprefix("\ufeff")) if text else {}
    known = set(known_keys())
    english, chinese = [], []
    found: dict[tuple[str, bool], list[Any]] = {}
    for problem in problems:
        parts = _place(problem["loc"], known).split(".")
        whole = problem["type"] == "extra_forbidden" or (problem["type"] == "missing" and not isinstance(problem["loc"][-1], int))
        longest = next((k for n in range(len(parts), 0, -1) if _unnumbered(k := ".".join(parts[:n])) in known), parts[0])
        key = ".".join(parts) if whole else longest
        found.setdefault((key, whole), []).append(problem)
    for (key, whole), group in found.items():
        problem = group[0]
        if not whole and any(k.startswith(key + ".") for k, _ in found):
            continue  # a list was given where a text could stand too: what is wrong inside it says more
        if any((k + ".").startswith(key + ".") or (key + ".").startswith(k + ".") for k in overridden):
            place, place_zh = "from --set", "来自 --set"
        elif key in lines:
            place, place_zh = f"{origin}, line {lines[key]}", f"{origin} 第 {lines[key]} 行"
        else:
            place, place_zh = origin, origin
        if problem["type"] == "extra_forbidden":
            hint, hint_zh = _hint(key)
            english.append(f"unknown key '{key}' ({place}).{hint}")
            chinese.append(f"未知的键 '{key}'（{place_zh}）。{hint_zh}")
        elif whole:
            english.append(f"'{key}' is missing ({place})")
            chinese.append(f"缺少 '{key}'（{place_zh}）")
        else:
            expected, expected_zh = expectations(group)
            given = repr(problem.get("input"))
            given = f" = {given[:200]}" if explain(problem)[2] is False or not isinstance(problem.get("input"), dict) else ""
            english.append(f"{key}{given} ({place}): {expected}")
            chinese.append(f"{key}{given}（{place_zh}）：{expected_zh}")
    raise RecipeError("{problems}", "{problems_zh}", problems="\n  ".join(english), problems_zh="\n  ".join(chinese))


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes inside the package."""
    folder = Path(str(resources.files("groundup.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load(recipe: str | Path | Recipe | Mapping[str, Any], overrides: Mapping[str, Any] = types.MappingProxyType({})) -> Recipe:
    """A recipe by name, YAML file, run folder, mapping or Recipe, with dotted overrides.

    Raises:
        RecipeError: no such recipe (with the nearest names), or one that does not fit the schema.
    """
    text, origin = "", "recipe"
    if isinstance(recipe, Recipe):
        tree = recipe.model_dump(mode="json")
    elif isinstance(recipe, Mapping):
        tree = copy.deepcopy(dict(recipe))
    else:
        path = Path(recipe).expanduser()
        if str(recipe) in shipped():
            path = shipped()[str(recipe)]
        elif path.is_dir() and (path / "recipe.yaml").is_file():
            path = path / "recipe.yaml"
        if not path.is_file():
            hint, hint_zh = did_you_mean(str(recipe), shipped())
            raise RecipeError(
                "no recipe '{recipe}': not one of the shipped ones and not a file." + hint,
                "没有名为 '{recipe}' 的 recipe：既不是自带的，也不是文件。" + hint_zh,
                recipe=recipe,
                fix="groundup recipes",
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise RecipeError(
                "{path} cannot be read as text: {error}",
                "无法读取 {path}：{error}",
                path=path,
                error=error,
                fix="save it as UTF-8",
                fix_zh="请存为 UTF-8 编码",
            ) from error
        origin = str(recipe)
        tree = parse_yaml(text, origin)
    return build(override(tree, overrides), origin, text=text, overridden=overrides)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) where two recipes differ."""
    a, b = old.flat(), new.flat()
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}
