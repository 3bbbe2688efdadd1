"""`groundup data show|check` as a person types it: exit status, both languages, never a traceback."""

import json

import numpy as np
import pytest
from PIL import Image

from groundup import cli


@pytest.fixture
def typed(capsys):
    """typed('data', 'show', ...) -> (exit status, stdout, stderr)."""

    def run(*arguments):
        status = cli.main([str(a) for a in arguments])
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        return status, told.out, told.err

    return run


def test_show(typed, folder, tmp_path):
    status, out, err = typed("data", "show", folder, "--grid", tmp_path / "新 目录" / "grid.png")
    assert status == 0 and "24 records" in out and "猫 cat" in out and err == ""
    with Image.open(tmp_path / "新 目录" / "grid.png") as sheet:
        sheet.verify()
    status, out, err = typed("data", "show", folder, "--json")
    assert status == 0 and json.loads(out)["records"] == 24


def test_show_decides_between_classes_and_numbers(typed, csv):
    assert "target: 0 .. 58.5" in typed("data", "show", csv("a,t\n" + "".join(f"{i},{i * 1.5}\n" for i in range(40))))[1]
    assert "class" in typed("data", "show", "iris")[1]


def test_check_finds_and_its_status_says_so(typed, csv, folder):
    assert typed("data", "check", "digits#500")[0] == 0
    holes = csv("a,target\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(30)) + ",x\n")
    status, out, _ = typed("data", "check", holes)
    assert status == 3 and "1 records cannot be used" in out and "line 32" in out
    assert typed("data", "check", holes, "--set", "data.on_bad_record=skip")[0] == 0
    (folder / "狗" / "坏.png").write_bytes(b"x")
    status, out, _ = typed("data", "check", folder, "--lang", "zh")
    assert status == 0 and "1 条记录无法使用" in out and "不是图片" in out
    assert typed("data", "check", folder, "--set", "data.on_bad_record=stop")[0] == 3


@pytest.mark.parametrize("lang, words", [("en", "Fix"), ("zh", "解决办法")])
def test_mistakes_exit_with_2_in_both_languages(typed, tmp_path, csv, lang, words):
    (tmp_path / "空 目录").mkdir()
    np.savez(tmp_path / "wrong.npz", a=1)
    for spec in (tmp_path / "空 目录", tmp_path / "wrong.npz", "no such thing", csv("a,b,t\n1,x,2\n"), "gone.py:f", "hub:nobody/nothing"):
        for verb in ("show", "check"):
            status, out, err = typed("data", verb, spec, "--lang", lang)
            assert status == 2 and out == "" and words in err


def test_a_mistake_as_json(typed):
    status, out, _ = typed("data", "show", "digitss", "--json", "--lang", "zh")
    error = json.loads(out)["error"]
    assert status == 2 and error["type"] == "DataError" and "没有数据 'digitss'" in error["message"]


@pytest.mark.parametrize(
    "assignment, told",
    [
        ("data.splitt.test=0.1", "data.splitt"),
        ("data.split.test=lots", "'lots'"),
        ("data.split", "KEY=VALUE"),
        ("data.on_bad_record=maybe", "'skip'"),
    ],
)
def test_settings_that_are_wrong(typed, assignment, told):
    status, _, err = typed("data", "show", "digits", "--set", assignment)
    assert status == 2 and told in err


def test_a_grid_that_cannot_be_written(typed, tmp_path):
    status, _, err = typed("data", "show", "digits#100", "--grid", tmp_path)
    assert status == 2 and "the grid cannot be written" in err and "grid.png" in err
    assert list(tmp_path.parent.glob(".*tmp-*")) == []
