"""Where named files lie: a folder, or a zip or tar archive that is read in place (a compressed tar is unpacked once, into the cache)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from groundup.core import files
from groundup.core.errors import DataError
from groundup.data.cache import cache_folder

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST = 2**29  # bytes of one member: an archive of a few kilobytes can claim files that fill the memory


class Tree(ABC):
    """Files by name, as 'cats/01.jpg' (always with '/'); the same in every process that holds it."""

    name: str

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Every file, sorted part by part; hidden ones (.ipynb_checkpoints holds copies) and __MACOSX are left out."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's bytes. Raises OSError or ValueError."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def where(self, name: str) -> str:
        """The place of a file, for messages."""

    def shown(self, name: str) -> str:
        """A file's name for a person."""
        return str(Path(name))


class Folder(Tree):
    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name

    @cached_property
    def names(self) -> list[str]:  # type: ignore[override]
        found = []
        for parent, folders, names in os.walk(self.root, followlinks=False):
            folders[:] = [f for f in folders if _shown(f)]
            place = Path(parent).relative_to(self.root)
            found += [(place / n).as_posix() for n in names if _shown(n)]
        return _sorted(found)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def has(self, name: str) -> bool:
        try:
            return (self.root / name).is_file()
        except (OSError, ValueError):  # a cell that cannot be a file name
            return False

    def where(self, name: str) -> str:
        return str(self.root / name)


class Archive(Tree):
    """A zip or tar. Members are only read, never written anywhere, so names like '../x' can do no harm.

    Raises:
        DataError: damaged, encrypted, or not an archive.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        try:
            if path.suffix.lower() == ".zip":
                self._members = self._of_zip()
            else:
                self._tar = path if path.suffix.lower() == ".tar" else _unpacked(path)
                self._members = self._of_tar()
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, NotImplementedError) as error:
            raise DataError(
                "{path} cannot be read as an archive: {cause}", "无法把 {path} 作为压缩包读取：{cause}", path=path, cause=error
            ) from error

    def _of_zip(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise DataError("{path} is encrypted", "{path} 已加密", path=self.path, fix="unpack it first", fix_zh="请先解压")
                if not info.is_dir():
                    found[_zip_name(info)] = info.filename
        return found

    def _of_tar(self) -> dict[str, Any]:
        with tarfile.open(self._tar, "r:") as archive:
            return {PurePosixPath(m.name).as_posix(): (m.offset_data, m.size) for m in archive if m.isfile()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zip": None}

    @cached_property
    def names(self) -> list[str]:  # type: ignore[override]
        return _sorted([n for n in self._members if all(_shown(part) for part in n.split("/"))])

    def read(self, name: str) -> bytes:
        member = self._members[name]
        if isinstance(member, tuple):
            offset, size = member
            _bounded(size)
            with open(self._tar, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) < size:
                raise OSError("the archive is cut off")
            return data
        if self._zip is None or self._zip[0] != os.getpid():  # after a fork the two processes would move one file's position
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        _bounded(self._zip[1].getinfo(member).file_size)
        try:
            return self._zip[1].read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"damaged in the archive: {error}") from error

    def has(self, name: str) -> bool:
        return name in self._members

    def where(self, name: str) -> str:
        return f"{self.path}:{name}"


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def _shown(part: str) -> bool:
    return not part.startswith(".") and part != "__MACOSX"


def _sorted(names: list[str]) -> list[str]:
    return sorted(names, key=lambda n: n.split("/"))


def _bounded(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{files.human_bytes(size)}, more than a picture can be")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; old zips of Chinese Windows hold GBK bytes, which zipfile takes for cp437."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        raw = name.encode("cp437", errors="replace")
        for encoding in ("utf-8", "gb18030"):  # two GBK bytes can be valid UTF-8 too: what reads as Chinese is right
            with contextlib.suppress(UnicodeDecodeError):
                read = raw.decode(encoding)
                if any("\u3400" <= c <= "\u9fff" for c in read):
                    name = read
                    break
    return name.replace("\\", "/")


def _unpacked(path: Path) -> Path:
    """The plain tar of a compressed one, in the cache: inside a compressed stream nothing can be found without reading all before it."""
    kind = {"gz": "gzip", "tgz": "gzip", "bz2": "bz2", "xz": "lzma"}[path.name.lower().rpartition(".")[2]]
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:32]
    made = cache_folder() / "archives" / f"{key}.tar"
    if made.is_file():
        return made
    temporary = files.temporary_sibling(made)
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        with importlib.import_module(kind).open(path, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        os.replace(temporary, made)
    except OSError as error:
        if error.errno is None:  # the compressed data itself is damaged
            raise
        raise DataError(
            "{path} has to be unpacked into {folder}, and that failed: {cause}",
            "{path} 需要解压到 {folder}，但失败了：{cause}",
            path=path,
            folder=made.parent,
            cause=error,
            fix="set GROUNDUP_CACHE to a folder with room, or unpack it yourself",
            fix_zh="把 GROUNDUP_CACHE 设为空间充足的目录，或自行解压",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return made
