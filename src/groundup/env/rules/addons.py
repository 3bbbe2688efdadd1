"""Extensions with compiled code of their own, by the words in which texts name them."""

from __future__ import annotations

import re
from typing import Optional

from groundup.env.machine import Machine

# Extensions with compiled code of their own: pattern in a path, module or sentence -> the distribution's name.
ADDONS = (
    (r"flash[_-]?attn|flash_attn_2_cuda|flash[- ]?attention", "flash-attn"),
    (r"\bvllm\b", "vllm"),
    (r"xformers", "xformers"),
    (r"bitsandbytes|\bbnb\b", "bitsandbytes"),
    (r"\bsgl[_-]kernel|sglang", "sgl-kernel"),
    (r"flashinfer", "flashinfer"),
    (r"pyg[_-]lib|libpyg", "pyg-lib"),
    (r"torch[_-]scatter", "torch-scatter"),
    (r"torch[_-]sparse", "torch-sparse"),
    (r"torch[_-]cluster", "torch-cluster"),
    (r"torch[_-]spline", "torch-spline-conv"),
    (r"mmcv", "mmcv"),
    (r"detectron2", "detectron2"),
    (r"pytorch3d", "pytorch3d"),
    (r"deepspeed", "deepspeed"),
    (r"\bapex\b|amp_c\b", "apex"),
    (r"causal[_-]conv1d", "causal-conv1d"),
    (r"mamba[_-]ssm|selective_scan", "mamba-ssm"),
    (r"auto[_-]?gptq|exllama|gptqmodel", "auto-gptq"),
    (r"auto[_-]?awq|awq_ext", "autoawq"),
    (r"onnxruntime", "onnxruntime-gpu"),
    (r"ctranslate2|faster[_-]whisper", "ctranslate2"),
    (r"tensorrt", "tensorrt"),
    (r"transformer[_-]engine", "transformer-engine"),
    (r"llama[_-]cpp", "llama-cpp-python"),
    (r"sage[_-]?attention", "sageattention"),
    (r"natten", "natten"),
    (r"spconv", "spconv"),
    (r"torchao\b", "torchao"),
    (r"nvdiffrast", "nvdiffrast"),
    (r"lmdeploy", "lmdeploy"),
    (r"\btriton\b|ptxas", "triton"),
)  # fmt: skip


def addon_of(m: Machine, where: Optional[str] = None, anywhere: bool = True) -> Optional[str]:
    """The extension that a text names: in `where` first (the lines of the error), else anywhere."""
    for text in (where, m.symptom, m.text) if anywhere else (where,):
        for pattern, name in ADDONS if text else ():
            if name != "triton" and re.search(pattern, text or "", re.IGNORECASE):
                return name
    return None
