"""groundup: from an empty machine to a fine-tuned model in service, on PyTorch 2.

The functions are loaded when first used, so that importing the package costs nothing and needs no torch:

    import groundup as gu

    run = gu.train("digits-cnn", {"train.epochs": 1})
    run.evaluate()
    tuned = gu.tune(run, data="path/to/photos", method="head")
    gu.predict(tuned, "photo.png")
"""

from __future__ import annotations  # start.py imports this on Python 3.8 too

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# GNU OpenMP's threads wait for each other by turning round for milliseconds. Where other programs want the cores too, they take the time of the very
# thread that they wait for: a training took up to four times as long as with this. It reads this once, when torch is loaded.
if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# public name -> (module, attribute); the only list of what Python callers get.
_PUBLIC = {
    "train": ("groundup.pipeline", "train"),
    "tune": ("groundup.pipeline", "tune"),
    "evaluate": ("groundup.pipeline", "evaluate"),
    "predict": ("groundup.pipeline", "predict"),
    "generate": ("groundup.pipeline", "generate"),
    "export": ("groundup.pipeline", "export"),
    "serve": ("groundup.pipeline", "serve"),
    "check": ("groundup.pipeline", "check"),
    "plan": ("groundup.pipeline", "plan"),
    "load": ("groundup.modelfolder", "load"),
    "Run": ("groundup.pipeline", "Run"),
    "Recipe": ("groundup.core.recipe", "Recipe"),
    "GroundupError": ("groundup.core.errors", "GroundupError"),
    "register_model": ("groundup.models", "register"),
    "register_task": ("groundup.tasks", "register"),
    "register_dataset": ("groundup.data", "register"),
    "register_method": ("groundup.tuning", "register"),
    "Card": ("groundup.core.registry", "Card"),
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'groundup' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
