#!/usr/bin/env python3
"""One command from a fresh clone to a running demo; nothing is needed but Python 3.11 to 3.14.

    python3 start.py            make .venv, install torch and groundup, verify, run the demo
    python3 start.py install    stop after the verification
    python3 start.py test       install with the development tools, then ruff, mypy and pytest
    python3 start.py env info   what this machine is (needs no installation)

Standard library only, and in the syntax of old Pythons, so that a wrong Python gets a sentence instead of a SyntaxError.
Exit status: 0 done, 1 failed, 2 the request or this machine was refused, 130 Ctrl-C.
"""

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "groundup-start.json")
WINDOWS = os.name == "nt"
OLDEST, NEWEST = (3, 11), (3, 14)  # requires-python in pyproject.toml
ENV_OLDEST = (3, 8)  # what groundup.env runs on
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
INDEX_TIMEOUT = 3.0
REST_GB = 0.8  # what is left to install when torch is already there
NETWORK_SIGNS = (
    "failed to establish a new connection",
    "max retries exceeded",
    "name resolution",
    "name or service not known",
    "getaddrinfo failed",
    "network is unreachable",
    "connection refused",
    "connection reset",
    "connection timed out",
    "connecttimeout",
    "read timed out",
    "proxyerror",
)

language = "en"


def say(en, zh):
    return zh if language == "zh" else en


class Refused(Exception):
    """This machine, folder or request cannot work: nothing was tried."""


class Failed(Exception):
    """A step was tried and failed."""


# --- the commands ----------------------------------------------------------------------------------------------------------------


def main(argv=None):
    global language
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A console that cannot show a character must not stop an installation.
            stream.reconfigure(errors="replace")
    if sys.version_info[:2] < ENV_OLDEST:
        # groundup.env cannot be loaded here, so the language is not known either: say it in both.
        language = "en"
        complain(python_refusal(sys.version_info))
        language = "zh"
        complain(python_refusal(sys.version_info))
        return REFUSED

    # A clone must not be littered with bytecode of whatever Python was tried first.
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.join(ROOT, "src"))
    from groundup.env.language import pick

    language = pick(option_value(argv, "--lang"))
    # The demo, and whatever else is started, speaks the same language.
    os.environ["GROUNDUP_LANG"] = language
    began = time.time()
    try:
        if argv[:1] == ["env"]:
            from groundup.env.cli import main as env_main

            return env_main(argv[1:])
        options = parse(argv)
        if options.help:
            print(help_text())
            return DONE
        install(options)
        if options.command == "test":
            return run_checks(options.rest)
        if options.command == "install":
            print_next_steps(time.time() - began)
            return DONE
        return run_demo()
    except Refused as refusal:
        complain(str(refusal))
        return REFUSED
    except Failed as failure:
        complain(str(failure))
        return FAILED
    except KeyboardInterrupt:
        complain(
            say("stopped by Ctrl-C. Running the same command again continues from here.", "已被 Ctrl-C 中断。再次运行同一命令即可继续。")
        )
        return INTERRUPTED


class Options:
    """What was typed: the command, --backend, --help, and the words that go on to pytest."""

    def __init__(self):
        self.command, self.backend, self.help, self.rest = None, None, False, []


def parse(argv):
    """Reads the arguments by hand: argparse could say its errors in English only."""
    from groundup.env.choose import BACKENDS

    options, words = Options(), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            options.help = True
        elif name in ("--lang", "--backend"):
            if not equals:
                value = words.pop(0) if words else ""
            allowed = ("en", "zh") if name == "--lang" else ("auto",) + BACKENDS
            if value not in allowed:
                raise wrong_argument(
                    say("{0} must be one of {2}, not '{1}'", "{0} 的值只能是 {2}，而不是“{1}”").format(name, value, ", ".join(allowed))
                )
            if name == "--backend":
                options.backend = value
        elif options.command is None and word in ("demo", "install", "test"):
            options.command = word
        elif options.command == "test":
            options.rest.append(word)
        else:
            raise wrong_argument(say("unknown argument '{0}'", "无法识别的参数“{0}”").format(word))
    options.command = options.command or "demo"
    return options


def wrong_argument(what):
    return Refused(what + say(".\n  To see what there is: ", "。\n  查看用法：") + "python3 start.py --help")


def help_text():
    from groundup.env.choose import BACKENDS

    return say(
        """\
usage: python3 start.py [install | test | env ...] [--lang en|zh] [--backend BACKEND]

  (no command)   make .venv, install torch and groundup, verify, run the demo
  install        stop after the verification
  test           install with the development tools, then ruff, mypy and pytest (further arguments go to pytest)
  env ...        the environment stage without an installation, for example: env info

  --lang         language of the messages; else GROUNDUP_LANG, else the system's
  --backend      build of torch instead of the best one for this machine, remembered until --backend auto:
                 {0}
  -h, --help     this text

GROUNDUP_TORCH_INDEX: address of a mirror of PyTorch's wheel index.""",
        """\
用法：python3 start.py [install | test | env ...] [--lang en|zh] [--backend 构建]

  （不带命令）   建立 .venv，安装 torch 与 groundup，验证，然后运行演示
  install        验证之后停止
  test           另装开发工具，依次运行 ruff、mypy、pytest（其余参数传给 pytest）
  env ...        无需安装即可使用的环境工具，例如：env info

  --lang         提示语言；未指定时依次取 GROUNDUP_LANG 与系统语言
  --backend      指定 torch 的构建，而不由程序选择；一直沿用，直到 --backend auto：
                 {0}
  -h, --help     显示本说明

GROUNDUP_TORCH_INDEX：PyTorch 安装包索引的镜像地址。""",
    ).format(", ".join(BACKENDS))


def install(options):
    """Everything up to a verified .venv; returns at once when an earlier start did all of it."""
    refusal = python_refusal(sys.version_info)
    if refusal:
        raise Refused(refusal)
    from groundup.env import choose, probe

    stamp = read_stamp()
    backend = options.backend or stamp.get("backend_asked")
    backend = None if backend == "auto" else backend
    choice = choose.choose_build(probe.facts(), backend, os.environ.get("GROUNDUP_TORCH_INDEX", choose.WHEEL_INDEX).rstrip("/"))
    if choice.refused:
        raise Refused(choice.refused[language])
    extras = ["dev"] if options.command == "test" else []
    wanted = make_stamp(choice, backend, sorted(set(extras) | set(stamp.get("extras", []))))

    state, why = venv_state()
    if state == "foreign":
        raise Refused(why)
    torch = probe.installed_torch(site_packages()) if state == "ready" else None
    if state == "ready" and choice.fits(torch) and stamp_matches(stamp, wanted):
        print(
            say(
                "Environment: torch {0} for {1}, installed and verified on {2}; nothing to do.",
                "环境：torch {0}（{1}），已于 {2} 安装并验证，无需再做。",
            ).format(torch["version"], choice.backend, stamp.get("verified_on", "?")),
            flush=True,
        )
        return

    check_folder(ROOT)
    check_disk(REST_GB if choice.fits(torch) else choice.disk_gb)
    print(say("torch build: {0} ({1})", "torch 构建：{0}（{1}）").format(choice.backend, choice.reason[language]), flush=True)
    if state == "broken":
        remove_venv(why)
    if state != "ready":
        check_venv_module()
        step(say("Making the environment .venv", "建立环境 .venv"), [base_python(), "-I", "-m", "venv", VENV])
    elif not stamp:
        print(
            say("Found a .venv without a finished installation: continuing with it.", "发现未完成安装的 .venv，在其基础上继续。"),
            flush=True,
        )
    if os.path.exists(STAMP):
        os.remove(STAMP)  # from here on nothing is certain until the verification has passed

    if choice.fits(torch):
        print(say("torch {0} is already there: kept.", "torch {0} 已安装，予以保留。").format(torch["version"]), flush=True)
    else:
        install_torch(choice, torch)
    target = ".[{}]".format(",".join(wanted["extras"])) if wanted["extras"] else "."
    step(say("Installing groundup and what it needs", "安装 groundup 及其依赖"), pip("install", "-e", target))
    verify(choice)
    write_stamp(wanted)


def run_demo():
    command = [venv_python(), "-m", "groundup", "demo"]
    print("\n$ " + shown(command), flush=True)
    return foreground(command)


def run_checks(pytest_arguments):
    """ruff, mypy, pytest. Nothing is printed after pytest: its own closing line is the last."""
    for tool in (["ruff", "check", "."], ["mypy"], ["pytest"] + pytest_arguments):
        command = [venv_python(), "-m"] + tool
        print("\n$ " + shown(command), flush=True)
        began = time.time()
        status = foreground(command)
        if tool[0] == "pytest":
            return DONE if status == 0 else FAILED
        if status != 0:
            raise Failed(
                say("{0} found problems (status {1}).\n  To repeat: {2}", "{0} 未通过（状态 {1}）。\n  重复此步：{2}").format(
                    tool[0], status, repeatable(command)
                )
            )
        print_duration(time.time() - began)
    return DONE


def print_next_steps(seconds):
    print(say("\nReady in {0:.1f} s. Next:", "\n已就绪，用时 {0:.1f} 秒。接下来：").format(seconds))
    activate = ".venv\\Scripts\\activate" if WINDOWS else "source .venv/bin/activate"
    program = ".venv\\Scripts\\groundup" if WINDOWS else ".venv/bin/groundup"
    if os.path.realpath(os.getcwd()) != os.path.realpath(ROOT):
        print("  " + change_folder())
    print(
        "  {0:<28}{1}".format(
            program + " demo", say("# the whole path on real handwriting, 2 minutes", "# 用真实手写数字走完全程，约 2 分钟")
        )
    )
    print("  {0:<28}{1}".format(activate, say("# then simply: groundup --help", "# 之后直接输入：groundup --help")), flush=True)


# --- walls: what can be known before anything is tried ---------------------------------------------------------------------------


def python_refusal(version):
    """Why this Python cannot be used, with what to type instead; None when it can."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    lines = [
        say(
            "this is Python {0}; groundup needs Python {1} to {2}.",
            "当前是 Python {0}，而 groundup 需要 Python {1} 至 {2}。",
        ).format(dotted(version[:3]), dotted(OLDEST), dotted(NEWEST))
    ]
    other = other_python()
    if other:
        lines.append(say("A suitable one is here. Run: ", "本机有合适的版本，请运行：") + join(other + ["start.py"] + sys.argv[1:]))
    else:
        lines.append(say("To get one: ", "安装方法：") + how_to_get_python())
    return "\n  ".join(lines)


def other_python():
    """The command of a suitable Python on this machine's PATH, newest first; None when there is none."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        name = "3.{}".format(minor)
        command = ["py", "-" + name] if WINDOWS else ["python" + name]
        if not shutil.which(command[0]):
            continue
        try:
            # Asking it is the only proof: version managers leave launchers for versions that are switched off.
            ask = ["-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            out = subprocess.check_output(command + ask, stderr=subprocess.DEVNULL, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        if out.decode("ascii", "replace").strip() == name:
            return command
    return None


def how_to_get_python():
    if sys.platform == "darwin":
        return say(
            "brew install python@3.13   (or the installer from python.org)", "brew install python@3.13   （或使用 python.org 的安装包）"
        )
    if WINDOWS:
        return "winget install Python.Python.3.13"
    if is_debian():
        return say(
            "sudo apt install python3.11 python3.11-venv   (where apt does not know it: uv python install 3.13)",
            "sudo apt install python3.11 python3.11-venv   （apt 中没有时：uv python install 3.13）",
        )
    return say(
        "your package manager (for example: sudo dnf install python3.12), or: uv python install 3.13",
        "使用系统的软件包管理器（例如：sudo dnf install python3.12），或：uv python install 3.13",
    )


def check_venv_module():
    """Debian and Ubuntu ship Python without the part that puts pip into a venv."""
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return
    version = dotted(sys.version_info[:2])
    if is_debian():
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


def check_folder(folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(
            say(
                "cannot write to the folder {0}: {1}.\n  Copy the project to a folder of your own and run start.py there.",
                "无法写入文件夹 {0}：{1}。\n  请把项目复制到自己有写权限的文件夹，再运行其中的 start.py。",
            ).format(folder, error.strerror)
        ) from None


def check_disk(needed_gb):
    """Room where .venv is, and in the temporary folder where that is another disk: pip unpacks there."""
    places = [(ROOT, needed_gb)]
    if os.stat(tempfile.gettempdir()).st_dev != os.stat(ROOT).st_dev:
        places.append((tempfile.gettempdir(), needed_gb / 4))
    for place, needed in places:
        free = shutil.disk_usage(place).free / 1e9
        if free < needed:
            raise Refused(
                say(
                    "{0} has {1:.1f} GB free; the installation needs about {2:.1f} GB there.\n  Free "
                    "some space, or copy the project to a larger disk "
                    "(for the temporary folder: set TMPDIR), then run this again.",
                    "{0} 只剩 {1:.1f} GB，安装大约需要 {2:.1f} GB。\n  请腾出空间，"
                    "或把项目复制到更大的磁盘（临时文件夹可用 TMPDIR 指定），然后重新运行。",
                ).format(place, free, needed)
            )


def is_debian():
    return os.path.exists("/etc/debian_version")


# --- the environment folder ------------------------------------------------------------------------------------------------------


def venv_state():
    """('missing' | 'ready' | 'broken' | 'foreign', why). Only a folder with a pyvenv.cfg is ever called broken, and so ever removed."""
    if not os.path.lexists(VENV):
        return "missing", ""
    if not os.path.isdir(VENV):
        return "foreign", foreign_message(say("it is not a folder", "它不是文件夹"))
    if not os.listdir(VENV):
        return "missing", ""
    config = os.path.join(VENV, "pyvenv.cfg")
    if not os.path.isfile(config):
        return "foreign", foreign_message(
            say("it has no pyvenv.cfg, so it is not a Python environment", "其中没有 pyvenv.cfg，不是 Python 环境")
        )

    why = venv_fault(config)
    if why is None:
        return "ready", ""
    if os.path.islink(VENV):
        return "foreign", foreign_message(say("it is a link to a broken environment ({0})", "它指向一个已损坏的环境（{0}）").format(why))
    return "broken", why


def foreign_message(why):
    return say(
        ".venv in {0} was not made by this program: {1}.\n  Move it away or rename it, then run this again. Nothing was changed.",
        "{0} 中的 .venv 不是由本程序建立的：{1}。\n  请将它移走或改名，然后重新运行。未作任何更改。",
    ).format(ROOT, why)


def venv_fault(config):
    """What is wrong with the environment, or None."""
    made_at = read_stamp().get("location") or venv_made_at(config)
    if made_at and os.path.realpath(made_at) != os.path.realpath(VENV):
        return say("it was moved or copied from another place", "它是从别处移动或复制来的")
    probe = (
        "import sys, importlib.util as u; print('%d.%d' % sys.version_info[:2], sys.prefix != sys.base_prefix, bool(u.find_spec('pip')))"
    )
    try:
        answer = subprocess.check_output([venv_python(), "-I", "-c", probe], stderr=subprocess.DEVNULL, env=child_environment(), timeout=60)
    except (OSError, subprocess.SubprocessError):
        return say("its Python is missing or does not start", "其中的 Python 缺失或无法启动")
    version, inside, has_pip = answer.decode("ascii", "replace").split()
    here = dotted(sys.version_info[:2])
    if version != here:
        return say("it was made for Python {0}, this is {1}", "它是为 Python {0} 建立的，当前为 {1}").format(version, here)
    if inside != "True" or has_pip != "True":
        return say("it is unfinished", "它尚未建立完整")
    return None


def venv_made_at(config):
    """Where `python -m venv` made the environment, as far as pyvenv.cfg says."""
    with open(config, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition("=")
            if key.strip() == "command" and " -m venv " in value:
                return value.split(" -m venv ", 1)[1].strip().split("--", 1)[0].strip() or None
    return None


def remove_venv(why):
    print(say("Rebuilding .venv: {0}.", "重新建立 .venv：{0}。").format(why), flush=True)
    if WINDOWS and running_inside_venv():
        raise Refused(
            say(
                "this program runs with the Python inside .venv, which Windows does not let "
                "it replace. Type: deactivate, then: py start.py",
                "本程序正由 .venv 中的 Python 运行，Windows 不允许替换它。请先输入 deactivate，再输入 py start.py。",
            )
        )
    try:
        shutil.rmtree(VENV)
    except OSError as error:
        raise Failed(
            say(
                "could not remove {0}: {1}.\n  Remove it by hand and run this again.", "无法删除 {0}：{1}。\n  请手动删除后重新运行。"
            ).format(error.filename or VENV, error.strerror)
        ) from None


def running_inside_venv():
    return os.path.realpath(sys.prefix) == os.path.realpath(VENV)


def base_python():
    """The Python that makes the environment: when this one is inside .venv, the one that .venv was made from."""
    return getattr(sys, "_base_executable", sys.executable) if running_inside_venv() else sys.executable


def venv_python():
    return os.path.join(VENV, "Scripts", "python.exe") if WINDOWS else os.path.join(VENV, "bin", "python")


def site_packages():
    from pathlib import Path

    if WINDOWS:
        return Path(VENV, "Lib", "site-packages")
    return Path(VENV, "lib", "python" + dotted(sys.version_info[:2]), "site-packages")


# --- the stamp: what an earlier start has finished -------------------------------------------------------------------------------


def make_stamp(choice, backend_asked, extras):
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as project:
        digest = hashlib.sha256(project.read()).hexdigest()
    return {
        "schema": 1,
        "location": VENV,
        "python": dotted(sys.version_info[:2]),
        "pyproject_sha256": digest,
        "torch": list(choice.pip_args),
        "device": choice.device,
        "backend_asked": backend_asked,
        "extras": extras,
    }


def read_stamp():
    try:
        with open(STAMP, encoding="utf-8") as source:
            stamp = json.load(source)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def stamp_matches(stamp, wanted):
    """True when everything wanted now was finished then, and groundup is still installed from here."""
    return all(stamp.get(key) == value for key, value in wanted.items()) and any(site_packages().glob("groundup-*.dist-info"))


def write_stamp(stamp):
    # Written whole or not at all: half a stamp must not vouch for half an installation.
    with open(STAMP + ".new", "w", encoding="utf-8") as target:
        json.dump(dict(stamp, verified_on=time.strftime("%Y-%m-%d")), target, indent=1)
    os.replace(STAMP + ".new", STAMP)


# --- installing and verifying ----------------------------------------------------------------------------------------------------


def install_torch(choice, installed):
    arguments = choice.pip_args
    if choice.index_url and not index_answers(choice.index_url):
        print(
            say("PyTorch's wheel index does not answer ({0}).", "无法访问 PyTorch 的安装包索引（{0}）。").format(choice.index_url)
            + " "
            + (
                say("Taking torch from pip's own sources.", "改从 pip 自身的软件源获取 torch。")
                if choice.pip_args_without_index
                else say("This build exists nowhere else, so pip will try it all the same.", "该构建没有其他来源，仍由 pip 尝试。")
            ),
            flush=True,
        )
        arguments = choice.pip_args_without_index or arguments
    if installed and choice.backend in ("cpu", "mps") and installed["version"].startswith(choice.torch_version + "+"):
        # The pin of a CPU build does not name the build, so pip would keep a CUDA build of the same release.
        arguments = tuple(arguments) + ("--force-reinstall",)
    step(
        say("Installing torch {0} ({1})", "安装 torch {0}（{1}）").format(choice.torch_version, choice.backend), pip("install", *arguments)
    )


def index_answers(url):
    """True when the host of the wheel index answers within a few seconds, through the proxy if one is set."""
    answer = []

    def ask():
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
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(INDEX_TIMEOUT + 1)
    return bool(answer and answer[0])


def verify(choice):
    script = os.path.join(ROOT, "src", "groundup", "env", "verify.py")
    command = [venv_python(), "-I", script, "--device", choice.device, "--package", "groundup"]

    def read_verdict(status, output):
        try:
            verdict = json.loads(output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return None
        if status == 0:
            return None
        advice = say(
            "If another build should be tried: python3 start.py install --backend BACKEND. If "
            "files are damaged: delete .venv and run this again.",
            "若想换一种构建：python3 start.py install --backend BACKEND。若文件已损坏：删除 .venv 后重新运行。",
        )
        return say("torch {0} does not compute on {1}: {2}\n  {3}", "torch {0} 无法在 {1} 上计算：{2}\n  {3}").format(
            choice.torch_version, verdict["device"], verdict["error"], advice
        )

    output = step(
        say("Verifying that torch computes on {0}", "验证 torch 能在 {0} 上计算").format(choice.device), command, explain=read_verdict
    )
    verdict = json.loads(output.strip().splitlines()[-1])
    print(
        say(
            "  torch {0} on {1}: matrix product off by {2:.0e}, gradient off by {3:.0e}",
            "  torch {0}（{1}）：矩阵乘积误差 {2:.0e}，梯度误差 {3:.0e}",
        ).format(verdict["torch"], verdict["device_name"] or verdict["device"], verdict["matmul_error"], verdict["gradient_error"]),
        flush=True,
    )


def pip(*arguments):
    return [venv_python(), "-I", "-m", "pip"] + list(arguments) + ["--disable-pip-version-check", "--no-input"]


# --- steps -----------------------------------------------------------------------------------------------------------------------


def step(title, command, explain=None):
    """Runs one command: says what and how long; its output is shown only when it fails. Returns the output.

    `explain(status, output)` names the cause of a failure; the general walls are known here.
    """
    print("\n" + title + "\n$ " + shown(command), flush=True)
    began = time.time()
    status, output = captured(command)
    if status != 0:
        cause = (explain(status, output) if explain else None) or known_cause(status, output)
        lines = [say("this step failed with status {0}: {1}", "此步失败，状态 {0}：{1}").format(status, title)]
        lines += [say("Cause: ", "原因：") + cause] if cause else []
        lines += [say("Its last lines:", "最后的输出：")] + ["  " + line for line in meaningful_lines(output)]
        lines += [say("To repeat it: ", "重复此步：") + repeatable(command)]
        raise Failed("\n  ".join(lines))
    print_duration(time.time() - began)
    return output


def print_duration(seconds):
    print(say("  done in {0:.1f} s", "  完成，用时 {0:.1f} 秒").format(seconds), flush=True)


def captured(command):
    """(status, output) of a long command, with a sign of life: on a terminal one changing line, in a log a line a minute."""
    child = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []

    def read():
        for raw in child.stdout:
            lines.append(raw.decode("utf-8", "replace").rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    on_terminal = sys.stdout.isatty()
    began, last = time.time(), 0
    try:
        while reader.is_alive():
            reader.join(0.2)
            seconds = int(time.time() - began)
            if seconds > last and (on_terminal or seconds % 60 == 0):
                last = seconds
                sign = say("  still working, {0} s", "  进行中，{0} 秒").format(seconds) + heading(lines)
                print("\r" + sign + "\x1b[K" if on_terminal else sign, end="" if on_terminal else "\n", flush=True)
        return child.wait(), "\n".join(lines)
    except (KeyboardInterrupt, SystemExit):
        end(child)
        raise
    finally:
        reader.join(5)  # a grandchild that outlives the command would hold the pipe open
        if not reader.is_alive():
            child.stdout.close()
        if on_terminal and last:
            print("\r\x1b[K", end="", flush=True)


def heading(lines):
    """What pip is at, from its latest line that tells."""
    for line in reversed(lines[-20:]):
        words = line.split()
        if words and words[0] in ("Collecting", "Downloading", "Installing", "Building", "Using", "Preparing"):
            return ": " + line.strip()[:60]
    return ""


def foreground(command):
    """The exit status of a command that owns the terminal. Ctrl-C is its business first: it may have something to save."""
    child = subprocess.Popen(command, cwd=ROOT, env=child_environment())
    interrupted = False
    while True:
        try:
            status = child.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            if not sys.stdin or not sys.stdin.isatty():
                child.send_signal(signal.SIGINT)  # without a terminal the signal came to this process only
        except SystemExit:
            end(child)
            raise
    if interrupted or status == -signal.SIGINT:
        raise KeyboardInterrupt
    # A command ended by signal 9 has status -9 here; a shell would say 128 + 9.
    return 128 - status if status < 0 else status


def end(child):
    """Waits for a child that got the same Ctrl-C; one that did not hear it is told, and in the end made to."""
    for seconds, tell in ((3, child.terminate), (10, child.kill)):
        try:
            child.wait(timeout=seconds)
            return
        except subprocess.TimeoutExpired:
            tell()
    child.wait()


def child_environment():
    """The environment for the Python in .venv: without what would lead it, or pip, to another place."""
    from groundup.env.probe import clean_environment

    environment = {name: value for name, value in clean_environment().items() if name not in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")}
    # pip refuses --user in a venv, and some systems set it for everybody.
    environment["PIP_USER"] = "0"
    return environment


def known_cause(status, output):
    """The wall behind a failed command, in a sentence with what to do; None for an unknown one. The surest signs come first."""
    low = output.lower()

    def has(*signs):
        return any(sign in low for sign in signs)

    if has("no space left on device", "errno 28", "disk quota exceeded", "not enough space on the disk"):
        return say(
            "the disk is full. Free some space and run start.py again: what is installed stays.",
            "磁盘已满。请腾出空间后重新运行 start.py，已安装的部分会保留。",
        )
    if has("read-only file system"):
        return say("the disk is read-only. Copy the project to a place that you can write to.", "磁盘为只读。请把项目复制到可写的位置。")
    if has("permission denied", "errno 13", "access is denied"):
        return say(
            "no permission to write there (a file of another user, or one that is in use). Make the folder your own, or copy the project.",
            "没有写权限（文件属于其他用户，或正被占用）。请取得该文件夹的权限，或复制一份项目。",
        )
    if has("ensurepip is not available", "no module named ensurepip"):
        return say(
            "Python's venv package is missing. Fix: ", "缺少 Python 的 venv 软件包。解决："
        ) + "sudo apt install python{}-venv".format(dotted(sys.version_info[:2]))
    if has("long path support"):
        return say(
            "a path is longer than Windows allows. Enable long paths (pip's hint below), or "
            "move the project to a short path such as C:\\gu.",
            "路径长度超过 Windows 的限制。请启用长路径支持（见下方 pip 的提示），或把项目移到较短的路径，如 C:\\gu。",
        )
    if has("certificate_verify_failed", "certificate verify failed"):
        return say(
            "the server's certificate is not trusted, as happens behind a company proxy. Set PIP_CERT to your company's certificate file.",
            "服务器证书不受信任，常见于公司代理之后。请把 PIP_CERT 设为公司的证书文件。",
        )
    # Told not to retry, pip is silent about servers that do not answer: it just knows no version at all.
    if has("(from versions: none)", *NETWORK_SIGNS):
        return say(
            "the network: pip got no answer from a server that it needs. Behind a proxy set HTTPS_PROXY; "
            "where the servers are slow or blocked use a mirror: "
            "PIP_INDEX_URL for packages, GROUNDUP_TORCH_INDEX for PyTorch's own wheels. Running start.py again continues.",
            "网络问题：pip 所需的服务器没有应答。使用代理时请设置 HTTPS_PROXY；访问缓慢或受限时请使用镜像："
            "PIP_INDEX_URL 用于普通软件包，GROUNDUP_TORCH_INDEX 用于 PyTorch 安装包。重新运行 start.py 即可继续。",
        )
    if has("no matching distribution found", "could not find a version"):
        return say(
            "pip's package sources do not have this version for Python {0} on this system (a mirror that is behind?).",
            "pip 的软件源中没有适用于本系统 Python {0} 的该版本（镜像可能未同步）。",
        ).format(dotted(sys.version_info[:2]))
    if has("do not match the hashes", "badzipfile", "incompleteread"):
        return say("a download arrived damaged. Run start.py again.", "下载的文件已损坏。请重新运行 start.py。")
    if status in (-9, 137) or has("memoryerror"):
        return say(
            "memory ran out and the system ended the command. Close other programs and run start.py again.",
            "内存不足，命令被系统终止。请关闭其他程序后重新运行。",
        )
    return None


def meaningful_lines(output, most=6):
    """The lines of a failed command that tell something: its errors, else its last words."""
    lines = [
        line.strip() for line in output.splitlines() if line.strip() and not line.strip().startswith(("[notice]", "WARNING: Retrying"))
    ]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-most:]


# --- words -----------------------------------------------------------------------------------------------------------------------


def option_value(argv, name):
    """The value of an option before the arguments are parsed: the messages about wrong ones need the language."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
    return None


def complain(message):
    print("\nstart.py: " + message, file=sys.stderr, flush=True)


def dotted(version):
    return ".".join(str(part) for part in version)


def join(command):
    return subprocess.list2cmdline(command) if WINDOWS else " ".join(shlex.quote(word) for word in command)


def shown(command):
    """The command as a person types it in the project's folder."""
    return join([os.path.relpath(word, ROOT) if word.startswith(ROOT + os.sep) else word for word in command])


def repeatable(command):
    return change_folder() + " && " + shown(command)


def change_folder():
    return ("cd /d " if WINDOWS else "cd ") + join([ROOT])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
