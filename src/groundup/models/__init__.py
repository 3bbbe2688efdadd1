"""Models: one file per family, found by name. A file here with `@MODELS.register` is all it takes."""

from groundup.core.registry import MODELS
from groundup.models.base import Model

register = MODELS.register

__all__ = ["MODELS", "Model", "register"]
