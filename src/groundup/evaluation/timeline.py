"""events.jsonl as a story: what interrupted a run, and how far each start of it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from groundup.core.messages import say

Row = dict[str, Any]


@dataclass
class Start:
    """One process that worked on the run: the steps it went through, and how it ended.

    Args:
        number: 0 for the first start, then the number of the resume.
        end: the signal, error or 'finished' that it left; empty where it could not say anything (a kill, a power cut).
    """

    number: int
    first: int
    last: int
    end: str = ""

    def label(self) -> str:
        ended = {
            "finished": say("finished", "完成"),
            "": say("ended without a word (killed, or power lost)", "未留记录即中断（被杀死或断电）"),
        }
        return say(
            "steps {a:,} to {b:,}: {end}", "第 {a:,} 至 {b:,} 步：{end}", a=self.first, b=self.last, end=ended.get(self.end, self.end)
        )


def starts(events: list[Row], metric_rows: list[Row]) -> list[Start]:
    """The starts of a run, from its events and from metric rows (superseded ones show how far a killed start had come)."""
    found: list[Start] = []
    for event in events:
        kind, step = event.get("event"), int(event.get("step") or 0)
        if kind in ("started", "resumed"):
            found.append(Start(int(event.get("attempt", 0)), step, step))
        elif found:
            found[-1].last = max(found[-1].last, step)
            if kind in ("stopped", "error", "finished"):
                # An error follows 'stopped' when a stop was asked for: the first word counts.
                found[-1].end = found[-1].end or str(event.get("signal") or event.get("type") or kind)
    for row in metric_rows:
        if attempt := row.get("superseded"):  # written before that resume, by the start before it
            for earlier, later in zip(found, found[1:]):
                if later.number == attempt:
                    earlier.last = max(earlier.last, int(row.get("step") or 0))
        elif found:
            found[-1].last = max(found[-1].last, int(row.get("step") or 0))
    return found


# kind -> its sentence; a function because the language is chosen when it is read
_SENTENCES: dict[str, Callable[[Row], str]] = {
    "started": lambda e: say("started: {n} steps to go", "开始：共 {n} 步", n=e.get("steps", "?")),
    "resumed": lambda e: say(
        "resumed from step {s} ({p}){d}", "从第 {s} 步恢复（{p}）{d}", s=e.get("step", "?"),
        p=say("bit-exact", "逐位一致") if e.get("promise") == "bit-exact" else say("equal within floating-point tolerance", "在浮点误差内一致"),
        d=say("; {n} later rows were written anew", "；其后的 {n} 行记录已重写", n=e["superseded_rows"]) if e.get("superseded_rows") else "",
    ),
    "stopped": lambda e: say("stopped by {g} at step {s}, after saving", "在第 {s} 步被 {g} 停止，已先保存", g=e.get("signal", "?"), s=e.get("step", "?")),
    "checkpoint_failed": lambda e: say("the checkpoint of step {s} could not be written: {c}", "第 {s} 步的检查点未能写入：{c}", s=e.get("step", "?"), c=e.get("cause", "?")),
    "damaged_checkpoint": lambda e: say("checkpoint {c} was damaged ({r}) and not used", "检查点 {c} 已损坏（{r}），未使用", c=e.get("checkpoint", "?"), r=e.get("reason", "?")),
    "worker_restart": lambda e: say("a data worker died and was started again: {w}", "一个数据进程退出并已重启：{w}", w=e.get("why", "?")),
    "nonfinite": lambda e: say("the loss or its gradient was not finite at step {s}", "第 {s} 步的损失或梯度不是有限值", s=e.get("step", "?")),
    "error": lambda e: say("ended with an error, {t}: {m}", "因错误结束，{t}：{m}", t=e.get("type", "?"), m=str(e.get("message", ""))[:300]),
    "best_lost": lambda e: say("the best weights (step {s}) were lost; the last ones were kept", "最好的权重（第 {s} 步）已丢失，保留了最后的权重", s=e.get("step", "?")),
    "model_not_saved": lambda e: say("the model folder could not be written: {c}", "模型目录未能写入：{c}", c=e.get("cause", "?")),
    "old_data_not_evaluated": lambda e: say("the base model's own data could not be evaluated: {w}", "无法在起始模型自己的数据上评估：{w}", w=e.get("why", "?")),
    "finished": lambda e: say("finished at step {s}", "在第 {s} 步完成", s=e.get("step", "?")),
}  # fmt: skip


def sentences(events: list[Row]) -> list[tuple[str, str]]:
    """(time, what happened) of each event; several of one kind in a row become one line with their number."""
    groups: list[list[Row]] = []
    for event in events:
        if event.get("event") == "checkpoint" or event.get("type") == "Stopped":  # routine, or said by 'stopped' already
            continue
        if groups and groups[-1][0].get("event") == event.get("event"):
            groups[-1].append(event)
        else:
            groups.append([event])
    return [(_when(g[-1]), _sentence(g[-1]) + (f"  (× {len(g)})" if len(g) > 1 else "")) for g in groups]


def _sentence(event: Row) -> str:
    kind = str(event.get("event"))
    if kind in _SENTENCES:
        return _SENTENCES[kind](event)
    facts = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))
    return f"{kind}: {facts}" if facts else kind


def _when(event: Row) -> str:
    moment = event.get("time")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment)) if isinstance(moment, int | float) else ""
