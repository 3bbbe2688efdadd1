"""What typer itself says of a command line, in Chinese; in English it stays as it is."""

from __future__ import annotations

import re

_SENTENCES = [  # whole messages; what stands in parentheses is filled in
    (r"Missing argument (.+)\.", "缺少参数 {0}"),
    (r"Missing option (.+)\.", "缺少选项 {0}"),
    (r"Missing command\.", "缺少命令"),
    (r"No such option: (\S+)", "没有选项 {0}"),
    (r"No such option: (\S+) (?:Did you mean (.+)\?|\(Possible options: (.+)\))", "没有选项 {0}；是否想用 {1}？"),
    (r"No such command (.+?)\.", "没有命令 {0}"),
    (r"No such command (.+?)\. Did you mean (.+)\?", "没有命令 {0}；是否想用 {1}？"),
    (r"Option (.+) requires an argument\.", "选项 {0} 后面缺少值"),
    (r"Option (.+) requires (\d+) arguments\.", "选项 {0} 后面应有 {1} 个值"),
    (r"Option (.+) does not take a value\.", "选项 {0} 不带值"),
    (r"Got unexpected extra arguments? \((.+)\)", "多余的参数：{0}"),
    (r"Got unexpected extra argument\(s\) \((.+)\)", "多余的参数：{0}"),
    (r"Invalid value for (.+?): (.+)", "{0} 的值无效：{1}"),
    (r"Invalid value: (.+)", "值无效：{0}"),
    (r"Input should be a valid integer\b.*", "应为整数"),
    (r"Input should be a valid number\b.*", "应为数"),
    (r"Input should be greater than or equal to (.+)", "应 >= {0}"),
    (r"Input should be greater than (.+)", "应 > {0}"),
    (r"Input should be less than or equal to (.+)", "应 <= {0}"),
    (r"Input should be less than (.+)", "应 < {0}"),
    (r"Input should be ('.+)", "应为 {0}"),
]
_HELP = [
    (r"^Usage: ", "用法："),
    (r"^Arguments:$", "参数："),
    (r"^Options:$", "选项："),
    (r"<int range>", "<整数>     "),
    (r"<float range>", "<小数>       "),
    (r"<list\[str\]>", "<文本>     "),
    (r"^Commands:$", "命令："),
    (r"\[OPTIONS\]", "[选项]"),
    (r"COMMAND \[ARGS\]\.\.\.", "命令 [参数]..."),
    (r"\[required\]", "[必填]"),
    (r"\[default:(?: |(?=$))", "[默认："),
    (r"Show this message and exit\.", "显示本说明并退出。"),
]


def in_chinese(message: str) -> str:
    """One of typer's messages; a message that is not known stays."""
    for pattern, chinese in _SENTENCES:
        if found := re.fullmatch(pattern, message.strip(), re.DOTALL):
            return chinese.format(*(in_chinese(g).replace("' or '", "' 或 '") for g in found.groups() if g is not None))
    return message


def help_in_chinese(text: str) -> str:
    """The frame that typer puts around our own words."""
    for pattern, chinese in _HELP:
        text = re.sub(pattern, chinese, text, flags=re.MULTILINE)
    return text
