"""The report for a person, the report to paste, and the JSON."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
from machines import MACHINES

from groundup.env import cli, info, layout, machine, plan, probe


def facts_of(name, deep=False):
    return probe.facts(deep=deep, host=copy.deepcopy(MACHINES[name]))


def person(facts, language="en"):
    return info.report(facts, plan.make_plan(facts), language)


def flat(text):
    return " ".join(text.split())


def test_json_is_one_object(capsys):
    assert cli.main(["info", "--json", "--quick"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == "" and report["schema"] == probe.SCHEMA
    assert {"os", "cpu", "memory", "disk", "disks", "python", "nvidia", "amd", "cuda", "packages", "torch", "plan", "torch_runtime"} <= set(
        report
    )
    assert set(report["plan"]["reason"]) == {"en", "zh"}


@pytest.mark.parametrize("arguments", [["--quick"], [], ["--quick", "--report"], ["--report", "--json"]])
def test_the_verb_prints(arguments, capsys):
    assert cli.main(["info", *arguments]) == 0
    out = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(out)["schema"] == probe.SCHEMA
    else:
        assert out.startswith(info.TITLE) is ("--report" in arguments)


def test_options():
    parser = argparse.ArgumentParser()
    info.configure(parser)
    options = parser.parse_args(["--deep", "--report"])
    assert (options.deep, options.quick, options.report) == (True, False, True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--deep", "--quick"])


def test_report_in_both_languages(capsys):
    for name, words in (("en", ("System", "Memory", "Fits")), ("zh", ("系统", "内存", "适用"))):
        assert cli.main(["info", "--quick", "--lang", name]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", MACHINES)
def test_person_report_fits_80_columns(name, language, deep):
    report = person(facts_of(name, deep), language)
    assert max(layout.width(line) for line in report.splitlines()) <= 80
    column = {len(re.match(r"\S.*?\s{2,}", line).group(0)) for line in report.splitlines() if line[0] != " "} if language == "en" else {1}
    assert len(column) == 1, "the second column starts at one place"


def test_long_lists_of_folders_are_broken():
    machine_facts = facts_of("pascal_cuda13")
    machine_facts["variables"]["LD_LIBRARY_PATH"] = ":".join(["/usr/lib/x86_64-linux-gnu"] * 30)
    assert max(layout.width(line) for line in person(machine_facts).splitlines()) <= 80


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fresh_ubuntu_rtx4090",
            ["GPU NVIDIA GeForce RTX 4090, 25.8 GB, compute capability 8.9", "not installed for this Python", "Fits torch 2.13.0, cu126"],
        ),
        ("pascal_cuda13", ["LD_LIBRARY_PATH: libcudnn 8.9.7", "pip index https://***", "built for sm_75"]),
        ("windows_no_vc_runtime", ["VC runtime missing: vcruntime140.dll"]),
        ("rocm_rdna2", ["gfx1031", "ROCm 6.3.3"]),
        ("container_without_gpu", ["[docker]", "limited to 8.6 GB here", "limited to 4", "0.067 GB shared memory"]),
        (
            "two_torches",
            [
                "Twice torch: 2.4.1+cu121 (user site), 2.7.1+cu126 (environment)",
                "Hidden torch.py in the current folder",
                "Unfinished ~orch",
            ],
        ),
        ("driver_mismatch", ["its library is 535.216.01", "Driver/library version mismatch"]),
        ("nouveau_secure_boot", ["nouveau is loaded, Secure Boot is on", "GA102 [GeForce RTX 3080 Lite Hash Rate] (built in"]),
        ("hgx_without_fabricmanager", ["GPU 7 x NVIDIA H100", "nvidia-fabricmanager is not running"]),
        ("hpc_login_node", ["SLURM", "also here: 3.6", "in conda (base)"]),
        ("mac_m2", ["GPU Apple M2 Pro"]),
        ("jetson_orin", ["Jetson L4T 36.4.3"]),
    ],
)
def test_person_report_says(name, words):
    report = flat(person(facts_of(name)))
    for word in words:
        assert word in report


def test_torch_that_cannot_be_imported_is_said():
    facts = facts_of("windows_no_vc_runtime", deep=True)
    assert "cannot be imported: OSError: [WinError 126]" in flat(person(facts))
    assert "无法导入：OSError" in person(facts, "zh").replace("\n", "")
    pasted = info.text_report(facts)
    assert "Import of torch: OSError: [WinError 126]" in pasted and "Is CUDA available: unknown" in pasted


def test_every_kind_of_mixing_has_a_sentence():
    found = set(re.findall(r'found\.append\("(\w+)"\)', Path(probe.__file__).read_text(encoding="utf-8")))
    assert found == set(info.MIXED)


# --- to paste --------------------------------------------------------------------------------------------------------------------


def test_pasted_report_has_the_keys_of_collect_env():
    lines = info.text_report(facts_of("blackwell_old_wheel", deep=True)).splitlines()
    assert lines[0] == "groundup environment report"
    for line in (
        "PyTorch version: 2.6.0+cu124",
        "CUDA used to build PyTorch: 12.4",
        "ROCM used to build PyTorch: N/A",
        "OS: Ubuntu 24.04.1 LTS (x86_64)",
        "Libc version: glibc-2.39",
        "Python version: 3.12.3 (CPython, 64-bit runtime)",
        "Python platform: Linux-6.8.0-45-generic-x86_64-with-glibc2.39",
        "Is CUDA available: True",
        "GPU models and configuration:",
        "GPU 0: NVIDIA GeForce RTX 5090",
        "Nvidia driver version: 575.64.03",
        "Versions of relevant libraries:",
        "[pip3] torch==2.6.0+cu124",
    ):
        assert line in lines
    conda = info.text_report(facts_of("two_torches")).splitlines()
    assert "[conda] pytorch 2.5.1 py3.10_cuda12.4_cudnn9.1.0_0 pytorch" in conda


@pytest.mark.parametrize("name", MACHINES)
def test_pasted_report_is_read_as_the_same_machine(name):
    facts = facts_of(name)
    report = info.text_report(facts)
    here, pasted = machine.from_facts(facts, report), machine.read(report)
    for key in (
        "system",
        "arch",
        "wsl",
        "container",
        "jetson",
        "libc",
        "glibc",
        "macos",
        "python",
        "conda",
        "torch",
        "build",
        "cuda_available",
        "driver",
    ):
        assert getattr(here, key) == getattr(pasted, key), key
    assert {gpu.sm for gpu in here.nvidia} <= {gpu.sm for gpu in pasted.nvidia}
    assert {gpu.gfx for gpu in here.amd} == {gpu.gfx for gpu in pasted.amd}


def test_what_is_not_there_has_no_line():
    report = info.text_report(facts_of("healthy_cpu")).lower()
    for word in (
        "container",
        "docker",
        "wsl",
        "jetson",
        "nouveau",
        "secure boot",
        "mig",
        "rosetta",
        "conda",
        "mismatch",
        "nvswitch",
        "kfd",
        "slurm",
    ):
        assert not re.search(rf"\b{word}\b", report), word


def test_one_line_per_fact():
    facts = facts_of("two_torches")
    facts["problems"].append("nvidia: OSError: denied")
    assert "Not learnt: nvidia: OSError: denied" in info.text_report(facts).splitlines()
    assert "Not learnt nvidia: OSError: denied" in flat(person(facts))
