"""The outermost layer, plain ASGI: request ids, API keys and their limits, size limits, errors as responses."""

import ipaddress
import logging
import re
import uuid
from collections.abc import Container
from contextlib import nullcontext
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_server.api.auth import ApiKeys
from dspark_server.api.errors import error_response
from dspark_server.api.limits import KeyLimits
from dspark_server.api.settings import ServerSettings
from dspark_server.errors import CapacityError, RequestError
from dspark_server.logcontext import concerned

logger = logging.getLogger(__name__)

REQUEST_ID = "dspark_server.request_id"  # key in the scope
MOST_BODIES = 16  # of the largest size, read at once: limits the memory of all bodies together
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = ApiKeys(settings.all_api_keys())
        self._limits = KeyLimits(settings.key_max_requests, settings.key_requests_per_minute)
        self._reading = 0  # bytes of all bodies that are being served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope[REQUEST_ID] = request_id.decode()
        concerned.set(lambda: (request_id.decode(),))
        started, reading = False, 0

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        async def counted() -> Message:
            """Count the bytes of a body: its Content-Length may be absent or wrong."""
            nonlocal reading
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                reading, self._reading = reading + size, self._reading + size
                if reading > self._settings.max_body_bytes:
                    raise self._too_large()
                if self._reading > MOST_BODIES * self._settings.max_body_bytes:
                    raise CapacityError("The server is reading too many large bodies. Try again later.")
            return message

        try:
            tenant = self._keys.check(scope)
            scope.setdefault("state", {})["tenant"] = tenant
            if not self._keys:
                _check_origin(scope, self._settings.host, self._settings.allowed_origins)
            self._check_sizes(scope)
            with self._limits.admit(tenant) if scope["method"] == "POST" else nullcontext():
                await self._app(scope, counted, send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:
            if started:
                raise  # the response has begun: uvicorn logs the error and closes the connection
            await error_response(error, scope["path"])(scope, receive, send_with_id)
        finally:
            self._reading -= reading

    def _check_sizes(self, scope: Scope) -> None:
        size = 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"content-length" and int(value) > self._settings.max_body_bytes:
                raise self._too_large()
        if size > self._settings.max_header_bytes:
            raise RequestError(f"The headers may have at most {self._settings.max_header_bytes} bytes.", status=431)

    def _too_large(self) -> RequestError:
        limit = self._settings.max_body_bytes
        return RequestError(f"The body may have at most {limit} bytes.", status=413, code="body_too_large")


def _check_origin(scope: Scope, listening: str, allowed: Container[str]) -> None:
    """Without API keys, refuse requests that a page of a site that is not allowed sends through a user's browser.

    Raises RequestError (403). Browsers send Origin with every POST of a page. Our own page is recognised by its Host,
    except on a server that listens on loopback only: there a foreign name that resolves to us is an attack (DNS
    rebinding), elsewhere names are how the server is reached.
    """
    headers = dict(scope["headers"])
    if b"origin" not in headers:
        return
    text = headers[b"origin"].decode("latin-1")
    if "*" in allowed or text in allowed:
        return
    origin = urlsplit(text)
    host = origin.hostname or ""
    if host == "localhost" or _is_address(host):
        return
    if not _is_loopback(listening) and origin.netloc.encode("latin-1") == headers.get(b"host"):
        return
    message = (
        "Web pages of other sites may not use a server without API keys: give it one (--api-key-file), or allow the "
        "site (--allowed-origins)."
    )
    raise RequestError(message, status=403, code="foreign_origin")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _request_id(scope: Scope) -> bytes:
    """Return the client's X-Request-Id if it is one printable word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value):
                return bytes(value)
            break
    return uuid.uuid4().hex.encode()
