"""What fine-tuning adds: methods that change the model before the loop. No second loop.

A method is one file with a function `apply(model, **arguments)`, registered with its card. It gives the modules (or single
parameters) to keep frozen, or a list of `Stage` where they change in the course of the run.
"""

from collections.abc import Sequence

from torch import nn

from groundup.core.registry import METHODS
from groundup.training.loop import Stage

register = METHODS.register


def stages_of(made: Sequence[nn.Module | nn.Parameter | Stage]) -> list[Stage]:
    """What a method gave, as stages: frozen parts are one that lasts from beginning to end."""
    return [m for m in made if isinstance(m, Stage)] or [Stage(0.0, [m for m in made if not isinstance(m, Stage)])]


__all__ = ["METHODS", "register", "stages_of"]
