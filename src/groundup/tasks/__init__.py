"""Tasks: what a sample means. One file each; a task binds data, model and metrics."""

from groundup.core.registry import TASKS
from groundup.tasks.base import Batch, Encoded, Loss, Task

register = TASKS.register

__all__ = ["TASKS", "Batch", "Encoded", "Loss", "Task", "register"]
