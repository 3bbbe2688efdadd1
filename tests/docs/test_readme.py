"""The READMEs are run: their commands work, in this order, and print what they show (numbers aside)."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundup.cli import main

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh-CN.md"]


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shape(line):
    """A line without its numbers and spacing."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*(e-?\d+)?", "#", line)).strip()


@pytest.mark.parametrize("name", [READMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in READMES[1:])])  # the commands are the same
def test_commands_work_and_print_what_is_shown(name, capsys):
    commands = []
    for block in blocks((ROOT / name).read_text(encoding="utf-8"), "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            elif line.strip() not in ("", "..."):
                commands[-1][1].append(line)
    assert len(commands) >= 14
    for command, expected in commands:
        program, *arguments = shlex.split(command)
        assert program == "groundup"
        assert main([*arguments, "--lang", "zh" if "zh" in name else "en"]) == 0, command
        printed = {shape(line) for line in capsys.readouterr().out.splitlines()}
        for line in expected:
            if not line.startswith("torch "):  # depends on the machine
                assert shape(line) in printed, f"{command} does not print: {line}"


@pytest.mark.parametrize("name", READMES)
def test_python_examples_work(name, capsys):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("digit.png")
    (code,) = blocks((ROOT / name).read_text(encoding="utf-8"), "python")
    exec(compile(code, name, "exec"), {})
    assert "'label'" in capsys.readouterr().out


def test_both_languages_show_the_same_commands():
    def commands(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        return [
            line
            for kind in ("console", "bash", "python")
            for b in blocks(text, kind)
            for line in b.splitlines()
            if line.startswith(("$ ", "python3", "run =", "tuned ="))
        ]

    english, chinese = ([re.split(r"\s{2,}#", c)[0] for c in commands(name)] for name in READMES)
    assert english == chinese
    english, chinese = (len(re.findall(r"^## ", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)) for name in READMES)
    assert english == chinese


def test_the_mistake_looks_as_shown(capsys):
    assert main(["train", "digits-cnn", "--set", "train.learning_rate=0.1", "--lang", "en"]) == 2
    assert capsys.readouterr().err.strip() in (ROOT / "README.md").read_text(encoding="utf-8")
