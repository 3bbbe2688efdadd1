"""The decoder against transformers: the same logits from the same folder, both ways; caches, attention paths and packed documents."""

import json

import pytest
import torch
from safetensors.torch import save_file

from groundup import modelfolder
from groundup.core.errors import ModelError
from groundup.models.base import build_model
from groundup.models.decoder import SIZES, Decoder, Experts
from groundup.models.language_files import CLASSES, family_of, read_config, read_weights, theirs, write_config

from languages import CONFIGS, FORMS, small, theirs_made  # isort: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_transformers_both_ways(name, tmp_path):
    import transformers

    model = theirs_made(name, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    architecture, arguments, context, vocabulary = read_config(config)
    net = build_model(architecture, arguments, (context,), vocabulary).eval()
    read_weights(net, tmp_path / "theirs", config["model_type"])
    x = torch.randint(0, 64, (2, 70))
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=0)
        net.attention_path = "explicit"
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=0)
        cache = net.new_cache(2, 80)
        parts = [x[:, :40], *(x[:, i : i + 1] for i in range(40, 70))]
        cached = torch.cat([net.head(net.features(part, cache=cache)) for part in parts], 1)
        torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)
    family = family_of(net)
    assert CLASSES[family] == type(model).__name__
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(write_config(net, {"bos_token_id": 0, "eos_token_id": 0})))
    save_file(theirs(net.state_dict(), family), tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    again, facts = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not facts["missing_keys"] and not facts["unexpected_keys"] and not facts["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_balance_loss_is_that_of_transformers(tmp_path):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    layer = Experts(16, 8, 4, 2, True).train()
    x = torch.randn(3, 10, 16)
    layer(x)
    logits = layer.gate(x.reshape(-1, 16))
    torch.testing.assert_close(layer.balance, load_balancing_loss_func((logits,), 4, 2))


@pytest.mark.parametrize("path", ["sdpa", "explicit"])
@pytest.mark.parametrize("form", FORMS)
def test_documents_of_a_row_never_see_each_other(form, path):
    """A document's hidden states in a packed row are those it has alone, and its gradient does not reach the others."""
    net = small(form if form in ("gpt2", "lstm") else "decoder", **FORMS[form]).eval()
    if hasattr(net, "attention_path"):
        net.attention_path = path
    x = torch.randint(0, 50, (2, 24))
    documents = torch.tensor([[1] * 7 + [2] * 12 + [3] * 5, [4] * 24])
    packed = net.features(x, documents)
    for row, begin, end in ((0, 0, 7), (0, 7, 19), (0, 19, 24), (1, 0, 24)):
        torch.testing.assert_close(packed[row, begin:end], net.features(x[row : row + 1, begin:end])[0], atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[0, :7] = (x[0, :7] + 1) % 50
    torch.testing.assert_close(net.features(changed, documents)[0, 7:], packed[0, 7:], atol=1e-6, rtol=1e-6)


def with_what_is_kept(net, x):
    """The outputs, and how many numbers wait for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = net(x)
    return out, sum(sizes)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_both_paths_agree_and_checkpointing_changes_nothing(form):
    found = {}
    kept = {}
    for variant in ("sdpa", "explicit", "selective", "whole"):
        if variant in ("selective", "whole") and form == "lstm":
            continue
        net = small(form if form in ("gpt2", "lstm") else "decoder", **FORMS[form]).train()
        net.attention_path = "explicit" if variant in ("explicit", "selective") else "sdpa"
        net.checkpointing = variant if variant in ("selective", "whole") else "none"
        torch.manual_seed(1)
        x = torch.randint(0, 50, (2, 24))
        out, kept[variant] = with_what_is_kept(net, x)
        out.square().mean().backward()
        found[variant] = {n: p.grad for n, p in net.named_parameters()}
    for variant, grads in found.items():
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found["sdpa"][name], atol=2e-6, rtol=1e-3, msg=f"{variant} {name}")
    if form != "lstm":
        assert kept["whole"] < kept["sdpa"] / 3


def test_presets_have_the_size_of_their_name():
    for name, number in (("1M", 1e6), ("5M", 5e6), ("15M", 15e6), ("50M", 50e6), ("125M", 125e6), ("350M", 350e6), ("1B", 1e9), ("3B", 3e9), ("8B", 8e9), ("70B", 70e9)):  # fmt: skip
        assert name in SIZES
        with torch.device("meta"):
            net = Decoder((128,), 1000, size=name)
        layers = sum(p.numel() for p in net.model.layers.parameters())
        assert 0.85 < layers / number < 1.1, (name, layers)


def test_the_real_checkpoint_continues_a_story(shared_data):
    import groundup as gu

    folder = shared_data / "pretrained" / "stories260k" / "hf"
    loaded = modelfolder.load(folder)
    assert sum(p.numel() for p in loaded.model.parameters()) == 260_032
    text = gu.generate(folder, "Once upon a time", temperature=0, max_tokens=60)[0]
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ModelError, match="mlp_bias"):
        read_config({"model_type": "llama", "mlp_bias": True})
    with pytest.raises(ModelError, match="not among"):
        read_config({"model_type": "gemma3"})
    with pytest.raises(ModelError, match="no family"):
        family_of(Decoder((8,), 20, layers=1, width=16, heads=2, qk_norm=False, window=4, bias="qkv", experts=2))
    with pytest.raises(ModelError, match=r"model\.size"):
        Decoder((8,), 20, size="2M")
