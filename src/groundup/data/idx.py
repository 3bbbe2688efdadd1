"""IDX files (the format of MNIST), gzip or plain: a magic number that holds dtype and rank, big-endian sizes, then the values."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.core.errors import DataError
from groundup.data.dataset import Dataset, from_arrays

_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: Path) -> NDArray[Any]:
    """The array of one IDX file.

    Raises:
        DataError: not an IDX file, or one that is cut off.
    """
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            "{path}: the gzip data is damaged or cut off: {error}", "{path}：gzip 数据损坏或不完整：{error}", path=path, error=error
        ) from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise DataError(
            "{path} is not an IDX file (it begins with {begin})",
            "{path} 不是 IDX 文件（开头是 {begin}）",
            path=path,
            begin=data[:4].hex() or "nothing",
        )
    rank, dtype = data[3], np.dtype(_DTYPES[data[2]])
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * rank], dtype=">u4"))
    expected = 4 + 4 * rank + int(np.prod(shape)) * dtype.itemsize
    if len(shape) != rank or len(data) != expected:
        raise DataError(
            "{path}: {found} bytes where its header {shape} asks for {expected}",
            "{path}：文件头 {shape} 要求 {expected} 字节，实际为 {found}",
            path=path,
            found=len(data),
            shape=shape,
            expected=expected,
        )
    return np.frombuffer(data, dtype=dtype, offset=4 + 4 * rank).reshape(shape).astype(dtype.newbyteorder("="))


def find_idx(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (images, labels) of a folder in MNIST's naming; empty where there are none. 't10k' and 'test' are the test split."""
    found = {}
    for split, stems in {"train": ("train",), "test": ("t10k", "test")}.items():
        for stem in stems:
            pair = []
            for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
                names = [f"{stem}-{part}.gz", f"{stem}-{part}", f"{stem}-{part.replace('-idx', '.idx')}"]
                pair += [folder / n for n in names if (folder / n).is_file()][:1]
            if len(pair) == 2:
                found[split] = (pair[0], pair[1])
    return found


def read_folder(folder: Path, name: str, classes: int | None = None) -> Dataset:
    """Train and test of a folder of IDX files, with the data's own split.

    Raises:
        DataError: files that do not belong together, or a label outside 0..classes-1.
    """
    pairs = find_idx(folder)
    if not pairs:
        raise DataError(
            "{folder}: no IDX image and label files (train-images-idx3-ubyte[.gz], ...)",
            "{folder}：没有 IDX 图像和标签文件（train-images-idx3-ubyte[.gz] 等）",
            folder=folder,
        )
    images, labels, given, start = [], [], {}, 0
    for split, (image_file, label_file) in pairs.items():
        x, y = read_idx(image_file), read_idx(label_file)
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise DataError(
                "{images} holds {x} and {labels} holds {y}; as many labels as pictures are expected",
                "{images} 的形状是 {x}，{labels} 的形状是 {y}；图片与标签数量应相同",
                images=image_file,
                labels=label_file,
                x=x.shape,
                y=y.shape,
            )
        if classes is not None and len(y) and (y.min() < 0 or y.max() >= classes):
            wrong = int(np.flatnonzero((y < 0) | (y >= classes))[0])
            raise DataError(
                "{labels}: label {label} of record {record} is outside 0..{top}",
                "{labels}：第 {record} 条的标签 {label} 超出范围 0..{top}",
                labels=label_file,
                label=int(y[wrong]),
                record=wrong,
                top=classes - 1,
            )
        images.append(x)
        labels.append(y)
        given[split] = np.arange(start, start + len(x))
        start += len(x)
    bounds = {split: index[0] for split, index in given.items() if len(index)}

    def describe(i: int) -> str:
        split = max((s for s in bounds if bounds[s] <= i), key=lambda s: bounds[s])
        return f"{name} {split}[{i - bounds[split]}]"

    read = {str(f): files.sha256(f) for pair in pairs.values() for f in pair}
    return from_arrays(
        name,
        np.concatenate(images),
        np.concatenate(labels).astype(np.int64),
        given=given if len(given) > 1 else None,
        describe=describe,
        files=read,
    )
