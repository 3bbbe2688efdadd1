"""Which torch to install here: facts in, Choice out, no side effects.

The driver, the GPU's compute capability and the kernels inside a wheel decide together. Deciding from the driver alone, as
most tools do, gives a Pascal card with a new driver a CUDA 13 build that has no kernels for it.
Sources of the tables: PyTorch's RELEASE.md (build matrix, architectures), NVIDIA's minor version compatibility (drivers).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

from groundup.env.language import Text, text

TORCH = "2.13.0"
WHEEL_INDEX = "https://download.pytorch.org/whl"

# Room for torch, its libraries and groundup's other dependencies, with pip's temporary copies.
DISK_GB = {"cpu": 2.5, "mps": 2.5, "cuda": 8.0, "rocm": 18.0}


@dataclass(frozen=True)
class CudaBuild:
    """One CUDA build of torch: the kernels it carries (compute capability without the dot) and the oldest driver that runs it."""

    tag: str
    torch: str
    kernels: Mapping[str, Tuple[int, ...]]
    ptx: Optional[int]
    driver: Tuple[int, ...]
    driver_windows: Tuple[int, ...]

    def runs(self, capability: int, machine: str) -> bool:
        """True when a GPU of this compute capability finds a kernel in this build."""
        # A kernel runs on the same major version with an equal or higher minor one; PTX is compiled for anything newer.
        return any(k // 10 == capability // 10 and k <= capability for k in self.kernels.get(machine, ())) or bool(
            self.ptx and self.ptx <= capability
        )

    def minimum(self, windows: bool) -> Tuple[int, ...]:
        return self.driver_windows if windows else self.driver


# In the order of preference. CUDA runs within one major family on every driver that meets the family's minimum, so 12.8 needs
# no newer driver than 12.6. torch 2.13 has no cu128; 2.11 is the last that has, and Blackwell with a 570 driver needs it.
CUDA_BUILDS = (
    CudaBuild(
        "cu130",
        TORCH,
        {"x86_64": (75, 80, 86, 90, 100, 120), "aarch64": (80, 90, 100, 110, 120)},
        120,
        driver=(580,),
        driver_windows=(580,),
    ),
    CudaBuild(
        "cu126", TORCH, {"x86_64": (50, 60, 70, 75, 80, 86, 90), "aarch64": (80, 90)}, None, driver=(525, 60, 13), driver_windows=(528, 33)
    ),
    CudaBuild(
        "cu128",
        "2.11.0",
        {"x86_64": (75, 80, 86, 90, 100, 120), "aarch64": (80, 90, 100, 120)},
        None,
        driver=(525, 60, 13),
        driver_windows=(528, 33),
    ),
)
ROCM = "rocm7.2"
ROCM_GFX = ("900", "906", "908", "90a", "942", "950", "1030", "1100", "1101", "1102", "1150", "1151", "1200", "1201")
BACKENDS = ("cpu", *(build.tag for build in CUDA_BUILDS), ROCM, "mps")

_MPS_MACOS = (14, 0)
_MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Choice:
    """What to install and why.

    `device` is what torch must then be able to compute on. `pip_args` follow `pip install`. `pip_args_without_index` are for the
    case that PyTorch's own wheel index does not answer; None: there is no other source. When `refused` is set, nothing fits.
    """

    backend: str
    torch_version: str
    pip_args: Tuple[str, ...]
    reason: Text
    refused: Optional[Text] = None
    device: str = "cpu"
    disk_gb: float = DISK_GB["cpu"]
    index_url: Optional[str] = None
    pip_args_without_index: Optional[Tuple[str, ...]] = None

    def fits(self, installed: Optional[Mapping[str, Any]]) -> bool:
        """True when the torch already there (see `probe.installed_torch`) is the chosen version and build."""
        if installed is None:
            return False
        version, _, build = str(installed["version"]).partition("+")
        if self.backend in ("cpu", "mps"):
            # What the default index gave is right for the CPU, even where (on Linux) that is a CUDA build.
            build = str(installed["distribution"]).partition("+")[2]
            return version == self.torch_version and build in ("", "cpu")
        return version == self.torch_version and build == self.backend


def choose_build(facts: Mapping[str, Any], backend: Optional[str] = None, index: str = WHEEL_INDEX) -> Choice:
    """The build of torch for a machine.

    Args:
        facts: what `probe.facts()` returns.
        backend: a build that the user asks for (`BACKENDS`), instead of the best one.
        index: base address of PyTorch's wheel index or of a mirror of it.
    """
    wall = machine_refusal(facts)
    if wall:
        return _refuse(wall)
    if backend and backend not in BACKENDS:
        listed = ", ".join(BACKENDS)
        return _refuse(
            text(
                f"there is no build '{backend}' that groundup supports. Expected one of: {listed}.",
                f"groundup 不支持名为 {backend} 的构建。可选：{listed}。",
            )
        )
    if facts["os"]["system"] == "Darwin":
        return _choose_mac(facts, backend)
    if backend == "mps":
        return _refuse(
            text("the mps build needs a Mac with Apple silicon; this is not a Mac.", "mps 只用于 Apple 芯片的 Mac，本机不是 Mac。")
        )
    if backend == "cpu":
        return _cpu(index, text("the CPU build was asked for", "按要求使用 CPU 版"))
    if backend == ROCM:
        return _asked_rocm(facts, index)
    if backend:
        return _asked_cuda(facts, next(build for build in CUDA_BUILDS if build.tag == backend), index)

    notes: List[Text] = []
    choice = _choose_cuda(facts, index, notes) or _choose_rocm(facts, index, notes)
    if choice:
        return choice
    if not notes:
        notes.append(text("no GPU that torch can use was found", "没有找到 torch 可用的 GPU"))
    return _cpu(index, text("; ".join(n["en"] for n in notes), "；".join(n["zh"] for n in notes)))


def machine_refusal(facts: Mapping[str, Any]) -> Optional[Text]:
    """Why no torch can be installed on this machine at all, or None."""
    system, python = facts["os"], facts["python"]
    if python["implementation"] != "CPython":
        return text(
            f"this is {python['implementation']}; torch has wheels for CPython only. Use the ordinary Python from your system.",
            f"当前解释器是 {python['implementation']}，而 torch 只提供 CPython 的安装包。请改用普通的 Python。",
        )
    if python["bits"] != 64:
        return text(
            f"this Python is a {python['bits']}-bit program; torch needs 64 bits. Install the "
            "64-bit Python (on a 32-bit system: a 64-bit system).",
            f"当前 Python 是 {python['bits']} 位程序，而 torch 需要 64 位。请安装 64 位 Python（系统本身为 32 位时，请换用 64 位系统）。",
        )
    if python["free_threaded"]:
        return text(
            f"this is the free-threaded build of Python {python['version']}; not every dependency of groundup has wheels for it. "
            "Use the ordinary build (without the 't').",
            f"当前是自由线程版（无 GIL）Python {python['version']}，groundup 的部分依赖还没有对应的安装包。请改用普通版（版本号不带 t）。",
        )
    if system["system"] == "Darwin" and system["machine"] == "x86_64":
        if system["rosetta"]:
            return text(
                "this Python is an Intel program that runs under Rosetta on Apple silicon; torch for Intel Macs ended with 2.2.2. "
                "Use an arm64 Python (Homebrew in /opt/homebrew, or the universal installer), then run this again with it.",
                "当前 Python 是在 Apple 芯片上经 Rosetta 转译运行的 Intel 程序，而 Intel 版 Mac 的 torch 止于 2.2.2。"
                "请安装 arm64 版 Python（/opt/homebrew 中的 Homebrew，或官方通用安装包），再用它重新运行。",
            )
        return text(
            "this is an Intel Mac; torch's wheels for Intel Macs ended with 2.2.2 (2024), and groundup needs 2.10 or newer. "
            "Use a Mac with Apple silicon, or Linux or Windows (also on this machine).",
            "这是 Intel 芯片的 Mac。torch 为它提供的安装包止于 2.2.2（2024 年），而 groundup 需要 2.10 以上。"
            "请使用 Apple 芯片的 Mac，或（在本机上也可以）使用 Linux 或 Windows。",
        )
    if system["jetson"]:
        return text(
            "this is an NVIDIA Jetson (tegra kernel); PyTorch's own wheels do not run on its GPU. "
            "Install NVIDIA's torch wheel for your JetPack release "
            "into an environment of your own, then: pip install -e .",
            "这是 NVIDIA Jetson（tegra 内核），PyTorch 官方安装包无法使用它的 GPU。"
            "请在自己的环境里安装 NVIDIA 为对应 JetPack 版本提供的 torch，然后执行：pip install -e .",
        )
    if system["libc"] == "musl":
        return text(
            "this system uses the musl C library (Alpine); torch has wheels for glibc only. "
            "Use a Debian, Ubuntu or Fedora system or image.",
            "本系统使用 musl C 库（如 Alpine），而 torch 只有面向 glibc 的安装包。请改用 Debian、Ubuntu 或 Fedora 系统（或镜像）。",
        )
    glibc = re.match(r"glibc (\d+)\.(\d+)", system["libc"] or "")
    if glibc and (int(glibc.group(1)), int(glibc.group(2))) < (2, 28):
        return text(
            f"this system has {system['libc']}; torch's wheels need glibc 2.28 or newer (Debian 10, Ubuntu 20.04, RHEL 8 and later).",
            f"本系统为 {system['libc']}，而 torch 的安装包需要 glibc 2.28 以上（Debian 10、Ubuntu 20.04、RHEL 8 及更新的系统）。",
        )
    if system["machine"] not in _MACHINES:
        return text(
            f"this machine's processor is {system['machine']}; torch has wheels for x86_64 and aarch64 (arm64) only.",
            f"本机处理器架构为 {system['machine']}，而 torch 只有 x86_64 与 aarch64（arm64）的安装包。",
        )
    return None


# --- NVIDIA ----------------------------------------------------------------------------------------------------------------------


def _choose_cuda(facts: Mapping[str, Any], index: str, notes: List[Text]) -> Optional[Choice]:
    """The CUDA build that serves the most GPUs of this machine; when none does, None and a note that says why."""
    nvidia = facts["nvidia"]
    gpus, driver = nvidia["gpus"], nvidia["driver"]
    if not gpus:
        note = _silent_nvidia(facts)
        if note:
            notes.append(note)
        return None
    names = ", ".join(sorted({_describe(gpu) for gpu in gpus}))
    if _version(driver) is None:
        notes.append(text(f"{names} found, but its driver's version could not be read", f"找到 {names}，但读不到驱动版本"))
        return None
    able = [build for build in CUDA_BUILDS if _driver_runs(build, facts)]
    if not able:
        oldest = _dotted(CUDA_BUILDS[1].minimum(_windows_driver(facts)))
        notes.append(
            text(
                f"{names} found, but its driver {driver} is older than {oldest}, which every current "
                "CUDA build needs; update the driver and run this again",
                f"找到 {names}，但驱动 {driver} 低于目前所有 CUDA 版所需的 {oldest}；请更新驱动后重新运行",
            )
        )
        return None

    served = {build.tag: [gpu for gpu in gpus if _gpu_runs(build, gpu, facts)] for build in able}
    # max() keeps the first of equals, and the table is in the order of preference.
    best = max(able, key=lambda build: len(served[build.tag]))
    if not served[best.tag]:
        if any(_gpu_runs(build, gpu, facts) for build in CUDA_BUILDS for gpu in gpus):
            notes.append(
                text(
                    f"{names} needs a CUDA 13 build, and that a driver >= 580; this machine has "
                    f"{driver}: update the driver and run this again",
                    f"{names} 需要 CUDA 13 版，而它要求驱动 >= 580，本机为 {driver}；请更新驱动后重新运行",
                )
            )
        else:
            notes.append(
                text(
                    f"{names} found, but no current build of torch has kernels for it (oldest compute capability: 5.0)",
                    f"找到 {names}，但目前的 torch 没有适用于它的内核（最低计算能力 5.0）",
                )
            )
        return None
    reason = _cuda_reason(best, names, driver)
    left_out = [gpu for gpu in gpus if gpu not in served[best.tag]]
    if left_out:
        unused = ", ".join(_describe(gpu) for gpu in left_out)
        reason = text(
            reason["en"] + f"; it has no kernels for {unused}, which stays unused",
            reason["zh"] + f"；它没有适用于 {unused} 的内核，该卡将闲置",
        )
    return _cuda(best, facts, index, reason)


def _cuda_reason(build: CudaBuild, names: str, driver: str) -> Text:
    if build.tag == "cu130":
        return text(f"{names}, driver {driver} (CUDA 13 needs >= 580)", f"{names}，驱动 {driver}（CUDA 13 需要 >= 580）")
    if build.tag == "cu128":
        return text(
            f"{names}, driver {driver}: too new a GPU for CUDA 12.6, too old a driver for CUDA 13; "
            f"torch {build.torch} is the last with CUDA 12.8. With a driver >= 580 you would get torch {TORCH}",
            f"{names}，驱动 {driver}：GPU 太新，CUDA 12.6 不支持；驱动太旧，不能用 CUDA 13。"
            f"torch {build.torch} 是最后一个带 CUDA 12.8 的版本；"
            f"驱动升级到 580 以上即可使用 torch {TORCH}",
        )
    if (_version(driver) or (0,)) >= (580,):
        return text(
            f"{names}, driver {driver}: CUDA 13 dropped GPUs before compute capability 7.5, CUDA 12.6 still has their kernels",
            f"{names}，驱动 {driver}：CUDA 13 不再支持计算能力低于 7.5 的 GPU，CUDA 12.6 仍带有它们的内核",
        )
    return text(f"{names}, driver {driver} (CUDA 13 would need >= 580)", f"{names}，驱动 {driver}（CUDA 13 需要 >= 580）")


def _silent_nvidia(facts: Mapping[str, Any]) -> Optional[Text]:
    """What to say when there are signs of an NVIDIA GPU but none answers."""
    nvidia = facts["nvidia"]
    if nvidia["problem"]:
        return text(
            f"an NVIDIA driver is here but no GPU answers ({nvidia['problem']})", f"有 NVIDIA 驱动，但没有 GPU 应答（{nvidia['problem']}）"
        )
    if nvidia["driver"] and facts["os"]["container"]:
        return text(
            f"the host has NVIDIA driver {nvidia['driver']}, but this container was started without its GPUs (docker run --gpus all)",
            f"宿主机有 NVIDIA 驱动 {nvidia['driver']}，但容器启动时没有带上 GPU（docker run --gpus all）",
        )
    if nvidia["driver"]:
        return text(
            f"NVIDIA driver {nvidia['driver']} is loaded, but no GPU answers", f"已加载 NVIDIA 驱动 {nvidia['driver']}，但没有 GPU 应答"
        )
    if nvidia["on_bus"]:
        return text(
            "an NVIDIA GPU is built in, but its driver is not installed or not loaded; install it and run this again to use the GPU",
            "本机装有 NVIDIA GPU，但驱动未安装或未加载；装好驱动后重新运行即可使用 GPU",
        )
    return None


def _asked_cuda(facts: Mapping[str, Any], build: CudaBuild, index: str) -> Choice:
    """A CUDA build by the user's wish: refused only when a known fact makes it impossible."""
    gpus, driver = facts["nvidia"]["gpus"], facts["nvidia"]["driver"]
    if not build.kernels.get(facts["os"]["machine"]):
        return _refuse(
            text(f"{build.tag} has no wheels for {facts['os']['machine']}.", f"{build.tag} 没有 {facts['os']['machine']} 的安装包。")
        )
    if _version(driver) is not None and not _driver_runs(build, facts):
        needed = _dotted(build.minimum(_windows_driver(facts)))
        return _refuse(
            text(
                f"torch {build.torch}+{build.tag} needs an NVIDIA driver >= {needed}; this machine has {driver}. "
                "Update the driver, or leave --backend away to get the best build for this one.",
                f"torch {build.torch}+{build.tag} 需要 NVIDIA 驱动 >= {needed}，本机为 {driver}。"
                "请更新驱动，或去掉 --backend，由程序按当前驱动选择。",
            )
        )
    if gpus and not any(_gpu_runs(build, gpu, facts) for gpu in gpus):
        names = ", ".join(sorted({_describe(gpu) for gpu in gpus}))
        return _refuse(
            text(
                f"torch {build.torch}+{build.tag} has no kernels for {names}. Leave --backend away to get a build that has.",
                f"torch {build.torch}+{build.tag} 没有适用于 {names} 的内核。请去掉 --backend，由程序选择合适的构建。",
            )
        )
    if gpus:
        return _cuda(build, facts, index, text(f"{build.tag} was asked for", f"按要求使用 {build.tag}"))
    note = text(
        f"{build.tag} was asked for; no NVIDIA GPU answers here, so it will compute on the CPU until one does",
        f"按要求使用 {build.tag}；目前没有 NVIDIA GPU 应答，暂时只能在 CPU 上计算",
    )
    return _cuda(build, facts, index, note, device="cpu")


def _cuda(build: CudaBuild, facts: Mapping[str, Any], index: str, reason: Text, device: str = "cuda") -> Choice:
    # The default package index carries one CUDA build, for Linux on x86_64 only: for 2.13 that is cu130.
    on_default = build.tag == "cu130" and facts["os"]["system"] == "Linux" and facts["os"]["machine"] == "x86_64"
    return Choice(
        backend=build.tag,
        torch_version=build.torch,
        # With the local version in the pin, pip replaces a CPU build of the same release instead of keeping it.
        pip_args=(f"torch=={build.torch}+{build.tag}", "--index-url", f"{index}/{build.tag}"),
        reason=reason,
        device=device,
        disk_gb=DISK_GB["cuda"],
        index_url=f"{index}/{build.tag}",
        pip_args_without_index=(f"torch=={build.torch}",) if on_default else None,
    )


def _gpu_runs(build: CudaBuild, gpu: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    if gpu["compute_capability"] is None:
        return True  # unknown is not a reason against: the verification after the install decides
    major, minor = gpu["compute_capability"].split(".")
    machine = facts["os"]["machine"]
    if facts["os"]["system"] == "Windows" and machine != "x86_64":
        return False
    return build.runs(int(major) * 10 + int(minor), machine)


def _driver_runs(build: CudaBuild, facts: Mapping[str, Any]) -> bool:
    return (_version(facts["nvidia"]["driver"]) or (0,)) >= build.minimum(_windows_driver(facts))


def _windows_driver(facts: Mapping[str, Any]) -> bool:
    return bool(facts["os"]["system"] == "Windows" or facts["os"]["wsl"])


def _describe(gpu: Mapping[str, Any]) -> str:
    return str(gpu["name"]) + (f" ({gpu['compute_capability']})" if gpu["compute_capability"] else "")


# --- AMD, Apple, CPU -------------------------------------------------------------------------------------------------------------


def _choose_rocm(facts: Mapping[str, Any], index: str, notes: List[Text]) -> Optional[Choice]:
    gfx = facts["amd"]["gfx"]
    if not gfx:
        if facts["amd"]["on_bus"] and not notes and facts["os"]["machine"] == "x86_64":
            notes.append(
                text(
                    "an AMD GPU is built in, but ROCm's kernel driver does not offer it for computing",
                    "本机有 AMD GPU，但 ROCm 内核驱动没有把它用于计算",
                )
            )
        return None
    good = [name for name in gfx if name.replace("gfx", "") in ROCM_GFX]
    if good and facts["os"]["machine"] == "x86_64":
        return _rocm(index, text(f"AMD {', '.join(good)} through ROCm", f"AMD {', '.join(good)}（ROCm）"))
    notes.append(
        text(
            f"AMD {', '.join(gfx)} found, but the ROCm build of torch {TORCH} has no kernels for it",
            f"找到 AMD {', '.join(gfx)}，但 torch {TORCH} 的 ROCm 版没有适用的内核",
        )
    )
    return None


def _asked_rocm(facts: Mapping[str, Any], index: str) -> Choice:
    if (facts["os"]["system"], facts["os"]["machine"]) != ("Linux", "x86_64"):
        return _refuse(text(f"{ROCM} has wheels for Linux on x86_64 only.", f"{ROCM} 只有 Linux x86_64 的安装包。"))
    return _rocm(index, text(f"{ROCM} was asked for", f"按要求使用 {ROCM}"), device="cuda" if facts["amd"]["gfx"] else "cpu")


def _rocm(index: str, reason: Text, device: str = "cuda") -> Choice:
    """torch's ROCm build calls its devices 'cuda' too."""
    url = f"{index}/{ROCM}"
    return Choice(
        ROCM, TORCH, (f"torch=={TORCH}+{ROCM}", "--index-url", url), reason, device=device, disk_gb=DISK_GB["rocm"], index_url=url
    )


def _choose_mac(facts: Mapping[str, Any], backend: Optional[str]) -> Choice:
    if backend not in (None, "cpu", "mps"):
        return _refuse(text(f"{backend} does not exist for macOS. Expected: mps or cpu.", f"macOS 没有 {backend} 版。可选：mps 或 cpu。"))
    # One wheel serves both; what differs is the device that must work afterwards.
    macos, chip = facts["apple"]["macos"], facts["apple"]["chip"] or "Apple silicon"
    able = (_version(macos) or (0,)) >= _MPS_MACOS
    if backend == "cpu":
        return Choice("cpu", TORCH, (f"torch=={TORCH}",), text("the CPU was asked for", "按要求使用 CPU"))
    if able:
        return Choice("mps", TORCH, (f"torch=={TORCH}",), text(f"{chip}, macOS {macos}", f"{chip}，macOS {macos}"), device="mps")
    why = text(
        f"torch {TORCH} needs macOS 14 to use the GPU of {chip}; this is {macos}",
        f"torch {TORCH} 使用 {chip} 的 GPU 需要 macOS 14，本机为 {macos}",
    )
    if backend == "mps":
        return _refuse(text(why["en"] + ".", why["zh"] + "。"))
    return Choice("cpu", TORCH, (f"torch=={TORCH}",), why)


def _cpu(index: str, reason: Text) -> Choice:
    # An extra index, not the only one: where it cannot be reached the default index has the same release (on Linux with CUDA's libraries).
    url = f"{index}/cpu"
    args = (f"torch=={TORCH}", "--extra-index-url", url)
    # Every package of the installation asks every index: with pip's five retries an index that is away costs minutes.
    return Choice("cpu", TORCH, args, reason, index_url=url, pip_args_without_index=(*args, "--retries", "0"))


def _refuse(why: Text) -> Choice:
    return Choice("none", "", (), why, refused=why, disk_gb=0.0)


def _version(source: Optional[str]) -> Optional[Tuple[int, ...]]:
    numbers = re.findall(r"\d+", source or "")
    return tuple(int(number) for number in numbers) if numbers else None


def _dotted(version: Tuple[int, ...]) -> str:
    # NVIDIA writes the parts after the first with two digits: 525.60.13
    return ".".join([str(version[0]), *(f"{part:02d}" for part in version[1:])])


def as_dict(choice: Choice) -> Dict[str, Any]:
    """The choice for JSON."""
    return {
        "backend": choice.backend,
        "torch": choice.torch_version,
        "device": choice.device,
        "pip_args": list(choice.pip_args),
        "reason": choice.reason,
        "refused": choice.refused,
    }
