"""Whether a training fits and how long it takes, from a step on fake tensors: the recipe's own model, loss, optimizer and first batch."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from groundup import modelfolder
from groundup.core.device import available_memory
from groundup.core.errors import GroundupError, RecipeError
from groundup.core.recipe import Recipe
from groundup.core.registry import METHODS
from groundup.data.prepare import prepare
from groundup.jobs import check_settings, fit, like_base, steps_of
from groundup.models.base import build_model, count_parameters, placed
from groundup.models.decoder import Decoder
from groundup.models.language import LanguageModel
from groundup.planning.devices import Device
from groundup.planning.trace import Trace, Work, adapts, as_fake, evaluation, fake_mode, stack_of, training_step
from groundup.tasks.base import Task
from groundup.training.batches import Batches
from groundup.training.optim import build_optimizers
from groundup.tuning import stages_of

if TYPE_CHECKING:
    from groundup.jobs import Job

CPU = torch.device("cpu")
PATIENCE = 25.0  # seconds in which advice is looked for
FEW = (2, 3)  # layers that are traced of models with more than twice as many
KERNEL = 8e-6  # seconds in which a GPU's host starts one kernel
CODE = 25 * 2**20  # pages of the libraries' own files that a first training brings in
LIBRARIES = 60 * 2**20  # with what they keep for themselves, where nothing was measured
HOST = 20e9  # bytes per second between a GPU and its host (PCIe 4.0 x16), and of the host's own memory where it updates weights
NF4 = 0.516  # bytes of a number in four bits, its quantised scales included (Dettmers et al., QLoRA, arXiv 2305.14314, 3)
LIKE_TEXT = ("language-modeling", "instruction-tuning", "preference-tuning")

OWNERS_ZH = {
    "weights": "权重",
    "adapters": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器状态",
    "activations": "激活值",
    "logits": "logits",
    "workspace": "反向传播的工作区",
    "update": "参数更新的工作区",
    "data": "数据",
    "cast": "权重的 16 位副本",
    "gathered": "汇集的参数",
    "buckets": "梯度通信缓冲",
    "dequantised": "反量化的矩阵",
    "ema": "滑动平均权重",
}


@dataclass
class Forecast:
    """What a training needs, of one device where there are several.

    Args:
        moments: for each phase of a step, and for an evaluation, owner -> bytes when most stands; memory: of the worst phase of a step; peak: its sum.
        step_seconds: of one optimizer step, from quick to slow. checkpoint: bytes of one checkpoint, and of its copy in the host's memory on GPUs.
        cache: bytes of keys and values of one sequence as long as the model's context.
        traffic: bytes that a device sends and receives in a step. calibrated: seconds of a step measured here, where that was done.
        libraries: bytes that the process of a CPU holds beside the tensors: data, threads, packed matrices, gaps between what was freed.
    """

    device: Device
    precision: str
    parameters: tuple[int, int]
    batch_size: int
    micro_batch_size: int
    steps: int
    moments: dict[str, dict[str, int]]
    flops: float
    step_seconds: tuple[float, float]
    checkpoint: int
    cache: int
    gpus: int = 1
    nodes: int = 1
    sharding: str | None = None
    traffic: float = 0.0
    calibrated: float | None = None
    libraries: int = LIBRARIES

    @property
    def memory(self) -> dict[str, int]:
        return max((m for phase, m in self.moments.items() if phase != "evaluation"), key=lambda m: sum(m.values()))

    @property
    def evaluation(self) -> int:
        return sum(self.moments["evaluation"].values())

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def resident(self) -> int:
        """What the process takes above its imports: on CPUs the tensors and what the libraries keep for themselves; on GPUs the driver's context."""
        return self.peak + (self.device.context if self.device.gpu else self.libraries)

    @property
    def fits(self) -> bool:
        return max(self.peak, self.evaluation) <= self.device.memory

    @property
    def hours(self) -> tuple[float, float]:
        quick, slow = (s * self.steps / 3600 for s in self.step_seconds)
        return quick, slow

    def as_json(self, price: float | None = None) -> dict[str, Any]:
        """price: of one device for an hour, in any currency."""
        energy = [round(h * self.gpus * self.device.watts / 1000, 3) for h in self.hours] if self.device.watts else None
        return {
            "device": self.device.name,
            "gpus": self.gpus,
            "sharding": self.sharding,
            "traffic": round(self.traffic),
            "calibrated": self.calibrated,
            "kilowatt_hours": energy,
            "cost": None if price is None else [round(h * self.gpus * price, 2) for h in self.hours],
            "source": self.device.source,
            "precision": self.precision,
            "parameters": {"all": self.parameters[0], "trainable": self.parameters[1]},
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "steps": self.steps,
            "memory": {**self.memory, "peak": self.peak, "capacity": self.device.memory},
            "evaluation": self.evaluation,
            "resident": self.resident,
            "kv_cache": self.cache,
            "staging": self.checkpoint,
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
    mode = fake_mode()
    base = None if recipe.init is None else modelfolder.load(recipe.init, trust_code=trust_code)
    task = modelfolder.build_task(recipe.task.name, recipe.task.arguments)
    check_settings(recipe, task, base)
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
    changed_by_method(model, recipe, mode)
    encoded = task.prepare(prepared.dataset, prepared.splits["train"], CPU, workers=0)
    size = min(recipe.train.batch_size, len(encoded))
    batches = Batches(task, encoded, batch_size=size, micro_batch_size=size, seed=recipe.train.seed, device=CPU)
    return Subject(recipe, task, model, batches, steps_of(recipe, batches), mode)


def changed_by_method(model: nn.Module, recipe: Recipe, mode: Any) -> None:
    """The tuning method's change of the model; a base in fewer bits stays whole here, its bytes are counted afterwards."""
    method = METHODS.get(recipe.method.name)
    arguments = {k: v for k, v in recipe.method.arguments.items() if k != "bits"}
    with mode:
        stages = stages_of(method.target(model, **METHODS.build_arguments(method, arguments, "method")))
    stages[-1].enter(model)


def of_job(job: Job) -> Forecast:
    """Of a training that is about to start on this machine's CPU, with its rehearsed step as the time."""
    mode = fake_mode()
    batches = copy.copy(job.batches)
    subject = Subject(job.recipe, job.task, as_fake(job.state.model, mode), batches, job.state.total, mode)
    here = Device("cpu", available_memory(), {"float32": 1.0}, 1.0, "this machine", gpu=False)
    found = _traced(subject, here, "float32", batches.micro_batch_size)
    found.calibrated = float(job.run.decisions["step_seconds"]["value"])
    found.step_seconds = (found.calibrated, 1.25 * found.calibrated)
    return found


def forecast(subject: Subject, device: Device, gpus: int = 1, sharding: str = "fsdp", nodes: int = 1) -> Forecast:
    """Traces a step for this device; a micro-batch of `auto` is halved until it fits, as a training does.

    Args:
        gpus: all devices, in so many nodes. sharding: 'fsdp' (weights, gradients and optimizer states divided among them), 'ddp' (whole on each), or
            'tensor' (the devices of a node share every layer, and the nodes divide the rest as FSDP does).
    """
    if sharding not in ("fsdp", "ddp", "tensor"):
        raise RecipeError(
            "--sharding {name}: fsdp, ddp or tensor is expected",
            "--sharding {name}：应为 fsdp、ddp 或 tensor",
            name=sharding,
            fix="--sharding fsdp",
        )
    recipe, batches = subject.recipe, subject.batches
    group = gpus // nodes if sharding == "tensor" else 1
    replicas = gpus // group
    if batches.batch_size % replicas:
        raise RecipeError(
            "train.batch_size = {batch} cannot be divided among {n} devices or groups of them",
            "train.batch_size = {batch} 无法分给 {n} 个设备（或设备组）",
            n=replicas,
            batch=batches.batch_size,
            least=max(1, batches.batch_size // replicas) * replicas,
            fix="--set train.batch_size={least}",
        )
    part = subject
    if group > 1:
        from groundup.planning.tensor import part_of

        part = part_of(subject, group)
    precision = recipe.train.precision if recipe.train.precision != "auto" else "bfloat16" if device.gpu and device.bfloat16 else "float32"
    wanted = recipe.train.micro_batch_size
    size = min(int(wanted) if wanted != "auto" else batches.batch_size, batches.batch_size // replicas)
    batches.tokens = None if device.gpu or wanted != "auto" or batches.encoded is None else subject.task.computed_at_once(batches.encoded)

    def planned(size: int) -> Forecast:
        found = _layered(part, device, precision, size)
        if replicas > 1:
            found = _shared(found, part, replicas, nodes, group, sharding)
        return _grouped(found, subject, group, replicas) if group > 1 else found

    found = planned(size)
    if found.fits or wanted != "auto" or size == 1:
        return found
    least, most = planned(1), size
    each = max(1.0, (found.peak - least.peak) / (size - 1))  # bytes of a sample
    while size > 1:
        size //= 2
        # Only a size that may fit is looked at: tracing a deep model takes seconds.
        if least.peak + each * (size - 1) <= 1.02 * device.memory and size < most and size > 1 and (found := planned(size)).fits:
            return found
    return least


def _layered(subject: Subject, device: Device, precision: str, size: int) -> Forecast:
    """Of deep models a few layers are traced and the rest is extrapolated: every layer adds the same."""
    found = stack_of(subject.model, 2 * FEW[1])
    if found is None:
        return _traced(subject, device, precision, size)
    parent, name, layers = found
    try:
        few, more = (_with(parent, name, layers[:n], lambda: _traced(subject, device, precision, size)) for n in FEW)
    finally:
        setattr(parent, name, layers)
    times = (len(layers) - FEW[0]) / (FEW[1] - FEW[0])

    def on(a: Any, b: Any) -> Any:
        return type(b)(a + (b - a) * times)

    quick, slow = (on(a, b) for a, b in zip(few.step_seconds, more.step_seconds))
    return replace(
        more,
        parameters=count_parameters(subject.model),
        moments={
            phase: {k: max(0, on(few.moments[phase].get(k, 0), v)) for k, v in memory.items()} for phase, memory in more.moments.items()
        },
        flops=on(few.flops, more.flops),
        step_seconds=(quick, slow),
        checkpoint=on(few.checkpoint, more.checkpoint),
        cache=_cache_of(subject.model, subject.recipe),
    )


def _with(parent: nn.Module, name: str, layers: nn.ModuleList, call: Callable[[], Forecast]) -> Forecast:
    setattr(parent, name, layers)
    return call()


def _shared(one: Forecast, subject: Subject, gpus: int, nodes: int, group: int, sharding: str) -> Forecast:
    """The same training on several devices: memory of one of them, its share of the work, and what has to be sent.

    'fsdp' is FSDP2 itself on ranks that do not exist, see `sharded`; 'ddp' keeps everything whole, and the gradients once more in the buckets in which
    they are summed (Li et al., arXiv 2006.15704, 3.2.3).

    Args:
        gpus: devices, or groups of them that share every layer, each of which has a part of the batch.
    """
    device = one.device
    if sharding == "ddp":
        gradients = sum(p.numel() * p.element_size() for p in subject.model.parameters() if p.requires_grad)
        moments = {phase: memory | {"buckets": gradients} for phase, memory in one.moments.items()}
        traffic = 2 * (gpus - 1) / gpus * gradients
    else:
        from groundup.planning.sharded import sharded_moments  # torch's distributed part takes a second to import

        traced, traffic = sharded_moments(subject, precision=one.precision, size=one.micro_batch_size, world=gpus)
        moments = {phase: _corrected(subject.recipe, subject.model, memory, gpus) for phase, memory in traced.items()}
    sending = max(traffic / device.link, group * traffic / device.network if nodes > 1 else 0.0)
    quick, slow = (s / gpus for s in one.step_seconds)
    # The quick end hides all sending behind the computing, the slow end none of it.
    return replace(
        one,
        moments=moments,
        gpus=gpus,
        nodes=nodes,
        sharding=sharding,
        traffic=traffic,
        step_seconds=(max(quick, sending), slow + sending),
    )


def _grouped(one: Forecast, subject: Subject, group: int, replicas: int) -> Forecast:
    """With what groups of devices that share every layer send each other meanwhile: nothing can be computed until it is there."""
    from groundup.planning.tensor import traffic_of

    traffic = traffic_of(subject, group, replicas, 4 if one.precision == "float32" else 2)
    sending = traffic / one.device.link
    quick, slow = one.step_seconds
    return replace(
        one,
        parameters=count_parameters(subject.model),
        gpus=group * replicas,
        sharding="tensor",
        traffic=one.traffic + traffic,
        step_seconds=(quick + sending, slow + 2 * sending),
        flops=one.flops * group,
        checkpoint=one.checkpoint * group,
    )


def advice(
    recipe: Recipe, build: Callable[[dict[str, Any]], Subject], device: Device, own: Forecast, sharding: str = "fsdp"
) -> list[dict[str, Any]]:
    """Changes after which the training needs less, each planned anew: those that make it fit, the cheapest in time first, or else the one that spares most.

    Args:
        build: overrides -> what is to be planned with them.
    """
    context = recipe.task.arguments.get("context")
    micro, whole = {"train.micro_batch_size": 1}, {"train.checkpointing": "whole"}
    tried: list[dict[str, Any]] = [micro]
    if recipe.optim.name == "muon":  # its update stacks all matrices of a shape
        tried.append({"optim.name": "adamw"})
    if recipe.task.name in LIKE_TEXT:
        tried += [{"train.checkpointing": "selective"}, whole, whole | micro]
        tried += [whole | micro | {"optim.name": "adamw"}] if recipe.optim.name == "muon" else []
        if context and int(context) > 512:
            tried.append(micro | {"task.context": int(context) // 2})
        if recipe.method.name == "full":
            tried += [{"method.name": "lora"}, whole | micro | {"method.name": "lora"}]
        rank = int(recipe.method.arguments.get("rank", 16))
        if recipe.method.name == "lora" and rank > 8:
            tried.append({"method.rank": rank // 2})
        if recipe.method.name in ("full", "lora") and not recipe.method.arguments.get("bits") and device.gpu:
            tried += [{"method.name": "lora", "method.bits": 4}, whole | micro | {"method.name": "lora", "method.bits": 4}]
    if device.gpu and not recipe.optim.offload:
        tried.append({"optim.offload": True})
    tried = _that_change(tried, recipe, own)
    found: list[dict[str, Any]] = []
    if own.peak > 2 * device.memory:
        tried.reverse()  # small changes will not do, and there is no time to try them all
    begin = time.monotonic()
    for changes in tried:
        spent = time.monotonic() - begin
        if (spent > PATIENCE and found) or spent > 2 * PATIENCE or sum(a["fits"] for a in found) == 3:
            break
        try:
            other = forecast(build(changes), device, own.gpus, sharding, own.nodes)
        except GroundupError:  # a change that this recipe does not allow
            continue
        if other.peak < own.peak:
            slower = (other.step_seconds[0] + other.step_seconds[1]) / (own.step_seconds[0] + own.step_seconds[1])
            found.append({"set": changes, "peak": other.peak, "fits": other.fits, "slower": round(slower, 2)})
    if not device.gpu or own.gpus > 1:
        fitting = []
    else:  # as many devices as the batch can be divided among
        fitting = [n for n in (2, 4, 8) if own.batch_size % n == 0]
    for n in fitting if not any(a["fits"] for a in found) else ():
        other = forecast(build({}), device, n, sharding)
        found.append(
            {
                "gpus": n,
                "set": {},
                "peak": other.peak,
                "fits": other.fits,
                "slower": round(sum(other.step_seconds) / sum(own.step_seconds), 2),
            }
        )
        if other.fits:
            break
    good = sorted((a for a in found if a["fits"]), key=lambda a: a["slower"])
    return good[:5] or sorted(found, key=lambda a: a["peak"])[:1]


def _that_change(tried: list[dict[str, Any]], recipe: Recipe, own: Forecast) -> list[dict[str, Any]]:
    """Without settings that are already so, and each only once."""
    found: list[dict[str, Any]] = []
    for changes in tried:
        new = {
            k: v
            for k, v in changes.items()
            if not (k == "train.micro_batch_size" and own.micro_batch_size == 1)
            and not (k == "train.checkpointing" and recipe.train.checkpointing == v)
            and not (k == "method.name" and recipe.method.name == v)
        }
        if new and new not in found:
            found.append(new)
    return found


def _traced(subject: Subject, device: Device, precision: str, size: int) -> Forecast:
    recipe, model, batches = subject.recipe, subject.model, subject.batches
    batches.micro_batch_size = size
    model.zero_grad(set_to_none=True)
    model.train()
    cast = contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", getattr(torch, precision))
    optimizers = build_optimizers(model, recipe.optim.model_copy(update={"offload": False}), "cpu")
    trace = Trace(subject.mode, getattr(model, "vocabulary", None), here=not device.gpu)
    with warnings.catch_warnings(), trace, trace.few_chunks():
        warnings.simplefilter("ignore")  # of kernels that would be chosen for real numbers
        training_step(trace, subject, optimizers, cast)
        evaluation(trace, subject, cast)
    moments = {phase: _corrected(recipe, model, memory) for phase, memory in trace.peaks().items()}
    times = batches.per_step / min(2, batches.per_step)
    per_micro = [trace.work[k] for k in ("activations", "workspace")]
    update = trace.work["update"]
    flops = sum(w.all_flops for w in per_micro) * times + update.all_flops
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = sum(
        v.numel() * v.element_size() for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )
    kept = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if not adapts(model) or n in trained)
    quick, slow = (
        sum(
            sum(f / (device.flops.get(d, device.flops["float32"]) * share) for d, f in w.flops.items()) * n
            + max(
                w.bytes / device.bandwidth * n * (0.5 if share == device.efficiency[1] else 1.0),
                w.kernels * KERNEL * n if device.gpu else 0,
            )
            for w, n in [*((w, times) for w in per_micro), (_as_on(device, update), 1.0)]
        )
        for share in reversed(device.efficiency)
    )
    if recipe.optim.offload:  # gradients go to the host and weights come back (8 bytes); the update there reads and writes 28 bytes of each
        there = sum(p.numel() for p in model.parameters() if p.requires_grad) * 36 / HOST
        quick, slow = quick + there, slow + 2 * there
    model.zero_grad(set_to_none=True)
    return Forecast(
        device,
        precision,
        count_parameters(model),
        batches.batch_size,
        size,
        subject.steps,
        moments,
        flops,
        (quick, slow),
        state + kept,
        _cache_of(model, recipe),
    )


def _corrected(recipe: Recipe, model: nn.Module, memory: dict[str, int], gpus: int = 1) -> dict[str, int]:
    """With the bytes that settings save and add which the trace does not run: a base in fewer bits, states on the host, averaged weights."""
    memory = dict(memory)
    if bits := recipe.method.arguments.get("bits"):
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        matrices = [w for w in matrices if w.shape[0] != getattr(model, "vocabulary", None)]
        each = NF4 if bits == 4 else 1.0
        memory["weights"] -= sum(int(w.numel() * (w.element_size() - each)) for w in matrices) // gpus
        if "cast" in memory:  # what is kept of them for the backward pass is the few bits, not their copies in 16
            memory["cast"] = max(0, memory["cast"] - sum(2 * w.numel() for w in matrices))
        memory["dequantised"] = max((w.numel() * w.element_size() for w in matrices), default=0)
    if recipe.optim.offload:
        memory.pop("optimizer", None)
    if recipe.train.ema is not None:
        memory["ema"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) // gpus
    return memory


def _cache_of(model: nn.Module, recipe: Recipe) -> int:
    """Bytes of the keys and values of one sequence."""
    if not isinstance(model, Decoder):
        return 0
    context = min(model.context, int(recipe.task.arguments.get("context", model.context)))
    return 2 * len(model.model.layers) * model.kv_heads * model.head_dim * context * model.output_weight.element_size()


def _as_on(device: Device, update: Work) -> Work:
    """Muon's products are in bfloat16 on GPUs."""
    return Work({"bfloat16": update.all_flops}, update.bytes, update.kernels) if device.gpu else update
