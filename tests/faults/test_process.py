"""Real processes, really killed, on real disks that are really full."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import groundup as gu
from groundup.core import files

COMMAND = [sys.executable, "-m", "groundup"]
SETTINGS = [
    "digits-cnn",
    "--set",
    "train.deterministic=true",
    "--set",
    "watch.tensorboard=false",
    "--set",
    "watch.report=false",
    "--set",
    "train.batch_size=16",
]


def sets(**values):
    return [part for k, v in values.items() for part in ("--set", f"{k.replace('__', '.')}={v}")]


def start(*arguments, **options):
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)


def wait_for_step(folder, step, process):
    """Until a checkpoint of at least that step is there."""
    for _ in range(600):
        found = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")] if (folder / "checkpoints").is_dir() else []
        if found and max(found) >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared")


def weights(folder):
    return files.sha256(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_killed_at_ten_random_moments():
    moments, step = random.Random(3), 0
    command = ("train", *SETTINGS, *sets(train__epochs=15, train__save_every=10), "--json", "--out")
    whole = run(*command, "whole")
    assert whole.returncode == 0, whole.stderr
    command = (*command, "cut", "--resume")
    for _ in range(10):
        process = start(*command)
        wait_for_step(Path("cut"), step + 10, process)  # every attempt gets past the one before it
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        step = max(int(p.name[5:]) for p in Path("cut/checkpoints").glob("step-*"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_from"] >= 100
    assert weights(Path("cut")) == weights(Path("whole"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_exits_and_says_how_to_go_on(number, status):
    process = start(
        "train", *SETTINGS, *sets(train__steps=400, train__save_every="10min", train__keep="last", evaluate__every=400), "--out", "cut run"
    )
    for _ in range(600):
        if Path("cut run/metrics.jsonl").is_file():
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert 'groundup train --resume --out "cut run"' in error and "Traceback" not in error
    (checkpoint,) = Path("cut run/checkpoints").iterdir()
    assert gu.train(None, out="cut run", resume=True).result["resumed_from"] == int(checkpoint.name[5:])


def test_a_signal_while_data_is_read_ends_at_once():
    code = (
        "import sys, time, groundup.data.prepare as p\nold = p.open_source\n"
        "def slow(c):\n    open('reading', 'w').close(); time.sleep(30); return old(c)\np.open_source = slow\n"
        "from groundup.cli import main\nsys.exit(main(['train', 'digits-cnn', '--out', 'run']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not Path("reading").exists():
        time.sleep(0.05)
    begin = time.time()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143 and time.time() - begin < 10 and "Traceback" not in error


def test_a_second_process_on_the_run_is_refused():
    first = start("train", *SETTINGS, *sets(train__epochs=60, train__save_every=10), "--out", "run")
    wait_for_step(Path("run"), 10, first)
    second = run("train", *SETTINGS, *sets(train__epochs=60, train__save_every=10), "--out", "run", "--resume")
    first.kill()
    first.communicate()
    assert second.returncode == 2 and f"pid {first.pid}" in second.stderr
    third = start("train", "--resume", "--out", "run", "--json")  # the lock died with its process
    time.sleep(6)
    third.send_signal(signal.SIGTERM)
    _, error = third.communicate(timeout=60)
    assert third.returncode == 143, error


# Dies with SIGKILL at a named place inside the writing of the second checkpoint.
KILL_AT = """
import os, signal, sys
import groundup.training.checkpoint as c
calls = 0
old = getattr(c, '{name}')
def dying(*a, **k):
    global calls
    calls += 1
    if calls == {call} and {before}: os.kill(os.getpid(), signal.SIGKILL)
    result = old(*a, **k)
    if calls == {call}: os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(c, '{name}', dying)
from groundup.cli import main
sys.exit(main(sys.argv[1:]))
"""


LINE = {
    "train.steps": 40,
    "train.save_every": 10,
    "train.deterministic": True,
    "watch.tensorboard": False,
    "watch.report": False,
    "evaluate.every": 1000,
}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    return weights(gu.train("line-regression", LINE, out=tmp_path_factory.mktemp("line") / "run").path)


@pytest.mark.parametrize(
    ("name", "call", "before"), [("save_file", 3, True), ("save_file", 4, False), ("commit", 2, True), ("commit", 2, False)]
)
def test_killed_inside_a_save(name, call, before, line):
    code = KILL_AT.format(name=name, call=call, before=before)
    settings = [part for k, v in LINE.items() for part in ("--set", f"{k}={str(v).lower()}")]
    died = subprocess.run(
        [sys.executable, "-c", code, "train", "line-regression", *settings, "--out", "cut"], capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    done = gu.train("line-regression", LINE, out="cut", resume=True)
    assert done.result["resumed_from"] == (20 if (name, before) == ("commit", False) else 10)
    assert not list(Path("cut/checkpoints").glob(".*"))
    assert weights(Path("cut")) == line


def can_mount():
    return (
        sys.platform == "linux"
        and shutil.which("unshare")
        and subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    )


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs unshare with user namespaces, to mount a small tmpfs")


def on_small_disk(size, script, cwd):
    """Runs a shell script in a namespace of its own with a tmpfs of `size` on ./disk."""
    (cwd / "disk").mkdir()
    lines = f"mount -t tmpfs -o size={size} tmpfs disk\nexport PYTHONDONTWRITEBYTECODE=1\n{script}"
    return subprocess.run(["unshare", "-Urm", "bash", "-ec", lines], capture_output=True, text=True, cwd=cwd, timeout=120)


@needs_mount
def test_a_disk_that_fills_does_not_end_the_training(tmp_path):
    """The disk fills in the middle and is freed before the end: training goes on, and the model is the uninterrupted run's."""
    code = """
import os, sys
import groundup.training.loop as loop
old = loop.step
def step(state, *rest):
    if state.step == 12: open('disk/filler', 'wb').write(b'0' * (os.statvfs('disk').f_bavail * os.statvfs('disk').f_frsize))
    if state.step == 33: os.unlink('disk/filler')
    return old(state, *rest)
loop.step = step
from groundup.cli import main
sys.exit(main(['train', 'digits-cnn', '--out', sys.argv[1], '--set', 'train.steps=40', '--set', 'train.save_every=10', '--set', 'train.deterministic=true',
               '--set', 'watch.log_every=1', '--set', 'evaluate.every=1000']))
"""
    (tmp_path / "fill.py").write_text(code)
    done = on_small_disk(
        "8m", f"{sys.executable} fill.py disk/run && {sys.executable} -m groundup runs verify disk/run && cp -r disk/run saved", tmp_path
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "step 20 could not be written: No space left on device; it needs" in done.stdout and "rows of metrics" in done.stdout
    settings = {"train.steps": 40, "train.save_every": 10, "train.deterministic": True, "evaluate.every": 1000, "watch.report": False}
    assert weights(tmp_path / "saved") == weights(gu.train("digits-cnn", settings, out="whole").path)


@needs_mount
def test_a_disk_that_stays_full_never_loses_the_model_silently(tmp_path):
    code = """
import os, sys
import groundup.training.loop as loop
old = loop.step
def step(state, *rest):
    if state.step == 12: open('disk/filler', 'wb').write(b'0' * (os.statvfs('disk').f_bavail * os.statvfs('disk').f_frsize))
    return old(state, *rest)
loop.step = step
from groundup.cli import main
sys.exit(main(['train', 'digits-cnn', '--out', 'disk/run', '--set', 'train.steps=20', '--set', 'train.save_every=10', '--set', 'evaluate.every=1000']))
"""
    (tmp_path / "fill.py").write_text(code)
    script = (
        f"export TMPDIR=$PWD\n{sys.executable} fill.py && exit 9 || echo status $?\nls disk/run/checkpoints\nrm disk/filler\n"
        f"{sys.executable} -m groundup train --resume --out disk/run --json"
    )
    done = on_small_disk("6m", script, tmp_path)
    assert "status 1" in done.stdout, done.stdout + done.stderr
    assert "could not be written (No space left" in done.stderr and "groundup train --resume --out disk/run" in done.stderr
    assert "step-000010" in done.stdout
    (rescued,) = tmp_path.glob("groundup-rescued-*")
    assert (rescued / "model.safetensors").is_file() and (rescued / "manifest.json").is_file()
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 10, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="file size limits are of POSIX")
def test_a_file_size_limit_counts_as_a_failing_writer(tmp_path):
    """RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC."""
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from groundup.cli import main\nsys.exit(main(['train', 'digits-cnn', '--out', 'run', '--set', 'train.steps=20', '--set', 'train.save_every=10']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
