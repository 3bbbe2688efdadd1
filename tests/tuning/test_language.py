"""Tuning language models: formats, template and mask, packing, adapters both ways with PEFT, before and after."""

import json
import random

import numpy as np
import pytest
import torch

import groundup as gu
from groundup import modelfolder, pipeline
from groundup.core.errors import DataError, ModelError, RecipeError
from groundup.core.recipe import load
from groundup.data import conversations
from groundup.data.chat_tokens import IGNORED, parse, render, template_for, tokenize_conversations
from groundup.data.corpus import prepare_corpus
from groundup.data.tokenizers import TEMPLATES, train_bpe
from groundup.models import adapters, lora
from groundup.models.base import build_model
from groundup.tasks import instruction_tuning
from groundup.training.batches import Batches

TEXT = ["User: what is the colour of the sky? Assistant: blue. 天空是什么颜色？蓝色。\n" * 20]


def tokenizer():
    return train_bpe(TEXT * 3, 300)


def examples(n, seed=0):
    """Questions with one right answer each."""
    rng = random.Random(seed)
    return [
        {"instruction": f"add {a} and {b}", "output": str(a + b)} for a, b in ((rng.randint(0, 9), rng.randint(0, 9) + i) for i in range(n))
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    """A small language model of our own, hardly trained."""
    folder = tmp_path_factory.mktemp("base")
    run = language_model(folder, "\n".join(f"{e['instruction']}: {e['output']}" for e in examples(400)), **{"task.vocabulary": 300})
    return run.path


def test_every_format_becomes_the_same_conversation():
    asked, told = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    for record in (
        {"messages": [asked, told]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, told]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"question": "2 + 2?", "answer": "4"},
        {"prompt": [asked], "completion": [told]},
    ):
        assert conversations.read(record) == {"messages": [asked, told]}, record
    assert conversations.read({"text": "a story"}) == {"text": "a story"}
    found = conversations.read({"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]})
    assert [(t["role"], t["content"]) for t in found["messages"]] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\nd"), ("assistant", "e"),
    ]  # fmt: skip
    called = conversations.read(
        {
            "conversations": [
                {"from": "human", "value": "weather?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
                {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."},
            ],
            "tools": '[{"name": "weather"}]',
        }
    )  # fmt: skip
    assert called["tools"] == [{"name": "weather"}] and called["messages"][1]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    "record, code, words",
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}, "role", "turn 2 has role 'bot'"),
        ({"messages": [{"content": "a"}]}, "schema", "turn 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "order", "turn 2: 'user' follows 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "order", "before 'user'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn", "no turn of the assistant"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}, "empty", "turn 1"),
        ({"messages": []}, "empty", "empty"),
        ({"messages": [{"role": "user", "content": {"image": 1}}]}, "content", "not text"),
        ({"instruction": "a"}, "schema", "no 'output'"),
        ({"instruction": "a", "output": ""}, "empty", "turn 2"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "several answers"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": False},
            "disliked",
            "label: false",
        ),
        ({"a": 1, "b": 2}, "format", "it has a, b"),
        ([1], "not a record", "list"),
    ],
)
def test_what_is_wrong_is_said_with_its_turn(record, code, words):
    reason = conversations.read(record)
    assert reason.code == code and words in reason.en and reason.zh != reason.en


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_serving_renders_what_training_saw_and_only_answers_are_trained(name):
    made = tokenizer()
    turns = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "the colour of the sky?"}, {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "天空？"}, {"role": "assistant", "content": "蓝色。"},
    ]  # fmt: skip
    for tools in (None, [{"name": "look"}]):
        found = render(made, TEMPLATES[name], {"messages": turns, "tools": tools})
        for at in (2, 4):  # the prompt that a server would send for each answer
            prompt = made.encode_rendered(made.render(turns[:at], tools=tools, template=TEMPLATES[name]))
            assert found.ids[: len(prompt)].tolist() == prompt
            assert found.trained[len(prompt)] and not found.trained[len(prompt) - 1]
        taught = made.decode(found.ids[found.trained].tolist(), special=True)
        end = "<|im_end|>" if name == "chatml" else "<|endoftext|>"
        assert taught.replace(" ", "") == f"blue{end}蓝色。{end}"
    assert bool(render(made, TEMPLATES[name], {"messages": turns}, "all").trained.all())
    with pytest.raises(DataError, match="known: auto"):
        template_for(made, "nonsense")


def test_examples_that_share_most_of_their_words_are_no_copies_and_are_split_by_their_number(base, tmp_path):
    turns = [{"role": "system", "content": "You are a helpful assistant who answers in one word and never in two. " * 8}]
    rows = [{"messages": [*turns, {"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(60)]
    rows[7]["messages"][1]["content"] += " word" * 20000
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    recipe = pipeline.tuning_recipe(base, str(path), "lora", {"evaluate.general": "none"})
    for config in (recipe, load(recipe), load(load(recipe).model_dump(mode="json"))):
        corpus = prepare_corpus(instruction_tuning.InstructionTuning.reads(config.data))
        assert len(corpus) == 60 and 4 <= len(corpus.splits["validation"]) <= 8


def test_an_answer_in_a_named_column_makes_examples(base, tmp_path):
    (tmp_path / "data.csv").write_text("frage,antwort\n" + "".join(f"was ist {i},das ist {i}\n" for i in range(30)))
    recipe = pipeline.tuning_recipe(base, str(tmp_path / "data.csv"), "lora", {"data.text.column": "frage", "data.columns.target": "antwort"})
    assert recipe.task.name == "instruction-tuning"
    assert '"das ist ' in prepare_corpus(instruction_tuning.InstructionTuning.reads(recipe.data)).text(0)


def test_a_template_that_rewrites_turns_is_refused():
    made = tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ModelError, match="writes earlier turns anew"):
        render(made, "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}", {"messages": turns})


def stream(records, context=200, key="k"):
    made = tokenizer()
    lines = [conversations.line(conversations.read(r)) for r in records]
    return tokenize_conversations(lambda: lines, len(lines), made, TEMPLATES["chatml"], context=context, train_on="assistant", key=key)


def test_packed_rows_lose_and_mix_nothing():
    records = [*examples(40), {"text": "the colour of the sky " * 8}]
    s = stream(records)
    index = np.array([40, 3, 3, 17, 0, 25])
    tokens, targets, documents, owners = s.fetch(index)
    assert [int((owners == i).sum()) for i in range(len(index))] == (s.starts[index + 1] - s.starts[index] - 1).tolist()
    assert len(tokens) < len(index), "several share a row"
    torch.manual_seed(0)
    model = build_model("decoder", {"layers": 2, "width": 32, "heads": 2}, (256,), 300).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)

    def loss(rows):
        x, y, d, _ = (torch.from_numpy(a) for a in rows)
        return torch.nn.functional.cross_entropy(
            model.head(model.features(x, d)).flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    alone = sum(loss(s.fetch(index[i : i + 1])).item() for i in range(len(index)))
    assert abs(loss((tokens, targets, documents, owners)).item() - alone) < 1e-8 * alone
    assert int((targets != IGNORED).sum()) == sum(int(s.trained[s.starts[i] + 1 : s.starts[i + 1]].sum()) for i in index)


def test_what_is_cut_or_empty_is_counted_and_nothing_at_all_is_an_error():
    long = {"instruction": "the colour " * 30, "output": "blue"}
    s = stream([*examples(3), long], context=30, key="cut")
    assert len(s) == 3 and s.facts["left_out"] == {"hold nothing to learn within the context": 1}
    s = stream([*examples(3), {"instruction": "sky", "output": "blue " * 50}], context=30, key="cut2")
    assert s.facts["cut"] == 1 and s.facts["lost_tokens"] > 0 and int(s.starts[-1] - s.starts[-2]) == 31
    with pytest.raises(DataError, match="nothing to learn from: 1 hold"):
        stream([long], context=30, key="none")
    assert parse("no json") == {"text": "no json"}
    turns = [t for i in range(40) for t in ({"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"answer {i}"})]
    whole, reached = (render(tokenizer(), TEMPLATES["chatml"], {"messages": turns}, context=n) for n in (None, 100))
    assert np.array_equal(whole.trained[:101], reached.trained[:101]) and 0 < len(reached.spans) < len(whole.spans) == 40


@pytest.mark.parametrize(
    "options", [{}, {"rs": True}, {"dora": True}, {"targets": ["q_proj", "v_proj"], "rank": 2}, {"init": "pissa"}, {"plus": 16.0}]
)
def test_adapters_change_nothing_at_first_and_are_merged_exactly(options):
    torch.manual_seed(0)
    model = build_model("decoder", {"layers": 2, "width": 32, "heads": 2}, (64,), 300)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randint(0, 300, (2, 20))
    before = model(x)
    from groundup.tuning.lora import lora as method

    frozen = method(model, **options)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    still = {id(p) for m in frozen for p in m.parameters()}
    trained = [n for n, p in model.named_parameters() if id(p) not in still]
    assert trained and all("lora_" in n for n in trained)
    for n, p in model.named_parameters():
        if "lora_B" in n or "magnitude" in n:
            torch.nn.init.normal_(p, mean=1.0 if "magnitude" in n else 0.0, std=0.1)
    for module in frozen:
        module.requires_grad_(False)
    changed = model(x)
    changed.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if n in trained)
    assert set(model.state_dict()) == set(trained), "the rest need not be kept"
    there = lora.merge(model)
    assert not lora.adapted(model) and "model.embed_tokens.weight" in model.state_dict()
    torch.testing.assert_close(model(x), changed, atol=1e-4, rtol=1e-4)
    lora.unmerge(model, there)
    assert torch.equal(model(x), changed)
    for name, value in {"targets": ["q_proj", "k_proj"], "alpha": 7.0, "rs": True, "dora": True, "rank": 3}.items():
        if value != options.get(name):
            with pytest.raises(RecipeError, match=rf"method\.{name} = .*goes on with has"):
                method(model, **{name: value})
    method(model)
    with pytest.raises(RecipeError, match="matches no linear layer"):
        method(build_model("decoder", {"layers": 1, "width": 32, "heads": 2}, (64,), 300), targets=["qqq"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rs": True}, {"init": "pissa"}, {"init": "pissa", "rs": True}])
def test_peft_reads_ours_and_we_read_peft(base, tmp_path, options):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(e) for e in examples(60)), encoding="utf-8")
    more = {f"method.{k}": v for k, v in options.items()}
    run = gu.tune(base, str(data), "lora", {"train.steps": 5, "optim.lr": 0.05, "method.rank": 4, **more}, out=tmp_path / "run")
    ours = run.load()
    x = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        expected = ours.model(x)
        assert not torch.allclose(expected, modelfolder.load(base).model(x), atol=1e-3)
        plain = AutoModelForCausalLM.from_pretrained(base / "model")
        torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, run.model).eval()(x).logits, expected, atol=1e-4, rtol=1e-4)

        plain = AutoModelForCausalLM.from_pretrained(base / "model")
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora="rs" in options, use_dora="dora" in options
        )
        theirs = peft.get_peft_model(plain, config)
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
        theirs.save_pretrained(tmp_path / "peft")
        model = modelfolder.load(base).model
        adapters.read(model, tmp_path / "peft")
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x).logits, atol=1e-4, rtol=1e-4)


def test_tune_recognises_the_file_and_tells_before_and_after(base, tmp_path, capsys):
    data = tmp_path / "问答 数据.json"
    data.write_text("\ufeff" + json.dumps(examples(120), ensure_ascii=False), encoding="utf-8")
    run = gu.tune(base, str(data), "full", {"train.steps": 60, "optim.lr": 0.01}, out=tmp_path / "run")
    assert run.result["task"] == "instruction-tuning"
    rows = {r["metric"]: r for r in run.result["before_after"]["rows"] if r["what"] == "new data"}
    assert rows["loss"]["after"] < rows["loss"]["before"] and rows["token_accuracy"]["after"] > rows["token_accuracy"]["before"]
    loaded = run.load()
    assert (
        loaded.task.tokenizer.chat_template and pipeline.evaluate(run.path, str(data), split="all")["records"] == 113
    )  # seven examples occur twice
    again = gu.tune(run.path, str(data), "lora", {"train.steps": 2}, out=tmp_path / "more")
    assert (again.path / "model" / "adapter_config.json").is_file()
    on = gu.tune(again.path, str(data), "lora", {"train.steps": 2}, out=tmp_path / "on")
    assert json.loads((on.path / "model" / "groundup.json").read_text())["parent"]["path"] == str(run.path / "model")


def test_an_adapter_knows_its_base(base, tmp_path):
    import shutil

    shutil.copytree(base / "model", tmp_path / "copy")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(e) for e in examples(40)), encoding="utf-8")
    run = gu.tune(tmp_path / "copy", str(data), "lora", {"train.steps": 2}, out=tmp_path / "run")
    other = gu.train(tmp_path / "run" / "recipe.yaml", {"train.steps": 1}, out=tmp_path / "same")
    assert other.load().card["parent"]["path"] == str(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ModelError):
        run.load()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_tuning_goes_on_exactly(base, tmp_path, method):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(e) for e in examples(60)), encoding="utf-8")
    settings = {"train.steps": 12, "train.deterministic": True, "train.save_every": 4}
    if method == "lora":
        settings["method.dropout"] = 0.1
    whole = gu.tune(base, str(data), method, settings, out=tmp_path / "whole")
    part = gu.tune(base, str(data), method, settings, out=tmp_path / "part")
    (part.path / "result.json").unlink()
    import shutil

    shutil.rmtree(part.path / "model")
    for folder in sorted((part.path / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = gu.train(None, out=part.path, resume=True)
    assert again.result["resumed_from"] is not None
    a, b = (r.load().model.state_dict() for r in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_forward_passes_are_filled_by_tokens_and_train_the_same(base, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    long = [{"instruction": "the colour of the sky", "output": "blue " * n} for n in (3, 9, 27, 15)]
    data.write_text("\n".join(json.dumps(e) for e in [*examples(36), *long]), encoding="utf-8")
    monkeypatch.setattr(instruction_tuning, "ENOUGH", 40)
    weights = {}
    for size in ("auto", 1, 8):
        settings = {"train.steps": 6, "train.batch_size": 8, "train.micro_batch_size": size, "train.keep": "last", "data.split.validation": 0.1}
        run = gu.tune(base, str(data), "lora", settings, out=tmp_path / str(size))
        weights[size] = run.load().model.state_dict()
    decisions = json.loads((tmp_path / "auto" / "decisions.json").read_text())
    assert 40 < decisions["micro_batch_tokens"]["value"] < 80 and decisions["micro_batch_size"]["value"] == 8
    for other in (1, 8):
        for name, value in weights["auto"].items():
            torch.testing.assert_close(value, weights[other][name], atol=2e-5, rtol=1e-3)


def test_each_sample_of_a_step_is_in_one_forward_pass_that_holds_it():
    from types import SimpleNamespace

    sizes = np.array([50, 10, 30, 30, 20, 60, 5, 100])
    task = SimpleNamespace(sizes=lambda encoded, index: sizes[index])
    batches = Batches(task, range(8), batch_size=8, micro_batch_size=8, seed=0, device=torch.device("cpu"))
    batches.tokens = 100
    parts = batches._parts(np.arange(8))
    assert sorted(np.concatenate(parts).tolist()) == list(range(8))
    assert all(sizes[p].sum() <= 100 for p in parts) and len(parts) == 4
    batches.micro_batch_size = 1
    assert len(batches._parts(np.arange(8))) == batches.per_step == 8


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_of_one_input_learn_together_what_they_learn_alone(targets, monkeypatch):
    torch.manual_seed(0)
    model = build_model("decoder", {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "bias": "qkv"}, (64,), 50)
    lora.attach(model, lora.chosen(model, targets), 4, 8.0, 0.0, False, False)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if p.requires_grad or "o_proj" in name or "down_proj" in name:
            torch.nn.init.normal_(p, std=0.1)
    x, found = torch.randint(0, 50, (2, 20)), []
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(lora.LoRALinear, "is_bare", lambda self, x: False)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_data_are_shown_and_checked_as_the_model_sees_them(base, tmp_path, capsys):
    from groundup.cli import main

    data = tmp_path / "a b.jsonl"
    rows = [*examples(30), {"instruction": "long", "output": "blue " * 200}, {"instruction": "empty", "output": ""}]
    data.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    assert main(["data", "show", str(data), "--model", str(base), "--html", str(tmp_path / "p.html"), "--lang", "en"]) == 0
    told = capsys.readouterr().out
    assert "⟦" in told and "<|im_start|>user" in told and "tokens of an example" in told
    assert "<mark>" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert main(["data", "check", str(data), "--model", str(base), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    words = " ".join(p["message"] for p in facts["problems"])
    assert "longer than the model's 64 tokens" in words and facts["for_model"]["cut"] == 1
    assert facts["for_model"]["tokens"]["longest"] > 900, "lengths are those before the cut"
    assert any("turn 2" in r for p in facts["problems"] for r in [p["message"], *p["records"]])


def test_a_merged_folder_says_what_base_and_adapter_say(base, tmp_path, monkeypatch, capsys):
    from groundup.cli import main
    from groundup.exporting import merge as merging

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(e) for e in examples(40)), encoding="utf-8")
    run = gu.tune(base, str(data), "lora", {"train.steps": 5, "optim.lr": 0.05}, out=tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(run.path), "--merge", "--out", str(tmp_path / "m"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["largest_difference"] < 1e-4 and result["greedy_agreement"] == 1.0
    merged = modelfolder.load(tmp_path / "m")
    x = torch.randint(0, 300, (2, 20))
    torch.testing.assert_close(merged.model(x), run.load().model(x), atol=1e-4, rtol=1e-4)
    assert not lora.adapted(merged.model) and (tmp_path / "m" / "config.json").is_file()
    assert main(["export", str(base), "--merge"]) == 2, "nothing to merge"

    def wrong(model):
        for m in lora.adapted(model).values():
            m.lora_B.weight.data.mul_(3)
        right(model)

    right = lora.merge
    monkeypatch.setattr(merging.lora, "merge", wrong)
    assert main(["export", str(run.path), "--merge", "--out", str(tmp_path / "n")]) == 3 and not (tmp_path / "n").exists()
