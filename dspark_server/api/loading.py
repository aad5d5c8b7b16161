"""The application while the model loads: 503 for every route of the final application, except liveness.

Keys and limits apply, and unknown paths are unknown, as in the final application.
"""

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dspark_server.api.app import bare_app, json_response
from dspark_server.api.dashboard import PAGES
from dspark_server.api.settings import ServerSettings
from dspark_server.errors import CapacityError

RETRY_AFTER = 5  # seconds

# Paths of create_app's application, by methods; a test compares the two.
_READ = ("GET",)
_PAGE = ("GET", "HEAD")
ROUTES: dict[str, tuple[str, ...]] = {
    "/v1/completions": ("POST",),
    "/v1/chat/completions": ("POST",),
    "/v1/messages": ("POST",),
    "/v1/messages/count_tokens": ("POST",),
    "/v1/models": _READ,
    "/v1/models/{name:path}": _READ,
    "/tokenize": ("POST",),
    "/detokenize": ("POST",),
    "/load": _READ,
    "/metrics": _READ,
    "/version": _READ,
    "/docs": _PAGE,
    "/openapi.json": _PAGE,
}
DASHBOARD_ROUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PAGES, _PAGE),
    "/dashboard/feed": _READ,
    **{f"/dashboard/{name}": ("POST",) for name in ("prompt", "stop", "policy", "load")},
}


class Door:
    """An ASGI application that forwards to another, which may be replaced while it serves."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with the current application."""
        await self.app(scope, receive, send)


def create_loading_app(settings: ServerSettings) -> FastAPI:
    """Return the application of a server whose model is not loaded yet."""
    app = bare_app(settings, openapi_url=None)
    app.add_api_route("/live", _live, methods=["GET"])
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/ping", _health, methods=["GET", "POST"])
    for path, methods in (ROUTES | (DASHBOARD_ROUTES if settings.dashboard else {})).items():
        app.add_api_route(path, _refuse, methods=list(methods))
    return app


async def _live(request: Request) -> Response:
    return json_response({"status": "alive"})


async def _health(request: Request) -> Response:
    return json_response({"status": "loading"}, 503)


async def _refuse(request: Request) -> Response:
    raise CapacityError("The model is still loading; /health says when it is ready.", retry_after=RETRY_AFTER)
