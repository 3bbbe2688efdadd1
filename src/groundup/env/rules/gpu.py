"""Signs from the driver, the kernel, CUDA, ROCm, Metal and containers."""

from __future__ import annotations

import re
from typing import Iterator, List, Optional, Tuple

from groundup.env import knowledge
from groundup.env.findings import INDEX, TORCH, Hit, Values, install, patch, sign, sm_text
from groundup.env.knowledge import dotted, version
from groundup.env.machine import Gpu, Machine
from groundup.env.rules.addons import addon_of


@sign
def shared_memory(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"ncclshm|dataloader worker .{0,60}(?:bus error|signal)|bus error|out of shared memory|insufficient shared memory|unable to (?:write to|open|allocate|mmap) .{0,40}(?:torch_|shm|shared memory)|"
        r"/dev/shm|error while creating shared memory segment|shm(?:_|-)?size|shared memory segment|shared memory limit"
    )
    if not found:
        return
    strong = m.find(
        r"bus error|ncclshm|shared memory segment|out of shared memory|insufficient shared memory|/torch_\d|/dev/shm[^\n]*(?:no space|100%)|no space left[^\n]*/dev/shm|unable to (?:open|write|allocate|mmap)[^\n]*(?:shm|shared memory|torch_)"
    )
    if strong:
        yield Hit("docker_shm_too_small", 0.94, found)
    elif m.container and m.find(r"--shm-size|--ipc|shm[^\n]{0,40}(?:small|64 ?m)"):
        yield Hit("docker_shm_too_small", 0.7, found)


@sign
def driver_and_library(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"driver/library version mismatch|api mismatch|nvml_error_lib_rm_version_mismatch|nvml library version|system has unsupported display driver|error 803|devicecount\D{0,40}803|kernel module .{0,30}(?:does not|doesn't) match|versions? (?:do not|don't) match.{0,40}driver"
    )
    strong = m.find(
        r"driver/library version mismatch|api mismatch|lib_rm_version|error 803|devicecount\D{0,40}803|unsupported display driver"
    )
    if found and strong:
        loaded = re.search(
            r"kernel module (?:has|version)?\D{0,30}(?:the )?version (\d{3}\.[\d.]*\d)|kernel module[^\n\d]{0,40}(\d{3}\.[\d.]*\d)",
            m.text,
            re.IGNORECASE,
        )
        library = re.search(
            r"(?:client|NVML library version|libnvidia-ml|NVRM: API mismatch)[^\n\d]{0,60}(\d{3}\.[\d.]*\d)", m.text, re.IGNORECASE
        )
        values: Values = {
            "module_version": next(g for g in loaded.groups() if g) if loaded else None,
            "library_version": library.group(1) if library else None,
        }
        yield Hit("driver_library_mismatch", 0.96, found + m.evidence(r"unattended-upgrade|apt (?:upgrade|full)|dnf upgrade", 1), values)


@sign
def two_driver_versions(m: Machine) -> Iterator[Hit]:
    """The kernel's module and the installed packages name different versions."""
    loaded = re.search(r"kernel module\s+(\d{3}\.\d+(?:\.\d+)?)", m.text, re.IGNORECASE)
    package = re.search(
        r"(?:nvidia-(?:driver|utils|compute-utils|dkms)-\d+\S*|libnvidia-\S+)\s+(\d{3}\.\d+(?:\.\d+)?)", m.text, re.IGNORECASE
    )
    if loaded and package and loaded.group(1) != package.group(1):
        values: Values = {"module_version": loaded.group(1), "library_version": package.group(1)}
        yield Hit("driver_library_mismatch", 0.85, m.evidence(re.escape(loaded.group(1)) + "|" + re.escape(package.group(1))), values)


@sign
def compat_library(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"error 804|devicecount\D{0,40}804|forward compatibility was attempted|cudaerrorcompatnotsupported|cuda_error_compat_not_supported|compat_not_supported"
    )
    if not found:
        return
    updated = m.find(
        r"unattended|after (?:an? )?(?:update|upgrade|apt)|(?:updated|upgraded) (?:the )?(?:nvidia|driver|kernel|system)|without (?:a )?reboot|version mismatch"
    )
    compat = (
        m.find(r"cuda[-/]compat|compat/lib|/compat\b|forward[- ]compat\w+ package")
        or m.container
        or (m.variables.get("LD_LIBRARY_PATH") or "").find("cuda") >= 0
    )
    if updated and not compat:
        yield Hit("driver_library_mismatch", 0.9, found)
    yield Hit("cuda_compat_lib_on_unsupported_gpu", 0.92, found, {"gpu_text": m.nvidia[0].name if m.nvidia else "a GeForce card"})


@sign
def stub_library(m: Machine) -> Iterator[Hit]:
    found = m.evidence(r"cuda driver is a stub|error 34\b|cudaerrorstublibrary|lib64/stubs|cuda_error_stub")
    if m.find(r"is a stub library|error 34\b|stublibrary|error_stub"):
        yield Hit("nvidia_libs_conflict", 0.9, found, {"library": "libcuda (the toolkit's stub)", "symbol": "cuInit"})


@sign
def fabric(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"error 802|devicecount\D{0,40}802|system not yet initialized|fabric ?manager|cudaerrorsystemnotready|cuda_error_system_not_ready|nvlink fabric|nvswitch"
    )
    if m.find(
        r"error 802|devicecount\D{0,40}802|system not yet initialized|systemnotready|system_not_ready|fabric ?manager[^\n]{0,60}(?:not|fail|inactive|dead|mismatch|error)"
    ):
        yield Hit("fabricmanager_not_running", 0.96, found, {}, set() if m.driver else {"no_driver"})


@sign
def unknown_error(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"error 999|cuda unknown error|cuda_error_unknown|cudaerrorunknown|(?:runtime error \(|error=)30\b|unknown error .{0,60}(?:cuda|initiali)|cuda[^\n]{0,40}unknown error|cuinit\D{0,20}999|nvidia[_-]uvm|devices are busy or unavailable"
    )
    if found and m.find(
        r"error 999|cuda unknown error|cuda_error_unknown|cudaerrorunknown|cuinit\D{0,20}999|nvidia[_-]uvm[^\n]{0,40}(?:missing|no such|not found|fail)|unknown error|busy or unavailable"
    ):
        hidden = m.find(r"CUDA_VISIBLE_DEVICES['\"\]]*\s*[=:]\s*['\"]?(?:-1|['\"]{2})")
        yield Hit(
            "cuda_unknown_error_driver_state", 0.6 if hidden else 0.92, found + m.evidence(r"suspend|resume|sleep|hibernat|休眠|睡眠", 1)
        )


@sign
def driver_too_old(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"driver on your system is too old|cuda driver version is insufficient|cudaerrorinsufficientdriver|error 35\b|insufficient driver|driver (?:is )?too old|unsatisfied condition: cuda>=|requires? (?:a )?(?:nvidia )?driver (?:version )?(?:>=|of at least)|the provided ptx was compiled with an unsupported toolchain|cuda_error_unsupported_ptx_version|驱动.{0,6}(?:过旧|太旧|版本过低)"
    )
    if found:
        yield old_driver_hit(m, 0.96, found)


def old_driver_hit(m: Machine, confidence: float, found: List[str]) -> Hit:
    build = m.likely_build if knowledge.cuda_of(m.likely_build) else None
    if build is None and m.driver_cuda and m.driver_cuda[0] < 12:
        build = "cu121"  # every build that pip gives today is of CUDA 12 or later
    minimum = knowledge.driver_minimum_text(build, m.windows_driver) if build else None
    if m.driver is not None and minimum and tuple(m.driver) >= version(minimum):
        minimum = None  # not the reason then: what torch says stands, the number does not
    driver = m.driver or ({11: (452, 39), 12: (528, 33), 10: (410, 48)}.get(m.driver_cuda[0]) if m.driver_cuda else None)
    values: Values = {
        "minimum": minimum or ("580" if build and (knowledge.cuda_of(build) or (0,))[0] >= 13 else "525.60.13"),
        "cuda": dotted(knowledge.cuda_of(build) or ()) or None,
    }
    if not m.driver_text and m.driver_cuda:
        values["driver"] = "for CUDA {} at most".format(dotted(m.driver_cuda))
    if driver:
        choices = [
            (release["torch"], tag)
            for release in knowledge.releases()
            for tag in knowledge.builds(release["torch"])
            if knowledge.driver_runs(tag, driver, m.windows_driver)
            and version(release["torch"]) <= version(TORCH)[:2]
            and (not m.python or len(m.python) < 2 or version(release["python"][0]) <= m.python[:2] <= version(release["python"][1]))
        ]
        same = [c for c in choices if m.torch and c[0] == knowledge.minor(m.torch)]
        # CUDA 12.x builds share a minimum; the one that torch names stable comes first in the list.
        if same or choices:
            torch, tag = (same or choices)[0]
            values["install_old"] = install(patch(torch, m.torch), tag, m, companions=False) if version(torch) >= (1, 4) else None
    return Hit(
        "driver_too_old_for_torch_cuda",
        confidence,
        found + ([m.seen["driver"]] if "driver" in m.seen and m.seen["driver"] not in found else []),
        values,
    )


def kernel_values(m: Machine, sm: int) -> Tuple[str, Values]:
    """('newer' or 'older' or 'covered' or 'unknown', values): where a GPU stands to the kernels of the installed build."""
    listed = re.search(
        r"(?:supports? (?:cuda )?(?:the )?(?:cuda )?(?:capabilities|architectures)?|arch list|get_arch_list\(\))[^\n]*?((?:sm_\d+[\s,'\"\]]*)+)",
        m.text,
        re.IGNORECASE,
    )
    carried: Optional[Tuple[List[int], List[int]]] = None
    if listed:
        carried = (
            [int(n) for n in re.findall(r"sm_(\d+)", listed.group(1))],
            [int(n) for n in re.findall(r"compute_(\d+)", listed.group(1))],
        )
    else:
        carried = knowledge.kernels(m.torch, m.likely_build, m.system or "linux", m.arch or "x86_64")
    if not carried or not carried[0]:
        if m.build and knowledge.cuda_of(m.build):
            cuda = knowledge.cuda_of(m.build) or (0, 0)
            if sm >= 100 and cuda < (12, 8):
                return "newer", {"kernels": "GPUs up to 9.0"}
            if sm < 75 and cuda[0] >= 13:
                return "older", {"oldest": "7.5"}
        return "unknown", {}
    values: Values = {"kernels": ", ".join(sm_text(k) for k in sorted(carried[0])), "oldest": sm_text(min(carried[0]))}
    if knowledge.runs(carried, sm):
        return "covered", values
    # Between two generations that are there, or below the first: dropped. Blackwell's own (10.x, 11.x, 12.x) are newer, whatever is beside them.
    return ("newer" if sm > max(carried[0]) or sm >= 100 else "older"), values


@sign
def no_kernel(m: Machine) -> Iterator[Hit]:
    """No code for this GPU in some binary: torch's, too new or too old, or an extension's."""
    pattern = (
        r"no kernel image is available|cuda error: invalid device function|with cuda capability sm_\d+ is not compatible|of cuda capability \d+\.\d|no longer supports this gpu|cudaerrornokernelimage|"
        r"ptxas.{0,40}(?:value|gpu-name)|is not defined for option 'gpu-name'|requires \.target sm_|only supports? (?:ampere|gpus with)|compute capability (?:of )?at least|"
        r"(?:minimum|requires?|needs?|supported).{0,40}compute capability|gpu (?:is )?too old|not supported on (?:this )?gpu|unsupported gpu|sm_\d+ .{0,30}not (?:supported|compatible)|unsupported architecture|arch conditional mma|too old gpu|sm_?\d+ kernel is not available|kernel is not available"
    )
    found = m.evidence(pattern)
    if not found or (m.amd and not m.nvidia):
        return
    compiling = re.search(r"unsupported gpu architecture 'compute_", m.low)
    if compiling:
        return
    sm = next((g.sm for g in m.nvidia if g.sm), None)
    stated = re.search(r"cuda capability sm_(\d+)|of cuda capability (\d+)\.(\d)", m.low)
    if stated:
        sm = int(stated.group(1) or stated.group(2) + stated.group(3))
        if not m.nvidia:
            m.gpus.append(Gpu("a GPU of compute capability " + sm_text(sm), "nvidia", sm))
    where = " ".join(m.evidence(pattern, 6))
    addon = addon_of(m, where)
    if addon is None and re.search(r"ptxas|triton", m.low):
        addon = "triton"
    need = re.search(r"(?:compute capability|capability)\D{0,30}(\d\.\d)|(ampere)|sm_(\d\d)", where.lower())
    needed = {
        "vllm": "7.0 or newer",
        "flash-attn": "8.0 (Ampere) or newer",
        "xformers": "7.0 or newer",
        "bitsandbytes": "7.5 or newer",
        "triton": "7.0 or newer",
        "deepspeed": "7.0 or newer",
        "autoawq": "7.5 or newer",
        "sgl-kernel": "8.0 or newer",
    }
    values: Values = {"addon": addon, "need": needed.get(addon or "", "a newer one")}
    if need and need.group(1) and sm and version(need.group(1)) != version(sm_text(sm)):
        values["need"] = need.group(1) + " or newer"
    inside = addon_of(m, where, anywhere=False)  # the error itself names the extension whose kernel is missing
    if inside and "third_party" in where and "xformers" in m.low:
        inside = "xformers"  # which brings flash-attention's kernels in its own wheel
    if sm is None:
        if inside:
            yield Hit("addon_gpu_arch_unsupported", 0.85, found, dict(values, addon=inside, need=needed.get(inside, "a newer one")))
        elif addon and re.search(r"only supports|at least|minimum|requires|ptxas", where.lower()):
            yield Hit("addon_gpu_arch_unsupported", 0.85, found, values)
        else:
            old = m.find(r"\bold(?:er)?\b[^\n]{0,20}(?:gpu|card)|no longer (?:work|support)|used to work|stopped working after")
            yield Hit("gpu_arch_dropped_by_wheel", 0.6 if old else 0.5, found)
            yield Hit("gpu_arch_newer_than_wheel", 0.55, found)
        return
    state, more = kernel_values(m, sm)
    values.update(more)
    if m.jetson:
        yield Hit("gpu_arch_newer_than_wheel", 0.9, found, values)
        return
    torch_says = re.search(
        r"with the current pytorch installation|pytorch no longer supports|pytorch install supports|minimum cuda capability supported by this library",
        m.low,
    )
    if inside and not torch_says and (state != "older" or m.build is None):
        wants = values["need"] if inside == addon else needed.get(inside, "a newer one")
        yield Hit("addon_gpu_arch_unsupported", 0.95, found, dict(values, addon=inside, need=wants))
        return
    if (
        addon
        and not torch_says
        and state in ("covered", "unknown")
        and (state == "covered" or m.cuda_available or re.search(addon.replace("-", ".?"), where.lower()))
    ):
        yield Hit("addon_gpu_arch_unsupported", 0.92, found, values)
        return
    if addon and not torch_says and re.search(r"only supports|at least|requires|ptxas", where.lower()):
        yield Hit("addon_gpu_arch_unsupported", 0.9, found, values)
        return
    if state == "newer" or (state != "older" and sm >= 89) or (torch_says and sm >= 100):
        yield Hit("gpu_arch_newer_than_wheel", 0.94, found, values)
    elif state == "older" or sm < 75:
        yield Hit("gpu_arch_dropped_by_wheel", 0.94, found, values)
    else:
        yield Hit("gpu_arch_newer_than_wheel", 0.6, found, values)
        yield Hit("addon_gpu_arch_unsupported", 0.5, found, values)


@sign
def rocm_target(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"hip error|hiperror\w*|tensilelibrary|rocblas error|invalid device function|unable to find code object|amdgpu[^\n]{0,60}not supported|gfx\w+[^\n]{0,60}(?:not supported|unsupported)|miopen[^\n]{0,60}(?:fail|error)|hsa_status_error"
    )
    if not found or not (m.amd or m.find(r"rocm|\bhip|gfx|rocblas|amdgpu")):
        return
    gfx = next((g.gfx for g in m.amd if g.gfx), None)
    rocm = re.match(r"rocm(\d+\.\d+)", m.build or "")
    values: Values = {"gfx": "gfx" + gfx if gfx else None, "override": knowledge.rocm_override(gfx) if gfx else None}
    targets = knowledge.rocm_gfx(rocm.group(1)) if rocm else None
    values["rocm_targets"] = ", ".join("gfx" + t for t in targets) if targets else None
    newest = next(iter(knowledge.load()["rocm_gfx"]["builds"]))
    if gfx and gfx in (knowledge.rocm_gfx(newest) or []):
        values["install_rocm"] = "python -m pip install torch torchvision --index-url {}/rocm{}".format(INDEX, newest)
    yield Hit("rocm_unsupported_gfx", 0.93, found, values)


@sign
def apple(m: Machine) -> Iterator[Hit]:
    version_said = m.find(r"mps backend is (?:not |only )?supported on macos")
    found = (
        []
        if version_said
        else m.evidence(
            r"not current(?:ly)? implemented for the mps|pytorch_enable_mps_fallback|doesn't support float64|mps framework doesn't support|mps:? .{0,40}not (?:yet )?(?:implemented|supported)|not supported on mps|mps: unsupported|unsupported .{0,20}mps"
        )
    )
    if found and m.find(r"implemented for the mps|float64|not (?:yet )?(?:implemented|supported)|doesn't support|mps: unsupported"):
        operator = re.search(r"(?:operator|op) ['\"`]?([\w:.]+)", m.text)
        yield Hit("mps_op_not_implemented", 0.94, found, {"operator": operator.group(1) if operator else "the operation"})
    old = m.evidence(
        r"mps (?:backend )?is (?:only |not )?supported on macos|macos (?:version )?(?:is )?(?:12\.3|13(?:\.\d)?|14(?:\.\d)?)(?: or (?:newer|later|higher)|\+)|requires? macos|mps[^\n]{0,40}macos 1[234]"
    )
    minimum = knowledge.mps_minimum(m.torch) if m.torch else None
    below = bool(m.macos and ((minimum and m.macos[:2] < minimum) or m.macos < (12, 3)))
    wants = m.find(r"\bmps\b")
    if m.system == "macos" and (old or (below and wants)) and not found:
        values: Values = {"mps_minimum": dotted(minimum) if minimum else "14" if m.macos and m.macos >= (12, 3) else "12.3"}
        yield Hit("macos_too_old_for_mps", 0.93 if below else 0.85, old or m.evidence(r"macos|\bmps\b"), values)


@sign
def container(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"could not select device driver|nvidia-container-cli|unknown (?:or invalid )?runtime(?: name| specified)?:? ?nvidia|the nvidia driver was not detected|"
        r"capabilities: \[\[gpu|no cuda-capable device|nvidia-docker|nvidia container (?:runtime|toolkit)|failed to initialize nvml: unknown error|--gpus|unresolvable cdi|device plugin|insufficient nvidia\.com/gpu"
    )
    strong = m.find(
        r"could not select device driver|nvidia-container-cli: |unknown (?:or invalid )?runtime|nvidia driver was not detected|unresolvable cdi|insufficient nvidia\.com/gpu|nvidia-container-runtime[^\n]{0,40}(?:not found|no such)"
    )
    if strong:
        yield Hit("container_without_gpu", 0.95, found)
    elif m.find(r"failed to initialize nvml: unknown error"):
        yield Hit("container_without_gpu", 0.9, found or m.evidence("nvml"), {}, {"nvml_unknown"})
    elif m.container:
        absent = m.evidence(
            r"nvidia-smi\W{0,3}:? ?(?:command )?not found|nvcc and nvidia-smi not found|found no nvidia driver|cuda not found|no nvidia driver|no gpu|cuda (?:is )?not available|not detect\w* (?:any )?gpu|nvidia-smi[^\n]{0,30}(?:not found|no such|does not work|doesn't work|missing)|torch\.cuda\.is_available\(\)[^\n]{0,20}false|no cuda gpus are available|can(?:'|no)t (?:see|find|access|use) (?:the |my )?gpu"
        )
        if absent and not m.find(r"couldn't communicate with the nvidia driver|mismatch"):
            yield Hit("container_without_gpu", 0.88, absent)


@sign
def wsl(m: Machine) -> Iterator[Hit]:
    if not m.wsl or (m.amd and not m.nvidia):
        return
    found = m.evidence(
        r"libcuda|found no nvidia driver|nvidia-smi[^\n]{0,40}(?:not found|couldn't|failed)|no cuda-capable|cannot find -lcuda|no cuda gpus|/usr/lib/wsl|gpu access blocked"
    )
    if found and m.find(
        r"libcuda[^\n]{0,60}(?:not|cannot|missing|no such|isn't)|found no nvidia driver|not a symbolic link|nvidia-smi[^\n]{0,40}(?:not found|couldn't|failed)|no cuda-capable|-lcuda|gpu access blocked|could not[^\n]{0,20}libcuda"
    ):
        yield Hit("wsl2_libcuda_not_found", 0.93, found)


@sign
def driver_absent(m: Machine) -> Iterator[Hit]:
    """The driver is installed and silent, or not there at all."""
    silent = m.evidence(
        r"couldn'?t communicate with the nvidia driver|could not insert '?nvidia|required key not available|key was rejected by service|nouveau|module nvidia not found|nvrm: (?:no nvidia|the nvidia gpu|gpu .{0,40}(?:fallen|rminitadapter))|rminitadapter failed|"
        r"modprobe: (?:error|fatal)|no devices were found|secure boot|dkms[^\n]{0,60}(?:added|error|bad|fail)|unable to (?:load|initialize) the kernel module|kernel module[^\n]{0,40}(?:not loaded|failed|missing)|nvidia-persistenced[^\n]{0,60}failed"
    )
    if m.find(
        r"couldn'?t communicate with the nvidia driver|could not insert '?nvidia|required key|key was rejected|module nvidia not found|rminitadapter|no devices were found|unable to (?:load|initialize) the kernel module|nvrm: no nvidia|kernel module[^\n]{0,40}not loaded"
    ):
        yield Hit("driver_not_loaded", 0.94 if not m.wsl else 0.6, silent)
    elif silent and m.find(r"nouveau|secure boot") and m.find(r"nvidia-smi|cuda|driver"):
        yield Hit("driver_not_loaded", 0.75, silent)
    none = m.evidence(
        r"nvcuda\.dll[^\n]{0,60}(?:not|cannot|missing)|could not find module 'nvcuda|found no nvidia driver|nvidia-smi\W{0,3}:? ?(?:command )?not found|'?nvidia-smi'? is not recognized|no nvidia driver|nvidia driver[^\n]{0,30}not (?:found|installed|detected)|nvml shared library not found|没有.{0,6}驱动"
    )
    if none:
        other = bool(m.gpus) or m.system == "macos"
        if (other and not m.nvidia) or (
            not m.nvidia
            and not m.container
            and m.find(
                r"no nvidia (?:gpu|card|graphics)|without (?:an? )?(?:nvidia )?gpu|(?:don't|do not|doesn't|does not) have (?:an? )?(?:nvidia )?gpu|cpu[- ]only (?:machine|server|laptop|vm|computer)|intel (?:hd|uhd|iris)|no gpu (?:in|on|at all)|\bno gpu[.,;]|integrated graphics|没有.{0,6}(?:显卡|gpu)"
            )
        ):
            yield no_gpu_hit(m, 0.9, none)
        else:
            yield Hit("no_nvidia_driver", 0.84, none)


def no_gpu_hit(m: Machine, confidence: float, found: List[str]) -> Hit:
    gfx = next((g.gfx for g in m.amd if g.gfx), None)
    newest = next(iter(knowledge.load()["rocm_gfx"]["builds"]))
    return Hit(
        "no_nvidia_gpu",
        confidence,
        found,
        {"gpu_text": ", ".join(g.name for g in m.gpus) or "no NVIDIA GPU", "rocm": "rocm" + newest, "gfx": gfx},
    )


@sign
def not_compiled_with_cuda(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"torch not compiled with cuda|not compiled with cuda (?:enabled|support)|pytorch (?:is )?(?:not )?(?:compiled|built) without cuda|attempting to deserialize object on a cuda device|cuda is not available|torch_use_cuda_dsa|lacks? cuda support|cpuonly|torch is not able to use gpu|cpu[- ](?:only )?(?:version|build) of (?:py)?torch|torch in (?:the )?cpu version|(?:\btorch|pytorch)[^\n]{0,40}\+cpu\b"
    )
    strong = m.find(r"not compiled with cuda|without cuda|lacks? cuda")
    if not found:
        return
    if m.jetson:
        yield Hit("jetson_generic_wheel", 0.93, found)
    elif m.system == "macos":
        if strong or m.find(r"deserialize object on a cuda"):
            yield no_gpu_hit(m, 0.93, found)
    elif (m.gpus and not m.nvidia) or (
        strong
        and not m.nvidia
        and m.find(
            r"no nvidia|without (?:an? )?(?:nvidia )?gpu|integrated graphics|intel (?:hd|uhd|iris|arc)|\bdon't have (?:an? )?(?:nvidia|gpu)|cpu[- ]only (?:machine|laptop|computer|server)|没有.{0,4}显卡"
        )
    ):
        if strong or m.cuda_available is False or m.find(r"deserialize|cuda is not available|not able to use gpu"):
            yield no_gpu_hit(m, 0.9, found)
    elif m.arch == "aarch64" and m.system in ("linux", None) and m.nvidia:
        yield Hit("aarch64_cpu_wheel", 0.93, found)
    elif strong:
        yield Hit("torch_cpu_build_on_gpu_machine", 0.92, found)
    elif m.build == "cpu" and (m.nvidia or m.driver or m.driver_cuda):
        yield Hit("torch_cpu_build_on_gpu_machine", 0.88, found)
    elif not knowledge.cuda_of(m.build) and m.find(r"not able to use gpu|cpu[- ](?:only )?(?:version|build)|cpuonly"):
        yield Hit("torch_cpu_build_on_gpu_machine", 0.55, found)


@sign
def hidden(m: Machine) -> Iterator[Hit]:
    """CUDA_VISIBLE_DEVICES, and MIG, which changes what its numbers mean."""
    mig = m.evidence(r"\bmig\b|mig-[0-9a-f]{8}|multi-instance")
    trouble = m.find(
        r"no cuda gpus are available|internal assert|invalid device ordinal|no cuda-capable device|device >= 0|num_gpus|is_available\(\)[^\n]{0,20}false|not (?:found|available|visible|detected)|error|fail|0 devices|invalid argument|no devices"
    )
    if mig and trouble and not m.find(r"migrat"):
        yield Hit("mig_device_selection", 0.93, mig + m.evidence(r"internal assert|no cuda gpus|invalid device|no cuda-capable", 1))
        return
    value = m.variables.get("CUDA_VISIBLE_DEVICES")
    says = m.evidence(
        r"no cuda gpus are available|invalid device ordinal|no cuda-capable device|cudaerrornodevice|error 100\b|error 101\b|cudaerrorinvaliddevice|setting the available devices to be zero|device_count\(\)\W{0,8}0\b"
    )
    mentioned = m.evidence(r"cuda_visible_devices|os\.environ\[.cuda_visible|hip_visible_devices")
    empty = value is not None and (
        value in ("", "-1", "none", "NoDevFiles")
        or bool(re.search(r"CUDA_VISIBLE_DEVICES['\"\]]*\s*=\s*(?:['\"]{2}|$|-1)", m.text, re.MULTILINE))
    )
    beyond = False
    if value and re.match(r"^[\d,]+$", value) and m.nvidia:
        count = max(len(set(re.findall(r"GPU (\d+):", m.text))), 1)
        beyond = any(int(n) >= count for n in value.split(",") if n) and count >= 1 and ("GPU 0" in m.text or len(m.nvidia) == 1)
    if mentioned and (says or empty or beyond) and not m.find(r"cuda unknown error|error 999|error 80[234]|no nvidia driver on"):
        unset = m.find(r"cuda_visible_devices[^\n]{0,20}(?:is )?(?:not set|unset|nothing is set)")
        if not unset:
            yield Hit(
                "cuda_visible_devices_hides_gpu",
                0.94 if says and value is not None else 0.85,
                mentioned + says,
                {"cvd": value if value is not None else None},
            )
    elif (
        says
        and not m.container
        and not m.wsl
        and not m.find(r"cuda unknown error|error 999|error 80[234]|no nvidia driver on|communicate with the nvidia")
    ):
        yield Hit("cuda_visible_devices_hides_gpu", 0.5 if m.find("invalid device ordinal|no cuda gpus") else 0.35, says)
