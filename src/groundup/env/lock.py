"""`groundup env lock` writes what this environment is; `groundup env diff A B` tells two apart, the most telling difference first.

A lock is a list of versions, without anything private: no folder, no host, no address, no hash of a file of the user's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from groundup.env import packages, probe
from groundup.env.host import Host
from groundup.env.language import Text, pick, text
from groundup.env.layout import width, wrapped

SCHEMA = "groundup.env.lock/1"
DIFF_SCHEMA = "groundup.env.diff/1"
FILE = "groundup-env.lock.json"
EQUAL, DIFFERENT, UNREADABLE = 0, 1, 2

_COMPANIONS = ("torchvision", "torchaudio", "torchtext", "torchdata", "torchao", "triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows", "xformers",
               "flash-attn", "bitsandbytes", "vllm", "deepspeed", "apex")  # fmt: skip
_OTHERS = 4  # the rank of distributions that have nothing to do with torch
_WIDTH = 80
_LARGEST = 50_000_000  # bytes of a file that is compared


class Unreadable(Exception):
    """What was given to compare is no lock and no facts; `says` in both languages."""

    def __init__(self, says: Text) -> None:
        super().__init__(says["en"])
        self.says = says


# --- lock ------------------------------------------------------------------------------------------------------------------------


def configure_lock(parser: argparse.ArgumentParser) -> None:
    """The options of `env lock`; `--json` prints the lock, and writes it only with --out."""
    parser.add_argument("--out", metavar="FILE", help="where to write it; - prints it (default: {0}) / 输出文件，- 为打印（默认 {0}）".format(FILE))
    parser.add_argument("--force", action="store_true", help="replace the file if it is there / 文件已存在时覆盖")


def run_lock(options: argparse.Namespace) -> int:
    """`env lock`: 0 written, 2 when the file is there already or cannot be written."""
    language = pick(options.lang)
    printed = options.json or options.out == "-"
    target = None if options.out == "-" or (options.json and not options.out) else Path(options.out or FILE)
    if target is not None and target.exists() and not options.force:
        said = text("{} is there already; --force replaces it.", "{} 已存在；如需覆盖请加 --force。")
        return _refuse(said, str(target), options.json, language)
    made = lock(probe.facts())
    content = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    if target is not None:
        try:
            _write(target, content)
        except OSError as error:
            said = text("cannot write {}: " + str(error.strerror), "无法写入 {}：" + str(error.strerror))
            return _refuse(said, str(target), options.json, language)
    if printed:
        print(json.dumps(made, ensure_ascii=False) if options.json else content, end="\n" if options.json else "")
    else:
        says = text("{}: {} distributions, torch {}", "{}：{} 个软件包，torch {}")[language]
        torch = (made["torch"] or {}).get("version") or text("not installed", "未安装")[language]
        print(says.format(target, len(made["packages"]), torch))
    return 0


def lock(facts: Mapping[str, Any], host: Optional[Host] = None, now: Optional[datetime.datetime] = None) -> Dict[str, Any]:
    """What this environment is, as the dict that `lock` writes.

    Args:
        facts: what `probe.facts()` returned for the same machine.
        now: the time to write down; else the present.
    """
    system, python, nvidia, amd, torch = facts["os"], facts["python"], facts["nvidia"], facts["amd"], facts["torch"]
    moment = now or datetime.datetime.now(datetime.timezone.utc)
    return {
        "schema": SCHEMA,
        "date": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "os": {key: system[key] for key in ("system", "name", "version", "kernel", "machine", "libc", "wsl", "container", "jetson")},
        "cpu": {"model": facts["cpu"]["model"], "cores": facts["cpu"]["cores"]},
        "python": {key: python[key] for key in ("version", "implementation", "bits", "free_threaded", "environment")},
        "nvidia": {
            "driver": nvidia["driver"],
            "cuda_version": nvidia["cuda_version"],
            "gpus": [{key: gpu.get(key) for key in ("name", "memory_gb", "compute_capability")} for gpu in nvidia["gpus"]],
        },
        "amd": {"gfx": amd["gfx"], "rocm": amd["rocm"]},
        "apple": dict(facts["apple"]),
        "cuda": {key: facts["cuda"][key] for key in ("nvcc", "toolkits", "libraries")},
        "torch": {key: torch.get(key) for key in ("version", "build", "cuda", "hip", "distribution")} if torch else None,
        "variables": dict(facts["variables"]),
        "packages": _everything(facts, host or Host()),
    }


def _everything(facts: Mapping[str, Any], host: Host) -> List[Dict[str, Any]]:
    """Every distribution that Python can see, torch's relatives with their builds; by name, the first copy first."""
    known = {(item["name"], item["version"], item["where"]): item for item in facts["packages"]}
    found: List[Dict[str, Any]] = []
    for item in packages.distributions(host):
        version, _, local = item.version.partition("+")
        more = known.get((item.name, version, item.where), {})
        found.append(
            {"name": item.name, "version": version, "build": more.get("build") or local or None, "installer": more.get("installer")}
        )
    found += [
        {"name": name, "version": version, "build": build, "installer": "conda"}
        for name, version, build, _ in packages.conda_packages(host)
    ]
    return sorted(found, key=lambda item: str(item["name"]))


def _write(target: Path, content: str) -> None:
    """The whole file or none of it."""
    handle, name = tempfile.mkstemp(prefix=target.name + ".", dir=str(target.parent))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner may read; this one is made to be shared.
        os.chmod(name, 0o644)
        os.replace(name, str(target))
    except BaseException:
        if os.path.exists(name):
            os.unlink(name)
        raise


def _refuse(said: Text, value: str, as_json: bool, language: str) -> int:
    if as_json:
        print(json.dumps({"error": {key: sentence.format(value) for key, sentence in said.items()}}, ensure_ascii=False))
    else:
        print(said[language].format(value), file=sys.stderr)
    return UNREADABLE


# --- diff ------------------------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One thing that is not the same; None: not there, or not known."""

    key: str
    label: Text
    a: Optional[str]
    b: Optional[str]


def configure_diff(parser: argparse.ArgumentParser) -> None:
    """The two things that `env diff` compares."""
    what = "a lock, the output of `env info --json`, - for stdin, or `here` for this machine / 锁文件、info --json 的输出、- 或 here"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", nargs="?", default="here", help=what)


def run_diff(options: argparse.Namespace) -> int:
    """`env diff`: 0 equal, 1 different, 2 when one of the two cannot be read."""
    language = pick(options.lang)
    try:
        if options.a == options.b == "-":
            raise Unreadable(text("only one of the two can be stdin.", "只能有一个来自标准输入。"))
        one, other = load(options.a), load(options.b)
    except Unreadable as wrong:
        if options.json:
            print(json.dumps({"schema": DIFF_SCHEMA, "error": wrong.says}, ensure_ascii=False))
        else:
            print(wrong.says[language], file=sys.stderr)
        return UNREADABLE
    found = differences(one, other)
    if options.json:
        rows = [{"key": item.key, "label": item.label, "a": item.a, "b": item.b} for item in found]
        print(json.dumps({"schema": DIFF_SCHEMA, "equal": not found, "differences": rows}, ensure_ascii=False))
    else:
        print(shown(found, options.a, options.b, language))
    return DIFFERENT if found else EQUAL


def load(source: str) -> Dict[str, Any]:
    """A lock, or the facts of a machine: from a file, from stdin ('-') or of this machine ('here')."""
    if source == "here" and not Path(source).exists():
        return lock(probe.facts())
    try:
        if source == "-":
            raw = sys.stdin.buffer.read(_LARGEST + 1)
        else:
            with open(source, "rb") as stream:
                raw = stream.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(text("cannot read {}: {}".format(source, reason), "无法读取 {}：{}".format(source, reason))) from None
    wanted = text(
        "{} is neither a lock (groundup env lock) nor facts (groundup env info --json).".format(source),
        "{} 既不是锁文件（groundup env lock），也不是 groundup env info --json 的输出。".format(source),
    )
    try:
        # Windows' PowerShell writes UTF-16 into what it redirects.
        found = json.loads(raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"))
    except (ValueError, RecursionError):
        raise Unreadable(wanted) from None
    if not isinstance(found, dict) or found.get("schema") not in (SCHEMA, probe.SCHEMA):
        raise Unreadable(wanted)
    return found


_FLAT: Tuple[Tuple[str, Text, Tuple[str, ...]], ...] = (
    ("torch", text("torch", "torch"), ("torch", "version")),
    ("torch.build", text("torch build", "torch 构建"), ("torch", "build")),
    ("torch.cuda", text("torch's CUDA", "torch 的 CUDA"), ("torch", "cuda")),
    ("torch.hip", text("torch's ROCm", "torch 的 ROCm"), ("torch", "hip")),
    ("nvidia.driver", text("NVIDIA driver", "NVIDIA 驱动"), ("nvidia", "driver")),
    ("nvidia.cuda_version", text("CUDA of the driver", "驱动支持的 CUDA"), ("nvidia", "cuda_version")),
    ("gpus", text("GPUs", "GPU"), ()),
    ("rocm", text("ROCm", "ROCm"), ("amd", "rocm")),
    ("apple.chip", text("Apple chip", "Apple 芯片"), ("apple", "chip")),
    ("python.version", text("Python", "Python"), ("python", "version")),
    ("python.implementation", text("Python kind", "Python 实现"), ("python", "implementation")),
    ("python.bits", text("Python bits", "Python 位数"), ("python", "bits")),
    ("python.free_threaded", text("free-threaded", "自由线程"), ("python", "free_threaded")),
    ("python.environment", text("environment", "环境类型"), ("python", "environment")),
    ("os.system", text("system", "操作系统"), ("os", "system")),
    ("os.machine", text("processor type", "处理器架构"), ("os", "machine")),
    ("os.name", text("distribution", "系统版本"), ("os", "name")),
    ("os.libc", text("C library", "C 库"), ("os", "libc")),
    ("os.wsl", text("WSL", "WSL"), ("os", "wsl")),
    ("os.container", text("container", "容器"), ("os", "container")),
    ("os.kernel", text("kernel", "内核"), ("os", "kernel")),
    ("cuda.nvcc", text("nvcc", "nvcc"), ("cuda", "nvcc")),
    ("cuda.toolkits", text("CUDA toolkits", "CUDA 工具包"), ("cuda", "toolkits")),
    ("libraries", text("libraries", "库"), ()),
)
_LAST = (("cpu.model", text("CPU", "处理器"), ("cpu", "model")), ("cpu.cores", text("CPU cores", "处理器核数"), ("cpu", "cores")))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[Difference]:
    """What is not the same: torch, driver, GPU, Python, system, CUDA's libraries, companions, NumPy, variables, the rest."""
    listed = _packages(a, b)
    relatives = [item for item in listed if _rank(item.label["en"]) < _OTHERS]
    others = [item for item in listed if _rank(item.label["en"]) >= _OTHERS]
    return [*_compared(a, b, _FLAT), *relatives, *_variables(a, b), *others, *_compared(a, b, _LAST)]


def _compared(a: Mapping[str, Any], b: Mapping[str, Any], rows: Tuple[Tuple[str, Text, Tuple[str, ...]], ...]) -> List[Difference]:
    found = []
    for key, label, path in rows:
        one, other = (_gpus(x) if key == "gpus" else _libraries(x) if key == "libraries" else _at(x, path) for x in (a, b))
        if one != other:
            found.append(Difference(key, label, one, other))
    return found


def _at(source: Mapping[str, Any], path: Tuple[str, ...]) -> Optional[str]:
    value: Any = source
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or value == []:
        return None
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _dicts(value: Any) -> List[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _group(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = source.get(key)
    return value if isinstance(value, Mapping) else {}


def _gpus(source: Mapping[str, Any]) -> Optional[str]:
    names = [str(gpu.get("name")) for gpu in _dicts(_group(source, "nvidia").get("gpus"))]
    gfx = _group(source, "amd").get("gfx")
    names += ["AMD " + str(name) for name in gfx] if isinstance(gfx, list) else []
    counted = ["{} x {}".format(names.count(name), name) if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return ", ".join(counted) or None


def _libraries(source: Mapping[str, Any]) -> Optional[str]:
    """Those outside of site-packages; the ones inside are told by their distributions."""
    listed = _dicts(_group(source, "cuda").get("libraries"))
    names = [
        "{} {} ({})".format(item.get("name"), item.get("version") or "?", item.get("where"))
        for item in listed
        if item.get("where") != "python"
    ]
    return ", ".join(sorted(names)) or None


def _variables(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[Difference]:
    one, other = _group(a, "variables"), _group(b, "variables")
    names = [name for name in [*one, *(name for name in other if name not in one)] if one.get(name) != other.get(name)]
    return [Difference("variable." + name, text(name, name), _text(one.get(name)), _text(other.get(name))) for name in names]


def _text(value: Any) -> Optional[str]:
    return None if value is None else str(value)


def _packages(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[Difference]:
    one, other = _versions(a), _versions(b)
    if SCHEMA not in (a.get("schema"), b.get("schema")) or a.get("schema") != b.get("schema"):
        # Facts list torch's relatives only: what they leave out is not a difference.
        one, other = ({name: value for name, value in side.items() if packages.RELATED.fullmatch(name)} for side in (one, other))
    names = sorted(set(one) | set(other), key=lambda name: (_rank(name), name))
    changed = [name for name in names if one.get(name) != other.get(name) and name != "torch"]
    return [Difference("package." + name, text(name, name), one.get(name), other.get(name)) for name in changed]


def _versions(source: Mapping[str, Any]) -> Dict[str, str]:
    """{'torchvision': '0.21.0+cu124'}; of several copies the one that Python imports, the others after it."""
    found: Dict[str, List[str]] = {}
    for item in _dicts(source.get("packages")):
        conda = item.get("installer") == "conda"
        build = item.get("build")
        version = str(item.get("version")) + ("+{}".format(build) if build and not conda else "")
        versions = found.setdefault(packages.normalize(str(item.get("name"))), [])
        if version not in versions:
            versions.append(version)
    return {name: ", ".join(versions) for name, versions in found.items()}


def _rank(name: str) -> int:
    if name in _COMPANIONS or name.startswith("torch"):
        return 0
    if name == "numpy":
        return 1
    if re.match(r"nvidia-|cuda|cudnn|nccl|rocm", name):
        return 2
    return 3 if packages.RELATED.fullmatch(name) else _OTHERS


def shown(found: List[Difference], a: str, b: str, language: str) -> str:
    """The differences for a person: three columns, at most 80 wide."""
    if not found:
        return text("No difference.", "没有差异。")[language]
    none = text("none", "无")[language]
    names = [name if name in ("-", "here") else Path(name).name for name in (a, b)]
    rows = [("", *names)] + [(item.label[language], item.a or none, item.b or none) for item in found]
    first = max(width(row[0]) for row in rows)
    room = max(16, (_WIDTH - first - 4) // 2)
    lines: List[str] = []
    for label, *cells in rows:
        pieces = [_cut(cell, room) for cell in cells]
        for index in range(max(len(piece) for piece in pieces)):
            parts = [label if index == 0 else "", *(piece[index] if index < len(piece) else "" for piece in pieces)]
            padded = [part + " " * (size - width(part)) for part, size in zip(parts, (first, room, room))]
            lines.append("  ".join(padded).rstrip())
    count = text("{} difference{}", "共 {} 处差异{}")[language].format(len(found), "s" if language == "en" and len(found) > 1 else "")
    return "\n".join([*lines, "", count])


def _cut(cell: str, room: int) -> List[str]:
    """A cell's lines; a word that no line has room for is cut."""
    return wrapped(re.sub(r"\S{%d,}" % (room + 1), lambda word: re.sub(r"(.{%d})(?=.)" % room, r"\1 ", word.group(0)), cell), room)
