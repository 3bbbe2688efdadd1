"""English or Chinese: `--lang`, else GROUNDUP_LANG, else the locale."""

from __future__ import annotations

import os
import sys
from typing import Dict, Mapping, Optional

Text = Dict[str, str]

LANGUAGES = ("en", "zh")
_WINDOWS_PRIMARY_CHINESE = 0x04


def text(en: str, zh: str) -> Text:
    """One sentence in both languages."""
    return {"en": en, "zh": zh}


def pick(asked: Optional[str] = None, environ: Optional[Mapping[str, str]] = None) -> str:
    """The language of the messages: 'en' or 'zh'."""
    environ = os.environ if environ is None else environ
    for wish in (asked, environ.get("GROUNDUP_LANG")):
        if wish and wish.lower()[:2] in LANGUAGES:
            return wish.lower()[:2]
    # POSIX: the first of these that is set decides. LANGUAGE is left out: it is a list of preferences for GNU gettext.
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environ.get(name):
            return "zh" if environ[name].lower().startswith("zh") else "en"
    return "zh" if _windows_is_chinese() else "en"


def _windows_is_chinese() -> bool:
    if sys.platform != "win32":
        return False
    import ctypes

    return bool((ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF) == _WINDOWS_PRIMARY_CHINESE)
