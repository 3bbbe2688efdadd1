"""The model card: a YAML head that parses with any label, every section, nothing of this machine or moment."""

import pytest
import yaml

from groundup.core.recipe import Recipe
from groundup.evaluation.card import model_card

NASTY = ["a: b", 'say "hi"', "two\nlines", "- item", "| pipe", "<b>", "`tick`", "猫", "---"]
DATA = {
    "fingerprint": "3f" * 32,
    "files": {},
    "statistics": {"name": "photos", "kind": "image", "records": 1797, "input_shape": [1, 8, 8], "splits": {"train": 1500, "test": 297}},
}
RESULT = {
    "run": "/home/me/runs/demo-20260101T000000Z-ab12", "model": "/home/me/runs/demo-20260101T000000Z-ab12/model", "name": "demo", "parameters": 4321,
    "steps": 300, "split": "test", "metric": "accuracy", "best_step": 200, "metrics": {"loss": 0.1, "accuracy": 0.95, "f1_macro": float("nan")},
    "intervals": {"accuracy": [0.92, 0.97]}, "per_class": {c: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3} for c in NASTY},
    "before_after": {"rows": [{"what": "old data", "metric": "accuracy", "before": 0.9, "before_interval": [0.8, 1.0], "after": 0.7,
                               "after_interval": [0.6, 0.8], "note": "head put back"}]},
    "seconds": {"total": 12.345},
}  # fmt: skip


def recipe(**changes):
    return Recipe.model_validate(
        {
            "name": "demo",
            "task": "image-classification",
            "data": {"source": "/home/me/photos"},
            "model": "simple_cnn",
            "train": {"seed": 41},
            **changes,
        }
    )


def head_and_body(text):
    assert text.startswith("---\n")
    head, _, body = text[4:].partition("\n---\n")
    return yaml.safe_load(head), body


def test_head_is_what_the_hub_reads():
    head, _ = head_and_body(model_card(recipe(), RESULT, DATA))
    assert head["library_name"] == "groundup" and head["pipeline_tag"] == "image-classification" and head["license"] == "unknown"
    assert "simple_cnn" in head["tags"]
    (entry,) = head["model-index"][0]["results"]
    assert entry["task"]["type"] == "image-classification"
    assert entry["dataset"] == {"name": "photos", "type": "photos", "split": "test", "revision": "3f" * 32}
    assert {m["type"]: m["value"] for m in entry["metrics"]} == {"loss": 0.1, "accuracy": 0.95}  # NaN is left out


@pytest.mark.parametrize("source", NASTY)
def test_head_parses_with_any_name(source):
    head, body = head_and_body(model_card(recipe(data={"source": source}), RESULT, DATA))
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == source
    assert body.startswith("\n# demo\n")


def test_sections():
    _, body = head_and_body(model_card(recipe(), RESULT, DATA))
    for title in ("Labels", "Training data", "Training", "Evaluation", "How to use", "Limits", "中文说明"):
        assert f"\n## {title}\n" in body
    for text in ("4,321 parameters", "3f" * 32, "0.9500 | 0.9200 – 0.9700", "groundup predict FOLDER", 'groundup.load("FOLDER")', "| seed | 41 |",
                 "past 64x64 take a deeper network", "0.7000 (0.6000 – 0.8000)", "head put back"):  # fmt: skip
        assert text in body, text


def test_labels_do_not_break_the_markdown():
    _, body = head_and_body(model_card(recipe(), RESULT, DATA))
    line = next(text for text in body.splitlines() if text.startswith("9: "))
    for label in ("two lines", r"\| pipe", r"\<b\>", r"\`tick\`", "猫"):
        assert label in line


def test_nothing_of_the_machine_or_the_moment():
    tuned = recipe(init="/home/me/runs/base-20260101T000000Z-cd34/model", method="head")
    text = model_card(tuned, RESULT, DATA)
    assert text == model_card(tuned, RESULT | {"seconds": {"total": 99.0}}, DATA)
    for private in ("/home", "20260101", "12.3"):
        assert private not in text
    assert "tuned (method `head`)" in text
    assert "`hub:owner/base`" in model_card(recipe(init="hub:owner/base"), RESULT, DATA)


@pytest.mark.parametrize("source", ["/data/me/photos", r"C:\Users\me\photos", "~/photos/", "./photos"])
def test_only_the_last_part_of_a_path(source):
    text = model_card(recipe(data={"source": source}), RESULT, DATA)
    assert "| source | photos |" in text


def test_own_code_needs_trust():
    text = model_card(recipe(model="/home/me/nets.py:MyNet"), RESULT, DATA)
    assert "`MyNet`" in text and "--trust-code" in text and "trust_code=True" in text and "/home" not in text
    assert "--trust-code" not in model_card(recipe(), RESULT, DATA)


def test_figures_without_a_test_split_are_called_what_they_are():
    assert "no test split" in model_card(recipe(), RESULT | {"split": "validation"}, DATA)
    assert "no test split" not in model_card(recipe(), RESULT, DATA)


def test_regression_and_bare_results():
    numbers = {"metrics": {"mse": 1.5e7}, "split": "test", "metric": "mse", "per_target": {"height": {"mse": 1.0}}}
    head, body = head_and_body(model_card(recipe(task="vector-regression", model="linear"), numbers, DATA))
    assert head["pipeline_tag"] == "tabular-regression" and "## Output" in body and "1.5e+07" in body
    head, _ = head_and_body(model_card(recipe(), {}, {}))
    assert "model-index" not in head
