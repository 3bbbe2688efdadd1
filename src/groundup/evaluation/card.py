"""The model card: the README.md of a model folder, readable by people and, through its YAML head, by the Hugging Face hub.

It says only what the run knows. Equal runs give equal cards: no time and no path of the machine is in it.
"""

from __future__ import annotations

import platform
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

import groundup
from groundup.core.errors import GroundupError
from groundup.core.recipe import Recipe
from groundup.core.registry import MODELS, TASKS, Card, Registry
from groundup.evaluation.page import interval, number

# The hub's names for our tasks, which it sorts models by.
HUB_TASKS = {
    "image-classification": "image-classification",
    "vector-classification": "tabular-classification",
    "vector-regression": "tabular-regression",
    "language-modeling": "text-generation",
    "instruction-tuning": "text-generation",
    "preference-tuning": "text-generation",
}
LISTED = 200  # labels written out


def model_card(recipe: Recipe, result: dict[str, Any], data: dict[str, Any]) -> str:
    """The README.md of a model folder.

    Args:
        result: what the run reports (result.json; the seconds may be missing).
        data: the contents of data.json.
    """
    parts = [_about(recipe, result), _labels(result, data), _training_data(recipe, data), _training(recipe, result), _evaluation(result), _use(recipe),
             _limits(recipe, result), _chinese(recipe, result, data)]  # fmt: skip
    head = yaml.safe_dump(_head(recipe, result, data), sort_keys=False, allow_unicode=True, width=110)
    return f"---\n{head}---\n\n# {_md(recipe.name)}\n\n" + "\n\n".join(p for p in parts if p) + "\n"


# -- the YAML head -------------------------------------------------------------------------------------------------------------
def _head(recipe: Recipe, result: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    task, name = _plain_name(recipe.task.name), _dataset(recipe, data)
    hub_task = HUB_TASKS.get(task)
    measured = [{"type": k, "name": k, "value": float(v)} for k, v in result.get("metrics", {}).items() if v == v]
    head: dict[str, Any] = {
        "library_name": "groundup",
        # Nobody told groundup under which licence this model may be used, and the data's licence does not decide it. The hub has the word
        # 'unknown' for that; 'other' would claim a licence that has a name. Whoever publishes the model writes the right one here.
        "license": "unknown",
        "tags": ["groundup", task, _plain_name(recipe.model.name), "pytorch"],
    }
    if hub_task:
        head["pipeline_tag"] = hub_task
    if measured:
        dataset = {"name": name, "type": name, "split": str(result.get("split", "test")), "revision": str(data.get("fingerprint", ""))}
        entry = {"task": {"type": hub_task or task, "name": task}, "dataset": dataset, "metrics": measured}
        head["model-index"] = [{"name": recipe.name, "results": [entry]}]
    return head


# -- sections ------------------------------------------------------------------------------------------------------------------
def _about(recipe: Recipe, result: dict[str, Any]) -> str:
    parameters = f" with {result['parameters']:,} parameters" if result.get("parameters") else ""
    text = f"A `{_plain_name(recipe.model.name)}` model{parameters} for the task `{_plain_name(recipe.task.name)}`, trained with groundup."
    if recipe.card.summary:
        text += f"\n{_md(recipe.card.summary)}."
    if card := _card(MODELS, recipe.model.name):
        text += f"\n\nThe architecture: {_md(card.summary)} ({_md(card.source)})."
    if recipe.init:
        origin = "another model on the machine it was trained on" if _is_path(recipe.init) else f"`{_code(recipe.init)}`"
        text += f"\n\nIt was tuned (method `{_code(recipe.method.name)}`) from {origin}; the sha256 of the weights it started from is in `groundup.json`."
    return text


def _labels(result: dict[str, Any], data: dict[str, Any]) -> str:
    names = list(result.get("per_class") or (data.get("statistics", {}).get("classes") or {}))
    if not names:
        targets = list(result.get("per_target") or {})
        return f"## Output\n\nNumbers: {', '.join(_md(t) for t in targets)}" if targets else ""
    more = f", and {len(names) - LISTED} more (in `groundup.json`)" if len(names) > LISTED else ""
    return f"## Labels\n\n{len(names)}: {', '.join(_md(n) for n in names[:LISTED])}{more}"


def _training_data(recipe: Recipe, data: dict[str, Any]) -> str:
    facts = data.get("statistics", {})
    splits = ", ".join(f"{k} {v:,}" for k, v in facts.get("splits", {}).items())
    shape = " x ".join(str(n) for n in facts.get("input_shape", []))
    rows = [
        ("source", _md(_dataset(recipe, data))),
        ("records", f"{facts['records']:,}" if "records" in facts else ""),
        ("splits", splits),
        ("input", _md(f"{facts.get('kind', '')} {shape}".strip())),
        ("fingerprint", f"`{_code(data.get('fingerprint', ''))}`" if data.get("fingerprint") else ""),
    ]
    return "## Training data\n\n" + _table(["", ""], [[k, v] for k, v in rows if v])


def _training(recipe: Recipe, result: dict[str, Any]) -> str:
    import torch

    length = f"{recipe.train.steps:,} steps" if recipe.train.steps else f"{recipe.train.epochs:g} epochs" if recipe.train.epochs else ""
    rows = [
        ("length", f"{length}, {result['steps']:,} steps done" if result.get("steps") else length),
        ("weights of step", f"{result['best_step']:,}" if result.get("best_step") is not None else ""),
        (
            "optimizer",
            f"{recipe.optim.name}, learning rate {recipe.optim.lr}, schedule {recipe.schedule.name}, batch {recipe.train.batch_size:,}",
        ),
        ("seed", str(recipe.train.seed)),
        ("versions", f"groundup {groundup.__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
    ]
    return "## Training\n\n" + _table(["", ""], [[k, v] for k, v in rows if v])


def _evaluation(result: dict[str, Any]) -> str:
    metrics = result.get("metrics", {})
    if not metrics:
        return ""
    intervals = result.get("intervals", {})
    rows = [[_md(k), number(v), interval(intervals.get(k))] for k, v in metrics.items()]
    text = f"## Evaluation\n\nOn the {_md(result.get('split', 'test'))} split; 95 % intervals over its records.\n\n" + _table(
        ["metric", "value", "95 % interval"], rows
    )
    compared = (result.get("before_after") or {}).get("rows") or []
    if compared:
        rows = [
            [_md(r.get("what", "")), _md(r.get("metric", "")), _with(r, "before"), _with(r, "after"), _md(r.get("note") or "")]
            for r in compared
        ]
        text += "\n\nBefore and after tuning:\n\n" + _table(["data", "metric", "before", "after", ""], rows)
    return text


def _use(recipe: Recipe) -> str:
    own_code = any(n.rpartition(":")[0].endswith(".py") for n in (recipe.model.name, recipe.task.name))
    kind = "photo.png" if "image" in recipe.task.name else "5.1,3.5,1.4,0.2"
    flag, argument = (" --trust-code", ", trust_code=True") if own_code else ("", "")
    warning = "\n\nThis folder holds code (`code/`) that is run when it is opened: read it first." if own_code else ""
    return f"""## How to use

```
groundup predict FOLDER {kind}{flag}
```

```python
import groundup

model = groundup.load("FOLDER"{argument})
print(model.predict("{kind}"))
```{warning}"""


def _limits(recipe: Recipe, result: dict[str, Any]) -> str:
    cards = [c for c in (_card(MODELS, recipe.model.name), _card(TASKS, recipe.task.name)) if c and c.limits]
    lines = [f"- {_md(c.limits)}" for c in cards]
    lines.append(
        f"- The figures hold for records like those of the {_md(result.get('split', 'test'))} split; nothing is known about other ones."
    )
    if result.get("split") in ("validation", "train"):
        lines.append(
            "- There was no test split: the figures are from records that took part in the training or in choosing the weights, and flatter the model."
        )
    return "## Limits\n\n" + "\n".join(lines)


def _chinese(recipe: Recipe, result: dict[str, Any], data: dict[str, Any]) -> str:
    """The same in short for Chinese readers; the tables above need no translation."""
    metric, split = str(result.get("metric", "")), str(result.get("split", "test"))
    text = f"## 中文说明\n\n用 groundup 训练的 `{_plain_name(recipe.model.name)}` 模型，任务为 `{_plain_name(recipe.task.name)}`，数据为 {_md(_dataset(recipe, data))}。"
    if recipe.card.summary_zh:
        text += f"{_md(recipe.card.summary_zh)}。"
    if metric in result.get("metrics", {}):
        spread = interval(result.get("intervals", {}).get(metric))
        text += (
            f"在 {_md(split)} 集上 {_md(metric)} 为 {number(result['metrics'][metric])}"
            + (f"（95 % 区间 {spread}）" if spread else "")
            + "。"
        )
    return text + "用 `groundup predict 目录 输入` 进行预测。许可证未注明：发布前请自行填写。"


# -- words and numbers ---------------------------------------------------------------------------------------------------------
def _card(registry: Registry[Any], name: str) -> Card | None:
    """The card of a registered thing; a user's own code has none."""
    try:
        return None if ".py:" in name else registry.get(name).card
    except GroundupError:
        return None


def _is_path(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith((".", "~"))


def _plain_name(name: str) -> str:
    """'/home/me/nets.py:Net' -> 'Net'."""
    return name.rpartition(":")[2]


def _dataset(recipe: Recipe, data: dict[str, Any]) -> str:
    """What the data is called, without where it lies on this machine."""
    source = recipe.data.source
    names = [source] if isinstance(source, str) else [m.source for m in source]
    short = [PureWindowsPath(n.rstrip("/\\")).name if _is_path(n) else n for n in names]  # its parts end at both kinds of slash
    return " + ".join(n for n in short if n) or str(data.get("statistics", {}).get("name", "unnamed"))


def _md(value: Any) -> str:
    """Any text inside a paragraph or a table cell: Markdown's and HTML's signs lose their meaning, line breaks become spaces."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!$&])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    """Text between backquotes."""
    return " ".join(str(value).replace("`", "'").split())


def _with(row: dict[str, Any], key: str) -> str:
    spread = interval(row.get(f"{key}_interval"))
    return number(row.get(key)) + (f" ({spread})" if spread else "")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
