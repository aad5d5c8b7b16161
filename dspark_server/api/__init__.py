"""The HTTP API: OpenAI's completions API on top of the engine.

`create_app` builds the ASGI application, `serve` runs it under uvicorn until SIGTERM. Both are imported on first use:
they import torch, and the command line reads `ServerSettings` for `--help`.
"""

from typing import TYPE_CHECKING, Any

from dspark_server.api.settings import ServerSettings

if TYPE_CHECKING:
    from dspark_server.api.app import create_app
    from dspark_server.api.server import serve

__all__ = ["ServerSettings", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from dspark_server.api.app import create_app

        return create_app
    if name == "serve":
        from dspark_server.api.server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
