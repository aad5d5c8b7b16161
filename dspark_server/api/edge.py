"""The outermost layer: request ids, keys and their limits, caps on what is read, no exception past it. Plain ASGI."""

import logging
import re
import uuid
from contextlib import nullcontext

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_server.api.auth import ApiKeys
from dspark_server.api.errors import error_response
from dspark_server.api.limits import KeyLimits
from dspark_server.api.settings import ServerSettings
from dspark_server.errors import RequestError
from dspark_server.logcontext import concerned

logger = logging.getLogger(__name__)

REQUEST_ID = "dspark_server.request_id"  # where the scope has it
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = ApiKeys(settings.all_api_keys())
        self._limits = KeyLimits(settings.key_max_requests, settings.key_requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope[REQUEST_ID] = request_id.decode()
        concerned.set(lambda: (request_id.decode(),))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            tenant = self._keys.check(scope)
            scope.setdefault("state", {})["tenant"] = tenant
            self._check_sizes(scope)
            with self._limits.admit(tenant) if scope["method"] == "POST" else nullcontext():
                await self._app(scope, self._counted(receive), send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:
            if started:
                raise  # uvicorn logs it and cuts the connection, which is all that can be done
            await error_response(error)(scope, receive, send_with_id)

    def _check_sizes(self, scope: Scope) -> None:
        size = 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"content-length" and int(value) > self._settings.max_body_bytes:
                raise self._too_large()
        if size > self._settings.max_header_bytes:
            raise RequestError(f"The headers may have at most {self._settings.max_header_bytes} bytes.", status=431)

    def _counted(self, receive: Receive) -> Receive:
        """`receive` for a body whose length nobody announced, or announced wrongly."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                if total > self._settings.max_body_bytes:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RequestError:
        limit = self._settings.max_body_bytes
        return RequestError(f"The body may have at most {limit} bytes.", status=413, code="body_too_large")


def _request_id(scope: Scope) -> bytes:
    """The client's X-Request-Id if it is one printable word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value):
                return bytes(value)
            break
    return uuid.uuid4().hex.encode()
