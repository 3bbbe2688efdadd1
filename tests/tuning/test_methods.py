"""More methods for language models: freezing, quantised bases, PEFT's, new tokens; each saved, opened again and gone on with."""

import json

import pytest
import torch

import groundup as gu
from groundup import modelfolder
from groundup.core.errors import ModelError, RecipeError
from groundup.exporting.merge import merge
from groundup.models import lora


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    folder = tmp_path_factory.mktemp("methods")
    run = language_model(
        folder,
        "the colour of the sky is blue. 天空是蓝色的。 one two three\n" * 200,
        **{"train.steps": 20, "model.layers": 3, "task.vocabulary": 300},
    )
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": f"sky {i}?", "output": f"blue {i % 3}"}) for i in range(60)), encoding="utf-8")
    return run.path, str(data)


def weights(run):
    return run.load().model.state_dict()


def test_freezing_by_pattern(base, tmp_path):
    model, data = base
    run = gu.tune(model, data, "freeze", {"train.steps": 3, "method.layers": ["embedding", "layer[01]"]}, out=tmp_path / "run")
    before, after = modelfolder.load(model).model.state_dict(), weights(run)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(".layers.2." in name or name == "model.norm.weight" for name in moved)
    with pytest.raises(RecipeError, match="matches no layer group"):
        gu.tune(model, data, "freeze", {"train.steps": 3, "method.layers": ["layer9"]}, out=tmp_path / "none")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits, library", [(8, "torchao"), (4, "bitsandbytes")])
def test_a_quantised_base_is_tuned_opened_resumed_and_merged(bits, library, base, tmp_path):
    found = pytest.importorskip(library)
    if bits == 4:
        matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        if (
            found.functional.dequantize_4bit(*found.functional.quantize_4bit(matrix, quant_type="nf4")) - matrix
        ).abs().max() > 0.2 * matrix.abs().max():
            pytest.skip("bitsandbytes' own kernels for this CPU (AVX512) read rows shorter than a block of 64 wrongly")
    model, data = base
    run = gu.tune(
        model, data, "lora", {"train.steps": 6, "method.bits": bits, "optim.lr": 0.01, "train.save_every": 3}, out=tmp_path / "run"
    )
    loaded = run.load()
    layer = next(iter(lora.adapted(loaded.model).values()))
    assert not lora.is_plain(layer) and modelfolder.replay(loaded) < 1e-4
    plain = next(iter(lora.adapted(gu.tune(model, data, "lora", {"train.steps": 1}, out=tmp_path / "plain").load().model).values()))
    error = (layer.base_weight - plain.base_weight).abs().max() / plain.base_weight.abs().max()
    assert 0 < error < (0.01 if bits == 8 else 0.2)
    merged = merge(str(run.path), tmp_path / "merged")
    assert merged["largest_difference"] < 1e-4
    (run.path / "result.json").unlink()
    assert gu.train(None, out=run.path, resume=True).result["resumed_from"] == 6
    more = gu.tune(run.path, data, "lora", {"train.steps": 1, "method.bits": bits}, out=tmp_path / "more")
    assert modelfolder.replay(more.load()) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        pytest.param({"peft_type": "LOHA", "r": 4}, marks=pytest.mark.slow),
        {"peft_type": "LORA", "r": 2, "rank_pattern": {"q_proj": 4}},
    ],
)
def test_any_method_of_peft(config, base, tmp_path):
    pytest.importorskip("peft")
    model, data = base
    run = gu.tune(model, data, "peft", {"train.steps": 5, "optim.lr": 0.01, "method.config": config}, out=tmp_path / "run")
    loaded = run.load()
    assert modelfolder.replay(loaded) < 1e-4
    x = torch.randint(0, 300, (1, 10))
    assert not torch.equal(loaded.model(x), modelfolder.load(model).model(x))
    assert isinstance(gu.generate(run, "sky")[0], str)
    more = gu.tune(run.path, data, "peft", {"train.steps": 2, "method.config": config}, out=tmp_path / "more")
    assert modelfolder.replay(more.load()) < 1e-4
    (run.path / "result.json").unlink()
    assert gu.train(None, out=run.path, resume=True).result["resumed_from"] == 5


@pytest.mark.filterwarnings("ignore")
def test_configs_that_peft_does_not_take_are_said(base, tmp_path):
    pytest.importorskip("peft")
    model, data = base
    for config, words in (
        ({}, "needs a peft_type"),
        ({"peft_type": "NO"}, "knows"),
        ({"peft_type": "IA3", "nonsense": 1}, "does not take"),
    ):
        with pytest.raises(RecipeError, match=words):
            gu.tune(model, data, "peft", {"train.steps": 1, "method.config": config}, out=tmp_path / "run")


def test_settings_that_do_not_go_together(base, tmp_path):
    model, data = base
    with pytest.raises(RecipeError, match="goes with neither"):
        gu.tune(model, data, "lora", {"method.init": "pissa", "method.dora": True}, out=tmp_path / "run")
    run = gu.tune(model, data, "lora", {"train.steps": 1, "method.rank": 4}, out=tmp_path / "four")
    with pytest.raises(RecipeError, match="goes on with has 4"):
        gu.tune(run.path, data, "lora", {"train.steps": 1, "method.rank": 8}, out=tmp_path / "run")


def test_lora_plus_trains_b_faster(base, tmp_path):
    from groundup.core.recipe import Optim
    from groundup.training.optim import build_optimizers
    from groundup.tuning.lora import lora as method

    net = modelfolder.load(base[0]).model
    for module in method(net, rank=2, plus=16.0):
        module.requires_grad_(False)
    groups = build_optimizers(net, Optim(lr=1e-3), "cpu")[0].param_groups
    rates = {round(g["base_lr"], 6) for g in groups}
    assert rates == {0.001, 0.016}


def test_new_tokens_grow_the_tables(base, tmp_path):
    model, data = base
    settings = {"train.steps": 3, "task.add_tokens": ["<think>", "</think>"]}
    run = gu.tune(model, data, "full", settings, out=tmp_path / "run")
    loaded = run.load()
    before = modelfolder.load(model)
    assert loaded.model.vocabulary == before.model.vocabulary + 2 == len(loaded.task.tokenizer)
    assert loaded.task.tokenizer.encode_rendered("<think>") == [before.model.vocabulary]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    x = torch.randint(0, loaded.model.vocabulary, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(run.model)(x).logits, loaded.model(x), atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(run.model).convert_tokens_to_ids("<think>") == before.model.vocabulary
    with pytest.raises(RecipeError, match="does not train the tables"):
        gu.tune(model, data, "lora", settings, out=tmp_path / "lora")


def test_the_comparison_is_measured_before_and_after(base, tmp_path):
    model, data = base
    general = tmp_path / "mine.jsonl"
    general.write_text('{"question": "one two", "answer": "three"}\n', encoding="utf-8")
    run = gu.tune(model, data, "full", {"train.steps": 30, "optim.lr": 0.01, "evaluate.general": str(general)}, out=tmp_path / "run")
    found = run.result["before_after"]
    metrics = {(r["what"], r["metric"]) for r in found["rows"]}
    assert {("new data", "exact_match"), ("new data", "loss"), ("general set", "perplexity"), ("old data", "token_accuracy")} <= metrics
    row = next(r for r in found["rows"] if r["metric"] == "loss" and r["what"] == "new data")
    assert (
        row["difference"] == pytest.approx(row["after"] - row["before"])
        and row["difference_interval"][0] < row["difference"] < row["difference_interval"][1]
    )
    assert found["answers"][0].keys() == {"prompt", "right", "before", "after"} and "exact_match" in found["verdict"]["en"]
    assert "新数据" in found["verdict"]["zh"]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert found["answers"][0]["prompt"] in page and "exact_match" in page
    none = gu.tune(model, data, "full", {"train.steps": 1, "evaluate.general": "none", "evaluate.answers": 0}, out=tmp_path / "none")
    assert {r["what"] for r in none.result["before_after"]["rows"]} == {"new data", "old data"} and none.result["before_after"][
        "answers"
    ] == []
    from groundup.core.errors import DataError

    with pytest.raises(DataError):
        gu.tune(model, data, "full", {"train.steps": 1, "evaluate.general": str(tmp_path / "nowhere.jsonl")}, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_averaged_weights_of_an_adapter(base, tmp_path):
    model, data = base
    settings = {"train.steps": 6, "method.rank": 1, "train.ema": 0.9, "train.save_every": 3, "train.deterministic": True}
    run = gu.tune(model, data, "lora", settings, out=tmp_path / "run")
    assert modelfolder.replay(run.load()) < 1e-4
    kept = next((run.path / "checkpoints").glob("step-*")) / "model.safetensors"
    assert kept.stat().st_size < 0.5 * (model / "model" / "model.safetensors").stat().st_size


def test_the_general_set_is_whole():
    """320 questions, ten kinds in two languages, each a conversation that ends with an answer."""
    from collections import Counter
    from importlib import resources

    from groundup.data.conversations import read

    lines = (resources.files("groundup") / "data" / "builtin" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len({r["id"] for r in rows}) == len({r["messages"][0]["content"] for r in rows if r["messages"][0]["role"] == "user"} | {
        r["messages"][1]["content"] for r in rows if r["messages"][0]["role"] == "system"
    }) == 320  # fmt: skip
    assert set(Counter((r["language"], r["kind"]) for r in rows).values()) == {16}
    assert all(isinstance(read(r), dict) and r["messages"][-1]["role"] == "assistant" for r in rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"rank_pattern": {"q_proj": 4}}])
def test_a_folder_that_peft_saved_is_a_model(more, base, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model, data = base
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model / "model"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = modelfolder.load(tmp_path / "theirs")
    x = torch.randint(0, 300, (1, 10))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), theirs(x).logits, atol=1e-5, rtol=0)
    assert gu.evaluate(tmp_path / "theirs", data)["records"] == 60
    if more:
        return
    tuned = gu.tune(tmp_path / "theirs", data, "lora", {"train.steps": 2, "method.rank": 2}, out=tmp_path / "tuned")
    assert modelfolder.replay(tuned.load()) < 1e-4
    assert merge(tmp_path / "theirs", tmp_path / "merged")["largest_difference"] < 1e-4
    facts = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": "/no/such/base"}), encoding="utf-8")
    with pytest.raises(ModelError, match="adapter for '/no/such/base', which is not there"):
        modelfolder.load(tmp_path / "theirs")
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": "owner/base"}), encoding="utf-8")
    monkeypatch.setattr(modelfolder, "fetch", {"owner/base": model / "model"}.__getitem__)
    assert modelfolder.load(tmp_path / "theirs").card["parent"]["path"] == "hub:owner/base"
    assert "adapter for owner/base of the Hugging Face hub" in " ".join(capsys.readouterr().out.split())
