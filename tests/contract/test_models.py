"""Every registered model against one contract; a new file under models/ is tested by being there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groundup
from groundup.core.errors import GroundupError
from groundup.core.registry import MODELS
from groundup.models.base import Model, build_model

SHAPES = [(1, 8, 8), (3, 28, 28), (1, 17, 31), (5,)]
LANGUAGE = ["decoder", "gpt2", "lstm"]  # these read tokens


BUILT = [
    n for n in MODELS.names() if n not in ("transformers", "timm", "causal-lm", *LANGUAGE)
]  # opened from weights: test_hub.py, test_causal_lm.py


def built(name, shape, outputs=4):
    torch.manual_seed(0)
    return build_model(name, {}, shape, outputs)


def takes(name):
    """The shapes that this model takes; it must refuse the others with an error of its own."""
    good = []
    for shape in SHAPES:
        try:
            built(name, shape)
            good.append(shape)
        except GroundupError as error:
            assert error.fix
    assert good
    return good


@pytest.mark.parametrize("name", MODELS.names())
def test_card_is_complete(name):
    card = MODELS.get(name).card
    assert card.summary and card.source and card.shapes and card.limits
    assert any("\u4e00" <= c <= "\u9fff" for c in card.summary_zh)


@pytest.mark.parametrize("name", BUILT)
def test_the_contract(name):
    for shape in takes(name):
        net = built(name, shape)
        assert isinstance(net, Model)
        x = torch.rand(3, *shape)
        assert net(x).shape == (3, 4) and net.example_input(2).shape == (2, *shape)
        assert torch.equal(net.eval()(x), net.head(net.features(x)))
        net.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        grouped = [id(p) for modules in net.layer_groups().values() for m in modules for p in m.parameters()]
        assert sorted(grouped) == sorted(id(p) for p in net.parameters()), "each parameter is in exactly one layer group"
        net.reset_head(7)
        assert net.num_outputs == 7 and net(x).shape == (3, 7)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_contract_of_language_models(name):
    for shape in SHAPES[:3]:
        with pytest.raises(GroundupError) as error:
            built(name, shape)
        assert error.value.fix
    net = built(name, (16,), 40)
    assert isinstance(net, Model)
    x = torch.randint(0, 40, (3, 12))
    assert net(x).shape == (3, 12, 40) and net(net.example_input(2)).shape[0] == 2 and net.flops_per_token(16) > 0
    assert torch.equal(net.eval()(x), net.head(net.features(x))) and net.output_weight.shape == (40, net.features(x).shape[-1])
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    grouped = [id(p) for modules in net.layer_groups().values() for m in modules for p in m.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters()), "each parameter is in exactly one layer group"
    net.eval()
    changed = x.clone()
    changed[1, 5:], changed[2] = (x[1, 5:] + 1) % 40, (x[2] + 3) % 40
    a, b = net(x), net(changed)
    torch.testing.assert_close(a[0], b[0])  # rows do not mix
    torch.testing.assert_close(a[1, :5], b[1, :5])  # and nothing sees what comes after it
    cache = net.new_cache(3, 12)
    torch.testing.assert_close(
        torch.cat([net.head(net.features(x[:, i : i + 1], cache=cache)) for i in range(12)], 1), a, atol=1e-5, rtol=1e-5
    )
    net.reset_head(7)
    assert net.num_outputs == 7 and net(x % 7).shape == (3, 12, 7)


@pytest.mark.parametrize("name", BUILT)
def test_samples_do_not_mix(name):
    shape = takes(name)[0]
    net = built(name, shape).eval()
    x = torch.rand(4, *shape)
    alone = net(x[1:2])
    torch.testing.assert_close(net(x)[1:2], alone)


@pytest.mark.parametrize("name", BUILT)
def test_same_seed_same_weights_and_state_round_trip(name):
    shape = takes(name)[0]
    a, b = built(name, shape), built(name, shape)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    with torch.no_grad():
        next(b.parameters()).add_(1)
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


NEW_MODEL = '''
"""A model that a test drops into the folder."""

from torch import Tensor, nn

from groundup.core.registry import MODELS, Card
from groundup.models.base import Model


@MODELS.register("dropped_in", Card(summary="a test's model", summary_zh="测试用的模型", source="none", shapes="[B, ...] -> [B, n]", limits="none"))
class DroppedIn(Model):
    def __init__(self, input_shape, num_outputs, width: int = 3):
        super().__init__(input_shape, num_outputs)
        import math
        self.body, self.out = nn.Linear(math.prod(input_shape), width), nn.Linear(width, num_outputs)
    def features(self, x: Tensor) -> Tensor: return self.body(x.flatten(1))
    def head(self, h: Tensor) -> Tensor: return self.out(h)
    def reset_head(self, num_outputs): self.out, self.num_outputs = nn.Linear(self.out.in_features, num_outputs), num_outputs
    def layer_groups(self): return {"body": [self.body], "head": [self.out]}
'''


def test_a_new_file_appears_everywhere_with_no_other_edit(tmp_path):
    """A copy of the package with one file more: the lists show it, this very contract passes on it, and it trains."""
    package = Path(groundup.__file__).parent
    shutil.copytree(package, tmp_path / "src" / "groundup", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "groundup" / "models" / "dropped_in.py").write_text(NEW_MODEL, encoding="utf-8")
    (tmp_path / "test_contract.py").write_text(Path(__file__).read_text(encoding="utf-8").split("\nNEW_MODEL")[0], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)

    listed = python("-m", "groundup", "models")
    assert "dropped_in" in listed.stdout, listed.stderr
    tested = python("-m", "pytest", "-q", "test_contract.py", "-k", "dropped_in", "-p", "no:cacheprovider")
    assert tested.returncode == 0 and "4 passed" in tested.stdout, tested.stdout
    trained = python(
        "-m",
        "groundup",
        "train",
        "digits-cnn",
        "--set",
        "model=dropped_in",
        "--set",
        "train.steps=3",
        "--set",
        "watch.report=false",
        "--out",
        "run",
    )
    assert trained.returncode == 0, trained.stderr
