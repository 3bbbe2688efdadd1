"""What this machine is: a dict of plain values, ready for JSON.

Nothing in it names a person or a place: no user, host, home folder or serial number. A value that could not be learnt is None, so that
"absent" and "unknown" stay different. Functions named `parse_*` turn captured text into facts and are tested on real captures; all that
touches the machine goes through `Host`, so that whole other machines are tested too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

from groundup.env import gpus, libraries, packages, settings
from groundup.env.gpus import (  # noqa: F401 - part of this module's interface
    parse_agent_enumerator,
    parse_driver_version,
    parse_kfd_properties,
    parse_nvidia_smi,
    parse_proc_gpu_name,
)
from groundup.env.host import Host, Later, below, join, last, scrub, scrub_all, table
from groundup.env.packages import parse_torch_version  # noqa: F401
from groundup.env.runtime import TorchProbe, parse_torch_answer  # noqa: F401

SCHEMA = "groundup.env.facts/1"

_GB = 1e9
_UNLIMITED = 1 << 60  # what cgroup v1 writes for "no limit" is near 2^63

_OS: Mapping[str, Any] = {
    "system": None, "name": None, "id": None, "like": [], "version": None, "release": None, "kernel": None, "machine": None, "libc": None, "wsl": False,
    "wsl_version": None, "container": None, "vm": None, "jetson": False, "l4t": None, "model": None, "rosetta": False,
    "hpc": {"scheduler": None, "in_job": False, "modules": None, "loaded": []},
}  # fmt: skip
_CPU: Mapping[str, Any] = {
    "model": None,
    "cores": None,
    "cores_usable": None,
    "quota": None,
    "avx2": None,
    "avx512": None,
    "amx": None,
    "bf16": None,
}
_MEMORY: Mapping[str, Any] = {"total_gb": None, "available_gb": None, "limit_gb": None}
_PYTHON: Mapping[str, Any] = {
    "version": None, "implementation": None, "bits": None, "free_threaded": None, "environment": None, "origin": None, "externally_managed": None,
    "headers": None, "active": {"venv": False, "conda": None, "pixi": False}, "pythons": [], "mixed": [],
}  # fmt: skip
_WINDOWS: Mapping[str, Any] = {"vc_runtime": None, "missing_dlls": [], "long_paths": None}
_TOOLS = (
    "pip", "uv", "conda", "mamba", "micromamba", "pixi", "git", "gcc", "g++", "cc", "clang", "cl", "ninja", "cmake", "make", "docker", "podman", "sudo",
    "apt-get", "dnf", "yum", "zypper", "pacman", "apk", "brew", "winget", "lspci", "mokutil", "nvidia-smi", "nvidia-ctk", "rocminfo",
)  # fmt: skip
_COMPANIONS = {
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "xformers": "xformers",
    "flash-attn": "flash_attn",
    "bitsandbytes": "bitsandbytes",
}


def facts(quick: bool = False, deep: bool = False, host: Optional[Host] = None) -> Dict[str, Any]:
    """Everything that can be learnt without importing torch in this process.

    What cannot be learnt is None; what went wrong on the way is a line in "problems". Never raises.

    Args:
        quick: read files only where that is possible (about 20 ms); GPU memory and compute capability may then be missing.
        deep: ask torch, libcuda and rocminfo too, in child processes (seconds).
        host: the machine, instead of this one.
    """
    host = host or Host()
    problems: List[str] = []

    def fill(name: str, skeleton: Mapping[str, Any], function: Callable[..., None], *args: Any) -> Dict[str, Any]:
        """A collector writes into a copy of its skeleton, so that what it learnt before it failed is kept."""
        found: Dict[str, Any] = json.loads(json.dumps(skeleton))
        attempt(name, lambda: function(host, *args, found))
        return found

    def attempt(name: str, function: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return function()
        except Exception as error:  # a fact that cannot be read must not hide the others
            problems.append("{}: {}: {}".format(name, type(error).__name__, scrub(str(error))[:200]))
            return otherwise

    devices = attempt("pci", lambda: gpus.pci(host))
    # What asks other programs runs beside the rest.
    nvidia = Later(fill, "nvidia", gpus.NVIDIA, gpus.nvidia, quick, deep, devices)
    amd = Later(fill, "amd", gpus.AMD, gpus.amd, quick, deep, devices)
    cuda = Later(fill, "cuda", libraries.CUDA, libraries.cuda, quick)
    sysctls = attempt("sysctl", lambda: _sysctls(host), {})
    system = fill("os", _OS, _operating_system, sysctls)
    listed = attempt("packages", lambda: packages.installed(host), [])
    torch = attempt("torch", lambda: packages.torch_on_path(host))
    if torch:
        args = (torch["version"], torch["build"], system["system"] or "", system["machine"] or "")
        torch["arch_list"] = attempt("arch_list", lambda: packages.known_architectures(*args))
    runtime = None
    if deep and torch:
        names = [module for name, module in _COMPANIONS.items() if any(item["name"] == name for item in listed)]
        runtime = Later(attempt, "torch_runtime", lambda: TorchProbe(host=host, companions=names).answer())
    found = {
        "schema": SCHEMA,
        "os": system,
        "cpu": fill("cpu", _CPU, _cpu, sysctls),
        "memory": fill("memory", _MEMORY, _memory, sysctls),
        "disks": attempt("disks", lambda: _disks(host), {}),
        "python": fill("python", _PYTHON, _python, listed),
        "windows": fill("windows", _WINDOWS, _windows),
        "tools": attempt("tools", lambda: {name: bool(host.which(name)) for name in _TOOLS}, {}),
        "intel": fill("intel", gpus.INTEL, gpus.intel, quick, devices),
        "apple": fill("apple", gpus.APPLE, gpus.apple, sysctls),
        "torch": torch,
        "packages": listed,
        "duplicates": attempt("duplicates", lambda: packages.duplicates(listed), []),
        "leftovers": attempt("leftovers", lambda: packages.leftovers(host), []),
        "shadow": attempt("shadow", lambda: packages.shadows(host, torch is not None), []),
        "variables": attempt("variables", lambda: settings.variables(host), {}),
        "pip": attempt("pip", lambda: settings.pip(host), {}),
        "nvidia": nvidia.result(),
        "amd": amd.result(),
        "cuda": cuda.result(),
        "torch_runtime": runtime.result() if runtime else None,
    }
    found["disk"] = {"free_gb": (found["disks"].get("here") or {}).get("free_gb")}
    found["problems"] = problems
    return dict(scrub_all(found, host))


# --- torch -----------------------------------------------------------------------------------------------------------------------


def installed_torch(site_packages: Path) -> Optional[Dict[str, Any]]:
    """The torch in one site-packages folder, read from its files; None when there is none or its installation did not finish."""
    return packages.torch_in(Host(), str(site_packages))


# --- the system ------------------------------------------------------------------------------------------------------------------


def _sysctls(host: Host) -> Dict[str, str]:
    if host.system != "Darwin":
        return {}
    names = ("machdep.cpu.brand_string", "hw.memsize", "sysctl.proc_translated", "hw.optional.arm.FEAT_BF16", "kern.hv_vmm_present",
             "hw.optional.avx2_0", "hw.optional.avx512f")  # fmt: skip
    # Names that this macOS does not know are errors between the answers.
    return table(host.run(["/usr/sbin/sysctl", *names], 5)[1])


def _operating_system(host: Host, sysctls: Mapping[str, str], found: Dict[str, Any]) -> None:
    release = host.release
    found.update(system=host.system, release=release, kernel=release, machine=_machine(host.machine))
    if host.system == "Darwin":
        found.update(name="macOS " + host.version, id="macos", version=host.version)
    elif host.system == "Windows":
        found.update(name="Windows {} {}".format(release, host.version), id="windows", version=host.version, kernel=host.version)
    else:
        described = parse_os_release(host.read("/etc/os-release", 20_000) or host.read("/usr/lib/os-release", 20_000))
        found.update(name=described.get("PRETTY_NAME", "Linux"), id=described.get("ID"), version=described.get("VERSION_ID"))
        found["like"] = described.get("ID_LIKE", "").split()
    found["libc"] = host.libc()
    found["rosetta"] = sysctls.get("sysctl.proc_translated") == "1"
    found["container"] = _container(host)
    if "microsoft" in release.lower():
        found["wsl"], found["wsl_version"] = True, 2 if re.search(r"microsoft-standard|wsl2", release, re.IGNORECASE) else 1
    tegra = host.read("/etc/nv_tegra_release", 500)
    found["jetson"] = "tegra" in release.lower() or bool(tegra)
    found["l4t"] = parse_tegra_release(tegra)
    model = host.read("/proc/device-tree/model", 200).strip("\0 \n")
    found["model"] = model if re.match(r"NVIDIA|Raspberry Pi", model) else None
    found["vm"] = _virtual_machine(host, sysctls)
    found["hpc"] = _hpc(host)


def _machine(name: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def parse_os_release(source: str) -> Dict[str, str]:
    """/etc/os-release as a dict."""
    pairs = (line.split("=", 1) for line in source.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}


def parse_tegra_release(source: str) -> Optional[str]:
    """'36.4.3' from '# R36 (release), REVISION: 4.3, GCID: ...'."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", source)
    return "{}.{}".format(*found.groups()) if found else None


def _container(host: Host) -> Optional[str]:
    environ = host.environ
    if "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ or host.exists("/.singularity.d"):
        return "apptainer"
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if host.exists("/.dockerenv"):
        return "docker"
    if host.exists("/run/.containerenv"):
        return "podman"
    named = host.read("/run/systemd/container", 50).strip()
    if re.fullmatch(r"[a-z-]{2,20}", named) and named != "wsl":
        return named
    # cgroup v2 shows a container only '/': the root file system tells.
    found = re.search(r"docker|containerd|kubepods|lxc", host.read("/proc/1/cgroup", 10_000))
    found = found or re.search(r"(?<= / / )[^\n]*?(docker|containerd|kubelet|lxc)(?=/)", host.read("/proc/self/mountinfo", 20_000))
    return found.group(found.lastindex or 0) if found else None


def _virtual_machine(host: Host, sysctls: Mapping[str, str]) -> Optional[str]:
    """The kind of virtual machine this is, or None. The names that a manufacturer writes are matched, never copied."""
    if host.system == "Darwin":
        return "hypervisor" if sysctls.get("kern.hv_vmm_present") == "1" else None
    if host.system == "Windows":
        bios = r"HARDWARE\DESCRIPTION\System\BIOS"
        product = "{} {}".format(host.registry(bios, "SystemManufacturer") or "", host.registry(bios, "SystemProductName") or "")
    else:
        folder = "/sys/class/dmi/id/"
        product = " ".join(host.read(folder + name, 200).strip() for name in ("sys_vendor", "product_name"))
    kinds = (
        (r"\bVMware", "VMware"), (r"VirtualBox", "VirtualBox"), (r"Microsoft Corporation Virtual Machine", "Hyper-V"), (r"Google Compute Engine", "Google Cloud"),
        (r"Amazon EC2", "Amazon EC2"), (r"Alibaba Cloud", "Alibaba Cloud"), (r"Tencent Cloud", "Tencent Cloud"), (r"OpenStack", "OpenStack"),
        (r"\bXen\b|HVM domU", "Xen"), (r"Parallels", "Parallels"), (r"QEMU|\bKVM\b", "KVM"),
    )  # fmt: skip
    for pattern, kind in kinds:
        # Amazon's whole machines carry the same vendor's name.
        if re.search(pattern, product) and not re.search(r"\.metal\b", product):
            return kind
    if (
        host.system == "Linux"
        and "microsoft" not in host.release.lower()
        and re.search(r"\bhypervisor\b", host.read("/proc/cpuinfo", 8192))
    ):
        return "hypervisor"
    return None


def _hpc(host: Host) -> Dict[str, Any]:
    environ = host.environ
    schedulers = (("slurm", "SLURM_", "sbatch"), ("pbs", "PBS_", "qsub"), ("lsf", "LSB_", "bsub"), ("sge", "SGE_", "qrsh"))
    found: Dict[str, Any] = {"scheduler": None, "in_job": False, "modules": None, "loaded": []}
    for name, prefix, tool in schedulers:
        if host.which(tool) or any(key.startswith(prefix) for key in environ):
            found["scheduler"] = name
            found["in_job"] = any(key in environ for key in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"))
            break
    if "LMOD_CMD" in environ or "LMOD_DIR" in environ:
        found["modules"] = "lmod"
    elif "MODULESHOME" in environ or "MODULEPATH" in environ:
        found["modules"] = "environment-modules"
    # A site's own module names stay here; those of compilers, CUDA and Python decide what is loaded.
    wanted = re.compile(
        r"(?:cuda|cudatoolkit|cudnn|nccl|nvhpc|rocm|gcc|intel|oneapi|python|anaconda\d?|miniconda\d?|miniforge\d?|conda|pytorch|torch|openmpi|mpi)(?:/[\w.+-]+)*"
    )
    loaded = (name for name in environ.get("LOADEDMODULES", "").split(":") if wanted.fullmatch(name.lower()))
    found["loaded"] = [name[:60] for name in loaded]
    return found


def _windows(host: Host, found: Dict[str, Any]) -> None:
    if host.system != "Windows":
        return
    folder = "C:/Windows/System32"
    wanted = ("vcruntime140.dll", "vcruntime140_1.dll", "msvcp140.dll")
    found["missing_dlls"] = [name for name in wanted if not host.exists(join(folder, name))]
    arch = "arm64" if _machine(host.machine) == "aarch64" else "x64"
    number = host.registry(r"SOFTWARE\Microsoft\VisualStudio\14.0\VC\Runtimes" + "\\" + arch, "Version")
    found["vc_runtime"] = (number or "").lstrip("v") or (None if found["missing_dlls"] else "unknown version")
    enabled = host.registry(r"SYSTEM\CurrentControlSet\Control\FileSystem", "LongPathsEnabled")
    found["long_paths"] = enabled == "1" if enabled is not None else None


# --- processor, memory, disks ----------------------------------------------------------------------------------------------------


def _cpu(host: Host, sysctls: Mapping[str, str], found: Dict[str, Any]) -> None:
    found.update(cores=host.cores, cores_usable=host.cores_usable())
    if host.system == "Darwin":
        found["model"] = sysctls.get("machdep.cpu.brand_string")
        arm = _machine(host.machine) == "aarch64"
        found["avx2"] = False if arm else _flag(sysctls, "hw.optional.avx2_0")
        found["avx512"] = False if arm else _flag(sysctls, "hw.optional.avx512f")
        found["amx"], found["bf16"] = False, bool(_flag(sysctls, "hw.optional.arm.FEAT_BF16"))
    elif host.system == "Windows":
        name = host.registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")
        found["model"] = re.sub(r"\s+", " ", name).strip() if name else None
        found["avx2"], found["avx512"] = host.processor_feature(40), host.processor_feature(41)
    else:
        # The whole file takes a second on a machine with hundreds of cores; they are alike.
        first = host.read("/proc/cpuinfo", 8192)
        found["model"] = parse_cpu_model(first)
        found.update(parse_cpu_flags(first))
        found["quota"] = _cpu_quota(host)


def _flag(sysctls: Mapping[str, str], name: str) -> Optional[bool]:
    return sysctls[name] == "1" if name in sysctls else None


def parse_cpu_model(cpuinfo: str) -> Optional[str]:
    """The processor's name in /proc/cpuinfo; ARM kernels give numbers instead."""
    found = re.search(r"^(?:model name|Model|Hardware|cpu model)[ \t]*:[ \t]*(\S.*)$", cpuinfo, re.MULTILINE)
    if found:
        return re.sub(r"\s+", " ", found.group(1)).strip()
    part = re.search(r"^CPU implementer\s*:\s*(0x[0-9a-f]{2})$.*?^CPU part\s*:\s*(0x[0-9a-f]{3})$", cpuinfo, re.MULTILINE | re.DOTALL)
    return _ARM_PARTS.get(part.groups()) if part else None  # type: ignore[arg-type]


_ARM_PARTS = {
    ("0x41", "0xd07"): "ARM Cortex-A57", ("0x41", "0xd08"): "ARM Cortex-A72", ("0x41", "0xd0b"): "ARM Cortex-A76", ("0x41", "0xd42"): "ARM Cortex-A78AE",
    ("0x41", "0xd0c"): "ARM Neoverse-N1", ("0x41", "0xd49"): "ARM Neoverse-N2", ("0x41", "0xd40"): "ARM Neoverse-V1", ("0x41", "0xd4f"): "ARM Neoverse-V2",
    ("0x41", "0xd83"): "ARM Neoverse-V3AE", ("0x4e", "0x004"): "NVIDIA Carmel", ("0xc0", "0xac3"): "Ampere-1", ("0xc0", "0xac4"): "Ampere-1a",
}  # fmt: skip


def parse_cpu_flags(cpuinfo: str) -> Dict[str, Optional[bool]]:
    """AVX2, AVX-512, AMX and bf16 instructions from the first processor in /proc/cpuinfo; None where it lists none."""
    found = re.search(r"^(?:flags|Features)[ \t]*:(.*)$", cpuinfo, re.MULTILINE)
    if not found:
        return {"avx2": None, "avx512": None, "amx": None, "bf16": None}
    flags = set(found.group(1).split())
    return {
        "avx2": "avx2" in flags,
        "avx512": "avx512f" in flags,
        "amx": "amx_tile" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}),
    }


def _cgroup_values(host: Host, v2: str, v1: str) -> List[str]:
    """A limit's values from this process's control group up to the root; the smallest holds."""
    found: List[str] = []
    for line in host.read("/proc/self/cgroup", 10_000).splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            root, name = ("/sys/fs/cgroup", v2) if parts[1] == "" else ("/sys/fs/cgroup/" + v1.split("/")[0], v1.split("/")[1])
            if parts[1] not in ("", v1.split("/")[0], "cpu,cpuacct"):
                continue
            levels = [part for part in parts[2].split("/") if part and part != ".."]
            found += [host.read(join(root, *levels[:depth], name), 200).strip() for depth in range(len(levels), -1, -1)]
    if not found:
        found = [host.read(path, 200).strip() for path in ("/sys/fs/cgroup/" + v2, "/sys/fs/cgroup/" + v1)]
    return [value for value in found if value]


def _cpu_quota(host: Host) -> Optional[float]:
    """Cores that a container or a job may use at once, where that is limited by time rather than by a set of cores."""
    quotas = []
    for value in _cgroup_values(host, "cpu.max", "cpu/cpu.cfs_quota_us"):
        found = re.match(r"(\d{1,15}) (\d{1,15})$", value) or re.match(r"(\d{1,15})()$", value)
        if found and int(found.group(2) or 100_000):
            quotas.append(int(found.group(1)) / int(found.group(2) or 100_000))
    return round(min(quotas), 2) if quotas else None


def _memory(host: Host, sysctls: Mapping[str, str], found: Dict[str, Any]) -> None:
    if host.system == "Windows":
        total, available = host.windows_memory()
        found.update(total_gb=_gb(total), available_gb=_gb(available))
    elif host.system == "Darwin":
        total_text = sysctls.get("hw.memsize", "")
        found["total_gb"] = _gb(int(total_text)) if total_text.isdigit() else None
    else:
        found.update(parse_meminfo(host.read("/proc/meminfo", 10_000)))
        values = _cgroup_values(host, "memory.max", "memory/memory.limit_in_bytes")
        limits = [int(value) for value in values if re.fullmatch(r"\d{1,20}", value) and int(value) < _UNLIMITED]
        found["limit_gb"] = _gb(min(limits)) if limits else None


def parse_meminfo(source: str) -> Dict[str, Optional[float]]:
    """Total and available memory in GB (10^9 bytes) from /proc/meminfo."""
    kib = {key: int(value) for key, value in re.findall(r"^(MemTotal|MemAvailable):\s+(\d{1,15}) kB", source, re.MULTILINE)}
    return {
        "total_gb": _gb(kib["MemTotal"] * 1024) if "MemTotal" in kib else None,
        "available_gb": _gb(kib["MemAvailable"] * 1024) if "MemAvailable" in kib else None,
    }


def _gb(size: float) -> float:
    return round(size / _GB, 1)


def _disks(host: Host) -> Dict[str, Optional[Dict[str, float]]]:
    """Where groundup works, where pip unpacks, where the packages are, and the memory that processes share."""
    places = {"here": host.cwd, "temporary": host.temporary, "environment": host.prefix}
    if host.system == "Linux":
        places["shm"] = "/dev/shm"
    found: Dict[str, Optional[Dict[str, float]]] = {"shm": None}
    for name, folder in places.items():
        usage = host.disk(folder) if folder else None
        # A docker container's shared memory is 64 MB: one decimal is not enough there.
        digits = 3 if name == "shm" else 1
        found[name] = {"free_gb": round(usage[0] / _GB, digits), "total_gb": round(usage[1] / _GB, digits)} if usage else None
    return found


# --- Python ----------------------------------------------------------------------------------------------------------------------


def _python(host: Host, listed: List[Dict[str, Any]], found: Dict[str, Any]) -> None:
    found.update(version=host.python_version, implementation=host.implementation, bits=host.bits, free_threaded=host.free_threaded)
    conda_prefix = host.environ.get("CONDA_PREFIX")
    if host.exists(join(host.prefix, "conda-meta")) or (conda_prefix and host.real(host.prefix) == host.real(conda_prefix)):
        found["environment"] = "conda"
    else:
        found["environment"] = "venv" if host.prefix != host.base_prefix else "system"
    found["origin"] = _origin(host)
    found["externally_managed"] = host.prefix == host.base_prefix and host.exists(join(host.stdlib, "EXTERNALLY-MANAGED"))
    found["headers"] = host.exists(join(host.include, "Python.h")) if host.include else None
    name = host.environ.get("CONDA_DEFAULT_ENV")
    if name and (re.search(r"[\\/]", name) or name == last(host.home)):
        name = "(a folder)"
    found["active"] = {
        "venv": bool(host.environ.get("VIRTUAL_ENV")),
        "conda": (name or "(unnamed)")[:60] if conda_prefix else None,
        "pixi": "PIXI_PROJECT_NAME" in host.environ,
    }
    found["pythons"] = _pythons(host)
    found["mixed"] = _mixed(host, found["environment"], listed)


def _origin(host: Host) -> str:
    """Who made this Python: decides how it is replaced and whether it may be written to."""
    base = host.base_prefix.replace("\\", "/")
    if host.exists(join(base, "conda-meta")):
        return "conda"
    kinds = (
        (r"/\.?pyenv/", "pyenv"), (r"/uv/python/", "uv"), (r"/Cellar/|/opt/homebrew|/linuxbrew/", "homebrew"), (r"/Library/Frameworks/Python\.framework", "python.org"),
        (r"/Xcode\.app/|/CommandLineTools/", "xcode"), (r"/WindowsApps/", "microsoft store"), (r"/Programs/Python/|/Program Files/Python|^[A-Z]:/Python\d", "python.org"),
        (r"/nix/store/", "nix"), (r"/(?:cvmfs|easybuild|spack|modules|apps|software|sw)/", "module"), (r"python_embeded|embed", "embedded"), (r"^/usr/local\b", "built here"),
        (r"^/usr\b|^/$", "system"),
    )  # fmt: skip
    return next((kind for pattern, kind in kinds if re.search(pattern, base + "/", re.IGNORECASE)), "other")


def _pythons(host: Host) -> List[str]:
    """Versions ('3.12') of the Pythons that can be called by name."""
    minors = range(6, 16)
    if host.system == "Windows":
        keys = host.registry_keys(r"SOFTWARE\Python\PythonCore")
        found = {int(key[2:].split("-")[0]) for key in keys if re.fullmatch(r"3\.\d{1,2}(?:-(?:32|64|arm64))?", key)}
    else:
        folders = set(host.path_folders())
        found = {minor for minor in minors if any(host.exists(join(folder, "python3.{}".format(minor))) for folder in folders)}
    return ["3.{}".format(minor) for minor in sorted(found)]


def _mixed(host: Host, environment: str, listed: List[Dict[str, Any]]) -> List[str]:
    """Names of the ways in which this Python is not what it seems; `info.MIXED` says what each means."""
    environ, found = host.environ, []
    conda, venv = environ.get("CONDA_PREFIX"), environ.get("VIRTUAL_ENV")
    if conda and environment == "venv":
        found.append("conda_around_venv")
    elif conda and environment != "conda":
        found.append("conda_active_elsewhere")
    elif conda and not below(host.real(host.prefix), host.real(conda)) and environment == "conda":
        found.append("other_conda_active")
    if venv and host.real(venv) != host.real(host.prefix):
        found.append("venv_active_elsewhere")
    if environ.get("PYTHONHOME"):
        found.append("pythonhome")
    if any(item["where"] == "PYTHONPATH" for item in listed):
        found.append("packages_on_pythonpath")
    if any(item["where"] == "user site" for item in listed):
        found.append("packages_in_user_site")
    if environment == "venv" and any(item["where"] == "system" for item in listed):
        found.append("system_packages_in_venv")
    if environment == "conda" and any(item["where"] == "environment" and item["installer"] in ("pip", "uv") for item in listed):
        conda_made = {item["name"] for item in listed if item["where"] == "conda"}
        if conda_made & {"pytorch", "libtorch", "numpy", "mkl"}:
            found.append("pip_and_conda")
    return found


def clean_environment() -> Dict[str, str]:
    """The environment for a child Python: without the variables that would make it import another installation's modules."""
    return {name: value for name, value in Host().environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")}
