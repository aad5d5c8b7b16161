"""API keys. Every path that is not listed here needs one, so a new route is closed by default."""

import hmac
from collections.abc import Iterable

from starlette.types import Scope

from dspark_server.errors import RequestError

# Paths of probes, scrapers and load balancers; and the dashboard's page, no secret: its data come from other paths.
OPEN_PATHS = frozenset({"/", "/health", "/live", "/load", "/ping", "/metrics", "/version"})
OPEN_FOLDER = "/static/"
READING = ("GET", "HEAD")


class ApiKeys:
    """Checks the key of requests against a set of keys; without keys every request is allowed.

    The key is a bearer token; on the routes of Anthropic's API it may also be `x-api-key`.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        """Whether there are keys."""
        return bool(self._keys)

    def check(self, scope: Scope) -> str:
        """Return the tenant: "key1" for the first key and so on, "" where no key is needed. Takes constant time.

        Raises RequestError (401) if the request needs a key and has no valid one.
        """
        if not self._keys or is_open(scope["method"], scope["path"]):
            return ""
        scheme, _, bearer = _only(scope, b"authorization").partition(b" ")
        own = _only(scope, b"x-api-key").strip() if is_anthropic(scope["path"]) else b""
        tokens = (bearer.strip() if scheme.lower() == b"bearer" else b"", own)
        known = 0
        for number, key in enumerate(self._keys, 1):  # all: the time must not reveal a nearly right key
            for token in tokens:
                known = max(known, number * hmac.compare_digest(key, token))
        if not known:
            given = bearer.strip() or own
            message = "The API key is wrong." if given else "An API key is needed: send `Authorization: Bearer KEY`."
            raise RequestError(message, status=401, code="invalid_api_key")
        return f"key{known}"


def _only(scope: Scope, header: bytes) -> bytes:
    """Return the value of a header that is there once, else nothing."""
    given = [value for name, value in scope["headers"] if name == header]
    return given[0] if len(given) == 1 else b""


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return method in READING and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API: its errors have that API's shape, and `x-api-key` may hold the key."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")
