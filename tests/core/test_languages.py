"""Every sentence for people is written in English and in Chinese, where it is used."""

import ast
import errno
import re
import string
from pathlib import Path

import pytest
from rich.cells import cell_len

import groundup
from groundup.core import console, errors
from groundup.core.errors import DataError

ROOT = Path(groundup.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.GroundupError)}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def texts(node):
    """All literal pieces of an argument: a plain text, an f-string, a sum or a choice of them."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def without_values(text):
    return re.sub(r"\{[^}]*\}", "", text)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else None
            if name == "say" or (name in ERRORS and not isinstance(node.func, ast.Attribute)):
                yield name, node


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_both_languages(path):
    for name, node in calls(path):
        where = f"{path.relative_to(ROOT)} line {node.lineno}: {name}"
        first = [a for a in node.args if not isinstance(a, ast.Starred)]
        assert len(first) == len(node.args) == 2 or any(isinstance(a, ast.Starred) for a in node.args), f"{where} needs two texts"
        if len(first) < 2:
            continue
        english, chinese = (" ".join(texts(a)) for a in first)
        assert not CHINESE.search(without_values(english)), f"{where}: Chinese in the English text"
        words = re.sub(r"[\W\d_]+", "", without_values(chinese))
        if words and chinese != english and isinstance(first[1], ast.Constant):
            assert CHINESE.search(chinese), f"{where}: no Chinese in {chinese!r}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_both_languages_name_the_same_values(path):
    """What is told in one language is told in the other; a value of its own may carry the suffix _zh, or be called en and zh."""
    for name, node in calls(path):
        if len(node.args) != 2 or not all(isinstance(a, ast.Constant) for a in node.args):
            continue
        english, chinese = (
            {n.split(":")[0].removesuffix("_zh").replace("zh", "en") for n in re.findall(r"\{(\w+[^}]*)\}", a.value)} for a in node.args
        )
        assert english == chinese, f"{path.relative_to(ROOT)} line {node.lineno}: {name} tells {english ^ chinese} in one language only"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_every_value_that_a_text_names_is_given(path):
    """A text with braces of its own beside values would fail in the moment when it is needed."""
    for name, node in calls(path):
        given = {k.arg for k in node.keywords} - {"fix", "fix_zh", "exit_status"}
        if not given or None in given:
            continue
        for part in [*node.args, *(k.value for k in node.keywords if k.arg in ("fix", "fix_zh"))]:
            for text in texts(part) if isinstance(part, ast.Constant) else []:
                named = {re.split(r"[.\[]", field)[0] for _, field, _, _ in string.Formatter().parse(text) if field is not None}
                assert named <= given, f"{path.relative_to(ROOT)} line {node.lineno}: {name} does not give {named - given} of {text!r}"


def test_the_system_s_words_come_in_both_languages():
    error = DataError("cannot write: {cause}", "无法写入：{cause}", cause=OSError(errno.ENOSPC, "No space left on device"))
    assert error.en == "cannot write: No space left on device" and error.zh == "无法写入：磁盘空间已满"
    assert DataError("{cause}", "{cause}", cause=OSError("torn")).zh == "torn"


def test_chinese_lines_break_as_chinese_does():
    text = "    训练 20 步之后，损失从 0.8227 变到 96.2（学习率 lr=1.0 过高）；请改用 lr=0.001，或者加上预热。"
    for width in range(16, 60):
        lines = console.wrapped(text, width)
        assert all(cell_len(one) <= width and one.startswith("    ") for one in lines)
        assert not any(one.strip()[0] in "，。；：）" or one[-1] in "（" for one in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert console.wrapped("", 20) == [""] and console.wrapped("中文" * 3, 4) == ["中文"] * 3
    assert console.wrapped("一个/很长的路径/" + "x" * 90, 20)[-1].endswith("x" * 90)  # rich folds it
