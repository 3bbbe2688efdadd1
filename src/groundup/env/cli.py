"""`groundup env ...`: also `python -m groundup.env ...`, and `python start.py env ...` on a machine that has nothing but Python.

Each verb is a module with `configure(parser)` and `run(options)`; only the one that is asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import Any, NoReturn, Optional, Sequence, Type

from groundup.env.language import LANGUAGES, pick

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

# verb: (module, prefix of its two functions, help in both languages)
VERBS = {
    "info": ("info", "", "what this machine is", "本机环境"),
    "doctor": ("doctor", "", "what is wrong here, or on the machine of a pasted report", "诊断本机或粘贴的报告"),
    "plan": ("plan", "", "which build of torch, why, and the commands", "应安装哪个 torch 构建、原因与命令"),
    "install": ("install", "", "carry the plan out in a venv, then verify", "按计划安装到 venv 并验证"),
    "verify": ("verify", "", "does torch compute, and how fast", "验证 torch 的计算结果与速度"),
    "driver": ("driver", "", "what to do about the GPU driver on this system", "本系统的 GPU 驱动该怎么处理"),
    "lock": ("lock", "_lock", "write down what this environment is", "记录当前环境"),
    "diff": ("lock", "_diff", "tell two machines apart", "比较两台机器"),
    "knowledge": ("guide", "_knowledge", "the facts behind the answers, with their sources", "判断所依据的事实与来源"),
    "guide": ("guide", "_guide", "the guide for an operating system", "各操作系统的安装指南"),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command of the environment stage; returns the exit status (argparse ends with 2 on a wrong argument)."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter gets a mark for it instead of a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser(arguments).parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return DONE


TITLES_ZH = {"usage: ": "用法：", "positional arguments": "参数", "options": "选项", "optional arguments": "选项"}


def _one(words: str, zh: bool) -> str:
    """Of a text `English / Chinese` one half."""
    english, _, chinese = words.rpartition(" / ")
    return words if not english else chinese if zh else english


def _in(language: str) -> Type[argparse.HelpFormatter]:
    """Writes help in one language."""
    zh = language == "zh"

    class Formatter(argparse.HelpFormatter):
        def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Optional[str] = None) -> None:
            super().add_usage(usage, actions, groups, TITLES_ZH["usage: "] if zh and prefix is None else prefix)

        def start_section(self, heading: Optional[str]) -> None:
            super().start_section(TITLES_ZH.get(heading or "", heading) if zh else heading)

        def add_text(self, text: Optional[str]) -> None:
            super().add_text(_one(text, zh) if text and text is not argparse.SUPPRESS else text)

        def _get_help_string(self, action: argparse.Action) -> Optional[str]:
            if zh and action.dest == "help":
                return "显示此帮助并退出"
            return _one(action.help, zh) if action.help else action.help

    return Formatter


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in the user's language, and what to type next."""

    zh = False

    def error(self, message: str) -> NoReturn:
        if self.zh:
            for english, chinese in ERRORS_ZH:
                message = re.sub(english, chinese, message)
        print("{}{}\n  {}{} --help".format("错误：" if self.zh else "error: ", message, "解决办法：" if self.zh else "Fix: ", self.prog), file=sys.stderr)
        raise SystemExit(REFUSED)


ERRORS_ZH = (
    (r"the following arguments are required: (.+)", r"缺少参数 \1"),
    (r"argument (\S+): invalid choice: (\S+) \(choose from (.+)\)", r"没有 \2；可用：\3"),
    (r"unrecognized arguments: (.+)", r"无法识别的参数：\1"),
    (r"argument (\S+): expected one argument", r"\1 后面缺少值"),
    (r"argument (\S+): invalid (\S+) value: (.+)", r"\1 的值无效：\3"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 不能与 \2 同用"),
)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    wished = [after for word, after in zip(arguments, [*arguments[1:], ""]) if word == "--lang"] + [w[7:] for w in arguments if w.startswith("--lang=")]
    language = pick(wished[0] if wished else None)
    form = _in(language)
    _Parser.zh = language == "zh"
    parser = _Parser(
        prog="groundup env",
        formatter_class=form,
        description="The environment: what is here, what is wrong, which torch fits, and how to install it. / 环境：有什么、哪里不对、装哪个 torch、怎么装。",
        epilog="Each verb has --json and --lang en|zh, and tells more with --help. / 每个命令都有 --json 与 --lang en|zh，--help 查看详细说明。",
    )
    # The two options every command has: before or after the command's name.
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for place in (common, parser):
        place.add_argument("--json", action="store_true", help="exactly one JSON object on stdout / 只输出一个 JSON 对象")
        place.add_argument("--lang", choices=LANGUAGES, help="language of the messages / 提示语言")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True
    asked = next((word for word in arguments if word in VERBS), None)
    for verb, (module, suffix, en, chinese) in VERBS.items():
        both = "{} / {}".format(en, chinese)
        made = commands.add_parser(verb, parents=[common], formatter_class=form, help=both, description=both)
        if verb == asked:
            home = importlib.import_module("groundup.env." + module)
            getattr(home, "configure" + suffix)(made)
            made.set_defaults(run=getattr(home, "run" + suffix))
    return parser
