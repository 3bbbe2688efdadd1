"""What a person sees: everything goes to standard error when the answer is JSON, else to standard output.

Colours and moving lines only on a terminal or in a notebook; elsewhere plain lines, without cursor codes.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_console: Console | None = None
_to_stderr = False
_quiet = False


def configure(*, to_stderr: bool = False, quiet: bool = False) -> None:
    """Where sentences go in this process: to stderr for `--json`; nowhere when quiet."""
    global _console, _to_stderr, _quiet
    _to_stderr, _quiet, _console = to_stderr, quiet, None


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Nothing is shown inside."""
    before = _to_stderr, _quiet
    configure(to_stderr=_to_stderr, quiet=True)
    try:
        yield
    finally:
        configure(to_stderr=before[0], quiet=before[1])


def out() -> Console:
    """The console in force."""
    global _console
    if _console is None or _console.file.closed:
        plain = not sys.stdout.isatty() and not _to_stderr
        _console = Console(stderr=_to_stderr, highlight=False, quiet=_quiet, width=100 if plain else None)
    return _console


_WIDE = "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
# What stands on one line: a Chinese character or a word of others, with the brackets and points that belong to it.
_UNIT = re.compile(rf"\s+|[（《「『“‘【]*(?:[{_WIDE}]|[^\s{_WIDE}“”‘’…]+|.)[、，。；：！？）》」』”’】…]*")


def wrapped(text: str, width: int) -> list[str]:
    """Chinese text as lines of at most `width` cells, none of which begins with a closing or ends with an opening mark; what is indented stays so.

    rich breaks lines at blanks alone, and anywhere in what is longer than a line.
    """
    indent = re.match(r" *", text)[0]  # type: ignore[index]
    lines = [""]
    for unit in _UNIT.findall(text):
        if cell_len(lines[-1] + unit.rstrip()) > width and lines[-1].strip():
            lines.append(indent)
        if lines[-1].strip() or unit.strip() or len(lines) == 1:
            lines[-1] += unit
    return [one.rstrip() for one in lines]


class _Cell:
    """Of a table, with Chinese in it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(cell_len(unit) for unit in _UNIT.findall(self._text)), cell_len(self._text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("\n".join(wrapped(self._text, options.max_width)), overflow="fold")


def line(text: str = "", style: str | None = None) -> None:
    """One line as it is (no markup is read from it)."""
    if out().is_terminal and re.search(f"[{_WIDE}]", text):
        text = "\n".join(part for whole in text.split("\n") for part in wrapped(whole, out().width))
    out().print(escape(text), style=style, soft_wrap=not out().is_terminal)  # a terminal wraps between words, a log file not at all


def heading(text: str) -> None:
    line()
    line(text, style="bold")


def command(text: str) -> None:
    """A command that a person may type."""
    out().print(escape(f"  $ {text}"), style="cyan", soft_wrap=True)  # never broken: it is there to be copied


def table(columns: list[str], rows: list[list[Any]], *, right: tuple[int, ...] = ()) -> None:
    """A table that fits the terminal; columns in `right` are aligned right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(escape(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_Cell(str(cell)) if re.search(f"[{_WIDE}]", str(cell)) else escape(str(cell)) for cell in row))
    out().print(made)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told what is being done and which share of it is done."""
    bar = Progress("", 100)
    what = ""

    def told(doing: str, share: float) -> None:
        nonlocal what
        what = bar.title = doing
        bar.update(round(100 * share), "%")

    try:
        yield told
    finally:
        bar.close()


_bars: list[Any] = []  # what is shown on the terminal


class Progress:
    """A line that is rewritten on a terminal; elsewhere a plain line at most every ten seconds, and lines for what matters."""

    def __init__(self, title: str, total: int, completed: int = 0) -> None:
        self.title, self.total = title, total
        self._bar: Any = None
        self._last = time.monotonic()
        terminal = out().is_terminal or out().is_jupyter
        if terminal and not _quiet:
            from rich.progress import Progress as Bar
            from rich.progress import TextColumn

            self._inside = _bars[-1] if _bars else None  # a second line of the one that is shown
            self._bar = self._inside or Bar(TextColumn("{task.description}"), console=out(), transient=True)
            if self._inside is None:
                self._bar.start()
                _bars.append(self._bar)
            self._task = self._bar.add_task(title, total=total, completed=completed)

    def update(self, completed: int, text: str) -> None:
        shown = f"{self.title} {completed} %" if text == "%" else f"{self.title} {completed:,}/{self.total:,}  {text}"
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, description=escape(shown))
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            line(shown)

    def line(self, text: str, *, important: bool = False) -> None:
        if self._bar is not None:
            self._bar.console.print(escape(text), style="yellow" if important else None)
        else:
            line(text, style="yellow" if important else None)

    def close(self) -> None:
        if self._bar is not None:
            if self._inside is not None:
                self._bar.remove_task(self._task)
            else:
                self._bar.stop()
                _bars.remove(self._bar)
            self._bar = None
