"""What is in a data set: sizes, class balance, ranges, duplicates, and a grid of samples as PNG."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core import files
from groundup.core.errors import DataError
from groundup.data.cleaning import BROKEN, CODES_ZH
from groundup.data.order import permutation
from groundup.data.pictures import pil_picture
from groundup.data.prepare import Prepared, labels_of, natural, numeric_target


def describe(prepared: Prepared, *, classification: bool) -> dict[str, Any]:
    """Numbers of a data set and its splits, JSON-able."""
    dataset = prepared.dataset
    if dataset.kind == "text":
        return {
            "name": dataset.name,
            "kind": "text",
            "records": len(dataset),
            "splits": {name: len(index) for name, index in prepared.splits.items()},
            "fingerprint": prepared.fingerprint,
            "notes": [en for en, _ in prepared.notes],
            "notes_zh": [zh for _, zh in prepared.notes],
            "rejected_file": str(dataset.inputs.rejected) if any(dataset.inputs.statistics["rejected"].values()) else None,
            **dataset.inputs.statistics,
        }
    facts: dict[str, Any] = {
        "name": dataset.name,
        "kind": dataset.kind,
        "records": len(dataset),
        "input_shape": list(dataset.input_shape),
        "splits": {name: len(index) for name, index in prepared.splits.items()},
        "rejected": len(dataset.rejected),
        "duplicates": len(dataset) - len(set(dataset.digests)),
        "fingerprint": prepared.fingerprint,
        "notes": [en for en, _ in prepared.notes],
        "notes_zh": [zh for _, zh in prepared.notes],
    }
    if classification:
        labels = labels_of(dataset)
        classes = sorted(set(labels.tolist()), key=natural)
        facts["classes"] = {c: {name: int((labels[index] == c).sum()) for name, index in prepared.splits.items()} for c in classes}
    elif dataset.kind == "image" and dataset.target_names:
        hot = numeric_target(dataset) > 0
        facts["classes"] = {
            c: {name: int(hot[index, k].sum()) for name, index in prepared.splits.items()} for k, c in enumerate(dataset.target_names)
        }
    else:
        target = numeric_target(dataset)
        facts["target"] = {"min": float(target.min()), "mean": float(target.mean()), "std": float(target.std()), "max": float(target.max())}
    if dataset.kind == "image":
        first, second = dataset.inputs.moments(prepared.splits["train"])
        facts["pixels"] = {
            "mean": (first / 255).round(4).tolist(),
            "std": (np.sqrt(np.maximum(second - first**2, 0)) / 255).round(4).tolist(),
        }
    else:
        x = dataset.inputs[prepared.splits["train"]]
        facts["features"] = {
            n: {"min": float(c.min()), "mean": float(c.mean()), "std": float(c.std()), "max": float(c.max())}
            for n, c in zip(dataset.feature_names, x.T)
        }
    return facts


def problems(prepared: Prepared, *, classification: bool) -> list[dict[str, Any]]:
    """What deserves a look before training: bad records, a single class, empty or tiny classes, contradicting labels, constant features."""
    dataset, found = prepared.dataset, []

    def add(severity: str, en: str, zh: str, records: list[str] | None = None, records_zh: list[str] | None = None) -> None:
        records = records or []
        found.append({"severity": severity, "message": en, "message_zh": zh, "records": records, "records_zh": records_zh or records})

    if dataset.kind == "image":  # what was passed over
        for note in dataset.notes:
            add("info", *note)
    if dataset.kind == "text":
        corpus, examples = dataset.inputs, prepared.config.text.document in ("conversation", "preference")
        for code, count in corpus.statistics["rejected"].items():
            with corpus.rejected.open(encoding="utf-8") as file:
                listed = list(itertools.islice((r for line in file if (r := json.loads(line))["code"] == code), 100))
            noun, noun_zh = ("records", "条记录") if examples else ("documents", "篇文档")
            add(
                "info" if "duplicate" in code else "error" if code in BROKEN and examples else "warning",
                f"{count} {noun[: -1 if count == 1 else None]} left out: {code}",
                f"移除了 {count} {noun_zh}：{CODES_ZH.get(code, code)}",
                [r["record"] if r["reason"] == code else f"{r['record']}: {r['reason']}" for r in listed],
                [f"{r['record']}：{r['reason_zh']}" for r in listed],
            )
        return found
    if dataset.rejected:
        add(
            "error" if prepared.config.on_bad_record == "stop" else "warning",
            f"{len(dataset.rejected)} records cannot be used",
            f"{len(dataset.rejected)} 条记录无法使用",
            [f"{r['record']}: {r['reason']}" for r in dataset.rejected],
            [f"{r['record']}：{r.get('reason_zh', r['reason'])}" for r in dataset.rejected],
        )
    if classification:
        labels = labels_of(dataset)
        count = Counter(labels.tolist())
        if len(count) < 2:
            add(
                "error",
                f"there is a single class, '{next(iter(count))}': nothing can be learned",
                f"只有一个类别 '{next(iter(count))}'，无法学习",
            )
        few = [c for c, n in count.items() if n < 10]
        if few and len(count) > 1:
            add(
                "warning",
                f"{len(few)} classes have fewer than 10 records: {', '.join(few[:8])}",
                f"{len(few)} 个类别不足 10 条记录：{', '.join(few[:8])}",
            )
        if count and max(count.values()) > 10 * min(count.values()):
            add(
                "warning",
                f"classes are unbalanced: {max(count.values())} to {min(count.values())} records",
                f"类别不均衡：最多 {max(count.values())} 条，最少 {min(count.values())} 条",
            )
        seen: dict[bytes, int] = {}
        clashes = [(seen[d], i) for i, d in enumerate(dataset.digests) if labels[seen.setdefault(d, i)] != labels[i]]
        if clashes:
            add(
                "warning",
                f"{len(clashes)} records equal another one that has a different label",
                f"{len(clashes)} 条记录与另一条完全相同，标签却不同",
                [f"{dataset.describe(a)} = {dataset.describe(b)} ({labels[a]} / {labels[b]})" for a, b in clashes],
            )
    if dataset.kind == "vector":
        constant = [n for n, c in zip(dataset.feature_names, dataset.inputs[prepared.splits["train"]].T) if c.min() == c.max()]
        if constant:
            add(
                "warning",
                f"{len(constant)} features never change: {', '.join(constant[:8])}",
                f"{len(constant)} 个特征恒定不变：{', '.join(constant[:8])}",
            )
    duplicates = len(dataset) - len(set(dataset.digests))
    if duplicates:
        add(
            "info",
            f"{duplicates} exact duplicates; each set of equals stands on one side of the split",
            f"{duplicates} 条完全重复的记录；相同的记录只出现在划分的同一侧",
        )
    return found


def sample_grid(prepared: Prepared, path: Path, *, columns: int = 10, rows: int = 6) -> None:
    """A PNG of training pictures, class by class along the rows; each 32 to 256 pixels high where its shape allows."""
    import io

    from PIL import Image

    dataset, train = prepared.dataset, prepared.splits["train"]
    if dataset.kind != "image":
        raise DataError("{name} holds vectors; a grid needs pictures", "{name} 是向量数据，图片网格需要图片", name=dataset.name)
    order = train[permutation(len(train), 0, 0)]
    labels = labels_of(dataset) if dataset.target.ndim == 1 else np.zeros(len(dataset), dtype=np.str_)
    classes = sorted(set(labels[order].tolist()), key=natural)[: rows if len(set(labels.tolist())) > 1 else 1]
    chosen = (
        [order[labels[order] == c][:columns] for c in classes]
        if len(classes) > 1
        else [order[i * columns : (i + 1) * columns] for i in range(rows)]
    )
    _, height, width = dataset.input_shape
    # Small pictures are enlarged by whole pixels, large ones shrunk: a sheet of photos at full size would not fit in memory.
    longest = max(height, width)
    zoom: float = max(1, min(-(-32 // height), 256 // longest)) if longest <= 256 else 256 / longest
    wide, high = max(1, round(width * zoom)), max(1, round(height * zoom))
    filtering = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BILINEAR
    sheet = Image.new("RGB", (columns * (wide + 2) + 2, len(chosen) * (high + 2) + 2), (255, 255, 255))
    for r, index in enumerate(chosen):
        pictures = dataset.inputs.fetch(index).numpy() if len(index) else []
        for c, pixels in enumerate(pictures):
            picture = pil_picture(pixels).resize((wide, high), filtering)
            sheet.paste(picture, (2 + c * (wide + 2), 2 + r * (high + 2)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    files.write_bytes(path, buffer.getvalue())
