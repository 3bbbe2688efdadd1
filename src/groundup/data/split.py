"""Dividing records into training, validation and test without leakage.

Exact duplicates (equal input) go to one side together; a training record that also stands in a given test or validation split leaves
training. Which records go where follows from the seed and their content, not from the order of files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.recipe import Split
from groundup.data.dataset import Dataset
from groundup.data.order import hashed_order

Splits = dict[str, NDArray[np.int64]]


def make_splits(dataset: Dataset, config: Split, labels: NDArray[Any] | None) -> tuple[Splits, list[tuple[str, str]]]:
    """Split name -> sorted positions, and remarks for the log (English, Chinese).

    Args:
        labels: class of each record, to keep class shares alike on all sides; None where there are no classes.

    Raises:
        DataError: a given split that the data does not have, or too few records to divide.
    """
    if config.by == "document":
        raise DataError(
            "data.split.by = document is for text; here write record, group or contiguous",
            "data.split.by = document 只用于文本；这里请写 record、group 或 contiguous",
        )
    notes: list[tuple[str, str]] = []
    given = {name: index for name, index in dataset.given.items() if len(index)}
    test = config.test if config.test != "auto" else ("given" if "test" in given else 0.2)
    if config.test == "auto":
        notes.append(
            ("test split: the data's own", "测试集：数据自带")
            if test == "given"
            else ("test split: 20 % of the records (the data has none of its own)", "测试集：取 20 % 的记录（数据没有自带测试集）")
        )
    for name, wanted in (("validation", config.validation), ("test", test)):
        if wanted == "given" and name not in given:
            raise DataError(
                "data.split.{name} = given, and {dataset} has no {name} split of its own",
                "data.split.{name} = given，但 {dataset} 没有自带的 {name} 集",
                name=name,
                dataset=dataset.name,
                fix="--set data.split.{name}=0.1",
            )
    splits: Splits = {}
    rest = np.ones(len(dataset), dtype=bool)
    for name, wanted in (("test", test), ("validation", config.validation)):
        if name in given:  # the data's own held-out records never train, even where another share is asked for
            rest[given[name]] = False
            if wanted == "given" or (name == "validation" and isinstance(wanted, float) and wanted > 0):
                splits[name] = np.sort(given[name])
    shares = {
        name: float(share)
        for name, share in (("test", test), ("validation", config.validation))
        if share != "given" and name not in splits and float(share) > 0
    }

    # Units that must stay together: equal inputs, or equal groups (and then equal inputs across groups tie the groups).
    unit = _units(dataset, config.by == "group")
    held = np.concatenate([unit[index] for index in splits.values()] or [unit[:0]])
    remaining = np.flatnonzero(rest)
    leaked = np.isin(unit[remaining], held)
    if leaked.any():
        count = int(leaked.sum())
        notes.append(
            (f"{count} training records equal a held-out one and were left out", f"有 {count} 条训练记录与验证/测试记录重复，已移出训练集")
        )
        remaining = remaining[~leaked]
    if config.by == "contiguous":
        parts, end = {}, len(remaining)
        for name, share in shares.items():
            count = max(1, round(share * len(remaining)))
            parts[name], end = remaining[end - count : end], end - count
        parts["train"] = remaining[:end]
        taken: set[int] = set()
        left_out = 0
        for name, index in parts.items():  # test, validation, then training: an earlier one keeps the equals
            clean = np.array([int(unit[i]) not in taken for i in index], dtype=bool)
            left_out += int((~clean).sum())
            taken |= {int(unit[i]) for i in index}
            parts[name] = index[clean]
        if left_out:
            notes.append(
                (
                    f"{left_out} records equal one of a later stretch and were left out",
                    f"有 {left_out} 条记录与其后区段的记录重复，已移出",
                )
            )
        splits |= parts
    else:
        splits |= _by_unit(dataset, remaining, unit, labels, shares, config.seed)
    duplicates = len(dataset) - len({*dataset.digests})
    if duplicates:
        notes.append(
            (
                f"{duplicates} records are exact duplicates of another; each set of equals stands on one side",
                f"有 {duplicates} 条记录与其他记录完全相同；相同的记录只出现在同一侧",
            )
        )
    if not len(splits["train"]):
        raise DataError(
            "{name}: nothing is left to train on ({n} records in all)",
            "{name}：没有剩下可训练的记录（共 {n} 条）",
            name=dataset.name,
            n=len(dataset),
            fix="--set data.split.validation=0 --set data.split.test=0",
        )
    for name in shares:
        if not len(splits[name]):
            notes.append(
                (
                    f"no record could be held out for {name}: every class keeps at least one for training",
                    f"没有记录可划入 {name} 集：每个类别至少留一条用于训练",
                )
            )
    return {name: np.sort(splits[name]) for name in ("train", "validation", "test") if name in splits and len(splits[name])}, notes


def _units(dataset: Dataset, by_group: bool) -> NDArray[np.int64]:
    """The unit number of each record: records of one unit are never divided."""
    first: dict[bytes, int] = {}
    unit = np.array([first.setdefault(d, i) for i, d in enumerate(dataset.digests)], dtype=np.int64)
    if not by_group:
        return unit
    if dataset.groups is None:
        raise DataError(
            "data.split.by = group needs a column of groups", "data.split.by = group 需要一列分组", fix="--set data.columns.group=NAME"
        )
    parent = list(range(len(dataset)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    leader: dict[Any, int] = {}
    for i, group in enumerate(dataset.groups):
        parent[root(i)] = root(leader.setdefault(group, i))
        parent[root(i)] = root(int(unit[i]))
    return np.array([root(i) for i in range(len(dataset))], dtype=np.int64)


def _by_unit(
    dataset: Dataset,
    remaining: NDArray[np.int64],
    unit: NDArray[np.int64],
    labels: NDArray[Any] | None,
    shares: dict[str, float],
    seed: int,
) -> Splits:
    """Whole units to each side, class by class (the class of a unit is its first record's)."""
    members: dict[int, list[int]] = {}
    for i, of in zip(remaining.tolist(), unit[remaining].tolist()):
        members.setdefault(of, []).append(i)
    leaders = np.array(list(members), dtype=np.int64)
    order = leaders[hashed_order([dataset.digests[i] for i in leaders], seed)]
    strata: dict[Any, list[int]] = {}
    classes = None if labels is None else labels.tolist()
    for leader in order.tolist():
        strata.setdefault(None if classes is None else classes[members[leader][0]], []).append(leader)
    parts: dict[str, list[int]] = {name: [] for name in ("train", *shares)}
    carry = dict.fromkeys(shares, 0.0)
    for stratum in sorted(strata, key=str):
        units = strata[stratum]
        total, start = sum(len(members[u]) for u in units), 0
        for name, share in shares.items():
            wanted, got = share * total + carry[name], 0
            # A class keeps at least one unit for training.
            while start < len(units) - 1 and got + len(members[units[start]]) / 2 <= wanted:
                parts[name] += members[units[start]]
                got += len(members[units[start]])
                start += 1
            carry[name] = min(wanted - got, 1.0)  # what a tiny class could not give is not taken from the next one
        for u in units[start:]:
            parts["train"] += members[u]
    return {name: np.array(sorted(index), dtype=np.int64) for name, index in parts.items()}
