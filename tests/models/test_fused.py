"""The C kernels of a training: the numbers and gradients of torch's own operations, and torch where there are none."""

import math
import shutil

import pytest
import torch
from torch.nn import functional as F

from groundup.models import fused, language, library
from groundup.models.decoder import Decoder
from groundup.tasks.token_loss import token_loss
from groundup.training.adamw import AdamW

from languages import FORMS, small  # isort: skip

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("gcc", "cc", "clang")), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def at_hand(isolated):
    if library.why_not("train") is not None:
        pytest.skip(f"no kernels here: {library.why_not('train')}")


def both_ways(ours, theirs, *inputs):
    """Outputs and gradients of two functions are alike."""
    found = []
    for function in (ours, theirs):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        outs = function(*own)
        outs = outs if isinstance(outs, tuple) else (outs,)
        sum((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in outs).backward()
        found.append([*outs, *(x.grad for x in own)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(b.detach().abs().max())))


SHAPES = [(1, 1, 1), (2, 3, 5), (1, 7, 16), (3, 50, 33), (2, 300, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    both_ways(lambda x, w: fused.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (shape[-1],), w, 1e-5), x, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    both_ways(fused.swiglu, lambda g, u: F.silu(g) * u, torch.randn(shape) * 5, torch.randn(shape))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_heads(rows, heads):
    b, t, d = 2, 9, 6
    angles = torch.randn(rows, 1, t, d // 2)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = torch.randn(b, t, heads[0], d), torch.randn(b, t, heads[1], d), torch.randn(b, t, heads[1], d)

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return language.rotate(q, cos, sin), language.rotate(k, cos, sin), v

    both_ways(lambda q, k, v: fused.heads(q, k, v, cos, sin), theirs, q, k, v)


@pytest.mark.parametrize("t", [1, 5, 16, 37])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_its_probabilities(t, masked, monkeypatch):
    q, k, v = torch.randn(2, 4, t, 8) * 4, torch.randn(2, 2, t, 8), torch.randn(2, 2, t, 8)
    may = language.allowed(torch.arange(t).expand(2, t) // 3, t, None, torch.device("cpu")) if masked else None
    both_ways(lambda q, k, v: language.attend(q, k, v, may, "explicit"), lambda q, k, v: language.attend(q, k, v, may, "sdpa"), q, k, v)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5, 32), (2, 4, 2, 40, 32), (2, 4, 2, 77, 64), (1, 6, 6, 200, 64), (3, 2, 1, 100, 96)])
@pytest.mark.parametrize("documents", [None, 1, 9, 33])
@pytest.mark.parametrize("window", [None, 1, 10])
def test_attention(shape, documents, window):
    b, heads, kv, t, d = shape
    q, k, v = torch.randn(b, heads, t, d) * 2, torch.randn(b, kv, t, d), torch.randn(b, kv, t, d)
    numbers = None if documents is None else torch.arange(t).expand(b, t) // documents
    spans = language.Spans.of(numbers, t, window, torch.device("cpu"))
    may = language.allowed(numbers, t, window, torch.device("cpu"))
    if may is not None:
        assert torch.equal(spans.mask().expand(may.shape), may)
    assert fused.attends(q, d)
    both_ways(lambda q, k, v: language.attend(q, k, v, spans, "sdpa"), lambda q, k, v: language.attend(q, k, v, may, "sdpa"), q, k, v)


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 5000])
@pytest.mark.parametrize("z", [0.0, 0.1])
def test_cross_entropy(vocabulary, z, monkeypatch):
    hidden, weight, targets = torch.randn(41, 8), torch.randn(vocabulary, 8) * 2, torch.randint(0, vocabulary, (41,))
    targets[3:5] = -100

    def theirs(h, w):
        logits, keep = h @ w.t(), targets >= 0
        return F.cross_entropy(logits[keep], targets[keep], reduction="sum") + z * logits[keep].logsumexp(1).square().sum()

    both_ways(lambda h, w: token_loss(h, w, targets, z_loss=z), theirs, hidden, weight)


@pytest.mark.parametrize("rows,width,vocabulary", [(1, 32, 1), (63, 32, 33), (64, 64, 32), (65, 96, 100), (300, 128, 1000)])
@pytest.mark.parametrize("z", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_and_its_loss(rows, width, vocabulary, z, frozen, monkeypatch):
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=not frozen)
    targets = torch.randint(0, vocabulary, (rows,))
    found, used, function = [], [], fused.token_loss
    monkeypatch.setattr(fused, "token_loss", lambda *a: (used.append(1), function(*a))[1])
    for takes in (fused.token_loss_takes, lambda *_: False):
        monkeypatch.setattr(fused, "token_loss_takes", takes)
        hidden.grad = weight.grad = None
        loss = token_loss(hidden, weight, targets, z_loss=z)
        (loss / 3).backward()
        found.append([loss.detach(), hidden.grad, weight.grad])
    assert len(used) == 1 and (found[0][2] is None) == frozen
    for ours, torchs in zip(*found):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-4)


def test_a_batch_without_targets_has_no_gradient():
    hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True)
    loss = token_loss(hidden, weight, torch.full((8,), -100))
    loss.backward()
    assert float(loss.detach()) == 0 and not hidden.grad.any() and not weight.grad.any()


def test_what_is_far_apart_and_what_is_no_number():
    logits = torch.tensor(
        [[1000.0, -1000.0, 0.0], [-1e30, -1e30, -1e30], [0.0, -math.inf, 1.0], [math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0]]
    )
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none")
    found = fused.cross_entropy_(logits.clone(), torch.zeros(5, dtype=torch.int64), 0.0, back=False)
    torch.testing.assert_close(found, expected, equal_nan=True)
    scores = torch.tensor([[[0.0, 9.0, 9.0], [500.0, -500.0, 9.0], [math.nan, 0.0, 0.0]]])
    fused.softmax_(scores, 1.0, None, 1)
    torch.testing.assert_close(scores[0, :2], torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    assert scores[0, 2].isnan().all()
    gate = torch.tensor([-500.0, -90.0, 0.0, 500.0, math.nan, math.inf])
    torch.testing.assert_close(fused.swiglu(gate, torch.ones(6)), F.silu(gate), equal_nan=True)


@pytest.mark.parametrize("path", ["sdpa", "explicit"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("form", ["decoder", "windows"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_model_learns_the_same_with_them_and_without(path, documents, form, wide, monkeypatch):
    tokens = torch.randint(0, 50, (2, 16))
    numbers = (torch.arange(16) // 5).expand(2, 16) if documents else None
    found = []
    for native in ("1", "0"):
        monkeypatch.setenv("GROUNDUP_NATIVE", native)
        torch.manual_seed(0)
        model = small("decoder", **FORMS[form] | ({"head_dim": 32} if wide else {}))
        model.attention_path = path
        loss = token_loss(model.features(tokens, numbers).flatten(0, 1), model.output_weight, tokens.flatten())
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_does_not_change_the_bits():
    x, weight, grad = torch.randn(700, 96), torch.randn(96), torch.randn(700, 96)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = fused.swiglu(fused.rms_norm(own, w, 1e-6), own)
        y.backward(grad)
        found.append((y.detach(), own.grad, w.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_they_are_for_float32_on_this_cpu_only():
    x = torch.randn(2, 4)
    assert fused.takes(x) and not fused.takes(x.double()) and not fused.takes(x.bfloat16()) and not fused.takes(x.to("meta"))
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        assert not fused.takes(mode.from_tensor(x))


def test_a_forecast_only_counts_them():
    told = []
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode, fused.forecast(lambda *facts: told.append(facts)):
        fused.swiglu(mode.from_tensor(torch.randn(2, 4)), mode.from_tensor(torch.randn(2, 4)))
    assert told == [(3 * 8 * 4, 0.0)]
    with fused.forecast(False):
        assert not fused.takes(torch.randn(2))


LAYERS = [  # batch, length, width, heads, kv_heads, hidden, norms of queries and keys, length of documents, window
    (2, 50, 128, 4, 4, 352, False, None, None),
    (3, 70, 128, 4, 2, 96, True, 9, None),
    (1, 33, 64, 2, 1, 64, True, None, 7),
    (1, 1, 32, 1, 1, 32, False, None, None),
    (2, 200, 192, 6, 2, 512, True, 33, 20),
]


def layers_of(width, heads, kv_heads, hidden, qk_norm, **settings):
    made = Decoder((8,), 16, layers=2, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden, qk_norm=qk_norm, **settings)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.normal_(p, mean=1, std=0.2)
    return made


@pytest.fixture
def run(monkeypatch):
    """What is run as layers after each other."""
    names, function = [], fused._run_layers
    monkeypatch.setattr(fused, "_run_layers", lambda name, *rest: (names.append(name), function(name, *rest)))
    return names


@pytest.mark.parametrize("shape", LAYERS)
def test_layers(shape, run):
    b, t, width, heads, kv_heads, hidden, qk_norm, document, window = shape
    model = layers_of(width, heads, kv_heads, hidden, qk_norm, window=window, window_from=1)
    documents = None if document is None else torch.arange(t).expand(b, t) // document
    tokens = torch.randint(16, (b, t))

    def whole(*weights):
        return torch.func.functional_call(Features(model), dict(zip(names, weights)), (tokens, documents))

    names, weights = zip(*Features(model).named_parameters())

    def parts(*weights):
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))  # whoever watches a part is told
        return whole(*weights)

    seen = []
    both_ways(whole, parts, *weights)
    assert run == ["layers", "layers_back"] and seen == [1]


class Features(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, documents):
        return self.model.features(tokens, documents)


def test_layers_with_frozen_matrices(run):
    model = layers_of(64, 2, 2, 96, False)
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.features(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"model.layers.0.mlp.up_proj.weight"}
    assert run == ["layers", "layers_back"]


def test_layers_that_are_computed_again_are_run_alone(run):
    model = layers_of(64, 2, 2, 96, False)
    model.recompute("whole")
    model.features(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert not run


def test_layers_in_other_precisions_stay_with_torch(run):
    model = layers_of(64, 2, 2, 96, False)
    with torch.autocast("cpu", torch.bfloat16):
        model.features(torch.zeros(1, 8, dtype=torch.int64))
    model.double().features(torch.zeros(1, 8, dtype=torch.int64))
    assert not run


@pytest.mark.parametrize("threads", [1, 3])
def test_layers_with_any_number_of_threads(threads):
    model = layers_of(128, 4, 2, 160, True)
    tokens, found = torch.randint(16, (5, 60)), []
    before = torch.get_num_threads()
    for count in (2, threads):
        torch.set_num_threads(count)
        try:
            model.zero_grad()
            hidden = model.features(tokens)
            hidden.square().sum().backward()
        finally:
            torch.set_num_threads(before)
        found.append([hidden.detach(), *(p.grad for p in model.parameters())])
    assert torch.equal(found[0][0], found[1][0])  # sums over tokens are cut by threads, rows are not
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("most", [None, 1e-3, 1.0, 1e6])
def test_adjusted_gradients(most):
    grads = [torch.randn(n) for n in (1, 7, 2048, 2049, 70000)]
    wanted = [g.clone() * 0.25 for g in grads]
    norm = torch.nn.utils.get_total_norm(wanted)
    if most is not None:
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in wanted]
        for p, g in zip(parameters, wanted):
            p.grad = g
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    torch.testing.assert_close(fused.adjust_(grads, 0.25, most), norm)
    torch.testing.assert_close(grads, wanted)
    assert not math.isfinite(fused.adjust_([torch.tensor([1.0, math.nan])], 1.0, most))


def test_our_adamw_does_what_torchs_does(monkeypatch):
    used, function = [], fused.adamw_
    monkeypatch.setattr(fused, "adamw_", lambda *a: (used.append(1), function(*a)))
    shapes, found = [(3, 5), (9000,), (70, 300)], []
    for kind in (AdamW, torch.optim.AdamW):
        random = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(s, generator=random)) for s in (*shapes, (4,))]
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 1e-3}]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, fused=True)
        for step in range(6):
            if step == 3:  # as a run goes on
                again = kind(groups, lr=1e-2, fused=True)
                again.load_state_dict(optimizer.state_dict())
                optimizer = again
            for p in weights[:3]:  # the last one has no gradient
                p.grad = torch.randn(p.shape, generator=random)
            if step == 4:
                weights[2].grad = weights[2].grad.t().contiguous().t()
            optimizer.step()
        states = [optimizer.state[w] for w in weights[:3]]
        assert not optimizer.state[weights[3]] and all(float(s["step"]) == 6 for s in states)
        found.append([*weights, *(s[k] for s in states for k in ("exp_avg", "exp_avg_sq"))])
    assert len(used) == 2 * 4  # without the first step, which makes the states, and the one with another order in memory
    for ours, torchs in zip(*found):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
