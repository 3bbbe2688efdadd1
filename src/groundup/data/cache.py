"""Prepared data on disk, under `$GROUNDUP_CACHE` (default: the platform's cache folder). Losing it costs time, never results."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.core.errors import DataError, RunError
from groundup.core.run import Lock

VERSION = 3  # part of every key: raise it when the meaning of cached bytes changes


def waited(path: Path, told: Callable[[str, str], None] | None = None) -> Lock:
    """The lock of something in the cache that is being made; where another process makes it, after that one has ended."""
    lock = Lock(path)
    while True:
        try:
            lock.acquire()
            return lock
        except RunError as busy:
            pid = busy.values["pid"]
            if told is not None:
                told(f"waiting for process {pid}, which prepares the same text", f"等待进程 {pid} 准备同一份文本")
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return lock


def unwritable(folder: Path, error: OSError) -> DataError:
    """What is said where tokens cannot be written into the cache."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return DataError(
        "the tokens cannot be written to {folder}: {why} ({free} are free)",
        "无法把词元写到 {folder}：{why}（剩余 {free}）",
        folder=folder,
        why=error,
        free=files.human_bytes(shutil.disk_usage(there).free),
        fix="free some space and run it again, or put the cache elsewhere: GROUNDUP_CACHE=FOLDER",
        fix_zh="腾出空间后再运行一次，或换一个缓存目录：GROUNDUP_CACHE=目录",
    )


def cache_folder() -> Path:
    if given := os.environ.get("GROUNDUP_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "groundup"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/groundup").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "groundup"


def load(key: str) -> dict[str, NDArray[Any]] | None:
    """The arrays stored under a key, or None. Damaged entries count as absent."""
    path = cache_folder() / f"v{VERSION}" / f"{key}.npz"
    try:
        # Opened here: numpy leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:  # zipfile.BadZipFile and zlib.error, without importing both for a path rarely taken
        if type(error).__name__ in ("BadZipFile", "error"):
            return None
        raise


def store(key: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Keeps arrays under a key. A cache that cannot be written (full, read-only) is only slower."""
    path = cache_folder() / f"v{VERSION}" / f"{key}.npz"
    temporary = files.temporary_sibling(path).with_suffix(".npz")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def pixel_file(key: str) -> Path:
    """Where the raw pixels of a set of pictures are kept: a .npy file, uint8 [N, C, H, W]."""
    return cache_folder() / f"v{VERSION}" / f"{key}.pixels.npy"


class PixelWriter:
    """Writes raw pixels, picture by picture in any order, from any thread; the file is there when `finish` was called and not before.

    A disk that fills up ends the writing, not the work: `finish` then gives None.
    """

    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self._path = pixel_file(key)
        self._temporary = files.temporary_sibling(self._path)
        self._size = math.prod(shape[1:])
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self._temporary, "wb")
            np.lib.format.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
            self._start = self._file.tell()
            # The whole length is taken now: a mapped file that cannot grow would end the process with SIGBUS.
            self._file.truncate(self._start + math.prod(shape))

    def put(self, i: int, pixels: NDArray[np.uint8]) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.seek(self._start + i * self._size)
                if self._file.write(pixels.tobytes()) != self._size:
                    raise OSError("the disk is full")
            except OSError:
                self._give_up()

    def finish(self) -> Path | None:
        if self._file is None:
            return None
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        except OSError:
            self._give_up()
            return None
        self._file = None
        return self._path

    def close(self) -> None:
        """Leaves nothing half-written behind."""
        with self._lock:
            if self._file is not None:
                self._give_up()

    def _give_up(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def bundled(name: str, read: Callable[[Any], dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of a scikit-learn data set; kept, because importing scikit-learn takes longer than training on them."""
    key = f"sklearn-{metadata.version('scikit-learn')}-{name}"
    if (arrays := load(key)) is None:
        from sklearn import datasets

        arrays = {k: np.asarray(v) for k, v in read(datasets).items()}
        store(key, arrays)
    return arrays
