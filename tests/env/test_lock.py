"""lock writes what an environment is; diff tells two apart."""

import copy
import datetime
import io
import json
import os
import sys

import pytest
from machines import MACHINES

from groundup.env import cli, layout, lock, probe

MOMENT = datetime.datetime(2026, 11, 23, 8, 0, tzinfo=datetime.UTC)


def lock_of(name):
    machine = copy.deepcopy(MACHINES[name])
    return lock.lock(probe.facts(host=machine), machine, MOMENT)


@pytest.fixture
def two(tmp_path):
    """Lock files of the Blackwell and the Pascal machine."""
    paths = []
    for name in ("blackwell_old_wheel", "pascal_cuda13"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(lock_of(name)), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_lock_says_what_the_environment_is():
    made = lock_of("blackwell_old_wheel")
    assert (made["schema"], made["date"]) == ("groundup.env.lock/1", "2026-11-23T08:00:00Z")
    assert made["torch"]["version"] == "2.6.0+cu124" and made["nvidia"]["driver"] == "575.64.03" and made["os"]["libc"] == "glibc 2.39"
    packages = {item["name"]: item for item in made["packages"]}
    assert packages["requests"] == {"name": "requests", "version": "2.32.3", "build": None, "installer": None}
    assert packages["torchvision"] == {"name": "torchvision", "version": "0.21.0", "build": "cu124", "installer": "pip"}
    conda = [item for item in lock_of("two_torches")["packages"] if item["name"] == "pytorch"]
    assert conda == [{"name": "pytorch", "version": "2.5.1", "build": "py3.10_cuda12.4_cudnn9.1.0_0", "installer": "conda"}]


def test_lock_is_written_once_and_whole(tmp_path, capsys):
    assert cli.main(["lock"]) == 0
    path = tmp_path / lock.FILE
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["schema"] == lock.SCHEMA and [item["version"] for item in made["packages"] if item["name"] == "pytest"] == [
        pytest.__version__
    ]
    assert str(len(made["packages"])) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
    if os.name != "nt":
        assert path.stat().st_mode & 0o777 == 0o644

    path.write_text("mine")
    assert cli.main(["lock"]) == 2
    assert "--force" in capsys.readouterr().err and path.read_text() == "mine"
    assert cli.main(["lock", "--force"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == lock.SCHEMA


def test_lock_prints(tmp_path, capsys):
    assert cli.main(["lock", "--out", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == lock.SCHEMA
    assert cli.main(["lock", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["schema"] == lock.SCHEMA and out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["lock", "--json", "--out", "x.json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))


def test_a_lock_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    assert cli.main(["lock", "--out", str(tmp_path / "no" / "folder.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert cli.main(["lock", "--json", "--out", str(tmp_path / "no" / "folder.json")]) == 2
    assert "cannot write" in json.loads(capsys.readouterr().out)["error"]["en"]

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "replace", full)
    assert cli.main(["lock"]) == 2
    assert list(tmp_path.iterdir()) == [], "no half-written file stays"


def test_this_machine_equals_itself(tmp_path, capsys):
    assert cli.main(["lock"]) == 0
    capsys.readouterr()
    assert cli.main(["diff", lock.FILE]) == 0
    assert "No difference" in capsys.readouterr().out
    assert cli.main(["diff", "here", lock.FILE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": lock.DIFF_SCHEMA, "equal": True, "differences": []}
    # The output of `info --json` has torch's relatives only; what it leaves out is no difference.
    assert cli.main(["info", "--json"]) == 0
    (tmp_path / "info.json").write_text(capsys.readouterr().out, encoding="utf-8")
    assert cli.main(["diff", "info.json", lock.FILE]) == 0
    assert cli.main(["diff", "info.json", "info.json"]) == 0


def test_the_most_telling_difference_comes_first(two, capsys):
    assert cli.main(["diff", *two, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    keys = [row["key"] for row in answer["differences"]]
    assert answer["equal"] is False and answer["differences"][0]["a"] == "2.6.0+cu124" and answer["differences"][0]["b"] == "2.13.0+cu130"
    order = ["torch", "torch.build", "nvidia.driver", "gpus", "cuda.nvcc", "libraries", "package.torchvision", "package.numpy", "package.nvidia-cudnn-cu13",
             "variable.LD_LIBRARY_PATH", "package.requests", "cpu.model"]  # fmt: skip
    assert [key for key in keys if key in order] == order


@pytest.mark.parametrize(("name", "words"), [("en", ("NVIDIA driver", "none", "differences")), ("zh", ("NVIDIA 驱动", "无", "处差异"))])
def test_differences_for_a_person(two, name, words, capsys):
    assert cli.main(["diff", *two, "--lang", name]) == 1
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    assert max(layout.width(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("one", MACHINES)
def test_any_two_machines_can_be_compared(one):
    for other in MACHINES:
        found = lock.differences(lock_of(one), probe.facts(host=copy.deepcopy(MACHINES[other])))
        assert (found == []) is (one == other)
        for language in ("en", "zh"):
            assert max(layout.width(line) for line in lock.shown(found, "a" * 90, "b", language).splitlines()) <= 80


def test_encodings_and_stdin(two, tmp_path, monkeypatch, capsys):
    content = json.dumps(lock_of("pascal_cuda13"))
    (tmp_path / "powershell.json").write_bytes(content.encode("utf-16"))
    (tmp_path / "notepad.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert cli.main(["diff", "powershell.json", "notepad.json"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert cli.main(["diff", "-", two[1]]) == 0
    capsys.readouterr()
    assert cli.main(["diff", "-", "-"]) == 2
    assert "only one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"schema": "other/1"}', b"\xff\xfe\x00", b"\x00" * 100, b"[" * 100_000, b"PyTorch version: 2.1"]
)
def test_what_is_no_lock_is_refused(content, tmp_path, capsys):
    (tmp_path / "bad.json").write_bytes(content)
    assert cli.main(["diff", "bad.json", "here"]) == 2
    assert "neither a lock" in capsys.readouterr().err
    assert cli.main(["diff", "bad.json", "--json"]) == 2
    assert set(json.loads(capsys.readouterr().out)["error"]) == {"en", "zh"}


def test_a_missing_file_is_named(capsys):
    assert cli.main(["diff", "no-such.json"]) == 2
    assert "no-such.json" in capsys.readouterr().err
    assert cli.main(["diff", "no-such.json", "--lang", "zh"]) == 2
    assert "无法读取" in capsys.readouterr().err


def test_a_mangled_lock_does_not_fall_over():
    whole = lock_of("two_torches")
    for key in whole:
        for value in (None, [], {}, "text", 3, [1, "x", None], {"gpus": "x"}):
            if key != "schema":
                lock.shown(lock.differences(dict(whole, **{key: value}), whole), "a", "b", "en")
