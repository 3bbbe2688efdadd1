"""Cleaning text: normal form, filters, languages, and copies found by MinHash.

Texts are compared as sets of shingles: runs of five words, or of five characters in scripts without spaces. MinHash estimates the Jaccard
similarity of two such sets from the minima of random permutations (Broder, On the resemblance and containment of documents, 1997), and
bands of these minima find the pairs worth estimating (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4). Everything works on
batches of documents at once, in NumPy.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.recipe import Text

SHINGLE = 5  # words, or characters where there are no spaces
PHRASE = 10  # words of a phrase that counts as repeated (Rae et al., Gopher, arXiv 2112.11446, A1.1)
PERMUTATIONS = 128
WINDOW = 2**18  # characters hashed at once: bounds the memory, and fits the processor's cache
TELLING = 40  # letters from which a text shows its language

Digests = NDArray[np.uint64]


CODES_ZH = {  # the codes of reasons, as a Chinese reader calls them
    "absurd": "内容荒谬",
    "binary": "二进制",
    "cells": "单元格数不符",
    "content": "内容有误",
    "disliked": "标为不好的回答",
    "empty": "空",
    "encoding": "编码错误",
    "exact duplicate": "完全重复",
    "format": "格式未知",
    "held out": "与留出数据重复",
    "in an archive": "在压缩包内",
    "language": "语言不符",
    "near-duplicate": "近似重复",
    "no text": "无文本",
    "no text column": "无文本列",
    "not JSON": "非 JSON",
    "not a record": "非记录",
    "not a table": "非表格",
    "nothing to learn": "没有可学的内容",
    "order": "轮次顺序有误",
    "preference": "偏好对",
    "personal data": "个人信息",
    "repetition": "重复内容过多",
    "role": "角色有误",
    "secret": "密钥或密码",
    "schema": "字段有误",
    "surrogate": "代理字符",
    "too long": "过长",
    "too long to read": "过长无法读取",
    "too short": "过短",
    "unreadable": "无法读取",
}


BROKEN = {"binary", "cells", "content", "encoding", "format", "no text", "not JSON", "not a record", "not a table", "order", "role", "schema", "surrogate",
          "too long to read", "unreadable"}  # codes of records that cannot be what was meant  # fmt: skip


class Reason(NamedTuple):
    """Why a record is left out. `damaged`: it could not be read, as opposed to not being wanted."""

    code: str
    en: str
    zh: str
    damaged: bool = False


# -- normal form ---------------------------------------------------------------------------------------------------------------
def clean(text: str, form: Literal["nfc", "nfkc"] | None) -> str:
    """CRLF and CR become LF, and the text its Unicode normal form. Nothing else changes: blanks at the ends stay."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if form is None or text.isascii():
        return text
    name: Literal["NFC", "NFKC"] = "NFKC" if form == "nfkc" else "NFC"
    return text if unicodedata.is_normalized(name, text) else unicodedata.normalize(name, text)


def unfit(text: str, settings: Text) -> Reason | None:
    """Why a cleaned document is left out for its length or its repetitions; None where it is kept."""
    if not text or text.isspace():
        return Reason("empty", "empty", "空文档")
    if len(text) < settings.min_chars:
        return Reason(
            "too short",
            f"{len(text)} characters, fewer than data.text.min_chars = {settings.min_chars}",
            f"{len(text)} 个字符，少于 data.text.min_chars = {settings.min_chars}",
        )
    if settings.max_chars is not None and len(text) > settings.max_chars:
        return Reason(
            "too long",
            f"{len(text)} characters, more than data.text.max_chars = {settings.max_chars}",
            f"{len(text)} 个字符，多于 data.text.max_chars = {settings.max_chars}",
        )
    if settings.repetition is not None and (share := repetition(text)) > settings.repetition:
        return Reason(
            "repetition",
            f"{share:.0%} of it stands in repeated lines or phrases, more than data.text.repetition = {settings.repetition:g}",
            f"{share:.0%} 的内容是重复的行或短语，超过 data.text.repetition = {settings.repetition:g}",
        )
    return None


def repetition(text: str) -> float:
    """The greater of two shares of a text's characters: those in lines that stood before, and those in ten-word phrases that did."""
    seen: set[str] = set()
    again = total = 0
    for line in text.split("\n"):
        if line := line.strip():
            total += len(line)
            again += len(line) * (line in seen)
            seen.add(line)
    by_line = again / max(1, total)
    same = words = 0
    for at in range(0, len(text), WINDOW):
        points = _points(text[at : at + WINDOW])
        starts, hashes = _tokens(points)
        ends = np.append(starts[1:], len(points))
        words += len(points)
        if len(hashes) < PHRASE:
            continue
        phrases = _runs(hashes, PHRASE)
        _, first = np.unique(phrases, return_index=True)
        repeated = np.ones(len(phrases), dtype=bool)
        repeated[first] = False
        # A character counts once, however many repeated phrases cover it.
        cover = np.zeros(len(points) + 1, dtype=np.int64)
        np.add.at(cover, starts[: len(phrases)][repeated], 1)
        np.add.at(cover, ends[PHRASE - 1 :][repeated], -1)
        same += int((np.cumsum(cover[:-1]) > 0).sum())
    return max(by_line, same / max(1, words))


# -- characters ----------------------------------------------------------------------------------------------------------------
# Scripts by ranges of code points (Unicode 15, Blocks.txt, roughly); 0 is what separates words.
SEPARATOR, DIGIT, LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, DEVANAGARI, HANGUL, OTHER, HAN, KANA, SOUTHEAST = range(13)
_UNSPACED = HAN  # from here on each character is a word
_RANGES = {
    LATIN: [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)],
    CYRILLIC: [(0x400, 0x52F)],
    GREEK: [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    ARABIC: [(0x600, 0x6FF), (0x750, 0x77F)],
    HEBREW: [(0x590, 0x5FF)],
    DEVANAGARI: [(0x900, 0x97F)],
    HANGUL: [(0x1100, 0x11FF), (0xAC00, 0xD7A3)],
    HAN: [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
    KANA: [(0x3041, 0x30FF)],
    SOUTHEAST: [(0xE01, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF)],
}


@functools.cache
def _scripts() -> NDArray[np.uint8]:
    """The script of each code point: uint8 [0x110000]."""
    table = np.zeros(0x110000, dtype=np.uint8)
    table[[c for c in range(0x10000) if not 0xD800 <= c < 0xE000 and chr(c).isalnum()]] = OTHER
    for script, ranges in _RANGES.items():
        for low, high in ranges:
            # Marks of the South and of the East are parts of words there, though they are not letters.
            of = slice(low, high + 1)
            table[of] = np.where((table[of] > 0) | (script >= DEVANAGARI), script, SEPARATOR)
    table[[c for c in range(0x10000) if not 0xD800 <= c < 0xE000 and chr(c).isdecimal()]] = DIGIT
    table[ord("_")] = OTHER
    return table


@functools.cache
def _values() -> NDArray[np.uint64]:
    """A random number for each character of a word, the same for both cases, 0 for what separates: uint64 [0x110000]."""
    table = np.random.default_rng(5).integers(1, 2**64, 0x110000, dtype=np.uint64)
    for c in [*range(0x41, 0x530), *range(0x1E00, 0x2000)]:
        if len(lower := chr(c).lower()) == 1:
            table[c] = table[ord(lower)]
    table[_scripts() == SEPARATOR] = 0
    return table


@functools.cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """r**i and r**-i modulo 2**64, for positions within a batch of twice WINDOW."""
    r = 0x9E3779B97F4A7C15
    powers = [np.full(2 * WINDOW + 1, base, dtype=np.uint64) for base in (r, pow(r, -1, 2**64))]
    for p in powers:
        p[0] = 1
    return np.cumprod(powers[0]), np.cumprod(powers[1])


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, fig. 14)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _tokens(points: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Where each word (or character of a script without spaces) begins, and its hash. Cases are alike; what separates is not looked at.

    A word's hash is sum(value * r**i) over its characters: a difference of prefix sums, divided by r**start, so no loop is needed.
    """
    script = _scripts()[points]
    word = script > SEPARATOR
    begins = script >= _UNSPACED
    begins[:1] |= word[:1]
    begins[1:] |= word[1:] & (~word[:-1] | (script[:-1] >= _UNSPACED))
    starts = np.flatnonzero(begins)
    if not len(starts):
        return starts, np.zeros(0, dtype=np.uint64)
    up, down = _powers()
    sums = np.cumsum(_values()[points] * up[: len(points)])
    before = np.where(starts > 0, sums[starts - 1], np.uint64(0))
    after = np.append(before[1:], sums[-1])
    return starts, mixed((after - before) * down[starts])


def _runs(hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """A hash of every run of `length` tokens: uint64 [len - length + 1]."""
    factors = np.random.default_rng(length).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    n = len(hashes) - length + 1
    total = hashes[:n] * factors[0]
    for k in range(1, length):
        total += hashes[k : n + k] * factors[k]
    return mixed(total)


# -- signatures ----------------------------------------------------------------------------------------------------------------
@functools.cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    rng = np.random.default_rng(1997)
    odd = rng.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return odd, rng.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)


def signatures(texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """MinHash signatures of documents: uint16 [n, PERMUTATIONS], and which documents are long enough to have one.

    Of each minimum 16 mixed bits are kept (b-bit minwise hashing, Li and König, arXiv 0910.3349): two different ones are equal once in 65,536.
    Documents of fewer than SHINGLE words have no shingles: they can only be compared exactly.
    """
    lowest = np.full((len(texts), PERMUTATIONS), 2**32 - 1, dtype=np.uint32)
    seen = np.zeros(len(texts), dtype=bool)
    for owners, windows in _batches(texts):
        shingles, counts = _shingles(windows)
        some = np.flatnonzero(counts)
        if not len(some):
            continue
        edges = np.concatenate([[0], np.cumsum(counts[some])[:-1]])
        minima = np.empty((len(some), PERMUTATIONS), dtype=np.uint32)
        hashed = np.empty_like(shingles)
        for k, (a, b) in enumerate(zip(*_permutations())):
            np.multiply(shingles, a, out=hashed)
            np.add(hashed, b, out=hashed)
            minima[:, k] = np.minimum.reduceat(hashed, edges)
        of = owners[some]
        seen[of] = True
        np.minimum.at(lowest, of, minima)
    return (lowest * np.uint32(0x9E3779B1) >> np.uint32(16)).astype(np.uint16), seen


def _batches(texts: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    """Documents, long ones in windows, gathered to about WINDOW characters: (the document of each window, windows)."""
    owners: list[int] = []
    windows: list[str] = []
    size = 0
    for i, text in enumerate(texts):
        for at in range(0, len(text), WINDOW):
            window = text[at : at + WINDOW]
            if windows and size + len(window) + len(windows) > WINDOW:
                yield np.array(owners), windows
                owners, windows, size = [], [], 0
            owners.append(i)
            windows.append(window)
            size += len(window)
    if windows:
        yield np.array(owners), windows


def _shingles(windows: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The shingles of every window behind each other, uint32, and how many each one has."""
    starts, hashes = _tokens(_points("\n".join(windows)))
    ends = np.cumsum([len(w) + 1 for w in windows])
    last = np.searchsorted(starts, ends)  # the first word after each window
    counts = np.maximum(0, np.diff(last, prepend=0) - (SHINGLE - 1))
    if len(hashes) < SHINGLE:
        return np.zeros(0, dtype=np.uint32), np.zeros(len(windows), dtype=np.int64)
    runs = (_runs(hashes, SHINGLE) >> np.uint64(32)).astype(np.uint32)
    inside = np.ones(len(hashes), dtype=bool)
    for k in range(1, SHINGLE):  # runs that reach into the next window
        inside[np.maximum(last - k, 0)[last >= k]] = False
    return runs[inside[: len(runs)]], counts


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows): the most selective division of the signature that still finds 90 % of the pairs exactly at the threshold."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.9:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


# -- copies --------------------------------------------------------------------------------------------------------------------
PARTITION = 2**20  # keys sorted at once


def equal_groups(
    n: int, key: Callable[[slice], tuple[NDArray[np.uint64], NDArray[np.bool_]]]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Positions with equal keys: (members, first), where `members` are positions that have an equal before them and `first` the first position of
    each one's group.

    Args:
        key: slice -> (keys uint64, which of them count).
    """
    keys, counted = np.empty(n, dtype=np.uint64), np.empty(n, dtype=bool)
    for at in range(0, n, 2**16):
        of = slice(at, min(n, at + 2**16))
        values, counted[of] = key(of)
        keys[of] = mixed(values)
    partitions = -(-n // PARTITION)
    for part in range(partitions):
        # An even share of all keys: memory for sorting does not grow with n.
        low, high = part * 2**64 // partitions, (part + 1) * 2**64 // partitions - 1
        position = np.flatnonzero(counted & (keys >= np.uint64(low)) & (keys <= np.uint64(high)))
        some = keys[position]
        order = np.argsort(some, kind="stable")
        some, position = some[order], position[order]
        later = np.zeros(len(position), dtype=bool)
        later[1:] = some[1:] == some[:-1]
        first = position[np.maximum.accumulate(np.where(later, 0, np.arange(len(position))))]
        yield position[later], first[later]


class Clusters:
    """Documents joined to sets; the root of a set is its earliest document.

    Args:
        n: documents.
    """

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n, dtype=np.int64 if n >= 2**31 else np.int32)

    def roots(self) -> NDArray[Any]:
        """[n] the root of each document."""
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return self._parent
            self._parent = above

    def join(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Joins document a[i] with document b[i], for every i."""
        parent = self._parent
        for x, y in zip(a.tolist(), b.tolist()):
            while (up := parent[x]) != x:
                parent[x] = parent[up]
                x = up
            while (up := parent[y]) != y:
                parent[y] = parent[up]
                y = up
            if x < y:
                parent[y] = x
            elif y < x:
                parent[x] = y


def join_similar(
    clusters: Clusters,
    signature: Any,
    counted: NDArray[np.bool_],
    threshold: float,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Joins the documents whose estimated Jaccard similarity reaches the threshold.

    Args:
        signature: uint16 [n, PERMUTATIONS], an array or something that is indexed like one.
        counted: which documents have a signature and take part.
    """
    bands, rows = bands_for(threshold)
    factors = np.random.default_rng(rows).integers(0, 2**63, rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for band in range(bands):
        columns = slice(band * rows, (band + 1) * rows)

        def key(of: slice, columns: slice = columns) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
            return mixed((signature[of, columns].astype(np.uint64) * factors).sum(axis=1)), counted[of]

        for members, first in equal_groups(len(signature), key):
            # Each one against the first of its bucket and against its neighbour in it: a chain of versions is found too.
            neighbour = (
                np.where(np.append(True, first[1:] != first[:-1]), first, np.append(first[:1], members[:-1])) if len(members) else first
            )
            for other in (first, neighbour):
                roots = clusters.roots()
                apart = np.flatnonzero(roots[members] != roots[other])
                for at in range(0, len(apart), 2**14):
                    some = apart[at : at + 2**14]
                    alike = (signature[members[some]] == signature[other[some]]).mean(axis=1) >= threshold
                    clusters.join(members[some][alike], other[some][alike])
        progress((band + 1) / bands)


# -- languages -----------------------------------------------------------------------------------------------------------------
LANGUAGES = ("und", "zh", "ja", "ko", "ru", "uk", "ar", "fa", "el", "he", "hi", "th", "en", "de", "fr", "es", "it", "pt", "nl")
_OF_SCRIPT = {GREEK: "el", HEBREW: "he", DEVANAGARI: "hi", SOUTHEAST: "th"}
_STOP_WORDS = {
    "en": "the and of to in is that it for was with as his he be not by but this are from have had at which you they were will what if",
    "de": "der die und das nicht ist ich zu den sie mit ein dem sich des auf für eine von auch als es im wird sind einen einer wir aber",
    "fr": "le la les et des un une du que est pas dans qui pour il ce sur ne au se avec par plus sont elle cette mais nous vous était",
    "es": "el los las que y en un una por con su para es se del como más pero sus este ha muy también hay fue lo sobre está era",
    "it": "il che di e la non per un una sono con del si della più come le dei ma nel gli anche alla è questo delle ha lo era dal",
    "pt": "o os que e da em um uma não para com por se dos na mais como mas foi ao das são pelo também ele à seu",
    "nl": "de het een en van ik te dat die niet is zijn op voor met aan er maar om ook als bij hij wordt naar dan nog zij deze uit",
}
_LANGUAGES_OF = {w: [la for la, ws in _STOP_WORDS.items() if w in ws.split()] for words in _STOP_WORDS.values() for w in words.split()}


def languages_of(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The language of each text by its beginning, 'und' where it does not show, and how many letters were looked at.

    Scripts decide where they can; texts in Latin letters are told by their most frequent words. Simplified and traditional are both 'zh'.
    """
    heads = [text[:4000] for text in texts]
    script = _scripts()[_points("".join(heads))]
    owner = np.repeat(np.arange(len(heads)), [len(h) for h in heads])
    counts = np.bincount(owner * 16 + script, minlength=len(heads) * 16).reshape(-1, 16)
    letters = counts[:, LATIN:].sum(axis=1)
    return [_language(head, row, int(n)) for head, row, n in zip(heads, counts.tolist(), letters)], letters


def _language(text: str, scripts: list[int], letters: int) -> str:
    if letters < 8:
        return "und"
    if scripts[LATIN] > 0.7 * letters:
        return _of_latin(text)
    if scripts[KANA] + scripts[HAN] > 0.3 * letters:
        return "ja" if scripts[KANA] > 0.1 * (scripts[KANA] + scripts[HAN]) else "zh"
    if scripts[HANGUL] > 0.3 * letters:
        return "ko"
    if scripts[CYRILLIC] > 0.5 * letters:
        return "uk" if any(c in text for c in "іїєґ") else "ru"
    if scripts[ARABIC] > 0.5 * letters:
        return "fa" if any(c in text for c in "پچژگ") else "ar"
    for script, language in _OF_SCRIPT.items():
        if scripts[script] > 0.5 * letters:
            return language
    return _of_latin(text) if scripts[LATIN] > 0.5 * letters else "und"


def _of_latin(text: str) -> str:
    """By the most frequent words of each language, if they are enough and one language has more of them than the others."""
    words = text[:2000].lower().replace("'", " ").split()
    found: dict[str, int] = {}
    for word in filter(_LANGUAGES_OF.__contains__, words):
        for language in _LANGUAGES_OF[word]:
            found[language] = found.get(language, 0) + 1
    most = max(found.values(), default=0)
    best = [language for language, n in found.items() if n == most]
    return best[0] if len(best) == 1 and most >= max(2, 0.06 * len(words)) else "und"


def wanted_languages(settings: Text) -> frozenset[str] | None:
    """The languages asked for, without their regions. Raises DataError for one that cannot be told from the others here."""
    if settings.languages is None:
        return None
    wanted = [w.lower().replace("_", "-").partition("-")[0] for w in settings.languages]
    for given, language in zip(settings.languages, wanted):
        if language not in LANGUAGES[1:]:
            raise DataError(
                "data.text.languages: '{given}' cannot be told from other languages; known: {known}",
                "data.text.languages：无法识别语言 '{given}'；可用：{known}",
                given=given,
                known=", ".join(LANGUAGES[1:]),
            )
    return frozenset(wanted)


def foreign(language: str, letters: int, wanted: frozenset[str]) -> Reason | None:
    """Why a document is left out for its language. What is too short to tell is kept."""
    if language in wanted or (language == "und" and letters < TELLING):
        return None
    listed = ", ".join(sorted(wanted))
    return Reason(
        "language",
        f"its language is {'not known' if language == 'und' else language}; data.text.languages = {listed}",
        f"语言{'未知' if language == 'und' else '为 ' + language}；data.text.languages = {listed}",
    )
