"""choose_build on tables of facts: every build, every wall."""

import pytest

from groundup.env.choose import BACKENDS, CUDA_BUILDS, TORCH, choose_build

INDEX = "https://download.pytorch.org/whl"


def machine(**changes):
    """Facts of an ordinary Linux machine without a GPU; `os__libc="musl"` changes one value."""
    facts = {
        "os": {
            "system": "Linux",
            "name": "Debian GNU/Linux 12",
            "release": "6.1.0",
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
    }
    for path, value in changes.items():
        group, key = path.split("__")
        facts[group][key] = value
    return facts


def nvidia(driver, *capabilities, **changes):
    gpus = [{"name": f"GPU {c}", "memory_gb": 24.0, "compute_capability": c} for c in capabilities]
    return machine(nvidia__driver=driver, nvidia__gpus=gpus, **changes)


def mac(macos="15.1", **changes):
    return machine(os__system="Darwin", os__machine="aarch64", os__libc=None, apple__chip="Apple M2", apple__macos=macos, **changes)


@pytest.mark.parametrize(
    ("driver", "capability", "backend", "torch"),
    [
        ("580.65.06", "8.6", "cu130", TORCH),
        ("595.10", "12.0", "cu130", TORCH),
        ("580.65.06", "10.3", "cu130", TORCH),  # sm_100 kernels run on 10.3
        ("580.65.06", "8.9", "cu130", TORCH),  # sm_86 kernels run on 8.9
        ("580.65.06", "13.0", "cu130", TORCH),  # a future GPU: PTX
        ("580.65.06", "7.5", "cu130", TORCH),
        ("580.65.06", "7.0", "cu126", TORCH),  # Volta: a driver new enough for CUDA 13 that has no kernels for it
        ("580.65.06", "6.1", "cu126", TORCH),
        ("580.65.06", "5.2", "cu126", TORCH),
        ("570.86.10", "9.0", "cu126", TORCH),
        ("550.144.03", "8.0", "cu126", TORCH),
        ("525.60.13", "8.6", "cu126", TORCH),  # exactly the minimum of CUDA 12
        ("575.57.08", "12.0", "cu128", "2.11.0"),  # Blackwell with a driver too old for CUDA 13
        ("525.60.12", "8.6", "cpu", TORCH),
        ("470.82.01", "8.6", "cpu", TORCH),
        ("580.65.06", "3.5", "cpu", TORCH),  # Kepler: no kernels anywhere
    ],
)
def test_driver_and_gpu_decide_together(driver, capability, backend, torch):
    choice = choose_build(nvidia(driver, capability))
    assert (choice.backend, choice.torch_version) == (backend, torch)
    assert choice.refused is None
    assert choice.device == ("cpu" if backend == "cpu" else "cuda")
    assert f"GPU {capability}" in choice.reason["en"] and f"GPU {capability}" in choice.reason["zh"]
    if backend != "cpu":
        assert choice.pip_args == (f"torch=={torch}+{backend}", "--index-url", f"{INDEX}/{backend}")


@pytest.mark.parametrize(
    ("facts", "backend"),
    [
        (nvidia("528.33", "8.6", os__system="Windows", os__libc=None), "cu126"),
        (nvidia("528.24", "8.6", os__system="Windows", os__libc=None), "cpu"),  # enough on Linux only
        (nvidia("528.24", "8.6", os__wsl=True), "cpu"),  # under WSL the driver is the one of Windows
        (nvidia("581.42", "8.9", os__wsl=True), "cu130"),
        (nvidia("580.95.05", "9.0", os__machine="aarch64"), "cu130"),
        (nvidia("560.35.05", "9.0", os__machine="aarch64"), "cu126"),
        (nvidia("580.95.05", "7.0", os__machine="aarch64"), "cpu"),  # no ARM build has kernels for it
        (nvidia("580.95.05", "8.6", os__machine="aarch64", os__system="Windows", os__libc=None), "cpu"),
    ],
)
def test_platform_changes_the_rule(facts, backend):
    assert choose_build(facts).backend == backend


def test_mixed_gpus_get_the_build_that_serves_most():
    choice = choose_build(nvidia("580.65.06", "6.1", "6.1", "12.0"))
    assert choice.backend == "cu126"
    assert "GPU 12.0" in choice.reason["en"].split("no kernels for")[1]
    assert choose_build(nvidia("580.65.06", "6.1", "8.6")).backend == "cu126"  # serves both
    assert choose_build(nvidia("580.65.06", "6.1", "12.0")).backend == "cu130"  # equal: the newer build


def test_unknown_capability_is_decided_by_the_driver():
    facts = nvidia("580.65.06", "8.6")
    facts["nvidia"]["gpus"][0]["compute_capability"] = None
    assert choose_build(facts).backend == "cu130"


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
    choice = choose_build(machine(**changes))
    assert choice.backend == "cpu" and words in choice.reason["en"]
    # An extra index, so that it works where PyTorch's own cannot be reached.
    assert choice.pip_args == (f"torch=={TORCH}", "--extra-index-url", f"{INDEX}/cpu")
    assert choice.pip_args_without_index == (*choice.pip_args, "--retries", "0")


def test_rocm():
    choice = choose_build(machine(amd__gfx=["gfx1036", "gfx1100"]))
    assert choice.backend == "rocm7.2" and choice.device == "cuda"
    assert choice.pip_args == (f"torch=={TORCH}+rocm7.2", "--index-url", f"{INDEX}/rocm7.2")
    assert choose_build(nvidia("470.82.01", "8.6", amd__gfx=["gfx90a"])).backend == "rocm7.2"
    assert choose_build(nvidia("580.65.06", "8.6", amd__gfx=["gfx90a"])).backend == "cu130"


def test_mac():
    assert (choose_build(mac()).backend, choose_build(mac()).device) == ("mps", "mps")
    assert choose_build(mac()).pip_args == (f"torch=={TORCH}",)
    assert choose_build(mac(), "cpu").device == "cpu"
    old = choose_build(mac("13.6"))
    assert old.device == "cpu" and "macOS 14" in old.reason["en"]
    assert choose_build(mac("13.6"), "mps").refused
    assert choose_build(mac(), "cu130").refused


@pytest.mark.parametrize(
    ("facts", "en", "zh"),
    [
        (mac(os__rosetta=True) | {"os": {**mac()["os"], "machine": "x86_64", "rosetta": True}}, "Rosetta", "Rosetta"),
        (machine(os__system="Darwin", os__machine="x86_64", os__libc=None), "Intel Mac", "Intel"),
        (machine(os__jetson=True, os__machine="aarch64"), "JetPack", "JetPack"),
        (machine(os__libc="musl"), "musl", "musl"),
        (machine(os__libc="glibc 2.17"), "2.28", "2.28"),
        (machine(os__machine="riscv64"), "riscv64", "riscv64"),
        (machine(python__bits=32), "32-bit", "32 位"),
        (machine(python__free_threaded=True), "free-threaded", "自由线程"),
        (machine(python__implementation="PyPy"), "PyPy", "PyPy"),
    ],
)
def test_walls_are_refused_in_both_languages(facts, en, zh):
    choice = choose_build(facts)
    assert choice.refused and en in choice.refused["en"] and zh in choice.refused["zh"]
    assert choice.pip_args == ()
    # No wish can climb a wall of the machine.
    assert choose_build(facts, "cpu").refused == choice.refused


@pytest.mark.parametrize(
    ("facts", "backend", "words"),
    [
        (nvidia("550.144.03", "8.6"), "cu130", "550.144.03"),
        (nvidia("580.65.06", "6.1"), "cu130", "no kernels"),
        (nvidia("580.65.06", "12.0"), "cu126", "no kernels"),
        (machine(), "cu999", "cu999"),
        (machine(), "mps", "Apple"),
        (machine(os__machine="aarch64"), "rocm7.2", "x86_64"),
    ],
)
def test_impossible_wishes_are_refused_with_the_reason(facts, backend, words):
    choice = choose_build(facts, backend)
    assert choice.refused and words in choice.refused["en"]


def test_possible_wishes_are_granted():
    assert choose_build(nvidia("580.65.06", "8.6"), "cu126").backend == "cu126"
    assert choose_build(nvidia("580.65.06", "8.6"), "cpu").backend == "cpu"
    # Preparing an image on a machine without a GPU: possible, and verified on the CPU.
    prepared = choose_build(machine(), "cu130")
    assert (prepared.backend, prepared.device, prepared.refused) == ("cu130", "cpu", None)


def test_default_index_stands_in_only_for_its_own_cuda_build():
    gpu = nvidia("580.65.06", "8.6")
    assert choose_build(gpu, "cu130").pip_args_without_index == (f"torch=={TORCH}",)
    assert choose_build(gpu, "cu126").pip_args_without_index is None
    assert choose_build(nvidia("580.95", "9.0", os__machine="aarch64")).pip_args_without_index is None


def test_mirror_of_the_wheel_index():
    assert choose_build(nvidia("580.65.06", "8.6"), index="https://mirror.example/whl").pip_args[2] == "https://mirror.example/whl/cu130"


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
    choice = choose_build(nvidia("580.65.06", "8.6"), backend)
    assert choice.fits({"version": version, "distribution": distribution}) is kept
    assert choice.fits(None) is False


def test_tables_are_consistent():
    assert len(set(BACKENDS)) == len(BACKENDS)
    for build in CUDA_BUILDS:
        assert all(list(kernels) == sorted(kernels) for kernels in build.kernels.values())
