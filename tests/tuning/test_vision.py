"""Tuning on pictures: stages of unfreezing, layer-wise rates, BatchNorm, new classes beside old ones, unbalanced classes, several labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from groundup import pipeline
from groundup.core.errors import DataError, RecipeError
from groundup.models.base import build_model
from groundup.models.weights import read_state
from groundup.training.optim import learning_rate_factors

QUIET = {"watch.report": False, "watch.tensorboard": False}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    settings = {"data.classes": ["0", "1", "2", "3"], "train.epochs": 12, **QUIET}
    return pipeline.train("digits-cnn", settings, out=place / "run")


def tensors(run):
    return read_state(run.path / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["head-first", "gradual"])
def test_stages_survive_a_stop(base, tmp_path, method):
    """Trained in one go, and stopped in every stage: the same weights."""
    settings = {
        "train.steps": 12,
        "train.batch_size": 16,
        "train.deterministic": True,
        "train.keep": "last",
        "train.save_every": 2,
        **QUIET,
    }
    data = {"data.classes": ["0", "1", "2", "3"], "data.augment": {"mixup": 0.2, "cutmix": 1.0}}
    whole = pipeline.tune(base, "digits", method, settings | data, out=tmp_path / "whole")
    import shutil

    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    for name in ("result.json",):
        (cut / name).unlink()
    shutil.rmtree(cut / "model")
    for step in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(step)
    again = pipeline.train(None, out=cut, resume=True)
    assert again.result["resumed_from"] < 12
    assert all(torch.equal(v, tensors(again)[n]) for n, v in tensors(whole).items())


def test_only_the_head_moves_in_the_first_stage(base, tmp_path):
    settings = {"train.steps": 10, "method.share": 0.9, "train.keep": "last", "data.classes": ["0", "1", "2", "3"], **QUIET}
    run = pipeline.tune(base, "digits", "head-first", settings | {"optim.lr": 1e-3}, out=tmp_path / "run")
    before, after = tensors(base), tensors(run)
    moved = {n: float((after[n] - before[n]).abs().max()) for n in before}
    assert moved["fc2.weight"] > 3 * moved["conv1.weight"] > 0  # one step of ten for the layers below
    with pytest.raises(RecipeError, match=r"method.share = 1.5"):
        pipeline.tune(base, "digits", "head-first", {"method.share": 1.5, "data.classes": ["0", "1", "2", "3"]}, out=tmp_path / "no")


def test_layer_wise_rates_multiply_with_groups():
    model = build_model("simple_cnn", {}, (1, 8, 8), 3)
    factors = learning_rate_factors(model, {"conv": 0.5}, 0.1)
    assert factors["fc2.weight"] == 1 and factors["fc1.weight"] == pytest.approx(0.1) and factors["conv1.bias"] == pytest.approx(0.005)


@pytest.mark.parametrize("wanted", ["trained", "frozen"])
def test_batch_norm_is_frozen_or_not_and_that_is_said(tmp_path, wanted):
    settings = {"model": "resnet", "train.steps": 3, "data.source": "digits#100", **QUIET}
    first = pipeline.train("digits-cnn", settings, out=tmp_path / "first")
    run = pipeline.tune(
        first, "digits#100", "full", {"train.steps": 3, "method.batch_norm": wanted, "train.keep": "last", **QUIET}, out=tmp_path / "run"
    )
    before, after = tensors(first), tensors(run)
    statistics = [n for n in before if n.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(before[n], after[n]) == (wanted == "frozen") for n in statistics)
    assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    decisions = json.loads((run.path / "decisions.json").read_text(encoding="utf-8"))
    assert decisions["batch_norm"]["value"] == wanted


def test_new_classes_beside_the_old_ones(base, tmp_path):
    settings = {"data.classes": ["4", "5"], "train.epochs": 4, "optim.lr": 3e-3, **QUIET}
    run = pipeline.tune(base, "digits", "full", settings, keep_classes=True, rehearse=150, out=tmp_path / "run")
    assert run.load().card["labels"] == ["0", "1", "2", "3", "4", "5"]
    rows = run.result["before_after"]["rows"]
    old = next(r for r in rows if r["what"] == "old data")
    assert old["note"] == "among old and new classes" and old["after"] > 0.8 and run.metrics["accuracy"] > 0.8
    bare = pipeline.tune(base, "digits", "full", settings, keep_classes=True, out=tmp_path / "bare")
    forgotten = next(r for r in bare.result["before_after"]["rows"] if r["what"] == "old data")
    assert forgotten["after"] < old["after"]


def test_old_rows_of_the_head_are_kept(base, tmp_path):
    settings = {"data.classes": ["8"], "train.steps": 1, "optim.lr": 1e-9, "train.keep": "last", **QUIET}
    run = pipeline.tune(base, "digits", "head", settings, keep_classes=True, out=tmp_path / "run")  # a single new class
    head = tensors(run)["fc2.weight"]
    assert head.shape[0] == 5 and torch.allclose(head[:4], tensors(base)["fc2.weight"], atol=1e-6)
    with pytest.raises(RecipeError, match="keep_classes needs"):
        pipeline.train("digits-cnn", {"keep_classes": True}, out=tmp_path / "no")


# -- unbalanced classes, several labels --------------------------------------------------------------------------------------------
def unbalanced(folder, several=False):
    rng, rows = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(160):
        rare = i % 16 == 0
        pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
        pixels[:, 4 * rare : 4 * rare + 4] += 14
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(
            {"file": f"{i}.png", "labels": (["稀有"] if rare else []) + (["亮"] if i % 2 else [])}
            if several
            else {"file": f"{i}.png", "label": "稀有" if rare else "常见"}
        )
    (folder / "labels.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("settings", [{"task.class_weights": "balanced"}, {"data.balance": 1.0}, {"task.class_weights": {"稀有": 9.0}}])
def test_a_rare_class_is_found_with_weights_or_balance(tmp_path, settings):
    shared = {"data.source": unbalanced(tmp_path / "data"), "train.epochs": 4, "evaluate.metric": "recall_macro", **QUIET}
    plain = pipeline.train("digits-cnn", shared, out=tmp_path / "plain").evaluate(split="all")
    helped = pipeline.train("digits-cnn", shared | settings, out=tmp_path / "helped").evaluate(split="all")
    assert helped["per_class"]["稀有"]["recall"] > plain["per_class"]["稀有"]["recall"] or plain["per_class"]["稀有"]["recall"] == 1


def test_class_weights_give_the_weighted_mean_of_torch(tmp_path):
    from groundup.data.dataset import from_arrays
    from groundup.modelfolder import build_task
    from groundup.tasks.base import Batch

    task = build_task("image-classification", {"class_weights": {"0": 3.0, "1": 0.5}})
    data = from_arrays("d", np.zeros((6, 4, 4), np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None], [0, 1, 2, 0, 1, 2])
    task.fit(data, np.arange(6))
    model = build_model("linear", {}, (1, 4, 4), 3)
    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 2, 0])
    loss = task.loss(model, Batch(x, y))
    assert float((loss.sum / loss.count).detach()) == pytest.approx(
        float(F.cross_entropy(model(x), y, torch.tensor([3.0, 0.5, 1.0])).detach()), abs=1e-6
    )
    with pytest.raises(RecipeError, match=r"there is no label '7'"):
        build_task("image-classification", {"class_weights": {"7": 1.0}}).fit(data, np.arange(6))


def test_several_labels_per_picture(tmp_path):
    spec = unbalanced(tmp_path / "data", several=True)
    settings = {
        "data.source": spec,
        "task.multi_label": True,
        "task.class_weights": "balanced",
        "data.augment": {"mixup": 0.2},
        "train.epochs": 2,
    }
    run = pipeline.train("digits-cnn", settings, out=tmp_path / "run")
    assert {"f1_macro", "subset_accuracy"} <= set(run.metrics) and run.result["slices"]
    answer = run.predict(tmp_path / "data" / "3.png")[0]
    assert set(answer["probabilities"]) == {"稀有", "亮"}
    assert run.evaluate(spec)["metrics"]["f1_micro"] >= 0
    with pytest.raises(DataError, match="one label per picture"):
        pipeline.train("digits-cnn", {"task.multi_label": True}, out=tmp_path / "no")


def test_an_odd_micro_batch_would_divide_a_pair(tmp_path):
    settings = {"data.augment": {"mixup": 0.2}, "train.batch_size": 8, "train.micro_batch_size": 3, "train.steps": 1}
    with pytest.raises(RecipeError, match="mix pairs"):
        pipeline.train("digits-cnn", settings, out=tmp_path / "no")
    runs = [
        pipeline.train(
            "digits-cnn", settings | {"train.micro_batch_size": m, "train.steps": 4, "train.keep": "last", **QUIET}, out=tmp_path / str(m)
        )
        for m in (8, 2)
    ]
    a, b = map(tensors, runs)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
