"""From the bytes of a file, a compressed file or a member of an archive to UTF-8: unpacking, encodings, lines."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import importlib
import io
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.data.cleaning import Reason
from groundup.data.items import HEAD, LONGEST, Item
from groundup.data.tree import Archive


class Ends(Exception):
    """Nothing behind this place can be read."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.en)
        self.reason = reason


def damage() -> tuple[type[Exception], ...]:
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


class _Zstd(io.RawIOBase):
    """zstd frames behind each other, unpacked. The package's own reader takes the end of a file that is cut off for the end of the text."""

    def __init__(self, stream: IO[bytes], unpacker: Any) -> None:
        self._stream, self._unpacker, self._frame = stream, unpacker, unpacker.decompressobj()
        self._ready = self._rest = b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data, self._rest = self._rest or self._stream.read(HEAD), b""
            if not data:
                if self._begun and not self._frame.eof:
                    raise EOFError("the zstd frame is cut off")
                return 0
            if self._frame.eof:
                self._frame = self._unpacker.decompressobj()
            self._begun = True
            self._ready = self._frame.decompress(data)
            self._rest = self._frame.unused_data
        taken = self._ready[: len(buffer)]
        self._ready = self._ready[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _unzstd(stream: IO[bytes], name: str) -> Any:
    try:
        return io.BufferedReader(_Zstd(stream, importlib.import_module("zstandard").ZstdDecompressor()), HEAD)
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


# In the middle of a word: accented letters of a European encoding that were taken for halves of characters.
_IN_WORDS = re.compile(r"(?<=[a-z])[^\x00-\x7f](?=[a-z])")


@functools.cache
def _usual(encoding: str) -> frozenset[str]:
    """The characters of the first level of GB 2312 (3,755) or Big5 (5,401): those in use."""
    leads, trails = (
        (range(0xB0, 0xD8), [*range(0xA1, 0xFF)])
        if encoding == "gb18030"
        else (range(0xA4, 0xC7), [*range(0x40, 0x7F), *range(0xA1, 0xFF)])
    )
    made = (bytes((lead, trail)).decode("gb2312" if encoding == "gb18030" else encoding, "ignore") for lead in leads for trail in trails)
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
    for encoding in ("gb18030", "cp950"):  # Big5 as Windows writes it, with seven characters more
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(data, whole)
            letters = [c for c in text[:200_000] if c > "\x7f"]
            frequent = sum(c in _FREQUENT for c in letters) / max(1, len(letters))
            usual = sum(c in _usual(encoding) or c in _FREQUENT for c in letters) / max(1, len(letters))
            if encoding == "gb18030" and usual <= 0.7:  # traditional characters in it, which Big5 has on its first level
                others = _usual("gb18030") | _usual("cp950") | _FREQUENT
                usual = sum(c in others for c in letters) / max(1, len(letters)) if frequent > 0.1 else 0.0
            if len(_IN_WORDS.findall(text[:200_000])) > 0.3 * len(letters):
                continue
            if usual > 0.7 and frequent + 0.1 * usual > best[0]:
                best = frequent + 0.1 * usual, encoding
    if best[1]:
        return best[1], 0
    byte, at = invalid.object[invalid.start], invalid.start
    broken = data.decode("utf-8", "replace").count("\ufffd")
    if sum(c > "\x7f" for c in data.decode("utf-8", "ignore")) > 2 * broken:  # another encoding has hardly two valid ones for each invalid one
        return Reason(
            "encoding",
            f"UTF-8 with damage: not valid at byte {at} (0x{byte:02x}), the first place of {broken:,} (iconv -c -f utf-8 -t utf-8 FILE leaves them out)",
            f"是 UTF-8，但有 {broken:,} 处损坏，第一处在第 {at} 字节（0x{byte:02x}）（iconv -c -f utf-8 -t utf-8 文件 可去掉它们）",
            damaged=True,
        )
    return Reason(
        "encoding",
        f"not text in a known encoding: not UTF-8 at byte {at} (0x{byte:02x}), and neither GB18030 nor Big5 (data.text.encoding=latin-1, or another, says which it is)",
        f"不是已知编码的文本：第 {at} 字节（0x{byte:02x}）不合 UTF-8，也不是 GB18030 或 Big5（可用 data.text.encoding=latin-1 等指明）",
        damaged=True,
    )


def undecodable(error: UnicodeDecodeError, at: int) -> Reason:
    byte = error.object[error.start]
    return Reason(
        "encoding",
        f"not valid {error.encoding.upper()} at byte {at} (0x{byte:02x})",
        f"第 {at} 字节（0x{byte:02x}）不合 {error.encoding.upper()} 编码",
        damaged=True,
    )


def decode(raw: bytes, encoding: str, offset: int) -> str | Reason:
    """Bytes as text, or where they are not; `offset` is where they stand in the file."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        return undecodable(error, offset + error.start)
    if "\0" in text:
        at = offset + raw.find(b"\0")
        return Reason("binary", f"not text: a zero byte at byte {at}", f"不是文本：第 {at} 字节为零", damaged=True)
    return text


class Again(io.RawIOBase):
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
                raise Ends(reason) from error
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


def read_plain(stream: IO[bytes], config: Data) -> Plain:
    """A stream of text of any encoding. Raises Ends where it is not text."""
    head, error = b"", None
    try:
        while len(head) < HEAD and (part := stream.read1(HEAD - len(head))):  # type: ignore[attr-defined]
            head += part
    except damage() as broken:  # in a compressed file: what stands before is good
        error = broken
    if config.text.encoding == "auto":
        told = detect(head, whole=len(head) < HEAD and error is None)
        if isinstance(told, Reason) and told.code == "binary":
            raise Ends(told)
        # Where none fits, the records that are valid UTF-8 can be read, and the others say where they are not.
        encoding, mark = ("utf-8", 0) if isinstance(told, Reason) else told
    else:
        encoding = named_encoding(config.text.encoding)
        mark = len(codecs.BOM_UTF8) if encoding == "utf-8" and head.startswith(codecs.BOM_UTF8) else 0
    again: Any = io.BufferedReader(Again(head[mark:], stream, error), HEAD)
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
            fix_zh="--set data.text.encoding=auto   （或 utf-8、gb18030、big5、latin-1 等）",
        ) from error


def read_up_to(stream: IO[bytes], count: int) -> bytes:
    """`count` bytes, or all there are."""
    parts = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def lines_of(plain: Plain) -> Iterator[tuple[int, bytes | None]]:
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
                raise Ends(too_long())
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


def too_long() -> Reason:
    mib = LONGEST // 2**20
    return Reason("too long to read", f"longer than {mib} MiB", f"超过 {mib} MiB", damaged=True)
