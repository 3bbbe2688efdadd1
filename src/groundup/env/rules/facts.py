"""Conclusions: what the facts of a machine and the knowledge file say together, where no program has said anything."""

from __future__ import annotations

import re
from typing import Iterator

from groundup.env import knowledge
from groundup.env.findings import TORCH, Hit, arch_name, conclusion, install, patch, sm_text
from groundup.env.knowledge import dotted, version
from groundup.env.machine import Machine
from groundup.env.rules.gpu import kernel_values, no_gpu_hit, old_driver_hit
from groundup.env.rules.installing import python_values
from groundup.env.rules.loading import COMPANIONS, companion_hit, copies, mixed_cuda, mixed_managers


@conclusion
def wrong_build(m: Machine) -> Iterator[Hit]:
    """torch and the machine's accelerator do not belong together."""
    if m.cuda_available:
        return
    evidence = [m.seen[k] for k in ("torch", "build", "gpu", "cuda_available") if k in m.seen]
    unable = m.cuda_available is False or m.find(
        r"(?:can(?:'|no)t|cannot|unable|does ?n.t|not) (?:use|see|find|detect|recogni[sz]e)[^\n]{0,30}(?:gpu|cuda|rtx|gtx|显卡)|no gpu|gpu (?:is )?not|cpu only|runs? on (?:the )?cpu|无法使用\s*gpu|找不到\s*gpu"
    )
    nvidia_build = bool(re.search(r"nv\d\d\.|\bnv2\d", m.torch or ""))
    if m.jetson:
        if (unable or m.build == "cpu") and not nvidia_build:
            yield Hit("jetson_generic_wheel", 0.85, evidence or m.evidence("jetson|tegra|orin"))
        return
    if m.nvidia and m.build == "cpu" and m.arch == "aarch64" and m.system in ("linux", None):
        yield Hit("aarch64_cpu_wheel", 0.88, evidence)
    elif m.nvidia and m.build == "cpu" and m.torch:
        if m.driver or m.driver_cuda or unable:
            yield Hit("torch_cpu_build_on_gpu_machine", 0.86, evidence)
    elif m.nvidia and m.torch and m.likely_build == "cpu" and unable and m.arch != "aarch64":
        yield Hit("torch_cpu_build_on_gpu_machine", 0.75, evidence)
    elif m.nvidia and m.torch and m.likely_build == "cpu" and unable:
        yield Hit("aarch64_cpu_wheel", 0.7, evidence)
    elif (
        m.torch is None
        and m.cuda_available is False
        and m.system == "windows"
        and (m.nvidia or m.toolkit or m.driver_cuda or m.find(r"\bgpu"))
    ):
        yield Hit("torch_cpu_build_on_gpu_machine", 0.5, evidence or m.evidence("gpu|cuda"))
    if knowledge.cuda_of(m.build) and not m.nvidia and (m.amd or any(g.vendor == "intel" for g in m.gpus)) and unable:
        yield no_gpu_hit(m, 0.75, evidence)
    rocm = re.match(r"rocm(\d+\.\d+)", m.build or "")
    if rocm and m.amd and unable:
        gfx = next((g.gfx for g in m.amd if g.gfx), None)
        if gfx and gfx not in (knowledge.rocm_gfx(rocm.group(1)) or [gfx]):
            yield Hit("rocm_unsupported_gfx", 0.8, evidence, {"gfx": "gfx" + gfx, "override": knowledge.rocm_override(gfx)})
    if m.amd and not m.nvidia and m.build == "cpu" and unable:
        yield no_gpu_hit(m, 0.6, evidence)


@conclusion
def driver_by_table(m: Machine) -> Iterator[Hit]:
    if m.cuda_available or not m.driver or not knowledge.cuda_of(m.likely_build) or m.jetson:
        return
    if knowledge.driver_runs(m.likely_build, m.driver, m.windows_driver) is False:
        evidence = [m.seen[k] for k in ("torch", "build", "driver", "cuda_available") if k in m.seen]
        yield old_driver_hit(m, 0.88, evidence)


@conclusion
def kernels_by_table(m: Machine) -> Iterator[Hit]:
    for gpu in m.nvidia:
        if gpu.sm is None or m.jetson or not knowledge.cuda_of(m.likely_build):
            continue
        state, values = kernel_values(m, gpu.sm)
        stable = "dev" not in (m.torch or "")
        if state in ("newer", "older") and stable:
            evidence = [m.seen[k] for k in ("torch", "gpu") if k in m.seen]
            others = [g for g in m.nvidia if g.sm and kernel_values(m, g.sm)[0] == "covered"]
            values.update(gpu_text=gpu.name, sm=sm_text(gpu.sm), smtag="sm_{}".format(gpu.sm), arch_name=arch_name(gpu.sm))
            cause = "gpu_arch_newer_than_wheel" if state == "newer" else "gpu_arch_dropped_by_wheel"
            yield Hit(cause, 0.8, evidence, values, severity="warning" if others else None)


@conclusion
def apple_by_table(m: Machine) -> Iterator[Hit]:
    minimum = knowledge.mps_minimum(m.torch) if m.torch else None
    if m.system == "macos" and m.arch == "aarch64" and m.macos and minimum and m.macos[:2] < minimum:
        evidence = [m.seen[k] for k in ("macos", "torch") if k in m.seen]
        yield Hit("macos_too_old_for_mps", 0.6, evidence, {"mps_minimum": dotted(minimum)}, severity="warning")
    if (
        m.system == "macos"
        and m.arch == "x86_64"
        and m.torch
        and version(m.torch) <= (2, 2, 2)
        and m.find("rosetta|apple m[1-5]|apple silicon")
    ):
        yield Hit("macos_x86_no_wheel", 0.7, m.evidence("rosetta|x86_64|apple"))


@conclusion
def packages_by_table(m: Machine) -> Iterator[Hit]:
    """Lists of packages that cannot work together: a fault where something fails, a warning where all is said to be well."""
    well = m.cuda_available is True
    for name in COMPANIONS:
        package, torch = m.installed(name), m.installed("torch")
        if (
            not package
            or not torch
            or "dev" in package.version + torch.version
            or "a0" in package.version + torch.version
            or "nv" in torch.version
        ):
            continue
        a, b = torch.version.partition("+")[2], package.version.partition("+")[2]
        misfit = knowledge.companion_fits(torch.version, name, package.version) is False
        other_build = bool(a and b and a != b and not (name == "torchaudio" and version(package.version)[:2] >= (2, 11)))
        if misfit or other_build:
            for hit in companion_hit(m, name, 0.78, m.evidence(rf"\b(?:py)?torch\W{{1,6}}\d|{name}\W{{1,6}}\d")):
                hit.severity = "warning" if well else None
                yield hit
    majors = {version(p.version)[:1] for p in m.packages.get("numpy", [])}
    if len(majors) > 1:  # one hides the other; whether that hurts shows when something is imported
        yield Hit("numpy2_abi_mismatch", 0.5, m.evidence(r"numpy\W{1,6}\d"), severity="warning")
    numpy = m.installed("numpy")
    if numpy and m.torch and version(numpy.version)[:1] >= (2,) and version(m.torch)[:3] < ((2, 4, 1) if m.system == "windows" else (2, 3)):
        yield Hit("numpy2_abi_mismatch", 0.72, m.evidence(r"numpy\W{1,6}2\."), severity="warning" if well else None)
    for hit in [*copies(m, 0.8), *mixed_managers(m)]:
        hit.severity, hit.confidence = "warning" if well else None, min(hit.confidence, 0.8)
        yield hit
    for hit in mixed_cuda(m):
        hit.severity, hit.confidence = "warning", 0.4
        yield hit
    triton = [n for n in m.packages if n in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")]
    if len(triton) > 1:
        yield Hit("multiple_triton_installs", 0.5, m.evidence(r"triton"), {"copies": ", ".join(triton)}, severity="warning")


@conclusion
def gpu_out_of_reach(m: Machine) -> Iterator[Hit]:
    """torch is right for the machine and yet sees no GPU: container, driver or variable."""
    if m.cuda_available is not False or not knowledge.cuda_of(m.build) or m.jetson:
        return
    evidence = [m.seen[k] for k in ("torch", "cuda_available") if k in m.seen]
    if m.driver is None and not m.nvidia:
        if m.container:
            yield Hit("container_without_gpu", 0.6, evidence)
        elif not m.amd:
            yield Hit("no_nvidia_driver", 0.55, evidence)
    elif m.driver and knowledge.driver_runs(m.build, m.driver, m.windows_driver):
        if m.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Hit(
                "cuda_visible_devices_hides_gpu", 0.8, m.evidence("CUDA_VISIBLE_DEVICES"), {"cvd": m.variables["CUDA_VISIBLE_DEVICES"]}
            )
        else:
            yield Hit("cuda_unknown_error_driver_state", 0.3, evidence)


@conclusion
def no_wheel_for_this_machine(m: Machine) -> Iterator[Hit]:
    """torch is not here, and the machine or its Python is one that today's wheels do not exist for."""
    if m.torch or not m.find(r"no module named '?torch'?|pytorch version: (?:none|not installed|n/a)"):
        return
    evidence = m.evidence(r"^(?:os|python version|python platform|libc version)\W", 4)
    if m.system == "macos" and m.arch == "x86_64":
        yield Hit("macos_x86_no_wheel", 0.75, evidence)
    minimum = knowledge.glibc_minimum(TORCH)
    if m.system == "linux" and m.glibc and minimum and m.glibc < minimum:
        able = [e["torch"] for e in knowledge.releases() if version(e["glibc"]) <= m.glibc]
        values = {"needed": "glibc " + dotted(minimum), "file": "torch's wheel", "install_glibc": install(patch(able[0], None), None, m)}
        yield Hit("glibc_too_old", 0.75, evidence, values, {"torch_binary"})
    if m.python and len(m.python) > 1 and not knowledge.releases_for_python(m.python):
        yield Hit("python_version_no_wheel", 0.75, evidence, python_values(m, None))


@conclusion
def rocm_by_table(m: Machine) -> Iterator[Hit]:
    rocm = re.match(r"rocm(\d+\.\d+)", m.build or "")
    targets = knowledge.rocm_gfx(rocm.group(1)) if rocm else None
    missing = [g.gfx for g in m.amd if g.gfx and targets and g.gfx not in targets]
    if missing and len(missing) == len(m.amd) and not m.cuda_available and "HSA_OVERRIDE_GFX_VERSION" not in m.variables:
        values = {
            "gfx": "gfx" + missing[0],
            "override": knowledge.rocm_override(missing[0]),
            "rocm_targets": ", ".join("gfx" + t for t in targets or []),
        }
        yield Hit("rocm_unsupported_gfx", 0.7, m.evidence(r"gfx|rocm|radeon"), values)
