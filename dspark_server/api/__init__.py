"""The HTTP edge: OpenAI's completions API over the engine's front door.

`create_app` builds the ASGI application, `serve` runs it under uvicorn until SIGTERM.
"""

from dspark_server.api.app import create_app
from dspark_server.api.server import serve
from dspark_server.api.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "serve"]
