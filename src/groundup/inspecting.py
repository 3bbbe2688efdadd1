"""What the command line shows: lists, cards, data, runs. Each verb has a function that gives JSON-able facts and one that prints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundup.core import console, files, units
from groundup.core.errors import DataError, RunError, UserError
from groundup.core.messages import language, say, split_name, typed
from groundup.core.recipe import Recipe, build, differences, load, override, shipped
from groundup.core.registry import MODELS, TASKS
from groundup.core.run import RunFolder, find_runs, read_rows, resolve_run, yaml_block


def local(facts: dict[str, Any], key: str) -> str:
    """A text that is stored in both languages, in the user's."""
    return str(facts.get(f"{key}_zh" if language() == "zh" else key) or facts.get(key) or "")


def number(value: Any) -> str:
    """A metric for a table: four digits after the point, three significant ones where that would show nothing; '-' for no value."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def interval(pair: Any) -> str:
    return f"{number(pair[0])} .. {number(pair[1])}" if pair and pair[0] is not None and pair[0] == pair[0] else ""


# -- cards ---------------------------------------------------------------------------------------------------------------------
def cards(kind: str, name: str | None) -> dict[str, Any]:
    registry = {"models": MODELS, "tasks": TASKS}[kind]
    if name is not None:
        return registry.get(name).describe()
    return {kind: [entry.describe() for entry in registry.entries()]}


def print_cards(facts: dict[str, Any]) -> None:
    if "name" in facts:
        console.heading(facts["name"])
        console.line(local(facts, "summary"))
        for key, label in (
            ("source", say("source", "出处")),
            ("shapes", say("shapes", "形状")),
            ("limits", say("limits", "限制")),
            ("licence", say("licence", "许可")),
        ):
            if facts.get(key):
                console.line(f"{label}: {facts[key]}")
        if facts["arguments"]:
            console.line(say("arguments and defaults:", "参数与默认值："))
            console.line("  " + yaml_block(_plain(facts["arguments"])).replace("\n", "\n  "))
        return
    kind, entries = next(iter(facts.items()))
    console.table([say("name", "名称"), say("what it is", "说明")], [[e["name"], local(e, "summary")] for e in entries])
    console.line(
        say(
            "groundup {kind} NAME shows the card; your own joins as path/to/file.py:Name",
            "groundup {kind} 名称 可查看卡片；自己的写作 path/to/file.py:名字",
            kind=kind,
        )
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def recipes(name: str | None, schema: bool) -> dict[str, Any]:
    if schema:
        return Recipe.model_json_schema()
    if name is not None:
        return {
            "recipe": load(name).model_dump(mode="json"),
            "file": shipped()[name].read_text(encoding="utf-8") if name in shipped() else "",
        }
    found = []
    for key in shipped():
        recipe = load(key)
        found.append(
            {"name": key, "task": recipe.task.name, "model": recipe.model.name, "data": recipe.data.source, **recipe.card.model_dump()}
        )
    return {"recipes": found}


def print_recipes(facts: dict[str, Any]) -> None:
    if "recipe" in facts:
        console.line(facts["file"].rstrip() or yaml_block(facts["recipe"]))
        return
    console.table(
        [say("name", "名称"), say("what it does", "说明"), say("measured", "实测")],
        [[r["name"], local(r, "summary"), local(r, "result")] for r in facts["recipes"]],
    )
    console.command("groundup train digits-cnn")


# -- data ----------------------------------------------------------------------------------------------------------------------
def _prepared(spec: str, overrides: dict[str, Any]) -> tuple[Any, bool]:
    """The data as training would see it; and whether its target is a class label (decided by the target where no task says it)."""
    import numpy as np

    from groundup.data.corpus import is_text
    from groundup.data.prepare import prepare
    from groundup.data.sources import open_source

    config = _section(spec, overrides)
    if isinstance(config.source, list) or is_text(config.source, config):
        config = config.model_copy(update={"on_bad_record": "skip"})
        if isinstance(config.source, str) or all(is_text(part.source, config) for part in config.source):
            return prepare(config, classification=False, kind="text"), False
    dataset = open_source(config)
    target = dataset.target
    classification = target.ndim == 1
    if classification and dataset.kind == "vector" and len(target):
        try:
            values = target.astype(np.float64)
            classification = bool((values == values.round()).all()) and len(set(values.tolist())) <= max(20, len(values) // 10)
        except ValueError:
            classification = True
    config = config.model_copy(update={"on_bad_record": "skip"})
    return prepare(config, classification=classification, dataset=dataset), classification


def _section(spec: str, overrides: dict[str, Any]) -> Any:
    """The data section that a SPEC and --set make."""
    tree = {"name": "data", "task": "-", "model": "-", "data": {"source": spec}}
    return build(override(tree, overrides), "--set", overridden=overrides).data


def data_show(
    spec: str, overrides: dict[str, Any], grid: Path | None, model: str | None = None, page: Path | None = None
) -> dict[str, Any]:
    from groundup import examples
    from groundup.data import statistics

    if model is not None:
        facts = examples.view(_section(spec, overrides), model)
        if page is not None:
            examples.write_page(facts, page)
            facts["page"] = str(page)
        return facts
    task = examples.task_for(spec) if grid is None else None
    prepared, classification = _prepared(spec, overrides) if task is None else (examples.prepared_for(_section(spec, overrides), task), False)
    facts = statistics.describe(prepared, classification=classification)
    if task is not None:
        facts["notes"] += [f"examples for {task}: --model MODEL shows them as that model will see them"]
        facts["notes_zh"] += [f"{task} 的样本：加 --model MODEL 可查看模型实际读到的内容"]
    if grid is not None:
        try:
            grid.parent.mkdir(parents=True, exist_ok=True)
            statistics.sample_grid(prepared, grid)
        except OSError as error:
            raise DataError(
                "the grid cannot be written to {grid}: {cause}",
                "无法把网格图写到 {grid}：{cause}",
                grid=grid,
                cause=error,
                fix="name a file, as --grid grid.png",
                fix_zh="请给出文件名，例如 --grid grid.png",
            ) from error
        facts["grid"] = str(grid)
    return facts


def _print_text(facts: dict[str, Any]) -> None:
    before, after = facts["before"], facts["after"]
    console.heading(
        say(
            "{name}: {n:,} documents of text, {size}",
            "{name}：{n:,} 篇文本，{size}",
            name=facts["name"],
            n=after["documents"],
            size=files.human_bytes(after["bytes"]),
        )
    )
    rows = [[say("as found", "原始"), before], [say("kept", "保留"), after], *([split_name(name), part] for name, part in after["splits"].items())]
    console.table(
        ["", say("documents", "文档"), say("characters", "字符"), say("bytes", "字节")],
        [[name, *(f"{part[k]:,}" for k in ("documents", "characters", "bytes"))] for name, part in rows],
        right=(1, 2, 3),
    )
    lengths = facts["characters"]
    if lengths:
        named = {"min": say("min", "最短"), "median": say("median", "中位数"), "max": say("max", "最长")}
        listed = ", ".join(f"{named.get(k, k)} {v:,.0f}" for k, v in lengths.items())
        console.line(say("characters of a document: {listed}", "每篇字符数：{listed}", listed=listed))
    for label, counts in ((say("languages", "语言"), facts["languages"]), (say("encodings", "编码"), facts["encodings"])):
        console.line(label + say(": ", "：") + ", ".join(f"{k} {n:,}" for k, n in sorted(counts.items(), key=lambda item: -item[1])[:8]))
    for note in facts["notes_zh" if language() == "zh" else "notes"]:
        console.line(f"- {note}")
    if facts["rejected_file"]:
        console.line(say("left out: {file}", "被移除的：{file}", file=facts["rejected_file"]))


def print_data(facts: dict[str, Any]) -> None:
    if "examples" in facts:
        from groundup import examples

        examples.print_view(facts)
        return
    if facts["kind"] == "text":
        _print_text(facts)
        return
    shape = " x ".join(str(n) for n in facts["input_shape"])
    console.heading(
        say(
            "{name}: {n:,} records, {kind} {shape}",
            "{name}：{n:,} 条记录，{kind} {shape}",
            name=facts["name"],
            n=facts["records"],
            kind=say(facts["kind"], {"image": "图片", "vector": "向量"}[facts["kind"]]),
            shape=shape,
        )
    )
    splits = list(facts["splits"])
    if "classes" in facts:
        rows = [[c, *(f"{n.get(s, 0):,}" for s in splits)] for c, n in list(facts["classes"].items())[:50]]
        rows.append([say("all", "合计"), *(f"{facts['splits'][s]:,}" for s in splits)])
        console.table([say("class", "类别"), *map(split_name, splits)], rows, right=tuple(range(1, len(splits) + 1)))
        if len(facts["classes"]) > 50:
            console.line(say("... and {n} more classes", "……另有 {n} 个类别", n=len(facts["classes"]) - 50))
    else:
        console.table([say("split", "划分"), say("records", "记录数")], [[split_name(s), f"{n:,}"] for s, n in facts["splits"].items()], right=(1,))
        t = facts["target"]
        console.line(
            say(
                "target: {min:.4g} .. {max:.4g}, mean {mean:.4g}, std {std:.4g}",
                "目标值：{min:.4g} .. {max:.4g}，均值 {mean:.4g}，标准差 {std:.4g}",
                **t,
            )
        )
    if "pixels" in facts:
        console.line(say("pixels (0..1): mean {mean}, std {std}", "像素（0..1）：均值 {mean}，标准差 {std}", **facts["pixels"]))
    if "features" in facts:
        console.table(
            [say("feature", "特征"), "min", "mean", "std", "max"],
            [[n, *(f"{v:.4g}" for v in (f["min"], f["mean"], f["std"], f["max"]))] for n, f in list(facts["features"].items())[:40]],
            right=(1, 2, 3, 4),
        )
    for note in facts["notes_zh" if language() == "zh" else "notes"]:
        console.line(f"- {note}")
    if facts.get("grid"):
        console.line(say("sample grid: {grid}", "样本网格图：{grid}", grid=facts["grid"]))


def data_check(spec: str, overrides: dict[str, Any], model: str | None = None, fix: Path | None = None) -> dict[str, Any]:
    from groundup import examples
    from groundup.data import statistics
    from groundup.data.corpus import is_text

    config = _section(spec, overrides)
    task = examples.task_for(spec)
    if model is not None or task is not None or (isinstance(config.source, str) and is_text(config.source, config)):
        prepared = examples.prepared_for(config, task if model is None else task or "instruction-tuning")
        odd, written = examples.review(prepared, fix.expanduser() if fix is not None else None)
        kind = prepared.dataset.inputs.statistics
        facts = {
            "name": prepared.dataset.name,
            "records": len(prepared.dataset),
            "task": task or "language-modeling",
            "languages": kind["languages"],
            "problems": statistics.problems(prepared, classification=False) + odd,
        }
        if model is not None:
            seen = examples.view(config, model)
            facts["for_model"] = {k: v for k, v in seen.items() if k != "examples"}
            facts["problems"] += examples.problems(seen)
        return facts | ({"fixed": written} if written else {})
    if fix is not None:
        raise DataError("--fix writes files of text and of examples; {spec} is neither", "--fix 用于文本与样本文件；{spec} 不是", spec=spec)
    prepared, classification = _prepared(spec, overrides)
    wish = overrides.get("data.on_bad_record", "auto")  # what training would do decides how severe a bad record is
    policy = wish if wish != "auto" else "stop" if prepared.dataset.kind == "vector" else "skip"
    prepared.config = prepared.config.model_copy(update={"on_bad_record": policy})
    return {
        "name": prepared.dataset.name,
        "records": len(prepared.dataset),
        "problems": statistics.problems(prepared, classification=classification),
    }


def print_check(facts: dict[str, Any]) -> None:
    if "for_model" in facts:
        from groundup import examples

        examples.print_lengths(facts["for_model"])
    if "task" in facts:
        what, what_zh = ("plain text", "普通文本") if facts["task"] == "language-modeling" else ("examples", "样本")
        console.line(say("read as {what} for {task}", "按 {task} 的{what_zh}读取", what=what, what_zh=what_zh, task=facts["task"]))
    if facts.get("languages"):
        listed = ", ".join(f"{k} {n:,}" for k, n in facts["languages"].items())
        console.line(say("languages: {listed}", "语言：{listed}", listed=listed))
    if not facts["problems"]:
        console.line(say("{name}: {records:,} records, nothing to remark", "{name}：{records:,} 条记录，没有发现问题", **facts))
    for problem in facts["problems"]:
        style = {"error": "red", "warning": "yellow"}.get(problem["severity"])
        console.line(
            f"{say(problem['severity'], {'error': '错误', 'warning': '警告', 'info': '提示'}[problem['severity']])}{say(': ', '：')}{local(problem, 'message')}",
            style=style,
        )
        for record in problem["records_zh" if language() == "zh" else "records"][:10]:
            console.line(f"    {record}")
        if len(problem["records"]) > 10:
            console.line(
                say("    ... and {n} more (--json lists all)", "    ……另有 {n} 条（--json 可列出全部）", n=len(problem["records"]) - 10)
            )
    if fixed := facts.get("fixed"):
        console.line(
            say(
                "{file}: {kept:,} records kept; {removed:,} removed, each with its reason in {removed_list}",
                "{file}：保留 {kept:,} 条；移除 {removed:,} 条，原因逐条写在 {removed_list}",
                **fixed,
            )
        )


# -- training and its results --------------------------------------------------------------------------------------------------
def print_plan(facts: dict[str, Any]) -> None:
    console.line(yaml_block(facts["recipe"]))
    console.line()
    print_decisions(facts["decisions"])
    console.line(
        say(
            "{steps:,} steps of about {ms:.1f} ms (forward and backward); {n:,} parameters, {t:,} trained",
            "{steps:,} 步，每步约 {ms:.1f} 毫秒（前向与反向）；{n:,} 个参数，训练 {t:,} 个",
            steps=facts["steps"],
            ms=1e3 * facts["step_seconds"],
            n=facts["parameters"]["all"],
            t=facts["parameters"]["trainable"],
        )
    )


def print_forecast(facts: dict[str, Any]) -> None:
    from groundup.planning.forecast import OWNERS_ZH

    memory, (quick, slow) = facts["memory"], facts["train_seconds"]
    size, human = files.human_bytes, units.human_seconds
    devices = facts["device"] + (f" x {facts['gpus']} ({facts['sharding']})" if facts["gpus"] > 1 else "")
    console.line(
        say(
            "{verdict}: {peak} of {capacity} on {device} ({precision}); {n:,} steps in about {time}",
            "{verdict_zh}：{device} 的 {capacity} 中需要 {peak}（{precision}）；{n:,} 步约需 {time_zh}",
            verdict="fits" if facts["fits"] else "does not fit",
            verdict_zh="放得下" if facts["fits"] else "放不下",
            peak=size(max(memory["peak"], facts["evaluation"])),
            capacity=size(memory["capacity"]),
            device=devices,
            precision=facts["precision"],
            n=facts["steps"],
            time=human(quick) if human(quick) == human(slow) else f"{human(quick)} to {human(slow)}",
            time_zh=human(quick) if human(quick) == human(slow) else f"{human(quick)} 到 {human(slow)}",
        ),
        style="green" if facts["fits"] else "red",
    )
    console.line(
        say(
            "{n:,} parameters, {t:,} trained; batches of {batch} in micro-batches of {micro}",
            "{n:,} 个参数，训练 {t:,} 个；每批 {batch} 个样本，微批次 {micro} 个",
            n=facts["parameters"]["all"],
            t=facts["parameters"]["trainable"],
            batch=facts["batch_size"],
            micro=facts["micro_batch_size"],
        )
    )
    console.line(
        say(
            "{of} {resident}, evaluation {evaluation}; a checkpoint {disk}, the run's folder {run}",
            "{of_zh} {resident}，评估 {evaluation}；每个检查点 {disk}，运行目录 {run}",
            of="the process above its imports" if facts["device"].startswith("cpu") else "with the driver's",
            of_zh="进程在导入之外共" if facts["device"].startswith("cpu") else "连同驱动",
            resident=size(facts["resident"]),
            evaluation=size(facts["evaluation"]),
            disk=size(facts["disk"]["checkpoint"]),
            run=size(facts["disk"]["run"]),
        )
        + (
            say("; keys and values of a sequence {kv}", "；一条序列的 KV 缓存 {kv}", kv=size(facts["kv_cache"]))
            if facts["kv_cache"]
            else ""
        )
    )
    costs = []
    if facts["kilowatt_hours"]:
        low, high = facts["kilowatt_hours"]
        costs.append(say("energy {low:.2f} to {high:.2f} kWh", "能耗 {low:.2f} 到 {high:.2f} 千瓦时", low=low, high=high))
    if facts["cost"]:
        low, high = facts["cost"]
        costs.append(say("price {low:,.2f} to {high:,.2f}", "费用 {low:,.2f} 到 {high:,.2f}", low=low, high=high))
    if costs:
        console.line(say(", ", "，").join(costs))
    if facts["calibrated"]:
        source = say("the time is that of real steps measured here", "时间由本机实测的训练步得出")
    elif facts["source"] == "measured here":
        source = say("the time is from this machine's peak rates, not from steps", "时间由本机实测的峰值速率推算，未实测训练步")
    else:
        source = say(
            "the time is from peak rates of {source}, not measured", "时间由 {source} 的峰值速率推算，未经实测", source=facts["source"]
        )
    console.line(source, style="dim")
    owners = sorted(((k, v) for k, v in memory.items() if k not in ("peak", "capacity")), key=lambda pair: -pair[1])
    console.table(
        [say("memory at its peak", "内存峰值时的构成"), say("bytes", "大小"), ""],
        [[say("{en}", "{zh}", en=k, zh=OWNERS_ZH.get(k, k)), size(v), f"{v / max(1, memory['peak']):.0%}"] for k, v in owners],
        right=(1, 2),
    )
    for change in facts["advice"]:
        console.line(
            say(
                "{mark} {peak}, {slower}x the time, with:",
                "{mark_zh}{peak}，耗时 {slower} 倍，只需：",
                mark="fits:" if change["fits"] else "still too much, but less:",
                mark_zh="放得下：" if change["fits"] else "仍放不下，但更少：",
                peak=size(change["peak"]),
                slower=change["slower"],
            )
        )
        words = [f"--gpus {change['gpus']}"] if "gpus" in change else []
        console.command(" ".join(words + [f"--set {k}={v}" for k, v in change["set"].items()]))


MARKS = {"error": "✗", "warning": "!", "info": "·"}


def print_findings(report: Any) -> None:
    if report.passed:
        names = say("、", "、").join(zh for _, zh in report.passed) if language() == "zh" else ", ".join(en for en, _ in report.passed)
        console.line("✓ " + say("nothing found: {names}", "未发现问题：{names}", names=names), style="green")
    for name, why in report.failed:
        console.line(say("? {name}: could not be tested: {why}", "? {name}：无法检查：{why}", name=name, why=why), style="yellow")
    for finding in report.findings:
        facts = finding.as_json()
        console.line(
            f"{MARKS[finding.severity]} {facts['finding_id']}  {facts['location']}"
            + (f"  ({source})" if (source := finding.evidence.get("source")) not in (None, finding.location) else ""),
            style={"error": "red", "warning": "yellow"}.get(finding.severity, "dim"),
        )
        console.line(f"    {facts['message']}")
        console.line(f"    {say('→', '→')} {facts['fix']}", style="bold")
    if report.findings:
        console.line(
            say("more about one of them: groundup explain {id}", "详细说明：groundup explain {id}", id=report.findings[0].finding_id),
            style="dim",
        )
    console.line(say("{s:.1f} s", "{s:.1f} 秒", s=report.seconds), style="dim")


def print_decisions(decisions: dict[str, Any]) -> None:
    def brief(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {brief(v)}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = [
        [key.partition(".")[0], files.human_bytes(d["value"]) if key == "memory" else brief(d["value"])[:40], local(d, "reason")]
        for key, d in decisions.items()
    ]
    console.table([say("choice", "自动选择"), say("value", "取值"), say("reason", "理由")], rows)


def print_run(run: Any) -> None:
    result = run.result
    print_scores(result)
    print_before_after(result)
    console.line()
    console.line(
        say(
            "{steps:,} steps in {train}, {total} in all; weights of step {best}",
            "{steps:,} 步用时 {train}，总共 {total}；采用第 {best} 步的权重",
            steps=result["steps"],
            train=units.human_seconds(result["seconds"]["train"]),
            total=units.human_seconds(result["seconds"]["total"]),
            best=result["best_step"],
        )
    )
    console.line(say("model: {model}", "模型：{model}", model=result["model"]))
    if (run.path / "report.html").is_file():
        console.line(say("report: {report}", "报告：{report}", report=str(run.path / "report.html")))


def print_scores(result: dict[str, Any]) -> None:
    console.heading(say("{split} split", "{split}", split=split_name(result["split"])))
    console.table(
        [say("metric", "指标"), say("value", "值"), say("95 % interval", "95 % 区间")],
        [[k, number(v), interval(result["intervals"].get(k))] for k, v in result["metrics"].items()],
        right=(1,),
    )


def print_before_after(result: dict[str, Any]) -> None:
    found = result.get("before_after")
    if not found:
        return
    console.heading(say("before and after tuning", "微调前后"))
    rows = [[local(r, "what"), r["metric"], number(r["before"]), number(r["after"]), _changed(r), local(r, "note")] for r in found["rows"]]
    paired = any(r.get("difference_interval") for r in found["rows"])
    change = say("change, 95 %", "变化，95 %") if paired else say("95 % interval", "95 % 区间")
    console.table(
        [say("data", "数据"), say("metric", "指标"), say("before", "之前"), say("after", "之后"), change, ""],
        rows,
        right=(2, 3),
    )
    for answer in found.get("answers", [])[:3]:
        console.line()
        for label, key in (
            (say("asked", "问题"), "prompt"),
            (say("right", "标准答案"), "right"),
            (say("before", "之前"), "before"),
            (say("after", "之后"), "after"),
        ):
            console.line(f"{label}: " + " ".join(answer[key].split())[:200], style="dim" if key in ("prompt", "right") else None)
    if found.get("verdict"):
        console.line()
        console.line(local({"said": found["verdict"]["en"], "said_zh": found["verdict"]["zh"]}, "said"), style="bold")


def _changed(row: dict[str, Any]) -> str:
    """The paired interval of the difference, or, where only the models' own intervals are known, that of the second one."""
    if pair := row.get("difference_interval"):
        known = pair[0] is not None and pair[0] == pair[0]
        return f"{row['difference']:+.3g} " + (f"({pair[0]:+.2g} .. {pair[1]:+.2g})" if known else say("(too few records)", "（记录太少）"))
    return interval(row["after_interval"])


def print_evaluation(result: dict[str, Any]) -> None:
    console.line(say("{data}, {n:,} records", "{data}，{n:,} 条记录", data=result["data"], n=result["records"]))
    if result.get("views"):
        seen = ", ".join(f"{k}={v}" for k, v in result["views"].items() if v)
        console.line(say("averaged over the views of each record: {seen}", "每条记录取多个视图的平均：{seen}", seen=seen))
    if result.get("same_data_as_training") and result["split"] in ("all", "train"):
        console.line(
            say(
                "! the model was trained on these records: how it does on others is not seen here",
                "! 模型就是在这些记录上训练的：这里看不出它在其他数据上的表现",
            ),
            style="yellow",
        )
    print_scores(result)
    if result.get("per_class"):
        rows = [
            [c, *(number(v[k]) for k in ("precision", "recall", "f1")), f"{v['support']:,}"]
            for c, v in list(result["per_class"].items())[:50]
        ]
        console.line()
        console.table([say("class", "类别"), "precision", "recall", "f1", say("records", "记录数")], rows, right=(1, 2, 3, 4))
    confusion = result.get("confusion")
    if confusion and len(confusion["classes"]) <= 12:
        console.line()
        console.table(
            [say("true \\ predicted", "真实 \\ 预测"), *confusion["classes"]],
            [[c, *row] for c, row in zip(confusion["classes"], confusion["matrix"])],
            right=tuple(range(1, len(confusion["classes"]) + 1)),
        )
    if rows := [
        [s["column"], s["slice"], f"{s['records']:,}", number(s["accuracy"]), interval(s["interval"])]
        for s in result.get("slices") or []
        if s["differs"]
    ]:
        console.heading(say("slices that differ from the rest", "与其余部分有差异的分组"))
        names = [
            say("column", "列"),
            say("part", "部分"),
            say("records", "记录数"),
            say("accuracy", "准确率"),
            say("95 % interval", "95 % 区间"),
        ]
        console.table(names, rows, right=(2, 3))
    if (other := result.get("against")) and "rows" in other:
        console.heading(say("against {model}", "与 {model} 相比", model=other["model"]))
        rows = [[r["metric"], number(r["before"]), number(r["after"]), _changed(r)] for r in other["rows"]]
        names = [say("metric", "指标"), say("the other", "另一个"), say("this one", "本模型"), say("difference, 95 %", "差值，95 %")]
        console.table(names, rows, right=(1, 2))
    elif other:
        console.line()
        console.line(
            say(
                "against {model} ({accuracy:.4f}): {difference:+.4f} [{low:+.4f} .. {high:+.4f}], p = {p:.3g} (McNemar, exact; {a} against {b} records)",
                "与 {model}（{accuracy:.4f}）相比：{difference:+.4f} [{low:+.4f} .. {high:+.4f}]，p = {p:.3g}（McNemar 精确检验；{a} 对 {b} 条记录）",
                model=other["model"],
                accuracy=other["accuracy"],
                difference=other["difference"],
                low=other["interval"][0],
                high=other["interval"][1],
                p=other["p_value"],
                a=other["only_first_right"],
                b=other["only_second_right"],
            )
        )
    if result.get("report"):
        console.line(say("report: {report}", "报告：{report}", report=result["report"]))


def print_harness(result: dict[str, Any]) -> None:
    rows = [
        [task, metric, number(value), number(values.get(f"{metric}_stderr")), number(values["questions"])]
        for task, values in result["harness"].items()
        for metric, value in values.items()
        if metric != "questions" and not metric.endswith("_stderr")
    ]
    names = [say("task", "任务"), say("metric", "指标"), say("value", "值"), say("standard error", "标准误"), say("questions", "题数")]
    console.table(names, rows, right=(2, 3, 4))


def print_export(result: dict[str, Any]) -> None:
    if result["to"] == "merged":
        console.line(
            say(
                "{file}: {size}; opened again, its logits are within {difference:.1e} of base and adapter (at most {tolerance:g}), {agreed:.0%} of "
                "{n} greedy answers alike",
                "{file}：{size}；重新打开后，logits 与“基座＋适配器”相差 {difference:.1e}（最多 {tolerance:g}），{n} 个贪心回答中 {agreed:.0%} 相同",
                file=result["file"],
                size=files.human_bytes(result["bytes"]),
                difference=result["largest_difference"],
                tolerance=result["tolerance"],
                agreed=result["greedy_agreement"],
                n=result["prompts"],
            )
        )
        return
    console.line(
        say(
            "{file}: {size}, outputs within {difference:.1e} of the model's (at most {tolerance:g}) at batch sizes {sizes}",
            "{file}：{size}，输出与原模型相差 {difference:.1e}（最多 {tolerance:g}），批大小 {sizes}",
            file=result["file"],
            size=files.human_bytes(result["bytes"]),
            difference=result["largest_difference"],
            tolerance=result["tolerance"],
            sizes=", ".join(map(str, result["batch_sizes"])),
        )
    )
    console.line(say("what goes in and comes out: {file}.json", "输入与输出的说明：{file}.json", file=result["file"]))


def print_predictions(facts: dict[str, Any]) -> None:
    for answer in facts["predictions"]:
        if "error" in answer:
            console.line(f"! {answer['input']}: {answer['error']}", style="yellow")
        elif "top" in answer:
            others = ", ".join(f"{t['label']} {t['probability']:.1%}" for t in answer["top"][1:3])
            console.line(f"{answer['input']}: {answer['label']}  {answer['probability']:.1%}" + (f"  ({others})" if others else ""))
        elif "labels" in answer:
            console.line(f"{answer['input']}: {', '.join(answer['labels']) or '-'}")
        elif "next" in answer:  # of a language model: the likeliest next tokens; `generate` writes on
            console.line(f"{answer['input']}: " + ", ".join(f"{n['token']!r} {n['probability']:.1%}" for n in answer["next"]))
        else:
            values = (
                {"": answer["value"]}
                if "value" in answer
                else answer["values"]
                if "values" in answer
                else {k: v for k, v in answer.items() if k != "input"}
            )
            console.line(f"{answer['input']}: " + ", ".join(f"{k} {number(v)}".strip() for k, v in values.items()))


# -- runs ----------------------------------------------------------------------------------------------------------------------
STATES_ZH = {"finished": "已完成", "running": "正在训练", "unfinished": "未完成", "damaged": "已损坏"}


def _brief(run: RunFolder) -> dict[str, Any]:
    recipe, result = run.recipe(), run.result()
    rows = run.metric_rows()
    steps = result["steps"] if result else max((r["step"] for r in rows), default=0)
    return {
        "run": run.path.name,
        "path": str(run.path),
        "recipe": recipe.name,
        "state": "finished" if result else "running" if run.lock.held() else "unfinished",
        "steps": steps,
        "metric": result["metric"] if result else None,
        "value": result["metrics"][result["metric"]] if result else None,
    }


def runs_list(root: Path) -> dict[str, Any]:
    found = []
    for run in find_runs(root):
        try:
            found.append(_brief(run))
        except UserError as error:  # the others are told all the same
            console.line("! " + error.localized(), style="yellow")
            damaged = {"recipe": None, "state": "damaged", "steps": 0, "metric": None, "value": None}
            found.append({"run": run.path.name, "path": str(run.path), **damaged})
    return {"runs": found}


def print_runs(facts: dict[str, Any]) -> None:
    if not facts["runs"]:
        console.line(say("no runs here yet", "这里还没有运行"))
        console.command("groundup train digits-cnn")
        return
    console.table(
        [say("run", "运行"), say("state", "状态"), say("steps", "步数"), say("result", "结果")],
        [
            [r["run"], say(r["state"], STATES_ZH[r["state"]]), f"{r['steps']:,}", f"{r['metric']} {number(r['value'])}" if r["metric"] else ""]
            for r in facts["runs"]
        ],
        right=(2,),
    )


def runs_show(text: str) -> dict[str, Any]:
    from groundup.training.checkpoint import Checkpoints

    run = resolve_run(text)
    events = [e for e in read_rows(run.path / "events.jsonl") if e.get("event") != "checkpoint"]
    return {
        **_brief(run),
        "result": run.result(),
        "decisions": run.decisions,
        "checkpoints": Checkpoints(run.checkpoints, {}).steps(),
        "events": events,
        "command": (run.path / "command.txt").read_text(encoding="utf-8").strip() if (run.path / "command.txt").is_file() else None,
    }


EVENTS_ZH = {
    "started": "开始", "planned": "计划", "resumed": "恢复", "stopped": "停止", "finished": "完成", "error": "错误", "nonfinite": "非有限值",
    "checkpoint_failed": "检查点未写入", "damaged_checkpoint": "检查点损坏", "model_not_saved": "模型未保存", "best_lost": "最佳权重丢失",
    "worker_restart": "工作进程重启", "not_compared": "未做前后对比", "old_data_not_evaluated": "旧数据未评估",
}  # fmt: skip
FACTS_ZH = {
    "steps": "步数", "step": "步", "memory": "内存", "seconds": "用时", "disk": "磁盘", "signal": "信号", "cause": "原因", "why": "原因", "type": "类型",
    "message": "信息", "records": "记录", "checkpoint": "检查点", "reason": "原因", "attempt": "次数", "promise": "承诺", "differs": "差异", "rescued": "已改存",
    "superseded_rows": "作废行数", "set": "数据",
}  # fmt: skip


def _event(event: dict[str, Any]) -> str:
    """A line of events.jsonl, with units."""
    zh = language() == "zh"

    def shown(key: str, value: Any) -> str:
        value = files.human_bytes(value) if key in ("memory", "disk") and value else units.human_seconds(value) if key == "seconds" else value
        return f"{FACTS_ZH.get(key, key) if zh else key} {value}"

    rest = [shown(k, local(event, k)) if f"{k}_zh" in event else shown(k, v) for k, v in event.items() if k not in ("event", "time") and not k.endswith("_zh")]
    name = EVENTS_ZH.get(event["event"], event["event"]) if zh else event["event"]
    return say("{name}: {rest}", "{name}：{rest}", name=name, rest=say(", ", "，").join(rest))


def print_run_details(facts: dict[str, Any]) -> None:
    console.heading(
        say(
            "{run}  ({state}, {n:,} steps)",
            "{run}（{state_zh}，{n:,} 步）",
            run=facts["run"],
            state=facts["state"],
            state_zh=STATES_ZH[facts["state"]],
            n=facts["steps"],
        )
    )
    if facts["command"]:
        console.command(facts["command"])
    if facts["result"]:
        print_scores(facts["result"])
        print_before_after(facts["result"])
    console.heading(say("automatic choices", "自动选择"))
    print_decisions(facts["decisions"])
    console.line()
    console.line(say("checkpoints: {steps}", "检查点：{steps}", steps=", ".join(f"step-{s:06d}" for s in facts["checkpoints"]) or "-"))
    for event in facts["events"]:
        console.line(f"  {_event(event)}")
    if facts["state"] == "unfinished":
        console.command(f"groundup train --resume --out {typed(facts['path'])}")


def runs_compare(texts: list[str]) -> dict[str, Any]:
    if len(texts) < 2:
        raise RunError(
            "comparing needs two runs or more; {n} was given",
            "比较至少需要两个运行；只给了 {n} 个",
            n=len(texts),
            fix="groundup runs compare RUN RUN",
        )
    found = [resolve_run(t) for t in texts]
    first = found[0].recipe()
    changed = sorted({k for run in found[1:] for k in differences(first, run.recipe()) if not k.startswith("card.")})
    flat = [run.recipe().flat() for run in found]
    results = [run.result() for run in found]
    metrics = list(dict.fromkeys(m for r in results if r for m in r["metrics"]))
    prints = [files.read_json(run.path / "data.json")["fingerprint"] if (run.path / "data.json").is_file() else None for run in found]
    return {
        "runs": [str(run.path) for run in found],
        "recipe": {k: [f.get(k) for f in flat] for k in changed},
        "same_data": len(set(prints)) == 1,
        "metrics": {m: [r["metrics"].get(m) if r else None for r in results] for m in metrics},
        "intervals": {m: [r["intervals"].get(m) if r else None for r in results] for m in metrics},
    }


def print_comparison(facts: dict[str, Any]) -> None:
    names = [Path(r).name for r in facts["runs"]]
    letters = [chr(65 + i) for i in range(len(names))]
    for letter, name in zip(letters, names):
        console.line(f"{letter}  {name}")
    if facts["recipe"]:
        console.heading(say("recipe: only what differs", "recipe：只列出差异"))
        console.table(
            [say("key", "键"), *letters], [[k, *("-" if v is None else v for v in values)] for k, values in facts["recipe"].items()]
        )
    console.heading(say("results", "结果"))
    console.table(
        [say("metric", "指标"), *letters],
        [
            [m, *(f"{number(v)}  ({interval(i)})" if interval(i) else number(v) for v, i in zip(values, facts["intervals"][m]))]
            for m, values in facts["metrics"].items()
        ],
    )
    console.line(
        say("the runs read the same data", "这些运行读取的是同样的数据")
        if facts["same_data"]
        else say("! the runs read different data: their results do not compare directly", "! 这些运行的数据不同：结果不能直接比较"),
        style=None if facts["same_data"] else "yellow",
    )


def print_verification(facts: dict[str, Any]) -> None:
    for check in facts["checks"]:
        good = check["problem"] is None
        console.line(
            f"{say('ok ', '完好') if good else say('BAD', '损坏')} {check['what']}" + ("" if good else f"{say(': ', '：')}{check['problem']}"),
            style=None if good else "red",
        )
    if not facts["checks"]:
        console.line(say("nothing to verify: no checkpoint and no model yet", "没有可校验的内容：还没有检查点和模型"))


def print_explanation(entry: dict[str, Any]) -> None:
    kinds = {"error": "错误", "warning": "警告", "info": "提示", "blocking": "阻断"}
    console.line(f"{entry['id']}  ({say(entry['severity'], kinds.get(entry['severity'], entry['severity']))})", style="bold")
    console.line(entry["says"])
    console.line(entry["why"])
    console.line("→ " + entry["fix"], style="bold")
    for key, title in (("wrong", say("wrong", "错误")), ("right", say("right", "正确"))):
        if entry[key]:
            console.line(title + say(":", "："), style="dim")
            for line in entry[key].splitlines():
                console.line(f"    {line}")
    if entry["source"]:
        console.line(f"{say('source: ', '来源：')}{entry['source']}", style="dim")
