"""`groundup demo`: the whole path on real handwriting, each step beside the command that does just that."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from groundup import inspecting, pipeline
from groundup.core import console, units
from groundup.core.errors import EnvError, GateError
from groundup.core.messages import say
from groundup.env import verify

LOW, HIGH = ["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]
FEW = 40  # labelled samples of the new digits, eight of each


def run(out: Path | None) -> dict[str, Any]:
    """Runs the demo and returns what every step gave."""
    begin = time.monotonic()
    root = out or Path("runs")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = {name: root / f"demo-{name}-{stamp}" for name in ("base", "tuned", "scratch")}
    timed: dict[str, float] = {}

    _step(1, say("the environment", "环境"), "groundup env info")
    found = verify.verify()
    if not found["ok"]:
        raise EnvError(
            "torch does not compute on this machine: {error}",
            "torch 无法在本机计算：{error}",
            error=found["error"],
            fix="python3 start.py install",
        )
    console.line(
        say(
            "torch {torch} computes on {device}: a matrix product and its gradient agree with the reference",
            "torch {torch} 在 {device} 上计算正常：矩阵乘法及其梯度与参考值一致",
            torch=found["torch"],
            device=found["device_name"] or found["device"],
        )
    )

    grid = root / f"demo-digits-{stamp}.png"
    _step(2, say("the data: 1,797 handwritten digits", "数据：1797 张手写数字"), f"groundup data show digits --grid {_q(grid)}")
    inspecting.print_data(inspecting.data_show("digits", {}, grid))

    base = {"data.classes": LOW}
    _step(
        3,
        say("train the articles' network on the digits 0 to 4", "用数字 0 到 4 训练文章中的网络"),
        _train("digits-cnn", base, folder["base"]),
    )
    with _timed(timed, "train"):
        first = pipeline.train("digits-cnn", base, out=folder["base"])

    _step(4, say("evaluate it on the test split", "在测试集上评估"), f"groundup evaluate {_q(folder['base'])}")
    with _timed(timed, "evaluate"):
        inspecting.print_evaluation(pipeline.evaluate(first))

    few = {"data.classes": HIGH, "data.train_samples": FEW, "train.epochs": 60, "train.batch_size": 20, "evaluate.every": 20}
    gentle = few | {"optim.groups": {"conv": 0.1, "fc1": 0.5}}
    _step(
        5,
        say("fine-tune it to the digits 5 to 9, from {n} labelled samples", "用 {n} 个有标签的样本把它微调到数字 5 到 9", n=FEW),
        f"groundup tune {_q(folder['base'])} --data digits --method full {_sets(gentle)} --out {_q(folder['tuned'])}",
    )
    with _timed(timed, "tune"):
        tuned = pipeline.tune(first, "digits", "full", gentle, out=folder["tuned"])

    alone = few | {"data.augment": None, "optim.lr": 1e-3}  # what tuning has too: no augmentation, this rate
    _step(
        6,
        say("the same {n} samples from scratch, for comparison", "用同样的 {n} 个样本从零训练，作为对比", n=FEW),
        _train("digits-cnn", alone, folder["scratch"]),
    )
    with _timed(timed, "scratch"):
        scratch = pipeline.train("digits-cnn", alone, out=folder["scratch"])
    comparison = {
        name: {"accuracy": r.metrics["accuracy"], "interval": r.result["intervals"]["accuracy"]}
        for name, r in (("tuned", tuned), ("scratch", scratch))
    }
    console.heading(say("on {n} test pictures of the digits 5 to 9", "在数字 5 到 9 的 {n} 张测试图片上", n=_records(tuned)))
    names = {"tuned": say("fine-tuned", "微调"), "scratch": say("from scratch", "从零训练")}
    console.table(
        ["", "accuracy", say("95 % interval", "95 % 区间")],
        [[names[k], f"{v['accuracy']:.1%}", f"{v['interval'][0]:.1%} .. {v['interval'][1]:.1%}"] for k, v in comparison.items()],
        right=(1,),
    )
    if comparison["tuned"]["accuracy"] <= comparison["scratch"]["accuracy"]:
        raise GateError(
            "fine-tuning ({a:.1%}) did not beat training from scratch ({b:.1%}) here",
            "这次微调（{a:.1%}）没有超过从零训练（{b:.1%}）",
            a=comparison["tuned"]["accuracy"],
            b=comparison["scratch"]["accuracy"],
        )

    picture, label = _one_picture(root, stamp)
    _step(
        7,
        say("predict one picture (a {label})", "预测一张图片（一个 {label}）", label=label),
        f"groundup predict {_q(folder['tuned'])} {_q(picture)}",
    )
    answer = pipeline.predict(tuned, picture)
    inspecting.print_predictions({"predictions": answer})

    return {
        "environment": found,
        "base": first.result,
        "tuned": tuned.result,
        "scratch": scratch.result,
        "comparison": comparison,
        "prediction": {"true": label, **answer[0]},
        "report": str((tuned.path / "report.html").resolve()),
        "grid": str(grid),
        "seconds": {**timed, "total": time.monotonic() - begin},
    }


def show(facts: dict[str, Any]) -> None:
    """The closing lines: where the report is, and where to go from here."""
    console.heading(say("done in {time}", "完成，用时 {time}", time=units.human_seconds(facts["seconds"]["total"])))
    console.line(say("report (open it in a browser): {report}", "报告（用浏览器打开）：{report}", report=facts["report"]))
    console.line(say("next, your own pictures in FOLDER/<label>/*.png:", "接下来，用你自己的图片（目录/<标签>/*.png）："))
    console.command(say("groundup data check FOLDER", "groundup data check 目录"))
    console.command(say("groundup train mnist-cnn --set data.source=FOLDER", "groundup train mnist-cnn --set data.source=目录"))


def _step(number: int, title: str, command: str) -> None:
    console.heading(f"{number}. {title}")
    console.command(command)


class _timed:
    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = round(time.monotonic() - self.begin, 3)


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def _sets(overrides: dict[str, Any]) -> str:
    def value(v: Any) -> str:
        import yaml

        return (
            "null"
            if v is None
            else yaml.safe_dump(v, default_flow_style=True).strip().removesuffix("\n...").strip()
            if isinstance(v, dict | list)
            else str(v)
        )

    return " ".join(f"--set {shlex.quote(f'{k}={value(v)}')}" for k, v in overrides.items())


def _train(recipe: str, overrides: dict[str, Any], out: Path) -> str:
    return f"groundup train {recipe} {_sets(overrides)} --out {_q(out)}"


def _records(run: pipeline.Run) -> int:
    return sum(row["support"] for row in run.result["per_class"].values())


def _one_picture(root: Path, stamp: str) -> tuple[Path, str]:
    """The first test picture of the new digits, as a PNG file."""
    from PIL import Image

    from groundup.core.recipe import Data
    from groundup.data.prepare import labels_of, prepare

    prepared = prepare(Data(source="digits", classes=HIGH), classification=True)
    at = prepared.splits["test"][:1]
    path = root / f"demo-picture-{stamp}.png"
    Image.fromarray(prepared.dataset.inputs.fetch(at)[0, 0].numpy()).save(path)
    return path, str(labels_of(prepared.dataset)[at[0]])
