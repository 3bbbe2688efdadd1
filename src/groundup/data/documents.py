"""From a data SPEC to a stream of documents: text files, source trees, JSON, tables and Parquet, in folders, globs and archives, compressed or
not, data sets of the hub, and user code.

Nothing is held but the record at hand. Every record comes in the same order each time, so that counting them is enough to continue.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from groundup.core import files
from groundup.core.errors import DataError, GroundupError, did_you_mean
from groundup.core.recipe import Data
from groundup.core.registry import DATASETS
from groundup.data.cache import VERSION, cache_folder
from groundup.data.cleaning import Reason
from groundup.data.table import MISSING, SPLIT_NAMES
from groundup.data.tree import ARCHIVES, Archive, is_archive

HEAD = 2**20  # bytes by which an encoding is told
PIECE = 16 * 2**20  # bytes: a longer text file becomes documents of at most so many, cut at ends of lines
LONGEST = 32 * 2**20  # bytes of a line, characters of a JSON value: a longer one is rejected rather than held

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".html", ".htm", ".xml", ".srt", ".vtt", ".log")
_CODE = "py pyi pyx c h cc cpp cxx hpp cu cuh java js mjs ts jsx tsx go rs rb php swift kt kts scala lua pl pm r jl sh bash zsh bat ps1 sql"
_CODE += " css scss vue cs fs hs ml mli ex exs erl clj lisp el vim cmake proto tcl yaml yml toml ini cfg"
CODE = tuple(f".{suffix}" for suffix in _CODE.split())
UNSUFFIXED = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "makefile", "dockerfile")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "table", ".tsv": "table", ".parquet": "parquet"}
_COLUMNS = (
    "text content paragraphs para document body story article passage sentence sentences review code markdown poem lyrics instruction"
)
TEXT_COLUMNS = tuple(_COLUMNS.split())
UNITS = ("", "line", "record", "row", "paragraph", "part")
_SKIPPED = frozenset({"__pycache__", "node_modules", "__MACOSX"})


@dataclass(frozen=True)
class TextSource:
    """What a registered text set is: files below some folders, one document each.

    Args:
        roots: folders or files.
        suffixes: only files that end so (lower case, '.py'); empty for everything that is text.
        skip: names of folders that are left out, at any depth.
    """

    name: str
    roots: tuple[Path, ...]
    suffixes: tuple[str, ...] = ()
    skip: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Item:
    """One file (or member of an archive, split of the hub, iterable) of documents.

    Args:
        name: for a person, 'tang/poet.tang.0.json'.
        kind: file, jsonl, json, table, parquet, rows or strings.
        split: the data's own split that it belongs to, or ''.
        alone: it is all that the SPEC names: then a missing text column is an error, not a rejected file.
    """

    name: str
    kind: str
    path: Path | None = None
    archive: Archive | None = None
    rows: Callable[[int], Iterable[Any]] | None = None
    split: str = ""
    size: int = 0
    alone: bool = False
    identity: tuple[Any, ...] = ()


@dataclass
class Part:
    """One source of a mixture: its items, how many of its documents are drawn (`sample`) and its weight; null takes all."""

    name: str
    items: list[Item]
    sample: int | None = None
    weight: float | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


class Found(NamedTuple):
    """One record as it was read: its text, or the reason why there is none.

    place: its number in the item, counted from 1 in `unit`s. piece: a part of a long text, which the next ones continue. last: nothing
    behind it can be read.
    """

    text: str | None
    reason: Reason | None = None
    unit: str = ""
    place: int = 0
    group: str = ""
    piece: bool = False
    last: bool = False


def shown(name: str, unit: str, place: int) -> str:
    """'big.txt line 12': a record for a person."""
    return f"{name} {unit} {place}" if unit else name


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
            )
        return _of_source(source)
    if files.exists(path):
        return _of_path(path)
    if (inside := _inside_archive(path)) is not None:
        return inside
    if any(c in spec for c in "*?["):
        matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        chosen = [p for p in matched if p.is_file()] or matched
        if chosen:
            parts = [_of_path(p) for p in chosen]
            base = Path(os.path.commonpath([p.parent for p in chosen]))
            named = [
                replace(i, name=(p.relative_to(base).as_posix() if len(part.items) == 1 else i.name), alone=False, split="")
                for p, part in zip(chosen, parts)
                for i in part.items
            ]
            return Part(path.name, _with_splits(named))
    hint, hint_zh = did_you_mean(spec, DATASETS.names())
    raise DataError(
        "no data '{spec}': not a built-in name, and no such file or folder." + hint,
        "没有数据 '{spec}'：既不是内置名称，也不是文件或文件夹。" + hint_zh,
        spec=spec,
        fix="groundup data show stdlib",
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
        for name in _walk(root, _SKIPPED | source.skip) if root.is_dir() else [""]:
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
            "{path} cannot be read: {cause}", "无法读取 {path}：{cause}", path=path, cause=error.strerror or str(error)
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


def kind_of(name: str) -> str:
    """The kind of file by its name: 'file' (a text), 'jsonl', 'json', 'table', 'parquet', or '' for what is not text."""
    lower = name.rpartition("/")[2].lower()
    lower = lower.removesuffix(".gz").removesuffix(".zst")
    stem, dot, suffix = lower.rpartition(".")
    if not stem:
        return "file" if lower in UNSUFFIXED else ""
    return KINDS.get(dot + suffix, "file" if dot + suffix in PROSE or dot + suffix in CODE else "")


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
    return [(f"{n} files of other kinds were not read ({listed})", f"另有 {n} 个其他类型的文件未读取（{listed}）")]


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


# -- from an item to records ---------------------------------------------------------------------------------------------------
def read_item(item: Item, config: Data, start: int = 0) -> Iterator[Found]:
    """The records of an item, in order, from the one numbered `start` (counted from 0, rejected ones too). What cannot be read is a Found with
    its reason; where nothing behind it can be read either, the item ends there.

    Raises:
        DataError: no text column in data that consist of one file, or a package that is missing.
    """
    read = {"file": _texts, "jsonl": _json_lines, "json": _json_values, "table": _table, "parquet": _parquet, "rows": _rows}[item.kind]
    unit = {"jsonl": "line", "table": "line", "json": "record"}.get(item.kind, "")
    found = Found(None, unit=unit)
    try:
        for found in read(item, config, start):
            yield found
    except UnicodeDecodeError as error:
        yield Found(None, _undecodable(error, error.start), found.unit, found.place + 1 if found.unit else 0, last=True)
    except _Ends as end:
        yield Found(None, end.reason, last=True)
    except _damage() as error:
        where, where_zh = (f" behind {found.unit} {found.place}", f"（在第 {found.place} 处之后）") if found.place else ("", "")
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = Reason("unreadable", f"cannot be read{where}: {cause}", f"无法读取{where_zh}：{cause}", damaged=True)
        yield Found(None, reason, last=True)


class _Ends(Exception):
    """Nothing behind this place can be read."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.en)
        self.reason = reason


def _damage() -> tuple[type[Exception], ...]:
    """What a damaged file raises while it is read."""
    kinds: tuple[type[Exception], ...] = (
        OSError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
        NotImplementedError,
        RuntimeError,
    )
    if zstandard := sys.modules.get("zstandard"):
        kinds += (zstandard.ZstdError,)
    if arrow := sys.modules.get("pyarrow"):
        kinds += (arrow.ArrowException,)
    return kinds


@contextlib.contextmanager
def open_item(item: Item) -> Iterator[IO[bytes]]:
    """An item's bytes as a stream, unpacked."""
    with contextlib.ExitStack() as stack:
        assert item.path is not None
        inner = item.path.name
        if item.archive is None:
            stream: IO[bytes] = stack.enter_context(open(item.path, "rb"))
        else:
            inner = str(item.identity[-1])
            stream = stack.enter_context(_member(item.archive, inner))
        if inner.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))  # type: ignore[arg-type]
        elif inner.lower().endswith(".zst"):
            stream = stack.enter_context(_unzstd(stream, inner))
        yield stream


class _Cut(io.RawIOBase):
    """A stretch of a file: a member of a tar."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file, self._left = open(path, "rb"), size
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        if not data and self._left:
            raise EOFError("the archive is cut off")
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _member(archive: Archive, name: str) -> Iterator[IO[bytes]]:
    member = archive._members[name]
    if isinstance(member, tuple):
        with io.BufferedReader(_Cut(archive._tar, *member), HEAD) as stream:
            yield stream
    else:
        with zipfile.ZipFile(archive.path) as opened, opened.open(member) as stream:
            yield stream


def _unzstd(stream: IO[bytes], name: str) -> Any:
    try:
        return io.BufferedReader(
            importlib.import_module("zstandard").ZstdDecompressor().stream_reader(stream, read_across_frames=True), HEAD
        )
    except ModuleNotFoundError:
        with contextlib.suppress(ModuleNotFoundError):  # Python 3.14 has its own
            return importlib.import_module("compression.zstd").ZstdFile(stream)
    raise DataError(
        "{name} is compressed with zstd, and the package that reads it is missing",
        "{name} 用 zstd 压缩，但缺少读取它的软件包",
        name=name,
        fix="pip install zstandard",
    )


# -- encodings -----------------------------------------------------------------------------------------------------------------
# The most frequent characters of Chinese in both scripts, and its punctuation: what a wrong encoding hardly yields.
_FREQUENT = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都"
    "同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问"
    "很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走"
    "义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科"
    "司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运"
    "這個們來為國說時會對後過發經麼學現當沒動還進樣開從實軍與長機無關點業將兩間問應戰頭體見產東聲員論處義幾認條氣題爾別變總電數報結務場計資許"
    "統區隊決馬書聽卻達強難權設記類據邊張該萬覺術領確傳師觀讓識導爭運於著裏裡種話風雲花春江秋夜"
    "，。、；：？！“”‘’（）《》「」『』…—　"
)


@functools.cache
def _usual(encoding: str) -> frozenset[str]:
    """The characters of the first level of GB 2312 (3,755) or Big5 (5,401): those in use."""
    leads, trails = (
        (range(0xB0, 0xD8), [*range(0xA1, 0xFF)])
        if encoding == "gb18030"
        else (range(0xA4, 0xC7), [*range(0x40, 0x7F), *range(0xA1, 0xFF)])
    )
    made = (bytes((lead, trail)).decode("gb2312" if encoding == "gb18030" else "big5", "ignore") for lead in leads for trail in trails)
    return frozenset(c for c in made if c)


def detect(data: bytes, *, whole: bool) -> tuple[str, int] | Reason:
    """(encoding, length of the byte order mark) of a text by its bytes, or why it is none.

    UTF-8 and UTF-16 by their mark; else UTF-8 if it is valid; else GB18030 or Big5, by which of them gives the more frequent characters.

    Args:
        whole: these are all bytes; else a character may be cut off at the end.
    """
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(mark):
            return encoding, len(mark)
    if (at := data.find(b"\0")) >= 0:
        return Reason(
            "binary",
            f"not text: a zero byte at byte {at} (UTF-16 without a mark is read with data.text.encoding=utf-16-le)",
            f"不是文本：第 {at} 字节为零（没有 BOM 的 UTF-16 请设 data.text.encoding=utf-16-le）",
            damaged=True,
        )
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, whole)
        return "utf-8", 0
    except UnicodeDecodeError as error:
        invalid = error
    best: tuple[float, str] = (0.0, "")
    for encoding in ("gb18030", "big5"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(data, whole)
            letters = [c for c in text[:200_000] if c > "\x7f"]
            frequent = sum(c in _FREQUENT for c in letters) / max(1, len(letters))
            usual = sum(c in _usual(encoding) or c in _FREQUENT for c in letters) / max(1, len(letters))
            if usual > 0.7 and frequent + 0.1 * usual > best[0]:
                best = frequent + 0.1 * usual, encoding
    if best[1]:
        return best[1], 0
    byte, at = invalid.object[invalid.start], invalid.start
    return Reason(
        "encoding",
        f"not text in a known encoding: not UTF-8 at byte {at} (0x{byte:02x}), and neither GB18030 nor Big5",
        f"不是已知编码的文本：第 {at} 字节（0x{byte:02x}）不合 UTF-8，也不是 GB18030 或 Big5",
        damaged=True,
    )


def _undecodable(error: UnicodeDecodeError, at: int) -> Reason:
    byte = error.object[error.start]
    return Reason(
        "encoding",
        f"not valid {error.encoding.upper()} at byte {at} (0x{byte:02x})",
        f"第 {at} 字节（0x{byte:02x}）不合 {error.encoding.upper()} 编码",
        damaged=True,
    )


def _decoded(raw: bytes, encoding: str, offset: int) -> str | Reason:
    """Bytes as text, or where they are not; `offset` is where they stand in the file."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        return _undecodable(error, offset + error.start)
    if "\0" in text:
        at = offset + raw.find(b"\0")
        return Reason("binary", f"not text: a zero byte at byte {at}", f"不是文本：第 {at} 字节为零", damaged=True)
    return text


class _Again(io.RawIOBase):
    """A stream whose beginning was read already; where that ended in an error, it comes at its place."""

    def __init__(self, head: bytes, rest: IO[bytes], error: Exception | None = None) -> None:
        self._head, self._rest, self._error = memoryview(head), rest, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: Any = self._head[: len(buffer)]
        self._head = self._head[len(buffer) :]
        if not len(data):
            if self._error is not None:
                raise self._error
            data = self._rest.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        return len(data)


class _AsUtf8(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 as UTF-8: there, lines end at a byte."""

    def __init__(self, stream: IO[bytes], encoding: str, offset: int) -> None:
        self._stream, self._decoder, self._ready = stream, codecs.getincrementaldecoder(encoding)(), b""
        self._read = offset

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stream.read1(HEAD)  # type: ignore[attr-defined]
            held = len(self._decoder.getstate()[0])
            try:
                self._ready = self._decoder.decode(data, not data).encode("utf-8")
            except UnicodeDecodeError as error:
                name, at = error.encoding.upper(), self._read - held + error.start
                reason = Reason("encoding", f"not valid {name} at byte {at}", f"第 {at} 字节不合 {name} 编码", damaged=True)
                raise _Ends(reason) from error
            self._read += len(data)
            if not data:
                break
        data, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class Plain(NamedTuple):
    """A text stream whose lines end at a byte: how it is encoded, what it was (`named`), and how many bytes stood before it."""

    stream: IO[bytes]
    encoding: str
    named: str
    offset: int
    newline: bytes


def _plain(stream: IO[bytes], config: Data) -> Plain:
    """A stream of text of any encoding. Raises _Ends where it is not text."""
    head, error = b"", None
    try:
        while len(head) < HEAD and (part := stream.read1(HEAD - len(head))):  # type: ignore[attr-defined]
            head += part
    except _damage() as damage:  # in a compressed file: what stands before is good
        error = damage
    if config.text.encoding == "auto":
        told = detect(head, whole=len(head) < HEAD and error is None)
        if isinstance(told, Reason) and told.code == "binary":
            raise _Ends(told)
        # Where none fits, the records that are valid UTF-8 can be read, and the others say where they are not.
        encoding, mark = ("utf-8", 0) if isinstance(told, Reason) else told
    else:
        encoding = named_encoding(config.text.encoding)
        mark = len(codecs.BOM_UTF8) if encoding == "utf-8" and head.startswith(codecs.BOM_UTF8) else 0
    again: Any = io.BufferedReader(_Again(head[mark:], stream, error), HEAD)
    named = encoding
    if encoding.startswith(("utf-16", "utf-32", "utf-7")):
        again, encoding, mark = io.BufferedReader(_AsUtf8(again, encoding, mark), HEAD), "utf-8", 0
    old = b"\r" in head and b"\n" not in head and not named.startswith(("utf-16", "utf-32"))
    return Plain(again, encoding, named, mark, b"\r" if old else b"\n")


def named_encoding(name: str) -> str:
    """An encoding by Python's name for it. Raises DataError for an unknown one."""
    try:
        found = codecs.lookup(name).name
        "".encode(found)
        return found
    except (LookupError, AttributeError) as error:
        raise DataError(
            "data.text.encoding: there is no encoding '{name}'",
            "data.text.encoding：没有编码 '{name}'",
            name=name,
            fix="--set data.text.encoding=auto   (or utf-8, gb18030, big5, latin-1, ...)",
        ) from error


def _read(stream: IO[bytes], count: int) -> bytes:
    """`count` bytes, or all there are."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _lines(plain: Plain) -> Iterator[tuple[int, bytes | None]]:
    """(offset, bytes) of every line with its end; None for one longer than LONGEST, which is passed over."""
    offset = plain.offset
    if plain.newline == b"\r":
        rest = b""
        while data := plain.stream.read1(HEAD):  # type: ignore[attr-defined]
            *whole, rest = (rest + data).split(b"\r")
            for line in whole:
                yield offset, line + b"\n"
                offset += len(line) + 1
            if len(rest) > LONGEST:  # keep its length, forget its bytes
                raise _Ends(_too_long())
        if rest:
            yield offset, rest
        return
    while line := plain.stream.readline(LONGEST + 1):
        begun, size = offset, len(line)
        if size > LONGEST and not line.endswith(b"\n"):
            line = b""
            while (more := plain.stream.readline(LONGEST)) and not more.endswith(b"\n"):
                size += len(more)
            size += len(more)
        offset += size
        yield begun, line or None


def _too_long() -> Reason:
    mib = LONGEST // 2**20
    return Reason("too long to read", f"longer than {mib} MiB", f"超过 {mib} MiB", damaged=True)


# -- text files ----------------------------------------------------------------------------------------------------------------
def _texts(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        if config.text.document == "line":
            yield from itertools.islice(_of_lines(_plain(stream, config)), start, None)
        elif config.text.document == "paragraph":
            yield from itertools.islice(_of_paragraphs(_plain(stream, config)), start, None)
        else:
            yield from itertools.islice(_pieces(stream, config), start, None)


def _of_lines(plain: Plain) -> Iterator[Found]:
    for number, (offset, raw) in enumerate(_lines(plain), 1):
        text = _decoded(raw, plain.encoding, offset) if raw is not None else _too_long()
        if isinstance(text, Reason):
            yield Found(None, text, "line", number)
            continue
        for part in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            if part and not part.isspace():
                yield Found(part, None, "line", number)


def _of_paragraphs(plain: Plain) -> Iterator[Found]:
    number, size, held = 1, 0, list[str]()
    damage: Reason | None = None
    for offset, raw in itertools.chain(_lines(plain), [(0, b"")]):
        text = _decoded(raw, plain.encoding, offset) if raw is not None else _too_long()
        if isinstance(text, Reason):
            damage = damage or text
            continue
        for line in text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n"):
            if line.strip() and size + len(line) <= LONGEST:
                held.append(line)
                size += len(line)
                continue
            if line.strip():
                damage = damage or _too_long()
                continue
            if held or damage:
                yield Found(None if damage else "\n".join(held), damage, "paragraph", number)
                number, size, held, damage = number + 1, 0, [], None


def _pieces(stream: IO[bytes], config: Data) -> Iterator[Found]:
    """A whole file as one document; one of more than PIECE bytes as pieces that follow each other."""
    data = _read(stream, PIECE + 1)
    if len(data) <= PIECE:
        yield Found(text) if isinstance(text := _whole(data, config), str) else Found(None, text)
        return
    plain = _plain(io.BufferedReader(_Again(data, stream)), config)
    data, offset, number, ends = b"", plain.offset, 1, False
    while True:
        data += _read(plain.stream, PIECE + 1 - len(data))
        ends = len(data) <= PIECE
        cut = len(data) if ends else max(data.rfind(plain.newline, 0, PIECE) + 1, 0) or data.rfind(b" ", 0, PIECE) + 1 or PIECE
        text = _decoded(data[:cut], plain.encoding, offset)
        if isinstance(text, Reason) and cut == PIECE and not ends:  # one line: perhaps only a character was cut through
            for shorter in range(PIECE - 1, PIECE - 4, -1):
                if isinstance(again := _decoded(data[:shorter], plain.encoding, offset), str):
                    cut, text = shorter, again
                    break
        yield Found(text, None, "part", number, piece=True) if isinstance(text, str) else Found(None, text, "part", number, piece=True)
        if ends:
            return
        data, offset, number = data[cut:], offset + cut, number + 1


def _whole(data: bytes, config: Data) -> str | Reason:
    if config.text.encoding != "auto":
        encoding, mark = named_encoding(config.text.encoding), 0
        mark = len(codecs.BOM_UTF8) if encoding == "utf-8" and data.startswith(codecs.BOM_UTF8) else 0
    else:
        told = detect(data, whole=True)
        if isinstance(told, Reason):
            return told
        encoding, mark = told
    return _decoded(data[mark:], encoding, mark)


def encoding_of(item: Item, config: Data) -> str:
    """The encoding of a text item by its beginning, for the statistics; '?' where it is not text."""
    if item.kind in ("parquet", "rows"):
        return "utf-8"
    try:
        with open_item(item) as stream:
            return _plain(stream, config).named
    except _Ends:
        return "?"
    except _damage():
        return "?"


# -- records -------------------------------------------------------------------------------------------------------------------
class Columns:
    """Finds the text of records, by the column asked for or recognised in the first one."""

    def __init__(self, item: Item, config: Data) -> None:
        self._item, self._wanted, self._group = item, config.text.column, config.columns.group
        self._only: str | None = None
        self._first = True
        self._keys: tuple[Any, ...] = ()  # of the record before: records are mostly alike
        self._named: str | None = None

    def records(self, value: Any) -> Iterator[dict[str, Any] | str | Reason]:
        """The records in a JSON value: lists in lists are opened, and a book whose text column holds records is its records."""
        if isinstance(value, list):
            for inner in value:
                yield from self.records(inner)
        elif isinstance(value, dict):
            name = self._column(value)
            inner = value.get(name) if name else None
            if isinstance(inner, list) and any(isinstance(v, dict) for v in inner):
                for v in inner:
                    yield from self.records(v)
            else:
                yield value
        elif isinstance(value, str):
            yield value
        else:
            found = type(value).__name__
            yield Reason(
                "not a record", f"{found} where an object like {{...}} is expected", f"应为对象 {{...}}，却是 {found}", damaged=True
            )

    def _column(self, record: dict[str, Any]) -> str | None:
        if self._wanted is not None:
            return self._wanted if self._wanted in record else None
        if self._named is None or tuple(record) != self._keys or not isinstance(record[self._named], str | list):
            lower = {str(k).lower(): k for k, v in record.items() if isinstance(v, str | list)}
            self._keys, self._named = tuple(record), next((lower[c] for c in TEXT_COLUMNS if c in lower), None)
        return self._named or self._only

    def found(self, record: dict[str, Any] | str | Reason, unit: str, place: int) -> Found:
        """One record's text. Raises DataError or _Ends where the first record shows no text column."""
        if isinstance(record, Reason):
            return Found(None, record, unit, place)
        if isinstance(record, str):
            return Found(record, None, unit, place)
        if self._first:
            self._first = False
            strings = [k for k, v in record.items() if isinstance(v, str)]
            if self._column(record) is None:
                if self._wanted is None and len(strings) == 1:
                    self._only = strings[0]
                else:
                    self.missing([str(k) for k in record], strings)
        name = self._column(record)
        value = record.get(name) if name is not None else None
        group = ""
        if self._group is not None:
            if record.get(self._group) is None:
                return Found(None, _lacks(self._group), unit, place)
            group = str(record[self._group])
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            title = record.get("title")
            lines = [title, *value] if isinstance(title, str) and title.strip() and name != "title" else value
            return Found("\n".join(lines), None, unit, place, group)
        if isinstance(value, str) or value == []:
            return Found(value or "", None, unit, place, group)
        return Found(None, _lacks(name or self._wanted or "/".join(TEXT_COLUMNS[:3])), unit, place)

    def missing(self, columns: Sequence[str], strings: Sequence[str]) -> NoReturn:
        """Raises DataError: none of these columns is the text; _Ends where the item is one of many."""
        listed = ", ".join(columns) or "(none)"
        if not self._item.alone and self._wanted is None:
            raise _Ends(Reason("no text column", f"no text column; it has {listed}", f"没有文本列；它有 {listed}"))
        if self._wanted is not None:
            hint, hint_zh = did_you_mean(self._wanted, columns)
            raise DataError(
                "{name} has no column '{wanted}'." + hint, "{name} 没有列 '{wanted}'。" + hint_zh, name=self._item.name, wanted=self._wanted
            )
        raise DataError(
            "{name}: which column holds the text? It has {columns}",
            "{name}：哪一列是文本？它有 {columns}",
            name=self._item.name,
            columns=listed,
            fix="--set data.text.column={column}",
            column=next(iter(strings), "NAME").replace("{", "{{").replace("}", "}}"),
        )


def _lacks(column: str) -> Reason:
    return Reason("no text", f"no text in '{column}'", f"'{column}' 中没有文本", damaged=True)


def _not_json(error: Exception) -> Reason:
    return Reason("not JSON", f"not JSON: {error}", f"不是 JSON：{error}", damaged=True)


def _json_lines(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        plain = _plain(stream, config)
        if plain.stream.peek(64).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from itertools.islice(_values(plain, item, config), start, None)
            return
        columns, count = Columns(item, config), 0
        for number, (offset, raw) in enumerate(_lines(plain), 1):
            if raw is not None and raw.isspace():
                continue
            text = _decoded(raw, plain.encoding, offset) if raw is not None else _too_long()
            records: Iterable[Any] = [text]
            if isinstance(text, str):
                try:
                    records = columns.records(json.loads(text))
                except (ValueError, RecursionError) as error:
                    records = [_not_json(error)]
            for record in records:
                made = columns.found(record, "line", number)
                if count >= start:
                    yield made
                count += 1


def _json_values(item: Item, config: Data, start: int) -> Iterator[Found]:
    with open_item(item) as stream:
        yield from itertools.islice(_values(_plain(stream, config), item, config), start, None)


def _values(plain: Plain, item: Item, config: Data) -> Iterator[Found]:
    """The elements of a JSON array, or JSON values behind each other, without holding them all."""
    columns, number = Columns(item, config), 0
    for value in _parsed(plain):
        if isinstance(value, Reason):
            yield Found(None, value, "record", number + 1)
            return
        for record in columns.records(value):
            number += 1
            yield columns.found(record, "record", number)


def _parsed(plain: Plain) -> Iterator[Any]:
    """JSON values, elements of a top-level array one by one; a Reason where it is not JSON: what follows cannot be read."""
    decoder, parse = codecs.getincrementaldecoder(plain.encoding)(), json.JSONDecoder().raw_decode
    buffer, at, ended, inside, read = "", 0, False, False, plain.offset

    def more() -> None:
        nonlocal buffer, at, ended, read
        data = plain.stream.read1(max(HEAD, len(buffer) - at))  # type: ignore[attr-defined]
        held = len(decoder.getstate()[0])
        try:
            buffer, at, ended = buffer[at:] + decoder.decode(data, not data), 0, not data
        except UnicodeDecodeError as error:
            raise _Ends(_undecodable(error, read - held + error.start)) from error
        read += len(data)

    between = re.compile(r"[\s,]*")
    first = True
    while True:
        at = between.match(buffer, at).end()  # type: ignore[union-attr]
        if at == len(buffer):
            if ended:
                if inside:
                    yield _not_json(ValueError("the array does not end"))
                return
            more()
            continue
        if first and buffer[at] == "[":
            first, inside, at = False, True, at + 1
            continue
        first = False
        if inside and buffer[at] == "]":
            inside, at = False, at + 1
            continue
        try:
            value, end = parse(buffer, at)
            if end == len(buffer) and not ended:  # a number could go on
                more()
                continue
        except (ValueError, RecursionError) as error:
            near = getattr(error, "pos", 0) > len(buffer) - 16 or str(error).startswith("Unterminated")
            if ended or not near or isinstance(error, RecursionError):
                yield _not_json(error)
                return
            if len(buffer) - at > LONGEST:
                yield _too_long()
                return
            more()
            continue
        yield value
        at = end


def _table(item: Item, config: Data, start: int) -> Iterator[Found]:
    """CSV and TSV. The text column is the one asked for, one with a known name, or the only one that is not numbers."""
    with open_item(item) as stream:
        plain = _plain(stream, config)
        bad: list[Found] = []
        number = 0

        def lines() -> Iterator[str]:
            nonlocal number
            for number, (offset, raw) in enumerate(_lines(plain), 1):
                text = _decoded(raw, plain.encoding, offset) if raw is not None else _too_long()
                if isinstance(text, str):
                    yield text
                else:
                    bad.append(Found(None, text, "line", number))
                    yield "\n"

        text = lines()
        head = list(itertools.islice(text, 50))
        delimiter = delimiter_of(item.name, next((h for h in head if h.strip()), ""))
        reader = csv.reader(itertools.chain(head, text), delimiter=delimiter)
        header, sample = _header(head, delimiter)
        if not header:
            return
        columns = Columns(item, config)
        name = text_column(header, sample, config.text.column)
        if name is None:
            columns.missing(header, [h for h in header if h])
        places = {h: header.index(h) for h in (name, config.columns.group) if h in header}
        count, begun = 0, False
        while True:
            try:
                with _long_cells():
                    row = next(reader)
            except StopIteration:
                row = None
            except csv.Error as error:
                row, reason = [], Reason("not a table", f"not a delimited table: {error}", f"不是分隔符表格：{error}", damaged=True)
                bad.append(Found(None, reason, "line", reader.line_num))
            while bad:
                if count >= start:
                    yield bad[0]
                count += 1
                bad.pop(0)
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if not begun:
                begun = True
                continue
            if count >= start:
                if len(row) != len(header):
                    facts = f"{len(row)} cells where the header has {len(header)}", f"有 {len(row)} 个单元格，表头有 {len(header)} 个"
                    yield Found(None, Reason("cells", *facts, damaged=True), "line", reader.line_num)
                else:
                    record = {h: row[i] for h, i in places.items() if h is not None}
                    if config.columns.group is not None and not record.get(config.columns.group):
                        yield Found(None, _lacks(config.columns.group), "line", reader.line_num)
                    else:
                        yield Found(record[str(name)], None, "line", reader.line_num, record.get(config.columns.group or "", ""))
            count += 1


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's limit is one for the whole process: it is put back."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def delimiter_of(name: str, line: str) -> str:
    if name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        return "\t"
    return max(",\t;|", key=line.count) if any(d in line for d in ",\t;|") else ","


def _header(lines: list[str], delimiter: str) -> tuple[list[str], list[list[str]]]:
    """The cells of the first row, and some rows below it."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error), _long_cells():
        for row in csv.reader(lines, delimiter=delimiter):
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
    return (rows[0], rows[1:]) if rows else ([], [])


def text_column(header: Sequence[str], sample: Sequence[Sequence[str]], wanted: str | None, *, by_name: bool = False) -> str | None:
    """The column of a table that holds the text, or None. `by_name`: only if its name says so."""
    if wanted is not None:
        return wanted if wanted in header else None
    texts = [h for i, h in enumerate(header) if not all(_numeric(row[i]) for row in sample if i < len(row)) or not sample]
    lower = {h.lower(): h for h in texts}
    named = next((lower[c] for c in TEXT_COLUMNS if c in lower), None)
    return named if named or by_name or len(texts) != 1 else texts[0]


def _numeric(cell: str) -> bool:
    if cell.lower() in MISSING:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parquet(item: Item, config: Data, start: int) -> Iterator[Found]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    assert item.path is not None
    if item.archive is not None:
        reason = Reason(
            "in an archive", "Parquet inside an archive is not read: unpack it", "不读取压缩包内的 Parquet：请先解压", damaged=True
        )
        yield Found(None, reason)
        return
    with parquet.ParquetFile(item.path) as file:
        kinds = {f.name: f.type for f in file.schema_arrow}
        strings = [n for n, t in kinds.items() if arrow.types.is_string(t) or arrow.types.is_large_string(t)]
        lists = [n for n, t in kinds.items() if arrow.types.is_list(t) or arrow.types.is_large_list(t)]
        columns = Columns(item, config)
        name = text_column(strings + lists, [], config.text.column, by_name=True)
        if name is None and config.text.column is None and len(strings) == 1:
            name = strings[0]
        if name is None:
            columns.missing(list(kinds), strings)
        wanted = [c for c in (name, "title" if name in lists else None, config.columns.group) if c in kinds]
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield columns.found(record, "row", number)


def _rows(item: Item, config: Data, start: int) -> Iterator[Found]:
    """Texts or records of the hub or of user code."""
    assert item.rows is not None
    columns = Columns(item, config)
    rows = iter(item.rows(start))
    for number in itertools.count(start + 1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except GroundupError:
            raise
        except Exception as error:  # the network, or user code
            cause = f"{type(error).__name__}: {error}"
            raise DataError(
                "{name} failed at record {number}: {cause}",
                "{name} 在第 {number} 条记录处出错：{cause}",
                name=item.name,
                number=number,
                cause=cause,
                fix="the same command continues where it stopped",
                fix_zh="再次运行同一命令会从中断处继续",
            ) from error
        if not isinstance(row, str | dict):
            kind = type(row).__name__
            row = Reason("not a record", f"a text or a mapping is expected, not {kind}", f"应为文本或映射，而不是 {kind}", damaged=True)
        yield columns.found(row, "record", number)


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
            names = _walk(path, _SKIPPED)
            if _pictures(names) or any(IDX_NAME.search(n) for n in names):
                return False
        items = [i for i in _open(spec, config).items if not (i.alone and not kind_of(i.name))]
        archives = {i.archive.path: i.archive for i in items if i.archive is not None}
        if any(_pictures(archive.names) for archive in archives.values()):
            return False
        # A code file or prose with a telling name settles it; else some of the files are looked into.
        return bool(items) and any(_looks_like_text(i, config) for i in items[:: max(1, len(items) // 8)])
    except (GroundupError, OSError):
        return False


IDX_NAME = re.compile(r"(idx\d-ubyte|-ubyte)(\.gz)?$")


def _pictures(names: Sequence[str]) -> bool:
    """Whether a folder is one of pictures: a few beside many texts are illustrations."""
    from groundup.data.image_folder import is_picture

    pictures = sum(is_picture(n) for n in names)
    return pictures * 10 > sum(bool(kind_of(n)) for n in names)


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


def _looks_like_text(item: Item, config: Data) -> bool:
    from groundup.data.image_folder import FILE_COLUMNS, is_picture

    name = item.name.lower().removesuffix(".gz").removesuffix(".zst")
    if item.kind in ("file", "rows") and not name.endswith(".txt"):
        return True
    if item.kind in ("json", "jsonl", "parquet"):
        first = next((f for f in _first_records(item, config)), None)
        return first is not None and first.reason is None
    with open_item(item) as stream:
        head = _read(stream, 2**16)
    told = detect(head, whole=len(head) < 2**16)
    if isinstance(told, Reason):
        return False
    lines = head[told[1] :].decode(told[0], "replace").splitlines(keepends=True)
    lines = lines[:-1][:50] or lines
    delimiter = delimiter_of(item.name, next((line for line in lines if line.strip()), ""))
    header, rows = _header(lines, delimiter)
    if item.kind == "table":
        lower = [h.lower() for h in header]
        named = any(c in lower and any(is_picture(r[lower.index(c)]) for r in rows if lower.index(c) < len(r)) for c in FILE_COLUMNS)
        return bool(rows) and not named and text_column(header, rows, config.text.column, by_name=True) is not None
    if not header:
        return False
    widths = {len(r) for r in [header, *rows]}
    if any(is_picture(cell) for row in rows[:5] for cell in row):
        return False
    # A .txt is a table where its rows are equally long and some column is numbers from the second row on.
    table = rows or [header]
    return len(widths) > 1 or not any(all(_numeric(r[i]) for r in table) for i in range(len(header)))


def _first_records(item: Item, config: Data) -> Iterator[Found]:
    """The first record as text, unless it names a picture."""
    from groundup.data.image_folder import FILE_COLUMNS, is_picture

    if item.kind != "parquet":
        with open_item(item) as stream:
            plain = _plain(stream, config)
            value = next(iter(_parsed(plain)), None)
            record = next(iter(Columns(item, config).records(value)), None) if value is not None else None
            if isinstance(record, dict) and any(is_picture(str(record.get(c, ""))) for c in FILE_COLUMNS):
                return
    yield from itertools.islice(read_item(item, config), 1)
