"""Durations and counts that carry their unit: `60s`, `10min`, `2h`, `15M`."""

from __future__ import annotations

import re

from groundup.core.errors import RecipeError

_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def seconds(text: str) -> float:
    """'60s' -> 60.0. Raises RecipeError where the unit is missing or unknown."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", str(text))
    if not match or match[2] not in _SECONDS or float(match[1]) <= 0:
        raise RecipeError(
            "'{text}' is not a duration; write a number and its unit, as 60s, 10min or 2h",
            "'{text}' 不是时长；请写数字加单位，例如 60s、10min 或 2h",
            text=text,
        )
    return float(match[1]) * _SECONDS[match[2]]


def count(text: str | int) -> int:
    """'15M' -> 15000000. Raises RecipeError for anything that is not a whole positive number with a known unit."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([kKMBT]?)\s*", str(text))
    value = float(match[1]) * _COUNTS[match[2]] if match else 0.0
    if not match or value <= 0 or value != int(value):
        raise RecipeError(
            "'{text}' is not a count; write a whole positive number, as 500, 20k or 15M",
            "'{text}' 不是数量；请写正整数，例如 500、20k 或 15M",
            text=text,
        )
    return int(value)


def human_seconds(value: float) -> str:
    """'0.8 s', '42 s', '3 min 05 s', '2 h 10 min'."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 90:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"
