"""Names, arguments and user code: what is wrong is said with the nearest name."""

import pytest

from groundup.core.errors import DataError, ModelError, RecipeError
from groundup.core.registry import DATASETS, METHODS, MODELS, TASKS, Card, Registry, load_user_module


def test_unknown_names_give_the_nearest():
    with pytest.raises(ModelError, match=r"unknown model 'simple_cn'. Did you mean 'simple_cnn'") as caught:
        MODELS.get("simple_cn")
    assert "没有名为 'simple_cn' 的模型" in caught.value.zh and caught.value.fix == "groundup models"
    with pytest.raises(RecipeError, match="'image-classification'"):
        TASKS.get("image-clasification")
    with pytest.raises(DataError, match="'digits'"):
        DATASETS.get("digit")
    with pytest.raises(RecipeError, match="'freeze'"):
        METHODS.get("freez")
    with pytest.raises(ModelError, match=r"written my/net.py:Name"):
        MODELS.get("my/net.py")


def test_every_entry_has_a_card_in_both_languages():
    for registry in (MODELS, TASKS, DATASETS, METHODS):
        for entry in registry.entries():
            facts = entry.describe()
            assert facts["summary"] and facts["summary_zh"] and facts["source"]


def test_a_name_is_taken_once():
    registry = Registry("thing", "东西", "groundup.models", ModelError)
    card = Card(summary="a", summary_zh="一", source="-")
    registry.register("a", card)(MODELS.get("fcnn").target)
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("a", card)(MODELS.get("linear").target)


# -- arguments -------------------------------------------------------------------------------------------------------------------
def arguments(**given):
    return MODELS.build_arguments(MODELS.get("fcnn"), given, "model")


def test_arguments_are_checked_against_the_signature():
    assert arguments(hidden=[8, 8], dropout=0.5)["dropout"] == 0.5
    with pytest.raises(RecipeError, match=r"unknown key 'model.hiden' for model 'fcnn'. Did you mean 'hidden'"):
        arguments(hiden=[8])
    with pytest.raises(RecipeError, match=r"model.dropout = 'abc' for model 'fcnn': expected a number"):
        arguments(dropout="abc")
    with pytest.raises(RecipeError, match="not true or false"):
        arguments(dropout=True)
    with pytest.raises(RecipeError, match=r"model.hidden = 'wide'"):
        arguments(hidden="wide")


def test_arguments_without_annotations_are_taken_as_they_are(tmp_path):
    (tmp_path / "net.py").write_text("class Net:\n    def __init__(self, input_shape, num_outputs, width, deep=3): pass\n")
    entry = MODELS.get(f"{tmp_path}/net.py:Net")
    assert set(entry.arguments()) == {"width", "deep"}
    assert MODELS.build_arguments(entry, {"width": "abc"}, "model") == {"width": "abc"}
    with pytest.raises(RecipeError, match=r"needs 'model.width'") as caught:
        MODELS.build_arguments(entry, {}, "model")
    assert caught.value.fix == "--set model.width=..."


# -- user code -------------------------------------------------------------------------------------------------------------------
def test_a_missing_file():
    with pytest.raises(RecipeError, match=r"no file gone\.py") as caught:
        MODELS.get("gone.py:Net")
    assert "找不到文件 gone.py" in caught.value.zh


@pytest.mark.parametrize(
    "text, told",
    [
        ("def f(:\n", "SyntaxError"),
        ("import not_there_at_all\n", "ModuleNotFoundError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("raise SystemExit(0)\n", "SystemExit"),
    ],
)
def test_a_file_that_fails(tmp_path, text, told):
    (tmp_path / "user.py").write_text(text)
    with pytest.raises(RecipeError, match=f"failed while it was imported: {told}") as caught:
        load_user_module(tmp_path / "user.py")
    assert caught.value.__cause__ is not None and caught.value.exit_status == 2


def test_a_missing_attribute_gives_the_nearest(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\nclass MyNet(nn.Module): pass\nlimit = 3\n")
    with pytest.raises(ModelError, match=r"has no model 'MyNt'. Did you mean 'MyNet'"):
        MODELS.get(f"{tmp_path}/net.py:MyNt")
    with pytest.raises(ModelError, match="has no model 'limit'"):
        MODELS.get(f"{tmp_path}/net.py:limit")


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder, value in (("甲 一", 1), ("乙", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(f"VALUE = {value}\n", encoding="utf-8")
    first, second = (load_user_module(tmp_path / f / "net.py") for f in ("甲 一", "乙"))
    assert (first.VALUE, second.VALUE) == (1, 2)
    (tmp_path / "乙" / "net.py").write_text("VALUE = 3\n")
    assert load_user_module(tmp_path / "乙" / "net.py").VALUE == 3
