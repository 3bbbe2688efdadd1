"""Lines for a terminal: aligned columns in which a Chinese character takes two, and commands as they are typed."""

from __future__ import annotations

import re
import shlex
import unicodedata
from itertools import zip_longest
from typing import List, Sequence


def shown(command: Sequence[str], windows: bool = False) -> str:
    """A command as it is typed; user names and passwords inside addresses are masked."""
    words = [re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", word) for word in command]
    if not windows:
        return " ".join(shlex.quote(word) for word in words)
    return " ".join('"' + word.replace('"', '\\"') + '"' if re.search(r"[\s<>&|^\"']", word) else word for word in words)


def columns(rows: Sequence[Sequence[str]], indent: str = "  ", limit: int = 80, widest: int = 34) -> List[str]:
    """Rows as aligned lines of at most `limit` columns. A cell that is too long goes on below itself: the last one at the limit, others at `widest`."""
    if not rows:
        return []
    widths = [min(widest, max(width(row[index]) for row in rows)) for index in range(len(rows[0]) - 1)]
    widths.append(max(20, limit - len(indent) - sum(widths) - 2 * len(widths)))
    lines = []
    for row in rows:
        for cells in zip_longest(*(wrapped(cell, wide) for cell, wide in zip(row, widths)), fillvalue=""):
            lines.append((indent + "".join(cell + " " * (wide - width(cell) + 2) for cell, wide in zip(cells, widths))).rstrip())
    return lines


def wrapped(line: str, limit: int) -> List[str]:
    """A line in pieces of at most `limit` columns, broken at spaces and between Chinese characters."""
    pieces, current = [], ""
    # No line begins with a closing mark.
    for part in re.findall(r"(?:[^\s\u2e80-\uffef]+|[\u2e80-\uffef])[，。；：、）]*|\s+", line):
        if current.strip() and width(current + part.rstrip()) > limit:
            pieces.append(current.strip())
            current = ""
        current += part
    return [*pieces, current.strip()] if current.strip() or not pieces else pieces


def width(source: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in source)
