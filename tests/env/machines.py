"""Whole machines made of files and command outputs, in the formats of real ones. `MACHINES["wsl2_rtx3080"]` is a Host for `probe.facts`.

Every machine belongs to USER on HOSTNAME, whose names, home folder, serial numbers and tokens must not come out of anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from groundup.env import gpus, runtime
from groundup.env.host import MISSING, Host, last

USER, HOSTNAME, TOKEN, SERIAL = "zhangsan7", "xiaoming-desk", "s3cr3t-t0ken", "1420918071623"
PRIVATE = (USER, HOSTNAME, TOKEN, SERIAL, "GPU-1b2c3d4e", "mirror.corp.example", "10.20.30.40")


class FakeHost(Host):
    """A machine that is not there.

    Args:
        files: path -> content; a path that ends in '/' is an empty folder.
        commands: beginning of a command line -> output, or (status, output). 'torch' and 'libcuda' are the questions in child processes.
        links: path -> what it links to.
        registry: (key, name) -> value, and key -> names of the keys below it.
    """

    home = temporary = ""
    user_site: str | None = None

    def __init__(
        self,
        files: Mapping[str, str],
        commands: Mapping[str, Any] | None = None,
        links: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        tools: Sequence[str] = (),
        registry: Mapping[Any, Any] | None = None,
        disks: Mapping[str, tuple[float, float]] | None = None,
        forbidden: Sequence[str] = (),
        **values: Any,
    ) -> None:
        self.files = {path: text for path, text in files.items() if not path.endswith("/")}
        self.links = dict(links or {})
        self.commands, self.tools, self.registered = dict(commands or {}), set(tools), dict(registry or {})
        self.disks, self.forbidden = dict(disks or {"/": (300e9, 500e9)}), set(forbidden)
        self.environ = dict(environ or {})
        self.calls: list[str] = []
        self.folders = {path.rstrip("/") for path in files if path.endswith("/")}
        for path in [*self.files, *self.links, *list(self.folders)]:
            while "/" in path:
                path = path.rsplit("/", 1)[0]
                self.folders.add(path or "/")
        defaults: dict[str, Any] = {
            "system": "Linux", "release": "6.8.0-45-generic", "version": "#45-Ubuntu SMP", "machine": "x86_64", "python_version": "3.12.3",
            "implementation": "CPython", "bits": 64, "free_threaded": False, "executable": "/usr/bin/python3", "prefix": "/usr", "base_prefix": "/usr",
            "path": [], "stdlib": "/usr/lib/python3.12", "include": "/usr/include/python3.12", "cores": 16, "cwd": f"/home/{USER}/work",
            "home": f"/home/{USER}", "temporary": "/tmp", "user_site": None, "c_library": "glibc 2.39", "usable": None,
        }  # fmt: skip
        for name, value in {**defaults, **values}.items():
            setattr(self, name, value)

    def cores_usable(self):
        return self.usable or self.cores

    def libc(self):
        return self.c_library

    def real(self, path):
        path = self._normal(path)
        for _ in range(10):
            for link, target in self.links.items():
                if path == link or path.startswith(link + "/"):
                    target = target if target.startswith("/") else link.rsplit("/", 1)[0] + "/" + target
                    path = self._normal(target + path[len(link) :])
                    break
            else:
                return path
        return path

    @staticmethod
    def _normal(path):
        parts: list[str] = []
        for part in path.replace("\\", "/").rstrip("/").split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part != ".":
                parts.append(part)
        return "/".join(parts) or "/"

    def read(self, path, limit=1_000_000):
        return self.files.get(self.real(path), "")[:limit]

    def exists(self, path):
        return self.real(path) in self.files or self.is_folder(path)

    def is_folder(self, path):
        return self.real(path) in self.folders

    def names(self, folder):
        folder = self.real(folder).rstrip("/") + "/"
        everything = [*self.files, *self.links, *self.folders]
        return sorted({path[len(folder) :].split("/")[0] for path in everything if path.startswith(folder) and path != folder} - {""})

    def glob(self, pattern):
        # As glob does: '*' stays within one part of the path.
        shape = re.escape(self._normal(pattern)).replace(r"\*", "[^/]*").replace(r"\[0\-9\]", "[0-9]").replace("[0-9]", "[0-9]")
        return sorted(path for path in {*self.files, *self.links, *self.folders} if re.fullmatch(shape, path))

    def can_use(self, path):
        return self.exists(path) and path not in self.forbidden

    def disk(self, folder):
        folder = self._normal(folder)
        best = max((mount for mount in self.disks if folder.startswith(mount)), key=len, default=None)
        return None if best is None else tuple(int(size) for size in self.disks[best])

    def which(self, name):
        known = self.tools | {command.split(" ")[0] for command in self.commands}
        if name in known:
            return f"C:/Windows/System32/{name}.exe" if self.system == "Windows" else f"/usr/bin/{name}"
        return name if "/" in name and self.exists(name) else None

    def run(self, command, timeout, without=()):
        name = re.sub(r"\.exe$", "", last(command[0]))
        if gpus.ASK_LIBCUDA in command:
            name, command = "libcuda", []
        elif runtime.ASK_TORCH in command:
            name, command = "torch", []
        line = " ".join([name, *command[1:]])
        self.calls.append(line)
        best = max((known for known in self.commands if line.startswith(known)), key=len, default=None)
        answer = (MISSING, "No such file or directory") if best is None else self.commands[best]
        return answer if isinstance(answer, tuple) else (0, answer)

    def registry(self, key, name):
        return self.registered.get((key, name))

    def registry_keys(self, key):
        return list(self.registered.get(key, []))

    def processor_feature(self, number):
        return {40: True, 41: False}.get(number)

    def windows_memory(self):
        return int(34.2e9), int(20.1e9)


# --- parts of machines -----------------------------------------------------------------------------------------------------------

X86_FLAGS = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr sse4_1 sse4_2 popcnt avx f16c rdrand bmi1 avx2 bmi2 fma"


def os_release(name: str, identifier: str, version: str, like: str = "") -> dict[str, str]:
    return {
        "/etc/os-release": f'PRETTY_NAME="{name}"\nNAME="{name.split()[0]}"\nVERSION_ID="{version}"\nID={identifier}\n'
        + (f'ID_LIKE="{like}"\n' if like else "")
        + 'HOME_URL="https://example.org/"\n'
    }


UBUNTU_2404 = os_release("Ubuntu 24.04.1 LTS", "ubuntu", "24.04", "debian")
UBUNTU_2204 = os_release("Ubuntu 22.04.5 LTS", "ubuntu", "22.04", "debian")


def linux(
    model: str = "AMD Ryzen 9 7950X 16-Core Processor", flags: str = X86_FLAGS, memory_kib: int = 65536000, vendor: str = ""
) -> dict[str, str]:
    files = {
        "/proc/cpuinfo": f"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: {model}\nflags\t\t: {flags}\n\nprocessor\t: 1\n",
        "/proc/meminfo": f"MemTotal:       {memory_kib} kB\nMemFree:        1000 kB\nMemAvailable:   {memory_kib // 2} kB\n",
        "/proc/self/cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n",
        "/sys/fs/cgroup/user.slice/memory.max": "max\n",
        "/proc/1/cgroup": "0::/init.scope\n",
        "/usr/include/python3.12/Python.h": "",
        "/dev/shm/": "",
    }
    if vendor:
        maker, product = vendor.split("|")
        files.update(
            {
                "/sys/class/dmi/id/sys_vendor": maker + "\n",
                "/sys/class/dmi/id/product_name": product + "\n",
                "/sys/class/dmi/id/product_serial": SERIAL,
            }
        )
    return files


def arm(part: str, features: str = "fp asimd evtstrm aes atomics", implementer: str = "0x41") -> str:
    return (
        f"processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: {features}\nCPU implementer\t: {implementer}\nCPU architecture: 8\nCPU variant\t: 0x0\n"
        f"CPU part\t: {part}\nCPU revision\t: 0\n"
    )


PCI_IDS = """\
#\tList of PCI ID's
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t164e  Raphael
\t73df  Navi 22 [Radeon RX 6700/6700 XT/6750 XT / 6800M/6850M XT]
\t\t1462 3980  RX 6700
10de  NVIDIA Corporation
\t1b80  GP104 [GeForce GTX 1080]
\t\t1043 8591  GTX 1080
\t2216  GA102 [GeForce RTX 3080 Lite Hash Rate]
\t2684  AD102 [GeForce RTX 4090]
8086  Intel Corporation
\ta780  Raptor Lake-S GT1 [UHD Graphics 770]
"""


def pci(*devices: tuple[str, str, str]) -> dict[str, str]:
    """('10DE:2684', '30000', 'nvidia'): identity, class, bound driver or ''."""
    files = {"/usr/share/misc/pci.ids": PCI_IDS}
    for number, (identity, kind, driver) in enumerate([("8086:A700", "60000", ""), *devices]):
        text = (
            f"DRIVER={driver}\n" if driver else ""
        ) + f"PCI_CLASS={kind}\nPCI_ID={identity}\nPCI_SUBSYS_ID=1043:88E2\nPCI_SLOT_NAME=0000:{number:02x}:00.0\n"
        files[f"/sys/bus/pci/devices/0000:{number:02x}:00.0/uevent"] = text
    return files


def driver_files(
    version: str, gpus: Sequence[str] = (), opened: bool = False, library: str | None = None, folder: str = "x86_64-linux-gnu"
):
    """(files, links) of a loaded NVIDIA driver with its user-space library."""
    library = library or version
    title = f"NVIDIA UNIX Open Kernel Module for x86_64  {version}" if opened else f"NVIDIA UNIX x86_64 Kernel Module  {version}"
    files = {
        "/proc/driver/nvidia/version": f"NVRM version: {title}  Release Build  (dvs-builder@U22-I3-AF03-24-1)  Mon Dec 30 17:36:10 UTC 2024\n"
        "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n",
        "/sys/module/nvidia/version": version + "\n",
        f"/usr/lib/{folder}/libcuda.so.{library}": "",
        f"/usr/lib/{folder}/libnvidia-ml.so.{library}": "",
        "/dev/nvidiactl": "",
        "/dev/nvidia-uvm": "",
    }
    for index, name in enumerate(gpus):
        files[f"/dev/nvidia{index}"] = ""
        files[f"/proc/driver/nvidia/gpus/0000:0{index + 1}:00.0/information"] = (
            f"Model: \t\t {name}\nIRQ:   \t\t 142\nGPU UUID: \t GPU-1b2c3d4e-aaaa-bbbb-cccc-0123456789ab\nVideo BIOS: \t 95.02.3c.00.8c\nDevice Minor: \t {index}\n"
        )
    links = {
        f"/usr/lib/{folder}/libcuda.so.1": f"libcuda.so.{library}",
        f"/usr/lib/{folder}/libcuda.so": "libcuda.so.1",
        f"/usr/lib/{folder}/libnvidia-ml.so.1": f"libnvidia-ml.so.{library}",
    }
    return files, links


def smi(driver: str, cuda: str, *gpus: tuple[str, str, str]) -> dict[str, str]:
    """The two answers of a working nvidia-smi; a GPU is (name, MiB, compute capability)."""
    table = [
        "Tue Mar  4 10:12:33 2025       ",
        "+-----------------------------------------------------------------------------------------+",
        f"| NVIDIA-SMI {driver:<22} Driver Version: {driver:<14} CUDA Version: {cuda:<8} |",
        "|-----------------------------------------+------------------------+----------------------+",
        "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
        "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |",
        "|                                         |                        |               MIG M. |",
        "|=========================================+========================+======================|",
    ]
    for index, (name, memory, _) in enumerate(gpus):
        table += [
            f"| {index:>3}  {name[:27]:<27}    Off |   00000000:0{index + 1}:00.0  On |                  Off |",
            f"|  0%   38C    P8             21W /  450W |     611MiB / {memory:>6}MiB |      3%      Default |",
            "+-----------------------------------------+------------------------+----------------------+",
        ]
    lines = [f"{name}, {memory}, {capability}, {driver}, [N/A]" for name, memory, capability in gpus]
    return {"nvidia-smi": "\n".join(table) + "\n", "nvidia-smi --query-gpu": "\n".join(lines) + "\n"}


def dist(site: str, name: str, version: str, installer: str = "pip", **files: str) -> dict[str, str]:
    """An installed distribution."""
    info = f"{site}/{name}-{version}.dist-info"
    return {f"{info}/RECORD": "", f"{info}/INSTALLER": installer + "\n", f"{info}/METADATA": f"Name: {name}\nVersion: {version}\n"}


def torch_wheel(
    site: str, version: str, cuda: str | None = None, hip: str | None = None, distribution: str | None = None
) -> dict[str, str]:
    """An installed torch: `version` as torch says it, `distribution` as its metadata does."""
    quoted = {key: f"'{value}'" if value else "None" for key, value in (("cuda", cuda), ("hip", hip))}
    return {
        **dist(site, "torch", distribution or version),
        f"{site}/torch/__init__.py": "",
        f"{site}/torch/version.py": "from typing import Optional\n\n__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']\n"
        f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {quoted['cuda']}\ngit_version = 'cf30153c4c'\nhip: Optional[str] = {quoted['hip']}\n",
        f"{site}/torch/share/cmake/Torch/TorchConfig.cmake": 'set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=1")\n',
    }


def companion(site: str, name: str, version: str) -> dict[str, str]:
    return {**dist(site, name, version), f"{site}/{name}/version.py": f"__version__ = '{version}'\ngit_version = 'abc'\n"}


def venv(home: str = f"/home/{USER}", base: str = "/usr", python: str = "3.12") -> dict[str, Any]:
    """Values of a Python in ~/work/.venv."""
    prefix = f"{home}/work/.venv"
    site = f"{prefix}/lib/python{python}/site-packages"
    return {"prefix": prefix, "base_prefix": base, "executable": f"{prefix}/bin/python", "path": [f"{base}/lib/python{python}", site]}


def told(*said: Mapping[str, Any]) -> str:
    """What the child process prints that imports torch."""
    return "".join(f"\nGROUNDUP {json.dumps(line)}\n" for line in said)


def merge(*parts: Mapping[str, str]) -> dict[str, str]:
    return {key: value for part in parts for key, value in part.items()}


VENV_SITE = f"/home/{USER}/work/.venv/lib/python3.12/site-packages"
LINUX_ENVIRON = {"HOME": f"/home/{USER}", "USER": USER, "PATH": f"/home/{USER}/bin:/usr/local/bin:/usr/bin:/bin"}
ACTIVE = dict(LINUX_ENVIRON, VIRTUAL_ENV=f"/home/{USER}/work/.venv")


# --- machines --------------------------------------------------------------------------------------------------------------------


def fresh_ubuntu_rtx4090() -> FakeHost:
    """Ubuntu 24.04, driver 550 from Ubuntu's packages, the system's Python, no torch."""
    files, links = driver_files("550.144.03", ["NVIDIA GeForce RTX 4090"])
    return FakeHost(
        merge(
            linux(vendor="ASUS|System Product Name"), UBUNTU_2404, files, pci(("10DE:2684", "30000", "nvidia"), ("1002:164E", "30000", "amdgpu")),
            {
                "/usr/lib/python3.12/EXTERNALLY-MANAGED": "[externally-managed]\n", "/usr/bin/python3.12": "", "/sys/module/amdgpu/": "", "/dev/kfd": "",
                "/sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 32\nsimd_count 0\ngfx_target_version 0\n",
                "/sys/class/kfd/kfd/topology/nodes/1/properties": "cpu_cores_count 0\nsimd_count 4\ngfx_target_version 100306\n",
                "/lib/modules/6.8.0-45-generic/updates/dkms/nvidia.ko.zst": "",
                "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": "\x06\0\0\0\0",
            },
            dist("/usr/lib/python3/dist-packages", "numpy", "1.26.4", ""),
        ),
        dict(smi("550.144.03", "12.4", ("NVIDIA GeForce RTX 4090", "24564", "8.9")), **{
            "ldconfig -p": "1204 libs found in cache `/etc/ld.so.cache'\n\tlibcuda.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so.1\n"
            "\tlibcuda.so.1 (libc6) => /lib/i386-linux-gnu/libcuda.so.1\n\tlibc.so.6 (libc6,x86-64, OS ABI: Linux 3.2.0) => /lib/x86_64-linux-gnu/libc.so.6\n"}),
        dict(links, **{"/lib/x86_64-linux-gnu": "/usr/lib/x86_64-linux-gnu"}),
        LINUX_ENVIRON,
        tools=["apt-get", "sudo", "git"],
        path=["/usr/lib/python3.12", "/usr/lib/python3.12/lib-dynload", "/usr/lib/python3/dist-packages"],
        forbidden=["/dev/kfd"],
    )  # fmt: skip


def blackwell_old_wheel() -> FakeHost:
    """RTX 5090 with the open driver 575 and torch 2.6.0+cu124, whose newest kernel is sm_90."""
    files, links = driver_files("575.64.03", ["NVIDIA GeForce RTX 5090"], opened=True)
    wheels = merge(
        torch_wheel(VENV_SITE, "2.6.0+cu124", "12.4", distribution="2.6.0"),
        companion(VENV_SITE, "torchvision", "0.21.0"), companion(VENV_SITE, "torchaudio", "2.6.0"),
        dist(VENV_SITE, "numpy", "2.2.4"), dist(VENV_SITE, "triton", "3.2.0"), dist(VENV_SITE, "pip", "24.0"), dist(VENV_SITE, "requests", "2.32.3"),
        dist(VENV_SITE, "nvidia_cudnn_cu12", "9.1.0.70"), dist(VENV_SITE, "nvidia_cublas_cu12", "12.4.5.8"), dist(VENV_SITE, "nvidia_nccl_cu12", "2.21.5"),
        dist(VENV_SITE, "nvidia_nvjitlink_cu12", "12.4.127"), dist(VENV_SITE, "nvidia_cuda_runtime_cu12", "12.4.127"),
        {
            f"{VENV_SITE}/nvidia/cudnn/lib/libcudnn.so.9": "", f"{VENV_SITE}/nvidia/cublas/lib/libcublas.so.12": "",
            f"{VENV_SITE}/nvidia/nccl/lib/libnccl.so.2": "", f"{VENV_SITE}/nvidia/nvjitlink/lib/libnvJitLink.so.12": "",
            f"{VENV_SITE}/nvidia/cuda_runtime/lib/libcudart.so.12": "", f"{VENV_SITE}/torch/lib/libtorch_cuda.so": "",
        },
    )  # fmt: skip
    wheels[f"{VENV_SITE}/torchvision/version.py"] = "__version__ = '0.21.0+cu124'\ngit_version = 'abc'\n"
    answer = {
        "devices": ["NVIDIA GeForce RTX 5090"], "capabilities": ["12.0"], "cuda_build": "12.4", "hip_build": None, "cuda_available": True, "numpy": None,
        "arch_list": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], "mps_available": False, "xpu_available": False, "cxx11_abi": False,
        "cudnn": 90100, "nccl": "2.21.5", "compute_error": "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "mapped": ["/usr/lib/x86_64-linux-gnu/libcuda.so.575.64.03", VENV_SITE + "/nvidia/cudnn/lib/libcudnn.so.9"],
    }  # fmt: skip
    warning = "\nNVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation."
    said = told(
        {"import_seconds": 2.1, "version": "2.6.0+cu124"}, {"answer": answer, "warnings": [warning]}, {"importing": "torchvision"},
        {"imported": "torchvision", "error": None}, {"importing": "torchaudio"},
        {"imported": "torchaudio", "error": "OSError: libcudart.so.13: cannot open shared object file"},
    )  # fmt: skip
    return FakeHost(
        merge(linux("Intel(R) Core(TM) i9-14900K"), UBUNTU_2404, files, wheels, pci(("10DE:2B85", "30000", "nvidia"), ("8086:A780", "30000", "i915")),
              {"/usr/bin/python3.12": "", "/usr/bin/python3.11": "", f"/home/{USER}/work/.venv/bin/python3.12": ""}),
        dict(smi("575.64.03", "12.9", ("NVIDIA GeForce RTX 5090", "32607", "12.0")), **{
            "ldconfig -p": "9 libs found in cache\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1\n",
            "libcuda": '{"error": 0, "version": 12090, "gpus": [{"name": "NVIDIA GeForce RTX 5090", "memory_gb": 33.7, "compute_capability": "12.0"}]}\n',
            "torch": said}),
        links, ACTIVE, tools=["apt-get", "pip", "gcc"], **venv(),
    )  # fmt: skip


def pascal_cuda13() -> FakeHost:
    """GTX 1080 with driver 580 and the CUDA 13 build, which has no kernels below 7.5."""
    files, links = driver_files("580.95.05", ["NVIDIA GeForce GTX 1080"])
    wheels = merge(
        torch_wheel(VENV_SITE, "2.13.0+cu130", "13.0", distribution="2.13.0"), companion(VENV_SITE, "torchvision", "0.28.0"), dist(VENV_SITE, "numpy", "2.3.4", "uv"),
        dist(VENV_SITE, "nvidia_cudnn_cu13", "9.15.1.9"), dist(VENV_SITE, "nvidia_nccl_cu13", "2.28.9"), dist(VENV_SITE, "nvidia_cuda_runtime", "13.0.96"),
        {
            f"{VENV_SITE}/nvidia/cu13/lib/libcudart.so.13": "", f"{VENV_SITE}/nvidia/cudnn/lib/libcudnn.so.9": "", f"{VENV_SITE}/nvidia/nccl/lib/libnccl.so.2": "",
            "/usr/local/cuda-12.6/lib64/libcudart.so.12.6.77": "", "/usr/local/cuda-12.6/version.json": '{"cuda" : {"name" : "CUDA SDK", "version" : "12.6.3"}}',
            "/opt/cudnn8/lib/libcudnn.so.8.9.7": "", f"/home/{USER}/libs/libnvJitLink.so.12.1.105": "", "/usr/bin/python3.12": "",
        },
    )  # fmt: skip
    return FakeHost(
        merge(linux("Intel(R) Core(TM) i7-6700K CPU @ 4.00GHz"), UBUNTU_2404, files, wheels, pci(("10DE:1B80", "30000", "nvidia"))),
        dict(smi("580.95.05", "13.0", ("NVIDIA GeForce GTX 1080", "8192", "6.1")), **{
            "nvcc --version": "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2024 NVIDIA Corporation\nBuilt on Tue_Oct_29_23:50:19_PDT_2024\n"
            "Cuda compilation tools, release 12.6, V12.6.85\nBuild cuda_12.6.r12.6/compiler.35059454_0\n",
            "ldconfig -p": "5 libs found in cache\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1\n"
            "\tlibcudart.so.12 (libc6,x86-64) => /usr/local/cuda/targets/x86_64-linux/lib/libcudart.so.12\n"}),
        dict(links, **{
            "/usr/local/cuda": "cuda-12.6", "/opt/cudnn8/lib/libcudnn.so.8": "libcudnn.so.8.9.7", "/usr/local/cuda-12.6/lib64/libcudart.so.12": "libcudart.so.12.6.77",
            "/usr/local/cuda-12.6/targets/x86_64-linux/lib": "/usr/local/cuda-12.6/lib64", f"/home/{USER}/libs/libnvJitLink.so.12": "libnvJitLink.so.12.1.105"}),
        dict(ACTIVE, LD_LIBRARY_PATH=f"/opt/cudnn8/lib:/home/{USER}/libs:/usr/local/cuda/lib64", CUDA_HOME="/usr/local/cuda", CUDA_VISIBLE_DEVICES="0",
             PIP_INDEX_URL=f"https://{USER}:{TOKEN}@mirror.corp.example/simple", PIP_EXTRA_INDEX_URL="https://download.pytorch.org/whl/cu118/",
             HTTPS_PROXY=f"http://{USER}:{TOKEN}@10.20.30.40:3128"),
        tools=["apt-get", "pip", "uv", "gcc"], **venv(),
    )  # fmt: skip


def wsl2_rtx3080() -> FakeHost:
    """Ubuntu 22.04 under WSL 2 with Windows' driver 581, torch 2.9.1+cu128."""
    values = dict(
        venv(python="3.10"),
        python_version="3.10.12",
        stdlib="/usr/lib/python3.10",
        include="/usr/include/python3.10",
        c_library="glibc 2.35",
    )
    site = values["path"][1]
    return FakeHost(
        merge(
            linux("12th Gen Intel(R) Core(TM) i7-12700K", X86_FLAGS + " hypervisor avx_vnni"), UBUNTU_2204,
            torch_wheel(site, "2.9.1+cu128", "12.8"), companion(site, "torchvision", "0.24.1+cu128"), dist(site, "numpy", "1.26.4"),
            {"/usr/lib/wsl/lib/nvidia-smi": "", "/usr/lib/wsl/lib/libcuda.so.1": "", "/usr/lib/wsl/lib/libcuda.so.1.1": "", "/dev/dxg": "",
             "/sys/bus/pci/devices/38f4:00:00.0/uevent": "DRIVER=dxgkrnl\nPCI_CLASS=30200\nPCI_ID=1414:008E\n", "/run/systemd/container": "wsl\n"},
        ),
        dict(smi("581.42", "13.0", ("NVIDIA GeForce RTX 3080", "10240", "8.6")), **{
            "ldconfig -p": "9 libs found in cache\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/wsl/lib/libcuda.so.1\n"}),
        {}, dict(ACTIVE, WSL_DISTRO_NAME="Ubuntu-22.04", NAME=HOSTNAME),
        release="5.15.167.4-microsoft-standard-WSL2", disks={"/": (700e9, 1081e9), "/dev/shm": (8e9, 8.2e9)}, **values,
    )  # fmt: skip


def windows_no_vc_runtime() -> FakeHost:
    """Windows 11 with an RTX 4070, a venv with torch 2.8.0+cu126, and no Visual C++ runtime."""
    home, displays = f"C:\\Users\\{USER}", r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
    prefix = home + "\\work\\.venv"
    site = f"C:/Users/{USER}/work/.venv/Lib/site-packages"
    base = home + "\\AppData\\Local\\Programs\\Python\\Python311"
    return FakeHost(
        merge(
            torch_wheel(site, "2.8.0+cu126", "12.6"), companion(site, "torchvision", "0.23.0+cu126"), dist(site, "numpy", "2.3.1"),
            {f"{site}/torch/lib/cudart64_12.dll": "", f"{site}/torch/lib/cudnn64_9.dll": "", f"{site}/torch/lib/c10.dll": "", "C:/Windows/System32/nvcuda.dll": "",
             "C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA/v11.8/bin/cudart64_110.dll": "", "C:/Windows/System32/kernel32.dll": "",
             f"C:/Users/{USER}/AppData/Roaming/pip/pip.ini": f"[global]\nindex-url = https://{USER}:{TOKEN}@mirror.corp.example/simple\ntrusted-host = mirror.corp.example\n"},
        ),
        dict(smi("560.94", "12.6", ("NVIDIA GeForce RTX 4070", "12282", "8.9")), torch=(1, (
            "Traceback (most recent call last):\n  File \"<string>\", line 12, in <module>\n"
            f"  File \"C:\\Users\\{USER}\\work\\.venv\\Lib\\site-packages\\torch\\__init__.py\", line 270, in <module>\n    _load_dll_libraries()\n"
            f"OSError: [WinError 126] The specified module could not be found. Error loading \"C:\\Users\\{USER}\\work\\.venv\\Lib\\site-packages\\torch\\lib\\c10.dll\""
            " or one of its dependencies.\n"))),
        {},
        {"USERPROFILE": home, "USERNAME": USER, "COMPUTERNAME": HOSTNAME, "APPDATA": home + "\\AppData\\Roaming", "TEMP": home + "\\AppData\\Local\\Temp",
         "PATH": "C:\\Windows\\System32;C:\\Program Files\\NVIDIA GPU Computing Toolkit\\CUDA\\v11.8\\bin", "VIRTUAL_ENV": prefix, "PROGRAMDATA": "C:\\ProgramData",
         "CUDA_PATH": "C:\\Program Files\\NVIDIA GPU Computing Toolkit\\CUDA\\v11.8"},
        tools=["winget", "pip"],
        registry={
            displays: ["0000", "0001", "Configuration", "Properties"],
            (displays + "\\0000", "DriverDesc"): "NVIDIA GeForce RTX 4070", (displays + "\\0000", "MatchingDeviceId"): "PCI\\VEN_10DE&DEV_2786",
            (displays + "\\0000", "DriverVersion"): "32.0.15.6094",
            (displays + "\\0001", "DriverDesc"): "AMD Radeon(TM) Graphics", (displays + "\\0001", "MatchingDeviceId"): "PCI\\VEN_1002&DEV_164E",
            (r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString"): "AMD Ryzen 7 7800X3D 8-Core Processor           ",
            (r"HARDWARE\DESCRIPTION\System\BIOS", "SystemManufacturer"): "Micro-Star International Co., Ltd.",
            (r"SYSTEM\CurrentControlSet\Control\FileSystem", "LongPathsEnabled"): "0",
            r"SOFTWARE\Python\PythonCore": ["3.11", "3.13", "3.13-32"],
        },
        disks={"C:": (120e9, 1000e9)},
        system="Windows", release="11", version="10.0.22631", machine="AMD64", python_version="3.11.9", executable=prefix + "\\Scripts\\python.exe", prefix=prefix,
        base_prefix=base, path=[base + "\\Lib", base + "\\python311.zip", prefix + "\\Lib\\site-packages"], stdlib=base + "\\Lib", include=base + "\\Include",
        cwd=home + "\\work", home=home, temporary=home + "\\AppData\\Local\\Temp", c_library=None,
    )  # fmt: skip


def jetson_orin() -> FakeHost:
    """Jetson AGX Orin with JetPack 6.2 and the generic aarch64 wheel."""
    values = dict(
        venv(python="3.10"),
        python_version="3.10.12",
        stdlib="/usr/lib/python3.10",
        include="/usr/include/python3.10",
        c_library="glibc 2.35",
    )
    site = values["path"][1]
    files, links = driver_files("540.4.0", folder="aarch64-linux-gnu/nvidia")
    return FakeHost(
        merge(
            linux(), UBUNTU_2204, files, torch_wheel(site, "2.9.1+cpu"), dist(site, "numpy", "1.26.1"),
            {"/proc/cpuinfo": arm("0xd42", "fp asimd evtstrm aes pmull sha1 crc32 atomics fphp"), "/proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
             "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
             "/proc/device-tree/serial-number": SERIAL, "/dev/nvhost-gpu": "", "/usr/local/cuda-12.6/version.json": '{"cuda" : {"version" : "12.6.11"}}'},
        ),
        {"nvidia-smi": "| NVIDIA-SMI 540.4.0                Driver Version: 540.4.0      CUDA Version: 12.6     |\n",
         "nvidia-smi --query-gpu": "Orin (nvgpu), [N/A], [N/A], 540.4.0, [N/A]\n",
         "libcuda": '{"error": 0, "version": 12060, "gpus": [{"name": "Orin", "memory_gb": 65.9, "compute_capability": "8.7"}]}\n',
         "ldconfig -p": "7 libs found in cache\n\tlibcudnn.so.9 (libc6,AArch64) => /usr/lib/aarch64-linux-gnu/libcudnn.so.9\n"},
        dict(links, **{"/usr/local/cuda": "cuda-12.6", "/usr/lib/aarch64-linux-gnu/libcudnn.so.9": "libcudnn.so.9.3.0"}),
        ACTIVE, machine="aarch64", release="5.15.148-tegra", cores=12, **values,
    )  # fmt: skip


def rocm_rdna2() -> FakeHost:
    """Radeon RX 6700 (gfx1031) with ROCm 6.3 and torch 2.9.1+rocm6.3."""
    return FakeHost(
        merge(
            linux(), UBUNTU_2404, pci(("1002:73DF", "30000", "amdgpu")), torch_wheel(VENV_SITE, "2.9.1+rocm6.3", hip="6.3.42134-a9a80e791"),
            companion(VENV_SITE, "torchvision", "0.24.1+rocm6.3"), dist(VENV_SITE, "numpy", "2.3.3"), dist(VENV_SITE, "pytorch_triton_rocm", "3.5.1"),
            {"/opt/rocm/.info/version": "6.3.3-74\n", "/sys/module/amdgpu/version": "6.10.5\n", "/dev/kfd": "", "/dev/dri/renderD128": "",
             "/sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 12\ngfx_target_version 0\n",
             "/sys/class/kfd/kfd/topology/nodes/1/properties": f"cpu_cores_count 0\nsimd_count 80\ngfx_target_version 100301\nunique_id {SERIAL}\n"},
        ),
        {"rocminfo": "ROCk module version 6.10.5 is loaded\n=====================\nHSA Agents\n=====================\n*******                  \nAgent 1                  \n*******                  \n"
         "  Name:                    AMD Ryzen 5 5600X 6-Core Processor\n  Uuid:                    CPU-XX\n  Marketing Name:          AMD Ryzen 5 5600X 6-Core Processor\n"
         "*******                  \nAgent 2                  \n*******                  \n  Name:                    gfx1031                            \n"
         "  Uuid:                    GPU-1b2c3d4e\n  Marketing Name:          AMD Radeon RX 6700                 \n  Vendor Name:             AMD\n"},
        {}, dict(ACTIVE, HSA_OVERRIDE_GFX_VERSION="10.3.0"), tools=["apt-get", "pip"], **venv(),
    )  # fmt: skip


def mac_m2() -> FakeHost:
    """MacBook with an M2 Pro and macOS 15, Homebrew's Python, torch 2.9.1."""
    home = f"/Users/{USER}"
    values = venv(home, "/opt/homebrew/opt/python@3.12/Frameworks/Python.framework/Versions/3.12")
    site = values["path"][1]
    return FakeHost(
        merge(torch_wheel(site, "2.9.1"), companion(site, "torchvision", "0.24.1"), dist(site, "numpy", "2.3.3"), {"/opt/homebrew/bin/python3.12": "", "/usr/bin/": ""}),
        {"sysctl": "machdep.cpu.brand_string: Apple M2 Pro\nhw.memsize: 17179869184\nsysctl.proc_translated: 0\nhw.optional.arm.FEAT_BF16: 1\nkern.hv_vmm_present: 0\n"
         "sysctl: unknown oid 'hw.optional.avx2_0'\n"},
        {}, {"HOME": home, "USER": USER, "PATH": "/opt/homebrew/bin:/usr/bin:/bin", "VIRTUAL_ENV": values["prefix"]}, tools=["brew"],
        system="Darwin", release="24.1.0", version="15.1", machine="arm64", cores=10, home=home, cwd=home + "/work", temporary="/var/folders/xx/T",
        stdlib="/opt/homebrew/lib/python3.12", include="/opt/homebrew/include/python3.12", c_library=None, **values,
    )  # fmt: skip


def mac_intel() -> FakeHost:
    """Intel MacBook with macOS 13 and python.org's Python, no torch."""
    home, base = f"/Users/{USER}", "/Library/Frameworks/Python.framework/Versions/3.12"
    return FakeHost(
        {base + "/bin/python3.12": "", base + "/lib/python3.12/site-packages/": ""},
        {"sysctl": "machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\nhw.memsize: 17179869184\nhw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n"
         "kern.hv_vmm_present: 0\n"},
        {}, {"HOME": home, "USER": USER, "PATH": base + "/bin:/usr/bin:/bin"},
        system="Darwin", release="22.6.0", version="13.6", machine="x86_64", cores=12, home=home, cwd=home, temporary="/var/folders/xx/T", prefix=base, base_prefix=base,
        executable=base + "/bin/python3", path=[base + "/lib/python3.12", base + "/lib/python3.12/site-packages"], stdlib=base + "/lib/python3.12",
        include=base + "/include/python3.12", c_library=None, python_version="3.12.7",
    )  # fmt: skip


def container_without_gpu() -> FakeHost:
    """Docker container that was started without --gpus on a host with driver 550; 64 MB of shared memory, 8 GB of memory."""
    site = "/usr/local/lib/python3.11/site-packages"
    return FakeHost(
        merge(
            linux("Intel(R) Xeon(R) Platinum 8358 CPU @ 2.60GHz", X86_FLAGS + " avx512f avx512bw"), os_release("Debian GNU/Linux 12 (bookworm)", "debian", "12"),
            pci(("10DE:20B5", "30200", "nvidia")), torch_wheel(site, "2.5.1+cu124", "12.4", distribution="2.5.1"), dist(site, "numpy", "2.1.3"),
            {"/.dockerenv": "", "/proc/1/cgroup": "0::/\n", "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "8589934592\n", "/sys/fs/cgroup/cpu.max": "400000 100000\n",
             "/sys/module/nvidia/version": "550.90.07\n",
             "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n"},
        ),
        {}, {}, {"HOME": "/root", "HOSTNAME": HOSTNAME, "PATH": "/usr/local/bin:/usr/bin:/bin", "NVIDIA_VISIBLE_DEVICES": "void"},
        disks={"/": (40e9, 200e9), "/dev/shm": (67.1e6, 67.1e6)}, tools=["pip", "apt-get"],
        prefix="/usr/local", base_prefix="/usr/local", executable="/usr/local/bin/python", path=["/usr/local/lib/python3.11", site], stdlib="/usr/local/lib/python3.11",
        include="/usr/local/include/python3.11", python_version="3.11.10", home="/root", cwd="/app", c_library="glibc 2.36", cores=64, release="5.15.0-122-generic",
    )  # fmt: skip


def hpc_login_node() -> FakeHost:
    """CentOS 7 login node: no GPU, SLURM, environment modules, glibc 2.17, a home with little room; conda's base active."""
    home = f"/gpfs/home/{USER}"
    prefix = f"{home}/miniconda3"
    site = f"{prefix}/lib/python3.11/site-packages"
    return FakeHost(
        merge(
            linux("Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz", X86_FLAGS + " avx512f", 196608000), os_release("CentOS Linux 7 (Core)", "centos", "7", "rhel fedora"), pci(),
            dist(site, "numpy", "1.26.4", "conda"), dist(site, "pip", "23.3.1", "conda"),
            {f"{prefix}/conda-meta/numpy-1.26.4-py311h08b1b3b_0.json": f'{{"build": "py311h08b1b3b_0", "channel": "https://repo.anaconda.com/pkgs/main/linux-64", "url": "/t/{TOKEN}/"}}',
             f"{prefix}/conda-meta/mkl-2023.1.0-h213fc3f_46344.json": f'{{"channel": "https://mirror.corp.example/t/{TOKEN}/conda-forge/linux-64"}}',
             f"{prefix}/conda-meta/history": "", f"{prefix}/lib/libmkl_core.so": "", "/usr/bin/python3.6": "", f"{prefix}/bin/python3.11": "",
             "/apps/cuda/12.1/lib64/libcudart.so.12.1.105": ""},
        ),
        {"nvcc --version": "Cuda compilation tools, release 12.1, V12.1.105\n", "sbatch": ""},
        {"/apps/cuda/12.1/lib64/libcudart.so.12": "libcudart.so.12.1.105"},
        {"HOME": home, "USER": USER, "PATH": f"{prefix}/bin:/apps/cuda/12.1/bin:/usr/bin:/bin", "CONDA_PREFIX": prefix, "CONDA_DEFAULT_ENV": "base",
         "MODULESHOME": "/usr/share/Modules", "LOADEDMODULES": f"cuda/12.1:gcc/11.2.0:{USER}/private:slurm", "LD_LIBRARY_PATH": f"/apps/cuda/12.1/lib64:/gpfs/projects/{USER}/lib",
         "SLURM_CONF": "/etc/slurm/slurm.conf", "CUDA_HOME": "/apps/cuda/12.1", "TMPDIR": f"/scratch/{USER}/tmp"},
        tools=["sinfo", "conda", "pip", "gcc"], disks={"/": (40e9, 50e9), "/gpfs/home": (2.1e9, 20e9), "/scratch": (9e12, 20e12)},
        release="3.10.0-1160.119.1.el7.x86_64", c_library="glibc 2.17", prefix=prefix, base_prefix=prefix, executable=prefix + "/bin/python",
        path=[prefix + "/lib/python3.11", site], stdlib=prefix + "/lib/python3.11", include=prefix + "/include/python3.11", python_version="3.11.5", home=home, cwd=home,
        temporary=f"/scratch/{USER}/tmp", cores=40,
    )  # fmt: skip


def two_torches() -> FakeHost:
    """torch 2.4.1 in the user's own site-packages in front of torch 2.7.1 of a conda environment; a torch.py in the current folder."""
    prefix = f"/home/{USER}/miniconda3/envs/llm"
    site, user = f"{prefix}/lib/python3.10/site-packages", f"/home/{USER}/.local/lib/python3.10/site-packages"
    files, links = driver_files("550.144.03", ["NVIDIA RTX A6000"])
    return FakeHost(
        merge(
            linux("AMD EPYC 7543 32-Core Processor"), UBUNTU_2204, files, pci(("10DE:2230", "30000", "nvidia")),
            torch_wheel(user, "2.4.1+cu121", "12.1", distribution="2.4.1"), dist(user, "numpy", "1.24.4"), dist(user, "typing_extensions", "4.12.2"),
            torch_wheel(site, "2.7.1+cu126", "12.6", distribution="2.7.1"), companion(site, "torchvision", "0.22.1"), dist(site, "numpy", "2.2.6"),
            {f"{prefix}/conda-meta/pytorch-2.5.1-py3.10_cuda12.4_cudnn9.1.0_0.json": '{"channel": "https://conda.anaconda.org/pytorch/linux-64"}',
             f"{prefix}/conda-meta/numpy-1.26.4-py310hb13e2d6_0.json": '{"channel": "https://conda.anaconda.org/conda-forge/linux-64"}',
             f"{site}/~orch-2.7.0.dist-info/METADATA": "", f"/home/{USER}/work/torch.py": "print('my experiment')", f"/home/{USER}/work/random.py": "",
             f"/home/{USER}/work/numpy/": "", f"/home/{USER}/work/torchvision/__init__.py": ""},
        ),
        smi("550.144.03", "12.4", ("NVIDIA RTX A6000", "49140", "8.6")),
        links, dict(LINUX_ENVIRON, CONDA_PREFIX=prefix, CONDA_DEFAULT_ENV="llm"), c_library="glibc 2.35",
        prefix=prefix, base_prefix=prefix, executable=prefix + "/bin/python", path=[prefix + "/lib/python3.10", user, site], stdlib=prefix + "/lib/python3.10",
        include=prefix + "/include/python3.10", python_version="3.10.15", user_site=user, tools=["conda", "pip"],
    )  # fmt: skip


def gh200_cpu_wheel() -> FakeHost:
    """Grace Hopper server whose torch came from the default index: the CPU build."""
    files, links = driver_files("570.124.06", ["NVIDIA GH200 480GB"], opened=True, folder="aarch64-linux-gnu")
    return FakeHost(
        merge(
            linux(memory_kib=502000000), UBUNTU_2404, files, pci(("10DE:2342", "30200", "nvidia")), torch_wheel(VENV_SITE, "2.9.1+cpu", distribution="2.9.1"),
            companion(VENV_SITE, "torchvision", "0.24.1"), dist(VENV_SITE, "numpy", "2.3.3"),
            {"/proc/cpuinfo": arm("0xd4f", "fp asimd aes sve sve2 bf16 i8mm"), "/sys/class/dmi/id/sys_vendor": "Supermicro\n"},
        ),
        dict(smi("570.124.06", "12.8", ("NVIDIA GH200 480GB", "97871", "9.0")),
             **{"nvidia-smi --query-gpu": "NVIDIA GH200 480GB, 97871, 9.0, 570.124.06, Disabled\n"}),
        links, ACTIVE, machine="aarch64", release="6.8.0-1021-nvidia-64k", cores=72, **venv(),
    )  # fmt: skip


def driver_mismatch() -> FakeHost:
    """unattended-upgrades replaced the driver's library; the old kernel module still runs."""
    files, links = driver_files("535.183.01", ["NVIDIA GeForce RTX 3060"], library="535.216.01")
    message = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.216\n"
    return FakeHost(
        merge(linux(), UBUNTU_2204, files, pci(("10DE:2503", "30000", "nvidia")), torch_wheel(VENV_SITE, "2.6.0+cu124", "12.4", distribution="2.6.0")),
        {"nvidia-smi": (18, message), "libcuda": '{"error": 803, "version": 12020, "gpus": []}\n',
         "ldconfig -p": "2 libs\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1\n"},
        links, ACTIVE, tools=["apt-get", "sudo", "pip"], **venv(),
    )  # fmt: skip


def nouveau_secure_boot() -> FakeHost:
    """Driver packages installed, but Secure Boot rejected the unsigned module and nouveau drives the card."""
    message = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.\n\n"
    return FakeHost(
        merge(
            linux(), os_release("Fedora Linux 41 (Workstation Edition)", "fedora", "41"), pci(("10DE:2216", "30000", "nouveau")),
            {"/sys/module/nouveau/": "", "/usr/lib64/libcuda.so.565.77": "", "/lib/modules/6.11.4-301.fc41.x86_64/extra/nvidia/nvidia.ko.xz": "",
             "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": "\x06\0\0\0\x01", "/usr/bin/python3.13": ""},
        ),
        {"nvidia-smi": (9, message), "libcuda": (1, "OSError: libcuda.so.1: cannot open shared object file\n")},
        {"/usr/lib64/libcuda.so.1": "libcuda.so.565.77"}, LINUX_ENVIRON, tools=["dnf", "mokutil"], release="6.11.4-301.fc41.x86_64", c_library="glibc 2.40",
        python_version="3.13.0", path=["/usr/lib64/python3.13", "/usr/lib/python3.13/site-packages"], stdlib="/usr/lib64/python3.13",
    )  # fmt: skip


def hgx_without_fabricmanager() -> FakeHost:
    """Server with eight H100 on NVSwitch, MIG on one GPU, and no fabric manager: cuInit says 802."""
    files, links = driver_files("570.133.20", ["NVIDIA H100 80GB HBM3"] * 8, opened=True)
    cards = [("10DE:2330", "30200", "nvidia")] * 8 + [("10DE:22A3", "68000", "nvidia-nvswitch")] * 4
    lines = [f"NVIDIA H100 80GB HBM3, 81559, 9.0, 570.133.20, {'Enabled' if index == 0 else 'Disabled'}" for index in range(8)]
    return FakeHost(
        merge(linux("Intel(R) Xeon(R) Platinum 8480C", X86_FLAGS + " avx512f avx512_bf16 amx_tile amx_bf16"), UBUNTU_2204, files, pci(*cards),
              torch_wheel(VENV_SITE, "2.9.1+cu128", "12.8"), {"/proc/1/comm": "systemd\n", "/proc/812/comm": "nvidia-persiste\n"}),
        dict(smi("570.133.20", "12.8", *[("NVIDIA H100 80GB HBM3", "81559", "9.0")] * 8), **{
            "nvidia-smi --query-gpu": "\n".join(lines) + "\n", "libcuda": '{"error": 802, "version": 12080, "gpus": []}'}),
        links, dict(ACTIVE, CUDA_VISIBLE_DEVICES="MIG-1b2c3d4e-5f60-7182-93a4-b5c6d7e8f901"), cores=224, **venv(),
    )  # fmt: skip


def windows_bare() -> FakeHost:
    """Windows 10 with Python 3.14 from the Store, Intel graphics, nothing else."""
    home, displays = f"C:\\Users\\{USER}", r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
    base = "C:\\Program Files\\WindowsApps\\PythonSoftwareFoundation.Python.3.14_3.14.240.0_x64__qbz5n2kfra8p0"
    return FakeHost(
        {"C:/Windows/System32/vcruntime140.dll": "", "C:/Windows/System32/vcruntime140_1.dll": "", "C:/Windows/System32/msvcp140.dll": ""}, {}, {},
        {"USERPROFILE": home, "USERNAME": USER, "PATH": "C:\\Windows\\System32", "TEMP": home + "\\AppData\\Local\\Temp"},
        registry={displays: ["0000"], (displays + "\\0000", "DriverDesc"): "Intel(R) UHD Graphics 630", (displays + "\\0000", "MatchingDeviceId"): "PCI\\VEN_8086&DEV_3E92",
                  (r"SOFTWARE\Microsoft\VisualStudio\14.0\VC\Runtimes\x64", "Version"): "v14.42.34433.00"},
        disks={"C:": (30e9, 250e9)}, system="Windows", release="10", version="10.0.19045", machine="AMD64", python_version="3.14.0", prefix=base, base_prefix=base,
        executable=base + "\\python.exe", path=[base + "\\Lib", base + "\\Lib\\site-packages"], stdlib=base + "\\Lib", include=base + "\\Include", cwd=home, home=home,
        temporary=home + "\\AppData\\Local\\Temp", c_library=None, cores=8,
    )  # fmt: skip


def healthy_cpu() -> FakeHost:
    """A cloud machine without a GPU, torch 2.13.0+cpu and its companions: nothing is wrong here."""
    return FakeHost(
        merge(linux("Intel(R) Xeon(R) CPU @ 2.20GHz", X86_FLAGS + " hypervisor avx512f", vendor="Google|Google Compute Engine"), UBUNTU_2404, pci(),
              torch_wheel(VENV_SITE, "2.13.0+cpu"), companion(VENV_SITE, "torchvision", "0.28.0+cpu"), dist(VENV_SITE, "numpy", "2.3.4"), {"/usr/bin/python3.12": ""}),
        {"ldconfig -p": "0 libs found in cache\n"}, {}, ACTIVE, tools=["apt-get", "pip", "gcc", "git", "sudo"], cores=4, **venv(),
    )  # fmt: skip


MACHINES: dict[str, FakeHost] = {
    build.__name__: build()
    for build in (
        fresh_ubuntu_rtx4090, blackwell_old_wheel, pascal_cuda13, wsl2_rtx3080, windows_no_vc_runtime, jetson_orin, rocm_rdna2, mac_m2, mac_intel, container_without_gpu,
        hpc_login_node, two_torches, gh200_cpu_wheel, driver_mismatch, nouveau_secure_boot, hgx_without_fabricmanager, windows_bare, healthy_cpu,
    )
}  # fmt: skip
