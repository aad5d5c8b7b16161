"""Errors as HTTP: one place turns exceptions into OpenAI's error objects.

`{"error": {"message", "type", "param", "code"}}`, of limited length, without content of the request or a traceback.
On the routes of Anthropic's API, `{"type": "error", "error": {"type", "message"}}`.
"""

import logging
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from dspark_server.api.auth import is_anthropic
from dspark_server.api.routing import explained
from dspark_server.errors import CapacityError, DeadlineError, EngineDeadError, LimitError, RequestError

logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 500  # characters
_TYPES = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_object(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the error object for a status."""
    if len(message) > LONGEST_MESSAGE:
        message = message[:LONGEST_MESSAGE] + " ..."
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, error object and extra headers of an exception; unexpected ones are logged, not shown."""
    if isinstance(error, RequestError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return error.status, error_object(error.status, str(error), param=error.param, code=error.code), headers
    if isinstance(error, CapacityError):
        body = error_object(503, str(error), code="no_capacity")
        return 503, body, {"Retry-After": str(error.retry_after)}
    if isinstance(error, LimitError):
        body = error_object(429, str(error), code="rate_limit_exceeded")
        return 429, body, {"Retry-After": str(error.retry_after)}
    if isinstance(error, DeadlineError):
        return 504, error_object(504, str(error), code="deadline_exceeded"), {}
    if isinstance(error, EngineDeadError):
        return 503, error_object(503, str(error), code="engine_dead"), {}
    if isinstance(error, GenerationError):
        return 500, error_object(500, str(error), code="generation_failed"), {}
    if isinstance(error, HTTPException):
        return error.status_code, error_object(error.status_code, error.detail), dict(error.headers or {})
    logger.error("unexpected error in a request", exc_info=error)
    return 500, error_object(500, "Internal server error."), {}


class GenerationError(Exception):
    """The engine gave up a request; the message is for the client."""


def anthropic_error(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return an error object in the shape of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def error_response(error: Exception, path: str) -> Response:
    """Return the HTTP response for an exception, in the shape of the API that `path` belongs to."""
    status, body, headers = describe(error)
    if is_anthropic(path):
        body = anthropic_error(status, body)
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Turn every exception that leaves a route into an error object."""

    async def handle(request: Request, error: Exception) -> Response:
        told = explained(request, error) if isinstance(error, HTTPException) else error
        return error_response(told, request.url.path)

    for kind in (RequestError, CapacityError, EngineDeadError, GenerationError, HTTPException):
        app.add_exception_handler(kind, handle)
