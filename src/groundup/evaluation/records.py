"""What an evaluation keeps of each record, about 30 bytes: for the worst and most confused pictures, for slices, and for comparing two models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core import files
from groundup.metrics.streamed import share_interval
from groundup.tasks.base import Encoded, Task

WORST, PAIRS, OF_PAIR = 16, 4, 4  # pictures shown, by loss, and of each of the most frequent confusions
SIDE = 144  # pixels of a picture in the report


@dataclass
class Records:
    """One value per record, in the order of the split. For tasks with labels; others leave it empty.

    Args:
        right: bool [N], the whole answer is right.
        loss: float [N], -log of the probability of the true class (mean over labels where there are several).
        predicted, true: int [N], positions of labels (-1 where a record has several).
        probability: float [N], of what was predicted.
        brightness: float [N], mean pixel on the scale 0..1; NaN for what is not a picture.
    """

    columns: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(self, judged: dict[str, torch.Tensor]) -> None:
        for name, values in judged.items():
            self.columns.setdefault(name, []).append(values.cpu().numpy())

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name.startswith("_") or name not in self.columns:
            raise AttributeError(name)
        return np.concatenate(self.columns[name])

    def __bool__(self) -> bool:
        return bool(self.columns)


def slices(records: Records, meta: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Accuracy on parts of the split: by brightness, by size and by each further column of the data.

    Numbers are divided into thirds, other columns by value (the ten most frequent ones). A part is marked where its 95 % interval does not
    hold the accuracy of the rest.
    """
    right, found = records.right, []
    columns = ({"brightness": records.brightness} if np.isfinite(records.brightness).all() else {}) | meta
    for name, values in columns.items():
        for label, part in _parts(values):
            n, hits = int(part.sum()), int(right[part].sum())
            if not n or n == len(right):
                continue
            low, high = share_interval(hits, n)
            rest = float(right[~part].mean())
            found.append(
                {
                    "column": name,
                    "slice": label,
                    "records": n,
                    "accuracy": hits / n,
                    "interval": [low, high],
                    "rest": rest,
                    "differs": not low <= rest <= high,
                }
            )
    return found


def _parts(values: NDArray[Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    distinct, counts = np.unique(values, return_counts=True)
    if values.dtype.kind in "fiu" and len(distinct) > 10:
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        parts = [("<= {:.4g}", values <= low), ("{:.4g} .. {:.4g}", (values > low) & (values <= high)), ("> {:.4g}", values > high)]
        return [
            (parts[0][0].format(low), parts[0][1]),
            (parts[1][0].format(low, high), parts[1][1]),
            (parts[2][0].format(high), parts[2][1]),
        ]
    if len(distinct) > max(50, len(values) // 5):  # names or identifiers: each value stands for hardly more than itself
        return []
    most = distinct[np.argsort(-counts, kind="stable")][:10]
    return [(f"{v:g}" if isinstance(v, float) else str(v), values == v) for v in most]


def shown_pictures(records: Records, labels: list[str], encoded: Encoded, picture: Callable[[Any], Any], folder: Path) -> dict[str, Any]:
    """The worst pictures and the most confused ones, written as PNG into `folder`.

    Args:
        picture: uint8 [C, H, W] -> a PIL picture.

    Returns:
        {'worst': [entry], 'confused': [{'true', 'predicted', 'records', 'pictures': [entry]}]}; an entry has the record's name, its labels,
        the probabilities, and the file.
    """
    right, loss, predicted, true, probability = (getattr(records, n) for n in ("right", "loss", "predicted", "true", "probability"))
    if (true < 0).any():
        return {}
    wrong = np.flatnonzero(~right)
    by_loss = wrong[np.argsort(-loss[wrong], kind="stable")]
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in by_loss:
        pairs.setdefault((int(true[i]), int(predicted[i])), []).append(int(i))
    common = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))[:PAIRS]
    chosen = [int(i) for i in by_loss[:WORST]]
    wanted = sorted({*chosen, *(i for _, index in common for i in index[:OF_PAIR])})
    if not wanted:
        return {}
    pixels = encoded.take(torch.tensor(wanted, device=encoded.targets.device)).cpu().numpy()
    entries = {}
    for i, array in zip(wanted, pixels):
        name = f"picture-{i}.png"
        _write(picture(array), folder / name)
        entries[i] = {
            "record": encoded.describe(i),
            "true": labels[true[i]],
            "predicted": labels[predicted[i]],
            "probability": float(probability[i]),
            "probability_of_true": math.exp(-float(loss[i])),
            "file": name,
        }
    return {
        "worst": [entries[i] for i in chosen],
        "confused": [
            {"true": labels[a], "predicted": labels[b], "records": len(index), "pictures": [entries[i] for i in index[:OF_PAIR]]}
            for (a, b), index in common
        ],
    }


def _write(picture: Any, path: Path) -> None:
    import io

    from PIL import Image

    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR).save(buffer, "PNG")
    files.write_bytes(path, buffer.getvalue())


def paired(first: Records, second: Records) -> dict[str, Any]:
    """Two models on the same records: only those that one of them gets right and the other does not say anything.

    The p-value is McNemar's exact one (two-sided, binomial; McNemar, 1947), the interval of the difference that of Bonett and Price
    (2012, adjusted Wald for paired shares).
    """
    from scipy.stats import binomtest

    a, b = first.right, second.right
    n, only_first, only_second = len(a), int((a & ~b).sum()), int((~a & b).sum())
    shares = [(only_first + 1) / (n + 2), (only_second + 1) / (n + 2)]
    middle = shares[0] - shares[1]
    half = 1.959963984540054 * math.sqrt(max(0.0, (shares[0] + shares[1] - middle**2) / (n + 2)))
    moved = only_first + only_second
    return {
        "records": n,
        "only_first_right": only_first,
        "only_second_right": only_second,
        "difference": (only_first - only_second) / n,
        "interval": [max(-1.0, middle - half), min(1.0, middle + half)],
        "p_value": float(binomtest(only_first, moved).pvalue) if moved else 1.0,
    }


def judge(task: Task, outputs: torch.Tensor, batch: Any) -> dict[str, torch.Tensor] | None:
    """The columns of a batch; None for tasks whose answers are not right or wrong."""
    columns = getattr(task, "judge", None)
    if columns is None:
        return None
    found: dict[str, torch.Tensor] = columns(outputs, batch.targets)
    brightness = getattr(task, "brightness", None)
    nothing = torch.full((len(outputs),), float("nan"))
    return found | {"brightness": nothing if brightness is None else brightness(batch.inputs)}
