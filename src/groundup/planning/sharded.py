"""Memory of one GPU among many: the model sharded as in training, on a process group of which only this rank exists.

FSDP2 itself runs (its gathering, freeing, prefetching and reducing), on fake tensors and with collectives that send nothing, so that its buffers and the
moments at which they stand are its own (Zhao et al., PyTorch FSDP, arXiv 2304.11277, 3 and 4).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.core.errors import GroundupError
from groundup.models.language import LanguageModel
from groundup.planning.forecast import Subject
from groundup.planning.trace import Trace, evaluation, stack_of, training_step
from groundup.training.optim import build_optimizers
from groundup.training.parallel import Ranks

# Layers that are traced of deep models. From three on each adds the same: the one that computes and its two neighbours hold buffers.
FEW = (3, 4)
WHOLE = 8  # a model with so many layers is traced as it is


Moments = dict[str, dict[str, int]]  # of each phase of a step, and of an evaluation: owner -> bytes when most stands


def sharded_moments(subject: Subject, *, precision: str, size: int, world: int) -> tuple[Moments, float]:
    """What one rank holds at the worst moment of each phase, and the bytes that it sends (and receives) in an optimizer step.

    Args:
        precision: of the products; weights and optimizer states are what the model's are. size: samples of a micro-batch of one rank.
        world: how many ranks share each batch.

    Raises:
        GroundupError: this process has a process group already.
    """
    batches = copy.copy(subject.batches)
    batches.ranks, batches.micro_batch_size = Ranks(0, world), size
    subject = replace(subject, batches=batches)
    with _fake_ranks(world) as mesh:
        found = _layered(subject, lambda part: _fsdp(part, precision, mesh))
        gc.collect()  # FSDP's states refer to themselves, and to the process group
        return found


@contextlib.contextmanager
def _fake_ranks(world: int) -> Iterator[DeviceMesh]:
    """This process as rank 0 of so many; the others do not exist, and nothing is sent."""
    if dist.is_initialized():
        raise GroundupError(
            "several devices are planned in a process of its own: this one is already part of a process group",
            "多设备规划需要单独的进程：当前进程已属于某个进程组",
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    module: Any = _fsdp_param
    chunks, module._chunk_with_empty = module._chunk_with_empty, _first_chunk
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        module._chunk_with_empty = chunks
        dist.destroy_process_group()


def _first_chunk(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """Of a parameter's parts that of rank 0: to make all five hundred takes longer than the step."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))]


def _layered(subject: Subject, trace: Callable[[Subject], tuple[Moments, float]]) -> tuple[Moments, float]:
    """Of deep models a few layers are traced twice, and the rest is extrapolated, each phase for itself: which is the worst may change with the depth."""
    found = stack_of(subject.model, WHOLE)
    if found is None:
        return trace(subject)
    parent, name, layers = found
    try:
        results = []
        for count in FEW:
            setattr(parent, name, layers[:count])
            results.append(trace(subject))
    finally:
        setattr(parent, name, layers)
    (few, sent_few), (more, sent_more) = results
    times = (len(layers) - FEW[0]) / (FEW[1] - FEW[0])
    moments = {}
    for phase in few | more:
        a, b = few.get(phase, {}), more.get(phase, {})
        memory = {k: a.get(k, 0) + round((b.get(k, 0) - a.get(k, 0)) * times) for k in a | b}
        moments[phase] = {k: v for k, v in memory.items() if v > 0}
    return moments, sent_few + (sent_more - sent_few) * times


def _cast(precision: str) -> Any:
    return contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", getattr(torch, precision))


class _ShardTrace(Trace):
    """A trace of one rank: it sees the local tensors of sharded ones, and what FSDP gathers and reduces."""

    sent = 0.0  # bytes, in all micro-batches that were traced
    buffers: str | None = None  # whose the storages are that begin now, whatever is being done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor turns it into operations on local tensors, which come back here
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _owner(self, tensor: Tensor) -> str:
        return self.buffers or super()._owner(tensor)

    @contextlib.contextmanager
    def owning(self, owner: str) -> Iterator[None]:
        self.buffers = owner
        yield
        self.buffers = None

    @contextlib.contextmanager
    def collectives(self, world: int) -> Iterator[None]:
        """Owns the buffers of FSDP's collectives and counts what they send; storages that it resizes are followed."""
        module: Any = _fsdp_param_group
        gather, copy_out, reduce = module.foreach_all_gather, module.foreach_all_gather_copy_out, module.foreach_reduce
        storage: Any = torch.UntypedStorage
        resize = storage.resize_

        def gathered(*args: Any, **kwargs: Any) -> Any:
            with self.owning("gathered"):
                found = gather(*args, **kwargs)
            self.sent += found.all_gather_output.nbytes * (world - 1) / world
            return found

        def copied_out(*args: Any, **kwargs: Any) -> Any:
            with self.owning("gathered"):
                return copy_out(*args, **kwargs)

        def reduced(*args: Any, **kwargs: Any) -> Any:
            with self.owning("gathered"):
                found = reduce(*args, **kwargs)
            self.sent += found[0].nbytes * (world - 1) / world
            return found

        def resized(this: torch.UntypedStorage, size: int) -> Any:
            found = resize(this, size)
            self.resized(this)
            return found

        module.foreach_all_gather, module.foreach_all_gather_copy_out, module.foreach_reduce = gathered, copied_out, reduced
        storage.resize_ = resized
        try:
            yield
        finally:
            module.foreach_all_gather, module.foreach_all_gather_copy_out, module.foreach_reduce = gather, copy_out, reduce
            del storage.resize_  # the class inherits its own


def _fsdp(subject: Subject, precision: str, mesh: DeviceMesh) -> tuple[Moments, float]:
    """One rank of FSDP2; gathered weights are in the dtype of the products, gradients are reduced in float32."""
    world = mesh.size()
    model: Any = copied(subject.model, subject.mode)
    subject = replace(subject, model=model)
    model.zero_grad(set_to_none=True)
    model.train()
    dtype = None if precision == "float32" else getattr(torch, precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    found = stack_of(model)
    with subject.mode:
        for layer in found[2] if found is not None else ():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    if isinstance(model, LanguageModel):
        register_fsdp_forward_method(model, "features")  # the tasks' way in: the head's product is part of their losses
    optimizers = build_optimizers(model, subject.recipe.optim.model_copy(update={"offload": False}), "cpu")
    sharded = list(model.parameters())
    with torch.no_grad():
        local = [nn.Parameter(_local(p), p.requires_grad) for p in sharded]
    part = {id(p): own for p, own in zip(sharded, local)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [part[id(p)] for p in group["params"]]

    def parts() -> list[nn.Parameter]:
        with torch.no_grad():
            for p, own in zip(sharded, local):
                own.grad = None if p.grad is None else _local(p.grad)
        return local

    trace = _ShardTrace(subject.mode, getattr(model, "vocabulary", None))
    with warnings.catch_warnings(), trace, trace.few_chunks(), trace.collectives(world):
        warnings.simplefilter("ignore")  # of kernels that would be chosen for real numbers
        training_step(trace, subject, optimizers, _cast(precision), parts)
        sent = trace.sent / min(2, subject.batches.per_step) * subject.batches.per_step
        evaluation(trace, subject, _cast(precision))
    return trace.peaks(), sent


def copied(model: nn.Module, mode: Any) -> nn.Module:
    """Another model of the same shapes: sharding changes the classes of modules and their parameters."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor) and id(tensor) not in memo:
            with mode:
                made: Any = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            memo[id(tensor)].__dict__.update(tensor.__dict__)
    return copy.deepcopy(model, memo)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
