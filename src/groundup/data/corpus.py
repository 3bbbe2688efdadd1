"""A corpus: the documents of a data SPEC, cleaned, without copies, divided, on the disk.

Made in two passes, neither of which holds the documents. The first one reads, cleans and filters them, and appends each one's text, digest and
MinHash signature to files; every few seconds it writes down how far it came, and a later start goes on from there. The second one finds the
copies, divides what is left, and writes the final files; then the folder gets its final name. The memory that is needed beside the batch at
hand is about 70 bytes for each document.

    <cache>/text/<key>/   text.bin (or kept.bin)  offsets.npy  records.npy  train.npy ...  rejected.jsonl  items.json  manifest.json
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as _quoted
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.core.errors import DataError
from groundup.core.messages import SPLITS_ZH, say
from groundup.core.recipe import Data
from groundup.data import cache, cleaning
from groundup.data.cache import VERSION, cache_folder
from groundup.data.cleaning import LANGUAGES, PERMUTATIONS, Reason
from groundup.data.documents import is_text, open_parts
from groundup.data.items import UNITS, Found, Item, Part, shown
from groundup.data.records import encoding_of, read_item

__all__ = ["Corpus", "is_text", "prepare_corpus"]

FORMAT = 3  # part of every key: raise it when the same source and settings give another corpus
COMMIT_EVERY = 3.0  # seconds of work that an interruption can cost
BATCH = (2000, 2**19)  # records, characters that are cleaned at once
SIMILAR = 0.8  # the similarity of copies, where none is given
SPLITS = ("train", "validation", "test")
WORKING = ("text.bin", "documents.bin", "signatures.bin", "rejected.jsonl")  # appended to by the first pass

# What the first pass writes down of each document; `end`: where its text ends in text.bin.
_TYPES = {
    "end": "<u8",
    "digest": "<2u8",
    "group": "<u8",
    "place": "<u8",
    "item": "<u4",
    "characters": "<u4",
    "unit": "u1",
    "language": "u1",
}
DOCUMENT = np.dtype([*_TYPES.items(), ("piece", "?"), ("signed", "?")])
RECORD = np.dtype([("place", "<u8"), ("item", "<u4"), ("unit", "u1"), ("language", "u1"), ("continues", "?")])

Told = Callable[[str, float], None]
Notes = list[tuple[str, str]]


@dataclass
class Corpus:
    """Documents on the disk, numbered in the order of their source.

    Args:
        offsets: int64 [n + 1], where each document begins in the text file (bytes of UTF-8), mapped from the disk.
        splits: 'train', 'validation', 'test' -> sorted document numbers; those that are not empty.
        fingerprint: sha256 of the documents' digests and the splits, in order.
        statistics: `before` and `after` cleaning, what was rejected by reason, languages, lengths, encodings.
        notes: remarks (English, Chinese).
        rejected: JSON lines with everything that was left out and why; may be long.
        files: file -> sha256; of more than 1,000 files one digest for each source.
        continues: bool [n]: the document goes on where the one before ends (pieces of a long text, or two sides of a cut).
    """

    name: str
    folder: Path
    offsets: NDArray[np.int64]
    splits: dict[str, NDArray[np.int64]]
    fingerprint: str
    statistics: dict[str, Any]
    notes: Notes
    rejected: Path
    files: dict[str, str]
    continues: NDArray[np.bool_]
    text_file: Path

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, i: int) -> str:
        return next(self.texts([i]))

    def texts(self, index: Iterable[int] | NDArray[np.int64]) -> Iterator[str]:
        """The documents at `index`, in its order, read one by one."""
        with open(self.text_file, "rb") as file:
            for i in index:
                start, end = int(self.offsets[i]), int(self.offsets[i + 1])
                file.seek(start)
                yield file.read(end - start).decode("utf-8")

    def bytes_of(self, split: str) -> int:
        """Bytes of UTF-8 in a split's documents; 0 for a split that is not there."""
        index = self.splits.get(split, np.zeros(0, dtype=np.int64))
        return int((self.offsets[index + 1] - self.offsets[index]).sum())

    def describe(self, i: int) -> str:
        """Where a document comes from: 'tang/poet.tang.0.json record 17', 'notes.md', 'big.txt line 12'."""
        record = self._records[i]
        return shown(self._items[record["item"]], UNITS[record["unit"]], int(record["place"]))

    @functools.cached_property
    def _records(self) -> NDArray[Any]:
        return np.load(self.folder / "records.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @functools.cached_property
    def _items(self) -> list[str]:
        return files.read_json(self.folder / "items.json")  # type: ignore[no-any-return]


def prepare_corpus(config: Data, *, progress: Told | None = None) -> Corpus:
    """The corpus of `data.source`, from the cache where it was made before. What was interrupted goes on.

    Args:
        progress: is told what is being done and which share of it is done, at most twice a second.

    Raises:
        DataError: nothing is there, more than half of it is damaged, or nothing is left to train on.
    """
    parts = open_parts(config)
    _check(config, parts)
    key = _key(config, parts)
    home = cache_folder() / f"v{VERSION}" / "text"
    told = _Teller(progress)
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = cache.waited(home / f"{key}.lock", lambda en, zh: told(en, zh, 0.0))
        try:
            if (corpus := _opened(home / key)) is None:
                partial = home / f"{key}.part"
                _prepare(partial, parts, config, told)
                if (home / key).exists():  # a damaged one
                    shutil.rmtree(home / key)
                os.replace(partial, home / key)
                files.sync(home)
                corpus = _opened(home / key)
            assert corpus is not None
            return corpus
        finally:
            lock.release()
    except OSError as error:
        raise DataError(
            "the text is prepared in {folder}, and that failed: {cause}",
            "文本在 {folder} 中准备，但失败了：{cause}",
            folder=home,
            cause=error,
            fix="set GROUNDUP_CACHE to a folder with room, and start again: what is done is kept",
            fix_zh="把 GROUNDUP_CACHE 设为空间充足的目录后重新开始；已完成的部分会保留",
        ) from error


class _Teller:
    """Passes on progress, at most every half second."""

    def __init__(self, progress: Told | None) -> None:
        self._progress, self._last = progress, 0.0

    def __call__(self, en: str, zh: str, share: float) -> None:
        if self._progress is not None and time.monotonic() - self._last >= 0.5:
            self._last = time.monotonic()
            self._progress(say(en, zh), min(1.0, share))


def _check(config: Data, parts: Sequence[Part]) -> None:
    cleaning.wanted_languages(config.text)
    if config.split.by != "group":
        return
    if config.columns.group is None:
        raise DataError(
            "data.split.by = group needs a column of groups", "data.split.by = group 需要一列分组", fix="--set data.columns.group=NAME"
        )
    for item in (i for part in parts for i in part.items if i.kind == "file"):
        raise DataError(
            "data.split.by = group: {name} has no columns; groups are for JSON, CSV and Parquet records",
            "data.split.by = group：{name} 没有列；分组只用于 JSON、CSV、Parquet 的记录",
            name=item.name,
            fix="--set data.split.by=document",
        )


def _key(config: Data, parts: Sequence[Part]) -> str:
    """The name of a corpus's folder: files by path, size and time, and all settings that matter."""
    facts = {
        "format": FORMAT,
        "parts": [
            [p.name, p.sample, p.weight, hashlib.sha256(repr([(i.name, i.identity) for i in p.items]).encode()).hexdigest()] for p in parts
        ],
        "text": config.text.model_dump(mode="json"),
        "split": config.split.model_dump(mode="json"),
        "group": config.columns.group,
        "stop": config.on_bad_record == "stop",
    }
    if config.columns.target is not None:  # the answers of examples
        facts["target"] = config.columns.target
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _opened(folder: Path) -> Corpus | None:
    """A finished corpus, or None where there is none or it is damaged."""
    try:
        made = files.read_json(folder / "manifest.json")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        text = folder / made["text"]
        if text.stat().st_size != int(offsets[-1]):
            return None
        splits = {s: np.load(folder / f"{s}.npy", mmap_mode="r") for s in made["splits"]}
        continues = np.load(folder / "records.npy", mmap_mode="r")["continues"]
        (folder / "items.json").stat()
    except (OSError, ValueError, KeyError, EOFError):
        return None
    for name in {*WORKING, "progress.json"} - {made["text"], "rejected.jsonl"}:  # of use no more
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return Corpus(
        made["name"],
        folder,
        offsets,
        splits,
        made["fingerprint"],
        made["statistics"],
        [(en, zh) for en, zh in made["notes"]],
        folder / "rejected.jsonl",
        made["files"],
        continues,
        text,
    )


# -- the first pass ------------------------------------------------------------------------------------------------------------
class _FirstPass:
    """Reads, cleans and filters, and appends to the working files. `position` is (item, records of it) up to which all is on the disk."""

    def __init__(self, folder: Path, config: Data) -> None:
        self.folder, self.config = folder, config
        self.position = (0, 0)
        self.done = False
        self.counts: dict[str, Any] = {"before": {"documents": 0, "bytes": 0, "characters": 0}, "records": 0, "damaged": 0, "first": None}
        self.counts |= {"rejected": {}, "encodings": {}, "long": {}}
        self._wanted = cleaning.wanted_languages(config.text)
        self._end = 0
        sizes = dict.fromkeys(WORKING, 0)
        with contextlib.suppress(OSError, ValueError, KeyError):  # none, or not whole: then from the beginning
            state = files.read_json(folder / "progress.json")
            if all((folder / name).stat().st_size >= size for name, size in state["sizes"].items()):
                sizes, self.position, self.done = state["sizes"], (state["position"][0], state["position"][1]), state["done"]
                self.counts = state["counts"]
        self._files: dict[str, IO[bytes]] = {}
        for name in WORKING:
            file = self._files[name] = open(folder / name, "r+b" if (folder / name).exists() else "w+b")
            file.truncate(sizes[name])
            file.seek(0, os.SEEK_END)
        self._end = sizes["text.bin"]
        self._committed = time.monotonic()

    def commit(self, *, done: bool = False) -> None:
        """Brings everything to the disk, and writes down that it is there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        state = {"position": self.position, "done": done, "sizes": sizes, "counts": self.counts}
        files.write_json(self.folder / "progress.json", state)
        self._committed, self.done = time.monotonic(), done

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def run(self, items: Sequence[Item], told: _Teller) -> None:
        """All items from the position on."""
        before = np.cumsum([0, *(max(1, i.size) for i in items)])
        queue: list[tuple[int, Found]] = []
        size = 0
        for number in range(self.position[0], len(items)):
            item, start = items[number], self.position[1] if number == self.position[0] else 0
            if start == 0:
                encodings = self.counts["encodings"]
                encoding = encoding_of(item, self.config)
                encodings[encoding] = encodings.get(encoding, 0) + 1
            count, read = start, 0
            for found in read_item(item, self.config, start):
                queue.append((number, found))
                count, size, read = count + 1, size + len(found.text or ""), read + len(found.text or "")
                if len(queue) >= BATCH[0] or size >= BATCH[1]:
                    self._flush(queue, items, (number + 1, 0) if found.last else (number, count))
                    size = 0
                    share = (before[number] + min(read, before[number + 1] - before[number])) / before[-1]
                    told(f"reading {item.name}", f"读取 {item.name}", 0.9 * float(share))
            if count == 0:
                queue.append((number, Found(None, Reason("empty", "empty", "空文件"))))
            if queue and number == len(items) - 1:
                self._flush(queue, items, (number + 1, 0))
        self.position = (len(items), 0)

    def _flush(self, queue: list[tuple[int, Found]], items: Sequence[Item], position: tuple[int, int]) -> None:
        """Cleans a batch and appends what is left of it."""
        reasons: list[Reason | None] = []
        kept: list[tuple[int, Found, str, bytes]] = []
        before = self.counts["before"]
        for number, found in queue:
            reason, text, data = found.reason, found.text, b""
            if reason is None and text is not None:
                cleaned = cleaning.clean(text, self.config.text.normalize)
                reason = cleaning.unfit(cleaned, self.config.text)
                try:
                    data = cleaned.encode("utf-8")
                except UnicodeEncodeError as error:
                    at = error.start
                    reason = Reason("surrogate", f"half a character at character {at}", f"第 {at} 个字符只有一半", damaged=True)
                before["documents"] += 1
                before["characters"] += len(text)
                before["bytes"] += len(data) if text is cleaned else len(text.encode("utf-8", "surrogatepass"))
                if reason is None:
                    kept.append((number, found, cleaned, data))
            reasons.append(reason)
        languages, letters = cleaning.languages_of([k[2] for k in kept])
        foreign = [cleaning.foreign(la, int(n), self._wanted) if self._wanted else None for la, n in zip(languages, letters)]
        left_out = iter(foreign)
        for (number, found), reason in zip(queue, reasons):
            if (why := reason or next(left_out)) is not None:
                self.reject(items[number].name, found, why)
        stay = [i for i, why in enumerate(foreign) if why is None]
        self._append([kept[i] for i in stay], [languages[i] for i in stay])
        self.counts["records"] += len(queue)
        self.position = position
        queue.clear()
        if time.monotonic() - self._committed >= COMMIT_EVERY:
            self.commit()

    def _append(self, kept: list[tuple[int, Found, str, bytes]], languages: list[str]) -> None:
        if not kept:
            return
        rows = np.zeros(len(kept), dtype=DOCUMENT)
        rows["piece"] = [k[1].piece for k in kept]
        signature, rows["signed"] = cleaning.signatures(["" if k[1].piece else k[2] for k in kept])
        sizes = [len(k[3]) for k in kept]
        rows["end"] = np.cumsum(sizes) + self._end
        self._end += sum(sizes)
        rows["item"] = [k[0] for k in kept]
        rows["place"] = [k[1].place for k in kept]
        rows["unit"] = [UNITS.index(k[1].unit) for k in kept]
        rows["characters"] = [len(k[2]) for k in kept]
        rows["language"] = [LANGUAGES.index(la) for la in languages]
        digests = b"".join(hashlib.blake2b(k[3], digest_size=16).digest() for k in kept)
        rows["digest"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        rows["group"] = [
            int.from_bytes(hashlib.blake2b(k[1].group.encode(), digest_size=8).digest(), "little") if k[1].group else 0 for k in kept
        ]
        self._files["text.bin"].write(b"".join(k[3] for k in kept))
        self._files["documents.bin"].write(rows.tobytes())
        self._files["signatures.bin"].write(signature.tobytes())
        for number, found, _, _ in kept:
            if found.piece:
                self.counts["long"][str(number)] = found.place

    def reject(self, name: str, found: Found, reason: Reason) -> None:
        """Writes a record that is left out, with the reason. Raises DataError for a damaged one where that is the policy."""
        record = shown(name, found.unit, found.place)
        if reason.damaged:
            self.counts["damaged"] += 1
            self.counts["first"] = self.counts["first"] or [record, reason.en, reason.zh]
            if self.config.on_bad_record == "stop":
                raise DataError(
                    "{record}: {reason}",
                    "{record}：{reason_zh}",
                    record=record,
                    reason=reason.en,
                    reason_zh=reason.zh,
                    fix="repair it, or leave such records out with --set data.on_bad_record=skip",
                    fix_zh="请修复，或用 --set data.on_bad_record=skip 跳过这类记录",
                )
        self.counts["rejected"][reason.code] = self.counts["rejected"].get(reason.code, 0) + 1
        self._files["rejected.jsonl"].write(rejection(record, reason, found.text or ""))


def rejection(record: str, reason: Reason, text: str) -> bytes:
    """One line of rejected.jsonl; written by hand, because there may be millions."""
    row = f'{{"record": {_quoted(record)}, "code": {_quoted(reason.code)}, "reason": {_quoted(reason.en)}, "reason_zh": {_quoted(reason.zh)}, "start of text": {_quoted(text[:80])}}}\n'
    return row.encode("utf-8", "backslashreplace")


# -- the second pass -----------------------------------------------------------------------------------------------------------
class _Rows:
    """Rows of a binary file. The file is mapped anew for each access and the rows are copied: a map that stays counts as memory."""

    def __init__(self, path: Path, dtype: Any, width: tuple[int, ...] = ()) -> None:
        self._path, self._dtype, self._width = path, dtype, width
        self._n = path.stat().st_size // (np.dtype(dtype).itemsize * int(np.prod(width)))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.array(np.memmap(self._path, dtype=self._dtype, mode="r", shape=(self._n, *self._width))[index])

    def column(self, name: str) -> NDArray[Any]:
        """One field of all rows."""
        made = np.empty((self._n, *self._dtype[name].shape), dtype=self._dtype[name].base)
        for at in range(0, self._n, 2**16):
            made[at : at + 2**16] = self[at : at + 2**16][name]
        return made


class _SecondPass:
    """Finds copies, takes samples and weights, and divides. `label` [n]: 0 left out, 1 train, 2 validation, 3 test.

    A document that a border runs through is in `cuts`: (document, bytes before the border, label behind it).
    """

    def __init__(self, folder: Path, parts: Sequence[Part], items: Sequence[Item], config: Data, first: _FirstPass, told: _Teller) -> None:
        self.folder, self.parts, self.items, self.config, self.first, self.told = folder, parts, items, config, first, told
        self.documents = _Rows(folder / "documents.bin", DOCUMENT)
        self.n = len(self.documents)
        self.sizes: NDArray[np.int64] = self.documents.column("end").astype(np.int64)
        self.sizes[1:] -= self.sizes[:-1].copy()
        self.label = np.ones(self.n, dtype=np.uint8)
        self.item: NDArray[np.uint32] = self.documents.column("item")
        self.notes: Notes = []
        self.cuts: list[tuple[int, int, int]] = []
        self.duplicates: Counter[str] = Counter()

    def run(self) -> None:
        self._own_splits()
        clusters = self._clusters()
        if self.config.text.near_duplicates is not None:
            self._without_copies(clusters.roots())
            clusters = cleaning.Clusters(self.n)
        self._sampled()
        self._weighted()
        self._divided(clusters)

    def _own_splits(self) -> None:
        """The data's own held-out documents get their label at once."""
        numbers = {"": 1, "train": 1, "validation": 2, "test": 3}
        of_item = np.array([numbers[i.split] for i in self.items], dtype=np.uint8)
        self.own = {SPLITS[k - 1] for k in np.unique(of_item).tolist()} - {"train"}
        if self.own:
            self.label = of_item[self.item]

    def _clusters(self) -> cleaning.Clusters:
        """Documents that are copies of each other. Pieces of a long text are none: it must stay whole."""
        clusters, documents = cleaning.Clusters(self.n), self.documents

        def key(of: slice) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
            rows = documents[of]
            return np.ascontiguousarray(rows["digest"][:, 0]), ~rows["piece"]

        for members, first in cleaning.equal_groups(self.n, key):
            for at in range(0, len(members), 2**14):
                a, b = members[at : at + 2**14], first[at : at + 2**14]
                equal = documents[a]["digest"][:, 1] == documents[b]["digest"][:, 1]
                clusters.join(a[equal], b[equal])
        signature = _Rows(self.folder / "signatures.bin", np.uint16, (PERMUTATIONS,))
        counted = documents.column("signed") & (clusters.roots() == np.arange(self.n))
        threshold = self.config.text.near_duplicates
        cleaning.join_similar(
            clusters,
            signature,
            counted,
            threshold if isinstance(threshold, float) else SIMILAR,
            lambda share: self.told("looking for copies", "查找重复文档", 0.9 + 0.05 * share),
        )
        return clusters

    def _without_copies(self, roots: NDArray[Any]) -> None:
        """Keeps the earliest of each cluster; a held-out one before those of training."""
        keeper = np.arange(self.n, dtype=roots.dtype)
        if self.own:
            best = np.full(self.n, np.iinfo(np.int64).max)
            ranked = (3 - self.label.astype(np.int64) << 48) + np.arange(self.n)
            np.minimum.at(best, roots, ranked)
            keeper = (best & ((1 << 48) - 1)).astype(roots.dtype)
        copies = np.flatnonzero(keeper[roots] != np.arange(self.n))
        for at in range(0, len(copies), 2**14):
            some = copies[at : at + 2**14]
            kept = keeper[roots[some]]
            exact = (self.documents[some]["digest"] == self.documents[kept]["digest"]).all(axis=1)
            reasons = [
                Reason("exact duplicate", f"exact duplicate of {where}", f"与 {where} 完全相同")
                if same
                else Reason("near-duplicate", f"near-duplicate of {where}", f"与 {where} 近似重复")
                for where, same in zip(self._names(kept), exact.tolist())
            ]
            self._leave_out(some, reasons)
        for code, zh in (("exact duplicate", "完全重复"), ("near-duplicate", "近似重复")):
            if count := self.duplicates[code]:
                removed = f"1 {code} was removed" if count == 1 else f"{count:,} {code}s were removed"
                self.notes.append((removed, f"移除了 {count:,} 个{zh}的文档"))

    def _leave_out(self, index: NDArray[Any], reasons: Sequence[Reason]) -> None:
        """Documents that were read and are not kept, written out with the reason of each."""
        self.label[index] = 0
        sizes = self.sizes[index].tolist()
        starts = (self.documents[index]["end"].astype(np.int64) - self.sizes[index]).tolist()
        rows = []
        for start, size, name, reason in zip(starts, sizes, self._names(index), reasons):
            self.duplicates[reason.code] += 1
            self.text_file.seek(start)
            rows.append(rejection(name, reason, self.text_file.read(min(size, 320)).decode("utf-8", "ignore")))
        self.rejected_file.write(b"".join(rows))

    def _names(self, index: NDArray[Any]) -> list[str]:
        rows = self.documents[index]
        facts = zip(rows["item"].tolist(), rows["unit"].tolist(), rows["place"].tolist())
        return [shown(self.items[item].name, UNITS[unit], place) for item, unit, place in facts]

    @functools.cached_property
    def text_file(self) -> IO[bytes]:
        return open(self.folder / "text.bin", "rb")

    @functools.cached_property
    def rejected_file(self) -> IO[bytes]:
        return open(self.folder / "rejected.jsonl", "ab")

    def close(self) -> None:
        for name in ("text_file", "rejected_file"):
            if name in self.__dict__:
                self.__dict__[name].close()

    @functools.cached_property
    def order(self) -> NDArray[np.uint64]:
        """[n] what documents are shuffled by: follows from the seed and their content, whatever the order of files."""
        seed = cleaning.mixed(np.array([self.config.split.seed * 2 + 1], dtype=np.uint64))
        made = np.empty(self.n, dtype=np.uint64)
        for at in range(0, self.n, 2**16):
            made[at : at + 2**16] = cleaning.mixed(self.documents[at : at + 2**16]["digest"][:, 0] ^ seed)
        return made

    def _of_part(self, number: int) -> NDArray[np.int64]:
        """The documents of one source that are still in, in shuffled order."""
        start = sum(len(p.items) for p in self.parts[:number])
        inside = (self.label > 0) & (self.item >= start) & (self.item < start + len(self.parts[number].items))
        index = np.flatnonzero(inside)
        return index[np.argsort(self.order[index], kind="stable")]

    def _sampled(self) -> None:
        for number, part in enumerate(self.parts):
            if part.sample is not None:
                self.label[self._of_part(number)[part.sample :]] = 0

    def _weighted(self) -> None:
        """With weights, as many documents as keep the proportions of bytes while none is used twice."""
        weights = [p.weight for p in self.parts]
        if len(self.parts) == 1 or not any(w is not None for w in weights):
            return
        index = [self._of_part(k) for k in range(len(self.parts))]
        total = min(int(self.sizes[i].sum()) / w for i, w in zip(index, weights) if w is not None)
        taken, missed = [], []
        for part, of, weight in zip(self.parts, index, weights):
            size = self.sizes[of]
            if weight is not None:
                fits = _fitting(size, total * weight)
                self.label[of[~fits]] = 0
                size = size[fits]
                if not 0.9 < (share := float(size.sum()) / (total * weight)) < 1.1:
                    missed.append(f"{part.name} {share:.1f}")
            taken.append(f"{part.name} {files.human_bytes(float(size.sum()))} / {len(size)}")
        listed = ", ".join(taken)
        self.notes.append((f"bytes / documents taken for the weights of the mixture: {listed}", f"按混合权重取用的字节 / 文档数：{listed}"))
        if missed:
            names = ", ".join(missed)
            self.notes.append(
                (
                    f"documents are taken whole and are too few or too long for these weights; times what was asked for: {names}",
                    f"文档只能整篇取用，数量太少或篇幅太长，无法达到这些权重；实际为要求的倍数：{names}",
                )
            )

    def _divided(self, clusters: cleaning.Clusters) -> None:
        split = self.config.split
        test = split.test if split.test != "auto" else ("given" if "test" in self.own else 0.0)
        shares: dict[str, float] = {}
        for name, wanted in (("test", test), ("validation", split.validation)):
            if wanted == "given" and name not in self.own:
                raise DataError(
                    "data.split.{name} = given, and {dataset} has no {name} split of its own",
                    "data.split.{name} = given，但 {dataset} 没有自带的 {name} 集",
                    name=name,
                    dataset=self.parts[0].name,
                    fix="--set data.split.{name}=0.1",
                )
            if name in self.own and (wanted == "given" or (name == "validation" and wanted > 0)):
                self.notes.append((f"{name} split: the data's own", f"{SPLITS_ZH[name]}：数据自带"))
                continue
            if name in self.own:  # the data's own held-out records never train, even where another share is asked for
                self.label[self.label == SPLITS.index(name) + 1] = 0
            if isinstance(wanted, float) and wanted > 0:
                shares[name] = wanted
        by_group = split.by == "group"
        if by_group:
            self._tie_groups(clusters)
        unit = clusters.roots()
        self._leaked(unit, self.label > 1, self.label == 1)
        rest = np.flatnonzero(self.label == 1)
        alone = self.documents.column("piece")[rest]
        count = int((~alone).sum()) + len(np.unique(self.item[rest[alone]]))
        whole = self.config.text.document in ("conversation", "preference")  # an example is of no use in halves
        few = split.by == "record" and count < 10 and bool(shares) and not whole
        if few:
            self.notes.append(
                (
                    f"{count} {'document is' if count == 1 else 'documents are'} too few to divide by document: the end of the text is held out",
                    f"只有 {count} 个文档，无法按文档划分：改为留出文本的末尾部分",
                )
            )
        if split.by == "contiguous" or few:
            self._contiguous(rest, shares, unit)
        else:
            self._by_unit(rest, shares, unit)
        if not (self.label == 1).any():
            raise DataError(
                "{name}: nothing is left to train on",
                "{name}：没有剩下可训练的文档",
                name=self.parts[0].name,
                fix="--set data.split.validation=0 --set data.split.test=0",
            )
        for name in shares:
            if not (self.label == SPLITS.index(name) + 1).any() and not any(SPLITS[c[2] - 1] == name for c in self.cuts):
                self.notes.append((f"no document could be held out for {name}", f"没有文档可划入{SPLITS_ZH[name]}"))

    def _tie_groups(self, clusters: cleaning.Clusters) -> None:
        def key(of: slice) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
            return np.ascontiguousarray(self.documents[of]["group"]), self.label[of] > 0

        for members, first in cleaning.equal_groups(self.n, key):
            clusters.join(members, first)

    def _leaked(self, unit: NDArray[Any], held: NDArray[np.bool_], inside: NDArray[np.bool_]) -> None:
        """Documents of `inside` that are copies of held-out ones leave."""
        marked = np.zeros(self.n, dtype=bool)
        marked[unit[held]] = True
        copies = np.flatnonzero(inside & marked[unit])
        reason = Reason("held out", "a copy of it, or one of its group, is held out", "它的副本或同组文档在留出集中")
        for at in range(0, len(copies), 2**14):
            some = copies[at : at + 2**14]
            self._leave_out(some, [reason] * len(some))
        if len(copies):
            self.notes.append(
                (
                    f"{len(copies)} documents were left out: copies of them, or others of their group, are held out",
                    f"{len(copies)} 个文档被移出：其副本或同组文档在留出集中",
                )
            )

    def _contiguous(self, rest: NDArray[np.int64], shares: dict[str, float], unit: NDArray[Any]) -> None:
        """The documents in order, cut by bytes: training, validation, test."""
        whole = self.config.text.document in ("conversation", "preference")
        ends = np.cumsum(self.sizes[rest])
        total = int(ends[-1]) if len(ends) else 0
        held = 0.0
        borders: list[tuple[int, int]] = []  # (byte, label behind it), from the last one on
        for name in ("test", "validation"):
            if name in shares:
                held += shares[name]
                borders.append((int(total * (1 - held)), SPLITS.index(name) + 1))
        for at, label in reversed(borders):
            k = int(np.searchsorted(ends, at, side="right"))
            if k == len(rest):
                continue
            inner = 0 if whole else self._boundary(int(rest[k]), at - int(ends[k] - self.sizes[rest[k]]))
            if inner > 0:
                self.cuts.append((int(rest[k]), inner, label))
            self.label[rest[k + (inner > 0) :]] = label
        cut = [c[0] for c in self.cuts]
        for label in (3, 2):  # a copy stays on the later side
            earlier = (self.label > 0) & (self.label < label)
            earlier[cut] = False
            self._leaked(unit, self.label == label, earlier)

    def _boundary(self, document: int, inner: int) -> int:
        """The byte, at most `inner`, at which a character of a document begins."""
        start = int(self.documents[document]["end"]) - int(self.sizes[document])
        back = min(inner, 4)
        self.text_file.seek(start + inner - back)
        near = self.text_file.read(back + 1)
        while back > 0 and near[back] & 0xC0 == 0x80:
            inner, back = inner - 1, back - 1
        return inner

    def _by_unit(self, rest: NDArray[np.int64], shares: dict[str, float], unit: NDArray[Any]) -> None:
        """Whole clusters and groups to each side, shuffled, by bytes; examples by their number, since what they teach is not their length."""
        of = unit[rest]
        first = np.full(self.n, np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(first, of, self.order[rest])
        whole = self.config.text.document in ("conversation", "preference")
        size = np.bincount(of, weights=None if whole else self.sizes[rest], minlength=self.n).astype(np.float64)
        units = np.flatnonzero(size)
        units = units[np.argsort(first[units], kind="stable")]
        total = size.sum()
        for name in ("test", "validation"):
            if name not in shares or len(units) < 2:
                continue
            # A unit that is larger than the share cannot give it; the smallest one is held out where all are.
            wanted = max(shares[name] * total, size[units].min())
            fit = units[size[units] <= wanted]
            most = max(1, min(len(units) - 1, round(2 * shares[name] * len(units))))  # a few long documents must not send all others to one side
            chosen = fit[np.cumsum(size[fit]) - size[fit] / 2 <= wanted][:most]
            taken = np.zeros(self.n, dtype=bool)
            taken[chosen] = True
            self.label[rest[taken[of]]] = SPLITS.index(name) + 1
            units = units[~taken[units]]



def _fitting(sizes: NDArray[np.int64], room: float) -> NDArray[np.bool_]:
    """Which documents to take, in their order: those that at least half fit into what is left of `room` bytes. Where none does, the shortest one."""
    fits = np.zeros(len(sizes), dtype=bool)
    for k, size in enumerate(sizes.tolist()):
        if size / 2 <= room:
            fits[k] = True
            room -= size
        if room <= 0:
            break
    if len(sizes) and not fits.any():
        fits[int(sizes.argmin())] = True
    return fits


# -- the final files -----------------------------------------------------------------------------------------------------------
def _prepare(folder: Path, parts: Sequence[Part], config: Data, told: _Teller) -> None:
    """Everything from the source to a finished folder."""
    folder.mkdir(exist_ok=True)
    items = [i for p in parts for i in p.items]
    first = _FirstPass(folder, config)
    try:
        if not first.done:
            first.run(items, told)
            _usable(parts, first)
            first.commit(done=True)
        else:
            _usable(parts, first)
    finally:
        first.close()
    second = _SecondPass(folder, parts, items, config, first, told)
    try:
        second.run()
        _write(second)
    finally:
        second.close()


def _usable(parts: Sequence[Part], first: _FirstPass) -> None:
    """Raises DataError where more than half is damaged, or no document is left."""
    counts = first.counts
    name = "+".join(p.name for p in parts)
    if counts["damaged"] * 2 > counts["records"]:
        record, reason, reason_zh = counts["first"]
        raise DataError(
            "{name}: {n} of {total} records are damaged; the first: {record}: {reason}",
            "{name}：{total} 条记录中有 {n} 条已损坏；第一条：{record}：{reason_zh}",
            name=name,
            n=counts["damaged"],
            total=counts["records"],
            record=record,
            reason=reason,
            reason_zh=reason_zh,
        )
    if first._end == 0 and set(counts["rejected"]) <= {"empty"}:
        raise DataError(
            "{name} is empty: there is nothing to read",
            "{name} 是空的：没有可读的内容",
            name=name,
            fix="name a file with text or examples in it",
            fix_zh="请指定有内容的文件",
        )
    if first._end == 0:
        why = ", ".join(f"{n} {code}" for code, n in counts["rejected"].items())
        raise DataError(
            "{name}: no document is left of {n} ({why})",
            "{name}：{n} 个文档全部被移除（{why}）",
            name=name,
            n=counts["records"],
            why=why or "0",
            fix="loosen data.text (min_chars, languages, repetition), or name another source",
            fix_zh="放宽 data.text 的设置（min_chars、languages、repetition），或换一个数据源",
        )


def _write(made: _SecondPass) -> None:
    """The kept documents behind each other, where each begins, and what is known of them."""
    folder, documents, told = made.folder, made.documents, made.told
    kept = np.flatnonzero(made.label)
    text = "text.bin" if len(kept) == made.n else "kept.bin"
    if text == "kept.bin":
        _copy_kept(made, folder / text)
    # A cut is one more place where a document begins.
    ends = np.cumsum(made.sizes[kept])
    cuts = [(int(ends[k] - made.sizes[i]) + inner, label) for i, inner, label in made.cuts for k in [int(np.searchsorted(kept, i))]]
    offsets = np.unique(np.concatenate([[0], ends, [c[0] for c in cuts]])).astype(np.int64)
    source = np.searchsorted(ends, offsets[:-1], side="right")
    raw = kept[source]
    label = made.label[raw]
    records = np.zeros(len(raw), dtype=RECORD)
    for name in ("place", "item", "unit", "language"):
        records[name] = documents.column(name)[raw]
    pieces = documents.column("piece")[raw]
    records["continues"][1:] = (source[1:] == source[:-1]) | (
        pieces[1:] & pieces[:-1] & (records["item"][1:] == records["item"][:-1]) & (records["place"][1:] == records["place"][:-1] + 1)
    )
    characters = documents.column("characters")[raw].astype(np.int64)
    digests = documents.column("digest")[raw]
    with open(folder / text, "rb") as file:
        for at, of in cuts:
            behind = int(np.searchsorted(offsets, at))
            label[behind] = of
            for i in (behind - 1, behind):
                file.seek(int(offsets[i]))
                data = file.read(int(offsets[i + 1] - offsets[i]))
                characters[i] = len(data.decode("utf-8"))
                digests[i] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype="<u8")
    splits = {name: np.flatnonzero(label == k) for k, name in enumerate(SPLITS, 1) if (label == k).any()}

    fingerprint = hashlib.sha256()
    for at in range(0, len(digests), 2**16):
        fingerprint.update(digests[at : at + 2**16].tobytes())
    for name, index in splits.items():
        fingerprint.update(name.encode() + index.astype("<i8").tobytes())
        _save(folder / f"{name}.npy", index)
    _save(folder / "offsets.npy", offsets)
    _save(folder / "records.npy", records)
    files.write_json(folder / "items.json", [i.name for i in made.items])
    made.rejected_file.flush()
    os.fsync(made.rejected_file.fileno())
    name = "+".join(p.name for p in made.parts)
    manifest = {
        "name": name,
        "text": text,
        "splits": list(splits),
        "fingerprint": fingerprint.hexdigest(),
        "statistics": _statistics(made, np.diff(offsets), characters, records["language"], splits),
        "notes": _notes(made),
        "files": _digests(made.parts, told),
    }
    files.write_json(folder / "manifest.json", manifest)


def _save(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _copy_kept(made: _SecondPass, path: Path) -> None:
    """The kept documents' bytes, a run of neighbours at once."""
    inside = np.diff((made.label > 0).astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(inside == 1), np.flatnonzero(inside == -1)
    ends = made.documents.column("end").astype(np.int64)
    with open(path, "wb") as target:
        for k, (start, stop) in enumerate(zip(starts, stops)):
            at, end = int(ends[start] - made.sizes[start]), int(ends[stop - 1])
            made.text_file.seek(at)
            while at < end:
                at += target.write(made.text_file.read(min(2**22, end - at)))
            made.told("writing what is kept", "写出保留的文档", 0.95 + 0.03 * (k + 1) / len(starts))
        target.flush()
        os.fsync(target.fileno())


def _statistics(
    made: _SecondPass,
    sizes: NDArray[np.int64],
    characters: NDArray[np.int64],
    language: NDArray[np.uint8],
    splits: dict[str, NDArray[np.int64]],
) -> dict[str, Any]:
    def total(index: Any) -> dict[str, int]:
        return {"documents": len(sizes[index]), "bytes": int(sizes[index].sum()), "characters": int(characters[index].sum())}

    counts = made.first.counts
    points = np.percentile(characters, [0, 5, 25, 50, 75, 95, 100])
    languages = {LANGUAGES[k]: int(n) for k, n in enumerate(np.bincount(language, minlength=len(LANGUAGES))) if n}
    return {
        "before": counts["before"],
        "after": total(slice(None)) | {"splits": {name: total(index) for name, index in splits.items()}},
        "rejected": counts["rejected"] | dict(made.duplicates),
        "damaged": counts["damaged"],
        "languages": dict(sorted(languages.items(), key=lambda pair: -pair[1])),
        "characters": {name: round(float(p), 1) for name, p in zip(("min", "p5", "p25", "median", "p75", "p95", "max"), points)},
        "encodings": counts["encodings"],
    }


def _notes(made: _SecondPass) -> Notes:
    counts = made.first.counts
    notes = [n for p in made.parts for n in p.notes]
    for number, pieces in list(counts["long"].items())[:5]:
        name = made.items[int(number)].name
        notes.append(
            (
                f"{name} is longer than 16 MiB: it is kept as {pieces} pieces that follow each other",
                f"{name} 超过 16 MiB：分成首尾相接的 {pieces} 段",
            )
        )
    if rejected := counts["rejected"]:
        listed = ", ".join(f"{n:,} {code}" for code, n in rejected.items())
        listed_zh = "、".join(f"{cleaning.CODES_ZH.get(code, code)} {n:,}" for code, n in rejected.items())
        n = sum(rejected.values())
        notes.append(
            (
                f"{n:,} of {counts['records']:,} records were left out ({listed}); they are in rejected.jsonl with their reasons",
                f"{counts['records']:,} 条记录中有 {n:,} 条被移除（{listed_zh}）；原因见 rejected.jsonl",
            )
        )
    other = {k: n for k, n in counts["encodings"].items() if k not in ("utf-8", "?")}
    if other:
        listed = ", ".join(f"{k.upper()} {n}" for k, n in other.items())
        notes.append((f"files in other encodings than UTF-8 were converted ({listed})", f"非 UTF-8 编码的文件已转换（{listed}）"))
    return notes + made.notes


def _digests(parts: Sequence[Part], told: _Teller) -> dict[str, str]:
    """File -> sha256; one combined digest for each source where there are more than 1,000 files."""
    found: dict[Path, str] = {}
    total = len({i.path for p in parts for i in p.items})
    combined: dict[str, str] = {}
    for part in parts:
        whole = hashlib.sha256()
        for item in part.items:
            if item.path is not None and item.path not in found:
                name = item.path.name if item.archive is not None or item.kind == "rows" else item.name
                found[item.path] = files.sha256(item.path)
                whole.update(f"{name} {found[item.path]}\n".encode("utf-8", "surrogateescape"))
                taken = name in combined
                if total <= 1000:
                    combined[str(item.path) if taken else name] = found[item.path]
                told("taking digests", "计算摘要", 0.98 + 0.02 * len(found) / total)
        if total > 1000:
            combined[part.name] = whole.hexdigest()
    return combined
