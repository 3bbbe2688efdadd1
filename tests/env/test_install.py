"""env install: what it does to a real environment with real (tiny) wheels, what it refuses, and the way back from every failure."""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from groundup.env import install, plan, probe, steps
from groundup.env.constraints import installed_versions

posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX permissions, signals or shell scripts")
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
FACTS = {
    "os": {
        "system": "Linux",
        "machine": "x86_64",
        "libc": "glibc 2.36",
        "wsl": False,
        "container": None,
        "jetson": False,
        "rosetta": False,
    },
    "python": {"version": "3.12.4", "implementation": "CPython", "bits": 64, "free_threaded": False, "environment": "system"},
    "nvidia": {"driver": None, "gpus": [], "problem": None, "on_bus": 0},
    "amd": {"gfx": [], "on_bus": 0},
    "apple": {"chip": None, "macos": None},
    "torch": None,
    "packages": [],
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No index, no configuration of pip, no GPU of the machine that runs the tests."""
    for name in [name for name in os.environ if name.startswith("PIP_")] + ["VIRTUAL_ENV", "CONDA_PREFIX", "GROUNDUP_TORCH_INDEX"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(probe, "facts", lambda: json.loads(json.dumps(FACTS)))


def wheel(folder, name, version, **files):
    """A real wheel of one package with these modules."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/__init__.py": "", f"{name}/version.py": f"__version__ = '{version}'\n", **files}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name}run = {name}:main\n"
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as target:
        for path, content in {**files, f"{info}/RECORD": record}.items():
            target.writestr(path, content)


@pytest.fixture
def environment(tmp_path):
    """A venv that borrows the pip of the tests' own environment: made in a moment, where ensurepip takes ten seconds."""
    folder = tmp_path / "my env 中文"
    venv.create(folder, with_pip=False)
    site = Path(install.ask(install.venv_python(str(folder)))["site"])
    own = Path(sysconfig.get_path("purelib"))
    for item in [own / "pip", *own.glob("pip-*.dist-info")]:
        (site / item.name).symlink_to(item)
    return folder


@pytest.fixture
def old(environment, tmp_path):
    """The same with torch 2.8.0 in it."""
    wheel(tmp_path / "old wheels", "torch", "2.8.0", **{"torch/treasure.py": "x = 1\n"})
    command = install.pip(
        install.venv_python(str(environment)), "install", "-q", "--no-index", "--find-links", "old wheels", "torch==2.8.0"
    )
    subprocess.run(command, check=True, cwd=tmp_path)
    return environment


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
    }


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lang")
    install.configure(parser)
    status = install.run(parser.parse_args(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def torch_in(folder):
    return (install.ask(install.venv_python(str(folder))) or {})["packages"].get("torch")


# --- installing ------------------------------------------------------------------------------------------------------------------


@posix
def test_installs_from_a_folder_and_the_second_run_has_nothing_to_do(capsys, environment, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "verify", lambda plan, python, cwd: {"ok": True})
    wheel(tmp_path / "wheels", "torch", "2.9.1")
    words = ("--venv", str(environment), "--torch", "2.9.1", "--find-links", "wheels")
    status, out, _ = run(capsys, *words, "--json")
    answer = json.loads(out)
    assert (status, answer["status"], torch_in(environment)) == (0, 0, "2.9.1")
    assert answer["plan"]["torch"] == "2.9.1" and answer["verify"] == {"ok": True}
    monkeypatch.setattr(install, "install_torch", lambda *rest: pytest.fail("nothing was to do"))
    status, out, _ = run(capsys, *words)
    assert status == 0 and "nothing to do" in out
    assert not (environment / install.BACKUP).exists()


@posix
def test_upgrade_replaces_and_leaves_no_backup(capsys, old, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "verify", lambda plan, python, cwd: {"ok": True})
    wheel(tmp_path / "wheels", "torch", "2.9.1")
    assert run(capsys, "--venv", str(old), "--torch", "2.9.1", "--find-links", "wheels")[0] == 0
    assert torch_in(old) == "2.9.1" and not list(old.rglob("treasure.py")) and not (old / install.BACKUP).exists()


def test_a_new_environment_is_made(capsys, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(install, "step", lambda title, command, cwd, explain=None: made.append(command) or "{}")
    monkeypatch.setattr(install, "verify", lambda plan, python, cwd: {"ok": True})
    monkeypatch.setattr(install, "index_answers", lambda url: True)
    status, out, _ = run(capsys, "--venv", "new")
    folder = str(tmp_path / "new")
    assert status == 0 and made[0][1:] == ["-I", "-m", "venv", folder]
    assert made[1][0] == install.venv_python(folder) and f"torch=={plan.TORCH}" in made[1]
    assert "To use it: " in out
    made.clear()
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/uv")
    assert run(capsys, "--venv", "new", "--manager", "uv")[0] == 0
    assert made[0][:2] == ["uv", "venv"] and made[1][:5] == ["uv", "pip", "install", "--python", install.venv_python(folder)]


def test_the_active_environment_is_the_default(monkeypatch):
    options = argparse.Namespace(venv=None, system=False)
    folder, python, there = install._target(options)
    if there["environment"] == "venv":
        assert (folder, python) == (None, sys.executable)
    outside = dict(there, environment="system")
    monkeypatch.setattr(install, "ask", lambda python: outside)
    assert install._target(options)[0] == str(Path(".venv").absolute())
    monkeypatch.setenv("VIRTUAL_ENV", str(Path("active").absolute()))
    assert install._target(options)[0] == str(Path("active").absolute())


def test_index_that_is_away_costs_no_retries(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(install, "step", lambda title, command, cwd, explain=None: commands.append(command))
    monkeypatch.setattr(install, "index_answers", lambda url: False)
    install.install_torch(plan.make_plan(FACTS), "python", ".")
    install.install_torch(plan.make_plan(FACTS, manager="uv"), "python", ".")
    assert commands[0][commands[0].index("--retries") + 1] == "0" and "--extra-index-url" in commands[0]
    assert "--retries" not in commands[1]  # uv has none
    assert "does not answer" in capsys.readouterr().out


def test_index_answers_within_its_time():
    assert install.index_answers("http://127.0.0.1:9") is False
    assert install.index_answers("no address") is False


# --- the way back ----------------------------------------------------------------------------------------------------------------


@posix
def test_torch_that_does_not_compute_is_taken_back(capsys, old, tmp_path):
    """The tiny torch installs, and the real verification fails on it."""
    wheel(tmp_path / "wheels", "torch", "2.9.1", **{"torch/new.py": ""})
    before = content(old)
    status, out, err = run(capsys, "--venv", str(old), "--torch", "2.9.1", "--find-links", "wheels")
    assert status == 1 and "does not compute" in err and "as it was before" in out
    assert content(old) == before and torch_in(old) == "2.8.0"


@posix
def test_missing_wheel_changes_nothing(capsys, old, tmp_path):
    (tmp_path / "wheels").mkdir()
    before = content(old)
    status, _, err = run(capsys, "--venv", str(old), "--torch", "2.9.1", "--find-links", "wheels")
    assert status == 1 and "do not have this version" in err
    assert content(old) == before


@posix
@pytest.mark.parametrize("reason", [KeyboardInterrupt, install.Failed("disk full")])
def test_half_an_installation_is_put_back(capsys, old, monkeypatch, reason):
    def break_off(plan, python, cwd):
        site = Path(install.ask(python)["site"])
        shutil.rmtree(site / "torch")
        (site / "half").mkdir()
        (site / "half" / "new.py").write_text("")
        (old / "bin" / "torchrun").unlink()
        raise reason

    before = content(old)
    monkeypatch.setattr(install, "install_torch", break_off)
    status, _, err = run(capsys, "--venv", str(old), "--upgrade")
    assert status == (130 if reason is KeyboardInterrupt else 1)
    assert content(old) == before and not (old / install.BACKUP).exists() and not list(old.rglob("half"))
    assert ("Ctrl-C" in err) == (status == 130)


@posix
def test_what_a_killed_run_left_is_the_state_that_counts(old):
    there = install.ask(install.venv_python(str(old)))
    site = Path(there["site"])
    kept = install.kept(there)
    kept.__enter__()  # and the process is gone: nothing is put back
    shutil.rmtree(site / "torch")
    with pytest.raises(install.Failed), install.kept(there):
        raise install.Failed
    assert (site / "torch" / "treasure.py").read_text() == "x = 1\n"
    # Half a backup vouches for nothing.
    (old / install.BACKUP / "site").mkdir(parents=True)
    with pytest.raises(install.Failed), install.kept(there):
        raise install.Failed
    assert (site / "torch" / "treasure.py").exists()


@posix
def test_links_in_an_environment_stay_links(old, tmp_path):
    there = install.ask(install.venv_python(str(old)))
    site = Path(there["site"])
    (tmp_path / "elsewhere").mkdir()
    (site / "folder link").symlink_to(tmp_path / "elsewhere")
    (site / "dead link").symlink_to(tmp_path / "absent")
    with pytest.raises(install.Failed), install.kept(there):
        (site / "folder link").unlink()
        (site / "dead link").unlink()
        raise install.Failed
    assert (site / "folder link").is_symlink() and (site / "dead link").is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_without_hard_links_it_is_said(monkeypatch, capsys, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "file").write_text("")
    there = {
        "environment": "venv",
        "packages": {"torch": "2.8.0"},
        "prefix": str(tmp_path),
        "site": str(tmp_path / "site"),
        "scripts": str(tmp_path),
    }

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(install.os, "link", refuse)
    with install.kept(there):
        pass
    assert "no hard links" in capsys.readouterr().out and not (tmp_path / install.BACKUP).exists()


# --- refusals --------------------------------------------------------------------------------------------------------------------


def test_full_disk_is_refused_before_anything_is_made(capsys, monkeypatch):
    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1.2e9}))
    for name, words in (("en", "1.2 GB"), ("zh", "1.2 GB")):
        status, _, err = run(capsys, "--venv", "new", "--lang", name)
        assert status == 2 and words in err
    assert not Path("new").exists()


def test_dry_run_does_nothing(capsys):
    status, out, _ = run(capsys, "--venv", "new", "--dry-run")
    assert status == 0 and "--dry-run" in out and f"torch=={plan.TORCH}" in out and not Path("new").exists()


def test_refused_plan_and_foreign_folders(capsys):
    assert run(capsys, "--venv", "new", "--backend", "cu999")[0] == 2
    Path("thesis").mkdir()
    Path("thesis", "chapter.txt").write_text("years of work")
    status, _, err = run(capsys, "--venv", "thesis")
    assert status == 2 and "pyvenv.cfg" in err and "thesis" in err
    Path("broken").mkdir()
    Path("broken", "pyvenv.cfg").write_text("home = /nowhere\n")
    status, _, err = run(capsys, "--venv", "broken")
    assert status == 2 and "is broken" in err and Path("broken", "pyvenv.cfg").exists()


def test_the_systems_python_is_left_alone(capsys, monkeypatch):
    there = dict(install.ask(sys.executable), environment="system", managed=True)
    monkeypatch.setattr(install, "ask", lambda python: there)
    status, _, err = run(capsys, "--system")
    assert status == 2 and "belongs to the system" in err


def test_conda_and_a_missing_uv(capsys, monkeypatch):
    status, _, err = run(capsys, "--venv", "new", "--manager", "conda")
    assert status == 2 and "conda install -c conda-forge" in err
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    status, _, err = run(capsys, "--venv", "new", "--manager", "uv")
    assert status == 2 and "uv is not here" in err


def test_environment_without_pip(capsys):
    venv.create("bare", with_pip=False)
    status, _, err = run(capsys, "--venv", "bare")
    assert status == 2 and "ensurepip" in err


def test_json_is_one_object_also_when_refused(capsys):
    status, out, err = run(capsys, "--venv", "new", "--torch", "0.1", "--json", "--lang", "zh")
    answer = json.loads(out)
    assert status == answer["status"] == 2 and "0.1" in answer["message"] and answer["plan"]["refused"]["en"]
    assert "0.1" in err


# --- the environment's own Python ------------------------------------------------------------------------------------------------


@posix
def test_what_an_environment_says_of_itself(environment, tmp_path):
    # The default index names no build in the version, the module does.
    wheel(
        tmp_path / "wheels",
        "torch",
        "2.9.1",
        **{"torch/version.py": "__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\nhip = None\n"},
    )
    python = install.venv_python(str(environment))
    subprocess.run(install.pip(python, "install", "-q", "--no-index", "--find-links", "wheels", "torch"), check=True, cwd=tmp_path)
    there = install.ask(python)
    assert there["environment"] == "venv" and there["pip"] and there["prefix"] == str(environment)
    assert there["torch"] == {"version": "2.9.1+cu128", "distribution": "2.9.1", "cuda": "12.8", "hip": None}
    facts = install.facts_for(there)
    assert installed_versions(facts)["torch"] == "2.9.1+cu128" and facts["python"]["environment"] == "venv"
    # RECORD is the last thing an installer writes: without it the folder was left half-made.
    next(Path(there["site"]).glob("torch-*/RECORD")).unlink()
    assert install.ask(python)["torch"] is None and install.ask(python)["packages"] == {}


def test_a_python_that_is_not_there():
    assert install.ask("/no/python") is None
    facts = install.facts_for(None)
    assert facts["torch"] is None and facts["python"]["environment"] == "venv"


def make_venv(folder, *, config="home = /usr/bin\n", says=None):
    """A folder that looks like an environment; its Python is a shell script that prints `says`."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(config, encoding="utf-8")
    if says is not None:
        program = folder / "bin" / "python"
        program.write_text(f"#!/bin/sh\necho '{json.dumps(says)}'\n")
        program.chmod(0o755)
    return str(folder)


READY = {"version": HERE + ".1", "environment": "venv", "pip": True}


@posix
@pytest.mark.parametrize(
    ("made", "state", "words"),
    [
        ({"says": READY}, "ready", ""),
        ({}, "broken", "missing"),
        ({"says": {**READY, "version": "3.1.4"}}, "broken", "Python 3.1.4"),
        ({"says": {**READY, "pip": False}}, "broken", "unfinished"),
        ({"says": {**READY, "environment": "system"}}, "broken", "unfinished"),
        ({"says": READY, "config": "command = /usr/bin/python3 -m venv /elsewhere/.venv\n"}, "broken", "moved"),
    ],
)
def test_state_of_an_environment(tmp_path, made, state, words):
    found, why, _ = install.venv_state(make_venv(tmp_path / "venv", **made), version=HERE)
    assert found == state and words in why


@posix
def test_other_states_of_a_folder(tmp_path):
    assert install.venv_state(str(tmp_path / "absent"))[0] == "missing"
    (tmp_path / "empty").mkdir()
    assert install.venv_state(str(tmp_path / "empty"))[0] == "missing"
    (tmp_path / "file").write_text("")
    assert install.venv_state(str(tmp_path / "file"))[0] == "foreign"
    folder = make_venv(tmp_path / "made", says=READY)
    assert install.venv_state(folder, made_at="/elsewhere/.venv")[0] == "broken"
    make_venv(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert install.venv_state(str(tmp_path / "link"))[0] == "foreign"  # a link to a broken environment is not followed


def test_where_a_venv_was_made(tmp_path):
    config = tmp_path / "pyvenv.cfg"
    config.write_text("home = /usr/bin\ncommand = /usr/bin/python3 -m venv /a b/中文/.venv\n", encoding="utf-8")
    assert install.venv_made_at(str(config)) == "/a b/中文/.venv"
    config.write_text("home = /usr/bin\n")
    assert install.venv_made_at(str(config)) is None


# --- walls and steps -------------------------------------------------------------------------------------------------------------


def in_both(monkeypatch, call):
    """What a call says in English and in Chinese."""
    said = {}
    for name in ("en", "zh"):
        monkeypatch.setenv("GROUNDUP_LANG", name)
        try:
            said[name] = call()
        except (install.Refused, install.Failed) as error:
            said[name] = str(error)
    assert said["en"] != said["zh"]
    return said["en"], said["zh"]


def test_missing_venv_package(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    for debian in (True, False):
        monkeypatch.setattr(install.os.path, "exists", lambda path, debian=debian: debian)
        for said in in_both(monkeypatch, install.check_venv_module):
            assert "ensurepip" in said and (f"sudo apt install python{HERE}-venv" in said) == debian


def test_read_only_folder(monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(install.tempfile, "TemporaryFile", refuse)
    for said in in_both(monkeypatch, lambda: install.check_folder("/some/folder")):
        assert "/some/folder" in said and "Read-only file system" in said


def test_small_disk(monkeypatch):
    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1.2e9}))
    for said in in_both(monkeypatch, lambda: install.check_disk("not there yet", 8.0)):
        assert "1.2 GB" in said and "8.0 GB" in said
    install.check_disk(".", 1.0)


@pytest.mark.parametrize(
    ("output", "en", "zh"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full", "磁盘已满"),
        ("OSError: [Errno 30] Read-only file system: '/x'", "read-only", "只读"),
        ("PermissionError: [Errno 13] Permission denied", "no permission", "没有写权限"),
        ("The virtual environment was not created because ensurepip is not available.", "-venv", "-venv"),
        ("error: externally-managed-environment", "--system", "--system"),
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
        ("Looking in links: wheels\nERROR: Could not find a version that satisfies torch==2.13.0 (from versions: none)", HERE, HERE),
        ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 2.9.0)", HERE, HERE),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "damaged", "损坏"),
    ],
)
def test_known_causes(monkeypatch, output, en, zh):
    said = in_both(monkeypatch, lambda: steps.known_cause(1, output))
    assert en in said[0] and zh in said[1]


def test_causes_by_status_and_unknown_ones():
    assert "memory" in steps.known_cause(-9, "")
    assert steps.known_cause(1, "something else") is None


def test_step_shows_command_and_duration(capsys, tmp_path):
    assert install.step("Saying hello", [sys.executable, "-c", "print('hello')"], str(tmp_path)) == "hello"
    out = capsys.readouterr().out
    assert "Saying hello" in out and "$ " in out and "done in" in out
    assert "\nhello" not in out  # the output of a step that went well is not shown


def test_failing_step_names_cause_and_command(monkeypatch, tmp_path):
    code = "import sys; print('Collecting torch'); print('ERROR: [Errno 28] No space left on device', file=sys.stderr); sys.exit(3)"
    folder = tmp_path / "a b 中文"
    folder.mkdir()
    english, chinese = in_both(monkeypatch, lambda: install.step("title", [sys.executable, "-c", code], str(folder)))
    for said in (english, chinese):
        assert "\n    ERROR: [Errno 28] No space left on device\n" in said and "\n    Collecting" not in said
        assert said.splitlines()[-1].endswith(install.shown([code])) and install.shown([str(folder)]) in said
    assert "status 3" in english and "disk is full" in english and "磁盘已满" in chinese


def test_verification_that_fails_says_what_to_try(monkeypatch):
    verdict = json.dumps({"torch": "2.13.0+cpu", "device": "cuda", "error": "no kernel image"})
    monkeypatch.setattr(steps, "captured", lambda command, cwd: (1, verdict))
    for said in in_both(monkeypatch, lambda: install.verify(plan.make_plan(FACTS), "python", ".")):
        assert "no kernel image" in said and "--backend" in said


def test_companions_are_verified_too(monkeypatch):
    commands = []

    def step(title, command, cwd, explain):
        commands.append(command)
        return json.dumps({"torch": "2.13.0", "device": "cpu", "device_name": None, "matmul_error": 1e-5, "gradient_error": 1e-6})

    monkeypatch.setattr(install, "step", step)
    install.verify(plan.make_plan(FACTS), "python", ".")
    install.verify(plan.make_plan(FACTS, companions=["torchvision"]), "python", ".")
    assert ["--companions" in command for command in commands] == [False, True]


def test_meaningful_lines():
    output = "Collecting x\nWARNING: Retrying (error)\n\nERROR: one\nERROR: two\n[notice] A new release of pip\n"
    assert steps.meaningful_lines(output) == ["ERROR: one", "ERROR: two"]
    assert steps.meaningful_lines("a\nb\n") == ["a", "b"]


def test_signs_of_life():
    assert (
        steps.heading(["Collecting torch==2.13.0", "  Downloading torch.whl (900 MB)", "     ---- 5%"])
        == ": Downloading torch.whl (900 MB)"
    )
    assert steps.heading(["something else"]) == ""


def test_children_are_not_led_astray(monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    environment = install.child_environment()
    assert not {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"} & set(environment)
    assert environment["PIP_USER"] == "0" and environment["HTTPS_PROXY"] == "http://proxy.example:3128"
