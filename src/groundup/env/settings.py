"""Variables and pip's configuration that decide what is installed, loaded and used. Addresses are masked: that one is set, and its scheme."""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional

from groundup.env.host import Host, join, public_path, scrub

# Values that are settings: no place and no person in them.
_PLAIN = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_CUDA", "NVIDIA_DISABLE_REQUIRE", "NVIDIA_TF32_OVERRIDE",
    "HSA_OVERRIDE_GFX_VERSION", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "PYTORCH_ROCM_ARCH", "ONEAPI_DEVICE_SELECTOR", "ZE_AFFINITY_MASK",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "TORCH_CUDA_ARCH_LIST", "TORCH_USE_CUDA_DSA", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "CUBLAS_WORKSPACE_CONFIG", "MAX_JOBS", "FORCE_CUDA", "USE_CUDA",
    "BNB_CUDA_VERSION", "KMP_DUPLICATE_LIB_OK", "KMP_AFFINITY", "MKL_THREADING_LAYER", "MKL_SERVICE_FORCE_INTEL", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME",
    "PYTHONNOUSERSITE", "PYTHONUTF8", "UV_TORCH_BACKEND", "CONDA_OVERRIDE_CUDA", "HF_HUB_OFFLINE",
)  # fmt: skip
_PATHS = (
    "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDNN_PATH", "ROCM_HOME",
    "ROCM_PATH", "HIP_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "TMPDIR", "TEMP", "TMP", "PIP_CACHE_DIR", "UV_CACHE_DIR", "CC", "CXX", "CUDAHOSTCXX",
    "TRITON_CACHE_DIR", "TORCH_HOME", "HF_HOME", "TRITON_PTXAS_PATH", "TRITON_LIBCUDA_PATH", "MKL_LIBRARY_PATH",
)  # fmt: skip
_ADDRESSES = ("HF_ENDPOINT",)
# Always there on Windows: noise unless somebody moved them.
_WINDOWS_NOISE = ("TEMP", "TMP")

_LONGEST = 300
_BUILD = re.compile(r"(?:cu\d{2,3}|cpu|rocm[\d.]+|xpu|nightly)$")
_OPTIONS = {
    "index": ("index-url", "PIP_INDEX_URL"),
    "extra_index": ("extra-index-url", "PIP_EXTRA_INDEX_URL"),
    "find_links": ("find-links", "PIP_FIND_LINKS"),
    "proxy": ("proxy", "PIP_PROXY"),
}
_SWITCHES = {
    "no_index": ("no-index", "PIP_NO_INDEX"),
    "trusted_host": ("trusted-host", "PIP_TRUSTED_HOST"),
    "user": ("user", "PIP_USER"),
    "target": ("target", "PIP_TARGET"),
    "require_virtualenv": ("require-virtualenv", "PIP_REQUIRE_VIRTUALENV"),
    "constraint": ("constraint", "PIP_CONSTRAINT"),
}


def variables(host: Host) -> Dict[str, str]:
    """The variables that decide what torch, CUDA and Python do, with values that name no place and no person."""
    found: Dict[str, str] = {}
    for name in _PLAIN:
        if name in host.environ:
            found[name] = _plain(host.environ[name], host)
    for name in _PATHS:
        value = host.environ.get(name)
        if value is not None and not (host.system == "Windows" and name in _WINDOWS_NOISE):
            found[name] = path_list(value, host)
    for name in _ADDRESSES:
        if host.environ.get(name):
            found[name] = mask_address(host.environ[name])
    return found


def _plain(value: str, host: Host) -> str:
    # A device can be named by its UUID, which is a serial number.
    value = re.sub(r"\b(GPU|MIG)-[0-9a-fA-F][\w/-]{7,}", r"\1-***", value)
    return scrub(value[:_LONGEST], host)


def path_list(value: str, host: Host) -> str:
    """A list of folders with the private parts of each masked."""
    separator = ";" if host.system == "Windows" else ":"
    # LD_PRELOAD may also be separated by spaces.
    return separator.join(public_path(entry, host) for entry in value[:4000].split(separator))[: 4 * _LONGEST]


def mask_address(value: str) -> str:
    """'https://user:key@host/whl/cu126' -> 'https://***/cu126'; several are separated by a space."""
    shown: List[str] = []
    for address in value.split():
        scheme = re.match(r"([A-Za-z][\w+.-]*)://", address)
        build = _BUILD.search(address.rstrip("/"))
        shown.append((scheme.group(1).lower() + "://" if scheme else "") + "***" + ("/" + build.group(0) if build else ""))
    return " ".join(shown[:5])


def pip(host: Host) -> Dict[str, Any]:
    """What pip was told: the configuration files that exist, the indexes, the proxy; every address masked."""
    options: Dict[str, str] = {}
    files: List[str] = []
    for kind, path in _config_files(host):
        source = host.read(path, 100_000)
        if source:
            files.append(kind)
            options.update(parse_pip_config(source))
    found: Dict[str, Any] = {}
    for key, (option, variable) in _OPTIONS.items():
        value = host.environ.get(variable) or options.get(option)
        found[key] = mask_address(value) if value else None
    for key, (option, variable) in _SWITCHES.items():
        found[key] = _is_set(host.environ.get(variable)) or _is_set(options.get(option))
    proxies = [_variable(host, name) for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")]
    found["proxy"] = found["proxy"] or next((mask_address(value) for value in proxies if value), None)
    found["no_proxy"] = bool(_variable(host, "NO_PROXY"))
    certificates = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
    found["cert"] = bool(options.get("cert")) or any(host.environ.get(name) for name in certificates)
    found["config_files"] = files
    indexes = [host.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")]
    found["uv_index"] = next((mask_address(value) for value in indexes if value), None)
    found["condarc"] = any(host.exists(path) for path in (join(host.home, ".condarc"), join(host.prefix, ".condarc")))
    return found


def parse_pip_config(source: str) -> Dict[str, str]:
    """Options of a pip.conf, whatever section they are in; a value's further lines are joined by spaces."""
    options: Dict[str, str] = {}
    name = None
    for line in source.splitlines():
        if not line.strip() or line.lstrip()[0] in "#;[":
            continue
        found = re.match(r"([A-Za-z][\w-]*)\s*[=:]\s*(.*)$", line)
        if found:
            name = found.group(1).lower().replace("_", "-")
            options[name] = found.group(2).strip()
        elif name and line[0] in " \t":
            options[name] = (options[name] + " " + line.strip()).strip()
    return options


def _config_files(host: Host) -> "List[tuple[str, str]]":
    """(kind, path) in the order in which pip reads them, later ones winning."""
    home, environ = host.home, host.environ
    if host.system == "Windows":
        found = [("global", join(environ.get("PROGRAMDATA", "C:/ProgramData"), "pip", "pip.ini")), ("user", join(home, "pip", "pip.ini"))]
        if environ.get("APPDATA"):
            found.append(("user", join(environ["APPDATA"], "pip", "pip.ini")))
        environment = join(host.prefix, "pip.ini")
    else:
        folders = [folder for folder in environ.get("XDG_CONFIG_DIRS", "").split(":") if folder] or ["/etc/xdg"]
        found = [("global", join(folder, "pip", "pip.conf")) for folder in folders] + [("global", "/etc/pip.conf")]
        found.append(("user", join(home, ".pip", "pip.conf")))
        if host.system == "Darwin":
            found.insert(0, ("global", "/Library/Application Support/pip/pip.conf"))
            found.append(("user", join(home, "Library", "Application Support", "pip", "pip.conf")))
        found.append(("user", join(environ.get("XDG_CONFIG_HOME") or join(home, ".config"), "pip", "pip.conf")))
        environment = join(host.prefix, "pip.conf")
    found.append(("environment", environment))
    named = environ.get("PIP_CONFIG_FILE")
    if named in ("/dev/null", "nul", "NUL"):
        return []  # how pip is told to read none
    return found + ([("PIP_CONFIG_FILE", named)] if named else [])


def _variable(host: Host, name: str) -> Optional[str]:
    return host.environ.get(name) or host.environ.get(name.lower())


def _is_set(value: Optional[str]) -> bool:
    return bool(value) and str(value).strip().lower() not in ("0", "no", "false", "off", "")
