"""What people do around a tuning: evaluate on examples, compare two models, pipe prompts in, look at ranked answers, start with a handful of examples."""

import gzip
import io
import json

import pytest
import torch

import groundup as gu
from groundup import pipeline
from groundup.cli import main
from groundup.models import lora

ADDITIONS = [{"instruction": f"add {a} and {b}", "output": str(a + b)} for a in range(6) for b in range(6)]


def written(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    folder = tmp_path_factory.mktemp("base")
    return language_model(folder, "\n".join(f"{r['instruction']}: {r['output']}" for r in ADDITIONS * 8), **{"task.vocabulary": 260}).path


def test_a_model_of_plain_text_is_evaluated_on_examples_and_compared_with_its_tuning(base, tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", ADDITIONS)
    run = gu.tune(base, data, "full", {"train.steps": 12, "optim.lr": 0.01}, out=tmp_path / "run")
    capsys.readouterr()
    assert main(["evaluate", str(run.path), "--data", data, "--against", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    alone = gu.evaluate(base, data)
    assert found["records"] == alone["records"] == len(ADDITIONS) and alone["metric"] == found["metric"]
    assert found["same_data_as_training"] and not alone["same_data_as_training"], "however it is divided"
    (loss,) = [r for r in found["against"]["rows"] if r["metric"] == "loss"]
    assert loss["before"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5) and loss["after"] == pytest.approx(found["metrics"]["loss"], rel=1e-5)
    shorter = gu.tune(base, data, "full", {"train.steps": 2, "task.context": 48}, out=tmp_path / "shorter")
    assert gu.evaluate(shorter, data, against=base)["against"]["rows"], "both read as far as the first one does"
    low, high = loss["difference_interval"]
    assert low <= loss["after"] - loss["before"] <= high < 0


def test_models_that_read_otherwise_are_not_compared(base, tmp_path, language_model):
    (tmp_path / "other").mkdir()
    other = language_model(tmp_path / "other", "another text with other words\n" * 60, **{"task.vocabulary": 262})
    with pytest.raises(gu.GroundupError, match="tokenizers"):
        gu.evaluate(base, written(tmp_path / "data.jsonl", ADDITIONS), against=other)


def test_prompts_come_from_a_pipe_and_tokens_are_counted(base, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("add 2 and\n"))
    assert main(["generate", str(base), "-", "--max-tokens", "5", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["done"] and 0 < lines[-1]["tokens"] <= 5 and lines[-1]["context_full"] == []
    assert main(["generate", str(base), "add 2 and", "--max-tokens", "500", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = pipeline.language_model(base)[1]
    room = 64 - len(tokenizer.encode_prompt("add 2 and"))
    assert (lines[-1]["tokens"] == room and lines[-1]["context_full"] == [0]) or lines[-1]["tokens"] < room


@pytest.mark.filterwarnings("ignore")
def test_lora_on_the_form_of_gpt2_is_peft_s(tmp_path, language_model):
    import transformers

    peft = pytest.importorskip("peft")
    base = language_model(tmp_path, "one two three four five six\n" * 80, **{"model.name": "gpt2", "model.heads": 2, "task.vocabulary": 262})
    run = gu.tune(base, written(tmp_path / "data.jsonl", ADDITIONS), "lora", {"train.steps": 4, "optim.lr": 0.01}, out=tmp_path / "tuned")
    model, x = run.load().model, torch.randint(0, 250, (2, 9))
    assert lora.adapted(model)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base.model), run.model).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_handful_of_examples_is_trained_whole(base, tmp_path, count):
    data = written(tmp_path / "few.jsonl", ADDITIONS[:count])
    run = gu.tune(base, data, "full", {"train.steps": 2}, out=tmp_path / "run")
    facts = json.loads((run.path / "data.json").read_text(encoding="utf-8"))["statistics"]
    assert facts["records"] == facts["after"]["documents"] == count


def test_ranked_answers_are_shown_whole_and_what_holds_nothing_is_told_apart(base, tmp_path, capsys):
    ranked = written(tmp_path / "ranked.jsonl", [{"prompt": "add 1 and 1", "responses": ["two", "three", "nine"], "scores": [3, 2, 1]}] * 2)
    assert main(["data", "show", ranked, "--model", str(base)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("two", "three", "nine")) and told.count(", better") == 1 and told.count(", worse") == 2
    long = {"instruction": "say " * 200, "output": "no"}
    run = gu.tune(base, written(tmp_path / "long.jsonl", [*ADDITIONS, long]), "full", {"train.steps": 2}, out=tmp_path / "run")
    told = capsys.readouterr()
    assert run.path.is_dir() and "hold nothing to learn within the context: left out" in told.out + told.err and "0 of" not in told.out + told.err


def test_cleaned_preferences_are_read_again_and_broken_examples_are_recognised(tmp_path, capsys):
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": f"add {n} and 1", "chosen": str(n + 1), "rejected": "none"} for n in range(3)])
    again = str(tmp_path / "again.jsonl")
    assert main(["data", "check", pairs, "--fix", again]) == 0
    capsys.readouterr()
    for file in (pairs, again):
        assert main(["data", "check", file, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["task"] == "preference-tuning"
        assert main(["data", "show", file]) == 0 and "examples for preference-tuning" in capsys.readouterr().out
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([{"instruction": "a", "output": ""}] * 3), encoding="utf-8")
    assert main(["data", "check", str(broken)]) == 2 and "is empty" in capsys.readouterr().err


def test_a_cut_archive_is_a_finding(tmp_path, capsys):
    whole = gzip.compress("\n".join(json.dumps(r) for r in ADDITIONS * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert main(["data", "check", str(tmp_path / "cut.jsonl.gz"), "--lang", "en"]) in (2, 3)
    told = capsys.readouterr()
    assert "cut.jsonl.gz" in told.out + told.err
