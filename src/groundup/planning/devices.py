"""Devices that a training may be planned for: memory, peak rates and bandwidth of their makers' data sheets (dense products, no sparsity)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from groundup.core.device import available_memory, matmul_peak
from groundup.core.errors import RecipeError, did_you_mean

GB = 10**9


@dataclass(frozen=True)
class Device:
    """
    Args:
        memory: bytes that a training can have. flops: operations per second of products in float32 and in 16 bits. bandwidth: bytes per second.
        efficiency: the shares of these rates that trainings reach, from slow to quick. watts: of the board at full load.
        link: bytes per second and direction from a device to the others of its machine; network: from a machine to the others, all its cards together.
        bfloat16: whether it has units for it. context: bytes that its driver takes, which no allocator of tensors sees.
    """

    name: str
    memory: int
    flops: dict[str, float]
    bandwidth: float
    source: str
    gpu: bool = True
    efficiency: tuple[float, float] = (0.25, 0.6)
    watts: float | None = None
    link: float = 25 * GB
    network: float = 12.5 * GB
    bfloat16: bool = True
    context: int = 700 * 2**20


def _gpu(
    name: str,
    memory: float,
    float32: float,
    half: float,
    bandwidth: float,
    watts: float,
    link: float,
    network: float,
    source: str,
    bfloat16: bool = True,
) -> Device:
    """Memory in GB of its label, TFLOP/s, GB/s, W; a part of the memory goes to the driver and to fragments."""
    usable = int(memory * 2**30 * 0.94)
    rates = {"float32": float32 * 1e12, "bfloat16": (half if bfloat16 else float32) * 1e12, "float16": half * 1e12}
    return Device(name, usable, rates, bandwidth * GB, source, watts=watts, link=link * GB, network=network * GB, bfloat16=bfloat16)


DEVICES = {
    d.name: d
    for d in (
        _gpu("t4", 15, 8.1, 65, 320, 70, 12, 3, "NVIDIA T4 data sheet", bfloat16=False),
        _gpu("v100", 32, 15.7, 125, 900, 300, 150, 50, "NVIDIA V100 data sheet", bfloat16=False),
        _gpu("a100", 80, 19.5, 312, 2039, 400, 300, 200, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("a100-40g", 40, 19.5, 312, 1555, 400, 300, 200, "NVIDIA A100 40GB data sheet"),
        _gpu("h100", 80, 67, 989, 3350, 700, 450, 400, "NVIDIA H100 SXM data sheet"),
        _gpu("h200", 141, 67, 989, 4800, 700, 450, 400, "NVIDIA H200 data sheet"),
        _gpu("l4", 24, 30.3, 121, 300, 72, 25, 12.5, "NVIDIA L4 data sheet"),
        _gpu("l40s", 48, 91.6, 362, 864, 350, 25, 25, "NVIDIA L40S data sheet"),
        _gpu("rtx3060", 12, 12.7, 51, 360, 170, 12, 1.25, "NVIDIA Ampere GA102 white paper"),
        _gpu("rtx3090", 24, 35.6, 71, 936, 350, 12, 1.25, "NVIDIA Ampere GA102 white paper"),
        _gpu("rtx4090", 24, 82.6, 165, 1008, 450, 25, 1.25, "NVIDIA Ada white paper"),
        # Half of an Apple GPU's rate in 16 bits is not documented apart: float32's stands for both.
        Device(
            "mps-32g",
            32 * 2**30 * 3 // 4,
            dict.fromkeys(("float32", "bfloat16", "float16"), 6.8e12),
            200 * GB,
            "Apple M2 Pro",
            watts=60,
            bfloat16=False,
            context=0,
        ),
        _gpu("mi300x", 192, 163, 1307, 5300, 750, 448, 400, "AMD Instinct MI300X data sheet"),
    )
}


def find(name: str | None) -> Device:
    """A device by name; None is this machine's. Raises RecipeError for one that is not in the table."""
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return _this_cpu()
    if name is None:
        facts = torch.cuda.get_device_properties(0)
        at = torch.device("cuda")
        rates = {d: matmul_peak(at, getattr(torch, d)) for d in ("float32", "bfloat16")}
        return Device(facts.name, int(facts.total_memory * 0.94), {**rates, "float16": rates["bfloat16"]}, 500 * GB, "measured here")
    hint, hint_zh = did_you_mean(name, [*DEVICES, "cpu"])
    raise RecipeError(
        "--device {name}: not in the table of devices." + hint,
        "--device {name}：设备表中没有。" + hint_zh,
        name=name,
        fix="groundup plan RECIPE --device a100",
    )


def _this_cpu() -> Device:
    """This machine: its peak measured by matrix products, its bandwidth by copies."""
    at = torch.device("cpu")
    rates = {d: matmul_peak(at, getattr(torch, d)) for d in ("float32", "bfloat16")}
    a = torch.ones(2**24)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - begin)
    return Device(
        f"cpu ({os.cpu_count()} cores)", available_memory(), {**rates, "float16": rates["bfloat16"]}, 8.0 * a.numel() / best, "measured here",
        gpu=False, efficiency=(0.5, 1.0),
    )  # fmt: skip
