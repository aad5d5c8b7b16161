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
    """Checks the bearer token of requests against a set of keys; without keys every request is allowed."""

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
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        token = token.strip()
        known = 0
        for number, key in enumerate(self._keys, 1):  # all: the time must not reveal a nearly right key
            known = max(known, number * hmac.compare_digest(key, token))
        if not known or scheme.lower() != b"bearer":
            message = "The API key is wrong." if token else "An API key is needed: send `Authorization: Bearer KEY`."
            raise RequestError(message, status=401, code="invalid_api_key")
        return f"key{known}"


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return method in READING and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))
