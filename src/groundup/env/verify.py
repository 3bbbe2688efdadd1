"""Does this torch compute? `env verify`, and a script that the Python to be judged runs by path; only there torch is imported.

    .venv/bin/python -I src/groundup/env/verify.py --device cuda [--full]

An import that works proves little: a wheel without kernels for the GPU imports, sees the device, and fails at the first sum. So this
multiplies matrices and differentiates on the device, and compares with float64 on the CPU and with the gradient worked out by hand.
The script prints one JSON object per line, the last one the verdict, and ends with 0 or 1. With --full each check is announced before
it runs, so that one which takes the whole process down can be named. A wrong number fails; a slow machine is only told so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

_SIZE = 128
# float32 sums of 128 products of standard normal numbers are off by about 1e-5, TF32 or bf16 units by up to 1e-1,
# wrong kernels by more than 1.
_TOLERANCE = 0.3
_SLOW = 0.25  # of what the device should reach; below that the row says 'slow'
_QUICK_LIMIT, _FULL_LIMIT = 180.0, 900.0

# Dense peaks in TFLOP/s (float32, TF32, bfloat16 with float32 sums) by a pattern in the GPU's name; the first hit counts, None: not stated.
# Source: NVIDIA's data sheets and architecture white papers, figures with sparsity halved; AMD's data sheet for the MI300X.
PEAKS: Tuple[Tuple[str, Tuple[Optional[float], ...]], ...] = (
    (r"GH200|H200|H100.*(?:HBM3|SXM)|H800.*SXM", (66.9, 494.7, 989.4)),
    (r"H100.*NVL", (60.0, 417.5, 835.5)),
    (r"H100.*PCIe", (51.2, 378.0, 756.0)),
    (r"A100|A800", (19.5, 156.0, 312.0)),
    (r"\bA30\b", (10.3, 82.0, 165.0)),
    (r"\bA40\b", (37.4, 74.8, 149.7)),
    (r"\bA10\b", (31.2, 62.5, 125.0)),
    (r"L40S", (91.6, 183.0, 362.1)),
    (r"\bL40\b", (90.5, 90.5, 181.1)),
    (r"\bL4\b", (30.3, 60.0, 121.0)),
    (r"RTX 6000 Ada", (91.1, 182.1, 364.2)),
    (r"RTX A6000", (38.7, 77.4, 154.8)),
    (r"RTX 5090\b", (104.8, 104.8, 209.5)),
    (r"RTX 4090\b", (82.6, 82.6, 165.2)),
    (r"RTX 4080\b(?! SUPER)", (48.7, 48.7, 97.5)),
    (r"RTX 3090 Ti", (40.0, 40.0, 80.0)),
    (r"RTX 3090\b", (35.6, 35.6, 71.0)),
    (r"RTX 3080\b(?! Ti)", (29.8, 29.8, 59.5)),
    (r"V100.*SXM", (15.7, None, None)),
    (r"V100", (14.0, None, None)),
    (r"\bT4\b", (8.1, None, None)),
    (r"MI300X", (163.4, 653.7, 1307.4)),
)


# --- the quick verification ------------------------------------------------------------------------------------------------------


def verify(device: str = "auto") -> Dict[str, Any]:
    """Computes on the device and says how far off it was.

    Args:
        device: 'cpu', 'cuda' (also for ROCm), 'mps', 'xpu', or 'auto' for the best one that torch offers.
    """
    start = time.perf_counter()
    verdict: Dict[str, Any] = {"ok": False, "device": device, "device_name": None, "torch": None, "error": None}
    try:
        _compute(device, verdict)
    except Exception as error:  # whatever went wrong is the verdict
        verdict["error"] = _line(error)
    verdict["seconds"] = round(time.perf_counter() - start, 2)
    return verdict


def _line(error: BaseException) -> str:
    return "{}: {}".format(type(error).__name__, str(error).strip().splitlines()[0] if str(error).strip() else "")


def _compute(device: str, verdict: Dict[str, Any]) -> None:
    import torch

    verdict["torch"] = torch.__version__
    if device == "auto":
        xpu = getattr(torch, "xpu", None)
        offered = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("xpu", xpu and xpu.is_available()))
        device = next((name for name, there in offered if there), "cpu")
    verdict["device"] = device
    if device == "cuda":
        verdict["device_name"] = torch.cuda.get_device_name(0)

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    on_device = left.to(device, copy=True).requires_grad_()
    product = on_device @ right.to(device)
    verdict["matmul_error"] = float((product.detach().cpu().double() - left.double() @ right.double()).abs().max())

    # d/dL of the sum of (L R)^2 is 2 (L R) R'. Divided by the size to keep the numbers of order one.
    (gradient,) = torch.autograd.grad(product.square().sum() / _SIZE, on_device)
    expected = 2 * (left.double() @ right.double()) @ right.double().T / _SIZE
    verdict["gradient_error"] = float((gradient.cpu().double() - expected).abs().max())

    worst = max(verdict["matmul_error"], verdict["gradient_error"])
    verdict["ok"] = worst < _TOLERANCE  # False for nan too
    if not verdict["ok"]:
        verdict["error"] = "wrong result on {}: off by {:.3g}, expected less than {}".format(device, worst, _TOLERANCE)


def _companions(device: str) -> Dict[str, Any]:
    try:
        found, wanted, status = companions(device)
    except Skip:
        return {}
    except Exception as error:  # whatever went wrong is the verdict
        return {"ok": False, "error": _line(error)}
    return {"companions": found} if status == "ok" else {"ok": False, "error": "{}, expected {}".format(found, wanted)}


# --- the full verification: one function per check -------------------------------------------------------------------------------


class Skip(Exception):
    """A check that cannot be made here; why, in both languages."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en)
        self.reason = {"en": en, "zh": zh}


# What a check returns: what was measured, what was expected of it, and 'ok', 'failed' or 'slow'.
Result = Tuple[str, str, str]


def _near(error: float, tolerance: float) -> Result:
    return "{:.1e}".format(error), "< {:.0e}".format(tolerance), "ok" if error < tolerance else "failed"  # nan fails


def _off(found: Any, expected: Any) -> float:
    """Relative distance of two tensors, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def matmul(device: str) -> Result:
    left, right = _random(512, 384), _random(384, 256)
    return _near(_off(left.to(device) @ right.to(device), left.double() @ right.double()), 1e-4)


def autograd(device: str) -> Result:
    """The derivative along a random direction against a central difference, in float64 where the device has it."""
    import torch

    dtype, step, tolerance = (torch.float32, 1e-2, 1e-2) if device == "mps" else (torch.float64, 1e-5, 1e-6)
    weight, inputs, direction = (_random(*shape).to(device, dtype) for shape in ((64, 32), (16, 64), (64, 32)))

    def loss(values: Any) -> Any:
        return torch.nn.functional.layer_norm(torch.tanh(inputs @ values / 8), (32,)).logsumexp(1).square().mean()

    point = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    slope = float((gradient * direction).sum())
    difference = float((loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step))
    return _near(abs(slope - difference) / abs(difference), tolerance)


def convolution(device: str) -> Result:
    """conv2d and the gradient of its weight: cuDNN or MIOpen on a GPU, oneDNN on most CPUs."""
    import torch

    images, weight = _random(4, 16, 32, 32), _random(24, 16, 3, 3)
    answers = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        kernel = weight.to(place, dtype).requires_grad_()
        out = torch.nn.functional.conv2d(images.to(place, dtype), kernel, padding=1, stride=2)
        answers.append((out, torch.autograd.grad(out.square().mean(), kernel)[0]))
    return _near(max(_off(found, expected) for found, expected in zip(*answers)), 1e-4)


def bf16(device: str) -> Result:
    return _half(device, "bfloat16", 1e-2)


def fp16(device: str) -> Result:
    return _half(device, "float16", 2e-3)


def _half(device: str, name: str, tolerance: float) -> Result:
    import torch

    left, right = (_random(*shape).to(getattr(torch, name)) for shape in ((256, 192), (192, 128)))
    try:
        found = left.to(device) @ right.to(device)
    except RuntimeError as error:
        if "not implemented" in str(error) or "not supported" in str(error):
            raise Skip(
                "this torch has no {} product for {}".format(name, device), "此 torch 没有 {1} 上的 {0} 乘法".format(name, device)
            ) from None
        raise
    return _near(_off(found, left.double() @ right.double()), tolerance)


def _attention(backend: str) -> Callable[[str], Result]:
    def check(device: str) -> Result:
        import torch

        try:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            chosen = getattr(SDPBackend, backend)
        except (ImportError, AttributeError):
            raise Skip("this torch does not have it", "此 torch 没有该实现") from None
        dtype = torch.float32 if device in ("cpu", "mps") or backend == "MATH" else torch.float16
        query, key, value = (_random(2, 4, 64, 32 + index)[..., :32].contiguous().to(dtype) for index in range(3))
        weights = (query.double() @ key.double().transpose(-1, -2) / 32**0.5).softmax(-1)
        import warnings

        with warnings.catch_warnings(), sdpa_kernel(chosen):
            warnings.simplefilter("ignore")
            try:
                found = torch.nn.functional.scaled_dot_product_attention(query.to(device), key.to(device), value.to(device))
            except RuntimeError as error:
                # "No available kernel" is torch's way to say that this implementation is not for this device.
                if "available kernel" in str(error) or "viable backend" in str(error):
                    raise Skip("not for this device", "不适用于此设备") from None
                raise
        return _near(_off(found, weights @ value.double()), 1e-4 if dtype == torch.float32 else 5e-3)

    return check


def compiled(device: str) -> Result:
    import torch

    if not hasattr(torch, "compile"):
        raise Skip("this torch is older than torch.compile", "此 torch 早于 torch.compile")
    if device == "mps":
        raise Skip("torch.compile is not finished for mps", "torch.compile 对 mps 的支持尚未完成")
    if device in ("cuda", "xpu") and importlib.util.find_spec("triton") is None:
        raise Skip(
            "no Triton (Linux wheels bring it; Windows: pip install triton-windows)",
            "没有 Triton（Linux 安装包自带；Windows：pip install triton-windows）",
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++", "c++", "cl")):
        how = {"win32": "winget install Microsoft.VisualStudio.2022.BuildTools", "darwin": "xcode-select --install"}
        fix = how.get(sys.platform, "sudo apt install g++ / sudo dnf install gcc-c++")
        raise Skip("no C++ compiler: " + fix, "没有 C++ 编译器：" + fix)
    left, right = _random(64, 48).to(device), _random(48, 32).to(device)

    def function(a: Any, b: Any) -> Any:
        return torch.nn.functional.gelu(a @ b).sin() * 2 + 1

    with tempfile.TemporaryDirectory() as cache:
        # A cache of its own, so that the compiler really runs.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        try:
            found = torch.compile(function)(left, right)
        except RuntimeError as error:
            if "not supported" in str(error) and "ython" in str(error):  # Dynamo is behind the newest Python
                raise Skip(_line(error), _line(error)) from None
            raise
    return _near(_off(found, function(left.cpu().double(), right.cpu().double())), 1e-4)


def all_reduce(device: str) -> Result:
    """Two processes add their vectors: NCCL with two GPUs, else gloo."""
    import torch

    if not torch.distributed.is_available():
        raise Skip("this torch was built without distributed", "此 torch 不含分布式功能")
    backend = "nccl" if device == "cuda" and torch.cuda.device_count() > 1 else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-I", os.path.abspath(__file__), "--reduce", backend, "--port", str(port), "--rank"]
    children = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
    outputs = []
    try:
        for child in children:
            outputs.append(child.communicate(timeout=120)[0].decode("utf-8", "replace").strip())
    finally:
        for child in children:
            child.kill()
    sums = [re.search(r"^sum (\S+)$", output, re.MULTILINE) for output in outputs]
    if not all(sums):
        last = next(output for output, found in zip(outputs, sums) if not found).splitlines()[-1:] or ["no answer"]
        raise RuntimeError("{}: {}".format(backend, last[0]))
    right = all(found and float(found.group(1)) == 3000.0 for found in sums)
    return "{} {}".format(backend, "/".join(found.group(1) for found in sums if found)), "3000.0", "ok" if right else "failed"


def reduce_once(backend: str, port: int, rank: int) -> None:
    """One of the two processes of `all_reduce`: a thousand ones plus a thousand twos."""
    import datetime

    import torch

    if sys.platform != "win32":
        # A host name that does not resolve is no fault of torch.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    address = "tcp://127.0.0.1:{}".format(port)
    torch.distributed.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    values = torch.full((1000,), rank + 1.0, device="cuda:{}".format(rank) if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(values)
    print("sum", float(values.sum()), flush=True)
    torch.distributed.destroy_process_group()


def companions(device: str) -> Result:
    """torchvision and torchaudio are compiled against one torch: an operator of each is called."""
    import torch

    found = []
    if importlib.util.find_spec("torchvision"):
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]).to(device)
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]).to(device), 0.5).tolist()
        if kept != [0, 2]:
            return "nms: {}".format(kept), "[0, 2]", "failed"
        found.append("torchvision " + torchvision.__version__)
    if importlib.util.find_spec("torchaudio"):
        import torchaudio

        found.append("torchaudio " + torchaudio.__version__)
    if not found:
        raise Skip("neither torchvision nor torchaudio is installed", "未安装 torchvision 与 torchaudio")
    return ", ".join(found), "", "ok"


def bandwidth(device: str) -> Result:
    """From pinned host memory to the device, in GB/s, against what its PCI Express link carries."""
    import torch

    if device != "cuda":
        raise Skip("host and device share the memory", "主机与设备共用内存")
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device, pin_memory=False)

    def copy() -> None:
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    reached = host.numel() / _best_seconds(copy) / 1e9
    link = _pcie_gb_per_s()
    expected = "{:.0f} GB/s".format(link) if link else "?"
    return "{:.1f} GB/s".format(reached), expected, "slow" if link and reached < 2 * _SLOW * link else "ok"


def _pcie_gb_per_s() -> Optional[float]:
    """What the first GPU's link can carry by its generation and width; None where nvidia-smi does not say."""
    lane = {"1": 0.25, "2": 0.5, "3": 0.985, "4": 1.969, "5": 3.938, "6": 7.563}
    try:
        command = ["nvidia-smi", "--id=0", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
        said = subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=20).decode("ascii", "replace")
        generation, lanes = (part.strip() for part in said.split(","))
        return lane[generation] * int(lanes)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def _speed(kind: str) -> Callable[[str], Result]:
    """FLOP/s of a matrix product against the device's peak: 0 float32, 1 TF32, 2 bfloat16."""

    def check(device: str) -> Result:
        import torch

        column = ("fp32", "tf32", "bf16").index(kind)
        if column and device != "cuda":
            raise Skip("measured on NVIDIA and AMD GPUs only", "仅在 NVIDIA 与 AMD GPU 上测量")
        name = torch.cuda.get_device_name(0) if device == "cuda" else None
        if column and torch.cuda.get_device_capability(0)[0] < 8 and not torch.version.hip:
            raise Skip("this GPU has no units for it", "此 GPU 没有相应的计算单元")
        size = 8192 if device == "cuda" else 2048
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32) for _ in range(2))

        def multiply() -> None:
            left @ right
            _wait(device)

        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        try:
            reached = 2 * size**3 / _best_seconds(multiply) / 1e12
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        if device == "cuda":
            peak = next((peaks[column] for pattern, peaks in PEAKS if re.search(pattern, name or "")), None)
        else:
            peak = cpu_peak(torch.get_num_threads()) if device == "cpu" else None
        expected = "{:.3g} TFLOP/s".format(peak) if peak else "?"
        return "{:.3g} TFLOP/s".format(reached), expected, "slow" if peak and reached < _SLOW * peak else "ok"

    return check


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        getattr(torch, device).synchronize()


def _best_seconds(work: Callable[[], None], tries: int = 5) -> float:
    work()
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def cpu_peak(threads: int) -> Optional[float]:
    """What this many cores should reach in float32, in TFLOP/s: cores x clock x SIMD lanes x 2 for multiply-and-add x 2 units.

    An estimate: the clock is the highest that the system states, which few machines hold on all cores. None where it states none.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as source:
            return parse_cpu_peak(source.read(), _highest_mhz(), threads)
    except OSError:
        return None


def _highest_mhz() -> Optional[float]:
    try:
        with open("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", encoding="ascii") as source:
            return float(source.read()) / 1000
    except (OSError, ValueError):
        return None


def parse_cpu_peak(cpuinfo: str, mhz: Optional[float], threads: int) -> Optional[float]:
    """`cpu_peak` from the text of /proc/cpuinfo; `mhz` where the system states the highest clock, else the present one counts."""
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", cpuinfo, re.MULTILINE))
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)]
    clock = mhz or (max(clocks) if clocks else None)
    if not clock:
        return None
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags or "avx" in flags else 4
    units = 2 if {"fma", "asimd"} & flags else 1
    siblings, cores = int(fields.get("siblings") or 1), int(fields.get("cpu cores") or 1)
    # Two threads of one core share its units.
    return max(1.0, threads * min(1.0, cores / siblings)) * clock * 1e6 * lanes * 2 * units / 1e12


CHECKS: Tuple[Tuple[str, str, str, Callable[[str], Result]], ...] = (
    ("matmul", "matrix product", "矩阵乘法", matmul),
    ("autograd", "autograd", "自动求导", autograd),
    ("convolution", "convolution", "卷积", convolution),
    ("bf16", "bfloat16 product", "bfloat16 乘法", bf16),
    ("fp16", "float16 product", "float16 乘法", fp16),
    ("sdpa_math", "attention: math", "注意力：math", _attention("MATH")),
    ("sdpa_flash", "attention: flash", "注意力：flash", _attention("FLASH_ATTENTION")),
    ("sdpa_efficient", "attention: efficient", "注意力：efficient", _attention("EFFICIENT_ATTENTION")),
    ("sdpa_cudnn", "attention: cudnn", "注意力：cudnn", _attention("CUDNN_ATTENTION")),
    ("companions", "companions", "配套库", companions),
    ("compile", "torch.compile", "torch.compile", compiled),
    ("all_reduce", "all-reduce, 2 processes", "双进程 all-reduce", all_reduce),
    ("bandwidth", "host to device", "主机到设备带宽", bandwidth),
    ("fp32_speed", "float32 speed", "float32 速度", _speed("fp32")),
    ("tf32_speed", "TF32 speed", "TF32 速度", _speed("tf32")),
    ("bf16_speed", "bfloat16 speed", "bfloat16 速度", _speed("bf16")),
)


def full(device: str) -> Iterator[Dict[str, Any]]:
    """Every check on a device: {'check': name} before it, then its row with status ok, failed, slow or skipped."""
    import torch

    # Lower precision on purpose has checks of its own.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, en, zh, check in CHECKS:
        yield {"check": name}
        row: Dict[str, Any] = {"name": name, "title": {"en": en, "zh": zh}, "measured": None, "expected": None, "reason": None}
        began = time.perf_counter()
        try:
            row["measured"], row["expected"], row["status"] = check(device)
        except Skip as skip:
            row.update(status="skipped", reason=skip.reason)
        except Exception as error:  # whatever went wrong is the result
            row.update(status="failed", reason={"en": _line(error), "zh": _line(error)})
        row["seconds"] = round(time.perf_counter() - began, 2)
        yield row


def main(argv: Optional[List[str]] = None) -> int:
    """Run by path in the environment that is judged."""
    parser = argparse.ArgumentParser(description="Verify that torch computes; prints JSON, one object a line, the verdict last.")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps", "xpu"])
    parser.add_argument("--package", help="also fail when this package cannot be found")
    parser.add_argument("--companions", action="store_true", help="torchvision and torchaudio too, as far as they are installed")
    parser.add_argument("--full", action="store_true", help="every check there is")
    parser.add_argument("--reduce", choices=["gloo", "nccl"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.reduce:
        reduce_once(options.reduce, options.port, options.rank)
        return 0
    verdict = verify(options.device)
    if verdict["ok"] and options.package and importlib.util.find_spec(options.package) is None:
        verdict.update(ok=False, error="package '{}' was installed but cannot be found".format(options.package))
    if options.companions and verdict["ok"]:
        verdict.update(_companions(verdict["device"]))
    if options.full and verdict["ok"]:
        began = time.perf_counter()
        rows = []
        for row in full(verdict["device"]):
            print(json.dumps(row), flush=True)
            rows += [row] if "status" in row else []
        failed = [row["name"] for row in rows if row["status"] == "failed"]
        verdict.update(ok=not failed, checks=rows, seconds=round(verdict["seconds"] + time.perf_counter() - began, 2))
        if failed:
            verdict["error"] = "failed checks: " + ", ".join(failed)
    print(json.dumps(verdict))
    return 0 if verdict["ok"] else 1


# --- the verb: starts the script above in the environment to be judged -----------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of `env verify`."""
    parser.add_argument("--full", action="store_true", help="every check: attention, compile, all-reduce, bandwidth, FLOP/s / 全部检查：注意力、编译、all-reduce、带宽、FLOP/s")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda", "mps", "xpu"], help="default: the best one / 默认取最好的设备"
    )
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="Python of the environment to judge / 待验证环境的 Python")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="default: 180, with --full 900 / 时限（秒）；默认 180，加 --full 为 900")


def run(options: argparse.Namespace) -> int:
    """`env verify`: 0 when it computes, 1 when not, 2 when there is no such Python."""
    from groundup.env.language import pick

    language = pick(options.lang)
    limit = options.timeout or (_FULL_LIMIT if options.full else _QUICK_LIMIT)
    shows = None if options.json else _Table(language)
    verdict = judge(options.python, options.device, options.full, limit, shows.row if shows else None)
    if options.json:
        print(json.dumps(verdict, ensure_ascii=False))
    elif shows:
        shows.end(verdict)
    return 0 if verdict["ok"] else 2 if verdict.get("missing") else 1


def judge(
    python: str, device: str, everything: bool, limit: float, row: Optional[Callable[[Dict[str, Any]], None]] = None
) -> Dict[str, Any]:
    """Runs the script with another Python; a torch that crashes or hangs becomes the verdict's `error`, with the check it happened in.

    Args:
        python: the interpreter of the environment.
        limit: seconds; after that the process is ended.
        row: called with each finished check.
    """
    import threading

    from groundup.env.probe import clean_environment, scrub

    verdict: Dict[str, Any] = {"ok": False, "device": device, "device_name": None, "torch": None, "error": None}
    command = [python, "-I", os.path.abspath(__file__), "--device", device, *(["--full"] if everything else [])]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment()
        )
    except OSError as error:
        return dict(verdict, missing=True, error="{}: {}".format(scrub(python), error.strerror))
    ended: List[bool] = []

    def end() -> None:
        ended.append(True)
        child.kill()

    clock = threading.Timer(limit, end)
    clock.daemon = True
    clock.start()
    rows: List[Dict[str, Any]] = []
    said: List[str] = []
    answer, current = None, None
    try:
        for raw in child.stdout or ():
            line = raw.decode("utf-8", "replace").rstrip()
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                said += [line] if line.strip() else []
            elif "check" in found:
                current = found["check"]
            elif "status" in found:
                current = None
                rows.append(found)
                if row:
                    row(found)
            elif "ok" in found:
                answer = found
        status = child.wait()
    finally:
        clock.cancel()
        child.kill()
        if child.stdout:
            child.stdout.close()
    if answer is not None and not (status and answer["ok"]):
        return dict(answer, error=scrub(answer["error"]) if answer["error"] else None)
    how = "did not end within {:.0f} s".format(limit) if ended else _how_it_ended(status)
    where = " in the check '{}'".format(current) if current else ""
    last = ": " + scrub(said[-1])[:300] if said else ""
    return dict(verdict, error="torch {}{}{}".format(how, where, last), checks=rows)


def _how_it_ended(status: int) -> str:
    """'crashed (signal 11, SIGSEGV)' from a process's exit status."""
    import signal

    if status < 0:
        names = {item.value: item.name for item in signal.Signals}
        return "crashed (signal {}, {})".format(-status, names.get(-status, "?"))
    return "crashed (status 0x{:08x})".format(status) if status > 0xFFFF else "ended with status {}".format(status)


class _Table:
    """Rows on the terminal as they come, 80 columns wide."""

    _MARKS = {"ok": ("ok", "通过"), "failed": ("FAILED", "失败"), "slow": ("slow", "偏慢"), "skipped": ("skipped", "跳过")}

    def __init__(self, language: str) -> None:
        self.language, self.column = language, 1 if language == "zh" else 0
        self.started = False

    def row(self, row: Dict[str, Any]) -> None:
        if not self.started:
            self.started = True
            self._line(*(("检查", "结果", "秒", "测得（应为）") if self.column else ("Check", "Result", "s", "Measured (expected)")))
        if row["reason"]:
            told = row["reason"][self.language]
        else:
            told = row["measured"] + (" ({})".format(row["expected"]) if row["expected"] else "")
        self._line(row["title"][self.language], self._MARKS[row["status"]][self.column], "{:.1f}".format(row["seconds"]), told)

    def _line(self, name: str, mark: str, seconds: str, told: str) -> None:
        from groundup.env.layout import width, wrapped

        head = name + " " * (24 - width(name)) + mark + " " * (8 - width(mark)) + seconds.rjust(6) + "  "
        first, *rest = wrapped(told, 80 - width(head))
        print(head + first, *(" " * width(head) + line for line in rest), sep="\n", flush=True)

    def end(self, verdict: Dict[str, Any]) -> None:
        zh = self.column
        where = verdict["device_name"] or verdict["device"]
        if verdict["ok"]:
            slow = [row["title"][self.language] for row in verdict.get("checks", []) if row["status"] == "slow"]
            says = "torch {0} 在 {1} 上计算正确（{2} 秒）" if zh else "torch {0} computes correctly on {1} ({2} s)"
            print(("\n" if self.started else "") + says.format(verdict["torch"], where, verdict["seconds"]))
            if slow:
                print(("比该设备应有的速度慢：" if zh else "Slower than this device should be: ") + ", ".join(slow))
        else:
            says = "torch 未通过验证：{0}" if zh else "torch does not pass: {0}"
            print(("\n" if self.started else "") + says.format(verdict["error"]))
            print("  " + ("诊断原因：" if zh else "To find the cause: ") + "groundup env doctor")


if __name__ == "__main__":
    sys.exit(main())
