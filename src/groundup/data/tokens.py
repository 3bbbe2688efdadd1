"""Text as tokens on disk: one stream of numbers per split, mapped into memory, cut into windows of the context's length.

Documents follow each other in the stream; where each begins is kept. A window is T inputs and their T targets; no token is lost, and the target of a
window's last input is the next token of the same document. In each epoch the windows are cut at another place.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.data import cache
from groundup.data.tokenizers import PIECE, Tokenizer, pieces

IGNORED = -100  # the target of a position from which nothing is to be predicted
BATCH = 4_000_000  # characters that are encoded at once


@dataclass
class TokenStream:
    """The tokens of a split.

    Args:
        tokens: uint16 or uint32 [n], memory-mapped: documents one after the other, each with its begin (and end) token.
        starts: int64 [documents], where each document begins.
        shared: one separator stands between documents, the end of the one and the begin of the next.
        bytes: of the UTF-8 text, for bits per byte.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    shared: bool
    bytes: int

    @property
    def inputs(self) -> int:
        """Positions from which something can be read: all but the last token."""
        return max(0, len(self.tokens) - 1)

    @property
    def supervised(self) -> int:
        """Positions that have a target."""
        return self.inputs if self.shared else self.inputs - max(0, len(self.starts) - 1)

    def windows(self, context: int) -> int:
        return -(-self.inputs // context)

    def fetch(self, index: NDArray[np.int64], context: int, shift: Any = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Windows as (tokens [B, T], targets [B, T], documents [B, T] or None where each row is of one document), int64.

        Args:
            index: [B] numbers of windows.
            shift: [B] or one number: how far the cuts are moved; what is cut off at the end comes first again.
        """
        whole = self.windows(context) * context
        at = (index * context + shift)[:, None] + np.arange(context)
        wrapped, at = np.divmod(at, whole)
        padding = at >= self.inputs
        at = np.minimum(at, self.inputs - 1) if padding.any() else at
        tokens, targets = self.tokens[at].astype(np.int64), self.tokens[at + 1].astype(np.int64)
        if padding.any():
            targets[padding] = IGNORED
        document = np.searchsorted(self.starts, at, side="right")
        if not self.shared:
            following = document.clip(max=len(self.starts) - 1)
            targets[(self.starts[following] == at + 1) & (document < len(self.starts))] = IGNORED
        document += wrapped * (len(self.starts) + 2)
        if padding.any():
            document[padding] = len(self.starts) + 1
        return tokens, targets, None if bool((document == document[:, :1]).all()) else document

    def describe(self, index: int, context: int, name: Callable[[int], str]) -> str:
        """A window's name for a person: the document that it begins in."""
        start = index * context
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        return f"{name(document)}, token {start - int(self.starts[document])}"


def tokenize(
    texts: Callable[[int], Iterable[str]],
    documents: int,
    size: int,
    tokenizer: Tokenizer,
    key: str,
    progress: Callable[[str, float], None] | None = None,
    going_on: NDArray[np.bool_] | None = None,
) -> TokenStream:
    """The stream of a split, from the cache or made now. What an interrupted call has finished is kept.

    Args:
        texts: from document number k of the split on, their texts.
        documents, size: how many, and their UTF-8 bytes.
        key: names the stream in the cache: it must change with the text and with the tokenizer.
        going_on: bool [documents], texts that go on where the one before ends: both are one document of the stream.

    Raises:
        DataError: the disk is full.
    """
    folder = cache.cache_folder() / f"v{cache.VERSION}" / "tokens" / key
    done = folder / "stream.json"
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if not done.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = cache.waited(folder / ".lock")
            try:
                if not done.is_file():  # another process may have made it meanwhile
                    _write(texts, documents, tokenizer, folder, dtype, progress, going_on)
            finally:
                lock.release()
        except OSError as error:
            raise cache.unwritable(folder, error) from error
    facts = files.read_json(done)
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if facts["tokens"] else np.zeros(0, dtype)
    return TokenStream(tokens, np.fromfile(folder / "starts.bin", dtype=np.int64), facts["shared"], size)


def _write(
    texts: Callable[[int], Iterable[str]],
    documents: int,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: Any,
    progress: Callable[[str, float], None] | None,
    going_on: NDArray[np.bool_] | None,
) -> None:
    """Appends document after document; `progress.json` says up to where all files are whole, and a later call cuts them off there."""
    at = {"documents": 0, "tokens": 0, "starts": 0}
    with contextlib.suppress(OSError, ValueError):
        at = files.read_json(folder / "progress.json")
    shared = tokenizer.begin is not None and tokenizer.begin == tokenizer.end
    ending = [] if tokenizer.end is None else [tokenizer.end]
    beginning = [] if tokenizer.begin is None else [tokenizer.begin]
    between = np.array(beginning if shared else [*ending, *beginning], dtype=np.uint32)
    with open(folder / "tokens.bin", "ab") as tokens, open(folder / "starts.bin", "ab") as starts:
        tokens.truncate(at["tokens"] * np.dtype(dtype).itemsize)
        starts.truncate(at["starts"] * 8)
        told = saved = time.monotonic()
        for group in _groups(texts(at["documents"])):
            parts = [list(pieces(text)) for text in group]
            encoded = iter(tokenizer.encode_batch([p for part in parts for p in part]))
            for part in parts:
                if going_on is None or not going_on[at["documents"]]:
                    before = between if at["documents"] else np.array(beginning, dtype=np.uint32)
                    starts.write(np.int64(at["tokens"] + len(before) - len(beginning)).tobytes())
                    at["starts"] += 1
                else:
                    before = between[:0]
                ids = np.concatenate([before, *(next(encoded) for _ in part)])
                tokens.write(ids.astype(dtype).tobytes())
                at["documents"] += 1
                at["tokens"] += len(ids)
            now = time.monotonic()
            if progress is not None and now - told > 0.5:
                progress("tokenising", at["documents"] / documents)
                told = now
            if now - saved > 5:
                for file in (tokens, starts):
                    file.flush()
                    os.fsync(file.fileno())
                files.write_text(folder / "progress.json", json.dumps(at))
                saved = now
        tokens.write(np.array(ending, dtype=dtype).tobytes())
        for file in (tokens, starts):
            file.flush()
            os.fsync(file.fileno())
    files.write_json(folder / "stream.json", {**at, "shared": shared})
    (folder / "progress.json").unlink(missing_ok=True)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of about BATCH characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += max(len(text), 1)
        if size >= BATCH or len(group) >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group
