"""report.html: well-formed, self-contained, in both languages, safe with any label, and there even when files are missing."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch

from groundup.core import messages
from groundup.core.recipe import Recipe
from groundup.core.run import RunFolder
from groundup.evaluation import plots, timeline
from groundup.evaluation.evaluate import summary
from groundup.evaluation.report import evaluation_report, write_report
from groundup.metrics import ClassificationMetrics

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = ['<b>bold</b> "quoted" & more', "$x_1$ \\frac", "猫", "line\nbreak", "nul\x00\x1b", "{brace} {0}"]


class Page(HTMLParser):
    """Every tag closed in order; sources and texts gathered."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.headings, self.lang = [], [], "", [], None
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag not in ("b", "script")
        self.links += [v for k, v in attributes if k in ("src", "href")]
        self.lang = self.lang or dict(attributes).get("lang")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text
    return page


def scores(classes, n=300):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, len(classes), (n,), generator=generator)
    logits = torch.randn(n, len(classes), generator=generator)
    logits[torch.arange(n), y] += 2
    metrics = ClassificationMetrics(classes)
    metrics.update(logits, y, 0.4 * n)
    return summary(metrics)


def result_of(**changes):
    return {
        "run": "runs/x", "model": "runs/x/model", "name": "demo", "task": "vector-classification", "architecture": "linear",
        "parameters": 1234, "steps": 300, "resumed_from": 100, "split": "test", "metric": "accuracy", "best_step": 200,
        "before_after": None, "seconds": {"total": 9.0, "train": 8.0, "evaluate": 0.5}, **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    recipe = Recipe.model_validate({"name": "demo", "task": "vector-classification", "data": {"source": "iris"}, "model": "linear"})
    run = RunFolder.create(recipe, tmp_path / "run", "groundup train demo --set 'model.name=\"<x>\"'")
    yield run
    run.close()


def fill(run, *, classes=("a", "b")):
    """Everything that a run folder can hold."""
    run.decide("device", "cpu", "no accelerator <was> found", "没有找到加速器")
    run.decide("data.0", 150, "a note on the data", "数据说明")
    run.decide("init", {"path": "/base", "sha256": "ab"}, "the model to start from", "起始模型")
    run.event("started", steps=300)
    run.event("worker_restart", why="exit -9")
    run.event("resumed", step=100, attempt=1, superseded_rows=4, promise="bit-exact")
    run.event("checkpoint_failed", step=150, cause="No space left on device")
    run.event("damaged_checkpoint", checkpoint="step-000100", reason="sha256")
    run.event("stopped", signal="SIGTERM", step=200)
    run.event("error", type="Stopped", message="stopped")
    run.event("resumed", step=200, attempt=2, superseded_rows=0, promise="tolerance")
    run.event("something_new", fact=1)
    for step in range(10, 301, 10):
        run.metrics.append({"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0})
    run.metrics.append({"kind": "train", "step": 140, "loss": 9.0, "superseded": 1})
    for step in (100, 200, 300):
        run.metrics.append({"kind": "evaluate", "step": step, "loss": 1.0, "accuracy": step / 400, "best": True})
    statistics = {
        "name": "iris", "kind": "vector", "records": 150, "input_shape": [4], "splits": {"train": 100, "test": 50}, "rejected": 25, "duplicates": 1,
        "classes": {c: {"train": 3, "test": 2} for c in classes}, "features": {"<f>": {"min": 0.0, "mean": 1.0, "std": 1.0, "max": 2.0}},
    }  # fmt: skip
    (run.path / "data.json").write_text(json.dumps({"fingerprint": "3f" * 32, "files": {}, "statistics": statistics}))
    rejected = [{"record": f"row {i} <i>", "reason": "no label", "reason_zh": "没有标签"} for i in range(25)]
    (run.path / "rejected.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rejected))
    environment = {
        "os": {"name": "Linux", "machine": "x86_64"},
        "python": {"version": "3.12"},
        "nvidia": {"gpus": [{"name": "T4"}]},
        "groundup": "1",
    }
    (run.path / "environment.json").write_text(json.dumps(environment))


def before_after():
    new = {
        "what": "new data", "what_zh": "新数据", "metric": "accuracy", "before": None, "before_interval": None, "after": 0.9,
        "after_interval": [0.8, 0.95], "note": "the base does not know these labels", "note_zh": "起始模型不认识这些标签",
    }  # fmt: skip
    old = {**new, "what": "old data", "what_zh": "旧数据", "before": 0.99, "before_interval": [0.98, 1.0], "note": "", "note_zh": ""}
    return {"split": "test", "rows": [new, old]}


def test_everything_is_there(run):
    fill(run)
    page = read(write_report(run, result_of(**scores(["a", "b"]), before_after=before_after()), language="en"))
    assert page.headings == [
        "Training curves", "Before and after tuning", "Metrics", "By class", "Confusion", "Calibration", "Data", "Automatic choices", "Events", "Skipped records",
        "How to reproduce", "Environment",
    ]  # fmt: skip
    for text in ("1,234", "3f3f", "no accelerator <was> found", "a note on the data", "No space left on device", "step-000100", "something_new: fact 1",
                 "row 19 <i>", "25 records", "T4", "groundup train demo", "worse", "the base does not know these labels", "95 % interval", "steps 200 to 300: finished"):  # fmt: skip
        assert text in page.text, text
    assert "row 20" not in page.text
    assert {p.name for p in (run.path / "plots").iterdir()} == {
        "loss.png", "metric.png", "rate.png", "gradient.png", "confusion.png", "classes.png", "before_after.png", "calibration.png",
    }  # fmt: skip
    assert len(page.links) == 8


def test_chinese_page_and_language_is_put_back(run):
    fill(run)
    messages.set_language("en")
    try:
        page = read(write_report(run, result_of(**scores(["a", "b"]), before_after=before_after()), language="zh"))
        assert messages.language() == "en"
    finally:
        messages.set_language(None)
    assert page.lang == "zh-CN" and page.headings[0] == "训练曲线"
    for text in ("没有找到加速器", "没有标签", "起始模型不认识这些标签", "逐位一致", "变差"):
        assert text in page.text
    for english in ("Automatic choices", "no label", "records could not", "What happened"):
        assert english not in page.text


def test_any_label_is_shown_as_it_is(run):
    fill(run, classes=NASTY)
    page = read(write_report(run, result_of(name=NASTY[0], **scores(NASTY)), language="en"))
    for label in (*NASTY[:4], NASTY[5]):
        assert label in page.text
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_missing_and_damaged_files(run):
    for file in run.path.iterdir():
        if file.name != ".lock":
            file.unlink()
    (run.path / "data.json").write_text('{"fingerprint": ')
    (run.path / "decisions.json").write_text("[]")
    (run.path / "events.jsonl").write_bytes(b'{"event": "started"}\n{"event": "fin')
    page = read(write_report(run, {"metrics": {}, "split": "test"}, language="en"))
    assert page.headings == ["Events"]


def test_regression_without_classes(run):
    run.metrics.append({"kind": "train", "step": 1, "loss": math.nan, "lr": 1e-3, "grad_norm": math.inf})
    run.metrics.append({"kind": "evaluate", "step": 1, "loss": 2.0, "mse": 123456.0})
    result = result_of(
        metric="mse", metrics={"loss": 0.1, "mse": 123456.0, "r2": -3.0}, intervals={"mse": [1e5, 1.5e5], "r2": [math.nan, math.nan]},
        per_target={"height": {"mse": 1.0, "mae": 0.5}}, best_step=1, resumed_from=None,
    )  # fmt: skip
    page = read(write_report(run, result, language="en"))
    assert "By class" not in page.headings and "Confusion" not in page.headings
    assert "1.235e+05" in page.text and "height" in page.text and "nan" not in page.text


def test_many_classes(run):
    classes = [f"card_payment_{i}" for i in range(77)]
    page = read(write_report(run, result_of(**scores(classes, 2000)), language="en"))
    assert "all 77 classes" in page.text and "card_payment_76" in page.text


@pytest.mark.parametrize("n", [2, 20, 21, 30, 31, 100])
def test_confusion_of_any_size(tmp_path, n):
    found = scores([f"class number {i}" for i in range(n)], 50)  # most classes of 100 have no record
    plots.confusion_matrix(tmp_path / "c.png", found["confusion"]["classes"], found["confusion"]["matrix"])
    plots.class_bars(tmp_path / "b.png", found["per_class"])
    for name in ("c.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_evaluation_report(tmp_path):
    result = {"model": "/x/model", "data": "<iris>", "fingerprint": "ab", "split": "all", "records": 300, "same_data_as_training": False,
              "metric": "accuracy", "seconds": 1.2, **scores(NASTY)}  # fmt: skip
    page = read(evaluation_report(tmp_path, "demo on <iris>", result))
    assert "demo on <iris>" in page.text and len(page.links) == 3 and "/x/model" not in page.text


def test_starts_of_a_run():
    """A killed start leaves no word; how far it came is in the rows that were written anew."""
    events = [
        {"event": "started"}, {"event": "checkpoint", "step": 100}, {"event": "resumed", "step": 100, "attempt": 1},
        {"event": "stopped", "signal": "SIGINT", "step": 150}, {"event": "error", "type": "Stopped"},
        {"event": "resumed", "step": 150, "attempt": 2}, {"event": "finished", "step": 300},
    ]  # fmt: skip
    rows = [{"step": 140, "superseded": 1}, {"step": 300}]
    found = [(s.first, s.last, s.end) for s in timeline.starts(events, rows)]
    assert found == [(0, 140, ""), (100, 150, "SIGINT"), (150, 300, "finished")]


def test_events_of_one_kind_in_a_row_are_one_line():
    events = [{"event": "worker_restart", "why": "x", "time": 0}] * 3 + [
        {"event": "checkpoint", "step": 1},
        {"event": "finished", "step": 2},
    ]
    lines = timeline.sentences(events)
    assert len(lines) == 2 and lines[0][0] == "1970-01-01 00:00:00" and "(× 3)" in lines[0][1]


def test_a_step_trained_twice_counts_once():
    rows = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 3}, {"step": 4, "loss": None}]
    assert plots.series(rows, "loss") == ([1.0, 2.0], [4.0, 3.0])


def test_smoothing_starts_unbiased_and_survives_nan():
    assert plots.smoothed([2.0, 2.0, math.nan, 2.0], 10) == pytest.approx([2.0] * 4)
