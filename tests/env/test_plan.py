"""make_plan on tables of facts: every build, every wall, what changes in an existing environment, and what is shown."""

import argparse
import json
import tomllib
from pathlib import Path

import pytest

from groundup.env import constraints, knowledge, plan
from groundup.env.layout import columns, shown, width, wrapped
from groundup.env.plan import TORCH, make_plan

INDEX = "https://download.pytorch.org/whl"
GROUNDUP = {"oldest": plan.OLDEST}  # how start.py asks


def machine(**changes):
    """Facts of an ordinary Linux machine without a GPU; `os__libc="musl"` changes one value, `torch=...` a whole group."""
    facts = {
        "os": {
            "system": "Linux",
            "machine": "x86_64",
            "libc": "glibc 2.36",
            "wsl": False,
            "container": None,
            "jetson": False,
            "rosetta": False,
        },
        "python": {"version": "3.12.4", "implementation": "CPython", "bits": 64, "free_threaded": False, "environment": "venv"},
        "nvidia": {"driver": None, "gpus": [], "problem": None, "on_bus": 0},
        "amd": {"gfx": [], "on_bus": 0},
        "apple": {"chip": None, "macos": None},
        "disk": {"free_gb": 100.0},
    }
    for path, value in changes.items():
        group, _, key = path.partition("__")
        if key:
            facts[group][key] = value
        else:
            facts[group] = value
    return facts


def nvidia(driver, *capabilities, **changes):
    """GPUs by compute capability, or by name where that has a space."""
    gpus = [{"name": c, "compute_capability": None} if " " in c else {"name": f"GPU {c}", "compute_capability": c} for c in capabilities]
    return machine(nvidia__driver=driver, nvidia__gpus=gpus, **changes)


def mac(macos="15.1", **changes):
    changes = {"os__machine": "aarch64", "apple__chip": "Apple M2", **changes}
    return machine(os__system="Darwin", os__libc=None, apple__macos=macos, **changes)


def windows(facts):
    facts["os"].update(system="Windows", libc=None)
    return facts


def installed(facts, torch, **others):
    """The same machine with torch '2.9.1+cu128' and other distributions in the environment."""
    packages = [
        {"name": n.replace("_", "-"), "version": v.partition("+")[0], "build": v.partition("+")[2] or None} for n, v in others.items()
    ]
    return {**facts, "torch": {"version": torch, "distribution": torch}, "packages": packages}


def build(plan):
    return plan.torch_version, plan.backend


# --- NVIDIA ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "gpu", "torch", "backend"),
    [
        ("580.65.06", "8.6", TORCH, "cu130"),
        ("580.95.05", "NVIDIA GeForce RTX 4090", TORCH, "cu130"),  # the name tells the capability
        ("595.10", "12.0", TORCH, "cu130"),
        ("580.65.06", "10.3", TORCH, "cu130"),  # sm_100 kernels run on 10.3
        ("580.65.06", "8.9", TORCH, "cu130"),  # sm_86 kernels run on 8.9
        ("580.65.06", "13.0", TORCH, "cu130"),  # a future GPU: PTX
        ("580.65.06", "7.5", TORCH, "cu130"),
        ("580.65.06", "7.0", TORCH, "cu126"),  # Volta: a driver new enough for CUDA 13, which has no kernels for it
        ("580.65.06", "NVIDIA GeForce GTX 1080 Ti", TORCH, "cu126"),
        ("580.65.06", "5.2", TORCH, "cu126"),
        ("570.86.10", "9.0", TORCH, "cu126"),
        ("525.60.13", "8.6", TORCH, "cu126"),  # exactly the minimum of CUDA 12
        ("575.57.08", "12.0", "2.11.0", "cu128"),  # Blackwell with a driver too old for CUDA 13
        ("580.65.06", "3.5", TORCH, "cpu"),  # Kepler: no kernels anywhere
        ("380.10", "8.6", TORCH, "cpu"),
    ],
)
@pytest.mark.parametrize("oldest", [None, plan.OLDEST])
def test_driver_and_gpu_decide_together(driver, gpu, torch, backend, oldest):
    found = make_plan(nvidia(driver, gpu), oldest=oldest)
    assert build(found) == (torch, backend) and found.refused is None
    assert found.device == ("cpu" if backend == "cpu" else "cuda")
    assert gpu in found.reason["en"] and gpu in found.reason["zh"]
    if backend != "cpu":
        assert found.pip_args == (f"torch=={torch}+{backend}", "--index-url", f"{INDEX}/{backend}")
        assert all(row.satisfied for row in found.constraints)


@pytest.mark.parametrize(
    ("driver", "gpu", "general"),
    [("525.60.12", "8.6", ("2.7.1", "cu118")), ("470.82.01", "8.6", ("2.7.1", "cu118")), ("470.82.01", "3.7", ("2.7.1", "cu118"))],
)
def test_old_driver_or_gpu_gets_an_older_release_but_groundup_the_cpu(driver, gpu, general):
    found = make_plan(nvidia(driver, gpu))
    assert build(found) == general
    assert any("groundup itself needs" in note["en"] for note in found.notes)
    own = make_plan(nvidia(driver, gpu), **GROUNDUP)
    assert build(own) == (TORCH, "cpu") and "needs a driver >= 525.60.13" in own.reason["en"]


def test_newer_driver_is_offered():
    ways = [way.says["en"] for way in make_plan(nvidia("570.86.10", "12.0")).alternatives]
    assert any(f"torch {TORCH}+cu130 with: an NVIDIA driver >= 580" in way for way in ways)
    assert make_plan(nvidia("580.65.06", "12.0")).alternatives == ()


@pytest.mark.parametrize(
    ("facts", "backend"),
    [
        (windows(nvidia("528.33", "8.6")), "cu126"),
        (windows(nvidia("528.24", "8.6")), "cpu"),  # enough on Linux only
        (nvidia("528.24", "8.6", os__wsl=True), "cpu"),  # under WSL the driver is the one of Windows
        (nvidia("581.42", "8.9", os__wsl=True), "cu130"),
        (nvidia("580.95.05", "9.0", os__machine="aarch64"), "cu130"),
        (nvidia("560.35.05", "NVIDIA GH200 480GB", os__machine="aarch64"), "cu126"),
        (nvidia("580.95.05", "7.0", os__machine="aarch64"), "cpu"),  # no ARM build has kernels for it
        (windows(nvidia("580.95.05", "8.6", os__machine="aarch64")), "cpu"),
    ],
)
def test_platform_changes_the_rule(facts, backend):
    assert make_plan(facts, **GROUNDUP).backend == backend


def test_mixed_gpus_get_the_build_that_serves_most():
    found = make_plan(nvidia("580.65.06", "6.1", "6.1", "12.0"))
    assert found.backend == "cu126"
    assert "GPU 12.0" in found.reason["en"].split("no kernels for")[1]
    assert make_plan(nvidia("580.65.06", "6.1", "8.6")).backend == "cu126"  # serves both
    assert make_plan(nvidia("580.65.06", "6.1", "12.0")).backend == "cu130"  # equal: the newer build


def test_unknown_capability_is_decided_by_the_driver_and_unknown_driver_by_the_gpu():
    facts = nvidia("580.65.06", "8.6")
    facts["nvidia"]["gpus"][0].update(name="Some GPU", compute_capability=None)
    assert make_plan(facts).backend == "cu130"
    found = make_plan(nvidia(None, "6.1"))
    assert found.backend == "cu126" and any("nvidia-smi" in note["en"] for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no GPU that torch can use"),
        ({"nvidia__on_bus": 1}, "driver is not installed"),
        ({"nvidia__driver": "580.65.06", "nvidia__on_bus": 1}, "no GPU answers"),
        ({"nvidia__driver": "580.65.06", "os__container": "docker"}, "--gpus all"),
        ({"nvidia__problem": "Driver/library version mismatch"}, "Driver/library version mismatch"),
        ({"amd__on_bus": 1}, "AMD GPU is built in"),
        ({"amd__gfx": ["gfx1036"]}, "gfx1036"),
    ],
)
def test_cpu_says_why_no_gpu_is_used(changes, words):
    found = make_plan(machine(**changes))
    assert found.backend == "cpu" and words in found.reason["en"]
    # An extra index, so that it works where PyTorch's own cannot be reached.
    assert found.pip_args == (f"torch=={TORCH}", "--extra-index-url", f"{INDEX}/cpu")
    assert found.pip_args_without_index == (*found.pip_args, "--retries", "0")


# --- AMD, Intel, Apple -----------------------------------------------------------------------------------------------------------


def test_rocm():
    found = make_plan(machine(amd__gfx=["gfx1036", "gfx1100"]))
    assert found.backend == "rocm7.2" and found.device == "cuda"
    assert found.pip_args == (f"torch=={TORCH}+rocm7.2", "--index-url", f"{INDEX}/rocm7.2")
    assert make_plan(nvidia("470.82.01", "8.6", amd__gfx=["gfx90a"])).backend == "rocm7.2"
    assert make_plan(nvidia("580.65.06", "8.6", amd__gfx=["gfx90a"])).backend == "cu130"
    unsupported = make_plan(machine(amd__gfx=["gfx1031"]))
    assert unsupported.backend == "cpu" and "no kernels for gfx1031" in unsupported.reason["en"]
    assert any("HSA_OVERRIDE_GFX_VERSION=10.3.0" in note["en"] and "unofficial" in note["en"] for note in unsupported.notes)


def test_intel_gpu_is_only_mentioned():
    found = make_plan(machine(intel={"names": ["DG2 [Arc A770]"]}))
    assert found.backend == "cpu" and any("--backend xpu" in note["en"] for note in found.notes)
    assert make_plan(machine(intel={"names": ["UHD Graphics 770"]})).notes == ()
    asked = make_plan(machine(intel={"names": ["DG2 [Arc A770]"]}), backend="xpu")
    assert (asked.backend, asked.device, asked.index_url) == ("xpu", "xpu", f"{INDEX}/xpu")


def test_mac():
    assert (make_plan(mac()).backend, make_plan(mac()).device) == ("mps", "mps")
    assert make_plan(mac()).pip_args == (f"torch=={TORCH}",)
    assert make_plan(mac(), backend="cpu").device == "cpu"
    assert build(make_plan(mac("13.6"))) == ("2.9.1", "mps")
    old = make_plan(mac("13.6"), **GROUNDUP)
    assert build(old) == (TORCH, "cpu") and "macOS 14" in old.reason["en"]
    assert make_plan(mac("13.6"), backend="mps", **GROUNDUP).refused
    assert make_plan(mac(), backend="cu130").refused
    intel = make_plan(mac(os__machine="x86_64", apple__chip=None))
    assert build(intel) == ("2.2.2", "cpu") and intel.pip_args == ("torch==2.2.2", "numpy<2")


# --- walls and wishes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "en", "zh"),
    [
        (mac(os__rosetta=True, os__machine="x86_64"), "Rosetta", "Rosetta"),
        (mac(os__machine="x86_64"), "Intel Mac", "Intel 芯片 Mac"),
        (machine(os__jetson=True, os__machine="aarch64"), "JetPack", "JetPack"),
        (machine(os__libc="musl"), "musl", "musl"),
        (machine(os__libc="glibc 2.17"), "2.28", "2.28"),
        (machine(os__machine="riscv64"), "riscv64", "riscv64"),
        (machine(python__bits=32), "32-bit", "32 位"),
        (machine(python__free_threaded=True), "free-threaded", "自由线程"),
        (machine(python__implementation="PyPy"), "PyPy", "PyPy"),
        (machine(python__version="3.15.0"), "3.10 - 3.14", "3.10 - 3.14"),
    ],
)
def test_walls_are_refused_in_both_languages(facts, en, zh):
    found = make_plan(facts, **GROUNDUP)
    assert found.refused and en in found.refused["en"] and zh in found.refused["zh"]
    assert found.pip_args == () and found.commands == ()
    # No wish can climb a wall of the machine.
    assert make_plan(facts, backend="cpu", **GROUNDUP).refused


@pytest.mark.parametrize(
    ("facts", "torch", "backend"),
    [
        (machine(os__libc="glibc 2.17"), "2.6.0", "cpu"),
        (nvidia("550.54", "8.0", os__libc="glibc 2.17"), "2.6.0", "cu124"),
        (machine(os__libc="glibc 2.17", os__machine="aarch64"), "2.5.1", "cpu"),
        (machine(python__version="3.8.10"), "2.4.1", "cpu"),
        (nvidia("550.54", "8.6", python__version="3.8.10"), "2.4.1", "cu121"),
        (nvidia("470.82", "8.6", python__version="3.14.0"), TORCH, "cpu"),  # no release for 3.14 has CUDA 11
    ],
)
def test_older_systems_get_the_newest_release_that_fits(facts, torch, backend):
    assert build(make_plan(facts)) == (torch, backend)


@pytest.mark.parametrize(
    ("facts", "wish", "words"),
    [
        (nvidia("550.144.03", "8.6"), {"backend": "cu130"}, "550.144.03"),
        (nvidia("580.65.06", "6.1"), {"backend": "cu130"}, "no kernels"),
        (nvidia("580.65.06", "12.0"), {"backend": "cu126"}, "no kernels"),
        (nvidia("580.65.06", "12.0"), {"torch": "2.5.1"}, "no kernels"),
        (nvidia("580.65.06", "8.6", python__version="3.14.0"), {"torch": "2.5.1"}, "3.9 - 3.12"),
        (machine(), {"backend": "cu999"}, "cu999"),
        (machine(), {"torch": "0.4.1"}, "0.4.1"),
        (machine(), {"torch": "2.13.0+cu118"}, "does not exist"),
        (machine(), {"backend": "mps"}, "no wheels for Linux"),
        (machine(os__machine="aarch64"), {"backend": "rocm7.2"}, "no wheels for Linux aarch64"),
        (machine(amd__gfx=["gfx1100"]), {"manager": "conda"}, "conda-forge"),
    ],
)
def test_impossible_wishes_are_refused_with_the_reason(facts, wish, words):
    found = make_plan(facts, **wish)
    assert found.refused and words in found.refused["en"] and found.refused["zh"] != found.refused["en"]


@pytest.mark.parametrize(
    ("facts", "wish", "fixes", "commands"),
    [
        (nvidia("580.65.06", "NVIDIA GeForce RTX 5090"), "2.5.1", ["torch 2.7 (cu128)"], [f"torch=={TORCH}+cu130", "torch==2.5.1 "]),
        (nvidia("580.65.06", "8.6", python__version="3.14.0"), "2.5.1", ["Python 3.9 - 3.12", "torch 2.9 to"], [f"torch=={TORCH}+cu130"]),
        (nvidia("470.82.01", "8.6"), "2.9.1", ["driver >= 525.60.13"], ["torch==2.7.1+cu118", "torch==2.9.1 "]),
    ],
)
def test_alternatives_to_an_impossible_version(facts, wish, fixes, commands):
    ways = make_plan(facts, torch=wish).alternatives
    said = "\n".join(way.says["en"] for way in ways)
    typed = "\n".join(shown(command) for way in ways for command in way.commands)
    assert all(word in said for word in fixes) and all(word in typed for word in commands)


def test_possible_wishes_are_granted():
    gpu = nvidia("580.65.06", "8.6")
    assert make_plan(gpu, backend="cu126").backend == "cu126"
    assert make_plan(gpu, backend="cpu").backend == "cpu"
    assert build(make_plan(gpu, backend="cu128")) == ("2.11.0", "cu128")  # the last release that has it
    assert build(make_plan(gpu, torch="2.9")) == ("2.9.1", "cu128")
    assert build(make_plan(gpu, torch="2.9.0+cu126")) == ("2.9.0", "cu126")
    # Preparing an image on a machine without a GPU: possible, and verified on the CPU.
    prepared = make_plan(machine(), backend="cu130")
    assert (prepared.backend, prepared.device, prepared.refused) == ("cu130", "cpu", None)
    assert "until one does" in prepared.reason["en"]


def test_release_newer_than_the_table_is_judged_as_the_newest():
    found = make_plan(nvidia("580.65.06", "8.6"), torch="2.99.0")
    assert found.torch_version == "2.99.0" and found.backend.startswith("cu13")
    assert any("newer than this program's table" in note["en"] for note in found.notes)


# --- companions, managers, mirrors -----------------------------------------------------------------------------------------------


def test_companions_come_from_the_same_index_and_build():
    gpu = nvidia("570.86.10", "12.0")
    found = make_plan(gpu, companions=["torchvision", "torchaudio"])
    # From 2.11 on torchaudio fits every build.
    assert found.pip_args[:3] == ("torch==2.11.0+cu128", "torchvision==0.26.0+cu128", "torchaudio==2.11.0")
    older = make_plan(gpu, torch="2.9.1", companions=["torchvision", "torchaudio"])
    assert older.pip_args[:3] == ("torch==2.9.1+cu128", "torchvision==0.24.1+cu128", "torchaudio==2.9.1+cu128")
    unlisted = make_plan(gpu, torch="2.12.0", backend="cpu", companions=["torchvision"])
    assert unlisted.pip_args[1] == "torchvision==0.27.*"


@pytest.mark.parametrize(
    ("manager", "facts", "expected"),
    [
        ("pip", nvidia("580.65", "8.6"), f"python -m pip install torch=={TORCH}+cu130 --index-url {INDEX}/cu130"),
        ("uv", nvidia("580.65", "8.6"), f"uv pip install torch=={TORCH}+cu130 --index-url {INDEX}/cu130"),
        ("conda", nvidia("580.65", "8.6"), "conda install -c conda-forge 'pytorch-gpu=2.13.*' cuda-version=13"),
        ("conda", nvidia("550.65", "8.6"), "conda install -c conda-forge 'pytorch-gpu=2.13.*' cuda-version=12"),
        ("conda", machine(), "conda install -c conda-forge 'pytorch=2.13.*'"),
    ],
)
def test_package_managers(manager, facts, expected):
    found = make_plan(facts, manager=manager)
    assert expected in [shown(command) for command in found.commands]
    assert any("channel ended" in note["en"] for note in found.notes) == (manager == "conda")


def test_torch_of_conda_is_not_mixed_with_pip():
    facts = machine(python__environment="conda", packages=[{"name": "pytorch", "version": "2.5.1", "build": "cpu", "where": "conda"}])
    assert any("--manager conda" in note["en"] for note in make_plan(facts).notes)
    assert not any("--manager conda" in note["en"] for note in make_plan(facts, manager="conda").notes)


def test_a_bare_python_gets_a_venv_first():
    facts = nvidia("580.65", "8.6", python__environment="system")
    assert [shown(command) for command in make_plan(facts).commands][:2] == ["python3 -m venv .venv", "source .venv/bin/activate"]
    typed = [shown(command, True) for command in make_plan(windows(facts)).commands]
    assert typed[:2] == ["py -m venv .venv", ".venv\\Scripts\\activate"]
    assert "--index-url" in typed[2] and typed[3].startswith('python -c "import torch')


def test_default_index_stands_in_only_for_its_own_cuda_build():
    gpu = nvidia("580.65.06", "8.6")
    assert make_plan(gpu, backend="cu130").pip_args_without_index == (f"torch=={TORCH}",)
    assert make_plan(gpu, backend="cu126").pip_args_without_index is None
    assert make_plan(nvidia("580.95", "9.0", os__machine="aarch64")).pip_args_without_index is None
    assert make_plan(windows(nvidia("580.95", "9.0"))).pip_args_without_index is None


def test_mirrors_and_offline(monkeypatch):
    gpu = nvidia("580.65.06", "8.6")
    assert make_plan(gpu, index="https://mirror.example/whl/").pip_args[2] == "https://mirror.example/whl/cu130"
    assert make_plan(gpu, index="https://mirror.example/whl/cu130").pip_args[2] == "https://mirror.example/whl/cu130"
    monkeypatch.setenv("GROUNDUP_TORCH_INDEX", "https://other.example")
    assert make_plan(gpu).pip_args[2] == "https://other.example/cu130"
    offline = make_plan(gpu, find_links="wheels")
    assert offline.pip_args[1:] == ("--find-links", "wheels", "--no-index") and offline.index_url is None
    both = make_plan(gpu, find_links="wheels", index="https://mirror.example")
    assert both.pip_args[1:] == ("--find-links", "wheels", "--index-url", "https://mirror.example/cu130")


def test_credentials_are_not_shown():
    found = make_plan(nvidia("580.65", "8.6"), index="https://user:secret@mirror.example/whl")
    assert "secret" in " ".join(found.pip_args)  # pip gets them
    for said in (plan.report(found, "en"), json.dumps(plan.as_dict(found))):
        assert "secret" not in said and "***@mirror.example" in said


# --- existing environments -------------------------------------------------------------------------------------------------------

GPU = nvidia("580.65.06", "8.6")


def changes(found):
    return {change.name: (change.before, change.after) for change in found.changes if change.action == "replace"}


def test_what_works_is_kept_and_upgrade_takes_the_newest():
    facts = installed(GPU, "2.9.1+cu128", torchvision="0.24.1+cu128")
    kept = make_plan(facts)
    assert build(kept) == ("2.9.1", "cu128") and kept.commands == () and changes(kept) == {}
    assert "nothing to do" in plan.report(kept, "en")
    new = make_plan(facts, upgrade=True)
    assert changes(new) == {"torch": ("2.9.1+cu128", f"{TORCH}+cu130"), "torchvision": ("0.24.1+cu128", "0.28.0+cu130")}
    assert new.uninstall == ("torch", "torchvision")
    newer = installed(GPU, "2.14.1+cu130")
    assert changes(make_plan(newer, upgrade=True)) == {}  # an upgrade never goes back


def test_a_cpu_build_beside_a_gpu_is_switched_at_the_same_release():
    found = make_plan(installed(GPU, "2.9.1+cpu", torchvision="0.24.1+cpu"))
    assert changes(found) == {"torch": ("2.9.1+cpu", "2.9.1+cu128"), "torchvision": ("0.24.1+cpu", "0.24.1+cu128")}
    typed = [shown(command) for command in found.commands]
    assert typed[0] == "python -m pip uninstall -y torch torchvision" and "torch==2.9.1+cu128" in typed[1]


def test_switch_keeps_the_release_where_it_can():
    facts = installed(GPU, "2.9.1+cpu", torchvision="0.24.1+cpu", torchaudio="2.9.1+cpu")
    found = make_plan(facts, switch="cu126")
    assert build(found) == ("2.9.1", "cu126") and found.uninstall == ("torch", "torchvision", "torchaudio")
    assert shown(found.commands[0]) == "python -m pip uninstall -y torch torchvision torchaudio"
    back = make_plan(installed(GPU, "2.9.1+cu126", nvidia_cublas_cu12="12.6.4.1"), switch="cpu")
    assert back.pip_args[0] == "torch==2.9.1+cpu"  # named, because pip would keep the CUDA build of the same version
    assert any("nvidia-cublas-cu12" in note["en"] for note in back.notes)
    gone = make_plan(facts, switch="cu121")
    assert gone.torch_version == "2.5.1" and "cu121 was asked for" in gone.reason["en"]


def test_a_build_that_cannot_run_is_replaced():
    pascal = nvidia("580.65.06", "6.1")
    assert build(make_plan(installed(pascal, "2.13.0+cu130"))) == (TORCH, "cu126")
    assert build(make_plan(installed(nvidia("550.54", "8.6"), "2.13.0+cu130"))) == (TORCH, "cu126")
    mismatched = make_plan(installed(GPU, "2.13.0+cu130", torchvision="0.27.1+cu130"))
    assert changes(mismatched) == {"torchvision": ("0.27.1+cu130", "0.28.0+cu130")} and mismatched.uninstall == ()


def test_the_default_cuda_build_is_kept_where_there_is_no_gpu():
    facts = machine(torch={"version": "2.13.0+cu130", "distribution": "2.13.0", "cuda": "13.0", "hip": None})
    assert changes(make_plan(facts)) == {}
    assert installed_text(machine(torch={"version": "2.13.0", "cuda": "12.6"})) == "2.13.0+cu126"
    assert installed_text(machine(torch={"version": "2.9.0", "cuda": None, "hip": "6.4.43"})) == "2.9.0+rocm6.4"


def installed_text(facts):
    return constraints.installed_versions(facts)["torch"]


@pytest.mark.parametrize(
    ("backend", "version", "distribution", "kept"),
    [
        ("cpu", "2.13.0+cpu", "2.13.0+cpu", True),
        ("cpu", "2.13.0+cu130", "2.13.0", True),  # from the default index, where the CPU index did not answer
        ("cpu", "2.13.0+cu126", "2.13.0+cu126", False),
        ("cpu", "2.12.1+cpu", "2.12.1+cpu", False),
        ("cu130", "2.13.0+cu130", "2.13.0", True),
        ("cu130", "2.13.0+cpu", "2.13.0+cpu", False),
    ],
)
def test_installed_torch_is_kept_when_it_fits(backend, version, distribution, kept):
    found = make_plan(GPU, backend=backend)
    assert found.fits({"version": version, "distribution": distribution}) is kept
    assert found.fits(None) is False


# --- tables, output, the verb ----------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"torch>={plan.OLDEST}" in project["dependencies"]
    assert knowledge.release(TORCH) and TORCH in [entry["torch"] for entry in knowledge.load()["companions"]]


def test_backends_come_from_the_table():
    assert {"cpu", "cu118", "cu126", "cu130", "rocm7.2", "mps", "xpu"} <= set(plan.backends())
    assert "cu118" not in plan.backends("2.10") and len(set(plan.backends())) == len(plan.backends())


def test_no_facts_at_all():
    found = make_plan({})
    assert found.backend == "cpu" and not found.refused
    assert {row.satisfied for row in found.constraints} == {None, True}


def test_disk_is_a_row_and_no_wall():
    found = make_plan(nvidia("580.65", "8.6", disk={"free_gb": 3.0}))
    assert not found.refused and [row.satisfied for row in found.constraints if row.key == "disk"] == [False]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "found",
    [
        make_plan(nvidia("570.86.10", "NVIDIA GeForce RTX 5090")),
        make_plan(nvidia("580.65", "12.0"), torch="2.5.1"),
        make_plan(installed(GPU, "2.9.1+cpu"), switch="cu126"),
        make_plan(machine(os__libc="musl")),
        make_plan(machine(amd__gfx=["gfx1100"])),
    ],
)
def test_report_is_eighty_columns_wide(found, language):
    for line in plan.report(found, language).splitlines():
        assert width(line) <= 80 or line.startswith("      ") or line.startswith("  python")  # commands are not broken


def test_json():
    answer = plan.as_dict(make_plan(nvidia("580.65", "12.0"), torch="2.5.1"))
    assert json.loads(json.dumps(answer)) == answer
    assert answer["refused"]["en"] and answer["alternatives"][0]["says"]["zh"]
    assert [row["key"] for row in answer["constraints"] if row["satisfied"] is False] == ["gpu"]


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lang")
    plan.configure(parser)
    status = plan.run(parser.parse_args(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_for_another_machine_from_its_facts_or_its_report(capsys, tmp_path, monkeypatch):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(nvidia("570.86.10", "12.0")))
    status, out, _ = run(capsys, "--for", str(facts), "--json")
    assert status == 0 and json.loads(out)["backend"] == "cu128"
    report = tmp_path / "report.txt"
    report.write_text(
        "PyTorch version: 2.9.1+cu128\nOS: Ubuntu 22.04.3 LTS (x86_64)\nLibc version: glibc-2.35\nPython version: 3.10.12 (64-bit runtime)\n"
        "Nvidia driver version: 580.95.05\nGPU models and configuration: GPU 0: NVIDIA GeForce GTX 1080 Ti\n[pip3] torch==2.9.1+cu128\n"
    )
    status, out, _ = run(capsys, "--for", str(report), "--json", "--upgrade")
    answer = json.loads(out)
    assert status == 0 and (answer["torch"], answer["backend"]) == (TORCH, "cu126")
    assert answer["changes"][0]["from"] == "2.9.1+cu128"
    assert run(capsys, "--for", str(tmp_path / "absent"))[0] == 2
    assert run(capsys, "--for", str(facts), "--torch", "2.5.1", "--lang", "zh")[0] == 2


def test_plan_for_this_machine(capsys, monkeypatch):
    monkeypatch.setattr("groundup.env.probe.facts", lambda: nvidia("580.65", "8.6"))
    status, out, _ = run(capsys, "--with", "torchvision", "--lang", "en")
    assert status == 0 and "torchvision==0.28.0+cu130" in out


# --- layout ----------------------------------------------------------------------------------------------------------------------


def test_columns_count_chinese_characters_twice():
    lines = columns([("驱动", "580", "要求很长" * 12), ("driver", "580", "short")], limit=50)
    assert all(width(line) <= 50 for line in lines) and len(lines) > 2
    assert lines[0].index("580") + 2 == lines[-1].index("580")  # two characters, four columns
    assert wrapped("", 10) == [""] and wrapped("one two three", 7) == ["one two", "three"]


def test_shown_quotes_for_the_system():
    assert shown(["pip", "install", "numpy<2"]) == "pip install 'numpy<2'"
    assert shown(["pip", "install", "numpy<2", "a b"], True) == 'pip install "numpy<2" "a b"'
