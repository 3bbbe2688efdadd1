"""The recipe: every mistake is named with its key, its line and the nearest name, in both languages; nothing is read differently than it looks."""

import copy
import json

import pytest

from groundup.core.errors import RecipeError
from groundup.core.messages import set_language
from groundup.core.recipe import Recipe, differences, load, override, parse_set, parse_yaml, shipped

MINIMAL = {"name": "x", "task": "image-classification", "data": {"source": "digits"}, "model": "fcnn"}
TEXT = "name: x\ntask: image-classification\ndata:\n  source: digits\nmodel: fcnn\n"


def refused(recipe, overrides=None):
    with pytest.raises(RecipeError) as caught:
        load(recipe, overrides or {})
    return caught.value


def written(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize(
    "lines, line, key, suggestion",
    [
        ("train:\n  learning_rate: 1e-3\n", 7, "train.learning_rate", "optim.lr"),
        ("optim:\n  learning_rate: 1e-3\n", 7, "optim.learning_rate", "optim.lr"),
        ("epochs: 3\n", 6, "epochs", "train.epochs"),
        ("train:\n  epoch: 3\n", 7, "train.epoch", "train.epochs"),
        ("schedule:\n  warmpu: 0.1\n", 7, "schedule.warmpu", "schedule.warmup"),
        ("watch:\n  log_evry: 3\n", 7, "watch.log_evry", "watch.log_every"),
        ("evaluate:\n  metrics: accuracy\n", 7, "evaluate.metrics", "evaluate.metric"),
        ("optimizer: sgd\n", 6, "optimizer", "optim.name"),
        ("train:\n  early_stopping:\n    patienc: 3\n", 8, "train.early_stopping.patienc", "train.early_stopping.patience"),
    ],
)
def test_unknown_key_names_the_line_and_the_nearest(tmp_path, lines, line, key, suggestion):
    error = refused(written(tmp_path / "mine.yaml", TEXT + lines))
    assert f"unknown key '{key}'" in str(error)
    assert f"line {line})" in str(error)
    assert f"'{suggestion}'" in str(error)
    assert f"第 {line} 行" in error.zh and f"'{suggestion}'" in error.zh


@pytest.mark.parametrize(
    "key, suggestion",
    [("data.split.tset", "data.split.test"), ("data.augment.shft", "data.augment.shift"), ("data.image.sise", "data.image.size")],
)
def test_unknown_key_inside_data(key, suggestion):
    assert f"'{suggestion}'" in str(refused(MINIMAL, {key: 1}))


def test_unknown_key_inside_a_mixture():
    error = refused(MINIMAL, {"data.source": [{"source": "a", "weigth": 1}, {"source": "b", "weight": -1}]})
    assert "'data.source.0.weigth'" in str(error) and "'data.source.weight'" in str(error)
    assert "data.source.1.weight = -1" in str(error)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("train.batch_size", 2.5, "a whole number"),
        ("train.batch_size", 0, "a number > 0"),
        ("train.batch_size", True, "not true or false"),
        ("train.ema", 1, "a number < 1"),
        ("train.epochs", "many", "a number"),
        ("train.steps", "lots", "write a whole positive number"),
        ("train.save_every", "10 parsecs", "60s"),
        ("train.save_every", 0, "a number > 0"),
        ("train.seed", -1, "a number >= 0"),
        ("train.compile", "maybe", "true or false"),
        ("optim.lr", -1, "a number > 0"),
        ("optim.lr", float("inf"), "a finite number"),
        ("optim.lr", float("nan"), "a finite number"),
        ("optim.lr", True, "not true or false"),
        ("optim.name", "adamx", "'adamw'"),
        ("optim.betas", [0.9], "another value"),
        ("optim", 3, "{name: ...}"),
        ("schedule.warmup", 1, "a number < 1"),
        ("data.augment.rotate", 500, "a number <= 180"),
        ("data.augment.flip", 2, "a number <= 1"),
        ("data.source", ["a", "b"], "{source: ...}"),
        ("data.image.channels", 2, "1, 3"),
        ("name", "a b", "letters, digits"),
        ("watch.trackers", 3, "a list"),
    ],
)
def test_wrong_values_say_what_is_expected(key, value, expected):
    error = refused(MINIMAL, {key: value})
    assert key in str(error) and expected in str(error)
    assert "来自 --set" in error.zh
    assert "expected" not in error.zh and "should be" not in error.zh


def test_all_problems_are_reported_together(tmp_path):
    error = refused(written(tmp_path / "m.yaml", TEXT + "train:\n  batch_size: 0\n  seed: a\nfoo: 1\n"), {"optim.lr": -3})
    for part in (
        "train.batch_size = 0",
        "line 7",
        "train.seed = 'a'",
        "line 8",
        "unknown key 'foo'",
        "line 9",
        "optim.lr = -3 (from --set)",
    ):
        assert part in str(error)


def test_missing_keys():
    error = refused({"name": "x"})
    assert all(f"'{key}' is missing" in str(error) for key in ("task", "data", "model"))


def test_split_shares_must_leave_something():
    assert "take 1.2 of the records" in str(refused(MINIMAL, {"data.split.test": 0.6, "data.split.validation": 0.6}))


@pytest.mark.parametrize(
    "assignment, value",
    [
        ("k=3e-4", 3e-4),
        ("k=1e-3", 1e-3),
        ("k=-5", -5),
        ("k=.5", 0.5),
        ("k=true", True),
        ("k=null", None),
        ("k=", None),
        ("k=[0.9, 0.99]", [0.9, 0.99]),
        ("k={name: sgd}", {"name": "sgd"}),
        ("k='5'", "5"),
        ("k=yes", "yes"),
        ("k=010", "010"),
        ("k=1:30", "1:30"),
        ("k=2024-01-31", "2024-01-31"),
        ("k=*.csv", "*.csv"),
        ("k=photos #2", "photos #2"),
        ("k=mnist#500", "mnist#500"),
        ("k=C: drive", "C: drive"),
        ("k=a=b", "a=b"),
        ("k=我的 照片", "我的 照片"),
    ],
)
def test_set_values_are_read_as_they_look(assignment, value):
    key, read = parse_set(assignment)
    assert key == "k" and read == value and type(read) is type(value)


@pytest.mark.parametrize("assignment", ["optim.lr", "=3", " =3", "k=[1", "k={a: 1"])
def test_set_mistakes(assignment):
    with pytest.raises(RecipeError, match="--set"):
        parse_set(assignment)


def test_a_folder_may_be_called_like_a_number():
    assert load(MINIMAL, dict([parse_set("data.source=2024")])).data.source == "2024"


def test_nested_model_arguments_and_model_as_text():
    recipe = load("mnist-fcnn", {"model.hidden": [8, 8]})
    assert recipe.model.name == "fcnn" and recipe.model.arguments == {"hidden": [8, 8], "dropout": 0.2}
    assert load("mnist-cnn", {"model": "fcnn"}).model.arguments == {}
    assert load("linear-classifier", {"model.hidden": [3]}).model.arguments == {"hidden": [3]}


@pytest.mark.parametrize("length", [{"train.steps": 5}, {"train.steps": "20k"}, {"train.epochs": 2.5}])
def test_a_new_length_replaces_the_old(length):
    train = load("mnist-cnn", length).train
    assert (train.epochs is None) != (train.steps is None)


def test_two_lengths_are_an_error():
    error = refused(MINIMAL, {"train.steps": 5, "train.epochs": 1})
    assert "not epochs and steps" in str(error) and "只能给一个" in error.zh


def test_yaml_errors_name_the_line(tmp_path):
    with pytest.raises(RecipeError, match=r"line 3: not valid YAML"):
        parse_yaml("a: 1\nb: 2\n\tc: 3\n", "m.yaml")


def test_a_key_given_twice_is_an_error():
    with pytest.raises(RecipeError, match=r"'train.epochs' is given twice, in lines 2 and 3"):
        parse_yaml("train:\n  epochs: 1\n  epochs: 2\n", "m.yaml")


@pytest.mark.parametrize("text, kind", [("", "empty"), ("# nothing\n", "empty"), ("- a\n", "a list"), ("hello", "a str")])
def test_what_is_not_a_mapping(tmp_path, text, kind):
    error = refused(written(tmp_path / "m.yaml", text))
    assert kind in str(error) and error.fix


def test_bom_and_chinese_names_and_values(tmp_path):
    folder = tmp_path / "配方 目录"
    folder.mkdir()
    recipe = load(written(folder / "我的.yaml", TEXT.replace("name: x", "name: 我的实验").replace("digits", "数据/照片"), "utf-8-sig"))
    assert recipe.name == "我的实验" and recipe.data.source == "数据/照片"
    assert Recipe.model_validate(parse_yaml(recipe.to_yaml(), "copy")) == recipe
    assert "我的实验" in recipe.to_yaml()


def test_a_file_that_is_not_utf8(tmp_path):
    error = refused(written(tmp_path / "m.yaml", TEXT.replace("name: x", "name: 实验"), "gb18030"))
    assert "cannot be read as text" in str(error) and "UTF-8" in error.fix


def test_labels_that_look_like_something_else_survive_yaml():
    labels = ["yes", "no", "on", "010", "1e3", "2024-01-31", "null", "true", "1:30", "~", "0x1F", "狗"]
    recipe = load(MINIMAL, {"data.classes": labels})
    assert load(parse_yaml(recipe.to_yaml(), "copy")).data.classes == labels
    text = "data:\n  source: a\n  classes: [yes, no, 010, 2024-01-31]\n"
    assert load(MINIMAL | parse_yaml(text, "m.yaml")).data.classes == ["yes", "no", "010", "2024-01-31"]


def test_unknown_recipe_gives_the_nearest(tmp_path):
    error = refused("mnist-cn")
    assert "'mnist-cnn'" in str(error) and error.fix == "groundup recipes"
    assert "digits-cnn" in str(refused("completely different"))


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_round_trip(name):
    recipe = load(name)
    assert recipe.name == name and recipe.card.summary and recipe.card.summary_zh
    again = load(parse_yaml(recipe.to_yaml(), "copy"))
    assert again == recipe and differences(recipe, again) == {}
    assert load(recipe) == recipe


def test_differences_name_the_keys():
    changed = load("mnist-best", {"optim.lr": 0.5, "model.layers": [1, 1, 1], "data.augment": None})
    found = differences(load("mnist-best"), changed)
    assert found["optim.lr"] == (0.006, 0.5) and found["model.layers"] == ([2, 2, 2], [1, 1, 1])
    assert found["data.augment.shift"] == (2, None)


def test_nothing_given_is_changed():
    recipe, overrides = copy.deepcopy(MINIMAL), {"model": {"name": "fcnn"}, "model.hidden": [3], "train": {"seed": 1}, "train.steps": 2}
    before = copy.deepcopy((recipe, overrides))
    load(recipe, overrides)
    override({"name": "y"}, overrides)
    assert (recipe, overrides) == before


def test_schema_is_json():
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert {"name", "task", "data", "model"} <= set(schema["required"])


def test_message_follows_the_language():
    set_language("zh")
    assert "未知的键 'trian'" in refused(MINIMAL, {"trian": 1}).localized()


def test_an_optimizer_and_a_schedule_may_be_given_by_name_alone():
    recipe = load("gpt-stdlib", {"optim": "adamw", "schedule": "wsd"})
    before = load("gpt-stdlib")
    assert recipe.optim == before.optim.model_copy(update={"name": "adamw"}) and recipe.schedule == before.schedule.model_copy(update={"name": "wsd"})
    tree = before.model_dump(mode="json")
    assert load(tree | {"optim": "sgd", "schedule": "constant"}).optim.name == "sgd"
    with pytest.raises(RecipeError, match=r"optim\.name = .admw."):
        load("gpt-stdlib", {"optim": "admw"})
