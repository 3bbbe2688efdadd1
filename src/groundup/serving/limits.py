"""What one request may ask for, and how it is told that it asked for too much."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from groundup.core.errors import GroundupError


@dataclass(frozen=True)
class Limits:
    """Args:
    body: bytes of a request.
    files, rows: pictures, or rows of numbers, in it.
    pixels: width times height of a picture, read from its header before it is decoded.
    decode_seconds: for reading the inputs of a request.
    receive_seconds: for its body to arrive.
    queue: inputs of all requests that may wait for the model.
    memory: bytes of all bodies held at a time.
    """

    body: int = 32 * 2**20
    files: int = 64
    rows: int = 512
    pixels: int = 50_000_000
    decode_seconds: float = 10.0
    receive_seconds: float = 30.0
    queue: int = 1024
    memory: int = 512 * 2**20


class Refusal(GroundupError):
    """An answer of 4xx or 5xx, {"error": {"type", "message", "fix"}}; with "index" where it is about one input of several.

    Args:
        status, kind: of HTTP, and the `type` that programs look at.
        en, zh, fix, fix_zh, values: as of every GroundupError.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        en: str,
        zh: str,
        /,
        *,
        headers: dict[str, str] | None = None,
        index: int | None = None,
        fix: str | None = None,
        fix_zh: str | None = None,
        **values: Any,
    ) -> None:
        super().__init__(en, zh, fix=fix, fix_zh=fix_zh, **values)
        self.status, self.kind, self.headers, self.index = status, kind, headers or {}, index

    def response(self, language: str) -> Response:
        """In the client's language, 'en' or 'zh'."""
        message, fix = (self.zh, self.fix_zh) if language == "zh" else (self.en, self.fix_en)
        error: dict[str, Any] = {"type": self.kind, "message": message, "fix": fix}
        if self.index is not None:
            error["index"] = self.index
        # ASCII: a client's own words are repeated here, and half of a surrogate pair has no UTF-8.
        return Response(json.dumps({"error": error}), self.status, self.headers, "application/json")


def short(text: Any, most: int = 100) -> str:
    """A client's words, as much of them as a message needs."""
    text = str(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def busy() -> Refusal:
    return Refusal(
        503,
        "Busy",
        "too many inputs are waiting",
        "等待处理的输入过多",
        fix="try again shortly",
        fix_zh="请稍后再试",
        headers={"Retry-After": "1"},
    )
