"""The run folder: what one training produced, and the only thing that passes between a training and everything after it.

    runs/<name>-<utc>-<id>/   recipe.yaml decisions.json environment.json data.json command.txt metrics.jsonl events.jsonl
                              rejected.jsonl tensorboard/ checkpoints/ report.html plots/ model/ result.json (written last)

JSONL files are appended by one process (the lock) and survive a torn last line; a full disk drops rows and counts them, it does not
end the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from groundup.core import files
from groundup.core.errors import RunError, UserError, did_you_mean
from groundup.core.recipe import Recipe, build, parse_yaml


class JsonLines:
    """Appends rows to a JSONL file. Rows that cannot be written are counted in `dropped`, never raised."""

    def __init__(self, path: Path) -> None:
        self.path, self.dropped = path, 0
        self._file: IO[bytes] | None = None
        self._torn = False

    def append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n").encode()
        try:
            if self._file is None:
                # Unbuffered: a row is with the operating system when append returns, so kill -9 loses none.
                self._file = open(self.path, "ab", buffering=0)
                self._torn = self._file.tell() > 0 and not self._ends_with_newline()
            data = b"\n" + line if self._torn else line
            written = self._file.write(data)  # on a disk that is just full, only a part of it, and no error
        except OSError:
            self.dropped += 1
            return
        if written < len(data):
            self._torn = written > 0 or self._torn
            self.dropped += 1
        else:
            self._torn = False

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a torn line (a kill in the middle of a write) is left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


_held: list[IO[str]] = []


def _forget_locks() -> None:
    """In a forked child: its copies of the files would keep the locks alive after the parent was killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class Lock:
    """One process per run folder. The operating system drops it when the process dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises RunError when another process holds it."""
        file = open(self.path, "a+", encoding="utf-8")
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = "?"
            with contextlib.suppress(OSError):  # Windows does not let others read a locked byte
                file.seek(0)
                holder = file.read().strip() or "?"
            file.close()
            if not isinstance(error, BlockingIOError | PermissionError):
                raise  # a file system without locks, and not another process
            raise RunError(
                "{folder} is in use by another groundup process (pid {pid})",
                "{folder} 正被另一个 groundup 进程使用（pid {pid}）",
                folder=self.path.parent,
                pid=holder,
                fix="wait for it, stop it, or choose another --out",
                fix_zh="等它结束、停止它，或换一个 --out",
            ) from error
        with contextlib.suppress(OSError):  # the id is for the message only: a full disk must not keep a run from being resumed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        self._file = file
        _held.append(file)

    def held(self) -> bool:
        """Whether somebody works here; False too where that cannot be told."""
        try:
            if self.path.is_file():
                self.acquire()
                self.release()
            return False
        except RunError:
            return True
        except OSError:
            return False

    def release(self) -> None:
        if self._file is not None:
            _held.remove(self._file)
            self._file.close()
            self._file = None


class RunFolder:
    """Paths and files of one run.

    `decide` writes an automatic choice with its reason; a resumed run reads it back instead of measuring again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.events = JsonLines(path / "events.jsonl")
        self.lock = Lock(path / ".lock")
        self.decisions: dict[str, dict[str, Any]] = {}
        self.agree: Callable[[Any], Any] = lambda value: value  # among several processes: what the first of them found

    # -- making and opening ------------------------------------------------------------------------------------------------
    @classmethod
    def create(cls, recipe: Recipe, out: Path | None, command: str) -> RunFolder:
        """A new, locked run folder with the recipe in it.

        Raises:
            RunError: `out` has something in it already, or cannot be made.
        """
        if out is None:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            out = Path("runs") / f"{recipe.name}-{stamp}-{secrets.token_hex(2)}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            occupied = sorted(p.name for p in out.iterdir() if p.name != ".lock")
        except OSError as error:
            raise RunError(
                "cannot make the run folder {out}: {cause}",
                "无法创建运行目录 {out}：{cause}",
                out=out,
                cause=error,
                fix="choose another place with --out FOLDER",
                fix_zh="用 --out 目录 换一个位置",
            ) from error
        run = cls(out)
        if occupied:
            if (out / "recipe.yaml").is_file():
                run._lock_or_explain()  # somebody may be at work in it
                run.close()
            what = ("a run", "一次训练的结果") if (out / "recipe.yaml").is_file() else (f"'{occupied[0]}'", f"'{occupied[0]}'")
            raise RunError(
                "{out} already holds {what}",
                "{out} 里已经有{what_zh}",
                out=out,
                what=what[0],
                what_zh=what[1],
                fix="add --resume to continue it, or choose another --out",
                fix_zh="加 --resume 继续训练，或换一个 --out",
            )
        run._lock_or_explain()
        try:
            run.write_decisions()
            files.write_text(out / "command.txt", command + "\n")
            files.write_text(out / "recipe.yaml", recipe.to_yaml())  # last: its presence makes the folder a run
        except OSError as error:
            run.close()
            raise RunError(
                "cannot write to {out}: {cause}",
                "无法写入 {out}：{cause}",
                out=out,
                cause=error,
                fix="free some space or choose another --out",
                fix_zh="腾出一些空间，或换一个 --out",
            ) from error
        return run

    def _lock_or_explain(self) -> None:
        try:
            self.lock.acquire()
        except OSError as error:
            raise RunError(
                "cannot write to {out}: {cause}",
                "无法写入 {out}：{cause}",
                out=self.path,
                cause=error,
                fix="choose another --out FOLDER",
                fix_zh="换一个 --out 目录",
            ) from error

    @classmethod
    def open(cls, path: Path, *, lock: bool = False) -> RunFolder:
        """An existing run folder. Raises RunError where there is none, or (with `lock`) when another process works in it."""
        if not (path / "recipe.yaml").is_file():
            raise RunError(
                "{path} is not a run folder (it has no recipe.yaml)",
                "{path} 不是运行目录（里面没有 recipe.yaml）",
                path=path,
                fix="groundup runs list",
            )
        run = cls(path)
        if lock:
            run._lock_or_explain()
        try:
            run.decisions = run._read("decisions.json") or {}
        except RunError:
            run.close()
            raise
        return run

    def close(self) -> None:
        self.metrics.close()
        self.events.close()
        self.lock.release()

    # -- reading and writing -----------------------------------------------------------------------------------------------
    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def recipe(self) -> Recipe:
        text = (self.path / "recipe.yaml").read_text(encoding="utf-8")
        return build(parse_yaml(text, str(self.path / "recipe.yaml")), str(self.path / "recipe.yaml"), text=text)

    def result(self) -> dict[str, Any] | None:
        """What the finished run reported, or None while it is not finished."""
        return self._read("result.json")

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON mapping of the run, or None where there is none. Raises RunError where it is damaged."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            value = files.read_json(path)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise RunError(
                "{path} is damaged: {error}",
                "{path} 已损坏：{error}",
                path=path,
                error=error,
                fix="restore it from a copy, or move the run folder away",
                fix_zh="从备份恢复它，或把该运行目录移走",
            ) from error
        return value

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append({"time": time.time(), "event": kind, **facts})

    def decide(self, key: str, value: Any, reason: str, reason_zh: str) -> Any:
        """Writes down an automatic choice, or returns the one that this run made before."""
        if key in self.decisions:
            return self.decisions[key]["value"]
        self.decisions[key] = self.agree({"value": value, "reason": reason, "reason_zh": reason_zh})
        self.write_decisions()
        return self.decisions[key]["value"]

    def write_decisions(self) -> None:
        files.write_json(self.path / "decisions.json", self.decisions)

    def supersede(self, step: int, evaluated_at: int, attempt: int) -> int:
        """Marks metric rows after `step`, and evaluations after `evaluated_at`, as superseded: they are done again. Returns how many."""
        rows = read_rows(self.path / "metrics.jsonl")
        marked = 0
        for row in rows:
            again = row.get("step", 0) > (evaluated_at if row.get("kind") == "evaluate" else step)
            if again and not row.get("superseded"):
                row["superseded"] = attempt
                marked += 1
        if marked:
            self.metrics.close()
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            files.write_text(self.path / "metrics.jsonl", text)
        return marked

    def metric_rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows in force (superseded ones left out), of one kind ('train', 'evaluate') or of all."""
        rows = [r for r in read_rows(self.path / "metrics.jsonl") if not r.get("superseded")]
        return [r for r in rows if kind is None or r.get("kind") == kind]


def command_line() -> str:
    """The command of this process as one could type it again."""
    program = Path(sys.argv[0]).name if sys.argv else "python"
    program = "groundup" if program in ("__main__.py", "groundup", "groundup.exe") else program
    return shlex.join([program, *sys.argv[1:]])


def find_runs(root: Path) -> list[RunFolder]:
    """The run folders directly under `root`, oldest first; of a damaged one only the paths."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if (p / "recipe.yaml").is_file()]
    runs = [RunFolder(p) for p in sorted(found, key=lambda p: (p / "recipe.yaml").stat().st_mtime)]
    for run in runs:
        with contextlib.suppress(RunError):
            run.decisions = run._read("decisions.json") or {}
    return runs


def newest_finished(root: Path, name: str) -> RunFolder | None:
    """The newest finished run of a recipe's name."""
    for run in reversed(find_runs(root)):
        with contextlib.suppress(UserError):  # a damaged one is none
            if run.result() is not None and run.recipe().name == name:
                return run
    return None


def resolve_run(text: str | Path, root: Path = Path("runs")) -> RunFolder:
    """A run by folder, or by its name or the start of its name under `runs/`.

    Raises:
        RunError: none or several fit.
    """
    path = Path(text).expanduser()
    if (path / "recipe.yaml").is_file():
        return RunFolder.open(path)
    known = {r.path.name: r for r in find_runs(root)}
    fitting = [n for n in known if n.startswith(str(text))]
    if len(fitting) == 1:
        return RunFolder.open(known[fitting[0]].path)
    if fitting:
        listed = ", ".join(fitting)
        raise RunError("'{text}' fits several runs: {listed}", "'{text}' 对应多个运行：{listed}", text=text, listed=listed)
    hint, hint_zh = did_you_mean(str(text), known) if known else ("", "")
    raise RunError("no run '{text}'." + hint, "没有运行 '{text}'。" + hint_zh, text=text, fix="groundup runs list")


def yaml_block(values: Mapping[str, Any] | Iterable[Any]) -> str:
    """Plain YAML for showing values to a person."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100).rstrip()
