"""Examples for tuning: as a model will see them, what is trained marked; what deserves a look in them; and a file without it."""

from __future__ import annotations

import contextlib
import hashlib
import html
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.text import Text

from groundup import modelfolder
from groundup.core import console, files
from groundup.core.errors import DataError
from groundup.core.messages import say
from groundup.core.recipe import Data
from groundup.core.registry import TASKS
from groundup.data import conversations
from groundup.data.chat_tokens import LEFT_OUT_ZH, parse, render, versions
from groundup.data.cleaning import CODES_ZH
from groundup.data.conversations import as_read
from groundup.data.corpus import rejection
from groundup.data.documents import open_parts
from groundup.data.prepare import Prepared, prepare
from groundup.data.records import read_item
from groundup.data.review import remarks

SHOWN = 3  # examples in the terminal
IN_PAGE = 50
STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;border:1px solid #ccc;padding:1em}mark{background:#b6e3b6}"


def task_for(spec: str) -> str | None:
    """The task that the first records which can be read are examples for, or would be if they were whole; None for plain text."""
    damaged = None
    for name in ("instruction-tuning", "preference-tuning"):
        try:
            config = TASKS.get(name).target.reads(Data(source=spec))
            items = [i for part in open_parts(config) for i in part.items if i.kind != "file"]
            found = [f for item in items[:3] for f in itertools.islice(read_item(item, config), 20)]
            if any(f.text is not None and f.text.startswith('{"messages": ') for f in found):
                return name
            broken = [f.reason for f in found if f.reason is not None and f.reason.code in ("empty", "schema", "roles", "nothing to learn")]
            if any(reason != conversations.EMPTY_TEXT for reason in broken):  # a text may be empty, too
                damaged = damaged or name
        except DataError:
            pass  # what is wrong with it is said when it is read
    return damaged


def prepared_for(config: Data, task: str | None) -> Prepared:
    """The records of a data section as the task reads them; what is wrong is left out and told, not stopped at."""
    config = config.model_copy(update={"on_bad_record": "skip"})
    return prepare(config if task is None else TASKS.get(task).target.reads(config), classification=False, kind="text")


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
    name = (task_for(config.source) if isinstance(config.source, str) else None) or "instruction-tuning"
    task: Any = modelfolder.build_task(name, given["arguments"] if given["name"] == name else {})
    task.read_files(loaded.companions)
    task.load_state({"labels": [], "preprocessor": loaded.task.state()["preprocessor"] | task.own_state()})
    prepared = prepared_for(config, name)
    index = np.sort(np.concatenate(list(prepared.splits.values())))
    with console.muted():
        stream = task.prepare(prepared.dataset, index, torch.device("cpu")).stream
    examples = []
    for record in dict.fromkeys(int(index[r]) for r in stream.records[:IN_PAGE]):
        conversation = parse(prepared.dataset.inputs.text(record))
        pair = "answers" in conversation
        made_of = versions(conversation) if pair else [conversation]
        for number, version in enumerate([made_of[0], *made_of[1::2]]):
            made = render(task.tokenizer, task.template, version, task.train_on, only_last=pair)
            which = ("", "") if not pair else (", better", "，较好的回答") if number == 0 else (", worse", "，较差的回答")
            examples.append(
                {
                    "record": prepared.dataset.inputs.describe(record) + say(*which),
                    "tokens": len(made.ids),
                    "parts": _parts(made, task.tokenizer),
                }
            )
    describe, there = prepared.dataset.inputs.describe, {int(index[r]) for r in stream.records}
    gone = [int(i) for i in index if int(i) not in there] if stream.facts["left_out"] else []
    longer = list(dict.fromkeys(int(index[r]) for r, n in zip(stream.records, stream.lengths) if n > task.context)) if stream.facts["cut"] else []
    return {
        "name": prepared.dataset.name,
        "model": model,
        "task": name,
        "template": task.template_name,
        "records": len(index),
        "context": task.context,
        "tokens": {f"p{q}": int(np.percentile(stream.lengths, q)) for q in (5, 50, 95, 99)} | {"longest": int(stream.lengths.max())},
        "cut": stream.facts["cut"],
        "lost_tokens": stream.facts["lost_tokens"],
        "trained_share": stream.supervised / max(1, int(stream.starts[-1])),
        "left_out": stream.facts["left_out"],
        "cut_records": [describe(i) for i in longer[:100]],
        "left_out_records": [describe(i) for i in gone[:100]],
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
    listed = ", ".join(f"{say('longest', '最长') if k == 'longest' else k} {v:,}" for k, v in facts["tokens"].items())
    console.line(
        say(
            "template: {template}; tokens of an example: {listed}; the model reads {context:,}; {share:.0%} are trained",
            "模板：{template}；每例词元数：{listed}；模型上限 {context:,}；其中 {share:.0%} 参与训练",
            template=say("its own", "模型自带") if facts["template"] == "its own" else facts["template"],
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
            _problem(
                f"{facts['cut']:,} examples ({share:.0%}) are longer than the model's {facts['context']:,} tokens: "
                f"{facts['lost_tokens']:,} tokens at their ends would be lost",
                f"{facts['cut']:,} 条样本（{share:.0%}）超过模型的 {facts['context']:,} 个词元：末尾将丢失 {facts['lost_tokens']:,} 个词元",
                records=facts["cut_records"],
                records_zh=facts["cut_records"],
            )
        )
    gone = facts["left_out_records"] if len(facts["left_out"]) == 1 else []
    return found + [
        _problem(f"{_count(n, 'example')} {reason}", f"{n:,} 条样本{LEFT_OUT_ZH[reason]}", records=gone, records_zh=gone)
        for reason, n in facts["left_out"].items()
    ]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _problem(en: str, zh: str, severity: str = "warning", records: Sequence[str] = (), records_zh: Sequence[str] = ()) -> dict[str, Any]:
    return {"severity": severity, "message": en, "message_zh": zh, "records": list(records), "records_zh": list(records_zh)}


def review(prepared: Prepared, fix: Path | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What deserves a look in every record, read one by one; with `fix`, the rest is written there, and what was removed and why beside it.

    Returns:
        problems, and {'file', 'kept', 'removed', 'removed_list'} of what was written.

    Raises:
        DataError: the file exists already or cannot be written.
    """
    corpus = prepared.dataset.inputs
    held_out = {int(i) for name, index in prepared.splits.items() if name != "train" for i in index}
    index = np.sort(np.concatenate(list(prepared.splits.values())))
    counts: Counter[str] = Counter()
    flagged = 0
    shown: dict[str, list[tuple[str, str]]] = {}
    trained: set[bytes] = set()  # digests of the questions that are trained
    held: dict[bytes, int] = {}  # and of those that are held out, with a record of each
    removed = None if fix is None else fix.with_name(fix.name + ".removed.jsonl")
    if fix is not None and fix.suffix != ".jsonl":
        raise DataError(
            "--fix {path}: the cleaned records are lines of JSON, and the file's name should say so",
            "--fix {path}：清理后的记录是逐行的 JSON，文件名应能看出这一点",
            path=fix,
            fix="--fix {name}.jsonl",
            name=fix.with_suffix(""),
        )
    for path in (p for p in (fix, removed) if p is not None and p.exists()):
        raise DataError("{path} exists already", "{path} 已经存在", path=path, fix="--fix another.jsonl")
    with contextlib.ExitStack() as stack, console.progress() as told:
        kept_file = removed_file = None
        if fix is not None and removed is not None:
            kept_file, removed_file = _whole(stack, fix), _whole(stack, removed)
            with corpus.rejected.open("rb") as before:
                shutil.copyfileobj(before, removed_file)
        for n, (i, text) in enumerate(zip(index, corpus.texts(index))):
            if n % 1000 == 0:
                told(say("reading every record", "正在逐条检查"), n / len(index))
            conversation = parse(text)
            reasons = remarks(conversation)
            for reason in reasons:
                counts[reason.code] += 1
                if len(shown.setdefault(reason.code, [])) < 100:
                    name = corpus.describe(int(i))
                    shown[reason.code].append((f"{name}: {reason.en}", f"{name}：{reason.zh}"))
            if messages := conversation.get("messages"):
                turns = messages if "answers" in conversation else messages[:-1]
                digest = hashlib.blake2b(repr([t["content"] for t in turns]).encode("utf-8", "replace"), digest_size=8).digest()
                if int(i) in held_out:
                    held.setdefault(digest, int(i))
                else:
                    trained.add(digest)
            if kept_file is not None and removed_file is not None:
                if reasons:
                    flagged += 1
                    removed_file.write(rejection(corpus.describe(int(i)), reasons[0], text))
                else:
                    kept_file.write(as_read(conversation).encode("utf-8") + b"\n")
    found = [
        _problem(
            f"{_count(n, 'record')}: {code}",
            f"{n:,} 条记录：{CODES_ZH.get(code, code)}",
            "error" if code == "secret" else "warning",
            [en for en, _ in shown[code]],
            [zh for _, zh in shown[code]],
        )
        for code, n in counts.items()
    ]
    if both := [corpus.describe(i) for digest, i in held.items() if digest in trained]:
        found.append(
            _problem(
                f"{_count(len(both), 'question')} of the evaluation split {'stands' if len(both) == 1 else 'stand'} in the training split, too",
                f"评估集中有 {len(both):,} 个问题也出现在训练集中",
                records=both[:100],
                records_zh=both[:100],
            )
        )
    if fix is None:
        return found, {}
    out = sum(corpus.statistics["rejected"].values())
    return found, {"file": str(fix), "kept": len(index) - flagged, "removed": out + flagged, "removed_list": str(removed)}


def _whole(stack: contextlib.ExitStack, path: Path) -> IO[bytes]:
    """A file that gets its name when the stack ends without an error, and is gone where it does not."""
    temporary = files.temporary_sibling(path)
    try:
        file = open(temporary, "xb")
    except OSError as error:
        raise DataError(
            "{path} cannot be written: {why}", "{path} 无法写入：{why}", path=path, why=error, fix="--fix another.jsonl"
        ) from error

    def close(kind: Any, error: Any, trace: Any) -> None:
        file.close()
        if kind is None:
            os.replace(temporary, path)
        else:
            temporary.unlink(missing_ok=True)

    stack.push(close)
    return file


def write_page(facts: dict[str, Any], path: Path) -> None:
    """The examples as one self-contained page."""
    body = [f"<h1>{html.escape(facts['name'])} → {html.escape(facts['model'])}</h1>"]
    for example in facts["examples"]:
        inside = "".join(f"<mark>{html.escape(p['text'])}</mark>" if p["trained"] else html.escape(p["text"]) for p in example["parts"])
        body.append(f"<h3>{html.escape(example['record'])} ({example['tokens']})</h3><pre>{inside}</pre>")
    files.write_text(
        path, f'<!doctype html><meta charset="utf-8"><title>{html.escape(facts["name"])}</title><style>{STYLE}</style>{"".join(body)}'
    )
