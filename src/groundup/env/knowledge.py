"""What is known about torch's builds, drivers and GPUs: questions to `knowledge.json`, which keeps the source of every fact.

Versions are tuples of int, `sm` is the compute capability without the dot (86 is 8.6), a build is an index tag ('cpu', 'cu126',
'rocm7.2'). A question that the data cannot answer gets None, so that "unknown" is never taken for "no".
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

Version = Tuple[int, ...]


@functools.lru_cache(maxsize=None)
def load() -> Dict[str, Any]:
    """The whole data file."""
    return dict(json.loads(Path(__file__).with_name("knowledge.json").read_text(encoding="utf-8")))


def version(source: Optional[str]) -> Version:
    """'2.9.1+cu126' -> (2, 9, 1); () where there is no number."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", (source or "").strip(), maxsplit=1)[0])[:4])


def minor(torch: Optional[str]) -> str:
    """'2.9.1+cu126' -> '2.9'."""
    return ".".join(str(part) for part in version(torch)[:2])


def dotted(numbers: Sequence[int]) -> str:
    return ".".join(str(number) for number in numbers)


# --- releases --------------------------------------------------------------------------------------------------------------------


def release(torch: Optional[str]) -> Optional[Dict[str, Any]]:
    """The entry of a release ('2.9.1' finds 2.9)."""
    return next((entry for entry in load()["releases"] if entry["torch"] == minor(torch)), None)


def releases() -> List[Dict[str, Any]]:
    """All releases, the newest first."""
    return list(load()["releases"])


def releases_for_python(python: Version) -> List[str]:
    """Releases with wheels for this Python, the newest first."""
    return [entry["torch"] for entry in releases() if version(entry["python"][0]) <= python[:2] <= version(entry["python"][1])]


def companions(torch: Optional[str]) -> Dict[str, str]:
    """{'torchvision': '0.24.1', 'torchaudio': '2.9.1'} for torch 2.9.1; minors ('0.24') for a patch that is not listed; {} if unknown."""
    number = dotted(version(torch)[:3])
    for entry in load()["companions"]:
        if entry["torch"] == number:
            return {"torchvision": entry["torchvision"], "torchaudio": entry["torchaudio"]}
    found = release(torch)
    return {"torchvision": found["torchvision"], "torchaudio": found["torchaudio"]} if found else {}


def companion_fits(torch: str, name: str, installed: str) -> Optional[bool]:
    """Whether this release of torchvision or torchaudio was made for this release of torch (by minor version)."""
    wanted = companions(torch).get(name)
    if wanted is None or not version(installed):
        return None
    if name == "torchaudio" and version(installed)[:2] >= (2, 11) and version(torch)[:2] >= (2, 11):
        return True  # stable binary interface
    return version(installed)[:2] == version(wanted)[:2]


def torch_for_companion(name: str, installed: str) -> Optional[str]:
    """The release of torch that a torchvision or torchaudio was made for: exact where the table has it, else the minor ('2.9')."""
    number = version(installed)
    if not number:
        return None
    for entry in load()["companions"]:
        if version(entry[name]) == number[:3]:
            return str(entry["torch"])
    for entry in releases():
        if version(entry[name])[:2] == number[:2]:
            return str(entry["torch"])
    return None


def newest_patch(torch: str) -> str:
    """'2.9' -> '2.9.1': the newest patch that the table lists; '2.9.1' stays."""
    if len(version(torch)) >= 3:
        return torch
    return next((str(entry["torch"]) for entry in load()["companions"] if minor(entry["torch"]) == minor(torch)), minor(torch) + ".0")


def python_range(torch: Optional[str]) -> Optional[Tuple[Version, Version]]:
    """The oldest and the newest Python, ((3, 10), (3, 14)), that a release has wheels for."""
    found = release(torch)
    return (version(found["python"][0]), version(found["python"][1])) if found else None


def last_for_intel_mac() -> str:
    """The last release with wheels for Intel Macs."""
    return str(load()["platforms"]["macos_x86_64"]["last_torch"])


def numpy_1_only(torch: str, windows: bool) -> bool:
    """Whether a release was compiled against NumPy 1 and fails with NumPy 2."""
    return version(torch)[:3] < version(load()["numpy"]["torch_for_numpy_2_windows" if windows else "torch_for_numpy_2"])


# --- builds and what they run on -------------------------------------------------------------------------------------------------


def cuda_of(build: Optional[str]) -> Optional[Version]:
    """'cu126' -> (12, 6); 'cu92' -> (9, 2); None for what is no CUDA build."""
    found = re.match(r"cu(\d{2,3})$", build or "")
    if not found:
        return None
    digits = found.group(1)
    return (int(digits[:-1]), int(digits[-1]))


def tag_of(cuda: Optional[str]) -> Optional[str]:
    """'12.6' -> 'cu126'."""
    numbers = version(cuda)
    return "cu{}{}".format(numbers[0], numbers[1]) if len(numbers) >= 2 and numbers[0] < 100 else None


def builds(torch: Optional[str]) -> List[str]:
    """CUDA builds of a release, the newest CUDA first."""
    found = release(torch)
    return sorted(found["cuda"], key=lambda tag: cuda_of(tag) or (), reverse=True) if found else []


def default_build(torch: Optional[str]) -> Optional[str]:
    """The CUDA build that the default package index has for Linux on x86_64; elsewhere it has none."""
    found = release(torch)
    return str(found["default_linux"]) if found else None


def rocm_builds(torch: Optional[str]) -> List[str]:
    """'rocm7.2' and so on, the newest first."""
    found = release(torch)
    return ["rocm" + number for number in sorted(found["rocm"], key=version, reverse=True)] if found else []


def is_stable(torch: Optional[str], build: str) -> bool:
    """Whether a CUDA build of a release is more than an experimental one."""
    found = release(torch)
    return bool(found and found["cuda"].get(build, {}).get("stable"))


def _platform(system: str, machine: str) -> str:
    system = {"darwin": "macos"}.get(system.lower(), system.lower())
    return "{}-{}".format(system, {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower()))


def kernels(torch: Optional[str], build: Optional[str], system: str, machine: str) -> Optional[Tuple[List[int], List[int]]]:
    """(sm of the kernels, sm of the PTX) in a build for this platform; None where that is not known."""
    number, platform = version(torch)[:2], _platform(system or "linux", machine or "x86_64")
    for entry in load()["kernels"]:
        if entry["build"] == build and entry["platform"] == platform and version(entry["torch"][0]) <= number <= version(entry["torch"][1]):
            return list(entry["sm"]), list(entry["ptx"])
    return None


def runs(found: Tuple[Sequence[int], Sequence[int]], sm: int) -> bool:
    """Whether a GPU finds a kernel: same major with an equal or higher minor version, or PTX of anything not newer."""
    return any(k // 10 == sm // 10 and k <= sm for k in found[0]) or any(p <= sm for p in found[1])


def builds_for(sm: int, torch: Optional[str], system: str, machine: str, driver: Optional[Version] = None, wsl: bool = False) -> List[str]:
    """CUDA builds of a release that have kernels for this GPU, and that this driver runs if one is given; the newest CUDA first."""
    found = []
    for tag in builds(torch):
        carried = kernels(torch, tag, system, machine)
        if carried and runs(carried, sm) and (driver is None or driver_runs(tag, driver, wsl or system == "windows")):
            found.append(tag)
    return found


def releases_with_kernels(sm: Optional[int], system: str, machine: str) -> Optional[str]:
    """'2.7 (cu128) - 2.14 (cu132/cu130)': the oldest and the newest release that have kernels for a GPU, with the builds that have them."""
    having = [(entry["torch"], builds_for(sm, entry["torch"], system, machine)) for entry in releases()] if sm else []
    named = ["{} ({})".format(torch, "/".join(tags)) for torch, tags in having if tags]
    return " - ".join(dict.fromkeys([named[-1], named[0]])) if named else None


def driver_minimum(build: Optional[str], windows: bool) -> Optional[Version]:
    """The oldest NVIDIA driver that runs a CUDA build. `windows` also for WSL, whose driver is the Windows one."""
    cuda = cuda_of(build)
    if cuda is None:
        return None
    key = "windows" if windows else "linux"
    for entry in load()["drivers"]["by_cuda_major"]:
        if entry["major"] == cuda[0]:
            return version(entry[key])
    for entry in load()["drivers"]["before_cuda_11"]:
        if version(entry["cuda"])[:2] == cuda:
            return version(entry[key])
    return None


def driver_minimum_text(build: Optional[str], windows: bool) -> Optional[str]:
    """As NVIDIA writes it: '525.60.13'."""
    minimum = driver_minimum(build, windows)
    return None if minimum is None else ".".join([str(minimum[0])] + ["{:02d}".format(part) for part in minimum[1:]])


def driver_runs(build: Optional[str], driver: Version, windows: bool) -> Optional[bool]:
    """Whether a driver is new enough for a build; None where the minimum is not known."""
    minimum = driver_minimum(build, windows)
    return None if minimum is None or not driver else tuple(driver) >= minimum


def cuda_of_driver(driver: Version) -> Optional[Version]:
    """The newest CUDA (major, minor) whose toolkit shipped with a driver not newer than this one."""
    for entry in load()["drivers"]["of_toolkits"] + load()["drivers"]["before_cuda_11"]:
        if entry["linux"] and version(entry["linux"])[:2] <= tuple(driver)[:2]:
            return version(entry["cuda"].split(" ")[0])[:2]
    return None


# --- GPUs ------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def _patterns(table: str) -> List[Tuple[Any, Any]]:
    key = "sm" if table == "nvidia_gpus" else "gfx"
    return [(re.compile(item["match"], re.IGNORECASE), item[key]) for item in load()[table]["items"]]


def sm_of(name: Optional[str]) -> Optional[int]:
    """The compute capability that goes with an NVIDIA GPU's name."""
    return next((int(sm) for pattern, sm in _patterns("nvidia_gpus") if pattern.search(name or "")), None)


def gfx_of(name: Optional[str]) -> Optional[str]:
    """The gfx target ('1100') that goes with an AMD GPU's name."""
    return next((str(gfx) for pattern, gfx in _patterns("amd_gpus") if pattern.search(name or "")), None)


def rocm_gfx(rocm: Optional[str]) -> Optional[List[str]]:
    """gfx targets in the wheels of a ROCm release ('6.3'); None where that is not known."""
    found = load()["rocm_gfx"]["builds"].get(rocm or "")
    return list(found) if found else None


def rocm_override(gfx: str) -> Optional[str]:
    """The HSA_OVERRIDE_GFX_VERSION that users report for a target without kernels (unofficial)."""
    return next((str(entry["value"]) for entry in load()["rocm_overrides"] if gfx in entry["gfx"]), None)


def mps_minimum(torch: Optional[str]) -> Optional[Version]:
    """The oldest macOS on which this release of torch uses the Apple GPU."""
    number = version(torch)[:2]
    for entry in load()["platforms"]["mps_minimum_macos"]:
        if version(entry["torch"][0]) <= number <= version(entry["torch"][1]):
            return version(entry["macos"])
    return None


def glibc_minimum(torch: Optional[str], build: Optional[str] = None) -> Optional[Version]:
    """The oldest glibc for a release's Linux wheels."""
    found = release(torch)
    return version(found.get("glibc_by_build", {}).get(build or "", found["glibc"])) if found else None
