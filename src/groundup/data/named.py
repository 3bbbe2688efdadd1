"""A named public data set is looked for in `$GROUNDUP_DATA/<name>`, then in the cache, then, when online, on the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.data.cache import cache_folder
from groundup.data.dataset import Dataset


def find_folder(name: str) -> tuple[Path | None, list[Path]]:
    """The folder of a named set on this machine, or None; and where it was looked for."""
    given = os.environ.get("GROUNDUP_DATA")
    places = [Path(given).expanduser() / name] if given else []
    places.append(cache_folder() / name)
    return next((p for p in places if p.is_dir() and any(p.iterdir())), None), places


def locate(name: str, hub_name: str, read: Callable[[Path], Dataset]) -> Dataset:
    """Reads a named set from the first place that has it.

    Raises:
        DataError: no place has it; says all three and why each one failed.
    """
    from groundup.data.hub import read_hub

    found, places = find_folder(name)
    if found is not None:
        return read(found)
    given = os.environ.get("GROUNDUP_DATA")
    try:
        return read_hub(hub_name, Data(source=f"hub:{hub_name}"))
    except DataError as error:
        listed = ", ".join(str(p) for p in places)
        raise DataError(
            "'{name}' was not found: looked in {looked}, and on the hub as {hub}: {why}",
            "没有找到 '{name}'：查过 {looked_zh}，以及 hub 上的 {hub}：{why_zh}",
            name=name,
            looked=listed if given else f"$GROUNDUP_DATA (not set), {listed}",
            looked_zh=listed if given else f"$GROUNDUP_DATA（未设置）、{listed}",
            hub=hub_name,
            why=error.en,
            why_zh=error.zh,
            fix="put its files into a folder FOLDER/{name} and set GROUNDUP_DATA=FOLDER",
            fix_zh="把文件放进 目录/{name}，并设置 GROUNDUP_DATA=目录",
        ) from error
