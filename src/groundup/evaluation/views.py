"""Test-time augmentation: a model that looks at several views of a picture and averages what it says."""

from __future__ import annotations

from torch import Tensor, nn

from groundup.core.errors import UserError
from groundup.core.recipe import Views
from groundup.data.augment import views


class Viewed(nn.Module):
    """The mean of the outputs over the views; pictures [B, C, H, W] in, outputs [B, K] out, as the model itself."""

    def __init__(self, model: nn.Module, config: Views) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, x: Tensor) -> Tensor:
        seen = views(x, self.config.flip, self.config.shift)
        total: Tensor = self.model(seen[0])
        for view in seen[1:]:  # one after the other: all at once would take as many times the memory
            total = total + self.model(view)
        return total / len(seen)


def viewed(model: nn.Module, config: Views | None) -> nn.Module:
    return Viewed(model, config) if config is not None and (config.flip or config.shift) else model


def parse(text: str) -> Views | None:
    """'flip', 'shift=2', 'flip,shift=1'; 'none' for a single view. Raises UserError."""
    found = Views()
    for part in text.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if name == "none" and not value:
            return None
        if name == "flip" and not value:
            found.flip = True
        elif name == "shift" and (value or "1").isdecimal():
            found.shift = int(value or 1)
        else:
            raise UserError(
                "--views {text}: flip, shift=PIXELS, both with a comma, or none",
                "--views {text}：可用 flip、shift=像素数、二者以逗号相连，或 none",
                text=text,
            )
    return found
