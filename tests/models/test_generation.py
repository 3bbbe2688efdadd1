"""Generation: cached equals uncached, batches equal single prompts, transformers' greedy token for token, sampling as defined."""

import copy
import json

import pytest
import torch

from groundup.cli import main
from groundup.core.errors import ModelError, UserError
from groundup.models import generation
from groundup.models.base import build_model
from groundup.models.generation import Sampling, TextStream, choose, generate, write

from languages import FORMS, small, theirs_made  # isort: skip

GREEDY = Sampling(max_tokens=40, temperature=0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def uncached(net, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("form", FORMS)
def test_cached_batches_equal_the_model_without_a_cache(form):
    net = small(form if form in ("gpt2", "lstm") else "decoder", **FORMS[form]).eval()
    together = generate(net, PROMPTS, GREEDY)
    for prompt, new in zip(PROMPTS, together):
        assert new == uncached(net, prompt, 40) == generate(net, [prompt], GREEDY)[0]
    few = Sampling(max_tokens=5, temperature=0)  # too few to lay the matrices out anew
    assert [new[:5] for new in together] == generate(net, PROMPTS, few)


def test_a_cap_of_the_logits_holds_in_every_way_of_a_step(monkeypatch):
    net = small("decoder", **FORMS["decoder"]).eval()
    net.softcap, probabilities = 0.02, []
    choosing = generation.choose
    monkeypatch.setattr(generation, "choose", lambda logits, *rest: probabilities.append(logits) or choosing(logits, *rest))
    for native, most in (("1", 40), ("0", 40), ("1", 4)):
        monkeypatch.setenv("GROUNDUP_NATIVE", native)
        generate(net, [[1, 2]], Sampling(max_tokens=most, temperature=0))
    assert max(float(logits.abs().max()) for logits in probabilities) <= 0.0201
    net.softcap = None
    generate(net, [[1, 2]], Sampling(max_tokens=40, temperature=0))
    assert float(probabilities[-1].abs().max()) > 0.03


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_nan_is_told_and_not_sampled(precision):
    net = small("decoder", **FORMS["decoder"]).eval()
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        generate(net, [[1, 2]], Sampling(max_tokens=40, temperature=0, precision=precision))


def test_weights_made_for_inference_generate_too():
    with torch.inference_mode():
        net = small("decoder", **FORMS["decoder"]).eval()
        assert len(generate(net, [[1, 2]], GREEDY)[0]) == 40


def test_the_context_is_the_end():
    net = small("decoder", **FORMS["decoder"]).eval()
    assert [len(new) for new in generate(net, PROMPTS, Sampling(max_tokens=500, temperature=0))] == [64 - len(p) for p in PROMPTS]
    with pytest.raises(ModelError, match="context is 64"):
        generate(net, [[1] * 64], GREEDY)
    with pytest.raises(ModelError, match="no tokens"):
        generate(net, [[]], GREEDY)


@pytest.mark.filterwarnings("ignore")
def test_greedy_equals_transformers_token_for_token(tmp_path):
    from transformers import AutoModelForCausalLM

    from groundup import modelfolder

    for name in ("llama", "qwen3", "gpt2", "qwen3 moe"):
        theirs_made(name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"eos_token_id": 0, "bos_token_id": 0}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        peer = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        architecture, arguments, context, vocabulary = modelfolder.read_config(config)
        net = build_model(architecture, arguments, (context,), vocabulary).eval()
        modelfolder.read_weights(net, tmp_path / name, config["model_type"])
        for penalty in (1.0, 1.3):
            how = Sampling(max_tokens=40, temperature=0, repetition_penalty=penalty, stop_tokens=[0])
            for prompt, new in zip(PROMPTS, generate(net, PROMPTS, how)):
                given = peer.generate(
                    torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty, pad_token_id=0, eos_token_id=0
                )[0, len(prompt) :].tolist()
                assert new == given[: given.index(0)] if 0 in given else new == given


def test_samples_depend_on_seed_and_prompt_alone():
    net = small("decoder", **FORMS["decoder"]).eval()
    how = Sampling(max_tokens=20, temperature=1.0, seed=3)
    first = generate(net, PROMPTS, how)
    assert first == generate(net, PROMPTS, how) and first[0] == generate(net, PROMPTS[:1], how)[0]
    assert first != generate(net, PROMPTS, Sampling(max_tokens=20, temperature=1.0, seed=4))


def test_what_is_left_to_choose_from():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])

    def possible(**settings):
        rows = torch.arange(400)
        return set(choose(logits.expand(400, -1), None, Sampling(temperature=1.0, **settings), rows, 0).tolist())

    p = logits.softmax(-1)[0]
    assert possible(top_k=2) == {0, 1}
    assert possible(top_p=float(p[0]) + 0.01) == {0, 1} and possible(top_p=float(p[0]) - 0.01) == possible(top_p=0.0) == {0}
    assert possible(min_p=float(p[1] / p[0]) - 0.01) == {0, 1}
    assert possible() == {0, 1, 2, 3, 4}
    drawn = choose(logits.expand(20000, -1), None, Sampling(temperature=1.0), torch.arange(20000), 1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=5) / 20000, p, atol=0.02, rtol=0)
    for bad in ({"temperature": -1.0}, {"top_p": -0.1}, {"max_tokens": 0}, {"precision": "int3"}):
        with pytest.raises(UserError):
            Sampling(**bad)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_fewer_bits_stay_close(precision):
    net = small("decoder", layers=2, width=64, heads=4).eval()
    exact, coarse = (generate(net, PROMPTS[:1], Sampling(max_tokens=32, temperature=0, precision=p))[0] for p in ("float32", precision))
    assert exact[:3] == coarse[:3]
    with pytest.raises(ModelError, match="experts"):
        generate(small("lstm", width=32), PROMPTS, Sampling(precision=precision))


def test_text_comes_in_whole_characters_and_ends_before_a_stop():
    from groundup.data.tokenizers import train_bpe

    tokenizer = train_bpe(["明月几时有 def f():\n    return 1"], 264)
    stream = TextStream(tokenizer, ("STOP",))
    pieces = [stream.add(t) for t in tokenizer.encode("明月 goes SToo STOP more")] + [stream.add(None)]
    assert "".join(pieces) == "明月 goes SToo " and "\ufffd" not in "".join(pieces) and stream.done
    unfinished = TextStream(tokenizer, ("STOP",))
    assert "".join([*(unfinished.add(t) for t in tokenizer.encode("a ST")), unfinished.add(None)]) == "a ST"
    net = build_model("decoder", {"layers": 1, "width": 16, "heads": 2}, (32,), len(tokenizer))
    texts = ["", ""]
    for i, piece in write(net, tokenizer, [[5], [6, 7]], Sampling(max_tokens=10, temperature=0)):
        texts[i] += piece
    assert texts == [tokenizer.decode(ids) for ids in generate(net, [[5], [6, 7]], Sampling(max_tokens=10, temperature=0))]


def test_the_commands(shared_data, capsys, monkeypatch, tmp_path):
    folder = str(shared_data / "pretrained" / "stories260k" / "hf")
    assert main(["generate", folder, "Once upon a time", "--temperature", "0", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl")
    assert main(["generate", folder, "Once", "Lily", "--max-tokens", "8", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line.get("prompt") for line in lines[:-1]} == {0, 1} and lines[-1]["done"] and lines[-1]["tokens_per_s"] > 0
    assert main(["chat", folder]) == 2 and "no chat template" in capsys.readouterr().err
    assert main(["generate", folder, "a", "--top-p", "-1"]) == 2
    assert main(["serve", folder]) == 2 and main(["export", folder, "--to", "onnx"]) == 2


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_matrices_of_any_width_and_layout(rows, precision):
    for inputs, outputs in ((100, 344), (172, 64), (170, 512), (64, 4), (1024, 1600)):  # the last one takes the path of large matrices
        weight, x, bias = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(outputs)
        expected = x @ weight.T + bias
        found = generation._Matrix(weight, bias, rows, precision)(x)
        error = float((found - expected).norm() / expected.norm())
        assert error < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.04}[precision]


def test_what_was_laid_out_is_used_again_and_only_while_the_weights_stay():
    net = small("decoder", layers=2, width=64, heads=4).eval()
    how = Sampling(max_tokens=40, temperature=0)
    first = generate(net, PROMPTS[:1], how)
    kept = generation._Dense.kept[net][1]
    assert generate(net, PROMPTS[:1], how) == first and generation._Dense.kept[net][1] is kept
    with torch.no_grad():
        net.model.embed_tokens.weight.copy_(torch.randn_like(net.model.embed_tokens.weight))
    changed = generate(net, PROMPTS[:1], how)
    assert generation._Dense.kept[net][1] is not kept and changed == generate(copy.deepcopy(net), PROMPTS[:1], how)
    net.train()
    generation._Dense.kept.clear()
    generate(net, PROMPTS[:1], how)
    assert not generation._Dense.kept, "in a training the weights change, and memory is short"
