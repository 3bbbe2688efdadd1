"""The C kernel of the decoder's step: exact in float32, the same for a row alone and among others, and never missed where it cannot be had."""

import shutil
import stat
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from groundup.models import generation, library, native
from groundup.models.generation import Sampling, generate
from groundup.models.native import Native

from languages import FORMS, small  # isort: skip

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in ("gcc", "cc", "clang")), reason="needs a C compiler")

BASE = {"layers": 2, "width": 32, "heads": 4}
DECODERS = {
    "grouped": FORMS["decoder"],
    "windows": FORMS["windows"],
    "windows in some layers": BASE | {"window": 5, "window_from": 1},
    "no norms of queries and keys": BASE | {"qk_norm": False},
    "biases": BASE | {"bias": "all", "kv_heads": 1},
    "biases of queries, keys and values": BASE | {"bias": "qkv", "qk_norm": False, "tied": False},
    "two tables": BASE | {"tied": False},
    "scaled positions": BASE | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original": 32}},
    "odd widths": {"layers": 2, "width": 37, "heads": 3, "kv_heads": 1, "head_dim": 14, "hidden": 51, "bias": "all"},
    "wide": {"layers": 2, "width": 530, "heads": 2, "head_dim": 90, "hidden": 1100},  # more than one block of int8 sums
}
LENGTHS = [3, 1, 7, 2, 9, 5, 4, 6, 8, 3, 12, 1, 15, 2, 11, 10] * 3


@pytest.fixture(autouse=True)
def at_hand(isolated):
    if library.why_not("decode") is not None:
        pytest.skip(f"no kernel here: {library.why_not('decode')}")


def texts(rows, steps):
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (n + steps,), generator=random).tolist() for n in LENGTHS[:rows]]


def stepped(net, ids, steps, precision="float32", threads=1):
    """Logits of the last `steps` tokens of each text, [steps, B, vocabulary], by the kernel; the tokens before them by the model, on one thread:
    torch's own products change their bits with the number of threads."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        caches = []
        for text in ids:
            caches.append(net.new_cache(1, 40))
            if len(text) > steps:
                net.features(torch.tensor([text[:-steps]]), cache=caches[-1])
        cache = caches[0] if len(caches) == 1 else type(caches[0]).joined(caches, torch.arange(len(ids)))
        stepper = Native.of(net, len(ids), 40, precision, keep=False)
        torch.set_num_threads(threads)
        return torch.stack([stepper.step(torch.tensor([text[len(text) - steps + i] for text in ids]), cache) for i in range(steps)])


@pytest.mark.parametrize("form", DECODERS)
def test_steps_equal_the_model_without_a_cache(form):
    net = small("decoder", **DECODERS[form]).eval()
    for rows in (1, 3, 16):
        ids = texts(rows, 4)
        found = stepped(net, ids, 4)
        for r, text in enumerate(ids):
            with torch.no_grad():
                expected = net(torch.tensor([text]))[0, -4:]
            assert float((found[:, r] - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("form", ["grouped", "odd widths", "wide"])
def test_a_row_has_the_same_bits_alone_and_among_others(form, precision):
    net = small("decoder", **DECODERS[form]).eval()
    alone = [stepped(net, [text], 3, precision) for text in texts(33, 3)]
    for rows in (2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 33):
        for threads in (1, 2):
            together = stepped(net, texts(rows, 3), 3, precision, threads)
            assert all(torch.equal(together[:, r], alone[r][:, 0]) for r in range(rows))


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.02), ("int8", 0.04)])
@pytest.mark.parametrize("form", DECODERS)
def test_fewer_bits_are_close(form, precision, most):
    net = small("decoder", **DECODERS[form]).eval()
    exact, coarse = (stepped(net, texts(3, 4), 4, p) for p in ("float32", precision))
    assert 0 < float((coarse - exact).norm() / exact.norm()) < most


def test_int8_sums_have_room():
    """All weights and inputs at their largest, over more inputs than a block has."""
    net = small("decoder", layers=1, width=1500, heads=2, head_dim=8, hidden=16, qk_norm=False).eval()
    with torch.no_grad():
        net.model.embed_tokens.weight.fill_(0.5)
        net.model.layers[0].mlp.down_proj.weight.zero_()
        net.model.layers[0].self_attn.o_proj.weight.zero_()
        net.model.norm.weight.fill_(1.0)
    torch.testing.assert_close(stepped(net, [[1, 2]], 1, "int8"), torch.full((1, 1, 50), 750.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_generation_uses_it_and_says_the_same_as_torch(precision, monkeypatch):
    net = small("decoder", **FORMS["decoder"]).eval()
    prompts, how = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], Sampling(max_tokens=40, temperature=0, precision=precision)
    ours = generate(net, prompts, how)
    assert isinstance(native.Laid.kept[net][1], Native)
    monkeypatch.setenv("GROUNDUP_NATIVE", "0")
    theirs = generate(net, prompts, how)
    assert isinstance(native.Laid.kept[net][1], generation._Dense) and library.why_not("decode") == "GROUNDUP_NATIVE=0"
    assert ours == theirs if precision == "float32" else [new[:3] for new in ours] == [new[:3] for new in theirs]


def test_one_layout_serves_any_number_of_rows_and_goes_with_the_model():
    net = small("decoder", **FORMS["decoder"]).eval()
    how = Sampling(max_tokens=40, temperature=0)
    generate(net, [[1]], how)
    kept = native.Laid.kept[net][1]
    generate(net, [[1], [2, 3]], how)
    assert native.Laid.kept[net][1] is kept
    gone = weakref.ref(kept)
    del net, kept
    assert gone() is None


def test_what_is_outside_the_tables_is_told():
    net = small("decoder", **FORMS["decoder"]).eval()
    stepper, cache = Native.of(net, 1, 4, "float32", keep=False), net.new_cache(1, 4)
    with torch.inference_mode():
        for bad in (-1, 50):
            with pytest.raises(IndexError):
                stepper.step(torch.tensor([bad]), cache)
        for _ in range(4):
            stepper.step(torch.tensor([1]), cache)
        with pytest.raises(IndexError):
            stepper.step(torch.tensor([1]), cache)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "cache"))
    library._loaded.cache_clear()
    yield tmp_path / "cache"
    library._loaded.cache_clear()


@pytest.mark.parametrize("fault", ["none there", "fails", "makes nothing of use", "no folder"])
def test_without_a_working_compiler_torch_does_it(fault, anew, monkeypatch, tmp_path):
    net = small("decoder", **FORMS["decoder"]).eval()
    how = Sampling(max_tokens=40, temperature=0)
    expected = generate(net, [[1, 2]], how)
    library._loaded.cache_clear()
    shutil.rmtree(anew)
    if fault == "no folder":
        anew.write_text("a file")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        (tmp_path / "bin").mkdir()
        if fault != "none there":
            script = tmp_path / "bin" / "gcc"
            last = "exit 1" if fault == "fails" else 'for last; do :; done; echo nonsense > "$last"'
            script.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\necho it does not work >&2\n{last}\n")
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert generate(net, [[1, 2]], how) == expected
    assert isinstance(native.Laid.kept[net][1], generation._Dense)
    reason = library.why_not("decode")
    assert {"none there": "no C compiler", "fails": "it does not work"}.get(fault, "") in reason


def test_a_damaged_library_is_made_again(anew):
    assert library.why_not("decode") is None
    (path,) = anew.glob("native/*/decode.so")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-40] + b"x" + whole[-39:]):
        path.unlink()  # not in place: this process has it in use
        path.write_bytes(damaged)
        assert not library._checked(path)
    with ThreadPoolExecutor(2) as pool:  # two at once, as two processes would
        assert all(pool.map(lambda _: library._load("decode"), range(2)))
    assert library._checked(path) and [p.name for p in (anew / "native").iterdir()] == [path.parent.name]
