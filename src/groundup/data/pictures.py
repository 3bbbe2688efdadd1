"""Pictures: from a file's bytes to uint8 [C, H, W] in one size, and sets of them in memory, in a file of raw pixels, or decoded on demand."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.core.errors import DataError
from groundup.core.recipe import Picture
from groundup.data.tree import Tree

REASONS_ZH = {
    "the file is empty": "文件为空", "not a picture": "不是图片", "No such file or directory": "文件不存在",
    "image file is truncated": "图片不完整",
}  # fmt: skip
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def reason_zh(reason: str) -> str:
    """Why a picture cannot be read, in Chinese where it is one of the usual reasons."""
    return REASONS_ZH.get(reason.partition(" (")[0], reason)


@dataclass(frozen=True)
class Resize:
    """How a picture comes to its size: 'stretch' both sides to it; or 'crop' the centre after its shorter side was brought to `short_side`
    (None: the shorter of the two asked for)."""

    mode: Literal["stretch", "crop"] = "stretch"
    short_side: int | None = None
    filter: Filter = "bilinear"

    @classmethod
    def of(cls, config: Picture) -> Resize:
        return cls(config.resize, None if config.short_side == "auto" else config.short_side, config.filter)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class ArrayImages:
    """Pictures in memory: uint8 [N, C, H, W]."""

    streamed = False

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.shape = array.shape

    def fetch(self, index: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.array[np.asarray(index)]))

    def select(self, keep: NDArray[np.int64]) -> ArrayImages:
        return ArrayImages(self.array[keep])

    def moments(self, index: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square per channel of the pictures at `index`, on the 0..255 scale."""
        first = second = np.zeros(self.shape[1])
        for start in range(0, len(index), 4096):  # in pieces: a float copy of everything would be eight times the data
            part = self.array[index[start : start + 4096]].astype(np.float64)
            first = first + part.sum(axis=(0, 2, 3))
            second = second + np.square(part).sum(axis=(0, 2, 3))
        count = len(index) * self.shape[2] * self.shape[3]
        return first / count, second / count


class FileImages:
    """Pictures that are not held in memory.

    Args:
        tree, names: the files.
        sums: each picture's channel sums and square sums [N, 2, C].
        pixels: a file of raw pixels (uint8, .npy, [M, C, H, W]) that holds picture `rows[i]`; without one they are decoded from their files
            when asked for.
    """

    streamed = True

    def __init__(
        self,
        tree: Tree,
        names: list[str],
        channels: int,
        size: tuple[int, int],
        sums: NDArray[np.float64],
        resize: Resize,
        pixels: Path | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.tree, self.names, self.channels, self.size, self.sums, self.resize = tree, names, channels, size, sums, resize
        self.pixels, self.rows = pixels, np.arange(len(names)) if rows is None else rows
        self.shape = (len(names), channels, *size)
        self._map: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def fetch(self, index: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        if self.pixels is not None:
            if self._map is None:
                self._map = np.load(self.pixels, mmap_mode="r")
            return torch.from_numpy(self._map[self.rows[np.asarray(index)]])
        with quiet_pillow():
            return torch.from_numpy(np.stack([self._decoded(int(i)) for i in index]))

    def _decoded(self, i: int) -> NDArray[np.uint8]:
        try:
            return decode(self.tree.read(self.names[i]), self.channels, self.size, self.resize)
        except (OSError, ValueError) as error:
            raise DataError(
                "{path} could be read when the run began and cannot be now: {error}",
                "{path} 在开始时可以读取，现在无法读取：{error}",
                path=self.tree.where(self.names[i]),
                error=error,
                fix="put the file back and continue with --resume",
                fix_zh="恢复该文件，然后用 --resume 继续",
            ) from error

    def select(self, keep: NDArray[np.int64]) -> FileImages:
        names = [self.names[i] for i in keep]
        return FileImages(self.tree, names, self.channels, self.size, self.sums[keep], self.resize, self.pixels, self.rows[keep])

    def moments(self, index: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        count = len(index) * self.size[0] * self.size[1]
        first, second = self.sums[index].sum(axis=0) / count
        return first, second

    def load(self) -> ArrayImages:
        """Everything in memory."""
        array = np.empty(self.shape, dtype=np.uint8)

        def part(start: int) -> None:
            index = range(start, min(start + 64, len(self.names)))
            array[start : start + 64] = self.fetch(index).numpy()

        with quiet_pillow(), ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock while it decodes
            list(pool.map(part, range(0, len(self.names), 64)))
        return ArrayImages(array)


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's remarks on odd metadata and large pictures. Around a thread pool, not in its threads: the filters are global."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


STRETCH = Resize()


def decode(data: bytes, channels: int | None = None, size: tuple[int, int] | None = None, resize: Resize = STRETCH) -> NDArray[np.uint8]:
    """One picture as uint8 [C, H, W]; converted to `channels` (1 grey, 3 RGB) and brought to `size` (height, width) where given. Of an
    animation the first frame is taken. A JPEG is decoded at a half, a quarter or an eighth where that is still as large as needed: most of its
    pixels would be averaged away.

    Raises:
        ValueError: the bytes are not a whole picture (with Pillow's reason).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if size is not None and opened.format == "JPEG":
                side = max(*size, resize.short_side or 0)  # both ways alike: the camera's rotation is not undone yet
                opened.draft(None, (side, side))
            opened.load()
            return picture_array(ImageOps.exif_transpose(opened), channels, size, resize)
    except UnidentifiedImageError as error:
        raise ValueError("not a picture") from error
    except Exception as error:  # Pillow raises many kinds for damaged bytes, a decompression bomb among them
        reason = str(error).replace(repr(io.BytesIO), "").split(" <_io.BytesIO")[0]
        raise ValueError(reason or type(error).__name__) from error


def picture_array(
    picture: Any, channels: int | None = None, size: tuple[int, int] | None = None, resize: Resize = STRETCH
) -> NDArray[np.uint8]:
    """A PIL picture as uint8 [C, H, W]. Transparency is laid on white; 16-bit grey and real-valued pixels are brought to 8 bits."""
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        raw = np.asarray(picture, dtype=np.float64)
        # 'I;16' says its depth; for 'I' and 'F' the values have to.
        highest = 65535.0 if picture.mode.startswith("I;16") else raw.max(initial=0)
        top = 65535.0 if highest > 255 else 255.0 if highest > 1 or picture.mode == "I" else 1.0
        picture = Image.fromarray((raw.clip(0, top) / top * 255).round().astype(np.uint8))
    elif "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        background = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(background, picture).convert("RGB")
    grey = picture.mode in ("1", "L")
    wanted = channels or (1 if grey else 3)
    picture = picture.convert("L" if wanted == 1 else "RGB")
    if size is not None:
        picture = _brought_to(picture, size, resize)
    array = np.asarray(picture)
    return array[None] if wanted == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def pil_picture(pixels: NDArray[np.uint8]) -> Any:
    """uint8 [C, H, W] -> a PIL picture, the inverse of `picture_array`."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _brought_to(picture: Any, size: tuple[int, int], resize: Resize) -> Any:
    from PIL import Image

    height, width = size
    method = getattr(Image.Resampling, resize.filter.upper())  # Pillow antialiases when it shrinks
    if resize.mode == "stretch":
        return picture if picture.size == (width, height) else picture.resize((width, height), method)
    short = resize.short_side or min(size)
    w, h = picture.size
    new = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if new[0] < width or new[1] < height:  # the crop would not fit: enlarged until it does
        scale = max(height / h, width / w)
        new = (max(width, round(w * scale)), max(height, round(h * scale)))
    if picture.size != new:
        picture = picture.resize(new, method)
    left, top = (new[0] - width) // 2, (new[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))
