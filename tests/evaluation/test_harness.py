"""The bridge to lm-evaluation-harness: its numbers are those of whole logits, and a task runs through."""

import json
from types import SimpleNamespace

import pytest
import torch

from groundup.evaluation.harness import bridge

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def base(tmp_path_factory, language_model):
    folder = tmp_path_factory.mktemp("harness")
    return language_model(
        folder, "the colour of the sky is blue. the grass is green. one two three\n" * 200, **{"train.steps": 60, "optim.lr": 0.01}
    )


def test_likelihoods_are_those_of_the_logits(base):
    loaded = base.load()
    tokenizer, made = loaded.task.tokenizer, bridge(loaded.model, loaded.task.tokenizer)
    pairs = [("the colour of the sky is", " blue"), ("the grass is", " blue"), ("", "one two")]
    found = made.loglikelihood([SimpleNamespace(args=p) for p in pairs], disable_tqdm=True)
    for (before, after), (value, _) in zip(pairs, found):
        first = tokenizer.encode(before) or [tokenizer.begin]
        ids = torch.tensor([first + tokenizer.encode(after)])
        with torch.no_grad():
            logp = torch.log_softmax(loaded.model(ids)[0], -1)
        expected = sum(float(logp[i - 1, ids[0, i]]) for i in range(len(first), ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-3)
    assert found[0][0] > found[1][0]
    rolled = made.loglikelihood_rolling([SimpleNamespace(args=("the grass is green. " * 30,))])
    assert rolled[0] < 0


@pytest.mark.slow  # the library takes most of a minute to import
@pytest.mark.filterwarnings("ignore")
def test_a_task_runs_through(base, tmp_path, capsys):
    from groundup.cli import main

    rows = [
        {"q": "the colour of the sky is", "choices": ["blue", "green"], "gold": 0},
        {"q": "the grass is", "choices": ["blue", "green"], "gold": 1},
    ] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = tmp_path / "sky.yaml"
    task.write_text(
        f"task: sky_colours\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/rows.jsonl\ntest_split: train\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n',
        encoding="utf-8",
    )  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", str(base.path), "--harness", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["harness"]["sky_colours"]
    made = bridge(base.load().model, base.load().task.tokenizer)
    blue, green = (
        made.loglikelihood([SimpleNamespace(args=(r["q"], f" {colour}")) for r in rows], disable_tqdm=True) for colour in ("blue", "green")
    )
    right = [(b[0] > g[0]) == (r["gold"] == 0) for b, g, r in zip(blue, green, rows)]
    assert found["acc"] == sum(right) / 10 and found["questions"] == 10
    assert main(["evaluate", str(base.path), "--harness", "no_such_task_at_all", "--lang", "en"]) == 2
    assert "no task 'no_such_task_at_all'" in capsys.readouterr().err
