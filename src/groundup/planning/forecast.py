"""Whether a training fits and how long it takes, from a step on fake tensors: the recipe's own model, loss, optimizer and first batch."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from groundup import modelfolder
from groundup.core.errors import RecipeError
from groundup.core.recipe import Recipe, load
from groundup.core.registry import METHODS
from groundup.data.prepare import prepare
from groundup.jobs import fit, like_base, steps_of
from groundup.models.base import build_model, count_parameters, placed
from groundup.models.language import LanguageModel
from groundup.planning.devices import Device
from groundup.planning.trace import Trace, Work, as_fake, fake_mode, step
from groundup.tasks.base import Task
from groundup.training.batches import Batches
from groundup.training.optim import build_optimizers
from groundup.tuning import stages_of

CPU = torch.device("cpu")
KERNEL = 8e-6  # seconds in which a GPU's host starts one kernel


@dataclass
class Forecast:
    """What a training needs.

    Args:
        memory: owner -> bytes at the moment when most memory stands; peak: their sum; capacity: what the device has.
        step_seconds: of one optimizer step, from quick to slow. checkpoint: bytes of one checkpoint.
    """

    device: Device
    precision: str
    parameters: tuple[int, int]
    batch_size: int
    micro_batch_size: int
    steps: int
    memory: dict[str, int]
    flops: float
    step_seconds: tuple[float, float]
    checkpoint: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.memory

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "source": self.device.source,
            "precision": self.precision,
            "parameters": {"all": self.parameters[0], "trainable": self.parameters[1]},
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "steps": self.steps,
            "memory": {**self.memory, "peak": self.peak, "capacity": self.device.memory},
            "fits": self.fits,
            "step_flops": self.flops,
            "step_seconds": [round(s, 6) for s in self.step_seconds],
            "train_seconds": [round(s * self.steps, 1) for s in self.step_seconds],
            "disk": {"checkpoint": self.checkpoint, "run": 3 * self.checkpoint},
        }


@dataclass
class Subject:
    """What is planned: a recipe's task and batches, and its model without contents."""

    recipe: Recipe
    task: Task
    model: nn.Module
    batches: Batches
    steps: int
    mode: Any


def subject_of(recipe: Recipe, trust_code: bool = False) -> Subject:
    """Prepares the data as a training would (cached), and builds the model without memory for it.

    Raises:
        UserError: the data or the model to start from is not here, or does not fit the recipe.
    """
    odd = {"method.bits": recipe.method.arguments.get("bits"), "train.ema": recipe.train.ema, "optim.offload": recipe.optim.offload}
    if uncounted := [name for name, value in odd.items() if value]:
        raise RecipeError(
            "{what} cannot be planned yet: its memory would be counted wrongly",
            "还不能规划 {what}：内存会算错",
            what=", ".join(uncounted),
            fix=f"--set {uncounted[0]}={'false' if uncounted[0] == 'optim.offload' else 'null'}   plans the training without it",
        )
    mode = fake_mode()
    base = None if recipe.init is None else modelfolder.load(recipe.init, trust_code=trust_code)
    task = modelfolder.build_task(recipe.task.name, recipe.task.arguments)
    prepared = prepare(like_base(task.reads(recipe.data), base), classification=task.classification, kind=task.kind)
    fit(task, prepared, base, recipe.keep_classes)
    if base is not None:
        model: Any = base.model
        if task.num_outputs != base.task.num_outputs and hasattr(model, "reset_head"):
            model.reset_head(task.num_outputs)
        model = as_fake(placed(model, CPU), mode)
    elif task.kind != "text":  # small enough to be built, with the layout in memory that it will have
        model = as_fake(placed(build_model(recipe.model.name, recipe.model.arguments, task.input_shape, task.num_outputs), CPU), mode)
    else:
        with mode:
            model = build_model(recipe.model.name, recipe.model.arguments, task.input_shape, task.num_outputs)
    if recipe.train.checkpointing != "none" and isinstance(model, LanguageModel):
        model.recompute(recipe.train.checkpointing)
    method = METHODS.get(recipe.method.name)
    with mode:
        stages = stages_of(method.target(model, **METHODS.build_arguments(method, recipe.method.arguments, "method")))
    stages[-1].enter(model)
    encoded = task.prepare(prepared.dataset, prepared.splits["train"], CPU, workers=0)
    size = min(recipe.train.batch_size, len(encoded))
    batches = Batches(task, encoded, batch_size=size, micro_batch_size=size, seed=recipe.train.seed, device=CPU)
    return Subject(recipe, task, model, batches, steps_of(recipe, batches), mode)


def forecast(subject: Subject, device: Device) -> Forecast:
    """Traces a step for this device; a micro-batch of `auto` is halved until it fits, as a training does."""
    recipe, batches = subject.recipe, subject.batches
    precision = recipe.train.precision if recipe.train.precision != "auto" else "bfloat16" if device.gpu else "float32"
    wanted = recipe.train.micro_batch_size
    small = None if device.gpu else getattr(subject.task, "small_batch", None)
    size = min(int(wanted), batches.batch_size) if wanted != "auto" else batches.batch_size
    if wanted == "auto" and small is not None:
        size = min(size, small(batches.encoded))
    while True:
        found = _traced(subject, device, precision, size)
        if found.fits or wanted != "auto" or size == 1:
            return found
        size //= 2


# Changes of a recipe that spare memory, the cheapest in time first. The update of Muon stacks all matrices of a shape.
SPARING = (
    {"train.micro_batch_size": 1},
    {"optim.name": "adamw"},
    {"train.checkpointing": "selective"},
    {"train.checkpointing": "whole"},
    {"train.checkpointing": "whole", "train.micro_batch_size": 1},
    {"train.checkpointing": "whole", "train.micro_batch_size": 1, "optim.name": "adamw"},
)


def advice(recipe: Recipe, device: Device, own: Forecast, trust_code: bool = False) -> list[dict[str, Any]]:
    """Changes after which the training needs less, each traced: those that make it fit, or else the one that spares most."""
    found: list[dict[str, Any]] = []
    for changes in SPARING:
        text = recipe.task.name in ("language-modeling", "instruction-tuning", "preference-tuning")
        if ("train.checkpointing" in changes and not text) or ("optim.name" in changes and recipe.optim.name != "muon"):
            continue
        changed = load(recipe, changes)
        other = forecast(subject_of(changed, trust_code), device)
        if other.peak < own.peak:
            found.append(
                {"set": changes, "peak": other.peak, "fits": other.fits, "slower": round(other.step_seconds[0] / own.step_seconds[0], 2)}
            )
    fitting = [a for a in found if a["fits"]]
    return fitting or sorted(found, key=lambda a: a["peak"])[:1]


def _traced(subject: Subject, device: Device, precision: str, size: int) -> Forecast:
    recipe, task, model, batches = subject.recipe, subject.task, subject.model, subject.batches
    batches.micro_batch_size, batches.per_step = size, -(-batches.batch_size // size)
    model.zero_grad(set_to_none=True)
    model.train()
    cast = contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", getattr(torch, precision))
    optimizers = build_optimizers(model, recipe.optim, "cpu")
    trace = Trace(subject.mode, task.num_outputs if task.kind == "text" else None)

    def loss(batch: Any) -> torch.Tensor:
        with cast:
            return task.loss(model, batch).sum / batches.batch_size

    with warnings.catch_warnings(), trace:
        warnings.simplefilter("ignore")  # of kernels that would be chosen for real numbers
        for p in model.parameters():
            trace.see(p, "weights" if not p.requires_grad or not _adapts(model) else "adapters")
        for b in model.buffers():
            trace.see(b, "weights")
        for round_ in range(2):  # the second one meets the optimizer's state
            trace.mark(f"step {round_}")
            step(trace, model, loss, _two(subject, trace), optimizers, clip=recipe.train.clip_norm is not None)
        trace.mark("end")
    _, memory = trace.peak()
    done = min(2, batches.per_step)
    times = batches.per_step / (2 * done)
    per_micro = [trace.work[k] for k in ("activations", "workspace")]
    update = trace.work["update"]
    flops = sum(w.all_flops for w in per_micro) * times + update.all_flops / 2
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = sum(
        v.numel() * v.element_size() for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )
    kept = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if not _adapts(model) or n in trained)
    quick, slow = (
        sum(
            sum(f / (device.flops.get(d, device.flops["float32"]) * share) for d, f in w.flops.items()) * n
            + max(
                w.bytes / device.bandwidth * n * (0.5 if share == device.efficiency[1] else 1.0),
                w.kernels * KERNEL * n if device.gpu else 0,
            )
            for w, n in [*((w, times) for w in per_micro), (_as_on(device, update), 0.5)]
        )
        for share in reversed(device.efficiency)
    )
    model.zero_grad(set_to_none=True)
    return Forecast(
        device,
        precision,
        count_parameters(model),
        batches.batch_size,
        size,
        subject.steps,
        dict(memory),
        flops,
        (quick, slow),
        state + kept,
    )


def _as_on(device: Device, update: Work) -> Work:
    """Muon's products are in bfloat16 on GPUs."""
    return Work({"bfloat16": update.all_flops}, update.bytes, update.kernels) if device.gpu else update


def _adapts(model: nn.Module) -> bool:
    return any("lora_A" in n for n, _ in model.named_parameters())


def _two(subject: Subject, trace: Trace) -> Any:
    """The first micro-batches, two at most: of more, the memory is the same."""
    for k, batch in enumerate(subject.batches.micro(0)):
        if k == 2:
            return
        if batch.inputs.is_floating_point():
            batch.inputs = subject.mode.from_tensor(batch.inputs)
        trace.see(batch.inputs, "data")
        trace.see(batch.targets, "data")
        yield batch
