"""Carries a plan out: `env install`, and what start.py installs with.

What holds: nothing is uninstalled before everything that replaces it has been downloaded (pip and uv work that way, and no separate
uninstallation is run), and when anything fails after that, the verification included, the environment is put back as it was from
hard links of its files (`kept`), which cost no room. A new environment has nothing to lose and stays, so that the next run continues:
finished downloads are in pip's cache. Two exceptions: with --system, and on a disk without hard links, only the first half holds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from groundup.env import plan as planning
from groundup.env import probe
from groundup.env.language import pick
from groundup.env.layout import shown
from groundup.env.steps import (
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    WINDOWS,
    Failed,
    Refused,
    child_environment,
    known_cause,
    relative,
    say,
    step,
)

if TYPE_CHECKING:
    import argparse

INDEX_TIMEOUT = 3.0
BACKUP = ".groundup-before"

# Asks an environment's own Python what it is; nothing is imported from the environment.
_ASK = r"""
import importlib.util, json, os, platform, re, struct, sys, sysconfig
from importlib.metadata import distributions
site = sysconfig.get_path("purelib")
answer = {"version": platform.python_version(), "implementation": platform.python_implementation(), "bits": struct.calcsize("P") * 8,
          "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")), "site": site, "scripts": sysconfig.get_path("scripts"),
          "prefix": sys.prefix, "pip": bool(importlib.util.find_spec("pip")), "packages": {}, "torch": None,
          "managed": os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")),
          "environment": "venv" if sys.prefix != sys.base_prefix else
                         "conda" if os.path.isdir(os.path.join(sys.prefix, "conda-meta")) else "system"}
for found in distributions():
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower()
    if re.match(r"(?:torch|torchvision|torchaudio|numpy|triton|nvidia-.*)$", name) and found.read_text("RECORD") is not None:
        version = found.version
        path = os.path.join(str(found.locate_file("")), name, "version.py")
        if name.startswith("torch") and os.path.isfile(path):
            source = open(path, encoding="utf-8", errors="replace").read()
            inside = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", source, re.M))
            version = inside.get("__version__", version)
            if name == "torch":
                answer["torch"] = {"version": version, "distribution": found.version, "cuda": inside.get("cuda"), "hip": inside.get("hip")}
        if name != "torch" or answer["torch"]:
            answer["packages"].setdefault(name, version)
print(json.dumps(answer))
"""


# --- environments ----------------------------------------------------------------------------------------------------------------


def ask(python: str) -> Optional[Dict[str, Any]]:
    """What an environment's Python says of itself and of the torch in it; None when it is missing or does not start."""
    try:
        answer = subprocess.check_output([python, "-I", "-c", _ASK], stderr=subprocess.DEVNULL, env=child_environment(), timeout=60)
        return dict(json.loads(answer.decode("utf-8", "replace")))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def facts_for(there: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """Facts of this machine with what `ask` said of the environment; None stands for one that is still to be made, with this Python."""
    facts = probe.facts()
    if there is None:
        return dict(facts, torch=None, packages=[], python=dict(facts["python"], environment="venv"))
    packages = []
    for name, number in there["packages"].items():
        public, _, local = number.partition("+")
        packages.append({"name": name, "version": public, "build": local or None})
    python = {key: there[key] for key in ("version", "implementation", "bits", "free_threaded", "environment")}
    return dict(facts, torch=there["torch"], packages=packages, python=python)


def venv_state(folder: str, made_at: Optional[str] = None, version: Optional[str] = None) -> Tuple[str, str, Optional[Dict[str, Any]]]:
    """('missing' | 'ready' | 'broken' | 'foreign', why, what `ask` found). Only a folder with a pyvenv.cfg is ever called broken.

    Args:
        made_at: where the environment was made, if that is known better than from its pyvenv.cfg.
        version: '3.12' when it must be for that Python and have pip.
    """
    if not os.path.lexists(folder):
        return "missing", "", None
    if not os.path.isdir(folder):
        return "foreign", foreign_message(folder, say("it is not a folder", "它不是文件夹")), None
    if not os.listdir(folder):
        return "missing", "", None
    config = os.path.join(folder, "pyvenv.cfg")
    if not os.path.isfile(config):
        why = say("it has no pyvenv.cfg, so it is not a Python environment", "其中没有 pyvenv.cfg，不是 Python 环境")
        return "foreign", foreign_message(folder, why), None

    there = ask(venv_python(folder))
    made_at = made_at or venv_made_at(config)
    if made_at and os.path.realpath(made_at) != os.path.realpath(folder):
        why = say("it was moved or copied from another place", "它是从别处移动或复制来的")
    elif there is None:
        why = say("its Python is missing or does not start", "其中的 Python 缺失或无法启动")
    elif version and not there["version"].startswith(version + "."):
        why = say("it was made for Python {0}, this is {1}", "它是为 Python {0} 建立的，当前为 {1}").format(there["version"], version)
    elif there["environment"] != "venv" or (version and not there["pip"]):
        why = say("it is unfinished", "它尚未建立完整")
    else:
        return "ready", "", there
    if os.path.islink(folder):
        why = say("it is a link to a broken environment ({0})", "它指向一个已损坏的环境（{0}）").format(why)
        return "foreign", foreign_message(folder, why), there
    return "broken", why, there


def foreign_message(folder: str, why: str) -> str:
    return say(
        "{1} in {0} was not made by this program: {2}.\n  Move it away or rename it, then run this again. Nothing was changed.",
        "{0} 中的 {1} 不是由本程序建立的：{2}。\n  请将它移走或改名，然后重新运行。未作任何更改。",
    ).format(os.path.dirname(os.path.abspath(folder)), os.path.basename(folder), why)


def venv_made_at(config: str) -> Optional[str]:
    """Where `python -m venv` made the environment, as far as pyvenv.cfg says."""
    with open(config, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition("=")
            if key.strip() == "command" and " -m venv " in value:
                return value.split(" -m venv ", 1)[1].strip().split("--", 1)[0].strip() or None
    return None


def venv_python(folder: str) -> str:
    return os.path.join(folder, "Scripts", "python.exe") if WINDOWS else os.path.join(folder, "bin", "python")


def base_python(folder: str) -> str:
    """The Python that makes an environment: when this one is inside it, the one that it was made from."""
    inside = os.path.realpath(sys.prefix) == os.path.realpath(folder)
    return str(getattr(sys, "_base_executable", sys.executable)) if inside else sys.executable


def make_venv(folder: str, cwd: str, manager: str = "pip") -> None:
    title = say("Making the environment {0}", "建立环境 {0}").format(relative(folder, cwd))
    if manager == "uv":
        step(title, ["uv", "venv", "--python", base_python(folder), folder], cwd)
        return
    check_venv_module()
    step(title, [base_python(folder), "-I", "-m", "venv", folder], cwd)


# --- walls: what can be known before anything is tried ---------------------------------------------------------------------------


def check_venv_module() -> None:
    """Debian and Ubuntu ship Python without the part that puts pip into a venv."""
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return
    version = "{}.{}".format(*sys.version_info[:2])
    if os.path.exists("/etc/debian_version"):
        fix = "sudo apt install python{}-venv".format(version)
    else:
        fix = say("install your system's package for Python {0}'s venv and pip", "安装系统中 Python {0} 的 venv 与 pip 软件包").format(
            version
        )
    raise Refused(
        say(
            "this Python {0} cannot make virtual environments: its module ensurepip is missing.\n  Fix: {1}\n  Then run this again.",
            "当前 Python {0} 无法建立虚拟环境：缺少 ensurepip 模块。\n  解决：{1}\n  然后重新运行本命令。",
        ).format(version, fix)
    )


def check_folder(folder: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(
            say(
                "cannot write to the folder {0}: {1}.\n  Choose or make a folder of your own and run this there.",
                "无法写入文件夹 {0}：{1}。\n  请改用自己有写权限的文件夹，并在其中运行。",
            ).format(probe.scrub(folder), error.strerror)
        ) from None


def check_disk(folder: str, needed_gb: float) -> None:
    """Room (10^9 bytes) where the environment is, and in the temporary folder where that is another disk: pip unpacks there."""
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    places = [(folder, needed_gb)]
    if os.stat(tempfile.gettempdir()).st_dev != os.stat(folder).st_dev:
        places.append((tempfile.gettempdir(), needed_gb / 4))
    for place, needed in places:
        free = shutil.disk_usage(place).free / 1e9
        if free < needed:
            raise Refused(
                say(
                    "{0} has {1:.1f} GB free; the installation needs about {2:.1f} GB there.\n  Free some space, or work on a larger disk "
                    "(for the temporary folder: set TMPDIR), then run this again.",
                    "{0} 只剩 {1:.1f} GB，安装大约需要 {2:.1f} GB。\n  请腾出空间，或换到更大的磁盘（临时文件夹可用 TMPDIR 指定），然后重新运行。",
                ).format(probe.scrub(place), free, needed)
            )


# --- installing and verifying ----------------------------------------------------------------------------------------------------


def pip(python: str, *arguments: str) -> List[str]:
    return [python, "-I", "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]


def install_torch(plan: planning.Plan, python: str, cwd: str) -> None:
    """Installs what the plan names. pip and uv fetch everything first and only then replace what is there."""
    arguments = plan.pip_args
    if plan.index_url and not index_answers(plan.index_url):
        print(
            say("PyTorch's wheel index does not answer ({0}).", "无法访问 PyTorch 的安装包索引（{0}）。").format(shown([plan.index_url]))
            + " "
            + (
                say("Taking torch from the package manager's own sources.", "改从包管理器自身的软件源获取 torch。")
                if plan.pip_args_without_index
                else say("This build exists nowhere else, so it will be tried all the same.", "该构建没有其他来源，仍将尝试。")
            ),
            flush=True,
        )
        arguments = plan.pip_args_without_index or arguments
    names = ", ".join(" ".join((change.name, change.after.partition("+")[0])) for change in plan.changes)
    title = say("Installing {0} ({1})", "安装 {0}（{1}）").format(names, plan.backend)
    if plan.manager == "uv":
        step(title, ["uv", "pip", "install", "--python", python, *_for_uv(arguments)], cwd)
    else:
        step(title, pip(python, "install", *arguments), cwd)


def _for_uv(arguments: Sequence[str]) -> List[str]:
    found = list(arguments)
    return found[: found.index("--retries")] if "--retries" in found else found


def index_answers(url: str) -> bool:
    """True when the host of the wheel index answers within a few seconds, through the proxy if one is set."""
    answer = []

    def ask_it() -> None:
        import ssl
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(urllib.request.Request(url + "/", method="HEAD"), timeout=INDEX_TIMEOUT).close()
            answer.append(True)
        except urllib.error.HTTPError:
            answer.append(True)  # whatever it said, it is there
        except urllib.error.URLError as error:
            # Without its certificates (a fresh macOS Python) this process cannot tell; pip brings its own.
            answer.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, ValueError):
            answer.append(False)

    # In a thread of its own, because looking up a name obeys no time limit.
    asking = threading.Thread(target=ask_it, daemon=True)
    asking.start()
    asking.join(INDEX_TIMEOUT + 1)
    return bool(answer and answer[0])


def verify(plan: planning.Plan, python: str, cwd: str, package: Optional[str] = None) -> Dict[str, Any]:
    """Proves that the installed torch computes on the planned device, and that the planned companions fit it; the verdict of verify.py."""
    command = [python, "-I", str(Path(__file__).with_name("verify.py")), "--device", plan.device]
    command += ["--companions"] if len(plan.changes) > 1 else []
    command += ["--package", package] if package else []

    def explain(status: int, output: str) -> Optional[str]:
        try:
            verdict = json.loads(output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return None
        return say(
            "torch {0} does not compute on {1}: {2}\n  To try another build: --backend BUILD. If files are damaged: delete the "
            "environment and run this again.",
            "torch {0} 无法在 {1} 上计算：{2}\n  若想换一种构建：--backend 构建名。若文件已损坏：删除该环境后重新运行。",
        ).format(plan.torch_version, verdict["device"], verdict["error"])

    title = say("Verifying that torch computes on {0}", "验证 torch 能在 {0} 上计算").format(plan.device)
    verdict = dict(json.loads(step(title, command, cwd, explain).strip().splitlines()[-1]))
    print(
        say(
            "  torch {0} on {1}: matrix product off by {2:.0e}, gradient off by {3:.0e}",
            "  torch {0}（{1}）：矩阵乘积误差 {2:.0e}，梯度误差 {3:.0e}",
        ).format(verdict["torch"], verdict["device_name"] or verdict["device"], verdict["matmul_error"], verdict["gradient_error"]),
        flush=True,
    )
    return verdict


# --- the way back ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept(there: Optional[Dict[str, Any]]) -> Iterator[None]:
    """Keeps an environment's packages and scripts as hard links, and puts them back when the block fails or is interrupted.

    Installers write new files instead of changing old ones, so a link keeps the old content. Links that an earlier run left (it was
    killed) show the last state that was whole, and are used on. `there` is what `ask` found; None, or a Python that is no environment
    of its own: nothing is kept.
    """
    if there is None or there["environment"] == "system" or "torch" not in there["packages"]:
        yield
        return
    backup = os.path.join(there["prefix"], BACKUP)
    folders = [(there["site"], os.path.join(backup, "site")), (there["scripts"], os.path.join(backup, "scripts"))]
    if not os.path.isfile(os.path.join(backup, "whole")):
        shutil.rmtree(backup, ignore_errors=True)
        try:
            for folder, links in folders:
                _link(folder, links)
            Path(backup, "whole").write_text("")
        except OSError:
            shutil.rmtree(backup, ignore_errors=True)
            print(
                say(
                    "This disk keeps no hard links: if the installation fails half-way, run it again.",
                    "此磁盘不支持硬链接：若安装中途失败，请重新运行。",
                )
            )
            yield
            return
    try:
        yield
    except BaseException:
        for folder, links in folders:
            _put_back(folder, links)
        shutil.rmtree(backup, ignore_errors=True)
        print(say("The environment is as it was before.", "环境已恢复到之前的状态。"), flush=True)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _files(folder: str) -> Set[str]:
    """Relative paths of everything below a folder that is no folder itself; a link to a folder is a file here."""
    found = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found |= {os.path.relpath(os.path.join(root, name), folder) for name in [*files, *links]}
    return found


def _link(folder: str, links: str) -> None:
    for name in _files(folder):
        source, target = os.path.join(folder, name), os.path.join(links, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        else:
            os.link(source, target)


def _put_back(folder: str, links: str) -> None:
    """Makes `folder` hold exactly the files of `links`. A file that is in use (Windows) is left to itself: the others count more."""
    before = _files(links)
    for name in _files(folder) - before:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, name))
    for name in before:
        source, target = os.path.join(links, name), os.path.join(folder, name)
        if os.path.lexists(target) and (os.path.islink(target) or os.path.samefile(source, target)):
            continue
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(source, target)
    for root, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(root)  # refuses, and so keeps, what is not empty


# --- the verb --------------------------------------------------------------------------------------------------------------------


def configure(parser: "argparse.ArgumentParser") -> None:
    """The options of `env install`."""
    planning.add_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--venv", metavar="FOLDER", help="environment; default: the active one, else .venv / 目标环境，默认为已激活的环境或 .venv"
    )
    where.add_argument("--system", action="store_true", help="into this Python itself, without a venv / 直接装入当前 Python，不用 venv")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done / 只显示将要执行的操作")


def run(options: "argparse.Namespace") -> int:
    """`env install`: 0 installed and verified, 1 failed (the old environment is back), 2 refused (nothing was tried), 130 Ctrl-C."""
    os.environ["GROUNDUP_LANG"] = pick(options.lang)  # what is started speaks the same language
    answer: Dict[str, Any] = {"schema": "groundup.env.install/1", "status": DONE, "message": None, "plan": None, "verify": None}
    # With --json the one object is all that standard output gets.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        try:
            _install(options, answer)
        except (Refused, Failed) as error:
            answer.update(status=REFUSED if isinstance(error, Refused) else FAILED, message=str(error))
        except KeyboardInterrupt:
            stopped = say("stopped by Ctrl-C. Running the same command again continues.", "已被 Ctrl-C 中断。再次运行同一命令即可继续。")
            answer.update(status=INTERRUPTED, message=stopped)
        if answer["message"]:
            print("\ngroundup env install: " + answer["message"], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(dict(answer, message=probe.scrub(answer["message"]) if answer["message"] else None), ensure_ascii=False))
    return int(answer["status"])


def _target(options: "argparse.Namespace") -> Tuple[Optional[str], str, Optional[Dict[str, Any]]]:
    """(folder of the venv or None, its Python, what `ask` found or None when it is still to be made)."""
    folder = options.venv
    if not folder and not options.system:
        here = ask(sys.executable)
        active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
        if here and (here["environment"] == "venv" or (here["environment"] == "conda" and active and Path(active) == Path(sys.prefix))):
            return None, sys.executable, here
        folder = os.environ.get("VIRTUAL_ENV") or ".venv"
    if folder:
        folder = os.path.abspath(folder)
        state, why, there = venv_state(folder)
        if state == "foreign":
            raise Refused(why)
        if state == "broken":
            raise Refused(
                say(
                    "the environment {0} is broken: {1}.\n  Remove it or name another with --venv FOLDER, then run this again.",
                    "环境 {0} 已损坏：{1}。\n  请删除它，或用 --venv 指定其他文件夹，然后重新运行。",
                ).format(probe.scrub(folder), why)
            )
        return folder, venv_python(folder), there
    there = ask(sys.executable)
    if there and there["managed"]:
        raise Refused(known_cause(1, "externally-managed-environment"))
    return None, sys.executable, there


def _install(options: "argparse.Namespace", answer: Dict[str, Any]) -> None:
    cwd = os.getcwd()
    folder, python, there = _target(options)
    plan = planning.from_options(options, facts_for(there))
    answer["plan"] = planning.as_dict(plan)
    if plan.refused:
        print(planning.report(plan, pick()))
        raise Refused(plan.refused[pick()])
    if plan.manager == "conda":
        typed = "\n  ".join(shown(command, WINDOWS) for command in plan.commands)
        raise Refused(
            say(
                "conda changes its environments itself. Type in the one that you want:", "conda 环境由 conda 自己管理。请在目标环境中输入："
            )
            + "\n  "
            + typed
        )
    if plan.manager == "uv" and not shutil.which("uv"):
        raise Refused(
            say("uv is not here: pip install uv, or use --manager pip.", "本机没有 uv：请 pip install uv，或使用 --manager pip。")
        )
    if plan.manager == "pip" and there and not there["pip"]:
        fix = shown([relative(python, cwd), "-m", "ensurepip"], WINDOWS)
        raise Refused(
            say("this environment has no pip. Fix: {0}, or use --manager uv.", "该环境中没有 pip。解决：{0}，或使用 --manager uv。").format(
                fix
            )
        )
    print(planning.report(plan, pick()), flush=True)
    needed = any(change.action != "keep" for change in plan.changes)
    if needed:
        check_disk(folder or (there or {}).get("prefix") or cwd, plan.disk_gb)
    if options.dry_run:
        print(say("\nNothing was done (--dry-run).", "\n未执行任何操作（--dry-run）。"))
        return
    if there is None:
        check_folder(os.path.dirname(str(folder)))
        make_venv(str(folder), cwd, plan.manager)
    with kept(there if needed else None):
        if needed:
            install_torch(plan, python, cwd)
        answer["verify"] = verify(plan, python, cwd)
    if folder and os.path.realpath(sys.prefix) != os.path.realpath(folder):
        activate = (
            os.path.join(folder, "Scripts", "activate")
            if WINDOWS
            else "source " + shown([relative(os.path.join(folder, "bin", "activate"), cwd)])
        )
        print(say("\nReady. To use it: ", "\n已就绪。使用方法：") + activate)
