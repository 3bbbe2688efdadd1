"""`groundup demo`: the whole path on real handwriting, then a language model from zero, each step beside the command that does just that."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

from groundup import inspecting, pipeline
from groundup.core import console, units
from groundup.core.errors import EnvError, GateError
from groundup.core.messages import say, typed
from groundup.env import verify

LOW, HIGH = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
DRAWS = 3  # choices of the few samples: one alone would be luck

# One labelled sample of each new digit and eight gentle steps, the same on both sides. Picked from a grid because the gap is visible here; it is
# not a general advantage: with less dropout and a higher rate, scratch does as well on the same samples. Do not quote it as one.
FEW: dict[str, Any] = {
    "data.classes": HIGH,
    "data.train_samples": 5,
    "train.epochs": 8,
    "train.batch_size": 5,
    "train.keep": "last",
    "optim.lr": 1e-3,
    "schedule.warmup": 0,
    "evaluate.every": 8,
}
BUDGET = "1min"  # for the language model
QUIET = {"watch.report": False, "watch.tensorboard": False}


def run(out: Path | None) -> dict[str, Any]:
    """Runs the demo and returns what every step gave."""
    begin = time.monotonic()
    root = out or Path("runs")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = {name: root / f"demo-{name}-{stamp}" for name in ("base", "tuned", "scratch", "language")}
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
    _step(2, say("the data: 1,797 handwritten digits", "数据：1797 张手写数字"), f"groundup data show digits --grid {typed(grid)}")
    inspecting.print_data(inspecting.data_show("digits", {}, grid))

    base = {"data.classes": LOW, "model.dropout": 0.5, "optim.name": "muon", "train.keep": "last"}
    _step(
        3,
        say("train the articles' network on the digits 0 to 4", "用数字 0 到 4 训练文章中的网络"),
        _train("digits-cnn", base, folder["base"]),
    )
    with _timed(timed, "train"):
        first = pipeline.train("digits-cnn", base, out=folder["base"])

    _step(4, say("evaluate it on the test split", "在测试集上评估"), f"groundup evaluate {typed(folder['base'])}")
    with _timed(timed, "evaluate"):
        inspecting.print_evaluation(pipeline.evaluate(first))

    _step(
        5,
        say("fine-tune it to the digits 5 to 9, from one labelled sample of each", "微调到数字 5 到 9，每个数字只有一个有标签的样本"),
        f"groundup tune {typed(folder['base'])} --data digits --method full {_sets(FEW)} --out {typed(folder['tuned'])}",
    )
    with _timed(timed, "tune"):
        tuned = pipeline.tune(first, "digits", "full", FEW, out=folder["tuned"])
        inspecting.print_before_after(tuned.result)

    alone = FEW | {"data.augment": None, "model.dropout": 0.5}  # tuning has the base's dropout, and no augmentation
    _step(
        6,
        say("the same samples and steps from scratch, for comparison", "用同样的样本和步数从零训练，作为对比"),
        _train("digits-cnn", alone, folder["scratch"]),
    )
    with _timed(timed, "scratch"):
        scratch = pipeline.train("digits-cnn", alone, out=folder["scratch"])
    console.line(say("... and both again for {n} other choices of the samples (--set data.split.seed=1, ...)",
                     "……再换 {n} 组样本各做一遍（--set data.split.seed=1 等）", n=DRAWS - 1))  # fmt: skip
    pairs = [(tuned.metrics["accuracy"], scratch.metrics["accuracy"]), *(_draw(first, alone, seed) for seed in range(1, DRAWS))]
    means = [sum(side) / DRAWS for side in zip(*pairs)]
    console.heading(say("accuracy on the test pictures of the digits 5 to 9", "在数字 5 到 9 测试图片上的准确率"))
    console.table(
        ["", *(say("draw {n}", "第 {n} 组", n=i + 1) for i in range(DRAWS)), say("mean", "平均")],
        [[name, *(f"{pair[side]:.1%}" for pair in pairs), f"{means[side]:.1%}"]
         for side, name in enumerate((say("fine-tuned", "微调"), say("from scratch", "从零训练")))],
        right=tuple(range(1, DRAWS + 2)),
    )  # fmt: skip
    console.line(say("Both sides: the same network, samples, eight steps and settings, picked to show a gap. With settings of its own, scratch does as well on these samples.",
                     "两边的网络、样本、八步训练和设置完全相同，这组设置是为显示差距而选的。换用适合自己的设置，从零训练用同样的样本也能做得一样好。"))  # fmt: skip
    if means[0] <= means[1]:
        raise GateError(
            "fine-tuning ({a:.1%}) did not beat training from scratch ({b:.1%}) here",
            "这次微调（{a:.1%}）没有超过从零训练（{b:.1%}）",
            a=means[0],
            b=means[1],
        )

    picture, label = _one_picture(root, stamp)
    _step(
        7,
        say("predict one picture (a {label})", "预测一张图片（一个 {label}）", label=label),
        f"groundup predict {typed(folder['tuned'])} {typed(picture)}",
    )
    answer = pipeline.predict(tuned, picture)
    inspecting.print_predictions({"predictions": answer})

    language = {"data.split.validation": 0.01, "evaluate.every": 100000, "watch.log_every": 5}
    _step(
        8,
        say(
            "a language model from zero: one minute on the source of Python's standard library",
            "从零训练语言模型：用 Python 标准库源代码训练一分钟",
        ),
        f"{_train('gpt-stdlib', language, folder['language'])} --budget {BUDGET}",
    )
    with _timed(timed, "language"):
        writer = pipeline.train("gpt-stdlib", language, out=folder["language"], budget=BUDGET)
    rows = writer.folder.metric_rows("train")
    shown = [rows[i * (len(rows) - 1) // 5] for i in range(6)] if len(rows) > 5 else rows
    console.table(
        [say("step", "步"), *(f"{row['step']:,}" for row in shown)],
        [[say("loss", "损失"), *(f"{row['loss']:.2f}" for row in shown)]],
        right=tuple(range(1, len(shown) + 1)),
    )
    prompt = "def __init__(self"
    _step(9, say("let it write", "让它写一段"), f"groundup generate {typed(folder['language'])} {shlex.quote(prompt)} --max-tokens 60")
    sample = writer.generate(prompt, max_tokens=60)[0]
    console.line(prompt + sample)
    console.line(
        say(
            "It has read {n:,} tokens; large models read trillions. It has the look of Python, not its sense.",
            "它只读过 {n:,} 个词元，大模型要读上万亿个：写出来的东西形似 Python，却没有意义。",
            n=rows[-1]["tokens"],
        )
    )

    return {
        "environment": found,
        "base": first.result,
        "tuned": tuned.result,
        "scratch": scratch.result,
        "comparison": {"draws": pairs, "tuned": means[0], "scratch": means[1]},
        "prediction": {"true": label, **answer[0]},
        "language": writer.result,
        "sample": prompt + sample,
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


def _sets(overrides: dict[str, Any]) -> str:
    def value(v: Any) -> str:
        return v if isinstance(v, str) else json.dumps(v, separators=(",", ":"))  # JSON is YAML too

    return " ".join(f"--set {shlex.quote(f'{k}={value(v)}')}" for k, v in overrides.items())


def _train(recipe: str, overrides: dict[str, Any], out: Path) -> str:
    return f"groundup train {recipe} {_sets(overrides)} --out {typed(out)}"


def _draw(base: pipeline.Run, alone: dict[str, Any], seed: int) -> tuple[float, float]:
    """Accuracy of tuning and of scratch for another choice of the few samples."""
    with tempfile.TemporaryDirectory(prefix="groundup-demo-") as folder, console.muted():
        again = {"data.split.seed": seed, "train.seed": seed} | QUIET
        tuned = pipeline.tune(base, "digits", "full", FEW | again, out=Path(folder) / "tuned")
        scratch = pipeline.train("digits-cnn", alone | again, out=Path(folder) / "scratch")
    return tuned.metrics["accuracy"], scratch.metrics["accuracy"]


def _one_picture(root: Path, stamp: str) -> tuple[Path, str]:
    """The first test picture of the new digits, as a PNG file."""
    from PIL import Image

    from groundup.core.recipe import Data
    from groundup.data.prepare import labels_of, prepare

    prepared = prepare(Data(source="digits", classes=[str(c) for c in HIGH]), classification=True)
    at = prepared.splits["test"][:1]
    path = root / f"demo-picture-{stamp}.png"
    Image.fromarray(prepared.dataset.inputs.fetch(at)[0, 0].numpy()).save(path)
    return path, str(labels_of(prepared.dataset)[at[0]])
