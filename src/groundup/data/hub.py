"""Data sets of the Hugging Face hub with an image column (or vectors), through `datasets`: the only network access, and only for
`hub:` specs and named sets that are not on disk."""

from __future__ import annotations

import os
import socket
import urllib.parse
from pathlib import Path
from typing import Any

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.data.dataset import Dataset
from groundup.data.image_folder import Listing, read_pictures
from groundup.data.table import SPLIT_NAMES
from groundup.data.tree import Tree

SIMPLE = ("string", "bool", "int8", "int16", "int32", "int64", "float32", "float64")  # columns that evaluation can be sliced by


def _reachable() -> bool:
    """Whether the hub's host (or the proxy to it) answers within three seconds: `datasets` itself would retry for minutes."""
    endpoint = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    address = urllib.parse.urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def read_hub(spec: str, config: Data) -> Dataset:
    """`owner/name[@revision][:config]` as a data set; its own splits become the given ones.

    Raises:
        DataError: offline and not in the cache of `datasets`, unknown name, or no column that can be read.
    """
    rest, _, subset = spec.partition(":")
    name, _, revision = rest.partition("@")
    import datasets

    online = not datasets.config.HF_HUB_OFFLINE and _reachable()
    if not online:
        datasets.config.HF_HUB_OFFLINE = True  # read what `datasets` has in its cache without asking the network
    try:
        loaded = datasets.load_dataset(name, subset or None, revision=revision or None)
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
    return from_hub_splits(name, dict(loaded), config)


def from_hub_splits(name: str, splits: dict[str, Any], config: Data) -> Dataset:
    """The splits of a `datasets.DatasetDict` as one data set."""
    import datasets

    features = next(iter(splits.values())).features
    image = config.columns.image or next((c for c, f in features.items() if isinstance(f, datasets.Image)), None)
    wanted = config.columns.target if isinstance(config.columns.target, str) else None
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
    names = getattr(features[target], "names", None)
    tree = Rows(name, {split: rows.cast_column(image, datasets.Image(decode=False)) for split, rows in splits.items()}, image)
    listing = Listing(meta={c: [] for c, f in features.items() if c not in (image, target) and getattr(f, "dtype", "") in SIMPLE})
    for split, rows in splits.items():
        columns_only = rows.select_columns([target, *listing.meta])
        for i, row in enumerate(columns_only):
            label = row[target]
            if label is None or (names and not isinstance(label, list) and not 0 <= label < len(names)):  # -1 stands for 'not labelled'
                listing.rejected.append({"record": f"{name} {split}[{i}]", "reason": "no label", "reason_zh": "没有标签"})
                continue
            named = (lambda v: names[v]) if names else str
            listing.names.append(f"{split}/{i}")
            listing.labels.append([named(v) for v in label] if isinstance(label, list) else named(label))
            listing.splits.append(SPLIT_NAMES.get(split, split))
            for column in listing.meta:
                listing.meta[column].append(row[column])
    return read_pictures(f"hub:{name}", tree, listing, config, f"hub:{name}")


class Rows(Tree):
    """The pictures of hub splits as files called 'train/0': read from `datasets`' memory-mapped tables when asked for."""

    def __init__(self, name: str, splits: dict[str, Any], column: str) -> None:
        self.name, self._splits, self._column = name, splits, column

    @property
    def names(self) -> list[str]:
        return [f"{split}/{i}" for split, rows in self._splits.items() for i in range(len(rows))]

    def read(self, name: str) -> bytes:
        split, _, i = name.rpartition("/")
        picture = self._splits[split][int(i)][self._column]
        if not picture or (not picture.get("bytes") and not picture.get("path")):
            raise ValueError("no picture")
        return picture["bytes"] or Path(picture["path"]).read_bytes()

    def has(self, name: str) -> bool:
        split, _, i = name.rpartition("/")
        return split in self._splits and int(i) < len(self._splits[split])

    def where(self, name: str) -> str:
        return f"hub:{self.shown(name)}"

    def shown(self, name: str) -> str:
        split, _, i = name.rpartition("/")
        return f"{self.name} {split}[{i}]"
