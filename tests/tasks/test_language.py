"""Language modelling: the chunked loss against torch's, packing, bits per byte, and the whole path on a small text."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import groundup as gu
from groundup import jobs
from groundup.core.errors import DataError, RecipeError
from groundup.data.tokens import IGNORED
from groundup.evaluation.evaluate import evaluate
from groundup.inspecting import print_predictions
from groundup.tasks import token_loss as module
from groundup.tasks.token_loss import token_loss, token_scores

TINY = {
    "task": {"name": "language-modeling", "context": 32, "tokenizer": "char", "prompts": ["def "], "sample_tokens": 8},
    "model": {"name": "decoder", "layers": 1, "width": 32, "heads": 2},
    "train.steps": 30, "train.batch_size": 8, "evaluate.every": 15, "watch.report": False, "watch.tensorboard": False,
    "data.split.validation": 0.2,
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    """A folder of small Python files, no two alike."""
    folder = tmp_path / "some text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["alpha", "beta", "gamma", "delta", "值"]
    for i in range(40):
        lines = [f"def {rng.choice(names)}_{i}_{k}({rng.choice(names)}):\n    return {rng.integers(1000)}\n" for k in range(6)]
        (folder / f"文件 {i}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.01}, {"softcap": 3.0}, {"z_loss": 0.01, "softcap": 3.0}])
def test_the_chunked_loss_is_torchs(settings, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64 * 50)  # several chunks
    torch.manual_seed(0)
    h, w = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    targets[::7] = IGNORED
    total = token_loss(h, w, targets, **settings)
    (total / 3).backward()
    found = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    logits = h @ w.t()
    if "softcap" in settings:
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected = expected + settings.get("z_loss", 0) * torch.logsumexp(logits, 1)[targets != IGNORED].square().sum()
    (expected / 3).backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, (h.grad, w.grad))
    if "z_loss" not in settings:
        each, hit = token_scores(h.detach(), w.detach(), targets, settings.get("softcap"))
        torch.testing.assert_close(each.sum(), expected)
        assert torch.equal(hit, (logits.argmax(1) == targets))


def test_scores_make_logits_of_supervised_positions_only(monkeypatch):
    rows = []
    scored = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda count, vocabulary: rows.append(count) or scored(count, vocabulary))
    h, w, targets = torch.randn(200, 16), torch.randn(50, 16), torch.full((200,), IGNORED)
    targets[150:] = 7
    loss, hit = token_scores(h, w, targets)
    assert rows == [50]
    torch.testing.assert_close(loss, F.cross_entropy(h @ w.t(), targets, ignore_index=IGNORED, reduction="none"))
    assert torch.equal(hit, ((h @ w.t()).argmax(1) == targets)) and not hit[:150].any()


def test_the_logits_of_all_positions_never_stand_in_memory():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor))
            return out

    h, w = torch.randn(4096, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    with Watch():
        token_loss(h, w, torch.randint(0, 20_000, (4096,))).backward()
    assert max(seen) <= module.CHUNK < 4096 * 20_000 / 10


def test_the_path_from_text_to_a_folder_that_transformers_opens(corpus, tmp_path, capsys):
    run = gu.train("gpt-stdlib", TINY | {"data.source": str(corpus)}, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [r for r in rows if r["kind"] == "evaluate"]
    assert [r["step"] for r in evaluated] == [15, 30] and evaluated[1]["loss"] < evaluated[0]["loss"] < math.log(60)
    low, high = evaluated[1]["bits_per_byte_interval"]
    assert low < evaluated[1]["bits_per_byte"] < high
    assert [r["prompt"] for r in rows if r["kind"] == "sample"] == ["def "] * 2
    trained = [r for r in rows if r["kind"] == "train"]
    assert trained[-1]["tokens"] == 30 * 8 * 32 and 0 < trained[-1]["mfu"] < 2
    decisions = json.loads((run.path / "decisions.json").read_text(encoding="utf-8"))
    assert {"tokenizer", "attention", "lr", "matmul_peak"} <= set(decisions) and decisions["attention"]["reason"]
    metrics = run.metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    found = gu.evaluate(run)
    assert found["metrics"]["loss"] == pytest.approx(metrics["loss"], rel=1e-5) and found["same_data_as_training"]
    other = gu.evaluate(run, str(corpus / "文件 3.py"))
    assert other["records"] > 0 and other["split"] == "all"
    assert run.generate("def ", max_tokens=5) == run.generate("def ", max_tokens=5)
    answer = run.predict("def ")[0]
    assert sum(n["probability"] for n in answer["next"]) <= 1 + 1e-6
    print_predictions({"predictions": [answer]})
    assert f"{answer['next'][0]['token']!r} " in capsys.readouterr().out
    from groundup.pipeline import verify_run

    assert verify_run(run.path)["ok"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_the_folder_unchanged(corpus, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, model in {
        "decoder": TINY["model"],
        "gpt2": {"name": "gpt2", "layers": 1, "width": 32},
        "experts": TINY["model"] | {"experts": 2},
    }.items():
        run = gu.train(
            "gpt-stdlib", TINY | {"data.source": str(corpus), "train.steps": 3, "evaluate.every": 3, "model": model}, out=tmp_path / name
        )
        loaded = run.load()
        peer, tokenizer = AutoModelForCausalLM.from_pretrained(run.model).eval(), AutoTokenizer.from_pretrained(run.model)
        ids = torch.tensor([loaded.task.tokenizer.encode_prompt("def alpha_1")])
        assert tokenizer("def alpha_1", add_special_tokens=False)["input_ids"] == ids[0, 1:].tolist()
        assert tokenizer("def alpha_1")["input_ids"] == ids[0].tolist(), "a prompt begins there as it does here"
        with torch.no_grad():
            torch.testing.assert_close(peer(ids).logits, loaded.model(ids), atol=1e-5, rtol=0)
        new = peer.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == run.generate("def alpha_1", max_tokens=8, temperature=0)[0]


def test_tuning_goes_on_from_a_language_model(corpus, tmp_path):
    base = gu.train("gpt-stdlib", TINY | {"data.source": str(corpus)}, out=tmp_path / "base")
    (tmp_path / "poem.txt").write_text("\n".join(f"line {i} of the poem, and a rhyme {i * i}" for i in range(200)), encoding="utf-8")
    tuned = gu.tune(base, str(tmp_path / "poem.txt"), "full", {"train.epochs": 3, "watch.report": False}, out=tmp_path / "tuned")
    row = tuned.result["before_after"]["rows"][0]
    assert row["metric"] == "loss" and row["after"] < row["before"]
    whats = [r["what"] for r in tuned.result["before_after"]["rows"]]
    assert whats == ["new data"] * 4 + ["old data"] * 4, (
        "and what was forgotten of the base's own; general questions are longer than 32 characters"
    )
    assert tuned.load().task.tokenizer.digest == base.load().task.tokenizer.digest


def test_a_foreign_folder_is_tuned_too(shared_data, corpus, tmp_path):
    folder = shared_data / "pretrained" / "stories260k" / "hf"
    settings = {"train.steps": 4, "train.batch_size": 4, "watch.report": False, "data.split.validation": 0.2, "task.context": 64}
    tuned = gu.tune(folder, str(corpus), "full", settings, out=tmp_path / "run")
    row = tuned.result["before_after"]["rows"][0]
    assert row["after"] < row["before"] and tuned.load().model.context == 512


def test_bad_settings_are_named(corpus, tmp_path):
    def train(**more):
        return gu.train("gpt-stdlib", TINY | {"data.source": str(corpus)} | more, out=tmp_path / "bad")

    with pytest.raises(RecipeError, match="at least 2"):
        train(**{"task.context": 1})
    with pytest.raises(RecipeError, match="the whole training text has"):
        train(**{"task.context": 100_000})
    with pytest.raises(gu.GroundupError, match=r"model\.window = 0"):
        train(**{"model.window": 0})
    with pytest.raises(DataError, match="supports a vocabulary"):
        train(**{"task.tokenizer": "bpe", "task.vocabulary": 30000})
    with pytest.raises(RecipeError, match=r"task\.vocabulary"):
        train(**{"task.tokenizer": "bpe", "task.vocabulary": "many"})
    with pytest.raises(DataError, match="no tokenizer"):
        train(**{"task.tokenizer": "nowhere/here"})
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        train(**{"data.source": str(tmp_path / "empty.txt")})
    with pytest.raises(gu.GroundupError, match="takes pictures"):
        gu.train("gpt-stdlib", TINY | {"data.source": str(corpus), "model": "simple_cnn"}, out=tmp_path / "bad")


def test_a_context_beyond_the_model_is_refused(shared_data, corpus, tmp_path):
    folder = shared_data / "pretrained" / "stories260k" / "hf"
    with pytest.raises(RecipeError, match="made for 512"):
        gu.tune(folder, str(corpus), "full", {"task.context": 1024}, out=tmp_path / "run")


def test_a_cap_of_the_logits_is_part_of_the_model(corpus, tmp_path, capsys):
    run = gu.train("gpt-stdlib", TINY | {"data.source": str(corpus), "task.logit_softcap": 0.5, "train.steps": 2}, out=tmp_path / "run")
    assert "transformers opens the folder without it" in capsys.readouterr().out
    model = run.load().model
    assert model.softcap == 0.5 and float(model(torch.arange(8)[None]).detach().abs().max()) <= 0.5


class Part:
    """One of several processes, as far as an evaluation sees them; `others` are the rows that each of them has made."""

    def __init__(self, rank, others):
        self.rank, self.world, self.own, self.others = rank, len(others), [], others

    def gather(self, rows):
        self.own.append(rows)
        return [rows if k == self.rank else (other or self.own)[len(self.own) - 1] for k, other in enumerate(self.others)]


@pytest.mark.parametrize("size", [3, 5, 100])
def test_processes_evaluate_a_part_each_and_have_the_whole(size, corpus, tmp_path):
    resolved, run, _ = jobs.open_run("gpt-stdlib", TINY | {"data.source": str(corpus)}, tmp_path / "run", resume=False, extend=False)
    job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=lambda name: None)
    run.close()
    whole = evaluate(job.task, job.state.model, job.validation, job.plan.device, batch_size=size)
    batches = -(-len(job.validation) // size)
    for world in (2, 3, batches + 1):
        parts = [Part(rank, [None] * world) for rank in range(world)]
        for part in parts:
            evaluate(job.task, job.state.model, job.validation, job.plan.device, batch_size=size, sharers=part)
            assert len(part.own) == -(-batches // world)
        for rank in range(world):
            again = Part(rank, [p.own for p in parts])
            found = evaluate(job.task, job.state.model, job.validation, job.plan.device, batch_size=size, sharers=again)
            assert found.compute() == whole.compute() and found.intervals() == whole.intervals() and found.records == whole.records


def test_a_budget_picks_a_size_and_says_why(corpus):
    from groundup.budget import choose
    from groundup.core.recipe import load

    recipe = load("gpt-stdlib", {"data.source": str(corpus)})
    chosen = choose(recipe, "30s")
    with pytest.raises(RecipeError, match=r"--budget 30s .* train.steps"):
        gu.train(recipe, {"train.steps": 5}, budget="30s")
    assert chosen.overrides["model.size"] == "1M" and "more than 4 times" in chosen.reason and "遍" in chosen.reason_zh
    with pytest.raises(RecipeError, match="not a duration"):
        choose(recipe, "soon")
    with pytest.raises(RecipeError, match="decoder"):
        choose(load("digits-cnn"), "1min")


def test_a_dry_run_plans_what_the_budget_allows(corpus, capsys):
    from groundup.cli import main

    assert main(["train", "gpt-stdlib", f"--set=data.source={corpus}", "--budget", "30s", "--dry-run", "--json", "--lang", "en"]) == 0
    shown = capsys.readouterr()
    assert "budget:" in shown.err and json.loads(shown.out)["recipe"]["model"]["size"] == "1M"
