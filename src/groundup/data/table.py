"""Vectors from CSV/TSV text or npz archives.

A text table needs numbers in every feature column; its target column is recognised by name (target, label, class, y), else it is the
last one. Missing values (empty, ?, NA, NaN) are counted by line: they stop the run, or their rows are skipped when asked.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core import files
from groundup.core.errors import DataError, did_you_mean
from groundup.core.messages import typed
from groundup.core.recipe import Data
from groundup.data.dataset import Dataset, digests_of, from_arrays, read_bytes

MISSING = {"", "?", "na", "n/a", "nan", "null", "none", "-"}
TARGETS = ("target", "label", "labels", "class", "y")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def read_text(path: Path) -> str:
    """A text file in UTF-8 (with or without BOM), UTF-16 (with one) or GB18030, decided by its bytes."""
    return text_of(read_bytes(path), path)


def text_of(data: bytes, path: Any) -> str:
    """As `read_text`, of bytes that were read already; `path` is for messages."""
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError("{path} is not text in UTF-8, UTF-16 or GB18030", "{path} 不是 UTF-8、UTF-16 或 GB18030 编码的文本", path=path)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, cells) of a delimited text; a table whose first row is all numbers gets the names c0, c1, ...

    Raises:
        DataError: an empty file, or rows of different length.
    """
    return rows_of(read_text(path), path)


def rows_of(text: str, path: Any) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """As `read_rows`, of a text that was read already; `path` is for messages."""
    if not text.strip():
        raise DataError("{path} is empty", "{path} 是空文件", path=path)
    first = text.strip("\r\n").splitlines()[0]
    delimiter = max(",\t;|", key=first.count) if any(d in first for d in ",\t;|") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise DataError(
            "{path} line {line}: not a delimited table: {error}",
            "{path} 第 {line} 行：不是分隔符表格：{error}",
            path=path,
            line=reader.line_num,
            error=error,
        ) from error
    if not rows:
        raise DataError("{path} is empty", "{path} 是空文件", path=path)
    header = rows[0][1]
    if _is_data(rows):
        header = [f"c{i}" for i in range(len(header))]
    else:
        rows = rows[1:]
    if len(set(header)) < len(header):
        twice = next(h for h in header if header.count(h) > 1)
        raise DataError("{path}: two columns are named '{name}'", "{path}：有两列都叫 '{name}'", path=path, name=twice)
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                "{path} line {line}: {found} cells where the header has {expected}",
                "{path} 第 {line} 行：有 {found} 个单元格，表头有 {expected} 个",
                path=path,
                line=line,
                found=len(row),
                expected=len(header),
            )
    return header, rows


def json_rows(text: str, path: Any) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    """Header and (line number, values) of JSON lines, or of one JSON list of objects (then the number is the record's). What an object
    lacks is ''.

    Raises:
        DataError: something that is not JSON, or not an object.
    """
    records: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # else they are lines of lists, and told as such
            records = list(enumerate(json.loads(text), 1))
    for line, row in enumerate(text.split("\n") if not records else (), 1):
        if row.strip():
            try:
                records.append((line, json.loads(row)))
            except ValueError as error:
                raise DataError(
                    "{path} line {line}: not JSON: {error}", "{path} 第 {line} 行：不是 JSON：{error}", path=path, line=line, error=error
                ) from error
    if not records:
        raise DataError("{path} is empty", "{path} 是空文件", path=path)
    for line, record in records:
        if not isinstance(record, dict):
            raise DataError(
                "{path} line {line}: {found} where an object like {{...}} is expected",
                "{path} 第 {line} 行：应为对象 {{...}}，却是 {found}",
                path=path,
                line=line,
                found=type(record).__name__,
            )
    header = list(dict.fromkeys(key for _, record in records for key in record))
    return header, [(line, [record.get(key, "") for key in header]) for line, record in records]


def _is_data(rows: list[tuple[int, list[str]]]) -> bool:
    """Whether the first row is a record and not the names of columns.

    It holds numbers, and each of its texts stands again further down in its column, as a label does and a name does not. The numbers
    0, 1, 2, ... in order are the names that pandas gives.
    """
    first = rows[0][1]
    texts = [i for i, cell in enumerate(first) if not _is_number(cell)]
    numbers = [cell for cell in first if _is_number(cell)]
    if not numbers or (len(numbers) > 2 and numbers == [str(i) for i in range(len(numbers))]):
        return False
    return all(first[i] and any(first[i] == row[i] for _, row in rows[1:] if i < len(row)) for i in texts)


def split_column(path: Any, header: list[str], rows: list[tuple[int, list[Any]]], wanted: str | None) -> list[str] | None:
    """The split of each row, where the table has a column of splits: the one asked for, or one called 'split' that holds nothing else.

    Raises:
        DataError: the column asked for is not there, or names something that is not a split.
    """
    lower = {h.lower(): i for i, h in enumerate(header)}
    at = lower.get((wanted or "split").lower())
    if at is None:
        if wanted is None:
            return None
        hint, hint_zh = did_you_mean(wanted, header)
        raise DataError("{path} has no column '{name}'." + hint, "{path} 没有列 '{name}'。" + hint_zh, path=path, name=wanted)
    for line, row in rows:
        if str(row[at]).lower() not in SPLIT_NAMES:
            if wanted is None:
                return None
            raise DataError(
                "{path} line {line}: split '{cell}' in column '{name}'; known: {known}",
                "{path} 第 {line} 行：列 '{name}' 中的划分 '{cell}' 无法识别；可用：{known}",
                path=path,
                line=line,
                cell=row[at],
                name=header[at],
                known=", ".join(SPLIT_NAMES),
            )
    return [SPLIT_NAMES[str(row[at]).lower()] for _, row in rows]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_csv(path: Path, config: Data) -> Dataset:
    """A data set of vectors from a delimited text.

    Raises:
        DataError: no rows, an unknown column, text in a feature column.
    """
    header, rows = read_rows(path)
    if not rows:
        raise DataError("{path} has a header and no rows", "{path} 只有表头，没有数据行", path=path)
    columns = config.columns
    wanted = [columns.target] if isinstance(columns.target, str) else columns.target
    for name in [
        *(wanted or []),
        *(columns.features or []),
        *columns.ignore,
        *([columns.group] if columns.group else []),
        *([columns.split] if columns.split else []),
    ]:
        if name not in header:
            hint, hint_zh = did_you_mean(name, header)
            raise DataError("{path} has no column '{name}'." + hint, "{path} 没有列 '{name}'。" + hint_zh, path=path, name=name)
    notes: list[tuple[str, str]] = []
    if wanted is None:
        lower = {h.lower(): h for h in header}
        wanted = [next((lower[t] for t in TARGETS if t in lower), header[-1])]
        notes.append(
            (
                f"the target is the column '{wanted[0]}' (--set data.columns.target=NAME changes it)",
                f"目标列是 '{wanted[0]}'（可用 --set data.columns.target=列名 修改）",
            )
        )
    splits = split_column(path, header, rows, columns.split)
    split_name = (columns.split or next(h for h in header if h.lower() == "split")) if splits else None
    roles = {*wanted, *columns.ignore, *[c for c in (columns.group, split_name) if c]}
    if both := [f for f in columns.features or [] if f in roles]:
        raise DataError(
            "data.columns: '{name}' is given as a feature and as something else; it can be one only",
            "data.columns：'{name}' 既被指定为特征又有其他用途；只能选一种",
            name=both[0],
        )
    unnamed = [h for h in header if h.lower() in ("", "unnamed: 0") and h not in roles] if columns.features is None else []
    if unnamed:  # the row numbers that pandas writes: in sorted data they give the label away
        roles |= {*unnamed}
        notes.append(("the column without a name is taken for row numbers and left out", "没有名称的列被视为行号，已忽略"))
    if header == [f"c{i}" for i in range(len(header))] and rows[0][0] == 1:
        notes.append(("the table has no header: its columns are called c0, c1, ...", "表格没有表头：各列依次称为 c0、c1……"))
    features = columns.features or [h for h in header if h not in roles]
    if not features:
        raise DataError(
            "{path} has no feature columns besides the target '{target}'",
            "{path} 除目标列 '{target}' 外没有特征列",
            path=path,
            target=wanted[0],
        )
    position = {h: i for i, h in enumerate(header)}
    x = np.empty((len(rows), len(features)))
    missing: dict[int, str] = {}
    for column, name in enumerate(features):
        text: list[tuple[int, str]] = []
        for r, (line, row) in enumerate(rows):
            cell = row[position[name]]
            if cell.lower() in MISSING:
                missing.setdefault(r, name)
                x[r, column] = np.nan
            elif _is_number(cell):
                x[r, column] = float(cell)
                if not np.isfinite(x[r, column]):
                    missing.setdefault(r, name)
            else:
                text.append((line, cell))
        if text:
            line, cell = text[0]
            ways = [typed(f"data.columns.ignore=[{', '.join([*columns.ignore, name])}]")]
            ways += [typed(f"data.columns.target={name}")] if columns.target is None else []
            raise DataError(
                "{path} line {line}: column '{name}' holds the text '{cell}' where numbers are expected ({n} rows are like this)",
                "{path} 第 {line} 行：列 '{name}' 应为数字，却是文本 '{cell}'（共 {n} 行如此）",
                path=path,
                line=line,
                name=name,
                cell=cell,
                n=len(text),
                fix="   or   ".join(f"--set {{way{k}}}" for k in range(len(ways))),
                fix_zh="   或   ".join(f"--set {{way{k}}}" for k in range(len(ways))),
                **{f"way{k}": way for k, way in enumerate(ways)},
            )
    target = np.array([[row[position[t]] for t in wanted] for _, row in rows])
    for r, row in enumerate(target):
        if any(cell.lower() in MISSING for cell in row):
            missing.setdefault(r, wanted[0])
    groups = np.array([row[position[columns.group]] for _, row in rows]) if columns.group else None
    given: dict[str, Any] = {}
    if splits:
        given = {s: np.array([i for i, n in enumerate(splits) if n == s], dtype=np.int64) for s in sorted(set(splits))}
    lines = [line for line, _ in rows]
    dataset = Dataset(
        path.stem,
        "vector",
        x,
        target[:, 0] if len(wanted) == 1 else target,
        digests_of(x),
        lambda i: f"{path.name} line {lines[i]}",
        given,
        groups,
        list(features),
        list(wanted),
        {path.name: files.sha256(path)},
        [
            {"record": f"{path.name} line {lines[r]}", "reason": f"no value in '{c}'", "reason_zh": f"'{c}' 列缺值"}
            for r, c in sorted(missing.items())
        ],
        notes,
    )
    keep = np.array([r for r in range(len(rows)) if r not in missing], dtype=np.int64)
    if not len(keep):
        raise DataError(
            "{path}: every row has a missing value; the first is in column '{name}'",
            "{path}：每一行都有缺失值；第一处在列 '{name}'",
            path=path,
            name=missing[0],
            fix="--set data.columns.ignore=[{name}]",
        )
    return dataset.select(keep) if missing else dataset


def read_npz(path: Path, config: Data) -> Dataset:
    """A data set from an npz archive: inputs as x, X, features, images or data; targets as y, target, labels or label; and, where they are
    there, x_train/y_train, x_test/y_test.

    Raises:
        DataError: damaged, pickled, or without such arrays.
    """
    data = read_bytes(path)
    try:
        if data[:2] != b"PK":
            raise zipfile.BadZipFile("it does not begin as one")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise DataError(
            "{path} holds pickled objects or other arrays that are never loaded ({error})",
            "{path} 含有 pickle 对象等不会加载的数组（{error}）",
            path=path,
            error=error,
            fix="save plain arrays: numpy.savez(FILE, x=..., y=...)",
            fix_zh="请保存普通数组：numpy.savez(文件, x=..., y=...)",
        ) from error
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(
            "{path} is not a whole npz archive: {error}", "{path} 不是完整的 npz 文件：{error}", path=path, error=error
        ) from error

    def pick(names: tuple[str, ...], suffix: str = "") -> Any:
        return next((arrays[n + suffix] for n in names if n + suffix in arrays), None)

    inputs, targets = ("x", "X", "features", "images", "data"), ("y", "Y", "target", "targets", "labels", "label")
    parts = {s: (pick(inputs, f"_{n}"), pick(targets, f"_{n}")) for n, s in (("train", "train"), ("val", "validation"), ("test", "test"))}
    parts = {s: p for s, p in parts.items() if p[0] is not None and p[1] is not None}
    if not parts:
        parts = {"": (pick(inputs), pick(targets))}
    if any(p is None for pair in parts.values() for p in pair):
        raise DataError(
            "{path} holds the arrays {names}; 'x' and 'y' are expected",
            "{path} 里的数组是 {names}；应有 'x' 和 'y'",
            path=path,
            names=", ".join(arrays) or "(none)",
            fix="numpy.savez(FILE, x=..., y=...)",
        )
    start, given = 0, {}
    for split, (x, y) in parts.items():
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise DataError(
                "{path}: {n} inputs and {m} targets; each record needs one of both",
                "{path}：输入有 {n} 条，目标有 {m} 条，应一一对应",
                path=path,
                n=len(x) if x.ndim else 0,
                m=len(y) if y.ndim else 0,
            )
        first = next(iter(parts.values()))
        if x.shape[1:] != first[0].shape[1:] or y.shape[1:] != first[1].shape[1:]:
            raise DataError(
                "{path}: the records of its splits have different shapes ({a} and {b})",
                "{path}：各划分中记录的形状不同（{a} 与 {b}）",
                path=path,
                a=first[0].shape[1:],
                b=x.shape[1:],
            )
        given[split] = np.arange(start, start + len(x))
        start += len(x)
    x, y = (np.concatenate([p[i] for p in parts.values()]) for i in (0, 1))
    dataset = from_arrays(
        path.stem,
        x,
        y,
        given={s: g for s, g in given.items() if s} if len(given) > 1 else None,
        describe=lambda i: f"{path.name}[{i}]",
        files={path.name: files.sha256(path)},
    )
    if dataset.kind == "vector":
        finite = np.isfinite(dataset.inputs).all(axis=1)
        if np.issubdtype(y.dtype, np.floating):
            finite &= np.isfinite(y[:, None] if y.ndim == 1 else y).all(axis=1)
        if not finite.all():
            wrong = np.flatnonzero(~finite)
            dataset.rejected += [
                {"record": f"{path.name}[{i}]", "reason": "NaN or infinite", "reason_zh": "含 NaN 或无穷大"} for i in wrong
            ]
            if len(wrong) == len(dataset):
                raise DataError("{path}: every record holds NaN or infinite values", "{path}：每条记录都含 NaN 或无穷大", path=path)
            dataset = dataset.select(np.flatnonzero(finite))
    return dataset
