"""Facts from captured texts, and what the report shows."""

import json
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groundup.env import cli, language, probe
from groundup.env.choose import choose_build

SMI = """\
NVIDIA GeForce RTX 3090, 24576, 8.6, 550.144.03
NVIDIA H100 80GB HBM3, 81559, 9.0, 550.144.03
"""


def test_nvidia_smi():
    first, second = probe.parse_nvidia_smi(SMI)
    assert first == {"name": "NVIDIA GeForce RTX 3090", "memory_gb": 25.8, "compute_capability": "8.6", "driver": "550.144.03"}
    assert second["compute_capability"] == "9.0"
    # An integrated GPU shares the machine's memory: nvidia-smi has no number for it.
    (shared,) = probe.parse_nvidia_smi("NVIDIA GB10, [N/A], 12.1, 580.95.05\n")
    assert shared["memory_gb"] is None and shared["compute_capability"] == "12.1"
    assert probe.parse_nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


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


def test_proc_gpu_reads_the_model_and_no_serial_number():
    source = "Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 142\nGPU UUID: \t GPU-1b2c\nDevice Minor: \t 0\n"
    assert probe.parse_proc_gpu_name(source) == "NVIDIA A100-SXM4-40GB"


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
    assert probe.parse_os_release('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n')["PRETTY_NAME"] == "Ubuntu 24.04.1 LTS"


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


def test_libcuda_is_asked_when_nvidia_smi_cannot_tell(monkeypatch):
    monkeypatch.setattr(probe.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)

    def answer(command, timeout):
        if command[0] == "/usr/bin/nvidia-smi":
            return 0, "NVIDIA GeForce GTX 1080, 8192, [N/A], 580.65.06\n"
        return 0, json.dumps({"error": 0, "gpus": [{"name": "NVIDIA GeForce GTX 1080", "memory_gb": 8.5, "compute_capability": "6.1"}]})

    monkeypatch.setattr(probe, "_output", answer)
    facts = probe.facts()
    assert facts["nvidia"]["gpus"][0]["compute_capability"] == "6.1"
    assert facts["nvidia"]["driver"] == "580.65.06"
    assert choose_build(facts).backend == "cu126"


def test_failing_nvidia_smi_is_a_fact(monkeypatch):
    monkeypatch.setattr(probe.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(
        probe,
        "_output",
        lambda command, timeout: (18, "Failed to initialize NVML: Driver/library version mismatch\n") if "smi" in command[0] else (1, ""),
    )
    facts = probe.facts()
    assert facts["nvidia"]["gpus"] == [] and "Driver/library version mismatch" in facts["nvidia"]["problem"]
    assert "Driver/library version mismatch" in cli.report(facts, None, choose_build(facts), "en")


def test_quick_facts_are_quick_and_import_nothing_heavy():
    code = "import sys, time; t = time.perf_counter(); from groundup.env import probe; f = probe.facts(quick=True); "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules, 'numpy' in sys.modules)"
    source = Path(probe.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r}); " + code], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == ["False", "False"]
    assert float(seconds) < 2  # about 0.02 on an idle machine


def test_json_is_one_object(capsys):
    assert cli.main(["info", "--json", "--quick"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == "" and report["schema"] == probe.SCHEMA
    assert {"os", "cpu", "memory", "disk", "python", "nvidia", "amd", "torch", "choice", "torch_runtime"} <= set(report)
    assert set(report["choice"]["reason"]) == {"en", "zh"}


def test_report_in_both_languages(capsys):
    for name, words in (("en", ("System", "Memory", "Fits")), ("zh", ("系统", "内存", "适用"))):
        assert cli.main(["info", "--quick", "--lang", name]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_nothing_private_in_the_report(monkeypatch, capsys, tmp_path):
    private = "zhang-private"
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, f"/home/{private}")
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, private)
    monkeypatch.setattr(platform, "node", lambda: private)
    monkeypatch.setattr(socket, "gethostname", lambda: private)
    folder = tmp_path / private
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert probe.scrub(f"No module in /home/{private}/x") == "No module in ~/x"
    for arguments in (["info", "--quick"], ["info", "--quick", "--json"]):
        assert cli.main(arguments) == 0
        assert private not in capsys.readouterr().out


def test_torch_that_cannot_be_imported_is_a_fact(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.13: cannot open' >&2\nexit 1\n")
    program.chmod(0o755)
    if sys.platform == "win32":
        pytest.skip("the stand-in is a shell script")
    answer = probe.TorchProbe(str(program)).answer()
    assert answer == {"error": "ImportError: libcudart.so.13: cannot open"}
    facts = dict(probe.facts(quick=True), torch={"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "distribution": "2.13.0"})
    assert "cannot be imported: ImportError" in cli.report(facts, answer, choose_build(facts), "en")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_torch_that_hangs_is_a_fact(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    began = time.monotonic()
    assert "did not end" in probe.TorchProbe(str(program), timeout=0.3).answer()["error"]
    assert time.monotonic() - began < 20


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
