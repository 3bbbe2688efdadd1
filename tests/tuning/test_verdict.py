"""What is said of a tuning: as much as the records show, and what became worse too."""

import math

import numpy as np
import pytest
import torch

from groundup import before_after, pipeline
from groundup.data import conversations
from groundup.evaluation.answers import beside
from groundup.metrics import PreferenceMetrics


def row(metric, difference, interval, higher=False):
    return {
        "what": "new data", "what_zh": "新数据", "metric": metric, "difference": difference, "difference_interval": interval, "higher_is_better": higher,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("loss", -0.5, [-0.6, -0.4])], "better on the new data by 0.5 ± 0.1 (loss)"),
        ([row("loss", -0.3, [-1.8, -0.16])], "better on the new data by 0.3 (95 % 0.16 .. 1.8) (loss)"),
        ([row("loss", -0.5, [-0.6, -0.4]), row("chrf", -0.08, [-0.14, -0.02], True)], "but worse by 0.08 ± 0.06 (chrf)"),
        ([row("loss", 0.1, [-0.1, 0.3])], "no clear change on the new data"),
        ([row("loss", -1.3, [math.nan, math.nan])], "cannot tell on the new data: too few records"),
        (
            [row("loss", -8.1, [-8.3, -7.9]), row("exact_match", 0.0, [0.0, 0.0], True)],
            "better on the new data by 8.1 ± 0.2 (loss), exact_match without a clear change (+0)",
        ),
        ([row("loss", -2.0, [-2.2, -1.8]), row("exact_match", 0.1, [math.nan, math.nan], True)], "exact_match on too few records to tell (+0.1)"),
    ],
)
def test_the_verdict_says_what_the_intervals_say(rows, said):
    assert said in before_after.verdict(rows)["en"]


def test_few_records_have_no_interval():
    values = np.linspace(1, 2, 101)
    assert math.isnan(beside(values, values + 1, 4)["difference_interval"][0])
    assert beside(values, values + 1, 5)["difference_interval"] == pytest.approx([1, 1])


def test_qlora_is_lora_on_a_base_in_few_bits():
    assert pipeline._named("qlora", {"method.rank": 4}, 4) == ("lora", {"method.bits": 4, "method.rank": 4})
    assert pipeline._named("qlora", {"method.bits": 8}, 4) == ("lora", {"method.bits": 8})
    assert pipeline._named("full", None) == ("full", {})


@pytest.mark.parametrize("name, settings", [("dora", {"method.dora": True}), ("rslora", {"method.rs": True}), ("pissa", {"method.init": "pissa"})])
def test_kinds_of_lora_have_names(name, settings):
    assert pipeline._named(name, {"method.rank": 4}) == ("lora", settings | {"method.rank": 4})


def test_a_bare_list_of_turns_is_a_conversation():
    assert conversations.turns_key([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "messages"
    assert conversations.turns_key([{"from": "human", "value": "a"}]) == "conversations"
    assert conversations.turns_key([{"text": "a"}]) is None and conversations.turns_key([1]) is None


def test_intervals_of_preferences_are_over_lists():
    """Several pairs of a list are drawn together, wherever batches are cut; three lists are too few for an interval."""
    pairs = torch.tensor([[0.5, 1.0, 0.1, 1.0, 1.0, record] for record in range(3) for _ in range(4)], dtype=torch.float64)
    few = PreferenceMetrics()
    few.update(pairs, pairs, 0.0)
    assert few.records == 3 and math.isnan(few.intervals()["accuracy"][0]) and few.compute()["accuracy"] == 1
    random = torch.rand(40, 1, dtype=torch.float64).round()
    rows = torch.cat([random.repeat_interleave(3, 0)] * 4 + [torch.ones(120, 1, dtype=torch.float64), torch.arange(40).repeat_interleave(3)[:, None]], 1)
    whole, cut, alone = PreferenceMetrics(), PreferenceMetrics(), PreferenceMetrics()
    whole.update(rows, rows, 0.0)
    for part in rows.split(7):
        cut.update(part, part, 0.0)
    alone.update(rows[::3], rows, 0.0)
    assert whole.records == 40 and whole.intervals() == cut.intervals()
    assert whole.intervals()["accuracy"] == pytest.approx(alone.intervals()["accuracy"])
