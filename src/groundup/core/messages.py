"""English and Chinese side by side: a text is written once, where it is used, in both languages.

`say(en, zh, **values)` gives the sentence in the language of the person at the terminal: `--lang`, else `GROUNDUP_LANG`,
else the locale. There is no catalogue to keep in step, and a missing translation is a missing argument.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

LANGUAGES = ("en", "zh")
SPLITS_ZH = {"train": "训练集", "validation": "验证集", "test": "测试集", "all": "全部数据"}
_chosen: str | None = None


def set_language(language: str | None) -> None:
    """Fixes the language of messages for this process; None goes back to the environment's."""
    global _chosen
    _chosen = language


def language() -> str:
    """'en' or 'zh'."""
    if _chosen:
        return _chosen
    for variable in ("GROUNDUP_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(variable):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def split_name(split: str) -> str:
    """A split as it is called in the user's language."""
    return SPLITS_ZH.get(split, split) if language() == "zh" else split


def typed(path: object) -> str:
    """A path as a command line takes it, in one of Windows too."""
    text = str(path)
    if not re.search(r"[^\w@%+=:,./\\~-]", text):
        return text
    return shlex.quote(text) if os.name != "nt" and re.search(r'["$`\\!]', text) else f'"{text}"'


def fill(template: str, values: dict[str, Any]) -> str:
    """`str.format` only where there are values: texts that quote braces (paths, JSON) stay as they are."""
    return template.format(**values) if values else template


def say(en: str, zh: str, /, **values: Any) -> str:
    """The text in the user's language, with `{names}` filled from `values`."""
    return fill(zh if language() == "zh" else en, values)
