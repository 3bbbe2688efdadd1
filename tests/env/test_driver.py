"""env driver: the right section for each system, commands for each GPU, and the drivers that the table asks for."""

import argparse
import json

import pytest

from groundup.env import driver, knowledge
from groundup.env.layout import width

UBUNTU = {"system": "Linux", "machine": "x86_64", "id": "ubuntu", "like": ["debian"], "version": "24.04", "name": "Ubuntu 24.04.1 LTS"}


def facts(os=UBUNTU, **nvidia):
    return {"os": os, "nvidia": {"driver": None, "gpus": [], "problem": None, "on_bus": 1, **nvidia}, "amd": {"gfx": [], "on_bus": 0}}


def gpu(capability, name="Some GPU"):
    return {"name": name, "compute_capability": capability}


@pytest.mark.parametrize(
    ("system", "name"),
    [
        (UBUNTU, "ubuntu"),
        ({"system": "Linux", "id": "linuxmint", "like": ["ubuntu", "debian"]}, "ubuntu"),
        ({"system": "Linux", "id": "debian", "version": "12"}, "debian"),
        ({"system": "Linux", "id": "rocky", "like": ["rhel", "centos", "fedora"], "version": "9.4"}, "rhel"),
        ({"system": "Linux", "id": "rhel", "like": ["fedora"]}, "rhel"),
        ({"system": "Linux", "id": "fedora"}, "fedora"),
        ({"system": "Linux", "id": "manjaro", "like": ["arch"]}, "arch"),
        ({"system": "Linux", "id": "opensuse-leap", "like": ["suse", "opensuse"]}, "opensuse"),
        ({"system": "Linux", "name": "Red Hat Enterprise Linux 8.10"}, "rhel"),
        ({**UBUNTU, "wsl": True}, "wsl"),
        ({**UBUNTU, "container": "docker"}, "container"),
        ({**UBUNTU, "jetson": True}, "jetson"),
        ({"system": "Windows"}, "windows"),
        ({"system": "Darwin"}, "macos"),
        ({"system": "Linux", "id": "nixos", "name": "NixOS"}, None),
    ],
)
def test_section_follows_the_system(system, name):
    assert driver.system_of({"os": system}) == name


def typed(said, vendor="nvidia"):
    return "\n".join(command for step in said["steps"][vendor] for command in step["commands"])


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (
            "ubuntu",
            ["linux-headers-$(uname -r)", "nvidia-driver-580-open", "mokutil --import", "blacklist nouveau", "nvidia-fabricmanager"],
        ),
        ("debian", ["debian12/x86_64/cuda-keyring", "nvidia-open", "update-initramfs", "cuda-drivers"]),
        ("rhel", ["rhel9/x86_64/cuda-rhel9.repo", "module enable nvidia-driver:open-dkms", "dracut", "kernel-devel"]),
        ("fedora", ["rpmfusion", "akmod-nvidia", "/etc/pki/akmods/certs/public_key.der"]),
        ("arch", ["nvidia-open-dkms", "mkinitcpio"]),
        ("opensuse", ["zypper", "nvidia-open"]),
        ("windows", ["nvidia.com/drivers", "VCRedist"]),
        ("wsl", ["wsl --update", "/usr/lib/wsl/lib/nvidia-smi"]),
        ("container", ["nvidia-container-toolkit", "nvidia-ctk runtime configure", "--gpus all"]),
        ("jetson", ["nvidia-jetpack"]),
        ("macos", []),
    ],
)
def test_every_system_has_its_commands(system, words):
    said = driver.advice({}, system, ["nvidia"])
    assert all(word in typed(said) for word in words)
    assert bool(said["requirements"]) == (system not in ("macos", "jetson"))
    for step in said["steps"]["nvidia"]:
        assert step["title"]["en"] != step["title"]["zh"] and (step["note"] is None or step["note"]["zh"])


@pytest.mark.parametrize("system", driver.SYSTEMS)
def test_amd_everywhere(system):
    assert driver.advice({}, system, ["amd"])["steps"]["amd"]


def test_the_gpu_decides_between_open_and_proprietary_modules():
    new = typed(driver.advice(facts(gpus=[gpu("12.0")])))
    old = typed(driver.advice(facts(gpus=[gpu(None, "NVIDIA GeForce GTX 1080")])))
    both = typed(driver.advice(facts()))
    assert "nvidia-driver-580-open" in new and "nvidia-driver-580\n" not in new
    assert "nvidia-driver-580\n" in old and "580-open" not in old
    assert "580-open" in both and "nvidia-driver-580\n" in both


def test_arm_servers_and_releases_have_repositories_of_their_own():
    arm = {"system": "Linux", "machine": "aarch64", "id": "debian", "version": "13"}
    assert "repos/debian13/sbsa/" in typed(driver.advice(facts(arm)))
    rocky = {"system": "Linux", "machine": "x86_64", "id": "rocky", "like": ["rhel"], "version": "10.0"}
    text = typed(driver.advice(facts(rocky)))
    assert "rhel10" in text and "module enable" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mismatch": True, "driver": "580.65"}, "reboot"),
        ({"nouveau": True}, "nouveau"),
        ({"module_built": False, "driver": "580.65"}, "kernel headers"),
        ({"secure_boot": True}, "Secure Boot"),
        ({"fabricmanager": {"needed": True, "running": False}}, "802"),
        ({}, "not installed or not loaded"),
        ({"driver": "570.86", "gpus": [gpu("8.6")]}, "CUDA 12, CUDA 11"),
        ({"driver": "580.65", "gpus": [gpu("8.6")]}, "CUDA 13, CUDA 12, CUDA 11"),
        ({"on_bus": 0}, "no GPU is seen"),
    ],
)
def test_state_of_this_machine(changes, words):
    said = [one["en"] for one in driver.advice(facts(**changes))["state"]]
    assert any(words in one for one in said), said


def test_container_without_its_gpus():
    said = driver.advice(facts({**UBUNTU, "container": "docker"}, driver="580.65"))
    assert "without its GPUs" in said["state"][0]["en"] and "--gpus all" in typed(said)


def test_requirements_come_from_the_table():
    rows = {row["cuda"]: row for row in driver.requirements(facts(driver="570.86"), "ubuntu")}
    assert rows[13]["linux"] == "580" and rows[13]["runs"] is False and "cu130" in rows[13]["builds"]
    assert rows[12]["linux"] == knowledge.driver_minimum_text("cu126", False) and rows[12]["runs"] is True
    assert {row["runs"] for row in driver.requirements({}, None)} == {None}


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lang")
    driver.configure(parser)
    status = driver.run(parser.parse_args(words))
    return status, capsys.readouterr().out


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("system", driver.SYSTEMS)
def test_report(capsys, system, language):
    status, out = run(capsys, "--for", system, "--lang", language)
    assert status == 0 and out.strip()
    assert all(width(line) <= 80 or line.startswith("       ") for line in out.splitlines())  # commands are not broken


def test_this_machine_and_json(capsys, monkeypatch):
    monkeypatch.setattr("groundup.env.probe.facts", lambda: facts(nouveau=True))
    status, out = run(capsys, "--json")
    answer = json.loads(out)
    assert status == 0 and answer["system"] == "ubuntu" and list(answer["steps"]) == ["nvidia"]
    assert "nouveau" in run(capsys, "--lang", "en")[1]
    amd = {**facts(on_bus=0), "amd": {"gfx": ["gfx1100"], "on_bus": 1}}
    assert list(driver.advice(amd)["steps"]) == ["amd"]
