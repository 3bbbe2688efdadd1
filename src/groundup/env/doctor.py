"""What is wrong with an environment, and how to mend it: a machine in, ranked findings out.

A rule (`rules/`) is a function from a `Machine` to what it found: the lines or values it rests on, how sure it is, and the values for the
texts in `causes.json`. Two kinds: signs read what a program said and know what that means; conclusions (`rules/facts.py`) follow from the
facts by `knowledge.json` alone and stand back where a sign explains the trouble.

This machine is examined by the same rules: its own report is the text, with what imports and a first computation said in a child process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from groundup.env import machine, rules  # noqa: F401  (importing the rules registers them)
from groundup.env.findings import CONCLUSIONS, SIGNS, Finding, Hit, Rule, causes, render
from groundup.env.language import pick
from groundup.env.machine import Machine

HEALTHY, UNUSABLE, BLOCKED = 0, 2, 3
MAX_BYTES = 64_000_000  # more is not read from a pipe or a file
PROBE_SECONDS = 9.0
TRIED = ("torchvision", "torchaudio", "xformers", "pandas", "sklearn")  # what breaks beside torch, and what NumPy breaks
MOST = 6  # findings: a longer list is not a diagnosis

# Runs in the Python to be judged, as a user's program would: with its PYTHONPATH and in its folder. Each import is tried after the other,
# and each error is printed whole; torch's own warnings go to stderr too.
_TRY = r"""
import importlib.util, sys, traceback
def attempt(what, act):
    try:
        return act()
    except BaseException:
        print("While trying:", what, file=sys.stderr)
        traceback.print_exc()
def compute():
    import torch
    file = str(getattr(torch, "__file__", None))
    if "site-packages" not in file and "dist-packages" not in file:
        print("imported as torch: " + file)
    print("torch.__version__: " + str(getattr(torch, "__version__", "none")) + " torch.version.cuda: " + str(torch.version.cuda))
    assert float((torch.ones(4, 4) @ torch.ones(4, 4)).sum()) == 64
    available = torch.cuda.is_available()
    print("Is CUDA available: " + str(available))
    if available:
        print("arch list: " + " ".join(torch.cuda.get_arch_list()))
        for i in range(torch.cuda.device_count()):
            torch.ones(8, device="cuda:%d" % i).sum().item()
    return torch
torch = attempt("import torch and compute", compute)
if torch is not None:
    attempt("torch and numpy", lambda: torch.zeros(2).numpy())
    for name in sys.argv[1:]:
        if importlib.util.find_spec(name) is not None:
            attempt("import " + name, lambda: importlib.import_module(name))
"""


def diagnose(m: Machine, language: str = "en", guarded: bool = False) -> List[Finding]:
    """The findings, the likeliest cause first; an empty list for a machine without fault.

    Args:
        guarded: a rule that fails on some odd text is passed over, so that the others still answer.
    """

    def ask(asked: List[Rule]) -> List[Hit]:
        hits: List[Hit] = []
        for rule in asked:
            try:
                hits += rule(m)
            except Exception:
                if not guarded:
                    raise
        return hits

    hits = ask(SIGNS)
    if not any(hit.confidence >= 0.5 for hit in hits):
        hits += ask(CONCLUSIONS)
    best: Dict[str, Hit] = {}
    for hit in hits:
        if hit.cause_id not in best or hit.confidence > best[hit.cause_id].confidence:
            best[hit.cause_id] = hit
    ranked = sorted(best.values(), key=lambda hit: ((hit.severity or causes()[hit.cause_id]["severity"]) != "blocking", -hit.confidence))
    findings = [render(hit, m, language) for hit in ranked if hit.confidence >= 0.2][:MOST]
    for finding in findings[1:]:
        if finding.severity == "blocking" and finding.confidence < 0.7:
            finding.severity = "warning"  # a guess beside a better explanation
    return findings


def examine(report: bytes, symptom: str = "", language: str = "en", guarded: bool = False) -> Tuple[Machine, List[Finding]]:
    """A pasted report of any kind -> the machine and its findings."""
    m = machine.read(machine.decode(report), symptom)
    return m, diagnose(m, language, guarded)


def examine_here(symptom: str = "", language: str = "en", python: str = sys.executable) -> Tuple[Machine, List[Finding]]:
    """This machine -> its facts as a machine, and its findings."""
    from groundup.env import info, probe

    said = try_imports(python, TRIED)
    facts = probe.facts()
    m = machine.from_facts(facts, info.text_report(facts) + "\n" + said, symptom)
    return m, diagnose(m, language, guarded=True)


def try_imports(python: str, names: Sequence[str], folder: Optional[Path] = None) -> str:
    """What Python says when torch, a first computation and these packages are tried in it; a crash is told as the signal that ended it."""
    try:
        done = subprocess.run(
            [python, "-W", "default", "-c", _TRY, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROBE_SECONDS,
            cwd=str(folder) if folder else None,
        )
    except subprocess.TimeoutExpired as late:
        return machine.decode(late.stdout or b"") + "\nimporting torch did not end within {:.0f} s".format(PROBE_SECONDS)
    except OSError as error:
        return "{} cannot be run: {}".format(python, error.strerror)
    said = machine.decode(done.stdout)
    if done.returncode < 0:
        said += "\nPython was ended by signal {} while torch was imported".format(-done.returncode)
    return said


# --- the verb --------------------------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", metavar="FILE", help="diagnose another machine from a pasted text; - reads stdin / 诊断另一台机器的报告，- 表示标准输入"
    )
    parser.add_argument("--symptom", metavar="TEXT", default="", help="the error message, in any words / 错误信息")
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="the Python to judge / 要诊断的 Python")


def run(options: argparse.Namespace) -> int:
    language = pick(options.lang)
    if options.report is None:
        m, findings = examine_here(options.symptom, language, options.python)
    else:
        try:
            report = sys.stdin.buffer.read(MAX_BYTES) if options.report == "-" else _read(Path(options.report))
        except OSError as error:
            return _unusable(options, language, "{}: {}".format(options.report, error.strerror or error))
        if not report.strip(b"\x00\xff\xfe\xef\xbb\xbf \t\r\n") and not options.symptom.strip():
            return _unusable(options, language, _say(language, "the report is empty", "报告为空"))
        m, findings = examine(report, options.symptom, language, guarded=True)
    blocking = any(f.severity == "blocking" for f in findings)
    if options.json:
        seen = {
            "system": m.system,
            "arch": m.arch,
            "torch": m.torch,
            "build": m.build,
            "gpus": [g.name for g in m.gpus],
            "driver": m.driver_text,
        }
        print(json.dumps({"healthy": not blocking, "findings": [f.as_dict() for f in findings], "machine": seen}, ensure_ascii=False))
    else:
        print(text(m, findings, language, here=options.report is None))
    return BLOCKED if blocking else HEALTHY


def _read(path: Path) -> bytes:
    with path.expanduser().open("rb") as file:
        return file.read(MAX_BYTES)


def _say(language: str, en: str, zh: str) -> str:
    return zh if language == "zh" else en


def _unusable(options: argparse.Namespace, language: str, why: str) -> int:
    fix = _say(
        language,
        "paste a report into a file: python -m torch.utils.collect_env > report.txt, or groundup env info --report",
        "请把报告存成文件：python -m torch.utils.collect_env > report.txt，或 groundup env info --report",
    )
    if options.json:
        print(json.dumps({"error": {"type": "EnvError", "message": why, "fix": fix}}, ensure_ascii=False))
    else:
        print("{}: {}\n{}: {}".format(_say(language, "Error", "错误"), why, _say(language, "Fix", "解决办法"), fix), file=sys.stderr)
    return UNUSABLE


def text(m: Machine, findings: List[Finding], language: str, *, here: bool, width: int = 80) -> str:
    """The diagnosis for a person."""
    torch = "torch {}{}".format(m.torch, "" if not m.build or "+" in m.torch else " ({})".format(m.build)) if m.torch else ""
    about = ", ".join(
        filter(None, [torch, *(g.name for g in m.gpus[:2]), "driver " + m.driver_text if m.driver_text else "", m.system or ""])
    )
    if not findings:
        if not here and not (m.torch or m.gpus or m.driver or m.cuda_available is not None):
            return _say(language, "nothing in this text tells of a PyTorch environment", "这段文本中没有关于 PyTorch 环境的内容")
        if here or m.cuda_available or not m.symptom.strip():
            return _say(language, "healthy: nothing here stands in the way", "正常：没有发现问题") + (
                " ({})".format(about) if about else ""
            )
        return _say(
            language,
            "no cause that is known here fits this text. More of it helps: the whole error, and the report of env info --report",
            "没有找到与此文本相符的已知原因。请提供更完整的错误信息以及 env info --report 的报告",
        )
    lines = _wrapped(_say(language, "Seen: ", "识别到：") + about, width, "", "  ") if about else []
    for number, f in enumerate(findings, 1):
        severity = _say(language, f.severity, {"blocking": "阻断", "warning": "警告", "info": "提示"}[f.severity])
        headline = "{}. {}  [{}, {:.0f} %]".format(number, f.title, severity, f.confidence * 100)
        lines += ["", *_wrapped(headline, width, "", "   "), "   " + f.cause_id]
        lines += ["   | " + line[: width - 5] for line in f.evidence[:4]]
        if number > 1 and f.severity != "blocking":
            continue
        lines += _wrapped(f.explanation, width, "   ")
        lines += [_say(language, "   What to do:", "   解决办法：")]
        for step, command in f.steps:
            lines += _wrapped("- " + step, width, "   ", "     ")
            lines += ["       $ " + command] if command else []  # never broken: it is there to be copied
        if f.changes:
            lines += _wrapped(_say(language, "Changes: ", "影响：") + f.changes, width, "   ")
        lines += [_say(language, "   Then check:", "   然后验证："), *("       $ " + command for command in f.verify)]
    if m.truncated:
        lines += ["", _say(language, "(the middle of this very long text was not read)", "（文本过长，中间部分未读取）")]
    return "\n".join(lines).strip("\n")


def _wrapped(paragraph: str, width: int, indent: str, then: Optional[str] = None) -> List[str]:
    """Lines of at most `width` columns; Chinese letters take two and may be broken anywhere."""
    if not any(ord(letter) > 0x2E80 for letter in paragraph):
        return textwrap.wrap(
            paragraph, width, initial_indent=indent, subsequent_indent=then or indent, break_long_words=False, break_on_hyphens=False
        )
    lines, line, columns = [], indent, len(indent)
    for word in re.findall(r"[!-\u02ff]+|.", paragraph):  # a run of Latin letters stays whole, Chinese breaks anywhere but before its marks
        size = sum(2 if ord(letter) > 0x2E80 else 1 for letter in word)
        if columns + size > width and word not in "，。；：、）":
            lines.append(line)
            line, columns = then or indent, len(then or indent)
            word = word.lstrip()
        line, columns = line + word, columns + size
    return [*lines, line]
