"""Folders of pictures: `folder/<label>/*.png|jpg`, `folder/<split>/<label>/*`, or a folder with a CSV of file names and labels."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.device import available_memory
from groundup.core.errors import DataError, did_you_mean
from groundup.core.recipe import Data
from groundup.data import cache
from groundup.data.dataset import IMAGE_SUFFIXES, REASONS_ZH, ArrayImages, Dataset, FileImages, decode, quiet_pillow
from groundup.data.table import SPLIT_NAMES, read_rows, split_column

FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; hidden files and folders (.ipynb_checkpoints holds copies) are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(parent) / n for n in sorted(names) if not n.startswith(".")]
    return sorted(found)


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures_in(folder: Path) -> int:
    return sum(_is_picture(p) and p.is_file() for p in folder.iterdir())


def list_labelled(folder: Path) -> tuple[list[Path], list[str], list[str], int]:
    """Files, labels and splits ('' where the folder has none) below a folder, sorted by path; and how many other files were passed over.

    Raises:
        DataError: folders of splits stand beside folders that are none.
    """
    below = {p: _files_below(p) for p in _folders_in(folder)}
    top = [p for p in below if any(_is_picture(f) for f in below[p])]
    if len(top) == 1 and not _pictures_in(folder) and not _pictures_in(top[0]) and top[0].name.lower() not in SPLIT_NAMES:
        return list_labelled(top[0])  # archives often unpack to a folder in a folder
    splits = {p: SPLIT_NAMES[p.name.lower()] for p in top if p.name.lower() in SPLIT_NAMES and _folders_in(p)}
    if splits:  # beside train/<label>/ a test/ without labels is common: its pictures cannot be used
        top = [p for p in top if p in splits or p.name.lower() not in SPLIT_NAMES]
    if len(splits) > 1 and len(splits) < len(top):
        raise DataError(
            "{folder} holds the splits {splits} and beside them {others}; is that a split or a label?",
            "{folder} 里有划分 {splits}，旁边还有 {others}；它是划分还是标签？",
            folder=folder,
            splits=", ".join(p.name for p in splits),
            others=", ".join(p.name for p in top if p not in splits),
            fix="move it out of the folder, or name it validation or test",
            fix_zh="把它移出该文件夹，或改名为 validation 或 test",
        )
    labelled = [(q, splits[p]) for p in top for q in _folders_in(p)] if splits and len(splits) == len(top) else [(p, "") for p in top]
    paths, labels, given, other = [], [], [], 0
    for label_folder, split in labelled:
        for file in _files_below(label_folder):
            if _is_picture(file):
                paths.append(file)
                labels.append(label_folder.name)
                given.append(split)
            else:
                other += 1
    return paths, labels, given, other


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a cell that cannot be a file name
        return False


def list_from_csv(csv: Path, columns: Any) -> tuple[list[Path], list[str], list[str], list[dict[str, Any]]]:
    """Files, labels and splits named by a table; names are relative to the table's folder (or to one inside it). Missing files are rejected."""
    header, rows = read_rows(csv)
    lower = {h.lower(): i for i, h in enumerate(header)}

    def column(wanted: str | None, usual: tuple[str, ...], role: str) -> int:
        if wanted is not None and wanted.lower() not in lower:
            hint, hint_zh = did_you_mean(wanted, header)
            raise DataError("{csv} has no column '{wanted}'." + hint, "{csv} 没有列 '{wanted}'。" + hint_zh, csv=csv, wanted=wanted)
        name = wanted.lower() if wanted else next((u for u in usual if u in lower), None)
        if name is None:
            raise DataError(
                "{csv}: none of its columns ({header}) is known as the {role}",
                "{csv}：在列（{header}）中认不出哪一列是 {role}",
                csv=csv,
                header=", ".join(header),
                role=role,
                fix="--set data.columns.{role}=NAME",
            )
        return lower[name]

    if isinstance(columns.target, list):
        raise DataError(
            "data.columns.target = {target}: a picture has one label column",
            "data.columns.target = {target}：图片只能有一列标签",
            target=columns.target,
        )
    file_at, label_at = column(columns.image, FILE_COLUMNS, "image"), column(columns.target, LABEL_COLUMNS, "target")
    splits = split_column(csv, header, rows, columns.split)
    places = [csv.parent, *_folders_in(csv.parent)]
    paths, labels, given, rejected = [], [], [], []
    for n, (line, row) in enumerate(rows):
        name, label = row[file_at], row[label_at]
        if not label:
            rejected.append({"record": f"{csv.name} line {line}", "reason": "no label", "reason_zh": "没有标签"})
            continue
        spellings = [name, name.replace("\\", "/")] if name else []
        found = next((p / spelling for p in places for spelling in spellings if _is_file(p / spelling)), None)
        if found is None:
            rejected.append({"record": f"{csv.name} line {line}", "reason": f"no file '{name}'", "reason_zh": f"没有文件 '{name}'"})
            continue
        paths.append(found)
        labels.append(label)
        given.append(splits[n] if splits else "")
    return paths, labels, given, rejected


def _label_table(folder: Path, columns: Any, needed: bool) -> Path | None:
    """The table of a folder that names pictures and labels; any table where one is needed and none is recognised."""
    tables = sorted((p for p in folder.iterdir() if p.suffix.lower() in (".csv", ".tsv") and p.is_file()), key=_table_rank)
    for table in tables:
        try:
            header = {h.lower() for h in read_rows(table)[0]}
        except DataError:
            continue
        image, target = columns.image, columns.target if isinstance(columns.target, str) else None
        if ({image.lower()} if image else {*FILE_COLUMNS}) & header and ({target.lower()} if target else {*LABEL_COLUMNS}) & header:
            return table
    return tables[0] if tables and needed else None


def _table_rank(path: Path) -> tuple[bool, str]:
    return path.stem.lower() not in ("labels", "metadata", "train", "index"), path.name


def read_image_folder(source: Path, config: Data) -> Dataset:
    """A folder of pictures, or a CSV that names them. Undecodable pictures are rejected by name and counted.

    Pictures of several sizes are brought to `data.image.size` (`auto`: the only size there is, else the median); they are decoded into
    memory where that takes at most a quarter of what is free (or as `data.in_memory` says), else read from their files each time.

    Raises:
        DataError: no picture at all, or every one of them is damaged.
    """
    root = source if source.is_dir() else source.parent
    rejected: list[dict[str, Any]] = []
    notes: list[tuple[str, str]] = []
    loose = _pictures_in(root) if source.is_dir() else 0
    paths, labels, given, other = list_labelled(source) if source.is_dir() else ([], [], [], 0)
    table = _label_table(source, config.columns, needed=not paths) if source.is_dir() else source
    if table is not None:
        if paths:
            notes.append((f"labels are taken from {table.name}, not from the folders' names", f"标签取自 {table.name}，而不是文件夹名"))
        (paths, labels, given, rejected), other = list_from_csv(table, config.columns), 0
    elif paths and (unlabelled := len({f for f in _files_below(source) if _is_picture(f)} - {*paths})):
        notes.append(
            (f"{unlabelled} pictures lie in no label's folder and were passed over", f"有 {unlabelled} 张图片不在任何标签文件夹里，已跳过")
        )
    if not paths:
        if loose and not rejected:
            raise DataError(
                "{source} holds {n} pictures and no labels",
                "{source} 里有 {n} 张图片，但没有标签",
                source=source,
                n=loose,
                fix="put them into one folder per label (FOLDER/<label>/*.png), or add labels.csv with the columns file,label",
                fix_zh="按标签分文件夹存放（目录/<标签>/*.png），或加一个含 file,label 两列的 labels.csv",
            )
        raise DataError(
            "{source}: no pictures found ({rejected} named ones are missing)" if rejected else "{source}: no pictures found",
            "{source}：没有找到图片（表中列出的 {rejected} 张不存在）" if rejected else "{source}：没有找到图片",
            source=source,
            rejected=len(rejected),
            fix="expected FOLDER/<label>/*.png|jpg, or FOLDER/labels.csv with the columns file,label",
            fix_zh="应为 目录/<标签>/*.png|jpg，或含 file,label 两列的 目录/labels.csv",
        )
    if other:
        notes.append((f"{other} files are not pictures and were passed over", f"有 {other} 个文件不是图片，已跳过"))

    # First pass: headers and bytes' digests. What cannot be opened is rejected here already.
    with quiet_pillow(), ThreadPoolExecutor() as pool:
        heads = list(pool.map(_head, paths))
    sizes = Counter(h["size"] for h in heads if "size" in h)
    if not sizes:
        raise DataError(
            "{source}: none of its {n} pictures can be read; the first one: {reason}",
            "{source}：{n} 张图片全部无法读取；第一张的原因：{reason_zh}",
            source=source,
            n=len(paths),
            reason=heads[0]["error"],
            reason_zh=REASONS_ZH.get(heads[0]["error"], heads[0]["error"]),
        )
    channels = config.image.channels if config.image.channels != "auto" else (3 if any(h.get("colour") for h in heads) else 1)
    if config.image.size == "auto":
        if len(sizes) == 1:
            size = next(iter(sizes))
        else:
            flat = np.array([s for s, n in sizes.items() for _ in range(n)])
            size = (int(np.median(flat[:, 0])), int(np.median(flat[:, 1])))
            notes.append(
                (
                    f"pictures have {len(sizes)} sizes; all are resized to the median, {size[1]}x{size[0]} (--set data.image.size=N changes it)",
                    f"图片有 {len(sizes)} 种尺寸；全部缩放到中位数 {size[1]}x{size[0]}（可用 --set data.image.size=N 修改）",
                )
            )
    else:
        given_size = config.image.size if isinstance(config.image.size, list) else [config.image.size]
        size = (given_size[0], given_size[-1])
    if len({bool(h.get("colour")) for h in heads if "size" in h}) == 2:
        notes.append(
            (
                f"grey and colour pictures are mixed; all are read with {channels} channel(s)",
                f"灰度图与彩色图混在一起；统一按 {channels} 个通道读取",
            )
        )

    images, bad = _decode_all(source.name, paths, heads, channels, size, config.in_memory)
    keep = np.array([i for i in range(len(paths)) if i not in bad], dtype=np.int64)
    names = [str(p.relative_to(root)) if p.is_relative_to(root) else p.name for p in paths]
    rejected += [
        {"record": names[i], "reason": reason, "reason_zh": f"图片损坏：{REASONS_ZH.get(reason, reason)}"}
        for i, reason in sorted(bad.items())
    ]
    if not len(keep):
        raise DataError(
            "{source}: none of its {n} pictures can be decoded; the first one: {reason}",
            "{source}：{n} 张图片全部无法解码；第一张的原因：{reason}",
            source=source,
            n=len(paths),
            reason=rejected[0]["reason"],
        )
    split_at = {s: np.array([i for i in range(len(paths)) if given[i] == s], dtype=np.int64) for s in sorted(set(given)) if s}
    dataset = Dataset(
        source.name,
        "image",
        images,
        np.array(labels),
        [h["digest"] for h in heads],
        lambda i: names[i],
        split_at if len(split_at) > 1 else {},
        files={names[i]: h["digest"].hex() for i, h in enumerate(heads)},
        rejected=rejected,
        notes=notes,
    )
    return dataset.select(keep) if bad else dataset


def _head(path: Path) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.read_bytes()
    except OSError as error:
        return {"error": error.strerror or str(error), "digest": bytes(32)}
    digest = hashlib.sha256(data).digest()
    if not data:
        return {"error": "the file is empty", "digest": digest}
    import io

    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # the camera was held upright: shown turned by 90 degrees
                width, height = height, width
            return {"size": (height, width), "colour": picture.mode not in ("1", "L", "I", "I;16", "F", "LA"), "digest": digest}
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        return {"error": reason, "digest": digest}


def _decode_all(
    name: str, paths: list[Path], heads: list[dict[str, Any]], channels: int, size: tuple[int, int], in_memory: bool | str
) -> tuple[ArrayImages | FileImages, dict[int, str]]:
    """Decodes every picture once: into memory, or only for its channel sums. Returns the pictures and position -> reason of damaged ones."""
    fits = channels * size[0] * size[1] * len(paths) <= available_memory() // 4
    keep = fits if in_memory == "auto" else bool(in_memory)
    key = hashlib.sha256(repr((name, channels, size, keep)).encode() + b"".join(h["digest"] for h in heads)).hexdigest()
    bad = {i: h["error"] for i, h in enumerate(heads) if "error" in h}
    if (stored := cache.load(key)) is not None:
        bad |= dict(zip((int(i) for i in stored["bad"]), (str(r) for r in stored["reasons"])))
        return (ArrayImages(stored["pixels"]) if keep else FileImages(paths, channels, size, stored["sums"])), bad
    pixels = np.zeros((len(paths), channels, *size), dtype=np.uint8) if keep else np.zeros((0,), dtype=np.uint8)
    sums = np.zeros((len(paths), 2, channels))

    def one(i: int) -> str | None:
        if i in bad:
            return bad[i]
        try:
            picture = decode(paths[i].read_bytes(), channels, size)
        except (ValueError, OSError) as error:
            return str(error)
        if keep:
            pixels[i] = picture
        real: NDArray[np.float64] = picture.reshape(channels, -1).astype(np.float64)
        sums[i] = real.sum(axis=1), np.square(real).sum(axis=1)
        return None

    with quiet_pillow(), ThreadPoolExecutor() as pool:
        bad = {i: reason for i, reason in enumerate(pool.map(one, range(len(paths)))) if reason is not None}
    arrays = {"bad": np.array(sorted(bad), dtype=np.int64), "reasons": np.array([bad[i] for i in sorted(bad)], dtype=np.str_), "sums": sums}
    cache.store(key, arrays | ({"pixels": pixels} if keep else {}))
    return (ArrayImages(pixels) if keep else FileImages(paths, channels, size, sums)), bad
