"""The routes that tell about the server and its model."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from qtool import __version__
from qtool.serve.api.answering import json_reply, while_connected
from qtool.serve.api.schemas import Model, ModelInfo, Models, ServerInfo, Status, Version
from qtool.serve.backend.engine_client import answer_once
from qtool.serve.backend.messages import EngineStats
from qtool.serve.host import ServiceHost
from qtool.serve.http.openapi import ERRORS, GET_ERRORS
from qtool.serve.metrics import CONTENT_TYPE
from qtool.serve.service import Service
from qtool.serve.settings import shown_name

# how long routes wait for the engine's statistics: a step may take longer
METRICS_S = 0.5
STATS_S = 5.0
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_server_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the page to try the model, health, metrics and version."""
    page = (resources.files("qtool.serve.http") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> Response:
        """Return the page to try the model by hand."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health", responses={403: ERRORS[403], 503: ERRORS[503]}, tags=["server"])
    async def health() -> Status:
        """Answer 200 once the model has answered, until the server ends."""
        host.ready()
        return Status(status="ok")

    @app.get(
        "/health_generate",
        responses={**GET_ERRORS, 429: ERRORS[429], 200: {"model": Status}},
        tags=["SGLang"],
    )
    async def health_generate(request: Request) -> Response:
        """Let the model answer once more, and answer 200 if it does."""
        return await while_connected(request, _answer_once(host.ready()))

    @app.get(
        "/metrics", response_class=PlainTextResponse, responses={403: ERRORS[403]}, tags=["server"]
    )
    async def metrics() -> Response:
        """Return counts and times for Prometheus."""
        stats = await host.current.stats(timeout_s=METRICS_S)
        return Response(host.metrics.render(stats), media_type=CONTENT_TYPE)

    @app.get("/version", responses={403: ERRORS[403]}, tags=["server"])
    async def version() -> Version:
        """Return the version of qtool."""
        return Version(version=__version__)


def add_model_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the routes that describe the model."""

    @app.get("/v1/models", responses=GET_ERRORS, tags=["OpenAI"])
    async def models() -> Models:
        """List the one model that is served."""
        return Models(object="list", data=[_model(host.ready())])

    @app.get("/v1/models/{name:path}", responses={**GET_ERRORS, 404: ERRORS[404]}, tags=["OpenAI"])
    async def model(name: str) -> Model:
        """Return the model, if it has that name."""
        service = host.ready()
        service.find_model(name)
        return _model(service)

    @app.get("/get_model_info", responses=GET_ERRORS, tags=["SGLang"])
    @app.get("/model_info", responses=GET_ERRORS, tags=["SGLang"])
    async def get_model_info() -> ModelInfo:
        """Return the names of the model and its tokenizer, without their paths."""
        service = host.ready()
        settings = service.settings
        own = settings.tokenizer_path
        return ModelInfo(
            model_path=settings.name,
            tokenizer_path=settings.name if own is None else shown_name(str(own)),
            is_generation=service.info.encoding is None,
        )

    @app.get(
        "/get_server_info", responses={**GET_ERRORS, 200: {"model": ServerInfo}}, tags=["SGLang"]
    )
    @app.get("/server_info", responses={**GET_ERRORS, 200: {"model": ServerInfo}}, tags=["SGLang"])
    async def get_server_info() -> Response:
        """Return how the server runs, and what it is doing."""
        service = host.ready()
        return json_reply(_server_info(service, await service.stats(timeout_s=STATS_S)))


def _server_info(service: Service, stats: EngineStats | None) -> dict[str, object]:
    info = {
        name: value
        for name, value in asdict(service.info).items()
        if name not in ("tokenizer", "tokenizer_path", "eos_ids", "model_path")
    }
    state: dict[str, object] = {"places_taken": service.slots_in_use}
    if stats is not None:
        state |= asdict(stats)
        del state["spec"]
    if stats is not None and stats.spec is not None:
        state["avg_spec_accept_length"] = stats.spec.accept_length
    return {
        **service.settings.to_dict(),
        **info,
        "served_model_name": service.settings.name,
        "compares": service.settings.reference is not None,
        "status": "ready",
        "version": __version__,
        "max_total_num_tokens": service.info.max_total_tokens,
        "internal_states": [state],
    }


async def _answer_once(service: Service) -> Response:
    with service.acquire(1):
        await answer_once(service.engine, service.info)
    return json_reply({"status": "ok"})


def _model(service: Service) -> Model:
    return Model(
        id=service.settings.name,
        object="model",
        created=service.started,
        owned_by="qtool",
        root=service.settings.name,
        max_model_len=service.info.context_length,
        type="model",
        display_name=service.settings.name,
        created_at=datetime.fromtimestamp(service.started, UTC).isoformat(),
        max_input_tokens=service.info.context_length - 1,
    )
