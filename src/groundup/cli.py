"""The command line: one table of verbs. Importing this imports neither torch nor transformers; a verb imports what it needs when it runs.

A verb reads its options and returns a `Call`: what to run, and how to show the result. `main` runs it, so that all errors, exit statuses
and `--json` are in one place, and so that a reader passes `main -> pipeline.train -> loop.train -> loop.step` on the way to `backward()`.

Exit status: 0 done, 1 failed, 2 the user's mistake, 3 findings or a failed gate, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

import groundup
from groundup.core import messages
from groundup.core.usage import help_in_chinese, in_chinese

_zh = (
    messages.language() == "zh"
    if "--lang" not in sys.argv
    else "zh" in sys.argv[sys.argv.index("--lang") + 1 : sys.argv.index("--lang") + 2]
)


def _help(en: str, zh: str) -> str:
    """Help texts are fixed when the table is built, before options are read: their language is looked up early."""
    return zh if _zh else en


@dataclass
class Call:
    """What a verb does: `run()` gives the JSON-able result, `show(result)` prints it for a person, `status` makes the exit status of it."""

    run: Callable[[], Any]
    show: Callable[[Any], None]
    as_json: bool
    to_json: Callable[[Any], Any] = lambda result: result
    status: Callable[[Any], int] = lambda result: 0


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help=_help(
            "Exactly one JSON object on standard output; all else goes to standard error.", "标准输出只给一个 JSON 对象，其余写到标准错误。"
        ),
    ),
]
Lang = Annotated[str | None, typer.Option("--lang", metavar="en|zh", help=_help("Language of messages.", "消息的语言。"))]
Trace = Annotated[bool, typer.Option("--traceback", help=_help("Show the whole traceback of an error.", "出错时显示完整的调用栈。"))]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=_help("Change a key of the recipe, as optim.lr=3e-4. May be repeated.", "修改 recipe 的键，例如 optim.lr=3e-4，可重复。"),
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help=_help("The run folder (default: runs/<name>-<time>-<id>).", "运行目录（默认：runs/<名称>-<时间>-<编号>）。"),
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help=_help("Continue the run in --out; with nothing there, start it.", "继续 --out 中的训练；若还没有则新开始。")
    ),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help=_help("With --resume: allow another train.epochs or train.steps.", "与 --resume 同用：允许修改 train.epochs 或 train.steps。"),
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help=_help("Show the resolved recipe and one rehearsed step; keep nothing.", "只显示解析后的 recipe 并预演一步，不保留任何东西。"),
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check/--no-check", help=_help("Self-tests of a language model before a long run.", "长时间训练语言模型之前先自检。")),
]
Trust = Annotated[
    bool, typer.Option("--trust-code", help=_help("Run the code that comes with a model folder.", "允许运行模型目录自带的代码。"))
]

class _InOwnLanguage:
    """A command whose help has its frame, too, in the language of the texts."""

    def get_help(self, ctx: Any) -> str:
        text: str = super().get_help(ctx)  # type: ignore[misc]
        return help_in_chinese(text) if _zh else text


class _Command(_InOwnLanguage, typer.core.TyperCommand):
    pass


class _Group(_InOwnLanguage, typer.core.TyperGroup):
    pass


class _Table(typer.Typer):
    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        return super().command(*names, cls=_Command, **settings)


app = _Table(
    name="groundup",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=_help(
        "From an empty machine to a fine-tuned model in service, on PyTorch 2.\n\nenv -> data -> models -> train -> evaluate -> tune -> export -> serve",
        "在 PyTorch 2 上，从一台空机器到一个微调好的模型。\n\nenv -> data -> models -> train -> evaluate -> tune -> export -> serve",
    ),
    epilog=_help("Start here: groundup demo", "从这里开始：groundup demo"),
)
data_app = _Table(cls=_Group, help=_help("Look at data and check it, before training.", "训练之前查看与检查数据。"), no_args_is_help=True)
runs_app = _Table(
    cls=_Group, help=_help("The runs of this folder: list, show, compare, verify.", "本目录下的训练：列出、查看、比较、校验。"), no_args_is_help=True
)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help=_help("Show the version and leave.", "显示版本并退出。"))] = False,
) -> None:
    if version:
        print(f"groundup {groundup.__version__}")  # noqa: T201
        raise typer.Exit


def _sets(assignments: list[str] | None) -> dict[str, Any]:
    from groundup.core.recipe import parse_set

    return dict(parse_set(a) for a in assignments or [])


# -- env -----------------------------------------------------------------------------------------------------------------------
@app.command(
    "env",
    help=_help("This machine: what is here, what is wrong, which torch fits.", "本机环境：有什么、哪里不对、装哪个 torch。"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def env(context: typer.Context) -> Call:
    from groundup.env import cli as env_cli

    return Call(lambda: env_cli.main(context.args), lambda status: None, False, status=int)  # a program of its own, which prints by itself


# -- data ----------------------------------------------------------------------------------------------------------------------
ForModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=_help("Examples for tuning this language model: as it will see them.", "用于微调该语言模型的样本：按模型看到的样子显示。"),
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help=_help(
            "A built-in name, a file, a folder, hub:owner/name, file.py:Name; any with #500.",
            "内置名称、文件、文件夹、hub:owner/name 或 file.py:名字；都可加 #500。",
        ),
    ),
]


@data_app.command(
    "show", help=_help("Sizes, classes, ranges, splits; a grid of samples as PNG.", "规模、类别、取值范围、划分；样本网格图（PNG）。")
)
def data_show(
    spec: Source,
    sets: Sets = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", metavar="FILE.png", help=_help("Write a grid of training pictures.", "写出训练图片的网格图。"))
    ] = None,
    model: ForModel = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE.html", help=_help("With --model: the examples as a page.", "配合 --model：把样本写成网页。")),
    ] = None,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.data_show(spec, _sets(sets), grid, model, page), inspecting.print_data, json)


@data_app.command(
    "check",
    help=_help("What deserves a look before training; exit 3 when something is wrong.", "训练前值得注意的问题；有错误时退出码为 3。"),
)
def data_check(
    spec: Source,
    sets: Sets = None,
    model: ForModel = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            metavar="OUT.jsonl",
            help=_help(
                "Write the records without remarks there, and what was removed and why beside it.",
                "把没有问题的记录写到这里，并在旁边列出移除了什么、为什么。",
            ),
        ),
    ] = None,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting

    return Call(
        lambda: inspecting.data_check(spec, _sets(sets), model, fix),
        inspecting.print_check,
        json,
        status=lambda r: 3 if any(p["severity"] == "error" for p in r["problems"]) else 0,
    )


# -- lists and cards -----------------------------------------------------------------------------------------------------------
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help=_help("One of them: show its card.", "指定名称则显示它的卡片。"))]


@app.command(help=_help("The models: list, or one card.", "模型：列表，或单个卡片。"))
def models(name: Name = None, json: Json = False, lang: Lang = None, traceback: Trace = False) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.cards("models", name), inspecting.print_cards, json)


@app.command(help=_help("The tasks: list, or one card.", "任务：列表，或单个卡片。"))
def tasks(name: Name = None, json: Json = False, lang: Lang = None, traceback: Trace = False) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.cards("tasks", name), inspecting.print_cards, json)


@app.command(help=_help("The shipped recipes: list, or one with all its keys.", "自带的 recipe：列表，或显示其中一个的全部键。"))
def recipes(
    name: Name = None,
    schema: Annotated[
        bool, typer.Option("--schema", help=_help("The JSON schema of recipes, for editors.", "recipe 的 JSON schema，供编辑器使用。"))
    ] = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.recipes(name, schema), inspecting.print_recipes, json or schema)


# -- train, tune, evaluate, predict --------------------------------------------------------------------------------------------
def _training(call: Callable[[], Any], plan: Callable[[], Any], dry_run: bool, as_json: bool) -> Call:
    from groundup import inspecting

    if dry_run:
        return Call(plan, inspecting.print_plan, as_json)
    return Call(call, inspecting.print_run, as_json, to_json=lambda run: run.result)


@app.command(help=_help("Train a recipe.", "按 recipe 训练。"))
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help=_help(
                "A shipped name (groundup recipes) or a YAML file. Left out with --resume: the run's own.",
                "自带名称（groundup recipes）或 YAML 文件；与 --resume 同用时可省略，取原来的。",
            ),
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    extend: Extend = False,
    check: Check = True,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="10min",
            help=_help(
                "Choose a language model's size, tokens and batch for this much time here.", "按给定时间为语言模型选择大小、词元数与批次。"
            ),
        ),
    ] = None,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from functools import partial

    from groundup import pipeline

    overrides = _sets(sets)
    return _training(
        partial(
            pipeline.train, recipe, overrides, out=out, resume=resume, extend=extend, trust_code=trust_code, budget=budget, check=check
        ),
        partial(pipeline.plan_only, recipe, overrides, budget),
        dry_run,
        json,
    )


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=_help(
            "A run folder, a run's name, a model folder, hub:owner/name, timm:name, or a folder of transformers.",
            "运行目录、运行名称、模型目录、hub:owner/name、timm:名称，或 transformers 的模型文件夹。",
        ),
    ),
]
Views = Annotated[
    str | None,
    typer.Option(
        "--views",
        metavar="flip,shift=1",
        help=_help(
            "Test-time augmentation: average over mirrored and moved views ('none' for a single one).",
            "测试时增强：对镜像与平移的视图取平均（none 表示单一视图）。",
        ),
    ),
]


@app.command(help=_help("Fine-tune a model on new data; shows before and after.", "用新数据微调模型；给出前后对比。"))
def tune(
    model: Model,
    data: Annotated[str, typer.Option("--data", metavar="SPEC", help=_help("The new data.", "新数据。"))],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="full|lora|qlora|rslora|dora|pissa|freeze|head|head-first|gradual|peft",
            help=_help(
                "What is trained: everything, low-rank adapters (qlora: on a base in few bits), the last layer groups, the head, the head first and then all, one group after the other, or any "
                "method of PEFT.",
                "训练哪些部分：全部、低秩适配器（qlora：基座用低比特存储）、后面的层组、仅输出层、先输出层后全部、逐组解冻，或 PEFT 的任意方法。",
            ),
        ),
    ] = "full",
    keep_classes: Annotated[
        bool,
        typer.Option(
            "--keep-classes",
            help=_help("Add the new data's classes to the old ones instead of replacing them.", "保留旧类别，并加入新数据的类别。"),
        ),
    ] = False,
    rehearse: Annotated[
        int,
        typer.Option(
            "--rehearse",
            metavar="N",
            min=0,
            help=_help("Mix in N records of the model's own data, against forgetting.", "混入模型原数据的 N 条记录，以减少遗忘。"),
        ),
    ] = 0,
    general: Annotated[
        str | None,
        typer.Option(
            "--general",
            metavar="FILE",
            help=_help(
                "General questions on which forgetting is measured, for language models (default: ours; 'none' for none).",
                "用来衡量遗忘的通用问题，适用于语言模型（默认用自带的；none 表示不测）。",
            ),
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    extend: Extend = False,
    check: Check = True,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from functools import partial

    from groundup import pipeline

    changes = ({"evaluate.general": general} if general else {}) | _sets(sets)
    recipe = partial(
        pipeline.tuning_recipe, model, data, method, changes, keep_classes=keep_classes, rehearse=rehearse, trust_code=trust_code
    )
    return _training(
        lambda: pipeline.train(recipe(), out=out, resume=resume, extend=extend, trust_code=trust_code, check=check),
        lambda: pipeline.plan_only(recipe()),
        dry_run,
        json,
    )


@app.command(
    help=_help(
        "Find classic mistakes in a training before it runs: a script of your own, a recipe, or a tuning; exit 3 when one is an error.",
        "训练之前查找常见错误：自己的脚本、recipe 或一次微调；发现错误时退出码为 3。",
    )
)
def check(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="SCRIPT.py|RECIPE|MODEL",
            help=_help(
                "A script that builds model, loss_fn, optimizer and train_loader at its top level (it is run, in a process of its own); a recipe; with --data the model to tune.",
                "在顶层构建 model、loss_fn、optimizer 与 train_loader 的脚本（会在单独的进程中运行）；recipe；与 --data 同用时为要微调的模型。",
            ),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="[SCRIPT.py:]NAME", help=_help("What the script calls its model.", "脚本中模型的名字。")),
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="loss_fn=criterion",
            help=_help(
                "What the script calls something else: loss_fn, optimizer, train_loader, val_loader, compute_loss, train_step, fit, evaluate, scheduler, tokenizer, ... May be repeated.",
                "脚本中其他对象的名字：loss_fn、optimizer、train_loader、val_loader、compute_loss、train_step、fit、evaluate、scheduler、tokenizer 等，可重复。",
            ),
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help=_help("For a script, in all.", "脚本检查的总时限（秒）。"))
    ] = 60.0,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SPEC", help=_help("What the model is to be tuned on.", "用来微调模型的数据。"))
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="full|lora|...", help=_help("As of tune.", "与 tune 相同。"))] = "full",
    sets: Sets = None,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting

    def run() -> Any:
        names = dict(_name(n) for n in named or [])
        wanted = target
        if model is not None:
            script, colon, name = model.rpartition(":")
            names["model"] = name if colon else model
            wanted = wanted or script or None
        if wanted is None:
            raise _nothing_to_check()
        if wanted.endswith(".py"):
            from groundup.checking.script import check_script

            return check_script(Path(wanted).expanduser(), names, timeout)
        from groundup import pipeline

        overrides = _sets(sets)
        if data is None:
            return pipeline.check(wanted, overrides=overrides)
        return pipeline.check(pipeline.tuning_recipe(wanted, data, method, overrides))

    return Call(
        run, inspecting.print_findings, json, to_json=lambda report: report.as_json(), status=lambda report: 3 if report.errors else 0
    )


@app.command(
    help=_help(
        "Whether a training fits into a device's memory, how long it takes, and what to change; trains nothing. Exit 3 when it does not fit.",
        "预测一次训练能否放进设备内存、需要多久、该改什么；不会开始训练。放不下时退出码为 3。",
    )
)
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help=_help(
                "A recipe; a model to tune, with --data; or one without its weights: a size (8B), a config.json or its folder, hub:owner/name.",
                "recipe；与 --data 同用时为要微调的模型；或不含权重的模型：规模名（8B）、config.json 或其目录、hub:owner/name。",
            ),
        ),
    ],
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="h100|a100|rtx4090|t4|cpu|...",
            help=_help("What it is to run on (default: this machine).", "在什么设备上运行（默认：本机）。"),
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SPEC", help=_help("What the model is to be tuned on.", "用来微调模型的数据。"))
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="full|lora|...", help=_help("As of tune.", "与 tune 相同。"))] = "full",
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help=_help("GPUs of each node.", "每个节点的 GPU 数。"))] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="M", help=_help("Nodes.", "节点数。"))] = 1,
    sharding: Annotated[
        str,
        typer.Option(
            "--sharding",
            metavar="fsdp|ddp|tensor",
            help=_help(
                "With several GPUs: weights, gradients and optimizer states divided (FSDP2), whole on each (DDP), or every layer shared by the GPUs of a "
                "node (tensor parallelism; FSDP2 between nodes).",
                "多 GPU 时：权重、梯度与优化器状态分片（FSDP2）、每卡完整保存（DDP），或每一层由节点内的 GPU 共同承担（张量并行；节点之间用 FSDP2）。",
            ),
        ),
    ] = "fsdp",
    price: Annotated[
        float | None, typer.Option("--price", metavar="X", help=_help("Of one device for an hour.", "每个设备每小时的价格。"))
    ] = None,
    sets: Sets = None,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting, pipeline

    overrides = _sets(sets)
    options: dict[str, Any] = {
        "device": device,
        "gpus": gpus,
        "nodes": nodes,
        "sharding": sharding,
        "price": price,
        "trust_code": trust_code,
    }

    def run() -> Any:
        if data is None:
            return pipeline.plan(recipe, overrides, method=method, **options)
        return pipeline.plan(pipeline.tuning_recipe(recipe, data, method, overrides, trust_code=trust_code), **options)

    return Call(run, inspecting.print_forecast, json, status=lambda r: 0 if r["fits"] else 3)


def _nothing_to_check() -> Exception:
    from groundup.core.errors import UserError

    return UserError(
        "name what is to be checked", "请指出要检查的对象", fix="groundup check train.py   (or a recipe: groundup check digits-cnn)", fix_zh="groundup check train.py   （或 recipe：groundup check digits-cnn）"
    )


def _name(assignment: str) -> tuple[str, str]:
    from groundup.core.errors import UserError

    key, equals, value = assignment.partition("=")
    if not equals:
        raise UserError(
            "--name {given}: a name and what the script calls it",
            "--name {given}：应为 名称=脚本中的名字",
            given=assignment,
            fix="--name loss_fn=criterion",
        )
    return key, value


@app.command(
    help=_help(
        "The long explanation of a finding of check, or of a cause that the doctor names.", "check 的发现或 doctor 所指原因的详细说明。"
    )
)
def explain(
    finding: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help=_help(
                "As loss.softmax_before_ce, or a cause of `groundup env doctor`.",
                "例如 loss.softmax_before_ce，或 `groundup env doctor` 的原因。",
            ),
        ),
    ],
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting
    from groundup.checking.explain import explain as explained

    return Call(lambda: explained(finding), inspecting.print_explanation, json)


@app.command(help=_help("Measure a model on its own test split, or on other data.", "在模型自己的测试集或其他数据上评估。"))
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SPEC", help=_help("Other data than the model's own.", "用其他数据，而不是模型自己的数据。")),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="test|validation|train|all",
            help=_help("Which part (default: test where there is one).", "哪一部分（默认：有测试集则用测试集）。"),
        ),
    ] = None,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help=_help("Write report.html, plots and metrics.json there.", "把 report.html、图和 metrics.json 写到这里。"),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help=_help("Compare with another model on the same records (paired test).", "在相同记录上与另一个模型比较（配对检验）。"),
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="arc_easy,...",
            help=_help(
                "Tasks of lm-evaluation-harness, or a task's YAML file, for language models.",
                "lm-evaluation-harness 的任务名或任务 YAML 文件，用于语言模型。",
            ),
        ),
    ] = None,
    views: Views = None,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting, pipeline

    if harness is not None:
        return Call(lambda: pipeline.evaluate_harness(model, harness.split(","), trust_code=trust_code), inspecting.print_harness, json)
    return Call(
        lambda: pipeline.evaluate(
            model, data, split=split, overrides=_sets(sets), out=out, against=against, views=views, trust_code=trust_code
        ),
        inspecting.print_evaluation,
        json,
    )


@app.command(
    help=_help(
        "Answer raw inputs: pictures, folders of them, rows of numbers, CSV files.", "回答原始输入：图片、图片文件夹、数字行、CSV 文件。"
    )
)
def predict(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help=_help(
                "photo.png, a folder, 5.1,3.5,1.4,0.2 or rows.csv (after -- where a number is negative).",
                "photo.png、文件夹、5.1,3.5,1.4,0.2 或 rows.csv（负数开头时写在 -- 之后）。",
            ),
        ),
    ],
    views: Views = None,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting, pipeline

    return Call(
        lambda: {"predictions": pipeline.predict(model, *inputs, views=views, trust_code=trust_code)},
        inspecting.print_predictions,
        json,
        status=lambda result: 2 if any("error" in answer for answer in result["predictions"]) else 0,
    )


@app.command(
    help=_help(
        "Write a model for other programs, its preprocessing inside; exit 3 when the file's outputs differ.",
        "导出模型供其他程序使用（含预处理）；输出不一致时退出码为 3。",
    )
)
def export(
    model: Model,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="onnx|torch-export|merged",
            help=_help(
                "The format: ONNX, a .pt2 file, or a model folder with the adapter merged in.",
                "格式：ONNX、.pt2 文件，或合并了适配器的模型目录。",
            ),
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help=_help("The same as --to merged.", "等同于 --to merged。"))] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help=_help(
                "The file or folder (default: exports/<name>.onnx, .pt2 or -merged).",
                "输出文件或目录（默认：exports/<名称>.onnx、.pt2 或 -merged）。",
            ),
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=_help("Replace a file that is there.", "覆盖已有的文件。"))] = False,
    trust_code: Trust = False,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import inspecting, pipeline
    from groundup.core.errors import UserError

    if to is None and not merge:
        raise UserError("export needs --to or --merge", "export 需要 --to 或 --merge", fix="groundup export MODEL --to onnx")
    if to is not None and merge and to != "merged":
        raise UserError("--merge and --to {to} exclude each other", "--merge 与 --to {to} 不能同时使用", to=to)
    form = to or "merged"
    return Call(lambda: pipeline.export(model, form, out, force=force, trust_code=trust_code), inspecting.print_export, json)


@app.command(
    help=_help(
        "Serve a model over HTTP: a page at /, POST /predict, /docs. On this machine only, unless told otherwise.",
        "通过 HTTP 提供模型：/ 为网页，POST /predict，/docs 为接口说明。默认仅限本机访问。",
    )
)
def serve(
    model: Model,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help=_help("The port (0: any free one).", "端口（0：任意空闲端口）。"))
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help=_help(
                "The address; others than loopback need --api-key or --insecure.", "监听地址；非本机地址需要 --api-key 或 --insecure。"
            ),
        ),
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help=_help(
                "Asked for with every request (better: GROUNDUP_API_KEY).", "每个请求都须携带的密钥（更好：环境变量 GROUNDUP_API_KEY）。"
            ),
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help=_help("Let other machines in without a key.", "允许其他机器不带密钥访问。"))
    ] = False,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help=_help("Inputs of one forward pass.", "一次前向计算的最大输入数。"))
    ] = 32,
    views: Views = None,
    trust_code: Trust = False,
    json: Annotated[
        bool, typer.Option("--json", help=_help("JSON lines on standard output: ready, stopped.", "标准输出为 JSON 行：ready、stopped。"))
    ] = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import pipeline

    def run() -> None:
        from groundup.core import console

        console.configure(to_stderr=json)
        pipeline.serve(
            model,
            host=host,
            port=port,
            api_key=api_key,
            insecure=insecure,
            max_batch=max_batch,
            views=views,
            trust_code=trust_code,
            as_json=json,
        )

    return Call(run, lambda nothing: None, False)  # it prints its JSON lines itself


# -- generate, chat ------------------------------------------------------------------------------------------------------------
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help=_help("New tokens at most.", "最多生成的词元数。"))]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", min=0.0, help=_help("Higher is more varied; 0 always takes the likeliest.", "越高越多样；0 表示总取最可能的词元。")
    ),
]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help=_help("Only the k likeliest tokens.", "只取最可能的 k 个词元。"))]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help=_help("Only the likeliest that hold p of the probability.", "只取累计概率达到 p 的词元。")
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help=_help("Only those p times as likely as the likeliest.", "只取概率不低于最大概率 p 倍的词元。")
    ),
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, help=_help("Above 1: against repeating what is there.", "大于 1：减少重复。"))
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help=_help("End before this text. May be repeated.", "遇到该文本即结束，可重复。")),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help=_help("The same seed gives the same text.", "相同的种子得到相同的文本。"))]
Weights = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="float32|bfloat16|int8",
        help=_help("Of the weights: fewer bits are read faster and are less exact.", "权重精度：位数越少读取越快，也越不精确。"),
    ),
]
LineJson = Annotated[bool, typer.Option("--json", help=_help("JSON lines on standard output.", "标准输出为 JSON 行。"))]


@app.command(help=_help("A language model continues a text.", "语言模型续写文本。"))
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help=_help("What to go on from (none or -: standard input; nothing there: the begin of a text).", "续写的开头（不给或 -：读取标准输入；没有内容则从文本开头写起）。")
        ),
    ] = None,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: SeedOption = 0,
    precision: Weights = "float32",
    trust_code: Trust = False,
    json: LineJson = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    def run() -> None:
        from groundup import talking
        from groundup.core import console

        console.configure(to_stderr=True)
        how = talking.Sampling(
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop or (),
            precision=precision,  # type: ignore[arg-type]
        )
        given = prompts or ["-"]
        if "-" in given:  # standard input, where something stands in it
            piped = "" if sys.stdin is None or sys.stdin.isatty() else talking.piped(sys.stdin.read).removesuffix("\n")
            given = [piped if p == "-" else p for p in given]
        talking.generate(model, given, how, as_json=json, trust_code=trust_code)

    return Call(run, lambda nothing: None, False)  # the text is shown as it comes


@app.command(help=_help("Talk with a language model that has learned to answer.", "与学会回答的语言模型对话。"))
def chat(
    model: Model,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help=_help("What the model is told before the first turn.", "第一轮之前的系统提示。")),
    ] = None,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: SeedOption = 0,
    precision: Weights = "float32",
    trust_code: Trust = False,
    json: LineJson = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    def run() -> None:
        from groundup import talking
        from groundup.core import console

        console.configure(to_stderr=json)
        how = talking.Sampling(
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop or (),
            precision=precision,  # type: ignore[arg-type]
        )
        talking.chat(model, how, system=system, as_json=json, trust_code=trust_code)

    return Call(run, lambda nothing: None, False)


# -- runs ----------------------------------------------------------------------------------------------------------------------
Root = Annotated[Path, typer.Option("--root", metavar="FOLDER", help=_help("Where the runs are.", "运行目录所在的文件夹。"))]
RunName = Annotated[str, typer.Argument(metavar="RUN", help=_help("A run folder, or the start of its name.", "运行目录，或其名称的开头。"))]


@runs_app.command("list", help=_help("All runs of a folder, oldest first.", "列出所有训练，旧的在前。"))
def runs_list(root: Root = Path("runs"), json: Json = False, lang: Lang = None, traceback: Trace = False) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.runs_list(root), inspecting.print_runs, json)


@runs_app.command("show", help=_help("One run: result, decisions, checkpoints, events.", "单个训练：结果、自动选择、检查点、事件。"))
def runs_show(run: RunName, json: Json = False, lang: Lang = None, traceback: Trace = False) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.runs_show(run), inspecting.print_run_details, json)


@runs_app.command(
    "compare", help=_help("Two or more runs: what differs in recipe, data and result.", "比较多个训练：recipe、数据与结果的差异。")
)
def runs_compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...")], json: Json = False, lang: Lang = None, traceback: Trace = False
) -> Call:
    from groundup import inspecting

    return Call(lambda: inspecting.runs_compare(runs), inspecting.print_comparison, json)


@runs_app.command(
    "verify",
    help=_help(
        "Check every checkpoint and the model, byte by byte; exit 3 when one is damaged.", "逐字节校验检查点与模型；有损坏时退出码为 3。"
    ),
)
def runs_verify(run: RunName, json: Json = False, lang: Lang = None, traceback: Trace = False) -> Call:
    from groundup import inspecting, pipeline

    return Call(lambda: pipeline.verify_run(run), inspecting.print_verification, json, status=lambda r: 0 if r["ok"] else 3)


# -- demo ----------------------------------------------------------------------------------------------------------------------
@app.command(
    help=_help(
        "The whole path on real handwriting, and a language model from zero, in less than 2 minutes, with the command of each step.",
        "用真实手写数字走完整条路径，再从零训练一个语言模型，不到 2 分钟，并给出每一步的命令。",
    )
)
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help=_help("Where the demo's runs go (default: runs).", "示例训练放在哪里（默认：runs）。")
        ),
    ] = None,
    json: Json = False,
    lang: Lang = None,
    traceback: Trace = False,
) -> Call:
    from groundup import demo as demonstration

    return Call(lambda: demonstration.run(out), demonstration.show, json)


# -- main ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    try:
        _choose_language(given)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        # Without standalone mode a verb's Call comes back, and 0 or the status where click itself has answered (help, version).
        call = app(args=_verb_first(given), standalone_mode=False)
        if not isinstance(call, Call):
            return int(call or 0)
        _configure(call.as_json)
        result = call.run()
        if result is None or getattr(result, "follower", False):  # another process of torchrun's tells the result
            return 0
        if call.as_json:
            _print_json(call.to_json(result))
        else:
            call.show(result)
        return call.status(result)
    except BaseException as error:
        return _failed(error, given)


def _verb_first(arguments: list[str]) -> list[str]:
    """Options that every verb has may stand before it."""
    early = 0
    while early < len(arguments) and arguments[early].partition("=")[0] in ("--lang", "--json", "--traceback"):
        early += 2 if arguments[early] == "--lang" else 1
    verb = arguments[early:] or ["--help"]
    words = 2 if verb[0] in ("data", "runs", "env") else 1
    if any(word.startswith("-") for word in verb[:words]) or len(verb) < words:  # only a help, which has no options but itself
        return [w for i, w in enumerate(verb) if not w.startswith("--lang") and (i == 0 or verb[i - 1] != "--lang")]
    return verb[:words] + arguments[:early] + verb[words:]  # at the end, an option without its value would take them for it


def _choose_language(arguments: list[str]) -> None:
    from groundup.core.errors import UserError

    messages.set_language(None)
    wanted = None
    for i, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == "--lang":
            wanted = arguments[i + 1] if i + 1 < len(arguments) else ""
        elif argument.startswith("--lang="):
            wanted = argument.removeprefix("--lang=")
    if wanted is not None and wanted not in messages.LANGUAGES:
        raise UserError("--lang {wanted}: known languages are en and zh", "--lang {wanted}：可用的语言是 en 和 zh", wanted=wanted or "''")
    messages.set_language(wanted)


def _configure(as_json: bool) -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that is not UTF-8 shows '?' instead of ending the program
            reconfigure(errors="replace")
    from groundup.core import console

    console.configure(to_stderr=as_json)
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # what extras warn of when they are merely imported
        logging.getLogger(name).setLevel(logging.ERROR)


def _terminate(number: int, frame: Any) -> NoReturn:
    from groundup.core.errors import Stopped

    raise Stopped("stopped by SIGTERM", "被 SIGTERM 停止", exit_status=143)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: null instead."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _failed(error: BaseException, given: list[str]) -> int:
    """Tells a person, or a program, what went wrong; gives the exit status."""
    from groundup.core.errors import GroundupError, Stopped, UserError, of_system

    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        told: GroundupError = Stopped("stopped by Ctrl-C", "被 Ctrl-C 停止", exit_status=130)
    elif isinstance(error, GroundupError):
        told = error
    elif isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    elif type(error).__name__ == "NoArgsIsHelpError":  # `groundup data` alone
        sys.stderr.write(f"{error}\n")
        return 2
    elif hasattr(error, "format_message"):  # click's usage errors, wherever typer keeps its click
        message = error.format_message()
        told = UserError(message, in_chinese(message), fix="groundup --help")
        context = getattr(error, "ctx", None)
        if context is not None:
            told.fix_en = told.fix_zh = f"{context.command_path} --help"
            if context.info_name == "predict" and re.match(r"No such option: -[\d.]", message):
                told.fix_en, told.fix_zh = "-- before a negative number: groundup predict MODEL -- -0.5,4.2", "负数开头时前面写 --：groundup predict MODEL -- -0.5,4.2"
            if context.info_name == "tune" and "--resume" in given:
                told.fix_en = told.fix_zh = "groundup train --resume --out RUN"
    elif isinstance(error, BrokenPipeError):  # `| head` has read enough; what Python would flush on leaving has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    elif isinstance(error, OSError):
        told = of_system(error)
    else:
        told = GroundupError(
            "{kind}: {message}",
            "{kind}：{message}",
            kind=type(error).__name__,
            message=str(error) or "(no message)",
            fix="run it again with --traceback, and report it",
            fix_zh="加 --traceback 再运行一次，并报告此问题",
        )
    if "--traceback" in given:
        traceback.print_exception(error, file=sys.stderr)
    if "--json" in given:
        _print_json(told.as_json())
    sys.stderr.write(told.localized() + "\n")
    return told.exit_status


if __name__ == "__main__":
    raise SystemExit(main())
