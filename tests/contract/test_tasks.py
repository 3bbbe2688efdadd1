"""Every registered task on data of its kind: what it learns is kept, its loss agrees with its metrics, its answer with its outputs."""

import json

import numpy as np
import pytest
import torch

from groundup.core.registry import DATASETS, METHODS, TASKS
from groundup.data.dataset import from_arrays
from groundup.evaluation.evaluate import evaluate
from groundup.modelfolder import build_task
from groundup.models.base import build_model
from groundup.tuning import stages_of

CPU = torch.device("cpu")
FEATURES = [
    n for n in TASKS.names() if TASKS.get(n).target.kind != "text"
]  # those: tests/tasks/test_language.py, tests/tuning/test_language.py
BY_KIND = {"image": "digits", "vector": "diabetes"}


def example(name):
    """A task fitted on a built-in data set that it can read."""
    task = build_task(name, {})
    dataset = DATASETS.get("wine" if name == "vector-classification" else BY_KIND[task.kind]).target()
    train = np.arange(0, len(dataset), 2)
    task.fit(dataset, train)
    return task, dataset, train


@pytest.mark.parametrize("name", TASKS.names())
def test_card_is_complete(name):
    card = TASKS.get(name).card
    assert card.summary and card.source and card.shapes and card.limits and any("\u4e00" <= c <= "\u9fff" for c in card.summary_zh)


@pytest.mark.parametrize("name", FEATURES)
def test_state_survives_json(name):
    task, dataset, train = example(name)
    again = build_task(name, {})
    again.load_state(json.loads(json.dumps(task.state())))
    assert again.input_shape == task.input_shape and again.num_outputs == task.num_outputs
    a, b = (t.batch(t.prepare(dataset, train[:5], CPU), torch.arange(5), training=False, rng=None) for t in (task, again))
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("name", FEATURES)
def test_the_loss_is_a_sum_over_supervised_items(name):
    task, dataset, train = example(name)
    torch.manual_seed(0)
    model = build_model("linear", {}, task.input_shape, task.num_outputs)
    encoded = task.prepare(dataset, train[:12], CPU)
    whole = task.loss(model, task.batch(encoded, torch.arange(12), training=False, rng=None))
    parts = [task.loss(model, task.batch(encoded, torch.arange(s, s + 4), training=False, rng=None)) for s in (0, 4, 8)]
    torch.testing.assert_close(whole.sum, sum(p.sum for p in parts))
    assert whole.count == sum(p.count for p in parts)
    metrics = evaluate(task, model, encoded, CPU, batch_size=5)
    assert metrics.compute()["loss"] == pytest.approx(float(whole.sum.detach()) / whole.count, rel=1e-5)
    assert task.default_metric in metrics.higher_is_better and set(metrics.compute()) <= set(metrics.higher_is_better)


@pytest.mark.parametrize("name", FEATURES)
def test_inputs_are_normalised_by_the_training_split(name):
    task, dataset, train = example(name)
    encoded = task.prepare(dataset, train, CPU)
    x = task.batch(encoded, torch.arange(len(train)), training=False, rng=None).inputs.double()
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    assert x.mean(axes).abs().max() < 1e-4 and (x.std(axes, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", FEATURES)
def test_the_answer_to_a_raw_input_is_that_of_the_prepared_one(name, tmp_path):
    from PIL import Image

    task, dataset, train = example(name)
    torch.manual_seed(0)
    model = build_model("linear", {}, task.input_shape, task.num_outputs).eval()
    outputs = model(task.batch(task.prepare(dataset, train[:1], CPU), torch.arange(1), training=False, rng=None).inputs)
    if task.kind == "image":
        Image.fromarray(dataset.inputs.array[train[0], 0]).save(tmp_path / "图 片.png")
        raw = [tmp_path / "图 片.png", (tmp_path / "图 片.png").read_bytes(), dataset.inputs.array[train[0]]]
    else:
        row = dataset.inputs[train[0]]
        raw = [row, ",".join(map(str, row)), dict(zip(dataset.feature_names, row)), f"[{'，'.join(map(str, row))}]"]
    answers = [task.answer(model, r) for r in raw]
    assert all(a == answers[0] for a in answers)
    json.dumps(answers[0])
    if "label" in answers[0]:
        assert answers[0]["label"] == task.labels[int(outputs.argmax())]


def test_binary_classification_has_one_output_and_two_probabilities():
    task = build_task("vector-classification", {})
    dataset = DATASETS.get("breast-cancer").target()
    task.fit(dataset, np.arange(len(dataset)))
    assert task.num_outputs == 1
    answer = task.answer(build_model("linear", {}, task.input_shape, 1), dataset.inputs[0])
    assert sum(t["probability"] for t in answer["top"]) == pytest.approx(1)


def test_multi_label_answers_any_number_of_labels(tmp_path):
    import groundup as gu

    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3))
    rows = ["a,b,c,left,up"] + [f"{p[0]},{p[1]},{p[2]},{int(p[0] > 0)},{int(p[1] > 0)}" for p in x]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    settings = {
        "data.source": "two.csv",
        "data.columns.target": ["left", "up"],
        "task": {"name": "vector-classification", "multi_label": True},
    }
    run = gu.train("linear-classifier", settings | {"train.epochs": 40, "watch.report": False}, out=tmp_path / "run")
    assert run.metrics["f1_macro"] > 0.9 and set(run.result["per_class"]) == {"left", "up"}
    assert run.predict("3,3,0")[0]["labels"] == ["left", "up"] and run.predict("3,-3,0")[0]["labels"] == ["left"]


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_regression_losses_equal_torchs(loss):
    task = build_task("vector-regression", {"loss": loss, "delta": 0.5})
    dataset = from_arrays("points", np.linspace(0, 1, 20)[:, None], np.linspace(5, 9, 20) ** 2)
    task.fit(dataset, np.arange(20))
    model = build_model("linear", {}, (1,), 1)
    batch = task.batch(task.prepare(dataset, np.arange(20), CPU), torch.arange(20), training=False, rng=None)
    peer = {"mse": torch.nn.MSELoss(), "mae": torch.nn.L1Loss(), "huber": torch.nn.HuberLoss(delta=0.5)}[loss](
        model(batch.inputs), batch.targets
    )
    ours = task.loss(model, batch)
    torch.testing.assert_close(ours.sum / ours.count, peer)


def test_label_smoothing_equals_torchs():
    task, dataset, train = example("image-classification")
    task.label_smoothing = 0.1
    model = build_model("linear", {}, task.input_shape, task.num_outputs)
    batch = task.batch(task.prepare(dataset, train[:9], CPU), torch.arange(9), training=False, rng=None)
    ours = task.loss(model, batch)
    torch.testing.assert_close(ours.sum / ours.count, torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model(batch.inputs), batch.targets))


@pytest.mark.parametrize(
    "name", [n for n in METHODS.names() if n not in ("lora", "peft")]
)  # for language models: tests/tuning/test_language.py
def test_methods_train_what_they_say(name):
    model = build_model("simple_cnn", {}, (1, 8, 8), 3)
    stages = stages_of(METHODS.get(name).target(model))
    trained = []
    for stage in stages:
        stage.enter(model)
        trained.append({n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad})
        assert all(m.training == (n.split(".")[0] in trained[-1]) for n, m in model.named_modules() if list(m.parameters(recurse=False)))
    all_of_it, head = {"conv1", "fc1", "fc2"}, {"fc2"}
    expected = {
        "full": [all_of_it],
        "freeze": [{"fc1", "fc2"}],
        "head": [head],
        "head-first": [head, all_of_it],
        "gradual": [head, {"fc1", "fc2"}, all_of_it],
    }
    assert trained == expected[name] and stages[0].begin == 0 and sorted(s.begin for s in stages) == [s.begin for s in stages]
    assert METHODS.get(name).card.summary_zh
