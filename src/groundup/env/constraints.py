"""What decides whether a build of torch runs on a machine: one release and build against everything that is known of it.

Driver, kernels, Python, C library and platform are checked together, each as a `Constraint` that can say why it fails and what would
help. Every number comes from `knowledge`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from groundup.env import knowledge
from groundup.env.knowledge import Version, dotted, version
from groundup.env.language import Text, text

COMPANIONS = ("torchvision", "torchaudio")
_SYSTEMS = {"Darwin": "macOS"}


@dataclass(frozen=True)
class Constraint:
    """One line of the table. `satisfied` None: not known.

    `why` finishes the sentence "torch 2.13.0+cu130 ..." when it is not satisfied, `fix` is what would satisfy it.
    """

    key: str
    what: Text
    here: Text
    needed: Text
    satisfied: Optional[bool] = None
    why: Optional[Text] = None
    fix: Optional[Text] = None


# --- the machine -----------------------------------------------------------------------------------------------------------------


class Target:
    """The facts that decide, in the types that the table speaks; what is not known is None, and no platform means Linux on x86_64."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        system, python, nvidia, apple = (facts.get(key) or {} for key in ("os", "python", "nvidia", "apple"))
        self.facts = facts
        self.system = str(system.get("system") or "Linux")
        self.machine = str(system.get("machine") or "x86_64")
        self.place = "{} {}".format(_SYSTEMS.get(self.system, self.system), self.machine)
        self.windows = self.system == "Windows"
        self.windows_driver = bool(self.windows or system.get("wsl"))
        libc = re.match(r"glibc (\d+)\.(\d+)", system.get("libc") or "")
        self.glibc: Optional[Version] = (int(libc.group(1)), int(libc.group(2))) if libc else None
        self.python: Version = version(python.get("version"))[:2]
        self.environment = python.get("environment")
        self.macos: Version = version(apple.get("macos"))
        self.chip = str(apple.get("chip") or "")
        self.driver_text = nvidia.get("driver")
        self.driver: Version = version(self.driver_text)
        # (name, sm): the capability that the driver tells, else the one that goes with the name.
        self.gpus = [(str(gpu["name"]), capability(gpu)) for gpu in nvidia.get("gpus") or []]
        self.gfx = [str(name).replace("gfx", "") for name in (facts.get("amd") or {}).get("gfx") or []]
        self.installed = installed_versions(facts)

    @property
    def names(self) -> str:
        return ", ".join(sorted({described(gpu) for gpu in self.gpus}))


def installed_versions(facts: Mapping[str, Any]) -> Dict[str, str]:
    """{'torch': '2.9.1+cu128', ...}: what Python would import, with the build even where the distribution does not name it."""
    found: Dict[str, str] = {}
    for item in facts.get("packages") or []:
        build = item.get("build") if item["name"] in ("torch", *COMPANIONS) and item.get("where") != "conda" else None
        found.setdefault(item["name"], "+".join(filter(None, [str(item["version"]).partition("+")[0], build])))
    torch = facts.get("torch")
    if torch:
        build = (
            torch.get("build")
            or knowledge.tag_of(torch.get("cuda"))
            or ("rocm" + dotted(version(torch["hip"])[:2]) if torch.get("hip") else None)
        )
        number, _, local = str(torch["version"]).partition("+")
        found["torch"] = "+".join(filter(None, [number, local or build]))
    return found


def capability(gpu: Mapping[str, Any]) -> Optional[int]:
    stated = re.match(r"(\d+)\.(\d)$", str(gpu.get("compute_capability") or ""))
    return int(stated.group(1) + stated.group(2)) if stated else knowledge.sm_of(gpu["name"])


def described(gpu: Tuple[str, Optional[int]]) -> str:
    return gpu[0] + (" ({})".format(capability_text(gpu[1])) if gpu[1] else "")


def capability_text(sm: int) -> str:
    return "{}.{}".format(sm // 10, sm % 10)


def machine_refusal(facts: Mapping[str, Any]) -> Optional[Text]:
    """Why no release of torch can be installed on this machine at all, or None."""
    system, python = facts.get("os") or {}, facts.get("python") or {}
    if python.get("implementation") not in (None, "CPython"):
        return text(
            f"this is {python['implementation']}; torch has wheels for CPython only. Use the ordinary Python from your system.",
            f"当前解释器是 {python['implementation']}，而 torch 只提供 CPython 的安装包。请改用普通的 Python。",
        )
    if python.get("bits") not in (None, 64):
        return text(
            f"this Python is a {python['bits']}-bit program; torch needs 64 bits. Install the 64-bit Python (on a 32-bit system: a 64-bit system).",
            f"当前 Python 是 {python['bits']} 位程序，而 torch 需要 64 位。请安装 64 位 Python（系统本身为 32 位时，请换用 64 位系统）。",
        )
    if python.get("free_threaded"):
        return text(
            f"this is the free-threaded build of Python {python['version']}; not every dependency of groundup has wheels for it. "
            "Use the ordinary build (without the 't').",
            f"当前是自由线程版（无 GIL）Python {python['version']}，groundup 的部分依赖还没有对应的安装包。请改用普通版（版本号不带 t）。",
        )
    if system.get("rosetta"):
        return text(
            "this Python is an Intel program that runs under Rosetta on Apple silicon; torch for Intel Macs ended with "
            f"{knowledge.last_for_intel_mac()}. Use an arm64 Python (Homebrew in /opt/homebrew, or the universal installer), then run this again with it.",
            f"当前 Python 是在 Apple 芯片上经 Rosetta 转译运行的 Intel 程序，而 Intel 版 Mac 的 torch 止于 {knowledge.last_for_intel_mac()}。"
            "请安装 arm64 版 Python（/opt/homebrew 中的 Homebrew，或官方通用安装包），再用它重新运行。",
        )
    if system.get("jetson"):
        return text(
            "this is an NVIDIA Jetson (tegra kernel); PyTorch's own wheels do not run on its GPU. Install NVIDIA's torch wheel for "
            "your JetPack release into an environment of your own, then: pip install -e .",
            "这是 NVIDIA Jetson（tegra 内核），PyTorch 官方安装包无法使用它的 GPU。"
            "请在自己的环境里安装 NVIDIA 为对应 JetPack 版本提供的 torch，然后执行：pip install -e .",
        )
    if system.get("libc") == "musl":
        return text(
            "this system uses the musl C library (Alpine); torch has wheels for glibc only. Use a Debian, Ubuntu or Fedora system or image.",
            "本系统使用 musl C 库（如 Alpine），而 torch 只有面向 glibc 的安装包。请改用 Debian、Ubuntu 或 Fedora 系统（或镜像）。",
        )
    if system.get("machine") not in (None, "x86_64", "aarch64"):
        return text(
            f"this machine's processor is {system['machine']}; torch has wheels for x86_64 and aarch64 (arm64) only.",
            f"本机处理器架构为 {system['machine']}，而 torch 只有 x86_64 与 aarch64（arm64）的安装包。",
        )
    return None


# --- one release and build on this machine ---------------------------------------------------------------------------------------


class Candidate:
    """A release and a build, with every constraint checked."""

    def __init__(self, host: Target, torch: str, build: str) -> None:
        self.host, self.torch, self.build = host, torch, build
        # A release that is newer than the table is judged as the newest one in it.
        self.known = torch if knowledge.release(torch) else knowledge.releases()[0]["torch"]
        self.carried = knowledge.kernels(self.known, build, host.system, host.machine) if build.startswith("cu") else None
        # A GPU whose capability is not known is no reason against: the verification after the install decides.
        self.served = [gpu for gpu in host.gpus if self.carried and (gpu[1] is None or knowledge.runs(self.carried, gpu[1]))]
        self.constraints = tuple(self._check())
        self.failed = [row for row in self.constraints if row.satisfied is False]

    @property
    def kind(self) -> str:
        return kind_of(self.build)

    @property
    def device(self) -> str:
        """What torch will compute on here: a build for a GPU that is not there computes on the CPU."""
        if self.kind == "rocm":
            return "cuda" if self.host.gfx and not self.failed else "cpu"
        if self.kind == "xpu":
            return "xpu" if intel_gpus(self.host.facts) else "cpu"
        return {"cu": "cuda" if self.served else "cpu", "mps": "mps"}.get(self.kind, "cpu")

    @property
    def rank(self) -> Tuple[bool, int]:
        return self.kind == "cu", len(self.served)

    @property
    def label(self) -> str:
        """'2.13.0+cu126'; on a Mac, where one wheel serves everything, '2.13.0'."""
        return self.torch if self.host.system == "Darwin" else f"{self.torch}+{self.build}"

    def _check(self) -> Iterator[Constraint]:
        host = self.host
        yield self._platform()
        span = knowledge.python_range(self.known)
        if span:
            needed = "{} - {}".format(dotted(span[0]), dotted(span[1]))
            yield Constraint(
                "python",
                plain("Python"),
                plain(dotted(host.python) or "?"),
                plain(needed),
                span[0] <= host.python <= span[1] if host.python else None,
                text(f"has wheels for Python {needed} only", f"只有 Python {needed} 的安装包"),
                joined([text(f"Python {needed}", f"使用 Python {needed}"), _wheels_for(host.python)]),
            )
        minimum = knowledge.glibc_minimum(self.known, "linux-aarch64" if host.machine == "aarch64" else self.build)
        if host.system == "Linux" and minimum:
            oldest = dotted(minimum)
            yield Constraint(
                "libc",
                text("C library", "C 库"),
                plain("glibc " + dotted(host.glibc) if host.glibc else "?"),
                plain("glibc >= " + oldest),
                host.glibc >= minimum if host.glibc else None,
                text(f"needs glibc {oldest} or newer", f"需要 glibc {oldest} 以上"),
                text(
                    f"a system with glibc {oldest} or newer (2.28: Debian 10, Ubuntu 20.04, RHEL 8 and later)",
                    f"glibc {oldest} 以上的系统（2.28：Debian 10、Ubuntu 20.04、RHEL 8 及更新的系统）",
                ),
            )
        if self.kind == "cu":
            yield self._driver()
            if host.gpus:
                yield self._kernels()
        elif self.kind == "rocm" and host.gfx:
            yield self._gfx()
        elif self.kind == "mps":
            needs = knowledge.mps_minimum(self.known) or ()
            yield Constraint(
                "macos",
                plain("macOS"),
                plain(dotted(host.macos) or "?"),
                plain(">= " + dotted(needs)),
                host.macos >= needs if host.macos and needs else None,
                text(f"needs macOS {dotted(needs)} to use the GPU", f"使用 GPU 需要 macOS {dotted(needs)}"),
                text(f"macOS {dotted(needs)} or newer", f"macOS {dotted(needs)} 或更新的版本"),
            )

    def _platform(self) -> Constraint:
        host, last = self.host, knowledge.last_for_intel_mac()
        linux, mac, x86 = host.system == "Linux", host.system == "Darwin", host.machine == "x86_64"
        ok: Optional[bool] = {
            "cu": self.carried is not None,
            "rocm": linux and x86,
            "xpu": x86 and not mac,
            "mps": mac and not x86,
            # Windows on ARM got CPU wheels late: not in the table.
            "cpu": not x86 or version(self.torch) <= version(last) if mac else None if host.windows and not x86 else True,
        }[self.kind]
        if mac and x86:
            why = text(f"has no wheels for an Intel Mac: they ended with {last}", f"没有 Intel 芯片 Mac 的安装包：它们止于 {last}")
            fix = text(
                "a Mac with Apple silicon, or Linux or Windows (also on this machine)",
                "Apple 芯片的 Mac，或 Linux、Windows（在本机上也可以）",
            )
        else:
            why, fix = text(f"has no wheels for {host.place}", f"没有 {host.place} 的安装包"), None
        needed = text("Apple silicon", "Apple 芯片") if self.kind == "mps" else text(f"wheels for {host.place}", f"{host.place} 的安装包")
        return Constraint("system", text("System", "系统"), plain(host.place), needed, ok, why, fix)

    def _driver(self) -> Constraint:
        needed = knowledge.driver_minimum_text(self.build, self.host.windows_driver) or "?"
        return Constraint(
            "driver",
            text("NVIDIA driver", "NVIDIA 驱动"),
            plain(self.host.driver_text or "?"),
            plain(">= " + needed),
            knowledge.driver_runs(self.build, self.host.driver, self.host.windows_driver),
            text(f"needs a driver >= {needed}", f"需要驱动 >= {needed}"),
            text(f"an NVIDIA driver >= {needed} (how: groundup env driver)", f"NVIDIA 驱动 >= {needed}（方法：groundup env driver）"),
        )

    def _kernels(self) -> Constraint:
        names, host = self.host.names, self.host
        sms, ptx = self.carried or ([], [])
        listed = " ".join(capability_text(sm) for sm in sms) + (" + PTX" if ptx else "")
        spans = sorted({span for span in (knowledge.releases_with_kernels(gpu[1], host.system, host.machine) for gpu in host.gpus) if span})
        return Constraint(
            "gpu",
            plain("GPU"),
            plain(names),
            text(f"kernels: {listed}", f"内核：{listed}"),
            bool(self.served) if self.carried else None,
            text(f"has no kernels for {names}", f"没有适用于 {names} 的内核"),
            text("kernels for it: torch " + ", ".join(spans), "带有其内核的版本：torch " + "、".join(spans)) if spans else None,
        )

    def _gfx(self) -> Constraint:
        targets, here = knowledge.rocm_gfx(self.build[4:]), ", ".join("gfx" + name for name in self.host.gfx)
        listed = " ".join(targets or ["?"])
        return Constraint(
            "gfx",
            plain("AMD GPU"),
            plain(here),
            text(f"kernels: {listed}", f"内核：{listed}"),
            any(name in targets for name in self.host.gfx) if targets else None,
            text(f"has no kernels for {here}", f"没有适用于 {here} 的内核"),
        )


def plain(value: str) -> Text:
    return text(value, value)


def kind_of(build: str) -> str:
    return re.match(r"[a-z]*", build).group(0)  # type: ignore[union-attr]


def joined(parts: Sequence[Text], en: str = "; ", zh: str = "；") -> Text:
    return text(en.join(part["en"] for part in parts), zh.join(part["zh"] for part in parts))


def _wheels_for(python: Version) -> Text:
    found, name = knowledge.releases_for_python(python) if python else [], dotted(python)
    if not found:
        return text(f"no release has wheels for Python {name}", f"没有任何版本提供 Python {name} 的安装包")
    return text(f"Python {name} has torch {found[-1]} to {found[0]}", f"Python {name} 可用 torch {found[-1]} 至 {found[0]}")


def intel_gpus(facts: Mapping[str, Any]) -> List[str]:
    """Intel GPUs that the xpu build is made for; the small ones inside most processors are not."""
    return [
        name for name in (facts.get("intel") or {}).get("names") or [] if re.search(r"\bArc\b|Data Center GPU|Battlemage|Alchemist", name)
    ]
