"""report.html: one page that says what was trained, on what, how well, and how to get it again.

Self-contained (pictures inside, no scripts, nothing fetched), so that it can be mailed and opened in ten years. Every section is a
function that gives HTML or nothing; a file of the run folder that is missing leaves its section out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.core import files, messages, units
from groundup.core.messages import say, split_name
from groundup.core.run import RunFolder, read_rows
from groundup.evaluation import page, plots, timeline
from groundup.evaluation.page import code, esc, interval, number, yes_no

LOWER_IS_BETTER = ("loss", "mse", "rmse", "mae", "perplexity", "bits_per_byte")
# The metrics that say most of a language model; the verdict names the first one that there is.
TELLING = ("pass_at_1", "accuracy", "exact_match", "loss")
PANELS = 5  # of the picture of before and after
MANY = 20  # longer tables are folded away, with the rows that matter above

Section = tuple[str, str]  # heading, HTML


def write_report(run: RunFolder, result: dict[str, Any], *, language: str | None = None) -> Path:
    """Writes `plots/*.png` and `report.html` into a run folder.

    Args:
        result: what the run reports (the contents of its result.json).
        language: 'en' or 'zh'; default: that of messages.

    Raises:
        OSError: the folder cannot be written to.
    """
    pictures = run.path / "plots"
    pictures.mkdir(exist_ok=True)
    train, evaluation = run.metric_rows("train"), run.metric_rows("evaluate")
    _draw_curves(pictures, train, evaluation, result)
    _draw_scores(pictures, result)
    data, recipe = _json(run.path / "data.json"), _text(run.path / "recipe.yaml")
    with _language(language):
        sections = [
            (say("Training curves", "训练曲线"), page.gallery(pictures, ["loss", "metric", "rate", "gradient"], _captions())),
            (say("Samples", "样例"), _samples(run.metric_rows("sample"))),
            (say("Before and after tuning", "微调前后对比"), _before_after(pictures, result)),
            *_score_sections(pictures, result),
            (say("Data", "数据"), _data(pictures, data)),
            (say("Automatic choices", "自动决定"), _decisions(_json(run.path / "decisions.json"))),
            (say("Events", "事件"), _events(run.path)),
            (say("Skipped records", "跳过的记录"), _rejected(read_rows(run.path / "rejected.jsonl"))),
            (say("How to reproduce", "如何复现"), _reproduce(_text(run.path / "command.txt"), recipe, data, result)),
            (say("Environment", "环境"), _environment(_json(run.path / "environment.json"))),
        ]
        kind = f"{result.get('task', '')} · {result.get('architecture', '')}".strip(" ·")
        html = page.document(str(result.get("name") or run.path.name), kind, _headline(result, data), sections)
    files.write_text(run.path / "report.html", html)
    return run.path / "report.html"


def evaluation_report(folder: Path, title: str, result: dict[str, Any]) -> Path:
    """Writes `report.html` and `plots/` of one evaluation into an existing folder: metrics, classes, confusion."""
    pictures = folder / "plots"
    pictures.mkdir(exist_ok=True)
    _draw_scores(pictures, result)
    kind = say(
        "evaluation of {model} on {data}",
        "{model} 在 {data} 上的评估",
        model=Path(str(result.get("model", "?"))).name,
        data=result.get("data", "?"),
    )
    facts = [
        (say("data", "数据"), esc(result.get("data", "?"))),
        (say("fingerprint", "指纹"), code(str(result.get("fingerprint", "?")))),
        (say("the data it was trained on", "与训练数据相同"), yes_no(result.get("same_data_as_training"))),
    ]
    sections = [*_score_sections(pictures, result), (say("Data", "数据"), page.facts(facts))]
    files.write_text(folder / "report.html", page.document(title, kind, _headline(result, {}), sections))
    return folder / "report.html"


@contextlib.contextmanager
def _language(language: str | None) -> Iterator[None]:
    """Messages in another language for a while."""
    before = messages._chosen
    messages.set_language(language or before)
    try:
        yield
    finally:
        messages.set_language(before)


def _json(path: Path) -> Any:
    """A JSON object's contents; {} where there is none that can be read: the report shows what is there."""
    try:
        value = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# -- pictures ------------------------------------------------------------------------------------------------------------------
def _draw_curves(pictures: Path, train: list[dict[str, Any]], evaluation: list[dict[str, Any]], result: dict[str, Any]) -> None:
    best, metric = result.get("best_step"), str(result.get("metric", ""))
    if train or evaluation:
        plots.loss_curve(pictures / "loss.png", train, evaluation, best)
    if metric != "loss" and plots.series(evaluation, metric)[0]:
        plots.metric_curve(pictures / "metric.png", evaluation, metric, best)
    if train:
        plots.learning_rate(pictures / "rate.png", train)
        plots.gradient_norm(pictures / "gradient.png", train)


def _draw_scores(pictures: Path, result: dict[str, Any]) -> None:
    if confusion := result.get("confusion"):
        plots.confusion_matrix(pictures / "confusion.png", confusion["classes"], confusion["matrix"])
    if per_class := result.get("per_class"):
        plots.class_bars(pictures / "classes.png", per_class)
    if calibration := result.get("calibration"):
        plots.reliability(pictures / "calibration.png", calibration)
    if rows := (result.get("before_after") or {}).get("rows"):
        telling = [r for r in rows if r["metric"] in TELLING] or rows
        plots.before_after(pictures / "before_after.png", (rows if len(rows) <= PANELS else telling)[:PANELS])


def _captions() -> dict[str, str]:
    return {
        "loss": say("loss on the training and the validation split", "训练集与验证集上的损失"),
        "metric": say("the metric that chose the kept weights, on the validation split", "用来选择保留权重的指标（验证集）"),
        "rate": say("learning rate", "学习率"),
        "gradient": say("norm of the gradient before clipping", "裁剪前的梯度范数"),
        "confusion": say(
            "rows: true class; columns: predicted class; colour: share of the row", "行：真实类别；列：预测类别；颜色：占该行的比例"
        ),
        "classes": say("precision, recall and F1 of each class", "各类别的精确率、召回率与 F1"),
        "calibration": say(
            "points: mean confidence and share right of each bin; dashes: perfect calibration",
            "点：每一档的平均置信度与正确率；虚线：理想校准",
        ),
        "samples": say("training pictures, class by class", "训练图片，按类别排列"),
        "before_after": say("whiskers: 95 % intervals", "须线：95 % 区间"),
    }


# -- sections ------------------------------------------------------------------------------------------------------------------
def _headline(result: dict[str, Any], data: dict[str, Any]) -> str:
    """The one number, its interval and where it was measured; then the size of the run in tiles."""
    metric, split = str(result.get("metric", "")), str(result.get("split", ""))
    records = result.get("records") or data.get("statistics", {}).get("splits", {}).get(split)
    on = say("on the {split} split", "在{split}上", split=split_name(split))
    if records:
        on = say("on {n:,} records of the {split} split", "在{split}的 {n:,} 条记录上", split=split_name(split), n=records)
    spread = interval(result.get("intervals", {}).get(metric))
    spread = say("95 % interval {pair}", "95 % 区间 {pair}", pair=spread) if spread else ""
    seconds = result.get("seconds")
    trained = seconds.get("train") if isinstance(seconds, dict) else None
    tiles = [
        (say("parameters", "参数量"), result.get("parameters")),
        (say("steps", "步数"), result.get("steps")),
        (say("weights of step", "权重取自第几步"), result.get("best_step")),
        (say("training time", "训练用时"), units.human_seconds(trained) if trained is not None else None),
    ]
    return page.headline(
        metric, number(result.get("metrics", {}).get(metric)), spread, on, [(k, number(v)) for k, v in tiles if v is not None]
    )


def _score_sections(pictures: Path, result: dict[str, Any]) -> list[Section]:
    return [
        (say("Metrics", "指标"), _metrics(result)),
        (say("By class", "分类别"), _per_class(pictures, result)),
        (say("Confusion", "混淆矩阵"), _confusion(pictures, result)),
        (say("Worst and most confused pictures", "错得最严重与最易混淆的图片"), _pictures(pictures, result)),
        (say("Calibration", "校准"), _calibration(pictures, result)),
        (say("Slices", "分组"), _slices(result)),
        (say("Compared with another model", "与另一个模型比较"), _comparison(result)),
    ]


def _calibration(pictures: Path, result: dict[str, Any]) -> str:
    ece = result.get("metrics", {}).get("ece")
    if not result.get("calibration") or ece is None:
        return ""
    facts = result["calibration"]
    sure = sum(c * n for c, n in zip(facts["confidence"], facts["records"])) / max(sum(facts["records"]), 1)
    right = sum(a * n for a, n in zip(facts["accuracy"], facts["records"])) / max(sum(facts["records"]), 1)
    spread = interval(result.get("intervals", {}).get("ece"))
    rows = [
        (say("expected calibration error", "期望校准误差（ECE）"), number(ece) + page.small(spread)),
        (say("mean confidence", "平均置信度"), number(sure)),
        (say("share right", "正确的比例"), number(right)),
    ]
    words = (
        say("On the whole it is surer than it is right.", "总体上，它的把握高于实际的正确率。")
        if sure > right
        else say("On the whole it is righter than it is sure.", "总体上，它的把握低于实际的正确率。")
    )
    picture = page.gallery(pictures, ["calibration"], _captions())
    return page.split(picture, page.facts(rows) + page.note(words))


def _pictures(pictures: Path, result: dict[str, Any]) -> str:
    def shown(entries: list[dict[str, Any]]) -> str:
        return page.photos(
            pictures,
            [
                (
                    e["file"],
                    say(
                        "{true} taken for {predicted} ({p:.0%}; true {q:.1%})",
                        "{true} 被认作 {predicted}（{p:.0%}；真实 {q:.1%}）",
                        true=e["true"],
                        predicted=e["predicted"],
                        p=e["probability"],
                        q=e["probability_of_true"],
                    ),
                    e["record"],
                )
                for e in entries
            ],
        )

    if not result.get("worst"):
        return ""
    html = page.note(say("Wrong answers with the least probability for the true class:", "真实类别概率最低的错误：")) + shown(
        result["worst"]
    )
    for pair in result.get("confused", []):
        title = say(
            "{true} taken for {predicted}: {n} records",
            "{true} 被认作 {predicted}：{n} 条",
            true=pair["true"],
            predicted=pair["predicted"],
            n=pair["records"],
        )
        html += page.folded(title, shown(pair["pictures"]))
    return html


def _slices(result: dict[str, Any]) -> str:
    rows = [
        [
            esc(s["column"]),
            esc(s["slice"]),
            number(s["records"]),
            page.meter(s["accuracy"], number(s["accuracy"])),
            interval(s["interval"]),
            esc(say("differs", "有差异")) if s["differs"] else "",
        ]
        for s in result.get("slices") or []
    ]
    columns = [
        say("column", "列"),
        say("part", "部分"),
        say("records", "记录数"),
        say("accuracy", "准确率"),
        say("95 % interval", "95 % 区间"),
        "",
    ]
    note = say("'differs': the interval does not hold the accuracy of the other records. Of many parts, one in twenty differs by chance.",
               "“有差异”：区间不包含其余记录的准确率。部分很多时，约二十分之一会偶然如此。")  # fmt: skip
    return page.table(columns, rows, right=(2, 3)) + page.note(note) if rows else ""


def _comparison(result: dict[str, Any]) -> str:
    found = result.get("against")
    if not found:
        return ""
    if "rows" in found:
        cells = [
            [esc(r["metric"]), number(r["before"]), number(r["after"]), f"{r['difference']:+.3g}" + page.small(interval(r["difference_interval"]))]
            for r in found["rows"]
        ]
        names = [say("metric", "指标"), say("the other", "另一个"), say("this one", "本模型"), say("difference, 95 %", "差值，95 %")]
        return page.note(esc(found["model"])) + page.table(names, cells, right=(1, 2))
    rows = [
        (say("the other model", "另一个模型"), esc(found["model"])),
        (say("its accuracy", "它的准确率"), number(found["accuracy"])),
        (say("difference", "差值"), f"{found['difference']:+.4f}" + page.small(interval(found["interval"]))),
        (say("only this one right", "仅本模型正确"), number(found["only_first_right"])),
        (say("only the other right", "仅另一个正确"), number(found["only_second_right"])),
        (say("p (McNemar, exact)", "p 值（McNemar 精确检验）"), number(found["p_value"])),
    ]
    return page.facts(rows)


def _metrics(result: dict[str, Any]) -> str:
    metrics, intervals = result.get("metrics", {}), result.get("intervals", {})
    rows = [[esc(name), number(value), interval(intervals.get(name))] for name, value in metrics.items()]
    note = say("Measured on the {split} split. Intervals: 95 %, over the records (bootstrap; Wilson's for shares of records). They say how much the "
               "figure would vary with other records of the same kind, not with another seed.",
               "在{split}上测得。区间：95 %，按记录计算（自助法；按记录的比例用 Wilson 区间）。它表示换一批同类记录时数值的波动，不包括换随机种子的波动。",
               split=split_name(result.get("split", "?")))  # fmt: skip
    html = page.split(
        page.table([say("metric", "指标"), say("value", "数值"), say("95 % interval", "95 % 区间")], rows, right=(1, 2)), page.note(note)
    )
    if targets := result.get("per_target"):
        keys = list(next(iter(targets.values())))
        html += page.table(
            [say("target", "目标"), *keys], [[esc(t), *(number(v[k]) for k in keys)] for t, v in targets.items()], right=(1, 2, 3, 4)
        )
    return html if metrics else ""


def _per_class(pictures: Path, result: dict[str, Any]) -> str:
    per_class: dict[str, dict[str, float]] = result.get("per_class") or {}
    columns = ["#", say("class", "类别"), say("precision", "精确率"), say("recall", "召回率"), "F1", say("records", "记录数")]
    rows = [[str(i + 1), esc(c), number(v["precision"]), number(v["recall"]), page.meter(v["f1"], number(v["f1"])), number(v["support"])]
            for i, (c, v) in enumerate(per_class.items())]  # fmt: skip
    right = (0, 2, 3, 4, 5)
    picture = page.gallery(pictures, ["classes"], _captions(), size="wide" if len(rows) > 12 else "")
    if len(rows) <= MANY:
        listed = page.table(columns, rows, right=right)
        return picture + listed if len(rows) > 12 else page.split(picture, listed)
    order = sorted(range(len(rows)), key=lambda i: list(per_class.values())[i]["f1"])
    weakest = page.table(columns, [rows[i] for i in order[:10]], right=right)
    every = page.folded(say("all {n} classes", "全部 {n} 个类别", n=len(rows)), page.table(columns, rows, right=right))
    return picture + page.note(say("The ten classes with the lowest F1:", "F1 最低的十个类别：")) + weakest + every


def _confusion(pictures: Path, result: dict[str, Any]) -> str:
    confusion = result.get("confusion")
    if not confusion:
        return ""
    classes, matrix = confusion["classes"], confusion["matrix"]
    mistakes = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    mistakes.sort(key=lambda m: (-m[0], m[1], m[2]))
    rows = [[esc(classes[i]), esc(classes[j]), number(c), f"{c / sum(matrix[i]):.1%}"] for c, i, j in mistakes[:10]]
    large = len(classes) > 12
    picture = page.gallery(pictures, ["confusion"], _captions(), size="large" if large else "")
    if not rows:
        return picture + page.note(say("No record of this split was mistaken for another class.", "该数据集上没有记录被错认为其他类别。"))
    columns = [say("true", "真实"), say("predicted", "预测"), say("records", "记录数"), say("share of the true class", "占真实类别的比例")]
    listed = page.note(say("Most frequent mistakes:", "最常见的错误：")) + page.table(columns, rows, right=(2, 3))
    return picture + listed if large else page.split(picture, listed)


def _before_after(pictures: Path, result: dict[str, Any]) -> str:
    rows = (result.get("before_after") or {}).get("rows") or []
    cells = []
    for row in rows:
        before = "–" if row.get("before") is None else f"{number(row['before'])}{page.small(interval(row.get('before_interval')))}"
        after = f"{number(row.get('after'))}{page.small(interval(row.get('after_interval')))}"
        what = esc(_local(row, "what")) + page.small(str(row.get("metric", ""))) + page.small(_local(row, "note"))
        cells.append([what, before, after, _change(row)])
    columns = [say("data", "数据"), say("before", "之前"), say("after", "之后"), say("change", "变化")]
    html = page.table(columns, cells, right=(1, 2)) + page.gallery(pictures, ["before_after"], _captions()) if rows else ""
    found = result.get("before_after") or {}
    if verdict := found.get("verdict"):
        html = page.note(say("{en}", "{zh}", **verdict)) + html
    return html + _answers(found.get("answers") or [])


def _samples(rows: list[dict[str, Any]]) -> str:
    """What the model wrote at its first and its last evaluation."""
    steps = sorted({r["step"] for r in rows})
    shown = [r for r in rows if r["step"] in (steps[:1] + steps[-1:])]
    columns = [say("step", "步"), say("beginning", "开头"), say("what the model wrote", "模型写的内容")]
    return page.table(columns, [[number(r["step"]), esc(r["prompt"]), esc(r["text"][:400])] for r in shown], right=(0,)) if rows else ""


def _answers(answers: list[dict[str, str]]) -> str:
    """What the model said before and after, beside what is right."""
    columns = [say("question", "问题"), say("right", "标准答案"), say("before", "之前"), say("after", "之后")]
    rows = [[esc(a[key][:300]) for key in ("prompt", "right", "before", "after")] for a in answers]
    return page.table(columns, rows, stack=True) if rows else ""


def _local(row: dict[str, Any], key: str) -> str:
    """A text that is stored in both languages."""
    return say("{en}", "{zh}", en=row.get(key) or "", zh=row.get(f"{key}_zh") or row.get(key) or "")


def _change(row: dict[str, Any]) -> str:
    """The difference, and in words only as far as the intervals go."""
    before, after = row.get("before"), row.get("after")
    if before is None or after is None:
        return ""
    b, a, paired = row.get("before_interval"), row.get("after_interval"), row.get("difference_interval")
    if after == before:
        verdict = say("the same", "相同")
    elif paired and not interval(paired):
        verdict = say("too few records", "记录太少")
    elif paired and interval(paired) and paired[0] <= 0 <= paired[1]:
        verdict = say("not clear: the interval of the difference holds 0", "不明确：差值的区间包含 0")
    elif not paired and b and a and interval(b) and interval(a) and b[0] <= a[1] and a[0] <= b[1]:
        verdict = say("not clear: the intervals overlap", "不明确：区间重叠")
    elif (after < before) == (row.get("metric") in LOWER_IS_BETTER):
        verdict = say("better", "变好")
    else:
        verdict = say("worse", "变差")
    spread = page.small(interval(paired)) if paired else ""
    return f"{'+' if after > before else ''}{number(after - before)}{spread}{page.small(verdict)}"


def _data(pictures: Path, data: dict[str, Any]) -> str:
    facts: dict[str, Any] = data.get("statistics", {})
    splits: dict[str, int] = facts.get("splits", {})
    shape = " × ".join(map(str, facts.get("input_shape", [])))
    rows = [
        (say("name", "名称"), esc(facts.get("name", ""))),
        (say("records", "记录数"), number(facts.get("records"))),
        (say("splits", "划分"), ", ".join(f"{esc(k)} {v:,}" for k, v in splits.items())),
        (say("input", "输入"), esc(f"{facts.get('kind', '')} {shape}".strip())),
        (say("exact duplicates", "完全重复"), number(facts.get("duplicates"))),
        (say("fingerprint", "指纹"), code(str(data.get("fingerprint", "")))),
    ]
    if target := facts.get("target"):
        rows.insert(4, (say("target", "目标值"), ", ".join(f"{esc(k)} {number(v)}" for k, v in target.items())))
    html = page.facts([r for r in rows if r[1] not in ("", "–", "<code></code>")])
    html += page.gallery(pictures, ["samples"], _captions())
    if classes := facts.get("classes"):
        names = list(splits)
        most = max(sum(counts.values()) for counts in classes.values()) or 1
        body = [[esc(c), *(number(counts.get(n, 0)) for n in names), page.meter(sum(counts.values()) / most, number(sum(counts.values())))]
                for c, counts in classes.items()]  # fmt: skip
        listed = page.table([say("class", "类别"), *map(esc, names), say("all", "合计")], body, right=tuple(range(1, len(names) + 2)))
        html += page.folded(say("records of each class ({n})", "各类别的记录数（{n} 类）", n=len(classes)), listed)
    if features := facts.get("features"):
        keys = ("min", "mean", "std", "max")
        body = [[esc(f), *(number(v.get(k)) for k in keys)] for f, v in list(features.items())[:200]]
        listed = page.table([say("feature", "特征"), *keys], body, right=(1, 2, 3, 4))
        html += page.folded(say("features of the training split ({n})", "训练集的特征（{n} 个）", n=len(features)), listed)
    return html if data else ""


def _decisions(decisions: dict[str, dict[str, Any]]) -> str:
    rows = []
    for key, decision in decisions.items():
        value = decision.get("value")
        if key.startswith("data."):  # a note of the preparation: its value is only the number of records
            key, value = "data", ""
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append([code(key), number(value), esc(_local(decision, "reason"))])
    return page.table([say("what", "项目"), say("value", "取值"), say("why", "原因")], rows, stack=True) if rows else ""


def _events(folder: Path) -> str:
    """What interrupted the run, and how far each start of it came."""
    events = read_rows(folder / "events.jsonl")
    rows = [[esc(when), esc(what)] for when, what in timeline.sentences(events)]
    starts = timeline.starts(events, read_rows(folder / "metrics.jsonl"))
    if starts:  # a report is written by the start that finishes, just before it says so
        starts[-1].end = starts[-1].end or "finished"
    html = page.spans([(s.first, s.last, s.label()) for s in starts]) if len(starts) > 1 else ""
    return html + page.table([say("time (UTC)", "时间（UTC）"), say("what happened", "发生了什么")], rows, stack=True) if rows else ""


def _rejected(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    shown = [[code(r.get("record", "?")), esc(_local(r, "reason"))] for r in rows[:20]]
    listed = page.table([say("record", "记录"), say("reason", "原因")], shown, stack=True)
    return page.note(say("{n:,} records could not be used and were left out; all of them are in rejected.jsonl.",
                         "有 {n:,} 条记录无法使用，已跳过；全部列在 rejected.jsonl 中。", n=len(rows))) + listed  # fmt: skip


def _reproduce(command: str, recipe: str, data: dict[str, Any], result: dict[str, Any]) -> str:
    facts = [(say("data fingerprint", "数据指纹"), code(str(data["fingerprint"])))] if data.get("fingerprint") else []
    if result.get("resumed_from") is not None:
        facts.append((say("resumed from step", "恢复自第几步"), number(result["resumed_from"])))
    html = page.pre(command) if command else ""
    html += page.facts(facts)
    return html + (page.folded(say("recipe, every key resolved", "recipe（全部键的取值）"), page.pre(recipe)) if recipe else "")


def _environment(environment: dict[str, Any]) -> str:
    os_facts, python, torch_facts = (environment.get(k) or {} for k in ("os", "python", "torch"))
    gpus = [g.get("name", "?") if isinstance(g, dict) else str(g) for g in (environment.get("nvidia") or {}).get("gpus") or []]
    cpu, memory = environment.get("cpu") or {}, environment.get("memory") or {}
    rows = [
        ("groundup", environment.get("groundup")),
        ("torch", environment.get("torch_version") or torch_facts.get("version")),
        ("Python", python.get("version")),
        (say("system", "系统"), " ".join(str(v) for v in (os_facts.get("name"), os_facts.get("machine")) if v)),
        ("CPU", " ".join(str(v) for v in (cpu.get("model"), f"× {cpu['cores']}" if cpu.get("cores") else None) if v)),
        (say("memory", "内存"), f"{memory['total_gb']} GB" if memory.get("total_gb") else None),
        ("GPU", ", ".join(gpus)),
    ]
    everything = [[code(key), esc(value)] for key, value in _flat(environment)]
    html = page.facts([(k, esc(v)) for k, v in rows if v])
    return (
        html + page.folded(say("everything that was probed", "探测到的全部信息"), page.table(["", ""], everything, stack=True))
        if environment
        else ""
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value not in (None, {}, []):
        yield prefix, str(value)[:400]
