"""Preferences: formats, the loss against its formula, what the reference is, and a model that learns them."""

import json
import math

import pytest
import torch

import groundup as gu
from groundup import examples, modelfolder
from groundup.core.recipe import Data
from groundup.data import conversations
from groundup.data.chat_tokens import parse, versions
from groundup.tasks.token_loss import token_nll, token_scores

ASKED = {"role": "user", "content": "2 + 2?"}
PAIR = {"messages": [ASKED], "answers": ["4", "5"]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"prompt": [ASKED], "chosen": [{"role": "assistant", "content": "4"}], "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": [ASKED, {"role": "assistant", "content": "4"}], "rejected": [ASKED, {"role": "assistant", "content": "5"}]},
        {"messages": [ASKED, {"role": "assistant", "content": "4"}], "rejected_response": "5"},
        {"prompt": "2 + 2?", "responses": ["5", "4"], "scores": [0.1, 0.9]},
        {"prompt": "2 + 2?", "responses": [{"text": "5", "rank": 2}, {"text": "4", "rank": 1}]},
        {"prompt": "2 + 2?", "responses": ["4", "5"]},
    ],
)
def test_every_format_becomes_the_same_preference(record):
    assert conversations.read_preference(record) == PAIR


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "completion": "b"}, "no preference"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "answer 2 is no text or empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": "a", "responses": ["b"]}, "two or more"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}, "equally good"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "not every answer"),
        ({"chosen": "b", "rejected": "c"}, "before 'user'"),
    ],
)
def test_what_is_wrong_with_a_preference_is_said(record, words):
    assert words in conversations.read_preference(record).en


def test_ranked_lists_are_pairs_with_the_best_one():
    made = conversations.read_preference({"prompt": "q", "responses": ["c", "a", "b", "a2"], "scores": [1, 3, 2, 3]})
    assert made["answers"] == ["a", "b", "c"]
    assert [v["messages"][-1]["content"] for v in versions(parse(conversations.line(made)))] == ["a", "b", "a", "c"]


def test_the_weighted_loss_has_the_gradient_of_plain_cross_entropy():
    torch.manual_seed(0)
    for softcap in (None, 5.0):
        hidden, weight = torch.randn(70, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        targets, weights = torch.randint(0, 50, (70,)), torch.randn(70)
        (token_nll(hidden, weight, targets, softcap) * weights).sum().backward()
        ours = hidden.grad.clone(), weight.grad.clone()
        hidden.grad = weight.grad = None
        logits = hidden @ weight.t()
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(token_scores(hidden, weight, targets, softcap)[0], loss.detach(), atol=1e-5, rtol=1e-5)
        (loss * weights).sum().backward()
        torch.testing.assert_close(ours[0], hidden.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours[1], weight.grad, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    folder = tmp_path_factory.mktemp("preferences")
    run = language_model(folder, "which is better? red blue green one two three 天空 " * 200)
    data = folder / "pairs.jsonl"
    numbers = ("one", "two", "three")
    rows = [{"prompt": f"better {i}?", "chosen": f"blue {numbers[i % 3]}", "rejected": f"red {numbers[i % 3]}"} for i in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return run.path, str(data)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_learns_what_is_better(base, tmp_path, method):
    model, data = base
    assert examples.task_for(data) == "preference-tuning"
    settings = {"train.steps": 25, "train.batch_size": 8, "optim.lr": 3e-3, "data.split.test": 0.1, "train.deterministic": True}
    run = gu.tune(model, data, method, settings, out=tmp_path / "run")
    assert run.result["task"] == "preference-tuning" and run.metrics["accuracy"] == 1.0 and run.metrics["margin"] > 0.5
    rows = {r["metric"]: r for r in run.result["before_after"]["rows"] if r["what"] == "new data"}
    assert (
        rows["loss"]["before"] == pytest.approx(math.log(2), abs=1e-5)
        and rows["accuracy"]["before"] == 0.5
        and abs(rows["margin"]["before"]) < 1e-5
    )
    assert run.result["before_after"]["verdict"]["en"].startswith("better on the new data")
    # the loss of a batch by its formula, from whole logits
    job_task, reference = run.load().task, modelfolder.load(model).model
    prepared = examples.prepared_for(Data(source=data), "preference-tuning")
    encoded = job_task.prepare(prepared.dataset, prepared.splits["validation"], torch.device("cpu"))
    job_task.observe(reference, {"validation": encoded}, tmp_path / "reference")
    batch = job_task.batch(encoded, torch.arange(len(encoded)), training=False, rng=None)
    tuned = run.load().model.train(False)
    with torch.no_grad():
        said = []
        for net in (tuned, reference):
            logp = torch.log_softmax(net.head(net.features(batch.inputs, batch.documents)), -1)
            token = logp.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
            said.append(torch.stack([token[(batch.owners == i) & (batch.targets >= 0)].sum() for i in range(2 * len(encoded))]).view(-1, 2))
        margin = (said[0] - said[1]) @ torch.tensor([1.0, -1.0])
        expected = -torch.nn.functional.logsigmoid(0.1 * margin).sum()
        torch.testing.assert_close(job_task.loss(tuned, batch).sum, expected, atol=1e-4, rtol=1e-4)


def test_a_stopped_preference_tuning_goes_on_exactly(base, tmp_path):
    import shutil

    model, data = base
    settings = {"train.steps": 8, "train.deterministic": True, "train.save_every": 4, "train.batch_size": 4}
    whole = gu.tune(model, data, "lora", settings, out=tmp_path / "whole")
    part = gu.tune(model, data, "lora", settings, out=tmp_path / "part")
    (part.path / "result.json").unlink()
    shutil.rmtree(part.path / "model")
    for folder in sorted((part.path / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = gu.train(None, out=part.path, resume=True)
    assert again.result["resumed_from"] == 4
    a, b = (r.load().model.state_dict() for r in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (json.dumps(r.result["before_after"]["rows"]) for r in (whole, again))
    assert a == b


def test_pairs_are_shown_as_the_model_sees_them(base, capsys):
    from groundup.cli import main

    model, data = base
    assert main(["data", "show", data, "--model", str(model), "--lang", "zh"]) == 0
    told = capsys.readouterr().out
    assert "较好的回答" in told and "较差的回答" in told
    assert main(["data", "check", data, "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "preference-tuning"
