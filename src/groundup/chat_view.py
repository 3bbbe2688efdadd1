"""Examples as a model will see them: rendered by its chat template, what is trained marked, their lengths in its tokens."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text

from groundup import modelfolder
from groundup.core import console, files
from groundup.core.errors import DataError
from groundup.core.messages import say
from groundup.core.recipe import Data
from groundup.data.chat_tokens import parse, render
from groundup.data.prepare import prepare

SHOWN = 3  # examples in the terminal
IN_PAGE = 50
STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;border:1px solid #ccc;padding:1em}mark{background:#b6e3b6}"


def view(config: Data, model: str) -> dict[str, Any]:
    """What `data show` and `data check` tell of examples for a model.

    Returns:
        'examples': of each its record and its parts, {'text', 'trained'}; 'tokens': percentiles of the lengths; 'context'; 'cut', 'lost_tokens';
        'trained_share'; 'left_out': reason -> count; 'template'.
    """
    loaded = modelfolder.load(model)
    if loaded.task.kind != "text":
        raise DataError(
            "{model} is no language model", "{model} 不是语言模型", model=model, fix="groundup data show SPEC   without --model"
        )
    given = loaded.card["task"]
    task: Any = modelfolder.build_task("instruction-tuning", given["arguments"] if given["name"] == "instruction-tuning" else {})
    task.read_files(loaded.path)
    task.load_state({"labels": [], "preprocessor": loaded.task.state()["preprocessor"] | task.own_state()})
    config = config.model_copy(update={"on_bad_record": "skip"})  # what is wrong is told, not stopped at
    prepared = prepare(task.reads(config), classification=False, kind="text")
    index = np.sort(np.concatenate(list(prepared.splits.values())))
    with console.muted():
        stream = task.prepare(prepared.dataset, index, torch.device("cpu")).stream
    examples = []
    for i in range(min(IN_PAGE, len(stream))):
        record = int(index[stream.records[i]])
        made = render(task.tokenizer, task.template, parse(prepared.dataset.inputs.text(record)), task.train_on)
        examples.append(
            {"record": prepared.dataset.inputs.describe(record), "tokens": len(made.ids), "parts": _parts(made, task.tokenizer)}
        )
    return {
        "name": prepared.dataset.name,
        "model": model,
        "template": task.template_name,
        "records": len(index),
        "context": task.context,
        "tokens": {f"p{q}": int(np.percentile(stream.lengths, q)) for q in (5, 50, 95, 99)} | {"longest": int(stream.lengths.max())},
        "cut": stream.facts["cut"],
        "lost_tokens": stream.facts["lost_tokens"],
        "trained_share": stream.supervised / max(1, int(stream.starts[-1])),
        "left_out": stream.facts["left_out"],
        "examples": examples,
    }


def _parts(made: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens' own text, in stretches that are trained or are not."""
    edges = [0, *(np.flatnonzero(np.diff(made.trained)) + 1).tolist(), len(made.ids)]
    return [
        {"text": tokenizer.decode(made.ids[a:b].tolist(), special=True), "trained": bool(made.trained[a])}
        for a, b in zip(edges, edges[1:])
        if b > a
    ]


def print_view(facts: dict[str, Any]) -> None:
    console.heading(say("{name} for {model}", "{name}，用于 {model}", **facts))
    for example in facts["examples"][:SHOWN]:
        console.line(say("{record}, {tokens} tokens", "{record}，{tokens} 个词元", **example), style="dim")
        text = Text()
        for part in example["parts"]:
            text.append(part["text"] if not part["trained"] else f"⟦{part['text']}⟧", style="bold green" if part["trained"] else "")
        console.out().print(text)
        console.line()
    console.line(say("⟦trained⟧, the rest is only read", "⟦训练的部分⟧，其余只用于阅读"), style="dim")
    print_lengths(facts)
    if facts.get("page"):
        console.line(say("page: {page}", "网页：{page}", page=facts["page"]))


def print_lengths(facts: dict[str, Any]) -> None:
    listed = ", ".join(f"{k} {v:,}" for k, v in facts["tokens"].items())
    console.line(
        say(
            "template: {template}; tokens of an example: {listed}; the model reads {context:,}; {share:.0%} are trained",
            "模板：{template}；每例词元数：{listed}；模型上限 {context:,}；其中 {share:.0%} 参与训练",
            template=facts["template"],
            listed=listed,
            context=facts["context"],
            share=facts["trained_share"],
        )
    )


def problems(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a check remarks about the examples for this model."""
    found = []
    if facts["cut"]:
        share = facts["cut"] / facts["records"]
        found.append(
            {
                "severity": "warning",
                "message": f"{facts['cut']:,} examples ({share:.0%}) are longer than the model's {facts['context']:,} tokens: "
                f"{facts['lost_tokens']:,} tokens at their ends would be lost",
                "message_zh": f"{facts['cut']:,} 条样本（{share:.0%}）超过模型的 {facts['context']:,} 个词元：末尾将丢失 {facts['lost_tokens']:,} 个词元",
                "records": [],
                "records_zh": [],
            }
        )
    for reason, n in facts["left_out"].items():
        found.append(
            {
                "severity": "warning",
                "message": f"{n:,} examples {reason}",
                "message_zh": f"{n:,} 条样本：{reason}",
                "records": [],
                "records_zh": [],
            }
        )
    return found


def write_page(facts: dict[str, Any], path: Path) -> None:
    """The examples as one self-contained page."""
    body = [f"<h1>{html.escape(facts['name'])} → {html.escape(facts['model'])}</h1>"]
    for example in facts["examples"]:
        inside = "".join(f"<mark>{html.escape(p['text'])}</mark>" if p["trained"] else html.escape(p["text"]) for p in example["parts"])
        body.append(f"<h3>{html.escape(example['record'])} ({example['tokens']})</h3><pre>{inside}</pre>")
    files.write_text(
        path, f'<!doctype html><meta charset="utf-8"><title>{html.escape(facts["name"])}</title><style>{STYLE}</style>{"".join(body)}'
    )
