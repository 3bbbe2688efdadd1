"""What a source of text consists of: parts of a mixture, files and other items of documents, the records found in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from groundup.data.cleaning import Reason
from groundup.data.tree import Archive

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
SKIPPED = frozenset({"__pycache__", "node_modules", "__MACOSX"})


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


def kind_of(name: str) -> str:
    """The kind of file by its name: 'file' (a text), 'jsonl', 'json', 'table', 'parquet', or '' for what is not text."""
    lower = name.rpartition("/")[2].lower()
    lower = lower.removesuffix(".gz").removesuffix(".zst")
    stem, dot, suffix = lower.rpartition(".")
    if not stem:
        return "file" if lower in UNSUFFIXED else ""
    return KINDS.get(dot + suffix, "file" if dot + suffix in PROSE or dot + suffix in CODE else "")
