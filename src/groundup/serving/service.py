"""A loaded model that many ask at once: inputs are read in threads, what waits is computed together."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import groundup
from groundup import modelfolder
from groundup.core.errors import DataError
from groundup.data.pictures import quiet_pillow
from groundup.models.base import count_parameters
from groundup.serving.batcher import Answers, Batcher
from groundup.serving.inputs import Asked
from groundup.serving.limits import Limits, Refusal, busy, short
from groundup.serving.metrics import Metrics

log = logging.getLogger("groundup.serving")

# What browsers and cameras make. Pillow reads many more, some by starting other programs (EPS).
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
SCANS = 16  # of a progressive JPEG of the largest size; ordinary ones have ten
# Some pictures may have this share of the pixels only: WebP and transparency, which Pillow works on without letting other threads run, so that
# nobody is served meanwhile (a second for 50 million pixels); and pixels of more than 8 bits, which take eight times the memory.
SHARE = 4


class Reading:
    """Some inputs of a request, read in a thread. `began` tells one that is slow from one that had to wait for a thread."""

    def __init__(self, asked: Asked, part: range) -> None:
        self.asked, self.part, self.began = asked, part, 0.0


class Service:
    """Args: max_wait: seconds that a forward pass waits for inputs that are being decoded."""

    def __init__(self, loaded: modelfolder.Loaded, limits: Limits, max_batch: int, max_wait: float) -> None:
        self.loaded, self.limits, self.metrics = loaded, limits, Metrics()
        self.device = next(loaded.model.parameters()).device
        self.model = loaded.answering.eval()
        self.name: str = loaded.card["source_run"]
        self.classes = max(len(loaded.card["labels"] or []), 1)
        self.batcher = Batcher(self._compute, max_batch, max_wait, self.metrics.batches.add)
        self.readers = self._threads()
        self.held = 0  # bytes of bodies
        self.accepted = 0  # requests that will be answered, also when the server is told to stop
        self.ready = False
        self.card = self._card()
        self.features: list[str] = self.card["preprocessor"].get("features", [])

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="read")

    def close(self) -> None:
        self.ready = False
        self.batcher.close()
        self.readers.shutdown(wait=False, cancel_futures=True)

    # -- answers ---------------------------------------------------------------------------------------------------------------
    def _compute(self, rows: Tensor, tops: list[int]) -> Answers:
        """One forward pass, in the model's thread; what `Task.read` gave -> one answer per row."""
        task = self.loaded.task
        with torch.inference_mode():
            outputs = self.model(task.model_inputs(rows.to(self.device))).float().cpu()
            if len(set(tops)) == 1:
                return task.answers(outputs, tops[0])
            return [task.answers(outputs[i : i + 1], top)[0] for i, top in enumerate(tops)]

    async def warm_up(self) -> None:
        """The first passes allocate, and choose kernels by size: the first clients must not wait for that."""

        def passes() -> None:
            with torch.inference_mode():
                for count in (1, self.batcher.max_batch):
                    self.model(modelfolder.reference_inputs(self.loaded.task.input_shape, count).to(self.device))

        await asyncio.get_running_loop().run_in_executor(self.batcher._thread, passes)

    async def predict(self, asked: Asked, top: int) -> Answers:
        """Answers in the order of the inputs. Raises Refusal, which names the input that it is about."""
        count, batcher = len(asked.raws), self.batcher
        ahead = batcher.coming + batcher.rows
        if ahead and ahead + count > self.limits.queue:
            raise busy()
        batcher.coming += count
        try:
            rows = await self._read_all(asked)
        finally:
            batcher.arrived(count)
        return await batcher.submit(torch.cat(rows) if len(rows) > 1 else rows[0], top)

    async def _read_all(self, asked: Asked) -> list[Tensor]:
        count = len(asked.raws)
        size = 1 if self.loaded.task.kind == "image" else count  # rows of numbers are read sooner than a thread is woken
        jobs = [Reading(asked, range(i, min(i + size, count))) for i in range(0, count, size)]
        futures: list[Future[Tensor]] = [self.readers.submit(self._read, job) for job in jobs]
        try:
            async with asyncio.timeout(self.limits.decode_seconds):
                found = await asyncio.gather(*(asyncio.wrap_future(f) for f in futures), return_exceptions=True)
        except TimeoutError as error:
            raise self._late(jobs, futures) from error
        for result in found:  # the first one that is bad, whichever was decoded first
            if isinstance(result, BaseException):
                raise result
        return [f for f in found if isinstance(f, Tensor)]

    def _late(self, jobs: list[Reading], futures: list[Future[Tensor]]) -> Refusal:
        seconds = self.limits.decode_seconds
        slow = [j for j, f in zip(jobs, futures) if j.began and not f.done() and time.monotonic() - j.began > seconds / 2]
        if not slow:
            return busy()
        # A thread cannot be stopped: it is left to its picture, and others take the next ones.
        old, self.readers = self.readers, self._threads()
        old.shutdown(wait=False)
        index = slow[0].part[0]
        return Refusal(
            422,
            "TooSlow",
            "{name}: decoding took more than {seconds} s",
            "{name}：解码超过 {seconds} 秒",
            fix="send a smaller picture, or another format",
            fix_zh="请发送更小的图片，或换一种格式",
            index=index,
            name=jobs[0].asked.names[index],
            seconds=f"{seconds:g}",
        )

    def _read(self, job: Reading) -> Tensor:
        """In a thread: raw inputs -> what the task's `model_inputs` takes, [n, ...]."""
        job.began = time.monotonic()
        return torch.cat([self._read_one(job.asked.raws[i], job.asked.names[i], i) for i in job.part])

    def _read_one(self, raw: Any, name: str, index: int) -> Tensor:
        try:
            if isinstance(raw, bytes):
                self._check_picture(raw)
            elif isinstance(raw, dict) and (unknown := sorted(set(raw) - set(self.features))):
                raise DataError("unknown feature '{name}'; known: {known}", "未知特征 '{name}'；可用：{known}",
                                name=unknown[0][:100], known=", ".join(self.features[:20]))  # fmt: skip
            return self.loaded.task.read(raw)
        except Refusal as error:
            error.en, error.zh, error.index = f"{name}: {error.en}", f"{name}：{error.zh}", index
            raise
        except DataError as error:
            why, why_zh, cure, cure_zh = error.en, error.zh, error.fix_en, error.fix_zh
        except Exception as error:  # a task of a user, or numbers beyond every float: the input's fault until shown otherwise
            log.info("%s could not be read", name, exc_info=error)
            why, why_zh, cure, cure_zh = f"{type(error).__name__} while it was read", f"读取时出现 {type(error).__name__}", None, None
        raise Refusal(
            422,
            "BadInput",
            "{name}: {why}",
            "{name}：{why_zh}",
            fix=cure and "{cure}",
            fix_zh=cure_zh and "{cure_zh}",
            index=index,
            name=name,
            why=short(why, 400),
            why_zh=short(why_zh, 400),
            cure=cure,
            cure_zh=cure_zh,
        )

    def _check_picture(self, data: bytes) -> None:
        """Refuses a picture by its header: a file of a few kilobytes can claim gigabytes of pixels, or thousands of passes over them."""
        from PIL import Image

        most = self.limits.pixels
        try:
            with quiet_pillow(), Image.open(io.BytesIO(data)) as picture:
                form, pixels, progressive = picture.format or "?", picture.width * picture.height, "progressive" in picture.info
                if form == "WEBP" or "A" in picture.getbands() or "transparency" in picture.info or picture.mode[0] in "IF":
                    most //= SHARE
        except Image.DecompressionBombError as error:  # Pillow's own bound; it says how many
            form, pixels, progressive = "?", int((re.search(r"\d+", str(error)) or [most + 1])[0]), False
        except Exception:
            return  # not a picture: the task says so
        if pixels > most:
            raise Refusal(
                413,
                "TooLarge",
                "{pixels} pixels; at most {most} are accepted of such a picture ({form})",
                "{pixels} 像素；此类图片（{form}）最多 {most}",
                fix="send a smaller picture",
                fix_zh="请发送更小的图片",
                form=form,
                pixels=f"{pixels:,}",
                most=f"{most:,}",
            )
        if form not in FORMATS:
            raise Refusal(
                422,
                "BadInput",
                "{form} pictures are not read here; known: {known}",
                "不接受 {form} 格式的图片；可用：{known}",
                form=form,
                known=", ".join(f for f in FORMATS if f != "MPO"),
            )
        # Every scan of a progressive JPEG goes over all pixels, and one can be ten bytes. Inside a scan FF is never followed by DA.
        if progressive and data.count(b"\xff\xda") * pixels > SCANS * self.limits.pixels:
            raise Refusal(413, "TooLarge", "a progressive JPEG with too many scans", "渐进式 JPEG 的扫描次数过多", fix="save it as an ordinary JPEG",
                          fix_zh="请另存为普通 JPEG")  # fmt: skip

    # -- what it says of itself ------------------------------------------------------------------------------------------------
    def _card(self) -> dict[str, Any]:
        """GET /model. Made once: the digest reads all weights."""
        card, task = self.loaded.card, self.loaded.task
        return {
            "name": self.name,
            "task": card["task"],
            "kind": task.kind,
            "labels": card["labels"],
            "architecture": Path(self.loaded.architecture).name,
            "parameters": count_parameters(self.loaded.model)[0],
            "input_shape": list(task.input_shape),
            "preprocessor": task.state()["preprocessor"],
            "views": card.get("views"),
            "metrics": card.get("metrics", {}),
            "sha256": self.loaded.sha256 if self.loaded.weights else None,
            "versions": card.get("versions", {}) | {"serving": groundup.__version__},
            "device": str(self.device),
            "limits": {"files": self.limits.files, "rows": self.limits.rows, "bytes": self.limits.body, "pixels": self.limits.pixels},
        }
