"""A script of the user's is run in a process of its own, because the user named it, for a limited time; its findings come back as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groundup.checking.catalogue import CATALOGUE
from groundup.checking.findings import Finding, Report
from groundup.core import console
from groundup.core.errors import UserError
from groundup.core.messages import say

# Names that people forget to import, and how they are imported.
IMPORTS = {
    "torch": "import torch",
    "nn": "from torch import nn",
    "F": "import torch.nn.functional as F",
    "optim": "from torch import optim",
    "np": "import numpy as np",
    "DataLoader": "from torch.utils.data import DataLoader",
    "TensorDataset": "from torch.utils.data import TensorDataset",
}
LIMIT = 60.0  # seconds, unless --timeout says otherwise


def check_script(path: Path, names: dict[str, str] | None = None, limit: float = LIMIT) -> Report:
    """Findings of a script that builds `model`, `train_loader`, ... at its top level.

    Args:
        names: what the script calls them, as {'model': 'net'}.
        limit: seconds that the whole check may take.

    Raises:
        UserError: no such file, no model in it, the script itself fails, or it takes too long.
    """
    if not path.is_file():
        raise UserError("there is no file {path}", "没有文件 {path}", path=path, fix="groundup check path/to/script.py")
    command = [sys.executable, "-m", "groundup.checking.script", str(path.resolve()), json.dumps(names or {})]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    with console.progress() as told:
        told(say("check: running {name}", "检查：正在运行 {name}", name=path.name), 0.0)
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, encoding="utf-8", errors="replace"
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(child.stderr.read() if child.stderr else ""), daemon=True)
        reader.start()
        answer: dict[str, Any] | None = None
        at = "", ""
        try:
            for line in child.stdout or ():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if "probe" in row:
                        at = row["probe"][0], row["probe"][1]
                        told(say("check: {what}", "检查：{what}", what=say(*at)), row["share"])
                    else:
                        answer = row
            child.wait()
        finally:
            timer.cancel()
            if child.poll() is None:
                child.kill()
            child.wait()
            reader.join(5)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
    if answer is not None and "report" in answer:
        return _report(answer["report"])
    if late.is_set():
        raise UserError(
            "{path} was stopped after {s:g} s{where}", "{path} 运行 {s:g} 秒后被停止{where_zh}", path=path.name, s=limit,
            where=f", at the probe of {at[0]}" if at[0] else " while it was building its objects",
            where_zh=f"，当时在检查{at[1]}" if at[1] else "，当时还在构建对象",
            fix="keep training under `if __name__ == \"__main__\":`, use a smaller data set, or --timeout SECONDS",
            fix_zh="把训练放在 `if __name__ == \"__main__\":` 之下，用更小的数据集，或 --timeout 秒数",
        )  # fmt: skip
    if answer is not None:
        raise UserError(answer["error"][0], answer["error"][1], fix=answer["error"][2], fix_zh=answer["error"][3])
    text = (errors[0] if errors else "").strip().splitlines()
    raise UserError(
        "{path} cannot be checked: {why}", "无法检查 {path}：{why}", path=path.name, why=text[-1] if text else f"exit status {child.returncode}",
        fix="python {path} must run by itself",
        fix_zh="先让 python {path} 能独立运行",
    )  # fmt: skip


def _report(row: dict[str, Any]) -> Report:
    findings = [
        Finding(
            f["finding_id"], f["severity"], f["location"], (f["message"][0], f["message"][1]), (f["fix"][0], f["fix"][1]), f["evidence"]
        )
        for f in row["findings"]
    ]
    return Report(findings, [(a, b) for a, b in row["passed"]], [(a, b) for a, b in row["failed"]], row["seconds"])


def main() -> int:
    """The process of the script: its own output goes to stderr, ours to stdout."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(row: dict[str, Any]) -> None:
        ours.write(json.dumps(row, ensure_ascii=False) + "\n")
        ours.flush()

    from groundup.checking.examine import examine
    from groundup.checking.subject import from_script

    def answer(report: Report) -> int:
        tell(
            {
                "report": {
                    "findings": [asdict(f) for f in report.findings],
                    "passed": report.passed,
                    "failed": report.failed,
                    "seconds": report.seconds,
                }
            }
        )
        return 0

    path = Path(sys.argv[1])
    try:
        subject = from_script(path, json.loads(sys.argv[2]))
    except UserError as error:
        tell({"error": [error.en, error.zh, error.fix_en, error.fix_zh]})
        return 2
    except SystemExit as error:
        tell({"error": [f"the script ended by itself (sys.exit({error.code}))", f"脚本自行退出（sys.exit({error.code}))", "keep it under `if __name__ == \"__main__\":`",
                        "把它放在 `if __name__ == \"__main__\":` 之下"]})  # fmt: skip
        return 2
    except Exception as error:
        return answer(Report([_fails(path, error)]))
    return answer(examine(subject, lambda en, zh, share: tell({"probe": [en, zh], "share": share})))


def _fails(path: Path, error: Exception) -> Finding:
    """The script could not even build its objects: where, and for a name that was never imported its import."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == str(path) else line
    name = getattr(error, "name", None) if isinstance(error, NameError) else None
    write = IMPORTS.get(name or "", f"python {path.name}   # must run by itself up to its `__main__` part")
    entry = CATALOGUE["script.fails"]
    shown = {"error": f"{type(error).__name__}: {error}", "write": write}
    says, fix = ((entry[key][0].format_map(shown), entry[key][1].format_map(shown)) for key in ("says", "fix"))
    where = f"{path.name}:{line}" if line else path.name
    return Finding("script.fails", "error", where, (f"{says[0]} {entry['why'][0]}", says[1] + entry["why"][1]), fix, {"source": where})


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # whatever threads or workers the script has left
