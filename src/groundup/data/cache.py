"""Prepared data on disk, under `$GROUNDUP_CACHE` (default: the platform's cache folder). Losing it costs time, never results."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files

VERSION = 1  # part of every key: raise it when the meaning of cached bytes changes


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


def bundled(name: str, read: Callable[[Any], dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of a scikit-learn data set; kept, because importing scikit-learn takes longer than training on them."""
    key = f"sklearn-{metadata.version('scikit-learn')}-{name}"
    if (arrays := load(key)) is None:
        from sklearn import datasets

        arrays = {k: np.asarray(v) for k, v in read(datasets).items()}
        store(key, arrays)
    return arrays
