"""A training of ours as a subject: the same probes look at recipes and at scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from groundup.checking.examine import examine
from groundup.checking.findings import Report
from groundup.checking.probes import FAST
from groundup.checking.subject import Subject
from groundup.core import console
from groundup.core.messages import say
from groundup.jobs import Job
from groundup.training import loop

MOST = 24  # steps of data that the probes see


class _Loader:
    """The first micro-batches of a job; where samples differ in length, the shortest of a step first: what is found does not depend on it, time and
    memory do."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[Any]:
        for step in range(min(MOST, self.job.state.total)):
            parts = self.job.batches.micro(step)
            yield from parts if self.job.batches.tokens is None else reversed(list(parts))


def subject_of(job: Job) -> Subject:
    """A job that is about to begin."""

    def compute_loss(model: Any, batch: Any) -> Tensor:
        with loop.mixed_precision(job.plan):
            found = job.task.loss(model, batch)
        return found.sum / torch.as_tensor(found.count).clamp(min=1).to(found.sum.device)

    space = {f"optimizer_{i}": o for i, o in enumerate(job.state.optimizers)}
    return Subject(job.state.model, None, job.state.optimizers[0], _Loader(job), compute_loss=compute_loss, namespace=space)


def check_job(job: Job, *, fast: bool = False) -> Report:
    """The probes on a job; `fast`: only those of one step, which every training of some length begins with."""
    subject = subject_of(job)
    subject.light = fast
    job.plan.stage(0, job.state.total).enter(job.state.model)
    with console.progress() as told:

        def tell(en: str, zh: str, share: float) -> None:
            told(say("check: {what}", "检查：{what}", what=say(en, zh)), share)

        return examine(subject, tell, probes=FAST) if fast else examine(subject, tell)
