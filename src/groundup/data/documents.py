"""From a data SPEC to a stream of documents: text files, source trees, JSON, tables and Parquet, in folders, globs and archives, compressed or
not, data sets of the hub, and user code.

Nothing is held but the record at hand. Every record comes in the same order each time, so that counting them is enough to continue.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from groundup.core import files
from groundup.core.errors import DataError, GroundupError, did_you_mean_path
from groundup.core.recipe import Data
from groundup.core.registry import DATASETS
from groundup.data.cache import VERSION, cache_folder
from groundup.data.cleaning import Reason
from groundup.data.decoding import detect, open_item, read_plain, read_up_to
from groundup.data.items import CODE, KINDS, PROSE, SKIPPED, TEXT_COLUMNS, Found, Item, Part, TextSource, kind_of
from groundup.data.records import Columns, delimiter_of, header_of, is_number, parse_json, read_item, text_column
from groundup.data.table import SPLIT_NAMES
from groundup.data.tree import ARCHIVES, Archive, is_archive


# -- from a SPEC to items ------------------------------------------------------------------------------------------------------
def open_parts(config: Data) -> list[Part]:
    """The sources that `data.source` names, with everything they consist of.

    Raises:
        DataError: nothing is there, or it is not text.
    """
    if isinstance(config.source, str):
        return [_part(config.source, config)]
    if not config.source:
        raise DataError("data.source is an empty list", "data.source 是空列表", fix="--set data.source=stdlib")
    for mixed in config.source:
        if mixed.classes is not None:
            raise DataError(
                "data.source: '{source}' asks for classes, and a text has none",
                "data.source：'{source}' 指定了 classes，但文本没有类别",
                source=mixed.source,
            )
    return [replace(_part(mixed.source, config), weight=mixed.weight) for mixed in config.source]


def split_spec(spec: str) -> tuple[str, int | None]:
    """A SPEC without its '#500', and the 500. Raises DataError for '#0'."""
    match = re.fullmatch(r"(.+)#([0-9]+)", spec, re.DOTALL)
    if not match or files.exists(Path(spec).expanduser()):
        return spec, None
    if int(match[2]) == 0:
        raise DataError("{spec} asks for no records", "{spec} 要求 0 条记录", spec=spec)
    return match[1], int(match[2])


def _part(spec: str, config: Data) -> Part:
    spec, sample = split_spec(spec)
    if not spec.strip():
        raise DataError("the data source is empty", "数据源为空", fix="groundup data show stdlib")
    part = _open(spec, config)
    if not part.items:
        raise DataError(
            "{spec} holds no text: none of its files ends in {known}",
            "{spec} 里没有文本：没有以 {known} 结尾的文件",
            spec=spec,
            known=", ".join([*PROSE[:3], *KINDS, ".py", "..."]),
        )
    part.sample = sample
    return part


def _open(spec: str, config: Data) -> Part:
    if spec.startswith("hub:"):
        return _hub(spec.removeprefix("hub:"), config)
    if ".py:" in spec:
        return _from_user(spec)
    path = Path(spec).expanduser()
    if spec in DATASETS.names():
        target = DATASETS.get(spec).target
        source = target() if _gives_text(target) else None
        if not isinstance(source, TextSource):
            raise DataError(
                "'{spec}' is not a set of texts",
                "'{spec}' 不是文本数据集",
                spec=spec,
                fix="groundup data show stdlib   is one that is built in",
                fix_zh="groundup data show stdlib   是内置的一份",
            )
        return _of_source(source)
    if files.exists(path):
        return _of_path(path)
    if (inside := _inside_archive(path)) is not None:
        return inside
    if any(c in spec for c in "*?["):
        matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        apart = {p.resolve(): p for p in sorted(matched, key=lambda p: len(p.parts), reverse=True)}  # one that links lead to as well counts once
        chosen = [p for p in sorted(apart.values()) if p.is_file()] or sorted(apart.values())
        if chosen:
            parts = [_of_path(p) for p in chosen]
            base = Path(os.path.commonpath([p.parent for p in chosen]))
            named = [
                replace(i, name=(p.relative_to(base).as_posix() if len(part.items) == 1 else i.name), alone=False, split="")
                for p, part in zip(chosen, parts)
                for i in part.items
            ]
            return Part(path.name, _with_splits(named))
    hint, hint_zh = did_you_mean_path(spec, DATASETS.names())
    raise DataError(
        "no data '{spec}': not a built-in name, and no such file or folder." + hint,
        "没有数据 '{spec}'：既不是内置名称，也不是文件或文件夹。" + hint_zh,
        spec=spec,
        fix="a file or folder (--set data.source=PATH), or one that is built in: groundup data show stdlib",
        fix_zh="给出文件或文件夹（--set data.source=路径），或用内置的：groundup data show stdlib",
    )


def _of_path(path: Path) -> Part:
    if path.is_dir():
        return _of_source(TextSource(path.resolve().name, (path,)))
    if is_archive(path):
        return _of_archive(path, "")
    return Part(path.stem, [replace(_file(path, path.name), alone=True)])


def _of_source(source: TextSource) -> Part:
    """Every text file below its roots. Archives are opened where the suffixes name them, or where there is nothing else."""
    items: list[Item] = []
    archives: list[Path] = []
    other: Counter[str] = Counter()
    for root in source.roots:
        for name in _walk(root, SKIPPED | source.skip) if root.is_dir() else [""]:
            path = root / name
            if source.suffixes and not path.name.lower().endswith(source.suffixes):
                continue
            if is_archive(path):
                archives.append(path)
            elif kind_of(path.name) or source.suffixes:
                items.append(_file(path, name or path.name))
            else:
                other[path.suffix.lower() or path.name] += 1
    if not items or any(s in ARCHIVES for s in source.suffixes):
        single = len(archives) == 1 and not items
        for path in archives:
            inside = _of_archive(path, "").items
            items += inside if single else [replace(i, name=f"{path.name}/{i.name}", split="") for i in inside]
    else:
        other.update(p.suffix.lower() for p in archives)
    return Part(source.name, _with_splits(items), notes=_unread(other))


def _walk(root: Path, skip: frozenset[str]) -> list[str]:
    """Every file below a folder, sorted part by part; hidden ones and what is skipped are left out."""
    found = []
    for parent, folders, names in os.walk(root, followlinks=False):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        place = Path(parent).relative_to(root)
        found += [(place / n).as_posix() for n in names if not n.startswith(".")]
    return sorted(found, key=lambda n: n.split("/"))


def _file(path: Path, name: str) -> Item:
    try:
        facts = path.stat()
    except OSError as error:
        raise DataError(
            "{path} cannot be read: {cause}", "无法读取 {path}：{cause}", path=path, cause=error
        ) from error
    identity = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    return Item(name, kind_of(path.name) or "file", path, size=facts.st_size, identity=identity)


def _inside_archive(path: Path) -> Part | None:
    """`archive.zip/tang`: a folder or file of an archive."""
    for parent in path.parents:
        if is_archive(parent) and parent.is_file():
            return _of_archive(parent, path.relative_to(parent).as_posix())
    return None


def _of_archive(path: Path, inside: str) -> Part:
    archive = Archive(path)
    facts = path.stat()
    names = [n for n in archive.names if not inside or n == inside or n.startswith(inside + "/")]
    if not names:
        raise DataError("{path} holds no '{inside}'", "{path} 里没有 '{inside}'", path=path, inside=inside or "*")
    other: Counter[str] = Counter()
    items = []
    for name in names:
        if kind := kind_of(name) or ("file" if name == inside else ""):
            identity = (str(path.resolve()), facts.st_size, facts.st_mtime_ns, name)
            shorter = name.removeprefix(inside + "/") if name != inside else name.rpartition("/")[2]
            items.append(Item(shorter, kind, path, archive, size=facts.st_size // len(names), alone=name == inside, identity=identity))
        else:
            other[Path(name).suffix.lower() or name] += 1
    return Part(Path(inside).stem if inside else path.stem, _with_splits(items), notes=_unread(other))


def _with_splits(items: list[Item]) -> list[Item]:
    """The items with the data's own splits: folders at the top, or files, that are called train, validation (valid, dev) and test."""

    def split_of(item: Item) -> str:
        top, _, _ = item.name.partition("/")
        stem = item.name.rpartition("/")[2].partition(".")[0]
        code = item.name.lower().endswith(CODE)
        return SPLIT_NAMES.get(top.lower(), "") or ("" if code else SPLIT_NAMES.get(stem.lower(), ""))

    splits = [split_of(i) for i in items]
    if "train" not in splits or not {*splits} & {"validation", "test"}:
        return items
    return [replace(i, split=s or "train") for i, s in zip(items, splits)]


def _unread(other: Counter[str]) -> list[tuple[str, str]]:
    if not other:
        return []
    n, listed = sum(other.values()), ", ".join(f"{s} {k}" for s, k in other.most_common(8))
    return [(f"files of other kinds, not read: {n:,} ({listed})", f"另有 {n:,} 个其他类型的文件未读取（{listed}）")]


def _gives_text(target: Any) -> bool:
    """Whether a registered function is annotated as giving a TextSource: then it is called, and no other set is loaded in vain."""
    given = getattr(target, "__annotations__", {}).get("return")
    return given is TextSource or given == "TextSource"


def _from_user(spec: str) -> Part:
    """`path/to/file.py:Name`: a function or class that gives a TextSource, or an iterable of texts (or of records like those of JSON lines)."""
    entry = DATASETS.get(spec)
    assert entry.file is not None
    made = _called(spec, entry.target)
    if isinstance(made, TextSource):
        return _of_source(made)
    texts = [made] if isinstance(made, str) else made
    if not hasattr(texts, "__iter__") or isinstance(texts, dict | bytes):
        raise DataError(
            "{spec} gave {kind}; a groundup TextSource or an iterable of strings is expected",
            "{spec} 返回了 {kind}；应为 groundup 的 TextSource 或字符串的可迭代对象",
            spec=spec,
            kind=type(made).__name__,
        )
    item = _file(entry.file, spec.rpartition(":")[2])
    held = [texts]

    def rows(start: int) -> Iterable[Any]:
        again = held.pop() if held else _called(spec, entry.target)  # a generator can be read only once
        return itertools.islice([again] if isinstance(again, str) else again, start, None)

    return Part(entry.file.stem, [replace(item, kind="rows", rows=rows, alone=True, identity=(*item.identity, spec))])


def _called(spec: str, target: Callable[[], Any]) -> Any:
    try:
        return target()
    except GroundupError:
        raise
    except Exception as error:
        raise DataError(
            "{spec} failed: {cause}",
            "{spec} 运行出错：{cause}",
            spec=spec,
            cause=f"{type(error).__name__}: {error}",
            fix="--traceback shows where; it is called without arguments and gives texts",
            fix_zh="加 --traceback 可看到位置；调用时不带参数，应返回文本",
        ) from error


def _hub(spec: str, config: Data) -> Part:
    """`owner/name[@revision][:config]`, streamed when online, else from the cache of `datasets`; its own splits become the given ones."""
    import datasets

    from groundup.data.hub import _reachable

    rest, _, subset = spec.partition(":")
    name, _, revision = rest.partition("@")
    online = not datasets.config.HF_HUB_OFFLINE and _reachable()
    seen = cache_folder() / f"v{VERSION}" / "text" / f"hub-{hashlib.sha256(spec.encode()).hexdigest()[:16]}.json"
    known = files.read_json(seen) if seen.is_file() else None
    if not online:
        datasets.config.HF_HUB_OFFLINE = True  # read what `datasets` has in its cache without asking the network
        if known is not None:  # perhaps it was prepared when the hub could be reached: then nothing is read again
            revision, loaded = known["revision"], dict.fromkeys(known["splits"])
            return _of_hub(name, revision, subset, loaded, functools.partial(_loaded, name, subset, known["given"]))
    given = revision
    try:
        if online and not revision:  # a branch moves: what is prepared is of one commit
            from huggingface_hub import HfApi

            revision = HfApi().dataset_info(name).sha or ""
        loaded = dict(datasets.load_dataset(name, subset or None, revision=revision or None, streaming=online))
    except Exception as error:  # `datasets` raises many kinds, network errors among them
        why = (
            ("the hub cannot be reached, and 'datasets' has no copy", "无法连接 hub，本地缓存也没有")
            if not online
            else ((str(error) or type(error).__name__).splitlines()[0],) * 2
        )
        raise DataError(
            "hub:{name} cannot be read: {why}",
            "无法读取 hub:{name}：{why_zh}",
            name=name,
            why=why[0],
            why_zh=why[1],
            fix="check the network (HF_ENDPOINT names a mirror), or give a local path",
            fix_zh="检查网络（HF_ENDPOINT 可指定镜像），或给出本地路径",
        ) from error
    if online:
        with contextlib.suppress(OSError):
            seen.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(seen, {"revision": revision, "given": given, "splits": [str(s) for s in loaded]})
    return _of_hub(name, revision, subset, loaded, loaded.__getitem__)


def _loaded(name: str, subset: str, revision: str, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, subset or None, revision=revision or None)[split]


def _of_hub(name: str, revision: str, subset: str, splits: Iterable[str], rows: Callable[[str], Any]) -> Part:
    names = [str(s) for s in splits]
    own = {SPLIT_NAMES.get(s.lower(), "train") for s in names}
    items = []
    for split in names:
        known = SPLIT_NAMES.get(split.lower(), "train") if "train" in own and len(own) > 1 else ""
        read = functools.partial(_skipped, rows, split)
        items.append(Item(f"{name} {split}", "rows", rows=read, split=known, alone=True, identity=("hub", name, revision, subset, split)))
    return Part(f"hub:{name}", items)


def _skipped(rows: Callable[[str], Any], split: str, start: int) -> Iterable[Any]:
    return rows(split).skip(start) if start else rows(split)  # type: ignore[no-any-return]


# -- what a SPEC looks like ----------------------------------------------------------------------------------------------------
def is_text(spec: str, config: Data) -> bool:
    """Whether a SPEC looks like text for a language model. What is read as vectors or pictures is not: tables of numbers, folders with
    pictures, JSON lines that name pictures."""
    try:
        spec = split_spec(spec)[0]
        if spec in DATASETS.names():
            return _gives_text(DATASETS.get(spec).target)
        if spec.startswith("hub:"):
            return _hub_is_text(spec.removeprefix("hub:"), config)
        if ".py:" in spec:
            target = DATASETS.get(spec).target
            made = None if _gives_text(target) else target()
            return made is None or isinstance(made, TextSource) or _is_texts(made)
        path = Path(spec).expanduser()
        if path.is_dir():
            names = _walk(path, SKIPPED)
            if _pictures(names) or any(IDX_NAME.search(n) for n in names):
                return False
        items = [i for i in _open(spec, config).items if not (i.alone and not kind_of(i.name))]
        archives = {i.archive.path: i.archive for i in items if i.archive is not None}
        if any(_pictures(archive.names) for archive in archives.values()):
            return False
        # A code file or prose with a telling name settles it; else some of the files are looked into.
        return bool(items) and any(_looks(i, config) for i in items[:: max(1, len(items) // 8)])
    except (GroundupError, OSError):
        return False


IDX_NAME = re.compile(r"(idx\d-ubyte|-ubyte)(\.gz)?$")


def _pictures(names: Sequence[str]) -> bool:
    """Whether a folder is one of pictures: a few beside more texts are illustrations. (Captions and boxes are one text for each picture.)"""
    from groundup.data.image_folder import is_picture

    pictures = sum(is_picture(n) for n in names)
    return pictures * 2 > sum(bool(kind_of(n)) for n in names)


def _is_texts(made: Any) -> bool:
    """Whether the first of what user code gives is a text; a table or an array is not."""
    if isinstance(made, str):
        return True
    first = next(iter(made), None) if isinstance(made, list | tuple | Iterator) else None
    return isinstance(first, str)


def _hub_is_text(spec: str, config: Data) -> bool:
    """By the columns that the hub tells of: a picture makes it one of pictures."""
    import datasets

    if config.columns.image is not None:
        return False
    if config.text.column is not None:
        return True
    rest, _, subset = spec.partition(":")
    name, _, revision = rest.partition("@")
    try:
        features = datasets.load_dataset_builder(name, subset or None, revision=revision or None).info.features or {}
    except Exception:  # `datasets` raises many kinds, network errors among them
        return False
    lower = {str(f).lower() for f in features}
    return not any(isinstance(f, datasets.Image) for f in features.values()) and any(c in lower for c in TEXT_COLUMNS)


def _looks(item: Item, config: Data) -> bool:
    try:
        return _looks_like_text(item, config)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return True  # cut off or damaged: said by who reads it


def _looks_like_text(item: Item, config: Data) -> bool:
    from groundup.data.image_folder import FILE_COLUMNS, is_picture

    name = item.name.lower().removesuffix(".gz").removesuffix(".zst")
    if item.kind in ("file", "rows") and not name.endswith(".txt"):
        return True
    if item.kind in ("json", "jsonl", "parquet"):
        return any(f.reason is None for f in _first_records(item, config))
    with open_item(item) as stream:
        head = read_up_to(stream, 2**16)
    told = detect(head, whole=len(head) < 2**16)
    if isinstance(told, Reason):
        return item.kind != "table"  # the reader of text says what is wrong with it
    lines = head[told[1] :].decode(told[0], "replace").splitlines(keepends=True)
    lines = lines[:-1][:50] or lines
    delimiter = delimiter_of(item.name, next((line for line in lines if line.strip()), ""))
    header, rows = header_of(lines, delimiter)
    if item.kind == "table":
        lower = [h.lower() for h in header]
        named = any(c in lower and any(is_picture(r[lower.index(c)]) for r in rows if lower.index(c) < len(r)) for c in FILE_COLUMNS)
        return bool(rows) and not named and text_column(header, rows, config.text.column, by_name=True) is not None
    if not header:
        return item.kind != "table"  # the reader of text says that it is empty
    widths = {len(r) for r in [header, *rows]}
    if any(is_picture(cell) for row in rows[:5] for cell in row):
        return False
    # A .txt is a table where its rows are equally long and some column is numbers from the second row on.
    table = rows or [header]
    return len(widths) > 1 or not any(all(is_number(r[i]) for r in table) for i in range(len(header)))


def _first_records(item: Item, config: Data) -> Iterator[Found]:
    """The first records as text, unless one names a picture."""
    from groundup.data.image_folder import FILE_COLUMNS, is_picture

    if item.kind != "parquet":
        with open_item(item) as stream:
            plain = read_plain(stream, config)
            value = next(iter(parse_json(plain)), None)
            record = next(iter(Columns(item, config).records(value)), None) if value is not None else None
            if isinstance(record, dict) and any(is_picture(str(record.get(c, ""))) for c in FILE_COLUMNS):
                return
    yield from itertools.islice(read_item(item, config), 20)
