"""Facts from captured texts and from this machine; nothing private, nothing that raises."""

import ast
import copy
import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from machines import MACHINES, FakeHost, merge, pci, smi, told

from groundup.env import gpus, host, language, libraries, packages, plan, probe, settings

SMI = """\
NVIDIA GeForce RTX 3090, 24576, 8.6, 550.144.03
NVIDIA H100 80GB HBM3, 81559, 9.0, 550.144.03
"""
SOURCE = Path(probe.__file__).parent
OURS = ("host", "gpus", "libraries", "packages", "settings", "runtime", "probe", "info", "lock")


# --- parsers ---------------------------------------------------------------------------------------------------------------------


def test_nvidia_smi():
    first, second = probe.parse_nvidia_smi(SMI)
    assert first == {"name": "NVIDIA GeForce RTX 3090", "memory_gb": 25.8, "compute_capability": "8.6", "driver": "550.144.03", "mig": None}
    assert second["compute_capability"] == "9.0"
    # An integrated GPU shares the machine's memory: nvidia-smi has no number for it.
    (shared,) = probe.parse_nvidia_smi("NVIDIA GB10, [N/A], 12.1, 580.95.05\n")
    assert shared["memory_gb"] is None and shared["compute_capability"] == "12.1"
    (old,) = probe.parse_nvidia_smi("Tesla K80, 11441, 418.87.01\n")
    assert (old["driver"], old["compute_capability"]) == ("418.87.01", None)
    assert [gpu["mig"] for gpu in probe.parse_nvidia_smi("A100, 40960, 8.0, 535.1, Enabled\nA100, 40960, 8.0, 535.1, Disabled\n")] == [
        True,
        False,
    ]
    assert probe.parse_nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "| NVIDIA-SMI 550.144.03             Driver Version: 550.144.03     CUDA Version: 12.4     |",
            {"driver": "550.144.03", "cuda": "12.4"},
        ),
        ("| NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 11.4     |", {"driver": "470.57.02", "cuda": "11.4"}),
        ("| NVIDIA-SMI 384.145                Driver Version: 384.145                   |", {"driver": "384.145"}),
        ("| NVIDIA-SMI 540.4.0     Driver Version: N/A          CUDA Version: N/A |", {}),
    ],
)
def test_smi_header(source, expected):
    assert gpus.parse_smi_header(source) == expected


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ("550.144.03\n", "550.144.03"),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.2.0",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder@host)  Sun Jul 27 2025",
            "580.65.06",
        ),
        ("", None),
    ],
)
def test_driver_version(source, version):
    assert probe.parse_driver_version(source) == version


@pytest.mark.parametrize(
    ("number", "version"),
    [("32.0.15.6094", "560.94"), ("31.0.15.3623", "536.23"), ("27.21.14.5671", "456.71"), ("", None), ("1.2", None), (None, None)],
)
def test_windows_driver_number(number, version):
    assert gpus.parse_windows_driver(number) == version


def test_proc_gpu_reads_the_model_and_no_serial_number():
    source = "Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 142\nGPU UUID: \t GPU-1b2c\nDevice Minor: \t 0\n"
    assert probe.parse_proc_gpu_name(source) == "NVIDIA A100-SXM4-40GB"
    assert probe.parse_proc_gpu_name("Model: \t\t \nIRQ: 3\n") is None


@pytest.mark.parametrize(("number", "name"), [(90010, "gfx90a"), (110000, "gfx1100"), (90402, "gfx942"), (100306, "gfx1036"), (0, None)])
def test_kfd(number, name):
    assert probe.parse_kfd_properties(f"cpu_cores_count 0\nsimd_count 304\ngfx_target_version {number}\n") == name


def test_agent_enumerator():
    assert probe.parse_agent_enumerator("gfx000\ngfx90a\ngfx90a\n") == ["gfx90a", "gfx90a"]


def test_meminfo_and_cpuinfo_and_os_release():
    memory = probe.parse_meminfo("MemTotal:       24689116 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n")
    assert memory == {"total_gb": 25.3, "available_gb": 20.5}
    assert probe.parse_meminfo("") == {"total_gb": None, "available_gb": None}
    assert probe.parse_cpu_model("processor\t: 0\nmodel name\t: AMD  EPYC 7B13\n") == "AMD EPYC 7B13"
    assert probe.parse_cpu_model("processor\t: 0\nBogoMIPS\t: 50\n") is None
    assert probe.parse_cpu_model("processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n") == "ARM Neoverse-N1"
    assert probe.parse_os_release('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n')["PRETTY_NAME"] == "Ubuntu 24.04.1 LTS"
    flags = probe.parse_cpu_flags("flags\t\t: fpu avx2 avx512f amx_tile avx512_bf16\nbugs: x\n")
    assert flags == {"avx2": True, "avx512": True, "amx": True, "bf16": True}
    assert set(probe.parse_cpu_flags("").values()) == {None}


def test_pci_devices_and_their_names():
    device = gpus.parse_uevent("DRIVER=vfio-pci\nPCI_CLASS=30000\nPCI_ID=10DE:2684\nPCI_SUBSYS_ID=1043:88E2\n")
    assert device == gpus.PciDevice(0x10DE, 0x2684, 0x030000, "vfio-pci")
    assert gpus.parse_uevent("PCI_CLASS=zz\nPCI_ID=10DE:2684\n") is None
    source = pci()["/usr/share/misc/pci.ids"]
    assert gpus.parse_pci_ids(source, 0x10DE, 0x2684) == "AD102 [GeForce RTX 4090]"
    # A subsystem's number is no device's.
    assert gpus.parse_pci_ids(source, 0x1002, 0x1462) is None and gpus.parse_pci_ids(source, 0x1234, 0x1) is None


def test_toolkits_and_libraries():
    assert libraries.parse_nvcc("Cuda compilation tools, release 12.4, V12.4.131\n") == "12.4.131"
    assert libraries.parse_nvcc("Cuda compilation tools, release 9.1\n") == "9.1"
    assert libraries.parse_nvcc("bash: nvcc: command not found") is None
    cache = (
        "3 libs found in cache `/etc/ld.so.cache'\n\tlibcudnn.so.9 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcudnn.so.9\n"
        "\tlibcudart.so.11.0 (libc6) => /lib32/libcudart.so.11.0\n\tlibc.so.6 (libc6,x86-64) => /lib/libc.so.6\n"
    )
    assert libraries.parse_ldconfig(cache) == ["/lib/x86_64-linux-gnu/libcudnn.so.9"]


def test_distribution_names():
    assert packages.parse_info_name("torch-2.6.0+cu124.dist-info") == ("torch", "2.6.0+cu124")
    assert packages.parse_info_name("nvidia_cudnn_cu12-9.1.0.70.dist-info") == ("nvidia-cudnn-cu12", "9.1.0.70")
    assert packages.parse_info_name("torch-1.13.1-py3.10.egg-info") == ("torch", "1.13.1")
    assert packages.parse_info_name("~orch-2.1.0.dist-info") is None and packages.parse_info_name("torch") is None
    assert packages.parse_conda_meta_name("pytorch-2.5.1-py3.12_cuda12.4_cudnn9.1.0_0.json") == (
        "pytorch",
        "2.5.1",
        "py3.12_cuda12.4_cudnn9.1.0_0",
    )
    assert packages.parse_conda_meta_name("history") is None
    assert packages.conda_channel('{"channel": "https://conda.anaconda.org/t/se-cr-et/pytorch/linux-64"') == "pytorch"
    assert packages.conda_channel('{"channel": "https://repo.anaconda.com/pkgs/main/linux-64"') == "defaults"
    assert packages.conda_channel('{"channel": "https://corp.example/private/linux-64"') == "other"


def test_rocminfo():
    agents = gpus.parse_rocminfo(MACHINES["rocm_rdna2"].commands["rocminfo"])
    assert agents == [("gfx1031", "AMD Radeon RX 6700")]


def test_pip_configuration_in_any_shape():
    source = "[global]\n# comment\nindex-url = https://a.example/simple\nextra-index-url =\n    https://b.example/whl/cu121\n    https://c.example\n[install]\nuser: true\n"
    options = settings.parse_pip_config(source)
    assert options["extra-index-url"] == "https://b.example/whl/cu121 https://c.example" and options["user"] == "true"
    assert settings.mask_address(options["extra-index-url"]) == "https://***/cu121 https://***"
    assert settings.mask_address("https://user:key@host/whl/nightly/cu126/") == "https://***/cu126"
    assert settings.mask_address("/mnt/wheels") == "***"


PARSERS = [
    probe.parse_nvidia_smi, gpus.parse_smi_header, probe.parse_driver_version, probe.parse_proc_gpu_name, probe.parse_kfd_properties, probe.parse_agent_enumerator,
    gpus.parse_rocminfo, gpus.parse_uevent, gpus.parse_windows_driver, lambda s: gpus.parse_pci_ids(s, 0x10DE, 0x2684), probe.parse_meminfo, probe.parse_cpu_model,
    probe.parse_cpu_flags, probe.parse_os_release, probe.parse_tegra_release, libraries.parse_nvcc, libraries.parse_ldconfig, packages.parse_info_name,
    packages.parse_conda_meta_name, packages.parse_version_file, packages.parse_torch_version, packages.conda_channel, packages.cxx11_abi, settings.parse_pip_config,
    settings.mask_address, host.scrub, host.public_path, host.public_text, lambda s: probe.parse_torch_answer(1, s),
]  # fmt: skip


def garbage():
    chance = random.Random(0)
    real = [
        text
        for machine in MACHINES.values()
        for text in [*machine.files.values(), *(c if isinstance(c, str) else c[1] for c in machine.commands.values())]
        if text
    ]
    yield from (
        "",
        "\n",
        "\0" * 50,
        ":" * 300,
        "=\n=\n",
        ",,,,\n",
        "GROUNDUP {\nGROUNDUP {}\nGROUNDUP []\n",
        "[" * 1000,
        "a" * 100_000,
        "9" * 10_000,
    )
    yield ("/" * 20_000) + ("\\a" * 20_000)
    for _ in range(60):
        text = chance.choice(real)
        start = chance.randrange(len(text))
        letters = list(text[start : start + chance.randrange(1, 3000)])
        for _ in range(len(letters) // 20):
            letters[chance.randrange(len(letters))] = chr(chance.choice([0, 10, 32, 44, 48, 92, 0x4E00, 0xD7FF, chance.randrange(256)]))
        yield "".join(letters)
        yield bytes(chance.randrange(256) for _ in range(300)).decode("utf-8", "replace")


def test_no_parser_falls_over_garbage():
    began = time.monotonic()
    for text in garbage():
        for parse in PARSERS:
            json.dumps(parse(text))
    assert time.monotonic() - began < 60  # seconds: about 2; a pattern that backtracks takes minutes


# --- torch on disk ---------------------------------------------------------------------------------------------------------------


def make_torch(folder: Path, version="2.13.0+cu130", distribution="2.13.0", record=True):
    (folder / "torch").mkdir(parents=True)
    source = f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    (folder / "torch" / "version.py").write_text(source)
    info = folder / f"torch-{distribution}.dist-info"
    info.mkdir()
    if record:
        (info / "RECORD").write_text("")


def test_installed_torch_is_read_from_files(tmp_path):
    assert probe.installed_torch(tmp_path) is None
    make_torch(tmp_path / "whole")
    assert probe.installed_torch(tmp_path / "whole") == {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "distribution": "2.13.0"}
    make_torch(tmp_path / "half", record=False)
    assert probe.installed_torch(tmp_path / "half") is None


@pytest.mark.parametrize(
    ("torch_facts", "build"),
    [
        ({"version": "2.13.0+cu130", "cuda": "13.0", "hip": None}, "cu130"),
        ({"version": "2.5.1", "cuda": "12.4", "hip": None}, "cu124"),  # conda names no build in the version
        ({"version": "2.9.1+rocm6.3", "cuda": None, "hip": "6.3.42134"}, "rocm6.3"),
        ({"version": "2.7.0a0+79aa17489c.nv25.4", "cuda": "12.9", "hip": None}, "cu129"),  # NVIDIA's container
        ({"version": "2.13.0+cpu", "cuda": None, "hip": None}, "cpu"),
        ({"version": "2.9.1", "cuda": None, "hip": None}, None),
    ],
)
def test_build_of_torch(torch_facts, build):
    assert packages.torch_build(torch_facts) == build


# --- the machine through Host ----------------------------------------------------------------------------------------------------


def test_libcuda_is_asked_when_nvidia_smi_cannot_tell():
    answer = {"error": 0, "version": 13000, "gpus": [{"name": "NVIDIA GeForce GTX 1080", "memory_gb": 8.5, "compute_capability": "6.1"}]}
    commands = {
        "nvidia-smi": "",
        "nvidia-smi --query-gpu": "NVIDIA GeForce GTX 1080, 8192, [N/A], 580.65.06\n",
        "libcuda": json.dumps(answer),
    }
    facts = probe.facts(host=FakeHost({}, commands))
    assert facts["nvidia"]["gpus"][0]["compute_capability"] == "6.1"
    assert (facts["nvidia"]["driver"], facts["nvidia"]["cuda_version"]) == ("580.65.06", "13.0")
    assert plan.make_plan(facts).backend == "cu126"


def test_old_nvidia_smi_without_compute_capability_is_asked_again():
    class Old(FakeHost):
        def run(self, command, timeout, without=()):
            if "compute_cap" in " ".join(command):
                return 2, 'Field "compute_cap" is not a valid field to query.\n'
            return super().run(command, timeout, without)

    facts = probe.facts(
        host=Old({}, {"nvidia-smi": smi("440.33.01", "10.2")["nvidia-smi"], "nvidia-smi --query-gpu": "Tesla V100, 16160, 440.33.01\n"})
    )
    assert facts["nvidia"]["gpus"] == [{"name": "Tesla V100", "memory_gb": 16.9, "compute_capability": None, "mig": None}]
    assert (facts["nvidia"]["driver"], facts["nvidia"]["cuda_version"], facts["nvidia"]["problem"]) == ("440.33.01", "10.2", None)


@pytest.mark.parametrize("status", [124, 255, 6])
def test_failing_nvidia_smi_is_a_fact(status):
    facts = probe.facts(host=FakeHost({}, {"nvidia-smi": (status, "Unable to determine the device handle for GPU0: Unknown Error\n")}))
    assert facts["nvidia"]["gpus"] == [] and "Unknown Error" in facts["nvidia"]["problem"]
    assert facts["problems"] == []


def test_cpu_and_memory_limits_of_a_job():
    files = {
        "/proc/meminfo": "MemTotal: 100000000 kB\n",
        "/proc/self/cgroup": "0::/slurm/job_7/step_0\n",
        "/sys/fs/cgroup/slurm/job_7/memory.max": "17179869184\n",
        "/sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
        "/sys/fs/cgroup/slurm/job_7/cpu.max": "250000 100000\n",
    }
    facts = probe.facts(host=FakeHost(files, {}))
    assert (facts["memory"]["limit_gb"], facts["cpu"]["quota"]) == (17.2, 2.5)
    old = {
        "/proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    facts = probe.facts(host=FakeHost(old, {}))
    assert (facts["memory"]["limit_gb"], facts["cpu"]["quota"]) == (2.1, None)
    unlimited = {"/proc/self/cgroup": "4:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert probe.facts(host=FakeHost(unlimited, {}))["memory"]["limit_gb"] is None


@pytest.mark.parametrize(
    ("changes", "mixed"),
    [
        ({}, []),
        ({"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}, ["conda_around_venv"]),
        ({"VIRTUAL_ENV": "/elsewhere/.venv"}, ["venv_active_elsewhere"]),
        ({"PYTHONHOME": "/usr"}, ["pythonhome"]),
    ],
)
def test_mixed_environments(changes, mixed):
    machine = copy.deepcopy(MACHINES["healthy_cpu"])
    machine.environ.update(changes)
    assert probe.facts(host=machine)["python"]["mixed"] == mixed


def test_conda_with_another_python():
    environ = {"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}
    assert probe.facts(host=FakeHost({}, {}, environ=environ))["python"]["mixed"] == ["conda_active_elsewhere"]


@pytest.mark.parametrize(
    "method",
    ["read", "exists", "is_folder", "names", "glob", "real", "disk", "which", "run", "libc", "can_use", "cores_usable", "registry"],
)
@pytest.mark.parametrize("name", ["pascal_cuda13", "windows_no_vc_runtime"])
def test_what_fails_is_a_line_and_hides_nothing_else(method, name):
    machine = copy.deepcopy(MACHINES[name])

    def broken(*args, **options):
        raise PermissionError(13, f"denied for /home/{machine.home}")

    setattr(machine, method, broken)
    facts = probe.facts(host=machine)
    assert facts["os"]["system"] and facts["python"]["version"] and facts["schema"] == probe.SCHEMA
    json.dumps(facts)
    plan.make_plan(facts)
    assert facts["problems"] or method in ("libc", "registry", "can_use", "cores_usable", "disk")
    assert all("Error: " in line for line in facts["problems"])


def test_one_failure_at_any_moment():
    class Fragile(FakeHost):
        def read(self, path, limit=1_000_000):
            self.left -= 1
            if self.left == 0:
                raise OSError("gone")
            return super().read(path, limit)

    for moment in range(1, 50, 7):
        machine = copy.deepcopy(MACHINES["blackwell_old_wheel"])
        machine.__class__, machine.left = Fragile, moment
        facts = probe.facts(host=machine)
        assert len(facts["problems"]) == 1, moment
        json.dumps(facts)


def test_quick_asks_no_program():
    machine = copy.deepcopy(MACHINES["pascal_cuda13"])
    facts = probe.facts(quick=True, host=machine)
    assert machine.calls == []
    assert facts["nvidia"]["gpus"][0]["name"] == "NVIDIA GeForce GTX 1080" and facts["nvidia"]["driver"] == "580.95.05"
    assert facts["torch"]["arch_list"][0] == "sm_75" and facts["cuda"]["cuda_home_version"] == "12.6"


def test_shadows_are_found_on_a_real_disk(tmp_path, monkeypatch):
    (tmp_path / "here" / "numpy").mkdir(parents=True)
    (tmp_path / "here" / "numpy" / "__init__.py").write_text("")
    (tmp_path / "here" / "random.py").write_text("")
    (tmp_path / "other" / "torch").mkdir(parents=True)  # without __init__.py it loses against the installed torch
    (tmp_path / "other" / "torch.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    found = {(item["name"], item["where"]) for item in probe.facts(quick=True)["shadow"]}
    assert found == {("numpy/", "current folder"), ("random.py", "current folder"), ("torch.py", "PYTHONPATH")}


# --- this machine ----------------------------------------------------------------------------------------------------------------


def test_quick_facts_are_quick_and_import_nothing_heavy():
    code = "import sys, time; t = time.perf_counter(); from groundup.env import probe; f = probe.facts(quick=True); "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules, 'numpy' in sys.modules)"
    source = Path(probe.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r}); " + code], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == ["False", "False"]
    assert float(seconds) < 2  # about 0.1 on an idle machine, most of it imports


def test_facts_of_this_machine():
    began = time.perf_counter()
    facts = probe.facts()
    assert time.perf_counter() - began < 5  # about 0.2 on an idle machine
    assert facts["problems"] == []
    assert facts["torch"]["version"] == torch.__version__ and facts["python"]["version"] == platform.python_version()
    assert facts["cpu"]["cores"] == os.cpu_count() and facts["disk"]["free_gb"] == facts["disks"]["here"]["free_gb"]
    names = {item["name"]: item for item in facts["packages"]}
    assert names["torch"]["where"] == "environment" and names["torch"]["complete"]
    assert "pydantic" not in names


def test_deep_facts_ask_the_real_torch(monkeypatch, tmp_path):
    # A file of that name in the current folder is not run by a question.
    (tmp_path / "torch.py").write_text("open('was-run', 'w').close()\nraise SystemExit(3)\n")
    (tmp_path / "json.py").write_text("open('was-run', 'w').close()\n")
    facts = probe.facts(deep=True)
    runtime = facts["torch_runtime"]
    assert runtime["error"] is None and runtime["version"] == torch.__version__ and runtime["cuda_available"] is torch.cuda.is_available()
    assert runtime["cxx11_abi"] == torch._C._GLIBCXX_USE_CXX11_ABI and runtime["numpy"] is None
    assert not (tmp_path / "was-run").exists()
    assert {item["name"] for item in facts["shadow"]} == {"torch.py", "json.py"}
    json.dumps(facts)


def test_torch_that_cannot_be_imported_is_a_fact(tmp_path, monkeypatch):
    package = tmp_path / "somebody" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import sys\nprint('noise')\nraise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    answer = probe.TorchProbe().answer()
    assert answer["error"] == "ImportError: libcudart.so.13: cannot open shared object file"
    assert "noise" in answer["details"] and "somebody" not in json.dumps(answer)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_torch_that_crashes_is_a_fact(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe.TorchProbe().answer() == {"error": "importing torch ended with signal SIGSEGV", "details": []}


def test_what_ends_the_process_after_the_import_is_a_fact():
    imported, answered = (
        {"import_seconds": 1, "version": "2.9.1"},
        {"answer": {"cuda_available": True, "devices": ["x"]}, "warnings": ["slow"]},
    )
    answer = probe.parse_torch_answer(-11, told(imported, answered, {"importing": "torchvision"}) + "fatal: boom\n")
    assert (answer["error"], answer["warnings"], answer["devices"], answer["details"]) == (None, ["slow"], ["x"], ["fatal: boom"])
    assert answer["imports"] == {"torchvision": "ended the process with signal SIGSEGV"}
    answer = probe.parse_torch_answer(-11, told(imported))
    assert answer["error"] is None and answer["compute_error"] == "asking torch for its devices ended the process with signal SIGSEGV"
    assert answer["cuda_available"] is False and answer["arch_list"] == []
    hung = probe.parse_torch_answer(124, told(imported) + "python did not answer within 60 s\n")
    assert hung["compute_error"] == "python did not answer within 60 s"
    assert "0xc0000005" in probe.parse_torch_answer(3221225477, "")["error"]


def test_windows_folders_on_the_path_of_wsl_are_not_asked():
    machine = copy.deepcopy(MACHINES["wsl2_rtx3080"])
    machine.environ["PATH"] = "/usr/bin:/mnt/c/Windows/System32:/mnt/wslg:/mnt/d"
    assert machine.path_folders() == ["/usr/bin", "/mnt/wslg"]


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_torch_that_hangs_is_a_fact(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    began = time.monotonic()
    assert "did not end" in probe.TorchProbe(str(program), timeout=0.3).answer()["error"]
    assert time.monotonic() - began < 20


# --- privacy ---------------------------------------------------------------------------------------------------------------------


def test_nothing_private_in_the_facts_of_this_machine(monkeypatch, tmp_path):
    private = "zhang-private"
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, f"/home/{private}")
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, private)
    monkeypatch.setattr(platform, "node", lambda: private)
    monkeypatch.setattr(socket, "gethostname", lambda: private)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/home/{private}/lib:/data/{private}/cuda/lib64:/usr/local/cuda/lib64")
    monkeypatch.setenv("HF_ENDPOINT", f"https://{private}.example")
    monkeypatch.setenv("CONDA_PREFIX", f"/home/{private}/conda/envs/{private}")
    monkeypatch.setenv("CONDA_DEFAULT_ENV", private)
    monkeypatch.setenv("PIP_INDEX_URL", f"https://{private}:{private}@{private}.example/simple")
    folder = tmp_path / private
    folder.mkdir()
    monkeypatch.chdir(folder)
    facts = probe.facts(quick=True)
    assert private not in json.dumps(facts)
    assert facts["variables"]["LD_LIBRARY_PATH"] == "~/lib:/data/***/cuda/lib64:/usr/local/cuda/lib64"
    assert facts["variables"]["HF_ENDPOINT"] == facts["pip"]["index"] == "https://***"
    assert probe.scrub(f"No module in /home/{private}/x") == "No module in ~/x"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see /home/other/x and C:\\Users\\Other\\y", "see /home/***/x and C:\\Users\\***\\y"),
        ("https://me:key@host.example/whl", "https://***@host.example/whl"),
        ("\\\\server\\share\\lib", "\\\\***\\share\\lib"),
        ("nvidia-cublas-cu12 12.4.5.8 in /usr/lib", "nvidia-cublas-cu12 12.4.5.8 in /usr/lib"),
    ],
)
def test_scrub(said, shown):
    assert probe.scrub(said) == shown


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/usr/local/cuda-12.4/lib64", "/usr/local/cuda-12.4/lib64"),
        ("/opt/secret-product/lib", "/opt/***/lib"),
        ("/data/li/project/.venv/lib/python3.11/site-packages/torch/lib", "/data/***/.venv/lib/python3.11/site-packages/torch/lib"),
        ("D:\\work\\secret\\cuda\\bin", "D:\\work\\***\\cuda\\bin"),
        ("C:\\Program Files\\NVIDIA GPU Computing Toolkit\\CUDA\\v12.4", "C:\\Program Files\\NVIDIA GPU Computing Toolkit\\CUDA\\v12.4"),
        ("/scratch/li/env/lib/libmkl_core.so.2", "/scratch/***/env/lib/libmkl_core.so.2"),
        ("", ""),
    ],
)
def test_public_path(path, shown):
    assert host.public_path(path) == shown


def test_public_text_masks_paths_and_nothing_else():
    said = 'File "/data/li/x/site-packages/torch/__init__.py", line 1: and/or https://pytorch.org/get-started 3/4'
    assert host.public_text(said) == 'File "/data/***/site-packages/torch/__init__.py", line 1: and/or https://pytorch.org/get-started 3/4'
    assert host.public_text("/data/li/libtorch.so: undefined symbol: x") == "/data/***/libtorch.so: undefined symbol: x"


# --- old Pythons and languages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_parses_as_python_3_8(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    # What an annotation may say under `from __future__ import annotations` fails where it is evaluated.
    assert not re.search(r"\.removeprefix|\.removesuffix|functools\.cache\b|zip\([^)]*strict=", ast.unparse(tree))


def older_pythons():
    """Real interpreters of this machine, the stand-ins of version managers resolved."""
    root = Path.home() / ".pyenv" / "versions"
    found = sorted(root.glob("3.*/bin/python")) if root.is_dir() else []
    found += [Path(path) for path in (shutil.which(f"python3.{minor}") for minor in (8, 9, 10)) if path and "shims" not in path]
    return [path for path in found if re.search(r"3\.(8|9|10)\b", str(path))]


def test_runs_on_old_pythons():
    pythons = older_pythons()
    if not pythons:
        pytest.skip("no Python 3.8 to 3.10 on this machine")
    code = (
        f"import sys; sys.path[:0] = [{str(SOURCE.parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        "import json\nfrom groundup.env import info, lock, plan, probe\nfrom machines import MACHINES\n"
        "for machine in [None, *MACHINES.values()]:\n"
        "    facts = probe.facts(host=machine)\n"
        "    assert not facts['problems'], facts['problems']\n"
        "    json.dumps(facts), info.text_report(facts), info.report(facts, plan.make_plan(facts), 'zh')\n"
        "    assert lock.differences(lock.lock(facts, machine), facts) == []\n"
    )
    for python in pythons:
        done = subprocess.run([str(python), "-W", "error", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{python}\n{done.stderr}"


@pytest.mark.parametrize(
    ("asked", "environ", "expected"),
    [
        ("zh", {"GROUNDUP_LANG": "en"}, "zh"),
        (None, {"GROUNDUP_LANG": "zh", "LANG": "en_US.UTF-8"}, "zh"),
        (None, {"LANG": "zh_CN.UTF-8"}, "zh"),
        (None, {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        (None, {"LANG": "de_DE.UTF-8"}, "en"),
        (None, {}, "en"),
    ],
)
def test_language(asked, environ, expected, monkeypatch):
    monkeypatch.setattr(language, "_windows_is_chinese", lambda: False)
    assert language.pick(asked, environ) == expected


def test_fake_host_has_all_that_host_has():
    """A method that probes gain must be answered by the made-up machines too."""
    own = {name for name in vars(host.Host) if not name.startswith("_")}
    assert own - set(vars(FakeHost)) <= {"path_folders"}, "give FakeHost these, or they ask the real machine"
    real, fake = host.Host(), FakeHost(merge(), {})
    assert {name for name in vars(real) if not name.startswith("_")} <= set(vars(fake))
