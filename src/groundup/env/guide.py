"""The knowledge behind the answers, and a guide per operating system made of it: `env knowledge`, `env guide`.

groundup env guide windows            print it
groundup env guide --write docs/env   all guides in both languages, as they are kept in the repository (a test compares)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from groundup.env import knowledge
from groundup.env.findings import INDEX, TORCH, causes, sm_text
from groundup.env.knowledge import dotted, version
from groundup.env.language import LANGUAGES, Text, pick, text

_DRIVER = [
    "no_nvidia_driver",
    "driver_not_loaded",
    "driver_library_mismatch",
    "driver_too_old_for_torch_cuda",
    "cuda_unknown_error_driver_state",
]
_WHEEL = [
    "torch_cpu_build_on_gpu_machine",
    "gpu_arch_newer_than_wheel",
    "gpu_arch_dropped_by_wheel",
    "python_version_no_wheel",
    "index_url_wrong_or_missing",
]
_LOADING = [
    "torchvision_torch_mismatch",
    "numpy2_abi_mismatch",
    "nvidia_libs_conflict",
    "cudnn_conflict_library_path",
    "openmp_duplicate_runtime",
]
_INSTALL = ["disk_or_tmp_full", "pip_network_timeout", "pip_corrupt_download"]

# name: (title, marks of the machine that choose among the steps, causes in the order in which they are met)
GUIDES: Dict[str, Tuple[Text, List[str], List[str]]] = {
    "linux": (
        text("Linux with an NVIDIA GPU, or with none", "Linux（NVIDIA GPU 或无 GPU）"),
        ["linux", "apt"],
        [*_DRIVER, *_WHEEL, *_LOADING, "conda_pip_mix", "multiple_torch_installs", "glibc_too_old", "nvcc_torch_cuda_mismatch", "compile_toolchain_missing", *_INSTALL],
    ),
    "windows": (
        text("Windows", "Windows"),
        ["windows"],
        [*_WHEEL[:4], "driver_too_old_for_torch_cuda", "windows_missing_runtime_dll", "windows_long_path", *_LOADING[:2], "openmp_duplicate_runtime",
         "compile_triton_missing", "compile_toolchain_missing", *_INSTALL],
    ),
    "wsl2": (
        text("WSL2", "WSL2"),
        ["linux", "wsl"],
        ["wsl2_libcuda_not_found", "driver_too_old_for_torch_cuda", *_WHEEL, *_LOADING, "compile_toolchain_missing", *_INSTALL],
    ),
    "macos": (
        text("macOS", "macOS"),
        ["macos"],
        ["macos_x86_no_wheel", "macos_too_old_for_mps", "mps_op_not_implemented", "no_nvidia_gpu", "openmp_duplicate_runtime", "python_version_no_wheel", *_INSTALL],
    ),
    "containers": (
        text("Containers", "容器"),
        ["linux", "container"],
        ["container_without_gpu", "docker_shm_too_small", "cuda_compat_lib_on_unsupported_gpu", "driver_library_mismatch", "mig_device_selection", "disk_or_tmp_full"],
    ),
    "rocm": (
        text("AMD GPUs (ROCm)", "AMD GPU（ROCm）"),
        ["linux", "amd_linux"],
        ["no_nvidia_gpu", "rocm_unsupported_gfx", "multiple_triton_installs", *_INSTALL],
    ),
    "arm": (
        text("ARM servers and Jetson", "ARM 服务器与 Jetson"),
        ["linux", "jetson"],
        ["aarch64_cpu_wheel", "jetson_generic_wheel", "gpu_arch_newer_than_wheel", "torchvision_torch_mismatch"],
    ),
    "servers": (
        text("Servers with several GPUs", "多 GPU 服务器"),
        ["linux", "apt"],
        ["fabricmanager_not_running", "mig_device_selection", "cuda_visible_devices_hides_gpu", "driver_library_mismatch", "docker_shm_too_small", "nvidia_libs_conflict"],
    ),
}  # fmt: skip

# What stands in the guides for a value that depends on the machine.
_GENERIC = {
    "install": "groundup env install", "install_all": "groundup env install", "install_companion": "groundup env install", "install_python": "groundup env install",
    "install_old": "groundup env install", "install_rocm": "groundup env install --backend rocm7.2", "room_folder": "/path/with/room", "pip_what": "torch",
    "torch_pin": "torch", "minimum": "580", "rocm": "rocm7.2", "addon_space": "", "driver_branch": "<driver>", "torch_cuda": "<CUDA>", "shadow": "torch.py",
    "make_env": "python3.12 -m venv .venv && .venv/bin/python -m pip install torch", "addon": "<package>", "index": INDEX + "/cu126", "override": "10.3.0",
}  # fmt: skip


def _fill(source: str) -> Optional[str]:
    try:
        return re.sub(r"\{([a-z_]+)\}", lambda found: _GENERIC[found.group(1)], source)
    except KeyError:
        return None


def _table(head: List[str], rows: List[List[str]]) -> List[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _builds(language: str, windows: bool) -> List[str]:
    """The CUDA builds of the default release: drivers and GPUs."""
    zh = language == "zh"
    system = "windows" if windows else "linux"
    rows = []
    for tag in knowledge.builds(TORCH):
        carried = knowledge.kernels(TORCH, tag, system, "x86_64")
        if carried:
            rows.append([tag, ">= {}".format(knowledge.driver_minimum_text(tag, windows)), ", ".join(sm_text(sm) for sm in carried[0])])
    head = ["构建", "NVIDIA 驱动", "计算能力"] if zh else ["build", "NVIDIA driver", "compute capabilities"]
    said = (
        "torch {} 的 CUDA 构建。GPU 与某个内核主版本相同且次版本不低于它，即可运行。不需要安装 CUDA 工具包。"
        if zh
        else "The CUDA builds of torch {}. A GPU runs a kernel of its own major version and an equal or lower minor one. No CUDA toolkit is needed."
    )
    return [said.format(TORCH), "", *_table(head, rows)]


def _machine_facts(name: str, language: str) -> List[str]:
    zh, data = language == "zh", knowledge.load()
    if name in ("linux", "windows", "wsl2", "containers", "servers"):
        return _builds(language, name in ("windows", "wsl2"))
    if name == "macos":
        rows = [["{} - {}".format(*e["torch"]), e["macos"]] for e in data["platforms"]["mps_minimum_macos"]]
        return _table(["torch", "macOS（使用 Apple GPU）" if zh else "macOS for the Apple GPU"], rows)
    if name == "rocm":
        rows = [[build, ", ".join("gfx" + g for g in gfx)] for build, gfx in data["rocm_gfx"]["builds"].items()]
        return _table(["ROCm", "带有内核的 GPU" if zh else "GPUs with kernels"], rows)
    return [
        data["platforms"]["linux_aarch64"][language] + ("。" if zh else "."),
        "",
        data["platforms"]["jetson"][language] + ("。" if zh else "."),
        "",
    ]


def guide(name: str, language: str) -> str:
    """One guide as Markdown."""
    zh = language == "zh"
    title, marks, listed = GUIDES[name]
    lines = [
        "# " + ("安装 PyTorch：" if zh else "Installing PyTorch: ") + title[language],
        "",
        (
            "由 `groundup env guide {}` 依据同一份知识生成，请勿手改。"
            if zh
            else "Made by `groundup env guide {}` from the knowledge that the doctor uses; not edited by hand."
        ).format(name),
        "",
        "## " + ("三条命令" if zh else "Three commands"),
        "",
        "```sh",
        "python3 start.py env doctor     # " + ("哪里不对" if zh else "what is wrong here"),
        "python3 start.py env plan       # " + ("该装哪个构建、为什么" if zh else "which build, and why"),
        "python3 start.py env install    # " + ("安装并验证" if zh else "install it and verify that it computes"),
        "```",
        "",
        "## " + ("构建与硬件" if zh else "Builds and hardware"),
        "",
        *_machine_facts(name, language),
        "## " + ("常见问题" if zh else "What goes wrong, and what to do"),
        "",
    ]
    for cause_id in dict.fromkeys(listed):
        entry = causes()[cause_id]
        headline = _fill(entry["title"][language]) or ""
        lines += ["### " + headline[:1].upper() + headline[1:], "", "`{}`".format(cause_id), ""]
        told = [s for s in (_fill(e[language]) if not re.search(r"\{", e[language]) else None for e in entry["explain"]) if s]
        lines += [("" if zh else " ").join(told), ""] if told else []
        for step in entry["fix"]:
            if ("if" in step and not set(step["if"]) & set(marks)) or set(step.get("not", [])) & set(marks):
                continue
            said, run = _fill(step[language]), _fill(step.get("run", ""))
            if said is not None and run is not None:
                lines += [
                    "- " + said + ("：" if zh and run else ":" if run else ""),
                    *(["", "  ```sh", "  " + run, "  ```", ""] if run else []),
                ]
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def file_name(name: str, language: str) -> str:
    return name + (".zh-CN.md" if language == "zh" else ".md")


# --- the verbs -------------------------------------------------------------------------------------------------------------------


def configure_guide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", nargs="?", choices=sorted(GUIDES), help="default: this one / 默认为本机系统")
    parser.add_argument("--write", metavar="FOLDER", help="write all guides in both languages there / 把全部指南写入该目录")


def run_guide(options: argparse.Namespace) -> int:
    if options.write:
        folder = Path(options.write)
        folder.mkdir(parents=True, exist_ok=True)
        for name in GUIDES:
            for language in LANGUAGES:
                (folder / file_name(name, language)).write_text(guide(name, language), encoding="utf-8")
        return 0
    here = {"win32": "windows", "darwin": "macos"}.get(sys.platform, "linux")
    made = guide(options.system or here, pick(options.lang))
    print(json.dumps({"system": options.system or here, "markdown": made}, ensure_ascii=False) if options.json else made)
    return 0


def configure_knowledge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", nargs="?", help="one of its parts, such as releases, kernels, drivers / 其中一部分")


def _cells(words: str) -> int:
    """How wide they are on a terminal, where a Chinese character takes two places."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words)


def run_knowledge(options: argparse.Namespace) -> int:
    data = knowledge.load()
    if options.topic and options.topic not in data:
        print(
            "{}: {}".format("没有该部分；可选" if pick(options.lang) == "zh" else "no such part; there are", ", ".join(data)),
            file=sys.stderr,
        )
        return 2
    if options.json or options.topic:
        print(
            json.dumps(
                {options.topic: data[options.topic]} if options.topic else data, ensure_ascii=False, indent=None if options.json else 1
            )
        )
        return 0
    zh = pick(options.lang) == "zh"
    print(data["about"]["zh" if zh else "en"])
    head = ("torch", "Python", "CUDA 构建" if zh else "CUDA builds", "ROCm", "torchvision", "torchaudio", "glibc")
    rows = [head] + [
        (r["torch"], "{}-{}".format(*r["python"]), " ".join(sorted(r["cuda"], key=lambda t: knowledge.cuda_of(t) or ())), " ".join(r["rocm"]),
         r["torchvision"], r["torchaudio"], r["glibc"]) for r in knowledge.releases()
    ]  # fmt: skip
    widths = [max(_cells(row[i]) for row in rows) for i in range(len(head))]
    print("\n".join("  ".join(cell + " " * (width - _cells(cell)) for cell, width in zip(row, widths)).rstrip() for row in rows))
    for entry in data["drivers"]["by_cuda_major"]:
        number = dotted(version(entry["linux"])[:1]) if entry["major"] >= 13 else entry["linux"]
        print("CUDA {}: {} >= {} (Windows {})".format(entry["major"], "驱动" if zh else "driver", number, entry["windows"]))
    print(("来源 {} 条；全部数据：--json" if zh else "{} sources; everything: --json").format(len(data["sources"])))
    return 0
