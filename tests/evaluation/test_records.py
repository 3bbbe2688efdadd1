"""What an evaluation knows of each record: calibration, slices, worst pictures, pairs; and the views of test-time augmentation."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from groundup import pipeline
from groundup.core.errors import ModelError, UserError
from groundup.core.recipe import Views
from groundup.evaluation.records import Records, paired, slices
from groundup.evaluation.views import Viewed, parse, viewed
from groundup.metrics import ClassificationMetrics


def records(right, **columns):
    found = Records()
    found.add({"right": torch.tensor(right), "brightness": torch.full((len(right),), math.nan), **columns})
    return found


def test_calibration_error_by_hand():
    metrics = ClassificationMetrics(["a", "b"])
    p = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.65, 0.65])  # of class a; right: three of four, one of two
    metrics.update(torch.stack([p.log(), (1 - p).log()], 1), torch.tensor([0, 0, 0, 1, 0, 1]), 1.0)
    assert metrics.compute()["ece"] == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.15, abs=1e-6)
    low, high = metrics.intervals()["ece"]
    assert 0 <= low <= high <= 1
    facts = metrics.details()["calibration"]
    assert sum(facts["records"]) == 6 and facts["accuracy"][14] == 0.75 and facts["confidence"][9] == pytest.approx(0.65)


def test_one_output_is_calibrated_too():
    metrics = ClassificationMetrics(["a", "b"])
    metrics.update(torch.tensor([[2.0], [-2.0]]), torch.tensor([1, 0]), 1.0)
    assert metrics.compute()["ece"] == pytest.approx(1 - torch.tensor(2.0).sigmoid().item(), abs=1e-6)


def test_slices_by_numbers_values_and_identifiers():
    right = [True] * 60 + [False] * 30
    found = slices(
        records(right), {"age": np.arange(90.0), "town": np.array(["x"] * 60 + ["y"] * 30), "id": np.array([f"r{i}" for i in range(90)])}
    )
    by = {(s["column"], s["slice"]): s for s in found}
    assert {c for c, _ in by} == {"age", "town"}
    assert by["town", "y"]["accuracy"] == 0 and by["town", "y"]["differs"] and by["town", "y"]["rest"] == 1
    assert [s["records"] for s in found if s["column"] == "age"] == [30, 30, 30]


def test_a_paired_test_by_hand():
    a, b = records([True] * 8 + [False] * 2), records([True] * 3 + [False] * 5 + [True, False])
    found = paired(a, b)
    assert (found["only_first_right"], found["only_second_right"]) == (5, 1)
    assert found["difference"] == pytest.approx(0.4) and found["p_value"] == pytest.approx(2 * (1 + 6) / 64)
    assert found["interval"][0] < 0.4 < found["interval"][1]
    assert paired(a, a)["p_value"] == 1.0


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model of red, green and blue squares, some of them mislabelled on purpose in the test split."""
    place = tmp_path_factory.mktemp("squares")
    rng, rows = np.random.default_rng(0), []
    for i in range(150):
        k = i % 3
        pixels = rng.integers(0, 90, (12, 12, 3), dtype=np.uint8)
        pixels[..., k] += 120
        (place / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / "data" / f"{i}.png")
        split = "test" if i >= 110 else "train"
        label = "红绿蓝"[(k + 1) % 3 if i in (120, 121, 125) else k]
        rows.append(f"{i}.png,{label},{split},{'夜' if i in (120, 121, 125) else '昼'}")
    (place / "data" / "labels.csv").write_text("file,label,split,time\n" + "\n".join(rows), encoding="utf-8")
    settings = {"data.source": str(place / "data"), "data.augment": {}, "train.epochs": 6, "data.split.test": "given"}
    first = pipeline.train("digits-cnn", {"name": "squares", **settings}, out=place / "first")
    second = pipeline.train("digits-cnn", {"name": "weak", "train.seed": 3, **settings, "train.epochs": 1}, out=place / "second")
    return first, second


def test_the_report_shows_the_worst_pictures_and_slices(trained):
    run = trained[0]
    worst = run.result["worst"]
    assert {w["record"] for w in worst[:3]} == {"120.png", "121.png", "125.png"} and worst[0]["probability_of_true"] < 0.5
    assert all((run.path / "plots" / w["file"]).is_file() for w in worst)
    assert sum(c["records"] for c in run.result["confused"]) >= 3
    night = next(s for s in run.result["slices"] if s["column"] == "time" and s["slice"] == "夜")
    assert night["records"] == 3 and night["accuracy"] == 0 and night["differs"]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "120.png" in page and "taken for" in page and "Calibration" in page and "夜" in page
    json.dumps(run.result)


def test_two_models_are_compared_in_pairs(trained, tmp_path):
    first, second = trained
    found = first.evaluate(against=second.path, out=tmp_path / "out")
    other = found["against"]
    assert other["difference"] == pytest.approx(found["metrics"]["accuracy"] - other["accuracy"])
    assert (tmp_path / "out" / "plots").is_dir() and "McNemar" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    third = pipeline.train("linear-classifier", {"train.steps": 1}, out=tmp_path / "third")
    with pytest.raises(ModelError, match="cannot be compared"):
        first.evaluate(against=third.path)


def test_views_average_what_is_seen():
    class Corner(nn.Module):
        def forward(self, x):
            return x[:, 0, 0, :1]

    x = torch.tensor([[[[1.0, 5.0]]]])
    assert Viewed(Corner(), Views(flip=True))(x).item() == 3.0
    assert viewed(Corner(), None)(x).item() == 1.0 and isinstance(viewed(Corner(), Views()), Corner)
    assert parse("flip,shift=2") == Views(flip=True, shift=2) and parse("none") is None
    for wrong in ("flop", "shift=x", "flip=2", ""):
        with pytest.raises(UserError, match="--views"):
            parse(wrong)


def test_views_are_kept_with_the_model(trained, tmp_path):
    run = pipeline.train("digits-cnn", {"train.steps": 20, "evaluate.views.shift": 1, "watch.report": False}, out=tmp_path / "run")
    assert run.load().card["views"] == {"flip": False, "shift": 1}
    assert run.evaluate()["metrics"] == pytest.approx(run.metrics, nan_ok=True)
    single = run.evaluate(views="none")
    assert single["views"] is None and single["metrics"]["loss"] != run.metrics["loss"]
