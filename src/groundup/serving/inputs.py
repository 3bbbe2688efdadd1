"""What a request to /predict holds: its body, counted while it comes, then pictures or rows of numbers, each with a name for messages.

Bodies are read by hand, not by declared models: every limit comes before the work that it limits.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from groundup.serving.limits import Limits, Refusal, busy, short


@dataclass(frozen=True)
class Asked:
    """Inputs as a user has them (bytes of a picture, or a list or mapping of numbers), their names, and how many classes to list."""

    raws: list[Any]
    names: list[str]
    top: Any = None


async def body_of(request: Request, limits: Limits, reserve: Callable[[int], bool]) -> bytes:
    """The whole body. Its stated length may be missing, or a lie.

    Args:
        reserve: takes so many bytes of the memory that all bodies share; says whether there were as many.
    """
    too_large = Refusal(
        413,
        "TooLarge",
        "the body is larger than {most} bytes",
        "请求体超过 {most} 字节",
        fix="send fewer or smaller pictures",
        fix_zh="请减少图片数量或缩小图片",
        most=f"{limits.body:,}",
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 15 or int(stated) > limits.body):
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.receive_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body:
                    raise too_large
                if not reserve(len(chunk)):
                    raise busy()
                parts.append(chunk)
    except TimeoutError as error:
        raise Refusal(
            408,
            "TooSlow",
            "the body did not arrive within {seconds} s",
            "请求体未能在 {seconds} 秒内到达",
            headers={"Connection": "close"},
            seconds=f"{limits.receive_seconds:g}",
        ) from error
    return b"".join(parts)


def read(body: bytes, content_type: str, kind: str, limits: Limits) -> Asked:
    """Raises Refusal: nothing in it, not what it says it is, or too many."""
    content = content_type.partition(";")[0].strip().lower()
    curl = (
        "curl -F file=@photo.jpg URL/predict"
        if kind == "image"
        else """curl -H 'Content-Type: application/json' -d '{"inputs": [[...]]}' URL/predict"""
    )
    if not body:
        raise Refusal(400, "BadRequest", "the body is empty", "请求体为空", fix=curl)
    most = limits.files if kind == "image" else limits.rows
    if content == "application/json":
        asked = _of_json(body, kind)
    elif kind == "image" and content == "multipart/form-data":
        asked = _of_form(body, content_type, most)
    elif kind == "image" and (content.startswith("image/") or content == "application/octet-stream"):
        asked = Asked([body], ["the picture"])
    else:
        known = "application/json" + (", multipart/form-data, image/*" if kind == "image" else "")
        raise Refusal(
            415,
            "UnsupportedMediaType",
            "content type '{content}' is not read here; known: {known}",
            "不支持内容类型 '{content}'；可用：{known}",
            fix="{curl}",
            curl=curl,
            content=short(content),
            known=known,
        )
    if not asked.raws:
        raise bad("no input in the request", "请求中没有输入", fix=curl)
    if len(asked.raws) > most:
        raise too_many(most)
    return asked


def bad(en: str, zh: str, status: int = 422, **values: Any) -> Refusal:
    return Refusal(status, "BadRequest" if status == 400 else "BadInput", en, zh, **values)


def too_many(most: int) -> Refusal:
    return Refusal(
        413,
        "TooLarge",
        "too many inputs in one request; at most {most} are accepted",
        "单个请求中的输入过多；最多 {most} 个",
        fix="send several requests",
        fix_zh="请分成多个请求",
        most=most,
    )


def _of_json(body: bytes, kind: str) -> Asked:
    try:
        given = json.loads(body, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise bad("not JSON: {error}", "不是 JSON：{error}", 400, error=short(error)) from error
    if not isinstance(given, dict):
        raise bad("an object is expected, not {found}", "应为 JSON 对象，而不是 {found}", found=_named(given))
    one, many = ("image", "images") if kind == "image" else ("input", "inputs")
    if unknown := sorted(set(given) - {one, many, "top_k"}):
        raise bad("unknown field '{name}'; known: {one}, {many}, top_k", "未知字段 '{name}'；可用：{one}、{many}、top_k",
                  name=short(unknown[0]), one=one, many=many)  # fmt: skip
    if (one in given) == (many in given):
        raise bad("give '{one}' or '{many}'", "请给出 '{one}' 或 '{many}'", one=one, many=many)
    values = given[many] if many in given else [given[one]]
    if not isinstance(values, list):
        raise bad("'{many}' is a list, not {found}", "'{many}' 应为列表，而不是 {found}", many=many, found=_named(values))
    names = [f"{many}[{i}]" for i in range(len(values))] if many in given else [one]
    check = _from_base64 if kind == "image" else _numbers
    return Asked([check(value, name, i) for i, (value, name) in enumerate(zip(values, names))], names, given.get("top_k"))


def _named(value: Any) -> str:
    """The type as JSON calls it."""
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _from_base64(value: Any, name: str, index: int) -> bytes:
    if not isinstance(value, str):
        raise bad(
            "{name}: base64 text is expected, not {found}",
            "{name}：应为 base64 文本，而不是 {found}",
            index=index,
            name=name,
            found=_named(value),
        )
    text = value.partition(",")[2] if value[:5].lower() == "data:" else value
    try:
        if any(space in text for space in " \r\n\t"):  # lines of 76 characters, as mail has them
            text = "".join(text.split())
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise bad("{name}: not base64: {error}", "{name}：不是 base64：{error}", index=index, name=name, error=short(error)) from error


def _numbers(value: Any, name: str, index: int) -> Any:
    if not isinstance(value, list | dict):
        raise bad("{name}: a list of numbers or an object by feature name is expected, not {found}", "{name}：应为数字列表，或按特征名给出的对象，而不是 {found}",
                  index=index, name=name, found=_named(value))  # fmt: skip
    for number in value.values() if isinstance(value, dict) else value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise bad(
                "{name}: {value} is not a number", "{name}：{value} 不是数字", index=index, name=name, value=short(json.dumps(number))
            )
    return value


def _of_form(body: bytes, content_type: str, most: int) -> Asked:
    """The parts of multipart/form-data (RFC 7578). The body is in memory already: cutting it at its marks is a tenth of a streaming parser's work."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, most + 9) if 0 < len(boundary) <= 70 else []
    if len(pieces) == most + 10:
        raise too_many(most)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        why = ("no boundary", "缺少 boundary") if not pieces else ("its end is missing", "缺少结尾")
        raise bad("the form cannot be read: {why}", "无法读取表单：{why_zh}", 400, why=why[0], why_zh=why[1])
    raws: list[Any] = []
    names: list[str] = []
    top = None
    for piece in pieces[1:-1]:
        head, found, data = piece.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")]
        options = parse_options_header(lines[0].partition(b":")[2].strip())[1] if lines else {}
        if not found or b"name" not in options:
            raise bad("the form cannot be read: a part without a name", "无法读取表单：有一部分没有名称", 400)
        if b"filename" in options:
            raws.append(data)
            names.append(f"file {len(names)} ({short(_text(options[b'filename']))})")
        elif options[b"name"] == b"top_k":
            top = _text(data)
        else:
            raise bad(
                "unknown field '{name}'; known: files, and top_k",
                "未知字段 '{name}'；可用：文件，以及 top_k",
                name=short(_text(options[b"name"])),
            )
    return Asked(raws, names, top)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def top_of(given: Any, most: int) -> int:
    """`top_k` as it was given -> how many classes are listed: 5 where nothing is said, and never more than there are."""
    if given is None or given == "":
        return min(5, most)
    text = str(given)
    if isinstance(given, bool) or not (text.isascii() and text.isdecimal()) or not text.strip("0"):
        raise bad("top_k = {given}: a whole number from 1 on is expected", "top_k = {given}：应为不小于 1 的整数", given=short(text, 40))
    return most if len(text.lstrip("0")) > 9 else min(int(text), most)
