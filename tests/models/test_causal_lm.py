"""Language models of transformers that our decoder does not have: the same logits, documents apart, tuned, saved and opened again."""

import json

import pytest
import torch

import groundup as gu
from groundup import modelfolder
from groundup.models import lora
from groundup.models.generation import Sampling, generate
from groundup.models.language_files import read_config

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 128, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 128},
    "olmo2": {},
    "cohere": {"logit_scale": 0.25},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 4},
}


def folder_of(kind, path):
    """A model of this kind made by transformers, with a tokenizer of ours."""
    import transformers

    from groundup.data.tokenizers import train_bpe

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | KINDS[kind])
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    net.save_pretrained(path)
    train_bpe(["the sky is blue and the answer is four. 天空是蓝色的。\n" * 30] * 3, 300).save(path, 128)
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_causal_language_model_opens_packs_and_generates(kind, tmp_path):
    net = folder_of(kind, tmp_path)
    loaded = modelfolder.load(tmp_path)
    assert loaded.architecture == "causal-lm" and loaded.card["task"]["name"] == "language-modeling"
    model = loaded.model
    x = torch.randint(0, 300, (2, 24))
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5, [0] * 24])
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x).logits, atol=1e-5, rtol=1e-4)
        packed = model.features(x, documents)
        for row, begin, end in ((0, 0, 7), (0, 7, 19), (0, 19, 24), (1, 0, 24)):
            alone = model.features(x[row : row + 1, begin:end])[0]
            torch.testing.assert_close(packed[row, begin:end], alone, atol=1e-4, rtol=1e-4)
        prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
        ours = generate(model, prompts, Sampling(max_tokens=6, temperature=0))
        for prompt, said in zip(prompts, ours):
            theirs = net.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(prompt) :]
            assert said == theirs.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma2", "bloom", "mamba"])
def test_what_was_read_is_remembered(kind, tmp_path, monkeypatch):
    """The same tokens as with everything read again, where rows end at different times; and only new tokens are read."""
    folder_of(kind, tmp_path)
    model, prompts = modelfolder.load(tmp_path).model, [[5, 6, 7], [9, 10, 11, 12, 13], [8] * 3, [20, 21], [40] * 9]
    model.remembers = False
    again = generate(model, prompts, Sampling(max_tokens=20, temperature=0))
    how = Sampling(max_tokens=20, temperature=0, stop_tokens=[again[0][2], again[1][6], again[4][1]])
    again, model.remembers = generate(model, prompts, how), None
    assert len({len(said) for said in again}) > 1
    read = []
    monkeypatch.setattr(model, "_read_on", lambda x, past, on=model._read_on: (read.append(x.shape[1]), on(x, past))[1])
    assert generate(model, prompts, how) == again
    assert model.remembers == (kind != "mamba")
    if model.remembers:
        assert set(read[-5:]) == {1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_they_are_tuned_and_saved_as_ours_are(method, tmp_path):
    from transformers import AutoModelForCausalLM

    folder_of("olmo2", tmp_path / "base")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": f"sky {i}", "output": "blue"}) for i in range(40)), encoding="utf-8")
    run = gu.tune(tmp_path / "base", str(data), method, {"train.steps": 4, "train.checkpointing": "whole"}, out=tmp_path / "run")
    again = run.load()
    assert modelfolder.replay(again) < 1e-4
    x = torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        expected = again.model(x)
        if method == "full":
            opened = AutoModelForCausalLM.from_pretrained(run.model)
        else:
            peft = pytest.importorskip("peft")
            assert all(not n.startswith("net.") for n in json.loads((run.model / "adapter_config.json").read_text())["target_modules"])
            opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run.model).eval()
            assert lora.adapted(again.model)
        torch.testing.assert_close(opened(x).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_lora_inside_modules_with_weights_of_their_own(tmp_path):
    folder_of("mamba", tmp_path / "base")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": f"sky {i}", "output": "blue"}) for i in range(20)), encoding="utf-8")
    run = gu.tune(tmp_path / "base", str(data), "lora", {"train.steps": 3, "optim.lr": 0.01}, out=tmp_path / "run")
    base, tuned = modelfolder.load(tmp_path / "base").model, run.load().model
    adapters = lora.adapted(tuned)
    assert adapters and all(bool(m.lora_B.weight.any()) for m in adapters.values())
    own = dict(base.named_parameters())
    still = [n for n, p in tuned.named_parameters() if n in own]
    assert any("A_log" in n for n in still) and all(torch.equal(tuned.get_parameter(n), own[n]) for n in still)


def test_forms_that_ours_lacks_go_through_transformers():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_act": "gelu",
        "max_position_embeddings": 64,
    }
    assert read_config(config | {"num_hidden_layers": 1, "num_attention_heads": 1})[0] == "causal-lm"
