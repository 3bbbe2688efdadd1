"""What one rank of many holds, from FSDP2 itself on ranks that do not exist."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.core.errors import GroundupError
from groundup.core.recipe import load
from groundup.models import fused
from groundup.models.base import build_model
from groundup.planning import devices, sharded
from groundup.planning.forecast import forecast, subject_of
from groundup.planning.sharded import sharded_moments
from groundup.training.optim import build_optimizers
from groundup.training.parallel import Ranks

SMALL = {
    "model.layers": 2,
    "model.width": 128,
    "model.heads": 2,
    "train.batch_size": 4,
    "task.vocabulary": 512,
    "task.context": 32,
    "data.source": "stdlib#40",
    "optim.name": "adamw",
}


def traced(changes=None, *, world=4, precision="bfloat16"):
    """The subject, what stands at the peak of a step, and the bytes sent."""
    subject = subject_of(load("gpt-stdlib", SMALL | (changes or {})))
    moments, sent = sharded_moments(subject, precision=precision, size=1, world=world)
    return subject, worst(moments), sent


def worst(moments):
    return max((m for phase, m in moments.items() if phase != "evaluation"), key=lambda m: sum(m.values()))


def bytes_of(model, trained=False):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def test_each_rank_holds_its_part_of_the_states():
    subject, memory, sent = traced()
    whole = bytes_of(subject.model)
    assert memory["weights"] == pytest.approx(whole / 4, rel=0.02)
    assert memory["optimizer"] == pytest.approx(2 * whole / 4, rel=0.02)
    assert memory["gathered"] > 0
    # bfloat16 weights twice (the root's once, it stays gathered between forward and backward), float32 gradients once
    root = bytes_of(subject.model) - sum(bytes_of(layer) for layer in subject.model.model.layers)
    assert sent == pytest.approx(0.75 * (2 * whole - root / 2), rel=0.001)
    assert traced(precision="float32")[2] == pytest.approx(0.75 * (3 * whole - root), rel=0.001)


def test_the_peak_is_that_of_the_allocator():
    """FSDP2 with real tensors, of which the collectives send nothing: gloo's own buffers, which GPUs do not have, would be counted too."""
    recipe = load("gpt-stdlib", SMALL)
    subject = subject_of(recipe)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        task = subject.task
        model = build_model(recipe.model.name, recipe.model.arguments, task.input_shape, task.num_outputs)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(model, "features")
        (optimizer,) = build_optimizers(model, recipe.optim, "cpu")
        standing = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
        batches = copy.copy(subject.batches)
        batches.ranks = Ranks(0, 4)
        # kernels of CPUs are none of what a plan for GPUs counts
        with fused.forecast(False), torch.autograd.profiler.profile(profile_memory=True) as profile:
            for k in range(2):
                optimizer.zero_grad(set_to_none=True)
                for batch in batches.micro(k):
                    task.loss(model, batch).sum.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    finally:
        dist.destroy_process_group()
    events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    most = max(itertools.accumulate(e.nbytes() for e in events))
    moments, _ = sharded_moments(subject, precision="float32", size=1, world=4)
    assert sum(worst(moments).values()) == pytest.approx(standing + most, rel=0.02)


def test_the_subject_is_left_as_it_was():
    subject, first, _ = traced()
    assert type(subject.model).__name__ == "Decoder" and not dist.is_initialized()
    assert not any(isinstance(p, DTensor) for p in subject.model.parameters())
    again, _ = sharded_moments(subject, precision="bfloat16", size=1, world=4)
    assert worst(again) == first


def test_extrapolated_layers_are_those_traced(monkeypatch):
    deep = {"model.layers": 6, "model.width": 64}
    monkeypatch.setattr(sharded, "WHOLE", 5)
    _, guessed, sent = traced(deep)
    monkeypatch.setattr(sharded, "WHOLE", 10)
    _, memory, all_sent = traced(deep)
    assert sum(guessed.values()) == pytest.approx(sum(memory.values()), rel=0.03)
    assert sent == pytest.approx(all_sent, rel=0.03)
    for owner in ("weights", "activations", "gathered", "optimizer"):
        assert guessed.get(owner, 0) == pytest.approx(memory.get(owner, 0), rel=0.03)


def test_replicas_hold_everything_and_the_gradients_twice():
    subject = subject_of(load("gpt-stdlib", SMALL))
    found = forecast(subject, devices.find("h100"), gpus=4, sharding="ddp")
    whole = bytes_of(subject.model)
    assert found.memory["weights"] == pytest.approx(whole, rel=0.01)
    assert found.memory["buckets"] == whole and found.traffic == 2 * 0.75 * whole


def test_only_the_adapters_have_gradients_and_states():
    subject, memory, sent = traced({"method.name": "lora"})
    trained, whole = bytes_of(subject.model, trained=True), bytes_of(subject.model)
    assert memory["optimizer"] == pytest.approx(2 * trained / 4, rel=0.05)
    assert memory["weights"] == pytest.approx((whole - trained) / 4, rel=0.02)
    assert sent < 0.75 * (whole + trained)


def test_a_large_model_on_many_ranks():
    subject, memory, _ = traced({"model.layers": 1, "model.width": 8192, "model.heads": 64, "train.batch_size": 512}, world=512)
    assert memory["weights"] == pytest.approx(bytes_of(subject.model) / 512, rel=0.02)


def test_a_process_that_is_one_of_several_is_refused():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(GroundupError, match="process group"):
            traced()
    finally:
        dist.destroy_process_group()
