"""start.py: the walls it knows, its stamp, and what it does with the .venv it finds. Nothing is installed here."""

import ast
import errno
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

from groundup.env import choose, probe

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "start.py").read_text(encoding="utf-8")
posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX permissions, signals or shell scripts")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start.py as a module whose project folder is an empty one with a space and Chinese characters in its name."""
    folder = tmp_path / "a b 中文"
    (folder / "src").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[project]\n")
    spec = importlib.util.spec_from_file_location("start_under_test", ROOT / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", str(folder))
    monkeypatch.setattr(module, "VENV", str(folder / ".venv"))
    monkeypatch.setattr(module, "STAMP", str(folder / ".venv" / "groundup-start.json"))
    # main() changes these; monkeypatch puts them back.
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(sys, "path", list(sys.path))
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
        except (start.Refused, start.Failed) as error:
            said[start.language] = str(error)
    assert said["en"] != said["zh"]
    return said["en"], said["zh"]


def make_venv(start, *, stamp=None, config="home = /usr/bin\n", python=None):
    """A folder that looks like an environment; its Python is a shell script that prints `python`."""
    venv = Path(start.VENV)
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(config, encoding="utf-8")
    if python is not None:
        program = venv / "bin" / "python"
        program.write_text(f"#!/bin/sh\necho '{python}'\n")
        program.chmod(0o755)
    if stamp is not None:
        Path(start.STAMP).write_text(json.dumps(stamp))
    return venv


HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


# --- the file itself -------------------------------------------------------------------------------------------------------------


def test_parses_on_old_pythons():
    ast.parse(SOURCE, feature_version=(3, 6))
    for path in (ROOT / "src" / "groundup" / "env").glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_is_standard_library_only():
    for path in [ROOT / "start.py", *(ROOT / "src" / "groundup" / "env").glob("*.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        allowed = {*sys.stdlib_module_names, "groundup"} | ({"torch"} if path.name == "verify.py" else set())
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


def test_missing_venv_package(start, monkeypatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    monkeypatch.setattr(start, "is_debian", lambda: True)
    for said in in_both(start, start.check_venv_module):
        assert f"sudo apt install python{HERE}-venv" in said
    monkeypatch.setattr(start, "is_debian", lambda: False)
    for said in in_both(start, start.check_venv_module):
        assert "ensurepip" in said and "apt" not in said


def test_read_only_folder(start, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(start.tempfile, "TemporaryFile", refuse)
    for said in in_both(start, lambda: start.check_folder("/some/folder")):
        assert "/some/folder" in said and "Read-only file system" in said


def test_small_disk(start, monkeypatch):
    monkeypatch.setattr(start.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1.2e9}))
    for said in in_both(start, lambda: start.check_disk(8.0)):
        assert "1.2 GB" in said and "8.0 GB" in said
    start.check_disk(1.0)


def test_refused_machine_ends_with_2_and_changes_nothing(start, monkeypatch, capsys):
    facts = plain_machine()
    facts["os"].update(system="Darwin", libc=None)
    monkeypatch.setattr(probe, "facts", lambda quick=False: facts)
    for name, words in (("en", "Intel Mac"), ("zh", "Intel 芯片的 Mac")):
        assert start.main(["install", "--lang", name]) == 2
        assert words in capsys.readouterr().err
    assert not Path(start.VENV).exists()


@pytest.mark.parametrize(
    ("output", "en", "zh"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full", "磁盘已满"),
        ("OSError: [Errno 30] Read-only file system: '/x'", "read-only", "只读"),
        ("PermissionError: [Errno 13] Permission denied", "no permission", "没有写权限"),
        ("The virtual environment was not created because ensurepip is not available.", "-venv", "-venv"),
        ("HINT: this system does not have Windows Long Path support enabled", "long paths", "长路径"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT", "PIP_CERT"),
        ("NewConnectionError: Failed to establish a new connection: [Errno -2] Name or service not known", "network", "网络"),
        # The extra index that is away is only a warning when the disk is what failed.
        (
            "WARNING: Retrying after NewConnectionError: connection refused\nERROR: [Errno 28] No space left on device",
            "disk is full",
            "磁盘已满",
        ),
        ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)", "network", "网络"),
        ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 2.9.0)", HERE, HERE),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "damaged", "损坏"),
    ],
)
def test_known_causes(start, output, en, zh):
    said = in_both(start, lambda: start.known_cause(1, output))
    assert en in said[0] and zh in said[1]


def test_causes_by_status_and_unknown_ones(start):
    assert "memory" in start.known_cause(-9, "")
    assert start.known_cause(1, "something else") is None


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
    assert start.venv_state()[0] == "missing"  # an empty folder is no obstacle
    (venv / "thesis.txt").write_text("years of work")
    for said in in_both(start, lambda: start.venv_state()[1]):
        assert "pyvenv.cfg" in said
    assert start.main(["install"]) == 2
    assert "was not made by this program" in capsys.readouterr().err
    assert (venv / "thesis.txt").read_text() == "years of work"
    (venv / "thesis.txt").unlink()
    venv.rmdir()
    venv.write_text("a file")
    assert start.venv_state()[0] == "foreign"


@posix
@pytest.mark.parametrize(
    ("made", "state", "words"),
    [
        ({"python": f"{HERE} True True"}, "ready", ""),
        ({}, "broken", "missing"),
        ({"python": "3.1 True True"}, "broken", "Python 3.1"),
        ({"python": f"{HERE} True False"}, "broken", "unfinished"),
        ({"python": f"{HERE} True True", "stamp": {"location": "/elsewhere/.venv"}}, "broken", "moved"),
        ({"python": f"{HERE} True True", "config": "command = /usr/bin/python3 -m venv /elsewhere/.venv\n"}, "broken", "moved"),
    ],
)
def test_state_of_the_environment(start, made, state, words):
    make_venv(start, **made)
    found, why = start.venv_state()
    assert found == state and words in why


@posix
def test_link_to_a_broken_environment_is_not_followed(start, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "pyvenv.cfg").write_text("home = /nowhere\n")
    Path(start.VENV).symlink_to(real)
    assert start.venv_state()[0] == "foreign"


def test_where_a_venv_was_made(start, tmp_path):
    config = tmp_path / "pyvenv.cfg"
    config.write_text("home = /usr/bin\ncommand = /usr/bin/python3 -m venv /a b/中文/.venv\n", encoding="utf-8")
    assert start.venv_made_at(str(config)) == "/a b/中文/.venv"
    config.write_text("home = /usr/bin\n")
    assert start.venv_made_at(str(config)) is None


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

    def step(title, command, explain=None):
        commands.append(command)
        if "venv" in command:
            make_venv(start, python=f"{HERE} True True")
        if any(word.startswith("torch==") for word in command):
            site = start.site_packages()
            (site / "torch").mkdir(parents=True, exist_ok=True)
            (site / "torch" / "version.py").write_text(f"__version__ = '{choose.TORCH}+cpu'\n")
            (site / f"torch-{choose.TORCH}+cpu.dist-info").mkdir(exist_ok=True)
            (site / f"torch-{choose.TORCH}+cpu.dist-info" / "RECORD").write_text("")
        if "-e" in command:
            (start.site_packages() / "groundup-0.1.0.dist-info").mkdir(exist_ok=True)
        return json.dumps({"torch": choose.TORCH, "device": "cpu", "device_name": None, "matmul_error": 1e-5, "gradient_error": 1e-6})

    monkeypatch.setattr(start, "step", step)
    monkeypatch.setattr(start, "index_answers", lambda url: True)
    monkeypatch.setattr(start, "check_disk", lambda needed: None)
    return commands


@posix
def test_second_start_does_nothing(start, monkeypatch, capsys):
    commands = record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    assert [any(word in command for word in ("venv", f"torch=={choose.TORCH}", "-e", "--device")) for command in commands] == [True] * 4
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
        next(start.site_packages().glob("torch-*/RECORD")).unlink()
    elif change == "groundup gone":
        next(start.site_packages().glob("groundup-*")).rmdir()
    elif change == "half a stamp":
        Path(start.STAMP).write_text('{"schema": 1, ')
    monkeypatch.setattr(start, "run_checks", lambda rest: 0)
    assert start.main(["test" if change == "extras" else "install"]) == 0
    words = [word for command in commands for word in command]
    assert "venv" not in words and "--device" in words
    assert (f"torch=={choose.TORCH}" in words) == (change == "torch gone")
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
    assert start.read_stamp()["backend_asked"] is None


@posix
def test_unfinished_installation_leaves_no_stamp(start, monkeypatch):
    record_steps(start, monkeypatch)
    assert start.main(["install"]) == 0
    Path(start.ROOT, "pyproject.toml").write_text("[project]\nname = 'x'\n")

    def fail(choice):
        raise start.Failed("torch does not compute")

    monkeypatch.setattr(start, "verify", fail)
    assert start.main(["install"]) == 1
    assert not Path(start.STAMP).exists()


@posix
def test_index_that_is_away_costs_no_retries(start, monkeypatch, capsys):
    commands = record_steps(start, monkeypatch)
    monkeypatch.setattr(start, "index_answers", lambda url: False)
    assert start.main(["install"]) == 0
    (command,) = [command for command in commands if f"torch=={choose.TORCH}" in command]
    assert command[command.index("--retries") + 1] == "0" and "--extra-index-url" in command
    assert "does not answer" in capsys.readouterr().out


# --- steps -----------------------------------------------------------------------------------------------------------------------


def test_step_shows_command_and_duration(start, capsys):
    assert start.step("Saying hello", [sys.executable, "-c", "print('hello')"]) == "hello"
    out = capsys.readouterr().out
    assert "Saying hello" in out and "$ " in out and "done in" in out
    assert "\nhello" not in out  # the output of a step that went well is not shown


def test_failing_step_names_cause_and_command(start):
    code = "import sys; print('Collecting torch'); print('ERROR: [Errno 28] No space left on device', file=sys.stderr); sys.exit(3)"
    english, chinese = in_both(start, lambda: start.step("title", [sys.executable, "-c", code]))
    for said in (english, chinese):
        assert "\n    ERROR: [Errno 28] No space left on device\n" in said and "\n    Collecting" not in said
        assert said.splitlines()[-1].endswith(start.join([code])) and start.join([start.ROOT]) in said
    assert "status 3" in english and "disk is full" in english and "磁盘已满" in chinese


def test_failing_pip_ends_with_1(start, monkeypatch, capsys):
    record_steps(start, monkeypatch)

    def fail(title, command, explain=None):
        raise start.Failed("this step failed")

    monkeypatch.setattr(start, "step", fail)
    assert start.main(["install"]) == 1
    assert "this step failed" in capsys.readouterr().err


def test_verification_that_fails_says_what_to_try(start, monkeypatch):
    monkeypatch.setattr(
        start, "captured", lambda command: (1, json.dumps({"torch": "2.13.0+cpu", "device": "cuda", "error": "no kernel image"}))
    )
    choice = choose.choose_build(plain_machine())
    for said in in_both(start, lambda: start.verify(choice)):
        assert "no kernel image" in said and "--backend" in said


def test_meaningful_lines(start):
    output = "Collecting x\nWARNING: Retrying (error)\n\nERROR: one\nERROR: two\n[notice] A new release of pip\n"
    assert start.meaningful_lines(output) == ["ERROR: one", "ERROR: two"]
    assert start.meaningful_lines("a\nb\n") == ["a", "b"]


def test_children_are_not_led_astray(start, monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    environment = start.child_environment()
    assert not {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"} & set(environment)
    assert environment["PIP_USER"] == "0" and environment["HTTPS_PROXY"] == "http://proxy.example:3128"


def test_checks_stop_at_the_first_failure_and_end_with_pytest(start, monkeypatch, capsys):
    ran = []

    def foreground(command, status):
        ran.append(command[2:])
        return status

    monkeypatch.setattr(start, "foreground", lambda command: foreground(command, 0))
    assert start.run_checks(["-x"]) == 0
    assert ran == [["ruff", "check", "."], ["mypy"], ["pytest", "-x"]]
    assert capsys.readouterr().out.splitlines()[-1].endswith("-m pytest -x")
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
        "start.install = lambda options: start.step('sleeping', [sys.executable, '-c', code])\n"
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
