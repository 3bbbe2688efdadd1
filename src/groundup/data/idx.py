"""IDX files (the format of MNIST), gzip or plain: a magic number that holds dtype and rank, big-endian sizes, then the values."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.core.errors import DataError
from groundup.data.dataset import Dataset, from_arrays, read_bytes

_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: Path) -> NDArray[Any]:
    """The array of one IDX file.

    Raises:
        DataError: not an IDX file, or one that is cut off.
    """
    data = read_bytes(path)
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
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, min(4 + 4 * rank, len(data) - 3), 4))
    expected = 4 + 4 * rank + math.prod(shape) * dtype.itemsize
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
    """Split -> (images, labels) of a folder in MNIST's naming; empty where there are none. 't10k' and 'test' are the test split.

    Raises:
        DataError: one file of a pair is there without the other.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for split, stems in {"train": ("train",), "test": ("t10k", "test")}.items():
        for stem in stems:
            pair = []
            for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
                names = [f"{stem}-{part}.gz", f"{stem}-{part}", f"{stem}-{part.replace('-idx', '.idx')}"]
                pair += [folder / n for n in names if (folder / n).is_file()][:1]
            if len(pair) == 2:
                found.setdefault(split, (pair[0], pair[1]))
            elif pair:
                raise DataError(
                    "{folder} holds {file} without its partner (images and labels belong together)",
                    "{folder} 里有 {file}，却没有与之配对的文件（图像与标签应成对出现）",
                    folder=folder,
                    file=pair[0].name,
                )
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
    images: list[NDArray[Any]] = []
    labels, given, start = [], {}, 0
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
        if not np.issubdtype(y.dtype, np.integer) or (images and x.shape[1:] != images[0].shape[1:]):
            raise DataError(
                "{images} holds {x} and {labels} holds {kind}; pictures of one size and whole-numbered labels are expected",
                "{images} 的形状是 {x}，{labels} 的类型是 {kind}；图片尺寸应一致，标签应为整数",
                images=image_file,
                x=x.shape,
                labels=label_file,
                kind=y.dtype,
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
