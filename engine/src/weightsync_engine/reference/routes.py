"""vLLM's routes, those that weightsync and its tests use, over the reference engine."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightsync_engine.reference.completions import Completions
from weightsync_engine.reference.engine import MODES, Engine

Handler = Callable[[Request], Awaitable[Response]]


class WeightTransfer(Protocol):
    """What a weight transfer backend does when its routes are called; any exception is answered with 500."""

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def receive_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...


class Routes:
    """The handlers."""

    def __init__(self, engine: Engine, backend: WeightTransfer, name: str, world_size: int) -> None:
        self._engine = engine
        self._backend = backend
        self._name = name
        self._world_size = world_size
        self._updating = False

    def application(self, completions: Completions) -> Starlette:
        """The ASGI application, without the guard."""
        post, get = ["POST"], ["GET"]
        return Starlette(
            routes=[
                Route("/health", _ok, methods=get),
                Route("/ping", _ok, methods=["GET", "POST"]),
                Route("/version", self._version, methods=get),
                Route("/metrics", self._metrics, methods=get),
                Route("/v1/models", self._models, methods=get),
                Route("/v1/completions", completions.answer, methods=post),
                Route("/pause", self._pause, methods=post),
                Route("/resume", self._resume, methods=post),
                Route("/is_paused", self._is_paused, methods=get),
                Route("/get_world_size", self._get_world_size, methods=get),
                Route("/reset_prefix_cache", self._reset_prefix_cache, methods=post),
                Route("/init_weight_transfer_engine", self._init, methods=post),
                Route("/start_weight_update", self._start, methods=post),
                Route("/update_weights", self._update, methods=post),
                Route("/finish_weight_update", self._finish, methods=post),
                Route("/shutdown_weight_transfer_engine", self._shutdown, methods=post),
            ],
            middleware=[Middleware(_AnswersErrors)],
        )

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": "reference"})

    async def _metrics(self, _: Request) -> Response:
        lines = f'vllm:num_requests_running{{model_name="{self._name}"}} {self._engine.running}\n'
        return PlainTextResponse(lines)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self._name, "object": "model"}]})

    async def _pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in MODES:
            return _bad(f"mode {mode!r}: one of {', '.join(MODES)}")
        await self._engine.pause(mode)
        return JSONResponse({"status": "paused"})

    async def _resume(self, _: Request) -> Response:
        await self._engine.resume()
        return JSONResponse({"status": "resumed"})

    async def _is_paused(self, _: Request) -> Response:
        return JSONResponse({"is_paused": self._engine.paused})

    async def _get_world_size(self, _: Request) -> Response:
        return JSONResponse({"world_size": self._world_size})

    async def _reset_prefix_cache(self, _: Request) -> Response:
        return JSONResponse({"success": True})

    async def _init(self, request: Request) -> Response:
        info = (await request.json()).get("init_info", {})
        await self._engine.between_steps(lambda: self._backend.init_transfer_engine(info))
        return JSONResponse({"message": "Weight transfer initialized"})

    async def _start(self, _: Request) -> Response:
        if self._updating:
            raise RuntimeError("a weight update is active already")
        await self._engine.between_steps(self._backend.start_weight_update)
        self._updating = True
        return JSONResponse({"message": "Weight update started"})

    async def _update(self, request: Request) -> Response:
        info = (await request.json()).get("update_info", {})
        if not self._updating:
            raise RuntimeError("no weight update was started")
        try:
            await self._engine.between_steps(lambda: self._backend.receive_weights(info))
        except Exception:
            # As vLLM's worker does: a failed update ends its session.
            self._updating = False
            raise
        return JSONResponse({"message": "Weights updated"})

    async def _finish(self, _: Request) -> Response:
        if not self._updating:
            raise RuntimeError("no weight update was started")
        await self._engine.between_steps(self._backend.finish_weight_update)
        self._updating = False
        return JSONResponse({"message": "Weight update finished"})

    async def _shutdown(self, _: Request) -> Response:
        await self._engine.between_steps(self._backend.shutdown)
        return JSONResponse({"message": "Weight transfer shut down"})


async def _ok(_: Request) -> Response:
    return Response()


class _AnswersErrors:
    """Any exception of the backend is an answer with status 500 that carries its message, as vLLM's are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            body = {"error": {"message": str(error), "type": type(error).__name__, "code": 500}}
            await JSONResponse(body, status_code=500)(scope, receive, send)


def _bad(message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": 400}}, status_code=400)
