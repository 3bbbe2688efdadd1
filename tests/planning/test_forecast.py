"""The forecast against what the allocator itself reports of real steps."""

import json

import pytest
import torch

import groundup
from groundup import cli, jobs, pipeline
from groundup.core.errors import RecipeError
from groundup.core.recipe import load
from groundup.planning import devices, shapes
from groundup.planning import forecast as forecasting
from groundup.planning.devices import Device
from groundup.planning.forecast import forecast, subject_of
from groundup.training import loop

HERE = Device("here", 2**40, {"float32": 1e11}, 1e10, "assumed", gpu=False)
DECODER = {
    "model.size": "1M",
    "model.layers": 2,
    "train.batch_size": 4,
    "task.vocabulary": 512,
    "data.source": "stdlib#40",
    "optim.name": "adamw",
}
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
    """The most bytes of tensors in three steps about the largest batch, by the events of torch's allocator."""
    _, run, _ = jobs.open_run(recipe, {}, folder, resume=False, extend=False)
    try:
        job = jobs.build(recipe, run, resume=False, trust_code=False, train_base=None)
        model = job.state.model
        model.attention_path = "sdpa"  # what the forecast assumes; a training measures which is faster
        job.plan.stage(0, job.state.total).enter(model)
        model.zero_grad(set_to_none=True)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
        sizes = [
            max(sum(t.nbytes for t in vars(b).values() if isinstance(t, torch.Tensor)) for b in job.batches.micro(k)) for k in range(16)
        ]
        job.state.step = max(1, sizes.index(max(sizes))) - 1  # the largest batch is in the middle, or its first meets no optimizer states
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


def test_what_does_not_fit_exits_3_with_changes_that_do(capsys, monkeypatch):
    monkeypatch.setattr(forecasting, "PATIENCE", 5.0)
    monkeypatch.setattr(devices, "find", lambda name: Device("small", 1100 * 2**20, {"float32": 1e12, "bfloat16": 1e12}, 1e11, "assumed"))
    big = [f"--set={k}={v}" for k, v in (DECODER | {"model.width": 2048, "model.layers": 1, "optim.name": "muon"}).items()]
    assert cli.main(["plan", "gpt-stdlib", *big, "--lang", "en"]) == 3
    out = capsys.readouterr().out
    assert "does not fit" in out and "--set optim.name=adamw" in out


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(RecipeError, match="a100"):
        groundup.plan("digits-cnn", device="a10")


@pytest.mark.parametrize("name", sorted(devices.DEVICES))
def test_devices_name_their_source(name):
    device = devices.DEVICES[name]
    assert device.source and device.memory > 2**30 and device.flops["bfloat16"] >= device.flops["float32"]


# -- models without their weights, several devices --------------------------------------------------------------------------------
TINY = {"task.context": 64, "task.vocabulary": 512, "train.batch_size": 8}


def test_the_layers_that_are_not_traced_are_extrapolated(monkeypatch):
    subject = shapes.subject_of_shape("5M", "full", TINY | {"model.layers": 8, "train.checkpointing": "whole"})
    guessed = forecasting.forecast(subject, HERE)
    monkeypatch.setattr(forecasting, "FEW", (8, 9))  # as it is: no layer is left out
    traced = forecasting.forecast(subject, HERE)
    assert guessed.peak == pytest.approx(traced.peak, rel=0.01)
    assert guessed.evaluation == pytest.approx(traced.evaluation, rel=0.01)
    assert guessed.flops == pytest.approx(traced.flops, rel=1e-6)
    assert guessed.parameters == traced.parameters


def test_a_config_is_enough(tmp_path, capsys):
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        "intermediate_size": 128, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    folder = tmp_path / "一个 模型"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(folder), "--method", "lora", "--device", "rtx4090", "--price", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["parameters"]["trainable"] < facts["parameters"]["all"]
    assert facts["kv_cache"] == 2 * 2 * 2 * 16 * 128 * 4
    assert facts["cost"] and facts["kilowatt_hours"] and facts["calibrated"] is None
    (folder / "config.json").write_text("{}")
    assert cli.main(["plan", str(folder), "--lang", "en"]) == 2
    assert "model_type" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "nothing"), "--lang", "en"]) == 2


def test_fewer_bits_averages_and_offloading_are_counted():
    def peak(changes, method="lora"):
        return forecasting.forecast(shapes.subject_of_shape("5M", method, TINY | {"model.layers": 2} | changes), devices.find("h100"))

    plain, four = peak({}), peak({"method.bits": 4})
    assert four.memory["weights"] < plain.memory["weights"]
    averaged, offloaded, full = peak({"train.ema": 0.99}, "full"), peak({"optim.offload": True}, "full"), peak({}, "full")
    assert averaged.memory["ema"] == 4 * full.parameters[1]
    assert offloaded.peak < full.peak and offloaded.step_seconds > full.step_seconds


def test_far_too_large_a_model_gets_the_strongest_advice_first(monkeypatch):
    monkeypatch.setattr(forecasting, "PATIENCE", 5.0)
    small = Device("small", 15 * 2**20, {"float32": 1e12, "bfloat16": 1e12}, 1e11, "assumed")
    monkeypatch.setattr(devices, "find", lambda name: small)
    facts = groundup.plan("5M", TINY | {"train.batch_size": 2, "model.layers": 2}, device="small")
    assert not facts["fits"] and any(a["fits"] for a in facts["advice"])
    assert facts["advice"][-1]["set"]["method.name"] == "lora"


def test_three_real_steps_are_measured_here():
    facts = groundup.plan("digits-cnn")
    assert facts["calibrated"] and facts["step_seconds"][0] < facts["calibrated"] < facts["step_seconds"][1]
    assert groundup.plan("digits-cnn", calibrate=False)["calibrated"] is None


@pytest.mark.parametrize("options", [{"gpus": 3}, {"gpus": 0}, {"gpus": 2, "sharding": "other"}])
def test_devices_that_cannot_share_the_batch_are_refused(options):
    with pytest.raises(RecipeError):
        groundup.plan("1M", TINY, device="h100", **options)


@pytest.mark.parametrize("long", [0.0, 120.0])
def test_every_training_begins_with_three_lines(long, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "LONG", long)
    run = ["train", "digits-cnn", "--set=train.steps=2", "--no-check", f"--out={tmp_path / 'run'}", "--lang", "en"]
    assert cli.main(run) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan:")]
    assert len(told) == 3 and ("activations" in told[0] if not long else "measured" in told[0])


def test_experts_are_no_layers():
    facts = groundup.plan("1M", TINY | {"model.layers": 2, "model.experts": 8}, device="h100")
    assert facts["fits"] and facts["parameters"]["all"] > 2_000_000


def test_a_base_in_four_bits_keeps_no_copies_in_sixteen():
    four = forecasting.forecast(shapes.subject_of_shape("5M", "lora", TINY | {"model.layers": 2, "method.bits": 4}), devices.find("h100"))
    plain = forecasting.forecast(shapes.subject_of_shape("5M", "lora", TINY | {"model.layers": 2}), devices.find("h100"))
    assert four.memory.get("cast", 0) < 0.3 * plain.memory["cast"]


def test_devices_without_bfloat16_are_planned_as_they_train():
    assert groundup.plan("1M", TINY | {"model.layers": 2}, device="t4")["precision"] == "float32"


def test_the_assumed_batch_divides_and_the_devices_are_gpus(tmp_path, capsys):
    assert groundup.plan("1M", {"model.layers": 1, "task.context": 64}, device="h100", gpus=3)["batch_size"] == 6
    if not torch.cuda.is_available():
        assert cli.main(["plan", "1M", "--gpus", "8", "--lang", "en"]) == 2
        assert "--device h100" in capsys.readouterr().err
    assert cli.main(["plan", "1M", "--device", "h100", "--price", "-5", "--lang", "en"]) == 2
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    assert cli.main(["plan", str(tmp_path), "--lang", "en"]) == 2
    assert "not JSON" in capsys.readouterr().err


def test_what_is_so_already_is_not_advised():
    recipe = load("gpt-stdlib", {"train.checkpointing": "whole"})
    own = forecast(subject_of(load("digits-cnn")), HERE)
    own.micro_batch_size = 1
    tried = [
        {"train.micro_batch_size": 1},
        {"train.checkpointing": "whole"},
        {"train.checkpointing": "whole", "optim.offload": True},
        {"optim.offload": True},
    ]
    assert forecasting._that_change(tried, recipe, own) == [{"optim.offload": True}]
