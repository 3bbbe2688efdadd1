"""Where and how to compute: device, precision, threads. Every choice comes with its reason."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core.errors import EnvError, RecipeError

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says at each start that it starts


@dataclass(frozen=True)
class Decision:
    """An automatic choice and why it was made, in both languages."""

    value: Any
    reason: str
    reason_zh: str


def choose_device(wanted: str = "auto") -> Decision:
    """CUDA (or ROCm), then Apple's MPS, then the CPU.

    Raises:
        EnvError: a device was asked for by name and is not there.
    """
    if wanted != "auto":
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise RecipeError(
                "train.device = {wanted}: not a device; write auto, cpu, cuda, cuda:1 or mps",
                "train.device = {wanted}：不是设备名；可写 auto、cpu、cuda、cuda:1 或 mps",
                wanted=repr(wanted),
            ) from error
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(device.type, False):
            raise EnvError(
                "device {wanted} was asked for, and torch {version} does not see one",
                "要求使用设备 {wanted}，但 torch {version} 看不到它",
                wanted=repr(wanted),
                version=torch.__version__,
                fix="groundup env info",
            )
        return Decision(str(device), "asked for in the recipe", "由 recipe 指定")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return Decision("cuda", f"torch {torch.__version__} sees {name}", f"torch {torch.__version__} 检测到 {name}")
    if torch.backends.mps.is_available():
        return Decision("mps", "Apple GPU through MPS", "通过 MPS 使用 Apple GPU")
    return Decision("cpu", f"torch {torch.__version__} sees no GPU", f"torch {torch.__version__} 没有检测到 GPU")


def choose_precision(wanted: str, device: str) -> Decision:
    """The dtype of matrix products: 'float32', 'bfloat16' or 'float16'."""
    if wanted != "auto":
        return Decision(wanted, "asked for in the recipe", "由 recipe 指定")
    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return Decision("bfloat16", "the GPU computes bfloat16 natively; no loss scaling is needed", "GPU 原生支持 bfloat16，无需损失缩放")
    return Decision("float32", f"on {device} lower precision does not pay for these models", f"在 {device} 上，低精度对这类模型没有好处")


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of some tries within a second or so."""
    # CPUs without instructions for 16 bits take a second for a product of a thousand.
    n = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 256
    a = torch.ones(n, n, device=device, dtype=dtype)
    best, first = float("inf"), time.perf_counter()
    for _ in range(8):
        begin = time.perf_counter()
        if begin - first > 1:
            break
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best


def seed_everything(seed: int) -> None:
    """Sets torch's, numpy's and Python's global generators (user code may draw from any of them)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def set_deterministic(on: bool) -> None:
    """Deterministic kernels only; cuBLAS needs its workspace setting before the first CUDA call."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on != torch.are_deterministic_algorithms_enabled():  # even to say False again imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def keep_freed_memory() -> None:
    """Linux: what tensors free stays with the process, for the next ones of the same size.

    glibc gives every block of some megabytes back to the system and asks for it again at the next step, and the system clears its pages each
    time: on a CPU that can be half of a training. Blocks of 32 MiB and more, which take so long to fill that this is little, are given back: kept, they
    would be cut up, and the next of their size would find no place. A person's own MALLOC_... settings win.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 2**25), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def memory_in_use(device: str) -> int:
    """Bytes: the GPU's peak allocation, or this process's resident memory (0 where the system does not tell)."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        try:
            import resource
        except ImportError:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back() -> None:
    """Linux: gives memory that is free in this process back to the system, in spite of `keep_freed_memory`."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Linux: lets `status_bytes("VmHWM")` begin anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    """Linux: what the system says of this process ('VmRSS' resident memory, 'RssFile' of it mapped files, 'VmHWM' the most so far); 0 elsewhere."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
    return 0


def available_memory() -> int:
    """Bytes of main memory that a data set may count on, container limits included."""
    limit = 4 * 2**30
    try:
        with open("/proc/meminfo") as file:
            limit = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = min(limit, int(file.read()))
    except (OSError, ValueError):
        pass
    return limit
