"""Run folders, their JSONL files and locks, atomic writes, units, and the words of errors: what must hold when something breaks."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from groundup.core import files, units
from groundup.core.errors import DataError, RecipeError, RunError, did_you_mean
from groundup.core.messages import language, say, set_language
from groundup.core.recipe import load
from groundup.core.run import JsonLines, Lock, RunFolder, command_line, find_runs, newest_finished, read_rows, resolve_run


def made(path, name="digits-cnn"):
    return RunFolder.create(load(name), path, "groundup train")


def limited(code, *arguments, size):
    """Runs code in a process that may not write files larger than `size` bytes, as on a disk that is full."""
    prelude = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


# -- locks ---------------------------------------------------------------------------------------------------------------------
HOLD = "import sys, time; from pathlib import Path; from groundup.core.run import Lock; Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by another groundup process .pid {holder.pid}") as caught:
            Lock(tmp_path / ".lock").acquire()
        assert "正被另一个 groundup 进程使用" in caught.value.zh and caught.value.exit_status == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    lock = Lock(tmp_path / ".lock")
    lock.acquire()
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    lock.release()


def test_a_run_is_opened_by_one_at_a_time(tmp_path):
    run = made(tmp_path / "run")
    with pytest.raises(RunError, match="in use"):
        RunFolder.open(tmp_path / "run", lock=True)
    RunFolder.open(tmp_path / "run")  # reading needs no lock
    run.close()
    RunFolder.open(tmp_path / "run", lock=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    code = """
        import os, sys, time
        from pathlib import Path
        from groundup.core.run import Lock
        Lock(Path(sys.argv[1])).acquire()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        print(child, flush=True)
        os.kill(os.getpid(), 9)
    """
    ended = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    child = int(ended.stdout.readline())
    try:
        ended.wait(timeout=30)
        lock = Lock(tmp_path / ".lock")
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, 9)
        ended.stdout.close()


# -- JSON lines ----------------------------------------------------------------------------------------------------------------
def test_rows_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xe7\x8c')
    assert read_rows(path) == [{"step": 1}]
    rows = JsonLines(path)
    rows.append({"step": 2, "名": "猫"})
    rows.close()
    assert read_rows(path) == [{"step": 1}, {"step": 2, "名": "猫"}]
    assert rows.dropped == 0


def test_rows_that_are_not_objects_are_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('[1]\n\n{"a": 1}\n7\n')
    assert read_rows(tmp_path / "m.jsonl") == [{"a": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_drops_rows_and_counts_them():
    rows = JsonLines(Path("/dev/full"))
    for step in range(3):
        rows.append({"step": step})
    rows.close()
    assert rows.dropped == 3


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_disk_that_fills_in_the_middle_of_a_row(tmp_path):
    """The operating system writes a part of the row without an error; the row counts as dropped, and the next one stands alone."""
    code = """
        import sys
        from pathlib import Path
        from groundup.core.run import JsonLines
        rows = JsonLines(Path(sys.argv[1]))
        for step in range(10):
            rows.append({"step": step})
        print(rows.dropped)
        rows.close()
    """
    done = limited(code, tmp_path / "m.jsonl", size=40)
    assert done.stdout == "7\n" and done.stderr == ""
    assert (tmp_path / "m.jsonl").stat().st_size == 40
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [0, 1, 2]
    after = JsonLines(tmp_path / "m.jsonl")
    after.append({"step": 10})
    after.close()
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [0, 1, 2, 10]


# -- whole files or none ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "state.json", "old")
    code = "import sys; from pathlib import Path; from groundup.core import files; files.write_bytes(Path(sys.argv[1]), b'x' * 5000)"
    done = limited(code, tmp_path / "state.json", size=1000)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert (tmp_path / "state.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_files_are_replaced_whole(tmp_path):
    files.write_json(tmp_path / "配置.json", {"名": [1, None]})
    files.write_json(tmp_path / "配置.json", {"名": [2]})
    assert files.read_json(tmp_path / "配置.json") == {"名": [2]}
    assert files.sha256(tmp_path / "配置.json") == hashlib.sha256((tmp_path / "配置.json").read_bytes()).hexdigest()
    assert len(list(tmp_path.iterdir())) == 1


def test_process_lives():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert files.process_lives(os.getpid()) and not files.process_lives(child.pid)


# -- run folders ---------------------------------------------------------------------------------------------------------------
def test_an_occupied_folder_is_refused(tmp_path):
    made(tmp_path / "run").close()
    with pytest.raises(RunError, match="already holds a run") as caught:
        made(tmp_path / "run")
    assert "--resume" in caught.value.fix
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "论文.txt").touch()
    with pytest.raises(RunError, match=r"already holds '论文.txt'"):
        made(tmp_path / "mine")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot make the run folder"):
        made(tmp_path / out)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device"):
        made(tmp_path / "run")
    monkeypatch.undo()
    made(tmp_path / "run").close()  # the lock was let go and nothing half-made is in the way


def test_a_run_keeps_its_recipe_and_its_decisions(tmp_path):
    run = made(tmp_path / "跑 1")
    assert run.decide("threads", 2, "this machine has two", "本机有两个") == 2
    run.close()
    again = RunFolder.open(tmp_path / "跑 1")
    assert again.decide("threads", 64, "another machine", "另一台机器") == 2
    assert again.recipe() == load("digits-cnn")
    assert again.result() is None
    assert (tmp_path / "跑 1" / "command.txt").read_text() == "groundup train\n"


def test_metric_rows_that_are_done_again_are_marked(tmp_path):
    run = made(tmp_path / "run")
    for step in (1, 2, 3, 4):
        run.metrics.append({"kind": "train", "step": step})
    run.metrics.append({"kind": "evaluate", "step": 3})
    run.metrics.append({"kind": "evaluate", "step": 4})
    assert run.supersede(2, 3, attempt=1) == 3
    run.metrics.append({"kind": "train", "step": 3})
    assert [r["step"] for r in run.metric_rows("train")] == [1, 2, 3]
    assert [r["step"] for r in run.metric_rows("evaluate")] == [3]
    assert run.supersede(3, 4, attempt=2) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 7 and [r["superseded"] for r in rows if "superseded" in r] == [1, 1, 1]
    run.close()


@pytest.mark.parametrize("name", ["decisions.json", "result.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    made(tmp_path / "run").close()
    (tmp_path / "run" / name).write_text('{"a": ')
    with pytest.raises(RunError, match=f"{name} is damaged"):
        RunFolder.open(tmp_path / "run").result()


def test_runs_are_found_by_name(tmp_path):
    for name in ("first-a", "first-b", "second"):
        made(tmp_path / "runs" / name).close()
    (tmp_path / "runs" / "not a run").mkdir()
    assert len(find_runs(tmp_path / "runs")) == 3 and find_runs(tmp_path / "none") == []
    assert resolve_run("sec").path.name == "second"
    assert resolve_run(tmp_path / "runs" / "first-a").path.name == "first-a"
    with pytest.raises(RunError, match=r"fits several runs: first-a, first-b|first-b, first-a"):
        resolve_run("first")
    with pytest.raises(RunError, match="'second'"):
        resolve_run("secnd")
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(tmp_path / "runs" / "not a run")
    assert newest_finished(tmp_path / "runs", "digits-cnn") is None
    files.write_json(tmp_path / "runs" / "first-a" / "result.json", {"steps": 1})
    assert newest_finished(tmp_path / "runs", "digits-cnn").path.name == "first-a"


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/bin/groundup", "train", "digits-cnn", "--out", "我的 跑"])
    assert command_line() == "groundup train digits-cnn --out '我的 跑'"


# -- units, messages, errors -----------------------------------------------------------------------------------------------------
def test_durations_and_counts():
    assert [units.seconds(t) for t in ("500ms", "60s", "1.5min", " 2 h ", "1d")] == [0.5, 60, 90, 7200, 86400]
    assert [units.count(t) for t in (5, "500", "20k", "1.5M", "2B")] == [5, 500, 20_000, 1_500_000, 2 * 10**9]
    for text in ("60", "0s", "-1s", "1 fortnight", "s", "", "²s"):
        with pytest.raises(RecipeError, match="is not a duration"):
            units.seconds(text)
    for text in ("0", "-3", "1.5", "x", "", "1e3", "²"):
        with pytest.raises(RecipeError, match="is not a count"):
            units.count(text)


def test_human_units():
    assert [units.human_seconds(s) for s in (0.84, 42, 185, 7800)] == ["0.8 s", "42 s", "3 min 05 s", "2 h 10 min"]
    assert [files.human_bytes(n) for n in (5, 2048, 3.2 * 2**20, 5 * 2**40)] == ["5 B", "2.0 KiB", "3.2 MiB", "5120.0 GiB"]


def test_language_is_chosen_by_option_then_environment(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG", "GROUNDUP_LANG"):
        monkeypatch.delenv(name, raising=False)
    assert language() == "en"
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language() == "zh" and say("{n} files", "{n} 个文件", n=3) == "3 个文件"
    monkeypatch.setenv("GROUNDUP_LANG", "en")
    assert language() == "en"
    set_language("zh")
    assert language() == "zh"


def test_errors_carry_both_languages():
    error = DataError("no file {path}", "没有文件 {path}", path="{a}.csv", fix="ls {path}", fix_zh="运行 ls {path}")
    assert str(error) == "no file {a}.csv\n  Fix: ls {a}.csv"
    assert isinstance(error, ValueError) and error.exit_status == 2
    set_language("zh")
    assert "没有文件 {a}.csv" in error.localized() and "运行 ls {a}.csv" in error.localized()
    assert json.loads(json.dumps(error.as_json()))["error"]["fix"] == "运行 ls {a}.csv"


def test_names_with_braces_do_not_break_messages():
    hint, hint_zh = did_you_mean("{x", ["{x}", "y"])
    assert str(DataError("no '{name}'." + hint, "没有。" + hint_zh, name="{x")) == "no '{x'. Did you mean '{x}'?"
    assert did_you_mean("a", []) == ("", "")
