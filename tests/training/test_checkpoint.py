"""A checkpoint that is not whole is never loaded: it is named, and the one before it is used."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import groundup as gu
from groundup.core import files
from groundup.core.errors import RunError
from groundup.training.checkpoint import Checkpoints, damage, load_weights, unique_tensors
from groundup.training.state import new_state


def state(step=0):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    made = new_state(model, [torch.optim.AdamW(model.parameters())], 100, torch.device("cpu"), ema=True, fp16=False)
    made.step = step
    model(torch.ones(1, 3)).sum().backward()
    made.optimizers[0].step()
    return made


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"torch": "x"})
    for step in (10, 20):
        checkpoints.save(state(step))
    return checkpoints


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


FILES = ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"]
HARM = {"truncated": truncate, "bit-flipped": flip_a_bit, "missing": os.unlink, "empty": lambda p: p.write_bytes(b"")}
CASES = [(n, h) for n in FILES for h in HARM if (n, h) != ("manifest.json", "bit-flipped")]  # that one has a test of its own below


@pytest.mark.parametrize(("name", "harm"), CASES)
def test_any_damage_is_found_named_and_passed_over(saved, name, harm):
    HARM[harm](saved.path(20) / name)
    fresh = state()
    restored = saved.load_newest(fresh)
    assert restored is not None and restored.step == fresh.step == 10
    ((folder, reason),) = restored.passed_over
    assert folder == "step-000020" and name in reason


def test_every_flipped_bit_of_the_manifest_is_harmless(saved):
    """Whatever bit of the manifest flips, either the checkpoint is refused or what it guards is still whole."""
    path = saved.path(20) / "manifest.json"
    original = path.read_bytes()
    for position in range(0, len(original), 5):
        data = bytearray(original)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(data))
        fresh = state()
        assert saved.load_newest(fresh).step in (10, 20)


def test_when_none_is_whole_it_refuses_instead_of_starting_again(saved):
    for step in (10, 20):
        (saved.path(step) / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint.*step-000020: manifest\.json is missing; step-000010"):
        saved.load_newest(state())


def test_the_choice_is_by_step_never_by_time(saved):
    os.utime(saved.path(10), (2**31, 2**31))
    fresh = state()
    assert saved.load_newest(fresh).step == 20


def test_the_newest_two_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    for step in range(1, 8):
        made = state(step)
        made.best_step = 3 if step >= 3 else -1
        checkpoints.save(made)
    assert checkpoints.steps() == [3, 6, 7]


def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_are_not(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    mine, parent = folder / f".step-000010.tmp-{dead.pid}-abcd1234", folder / f".step-000010.tmp-{os.getppid()}-abcd1234"
    mine.mkdir()
    parent.mkdir()
    Checkpoints(folder, {}).sweep()
    assert not mine.exists() and parent.exists()


@pytest.mark.parametrize("action", ["save_file", "write_manifest", "commit"])
def test_a_failing_writer_leaves_the_old_ones_and_nothing_half_written(saved, monkeypatch, action):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"groundup.training.checkpoint.{action}", fail)
    with pytest.raises(OSError, match="No space"):
        saved.save(state(30))
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-000010", "step-000020"]
    assert damage(saved.path(20)) is None


def test_restores_everything(saved):
    reference = state(20)
    torch.manual_seed(5)
    reference.best_value, reference.best_step = float("inf"), 7
    checkpoints = Checkpoints(saved.folder.parent / "other", {})
    draw_state = torch.get_rng_state()
    checkpoints.save(reference)
    expected = torch.rand(3)
    torch.set_rng_state(draw_state)
    fresh = state()
    torch.manual_seed(99)
    checkpoints.load_newest(fresh)
    assert torch.equal(torch.rand(3), expected)
    assert fresh.best_value == float("inf") and fresh.best_step == 7
    named, _ = fresh.tensors()
    original, _ = reference.tensors()
    assert all(torch.equal(named[k], original[k]) for k in original if not k.startswith("rng"))


def test_tied_weights_are_stored_once_and_loaded_back():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    stored = {k: v.clone() for k, v in unique_tensors(net.state_dict()).items()}
    assert "b.weight" not in stored
    with torch.no_grad():
        net["a"].weight.zero_()
    load_weights(net, stored)
    assert torch.equal(net["b"].weight, stored["a.weight"])


def test_weights_that_do_not_fit_are_refused_by_name():
    with pytest.raises(RunError, match="'bias' is missing"):
        load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 3)})
    with pytest.raises(RunError, match="'weight' is of another shape"):
        load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


def test_no_pickle_and_no_time_in_the_model_folder(tmp_path):
    """Two runs of one recipe give byte-equal weights files."""
    a, b = (gu.train("line-regression", {"train.steps": 5, "train.deterministic": True}, out=tmp_path / n) for n in "ab")
    assert files.sha256(a.model / "model.safetensors") == files.sha256(b.model / "model.safetensors")
    suffixes = {p.suffix for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".pkl", ".bin", ".npy"}
