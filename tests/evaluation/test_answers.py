"""Scores of answers: against values by hand and sacrebleu, paired intervals, code that is run within limits."""

import numpy as np
import pytest
import torch

from groundup.evaluation import answers
from groundup.evaluation.answers import Answers, Question, differences, fitting, passes, questions
from groundup.metrics import LanguageMetrics


def test_scores_by_hand():
    assert answers.words("Hello, 世界! It's 3.5") == ["hello", "世", "界", "it", "s", "3", "5"]
    assert (
        answers.exact_match("Paris.", "paris") == 1 and answers.exact_match("in Paris", "Paris") == 0 and answers.exact_match("+", "-") == 0
    )
    assert answers.f1("the cat sat", "a cat sat down") == pytest.approx(4 / 7) and answers.f1("", "x") == 0
    assert answers.rouge_l("the cat on the mat", "the cat sat on a mat") == pytest.approx(8 / 11)
    assert answers.rouge_l("b a", "a b") == 0.5 and answers._common(list("abcbdab"), list("bdcaba")) == 4


def test_bleu_and_chrf_are_sacrebleus():
    import sacrebleu

    said = ["the cat sat on the mat today", "there is a house over there", "totally other words here now"]
    right = ["the cat sat on a mat today", "there is a house over the hill", "nothing of this is the same"]
    counts = np.array([answers._bleu_counts(s, r) for s, r in zip(said, right)])
    assert answers._bleu(counts.sum(0)) == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score / 100, abs=1e-6)
    assert answers._chrf("春眠不觉晓", "春眠不觉晓") == pytest.approx(1.0)


def test_which_metrics_fit():
    label = [Question([{"role": "user", "content": "x"}], "card lost")] * 10
    text = [Question([{"role": "user", "content": "x"}], "a sentence that is rather longer than a label")] * 10
    assert (
        fitting(label, False) == ["exact_match", "f1"] and fitting(text, False) == ["rouge_l", "bleu", "chrf"] and fitting([], False) == []
    )
    code = [Question([{"role": "user", "content": "x"}], "def f(): return 1", None, "assert f() == 1")]
    assert fitting(code, True)[0] == "pass_at_1" and "pass_at_1" not in fitting(code, False)


def test_code_passes_its_tests_or_not():
    assert passes("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", "assert add(1, 2) == 3") == 1
    assert passes("def add(a, b):\n    return a - b", "assert add(1, 2) == 3") == 0
    assert passes("not code at all", "assert True") == 0 and passes("x = '\0'", "assert True") == 0
    assert passes("import os\nopen('/proc/self/nothing', 'w')", "") == 0


def test_code_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(answers, "RUN_SECONDS", -1)  # the clock of the parent: a second
    assert passes("while True: pass", "") == 0


def test_differences_are_paired():
    """Both models miss the same hard records: their own intervals are wide, that of the difference is not."""
    random = np.random.default_rng(0)
    hard = random.random(200) < 0.5
    first = (~hard).astype(float)
    second = first.copy()
    second[np.flatnonzero(hard)[:20]] = 1.0
    row = differences(Answers(["x"] * 200, {"exact_match": first}), Answers(["x"] * 200, {"exact_match": second}))["exact_match"]
    low, high = row["difference_interval"]
    assert row["difference"] == pytest.approx(0.1) and 0 < low < 0.1 < high < 0.16
    assert row["before_interval"][1] > row["after_interval"][0], "the intervals of the two overlap"


def test_two_language_metrics_stand_on_the_same_resamples():
    rows = torch.rand(50, 3, dtype=torch.float64) + 1
    a, b, c = (LanguageMetrics(1.0) for _ in range(3))
    a.update(rows, rows, 0.0)
    b.update(rows[:20], rows, 0.0)
    b.update(rows[20:], rows, 0.0)
    assert np.allclose(a.sums, b.sums)
    c.restore(a.stored())
    assert c.compute() == a.compute() and c.intervals() == a.intervals()


def test_questions_are_the_turns_before_the_last_answer():
    found = questions(
        [
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tests": "assert 1"}',
            '{"messages": [{"role": "user", "content": "a"}], "answers": ["good", "bad"]}',
            '{"text": "plain"}',
        ]
    )
    assert [(q.asked, q.right, q.tests) for q in found] == [("a", "b", "assert 1"), ("a", "good", "")]
