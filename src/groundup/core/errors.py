"""What can go wrong, as a tree. Every error says what failed with the actual value, what was expected, and what to type next.

    GroundupError            exit 1
    ├── UserError            exit 2: a mistake in what was asked
    │   ├── RecipeError      a key, a type or a combination in a recipe
    │   ├── DataError        files, records, labels
    │   ├── ModelError       unknown or unfit model, damaged model folder
    │   ├── RunError         run folders: existing, locked, changed since
    │   └── EnvError         this machine or its installation
    ├── TrainError           a training that had to stop; its progress is on disk
    ├── GateError            exit 3: findings, a parity gate that failed, or it does not fit
    └── Stopped              exit 130 or 143: Ctrl-C or SIGTERM, after saving

Texts are in English for Python callers (`str(error)`); `localized()` gives the language of the terminal.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from groundup.core.messages import fill, say, typed

KINDS_ZH = {
    "GroundupError": "错误",
    "UserError": "用法错误",
    "RecipeError": "recipe 错误",
    "DataError": "数据错误",
    "ModelError": "模型错误",
    "RunError": "运行目录错误",
    "EnvError": "环境错误",
    "TrainError": "训练错误",
    "GateError": "未通过校验",
    "Stopped": "已停止",
}


class GroundupError(Exception):
    """An error with its words in both languages and the next command to type.

    Args:
        en, zh: what happened, with `{names}` filled from `values`.
        fix, fix_zh: what to type or do next; `fix_zh` only where the fix is a sentence and not a command.
    """

    exit_status = 1

    def __init__(self, en: str, zh: str, /, *, fix: str | None = None, fix_zh: str | None = None, **values: Any) -> None:
        self.en, self.zh, self.values = fill(en, values, "en"), fill(zh, values, "zh"), values
        values = {k: typed(v) if isinstance(v, Path) else v for k, v in values.items()}  # a fix is to be typed
        self.fix_en = fill(fix, values, "en") if fix else None
        self.fix_zh = fill(fix_zh, values, "zh") if fix_zh else self.fix_en
        super().__init__(self.en + (f"\n  Fix: {self.fix_en}" if self.fix_en else ""))

    @property
    def message(self) -> str:
        """The text without the fix, in the terminal's language."""
        return say(self.en, self.zh)

    @property
    def fix(self) -> str | None:
        """What to type next, in the terminal's language."""
        if self.fix_en is None or self.fix_zh is None:
            return None
        return say(self.fix_en, self.fix_zh)

    def localized(self) -> str:
        """Type, message and fix as the terminal shows them."""
        kind = type(self).__name__
        lines = say("{kind}: {message}", "{kind_zh}：{message}", kind=kind, kind_zh=KINDS_ZH.get(kind, kind), message=self.message)
        return lines + (f"\n  {say('Fix: ', '解决办法：')}{self.fix}" if self.fix else "")

    def as_json(self) -> dict[str, Any]:
        return {"error": {"type": type(self).__name__, "message": self.message, "fix": self.fix}}


class UserError(GroundupError, ValueError):
    exit_status = 2


class RecipeError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class RunError(UserError):
    pass


class EnvError(UserError):
    pass


class TrainError(GroundupError):
    pass


class GateError(GroundupError):
    exit_status = 3


class Stopped(GroundupError):
    """Ctrl-C (130) or SIGTERM (143), raised at a step boundary after the checkpoint was written."""

    def __init__(self, en: str, zh: str, /, *, exit_status: int, **values: Any) -> None:
        super().__init__(en, zh, **values)
        self.exit_status = exit_status


def of_system(error: OSError) -> GroundupError:
    """An error of the system that nobody had better words for."""
    code = errno.errorcode.get(error.errno or 0, "")
    full, closed = code in ("ENOSPC", "EDQUOT"), code in ("EACCES", "EPERM", "EROFS")
    return GroundupError(
        "{cause}{where}",
        "{cause}{where_zh}",
        cause=error,
        where=f": {error.filename}" if error.filename else "",
        where_zh=f"：{error.filename}" if error.filename else "",
        fix="free some space, or choose another disk (--out, GROUNDUP_CACHE)" if full else "choose a place that can be written to" if closed else None,
        fix_zh="腾出空间，或换一个磁盘（--out、GROUNDUP_CACHE）" if full else "换一个可以写入的位置" if closed else None,
    )


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest to a mistyped one, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> tuple[str, str]:
    """' Did you mean ...?' in English and Chinese, with the known names where nothing is near; braces in names are escaped for `fill`."""
    names = sorted(known)
    if close := nearest(name, names):
        joined = ", ".join(f"'{c}'" for c in close).replace("{", "{{").replace("}", "}}")
        return f" Did you mean {joined}?", f"是不是 {joined}？"
    if not names:
        return "", ""
    listed = (", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")).replace("{", "{{").replace("}", "}}")
    return f" Known: {listed}.", f"可用的有：{listed}。"


def did_you_mean_path(path: str | Path, known: Iterable[str] = ()) -> tuple[str, str]:
    """As `did_you_mean` for a path that is not there: what stands near it in the last folder of it that is, or else the known names."""
    path = Path(path).expanduser()
    part = next((p for p in (path, *path.parents) if p.parent.is_dir()), path)
    try:
        there = [p.name for p in part.parent.iterdir()]
    except OSError:
        there = []
    close = [str(part.parent / name) for name in nearest(part.name, there)]
    if close or len(path.parts) == 1:
        return did_you_mean(str(part), close if len(path.parts) > 1 else [*close, *known])
    where = str(part.parent.resolve()).replace("{", "{{").replace("}", "}}")
    name = part.name.replace("{", "{{").replace("}", "}}")
    return f" There is no '{name}' in {where}.", f"{where} 里没有 '{name}'。"
