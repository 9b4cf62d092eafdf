"""vLLM's routes over the reference engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from weightsync_engine.guard import Guard
from weightsync_engine.reference.control import MODES, Control, EngineError
from weightsync_engine.reference.core import Core, Request, Step
from weightsync_engine.reference.requests import BadRequestError, Completion, answer, parse


class Api:
    """Handlers, one a route."""

    def __init__(
        self, core: Core, control: Control, tokenizer: Tokenizer, model: str, world_size: int
    ) -> None:
        self._core = core
        self._control = control
        self._tokenizer = tokenizer
        self._model = model
        self._world_size = world_size

    def app(self) -> Starlette:
        """The application, guarded."""
        routes = [
            Route("/health", self.health),
            Route("/ping", self.health, methods=["GET", "POST"]),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/get_world_size", self.world_size),
            Route("/pause", self.pause, methods=["POST"]),
            Route("/resume", self.resume, methods=["POST"]),
            Route("/is_paused", self.is_paused),
            Route("/init_weight_transfer_engine", self.init, methods=["POST"]),
            Route("/start_weight_update", self.start, methods=["POST"]),
            Route("/update_weights", self.update, methods=["POST"]),
            Route("/finish_weight_update", self.finish, methods=["POST"]),
            Route("/update_weight_version", self.update_version, methods=["POST"]),
            Route("/weight_info", self.weight_info),
        ]
        handlers: Any = {
            EngineError: _engine_error,
            BadRequestError: _bad_request,
            HTTPException: _http_error,
        }
        return Starlette(routes=routes, middleware=[Middleware(Guard)], exception_handlers=handlers)

    # ----------------------------------------------------------------------------------------- open

    async def health(self, request: HttpRequest) -> Response:
        """Alive as long as its thread is."""
        return Response(status_code=200 if self._core.is_alive() else 503)

    async def version(self, request: HttpRequest) -> Response:
        """This package's version."""
        return JSONResponse({"version": version("weightsync-engine")})

    async def metrics(self, request: HttpRequest) -> Response:
        """The two gauges of vLLM's that say whether it is busy."""
        label = f'{{model_name="{self._model}"}}'
        text = (
            f"vllm:num_requests_running{label} {len(self._core.running)}\n"
            f"vllm:num_requests_waiting{label} {len(self._core.waiting)}\n"
        )
        return PlainTextResponse(text)

    # ------------------------------------------------------------------------------------ inference

    async def models(self, request: HttpRequest) -> Response:
        """The one that is served."""
        model = {"id": self._model, "object": "model", "owned_by": "weightsync"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: HttpRequest) -> Response:
        """Greedy completion, whole or streamed."""
        config = self._core.model.config
        body = await _json(request)
        try:
            asked = parse(body, self._tokenizer, self._model, config.positions, config.vocabulary)
        except KeyError as error:
            raise HTTPException(404, f"The model {error} does not exist.") from error
        steps = self._generate(asked)
        if asked.stream:
            return StreamingResponse(self._events(asked, steps), media_type="text/event-stream")
        made = [step async for step in steps]
        if made[-1].finish == "error":
            raise EngineError("the request failed: see the engine's log")
        return JSONResponse(answer(asked, made, self._tokenizer))

    async def tokenize(self, request: HttpRequest) -> Response:
        """Text to token ids."""
        text = str((await _json(request)).get("prompt", ""))
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return JSONResponse({"count": len(ids), "tokens": ids})

    async def detokenize(self, request: HttpRequest) -> Response:
        """Token ids to text."""
        return JSONResponse({"prompt": self._tokenizer.decode((await _json(request)).get("tokens", []))})

    async def _generate(self, asked: Completion) -> AsyncIterator[Step]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step] = asyncio.Queue()

        def emit(step: Step) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        request = Request(asked.prompt, asked.max_tokens, asked.ignore_eos, asked.logprobs or 0, emit)
        self._core.submit(request)
        try:
            while True:
                step = await steps.get()
                yield step
                if step.finish:
                    return
        finally:
            request.cancelled = True

    async def _events(self, asked: Completion, steps: AsyncIterator[Step]) -> AsyncIterator[str]:
        async for step in steps:
            yield f"data: {json.dumps(answer(asked, [step], self._tokenizer))}\n\n"
        yield "data: [DONE]\n\n"

    # -------------------------------------------------------------------------------------- control

    async def world_size(self, request: HttpRequest) -> Response:
        """Ranks."""
        return JSONResponse({"world_size": self._world_size})

    async def pause(self, request: HttpRequest) -> Response:
        """Stop generating, in one of three ways."""
        mode = request.query_params.get("mode", "abort")
        if mode not in MODES:
            raise BadRequestError(f"mode is one of {', '.join(MODES)}")
        await asyncio.wrap_future(self._core.pause(mode))
        return JSONResponse({"status": "paused"})

    async def resume(self, request: HttpRequest) -> Response:
        """Go on."""
        await asyncio.wrap_future(self._core.resume())
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, request: HttpRequest) -> Response:
        """Is it?"""
        return JSONResponse({"is_paused": await self._call(self._control.is_paused)})

    async def init(self, request: HttpRequest) -> Response:
        """Preflight."""
        info = await _field(request, "init_info")
        await self._call(lambda: self._control.init(info))
        return JSONResponse({"message": "Weight transfer initialized"})

    async def start(self, request: HttpRequest) -> Response:
        """Open an update."""
        await self._call(self._control.start)
        return JSONResponse({"message": "Weight update started"})

    async def update(self, request: HttpRequest) -> Response:
        """Name the image."""
        info = await _field(request, "update_info")
        await self._call(lambda: self._control.update(info))
        return JSONResponse({"message": "Weights updated"})

    async def finish(self, request: HttpRequest) -> Response:
        """Apply."""
        await self._call(self._control.finish)
        return JSONResponse({"message": "Weight update finished"})

    async def update_version(self, request: HttpRequest) -> Response:
        """Set the label."""
        self._control.weight_version = str((await _json(request)).get("new_version"))
        return JSONResponse({"success": True, "new_version": self._control.weight_version})

    async def weight_info(self, request: HttpRequest) -> Response:
        """Get the label."""
        return JSONResponse({"weight_version": self._control.weight_version})

    async def _call(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._core.call(function))


async def _json(request: HttpRequest) -> Any:
    try:
        return json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise BadRequestError(f"the body is no JSON: {error}") from error


async def _field(request: HttpRequest, name: str) -> dict[str, Any]:
    body = await _json(request)
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, dict):
        raise BadRequestError(f"the body has an object {name}")
    return value


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


async def _engine_error(request: HttpRequest, error: Exception) -> Response:
    return _error(500, str(error))


async def _bad_request(request: HttpRequest, error: Exception) -> Response:
    return _error(400, str(error))


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)
