"""Train 20 steps = train 10, stop, resume 10: bit for bit, and the same metric rows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import groundup as gu
from groundup.core.errors import RunError
from groundup.core.run import RunFolder
from groundup.training import loop
from groundup.training.watch import WALL_CLOCK

EXACT = {
    "train.deterministic": True,
    "train.steps": 20,
    "train.save_every": 1,
    "watch.tensorboard": False,
    "watch.report": False,
    "watch.log_every": 3,
    "evaluate.every": 7,
}


class Killed(BaseException):
    """Stands for kill -9 inside this process: no handler of the product catches it."""


def stop_after(monkeypatch, step):
    """The process 'dies' right after an optimizer step, before anything else is written."""
    original = loop.step

    def dying(state, *rest):
        report = original(state, *rest)
        if state.step >= step:
            raise Killed
        return report

    monkeypatch.setattr(loop, "step", dying)


def everything(run):
    """All that the contract names: weights, optimizer, random state, counters, metric rows."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    numbers = json.loads((last / "state.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in RunFolder.open(run).metric_rows()]
    return (
        load_file(run / "model" / "model.safetensors"),
        load_file(last / "optim.safetensors"),
        {k: v for k, v in numbers.items() if k != "facts"},
        rows,
    )


def assert_same(a, b):
    for x, y in zip(everything(a), everything(b)):
        if isinstance(x, dict) and x and isinstance(next(iter(x.values())), torch.Tensor):
            assert x.keys() == y.keys()
            assert [k for k in x if not torch.equal(x[k], y[k])] == []
        else:
            assert x == y


CASES = {
    "augmentation and dropout": {"data.augment": {"shift": 1, "rotate": 10, "flip": 0.5, "crop": 1, "erase": 0.5}, "model.dropout": 0.3},
    "accumulation": {"train.micro_batch_size": 16},
    "ema": {"train.ema": 0.9},
    "muon": {"optim.name": "muon"},
    "sgd with momentum": {"optim.name": "sgd", "optim.momentum": 0.9, "optim.nesterov": True, "optim.lr": 0.05},
    "rmsprop": {"optim.name": "rmsprop"},
    "float16 with scaling": {"train.precision": "float16"},
    "early stopping": {"train.early_stopping": 3, "evaluate.every": 2, "optim.lr": 0.03},
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_ten_and_ten(case, tmp_path, monkeypatch):
    settings = EXACT | CASES[case]
    whole = gu.train("digits-cnn", settings, out=tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 11)
        gu.train("digits-cnn", settings, out=tmp_path / "cut")
    torch.manual_seed(1234)  # whatever the new process begins with must not matter
    resumed = gu.train("digits-cnn", settings, out=tmp_path / "cut", resume=True)
    assert resumed.result["resumed_from"] == 10 and whole.result["resumed_from"] is None
    assert_same(whole.path, resumed.path)


@pytest.mark.parametrize("stops", [(1, 2, 3, 4, 19), (6, 7, 8), (20,)])
def test_any_number_of_resumes(stops, tmp_path, monkeypatch):
    whole = gu.train("digits-cnn", EXACT, out=tmp_path / "whole")
    for step in stops:
        with monkeypatch.context() as m, pytest.raises(Killed):
            stop_after(m, step)
            gu.train("digits-cnn", EXACT, out=tmp_path / "cut", resume=True)
    assert_same(whole.path, gu.train("digits-cnn", EXACT, out=tmp_path / "cut", resume=True).path)


@pytest.fixture
def photos(tmp_path):
    """Forty small colour pictures in two classes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "my photos 照片" / ("猫" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (10, 12, 3), dtype=np.uint8) // (1 + i % 2)).save(folder / f"{i}.png")
    return tmp_path / "my photos 照片"


def test_streamed_data_with_any_workers_equals_data_in_memory(photos, tmp_path, monkeypatch):
    settings = EXACT | {"data.source": str(photos), "train.batch_size": 8, "data.augment": {"shift": 1, "erase": 0.3}}
    memory = gu.train("mnist-cnn", settings | {"data.in_memory": True}, out=tmp_path / "memory")
    none = gu.train("mnist-cnn", settings | {"data.in_memory": False, "data.workers": 0}, out=tmp_path / "none")
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 11)
        gu.train("mnist-cnn", settings | {"data.in_memory": False, "data.workers": 2}, out=tmp_path / "two")
    two = gu.train(
        "mnist-cnn", settings | {"data.in_memory": False, "data.workers": 0}, out=tmp_path / "two", resume=True
    )  # workers may differ
    assert_same(memory.path, none.path)
    assert_same(memory.path, two.path)


def test_metric_rows_after_the_restored_step_are_marked(tmp_path, monkeypatch):
    settings = EXACT | {"train.save_every": 8, "evaluate.every": 100, "watch.log_every": 1}
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 12)
        gu.train("digits-cnn", settings, out=tmp_path / "cut")
    gu.train("digits-cnn", settings, out=tmp_path / "cut", resume=True)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(r["step"] for r in rows if r.get("superseded")) == [9, 10, 11]
    assert [r["step"] for r in rows if r["kind"] == "train" and not r.get("superseded")] == list(range(1, 21))


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    first = gu.train("digits-cnn", EXACT, out=tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert gu.train("digits-cnn", EXACT, out=tmp_path / "run", resume=True).result == first.result
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_with_nothing_there_resume_starts(tmp_path):
    assert gu.train("line-regression", {"train.steps": 3}, out=tmp_path / "new", resume=True).result["resumed_from"] is None


def test_a_changed_recipe_is_refused_with_its_fields(tmp_path):
    gu.train("digits-cnn", EXACT, out=tmp_path / "run")
    with pytest.raises(RunError, match=r"(?s)optim\.lr: 0\.003 -> 0\.1.*train\.seed: 0 -> 5"):
        gu.train("digits-cnn", EXACT | {"optim.lr": 0.1, "train.seed": 5}, out=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"(?s)train\.steps: 20 -> 30.*--extend"):
        gu.train("digits-cnn", EXACT | {"train.steps": 30}, out=tmp_path / "run", resume=True)


def test_watching_and_saving_may_change_on_resume(tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 5)
        gu.train("digits-cnn", EXACT, out=tmp_path / "run")
    changed = EXACT | {"watch.log_every": 5, "train.save_every": "10min"}
    assert gu.train("digits-cnn", changed, out=tmp_path / "run", resume=True).result["resumed_from"] == 4


def test_extend_trains_on(tmp_path):
    gu.train("digits-cnn", EXACT, out=tmp_path / "run")
    longer = gu.train("digits-cnn", EXACT | {"train.steps": 30}, out=tmp_path / "run", resume=True, extend=True)
    assert (longer.result["steps"], longer.result["resumed_from"]) == (30, 20)
    again = gu.train(None, {"train.steps": 35}, out=tmp_path / "run", resume=True, extend=True)  # without naming the recipe
    assert again.result["steps"] == 35


def test_changed_data_is_refused_by_name(photos, tmp_path, monkeypatch):
    settings = EXACT | {"data.source": str(photos), "train.batch_size": 8}
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 5)
        gu.train("mnist-cnn", settings, out=tmp_path / "run")
    shutil.copyfile(photos / "dog" / "0.png", photos / "dog" / "2.png")
    with pytest.raises(RunError, match=r"data has changed.*dog/2\.png"):
        gu.train("mnist-cnn", settings, out=tmp_path / "run", resume=True)


def test_another_thread_count_is_put_back_under_the_exact_promise(tmp_path, monkeypatch):
    torch.set_num_threads(2)
    whole = gu.train("digits-cnn", EXACT, out=tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_after(m, 11)
        gu.train("digits-cnn", EXACT, out=tmp_path / "cut")
    torch.set_num_threads(1)
    assert_same(whole.path, gu.train("digits-cnn", EXACT, out=tmp_path / "cut", resume=True).path)
    (event,) = [json.loads(line) for line in (tmp_path / "cut" / "events.jsonl").read_text().splitlines() if '"resumed"' in line]
    assert event["promise"] == "bit-exact"
