"""Checkpoints: safetensors and JSON, whole or not there, and never loaded without a matching manifest.

    checkpoints/step-000200/   model.safetensors  optim.safetensors  state.json  manifest.json

A checkpoint is written to a temporary sibling folder, every file flushed to the disk, the manifest (sizes and sha256) last; then the folder
is renamed and its parent flushed. Only then is an older one removed, by renaming it away first. So at every instant after the first one
there is a checkpoint that verifies, whenever the process dies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.core import files
from groundup.core.errors import RunError
from groundup.core.messages import say
from groundup.training.state import TrainState

FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY = re.compile(r"\.(?:step-\d+|model)\.tmp-(\d+)-[0-9a-f]+")


def unique_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without those that share another's storage (tied weights): safetensors stores each once."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, value in tensors.items():
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = value.detach().contiguous()
    return kept


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights of `unique_tensors`. Raises RunError where names or shapes do not fit the model."""
    own = model.state_dict()
    aliases = own.keys() - unique_tensors(own).keys()
    lacking = sorted(own.keys() - weights.keys() - aliases)
    surplus = sorted(weights.keys() - own.keys())
    wrong = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if lacking or surplus or wrong:
        name = (lacking + surplus + wrong)[0]
        raise RunError(
            "the weights do not fit the model: '{name}' is {what} ({n} tensors in all)",
            "权重与模型不符：'{name}' {what_zh}（共 {n} 个张量）",
            name=name,
            n=len(lacking) + len(surplus) + len(wrong),
            what="missing" if lacking else "unknown" if surplus else "of another shape",
            what_zh="缺失" if lacking else "多余" if surplus else "形状不同",
        )
    model.load_state_dict(weights, strict=False)


def system_error(error: SafetensorError) -> OSError:
    """safetensors wraps the operating system's error into a text of its own: the error again, with its number where the text has one."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def write_manifest(folder: Path) -> None:
    """Flushes every file of a folder and writes their sizes and digests, last. README.md is for people, who may edit it: it is not listed."""
    listed = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files.sync(path)
        if path.name == "README.md":
            continue
        listed[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": listed}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    files.sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder against its manifest, in the user's language, or None. Every byte is read."""
    try:
        manifest = files.read_json(folder / "manifest.json")
        listed = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        if manifest["format"] > FORMAT:
            return say("manifest.json has format {n}; this groundup reads up to {most}", "manifest.json 的格式为 {n}；此版本最多读到 {most}", n=manifest["format"], most=FORMAT)
    except FileNotFoundError:
        return say("manifest.json is missing", "缺少 manifest.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return say("manifest.json is damaged ({kind})", "manifest.json 已损坏（{kind}）", kind=type(error).__name__)
    for name, (size, digest) in listed.items():
        path = folder / name
        try:
            if not path.is_file():
                return say("{name} is missing", "缺少 {name}", name=name)
            if path.stat().st_size != size:
                found = path.stat().st_size
                return say("{name} has {found} bytes, its manifest says {size}", "{name} 有 {found} 字节，清单记录为 {size}", name=name, found=found, size=size)
            if files.sha256(path) != digest:
                return say("{name} has changed (its sha256 differs from the manifest)", "{name} 已被改动（sha256 与清单不符）", name=name)
        except OSError as error:
            return say("{name} cannot be read ({cause})", "{name} 无法读取（{cause}）", name=name, cause=error)
    return None


def commit(temporary: Path, final: Path) -> None:
    """Renames a finished temporary folder to its name; an older folder of that name is moved away first and removed last."""
    old = None
    if final.exists():
        old = files.temporary_sibling(final)
        final.rename(old)
    temporary.rename(final)
    files.sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@dataclass
class Restored:
    """What `load_newest` found: the step, and newer checkpoints that were passed over because they are damaged."""

    step: int
    facts: dict[str, Any]
    passed_over: list[tuple[str, str]]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`.
        facts: what every checkpoint also records (versions, threads, data fingerprint), for saying which promise holds on resume.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    def steps(self) -> list[int]:
        """Steps that have a folder, verified or not, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if p.is_dir() and (m := NAME.fullmatch(p.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def sweep(self) -> None:
        """Removes temporary folders whose process is gone (or is this one, between two saves)."""
        for root in (self.folder, self.folder.parent):
            for path in root.iterdir() if root.is_dir() else ():
                match = TEMPORARY.fullmatch(path.name)
                if match and (int(match[1]) == os.getpid() or not files.process_lives(int(match[1]))):
                    shutil.rmtree(path, ignore_errors=True)

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint and then removes old ones: the newest two and the best stay.

        Raises:
            OSError: it could not be written (full disk). Older checkpoints are untouched, and nothing half-written is left.
        """
        final = self.path(state.step)
        if final.exists() and damage(final) is None:
            return  # the same step of the same run: the same contents
        temporary = files.temporary_sibling(final)
        named, numbers = state.tensors()
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.mkdir()
            save_file(unique_tensors(state.model.state_dict()), temporary / "model.safetensors")
            save_file(unique_tensors(named), temporary / "optim.safetensors")
            (temporary / "state.json").write_text(
                json.dumps({"format": FORMAT, "facts": self.facts, **numbers}, indent=1), encoding="utf-8"
            )
            write_manifest(temporary)
            commit(temporary, final)
        except SafetensorError as error:
            raise system_error(error) from error
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        self._retire(state.best_step)

    def _retire(self, best: int) -> None:
        keep = {*self.steps()[-2:], best}
        for step in self.steps():
            if step not in keep:
                away = files.temporary_sibling(self.path(step))
                self.path(step).rename(away)  # renamed first: a kill in the middle of removing leaves no half checkpoint
                shutil.rmtree(away, ignore_errors=True)

    def load_newest(self, state: TrainState) -> Restored | None:
        """Restores the newest checkpoint that verifies; None where the run has none at all.

        Raises:
            RunError: there are checkpoints, and not one of them verifies.
        """
        passed_over: list[tuple[str, str]] = []
        for step in reversed(self.steps()):
            folder = self.path(step)
            if (reason := damage(folder)) is not None:
                passed_over.append((folder.name, reason))
                continue
            numbers = files.read_json(folder / "state.json")
            load_weights(state.model, load_file(folder / "model.safetensors"))
            state.restore(load_file(folder / "optim.safetensors"), numbers)
            return Restored(step, numbers["facts"], passed_over)
        if passed_over:
            listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
            raise RunError(
                "no checkpoint in {folder} is whole: {listed}",
                "{folder} 中没有完整的检查点：{listed}",
                folder=self.folder,
                listed=listed,
                fix="restore the folder from a copy, or start again with another --out",
                fix_zh="从备份恢复该目录，或用另一个 --out 重新开始",
            )
        return None

    def weights(self, step: int, *, ema: bool) -> dict[str, Tensor] | None:
        """The weights of a checkpoint (the averaged ones with `ema`), or None where it is not there or damaged."""
        folder = self.path(step)
        if damage(folder) is not None:
            return None
        if not ema:
            return load_file(folder / "model.safetensors")
        stored = load_file(folder / "optim.safetensors")
        return {n.removeprefix("ema."): t for n, t in stored.items() if n.startswith("ema.")}
