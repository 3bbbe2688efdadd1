"""CUDA's toolkits and libraries: which versions lie where a program can pick them up. Places are named by kind, not by path."""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, Optional, Tuple

from groundup.env.host import Host, Later, below, join, last
from groundup.env.packages import folders

# Libraries that torch's wheels bring themselves: a second copy in front of theirs is a cause of failures.
_LINUX = re.compile(
    r"lib(cuda|cudart|cudnn|nccl|cublas|nvJitLink|cusparse|cusolver|cufft|nvrtc|cupti|nvshmem_host|cusparseLt)\.so((?:\.\d+)*)$"
)
# cudart64_110.dll, cublas64_12.dll, nvJitLink_120_0.dll, cudnn64_9.dll
_WINDOWS = re.compile(r"(cudart|cudnn|cublas|cusparse|cusolver|cufft|nvrtc|cupti|nvJitLink)(?:64)?_(\d+)(?:[_.]\S*)?\.dll$", re.IGNORECASE)
# Where the wheel's version says more than the file's name: 'libcudnn.so.9' is 9.1.0.70.
_WHEELS = {
    "cudart": "nvidia-cuda-runtime", "cudnn": "nvidia-cudnn", "nccl": "nvidia-nccl", "cublas": "nvidia-cublas", "nvJitLink": "nvidia-nvjitlink",
    "cusparse": "nvidia-cusparse", "cusolver": "nvidia-cusolver", "cufft": "nvidia-cufft", "nvrtc": "nvidia-cuda-nvrtc", "cupti": "nvidia-cuda-cupti",
    "nvshmem_host": "nvidia-nvshmem", "cusparseLt": "nvidia-cusparselt",
}  # fmt: skip
_SYSTEM_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/lib")
_WINDOWS_TOOLKITS = "C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA"

CUDA: Mapping[str, Any] = {
    "nvcc": None,
    "cuda_home": None,
    "cuda_home_version": None,
    "toolkits": [],
    "default_toolkit": None,
    "libraries": [],
    "compat": None,
}


def cuda(host: Host, quick: bool, found: Dict[str, Any]) -> None:
    """Fills `found` (as `CUDA`)."""
    asked = Later(_nvcc_output, host) if not quick else None
    listed = Later(_ldconfig, host) if not quick and host.system == "Linux" else None
    home = host.environ.get("CUDA_HOME") or host.environ.get("CUDA_PATH")
    found["toolkits"], found["default_toolkit"] = _toolkits(host)
    found["cuda_home"] = bool(home)
    found["cuda_home_version"] = _version_of_toolkit(host, home) if home else None
    cache = listed.result() if listed else []
    found["libraries"] = _on_windows(host) if host.system == "Windows" else _on_linux(host, cache)
    found["compat"] = _compat(host, cache)
    nvcc = host.which("nvcc")
    found["nvcc"] = (asked.result() if asked else None) or (_version_of_toolkit(host, join(host.real(nvcc), "..", "..")) if nvcc else None)


# --- toolkits --------------------------------------------------------------------------------------------------------------------


def _nvcc_output(host: Host) -> Optional[str]:
    nvcc = host.which("nvcc")
    return parse_nvcc(host.run([nvcc, "--version"], timeout=5)[1]) if nvcc else None


def parse_nvcc(source: str) -> Optional[str]:
    """'12.4.131' from `nvcc --version`; '12.4' when the long form is missing."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", source) or re.search(r"release (\d+\.\d+)", source)
    return found.group(1) if found else None


def _toolkits(host: Host) -> Tuple[List[str], Optional[str]]:
    """Versions of the toolkits in their usual places, and of the one that /usr/local/cuda points to."""
    if host.system == "Windows":
        names = [name[1:] for name in host.names(_WINDOWS_TOOLKITS) if re.fullmatch(r"v\d+\.\d+", name)]
        return sorted(names, key=_numbers), None
    paths = host.glob("/usr/local/cuda-*") + host.glob("/opt/cuda-*") + host.glob("/opt/cuda")
    found = {version for version in (_version_of_toolkit(host, path) for path in paths) if version}
    default = _version_of_toolkit(host, "/usr/local/cuda") if host.exists("/usr/local/cuda") else None
    return sorted(found | ({default} if default else set()), key=_numbers), default


def _version_of_toolkit(host: Host, folder: str) -> Optional[str]:
    """'12.4' from the folder's name, version.json, version.txt or its runtime library."""
    found = re.search(r"(?:^|[-v])(\d+\.\d+)", last(host.real(folder)))
    if found:
        return found.group(1)
    found = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"(\d+\.\d+)', host.read(join(folder, "version.json"), 20_000))
    found = found or re.search(r"CUDA Version (\d+\.\d+)", host.read(join(folder, "version.txt"), 1000))
    if found:
        return found.group(1)
    for name in host.names(join(folder, "lib64")):
        found = re.match(r"libcudart\.so\.(\d+\.\d+)", name)
        if found:
            return found.group(1)
    return None


# --- libraries -------------------------------------------------------------------------------------------------------------------


def _on_linux(host: Host, cache: List[str]) -> List[Dict[str, Any]]:
    """In the order in which the loader looks, the wheels' own last."""
    places: List[Tuple[str, str]] = []
    for folder in host.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder:
            places.append((folder, "LD_LIBRARY_PATH"))
    places.append(("/usr/lib/wsl/lib", "wsl"))
    for folder in ["/usr/local/cuda/lib64", *(join(path, "lib64") for path in host.glob("/usr/local/cuda-*"))]:
        places.append((folder, "toolkit"))
    if not cache:
        places += [(folder, "system") for folder in _SYSTEM_FOLDERS]
    found: Dict[Tuple[str, str, str], Dict[str, Any]] = {}
    for folder, where in places:
        for name in host.names(folder):
            _add(host, found, join(folder, name), where)
    for path in cache:
        _add(host, found, path, place_of(host, path))
    if host.is_folder(join(host.prefix, "conda-meta")):
        for name in host.names(join(host.prefix, "lib")):
            _add(host, found, join(host.prefix, "lib", name), "conda")
    _add_wheels(host, found)
    return list(found.values())


def _add(host: Host, found: Dict[Tuple[str, str, str], Dict[str, Any]], path: str, where: str) -> None:
    """One entry for the several names (links) of a library."""
    named = _LINUX.search(last(path))
    if not named:
        return
    real = _LINUX.search(last(host.real(path)))
    version = max((named.group(2)[1:], real.group(2)[1:] if real else ""), key=len) or None
    if where == "wsl":
        version = None  # 'libcuda.so.1.1' there: a stand-in for Windows' own, without a version of its own
    name = "lib" + named.group(1)
    major = (version or "").split(".")[0]
    kept = found.setdefault((name, where, major), {"name": name, "version": version, "where": where})
    if len(version or "") > len(kept["version"] or ""):
        kept["version"] = version
    if major and (name, where, "") in found:
        del found[(name, where, "")]


def place_of(host: Host, path: str) -> str:
    """What kind of place a library was found in: nothing of its path is told."""
    for folder in host.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and (below(path, folder) or below(path, host.real(folder))):
            return "LD_LIBRARY_PATH"
    if "/wsl/" in path:
        return "wsl"
    if "/compat/" in path:
        return "compat"
    if "site-packages" in path or "dist-packages" in path:
        return "python"
    if re.match(r"/usr/local/cuda|/opt/cuda", path):
        return "toolkit"
    if below(path, host.prefix) and host.is_folder(join(host.prefix, "conda-meta")):
        return "conda"
    return "python" if below(path, host.prefix) and not path.startswith("/usr/lib") else "system"


def describe(host: Host, path: str) -> Optional[Dict[str, Any]]:
    """One library that a process has loaded, as `cuda`'s list names it; None for what is none of CUDA's."""
    found: Dict[Tuple[str, str, str], Dict[str, Any]] = {}
    _add(host, found, path, place_of(host, path))
    return next(iter(found.values()), None)


def _ldconfig(host: Host) -> List[str]:
    # /sbin is not on the path of an ordinary user.
    status, out = host.run([host.which("ldconfig") or "/sbin/ldconfig", "-p"], timeout=5)
    return parse_ldconfig(out) if status == 0 else []


def parse_ldconfig(source: str) -> List[str]:
    """Paths of CUDA's libraries in the loader's cache, from `ldconfig -p`; 32-bit ones left out."""
    paths = []
    for name, kind, path in re.findall(r"^\s+(\S+) \(([^)]*)\) => (\S+)$", source, re.MULTILINE):
        if _LINUX.search(name) and ("64" in kind or "AArch" in kind):
            paths.append(path)
    return paths


def _add_wheels(host: Host, found: Dict[Tuple[str, str, str], Dict[str, Any]]) -> None:
    """Libraries inside site-packages: NVIDIA's wheels, and torch's own folder (older builds, conda)."""
    for folder, _ in folders(host):
        if not host.is_folder(join(folder, "nvidia")) and not host.is_folder(join(folder, "torch", "lib")):
            continue
        versions = {}
        for name in host.names(folder):
            wheel = re.match(r"(nvidia_[a-z_]+?)(?:_cu(\d+))?-([^-]+)\.dist-info$", name)
            if wheel:
                versions[(wheel.group(1).replace("_", "-"), wheel.group(2) or "")] = wheel.group(3)
        for path in host.glob(join(folder, "nvidia/*/lib/lib*.so*")) + host.glob(join(folder, "torch/lib/lib*.so*")):
            named = _LINUX.search(last(path))
            if not named:
                continue
            library, version = "lib" + named.group(1), named.group(2)[1:]
            cuda_major = re.search(r"nvidia/cu(\d+)/lib", path.replace("\\", "/"))
            full = [
                number
                for (wheel_name, cuda), number in versions.items()
                if wheel_name == _WHEELS.get(named.group(1)) and (not cuda_major or cuda in ("", cuda_major.group(1)))
            ]
            own = "torch/lib" not in path.replace("\\", "/")
            found.setdefault(
                (library, "python", version.split(".")[0]),
                {"name": library, "version": (full[0] if own and len(full) == 1 else version) or None, "where": "python"},
            )


def _on_windows(host: Host) -> List[Dict[str, Any]]:
    """DLLs on PATH, where Windows looks after the program's own folder, and in torch's folder."""
    found: Dict[Tuple[str, str, str], Dict[str, Any]] = {}

    def add(name: str, where: str) -> None:
        named = _WINDOWS.match(name)
        if named:
            key = (named.group(1).lower(), where, named.group(2))
            found.setdefault(key, {"name": key[0], "version": named.group(2), "where": where})

    for folder in host.environ.get("PATH", "").split(";"):
        if re.search(r"cuda|cudnn|nvidia", folder, re.IGNORECASE):
            for name in host.names(folder):
                add(name, "toolkit" if "GPU Computing Toolkit" in folder else "PATH")
    for folder, _ in folders(host):
        for name in host.names(join(folder, "torch", "lib")):
            add(name, "python")
    if host.exists("C:/Windows/System32/nvcuda.dll"):
        found[("nvcuda", "system", "")] = {"name": "nvcuda", "version": None, "where": "system"}
    return list(found.values())


def _compat(host: Host, cache: List[str]) -> Optional[Dict[str, Any]]:
    """NVIDIA's forward-compatibility libcuda: newer than the driver, for data-centre GPUs only (error 804 on others)."""
    paths = host.glob("/usr/local/cuda*/compat/libcuda.so.*.*")
    numbers = [found.group(1) for found in (re.search(r"libcuda\.so\.(\d{3}\.[\d.]+)$", path) for path in paths) if found]
    if not numbers:
        return None
    loaded = any("/compat" in entry for entry in host.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return {"version": max(numbers, key=_numbers), "on_path": loaded or any("/compat/" in path for path in cache)}


def _numbers(version: str) -> List[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
