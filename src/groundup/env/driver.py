"""What to do about the GPU's driver on this system, as commands that a person runs: `env driver`. Nothing is run here.

A wheel of torch brings CUDA or ROCm with it; what it needs from the system is the driver alone. Which driver a build needs comes from
`knowledge`. The commands are those of NVIDIA's driver installation guide (open kernel modules from compute capability 7.5 on and the
only ones for Blackwell; branch 580 is the last for older GPUs), of NVIDIA's container toolkit guide, and of each distribution.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from groundup.env import knowledge, plan
from groundup.env.constraints import capability
from groundup.env.knowledge import version
from groundup.env.language import Text, pick, text
from groundup.env.layout import columns, wrapped

if TYPE_CHECKING:
    import argparse

SYSTEMS = ("ubuntu", "debian", "rhel", "fedora", "arch", "opensuse", "windows", "wsl", "container", "jetson", "macos")
_FIRST_OPEN = 75  # compute capability of the oldest GPU that the open kernel modules drive
_LAST_BRANCH = 580  # of drivers for the GPUs before that
_REPOSITORY = "https://developer.download.nvidia.com/compute/cuda/repos"

_FAMILIES = {
    "ubuntu": "ubuntu|mint|pop|elementary|zorin|neon",
    "debian": "debian|raspbian|kali|devuan",
    "fedora": "fedora|nobara",
    "rhel": "rhel|red ?hat|centos|rocky|alma|oracle|ol|scientific|amzn|amazon|anolis|openeuler|kylin",
    "arch": "arch|manjaro|endeavouros|garuda|cachyos",
    "opensuse": "opensuse|suse|sles",
}


class Step(NamedTuple):
    """One thing to do: the commands in order, and what to know about them."""

    title: Text
    commands: Tuple[str, ...] = ()
    note: Optional[Text] = None


def system_of(facts: Mapping[str, Any]) -> Optional[str]:
    """Which of `SYSTEMS` a machine is; None for a Linux that is none of them."""
    system = facts.get("os") or {}
    if system.get("system") in ("Darwin", "Windows"):
        return {"Darwin": "macos", "Windows": "windows"}[system["system"]]
    for name in ("jetson", "wsl", "container"):
        if system.get(name):
            return name
    for said in ([system.get("id") or ""], system.get("like") or [], [system.get("name") or ""]):
        for name, pattern in _FAMILIES.items():
            if any(re.search(rf"\b(?:{pattern})", word, re.IGNORECASE) for word in said):
                return name
    return None


def vendors_of(facts: Mapping[str, Any]) -> List[str]:
    """'nvidia' and 'amd', as far as their GPUs are here; NVIDIA's where none is seen, because a missing driver hides them."""
    nvidia, amd = facts.get("nvidia") or {}, facts.get("amd") or {}
    found = [
        name
        for name, signs in (("nvidia", ("gpus", "driver", "on_bus", "problem")), ("amd", ("gfx", "on_bus")))
        if any({"nvidia": nvidia, "amd": amd}[name].get(sign) for sign in signs)
    ]
    return found or ["nvidia"]


# --- the state of this machine ---------------------------------------------------------------------------------------------------


def state(facts: Mapping[str, Any], system: Optional[str]) -> List[Text]:
    """What is right or wrong with the driver that is here, the worst first; [] where nothing of a GPU is seen."""
    nvidia = facts.get("nvidia") or {}
    driver, gpus = nvidia.get("driver"), nvidia.get("gpus") or []
    found: List[Text] = []
    if nvidia.get("mismatch"):
        found.append(
            text(
                "the kernel module and the libraries are of two driver versions (an update without a restart): reboot",
                "内核模块与驱动库版本不一致（更新后未重启）：请重启",
            )
        )
    if nvidia.get("nouveau"):
        found.append(text("nouveau drives the GPU instead of NVIDIA's driver", "GPU 正由 nouveau 而非 NVIDIA 驱动控制"))
    if driver and not gpus and system == "container":
        found.append(text("the container was started without its GPUs", "容器启动时没有带上 GPU"))
    elif nvidia.get("on_bus") and not gpus and nvidia.get("module_built") is False:
        found.append(
            text(
                "the driver's kernel module is not built for the running kernel: install the kernel headers, then reinstall the driver",
                "驱动的内核模块未针对当前内核编译：请安装内核头文件后重装驱动",
            )
        )
    elif nvidia.get("on_bus") and not gpus and nvidia.get("secure_boot"):
        found.append(
            text(
                "Secure Boot is on: an unsigned kernel module is refused (see below)", "安全启动已开启：未签名的内核模块会被拒绝（见下文）"
            )
        )
    elif not gpus and plan.silent_gpu(facts):
        found += [said for said in [plan.silent_gpu(facts)] if said]
    fabric = nvidia.get("fabricmanager") or {}
    if fabric.get("needed") and fabric.get("running") is False:
        found.append(
            text(
                "this machine has NVSwitch and nvidia-fabricmanager does not run: CUDA answers with error 802",
                "本机有 NVSwitch，而 nvidia-fabricmanager 未运行：CUDA 会报错误 802",
            )
        )
    if driver and gpus:
        windows = system in ("windows", "wsl")
        runs = [entry["major"] for entry in _majors() if knowledge.driver_runs(f"cu{entry['major']}0", version(driver), windows)]
        listed = ", ".join(f"CUDA {major}" for major in runs) or "-"
        found.append(text(f"driver {driver} answers and runs builds for: {listed}", f"驱动 {driver} 工作正常，可运行的构建：{listed}"))
    if facts and not found and not (facts.get("amd") or {}).get("gfx") and system != "macos":
        found.append(text("no GPU is seen from here; this is for one that is built in", "这里看不到 GPU；以下适用于装有 GPU 的机器"))
    return found


def _majors() -> List[Dict[str, Any]]:
    return list(knowledge.load()["drivers"]["by_cuda_major"])


def requirements(facts: Mapping[str, Any], system: Optional[str]) -> List[Dict[str, Any]]:
    """One row for each CUDA major version: its builds, the driver they need on either system, and whether the one here will do."""
    driver = version((facts.get("nvidia") or {}).get("driver"))
    windows = system in ("windows", "wsl")
    rows = []
    for entry in _majors():
        tags = [tag for tag in plan.backends() if (knowledge.cuda_of(tag) or (0,))[0] == entry["major"]]
        runs = knowledge.driver_runs(tags[0], driver, windows) if tags else None
        rows.append({"cuda": entry["major"], "builds": tags, "linux": entry["linux"], "windows": entry["windows"], "runs": runs})
    return rows


# --- what to do ------------------------------------------------------------------------------------------------------------------


def steps(facts: Mapping[str, Any], system: Optional[str], vendor: str) -> List[Step]:
    """What to type on a system for a vendor's GPUs, in order."""
    if vendor == "amd":
        return _amd(system)
    special = {"windows": _windows, "wsl": _wsl, "container": _container, "jetson": _jetson, "macos": _macos}
    return special[system]() if system in special else _linux(facts, system or "")


def _linux(facts: Mapping[str, Any], system: str) -> List[Step]:
    branch = (knowledge.driver_minimum("cu130", False) or (_LAST_BRANCH,))[0]
    number = str((facts.get("os") or {}).get("version") or "")
    # Headers, the driver for open modules, the driver for GPUs before 7.5, how the boot image is rebuilt, where DKMS keeps its key.
    arch = "sbsa" if (facts.get("os") or {}).get("machine") == "aarch64" else "x86_64"
    rebuild, key = "sudo dracut --force", "/var/lib/dkms/mok.pub"
    note: Optional[Text] = None
    if system == "ubuntu":
        headers: Tuple[str, ...] = ("sudo apt update", "sudo apt install linux-headers-$(uname -r)")
        opened: Tuple[str, ...] = (f"sudo apt install nvidia-driver-{branch}-open",)
        closed: Tuple[str, ...] = (f"sudo apt install nvidia-driver-{_LAST_BRANCH}",)
        rebuild, key = "sudo update-initramfs -u", "/var/lib/shim-signed/mok/MOK.der"
        note = text(
            f"On a server without a screen: nvidia-driver-{branch}-server-open. To see what Ubuntu offers: ubuntu-drivers list --gpgpu",
            f"无显示器的服务器可用 nvidia-driver-{branch}-server-open。查看 Ubuntu 提供的版本：ubuntu-drivers list --gpgpu",
        )
    elif system == "debian":
        release = "debian" + (number.split(".")[0] or "12")
        headers = ("sudo apt update", "sudo apt install linux-headers-$(dpkg --print-architecture)")
        repository = (
            f"wget {_REPOSITORY}/{release}/{arch}/cuda-keyring_1.1-1_all.deb",
            "sudo dpkg -i cuda-keyring_1.1-1_all.deb",
            "sudo apt update",
        )
        opened = (*repository, "sudo apt install nvidia-open")
        closed = (*repository, f"sudo apt install nvidia-driver-pinning-{_LAST_BRANCH}", "sudo apt install cuda-drivers")
        rebuild = "sudo update-initramfs -u"
        note = text(
            "Debian's own package nvidia-driver (contrib, non-free, non-free-firmware) is older: look at its version before you take it.",
            "Debian 自带的 nvidia-driver（contrib、non-free、non-free-firmware）版本较旧，安装前请先查看其版本。",
        )
    elif system == "fedora":
        fusion = "https://download1.rpmfusion.org"
        headers = ("sudo dnf install kernel-devel",)
        opened = (
            f"sudo dnf install {fusion}/free/fedora/rpmfusion-free-release-$(rpm -E %fedora).noarch.rpm "
            f"{fusion}/nonfree/fedora/rpmfusion-nonfree-release-$(rpm -E %fedora).noarch.rpm",
            "sudo dnf install akmod-nvidia xorg-x11-drv-nvidia-cuda",
            "sudo akmods --force",
            "modinfo -F version nvidia",
        )
        closed = (opened[0], f"sudo dnf install akmod-nvidia-{_LAST_BRANCH}xx xorg-x11-drv-nvidia-{_LAST_BRANCH}xx-cuda", *opened[2:])
        key = "/etc/pki/akmods/certs/public_key.der"
        note = text(
            "Do not reboot before modinfo prints a version: the module is compiled in the background.",
            "modinfo 打印出版本号之前不要重启：模块正在后台编译。",
        )
    elif system == "arch":
        headers = ("sudo pacman -Syu linux-headers",)
        opened = ("sudo pacman -S nvidia-open-dkms nvidia-utils",)
        closed = (
            f"git clone https://aur.archlinux.org/nvidia-{_LAST_BRANCH}xx-utils.git",
            f"cd nvidia-{_LAST_BRANCH}xx-utils && makepkg -si",
        )
        rebuild = "sudo mkinitcpio -P"
    elif system == "opensuse":
        headers = ("sudo zypper install kernel-default-devel",)
        release = "suse16" if number.startswith("16") else "opensuse15"
        opened = (
            f"sudo zypper addrepo {_REPOSITORY}/{release}/{arch}/cuda-{release}.repo",
            "sudo zypper refresh",
            "sudo zypper install nvidia-open",
        )
        closed = (*opened[:2], f"sudo zypper install cuda-drivers-{_LAST_BRANCH}")
        note = text(
            "On Tumbleweed: sudo zypper install openSUSE-repos-Tumbleweed-NVIDIA, then sudo zypper install-new-recommends",
            "Tumbleweed：sudo zypper install openSUSE-repos-Tumbleweed-NVIDIA，然后 sudo zypper install-new-recommends",
        )
    else:
        major = number.split(".")[0] if system == "rhel" and number else "9"
        headers = (
            "sudo dnf install kernel-devel-$(uname -r) kernel-headers",
            f"sudo dnf install https://dl.fedoraproject.org/pub/epel/epel-release-latest-{major}.noarch.rpm",
        )
        add = f"sudo dnf config-manager --add-repo {_REPOSITORY}/rhel{major}/{arch}/cuda-rhel{major}.repo"
        streams = ("sudo dnf module enable nvidia-driver:open-dkms",) if major in ("8", "9") else ()
        opened = (add, *streams, "sudo dnf install nvidia-open")
        locked = (
            f"sudo dnf module enable nvidia-driver:{_LAST_BRANCH}-dkms" if streams else f"sudo dnf versionlock '*nvidia*{_LAST_BRANCH}*'"
        )
        closed = (add, locked, "sudo dnf install cuda-drivers")
        if system != "rhel":
            note = text(
                "This distribution is not one that this program knows: what follows is for the RHEL family; see also --for.",
                "本程序不认识此发行版：以下为 RHEL 系列的做法，也可参考 --for。",
            )
    sms = [sm for sm in (capability(gpu) for gpu in (facts.get("nvidia") or {}).get("gpus") or []) if sm]
    found = [Step(text("Kernel headers, which the driver's module is compiled against", "内核头文件：编译驱动模块所需"), headers)]
    if not sms or max(sms) >= _FIRST_OPEN:
        title = text("Driver for RTX 20, GTX 16, T4 and every newer GPU (7.5 and up)", "RTX 20、GTX 16、T4 及更新的 GPU（7.5 以上）的驱动")
        found.append(Step(title, opened, note))
    if not sms or min(sms) < _FIRST_OPEN:
        title = text(
            f"Driver for GTX 10, GTX 9, V100, P100 and older: {_LAST_BRANCH} is their last branch",
            f"GTX 10、GTX 9、V100、P100 及更早 GPU 的驱动：{_LAST_BRANCH} 是最后一个分支",
        )
        found.append(Step(title, closed, None if len(found) > 1 else note))
    found += [
        Step(
            text("nouveau out of the way, then restart", "停用 nouveau，然后重启"),
            (
                "printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' | sudo tee /etc/modprobe.d/blacklist-nouveau.conf",
                rebuild,
                "sudo reboot",
            ),
            text("Most driver packages do the first two themselves.", "多数驱动包会自动完成前两步。"),
        ),
        Step(
            text("Only with Secure Boot: enrol the key that the module is signed with", "仅在安全启动开启时：登记模块的签名密钥"),
            ("mokutil --sb-state", f"sudo mokutil --import {key}", "sudo reboot"),
            text(
                "Choose a password, and 'Enroll MOK' on the blue screen after the restart. Without the key the module is refused: "
                "'Key was rejected by service'.",
                "设置一个密码，重启后在蓝色界面选择 Enroll MOK。没有密钥时模块会被拒绝，提示 Key was rejected by service。",
            ),
        ),
        Step(
            text(
                "Only with NVSwitch (HGX, DGX): fabric manager of the driver's own version",
                "仅限 NVSwitch 机器（HGX、DGX）：与驱动版本相同的 fabric manager",
            ),
            (
                {"ubuntu": f"sudo apt install nvidia-fabricmanager-{branch}", "debian": "sudo apt install nvidia-fabricmanager"}.get(
                    system, "sudo {} install nvidia-fabricmanager".format("zypper" if system == "opensuse" else "dnf")
                ),
                "sudo systemctl enable --now nvidia-fabricmanager",
            ),
        ),
        _check("nvidia-smi"),
    ]
    return found


def _check(command: str) -> Step:
    return Step(text("Does it answer?", "验证"), (command, "groundup env doctor"))


def _windows() -> List[Step]:
    return [
        Step(
            text("Driver", "驱动"),
            ("start https://www.nvidia.com/drivers",),
            text(
                "Choose the GPU, install, restart. The CUDA toolkit is not needed: the wheel brings its own libraries.",
                "选择 GPU 型号，安装并重启。无需安装 CUDA 工具包：安装包自带所需的库。",
            ),
        ),
        Step(
            text("Microsoft's C++ runtime, which torch's libraries need", "微软 C++ 运行库（torch 的库需要）"),
            ("winget install Microsoft.VCRedist.2015+.x64",),
        ),
        _check("nvidia-smi"),
    ]


def _wsl() -> List[Step]:
    return [
        Step(
            text("On Windows, in PowerShell: driver and WSL", "在 Windows 的 PowerShell 中：驱动与 WSL"),
            ("start https://www.nvidia.com/drivers", "wsl --update", "wsl --shutdown"),
            text(
                "The driver is installed on Windows only. Inside WSL install no Linux display driver: it would hide Windows' libcuda.",
                "驱动只装在 Windows 上。不要在 WSL 内安装 Linux 显卡驱动：它会遮住 Windows 的 libcuda。",
            ),
        ),
        Step(
            text("Inside WSL: remove a Linux driver that is there by mistake", "在 WSL 内：移除误装的 Linux 驱动"),
            ("dpkg -l | grep -E 'nvidia-driver|libnvidia-compute'", "sudo apt purge '^nvidia-driver-.*' '^libnvidia-compute-.*'"),
        ),
        _check("/usr/lib/wsl/lib/nvidia-smi"),
    ]


def _container() -> List[Step]:
    base = "https://nvidia.github.io/libnvidia-container"
    keyring = "/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg"
    return [
        Step(
            text("On the host: its driver first", "在宿主机上：先装好驱动"),
            ("nvidia-smi",),
            text(
                "The container uses the host's driver and needs none of its own. To install one: groundup env driver --for ubuntu (or another)",
                "容器使用宿主机的驱动，自身不需要。安装方法：groundup env driver --for ubuntu（或其他系统）",
            ),
        ),
        Step(
            text("On a host with apt: NVIDIA's container toolkit", "宿主机（apt）：NVIDIA 容器工具包"),
            (
                f"curl -fsSL {base}/gpgkey | sudo gpg --dearmor -o {keyring}",
                f"curl -fsSL {base}/stable/deb/nvidia-container-toolkit.list | sed 's#deb https://#deb [signed-by={keyring}] https://#g' "
                "| sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list",
                "sudo apt update && sudo apt install nvidia-container-toolkit",
            ),
        ),
        Step(
            text("On a host with dnf: NVIDIA's container toolkit", "宿主机（dnf）：NVIDIA 容器工具包"),
            (
                f"curl -fsSL {base}/stable/rpm/nvidia-container-toolkit.repo | sudo tee /etc/yum.repos.d/nvidia-container-toolkit.repo",
                "sudo dnf install nvidia-container-toolkit",
            ),
        ),
        Step(
            text("Tell Docker, and start the container with its GPUs", "配置 Docker，并带 GPU 启动容器"),
            (
                "sudo nvidia-ctk runtime configure --runtime=docker",
                "sudo systemctl restart docker",
                "docker run --rm --gpus all ubuntu nvidia-smi",
            ),
            text(
                "Podman: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, then podman run --device nvidia.com/gpu=all",
                "Podman：sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml，再用 podman run --device nvidia.com/gpu=all",
            ),
        ),
    ]


def _jetson() -> List[Step]:
    jetson = knowledge.load()["platforms"]["jetson"]
    return [
        Step(
            text("The driver is part of JetPack", "驱动随 JetPack 提供"),
            ("cat /etc/nv_tegra_release", "sudo apt update", "sudo apt install nvidia-jetpack"),
            text(jetson["en"], jetson["zh"]),
        )
    ]


def _macos() -> List[Step]:
    return [
        Step(
            text(
                "Nothing to install: Apple's GPU driver is part of macOS, and NVIDIA's ended with macOS 10.13",
                "无需安装：Apple 的 GPU 驱动随 macOS 提供，NVIDIA 的驱动止于 macOS 10.13",
            )
        )
    ]


def _amd(system: Optional[str]) -> List[Step]:
    if system == "macos":
        return _macos()
    if system in ("windows", "wsl"):
        return [
            Step(
                text("Driver on Windows", "Windows 上的驱动"),
                ("start https://www.amd.com/support",),
                text("PyTorch's ROCm wheels are for Linux on x86_64 only.", "PyTorch 的 ROCm 安装包仅支持 x86_64 的 Linux。"),
            )
        ]
    host = text(" (on the host)", "（在宿主机上）") if system == "container" else text("", "")
    found = [
        Step(
            text("The kernel's own amdgpu driver is enough" + host["en"], "内核自带的 amdgpu 驱动即可" + host["zh"]),
            ("ls -l /dev/kfd /dev/dri/render*",),
            text(
                "The wheel brings ROCm with it. A GPU newer than the kernel needs AMD's amdgpu-dkms: see repo.radeon.com/amdgpu-install",
                "安装包自带 ROCm。GPU 比内核新时需要 AMD 的 amdgpu-dkms：见 repo.radeon.com/amdgpu-install",
            ),
        ),
        Step(
            text("The right to use it" + host["en"], "使用权限" + host["zh"]),
            ('sudo usermod -a -G render,video "$USER"',),
            text("Then log in anew.", "然后重新登录。"),
        ),
    ]
    if system == "container":
        found.append(
            Step(
                text("Start the container with the GPU", "带 GPU 启动容器"),
                ("docker run --rm -it --device=/dev/kfd --device=/dev/dri --group-add video --group-add render IMAGE",),
            )
        )
    return [*found, Step(text("Does it answer?", "验证"), ("groundup env doctor",))]


# --- the verb --------------------------------------------------------------------------------------------------------------------


def advice(facts: Mapping[str, Any], system: Optional[str] = None, vendors: Sequence[str] = ()) -> Dict[str, Any]:
    """Everything that `env driver` says, for JSON. With `system` it is about another machine than the one of the facts."""
    about = {} if system else facts
    system = system or system_of(facts)
    chosen = list(vendors) or (vendors_of(facts) if about else ["nvidia", "amd"] if system in ("ubuntu", "debian", "rhel") else ["nvidia"])
    return {
        "schema": "groundup.env.driver/1",
        "system": system,
        "state": state(about, system),
        "requirements": requirements(about, system) if "nvidia" in chosen and system not in ("macos", "jetson") else [],
        "steps": {vendor: [step._asdict() for step in steps(about, system, vendor)] for vendor in chosen},
    }


def configure(parser: "argparse.ArgumentParser") -> None:
    """The options of `env driver`."""
    parser.add_argument("--for", dest="system", choices=SYSTEMS, help="another system than this one / 查看其他系统的做法")
    parser.add_argument("--gpu", choices=("nvidia", "amd"), help="default: what is here / 默认按本机 GPU")


def run(options: "argparse.Namespace") -> int:
    """`env driver`: always 0, because it only tells."""
    from groundup.env import probe

    language = pick(options.lang)
    said = advice({} if options.system else probe.facts(), options.system, [options.gpu] if options.gpu else [])
    print(json.dumps(said, ensure_ascii=False) if options.json else report(said, language))
    return 0


def report(said: Mapping[str, Any], language: str) -> str:
    """The advice for a person."""
    zh = language == "zh"
    lines: List[str] = []
    for one in said["state"]:
        lines += columns([("-", one[language])], "")
    if said["requirements"]:
        head = (
            ("CUDA 构建", "Linux 驱动", "Windows 驱动与 WSL", "本机") if zh else ("CUDA builds", "Linux driver", "Windows and WSL", "Here")
        )
        marks = {True: "可用" if zh else "ok", False: "太旧" if zh else "too old", None: "?"}
        rows = [
            (f"{row['builds'][-1]} - {row['builds'][0]}", ">= " + row["linux"], ">= " + row["windows"], marks[row["runs"]])
            for row in said["requirements"]
        ]
        lines += [*([""] if lines else []), *columns([head, *rows])]
    names = {"nvidia": "NVIDIA", "amd": "AMD"}
    for vendor, listed in said["steps"].items():
        lines += [*([""] if lines else []), f"{names[vendor]}, {said['system'] or 'Linux'}" + ("：" if zh else ":")]
        for number, step in enumerate(listed, 1):
            lines += columns([(f"{number}.", step["title"][language])])
            lines += ["       " + command for command in step["commands"]]
            lines += ["     " + line for line in (wrapped(step["note"][language], 75) if step["note"] else [])]
    return "\n".join(lines)
