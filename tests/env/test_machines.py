"""What the probe learns of whole machines, through the real code path."""

import copy
import json

import pytest
from machines import MACHINES, PRIVATE

from groundup.env import info, lock, plan, probe

UBUNTU = {"os.system": "Linux", "os.id": "ubuntu", "os.wsl": False, "os.container": None, "os.vm": None, "os.jetson": False}
EXPECTED = {
    "fresh_ubuntu_rtx4090": {
        **UBUNTU, "os.version": "24.04", "os.libc": "glibc 2.39", "cpu.avx2": True, "memory.total_gb": 67.1, "python.environment": "system",
        "python.origin": "system", "python.externally_managed": True, "python.headers": True, "python.pythons": ["3.12"], "nvidia.driver": "550.144.03",
        "nvidia.gpus": [{"name": "NVIDIA GeForce RTX 4090", "memory_gb": 25.8, "compute_capability": "8.9", "mig": None}], "nvidia.cuda_version": "12.4",
        "nvidia.kernel_module": "550.144.03", "nvidia.library": "550.144.03", "nvidia.mismatch": False, "nvidia.open_module": False, "nvidia.module_built": True,
        "nvidia.secure_boot": False, "nvidia.on_bus": 1, "nvidia.bus_names": ["AD102 [GeForce RTX 4090]"], "nvidia.devices": ["nvidia-uvm", "nvidia0", "nvidiactl"],
        "amd.gfx": ["gfx1036"], "amd.kfd": "no access", "amd.module": "kernel", "torch": None, "tools.apt-get": True, "tools.pip": False, "duplicates": [], "shadow": [],
    },
    "blackwell_old_wheel": {
        **UBUNTU, "nvidia.driver": "575.64.03", "nvidia.open_module": True, "nvidia.cuda_version": "12.9", "nvidia.gpus.0.compute_capability": "12.0",
        "intel.names": ["Raptor Lake-S GT1 [UHD Graphics 770]"], "torch.version": "2.6.0+cu124", "torch.build": "cu124", "torch.distribution": "2.6.0",
        "torch.arch_list": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], "torch.cxx11_abi": True, "torch.where": "environment",
        "python.environment": "venv", "python.active": {"venv": True, "conda": None, "pixi": False}, "python.mixed": [],
    },
    "pascal_cuda13": {
        **UBUNTU, "nvidia.driver": "580.95.05", "nvidia.gpus.0.compute_capability": "6.1", "torch.build": "cu130", "cuda.nvcc": "12.6.85", "cuda.toolkits": ["12.6"],
        "cuda.default_toolkit": "12.6", "cuda.cuda_home": True, "variables.LD_LIBRARY_PATH": "/opt/cudnn8/lib:~/***:/usr/local/cuda/lib64",
        "variables.CUDA_VISIBLE_DEVICES": "0", "pip.index": "https://***", "pip.extra_index": "https://***/cu118", "pip.proxy": "http://***",
    },
    "wsl2_rtx3080": {
        "os.wsl": True, "os.wsl_version": 2, "os.container": None, "os.vm": None, "nvidia.driver": "581.42", "nvidia.kernel_module": None, "nvidia.mismatch": None,
        "nvidia.module_built": None, "nvidia.cuda_version": "13.0", "nvidia.devices": ["dxg"], "cuda.libraries": [{"name": "libcuda", "version": None, "where": "wsl"}],
        "torch.build": "cu128", "python.version": "3.10.12",
    },
    "windows_no_vc_runtime": {
        "os.system": "Windows", "os.name": "Windows 11 10.0.22631", "os.machine": "x86_64", "os.libc": None, "cpu.model": "AMD Ryzen 7 7800X3D 8-Core Processor",
        "cpu.avx2": True, "memory.total_gb": 34.2, "disks.shm": None, "disks.here.free_gb": 120.0, "python.origin": "python.org", "python.pythons": ["3.11", "3.13"],
        "windows.vc_runtime": None, "windows.missing_dlls": ["vcruntime140.dll", "vcruntime140_1.dll", "msvcp140.dll"], "windows.long_paths": False,
        "nvidia.driver": "560.94", "nvidia.bus_names": ["NVIDIA GeForce RTX 4070"], "amd.names": ["AMD Radeon(TM) Graphics"], "torch.build": "cu126",
        "cuda.toolkits": ["11.8"], "cuda.cuda_home_version": "11.8", "variables.CUDA_PATH": "C:\\Program Files\\NVIDIA GPU Computing Toolkit\\CUDA\\v11.8",
        "pip.index": "https://***", "pip.trusted_host": True, "pip.config_files": ["user"],
    },
    "jetson_orin": {
        "os.jetson": True, "os.l4t": "36.4.3", "os.model": "NVIDIA Jetson AGX Orin Developer Kit", "os.machine": "aarch64", "cpu.model": "ARM Cortex-A78AE",
        "cpu.avx2": False, "nvidia.gpus.0.compute_capability": "8.7", "nvidia.cuda_version": "12.6", "torch.build": "cpu", "cuda.default_toolkit": "12.6",
        "cuda.libraries": [{"name": "libcudnn", "version": "9.3.0", "where": "system"}],
    },
    "rocm_rdna2": {
        **UBUNTU, "amd.gfx": ["gfx1031"], "amd.rocm": "6.3.3", "amd.kfd": "ok", "amd.module": "6.10.5", "nvidia.on_bus": 0, "torch.build": "rocm6.3",
        "torch.hip": "6.3.42134-a9a80e791", "variables": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"},
    },
    "mac_m2": {
        "os.system": "Darwin", "os.name": "macOS 15.1", "os.machine": "aarch64", "os.rosetta": False, "apple": {"chip": "Apple M2 Pro", "macos": "15.1"},
        "cpu.bf16": True, "memory.total_gb": 17.2, "python.origin": "homebrew", "torch.version": "2.9.1", "torch.build": None, "nvidia.on_bus": None,
    },
    "mac_intel": {
        "os.system": "Darwin", "os.machine": "x86_64", "apple.macos": "13.6", "cpu.avx2": True, "cpu.avx512": False, "python.environment": "system",
        "python.origin": "python.org", "torch": None,
    },
    "container_without_gpu": {
        "os.container": "docker", "memory.limit_gb": 8.6, "cpu.quota": 4.0, "cpu.avx512": True, "disks.shm": {"free_gb": 0.067, "total_gb": 0.067},
        "nvidia.driver": "550.90.07", "nvidia.gpus": [], "nvidia.devices": [], "nvidia.smi": False, "nvidia.on_bus": 1, "nvidia.library": None,
        "variables.NVIDIA_VISIBLE_DEVICES": "void", "torch.build": "cu124", "torch.version": "2.5.1+cu124",
    },
    "hpc_login_node": {
        "os.id": "centos", "os.libc": "glibc 2.17", "os.hpc": {"scheduler": "slurm", "in_job": False, "modules": "environment-modules", "loaded": ["cuda/12.1", "gcc/11.2.0"]},
        "python.environment": "conda", "python.active.conda": "base", "python.pythons": ["3.6", "3.11"], "disks.here.free_gb": 2.1, "disks.temporary.free_gb": 9000.0,
        "nvidia.on_bus": 0, "cuda.nvcc": "12.1.105", "cuda.libraries": [{"name": "libcudart", "version": "12.1.105", "where": "LD_LIBRARY_PATH"}], "torch": None,
        "duplicates": [], "python.mixed": [], "variables.TMPDIR": "/scratch/***/tmp",
    },
    "two_torches": {
        "torch.version": "2.4.1+cu121", "torch.where": "user site", "python.mixed": ["packages_in_user_site", "pip_and_conda"], "python.active.conda": "llm",
        "leftovers": ["~orch-2.7.0.dist-info"],
        "shadow": [
            {"name": "torch.py", "module": "torch", "where": "current folder"}, {"name": "torchvision/", "module": "torchvision", "where": "current folder"},
            {"name": "random.py", "module": "random", "where": "current folder"},
        ],
    },
    "gh200_cpu_wheel": {
        **UBUNTU, "os.machine": "aarch64", "cpu.model": "ARM Neoverse-V2", "cpu.bf16": True, "nvidia.gpus.0.name": "NVIDIA GH200 480GB", "nvidia.gpus.0.mig": False,
        "nvidia.open_module": True, "torch.version": "2.9.1+cpu", "torch.build": "cpu", "torch.arch_list": [],
    },
    "driver_mismatch": {
        "nvidia.driver": "535.183.01", "nvidia.kernel_module": "535.183.01", "nvidia.library": "535.216.01", "nvidia.mismatch": True, "nvidia.gpus": [],
        "nvidia.cuinit": 803,
        "nvidia.problem": "Failed to initialize NVML: Driver/library version mismatch NVML library version: 535.216 [cuInit: error 803]",
    },
    "nouveau_secure_boot": {
        "os.id": "fedora", "nvidia.driver": None, "nvidia.nouveau": True, "nvidia.secure_boot": True, "nvidia.module_built": True, "nvidia.library": "565.77",
        "nvidia.bus_drivers": ["nouveau"], "nvidia.gpus": [], "nvidia.devices": [], "nvidia.smi": True,
    },
    "hgx_without_fabricmanager": {
        "nvidia.on_bus": 8, "nvidia.fabricmanager": {"needed": True, "running": False}, "nvidia.gpus.0.mig": True, "nvidia.gpus.7.mig": False, "cpu.amx": True,
        "cpu.bf16": True, "variables.CUDA_VISIBLE_DEVICES": "MIG-***",
    },
    "windows_bare": {
        "os.release": "10", "python.origin": "microsoft store", "windows.vc_runtime": "14.42.34433.00", "windows.missing_dlls": [], "windows.long_paths": None,
        "intel.names": ["Intel(R) UHD Graphics 630"], "nvidia.driver": None, "torch": None,
    },
    "healthy_cpu": {**UBUNTU, "os.vm": "Google Cloud", "nvidia.driver": None, "nvidia.problem": None, "torch.build": "cpu", "duplicates": [], "shadow": [], "leftovers": []},
}  # fmt: skip


def at(facts, path):
    value = facts
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.fixture(scope="module")
def learnt():
    """Facts of each machine, gathered once."""
    return {name: probe.facts(host=copy.deepcopy(machine)) for name, machine in MACHINES.items()}


def test_every_machine_is_expected():
    assert set(EXPECTED) == set(MACHINES) and len(MACHINES) >= 15


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, expected in EXPECTED.items() for path in expected])
def test_fact(name, path, learnt):
    assert at(learnt[name], path) == EXPECTED[name][path]


@pytest.mark.parametrize("name", MACHINES)
def test_facts_have_one_shape_and_no_problem(name, learnt):
    facts, usual = learnt[name], learnt["healthy_cpu"]
    assert facts["problems"] == [] and facts["schema"] == "groundup.env.facts/1"
    assert list(facts) == list(usual)
    for group in ("os", "cpu", "memory", "disks", "python", "windows", "nvidia", "amd", "intel", "apple", "cuda", "pip", "tools"):
        assert set(facts[group]) == set(usual[group]), group
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", MACHINES)
def test_nothing_private_comes_out(name, deep, learnt):
    machine = copy.deepcopy(MACHINES[name])
    facts = probe.facts(deep=deep, host=machine)
    fits = plan.make_plan(facts)
    written = [
        json.dumps(facts, ensure_ascii=False),
        info.text_report(facts),
        info.report(facts, fits, "en"),
        info.report(facts, fits, "zh"),
    ]
    written.append(json.dumps(lock.lock(facts, machine)))
    for text in written:
        assert not [word for word in PRIVATE if word in text]


def names(packages, *keys):
    return [tuple(item[key] for key in keys) for item in packages]


def test_two_torches_are_both_listed(learnt):
    facts = learnt["two_torches"]
    torches = [item for item in facts["duplicates"] if item["name"] == "torch"]
    assert names(torches[0]["copies"], "version", "build", "installer", "where") == [
        ("2.4.1", "cu121", "pip", "user site"),
        ("2.7.1", "cu126", "pip", "environment"),
        ("2.5.1", "py3.10_cuda12.4_cudnn9.1.0_0", "conda", "conda"),
    ]
    channels = {item["name"]: item["channel"] for item in facts["packages"] if item["where"] == "conda"}
    assert channels == {"pytorch": "pytorch", "numpy": "conda-forge"}


def test_conda_and_its_metadata_are_one_copy(learnt):
    facts = learnt["hpc_login_node"]
    numpy = [item for item in facts["packages"] if item["name"] == "numpy"]
    assert names(numpy, "installer", "where", "build") == [("conda", "environment", None), ("conda", "conda", "py311h08b1b3b_0")]
    assert facts["duplicates"] == []


def test_libraries_in_the_order_of_the_loader(learnt):
    found = names(learnt["pascal_cuda13"]["cuda"]["libraries"], "name", "version", "where")
    assert found == [
        ("libcudnn", "8.9.7", "LD_LIBRARY_PATH"),
        ("libnvJitLink", "12.1.105", "LD_LIBRARY_PATH"),
        ("libcudart", "12.6.77", "LD_LIBRARY_PATH"),
        ("libcudart", "12.6.77", "toolkit"),
        ("libcuda", "580.95.05", "system"),
        ("libcudart", "13.0.96", "python"),
        ("libcudnn", "9.15.1.9", "python"),
        ("libnccl", "2.28.9", "python"),
    ]


def test_wheels_name_their_build_where_the_module_does(learnt):
    packages = {item["name"]: item for item in learnt["blackwell_old_wheel"]["packages"]}
    assert (packages["torch"]["version"], packages["torch"]["build"]) == ("2.6.0", "cu124")
    assert packages["torchvision"]["build"] == "cu124" and "requests" not in packages
    assert {item["installer"] for item in learnt["pascal_cuda13"]["packages"]} == {"pip", "uv"}


def test_deep_asks_torch_and_its_companions():
    facts = probe.facts(deep=True, host=copy.deepcopy(MACHINES["blackwell_old_wheel"]))
    runtime = facts["torch_runtime"]
    assert runtime["error"] is None and "no kernel image" in runtime["compute_error"] and "sm_120" in runtime["warnings"][0]
    assert runtime["imports"] == {"torchvision": None, "torchaudio": "OSError: libcudart.so.13: cannot open shared object file"}
    assert names(runtime["loaded"], "name", "version", "where") == [("libcuda", "575.64.03", "system"), ("libcudnn", "9", "python")]
    assert facts["nvidia"]["cuinit"] == 0


def test_deep_on_windows_keeps_the_error_and_masks_the_folder():
    runtime = probe.facts(deep=True, host=copy.deepcopy(MACHINES["windows_no_vc_runtime"]))["torch_runtime"]
    assert "WinError 126" in runtime["error"] and "torch\\lib\\c10.dll" in runtime["error"]
    assert any("Traceback" in line for line in runtime["details"])


def test_deep_asks_rocminfo_and_libcuda():
    assert probe.facts(deep=True, host=copy.deepcopy(MACHINES["rocm_rdna2"]))["amd"]["names"] == ["AMD Radeon RX 6700"]
    nvidia = probe.facts(deep=True, host=copy.deepcopy(MACHINES["hgx_without_fabricmanager"]))["nvidia"]
    assert nvidia["cuinit"] == 802 and len(nvidia["gpus"]) == 8


def test_user_cannot_be_named_like_a_part_that_says_something():
    machine = copy.deepcopy(MACHINES["blackwell_old_wheel"])
    machine.environ.update(USER="torch", LD_LIBRARY_PATH="/usr/lib/torch/lib")
    assert probe.facts(host=machine)["variables"]["LD_LIBRARY_PATH"] == "/usr/lib/torch/lib"
