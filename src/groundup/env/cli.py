"""`groundup env ...`: also `python -m groundup.env ...`, and `python start.py env ...` on a machine that has nothing but Python."""

from __future__ import annotations

import argparse
import json
from typing import Any, Dict, List, Optional, Sequence, Tuple

from groundup.env import choose, probe
from groundup.env.language import LANGUAGES, pick

DONE, FAILED = 0, 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command of the environment stage; returns the exit status (argparse ends with 2 on a wrong argument)."""
    options = _parser().parse_args(argv)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="groundup env", description="What this machine is and which torch fits it. 本机环境与合适的 torch。"
    )
    # The two options every command has: before or after the command's name.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="exactly one JSON object on stdout / 只输出一个 JSON 对象")
    common.add_argument("--lang", choices=LANGUAGES, help="language of the messages / 提示语言")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True
    info = commands.add_parser("info", parents=[common], help="report this machine / 报告本机环境")
    info.add_argument("--quick", action="store_true", help="do not ask torch itself (saves its import) / 不导入 torch")
    info.set_defaults(run=_info)
    return parser


def _info(options: argparse.Namespace) -> int:
    # Importing torch takes longest, so it runs while the rest is read.
    asking = None if options.quick or probe.facts(quick=True)["torch"] is None else probe.TorchProbe()
    facts = probe.facts()
    runtime = asking.answer() if asking else None
    choice = choose.choose_build(facts)
    if options.json:
        print(json.dumps(dict(facts, torch_runtime=runtime, choice=choose.as_dict(choice)), ensure_ascii=False))
    else:
        print(report(facts, runtime, choice, pick(options.lang)))
    return DONE


def report(facts: Dict[str, Any], runtime: Optional[Dict[str, Any]], choice: choose.Choice, language: str) -> str:
    """The report for a person."""
    rows = [*_machine_rows(facts), *_accelerator_rows(facts), _torch_row(facts, runtime), _choice_row(choice)]
    column = 0 if language == "en" else 1
    labels = [label[column] for label, _ in rows]
    # A Chinese character is two columns wide on a terminal.
    widths = [sum(2 if ord(letter) > 0x2E80 else 1 for letter in label) for label in labels]
    return "\n".join(label + " " * (max(widths) - width + 2) + value[column] for label, width, (_, value) in zip(labels, widths, rows))


Row = Tuple[Tuple[str, str], Tuple[str, str]]


def _machine_rows(facts: Dict[str, Any]) -> List[Row]:
    system, cpu, memory, python = facts["os"], facts["cpu"], facts["memory"], facts["python"]
    details = ", ".join(filter(None, [system["name"], system["release"], system["machine"], system["libc"]]))
    marks = ", ".join(filter(None, ["WSL 2" if system["wsl"] else "", system["container"] or "", "Jetson" if system["jetson"] else ""]))
    where = details + (f" [{marks}]" if marks else "")
    model = cpu["model"] or "?"
    environment = {"venv": ("in a venv", "位于 venv"), "conda": ("in conda", "位于 conda"), "system": ("no venv", "未用 venv")}[
        python["environment"]
    ]
    build = f"{python['version']}, {python['implementation']}, {python['bits']} bit"
    return [
        (("System", "系统"), (where, where)),
        (
            ("CPU", "处理器"),
            (
                f"{model}, {cpu['cores_usable']} cores usable of {cpu['cores']}",
                f"{model}，{cpu['cores']} 核，可用 {cpu['cores_usable']} 核",
            ),
        ),
        (
            ("Memory", "内存"),
            (
                f"{_gb(memory['total_gb'])}, {_gb(memory['available_gb'])} free",
                f"{_gb(memory['total_gb'])}，可用 {_gb(memory['available_gb'])}",
            ),
        ),
        (("Disk", "磁盘"), (f"{_gb(facts['disk']['free_gb'])} free here", f"当前位置剩余 {_gb(facts['disk']['free_gb'])}")),
        (("Python", "Python"), (f"{build}, {environment[0]}", f"{build}，{environment[1]}")),
    ]


def _accelerator_rows(facts: Dict[str, Any]) -> List[Row]:
    rows: List[Row] = []
    nvidia, amd, apple = facts["nvidia"], facts["amd"], facts["apple"]
    for gpu in nvidia["gpus"]:
        capability = gpu["compute_capability"] or "?"
        en = f"{gpu['name']}, {_gb(gpu['memory_gb'])}, compute capability {capability}, driver {nvidia['driver'] or '?'}"
        zh = f"{gpu['name']}，{_gb(gpu['memory_gb'])}，计算能力 {capability}，驱动 {nvidia['driver'] or '?'}"
        rows.append((("GPU", "GPU"), (en, zh)))
    for gfx in amd["gfx"]:
        rows.append((("GPU", "GPU"), (f"AMD {gfx}", f"AMD {gfx}")))
    if apple["chip"] and facts["os"]["machine"] == "aarch64":
        rows.append((("GPU", "GPU"), (apple["chip"], apple["chip"])))
    if nvidia["problem"]:
        rows.append((("NVIDIA", "NVIDIA"), (nvidia["problem"], nvidia["problem"])))
    if not rows:
        rows.append((("GPU", "GPU"), ("none found", "未找到")))
    for name, value in facts["variables"].items():
        rows.append(((name, name), (value, value)))
    return rows


def _torch_row(facts: Dict[str, Any], runtime: Optional[Dict[str, Any]]) -> Row:
    label = ("torch", "torch")
    if facts["torch"] is None:
        return label, ("not installed for this Python", "当前 Python 未安装")
    version = facts["torch"]["version"]
    if runtime is None:
        return label, (version, version)
    if runtime["error"]:
        return label, (f"{version}, but it cannot be imported: {runtime['error']}", f"{version}，但无法导入：{runtime['error']}")
    devices = ", ".join(runtime["devices"]) or ("Apple GPU (mps)" if runtime["mps_available"] else "CPU")
    seconds = runtime["import_seconds"]
    return label, (
        f"{version}, computes on {devices} (imported in {seconds} s)",
        f"{version}，计算设备：{devices}（导入用时 {seconds} 秒）",
    )


def _choice_row(choice: choose.Choice) -> Row:
    label = ("Fits", "适用")
    if choice.refused:
        return label, ("nothing: " + choice.refused["en"], "无：" + choice.refused["zh"])
    name = f"torch {choice.torch_version}, {choice.backend}"
    return label, (f"{name}: {choice.reason['en']}", f"{name}：{choice.reason['zh']}")


def _gb(value: Optional[float]) -> str:
    return "? GB" if value is None else f"{value:g} GB"
