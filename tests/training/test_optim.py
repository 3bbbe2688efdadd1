import pytest
import torch
from torch import nn

from groundup.core.errors import RecipeError
from groundup.core.recipe import Optim
from groundup.models.base import build_model
from groundup.training.muon import Muon
from groundup.training.optim import build_optimizers, masked_step, set_learning_rate


def model():
    torch.manual_seed(0)
    return build_model("simple_cnn", {}, (1, 8, 8), 4)


def backward(net):
    net.zero_grad()
    net(torch.ones(3, 1, 8, 8)).square().sum().backward()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "muon"])
def test_each_optimizer_lowers_the_loss(name):
    net = model()
    optimizers = build_optimizers(
        net, Optim(name=name, lr=1e-4, momentum=0.9 if name in ("sgd", "rmsprop") else None, nesterov=name == "sgd"), "cpu"
    )
    first = float(net(torch.ones(3, 1, 8, 8)).square().sum().detach())
    for _ in range(5):
        backward(net)
        for optimizer in optimizers:
            optimizer.step()
    assert float(net(torch.ones(3, 1, 8, 8)).square().sum().detach()) < first


def test_weight_decay_spares_biases_and_norms():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    (optimizer,) = build_optimizers(net, Optim(weight_decay=0.5), "cpu")
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(net[0].weight)] == 0.5
    assert decay[id(net[0].bias)] == decay[id(net[1].weight)] == decay[id(net[1].bias)] == 0.0


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    net = model()
    muon, adamw = build_optimizers(net, Optim(name="muon"), "cpu")
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [p is net.fc1.weight for g in muon.param_groups for p in g["params"]] == [True]
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert rest == {id(p) for p in net.parameters()} - {id(net.fc1.weight)}


def test_learning_rates_per_layer_group_and_per_pattern():
    net = model()
    optimizers = build_optimizers(net, Optim(lr=1.0, groups={"conv": 0.1, "fc2.*": 10.0}), "cpu")
    set_learning_rate(optimizers, 0.5)
    lr = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert (lr[id(net.conv1.weight)], lr[id(net.fc1.weight)], lr[id(net.fc2.bias)]) == (0.05, 0.5, 5.0)


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"'convs' matches no layer group.*'conv'"):
        build_optimizers(model(), Optim(groups={"convs": 0.1}), "cpu")


def test_nothing_to_train_is_an_error():
    net = model()
    net.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter"):
        build_optimizers(net, Optim(), "cpu")


def test_nesterov_needs_a_momentum():
    with pytest.raises(RecipeError, match="momentum"):
        build_optimizers(model(), Optim(name="sgd", nesterov=True), "cpu")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "muon"])
def test_a_masked_step_changes_neither_weights_nor_optimizer_state(name):
    """Fused optimizers skip on the device, the others on the host: the next good step must be as if the bad one had not been."""
    results = []
    for with_bad_step in (False, True):
        net = model()
        optimizers = build_optimizers(net, Optim(name=name, lr=1e-2, momentum=0.9 if name == "sgd" else None), "cpu")
        backward(net)
        masked_step(optimizers, torch.tensor(True))
        if with_bad_step:
            before = [p.detach().clone() for p in net.parameters()]
            for p in net.parameters():
                p.grad = torch.full_like(p, float("nan"))
            masked_step(optimizers, torch.tensor(False))
            assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        backward(net)
        masked_step(optimizers, torch.tensor(True))
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def tuned(config, steps=3):
    import torch

    from groundup.training.optim import build_optimizers

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.ReLU(), torch.nn.Linear(70, 4))
    optimizers = build_optimizers(net, config, "cpu")
    for _ in range(steps):
        net(torch.randn(8, 70)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return net, optimizers


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon", "rmsprop"])
def test_offloaded_states_give_the_same_weights(name):
    config = Optim(name=name, lr=1e-2, momentum=0.9 if name in ("sgd", "muon") else None)
    plain, _ = tuned(config)
    away, optimizers = tuned(config.model_copy(update={"offload": True}))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), away.parameters()))
    assert optimizers[0].state_dict()["state"], "what a checkpoint keeps"
    assert not optimizers[0].state, "nothing on the device"


@pytest.mark.filterwarnings("ignore")
def test_eight_bits_come_close_and_are_kept_in_a_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    plain, _ = tuned(Optim(name="adamw", lr=1e-2))
    small, optimizers = tuned(Optim(name="adamw8bit", lr=1e-2))
    for a, b in zip(plain.parameters(), small.parameters()):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0.1)
    assert any(v.dtype == torch.uint8 for s in optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor))
