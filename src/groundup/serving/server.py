"""`groundup serve`: FastAPI around one model. Every limit is checked before the work it limits; a client's mistake is a 4xx with the words and the
fix, in one form: {"error": {"type", "message", "fix"}}."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
import uvicorn.server
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

import groundup
from groundup import modelfolder
from groundup.core import console
from groundup.core.device import choose_device
from groundup.core.errors import GateError, UserError
from groundup.core.messages import say
from groundup.models.base import placed
from groundup.serving import inputs
from groundup.serving.limits import Limits, Refusal
from groundup.serving.service import Service, log

# Answered without a key: the pages are the same for everybody and hold nothing of the model; what probes ask is not a secret.
OPEN = ("/", "/docs", "/health", "/ready")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


# -- who may come in -----------------------------------------------------------------------------------------------------------
class Gate:
    """The outermost layer: refuses before anything is read, counts, and turns every error into words. Nothing passes it as a traceback.

    Args:
        hosts: names that a request's Host header, and its Origin, may have; None for any. Without a key, a page of another site could otherwise
            reach a server on loopback through a name that its owner lets point there (DNS rebinding).
        stopping: whether the server is about to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        paths: set[str],
        api_key: str | None,
        hosts: tuple[str, ...] | None,
        stopping: Callable[[], bool],
    ) -> None:
        self.app, self.service, self.paths, self.hosts, self.stopping = app, service, paths, hosts, stopping
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status, metrics, headers = time.perf_counter(), 0, self.service.metrics, Headers(scope=scope)
        unread = scope["method"] == "POST"

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread and status != 408 and "expect" not in headers:
                    await self._drain(received)
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        metrics.in_flight += 1
        try:
            self._check(scope, headers)
            await self.app(scope, received, sent)
        except ClientDisconnect:
            status = 499  # as others count it; nobody is there to be told
        except Exception as error:
            if not isinstance(error, Refusal):
                log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
                error = Refusal(500, "InternalError", "something went wrong in the server; its log says what", "服务器内部出错；详见其日志")
            if not status:
                language = "zh" if headers.get("accept-language", "").lower().startswith("zh") else "en"
                await error.response(language)(scope, received, sent)
        finally:
            metrics.in_flight -= 1
            path, seconds = scope["path"] if scope["path"] in self.paths else "other", time.perf_counter() - begin
            metrics.requests[path, status] += 1
            if path == "/predict":
                metrics.latency.add(seconds)
            log.info("%s %s %d %.1f ms", scope["method"], path, status, 1e3 * seconds)

    async def _drain(self, receive: Receive) -> None:
        """Lets a client finish what it is sending before it is refused: a connection that is closed under it loses the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                while (await receive()).get("more_body"):
                    pass

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Refusal."""
        path = scope["path"]
        if self.hosts is not None:
            if _host(headers.get("host", "")) not in self.hosts:
                raise Refusal(421, "WrongHost", "this server does not answer for the host '{host}'", "本服务不接受主机名 '{host}'",
                              fix="use {known}, or set an API key", fix_zh="请使用 {known}，或设置 API 密钥",
                              host=headers.get("host", "")[:100], known=self.hosts[0])  # fmt: skip
            origin = headers.get("origin")
            if origin is not None and _host(origin.partition("://")[2]) not in self.hosts:
                raise Refusal(403, "WrongOrigin", "a page of another site asked", "请求来自其他网站的页面")
        if self.stopping() and path in ("/predict", "/ready"):
            raise Refusal(503, "Stopping", "the server is stopping", "服务正在停止", fix="try again shortly", fix_zh="请稍后再试",
                          headers={"Retry-After": "5", "Connection": "close"})  # fmt: skip
        if self.key is not None and path not in OPEN:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("latin-1"), self.key):  # a header's bytes arrive as Latin-1
                raise Refusal(401, "Unauthorized", "the API key is missing or wrong", "缺少 API 密钥，或密钥不正确",
                              fix="Authorization: Bearer KEY, or X-API-Key: KEY",
                              fix_zh="Authorization: Bearer KEY，或 X-API-Key: KEY", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def _host(text: str) -> str:
    """'[::1]:80' -> '[::1]', 'LOCALHOST:80' -> 'localhost'."""
    return re.sub(r":\d*$", "", text).lower() if not text.endswith("]") else text.lower()


# -- the application -----------------------------------------------------------------------------------------------------------
def create_app(
    loaded: modelfolder.Loaded,
    *,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = LOOPBACK,
    limits: Limits | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application.

    Args:
        api_key: asked for on all but the pages, /health and /ready.
        hosts, stopping: see `Gate`; with a key any host is answered for.
        max_batch, max_wait_ms: see `Batcher`.
    """
    service = Service(loaded, limits or Limits(), max_batch, max_wait_ms / 1e3)
    limits, kind = service.limits, loaded.task.kind
    pages = {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.html", "docs.html")}

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        service.ready = True
        yield
        service.close()

    app = FastAPI(
        title=f"groundup: {service.name}",
        version=groundup.__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        known = {404: ("no such path", "没有这个路径"), 405: ("this path does not take that method", "该路径不支持此方法")}
        en, zh = known.get(error.status_code, (str(error.detail), str(error.detail)))
        raise Refusal(error.status_code, "BadRequest", en, zh, fix="GET /docs", headers=dict(error.headers or {}))

    @app.post("/predict", openapi_extra=_predict_schema(kind), summary="Answers to pictures, or to rows of numbers, in their order")
    async def predict(request: Request) -> JSONResponse:
        begin, own = time.perf_counter(), 0

        def reserve(size: int) -> bool:
            nonlocal own
            own += size
            service.held += size
            return service.held <= limits.memory

        service.accepted += 1
        try:
            if unknown := [name for name in request.query_params if name != "top_k"]:
                raise inputs.bad("unknown parameter '{name}'; known: top_k", "未知参数 '{name}'；可用：top_k", name=unknown[0][:100])
            body, content = await inputs.body_of(request, limits, reserve), request.headers.get("content-type", "")
            if len(body) < 2**17:
                asked = inputs.read(body, content, kind, limits)
            else:  # milliseconds to parse, in which others could not be served
                asked = await asyncio.to_thread(inputs.read, body, content, kind, limits)
            given = request.query_params.get("top_k") if asked.top is None else asked.top
            found = await service.predict(asked, inputs.top_of(given, service.classes))
        finally:
            service.held -= own
            service.accepted -= 1
        return JSONResponse({"predictions": found, "model": service.name, "milliseconds": round(1e3 * (time.perf_counter() - begin), 3)})

    @app.get("/health", summary="The process is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="The model answers; 503 before that, and while stopping")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/model", summary="What is served: task, labels, input shape, preprocessing, digest, versions, metrics")
    async def model() -> JSONResponse:
        return JSONResponse(service.card)

    @app.get("/metrics", summary="Counters in Prometheus' format", response_class=PlainTextResponse)
    async def counters() -> PlainTextResponse:
        waiting = service.batcher.coming + service.batcher.rows
        return PlainTextResponse(service.metrics.text(waiting), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page(pages["page.html"])

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page(pages["docs.html"])

    if api_key:
        schema = app.openapi()  # made once, and kept by the application
        kinds = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
        schema.setdefault("components", {})["securitySchemes"] = kinds
        schema["security"] = [{name: []} for name in kinds]
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Gate, service=service, paths=paths, api_key=api_key, hosts=None if api_key else hosts, stopping=stopping)
    return app


def _predict_schema(kind: str) -> dict[str, Any]:
    """The bodies and answers of POST /predict, for /openapi.json."""
    top = {"type": "integer", "minimum": 1, "description": "how many labels to list (5)"}
    row = {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "object", "additionalProperties": {"type": "number"}}]}
    picture, file = {"type": "string", "format": "byte", "description": "base64, or a data: URL"}, {"type": "string", "format": "binary"}
    one, many, item = ("image", "images", picture) if kind == "image" else ("input", "inputs", row)

    def content(**fields: Any) -> dict[str, Any]:
        return {"schema": {"type": "object", "properties": fields}}

    bodies: dict[str, Any] = {"application/json": content(**{one: item, many: {"type": "array", "items": item}, "top_k": top})}
    if kind == "image":
        bodies |= {"multipart/form-data": content(file={"type": "array", "items": file}, top_k=top), "image/*": {"schema": file}}
    answer = content(predictions={"type": "array", "items": {"type": "object"}}, model={"type": "string"}, milliseconds={"type": "number"})
    text = {"type": "string"}
    error = content(error={"type": "object", "properties": {"type": text, "message": text, "fix": text, "index": {"type": "integer"}}})
    told = {400: "not what it says it is", 401: "the API key is missing or wrong", 413: "too large, or too many", 415: "another content type",
            422: "an input that cannot be read; `index` says which", 503: "busy, or stopping: try again after Retry-After"}  # fmt: skip
    return {
        "parameters": [{"name": "top_k", "in": "query", "required": False, "schema": top}],
        "requestBody": {"required": True, "content": bodies},
        "responses": {"200": {"description": "one prediction per input", "content": {"application/json": answer}}}
        | {str(code): {"description": words, "content": {"application/json": error}} for code, words in told.items()},
    }


def _page(html: str) -> HTMLResponse:
    """A page of ours: nothing is fetched from elsewhere, and only its own script runs."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:; connect-src 'self'"
    return HTMLResponse(
        html.replace("NONCE", nonce),
        headers={"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
    )


# -- the process ---------------------------------------------------------------------------------------------------------------
class Patient(H11Protocol):
    """Closes a connection on which the head of a request does not come: uvicorn itself would wait for ever."""

    SECONDS = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._looked: Any = None
        self._timer = self.loop.call_later(self.SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle = self.cycle
        waiting = (cycle is None or cycle.response_complete) and self.timeout_keep_alive_task is None
        state = (waiting, cycle)
        if waiting and (cycle is None or self._looked == state):
            self.transport.close()
            return
        self._looked = state
        self._timer = self.loop.call_later(self.SECONDS, self._look)


class Server(uvicorn.Server):
    """Stops in order: at the first SIGINT or SIGTERM new requests get 503, and it ends when the accepted ones are answered; a second one ends the
    process at once. Outside the main thread signals stay as they are."""

    PATIENCE = 30.0  # seconds for what was accepted

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.announce = announce
        self.stopped_by: int | None = None
        self._deadline = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        old = {}
        if threading.current_thread() is threading.main_thread():
            old = {number: signal.signal(number, self.handle_exit) for number in uvicorn.server.HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.stopped_by is not None:
            os._exit(128 + sig)
        self.stopped_by, self._deadline = sig, time.monotonic() + self.PATIENCE

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce()

    async def on_tick(self, counter: int) -> bool:
        service: Service = self.config.app.state.service  # type: ignore[union-attr]
        if self.stopped_by is not None and (service.accepted == 0 or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    insecure: bool = False,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    max_body_mb: float = 32,
    max_pixels: int = 50_000_000,
    views: str | None = None,
    trust_code: bool = False,
    device: str | None = None,
    log_level: str = "warning",
    as_json: bool = False,
) -> None:
    """Serves a model until it is told to stop (Ctrl-C, SIGTERM), and returns when what was accepted is answered: to be stopped is no failure.

    Args:
        host: an address that others can reach needs `api_key` or `insecure`.
        port: 0 for any free one.
        api_key: default: the environment variable GROUNDUP_API_KEY.
        max_wait_ms: how long a forward pass waits for inputs that are being decoded.
        log_level: 'info' shows a line per request.
        as_json: JSON lines on standard output: {"event": "ready", "url"}, {"event": "stopped", "url"}.

    Raises:
        UserError: an address that others can reach without a key, or a port that is taken.
        GateError: the model does not compute what it did when it was saved.
    """
    api_key = (api_key or os.environ.get("GROUNDUP_API_KEY") or "").strip() or None
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
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(shown, shown) }:{taken.getsockname()[1]}"
    try:
        loaded = modelfolder.load(model, trust_code=trust_code)
        loaded.look_through(views)
        _gate(loaded)
        placed(loaded.model, torch.device(choose_device(device or "auto").value))
        _leave_a_core(loaded)
        if log_level.lower() in ("info", "debug"):
            log.setLevel(log_level.upper())
            if not log.handlers:
                log.addHandler(logging.StreamHandler())
        app = create_app(
            loaded,
            api_key=api_key,
            hosts=(*LOOPBACK, shown.lower()) if local else None,
            limits=Limits(body=int(max_body_mb * 2**20), pixels=max_pixels),
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            stopping=lambda: server.stopped_by is not None,
        )
        config = uvicorn.Config(
            app,
            http=Patient,
            ws="none",
            log_level="error",
            access_log=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
            server_header=False,
            lifespan="on",
        )
        server = Server(config, lambda: _say_ready(url, loaded, as_json))
        server.run(sockets=[taken])
    finally:
        taken.close()
    console.line(say("stopped", "已停止"))
    if as_json:
        print(json.dumps({"event": "stopped", "url": url}), flush=True)  # noqa: T201 - a stream of JSON lines


def _say_ready(url: str, loaded: modelfolder.Loaded, as_json: bool) -> None:
    name = loaded.card["source_run"]
    if as_json:
        print(json.dumps({"event": "ready", "url": url, "model": name}), flush=True)  # noqa: T201
    console.line(say("serving {name} at {url}   (Ctrl-C stops)", "正在 {url} 提供 {name}   （Ctrl-C 停止）", name=name, url=url))
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


def _leave_a_core(loaded: modelfolder.Loaded) -> None:
    """On the CPU: one thread less for the model, unless that costs it a third. What reads requests and pictures needs a core, too, and threads that
    wait for each other suffer most where they get none. OMP_NUM_THREADS wins."""
    threads = torch.get_num_threads()
    if threads == 1 or "OMP_NUM_THREADS" in os.environ or next(loaded.model.parameters()).device.type != "cpu":
        return
    inputs, seconds = modelfolder.reference_inputs(loaded.task.input_shape, 1), {}
    with torch.inference_mode():
        for count in (threads, threads - 1):
            torch.set_num_threads(count)
            loaded.model(inputs)
            begin = time.perf_counter()
            for _ in range(3):
                loaded.model(inputs)
            seconds[count] = time.perf_counter() - begin
    torch.set_num_threads(threads if seconds[threads - 1] > 4 / 3 * seconds[threads] else threads - 1)


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """The listening socket, taken before the model is loaded: a port in use is known at once, and nobody can take it meanwhile."""
    # Only of a socket that is TCP by name does asyncio switch off Nagle's delay (40 ms per answer).
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # elsewhere it would let two servers share a port
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(1024)
    except (OSError, OverflowError) as error:
        made.close()
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) or isinstance(error, OverflowError):
            fix = f"--port {port + 1 if 1024 <= port < 65535 else 8000}"
        else:
            fix = "--host 127.0.0.1"
        raise UserError(
            "{host}:{port} cannot be opened: {cause}",
            "无法打开 {host}:{port}：{cause}",
            host=host,
            port=port,
            cause=error,
            fix=fix,
        ) from error
    return made
