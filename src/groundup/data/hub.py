"""Data sets of the Hugging Face hub with an image column (or vectors), through `datasets`: the only network access, and only for
`hub:` specs and named sets that are not on disk."""

from __future__ import annotations

import os
import socket
import urllib.parse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.data.dataset import Dataset, from_arrays, picture_array, quiet_pillow
from groundup.data.table import SPLIT_NAMES


def _reachable() -> bool:
    """Whether the hub's host (or the proxy to it) answers within three seconds: `datasets` itself would retry for minutes."""
    endpoint = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    address = urllib.parse.urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def read_hub(spec: str, columns: Any = None) -> Dataset:
    """`owner/name[@revision][:config]` as a data set; its own splits become the given ones.

    Raises:
        DataError: offline and not in the cache of `datasets`, unknown name, or no column that can be read.
    """
    rest, _, config = spec.partition(":")
    name, _, revision = rest.partition("@")
    import datasets

    online = not datasets.config.HF_HUB_OFFLINE and _reachable()
    if not online:
        datasets.config.HF_HUB_OFFLINE = True  # read what `datasets` has in its cache without asking the network
    try:
        loaded = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as error:  # `datasets` raises many kinds, network errors among them
        why = (
            ("the hub cannot be reached, and 'datasets' has no copy", "无法连接 hub，本地缓存也没有")
            if not online
            else (str(error), str(error))
        )
        raise DataError(
            "hub:{name} cannot be read: {why}",
            "无法读取 hub:{name}：{why_zh}",
            name=name,
            why=why[0].splitlines()[0],
            why_zh=why[1].splitlines()[0],
            fix="check the network (HF_ENDPOINT names a mirror), or give a local path",
            fix_zh="检查网络（HF_ENDPOINT 可指定镜像），或给出本地路径",
        ) from error
    return from_hub_splits(name, dict(loaded), columns)


def from_hub_splits(name: str, splits: dict[str, Any], columns: Any = None) -> Dataset:
    """The splits of a `datasets.DatasetDict` as one data set."""
    import datasets

    features = next(iter(splits.values())).features
    image = getattr(columns, "image", None) or next((c for c, f in features.items() if isinstance(f, datasets.Image)), None)
    wanted = getattr(columns, "target", None)
    target = wanted or next((c for c, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    target = target or next((c for c in ("label", "labels", "target", "class", "y", "fine_label") if c in features), None)
    if image is None or target is None or image not in features or target not in features:
        raise DataError(
            "hub:{name} has the columns {columns}; one of pictures and one of labels are needed",
            "hub:{name} 的列为 {columns}；需要一列图片和一列标签",
            name=name,
            columns=", ".join(features),
            fix="--set data.columns.image=NAME --set data.columns.target=NAME",
        )
    pictures: list[NDArray[np.uint8]] = []
    labels, given = [], {}
    rejected: list[dict[str, Any]] = []
    places: list[str] = []
    names = getattr(features[target], "names", None)
    for split, rows in splits.items():
        start = len(pictures)
        for i in range(len(rows)):
            try:
                row = rows[i]
                label = row[target]
                if row[image] is None or label is None or (names and not 0 <= label < len(names)):  # -1 stands for 'not labelled'
                    raise ValueError("no picture" if row[image] is None else "no label")
                with quiet_pillow():
                    picture = picture_array(row[image])
            except (ValueError, OSError) as error:
                rejected.append({"record": f"{name} {split}[{i}]", "reason": str(error), "reason_zh": f"无法使用：{error}"})
                continue
            pictures.append(picture)
            labels.append(names[label] if names else label)
            places.append(f"{name} {split}[{i}]")
        given[SPLIT_NAMES.get(split, split)] = np.arange(start, len(pictures))
    if not pictures:
        raise DataError(
            "hub:{name}: none of its {n} records has a picture and a label; the first: {why}",
            "hub:{name}：{n} 条记录中没有一条同时有图片和标签；第一条：{why}",
            name=name,
            n=len(rejected),
            why=rejected[0]["reason"] if rejected else "no records",
        )
    notes: list[tuple[str, str]] = []
    shapes = {p.shape for p in pictures}
    if len(shapes) > 1:
        from PIL import Image

        channels = max(s[0] for s in shapes)
        size = tuple(int(np.median([p.shape[a] for p in pictures])) for a in (1, 2))
        notes.append(
            (
                f"pictures have {len(shapes)} sizes or modes; all are brought to {channels} channels of {size[1]}x{size[0]}",
                f"图片有 {len(shapes)} 种尺寸或模式；全部转为 {channels} 个通道、{size[1]}x{size[0]}",
            )
        )
        pictures = [picture_array(Image.fromarray(p[0] if p.shape[0] == 1 else p.transpose(1, 2, 0)), channels, size) for p in pictures]  # type: ignore[arg-type]
    dataset = from_arrays(f"hub:{name}", np.stack(pictures), np.asarray(labels), given=given, describe=lambda i: places[i])
    dataset.rejected += rejected
    dataset.notes += notes
    return dataset
