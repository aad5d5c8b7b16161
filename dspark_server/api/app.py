"""The ASGI application: its routes and what they share."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from time import time
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

from dspark_server import __version__
from dspark_server.api import errors, reference
from dspark_server.api.chat import Chat
from dspark_server.api.chat_schema import ChatRequest
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.completions import Completions
from dspark_server.api.dashboard import PAGE_HEADERS, Dashboard
from dspark_server.api.edge import Edge
from dspark_server.api.intake import Intake
from dspark_server.api.messages import Messages
from dspark_server.api.messages_schema import MessagesRequest
from dspark_server.api.metrics import Metrics
from dspark_server.api.openapi import body_schema
from dspark_server.api.schema import Body, CompletionRequest
from dspark_server.api.settings import ServerSettings
from dspark_server.api.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest, Tokens
from dspark_server.engine.engine import AsyncEngine
from dspark_server.errors import RequestError


def create_app(engine: AsyncEngine, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application for an engine, which must be started before the application serves."""
    settings = settings or ServerSettings()
    metrics = Metrics(engine)
    intake = Intake(engine, metrics, settings)
    template = ChatTemplate.load(engine.tokenizer, settings.chat_template)
    app = bare_app(settings)
    app.add_api_route("/docs", _docs_page(app), methods=["GET", "HEAD"], include_in_schema=False)
    app.state.intake = intake
    tokens = Tokens(intake, template)
    app.state.tokens = tokens
    completions, chat = Completions(intake), Chat(intake, template)
    about = "Continue prompts."
    _add_post(app, "/v1/completions", about, completions.create, prompt=CompletionRequest)
    about = "Answer a conversation, by the model's chat template."
    _add_post(app, "/v1/chat/completions", about, chat.create, messages=ChatRequest)
    about = "Answer a conversation in the form of Anthropic's API."
    _add_post(app, "/v1/messages", about, Messages(intake, chat).create, messages=MessagesRequest)
    about = "Tokens of a conversation in the form of Anthropic's API: `input_tokens`."
    _add_post(app, "/v1/messages/count_tokens", about, tokens.count, messages=MessagesRequest)
    about = (
        "Tokens of a text as a completion sees it, or of messages as a chat does: `tokens`, `count`, `max_model_len`."
    )
    _add_post(app, "/tokenize", about, tokens.tokenize, prompt=TokenizeRequest, messages=TokenizeChatRequest)
    about = "Text of tokens, special ones included: `prompt`."
    _add_post(app, "/detokenize", about, tokens.detokenize, tokens=DetokenizeRequest)
    _add_probes(app, engine, metrics)
    _add_models(app, engine)
    if settings.dashboard:
        Dashboard(intake, template).add_to(app)
    return app


def bare_app(settings: ServerSettings, **options: Any) -> FastAPI:
    """Return an application without routes: CORS where origins are allowed, the edge, errors as OpenAI's objects."""
    app = FastAPI(
        title="dspark-server", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None, **options
    )
    app.add_middleware(Edge, settings=settings)
    if settings.allowed_origins:  # around the edge: a browser asks before it sends a key, and reads errors, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=("x-request-id", "retry-after"),
        )
    errors.install(app)
    return app


def _docs_page(app: FastAPI) -> Callable[[], Awaitable[Response]]:
    """Return the handler of /docs. FastAPI's own page loads Swagger UI from the internet."""
    policy = PAGE_HEADERS["Content-Security-Policy"].replace("'self'", "'none'", 1)
    headers = PAGE_HEADERS | {"Content-Security-Policy": f"{policy}; img-src data:; style-src 'unsafe-inline'"}

    @cache
    def page() -> str:
        return reference.page(app.openapi())

    async def docs() -> Response:
        return Response(await asyncio.to_thread(page), headers=headers, media_type="text/html; charset=utf-8")

    return docs


def _add_post(
    app: FastAPI, path: str, about: str, endpoint: Callable[[Request], Awaitable[Response]], **bodies: type[Body]
) -> None:
    """Add a POST route whose body is one of `bodies`, each keyed by the name of its required field."""
    schemas = [body_schema(kind, required) for required, kind in bodies.items()]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    app.add_api_route(path, endpoint, methods=["POST"], description=about, response_class=Response, openapi_extra=extra)


def _add_probes(app: FastAPI, engine: AsyncEngine, metrics: Metrics) -> None:
    @app.get("/health", response_class=Response)
    async def health(request: Request) -> Response:
        """Readiness: 200 when a request sent now would be served, else 503; `status` says why."""
        state = engine.health()
        return json_response({"status": state}, 200 if state == "ready" else 503)

    @app.get("/live", response_class=Response)
    async def live(request: Request) -> Response:
        """Liveness: the process answers."""
        return json_response({"status": "alive"})

    @app.get("/ping", response_class=Response)
    @app.post("/ping", response_class=Response)
    async def ping(request: Request) -> Response:
        """The same as /health, for SageMaker."""
        return await health(request)

    @app.get("/load", response_class=Response)
    async def load(request: Request) -> Response:
        """Choices in flight, waiting ones included: `server_load`."""
        return json_response({"server_load": engine.in_flight})

    @app.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        """Prometheus text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", response_class=Response)
    async def version(request: Request) -> Response:
        """Version and the kernels in use."""
        backend = getattr(engine, "backend", None)
        return json_response({"version": __version__, "backend": None if backend is None else str(backend)})


def _add_models(app: FastAPI, engine: AsyncEngine) -> None:
    created = int(time())

    def card() -> dict[str, Any]:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": created,
            "owned_by": "dspark-server",
            "root": engine.model_name,
            "parent": None,
            "max_model_len": engine.max_model_len,
            "sampling_defaults": engine.sampling_defaults,
        }

    @app.get("/v1/models", response_class=Response)
    async def models(request: Request) -> Response:
        """The model served; `sampling_defaults` hold where a request leaves a field out (--generation-config)."""
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", response_class=Response)
    async def model(request: Request, name: str) -> Response:
        """One model by name."""
        if name != engine.model_name:
            raise RequestError(
                "This server does not have that model.", param="model", status=404, code="model_not_found"
            )
        return json_response(card())


def json_response(value: dict[str, Any], status: int = 200) -> Response:
    """Return a response with a JSON object."""
    return Response(orjson.dumps(value), status, media_type="application/json")
