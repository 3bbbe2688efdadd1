"""The loop against loops written by hand, and against itself cut up differently."""

import json

import pytest
import torch
from torch import nn

import groundup as gu
from groundup.core.errors import RecipeError, RunError, TrainError
from groundup.core.run import RunFolder
from groundup.data.order import Order

QUICK = {"watch.tensorboard": False, "watch.report": False, "train.deterministic": True}


def weights(run):
    from safetensors.torch import load_file

    return load_file(run.model / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_equals_a_hand_written_loop(tmp_path):
    """The same samples, the same optimizer, the same clipping: the same weights, bit for bit."""
    settings = {
        "data.split.test": 0,
        "data.split.validation": 0,
        "train.steps": 30,
        "train.batch_size": 16,
        "optim.name": "adamw",
        "schedule.name": "constant",
    }
    run = gu.train("linear-classifier", settings | QUICK | {"model": "fcnn", "train.keep": "last"}, out=tmp_path / "run")
    from sklearn.datasets import load_wine

    from groundup.models.fcnn import FCNN

    x, y = load_wine(return_X_y=True)
    x = torch.from_numpy((x - x.mean(0)) / x.std(0)).float()
    y = torch.from_numpy(y)
    torch.manual_seed(0)
    net = FCNN((13,), 3)
    decayed, spared = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.0}, {"params": spared, "weight_decay": 0.0}], lr=1e-2, fused=True)
    order = Order(len(x), 16, 0)
    for step in range(30):
        _, index = order.batch(step)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x[index]), y[index], reduction="sum") / 16).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    trained = weights(run)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("recipe", ["digits-cnn", "line-regression", "linear-classifier"])
def test_one_batch_of_eight_equals_eight_of_one(recipe, tmp_path):
    """Accumulation: the gradient is that of the whole step's mean, however the step is cut. Without dropout and batch statistics."""
    settings = QUICK | {"train.steps": 12, "train.batch_size": 8, "train.keep": "last", "evaluate.every": 12}
    if recipe == "digits-cnn":
        settings["model.dropout"] = 0.0
    whole, cut, uneven = (weights(gu.train(recipe, settings | {"train.micro_batch_size": m}, out=tmp_path / f"run{m}")) for m in (8, 1, 3))
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole[name], uneven[name], rtol=1e-4, atol=1e-6)


def test_the_rehearsal_leaves_no_trace(tmp_path, monkeypatch):
    """BatchNorm statistics, gradients and random state after the dry step are those from before it."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, input_shape, num_outputs):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, num_outputs))\n"
    )
    settings = QUICK | {"model": "net.py:Net", "train.steps": 6, "train.keep": "last"}
    with_rehearsal = weights(gu.train("digits-cnn", settings | {"model": {"name": "net.py:Net"}}, out=tmp_path / "a"))
    monkeypatch.setattr("groundup.training.loop.rehearse", lambda *_: 0.0)
    without = weights(gu.train("digits-cnn", settings | {"model": {"name": "net.py:Net"}}, out=tmp_path / "b"))
    assert same(with_rehearsal, without)


def test_watching_does_not_change_the_training(tmp_path):
    a = gu.train(
        "digits-cnn", QUICK | {"train.steps": 12, "watch.log_every": 1, "watch.profile": 3, "watch.tensorboard": True}, out=tmp_path / "a"
    )
    b = gu.train("digits-cnn", QUICK | {"train.steps": 12, "watch.log_every": 12}, out=tmp_path / "b")
    assert same(weights(a), weights(b))
    assert json.loads((a.path / "profile.json").read_text())["traceEvents"]
    assert list((a.path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run = gu.train("line-regression", {"watch.report": False, "train.steps": 20, "evaluate.every": 10}, out=tmp_path / "run")
    (file,) = (run.path / "tensorboard").glob("events.out.tfevents.*")
    events = list(EventFileLoader(str(file)).Load())
    tags = {(e.step, v.tag) for e in events for v in e.summary.value}
    assert {(10, "train/loss"), (20, "train/lr"), (20, "evaluate/mse")} <= tags


def test_a_user_tracker_sees_every_row(tmp_path):
    (tmp_path / "track.py").write_text(
        "import json\nclass Track:\n    def __init__(self, folder): self.file = open(folder / 'mine.jsonl', 'w')\n    def begin(self, state, plan): pass\n"
        "    def after_step(self, state, report): pass\n    def row(self, row): self.file.write(json.dumps(row) + '\\n')\n    def end(self): self.file.close()\n"
    )
    run = gu.train(
        "line-regression", {"watch.report": False, "train.steps": 20, "watch.trackers": ["track.py:Track"]}, out=tmp_path / "run"
    )
    assert len((run.path / "mine.jsonl").read_text().splitlines()) >= 3


def test_early_stopping_stops_and_keeps_the_best(tmp_path):
    run = gu.train("digits-cnn", QUICK | {"train.epochs": 50, "train.early_stopping": 2, "optim.lr": 1e-2}, out=tmp_path / "run")
    rows = RunFolder.open(run.path).metric_rows("evaluate")
    assert run.result["steps"] < 900
    best = max(rows, key=lambda r: (r["accuracy"], -r["step"]))
    assert run.result["best_step"] == best["step"] and len(rows) - 1 - rows.index(best) == 2


def test_keep_best_and_keep_last_give_those_weights(tmp_path):
    from groundup.training.checkpoint import Checkpoints

    run = gu.train("digits-cnn", QUICK | {"train.epochs": 6, "optim.lr": 3e-2}, out=tmp_path / "best")
    best = Checkpoints(run.path / "checkpoints", {}).weights(run.result["best_step"], ema=False)
    assert best is not None and same(best, weights(run))
    last = gu.train("digits-cnn", QUICK | {"train.epochs": 6, "optim.lr": 3e-2, "train.keep": "last"}, out=tmp_path / "last")
    assert last.result["best_step"] == last.result["steps"]


def test_ema_is_the_average_of_the_weights(tmp_path):
    """With a constant decay the stored average follows the recursion by hand; the model folder holds the average."""
    settings = QUICK | {"train.steps": 3, "train.ema": 0.05, "train.keep": "last", "evaluate.every": 100, "train.save_every": 1}
    run = gu.train("line-regression", settings, out=tmp_path / "run")
    from safetensors.torch import load_file

    folder = run.path / "checkpoints"
    own = {s: load_file(folder / f"step-{s:06d}" / "model.safetensors") for s in (2, 3)}
    averaged = {s: load_file(folder / f"step-{s:06d}" / "optim.safetensors") for s in (2, 3)}
    for name, value in weights(run).items():
        torch.testing.assert_close(averaged[3][f"ema.{name}"], 0.05 * averaged[2][f"ema.{name}"] + 0.95 * own[3][name])
        assert torch.equal(value, averaged[3][f"ema.{name}"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(precision, tmp_path):
    run = gu.train(
        "digits-cnn", QUICK | {"train.epochs": 4, "train.precision": precision, "train.deterministic": False}, out=tmp_path / "run"
    )
    assert run.metrics["accuracy"] > 0.8
    if precision == "float16":
        assert "scale" in RunFolder.open(run.path).metric_rows("train")[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_compiled_equals_eager_closely(tmp_path):
    # Plain SGD: Adam makes whole steps out of the rounding noise that is the gradient of a bias before a BatchNorm.
    settings = QUICK | {"train.steps": 3, "optim": {"name": "sgd", "lr": 0.01}}
    eager, compiled = (gu.train("digits-cnn", settings | {"train.compile": c}, out=tmp_path / str(c)) for c in (False, True))
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-3, atol=1e-3)


def test_every_automatic_choice_has_a_reason_in_both_languages(tmp_path):
    run = gu.train("digits-cnn", QUICK | {"train.steps": 2}, out=tmp_path / "run")
    decisions = json.loads((run.path / "decisions.json").read_text())
    assert {"device", "precision", "micro_batch_size", "compile", "threads"} <= decisions.keys()
    assert all(d["reason"] and any("\u4e00" <= c <= "\u9fff" for c in d["reason_zh"]) for d in decisions.values())


NAN_TASK = """
from groundup.tasks.vector_regression import VectorRegression
import torch
class Task(VectorRegression):
    calls = 0
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        Task.calls += 1
        if Task.calls == {bad}:
            loss.sum = loss.sum * float("{value}")
        return loss
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_non_finite_loss_never_reaches_the_weights(value, tmp_path):
    (tmp_path / "bad.py").write_text(NAN_TASK.format(bad=2 + 15, value=value))  # two passes of the rehearsal come first
    settings = QUICK | {"task": "bad.py:Task", "train.steps": 30, "train.save_every": 5, "evaluate.every": 100, "train.batch_size": 4}
    with pytest.raises(TrainError, match=r"not finite at step 15, whose update was not made; .*checkpoint") as caught:
        gu.train("line-regression", settings, out=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "nonfinite-000015.json").read_text())
    assert (
        len(report["records"]) == 4 and all(r.startswith("line[") for r in report["records"]) and report["records"][0] in str(caught.value)
    )
    from safetensors.torch import load_file

    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(torch.isfinite(v).all() for v in load_file(folder / "model.safetensors").values())


def test_a_record_with_nan_is_named(tmp_path):
    """NaN values are refused when data is read; one that a user's data set lets through is named by its record."""
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom groundup.data import from_arrays\ndef make():\n    x = np.linspace(0, 1, 40)[:, None]; y = x[:, 0].copy(); x[7] = np.inf\n"
        "    d = from_arrays('mine', x, y); d.inputs[7] = np.nan; return d\n"
    )
    (tmp_path / "task.py").write_text(
        "import numpy as np\nfrom groundup.tasks.vector_regression import VectorRegression\nclass Task(VectorRegression):\n"
        "    def fit(self, dataset, train):\n        super().fit(dataset, train); self.mean = np.zeros(1); self.std = np.ones(1)\n"
    )
    settings = QUICK | {
        "data.source": "data.py:make",
        "task": "task.py:Task",
        "data.split.test": 0,
        "data.split.validation": 0,
        "train.steps": 50,
    }
    with pytest.raises(TrainError, match=r"Records with NaN or infinite values: mine\[7\]"):
        gu.train("line-regression", settings, out=tmp_path / "run")


def test_fp16_overflows_are_skipped_and_many_in_a_row_stop(tmp_path):
    (tmp_path / "bad.py").write_text(NAN_TASK.format(bad=2 + 5, value="inf"))
    settings = {"task": "bad.py:Task", "train.precision": "float16", "train.steps": 20, "watch.tensorboard": False, "train.batch_size": 8}
    run = gu.train("line-regression", settings, out=tmp_path / "one")
    assert RunFolder.open(run.path).metric_rows("train")[-1]["skipped"] == 1
    (tmp_path / "worse.py").write_text(NAN_TASK.replace("== {bad}", "> 10").format(value="inf"))
    with pytest.raises(TrainError, match="30 fp16 updates in a row"):
        gu.train("line-regression", settings | {"task": "worse.py:Task", "train.steps": 200}, out=tmp_path / "many")


def test_few_records_shrink_the_batch_with_a_reason(tmp_path):
    run = gu.train("linear-classifier", QUICK | {"data.train_samples": 9, "train.steps": 4}, out=tmp_path / "run")
    assert json.loads((run.path / "decisions.json").read_text())["batch_size"]["value"] == 9


def test_tokens_are_refused_where_no_task_counts_them():
    with pytest.raises(RecipeError, match=r"train\.tokens"):
        gu.train("digits-cnn", {"train.tokens": "15M"})


def test_a_dry_run_keeps_nothing(tmp_path):
    from groundup.pipeline import plan_only

    facts = plan_only("digits-cnn", {"train.steps": 7})
    assert facts["steps"] == 7 and facts["parameters"]["all"] > 1000 and not list(tmp_path.iterdir())


def test_an_existing_run_is_refused_without_resume(tmp_path):
    gu.train("line-regression", {"watch.report": False, "train.steps": 2}, out=tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        gu.train("line-regression", {"watch.report": False, "train.steps": 2}, out=tmp_path / "run")
    with pytest.raises(RunError, match="--resume needs"):
        gu.train("line-regression", resume=True)
