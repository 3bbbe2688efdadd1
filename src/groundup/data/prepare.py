"""From a recipe's data section to records in splits: the one way in for training, evaluation and the data commands."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError, did_you_mean
from groundup.core.recipe import Data
from groundup.data.dataset import Dataset
from groundup.data.order import hashed_order
from groundup.data.sources import open_source
from groundup.data.split import Splits, make_splits


@dataclass
class Prepared:
    """Records, their splits, and what was noticed on the way."""

    dataset: Dataset
    splits: Splits
    notes: list[tuple[str, str]]
    config: Data

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    @property
    def contents(self) -> str | None:
        """sha256 of the contents of its files, however they are named and divided; None where there are no files."""
        files = sorted(self.dataset.files.values())
        return hashlib.sha256("\n".join(files).encode()).hexdigest() if files else None

    def is_that_of(self, card: dict[str, Any]) -> bool:
        """Whether a model with this card was made with the same data."""
        known = card.get("data", {})
        return self.fingerprint == known.get("fingerprint") or (self.contents is not None and self.contents == known.get("contents"))


def natural(label: str) -> tuple[Any, ...]:
    """Sort key that puts '2' before '10'."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", label) if part)


def labels_of(dataset: Dataset) -> NDArray[np.str_]:
    """The target as one text label per record; whole numbers lose their '.0'.

    Raises:
        DataError: several target columns, or numbers that are not whole.
    """
    target = dataset.target
    if target.ndim != 1:
        raise DataError(
            "{name} has {n} target columns; a class label needs one",
            "{name} 有 {n} 个目标列；类别标签只需要一个",
            name=dataset.name,
            n=target.shape[1],
            fix="--set task.multi_label=true   for columns of 0 and 1 with vector-classification"
            if dataset.kind == "vector"
            else "one whole number or text per picture",
            fix_zh="--set task.multi_label=true   （vector-classification，各列为 0 和 1）"
            if dataset.kind == "vector"
            else "每张图片一个整数或文本",
        )
    if np.issubdtype(target.dtype, np.floating):
        whole = np.isfinite(target) & (target == np.round(target))
        if not whole.all():
            at = int(np.flatnonzero(~whole)[0])
            raise DataError(
                "{record}: the label is {value}, which is not a class (whole number or text)",
                "{record}：标签为 {value}，不是类别（应为整数或文本）",
                record=dataset.describe(at),
                value=float(target[at]),
                fix="--set task=vector-regression   for a real-valued target",
                fix_zh="--set task=vector-regression   （若目标是实数）",
            )
        target = target.astype(np.int64)
    labels = target.astype(np.str_)
    return _numbers_as_labels(dataset, labels) if target.dtype.kind not in "biu" else labels


def _numbers_as_labels(dataset: Dataset, labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Text labels that are numbers: '1.0' is the class '1'; a column of many different reals is a target of regression, not classes."""
    known = sorted(set(labels.tolist()))
    values = {label: _real(label) for label in known}
    if not all(math.isfinite(v) for v in values.values()) or all("." not in label and "e" not in label.lower() for label in known):
        return labels
    if any(v != round(v) for v in values.values()):
        if len(known) > max(20, len(labels) // 10):
            at = next(i for i, label in enumerate(labels) if values[label] != round(values[label]))
            raise DataError(
                "{record}: the label is {value}, one of {n} different numbers; classes are whole numbers or text",
                "{record}：标签为 {value}，共有 {n} 个不同的数；类别应为整数或文本",
                record=dataset.describe(at),
                value=labels[at],
                n=len(known),
                fix="--set task=vector-regression   for a real-valued target",
                fix_zh="--set task=vector-regression   （若目标是实数）",
            )
        return labels
    return np.array([str(int(values[label])) if "." in label or "e" in label.lower() else label for label in labels.tolist()])


def numeric_target(dataset: Dataset) -> NDArray[np.float64]:
    """The target as float64 [N, targets].

    Raises:
        DataError: a value that is not a finite number; names the first one.
    """
    target = dataset.target if dataset.target.ndim == 2 else dataset.target[:, None]
    try:
        values: NDArray[np.float64] = target.astype(np.float64)
    except ValueError:
        values = np.array([[_real(cell) for cell in row] for row in target])
    if not np.isfinite(values).all():
        i, j = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            "{record}: the target is '{cell}'; a finite number is expected",
            "{record}：目标值是 '{cell}'；应为有限的数",
            record=dataset.describe(int(i)),
            cell=target[i, j],
            fix="--set task=vector-classification   for labels",
            fix_zh="--set task=vector-classification   （若目标是标签）",
        )
    return values


def _real(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def keep_classes(dataset: Dataset, classes: list[str]) -> Dataset:
    """Only the records with these labels. Raises DataError for a label that the data does not have."""
    labels = labels_of(dataset)
    known = sorted(set(labels.tolist()), key=natural)
    for label in classes:
        if label not in known:
            hint, hint_zh = did_you_mean(label, known)
            raise DataError(
                "data.classes: {name} has no label '{label}'." + hint,
                "data.classes：{name} 没有标签 '{label}'。" + hint_zh,
                name=dataset.name,
                label=label,
            )
    return dataset.select(np.flatnonzero(np.isin(labels, classes)))


def prepare(config: Data, *, classification: bool, dataset: Dataset | None = None, kind: str = "") -> Prepared:
    """Reads, filters and divides the data.

    Args:
        kind: what the task reads; 'text' makes documents of any source.
        classification: the target is a class label; splits then keep the class shares alike.
        dataset: what `open_source(config)` gave, where the caller has had to look at it first.

    Raises:
        DataError: everything that is wrong with the data, with names and counts.
    """
    if kind == "text":
        return _prepare_text(config)
    dataset = dataset if dataset is not None else open_source(config)
    if len(dataset) == 0:
        raise DataError("{name} has no records", "{name} 没有任何记录", name=dataset.name)
    notes = list(dataset.notes)
    if dataset.rejected:
        # A damaged picture among thousands is everyday life; a hole in a table is a question to its owner.
        policy = config.on_bad_record if config.on_bad_record != "auto" else ("skip" if dataset.kind == "image" else "stop")
        first, count, total = dataset.rejected[0], len(dataset.rejected), len(dataset.rejected) + len(dataset)
        facts = {
            "n": count,
            "total": total,
            "record": first["record"],
            "reason": first["reason"],
            "reason_zh": first.get("reason_zh", first["reason"]),
        }
        if policy == "stop":
            raise DataError(
                "{n} of {total} records cannot be used; the first: {record}: {reason}",
                "{total} 条记录中有 {n} 条无法使用；第一条：{record}：{reason_zh}",
                fix="groundup data check SPEC lists them; leave them out with --set data.on_bad_record=skip",
                fix_zh="用 groundup data check SPEC 查看；用 --set data.on_bad_record=skip 跳过它们",
                **facts,
            )
        notes.append(
            (
                "{n} of {total} records cannot be used and are skipped; the first: {record}: {reason}".format(**facts),
                "{total} 条记录中有 {n} 条无法使用，已跳过；第一条：{record}：{reason_zh}".format(**facts),
            )
        )
    if config.classes is not None:
        dataset = keep_classes(dataset, config.classes)
    labels = labels_of(dataset) if classification else None
    splits, remarks = make_splits(dataset, config.split, labels)
    if config.train_samples is not None and config.train_samples < len(splits["train"]):
        splits["train"] = _few(dataset, splits["train"], labels, config.train_samples, config.split.seed)
    return Prepared(dataset, splits, notes + remarks, config)


def _prepare_text(config: Data) -> Prepared:
    from groundup.core import console
    from groundup.data.corpus import prepare_corpus

    with console.progress() as told:
        corpus = prepare_corpus(config, progress=told)
    nothing = np.zeros(len(corpus), dtype=np.int8)
    dataset = Dataset(corpus.name, "text", corpus, nothing, [], corpus.describe, files=corpus.files, notes=corpus.notes)
    dataset.fingerprint = corpus.fingerprint  # of the documents, found when they were read
    return Prepared(dataset, dict(corpus.splits), corpus.notes, config)


def _few(dataset: Dataset, index: NDArray[np.int64], labels: NDArray[Any] | None, count: int, seed: int) -> NDArray[np.int64]:
    """A seeded choice of `count` records, the classes in turn."""
    order = index[hashed_order([dataset.digests[i] for i in index], seed + 1)]
    if labels is None:
        return np.sort(order[:count])
    rank: dict[str, int] = {}
    keyed = []
    for place, i in enumerate(order):
        rank[labels[i]] = rank.get(labels[i], 0) + 1
        keyed.append((rank[labels[i]], place))
    return np.sort(order[[place for _, place in sorted(keyed)[:count]]])


def absolute_source(config: Data) -> Data:
    """The section with paths made absolute, so that a run can be resumed and evaluated from any folder."""

    def fixed(spec: str) -> str:
        base = re.sub(r"#\d+$", "", spec)
        path = Path(base.rpartition(":")[0] if ".py:" in base else base).expanduser()
        from groundup.core.registry import DATASETS

        if spec.startswith("hub:") or base in DATASETS.names() or (not path.exists() and not any(c in base for c in "*?[")):
            return spec
        return str(path.resolve()) + spec[len(base.rpartition(":")[0] if ".py:" in base else base) :]

    source = (
        fixed(config.source)
        if isinstance(config.source, str)
        else [part.model_copy(update={"source": fixed(part.source)}) for part in config.source]
    )
    return config.model_copy(update={"source": source})
