"""Installed distributions, read from their folders' names: torch and what has to fit it, copies of the same thing, files that hide a module."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from groundup.env.host import Host, below, join, last

# What has to fit torch, brings libraries that torch loads too, or is named in torch's error messages. Names as pip normalises them.
RELATED = re.compile(
    r"torch.*|functorch|libtorch.*|pytorch.*|triton.*|nvidia-.*|cuda-(?:python|bindings|version|runtime|cudart|nvcc|toolkit|compat|core|tile)|cudatoolkit|cudnn"
    r"|libcudnn.*|nccl|libcublas|libnvjitlink|cpuonly|xformers|flash-attn.*|flashinfer.*|sageattention|bitsandbytes.*|vllm.*|sglang|sgl-kernel|deepspeed|apex"
    r"|numpy|scipy|pandas|scikit-learn|numba|mkl|intel-openmp|llvm-openmp|-openmp-mutex|libgomp|tbb|blas|openblas|libopenblas|safetensors|transformers|tokenizers"
    r"|accelerate|peft|trl|unsloth.*|diffusers|datasets|timm|lightning|pytorch-lightning|sentence-transformers|ultralytics|openmim|mmcv.*|detectron2"
    r"|jax.*|tensorflow.*|keras|onnx.*|cupy.*|tensorrt.*|optimum|auto-gptq|gptqmodel|autoawq|exllamav2|ctranslate2|faster-whisper|llama-cpp-python"
    r"|mamba-ssm|causal-conv1d|pyg-lib|torch-.*|intel-extension-for-pytorch|ipex-llm|oneccl.*|rocm.*|amd-.*|hip.*|opencv-.*|protobuf|ml-dtypes|pillow"
    r"|setuptools|pip|ninja|typing-extensions|groundup"
)
_VERSIONED = ("torch", "torchvision", "torchaudio", "torchtext", "torchdata")
# The same thing under conda's and pip's names.
_CONDA_NAMES = {"pytorch": "torch", "pytorch-gpu": "torch", "pytorch-cpu": "torch", "libtorch": "torch"}
_CONDA_CHANNELS = (
    "conda-forge",
    "pytorch-nightly",
    "pytorch-lts",
    "pytorch",
    "nvidia",
    "bioconda",
    "intel",
    "rapidsai",
    "huggingface",
    "xformers",
)

# Modules of the standard library that torch or NumPy import early, under names that people give to scripts.
_OFTEN_HIDDEN = (
    "abc", "ast", "bisect", "calendar", "code", "codecs", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "glob", "hashlib", "heapq", "inspect", "io", "json", "keyword", "logging", "math", "numbers", "operator", "parser", "pickle", "platform", "profile", "queue",
    "random", "re", "secrets", "select", "signal", "socket", "statistics", "string", "struct", "subprocess", "tempfile", "threading", "time", "timeit", "token",
    "tokenize", "types", "typing", "unittest", "uuid", "warnings", "weakref",
)  # fmt: skip
_HIDDEN_PACKAGES = ("torch", "torchvision", "torchaudio", "numpy", "triton", "transformers", "accelerate", "PIL")


class Distribution(NamedTuple):
    """One installed distribution, from the name of its folder."""

    name: str
    version: str
    folder: str
    info: str
    where: str


def normalize(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_info_name(folder_name: str) -> Optional[Tuple[str, str]]:
    """('torch', '2.6.0+cu124') from 'torch-2.6.0+cu124.dist-info'; egg-info folders too; None for anything else."""
    found = re.match(r"([^-~][^-]*)-([^-]+)\.dist-info$", folder_name) or re.match(
        r"([^-~][^-]*)-([^-]+)(?:-py\d.*)?\.egg-info$", folder_name
    )
    return (normalize(found.group(1)), found.group(2)) if found else None


def parse_conda_meta_name(file_name: str) -> Optional[Tuple[str, str, str]]:
    """('pytorch', '2.5.1', 'py3.12_cuda12.4_cudnn9.1.0_0') from a file's name in conda-meta."""
    found = re.match(r"(.+)-([^-]+)-([^-]+)\.json$", file_name)
    return (found.group(1), found.group(2), found.group(3)) if found else None


def parse_version_file(source: str) -> Dict[str, str]:
    """The plain values of a version.py ('__version__', 'cuda', 'hip', 'xpu'), without running it."""
    return dict(re.findall(r"^(__version__|cuda|hip|rocm|xpu)\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", source, re.MULTILINE))


def folders(host: Host) -> List[Tuple[str, str]]:
    """(folder, where) of every folder of sys.path that can hold distributions, in the order in which Python looks."""
    found: List[Tuple[str, str]] = []
    seen = set()
    for folder in host.path:
        real = host.real(folder)
        # The standard library itself; on Debian's layout the site-packages folder is in it.
        if real in seen or folder.endswith(".zip") or last(folder) == "lib-dynload" or real == host.real(host.stdlib):
            continue
        seen.add(real)
        found.append((folder, _where(host, folder)))
    return found


def _where(host: Host, folder: str) -> str:
    listed = [entry for entry in host.environ.get("PYTHONPATH", "").split(";" if host.system == "Windows" else ":") if entry]
    if any(folder.rstrip("/\\") == entry.rstrip("/\\") for entry in listed):
        return "PYTHONPATH"
    if below(folder, host.user_site):
        return "user site"
    if below(folder, host.prefix):
        return "environment"
    if host.prefix != host.base_prefix and below(folder, host.base_prefix):
        return "system"  # a venv that was made with --system-site-packages
    if "site-packages" in folder or "dist-packages" in folder:
        # /usr/local/lib/python3/dist-packages belongs to /usr on Debian.
        return "system" if host.prefix != host.base_prefix else "environment"
    return "added folder"


def distributions(host: Host) -> Iterator[Distribution]:
    """Every distribution that this Python can see, in the order of sys.path."""
    for folder, where in folders(host):
        for name in host.names(folder):
            parsed = parse_info_name(name)
            if parsed:
                yield Distribution(parsed[0], parsed[1], folder, name, where)


def conda_packages(host: Host) -> List[Tuple[str, str, str, str]]:
    """(name, version, build, file) of every package that conda put into this environment."""
    meta = join(host.prefix, "conda-meta")
    if not host.is_folder(meta):
        return []
    found = []
    for name in host.names(meta):
        parsed = parse_conda_meta_name(name)
        if parsed:
            found.append((*parsed, join(meta, name)))
    return found


def installed(host: Host) -> List[Dict[str, Any]]:
    """Distributions that have to do with torch, the first that Python finds first, conda's own list last."""
    found: List[Dict[str, Any]] = []
    for item in distributions(host):
        if not RELATED.fullmatch(item.name):
            continue
        version, _, local = item.version.partition("+")
        build: Optional[str] = local or None
        info = join(item.folder, item.info)
        complete = item.info.endswith(".egg-info") or host.exists(join(info, "RECORD"))
        if item.name in _VERSIONED:
            # The default package index names no build in the version it installs, the module does.
            inside = parse_version_file(host.read(join(item.folder, item.name, "version.py"), 20_000))
            build = build or inside.get("__version__", "").partition("+")[2] or None
            complete = complete and (item.name != "torch" or bool(inside))
        found.append(
            {
                "name": item.name,
                "version": version,
                "build": build,
                "installer": host.read(join(info, "INSTALLER"), 100).strip().lower() or None,
                "where": item.where,
                "complete": complete,
            }
        )
    for name, number, build, path in conda_packages(host):
        if RELATED.fullmatch(normalize(name)):
            entry = {"name": name, "version": number, "build": build, "installer": "conda", "where": "conda", "complete": True}
            found.append(dict(entry, channel=conda_channel(host.read(path, 4000))))
    return found


def conda_channel(source: str) -> Optional[str]:
    """The channel's public name in the beginning of a conda-meta file; an address can hold a token and is not given."""
    found = re.search(r'"channel"\s*:\s*"([^"]*)"', source)
    if not found:
        return None
    if "repo.anaconda.com" in found.group(1) or "/pkgs/main" in found.group(1):
        return "defaults"
    return next((name for name in _CONDA_CHANNELS if name in re.split(r"[/:]", found.group(1))), "other")


def duplicates(found: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Distributions that are there more than once, in the order in which Python finds them: the first copy is the one that is imported."""
    copies: Dict[str, List[Dict[str, Any]]] = {}
    for item in found:
        if item["where"] != "conda":
            copies.setdefault(item["name"], []).append(item)
    for item in found:
        if item["where"] == "conda":
            name = _CONDA_NAMES.get(item["name"], normalize(item["name"]))
            # conda's record and the metadata of the same files are one copy.
            if any(copy["where"] == "environment" and copy["installer"] not in ("conda", None) for copy in copies.get(name, [])):
                copies[name].append(item)
    return [
        {"name": name, "copies": [{key: item[key] for key in ("version", "build", "installer", "where")} for item in items]}
        for name, items in copies.items()
        if len(items) > 1
    ]


def leftovers(host: Host) -> List[str]:
    """Remains of an interrupted pip ('~orch-2.1.0.dist-info'), which make pip warn of an invalid distribution."""
    return [name for folder, _ in folders(host) for name in host.names(folder) if name.startswith("~") and len(name) < 80]


def shadows(host: Host, torch_installed: bool) -> List[Dict[str, str]]:
    """Files and folders that Python would import instead of torch, NumPy or the standard library: here and on PYTHONPATH."""
    separator = ";" if host.system == "Windows" else ":"
    listed = [entry for entry in host.environ.get("PYTHONPATH", "").split(separator) if entry]
    found: List[Dict[str, str]] = []
    for folder, where in [(host.cwd, "current folder"), *((entry, "PYTHONPATH") for entry in listed)]:
        if last(folder) in ("site-packages", "dist-packages") or host.real(folder) == host.real(host.stdlib):
            continue
        for name in _HIDDEN_PACKAGES:
            if host.exists(join(folder, name + ".py")):
                found.append({"name": name + ".py", "module": name, "where": where})
            elif host.is_folder(join(folder, name)) and not _is_installed_here(host, folder, name):
                # Without __init__.py a folder loses against any real package further down the path.
                if host.exists(join(folder, name, "__init__.py")):
                    found.append({"name": name + "/", "module": name, "where": where})
                elif name == "torch" and not torch_installed:
                    found.append({"name": name + "/ (no __init__.py)", "module": name, "where": where})
        found += [
            {"name": name + ".py", "module": name, "where": where} for name in _OFTEN_HIDDEN if host.exists(join(folder, name + ".py"))
        ]
    return found


def _is_installed_here(host: Host, folder: str, name: str) -> bool:
    """`pip install --target`: a folder of distributions under any name."""
    return any(entry.startswith(name + "-") and entry.endswith(".dist-info") for entry in host.names(folder))


# --- torch itself ----------------------------------------------------------------------------------------------------------------


def parse_torch_version(source: str) -> Optional[Dict[str, Any]]:
    """Reads torch/version.py without running it."""
    found = parse_version_file(source)
    if "__version__" not in found:
        return None
    return {"version": found["__version__"], "cuda": found.get("cuda"), "hip": found.get("hip")}


def torch_in(host: Host, folder: str) -> Optional[Dict[str, Any]]:
    """The torch in one site-packages folder, read from its files; None when there is none or its installation did not finish."""
    # RECORD is the last thing an installer writes: without it the folder was left half-made. Old conda packages have an egg-info.
    records = host.glob(join(folder, "torch-*.dist-info/RECORD")) or host.glob(join(folder, "torch-*.egg-info"))
    found = parse_torch_version(host.read(join(folder, "torch", "version.py"), 20_000)) if records else None
    if found:
        # The default package index names no build in the version it installs, PyTorch's own index does.
        name = re.split(r"[\\/]", records[0])[-2 if records[0].endswith("RECORD") else -1]
        parsed = parse_info_name(name)
        found["distribution"] = parsed[1] if parsed else found["version"]
    return found


def torch_on_path(host: Host) -> Optional[Dict[str, Any]]:
    """The torch that would be imported."""
    for folder, where in folders(host):
        found = torch_in(host, folder)
        if found:
            return dict(
                found,
                build=torch_build(found),
                where=where,
                arch_list=None,
                cxx11_abi=cxx11_abi(host.read(join(folder, "torch/share/cmake/Torch/TorchConfig.cmake"), 50_000)),
            )
    return None


def torch_build(torch: Dict[str, Any]) -> Optional[str]:
    """'cu130', 'rocm6.3', 'cpu', 'xpu': from the version's local part, else from what version.py says; None on a Mac and where unknown."""
    local = str(torch["version"]).partition("+")[2]
    if re.match(r"(?:cu\d{2,3}|cpu|rocm[\d.]+|xpu)$", local):
        return local
    numbers = re.match(r"(\d+)\.(\d+)", torch.get("cuda") or "")
    if numbers:
        return "cu{}{}".format(*numbers.groups())
    numbers = re.match(r"(\d+\.\d+)", torch.get("hip") or "")
    return "rocm" + numbers.group(1) if numbers else None


def known_architectures(version: str, build: Optional[str], system: str, machine: str) -> Optional[List[str]]:
    """As torch.cuda.get_arch_list() writes them, from the table of builds; [] for a CPU build; None where the table does not say."""
    from groundup.env import knowledge

    if build in (None, "cpu", "xpu"):
        return [] if build else None
    if str(build).startswith("rocm"):
        targets = knowledge.rocm_gfx(str(build)[4:])
        return ["gfx" + target for target in targets] if targets else None
    carried = knowledge.kernels(version, build, system, machine)
    return ["sm_{}".format(sm) for sm in carried[0]] + ["compute_{}".format(sm) for sm in carried[1]] if carried else None


def cxx11_abi(cmake: str) -> Optional[bool]:
    """Whether extensions must be compiled with the new C++ string type, from TorchConfig.cmake."""
    found = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", cmake)
    return found.group(1) == "1" if found else None
