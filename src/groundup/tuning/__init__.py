"""What fine-tuning adds: methods that change the model before the loop. No second loop.

A method is one file with a function `apply(model, **arguments) -> list of modules to keep frozen`, registered with its card.
"""

from groundup.core.registry import METHODS

register = METHODS.register

__all__ = ["METHODS", "register"]
