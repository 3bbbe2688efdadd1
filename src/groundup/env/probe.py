"""What this machine is: a dict of plain values, ready for JSON.

Nothing in it names a person or a place: no user, host, home folder or serial number. A value that could not be learnt is None, so that
"absent" and "unknown" stay different. Functions named `parse_*` turn captured text into facts and are tested on real captures.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

SCHEMA = "groundup.env.facts/1"

_GB = 1e9
_PCI_NVIDIA, _PCI_AMD = "0x10de", "0x1002"
_WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"

# Run in a child process: a broken driver can hang or kill whoever opens libcuda.
_ASK_LIBCUDA = """
import ctypes, json, sys
lib = ctypes.CDLL(sys.argv[1])
answer = {"error": lib.cuInit(0), "gpus": []}
count = ctypes.c_int()
if answer["error"] == 0 and lib.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, size = ctypes.create_string_buffer(100), ctypes.c_size_t()
        lib.cuDeviceGet(ctypes.byref(device), index)
        lib.cuDeviceGetName(name, 100, device)
        lib.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        lib.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        lib.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        answer["gpus"].append({"name": name.value.decode("utf-8", "replace"), "memory_gb": round(size.value / 1e9, 1),
                               "compute_capability": "%d.%d" % (major.value, minor.value)})
print(json.dumps(answer))
"""

_ASK_TORCH = """
import json, time, warnings
warnings.simplefilter("ignore")
start = time.perf_counter()
import torch
answer = {"import_seconds": round(time.perf_counter() - start, 2), "version": torch.__version__, "devices": [],
          "cuda_build": torch.version.cuda, "hip_build": torch.version.hip,
          "cuda_available": torch.cuda.is_available(), "arch_list": torch.cuda.get_arch_list(),
          "mps_available": bool(getattr(torch.backends, "mps", None) and torch.backends.mps.is_available())}
if answer["cuda_available"]:
    answer["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(answer))
"""


def facts(quick: bool = False) -> Dict[str, Any]:
    """Everything that can be learnt without importing torch.

    Args:
        quick: read files only where that is possible (about 20 ms); GPU memory and compute capability may then be missing.
    """
    return {
        "schema": SCHEMA,
        "os": _operating_system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"free_gb": _disk_free_gb(Path.cwd())},
        "python": _python(),
        "nvidia": _nvidia(quick),
        "amd": _amd(quick),
        "apple": _apple(),
        "torch": _torch_on_path(),
        "variables": {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION") if name in os.environ},
    }


# --- torch -----------------------------------------------------------------------------------------------------------------------


def installed_torch(site_packages: Path) -> Optional[Dict[str, Any]]:
    """The torch in one site-packages folder, read from its files; None when there is none or its installation did not finish."""
    # RECORD is the last thing an installer writes: without it the folder was left half-made.
    records = sorted(site_packages.glob("torch-*.dist-info/RECORD"))
    found = parse_torch_version(_read(str(site_packages / "torch" / "version.py"))) if records else None
    if found:
        # The default package index names no build in the version it installs, PyTorch's own index does.
        found["distribution"] = records[0].parent.name[len("torch-") : -len(".dist-info")]
    return found


def parse_torch_version(source: str) -> Optional[Dict[str, Any]]:
    """Reads torch/version.py without running it."""
    found = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*=\s*'([^']*)'", source, re.MULTILINE))
    if "__version__" not in found:
        return None
    return {"version": found["__version__"], "cuda": found.get("cuda"), "hip": found.get("hip")}


class TorchProbe:
    """Imports torch in a child process, so that this one survives whatever that does. Starts at once; `answer()` waits."""

    def __init__(self, python: str = sys.executable, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._child = subprocess.Popen(
            [python, "-I", "-c", _ASK_TORCH],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        )

    def answer(self) -> Dict[str, Any]:
        """torch's own view of the machine; `error` is None when it could be imported."""
        try:
            out, err = self._child.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            return {"error": "importing torch did not end within {:.0f} s".format(self.timeout)}
        try:
            return dict(json.loads(out.decode("utf-8", "replace").strip().splitlines()[-1]), error=None)
        except (ValueError, IndexError):
            lines = err.decode("utf-8", "replace").strip().splitlines()
            return {"error": scrub(lines[-1]) if lines else "importing torch ended with status {}".format(self._child.returncode)}


def _torch_on_path() -> Optional[Dict[str, Any]]:
    for folder in sys.path:
        found = installed_torch(Path(folder)) if folder else None
        if found:
            return found
    return None


# --- the machine -----------------------------------------------------------------------------------------------------------------


def _operating_system() -> Dict[str, Any]:
    release = platform.release()
    return {
        "system": platform.system(),
        "name": _distribution(),
        "release": release,
        "machine": _machine(),
        "libc": _libc(),
        "wsl": "microsoft" in release.lower(),
        "container": _container(),
        "jetson": "tegra" in release.lower() or Path("/etc/nv_tegra_release").exists(),
        "rosetta": _sysctl("sysctl.proc_translated") == "1",
    }


def _machine() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _distribution() -> str:
    if sys.platform == "darwin":
        return "macOS " + platform.mac_ver()[0]
    if sys.platform == "win32":
        return "Windows {} {}".format(platform.release(), platform.version())
    return parse_os_release(_read("/etc/os-release")).get("PRETTY_NAME", "Linux")


def parse_os_release(source: str) -> Dict[str, str]:
    """/etc/os-release as a dict."""
    pairs = (line.split("=", 1) for line in source.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}


def _libc() -> Optional[str]:
    """'glibc 2.36', 'musl', or None where the question has no meaning."""
    if not sys.platform.startswith("linux"):
        return None
    if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")) or "musl" in str(sysconfig.get_config_var("EXT_SUFFIX")):
        return "musl"
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return "musl"


def _container() -> Optional[str]:
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    found = re.search(r"docker|containerd|kubepods|lxc", _read("/proc/1/cgroup"))
    return found.group(0) if found else None


def _cpu() -> Dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if sys.platform == "darwin":
        model: Optional[str] = _sysctl("machdep.cpu.brand_string")
    elif sys.platform == "win32":
        model = platform.processor() or None
    else:
        model = parse_cpu_model(_read("/proc/cpuinfo"))
    return {"model": model, "cores": os.cpu_count(), "cores_usable": usable}


def parse_cpu_model(cpuinfo: str) -> Optional[str]:
    """The processor's name in /proc/cpuinfo; ARM kernels often give none."""
    found = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    return re.sub(r"\s+", " ", found.group(1)).strip() if found else None


def _memory() -> Dict[str, Optional[float]]:
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        total = _sysctl("hw.memsize")
        return {"total_gb": round(int(total) / _GB, 1) if total else None, "available_gb": None}
    return parse_meminfo(_read("/proc/meminfo"))


def parse_meminfo(source: str) -> Dict[str, Optional[float]]:
    """Total and available memory in GB (10^9 bytes) from /proc/meminfo."""
    kib = {key: int(value) for key, value in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", source, re.MULTILINE)}
    return {
        "total_gb": round(kib["MemTotal"] * 1024 / _GB, 1) if "MemTotal" in kib else None,
        "available_gb": round(kib["MemAvailable"] * 1024 / _GB, 1) if "MemAvailable" in kib else None,
    }


def _windows_memory() -> Dict[str, Optional[float]]:
    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # noqa: B009 - windll exists on Windows only
    return {"total_gb": round(status.total / _GB, 1), "available_gb": round(status.available / _GB, 1)}


def _disk_free_gb(folder: Path) -> Optional[float]:
    try:
        return round(shutil.disk_usage(str(folder)).free / _GB, 1)
    except OSError:
        return None


def _python() -> Dict[str, Any]:
    if os.environ.get("CONDA_PREFIX") and Path(sys.prefix) == Path(os.environ["CONDA_PREFIX"]):
        environment = "conda"
    else:
        environment = "venv" if sys.prefix != sys.base_prefix else "system"
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "bits": struct.calcsize("P") * 8,
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "environment": environment,
    }


# --- accelerators ----------------------------------------------------------------------------------------------------------------


def _nvidia(quick: bool) -> Dict[str, Any]:
    """NVIDIA GPUs that answer. `driver` may be known while `gpus` is empty: a container without GPU access sees the host's driver."""
    driver = parse_driver_version(_read("/sys/module/nvidia/version") or _read("/proc/driver/nvidia/version"))
    found: Dict[str, Any] = {"driver": driver, "gpus": [], "problem": None, "on_bus": _pci_displays(_PCI_NVIDIA)}
    if quick and sys.platform.startswith("linux"):
        cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        names = (parse_proc_gpu_name(_read(str(card))) for card in cards)
        found["gpus"] = [{"name": name, "memory_gb": None, "compute_capability": None} for name in names if name]
        return found

    smi = shutil.which("nvidia-smi") or (_WSL_NVIDIA_SMI if Path(_WSL_NVIDIA_SMI).exists() else None)
    if smi:
        fields = ("name", "memory.total", "compute_cap", "driver_version")
        status, out = _output([smi, "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"], timeout=15)
        found["gpus"] = parse_nvidia_smi(out) if status == 0 else []
        if found["gpus"]:
            # Under WSL and on Windows there is no kernel module to read, and what answers is what counts.
            found["driver"] = found["gpus"][0]["driver"] or driver
        elif status != 0:
            found["problem"] = scrub(" ".join(out.split())[:300]) or "nvidia-smi ended with status {}".format(status)
    signs = smi or driver or found["on_bus"]
    if signs and (not found["gpus"] or any(gpu["compute_capability"] is None for gpu in found["gpus"])):
        answer = _ask_libcuda()
        if answer and answer["gpus"]:
            found["gpus"] = answer["gpus"]
        elif answer and answer["error"] and not found["gpus"]:
            found["problem"] = "{} [cuInit: error {}]".format(found["problem"] or "", answer["error"]).strip()
    for gpu in found["gpus"]:
        gpu.pop("driver", None)
    return found


def parse_driver_version(source: str) -> Optional[str]:
    """'550.144.03' from /sys/module/nvidia/version or /proc/driver/nvidia/version."""
    found = re.search(r"(?:Kernel Module(?: for \S+)?\s+|^)(\d{3,4}\.\d+(?:\.\d+)?)\b", source.strip(), re.MULTILINE)
    return found.group(1) if found else None


def parse_proc_gpu_name(source: str) -> Optional[str]:
    """The model in /proc/driver/nvidia/gpus/*/information (the file also has a serial number: nothing else is read)."""
    found = re.search(r"^Model:\s*(\S.*)$", source, re.MULTILINE)
    return found.group(1).strip() if found else None


def parse_nvidia_smi(source: str) -> List[Dict[str, Any]]:
    """Lines of `nvidia-smi --query-gpu=name,memory.total,compute_cap,driver_version --format=csv,noheader,nounits`."""
    gpus = []
    for line in source.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or not parts[0]:
            continue
        name, memory, capability, driver = parts
        # '[N/A]' and '[Not Supported]' are normal on integrated GPUs, where the memory is the machine's own.
        gpus.append(
            {
                "name": name,
                "memory_gb": round(float(memory) * 1024 * 1024 / _GB, 1) if re.fullmatch(r"\d+(\.\d+)?", memory) else None,
                "compute_capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
                "driver": driver if re.match(r"\d", driver) else None,
            }
        )
    return gpus


def _ask_libcuda() -> Optional[Dict[str, Any]]:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    status, out = _output([sys.executable, "-I", "-c", _ASK_LIBCUDA, name], timeout=15)
    try:
        return dict(json.loads(out)) if status == 0 else None
    except ValueError:
        return None


def _amd(quick: bool) -> Dict[str, Any]:
    """AMD GPUs that the ROCm kernel driver (KFD) offers for computing."""
    nodes = sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"))
    gfx = [name for name in (parse_kfd_properties(_read(str(path))) for path in nodes) if name]
    if not gfx and not quick:
        tool = shutil.which("rocm_agent_enumerator") or shutil.which("/opt/rocm/bin/rocm_agent_enumerator")
        if tool:
            gfx = parse_agent_enumerator(_output([tool], timeout=15)[1])
    return {"gfx": gfx, "on_bus": _pci_displays(_PCI_AMD)}


def parse_kfd_properties(source: str) -> Optional[str]:
    """'gfx90a' from one KFD node; None for a CPU node, whose version is 0."""
    found = re.search(r"^gfx_target_version\s+(\d+)$", source, re.MULTILINE)
    number = int(found.group(1)) if found else 0
    # 90010 is major 9, minor 0, stepping 10; the name writes minor and stepping in hexadecimal: gfx90a.
    return "gfx{}{:x}{:x}".format(number // 10000, number // 100 % 100, number % 100) if number else None


def parse_agent_enumerator(source: str) -> List[str]:
    """Lines of rocm_agent_enumerator; gfx000 is the CPU."""
    return [line.strip() for line in source.splitlines() if re.fullmatch(r"gfx[0-9a-f]+", line.strip()) and line.strip() != "gfx000"]


def _apple() -> Dict[str, Any]:
    if sys.platform != "darwin":
        return {"chip": None, "macos": None}
    return {"chip": _sysctl("machdep.cpu.brand_string"), "macos": platform.mac_ver()[0]}


def _pci_displays(vendor: str) -> Optional[int]:
    """How many display controllers of this vendor are on the PCI bus; None where that cannot be read."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return None
    devices = [path for path in bus.iterdir() if _read(str(path / "vendor")).strip() == vendor]
    return sum(_read(str(path / "class")).startswith("0x03") for path in devices)


# --- helpers ---------------------------------------------------------------------------------------------------------------------


def clean_environment() -> Dict[str, str]:
    """The environment for a child Python: without the variables that would make it import another installation's modules."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")}


def scrub(message: str) -> str:
    """Takes the home folder out of a message that ends in a report."""
    try:
        home = str(Path.home())
    except RuntimeError:  # a container's user without an entry in the user table
        return message
    return message.replace(home, "~") if len(home) > 1 else message


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(command: Sequence[str], timeout: float) -> "tuple[int, str]":
    """Exit status and output of a tool; a tool that is missing or hangs is a fact (status 127, 124), not an error."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            env=clean_environment(),
        )
    except subprocess.TimeoutExpired:
        return 124, "{} did not answer within {:.0f} s".format(Path(command[0]).name, timeout)
    except OSError as error:
        return 127, str(error.strerror)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def _sysctl(name: str) -> Optional[str]:
    if sys.platform != "darwin":
        return None
    status, out = _output(["/usr/sbin/sysctl", "-n", name], timeout=5)
    return out.strip() if status == 0 else None
