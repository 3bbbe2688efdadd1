"""Pictures with labels: `folder/<label>/*.jpg`, `folder/<split>/<label>/*`, or a CSV or JSON lines of file names and labels; the same in a zip
or tar archive."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import console
from groundup.core.device import available_memory
from groundup.core.errors import DataError, did_you_mean
from groundup.core.messages import say
from groundup.core.recipe import Data
from groundup.data import cache
from groundup.data.dataset import Dataset
from groundup.data.pictures import IMAGE_SUFFIXES, ArrayImages, FileImages, Resize, decode, quiet_pillow, reason_zh
from groundup.data.table import SPLIT_NAMES, json_rows, rows_of, split_column, text_of
from groundup.data.tree import Archive, Folder, Tree, is_archive

FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "img", "image_path", "filepath")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


@dataclass
class Listing:
    """What is to be read: file names in a tree, and of each its label (a list where a picture has several), split ('' for none), group and
    further columns."""

    names: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    meta: dict[str, list[Any]] = field(default_factory=dict)
    target_names: list[str] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def is_picture(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


def read_image_folder(source: Path, config: Data) -> Dataset:
    """A folder or archive of pictures, or a table that names them. Undecodable pictures are rejected by name and counted.

    Raises:
        DataError: no picture at all, or every one of them is damaged.
    """
    table: str | None = None
    if source.is_dir():
        tree: Tree = Folder(source)
    elif is_archive(source):
        tree = Archive(source)
    else:
        tree, table = Folder(source.parent), source.name
    listing = _listing(source, tree, table, config)
    return read_pictures(source.name, tree, listing, config, source)


def _listing(source: Path, tree: Tree, table: str | None, config: Data) -> Listing:
    if table is not None:
        return list_from_table(tree, table, config)
    listing, other = list_labelled(tree)
    if (table := _label_table(tree, config.columns, needed=not listing.names)) is not None:
        by_folders = bool(listing.names)
        listing = list_from_table(tree, table, config)
        if by_folders:
            listing.notes.append((f"labels are taken from {table}, not from the folders' names", f"标签取自 {table}，而不是文件夹名"))
        return listing
    pictures = [n for n in tree.names if is_picture(n)]
    loose = sum("/" not in n for n in pictures)
    if not listing.names and loose:
        raise DataError(
            "{source} holds {n} pictures and no labels",
            "{source} 里有 {n} 张图片，但没有标签",
            source=source,
            n=loose,
            fix="put them into one folder per label (FOLDER/<label>/*.png), or add labels.csv with the columns file,label",
            fix_zh="按标签分文件夹存放（目录/<标签>/*.png），或加一个含 file,label 两列的 labels.csv",
        )
    if unlabelled := len(pictures) - len(listing.names):
        listing.notes.append(
            (f"{unlabelled} pictures lie in no label's folder and were passed over", f"有 {unlabelled} 张图片不在任何标签文件夹里，已跳过")
        )
    if source.is_dir() and (empty := _without_pictures(source, listing.names)):
        listing.notes.append(
            (f"folders without a picture, which make no class: {', '.join(empty)}", f"没有图片的文件夹，不构成类别：{'、'.join(empty)}")
        )
    if other:
        listing.notes.append((f"{other} files are not pictures and were passed over", f"有 {other} 个文件不是图片，已跳过"))
    return listing


def _without_pictures(source: Path, names: Sequence[str]) -> list[str]:
    """Folders beside those of labels that hold no picture."""
    used = {(source / n).parent for n in names}
    beside = {folder for place in {u.parent for u in used if u != source} for folder in place.iterdir() if folder.is_dir()}
    return sorted(f.name for f in beside if not f.name.startswith((".", "_")) and not any(u == f or f in u.parents for u in used))


def list_labelled(tree: Tree) -> tuple[Listing, int]:
    """Pictures labelled by their folders; and how many other files lie in those folders.

    Raises:
        DataError: folders of splits stand beside folders that are none.
    """
    parts, prefix = [n.split("/") for n in tree.names], ""
    while True:  # archives often unpack to a folder in a folder
        top = sorted({p[0] for p in parts if len(p) > 1 and is_picture(p[-1])})
        loose = any(len(p) == 1 and is_picture(p[0]) for p in parts)
        inside = [p[1:] for p in parts if len(p) > 1 and p[0] == top[0]] if len(top) == 1 else []
        if len(top) != 1 or loose or top[0].lower() in SPLIT_NAMES or any(len(p) == 1 and is_picture(p[0]) for p in inside):
            break
        parts, prefix = inside, f"{prefix}{top[0]}/"
    folders = {p: {q[1] for q in parts if len(q) > 2 and q[0] == p} for p in top}
    splits = {p: SPLIT_NAMES[p.lower()] for p in top if p.lower() in SPLIT_NAMES and folders[p]}
    if splits:  # beside train/<label>/ a test/ without labels is common: its pictures cannot be used
        top = [p for p in top if p in splits or p.lower() not in SPLIT_NAMES]
    if len(splits) > 1 and len(splits) < len(top):
        raise DataError(
            "{folder} holds the splits {splits} and beside them {others}; is that a split or a label?",
            "{folder} 里有划分 {splits}，旁边还有 {others}；它是划分还是标签？",
            folder=tree.name,
            splits=", ".join(splits),
            others=", ".join(p for p in top if p not in splits),
            fix="move it out of the folder, or name it validation or test",
            fix_zh="把它移出该文件夹，或改名为 validation 或 test",
        )
    by_split = bool(splits) and len(splits) == len(top)
    listing, other, wanted = Listing(), 0, set(top)
    for p in parts:
        if len(p) < (3 if by_split else 2) or p[0] not in wanted:
            continue
        if not is_picture(p[-1]):
            other += 1
            continue
        listing.names.append(prefix + "/".join(p))
        listing.labels.append(p[1] if by_split else p[0])
        listing.splits.append(splits[p[0]] if by_split else "")
    return listing, other


def list_from_table(tree: Tree, table: str, config: Data) -> Listing:
    """Pictures named by a CSV or JSON lines; names are relative to the table's folder (or to one inside it). Missing files are rejected.

    Several labels of a picture are a list in JSON, several 0/1 columns (`data.columns.target`), or one text that
    `data.columns.separator` divides.
    """
    columns, where = config.columns, tree.where(table)
    text = text_of(tree.read(table), where)
    header, rows = (json_rows if Path(table).suffix.lower() in (".jsonl", ".ndjson", ".json") else rows_of)(text, where)
    lower = {h.lower(): i for i, h in enumerate(header)}

    def column(wanted: str | None, usual: tuple[str, ...], role: str) -> int:
        if wanted is not None and wanted.lower() not in lower:
            hint, hint_zh = did_you_mean(wanted, header)
            raise DataError("{csv} has no column '{wanted}'." + hint, "{csv} 没有列 '{wanted}'。" + hint_zh, csv=where, wanted=wanted)
        name = wanted.lower() if wanted else next((u for u in usual if u in lower), None)
        if name is None:
            raise DataError(
                "{csv}: none of its columns ({header}) is known as the {role}",
                "{csv}：在列（{header}）中认不出哪一列是 {role}",
                csv=where,
                header=", ".join(header),
                role=role,
                fix="--set data.columns.{role}=NAME",
            )
        return lower[name]

    file_at = column(columns.image, FILE_COLUMNS, "image")
    several = columns.target if isinstance(columns.target, list) else None
    single = columns.target if isinstance(columns.target, str) else None
    label_at = [column(t, (), "target") for t in several] if several else [column(single, LABEL_COLUMNS, "target")]
    splits = split_column(where, header, rows, columns.split)
    group_at = column(columns.group, (), "group") if columns.group else None
    used = {file_at, *label_at, group_at, lower.get((columns.split or "split").lower()) if splits else None}
    used |= {lower[c.lower()] for c in columns.ignore if c.lower() in lower}
    others = [(h, i) for i, h in enumerate(header) if i not in used and h]
    base = table.rpartition("/")[0]
    places = [base, *sorted({"/".join(filter(None, [base, n[len(base) :].lstrip("/").split("/")[0]])) for n in _below(tree, base)})]
    found = Listing(target_names=list(several or []), meta={h: [] for h, _ in others})

    def reject(line: int, reason: str, reason_zh: str) -> None:
        found.rejected.append({"record": f"{Path(table).name} line {line}", "reason": reason, "reason_zh": reason_zh})

    for n, (line, row) in enumerate(rows):
        name = str(row[file_at])
        label: Any = [row[i] for i in label_at] if several else row[label_at[0]]
        if columns.separator and isinstance(label, str):
            label = [part.strip() for part in label.split(columns.separator) if part.strip()]
        elif label is None or label == "" or (several and any(v is None or v == "" for v in label)):
            reject(line, "no label", "没有标签")
            continue
        spellings = [name, name.replace("\\", "/")] if name else []
        at = next((f"{p}/{s}" if p and not s.startswith("/") else s for p in places for s in spellings if _has(tree, p, s)), None)
        if at is None:
            reject(line, f"no file '{name}'", f"没有文件 '{name}'")
            continue
        found.names.append(at)
        found.labels.append(label)
        found.splits.append(splits[n] if splits else "")
        if group_at is not None:
            found.groups.append(str(row[group_at]))
        for h, i in others:
            found.meta[h].append(row[i])
    return found


def _has(tree: Tree, place: str, name: str) -> bool:
    return tree.has(f"{place}/{name}" if place and not name.startswith("/") else name)


def _below(tree: Tree, base: str) -> list[str]:
    """Names with a folder below `base`; of a folder on disk only its own folders are looked at (a table may lie among a million files)."""
    if isinstance(tree, Folder):
        here = tree.root / base if base else tree.root
        inside = sorted(p.name for p in here.iterdir() if p.is_dir() and not p.name.startswith("."))
        return ["/".join(filter(None, [base, name, "x"])) for name in inside]
    return [n for n in tree.names if n.startswith(f"{base}/" if base else "") and n.count("/") > (base.count("/") + 1 if base else 0)]


def _label_table(tree: Tree, columns: Any, needed: bool) -> str | None:
    """The table of a folder that names pictures and labels; any table where one is needed and none is recognised."""
    tables = sorted((n for n in tree.names if n.count("/") <= 1 and n.lower().endswith(TABLES)), key=_table_rank)
    known = {columns.image.lower()} if columns.image else {*FILE_COLUMNS}
    targets = [columns.target] if isinstance(columns.target, str) else columns.target
    wanted = {t.lower() for t in targets} if targets else {*LABEL_COLUMNS}
    for table in tables:
        try:
            text = text_of(tree.read(table), table)
            rows = json_rows if table.lower().endswith(TABLES[2:]) else rows_of
            header = {h.lower() for h in rows(text, table)[0]}
        except (DataError, OSError, ValueError):
            continue
        if known & header and wanted & header:
            return table
    top = [t for t in tables if "/" not in t and t.lower().endswith(TABLES[:2])]
    return top[0] if top and needed else None


def _table_rank(name: str) -> tuple[int, bool, str]:
    return name.count("/"), Path(name).stem.lower() not in ("labels", "metadata", "train", "index"), name


# -- from names to pictures --------------------------------------------------------------------------------------------------------
def read_pictures(name: str, tree: Tree, listing: Listing, config: Data, source: Any) -> Dataset:
    """The pictures of a listing as a data set.

    Pictures of several sizes are brought to `data.image.size` (`auto`: the only size there is, else the median). They are decoded into memory
    where that takes at most a quarter of what is free (or as `data.in_memory` says); else once into a file of raw pixels in the cache where
    the disk has room for it (or as `data.cached` says); else they are decoded each time, by worker processes.

    Raises:
        DataError: no picture at all, or every one of them is damaged.
    """
    names, rejected, notes = listing.names, listing.rejected, listing.notes
    if not names:
        raise DataError(
            "{source}: no pictures found ({rejected} named ones are missing)" if rejected else "{source}: no pictures found",
            "{source}：没有找到图片（表中列出的 {rejected} 张不存在）" if rejected else "{source}：没有找到图片",
            source=source,
            rejected=len(rejected),
            fix="expected FOLDER/<label>/*.png|jpg, or FOLDER/labels.csv with the columns file,label; or files of text",
            fix_zh="应为 目录/<标签>/*.png|jpg，或含 file,label 两列的 目录/labels.csv；或文本文件",
        )
    # First pass: headers and bytes' digests. What cannot be opened is rejected here already.
    heads = _each(say("reading pictures", "读取图片"), len(names), lambda i: _head(tree, names[i]))
    sizes = Counter(h["size"] for h in heads if "size" in h)
    if not sizes:
        raise DataError(
            "{source}: none of its {n} pictures can be read; the first one: {reason}",
            "{source}：{n} 张图片全部无法读取；第一张的原因：{reason_zh}",
            source=source,
            n=len(names),
            reason=heads[0]["error"],
            reason_zh=reason_zh(heads[0]["error"]),
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
    if frames := sum(h.get("frames", 1) > 1 for h in heads):
        notes.append((f"{frames} pictures are animated; the first frame is used", f"有 {frames} 张动图；只用第一帧"))

    images, bad = _decode_all(name, tree, names, heads, channels, size, config, notes)
    keep = np.array([i for i in range(len(names)) if i not in bad], dtype=np.int64)
    rejected += [
        {"record": names[i], "reason": reason, "reason_zh": f"图片损坏：{reason_zh(reason)}"}
        for i, reason in sorted(bad.items())
    ]
    if not len(keep):
        raise DataError(
            "{source}: none of its {n} pictures can be decoded; the first one: {reason}",
            "{source}：{n} 张图片全部无法解码；第一张的原因：{reason}",
            source=source,
            n=len(names),
            reason=rejected[0]["reason"],
        )
    split_at = {s: np.array([i for i, g in enumerate(listing.splits) if g == s], dtype=np.int64) for s in sorted({*listing.splits}) if s}
    target, target_names = _targets(listing)
    shown = [tree.shown(n) for n in names]
    meta = {h: _column(values) for h, values in listing.meta.items()}
    if len(sizes) > 1:
        meta["height"], meta["width"] = (np.array([h.get("size", (0, 0))[k] for h in heads]) for k in (0, 1))
    dataset = Dataset(
        name,
        "image",
        images,
        target,
        [h["digest"] for h in heads],
        lambda i: shown[i],
        split_at if len(split_at) > 1 else {},
        np.array(listing.groups) if listing.groups else None,
        target_names=target_names,
        files={shown[i]: h["digest"].hex() for i, h in enumerate(heads)},
        rejected=rejected,
        notes=notes,
        meta=meta,
    )
    return dataset.select(keep) if bad else dataset


def _targets(listing: Listing) -> tuple[NDArray[Any], list[str]]:
    """Labels as text [N], or for pictures with several labels 0/1 [N, labels] with the labels' names."""
    labels = listing.labels
    if listing.target_names:  # columns of 0 and 1: the task says what is wrong with another value
        return np.array([[str(v) for v in row] for row in labels]), listing.target_names
    if not any(isinstance(v, list) for v in labels):
        return np.array([str(v) for v in labels]), []
    lists = [[str(w) for w in (v if isinstance(v, list) else [v])] for v in labels]
    names = sorted({w for v in lists for w in v})
    at = {w: k for k, w in enumerate(names)}
    hot = np.zeros((len(lists), len(names)))
    for i, v in enumerate(lists):
        hot[i, [at[w] for w in v]] = 1
    return hot, names


def _column(values: list[Any]) -> NDArray[Any]:
    """A column of numbers where all are, else of text."""
    try:
        return np.array([float(v) for v in values])
    except (TypeError, ValueError):
        return np.array([str(v) for v in values])


def _each(title: str, count: int, one: Callable[[int], Any]) -> list[Any]:
    """`one(i)` of every i in threads (Pillow releases the interpreter lock while it decodes), with progress."""
    found: list[Any] = []
    progress = console.Progress(title, count)
    pool = ThreadPoolExecutor()
    try:
        with quiet_pillow():
            for result in pool.map(one, range(count)):
                found.append(result)
                if len(found) % 64 == 0:
                    progress.update(len(found), "")
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for a hundred thousand pictures
        progress.close()
    return found


def _head(tree: Tree, name: str) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        data = tree.read(name)
    except (OSError, ValueError) as error:
        return {"error": getattr(error, "strerror", None) or str(error), "digest": bytes(32)}
    digest = hashlib.sha256(data).digest()
    if not data:
        return {"error": "the file is empty", "digest": digest}
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # the camera was held upright: shown turned by 90 degrees
                width, height = height, width
            colour = picture.mode not in ("1", "L", "I", "I;16", "F", "LA")
            return {"size": (height, width), "colour": colour, "digest": digest, "frames": getattr(picture, "n_frames", 1)}
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        return {"error": reason, "digest": digest}


def _decode_all(
    name: str,
    tree: Tree,
    names: list[str],
    heads: list[dict[str, Any]],
    channels: int,
    size: tuple[int, int],
    config: Data,
    notes: list[tuple[str, str]],
) -> tuple[ArrayImages | FileImages, dict[int, str]]:
    """Decodes every picture once: into memory, into a file of raw pixels, or only for its channel sums. Returns the pictures and
    position -> reason of damaged ones."""
    resize = Resize.of(config.image)
    needed = channels * size[0] * size[1] * len(names)
    in_memory = needed <= available_memory() // 4 if config.in_memory == "auto" else config.in_memory
    cached = not in_memory and (_room() >= 4 * needed if config.cached == "auto" else config.cached)
    digests = b"".join(h["digest"] for h in heads)
    key = hashlib.sha256(repr((name, channels, size, resize)).encode() + digests).hexdigest()
    bad = {i: h["error"] for i, h in enumerate(heads) if "error" in h}
    stored = cache.load(key)
    raw = cache.pixel_file(key)
    if stored is not None and raw.is_file():
        bad |= dict(zip((int(i) for i in stored["bad"]), (str(r) for r in stored["reasons"])))
        if in_memory:
            return ArrayImages(np.load(raw)), bad
        return FileImages(tree, names, channels, size, stored["sums"], resize, raw if cached else None), bad
    if stored is not None and not in_memory and not cached:
        bad |= dict(zip((int(i) for i in stored["bad"]), (str(r) for r in stored["reasons"])))
        return FileImages(tree, names, channels, size, stored["sums"], resize), bad
    shape = (len(names), channels, *size)
    writer = cache.PixelWriter(key, shape) if cached or (in_memory and 4 * needed <= _room()) else None
    memory = np.zeros(shape, dtype=np.uint8) if in_memory else None
    sums = np.zeros((len(names), 2, channels))

    def one(i: int) -> str | None:
        if i in bad:
            return bad[i]
        try:
            picture = decode(tree.read(names[i]), channels, size, resize)
        except (ValueError, OSError) as error:
            return str(error)
        if memory is not None:
            memory[i] = picture
        if writer is not None:
            writer.put(i, picture)
        real: NDArray[np.float64] = picture.reshape(channels, -1).astype(np.float64)
        sums[i] = real.sum(axis=1), np.square(real).sum(axis=1)
        return None

    try:
        reasons = _each(say("decoding pictures", "解码图片"), len(names), one)
        kept = writer.finish() if writer is not None else None
    finally:
        if writer is not None:
            writer.close()
    bad = {i: reason for i, reason in enumerate(reasons) if reason is not None}
    facts = {"bad": np.array(sorted(bad), dtype=np.int64), "reasons": np.array([bad[i] for i in sorted(bad)], dtype=np.str_)}
    cache.store(key, facts | {"sums": sums})
    if cached and kept is None:
        notes.append(("the cache has no room for the decoded pictures: they are decoded each time", "缓存空间不足，图片每次重新解码"))
    return (ArrayImages(memory) if memory is not None else FileImages(tree, names, channels, size, sums, resize, kept)), bad


def _room() -> int:
    """Bytes free where the cache is."""
    place = cache.cache_folder()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0
