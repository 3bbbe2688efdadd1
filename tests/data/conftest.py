"""Small real files, made on the spot."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundup.core.recipe import Data
from groundup.data.prepare import prepare


@pytest.fixture
def picture():
    """picture(path, size=(8, 6), mode='RGB') writes one picture of its own random pixels, in the format of its suffix."""
    rng = np.random.default_rng(7)

    def write(path, size=(8, 6), mode="RGB", **options):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    return write


@pytest.fixture
def folder(tmp_path, picture):
    """Twelve pictures each of two labels, in a path with a space and Chinese characters."""
    for label in ("猫 cat", "狗"):
        for i in range(12):
            picture(tmp_path / "我的 照片" / label / f"图 {i:02}.png")
    return tmp_path / "我的 照片"


@pytest.fixture
def csv(tmp_path):
    """csv(text) writes a table and gives its path as a data SPEC."""

    def write(text, name="表 1.csv", encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return str(tmp_path / name)

    return write


@pytest.fixture
def prepared():
    """prepared(spec, classification=True, **settings) -> what training would see."""

    def make(spec, *, classification=True, **settings):
        return prepare(
            Data.model_validate({"source": str(spec) if isinstance(spec, Path) else spec} | settings), classification=classification
        )

    return make
