"""Self-tests find what is broken, pass what is not, and leave everything as it was."""

import json

import pytest
import torch

import groundup as gu
from groundup import jobs, pipeline
from groundup.checking.selftests import self_tests
from groundup.cli import main
from groundup.core.errors import GateError
from groundup.models import lora
from groundup.training.batches import Batches


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    folder = tmp_path_factory.mktemp("selftests")
    run = language_model(folder, "the colour of the sky is blue. 天空是蓝色的。 one two three\n" * 200, **{"train.steps": 10})
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": f"sky {i}?", "output": f"blue {i % 3}"}) for i in range(60)), encoding="utf-8")
    return run.path, str(data)


@pytest.fixture
def job(base, tmp_path):
    model, data = base
    recipe = pipeline.tuning_recipe(model, data, "lora", {"train.steps": 5, "method.dropout": 0.1})
    resolved, run, _ = jobs.open_run(recipe, {}, tmp_path / "run", resume=False, extend=False)
    yield jobs.build(resolved, run, resume=False, trust_code=False, train_base=None)
    run.close()


def ids(report):
    assert not report.failed, report.failed
    return [f.finding_id for f in report.findings]


def test_a_sound_training_passes_and_is_left_as_it_was(job):
    before = {n: p.clone() for n, p in job.state.model.named_parameters()}
    modes = [m.training for m in job.state.model.modules()]
    random = torch.get_rng_state()
    report = self_tests(job)
    assert ids(report) == [] and len(report.passed) == 7
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in job.state.model.named_parameters())
    assert torch.equal(random, torch.get_rng_state()) and modes == [m.training for m in job.state.model.modules()]


def broken_labels(job, monkeypatch):
    real = type(job.task).batch

    def batch(self, encoded, index, **options):
        made = real(self, encoded, index, **options)
        made.targets = torch.where(made.targets >= 0, made.inputs, made.targets)
        return made

    monkeypatch.setattr(type(job.task), "batch", batch)


def all_masked(job, monkeypatch):
    real = type(job.task).batch

    def batch(self, encoded, index, **options):
        made = real(self, encoded, index, **options)
        made.targets = torch.full_like(made.targets, -100)
        return made

    monkeypatch.setattr(type(job.task), "batch", batch)


def mixed_documents(job, monkeypatch):
    model = job.state.model
    real = model.features
    monkeypatch.setattr(model, "features", lambda x, documents=None, cache=None: real(x, None, cache))


def loud_adapter(job, monkeypatch):
    for layer in lora.adapted(job.state.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)


def silent_adapter(job, monkeypatch):
    for layer in lora.adapted(job.state.model).values():
        torch.nn.init.zeros_(layer.lora_A.weight)


def small_table(job, monkeypatch):
    monkeypatch.setattr(job.state.model, "vocabulary", 50)


def high_rate(job, monkeypatch):
    for optimizer in job.state.optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = 1e30


def unscaled(job, monkeypatch):
    """A loss that divides by its own batch's tokens, as a mean does."""
    from groundup.tasks.base import Loss

    real = type(job.task).loss

    def loss(self, model, batch):
        found = real(self, model, batch)
        return Loss(found.sum / found.count, found.count)

    monkeypatch.setattr(type(job.task), "loss", loss)


@pytest.mark.parametrize(
    "break_it, finding",
    [
        (broken_labels, "lm.labels_not_shifted"), (all_masked, "lm.all_labels_masked"), (mixed_documents, "lm.packing_mixes"),
        (loud_adapter, "lm.adapter_not_neutral"), (silent_adapter, "lm.lora_both_zero"), (small_table, "lm.vocab_too_small"),
        (high_rate, "grad.does_not_learn"), (unscaled, "optim.accumulation_not_scaled"),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(job, monkeypatch, break_it, finding):
    break_it(job, monkeypatch)
    report = self_tests(job)
    found = [f for f in report.findings if f.finding_id == finding]
    assert found and found[0].severity == "error" and found[0].message[0] != found[0].message[1] and found[0].location


def test_a_tensor_that_is_not_used_has_no_gradient(job):
    job.state.model.stray = torch.nn.Linear(3, 3)
    assert "grad.none" in ids(self_tests(job))


def test_the_command_and_what_stops_a_run(base, tmp_path, capsys, monkeypatch):
    model, data = base
    assert main(["check", str(model), "--data", data, "--method", "lora", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["findings"] == [] and len(facts["passed"]) > 20 and facts["seconds"] < 60
    assert main(["check", str(model), "--data", data, "--method", "full", "--lang", "zh"]) == 0
    assert "词表覆盖所有词元编号" in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "SHORT", 0.0)
    monkeypatch.setattr(pipeline, "LONG", 0.0)
    real = Batches.index
    settings = {"train.steps": 2, "optim.lr": 1e30, "evaluate.answers": 0, "evaluate.general": "none", "watch.report": False}
    with pytest.raises(GateError, match="1 errors"):
        gu.tune(model, data, "lora", settings, out=tmp_path / "no")
    assert not (tmp_path / "no").exists() and Batches.index is real
    assert gu.tune(model, data, "lora", settings | {"optim.lr": 1e-3}, out=tmp_path / "yes", check=False).path.is_dir()
