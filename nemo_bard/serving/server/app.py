"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from nemo_bard.base.errors import one_line
from nemo_bard.generation.parameters import strategy_fields
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.serving.requests import request_settings
from nemo_bard.serving.server.chat import Preparer
from nemo_bard.serving.server.completions import Completions
from nemo_bard.serving.server.errors import ApiError, error_body
from nemo_bard.serving.server.intake import check_key
from nemo_bard.serving.server.metrics import Metrics
from nemo_bard.serving.server.served import Served
from nemo_bard.serving.server.settings import ServerSettings
from nemo_bard.serving.server.worker import DecodingThread

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/picture.js": ("picture.js", "text/javascript; charset=utf-8"),
    "/settings.js": ("settings.js", "text/javascript; charset=utf-8"),
    "/stream.js": ("stream.js", "text/javascript; charset=utf-8"),
}
"""Path -> file of the package and its type."""
GUARDS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(model: Any, processor: Any, name: str, settings: ServerSettings) -> FastAPI:
    """Build the application.

    Args:
        model: ``BardVLForConditionalGeneration`` in eval mode.
        processor: Its processor.
        name: Name of the model in requests.
        settings: Limits and key.

    Returns:
        The application; its decoding thread ends with its lifespan.
    """
    metrics = Metrics()
    thread = DecodingThread(model, processor, settings.max_queue, metrics)
    preparer = Preparer(model, processor, name, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await asyncio.to_thread(thread.close)

    app = FastAPI(
        title="nemo-bard", lifespan=lifespan, openapi_url=None
    )  # its pages of documentation load from elsewhere
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)
    completions = Completions(thread, preparer, settings, metrics)
    app.router.routes.append(Route("/v1/chat/completions", completions, methods=["POST"]))
    _add_facts(app, preparer, settings, metrics)
    _add_page(app)
    app.state.thread = thread
    return app


def _add_facts(app: FastAPI, preparer: Preparer, settings: ServerSettings, metrics: Metrics) -> None:
    def find(name: str) -> Served:
        if name not in preparer.served:
            raise ApiError(404, f"the model {name[:60]!r} is not here", param="model", code="model_not_found")
        return preparer.served[name]

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/metrics")
    async def tell() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, settings.api_key)
        return {"object": "list", "data": [served.card() for served in preparer.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        check_key(request, settings.api_key)
        return find(name).card()

    @app.get("/v1/bard")
    async def bard(request: Request, model: str | None = None) -> dict[str, Any]:
        """What the page has to know of a model, the first one if none is named."""
        check_key(request, settings.api_key)
        served = preparer.first if model is None else find(model)
        limits = ("max_pixels", "max_images", "max_tokens", "max_prompt_tokens", "max_body", "max_queue")
        return {
            "model": served.name,
            "models": list(preparer.served),
            "block_size": served.block_size,
            "max_tokens": served.max_tokens,
            "limits": {limit: getattr(settings, limit) for limit in limits},
            "settings": page_settings(served.config, served.strategies),
            "strategies": {strategy: list(strategy_fields(strategy)) for strategy in served.strategies},
        }


def page_settings(config: BardGenerationConfig, strategies: list[str]) -> list[dict[str, Any]]:
    """The settings of a request as fields of a form.

    Args:
        config: The model's; its values are what a request gets where it says nothing.
        strategies: Those that the model can be decoded with.

    Returns:
        For each its ``name``, ``value``, ``help``, ``kind`` (``choice``, ``flag``, ``integer``, ``number``), what is
        ``allowed`` and the ``choices``.
    """
    fields = []
    for name, field in request_settings(vars(config)).items():
        check = field.metadata["check"]
        if name == "block_size" or check is None:
            continue
        kind = {bool: "flag", int: "integer", float: "number"}.get(check.parse, "text")
        fields.append(
            {
                "name": name,
                "value": getattr(config, name),
                "help": field.metadata["help"],
                "kind": "choice" if check.choices else kind,
                "allowed": check.allowed,
                "choices": strategies
                if name == "remasking_strategy"
                else list(check.choices())
                if check.choices
                else [],
            }
        )
    return fields


def _add_page(app: FastAPI) -> None:
    folder = files("nemo_bard.serving.server") / "page"
    for path, (file, kind) in PAGE.items():
        app.add_api_route(path, _page(folder.joinpath(file).read_bytes(), kind), methods=["GET", "HEAD"])


def _page(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=GUARDS)

    return page


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    del request
    return JSONResponse(error_body(500, f"this request failed: {one_line(error)}"), 500)
