"""start.py: the Pythons it refuses, its stamp, and what it does with the .venv it finds. Nothing is installed here.

The steps themselves are those of groundup.env.install, and are tested there.
"""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from groundup.env import install, plan, probe

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "start.py").read_text(encoding="utf-8")
posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX permissions, signals or shell scripts")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start.py as a module whose project folder is an empty one with a space and Chinese characters in its name."""
    folder = tmp_path / "a b 中文"
    (folder / "src").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[project]\n")
    # start.py changes these when it is loaded; monkeypatch puts them back.
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("start_under_test", ROOT / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", str(folder))
    monkeypatch.setattr(module, "VENV", str(folder / ".venv"))
    monkeypatch.setattr(module, "STAMP", str(folder / ".venv" / "groundup-start.json"))
    monkeypatch.setenv("GROUNDUP_LANG", "en")
    monkeypatch.setattr(probe, "facts", lambda quick=False: plain_machine())
    return module


def plain_machine():
    return {
        "os": {
            "system": "Linux",
            "machine": "x86_64",
            "libc": "glibc 2.36",
            "wsl": False,
            "container": None,
            "jetson": False,
            "rosetta": False,
        },
        "python": {"version": "3.12.4", "implementation": "CPython", "bits": 64, "free_threaded": False},
        "nvidia": {"driver": None, "gpus": [], "problem": None, "on_bus": 0},
        "amd": {"gfx": [], "on_bus": 0},
        "apple": {"chip": None, "macos": None},
    }


def in_both(start, call):
    """What a call says in English and in Chinese."""
    said = {}
    for start.language in ("en", "zh"):
        try:
            said[start.language] = call()
        except (install.Refused, install.Failed) as error:
            said[start.language] = str(error)
    assert said["en"] != said["zh"]
    return said["en"], said["zh"]


def make_venv(start, *, stamp=None, config="home = /usr/bin\n", says=None):
    """A folder that looks like an environment; its Python is a shell script that prints `says`, with the torch that is in its folder."""
    venv = Path(start.VENV)
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(config, encoding="utf-8")
    if says is not None:
        site = venv / "lib" / "site-packages"
        site.mkdir(parents=True)
        (venv / "says.json").write_text(
            json.dumps(dict(says, site=str(site), scripts=str(venv / "bin"), prefix=str(venv))), encoding="utf-8"
        )
        program = venv / "bin" / "python"
        program.write_text(f"#!/bin/sh\ncat '{venv / 'says.json'}'\n", encoding="utf-8")
        program.chmod(0o755)
    if stamp is not None:
        Path(start.STAMP).write_text(json.dumps(stamp))
    return venv


HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
READY = {"version": HERE + ".1", "implementation": "CPython", "bits": 64, "free_threaded": False, "environment": "venv", "pip": True,
         "managed": False, "packages": {}, "torch": None}  # fmt: skip


def say_torch(start, version):
    """What the environment's Python says from now on: that this torch is in it, or none."""
    path = Path(start.VENV, "says.json")
    there = json.loads(path.read_text(encoding="utf-8"))
    torch = {"version": version, "distribution": version, "cuda": None, "hip": None} if version else None
    path.write_text(json.dumps(dict(there, torch=torch, packages={"torch": version} if version else {})), encoding="utf-8")


# --- the file itself -------------------------------------------------------------------------------------------------------------


def test_parses_on_old_pythons():
    ast.parse(SOURCE, feature_version=(3, 6))
    for path in (ROOT / "src" / "groundup" / "env").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_annotations_are_no_code_on_old_pythons():
    """`list[str]` parses on Python 3.8 and fails when it is evaluated."""
    for path in [ROOT / "src" / "groundup" / "__init__.py", *(ROOT / "src" / "groundup" / "env").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        annotated = any(isinstance(node, ast.AnnAssign) or getattr(node, "returns", None) for node in ast.walk(tree))
        assert not annotated or any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body), path.name


def test_is_standard_library_only():
    for path in [ROOT / "start.py", *(ROOT / "src" / "groundup" / "env").rglob("*.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        allowed = {*sys.stdlib_module_names, "groundup"} | ({"torch", "torchvision", "torchaudio"} if path.name == "verify.py" else set())
        assert names <= allowed, path.name


def test_python_range_is_the_one_of_the_project(start):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={start.dotted(start.OLDEST)},<{start.NEWEST[0]}.{start.NEWEST[1] + 1}"


# --- walls -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 1), (3, 15, 0)])
def test_wrong_python_is_named_with_the_way_out(start, monkeypatch, version):
    monkeypatch.setattr(start, "other_python", lambda: None)
    for said in in_both(start, lambda: start.python_refusal(version)):
        assert start.dotted(version) in said and "3.11" in said and "3.14" in said and "\n" in said
    monkeypatch.setattr(start, "other_python", lambda: ["python3.12"])
    monkeypatch.setattr(sys, "argv", ["start.py", "install"])
    for said in in_both(start, lambda: start.python_refusal(version)):
        assert said.endswith("python3.12 start.py install")
    assert start.python_refusal((3, 11, 0)) is None and start.python_refusal((3, 14, 2)) is None


def test_python_too_old_for_the_environment_stage_is_told_in_both_languages(start, monkeypatch, capsys):
    monkeypatch.setattr(start, "ENV_OLDEST", (9, 0))
    monkeypatch.setattr(start, "python_refusal", lambda version: start.say("english", "中文"))
    assert start.main(["install"]) == 2
    assert "english" in (err := capsys.readouterr().err) and "中文" in err


@posix
def test_another_python_counts_only_if_it_runs(start, monkeypatch, tmp_path):
    for name, body in (("python3.14", "echo switched off >&2; exit 127"), ("python3.13", "echo 3.13")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start.other_python() == ["python3.13"]


def test_refused_machine_ends_with_2_and_changes_nothing(start, monkeypatch, capsys):
    facts = plain_machine()
    facts["os"].update(system="Darwin", libc=None)
    monkeypatch.setattr(probe, "facts", lambda quick=False: facts)
    for name, words in (("en", "Intel Mac"), ("zh", "Intel 芯片 Mac")):
        assert start.main(["install", "--lang", name]) == 2
        assert words in capsys.readouterr().err
    assert not Path(start.VENV).exists()


# --- arguments -------------------------------------------------------------------------------------------------------------------


def test_arguments(start):
    options = start.parse(["test", "-k", "name", "--backend=cpu", "tests/env"])
    assert (options.command, options.backend, options.rest) == ("test", "cpu", ["-k", "name", "tests/env"])
    assert start.parse([]).command == "demo"
    assert start.parse(["install", "--backend", "auto"]).backend == "auto"


@pytest.mark.parametrize(
    ("arguments", "word"), [(["frob"], "frob"), (["--backend", "cu999"], "cu999"), (["install", "x"], "x"), (["--lang"], "--lang")]
)
def test_wrong_arguments_are_the_users_mistake(start, capsys, arguments, word):
    for name in ("en", "zh"):
        os.environ["GROUNDUP_LANG"] = name
        assert start.main(arguments) == 2
        assert word in (err := capsys.readouterr().err) and "--help" in err


def test_help_in_both_languages(start, capsys):
    assert start.main(["--help", "--lang", "en"]) == 0
    assert start.main(["--help", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert "usage:" in out and "用法" in out and out.count("cu130") == 2


def test_env_needs_no_installation(start, capsys, monkeypatch):
    monkeypatch.undo()  # the real facts
    assert start.main(["env", "info", "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == probe.SCHEMA


# --- .venv -----------------------------------------------------------------------------------------------------------------------


def test_foreign_folders_and_files_are_refused_and_kept(start, capsys):
    venv = Path(start.VENV)
    venv.mkdir()
    (venv / "thesis.txt").write_text("years of work")
    assert start.main(["install"]) == 2
    assert "was not made by this program" in capsys.readouterr().err
    assert (venv / "thesis.txt").read_text() == "years of work"


@posix
def test_broken_environment_is_rebuilt(start, monkeypatch, capsys):
    venv = make_venv(start)
    (venv / "old").write_text("")
    commands = record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    assert not (venv / "old").exists()
    assert "Rebuilding .venv" in capsys.readouterr().out
    assert commands[0][-3:] == ["-m", "venv", start.VENV]


# --- the stamp -------------------------------------------------------------------------------------------------------------------


def record_steps(start, monkeypatch):
    """Replaces what installs by what leaves the same traces; returns the list of commands that would have run."""
    commands = []

    def step(title, command, cwd, explain=None):
        commands.append(command)
        if "venv" in command:
            make_venv(start, says=READY)
        if any(word.startswith("torch==") for word in command):
            say_torch(start, plan.TORCH + "+cpu")
        if "-e" in command:
            (Path(start.VENV) / "lib" / "site-packages" / "groundup-0.1.0.dist-info").mkdir(exist_ok=True)
        return json.dumps({"torch": plan.TORCH, "device": "cpu", "device_name": None, "matmul_error": 1e-5, "gradient_error": 1e-6})

    monkeypatch.setattr(install, "step", step)
    monkeypatch.setattr(install, "index_answers", lambda url: True)
    monkeypatch.setattr(install, "check_disk", lambda folder, needed: None)
    return commands


@posix
def test_second_start_does_nothing(start, monkeypatch, capsys):
    commands = record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    assert [any(word in command for word in ("venv", f"torch=={plan.TORCH}", "-e", "--device")) for command in commands] == [True] * 4
    commands.clear()
    assert start.main(["install"]) == 0
    assert commands == [] and "nothing to do" in capsys.readouterr().out


@posix
@pytest.mark.parametrize("change", ["pyproject", "extras", "torch gone", "groundup gone", "half a stamp"])
def test_what_changed_is_installed_again_and_no_more(start, monkeypatch, change):
    commands = record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    commands.clear()
    if change == "pyproject":
        Path(start.ROOT, "pyproject.toml").write_text("[project]\nname = 'x'\n")
    elif change == "torch gone":
        say_torch(start, None)
    elif change == "groundup gone":
        (Path(start.VENV) / "lib" / "site-packages" / "groundup-0.1.0.dist-info").rmdir()
    elif change == "half a stamp":
        Path(start.STAMP).write_text('{"schema": 1, ')
    monkeypatch.setattr(start, "run_checks", lambda rest: 0)
    assert start.main(["test" if change == "extras" else "install"]) == 0
    words = [word for command in commands for word in command]
    assert "venv" not in words and "--device" in words
    assert (f"torch=={plan.TORCH}" in words) == (change == "torch gone")
    assert (".[dev]" in words) == (change == "extras")
    if change == "extras":
        commands.clear()
        assert start.main(["install"]) == 0  # the development tools stay
        assert commands == []


@posix
def test_asked_backend_is_remembered(start, monkeypatch):
    record_steps(start, monkeypatch)
    assert start.main(["install", "--backend", "cpu"]) == 0
    assert start.read_stamp()["backend_asked"] == "cpu"
    assert start.main(["install"]) == 0
    assert start.read_stamp()["backend_asked"] == "cpu"
    assert start.main(["install", "--backend", "auto"]) == 0
    assert start.read_stamp()["backend_asked"] == "auto"


@posix
def test_unfinished_installation_leaves_no_stamp(start, monkeypatch):
    record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    Path(start.ROOT, "pyproject.toml").write_text("[project]\nname = 'x'\n")

    def fail(plan, python, cwd, package):
        raise install.Failed("torch does not compute")

    monkeypatch.setattr(install, "verify", fail)
    assert start.main(["install"]) == 1
    assert not Path(start.STAMP).exists()


def test_failing_pip_ends_with_1(start, monkeypatch, capsys):
    record_steps(start, monkeypatch)

    def fail(title, command, cwd, explain=None):
        raise install.Failed("this step failed")

    monkeypatch.setattr(install, "step", fail)
    assert start.main(["install"]) == 1
    assert "this step failed" in capsys.readouterr().err


def test_checks_stop_at_the_first_failure_and_end_with_pytest(start, monkeypatch, capsys):
    ran = []

    def foreground(command, status):
        ran.append(command[2:])
        return status

    monkeypatch.setattr(start, "foreground", lambda command: foreground(command, 0))
    assert start.run_checks(["-x"]) == 0
    side_by_side = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    assert ran == [["ruff", "check", "."], ["mypy"], ["pytest", *side_by_side, "-x"]]
    assert capsys.readouterr().out.splitlines()[-1].endswith("worksteal -x")
    ran.clear()
    monkeypatch.setattr(start, "foreground", lambda command: foreground(command, 1))
    for said in in_both(start, lambda: start.run_checks([])):
        assert "ruff" in said
    assert ran == [["ruff", "check", "."]] * 2


def test_demo_passes_its_status_on(start, monkeypatch):
    monkeypatch.setattr(start, "install", lambda options: None)
    monkeypatch.setattr(start, "foreground", lambda command: 3)
    assert start.main([]) == 3


def test_ctrl_c_is_one_line_and_130(start, monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "install", interrupt)
    for name, words in (("en", "Ctrl-C"), ("zh", "再次运行")):
        assert start.main(["install", "--lang", name]) == 130
        err = capsys.readouterr().err
        assert words in err and len(err.strip().splitlines()) == 1


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_a_running_step(tmp_path, number, status):
    """The real program, interrupted while a (pretended) environment is being made: it ends the child and says so."""
    program = tmp_path / "drive.py"
    program.write_text(
        "import importlib.util, os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        f"spec = importlib.util.spec_from_file_location('start', {str(ROOT / 'start.py')!r})\n"
        "start = importlib.util.module_from_spec(spec); spec.loader.exec_module(start)\n"
        'code = \'import os, time; print(os.getpid(), flush=True); open("pid", "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "start.ROOT = os.getcwd()\n"
        "start.install = lambda options: start.steps.step('sleeping', [sys.executable, '-c', code], start.ROOT)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "sys.exit(start.main(['install']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(program)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, number)
    child.communicate(timeout=30)
    assert child.returncode == status
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
