"""A data set: records with a schema and a fingerprint, before any task looks at them.

Pictures are uint8 tensors [channels, height, width] in one common size; vectors are float64 rows. The target is kept as the data has
it (text, whole numbers or reals, one column or several): the task decides what it means.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.data.pictures import ArrayImages


@dataclass
class Dataset:
    """Records as arrays.

    Args:
        kind: 'image', 'vector' or 'text'.
        inputs: pictures (an object with `shape` [N, C, H, W] and `fetch(index)`), float64 [N, features], or a `Corpus`.
        target: [N] or [N, targets]; text, integers or reals.
        digests: [N] bytes, one digest of each record's input: equal digests are exact duplicates.
        describe: position -> the record's name for a person ('cats/12.png', 'wine.csv line 7').
        given: the data's own splits, name -> positions.
        files: file -> sha256 of what was read.
        meta: further columns, name -> [N]: evaluation can be sliced by them.
    """

    name: str
    kind: Literal["image", "vector", "text"]
    inputs: Any
    target: NDArray[Any]
    digests: list[bytes]
    describe: Callable[[int], str]
    given: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    groups: NDArray[Any] | None = None
    feature_names: list[str] = field(default_factory=list)
    target_names: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    meta: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of every record's content and target, in order: equal for equal data, wherever it lies."""
        digest = hashlib.sha256(repr((self.kind, self.input_shape)).encode())
        for record, target in zip(self.digests, self.target):
            digest.update(record)
            digest.update(str(target).encode())
        for split, index in sorted(self.given.items()):
            digest.update(split.encode() + index.tobytes())
        return digest.hexdigest()

    def select(self, keep: NDArray[np.int64]) -> Dataset:
        """The records at `keep`, splits and names carried along."""
        position = np.full(len(self), -1, dtype=np.int64)
        position[keep] = np.arange(len(keep))
        describe, inputs = self.describe, self.inputs
        return Dataset(
            self.name,
            self.kind,
            inputs.select(keep) if self.kind == "image" else inputs[keep],
            self.target[keep],
            [self.digests[i] for i in keep],
            lambda i: describe(int(keep[i])),
            {s: p[p >= 0] for s, index in self.given.items() for p in [position[index]]},
            None if self.groups is None else self.groups[keep],
            self.feature_names,
            self.target_names,
            self.files,
            self.rejected,
            self.notes,
            {name: column[keep] for name, column in self.meta.items()},
        )


def read_bytes(path: Path) -> bytes:
    """A data file's contents. Raises DataError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            "{path} cannot be read: {cause}", "无法读取 {path}：{cause}", path=path, cause=error
        ) from error


def digests_of(array: NDArray[Any]) -> list[bytes]:
    """A 16-byte digest of each row's bytes."""
    rows = np.ascontiguousarray(array).reshape(len(array), math.prod(array.shape[1:]))
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def from_arrays(
    name: str,
    inputs: Any,
    target: Any,
    *,
    given: dict[str, Any] | None = None,
    feature_names: list[str] | None = None,
    target_names: list[str] | None = None,
    describe: Callable[[int], str] | None = None,
    files: dict[str, str] | None = None,
) -> Dataset:
    """A data set from arrays: pictures as [N, H, W] or [N, C, H, W] or [N, H, W, C] (uint8, or reals in 0..1), vectors as [N, features].

    Raises:
        DataError: shapes that do not fit each other, or a dtype that is neither.
    """
    x, y = np.asarray(inputs), np.asarray(target)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(
            "{name}: {n} inputs and {m} targets; each record needs one of both",
            "{name}：输入有 {n} 条，目标有 {m} 条，应一一对应",
            name=name,
            n=len(x) if x.ndim else 0,
            m=len(y) if y.ndim else 0,
        )
    if x.dtype.kind not in "buif":
        raise DataError(
            "{name}: inputs have dtype {dtype}; real numbers are expected",
            "{name}：输入的类型是 {dtype}，应为实数",
            name=name,
            dtype=x.dtype,
        )
    if x.ndim > 4 or y.ndim > 2 or x[:1].size == 0 < len(x):
        raise DataError(
            "{name}: inputs of shape {x} and targets of shape {y}; pictures [N, H, W] or [N, C, H, W] or vectors [N, features] are expected",
            "{name}：输入的形状是 {x}，目标的形状是 {y}；应为图片 [N, H, W]、[N, C, H, W] 或向量 [N, 特征]",
            name=name,
            x=x.shape,
            y=y.shape,
        )
    if y.dtype.kind not in "buifUS" and any(v is None or v != v for v in y.ravel()):
        at = next(i for i, row in enumerate(y) if any(v is None or v != v for v in np.ravel(row)))
        raise DataError("{name}: record {at} has no target", "{name}：第 {at} 条记录没有目标值", name=name, at=at)
    if x.ndim in (3, 4):
        if x.ndim == 3:
            x = x[:, None]
        elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        if x.shape[1] not in (1, 3):
            raise DataError(
                "{name}: pictures of shape {shape}; 1 or 3 channels are expected",
                "{name}：图片形状为 {shape}，应为 1 或 3 个通道",
                name=name,
                shape=x.shape[1:],
            )
        if x.dtype != np.uint8:
            low, high = float(x.min(initial=0)), float(x.max(initial=0))
            if not (low >= 0 and high <= 255):
                raise DataError(
                    "{name}: pixel values from {low} to {high}; 0..1 or 0..255 are expected",
                    "{name}：像素值范围是 {low} 到 {high}，应为 0..1 或 0..255",
                    name=name,
                    low=low,
                    high=high,
                )
            x = (x * (255 if high <= 1 else 1)).round().astype(np.uint8)
        images = np.ascontiguousarray(x)
        return Dataset(
            name,
            "image",
            ArrayImages(images),
            y,
            digests_of(images),
            describe or (lambda i: f"{name}[{i}]"),
            _positions(given),
            files=files or {},
            target_names=target_names or [],
        )
    rows = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
    return Dataset(
        name,
        "vector",
        rows,
        y,
        digests_of(rows),
        describe or (lambda i: f"{name}[{i}]"),
        _positions(given),
        feature_names=feature_names or [f"x{i}" for i in range(rows.shape[1])],
        target_names=target_names or [],
        files=files or {},
    )


def _positions(given: dict[str, Any] | None) -> dict[str, NDArray[np.int64]]:
    return {split: np.asarray(index, dtype=np.int64) for split, index in (given or {}).items()}
