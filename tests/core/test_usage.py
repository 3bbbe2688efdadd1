"""What typer says of a wrong command line, in Chinese: a new wording of a new version would show up here."""

import pytest

from groundup import cli
from groundup.core.usage import help_in_chinese


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune"], "缺少参数 'MODEL'"),
        (["tune", "m"], "缺少选项 '--data'"),
        (["tune", "m", "--data"], "选项 '--data' 后面缺少值"),
        (["tune", "m", "--nosuch"], "没有选项 --nosuch；是否想用"),
        (["runs", "list", "--qqqq"], "没有选项 --qqqq"),
        (["trian"], "没有命令 'trian'；是否想用 'train'？"),
        (["zzzz"], "没有命令 'zzzz'"),
        (["runs", "verify", "a", "b"], "多余的参数：b"),
        (["runs", "list", "--json=1"], "选项 '--json' 不带值"),
        (["generate", "m", "--temperature", "abc"], "'--temperature' 的值无效：应为数"),
        (["generate", "m", "--max-tokens", "0"], "'--max-tokens' 的值无效：应 >= 1"),
    ],
)
def test_wrong_command_lines(words, told, capsys):
    assert cli.main(["--lang", "zh", *words]) == 2
    assert told in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["tune", "--help"]) == 0
    text = help_in_chinese(capsys.readouterr().out)
    assert all(word not in text for word in ("Usage", "Options:", "Arguments:", "[required]", "[default: ", "Show this message"))
