"""The forecast against what the allocator itself reports of real steps."""

import json

import pytest
import torch

import groundup
from groundup import cli, jobs
from groundup.core.errors import RecipeError
from groundup.core.recipe import load
from groundup.planning import devices
from groundup.planning.devices import Device
from groundup.planning.forecast import forecast, subject_of
from groundup.training import loop

HERE = Device("here", 2**40, {"float32": 1e11}, 1e10, "assumed", gpu=False)
DECODER = {"model.size": "1M", "train.batch_size": 4, "task.vocabulary": 512, "data.source": "stdlib#40", "optim.name": "adamw"}
CASES = {
    "vision": ("digits-cnn", {}),
    "accumulation": ("digits-cnn", {"train.micro_batch_size": 16}),
    "sgd": ("digits-cnn", {"optim.name": "sgd"}),
    "decoder": ("gpt-stdlib", DECODER),
    "muon": ("gpt-stdlib", DECODER | {"optim.name": "muon"}),
    "micro-batches": ("gpt-stdlib", DECODER | {"train.micro_batch_size": 1}),
    "checkpointing": ("gpt-stdlib", DECODER | {"train.checkpointing": "whole"}),
    "selective": ("gpt-stdlib", DECODER | {"train.checkpointing": "selective"}),
}


def measured_peak(recipe, folder):
    """The most bytes of tensors in three steps, by the events of torch's allocator."""
    _, run, _ = jobs.open_run(recipe, {}, folder, resume=False, extend=False)
    try:
        job = jobs.build(recipe, run, resume=False, trust_code=False, train_base=None)
        model = job.state.model
        model.attention_path = "sdpa"  # what the forecast assumes; a training measures which is faster
        job.plan.stage(0, job.state.total).enter(model)
        model.zero_grad(set_to_none=True)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            for _ in range(3):
                loop.step(job.state, job.batches, job.task, job.plan)
        events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
        now = most = 0
        for event in events:
            now += event.nbytes()
            most = max(most, now)
        return most + sum(storages.values())
    finally:
        run.close()


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_that_of_real_steps(case, tmp_path):
    name, changes = CASES[case]
    recipe = load(name, {"train.micro_batch_size": changes.get("train.micro_batch_size", changes.get("train.batch_size", 64)), **changes})
    found = forecast(subject_of(recipe), HERE)
    measured = measured_peak(recipe, tmp_path / "run")
    assert found.peak == pytest.approx(measured, rel=0.05)
    assert found.memory["weights"] == pytest.approx(4 * found.parameters[0], rel=0.05)


def test_a_model_larger_than_this_machine_is_planned_without_its_weights():
    found = forecast(
        subject_of(load("gpt-stdlib", DECODER | {"model.size": "8B", "model.layers": 4, "model.width": 16384})), devices.find("h100")
    )
    assert found.parameters[0] > 4e9 and not found.fits
    assert found.memory["weights"] >= 4 * found.parameters[0]


def test_more_micro_batches_take_less_and_checkpointing_too():
    whole, small, recomputed = (
        forecast(subject_of(load("gpt-stdlib", DECODER | changes)), HERE).peak
        for changes in (
            {"train.micro_batch_size": 4},
            {"train.micro_batch_size": 1},
            {"train.micro_batch_size": 4, "train.checkpointing": "whole"},
        )
    )
    assert small < whole and recomputed < whole


def test_the_command(capsys):
    assert cli.main(["plan", "digits-cnn", "--device", "a100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["device"] == "a100" and facts["steps"] > 0
    owners = {k: v for k, v in facts["memory"].items() if k not in ("peak", "capacity")}
    assert sum(owners.values()) == facts["memory"]["peak"]
    assert facts["train_seconds"][0] <= facts["train_seconds"][1]


def test_what_does_not_fit_exits_3_with_changes_that_do(capsys):
    big = [f"--set={k}={v}" for k, v in (DECODER | {"model.size": "1B", "optim.name": "muon"}).items()]
    assert cli.main(["plan", "gpt-stdlib", *big, "--device", "rtx4090", "--lang", "en"]) == 3
    out = capsys.readouterr().out
    assert "does not fit" in out and "--set optim.name=adamw" in out


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(RecipeError, match="a100"):
        groundup.plan("digits-cnn", device="a10")


@pytest.mark.parametrize("name", sorted(devices.DEVICES))
def test_devices_name_their_source(name):
    device = devices.DEVICES[name]
    assert device.source and device.memory > 2**30 and device.flops["bfloat16"] >= device.flops["float32"]
