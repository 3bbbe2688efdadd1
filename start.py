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
import json
import os
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "groundup-start.json")
WINDOWS = os.name == "nt"
OLDEST, NEWEST = (3, 11), (3, 14)  # requires-python in pyproject.toml
ENV_OLDEST = (3, 8)  # what groundup.env runs on
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
REST_GB = 0.8  # what is left to install when torch is already there

if sys.version_info[:2] >= ENV_OLDEST:
    # A clone must not be littered with bytecode of whatever Python was tried first.
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.join(ROOT, "src"))
    from groundup.env.language import pick

    if sys.argv[1:2] != ["env"]:  # which loads what it needs by itself, and answers at once
        from groundup.env import install as installing
        from groundup.env import plan as planning
        from groundup.env import steps
        from groundup.env.layout import shown
        from groundup.env.steps import Failed, Refused

language = "en"


def say(en, zh):
    return zh if language == "zh" else en


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

    language = pick(option_value(argv, "--lang"))
    # The demo, and whatever else is started, speaks the same language.
    os.environ["GROUNDUP_LANG"] = language
    if argv[:1] == ["env"]:
        from groundup.env.cli import main as env_main

        return env_main(argv[1:])
    began = time.time()
    try:
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
    options, words = Options(), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            options.help = True
        elif name in ("--lang", "--backend"):
            if not equals:
                value = words.pop(0) if words else ""
            allowed = ("en", "zh") if name == "--lang" else ["auto"] + planning.backends(planning.OLDEST)
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
    ).format(", ".join(planning.backends(planning.OLDEST)))


def install(options):
    """Everything up to a verified .venv; returns at once when an earlier start did all of it."""
    refusal = python_refusal(sys.version_info)
    if refusal:
        raise Refused(refusal)
    stamp = read_stamp()
    backend = options.backend or stamp.get("backend_asked") or "auto"
    state, why, there = installing.venv_state(VENV, stamp.get("location"), dotted(sys.version_info[:2]))
    facts = installing.facts_for(there if state == "ready" else None)
    plan = planning.make_plan(facts, backend=backend, upgrade=True, oldest=planning.OLDEST)
    if plan.refused:
        raise Refused(plan.refused[language])
    if state == "foreign":
        raise Refused(why)
    extras = ["dev"] if options.command == "test" else []
    wanted = make_stamp(plan, backend, sorted(set(extras) | set(stamp.get("extras", []))))
    torch = facts["torch"]
    if plan.fits(torch) and stamp_matches(stamp, wanted, there["site"]):
        print(
            say(
                "Environment: torch {0} for {1}, installed and verified on {2}; nothing to do.",
                "环境：torch {0}（{1}），已于 {2} 安装并验证，无需再做。",
            ).format(torch["version"], plan.backend, stamp.get("verified_on", "?")),
            flush=True,
        )
        return

    installing.check_folder(ROOT)
    installing.check_disk(ROOT, REST_GB if plan.fits(torch) else plan.disk_gb)
    print(say("torch build: {0} ({1})", "torch 构建：{0}（{1}）").format(plan.backend, plan.reason[language]), flush=True)
    if state == "broken":
        remove_venv(why)
    if state != "ready":
        installing.make_venv(VENV, ROOT)
    elif not stamp:
        print(
            say("Found a .venv without a finished installation: continuing with it.", "发现未完成安装的 .venv，在其基础上继续。"),
            flush=True,
        )
    if os.path.exists(STAMP):
        os.remove(STAMP)  # from here on nothing is certain until the verification has passed

    python = installing.venv_python(VENV)
    with installing.kept(there if state == "ready" else None):
        if plan.fits(torch):
            print(say("torch {0} is already there: kept.", "torch {0} 已安装，予以保留。").format(torch["version"]), flush=True)
        else:
            installing.install_torch(plan, python, ROOT)
        target = ".[{}]".format(",".join(wanted["extras"])) if wanted["extras"] else "."
        installing.step(
            say("Installing groundup and what it needs", "安装 groundup 及其依赖"), installing.pip(python, "install", "-e", target), ROOT
        )
        installing.verify(plan, python, ROOT, "groundup")
    write_stamp(wanted)


def run_demo():
    command = [installing.venv_python(VENV), "-m", "groundup", "demo"]
    print("\n$ " + typed(command), flush=True)
    return foreground(command)


def run_checks(pytest_arguments):
    """ruff, mypy, pytest. Nothing is printed after pytest: its own closing line is the last."""
    for tool in (["ruff", "check", "."], ["mypy"], ["pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"] + pytest_arguments):
        command = [installing.venv_python(VENV), "-m"] + tool
        print("\n$ " + typed(command), flush=True)
        began = time.time()
        status = foreground(command)
        if tool[0] == "pytest":
            return DONE if status == 0 else FAILED
        if status != 0:
            raise Failed(
                say("{0} found problems (status {1}).\n  To repeat: {2}", "{0} 未通过（状态 {1}）。\n  重复此步：{2}").format(
                    tool[0], status, steps.repeatable(command, ROOT)
                )
            )
        print(say("  done in {0:.1f} s", "  完成，用时 {0:.1f} 秒").format(time.time() - began), flush=True)
    return DONE


def print_next_steps(seconds):
    print(say("\nReady in {0:.1f} s. Next:", "\n已就绪，用时 {0:.1f} 秒。接下来：").format(seconds))
    activate = ".venv\\Scripts\\activate" if WINDOWS else "source .venv/bin/activate"
    program = ".venv\\Scripts\\groundup" if WINDOWS else ".venv/bin/groundup"
    if os.path.realpath(os.getcwd()) != os.path.realpath(ROOT):
        print("  " + steps.change_folder(ROOT))
    print(
        "  {0:<28}{1}".format(
            program + " demo", say("# the whole path on real handwriting, less than 2 minutes", "# 用真实手写数字走完全程，不到 2 分钟")
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
        lines.append(say("A suitable one is here. Run: ", "本机有合适的版本，请运行：") + " ".join(other + ["start.py"] + sys.argv[1:]))
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
    if os.path.exists("/etc/debian_version"):
        return say(
            "sudo apt install python3.11 python3.11-venv   (where apt does not know it: uv python install 3.13)",
            "sudo apt install python3.11 python3.11-venv   （apt 中没有时：uv python install 3.13）",
        )
    return say(
        "your package manager (for example: sudo dnf install python3.12), or: uv python install 3.13",
        "使用系统的软件包管理器（例如：sudo dnf install python3.12），或：uv python install 3.13",
    )


def remove_venv(why):
    print(say("Rebuilding .venv: {0}.", "重新建立 .venv：{0}。").format(why), flush=True)
    if WINDOWS and os.path.realpath(sys.prefix) == os.path.realpath(VENV):
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


# --- the stamp: what an earlier start has finished -------------------------------------------------------------------------------


def make_stamp(plan, backend_asked, extras):
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as project:
        digest = hashlib.sha256(project.read()).hexdigest()
    return {
        "schema": 1,
        "location": VENV,
        "python": dotted(sys.version_info[:2]),
        "pyproject_sha256": digest,
        "torch": [plan.torch_version, plan.backend],
        "device": plan.device,
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


def stamp_matches(stamp, wanted, site):
    """True when everything wanted now was finished then, and groundup is still installed from here."""
    installed = any(name.startswith("groundup-") and name.endswith(".dist-info") for name in os.listdir(site))
    return installed and all(stamp.get(key) == value for key, value in wanted.items())


def write_stamp(stamp):
    # Written whole or not at all: half a stamp must not vouch for half an installation.
    with open(STAMP + ".new", "w", encoding="utf-8") as target:
        json.dump(dict(stamp, verified_on=time.strftime("%Y-%m-%d")), target, indent=1)
    os.replace(STAMP + ".new", STAMP)


# --- commands that own the terminal ----------------------------------------------------------------------------------------------


def foreground(command):
    """The exit status of a command that owns the terminal. Ctrl-C is its business first: it may have something to save."""
    child = subprocess.Popen(command, cwd=ROOT, env=steps.child_environment())
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
            steps.end(child)
            raise
    if interrupted or status == -signal.SIGINT:
        raise KeyboardInterrupt
    # A command ended by signal 9 has status -9 here; a shell would say 128 + 9.
    return 128 - status if status < 0 else status


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


def typed(command):
    """The command as a person types it in the project's folder."""
    return shown([steps.relative(word, ROOT) for word in command], WINDOWS)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
