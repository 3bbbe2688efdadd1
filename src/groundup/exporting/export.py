"""ONNX and torch.export: the model with its preprocessing inside, and proof that the file computes the same.

Inputs are what a program has at hand, pixels 0..255 in the model's size or raw features, so that nobody has to repeat the normalisation (a
forgotten one is the most frequent fault of deployed models). Beside the file goes `<file>.json`: labels, what the input must be, digests.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import groundup
from groundup import modelfolder
from groundup.core import files
from groundup.core.errors import GateError, GroundupError, UserError
from groundup.evaluation.evaluate import evaluating
from groundup.tasks.base import Task

SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4  # largest difference of outputs, as a share of the largest output where that is above 1
BATCHES = (1, 2, 5)  # sizes at which the file is tried: a batch size that was baked in would show


class Whole(nn.Module):
    """Preprocessing, model and the way back to the units of the data, as one module.

    Pictures: uint8 [B, C, H, W] -> logits [B, K]. Vectors: float32 [B, features] as they are in the data -> logits, or values in their units.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        facts = task.state()["preprocessor"]
        shape = (-1, 1, 1) if task.kind == "image" else (-1,)
        self.model, self.picture = model, task.kind == "image"
        self.register_buffer("mean", torch.tensor(facts["mean"], dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(facts["std"], dtype=torch.float32).view(shape))
        scale, offset = (getattr(task, name, None) for name in ("scale", "offset"))
        self.scaled = scale is not None
        self.register_buffer("scale", torch.as_tensor(np.asarray(1.0 if scale is None else scale), dtype=torch.float32))
        self.register_buffer("offset", torch.as_tensor(np.asarray(0.0 if offset is None else offset), dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs.to(torch.float32) / 255 if self.picture else inputs
        outputs: Tensor = self.model((x - self.mean) / self.std)
        return outputs * self.scale + self.offset if self.scaled else outputs


def export(model: str | Path, to: str, out: str | Path | None = None, *, force: bool = False, trust_code: bool = False) -> dict[str, Any]:
    """Writes a model in another format, whole and proven, or not at all.

    Args:
        to: 'onnx' (checked in onnxruntime) or 'torch-export' (a .pt2 file, opened again and checked).
        out: the file; default `exports/<name>.onnx` or `.pt2`.

    Returns:
        {'model', 'to', 'file', 'bytes', 'largest_difference', 'tolerance', 'batch_sizes'}.

    Raises:
        GateError: the file's outputs differ from the model's, or the model's from those it was saved with.
        UserError: unknown format, a file that is there already, a missing extra.
    """
    if to not in SUFFIX:
        raise UserError("--to {to}: known are {known}", "--to {to}：可用的有 {known}", to=to, known=", ".join(SUFFIX))
    loaded = modelfolder.load(model, trust_code=trust_code)
    path = Path(out).expanduser() if out is not None else Path("exports") / f"{loaded.card['source_run']}{SUFFIX[to]}"
    if path.suffix != SUFFIX[to]:
        path = path.with_name(path.name + SUFFIX[to])
    if path.exists() and not force:
        raise UserError("{path} exists already", "{path} 已经存在", path=path, fix="--force replaces it, or give another --out", fix_zh="--force 会替换它，或另选一个 --out")
    if (loaded.path / "reference.json").is_file() and not modelfolder.replay(loaded) <= TOLERANCE:
        raise GateError(
            "{model} does not compute here what it did when it was saved",
            "{model} 在这里的计算结果与保存时不同",
            model=loaded.path,
            fix="groundup runs verify RUN",
        )
    whole = Whole(loaded.answering, loaded.task).eval()
    samples = [_samples(loaded.task, n) for n in BATCHES]
    expected = [_expected(loaded, x) for x in samples]
    temporary = files.temporary_sibling(path).with_suffix(SUFFIX[to])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with evaluating(whole), _quiet():
            run = (_onnx if to == "onnx" else _torch_export)(whole, samples[-1], temporary)
            differences = [_difference(run(x), wanted) for x, wanted in zip(samples, expected)]
        largest = max(differences)
        if not largest <= TOLERANCE:
            raise GateError(
                "the exported model's outputs differ from the model's by {largest:.2e} (at most {tolerance:g} is accepted); no file was written",
                "导出模型的输出与原模型相差 {largest:.2e}（最多允许 {tolerance:g}）；没有写出文件",
                largest=largest,
                tolerance=TOLERANCE,
            )
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            "{path} cannot be written: {cause}", "{path} 无法写入：{cause}", path=path, cause=error, fix="--out another/place{suffix}", suffix=SUFFIX[to]
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    result = {
        "model": str(loaded.path),
        "to": to,
        "file": str(path),
        "bytes": path.stat().st_size,
        "largest_difference": largest,
        "tolerance": TOLERANCE,
        "batch_sizes": list(BATCHES),
    }
    files.write_json(path.with_name(path.name + ".json"), _card(loaded, result, path))
    return result


def _onnx(whole: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx imports it
    except ImportError as error:
        raise UserError(
            "export to ONNX needs {name}, which is not installed",
            "导出 ONNX 需要 {name}，尚未安装",
            name=error.name or "onnx",
            fix="pip install 'groundup[onnx]'   (or: pip install onnx onnxscript onnxruntime)",
            fix_zh="pip install 'groundup[onnx]'   （或：pip install onnx onnxscript onnxruntime）",
        ) from error
    batch = torch.export.Dim("batch", min=1)
    try:
        torch.onnx.export(
            whole,
            (example,),
            path,
            dynamo=True,
            external_data=False,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes={"inputs": {0: batch}},
            verbose=False,
        )
        onnx.checker.check_model(path)
    except OSError:
        raise
    except Exception as error:
        raise _failed("ONNX", error) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0])


def _torch_export(whole: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        program = torch.export.export(whole, (example,), dynamic_shapes={"inputs": {0: torch.export.Dim("batch", min=1)}})
        made = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, made)
        path.write_bytes(made.getbuffer())
        again = torch.export.load(path).module()
    except OSError:
        raise
    except Exception as error:
        raise _failed("torch.export", error) from error
    return lambda x: again(x)


def _failed(what: str, error: Exception) -> GroundupError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return GroundupError(
        "{what} cannot take this model: {cause}",
        "{what} 无法导出该模型：{cause}",
        what=what,
        cause=f"{type(error).__name__}: {lines[0] if lines else ''}",
        fix="--traceback shows where; a model whose forward() depends on values of its inputs cannot be exported",
        fix_zh="加 --traceback 可看到位置；forward() 依赖输入数值的模型无法导出",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and remarks, which are for those who write them."""
    noisy = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, before):
            logger.setLevel(level)


def _samples(task: Task, count: int) -> Tensor:
    """Fixed inputs as a program would give them."""
    unit = modelfolder.reference_inputs(task.input_shape, count)
    if task.kind == "image":
        return ((unit + 1) * 127.5).round().to(torch.uint8)
    facts = task.state()["preprocessor"]
    return (unit * torch.tensor(facts["std"]) + torch.tensor(facts["mean"])).float()


def _expected(loaded: modelfolder.Loaded, samples: Tensor) -> Tensor:
    """What groundup's own way, from `read` on, gives for them."""
    task, model = loaded.task, loaded.answering
    with evaluating(model):
        if task.kind == "image":
            return model(task.model_inputs(samples)).float()
        outputs: Tensor = model(task.model_inputs(torch.cat([task.read(row.tolist()) for row in samples]))).float()
    scale, offset = (getattr(task, name, None) for name in ("scale", "offset"))
    return outputs if scale is None else outputs * torch.as_tensor(np.asarray(scale)) + torch.as_tensor(np.asarray(offset))


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / max(1.0, float(wanted.abs().max())))


def _card(loaded: modelfolder.Loaded, result: dict[str, Any], path: Path) -> dict[str, Any]:
    facts = dict(loaded.task.state()["preprocessor"])
    shape = list(loaded.task.input_shape)
    inside = {k: facts.pop(k) for k in ("mean", "std", "scale") if k in facts}
    inputs: dict[str, Any] = {"name": "inputs", "shape": ["batch", *shape]}
    if loaded.task.kind == "image":
        inputs |= {
            "dtype": "uint8",
            "meaning": f"pixels 0..255, {'RGB' if shape[0] == 3 else 'grey'}, rows from the top",
            "resize_before": facts.get("resize"),
        }
    else:
        inputs |= {"dtype": "float32", "meaning": "features in their own units, in this order", "features": facts.get("features")}
    return {
        "format": result["to"],
        "groundup": groundup.__version__,
        "torch": torch.__version__,
        "name": loaded.card["source_run"],
        "task": loaded.card["task"],
        "labels": loaded.card["labels"],
        "inputs": inputs,
        "outputs": {"name": "outputs", "shape": ["batch", "K"], "meaning": "values" if hasattr(loaded.task, "scale") else "logits"},
        "preprocessing_inside": json.loads(json.dumps(inside)),
        "weights_sha256": loaded.sha256 if loaded.weights else None,
        "file_sha256": files.sha256(path),
        "parity": {k: result[k] for k in ("largest_difference", "tolerance", "batch_sizes")},
    }
