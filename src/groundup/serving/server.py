"""`groundup serve`: FastAPI around one model. Every limit is checked before the work it limits; a client's mistake is a 4xx with the words and the
fix, in one form: {"error": {"type", "message", "fix"}}."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response
from torch import Tensor

import groundup
from groundup import modelfolder
from groundup.core import console
from groundup.core.device import choose_device
from groundup.core.errors import DataError, GateError, UserError
from groundup.core.messages import say
from groundup.evaluation.evaluate import evaluating
from groundup.models.base import count_parameters, placed
from groundup.serving.batcher import Batcher, Busy
from groundup.serving.metrics import Metrics

OPEN = ("/", "/docs", "/health")  # answered without a key: the page is the same for everybody and holds nothing of the model
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        body: bytes of a request; files: pictures (or rows) in it; pixels: width times height of a picture, read from its header before it is
            decoded; seconds: for receiving the body, and again for decoding; queue: inputs that may wait for the model.
    """

    body: int = 32 * 2**20
    files: int = 64
    pixels: int = 50_000_000
    seconds: float = 15.0
    queue: int = 512


class ApiError(Exception):
    """An answer of 4xx or 503 with words."""

    def __init__(self, status: int, kind: str, message: str, fix: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.fix, self.headers = status, kind, fix, headers or {}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": {"type": self.kind, "message": str(self), "fix": self.fix}}, self.status, self.headers)


class Service:
    """A loaded model behind a batcher; what the routes share."""

    def __init__(self, loaded: modelfolder.Loaded, limits: Limits, max_batch: int) -> None:
        self.loaded, self.limits, self.metrics = loaded, limits, Metrics()
        self.device = next(loaded.model.parameters()).device
        self.model = loaded.answering.eval()
        self.batcher = Batcher(self._forward, max_batch, limits.queue, self.metrics.batches.add)
        self.decoders = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="decode")
        self.ready = False

    def _forward(self, rows: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs: Tensor = self.model(self.loaded.task.model_inputs(rows.to(self.device))).float().cpu()
        return outputs

    def warm_up(self) -> None:
        """One pass of one input: the first one allocates, and would make the first client wait."""
        with evaluating(self.model):
            self.model(modelfolder.reference_inputs(self.loaded.task.input_shape, 1).to(self.device))

    async def predict(self, raws: list[tuple[str, Any]], top: int) -> list[dict[str, Any]]:
        """Answers in the order of the inputs. Raises ApiError that names the one it is about."""
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self.decoders, self._read, name, raw) for name, raw in raws]
        try:
            async with asyncio.timeout(self.limits.seconds):
                rows = await asyncio.gather(*jobs)
        except TimeoutError as error:
            raise ApiError(422, "TooSlow", f"decoding took more than {self.limits.seconds:g} s", "send smaller pictures") from error
        try:
            outputs = await self.batcher.submit(torch.cat(rows))
        except Busy as error:
            raise ApiError(503, "Busy", "too many inputs are waiting", "try again shortly", {"Retry-After": "1"}) from error
        return self.loaded.task.answers(outputs, top)

    def _read(self, name: str, raw: Any) -> Tensor:
        try:
            if isinstance(raw, bytes):
                self._bounded(name, raw)
            return self.loaded.task.read(raw)
        except DataError as error:
            raise ApiError(422, "BadInput", f"{name}: {error.en}", error.fix_en) from error

    def _bounded(self, name: str, data: bytes) -> None:
        """Refuses a picture by its header: a file of a few kilobytes can claim to be gigabytes of pixels."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
        except Image.DecompressionBombError:
            width, height = self.limits.pixels + 1, 1
        except Exception:
            return  # not a picture: `read` says so
        if width * height > self.limits.pixels:
            raise ApiError(
                413, "TooLarge", f"{name}: {width} x {height} pixels; at most {self.limits.pixels:,} are accepted", "send a smaller picture"
            )

    def card(self) -> dict[str, Any]:
        card, task = self.loaded.card, self.loaded.task
        return {
            "name": card["source_run"],
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
        }


# -- reading a request ---------------------------------------------------------------------------------------------------------
async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, counted while it comes: its stated length may be missing, or a lie."""
    too_large = ApiError(413, "TooLarge", f"the body is larger than {limits.body:,} bytes", "send fewer or smaller pictures")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limits.body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body:
                    raise too_large
                parts.append(chunk)
    except TimeoutError as error:
        raise ApiError(408, "TooSlow", f"the body did not arrive within {limits.seconds:g} s") from error
    return b"".join(parts)


async def _inputs(request: Request, kind: str, limits: Limits) -> tuple[list[tuple[str, Any]], Any]:
    """The raw inputs with names for messages, and `top_k` as it was given."""
    body = await _body(request, limits)
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    top: Any = request.query_params.get("top_k")
    if not body:
        raise ApiError(400, "BadRequest", "the body is empty", 'curl -F file=@photo.jpg, or JSON {"image": BASE64}')
    if content == "application/json":
        found, top = _of_json(body, kind, top)
    elif kind == "image" and content == "multipart/form-data":
        found, top = await _of_form(request, body, limits, top)
    elif kind == "image" and (content.startswith("image/") or content == "application/octet-stream"):
        found = [("image", body)]
    else:
        known = "application/json" + (", multipart/form-data or image/*" if kind == "image" else "")
        raise ApiError(415, "UnsupportedMediaType", f"content type '{content}' is not read here; known: {known}")
    if not found:
        raise ApiError(422, "BadInput", "no input in the request")
    if len(found) > limits.files:
        raise ApiError(413, "TooLarge", f"{len(found)} inputs in one request; at most {limits.files} are accepted", "send several requests")
    return found, top


def _of_json(body: bytes, kind: str, top: Any) -> tuple[list[tuple[str, Any]], Any]:
    try:
        given = json.loads(body, parse_constant=lambda name: _not_a_number(name))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "BadRequest", f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError(422, "BadInput", f"an object is expected, not {type(given).__name__}")
    one, many = ("image", "images") if kind == "image" else ("input", "inputs")
    if unknown := sorted(set(given) - {one, many, "top_k"}):
        raise ApiError(422, "BadInput", f"unknown field '{unknown[0]}'; known: {one}, {many}, top_k")
    if (one in given) == (many in given):
        raise ApiError(422, "BadInput", f"give '{one}' or '{many}'")
    values = [given[one]] if one in given else given[many]
    if not isinstance(values, list):
        raise ApiError(422, "BadInput", f"'{many}' is a list, not {type(values).__name__}")
    named = [(f"{many}[{i}]" if many in given else one, value) for i, value in enumerate(values)]
    top = given.get("top_k", top)
    if kind == "image":
        return [(name, _from_base64(name, value)) for name, value in named], top
    for name, value in named:
        if not isinstance(value, list | dict):
            raise ApiError(
                422, "BadInput", f"{name}: a list of numbers or an object by feature name is expected, not {type(value).__name__}"
            )
    return named, top


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _from_base64(name: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise ApiError(422, "BadInput", f"{name}: base64 text is expected, not {type(value).__name__}")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, "BadInput", f"{name}: not base64: {error}") from error


async def _of_form(request: Request, body: bytes, limits: Limits, top: Any) -> tuple[list[tuple[str, Any]], Any]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=limits.files + 1, max_part_size=limits.body).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, "BadRequest", f"the form cannot be read: {getattr(error, 'message', error)}") from error
    found: list[tuple[str, Any]] = []
    try:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                found.append((f"file {len(found)} ({value.filename})", await value.read()))
            elif key == "top_k":
                top = value
            else:
                raise ApiError(422, "BadInput", f"unknown field '{key}'; known: files, and top_k")
    finally:
        await form.close()
    return found, top


def _top(given: Any, most: int) -> int:
    if given is None or given == "":
        return min(5, most)
    text = str(given)
    if isinstance(given, bool) or not text.isdecimal() or not 1 <= int(text[:9]) <= 100_000:
        raise ApiError(422, "BadInput", f"top_k = {text[:40]}: a whole number from 1 on is expected")
    return min(int(text[:9]), most)


# -- the application -----------------------------------------------------------------------------------------------------------
_NUMBERS = {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "object", "additionalProperties": {"type": "number"}}]}


def _request_schema(kind: str) -> dict[str, Any]:
    """The bodies of POST /predict, for /openapi.json: they are read by hand, so that limits come before parsing."""
    top = {"type": "integer", "minimum": 1, "description": "how many labels to list"}
    if kind != "image":
        fields = {"input": _NUMBERS, "inputs": {"type": "array", "items": _NUMBERS}, "top_k": top}
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object", "properties": fields}}}}}
    text, binary = {"type": "string", "format": "byte"}, {"type": "string", "format": "binary"}
    fields = {"image": text, "images": {"type": "array", "items": text}, "top_k": top}
    form = {"file": {"type": "array", "items": binary}, "top_k": top}
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form}},
        "application/json": {"schema": {"type": "object", "properties": fields}},
        "image/*": {"schema": binary},
    }
    parameters = [{"name": "top_k", "in": "query", "schema": top}]
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def create_app(
    loaded: modelfolder.Loaded,
    *,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = LOOPBACK,
    limits: Limits | None = None,
    max_batch: int = 32,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application.

    Args:
        api_key: asked for on all but the page, its description and /health.
        hosts: names that a request's Host header may have; None for any. A page of another site could otherwise reach a server on loopback
            through a name that its owner lets point there (DNS rebinding).
        stopping: whether the server is about to end; new requests then get 503.
    """
    service = Service(loaded, limits or Limits(), max_batch)
    metrics = service.metrics

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.get_running_loop().run_in_executor(None, service.warm_up)
        service.ready = True
        yield
        service.ready = False
        service.batcher.close()
        service.decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title=f"groundup: {loaded.card['source_run']}", version=groundup.__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.state.service = service

    def refused(request: Request) -> ApiError | None:
        path, host = request.url.path, request.headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if hosts is not None and name.lower() not in hosts:
            return ApiError(421, "WrongHost", f"this server does not answer for the host '{host[:100]}'", f"use http://{hosts[0]}")
        if stopping() and path != "/health":
            return ApiError(503, "Stopping", "the server is stopping", "try again shortly", {"Retry-After": "5", "Connection": "close"})
        if api_key is not None and path not in OPEN:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                return ApiError(
                    401, "Unauthorized", "the API key is missing or wrong", "Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
                )
        return None

    @app.middleware("http")
    async def gate(request: Request, call_next: Any) -> Response:
        begin = time.perf_counter()
        metrics.in_flight += 1
        try:
            error = refused(request)
            response: Response = error.response() if error is not None else await call_next(request)
        finally:
            metrics.in_flight -= 1
        path = request.url.path if any(getattr(r, "path", None) == request.url.path for r in app.routes) else "other"
        metrics.requests[path, response.status_code] += 1
        if path == "/predict":
            metrics.latency.add(time.perf_counter() - begin)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        fix = "GET /docs lists the paths" if error.status_code == 404 else None
        return ApiError(error.status_code, "BadRequest", str(error.detail), fix, dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def of_any(request: Request, error: Exception) -> Response:
        return ApiError(500, "InternalError", "something went wrong in the server; its log says what").response()

    @app.post("/predict", openapi_extra=_request_schema(loaded.task.kind), summary="Answers to pictures or rows of numbers, in their order")
    async def predict(request: Request) -> JSONResponse:
        begin = time.perf_counter()
        raws, top = await _inputs(request, loaded.task.kind, service.limits)
        found = await service.predict(raws, _top(top, max(len(loaded.card["labels"] or []), 1)))
        elapsed = round(1e3 * (time.perf_counter() - begin), 3)
        return JSONResponse({"predictions": found, "model": loaded.card["source_run"], "milliseconds": elapsed})

    @app.get("/health", summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="The model answers; 503 before that, and while stopping")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/model", summary="What is served: task, labels, preprocessing, digest, metrics")
    async def model() -> dict[str, Any]:
        return service.card()

    @app.get("/metrics", summary="Counters in Prometheus' format")
    async def counters() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(service.batcher.rows), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("page.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page("docs.html")

    return app


def _page(name: str) -> HTMLResponse:
    """A page of ours: nothing is fetched from elsewhere, and only its own script runs."""
    nonce = secrets.token_urlsafe(16)
    html = (Path(__file__).parent / name).read_text(encoding="utf-8").replace("NONCE", nonce)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:; connect-src 'self'"
    return HTMLResponse(html, headers={"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"})


# -- the process ---------------------------------------------------------------------------------------------------------------
def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    insecure: bool = False,
    max_batch: int = 32,
    limits: Limits | None = None,
    views: str | None = None,
    trust_code: bool = False,
    as_json: bool = False,
) -> None:
    """Serves a model until it is told to stop (SIGINT, SIGTERM): what was accepted is answered first.

    Raises:
        UserError: an address that others can reach without a key, or a port that is taken.
        GateError: the model does not compute what it did when it was saved.
    """
    import uvicorn

    from groundup.evaluation.views import parse

    api_key = api_key or os.environ.get("GROUNDUP_API_KEY") or None
    local = _is_loopback(host)
    if not local and not api_key and not insecure:
        raise UserError(
            "--host {host} can be reached from other machines: anyone there could use the model",
            "--host {host} 可被其他机器访问：任何人都能使用该模型",
            host=host,
            fix="--api-key KEY   (or GROUNDUP_API_KEY), or --insecure where that is meant",
            fix_zh="--api-key 密钥   （或环境变量 GROUNDUP_API_KEY）；确实需要时用 --insecure",
        )
    taken = _bound(host, port)
    port = taken.getsockname()[1]
    try:
        loaded = modelfolder.load(model, trust_code=trust_code)
        if views is not None:
            chosen = parse(views)
            loaded.card["views"] = chosen.model_dump() if chosen else None
        _gate(loaded)
        placed(loaded.model, torch.device(choose_device().value))
        shown = f"[{host}]" if ":" in host else host
        hosts = (*LOOPBACK, shown.lower()) if local else None
        server: uvicorn.Server
        app = create_app(loaded, api_key=api_key, hosts=hosts, limits=limits, max_batch=max_batch, stopping=lambda: server.should_exit)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=30,
            server_header=False,
            lifespan="on",
        )
        server = uvicorn.Server(config)
        url = f"http://{shown}:{port}"
        _say_ready(url, loaded, as_json)
        server.run(sockets=[taken])
    finally:
        taken.close()
    if as_json:
        print(json.dumps({"event": "stopped", "url": url}), flush=True)  # noqa: T201 - a stream of JSON lines


def _say_ready(url: str, loaded: modelfolder.Loaded, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "ready", "url": url, "model": loaded.card["source_run"]}), flush=True)  # noqa: T201
    console.line(
        say("serving {name} at {url}   (Ctrl-C stops)", "正在 {url} 提供 {name}   （Ctrl-C 停止）", name=loaded.card["source_run"], url=url)
    )
    if loaded.task.kind == "image":
        console.command(f"curl -F file=@photo.jpg {url}/predict")
    else:
        row = ", ".join(["0"] * loaded.task.input_shape[0])
        console.command(f"""curl -H 'Content-Type: application/json' -d '{{"input": [{row}]}}' {url}/predict""")


def _gate(loaded: modelfolder.Loaded) -> None:
    if not (loaded.path / "reference.json").is_file():
        console.line(
            say("no reference outputs to replay: this folder is not one of ours", "没有可回放的参考输出：该目录不是 groundup 的模型目录")
        )
        return
    difference = modelfolder.replay(loaded)
    if not difference <= 1e-4:
        raise GateError(
            "{model} does not compute here what it did when it was saved: outputs differ by {difference:.2e} (at most 1e-4 is accepted)",
            "{model} 在这里的计算结果与保存时不同：输出相差 {difference:.2e}（最多允许 1e-4）",
            model=loaded.path,
            difference=difference,
            fix="groundup runs verify RUN; or compare the versions of torch (groundup.json, versions)",
            fix_zh="运行 groundup runs verify RUN；或比较 torch 版本（groundup.json 的 versions）",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """The listening socket, taken before the model is loaded: a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise UserError(
            "{host}:{port} cannot be opened: {cause}",
            "无法打开 {host}:{port}：{cause}",
            host=host,
            port=port,
            cause=getattr(error, "strerror", None) or error,
            fix=f"--port {port + 1 if 0 < port < 65535 else 8000}",
        ) from error
    return made
