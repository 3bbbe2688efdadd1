"""English and Chinese side by side: a text is written once, where it is used, in both languages.

`say(en, zh, **values)` gives the sentence in the language of the person at the terminal: `--lang`, else `GROUNDUP_LANG`,
else the locale. There is no catalogue to keep in step, and a missing translation is a missing argument.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from typing import Any

LANGUAGES = ("en", "zh")
SPLITS_ZH = {"train": "训练集", "validation": "验证集", "test": "测试集", "all": "全部数据"}
OS_ZH = {
    "ENOSPC": "磁盘空间已满", "EDQUOT": "超出磁盘配额", "EFBIG": "文件超出大小限制", "EROFS": "文件系统只读", "EACCES": "没有权限",
    "EPERM": "系统不允许此操作", "ENOENT": "文件或目录不存在", "EEXIST": "已存在", "EISDIR": "这是一个目录", "ENOTDIR": "路径中有一段不是目录",
    "ENAMETOOLONG": "文件名过长", "EIO": "读写出错", "ENOMEM": "内存不足", "EMFILE": "打开的文件过多", "EBUSY": "正被占用",
    "EADDRINUSE": "地址已被占用",
}  # fmt: skip
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


def cause_of(error: OSError, language: str) -> str:
    """What the system says of a call that failed."""
    said = error.strerror or str(error) or type(error).__name__
    return OS_ZH.get(errno.errorcode.get(error.errno or 0, ""), said) if language == "zh" else said


def fill(template: str, values: dict[str, Any], language: str) -> str:
    """`str.format` only where there are values: texts that quote braces (paths, JSON) stay as they are. Errors of the system are put into words."""
    return template.format(**{k: cause_of(v, language) if isinstance(v, OSError) else v for k, v in values.items()}) if values else template


def say(en: str, zh: str, /, **values: Any) -> str:
    """The text in the user's language, with `{names}` filled from `values`."""
    return fill(zh if language() == "zh" else en, values, language())
