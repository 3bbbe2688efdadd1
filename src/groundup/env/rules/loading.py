"""Signs from imports and the dynamic linker: libraries that do not fit together, compilers that are missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, List

from groundup.env import knowledge
from groundup.env.findings import INDEX, Hit, Values, install, patch, recommended, sign
from groundup.env.knowledge import dotted, version
from groundup.env.machine import Machine
from groundup.env.rules.addons import addon_of

# Libraries that torch's Linux wheels take from other distributions: stem -> (distribution without its suffix, folder in site-packages/nvidia).
CUDA_LIBRARIES = {
    "libcudart": ("nvidia-cuda-runtime", "cuda_runtime"), "libcublas": ("nvidia-cublas", "cublas"), "libcublasLt": ("nvidia-cublas", "cublas"),
    "libcudnn": ("nvidia-cudnn", "cudnn"), "libcufft": ("nvidia-cufft", "cufft"), "libcurand": ("nvidia-curand", "curand"),
    "libcusolver": ("nvidia-cusolver", "cusolver"), "libcusparse": ("nvidia-cusparse", "cusparse"), "libcusparseLt": ("nvidia-cusparselt", "cusparselt"),
    "libnccl": ("nvidia-nccl", "nccl"), "libnvJitLink": ("nvidia-nvjitlink", "nvjitlink"), "libcupti": ("nvidia-cuda-cupti", "cuda_cupti"),
    "libnvrtc": ("nvidia-cuda-nvrtc", "cuda_nvrtc"), "libnvToolsExt": ("nvidia-nvtx", "nvtx"), "libcufile": ("nvidia-cufile", "cufile"),
    "libnvshmem": ("nvidia-nvshmem", "nvshmem"), "libnpp": ("nvidia-npp", "npp"), "libnvfatbin": ("nvidia-nvfatbin", "nvfatbin"),
}  # fmt: skip


CUDA_STEMS = {"cublas", "cusparse", "cusolver", "nvrtc", "cupti", "cufft", "curand", "cudart"}


COMPANIONS = ("torchvision", "torchaudio")


@sign
def numpy_two(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"compiled using numpy 1\.x|_array_api not found|numpy is not available|numpy\.core\.multiarray failed to import|numpy\.dtype size changed|"
        r"numpy 2\.\d.{0,60}(?:may crash|cannot be run)|module compiled against (?:abi|api) version|failed to initialize numpy"
    )
    if found:
        yield Hit("numpy2_abi_mismatch", 0.95, found)


@sign
def mkl(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"ijit_notifyevent|intel mkl fatal error|mkl_threading_layer|libmkl_\w+\.so[^\n]*(?:cannot open|undefined)|cannot load (?:libmkl|mkl_)|libmkl_(?:intel|core|gnu)\S*: undefined symbol"
    )
    if found:
        yield Hit("mkl_version_mismatch", 0.95, found)


@sign
def openmp(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"omp: error #15|error #15: initializing|libi?omp5?(?:md)?\.(?:dll|dylib|so) already initialized|libiomp5md\.dll, but found"
    )
    if found:
        yield Hit("openmp_duplicate_runtime", 0.95, found)
    elif m.find(r"kmp_duplicate_lib_ok[^\n]{0,80}(?:unsafe|workaround|crash)|(?:unsafe|workaround|crash)[^\n]{0,80}kmp_duplicate_lib_ok"):
        yield Hit(
            "openmp_duplicate_runtime", 0.6, m.evidence("kmp_duplicate_lib_ok")
        )  # set alone it means nothing: scikit-learn sets it for everybody


@sign
def c_library(m: Machine) -> Iterator[Hit]:
    found = re.search(
        r"version [`'‘\"]?(GLIBC(?:XX)?|CXXABI)_([\d.]+)['’\"]? not found(?:[^\n]*?\(required by ([^)\n]+)\))?", m.text, re.IGNORECASE
    )
    if found:
        file = (found.group(3) or "").strip()
        name = "glibc" if found.group(1).upper() == "GLIBC" else "libstdc++ (GLIBCXX, of GCC's runtime)"
        own = not file or re.search(r"libtorch|libc10|torch/lib|libcudnn|nvidia", file)
        marks = {"torch_binary"} if own else set()
        if "XX" in found.group(1).upper() or "CXXABI" in found.group(1).upper():
            marks.add("glibcxx")
        values: Values = {
            "needed": "{} {}".format(name, found.group(2)),
            "file": Path(file).name if file else None,
            "addon": addon_of(m, file),
        }
        if own and m.glibc:
            able = [e["torch"] for e in knowledge.releases() if version(e["glibc"]) <= m.glibc]
            values["install_glibc"] = install(patch(able[0], None), None, m) if able else None
        yield Hit("glibc_too_old", 0.96, m.evidence(r"GLIBC(?:XX)?_|CXXABI_"), values, marks)
        return
    if m.find(
        r"glibc[^\n]{0,60}(?:too old|is older|required|requires|>=|or (?:newer|later))|manylinux_2_\d+[^\n]{0,80}not (?:supported|compatible)|kernel too old|requires glibc"
    ):
        yield Hit("glibc_too_old", 0.75, m.evidence(r"glibc|manylinux"), {"needed": "a newer glibc", "file": "the wheel"}, {"torch_binary"})


@sign
def windows_dll(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"winerror (?:126|127|1114|182|193)\]?|dll load failed|error loading [\"']?[^\n\"']+\.dll|vcruntime140|msvcp140|libomp140|microsoft visual c\+\+ redistributable|找不到指定的模块"
    )
    if not found:
        return
    joined = " ".join(found)
    name = re.search(r"([\w.+-]+\.dll)", joined)
    addon = addon_of(m, joined) if re.search(r"flash_attn|xformers|torch_scatter|mmcv|bitsandbytes|onnxruntime", joined) else None
    if addon and "torch\\lib" not in joined:
        yield Hit("flash_attn_abi_mismatch" if addon == "flash-attn" else "extension_abi_mismatch", 0.8, found, {"addon": addon})
        return
    if re.search(r"torchvision|torchaudio|_C\.pyd", joined) and not re.search(r"torch\\+lib|c10|fbgemm|shm", joined):
        which = "torchaudio" if "torchaudio" in joined else "torchvision"
        if which in joined:
            yield from companion_hit(m, which, 0.8, found)
            return
    yield Hit("windows_missing_runtime_dll", 0.93, found, {"dll": name.group(1) if name else "the library"})


@sign
def undefined_symbol(m: Machine) -> Iterator[Hit]:
    """The dynamic linker found a library without a symbol: whose library, whose symbol."""
    pattern = r"undefined symbol|symbol not found|procedure entry point|symbol lookup error|not defined in file|\b_ZNK?(?:2at|3c10|5torch|6caffe2)\d"
    found = m.evidence(pattern)
    if not found:
        return
    text = " ".join(m.evidence(pattern, 6))
    symbol = re.search(r"(?:undefined symbol|symbol not found)\W*:?\s*'?([\w@.]+)", text) or re.search(r"symbol (\w+),? version", text)
    values: Values = {"symbol": symbol.group(1)[:80] if symbol else None, "library": "library"}
    low = text.lower()
    if "ijit" in low:
        return
    if "libcudnn" in low or (symbol and "cudnn" in symbol.group(1).lower()):
        yield cudnn_hit(m, 0.95, found)
        return
    nvidia = re.search(
        r"nvjitlink|nccl|cublas|cusparse|cusolver|nvrtc|cupti|cufft|curand|cudart|^cuda[a-z]|version libcu",
        (symbol.group(1) if symbol else "").lower() + " " + " ".join(re.findall(r"version libcu\w+", low)),
    )
    own = re.search(
        r"(?:^|[\s/])(lib(?:torch_cuda|torch|c10_cuda|cusparse|cusolver|cublas\w*|nccl|torch_cuda_linalg|cufft|nvJitLink)[\w.-]*)[^\s]*: undefined",
        text,
        re.IGNORECASE,
    )
    addon = addon_of(m, text)
    if nvidia and not (addon and re.search(r"flash|xformers|vllm|_C\.", low) and not own):
        values["library"] = {"nvjitlink": "libnvJitLink (nvidia-nvjitlink)", "nccl": "libnccl (nvidia-nccl)"}.get(
            nvidia.group(0), "lib" + nvidia.group(0) if nvidia.group(0) in CUDA_STEMS else "libcudart"
        )
        yield Hit("nvidia_libs_conflict", 0.95, found + m.evidence(r"LD_LIBRARY_PATH|nvidia-[a-z-]+-cu1\d", 2), values)
        return
    for name in COMPANIONS:
        if name in low:
            yield from companion_hit(m, name, 0.92, found)
            return
    if re.search(r"flash_?attn|flash_attn_2_cuda", low):
        # A C++ symbol with __cxx11 in it is of the new ABI, one that ends in Ss (the old std::string) of the old one.
        abi = "TRUE" if "__cxx11" in text else "FALSE" if re.search(r"_ZN\w*Ss\b", text) else None
        other = {"TRUE": "FALSE", "FALSE": "TRUE"}.get(abi or "")
        yield Hit("flash_attn_abi_mismatch", 0.95, found, {"addon": "flash-attn", "abi": abi, "other_abi": other})
    elif "xformers" in low:
        yield xformers_hit(m, 0.92, found)
    elif "bitsandbytes" in low:
        yield Hit("bitsandbytes_cuda_setup", 0.9, found)
    elif own:
        mixed = list(mixed_managers(m))
        yield from mixed
        yield Hit(
            "nvidia_libs_conflict" if re.search(r"cuda|cu[bsf]", own.group(1).lower()) and nvidia else "multiple_torch_installs",
            0.6,
            found,
            dict(values, **copies_values(m)),
        )
    elif addon and addon not in ("triton",):
        yield Hit("flash_attn_abi_mismatch" if addon == "flash-attn" else "extension_abi_mismatch", 0.85, found, {"addon": addon})
    else:
        file = re.search(r"([\w.-]+?)(?:\.cpython[\w.-]*|\.abi3)?\.so", text)
        yield Hit("extension_abi_mismatch", 0.7, found, {"addon": file.group(1) if file else "the extension"})


def cudnn_hit(m: Machine, confidence: float, found: List[str]) -> Hit:
    path = re.search(r"(/usr/[\w./-]*|/opt/[\w./-]*|[A-Za-z]:\\[^\n'\"]*?)(?:libcudnn|cudnn)[\w.]*", m.text)
    values: Values = {"library_where": path.group(0)[:120] if path else "another cuDNN"}
    entry = knowledge.release(m.torch)
    number = entry["cuda"].get(m.build or "", {}).get("cudnn") if entry else None
    cuda = knowledge.cuda_of(m.likely_build)
    if number and cuda:
        values["cudnn_package"] = "nvidia-cudnn-cu{}=={}".format(cuda[0], number)
    return Hit("cudnn_conflict_library_path", confidence, found + m.evidence(r"LD_LIBRARY_PATH", 1), values)


@sign
def cudnn(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"could not load library \S*cudnn|cudnn version incompatib|sublibrary_version_mismatch|cudnn_status_(?:not_initialized|version_mismatch|sublibrary)\w*|unable to load any of \{?libcudnn|unable to find an engine to execute|cannot load symbol cudnn|cudnn[^\n]{0,60}(?:different|mismatch|incompatible)|loaded runtime cudnn"
    )
    if not found:
        return
    absent = m.find(
        r"libcudnn\S*: cannot open shared object|please make sure libcudnn\S* is in your library path|unable to load any of \{?libcudnn|could not locate cudnn|cannot load symbol cudnn"
    )
    clash = m.find(
        r"undefined symbol|version incompatib|sublibrary|LD_LIBRARY_PATH|/usr/local/cuda|version mismatch|loaded runtime|libcudnn\S*: [^\n]*symbol|two|another|different|conflict|system[- ]wide|conda"
    )
    if absent and not (clash and m.find(r"undefined symbol|version incompatib|sublibrary|LD_LIBRARY_PATH\S*\s*[=:]")):
        name = re.search(r"libcudnn[\w.]*", m.text)
        yield library_hit(m, name.group(0) if name else "libcudnn", 0.85, found)
        yield cudnn_hit(m, 0.5, found)
    else:
        yield cudnn_hit(m, 0.93, found)


@sign
def missing_library(m: Machine) -> Iterator[Hit]:
    """A shared library that cannot be opened: NVIDIA's, the driver's, or torch's own."""
    names = re.findall(
        r"(lib[\w+.-]*?\.so(?:\.[\d.]*\d)?|lib\w+\.\*?\[?0?-?9?\]?[^\s:]*)\W{0,3}:? (?:cannot open shared object|not found in the system path|no such file)"
        r"|(?:could not (?:load|find|open)|failed to (?:load|open)|unable to (?:load|find)|load library failed:?|cannot (?:find|load))\s+(?:dynamic |shared )?(?:library )?['\"`]?(lib[\w+.-]*\.so[\d.]*)"
        r"|(lib[\w+.-]+\.so(?:\.\d+)*) (?:=> )?not found",
        m.text,
    )
    for name in dict.fromkeys(n for group in names for n in group if n):
        found = m.evidence(re.escape(name))
        stem = re.split(r"\.so|\.\*|[.]", name)[0]
        if stem in ("libcuda", "libnvidia-ml", "libnvcuvid", "libnvidia-encode"):
            if m.wsl:
                yield Hit("wsl2_libcuda_not_found", 0.95, found)
            elif m.container:
                yield Hit("container_without_gpu", 0.93, found)
            else:
                yield Hit("no_nvidia_driver", 0.85, found)
        elif re.match(r"libtorch_cuda|libc10_cuda|libtorch_cpu|libtorch\b|libc10\b|libtorch_python", stem):
            where = " ".join(found) + " " + m.low
            for companion in COMPANIONS:
                if companion in where and (
                    companion in " ".join(found) or not re.search(r"flash|xformers|scatter|sparse|mmcv|detectron", where)
                ):
                    yield from companion_hit(m, companion, 0.92, found)
                    break
            else:
                addon = addon_of(m)
                if addon == "xformers":
                    yield xformers_hit(m, 0.88, found)
                elif addon == "flash-attn":
                    yield Hit("flash_attn_abi_mismatch", 0.88, found)
                else:
                    yield Hit("extension_abi_mismatch", 0.8, found, {"addon": addon or "the extension"})
        elif stem.startswith(("libmkl", "libiomp")):
            yield Hit("mkl_version_mismatch", 0.8, found)
        elif stem in CUDA_LIBRARIES or any(stem.startswith(s) for s in ("libcudnn", "libnpp", "libnvrtc", "libnvToolsExt", "libnvshmem")):
            yield from cuda_library(m, name, stem, found)
        elif stem.startswith("libbitsandbytes"):
            yield Hit("bitsandbytes_cuda_setup", 0.93, found)
        elif stem.startswith("libcudnn"):
            yield library_hit(m, name, 0.9, found)


def cuda_library(m: Machine, name: str, stem: str, found: List[str]) -> Iterator[Hit]:
    """A CUDA library is missing: because an extension wants another CUDA, or because torch's own is not there."""
    number = re.search(r"\.so\.(\d+)", name)
    major = int(number.group(1)) if number else None
    cuda = knowledge.cuda_of(m.likely_build)
    addon = addon_of(m, " ".join(found))
    counted = stem in ("libcudart", "libcublas", "libcublasLt", "libcusparse", "libnvrtc", "libcusolver", "libnvJitLink")
    offset = {"libcusolver": 11}.get(stem)  # libcusolver.so.11 belongs to CUDA 11 and 12 alike
    other = bool(counted and major and cuda and major != cuda[0] and not offset)
    if addon == "bitsandbytes":
        yield Hit("bitsandbytes_cuda_setup", 0.92, found)
    elif other or (stem == "libcudart" and addon and (cuda is None or major != cuda[0])):
        values: Values = {"addon": addon or "an extension", "library": name, "library_major": major}
        if major:
            same = [t for t in knowledge.builds(m.torch) if (knowledge.cuda_of(t) or (0,))[0] == major]
            if same and m.torch:
                values["install_major"] = install(dotted(version(m.torch)[:3]), same[0], m)
        yield Hit("addon_cuda_major_mismatch", 0.94, found, values)
        yield library_hit(m, name, 0.4, found)
    else:
        yield library_hit(m, name, 0.92, found)


def library_hit(m: Machine, name: str, confidence: float, found: List[str]) -> Hit:
    stem = re.split(r"\.so|\.\*|[.]", name)[0]
    key = next((k for k in sorted(CUDA_LIBRARIES, key=len, reverse=True) if stem.startswith(k)), None)
    cuda = knowledge.cuda_of(m.likely_build)
    number = re.search(r"\.so\.(\d+)", name)
    major = cuda[0] if cuda else int(number.group(1)) if number and key in ("libcudart", "libcupti", "libcublas") else 12
    values: Values = {"library": name}
    if key:
        package, folder = CUDA_LIBRARIES[key]
        values["package"] = (
            package
            if major >= 13 and key not in ("libcudnn", "libnccl", "libcusparseLt", "libnvshmem")
            else "{}-cu{}".format(package, major)
        )
        if key == "libcudnn" and number and number.group(1) in ("8", "9"):
            values["package"] += "=={}.*".format(number.group(1))
        values["package_folder"] = folder
    return Hit("missing_cuda_library", confidence, found, values)


def companion_hit(m: Machine, name: str, confidence: float, found: List[str]) -> Iterator[Hit]:
    """torchvision or torchaudio does not fit; on a Jetson the reason is another build of torch."""
    package = m.installed(name)
    values: Values = {}
    stated = re.search(name + r"(?: version)?(?: is)?[ =:v-]{1,4}(\d+\.\d+(?:\.\d+)?)(?!\d* *whereas)", m.text, re.IGNORECASE)
    number = package.version if package else stated.group(1) if stated else None
    if number:
        values[name] = number
        values[name + "_for"] = knowledge.torch_for_companion(name, number)
    torch = m.torch or values.get(name + "_for")
    if torch and "dev" in torch:  # a nightly goes with nightlies of its day only: the stable pair is the way back
        values["nightly"] = torch
        torch = values.get(name + "_for") or recommended(m)[0]
    wanted = knowledge.companions(torch).get(name) if torch else None
    if torch and wanted:
        both = "torch=={} {}=={}".format(dotted(version(torch)[:3]), name, wanted + (".*" if wanted.count(".") == 1 else ""))
        tag = m.build if m.build and not m.build.startswith("rocm") else None
        values["install_companion"] = "python -m pip install {}".format(both) + (" --index-url {}/{}".format(INDEX, tag) if tag else "")
    else:
        values["install_companion"] = install(*recommended(m)[:1], None, m) + "   # both from one --index-url"
    if name == "torchaudio" and torch and wanted:
        tag = m.build if m.build and not m.build.startswith("rocm") else None
        values["install_all"] = install(dotted(version(torch)[:3]), tag, m)
    yield Hit(name + "_torch_mismatch", confidence, found, values)


@sign
def companions(m: Machine) -> Iterator[Hit]:
    vision = m.evidence(
        r"operator torchvision::\w+ does not exist|couldn't load custom c\+\+ ops|could not run 'torchvision::|no such operator torchvision|failed to load image python extension|torchvision.{0,60}(?:were )?compiled with different cuda|"
        r"module 'torchvision' has no attribute 'extension'|torchvision[\w.]*\W[^\n]{0,40}requires torch\s?==|torchvision\.\w+[^\n]{0,80}has no attribute|functional_tensor"
    )
    if vision:
        weak = any(".dev20" in line for line in vision) or not m.find(
            r"does not exist|custom c\+\+ ops|could not run|different cuda|no such operator|no attribute 'extension'|requires torch"
        )
        yield from companion_hit(m, "torchvision", 0.6 if weak else 0.95, vision)
        torch, package = m.installed("torch"), m.installed("torchvision")
        if torch and package and knowledge.companion_fits(torch.version, "torchvision", package.version):
            for hit in mixed_managers(m):  # the versions agree, so the reason is who built them
                hit.confidence = 0.96
                yield hit
    audio = m.evidence(
        r"libtorchaudio|torchaudio[^\n]{0,80}(?:undefined symbol|oserror|cannot open|incompatible|were compiled with different cuda)|torchaudio[\w.]*\W[^\n]{0,40}requires torch\s?==|_torchaudio\b|torchaudio[\\/]_extension|torch audio.{0,60}different cuda"
    )
    if audio:
        yield from companion_hit(m, "torchaudio", 0.9, audio)


def xformers_hit(m: Machine, confidence: float, found: List[str]) -> Hit:
    built = re.search(r"built for:?\s*\W*\s*(?:PyTorch|torch)\s+(\d[\w.]*)(?:\+(\w+))?", m.text, re.IGNORECASE)
    values: Values = {"addon": "xformers", "xformers_for": built.group(0).split("PyTorch")[-1].strip() if built else None}
    if built:
        values.update(xformers_torch=built.group(1), xformers_index="{}/{}".format(INDEX, built.group(2)) if built.group(2) else None)
    if m.build and not m.build.startswith("rocm"):
        values["index"] = "{}/{}".format(INDEX, m.build)
    return Hit("xformers_torch_mismatch", confidence, found, values)


@sign
def xformers(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"xformers (?:was built for|can't load|[\d.\w]* requires torch|.{0,40}(?:not compatible|incompatible|mismatch|undefined symbol))|xformers[^\n]{0,40}requires torch\s?==|memory[- ]efficient attention[^\n]{0,60}won't be available|xformers[^\n]{0,60}(?:c\+\+|cuda) extensions?"
    )
    if found:
        built = re.search(r"built for:?\s*\W*\s*PyTorch\s+(\S+)(?:[^\n]*?)\(you have ([\w.+]+)\)", m.text, re.IGNORECASE)
        if built and built.group(2).endswith("+cpu") and "+cu" in built.group(1):
            yield Hit("torch_cpu_build_on_gpu_machine", 0.93, found, dict(wished_build(m, built.group(1)), addon="xformers"))
        yield xformers_hit(m, 0.96 if built else 0.9, found)


def wished_build(m: Machine, text: str) -> Values:
    """The build that an extension was made for, as the one to install."""
    torch, _, tag = text.partition("+")
    if knowledge.cuda_of(tag):
        return {"tag": tag, "install": install(torch, tag, m)}
    return {}


@sign
def flash_attention(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"flash_attn_2_cuda|flash[_-]attn[^\n]{0,80}(?:undefined symbol|dll load|cannot open|not compatible|incompatible|abi)|flash[_-]attn[^\n]*cxx11abi"
    )
    if found and m.find(r"undefined symbol|dll load|abi|cannot import|importerror|no module named 'flash_attn_2_cuda'"):
        yield Hit("flash_attn_abi_mismatch", 0.8, found, {"addon": "flash-attn"})


@sign
def bitsandbytes(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"cuda setup failed|libbitsandbytes|cget_col_row_stats|cquantize_blockwise|bitsandbytes[^\n]{0,80}(?:without gpu support|not compiled|no gpu|cpu version|cuda_setup|fail|error|not found|missing)|bnb_cuda_version|compiled without gpu support|cadam32bit"
    )
    if found and m.find(r"bitsandbytes|cuda setup|bnb"):
        values: Values = {"bnb_cuda": "{}{}".format(*knowledge.cuda_of(m.build)) if knowledge.cuda_of(m.build) else "122"}  # type: ignore[misc]
        cpu = m.build == "cpu" and m.nvidia
        if cpu:
            yield Hit("torch_cpu_build_on_gpu_machine", 0.9, found)
        yield Hit("bitsandbytes_cuda_setup", 0.94 if not cpu else 0.7, found, values)


@sign
def nvcc(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"detected cuda version|mismatches the version that was used to compile|cuda_home environment variable is not set|nvcc fatal|unsupported gpu architecture|"
        r"nvcc(?:\.exe)?['\"]?:? (?:not found|no such file|command not found)|cuda_home does not exist|unsupported gnu version|unsupported microsoft visual studio|cuda bare metal|nvcc was not found|does not match the version torch was compiled with|cudamismatchexception"
    )
    if found and m.find(
        r"mismatches the version|cuda_home|nvcc fatal|nvcc(?:\.exe)?['\"]?:? (?:not found|no such|command)|unsupported gnu|unsupported microsoft|bare metal|nvcc was not|does not match the version torch was compiled|cudamismatch"
    ):
        if m.container and m.find(r"nvidia-smi[^\n]{0,60}not found") and not m.find(r"mismatches|fatal|cuda_home"):
            return
        stated = re.search(r"installed cuda version (\d+\.\d+) does not match[\s\S]{0,60}?compiled with (\d+\.\d+)", m.low) or re.search(
            r"detected cuda version \((\d+\.\d+)\)[\s\S]{0,160}?pytorch \((\d+\.\d+)\)", m.low
        )
        toolkit = stated.group(1) if stated else dotted(m.toolkit[0]) if m.toolkit else None
        needed = stated.group(2) if stated else dotted(knowledge.cuda_of(m.build) or ()) or None
        values: Values = {"toolkit": toolkit, "torch_cuda": needed}
        if toolkit:
            same = [
                e["torch"] for e in knowledge.releases() if any((knowledge.cuda_of(t) or (0,))[0] == version(toolkit)[0] for t in e["cuda"])
            ]
            present = knowledge.minor(m.torch) if m.torch else None
            release = present if present in same else same[0] if same else None
            if release:
                tags = [t for t in knowledge.builds(release) if (knowledge.cuda_of(t) or (0,))[0] == version(toolkit)[0]]
                fits = [t for t in tags if (knowledge.cuda_of(t) or (0, 0)) <= version(toolkit)[:2]] or tags[-1:]
                values["install_toolkit"] = install(patch(release, m.torch), fits[0], m)
        yield Hit("nvcc_torch_cuda_mismatch", 0.94, found, values, set() if needed else {"no_torch_cuda"})


@sign
def compiling(m: Machine) -> Iterator[Hit]:
    tools = m.evidence(
        r"failed to find c compiler|no working c\+\+ compiler|compiler: ?(?:cl|g\+\+|gcc|clang)\b[^\n]{0,20}not found|invalidcxxcompiler|python\.h: no such file|cannot find -lcuda|"
        r"(?:gcc|g\+\+|cc|cl|clang)(?:\.exe)?['\"]?:? (?:not found|command not found|no such file|is not found)|cl is not found|is_command_exist|stdio\.h: no such|ninja is required|"
        r"command ['\"]?\[?['\"]?(?:/usr/bin/)?(?:gcc|cc|g\+\+)[^\n]*(?:non-zero|failed)|microsoft visual c\+\+ 14\.0 or greater is required|omp\.h['\"]?(?: file)?:? (?:no such file|not found)|libcuda\.so cannot found"
    )
    if tools:
        if m.find(r"libcuda\.so cannot found") and m.wsl:
            yield Hit("wsl2_libcuda_not_found", 0.95, tools)
        lcuda = {"lcuda"} if m.find(r"-lcuda|libcuda") else set()
        yield Hit("compile_toolchain_missing", 0.93, tools, {}, lcuda)
    triton = m.evidence(
        r"cannot find a working triton|cannot import name '\w+' from 'triton|tritonmissing|no module named '?triton|triton[^\n]{0,40}(?:is )?not (?:available|installed|found|supported)|triton is not (?:available|installed)|requires? triton|matching triton is not available|triton installation|torch\.compile[^\n]{0,40}not (?:yet )?supported on windows|windows not yet supported for torch\.compile"
    )
    if triton and not tools:
        quiet = bool(m.find(r"matching triton is not available, some optimizations")) and not m.find(
            r"working triton|tritonmissing|torch\.compile|inductor|dynamo"
        )
        below = knowledge.load()["triton_windows"]["below"].get(knowledge.minor(m.torch))
        marks = set() if below or m.system != "windows" else {"triton_any"}
        severity = "warning" if quiet else None
        yield Hit("compile_triton_missing", 0.3 if quiet else 0.92, triton, {"triton_below": below}, marks, severity)


@sign
def torch_itself(m: Machine) -> Iterator[Hit]:
    """torch is not there, or something else has its name."""
    shadow = re.search(
        r"module '(torch|numpy|triton)' has no attribute '(?:__version__|version|Tensor|nn|cuda|float32|tensor|_C|ndarray|array|device|autocast|no_grad|zeros|ones|randn?)'"
        r"|partially initialized module '(torch)'|imported as (torch): \S|consider renaming '[^']*(torch)\.py'",
        m.text,
    )
    if shadow:
        name = next(g for g in shadow.groups() if g)
        told = m.evidence(r"has no attribute|partially initialized|imported as torch|consider renaming")
        own = re.search(r"(?:imported as torch: |consider renaming ')([^'\n]+?\.py)", m.text) or re.search(
            r"[\"' ]((?:[\w.:~-]*[\\/])*" + name + r"\.py)\b", re.sub(r"\S*(?:site|dist)-packages\S*", "", m.text)
        )
        values: Values = {"error": told[0]}
        if own:
            file = own.group(1).strip()
            values.update(shadow=file, shadow_new=file[:-3] + "_mine.py")
        yield Hit("torch_import_failed", 0.9 if own else 0.6, told, values, {"shadow"} if own else set())
    copies = m.evidence(
        r"multiple (?:versions|copies|installations) of (?:py)?torch|two (?:versions|copies|installs|installations) of (?:py)?torch|(?:py)?torch (?:is )?installed twice|several (?:py)?torch"
    )
    if copies:
        yield Hit("multiple_torch_installs", 0.88, copies, copies_values(m))
    home = re.search(r"(\S*\.local/lib/python\S*?/torch)/__init__", m.text)
    named = set(re.findall(r"\b\d\.\d+\.\d+(?:a0)?", re.sub(r"python \d\S*", "", m.low)))
    if home and m.find(r"torch\.__file__") and len(named) > 1:
        yield Hit(
            "multiple_torch_installs", 0.75, m.evidence(r"\.local|__version__|pip list"), {"copies": "~/.local, and another", "count": 2}
        )
    leftover = m.evidence(r"ignoring invalid distribution [-~]orch|site-packages\S*[\\/]~orch")
    if leftover:
        yield Hit("multiple_torch_installs", 0.88, leftover, copies_values(m), {"leftover"})
    listed = m.packages.get("torch", [])
    if (
        m.torch
        and listed
        and all(version(p.version)[:3] != version(m.torch)[:3] for p in listed)
        and m.find(r"torch\.__version__|has no attribute|is_available")
    ):
        loaded = dict(copies_values(m), copies="{} (loaded), {} (listed)".format(m.torch, listed[0].version), count=2)
        yield Hit("multiple_torch_installs", 0.8, m.evidence(r"torch\W{1,6}\d|__version__|\.local"), loaded)
    absent = m.evidence(r"no module named '?torch'?(?:$|[\s'\"])")
    if absent:
        build = m.find(r"flash|build isolation|pep ?517|getting requirements to build|setup\.py|metadata")
        torch, tag = recommended(m)
        tag = tag if m.nvidia else None if m.system == "macos" else "cpu"  # a machine without a known GPU gets the small build
        sure = 0.4 if build else 0.45  # less than half: why it is not there may follow from the facts
        yield Hit("torch_not_installed", sure, absent, {"install": install(torch, tag, m, companions=False)})


@sign
def declared_conflict(m: Machine) -> Iterator[Hit]:
    """Mixtures that an error about symbols or loading rests on."""
    if m.find(
        r"undefined symbol|cannot open shared|segmentation fault|core dumped|importerror|oserror|dll load|illegal instruction|incompatible|conflict"
    ):
        yield from mixed_managers(m)
        yield from mixed_cuda(m)
        yield from copies(m, 0.8)


def copies_values(m: Machine) -> Values:
    torches = m.packages.get("torch", [])
    return {"count": len(torches) or None, "copies": ", ".join("{} ({})".format(p.version, p.source or "?") for p in torches) or None}


def copies(m: Machine, confidence: float) -> Iterator[Hit]:
    torches = m.packages.get("torch", [])
    if len({p.version.partition("+")[0] for p in torches}) > 1 or (len(torches) > 1 and len({p.version for p in torches}) > 1):
        yield Hit("multiple_torch_installs", confidence, m.evidence(r"torch\W{1,4}\d"), copies_values(m))
    elif m.find(r"\.local/lib/python[^\n]*torch") and m.find(r"(?:conda|venv|envs)[^\n]*site-packages/torch\b"):
        yield Hit(
            "multiple_torch_installs",
            confidence,
            m.evidence(r"site-packages/torch"),
            {"copies": "~/.local and the environment", "count": 2},
        )


def mixed_managers(m: Machine) -> Iterator[Hit]:
    torch = m.installed("torch")
    for name in (*COMPANIONS, "torch"):
        for package in m.packages.get(name, []):
            if torch and torch.source and package.source and package.source != torch.source:
                both = {p.source for p in m.packages.get("torch", [])}
                if name == "torch" or len(both) == 1:
                    yield Hit(
                        "conda_pip_mix",
                        0.9 if name == "torch" else 0.82,
                        m.evidence(r"\b(?:py)?torch(?:vision|audio)?\W{1,6}\d", 4),
                        {"torch_by": torch.source, "companion": name, "companion_by": package.source},
                    )
                    return
    if m.find(
        r"(?:mix\w*|both|combin\w*)[^\n]{0,40}(?:conda and pip|pip and conda)|(?:torch|pytorch)[^\n]{0,60}conda[^\n]{0,80}(?:torchvision|torchaudio)[^\n]{0,40}pip|pip[^\n]{0,60}over[^\n]{0,20}conda|with\W{0,3}pip\W[^\n]{0,30}and one with\W{0,3}conda"
    ):
        yield Hit("conda_pip_mix", 0.75, m.evidence(r"conda"))


def mixed_cuda(m: Machine) -> Iterator[Hit]:
    majors = {n[-4:] for n in m.packages if re.match(r"nvidia-.*-cu1\d$", n)}
    if len(majors) > 1 or m.find(r"nvidia-\S*-cu11[^\n]*nvidia-\S*-cu12"):
        yield Hit("nvidia_libs_conflict", 0.75, m.evidence(r"nvidia-[\w*-]+-cu1\d"), {"symbol": None})
