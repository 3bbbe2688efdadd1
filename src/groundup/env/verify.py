"""Does this torch compute? Run by path with the Python to be judged; prints one line of JSON and ends with 0 or 1.

    .venv/bin/python -I src/groundup/env/verify.py --device cuda

An import that works proves little: a wheel without kernels for the GPU imports, sees the device, and fails at the first sum. So this
multiplies matrices and differentiates on the device, and compares with float64 on the CPU and with the gradient worked out by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from typing import Any, Dict, List, Optional

_SIZE = 128
# float32 sums of 128 products of standard normal numbers are off by about 1e-5, TF32 or bf16 units by up to 1e-1,
# wrong kernels by more than 1.
_TOLERANCE = 0.3


def verify(device: str = "auto") -> Dict[str, Any]:
    """Computes on the device and says how far off it was.

    Args:
        device: 'cpu', 'cuda' (also for ROCm), 'mps', or 'auto' for the best one that torch offers.
    """
    start = time.perf_counter()
    verdict: Dict[str, Any] = {"ok": False, "device": device, "device_name": None, "torch": None, "error": None}
    try:
        _compute(device, verdict)
    except Exception as error:  # whatever went wrong is the verdict
        verdict["error"] = "{}: {}".format(type(error).__name__, str(error).strip().splitlines()[0] if str(error).strip() else "")
    verdict["seconds"] = round(time.perf_counter() - start, 2)
    return verdict


def _compute(device: str, verdict: Dict[str, Any]) -> None:
    import torch

    verdict["torch"] = torch.__version__
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Verify that torch computes; prints one line of JSON.")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--package", help="also fail when this package cannot be found")
    options = parser.parse_args(argv)
    verdict = verify(options.device)
    if verdict["ok"] and options.package and importlib.util.find_spec(options.package) is None:
        verdict.update(ok=False, error="package '{}' was installed but cannot be found".format(options.package))
    print(json.dumps(verdict))
    return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
