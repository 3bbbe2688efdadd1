"""Before and after tuning: the base model and the tuned one on the same records, and one sentence that says what came of it.

A language model is measured before the first step and after the last: on the held-out split, on general questions, and on the data that the base was
trained on. All differences are paired: both models stand on the same resamples of the same records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from groundup import modelfolder
from groundup.core import console, files
from groundup.core.errors import DataError, GroundupError
from groundup.core.messages import say
from groundup.core.recipe import Data, Split
from groundup.data.prepare import prepare
from groundup.evaluation.answers import MOST, SECONDS, Answers, Question, answer, beside, differences, fitting, questions
from groundup.evaluation.evaluate import evaluate, evaluating
from groundup.evaluation.report import TELLING
from groundup.jobs import Job, like_base
from groundup.metrics import MetricSet
from groundup.metrics.language import SummedMetrics
from groundup.models.base import build_model, placed
from groundup.models.language import LanguageModel
from groundup.models.weights import load_into
from groundup.tasks.base import Encoded, Task
from groundup.tasks.instruction_tuning import InstructionTuning

GENERAL = Path(__file__).parent / "data" / "builtin" / "general.jsonl"
SHOWN = 12  # answers side by side in the result and the report
STORED = "before.json"
NEW = "new data"


# -- language models -----------------------------------------------------------------------------------------------------------
@dataclass
class TextSet:
    """Records that a language model is measured on."""

    name: str
    name_zh: str
    task: Task
    encoded: Encoded


def measure_before(job: Job) -> None:
    """What the comparison needs of the model before the first step, kept in the run folder: a memory that is too small for it shows now, not after the
    training. Nothing where it is there already, or where there is no language model to compare with."""
    path = job.run.path / STORED
    if job.base is None or job.task.kind != "text" or path.is_file():
        return
    console.line(say("measuring the model before its tuning", "正在测量微调前的模型"))
    model = (
        job.state.model if job.resumed_from is None else modelfolder.load(job.base.path, trust_code=True, device=str(job.plan.device)).model
    )
    files.write_json(path, _measured(job, model, None, _sets(job)))


def compare_text(job: Job, scores: MetricSet) -> dict[str, Any]:
    """The rows, the answers and the verdict of a tuned language model; `scores`: those of the held-out split."""
    then = files.read_json(job.run.path / STORED)
    sets = _sets(job)
    now = _measured(job, job.state.model, then, sets, scores)
    before, after = Answers(**then["answers"]), Answers(**now["answers"])
    rows: list[dict[str, Any]] = []
    for part in sets:
        if part.name not in then["sets"] or part.name not in now["sets"]:
            continue
        facts = {"what": part.name, "what_zh": part.name_zh}
        first, second = (_restored(part, measured["sets"][part.name]) for measured in (then, now))
        rows += [facts | row | _note() for row in rows_of(first, second)]
        if part.name == NEW and after.said:
            note = _note(f"of {len(after.said)} answers", f"{len(after.said)} 个回答")
            rows += [facts | {"metric": m, "higher_is_better": True, **row, **note} for m, row in differences(before, after).items()]
    shown = list(zip(_questions(job), before.said, after.said))[:SHOWN]
    return {
        "split": _held_out(job),
        "rows": rows,
        "answers": [{"prompt": q.asked, "right": q.right, "before": a, "after": b} for q, a, b in shown],
        "verdict": verdict(rows),
    }


def rows_of(first: SummedMetrics, second: SummedMetrics) -> list[dict[str, Any]]:
    """Each metric of two models on the same records."""
    values = first.values(), second.values()
    return [
        {"metric": metric, "higher_is_better": higher, **beside(values[0][metric], values[1][metric], second.records)}
        for metric, higher in second.higher_is_better.items()
    ]


def verdict(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One sentence: on what it became better, on what worse, and by how much, as far as the intervals of the differences say so."""
    said, said_zh = [], []
    for name in dict.fromkeys(r["what"] for r in rows):
        of = {r["metric"]: r for r in rows if r["what"] == name}
        telling = list({m: of[m] for m in (*TELLING, *of) if m in of}.values())
        # The most telling metric that says something: no exact match before and after must not hide a loss that fell.
        row = next((r for r in telling if _change(r)), next((r for r in telling if not math.isnan(r["difference_interval"][0])), telling[0]))
        change = _change(row)
        if math.isnan(row["difference_interval"][0]):
            said.append(f"cannot tell on the {name}: too few records ({row['metric']} {row['difference']:+.2g})")
            said_zh.append(f"{row['what_zh']}的记录太少，无法判断（{row['metric']} {row['difference']:+.2g}）")
        elif change == 0:
            by = f"{row['difference']:+.2g}, 95 % {row['difference_interval'][0]:+.2g} .. {row['difference_interval'][1]:+.2g}"
            said.append(f"no clear change on the {name} ({row['metric']} {by})")
            said_zh.append(f"在{row['what_zh']}上没有明确变化（{row['metric']} {by}）")
        else:
            said.append(f"{'better' if change > 0 else 'worse'} on the {name} by {_by(row)} ({row['metric']})")
            said_zh.append(f"在{row['what_zh']}上{'变好' if change > 0 else '变差'}，{row['metric']} 相差 {_by(row)}")
            if (first := telling[0]) is not row:
                few = math.isnan(first["difference_interval"][0])
                said[-1] += f", {first['metric']} {'on too few records to tell' if few else 'without a clear change'} ({first['difference']:+.2g})"
                said_zh[-1] += f"，{first['metric']} {'记录太少，无法判断' if few else '没有明确变化'}（{first['difference']:+.2g}）"
            for other in of.values():
                if _change(other) * change < 0:
                    said[-1] += f", but {'worse' if change > 0 else 'better'} by {_by(other)} ({other['metric']})"
                    said_zh[-1] += f"，但 {other['metric']} {'变差' if change > 0 else '变好'} {_by(other)}"
    return {"en": "; ".join(said), "zh": "；".join(said_zh)}


def _change(row: dict[str, Any]) -> int:
    """1 where the interval of the difference says that it became better, -1 worse, 0 neither."""
    low, high = row["difference_interval"]
    if not math.isfinite(low) or low <= 0 <= high:
        return 0
    return 1 if (row["difference"] > 0) == row["higher_is_better"] else -1


def _by(row: dict[str, Any]) -> str:
    """By how much, as a ± b; where the interval is so lopsided that this would hold zero, the interval."""
    low, high = sorted(abs(x) for x in row["difference_interval"])
    size, half = abs(row["difference"]), (high - low) / 2
    return f"{size:.3g} ± {half:.2g}" if half < size else f"{size:.3g} (95 % {low:.2g} .. {high:.2g})"


def _note(en: str = "", zh: str = "") -> dict[str, str]:
    return {"note": en, "note_zh": zh}


def _sets(job: Job) -> list[TextSet]:
    """What can be measured: what cannot (another tokenizer refuses the old data, a file of general questions has gone) is an event."""
    found = [_new(job)]
    for make in (_general, _old):
        try:
            found += [part] if (part := make(job)) is not None else []
        except (GroundupError, StopIteration, KeyError) as error:
            if make is _general and job.recipe.evaluate.general not in ("auto", "none"):
                raise
            which = ("general set", "通用集") if make is _general else ("old data", "旧数据")
            job.run.event("not_compared", set=which[0], why=str(error))
            console.line(
                say("! the {name} is not compared: {why}", "! 没有比较{name}：{why}", name=say(*which), why=str(error).splitlines()[0]),
                style="yellow",
            )
    return found


def _measured(job: Job, model: nn.Module, then: dict[str, Any] | None, sets: list[TextSet], new: MetricSet | None = None) -> dict[str, Any]:
    """The running sums of each set, and the answers; `then`: what was measured before, of which as many answers are given again; `new`:
    the scores of the new data where they are known."""
    found: dict[str, Any] = {"sets": {}, "answers": {"said": [], "scores": {}}}
    for part in sets:
        scores = new if part.name == NEW and new is not None else evaluate(part.task, model, part.encoded, job.plan.device)
        assert isinstance(scores, SummedMetrics)
        found["sets"][part.name] = scores.stored()
    asked = _questions(job)
    if then is not None:
        asked = asked[: len(then["answers"]["said"])]
    if asked and isinstance(model, LanguageModel):
        task: Any = job.task
        metrics = fitting(asked, job.recipe.evaluate.run_code)
        seconds = SECONDS if then is None and job.recipe.evaluate.answers == "auto" else None
        with evaluating(model):
            made = answer(model, task.tokenizer, task.template, asked, metrics, task.context, seconds)
        found["answers"] = {"said": made.said, "scores": made.scores}
    return found


def _restored(part: TextSet, stored: dict[str, Any]) -> SummedMetrics:
    metrics = part.task.metrics_of(part.encoded)
    assert isinstance(metrics, SummedMetrics)
    metrics.restore(stored)
    return metrics


def _held_out(job: Job) -> str:
    return next((s for s in ("test", "validation", "train") if s in job.prepared.splits), "train")


def _questions(job: Job) -> list[Question]:
    """Questions of the held-out split, spread over it."""
    wanted = job.recipe.evaluate.answers
    most = MOST if wanted == "auto" else int(wanted)
    if not isinstance(job.task, InstructionTuning) or not most:
        return []
    index = job.prepared.splits[_held_out(job)]
    spread = index[np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(np.int64))]
    # A batch of answers is cut off where the time is over: what comes first must be spread as well.
    spread = spread[np.random.default_rng(0).permutation(len(spread))]
    return questions(list(job.prepared.dataset.inputs.texts(spread)))


def _new(job: Job) -> TextSet:
    split = _held_out(job)
    encoded = job.validation if split == "validation" and job.validation is not None else None
    return TextSet(NEW, "新数据", job.task, encoded or job.task.prepare(job.prepared.dataset, job.prepared.splits[split], job.plan.device))


def _general(job: Job) -> TextSet | None:
    """General questions in English and Chinese, or the recipe's own file of them, through the template that the tuned model will have."""
    wanted, held = job.recipe.evaluate.general, job.task
    if wanted == "none":
        return None
    config = InstructionTuning.reads(Data(source=str(GENERAL) if wanted == "auto" else wanted, split=Split(validation=0.0)))
    with console.muted():
        made = prepare(config, classification=False, kind="text")
        task: Any = held if type(held) is InstructionTuning else as_conversations(held)
        index = np.sort(np.concatenate(list(made.splits.values())))
        return TextSet("general set", "通用集", task, task.prepare(made.dataset, index, job.plan.device))


def as_conversations(task: Any) -> InstructionTuning:
    """A task that reads conversations with the tokenizer of another one, through its chat template."""
    from groundup.data.chat_tokens import template_for

    made = InstructionTuning()
    made.tokenizer, made.softcap = task.tokenizer, task.softcap
    made._set_context(task.context)
    made.template, made.template_name = template_for(task.tokenizer, getattr(task, "wanted_template", "auto"))
    return made


def _old(job: Job) -> TextSet | None:
    """What the base was trained on, as it says itself; None where it does not, or where that is the new data."""
    assert job.base is not None
    base = job.base
    if "data" not in base.card or job.prepared.is_that_of(base.card):
        return None
    with console.muted():
        old = prepare(base.task.reads(Data.model_validate(base.card["data"]["spec"])), classification=False, kind="text")
        split = next(s for s in ("test", "validation", "train") if s in old.splits)
        return TextSet("old data", "旧数据", base.task, base.task.prepare(old.dataset, old.splits[split], job.plan.device))


# -- other models --------------------------------------------------------------------------------------------------------------
def compare(job: Job, encoded: Encoded, found: dict[str, Any], split: str, scores: MetricSet) -> dict[str, Any] | None:
    """The comparison of any tuned model, for its result; None where training did not start from a model.

    Args:
        scores, found: of the tuned model on the held-out split `encoded`.
    """
    if job.base is None:
        return _compare_file(job, encoded, found, split)
    return compare_text(job, scores) if job.task.kind == "text" else _compare_folder(job, encoded, found, split)


def _compare_file(job: Job, encoded: Encoded, found: dict[str, Any], split: str) -> dict[str, Any] | None:
    """Training began with a file of weights that may have a head for these classes."""
    if job.recipe.init is None:
        return None
    model = build_model(job.recipe.model.name, job.recipe.model.arguments, job.task.input_shape, job.task.num_outputs)
    if load_into(model, Path(job.recipe.init)):
        return None
    scores = evaluate(job.task, placed(model, job.plan.device), encoded, job.plan.device)
    assert scores is not None
    return {"split": split, "rows": [_row(job.plan.metric, found) | _before(job.plan.metric, scores)]}


def _row(metric: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": "new data",
        "what_zh": "新数据",
        "metric": metric,
        "before": None,
        "before_interval": None,
        "after": found["metrics"][metric],
        "after_interval": found["intervals"].get(metric),
        "note": "",
        "note_zh": "",
    }


def _before(metric: str, scores: MetricSet) -> dict[str, Any]:
    return {"before": scores.compute()[metric], "before_interval": list(scores.intervals().get(metric, (math.nan, math.nan)))}


def _compare_folder(job: Job, encoded: Encoded, found: dict[str, Any], split: str) -> dict[str, Any]:
    """Base against tuned: on the new data, and on the base's own data (what was forgotten)."""
    assert job.base is not None
    base = modelfolder.load(job.base.path, trust_code=True, device=str(job.plan.device))  # its code ran already in this process
    metric = job.plan.metric
    same = base.task.state()["labels"] == job.task.state()["labels"]
    keeps = job.recipe.keep_classes
    row = _row(metric, found)
    if same:
        scores = evaluate(base.task, base.model, encoded, job.plan.device)
        assert scores is not None
        row |= _before(metric, scores)
    else:
        row |= {"note": "the base does not know these labels", "note_zh": "起始模型不认识这些标签"}
    rows = [row]
    try:
        config = Data.model_validate(base.card["data"]["spec"])
        old = prepare(like_base(base.task.reads(config), base), classification=base.task.classification, kind=base.task.kind)
        where = next(s for s in ("test", "validation", "train") if s in old.splits)
        old_encoded = base.task.prepare(old.dataset, old.splits[where], job.plan.device)
        before = evaluate(base.task, base.model, old_encoded, job.plan.device)
        judge: Task = base.task
        if keeps and not same:  # the old classes among all of them
            judge, model = job.task, job.state.model
            old_encoded = judge.prepare(old.dataset, old.splits[where], job.plan.device)
        elif not same:  # the old head on the tuned features
            own = job.state.model.state_dict()
            head = _head_keys(base.model)
            base.model.load_state_dict({k: v if k in head else own[k] for k, v in base.model.state_dict().items()})
            model = base.model
        else:
            model = job.state.model
        after = evaluate(judge, model, old_encoded, job.plan.device)
        assert before is not None and after is not None
        old_metric = metric if metric in before.compute() else base.task.default_metric
        rows.append(
            {
                "what": "old data",
                "what_zh": "旧数据",
                "metric": old_metric,
                **_before(old_metric, before),
                "after": after.compute()[old_metric],
                "after_interval": list(after.intervals()[old_metric]),
                "note": "" if same else "among old and new classes" if keeps else "with the base's own head put back on the tuned features",
                "note_zh": "" if same else "在新旧类别之中" if keeps else "在微调后的特征上放回起始模型原来的输出层",
            }
        )
    except (DataError, StopIteration, KeyError) as error:
        job.run.event("old_data_not_evaluated", why=str(error))
    return {"split": split, "rows": rows}


def _head_keys(model: nn.Module) -> set[str]:
    """Names of the last layer group's tensors."""
    groups = getattr(model, "layer_groups", None)
    if groups is None:
        return set()
    last = list(groups().values())[-1]
    inside = {id(t) for m in last for t in (*m.parameters(), *m.buffers())}
    return {n for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in inside}
