"""From a data SPEC to a data set: built-in name, file, folder, glob, `hub:`, user code, `#500`, and mixtures."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.core import files
from groundup.core.errors import DataError, GroundupError, did_you_mean_path
from groundup.core.recipe import Data
from groundup.core.registry import DATASETS
from groundup.data.dataset import Dataset, digests_of, from_arrays
from groundup.data.idx import find_idx, read_folder
from groundup.data.image_folder import FILE_COLUMNS, is_picture, read_image_folder
from groundup.data.order import hashed_order
from groundup.data.pictures import ArrayImages, Resize, picture_array, pil_picture
from groundup.data.table import read_csv, read_npz, read_rows
from groundup.data.tree import is_archive


def open_source(config: Data) -> Dataset:
    """The data set that `data.source` names.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if isinstance(config.source, str):
        return _sampled(config.source, config)
    parts = [(_sampled(part.source, config, part.classes), part.weight) for part in config.source]
    if not parts:
        raise DataError("data.source is an empty list", "data.source 是空列表", fix="--set data.source=digits")
    return _mixture(parts)


def _sampled(spec: str, config: Data, classes: list[str] | None = None) -> Dataset:
    match = re.fullmatch(r"(.+)#([0-9]+)", spec)
    if match and files.exists(Path(spec).expanduser()):  # a folder may be called 'photos#2'
        match = None
    dataset = _open_one(match[1] if match else spec, config)
    if classes is not None:
        from groundup.data.prepare import keep_classes

        dataset = keep_classes(dataset, classes)
    if match and (count := int(match[2])) < len(dataset):
        if count == 0:
            raise DataError("{spec} asks for no records", "{spec} 要求 0 条记录", spec=spec)
        dataset = dataset.select(np.sort(hashed_order(dataset.digests, config.split.seed)[:count]))
    return _resized(dataset, config) if dataset.kind == "image" else dataset


def _resized(dataset: Dataset, config: Data) -> Dataset:
    """Pictures in memory brought to `data.image` (folders are decoded to it already)."""
    wanted, channels = config.image.size, config.image.channels
    sides = dataset.input_shape[1:] if wanted == "auto" else (wanted, wanted) if isinstance(wanted, int) else (wanted[0], wanted[-1])
    shape, how = (dataset.input_shape[0] if channels == "auto" else channels, *sides), Resize.of(config.image)
    if shape == dataset.input_shape or not isinstance(dataset.inputs, ArrayImages):
        return dataset
    made = np.empty((len(dataset), *shape), dtype=np.uint8)
    for i, pixels in enumerate(dataset.inputs.array):
        made[i] = picture_array(pil_picture(pixels), shape[0], (shape[1], shape[2]), how)
    return replace(dataset, inputs=ArrayImages(made))


def _open_one(spec: str, config: Data) -> Dataset:
    if not spec.strip():
        raise DataError("the data source is empty", "数据源为空", fix="groundup data show digits")
    if spec.startswith("hub:"):
        from groundup.data.hub import read_hub

        return read_hub(spec.removeprefix("hub:"), config)
    if ".py:" in spec:
        return _from_user(spec)
    path = Path(spec).expanduser()
    if spec in DATASETS.names():  # a name wins over a folder of the same name: ./digits is still reached as ./digits
        return DATASETS.get(spec).target()  # type: ignore[no-any-return]
    if files.exists(path):
        return _from_path(path, config)
    matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))] if any(c in spec for c in "*?[") else []
    if matched:
        tables = [p for p in matched if p.suffix.lower() in (".csv", ".tsv", ".txt", ".npz")]
        if len(tables) != len(matched):
            raise DataError(
                "{spec} matches {found}; a glob of CSV or npz files is expected",
                "{spec} 匹配到 {found}；通配符应匹配 CSV 或 npz 文件",
                spec=spec,
                found=matched[0].name,
                fix="name the folder of pictures itself",
                fix_zh="图片请直接给出文件夹",
            )
        return _mixture([(_from_path(p, config), None) for p in tables])
    hint, hint_zh = did_you_mean_path(spec, DATASETS.names())
    raise DataError(
        "no data '{spec}': not a built-in name, and no such file or folder." + hint,
        "没有数据 '{spec}'：既不是内置名称，也不是文件或文件夹。" + hint_zh,
        spec=spec,
        fix="a file or folder (--set data.source=PATH), or one that is built in: groundup data show digits",
        fix_zh="给出文件或文件夹（--set data.source=路径），或用内置的：groundup data show digits",
    )


def _from_path(path: Path, config: Data) -> Dataset:
    if path.is_dir():
        if find_idx(path):
            return read_folder(path, path.name)
        return read_image_folder(path, config)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_npz(path, config)
    if is_archive(path) or suffix in (".jsonl", ".ndjson", ".json"):
        return read_image_folder(path, config)
    if suffix in (".csv", ".tsv", ".txt", ".data"):
        header, rows = read_rows(path)
        by_name = {h.lower(): i for i, h in enumerate(header)}
        at = next((by_name[c] for c in FILE_COLUMNS if c in by_name), None)
        if config.columns.image or (at is not None and any(is_picture(row[at]) for _, row in rows)):
            return read_image_folder(path, config)
        return read_csv(path, config)
    raise DataError(
        "{path}: files that end in '{suffix}' cannot be read; known: .csv, .tsv, .jsonl, .npz, .zip and .tar of pictures, folders of pictures, IDX folders; "
        "and with text in them .txt, .md, source code, .jsonl, .json, .csv, .parquet, also as .gz or .zst",
        "{path}：无法读取 '{suffix}' 文件；可读：.csv、.tsv、.jsonl、.npz、装图片的 .zip 与 .tar、图片文件夹、IDX 文件夹；"
        "以及含有文本的 .txt、.md、源代码、.jsonl、.json、.csv、.parquet，可为 .gz 或 .zst",
        path=path,
        suffix=suffix or path.name,
        fix="write {path}:NAME for a function or class in it" if suffix == ".py" else None,
        fix_zh="其中的函数或类写作 {path}:名字" if suffix == ".py" else None,
    )


def _from_user(spec: str) -> Dataset:
    """`path/to/file.py:Name`: a function or class that gives a Dataset, a pair (inputs, targets), or a torch map-style data set of such pairs."""
    entry = DATASETS.get(spec)
    assert entry.file is not None
    try:
        made: Any = entry.target()
        if not isinstance(made, Dataset | tuple | dict) and hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            pairs = [made[i] for i in range(len(made))]
            if pairs and all(isinstance(p, tuple | list) and len(p) >= 2 for p in pairs):
                made = np.stack([np.asarray(p[0]) for p in pairs]), np.asarray([np.asarray(p[1]) for p in pairs])
    except GroundupError:
        raise
    except Exception as error:
        raise DataError(
            "{spec} failed: {cause}",
            "{spec} 运行出错：{cause}",
            spec=spec,
            cause=f"{type(error).__name__}: {error}",
            fix="--traceback shows where; it is called without arguments and gives (inputs, targets)",
            fix_zh="加 --traceback 可看到位置；调用时不带参数，应返回 (输入, 目标)",
        ) from error
    if not isinstance(made, Dataset):
        if not (isinstance(made, tuple) and len(made) == 2):
            raise DataError(
                "{spec} gave {kind}; a groundup Dataset, a pair (inputs, targets) or a torch Dataset is expected",
                "{spec} 返回了 {kind}；应为 groundup 的 Dataset、(输入, 目标) 二元组或 torch 的 Dataset",
                spec=spec,
                kind=type(made).__name__,
            )
        made = from_arrays(entry.file.stem, np.asarray(made[0]), np.asarray(made[1]))
    made.files[entry.file.name] = files.sha256(entry.file)
    return made


def _mixture(parts: Sequence[tuple[Dataset, float | None]]) -> Dataset:
    """Several sources as one. With weights, as many records as keep the proportions while no record is used twice; None takes all."""
    sets = [p for p, _ in parts]
    if len(sets) == 1:
        return sets[0]
    shapes = {(s.kind, s.input_shape, s.target.ndim) for s in sets}
    if len(shapes) > 1:
        listed = "; ".join(f"{s.name}: {s.kind} {s.input_shape}" for s in sets)
        raise DataError(
            "sources of different shape cannot be mixed ({listed})",
            "形状不同的数据源不能混合（{listed}）",
            listed=listed,
            fix="--set data.image.size=N --set data.image.channels=1",
        )
    sets = [_columns_like(sets[0], s) for s in sets]
    notes: list[tuple[str, str]] = []
    weights = [w for _, w in parts]
    if any(w is not None for w in weights):
        total = min(len(s) / w for s, w in zip(sets, weights) if w is not None)
        whole = sets
        sets = [
            s if w is None else s.select(np.sort(hashed_order(s.digests, 0)[: max(1, round(total * w))])) for s, w in zip(sets, weights)
        ]
        shares = ", ".join(f"{s.name} {len(s)}/{len(w)}" for s, w in zip(sets, whole))
        notes.append((f"records taken for the weights of the mixture: {shares}", f"按混合权重取用的记录：{shares}"))
    starts = np.cumsum([0, *(len(s) for s in sets)])

    def describe(i: int) -> str:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return sets[part].describe(i - int(starts[part]))

    given = {
        split: np.concatenate([s.given.get(split, np.zeros(0, np.int64)) + starts[i] for i, s in enumerate(sets)])
        for split in {k for s in sets for k in s.given}
    }
    images = sets[0].kind == "image"
    if images:  # mixtures of streamed folders are read into memory: they are small compared to one streamed set
        arrays = [s.inputs.load().array if s.inputs.streamed else s.inputs.array for s in sets]
        inputs: Any = ArrayImages(np.concatenate(arrays))
    else:
        inputs = np.concatenate([s.inputs for s in sets])
    return Dataset(
        "+".join(s.name for s in sets),
        sets[0].kind,
        inputs,
        np.concatenate([s.target for s in sets]),
        [d for s in sets for d in s.digests],
        describe,
        given,
        None if any(s.groups is None for s in sets) else np.concatenate([s.groups for s in sets]),
        sets[0].feature_names,
        sets[0].target_names,
        {k: v for s in sets for k, v in s.files.items()},
        [r for s in sets for r in s.rejected],
        list(dict.fromkeys(n for s in sets for n in s.notes)) + notes,
        {c: np.concatenate([s.meta[c] for s in sets]) for c in sets[0].meta if all(c in s.meta for s in sets)},
    )


def _columns_like(first: Dataset, other: Dataset) -> Dataset:
    """The same columns in the first one's order. Raises DataError where they are not the same."""
    if other.kind != "vector" or (other.feature_names == first.feature_names and other.target_names == first.target_names):
        return other
    if sorted(other.feature_names) != sorted(first.feature_names) or other.target_names != first.target_names:
        a, b = (", ".join(s.feature_names) + " -> " + ", ".join(s.target_names) for s in (first, other))
        raise DataError(
            "sources with different columns cannot be mixed ({first}: {a}; {other}: {b})",
            "列不同的数据源不能混合（{first}：{a}；{other}：{b}）",
            first=first.name,
            other=other.name,
            a=a,
            b=b,
        )
    inputs = other.inputs[:, [other.feature_names.index(n) for n in first.feature_names]]
    return replace(other, inputs=inputs, feature_names=first.feature_names, digests=digests_of(inputs))
