"""`groundup env info`: everything found, as two columns for a person, as JSON, or as plain lines to paste into a bug report.

The lines to paste use the keys of torch.utils.collect_env where it has them, so that what reads one report reads the other. Something
special (a container, nouveau, MIG) has a line only where it is: a line that says "no" would look like a sign of it.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, Iterable, List, Mapping, Optional, Tuple

from groundup.env import plan, probe
from groundup.env.language import Text, pick, text
from groundup.env.layout import columns, width

DONE = 0
TITLE = "groundup environment report"
WIDTH = 80
_UNKNOWN = "Could not collect"

# What the names in facts["python"]["mixed"] mean.
MIXED: Mapping[str, Text] = {
    "conda_around_venv": text("a venv runs while a conda environment is active", "conda 环境已激活，而运行的是 venv"),
    "conda_active_elsewhere": text(
        "a conda environment is active, but this Python is not conda's", "conda 环境已激活，但当前 Python 不属于 conda"
    ),
    "other_conda_active": text("another conda environment than this Python's is active", "激活的 conda 环境与当前 Python 所在的环境不同"),
    "venv_active_elsewhere": text("another venv than this Python's is active", "激活的 venv 与当前 Python 所在的环境不同"),
    "pythonhome": text("PYTHONHOME is set", "设置了 PYTHONHOME"),
    "packages_on_pythonpath": text("packages come from PYTHONPATH", "部分软件包来自 PYTHONPATH"),
    "packages_in_user_site": text("packages come from the user's own site-packages", "部分软件包来自用户目录（user site）"),
    "system_packages_in_venv": text("the venv also reads the system's packages", "该 venv 也读取系统的软件包"),
    "pip_and_conda": text("pip and conda both installed into this environment", "pip 与 conda 都向此环境安装过软件包"),
}
_FLAGS = (("avx2", "AVX2"), ("avx512", "AVX-512"), ("amx", "AMX"), ("bf16", "bf16"))
# Companions worth a line for a person; NVIDIA's twenty wheels are counted.
_SHOWN = re.compile(
    r"torch.+|pytorch.*|triton.*|numpy|xformers|flash-attn|bitsandbytes|vllm|deepspeed|transformers|accelerate|peft|apex|jax|tensorflow|onnxruntime.*"
)

Row = Tuple[Tuple[str, str], Tuple[str, str]]


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's options; `--json` and `--lang` are the caller's."""
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="read files only, ask no other program / 只读文件，不询问其他程序")
    depth.add_argument(
        "--deep", action="store_true", help="also ask torch and the drivers themselves (seconds) / 同时询问 torch 与驱动（需数秒）"
    )
    parser.add_argument("--report", action="store_true", help="plain lines to paste, nothing private in them / 可直接粘贴的报告，不含隐私")


def run(options: argparse.Namespace) -> int:
    """Prints what was found; the exit status is 0 whatever that is."""
    facts = probe.facts(quick=options.quick, deep=options.deep)
    if options.report and not options.json:
        print(text_report(facts))
        return DONE
    fits = plan.make_plan(facts)
    if options.json:
        print(json.dumps(dict(facts, plan=plan.as_dict(fits)), ensure_ascii=False))
    else:
        print(report(facts, fits, pick(options.lang)))
    return DONE


# --- for a person ----------------------------------------------------------------------------------------------------------------


def report(facts: Mapping[str, Any], fits: plan.Plan, language: str) -> str:
    """Two aligned columns, at most 80 wide."""
    runtime = facts.get("torch_runtime")
    rows = [*_machine_rows(facts), *_python_rows(facts), *_accelerator_rows(facts), *_cuda_rows(facts), _torch_row(facts, runtime)]
    rows += [*_runtime_rows(runtime), *_package_rows(facts), *_setting_rows(facts), _plan_row(fits)]
    column = 0 if language == "en" else 1
    # Chinese punctuation may stand beyond the limit, so that no line begins with it.
    limit = WIDTH - 2 * column
    room = limit - 2 - max(width(label[column]) for label, _ in rows)
    return "\n".join(columns([(label[column], _breakable(value[column], room)) for label, value in rows], indent="", limit=limit))


def _breakable(value: str, room: int) -> str:
    """With a place to break in words that no line has room for: lists of folders, mostly."""
    return re.sub(r"[!-~]{%d,}" % (room + 1), lambda word: re.sub(r"(.{%d})(?=.)" % room, r"\1 ", word.group(0)), value)


def _machine_rows(facts: Mapping[str, Any]) -> List[Row]:
    system, cpu, memory = facts["os"], facts["cpu"], facts["memory"]
    details = ", ".join(
        filter(None, [system["name"], system["release"] if system["system"] == "Linux" else "", system["machine"], system["libc"]])
    )
    jetson = "Jetson" + (" L4T " + system["l4t"] if system["l4t"] else "") if system["jetson"] else ""
    wsl = "WSL {}".format(system["wsl_version"] or "") if system["wsl"] else ""
    marks = ", ".join(
        filter(
            None,
            [wsl.strip(), system["container"], system["vm"], jetson, "Rosetta" if system["rosetta"] else "", *_hpc_marks(system["hpc"])],
        )
    )
    where = details + (" [{}]".format(marks) if marks else "")
    model = cpu["model"] or "?"
    flags = ", ".join(name for key, name in _FLAGS if cpu[key])
    quota = cpu["quota"]
    en = "{}, {} cores usable of {}".format(model, cpu["cores_usable"], cpu["cores"]) + (", limited to {:g}".format(quota) if quota else "")
    zh = "{}，{} 核，可用 {}".format(model, cpu["cores"], cpu["cores_usable"]) + ("，限额 {:g} 核".format(quota) if quota else "")
    limit = memory["limit_gb"]
    total, free = _gb(memory["total_gb"]), _gb(memory["available_gb"])
    return [
        (("System", "系统"), (where, where)),
        (("CPU", "处理器"), (en + ("; " + flags if flags else ""), zh + ("；" + flags if flags else ""))),
        (
            ("Memory", "内存"),
            (
                "{}, {} free".format(total, free) + (", limited to {} here".format(_gb(limit)) if limit else ""),
                "{}，可用 {}".format(total, free) + ("，此处限额 {}".format(_gb(limit)) if limit else ""),
            ),
        ),
        _disk_row(facts["disks"]),
    ]


def _hpc_marks(hpc: Mapping[str, Any]) -> List[str]:
    scheduler = str(hpc["scheduler"]).upper() + (" job" if hpc["in_job"] else "") if hpc["scheduler"] else ""
    return [mark for mark in [scheduler, " ".join(hpc["loaded"])] if mark]


def _disk_row(disks: Mapping[str, Any]) -> Row:
    names = {
        "here": ("free here", "当前位置剩余"),
        "temporary": ("where pip unpacks", "pip 解包处"),
        "environment": ("where the packages are", "软件包所在处"),
        "shm": ("shared memory", "共享内存"),
    }
    en, zh = [], []
    for key, (english, chinese) in names.items():
        disk = disks.get(key)
        if disk:
            en.append("{} {}".format(_gb(disk["free_gb"]), english))
            zh.append("{} {}".format(chinese, _gb(disk["free_gb"])))
    return ("Disk", "磁盘"), (", ".join(en) or "?", "，".join(zh) or "?")


def _python_rows(facts: Mapping[str, Any]) -> List[Row]:
    python, system = facts["python"], facts["windows"]
    kinds = {"venv": ("in a venv", "位于 venv"), "conda": ("in conda", "位于 conda"), "system": ("no venv", "未用 venv")}
    environment = kinds.get(python["environment"], ("?", "?"))
    build = "{}, {}, {} bit".format(python["version"], python["implementation"], python["bits"])
    if python["free_threaded"]:
        build += ", free-threaded"
    conda = python["active"]["conda"]
    origin = python["origin"] if python["origin"] not in (None, "system", "other", "conda") else ""
    marks = [mark for mark in [conda, origin] if mark]
    tail = " ({})".format(", ".join(marks)) if marks else ""
    others = [other for other in python["pythons"] if not str(python["version"]).startswith(other + ".")]
    en = "{}, {}".format(build, environment[0]) + tail + ("; also here: " + ", ".join(others) if others else "")
    zh = "{}，{}".format(build, environment[1]) + tail + ("；另有 " + "、".join(others) if others else "")
    rows: List[Row] = [(("Python", "Python"), (en, zh))]
    rows += [(("Mixed", "混用"), (MIXED[name]["en"], MIXED[name]["zh"])) for name in python["mixed"] if name in MIXED]
    if system["missing_dlls"]:
        listed = ", ".join(system["missing_dlls"])
        rows.append((("VC runtime", "VC 运行库"), ("missing: " + listed, "缺少：" + listed)))
    return rows


def _accelerator_rows(facts: Mapping[str, Any]) -> List[Row]:
    rows: List[Row] = []
    nvidia, amd, apple = facts["nvidia"], facts["amd"], facts["apple"]
    for gpu, count in _grouped(nvidia["gpus"]):
        capability, times = gpu["compute_capability"] or "?", "{} x ".format(count) if count > 1 else ""
        mig = ", MIG" if gpu.get("mig") else ""
        en = "{}{}, {}, compute capability {}{}".format(times, gpu["name"], _gb(gpu["memory_gb"]), capability, mig)
        zh = "{}{}，{}，计算能力 {}{}".format(times, gpu["name"], _gb(gpu["memory_gb"]), capability, mig)
        rows.append((("GPU", "GPU"), (en, zh)))
    for index, gfx in enumerate(amd["gfx"]):
        name = "AMD " + (amd["names"][index] + " " if len(amd["names"]) == len(amd["gfx"]) else "") + gfx
        rows.append((("GPU", "GPU"), (name, name)))
    if apple["chip"] and facts["os"]["machine"] == "aarch64":
        rows.append((("GPU", "GPU"), (apple["chip"], apple["chip"])))
    rows += [
        (
            ("Display", "显卡"),
            ("{} (built in; does not answer as a computing device)".format(name), name + "（已安装，但未作为计算设备应答）"),
        )
        for name in _idle(facts)
    ]
    if not rows:
        rows.append((("GPU", "GPU"), ("none found", "未找到")))
    if nvidia["driver"]:
        en, zh = nvidia["driver"], nvidia["driver"]
        if nvidia["cuda_version"]:
            en, zh = en + ", runs CUDA up to " + nvidia["cuda_version"], zh + "，最高支持 CUDA " + nvidia["cuda_version"]
        if nvidia["open_module"]:
            en, zh = en + ", open kernel module", zh + "，开源内核模块"
        if nvidia["mismatch"]:
            en, zh = en + "; its library is " + str(nvidia["library"]), zh + "；用户态库版本为 " + str(nvidia["library"])
        rows.append((("Driver", "驱动"), (en, zh)))
    if nvidia["nouveau"]:
        boot = nvidia["secure_boot"]
        rows.append(
            (
                ("Driver", "驱动"),
                (
                    "nouveau is loaded" + (", Secure Boot is on" if boot else ""),
                    "已加载 nouveau" + ("，Secure Boot 已开启" if boot else ""),
                ),
            )
        )
    if nvidia["fabricmanager"]["needed"] and nvidia["fabricmanager"]["running"] is False:
        rows.append((("NVSwitch", "NVSwitch"), ("nvidia-fabricmanager is not running", "nvidia-fabricmanager 未运行")))
    if nvidia["problem"]:
        rows.append((("NVIDIA", "NVIDIA"), (nvidia["problem"], nvidia["problem"])))
    if amd["rocm"] or amd["kfd"] in ("no access", "absent"):
        access = {
            "no access": ("; this user may not use /dev/kfd", "；当前用户无权使用 /dev/kfd"),
            "absent": ("; /dev/kfd is absent", "；没有 /dev/kfd"),
        }
        en, zh = access.get(amd["kfd"], ("", ""))
        rows.append((("ROCm", "ROCm"), ((amd["rocm"] or "not installed") + en, (amd["rocm"] or "未安装") + zh)))
    return rows


def _idle(facts: Mapping[str, Any]) -> List[str]:
    """GPUs that are built in but do not answer. Where one answers, the others are mostly the processor's own and would only confuse."""
    nvidia, amd, intel = facts["nvidia"], facts["amd"], facts["intel"]
    if nvidia["gpus"]:
        return []
    found = ["NVIDIA " + name for name in nvidia["bus_names"]]
    if not amd["gfx"]:
        found += ["AMD " + name.replace("AMD ", "") for name in amd["names"]]
        found += ["Intel " + name.replace("Intel(R) ", "").replace("Intel ", "") for name in intel["names"]]
    return found


def _grouped(gpus: Iterable[Mapping[str, Any]]) -> List[Tuple[Mapping[str, Any], int]]:
    """Equal GPUs in one row."""
    found: List[Tuple[Mapping[str, Any], int]] = []
    for gpu in gpus:
        if found and found[-1][0] == gpu:
            found[-1] = (gpu, found[-1][1] + 1)
        else:
            found.append((gpu, 1))
    return found


def _cuda_rows(facts: Mapping[str, Any]) -> List[Row]:
    cuda = facts["cuda"]
    parts = ["nvcc " + cuda["nvcc"]] if cuda["nvcc"] else []
    if cuda["toolkits"]:
        parts.append(
            "/usr/local: " + ", ".join(cuda["toolkits"]) if facts["os"]["system"] == "Linux" else "toolkit " + ", ".join(cuda["toolkits"])
        )
    rows: List[Row] = [(("CUDA", "CUDA"), (", ".join(parts), "，".join(parts)))] if parts else []
    for place in ("LD_LIBRARY_PATH", "PATH", "compat", "system", "conda"):
        listed = ", ".join(
            _library(item) for item in cuda["libraries"] if item["where"] == place and item["name"] not in ("libcuda", "nvcuda")
        )
        if listed:
            name = {"system": ("system: ", "系统："), "conda": ("conda: ", "conda：")}.get(place, (place + ": ", place + "："))
            rows.append((("Libraries", "库"), (name[0] + listed, name[1] + listed)))
    return rows


def _library(item: Mapping[str, Any]) -> str:
    return " ".join(filter(None, [item["name"], item["version"]]))


def _torch_row(facts: Mapping[str, Any], runtime: Optional[Mapping[str, Any]]) -> Row:
    label = ("torch", "torch")
    torch = facts["torch"]
    if torch is None:
        return label, ("not installed for this Python", "当前 Python 未安装")
    version = torch["version"]
    if runtime is None:
        architectures = ", ".join(torch.get("arch_list") or [])
        return label, (version, version) if not architectures else (
            version + ", built for " + architectures,
            version + "，适用于 " + architectures,
        )
    if runtime["error"]:
        return label, (
            "{}, but it cannot be imported: {}".format(version, runtime["error"]),
            "{}，但无法导入：{}".format(version, runtime["error"]),
        )
    devices = ", ".join(runtime["devices"]) or ("Apple GPU (mps)" if runtime["mps_available"] else "CPU")
    seconds = runtime["import_seconds"]
    return label, (
        "{}, computes on {} (imported in {} s)".format(version, devices, seconds),
        "{}，计算设备：{}（导入用时 {} 秒）".format(version, devices, seconds),
    )


def _runtime_rows(runtime: Optional[Mapping[str, Any]]) -> List[Row]:
    """What torch said that is not as it should be."""
    if runtime is None or runtime["error"]:
        return []
    said = [str(warning).strip() for warning in runtime.get("warnings", [])] + [runtime.get("compute_error"), runtime.get("numpy")]
    said += ["import {}: {}".format(name, error) for name, error in runtime.get("imports", {}).items() if error]
    texts = [" ".join(str(item).split())[:400] for item in said if item]
    return [(("torch says", "torch 提示"), (item, item)) for item in texts]


def _package_rows(facts: Mapping[str, Any]) -> List[Row]:
    rows: List[Row] = []
    shown: List[str] = []
    for item in facts["packages"]:
        name = (
            "{} {}".format(item["name"], _full_version(item))
            if item["where"] != "conda"
            else "{} {} (conda)".format(item["name"], item["version"])
        )
        if _SHOWN.fullmatch(item["name"]) and name not in shown:
            shown.append(name)
    if shown:
        rows.append((("Beside it", "相关包"), (", ".join(shown), "、".join(shown))))
    for item in facts["duplicates"]:
        copies = ["{} ({})".format(_full_version(copy), copy["where"]) for copy in item["copies"]]
        rows.append(
            (("Twice", "重复"), ("{}: {}".format(item["name"], ", ".join(copies)), "{}：{}".format(item["name"], "、".join(copies))))
        )
    for item in facts["shadow"]:
        en = "{} in {} hides the module {}".format(
            item["name"], "the current folder" if item["where"] == "current folder" else item["where"], item["module"]
        )
        zh = "{}的 {} 会遮蔽模块 {}".format(
            "当前文件夹中" if item["where"] == "current folder" else item["where"] + " 中", item["name"], item["module"]
        )
        rows.append((("Hidden", "遮蔽"), (en, zh)))
    incomplete = ["{} {}".format(item["name"], item["version"]) for item in facts["packages"] if not item["complete"]] + facts["leftovers"]
    if incomplete:
        rows.append((("Unfinished", "未装完"), (", ".join(incomplete), "、".join(incomplete))))
    return rows


def _setting_rows(facts: Mapping[str, Any]) -> List[Row]:
    rows: List[Row] = [
        (("Variable", "变量"), ("{}={}".format(name, value), "{}={}".format(name, value))) for name, value in facts["variables"].items()
    ]
    said = pip_settings(facts["pip"])
    if said:
        rows.append((("pip", "pip"), (", ".join(said), "，".join(said))))
    rows += [(("Not learnt", "未能读取"), (problem, problem)) for problem in facts["problems"]]
    return rows


def pip_settings(pip: Mapping[str, Any]) -> List[str]:
    """'index https://***', 'proxy http://***', 'no-index': what pip was told."""
    said = [
        "{} {}".format(key.replace("_", "-"), pip[key])
        for key in ("index", "extra_index", "find_links", "proxy", "uv_index")
        if pip.get(key)
    ]
    switches = ("no_index", "user", "target", "require_virtualenv", "constraint", "trusted_host", "cert")
    return said + [key.replace("_", "-") for key in switches if pip.get(key)]


def _plan_row(fits: plan.Plan) -> Row:
    label = ("Fits", "适用")
    if fits.refused:
        return label, ("nothing: " + fits.refused["en"], "无：" + fits.refused["zh"])
    name = "torch {}, {}".format(fits.torch_version, fits.backend)
    return label, ("{}: {}".format(name, fits.reason["en"]), "{}：{}".format(name, fits.reason["zh"]))


def _gb(value: Optional[float]) -> str:
    return "? GB" if value is None else "{:g} GB".format(value)


def _full_version(item: Mapping[str, Any]) -> str:
    """'2.6.0+cu124'; conda's build string is no part of a version."""
    return item["version"] + ("+" + item["build"] if item.get("build") and item["where"] != "conda" else "")


# --- to paste --------------------------------------------------------------------------------------------------------------------


def text_report(facts: Mapping[str, Any]) -> str:
    """Plain `Key: value` lines with nothing private in them; the keys are torch.utils.collect_env's where it has them."""
    lines = [TITLE]
    for section in (_torch_lines, _system_lines, _python_lines, _gpu_lines, _machine_lines, _finding_lines, _setting_lines, _library_lines):
        found = section(facts)
        if found:
            lines += ["", *found]
    return "\n".join(lines)


def _torch_lines(facts: Mapping[str, Any]) -> List[str]:
    torch, runtime = facts["torch"], facts.get("torch_runtime")
    if torch is None:
        return ["PyTorch version: N/A (not installed for this Python)"]
    lines = [
        "PyTorch version: " + torch["version"],
        "CUDA used to build PyTorch: " + (torch["cuda"] or ("N/A" if torch["hip"] else "None")),
        "ROCM used to build PyTorch: " + (torch["hip"] or "N/A"),
    ]
    kernels = (runtime or {}).get("arch_list") or torch.get("arch_list") or []
    # A list of AMD targets would read like the GPUs of this machine.
    if kernels and not kernels[0].startswith("gfx"):
        lines.append("Kernels in PyTorch: " + " ".join(kernels))
    if torch["where"] != "environment":
        lines.append("PyTorch comes from: " + torch["where"])
    if runtime and runtime["error"]:
        lines += [
            "Import of torch: " + runtime["error"],
            *("  " + line for line in runtime.get("details", [])[-12:] if line != runtime["error"]),
        ]
    elif runtime:
        lines += ["Warning of torch: " + " ".join(str(item).split()) for item in runtime.get("warnings", [])]
        lines += ["Computing on the GPU: " + runtime["compute_error"]] if runtime.get("compute_error") else []
        lines += ["torch and NumPy: " + runtime["numpy"]] if runtime.get("numpy") else []
        lines += ["Import of {}: {}".format(name, error) for name, error in runtime.get("imports", {}).items() if error]
        lines += ["  " + line for line in runtime.get("details", [])[-12:]]
    return lines


def _system_lines(facts: Mapping[str, Any]) -> List[str]:
    system = facts["os"]
    libc = "glibc-" + system["libc"].split()[1] if str(system["libc"]).startswith("glibc ") else system["libc"] or "N/A"
    machine = {("Darwin", "aarch64"): "arm64"}.get((system["system"], system["machine"]), system["machine"])
    lines = ["OS: {} ({})".format(system["name"], machine), "Libc version: " + libc]
    if system["system"] == "Linux":
        lines.append("Kernel: " + str(system["kernel"]))
    special = (
        ("Windows Subsystem for Linux: WSL {}".format(system["wsl_version"] or ""), system["wsl"]),
        ("Container: {}".format(system["container"]), system["container"]),
        ("Virtual machine: {}".format(system["vm"]), system["vm"]),
        ("Jetson: {}, L4T {}".format(system["model"] or "unknown model", system["l4t"] or "unknown"), system["jetson"]),
        ("Rosetta: this Python is translated", system["rosetta"]),
        (
            "Scheduler: {}{}".format(system["hpc"]["scheduler"], ", in a job" if system["hpc"]["in_job"] else ", not in a job"),
            system["hpc"]["scheduler"],
        ),
        ("Modules loaded: " + " ".join(system["hpc"]["loaded"]), system["hpc"]["loaded"]),
        ("Visual C++ runtime: missing " + ", ".join(facts["windows"]["missing_dlls"]), facts["windows"]["missing_dlls"]),
    )
    return lines + [line for line, there in special if there]


def _python_lines(facts: Mapping[str, Any]) -> List[str]:
    system, python = facts["os"], facts["python"]
    runtime = facts.get("torch_runtime")
    available = "unknown (not asked)" if runtime is None or runtime["error"] else str(runtime["cuda_available"])
    names = {"Darwin": "macOS-{}-{}".format(facts["apple"]["macos"], {"aarch64": "arm64"}.get(system["machine"], system["machine"]))}
    platform = names.get(system["system"], "{}-{}-{}".format(system["system"], system["kernel"], system["machine"]))
    if str(system["libc"]).startswith("glibc "):
        platform += "-with-glibc" + system["libc"].split()[1]
    kinds = {"venv": "a venv", "conda": "a conda environment", "system": "none"}
    lines = [
        "Python version: {} ({}, {}-bit runtime{})".format(
            python["version"], python["implementation"], python["bits"], ", free-threaded" if python["free_threaded"] else ""
        ),
        "Python platform: " + platform,
        "Python environment: {}{}".format(
            kinds.get(python["environment"], "?"), ", Python from " + python["origin"] if python["origin"] != "conda" else ""
        ),
        "Is CUDA available: " + available,
    ]
    return lines + ["Mixed: " + MIXED[name]["en"] for name in python["mixed"] if name in MIXED]


def _gpu_lines(facts: Mapping[str, Any]) -> List[str]:
    nvidia, amd, apple, cuda = facts["nvidia"], facts["amd"], facts["apple"], facts["cuda"]
    names = [gpu["name"] for gpu in nvidia["gpus"]]
    for index, gfx in enumerate(amd["gfx"]):
        names.append("AMD {} ({})".format(amd["names"][index], gfx) if len(amd["names"]) == len(amd["gfx"]) else "AMD GPU ({})".format(gfx))
    if apple["chip"] and facts["os"]["machine"] == "aarch64":
        names.append(apple["chip"])
    lines = ["CUDA runtime version: " + (cuda["nvcc"] or _UNKNOWN)]
    lines += (
        ["GPU models and configuration:", *("GPU {}: {}".format(index, name) for index, name in enumerate(names))]
        if names
        else ["GPU models and configuration: " + _UNKNOWN]
    )
    for index, gpu in enumerate(nvidia["gpus"]):
        details = ["memory " + _gb(gpu["memory_gb"])] if gpu["memory_gb"] else []
        details += ["compute capability " + gpu["compute_capability"]] if gpu["compute_capability"] else []
        details += ["MIG enabled"] if gpu.get("mig") else []
        if details:
            lines.append("Details of GPU {}: {}".format(index, ", ".join(details)))
    lines += ["Display adapter: " + name for name in _idle(facts)]
    lines.append("Nvidia driver version: " + (nvidia["driver"] or _UNKNOWN))
    if nvidia["cuda_version"]:
        lines.append("CUDA driver: " + nvidia["cuda_version"])
    if nvidia["mismatch"]:
        lines.append("Nvidia library version: {} (kernel module {})".format(nvidia["library"], nvidia["kernel_module"]))
    if nvidia["problem"]:
        lines.append("nvidia-smi: " + nvidia["problem"])
    elif nvidia["driver"] and not nvidia["smi"] and not facts["os"]["jetson"]:
        lines.append("nvidia-smi: command not found")
    if nvidia["cuinit"]:
        lines.append("cuInit: error {}".format(nvidia["cuinit"]))
    if nvidia["nouveau"]:
        lines.append("Kernel driver of the GPU: nouveau")
    if nvidia["secure_boot"] and (nvidia["nouveau"] or nvidia["problem"]):
        lines.append("Secure Boot: enabled")
    if nvidia["fabricmanager"]["needed"] and nvidia["fabricmanager"]["running"] is False:
        lines.append("NVSwitch: nvidia-fabricmanager is not running")
    if nvidia["driver"] and not nvidia["devices"] and facts["os"]["container"]:
        lines.append("GPU device nodes in /dev: none")
    cudnn = sorted(
        {item["version"] for item in cuda["libraries"] if item["name"] == "libcudnn" and item["where"] != "python" and item["version"]}
    )
    lines.append("cuDNN version: " + (", ".join(cudnn) or _UNKNOWN))
    if amd["rocm"] or amd["gfx"]:
        lines.append("ROCm version: " + (amd["rocm"] or _UNKNOWN))
    if amd["kfd"] in ("no access", "absent") and (amd["rocm"] or (facts["torch"] or {}).get("hip")):
        lines.append("/dev/kfd: " + amd["kfd"])
    if cuda["toolkits"]:
        lines.append("CUDA toolkits: " + ", ".join(cuda["toolkits"]))
    if cuda["compat"] and cuda["compat"]["on_path"]:
        lines.append("cuda-compat libcuda: " + cuda["compat"]["version"])
    for place in ("LD_LIBRARY_PATH", "PATH"):
        listed = [_library(item) for item in cuda["libraries"] if item["where"] == place]
        if listed:
            lines.append("Libraries on {}: {}".format(place, ", ".join(listed)))
    return lines


def _machine_lines(facts: Mapping[str, Any]) -> List[str]:
    cpu, memory, disks = facts["cpu"], facts["memory"], facts["disks"]
    flags = " ".join(name for key, name in _FLAGS if cpu[key])
    lines = [
        "CPU: {}".format(cpu["model"] or _UNKNOWN),
        "CPU cores: {} of {}{}".format(cpu["cores_usable"], cpu["cores"], ", limited to {:g}".format(cpu["quota"]) if cpu["quota"] else ""),
    ]
    lines += ["CPU instructions: " + flags] if flags else []
    limit = ", limited to " + _gb(memory["limit_gb"]) if memory["limit_gb"] else ""
    lines.append("Memory: {}, {} available{}".format(_gb(memory["total_gb"]), _gb(memory["available_gb"]), limit))
    places = (
        ("here", "Disk free"),
        ("temporary", "Disk free for temporary files"),
        ("environment", "Disk free for packages"),
        ("shm", "Shared memory"),
    )
    lines += [
        "{}: {} of {}".format(title, _gb(disks[key]["free_gb"]), _gb(disks[key]["total_gb"])) for key, title in places if disks.get(key)
    ]
    return lines


def _finding_lines(facts: Mapping[str, Any]) -> List[str]:
    lines = []
    for item in facts["duplicates"]:
        copies = ["{} ({})".format(_full_version(copy), copy["where"]) for copy in item["copies"]]
        lines.append("Installed more than once: {} {}".format(item["name"], ", ".join(copies)))
    lines += ["Hides the module {}: {} ({})".format(item["module"], item["name"], item["where"]) for item in facts["shadow"]]
    lines += [
        "Installation not finished: {} {}".format(item["name"], item["version"]) for item in facts["packages"] if not item["complete"]
    ]
    lines += ["Left over in site-packages: " + name for name in facts["leftovers"]]
    return lines + ["Not learnt: " + problem for problem in facts["problems"]]


def _setting_lines(facts: Mapping[str, Any]) -> List[str]:
    lines = ["{}={}".format(name, value) for name, value in facts["variables"].items()]
    return lines + ["pip setting: " + said for said in pip_settings(facts["pip"])]


def _library_lines(facts: Mapping[str, Any]) -> List[str]:
    lines = ["Versions of relevant libraries:"]
    for item in facts["packages"]:
        if item["where"] == "conda":
            lines.append("[conda] {} {} {} {}".format(item["name"], item["version"], item["build"], item.get("channel") or "unknown"))
        else:
            lines.append("[pip3] {}=={}".format(item["name"], _full_version(item)))
    return lines if len(lines) > 1 else [*lines, "[pip3] " + _UNKNOWN]
