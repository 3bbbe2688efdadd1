"""The promises of exactness on a language model: killed and resumed, cut into micro-batches, divided among processes, and stopped at a NaN."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import groundup as gu
from groundup.core import files
from groundup.core.errors import TrainError
from groundup.core.run import RunFolder
from groundup.training import loop
from groundup.training.watch import WALL_CLOCK

SETTINGS = {
    "task": {"name": "language-modeling", "context": 24, "tokenizer": "char", "prompts": ["ab"], "sample_tokens": 6},
    "model": {"name": "decoder", "layers": 2, "width": 32, "heads": 2},
    "train.deterministic": True, "train.steps": 20, "train.save_every": 1, "train.batch_size": 8, "evaluate.every": 7,
    "watch.tensorboard": False, "watch.report": False, "watch.log_every": 3, "data.split.validation": 0.2,
}  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9 inside this process."""


@pytest.fixture
def texts(tmp_path):
    """Two sources of many short documents, so that every window holds several."""
    rng = np.random.default_rng(0)
    for name, letters in (("one", "abcdefgh"), ("two", "ijklmnop")):
        rows = [{"text": "".join(rng.choice(list(letters), rng.integers(3, 60)))} for _ in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def mixture(texts):
    return {"data.source": [{"source": str(texts / "one.jsonl"), "weight": 0.7}, {"source": str(texts / "two.jsonl"), "weight": 0.3}]}


def everything(run):
    last = sorted((run / "checkpoints").iterdir())[-1]
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in RunFolder.open(run).metric_rows()]
    return load_file(run / "model" / "model.safetensors"), load_file(last / "optim.safetensors"), rows


def same(a, b):
    (wa, oa, ra), (wb, ob, rb) = everything(a), everything(b)
    assert all(torch.equal(wa[k], wb[k]) for k in wa) and all(torch.equal(oa[k], ob[k]) for k in oa) and ra == rb


CASES = {
    "mixture": {},
    "accumulation": {"train.micro_batch_size": 3},
    "ema and adamw": {"train.ema": 0.9, "optim.name": "adamw", "optim.lr": 1e-3},
    "experts": {"model.experts": 3},
    "gpt2 with dropout": {"model": {"name": "gpt2", "layers": 1, "width": 32, "dropout": 0.2}},
    "lstm": {"model": {"name": "lstm", "width": 16, "layers": 1}, "optim.name": "adamw", "optim.lr": 1e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_bit_equal(case, texts, tmp_path, monkeypatch):
    settings = SETTINGS | mixture(texts) | CASES[case]
    whole = gu.train("gpt-stdlib", settings, out=tmp_path / "whole")
    original, stop_at = loop.step, [0]

    def dying(state, *rest):
        report = original(state, *rest)
        if state.step == stop_at[0]:
            raise Killed
        return report

    monkeypatch.setattr(loop, "step", dying)
    for stop_at[0] in (4, 11):
        with pytest.raises(Killed):
            gu.train("gpt-stdlib", settings, out=tmp_path / "cut", resume=True)
    monkeypatch.setattr(loop, "step", original)
    assert gu.train("gpt-stdlib", settings, out=tmp_path / "cut", resume=True).result["resumed_from"] == 10
    same(whole.path, tmp_path / "cut")


def test_accumulation_equals_the_large_batch(texts, tmp_path):
    """Windows hold different numbers of targets (the last one is filled up): the loss is divided by the count of the whole step."""
    found = []
    for size in (8, 1):
        settings = SETTINGS | mixture(texts) | {"train.micro_batch_size": size, "train.steps": 5, "optim.name": "sgd", "optim.lr": 0.1}
        found.append(load_file(gu.train("gpt-stdlib", settings, out=tmp_path / str(size)).model / "model.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5)


def command(*arguments):
    return [sys.executable, "-m", *arguments]


def recipe_file(texts, **more):
    import yaml

    from groundup.core.recipe import load

    path = texts / "recipe.yaml"
    tree = load("gpt-stdlib", SETTINGS | mixture(texts) | more).model_dump(mode="json")
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_really_killed_and_resumed(texts, tmp_path):
    recipe = recipe_file(texts, **{"train.steps": 60})
    whole = subprocess.run(command("groundup", "train", recipe, "--out", "whole"), capture_output=True, text=True, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command("groundup", "train", recipe, "--out", "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    import time

    while process.poll() is None and not list((tmp_path / "cut").glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command("groundup", "train", "--resume", "--out", "cut"), capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert files.sha256(tmp_path / "cut" / "model" / "model.safetensors") == files.sha256(
        tmp_path / "whole" / "model" / "model.safetensors"
    )


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "muon"])
def test_two_processes_train_the_model_of_one(optimizer, texts, tmp_path):
    more = {"optim.name": optimizer, "optim.lr": 0.1 if optimizer == "sgd" else 1e-2, "train.steps": 8, "train.batch_size": 7}
    recipe = recipe_file(texts, **more)
    one = subprocess.run(command("groundup", "train", recipe, "--out", "one"), capture_output=True, text=True, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29000 + os.getpid() % 900), "-m"]
    two = subprocess.run(
        command(*launcher, "groundup", "train", recipe, "--out", "two"), capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert two.returncode == 0, two.stderr
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-5 if optimizer == "sgd" else 1e-3, rtol=1e-4)
    losses = [[r["loss"] for r in RunFolder.open(tmp_path / n).metric_rows("train")] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    evaluations = [RunFolder.open(tmp_path / n).metric_rows("evaluate")[-1] for n in ("one", "two")]  # each process evaluates a part
    for key in ("loss", "token_accuracy", "bits_per_byte", "bits_per_byte_interval"):
        assert evaluations[0][key] == pytest.approx(evaluations[1][key], rel=1e-3)
    assert two.stdout.count("run folder") == 1, "only one process speaks"
    assert json.loads((tmp_path / "two" / "result.json").read_text())["steps"] == 8


def test_a_loss_that_is_not_finite_never_reaches_the_weights(texts, tmp_path):
    settings = SETTINGS | mixture(texts) | {"optim.name": "sgd", "optim.lr": 1e30, "train.clip_norm": None}
    with pytest.raises(TrainError, match="not finite") as error:
        gu.train("gpt-stdlib", settings, out=tmp_path / "run")
    assert "jsonl" in str(error.value) and "token" in str(error.value)
