"""Messages of routing errors: paths that are not served (404), methods that a path does not take (405).

Many unknown paths are routes of other servers, or served paths with a wrong base: the error names them, and the route
to use instead where there is one.
"""

import re

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

_CHAT = "POST /v1/chat/completions"
_COMPLETIONS = "POST /v1/completions"
_MODELS = "GET /v1/models"
_HEALTH = "GET /health"

# Routes of other servers (OpenAI, vLLM, SGLang, TGI, TEI, llama.cpp, Ollama, Anthropic, SageMaker, KServe), paths below
# them included, and the route that serves the same here.
INSTEAD: dict[str, str | None] = {
    **dict.fromkeys(("/v1/responses", "/v1/complete", "/api/chat", "/v1/chat"), _CHAT),
    **dict.fromkeys(("/openai/deployments", "/invocations", "/v2/models"), f"{_CHAT} or {_COMPLETIONS}"),
    **dict.fromkeys(("/generate", "/generate_stream", "/api/generate", "/completion", "/v1/engines"), _COMPLETIONS),
    **dict.fromkeys(
        ("/api/tags", "/api/show", "/api/ps", "/info", "/model_info", "/get_model_info", "/props"), _MODELS
    ),
    **dict.fromkeys(("/server_info", "/get_server_info", "/api/version"), "GET /version"),
    **dict.fromkeys(("/health_generate", "/healthz", "/readyz", "/v2/health", "/v1/health"), _HEALTH),
    "/v1/messages/batches": "POST /v1/messages",
    "/livez": "GET /live",
    **dict.fromkeys(("/v1/tokenize", "/apply-template"), "POST /tokenize"),
    "/v1/detokenize": "POST /detokenize",
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/embeddings", "/embed", "/embedding", "/api/embed", "/api/embeddings", "/encode"),
            *("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify"),
            *("/v1/audio", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/realtime"),
            *("/v1/images", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/videos"),
            *("/v1/moderations", "/v1/files", "/v1/uploads", "/v1/batches", "/v1/fine_tuning", "/v1/assistants"),
            *("/v1/threads", "/v1/vector_stores", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
            *("/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache", "/flush_cache", "/start_profile"),
            *("/stop_profile", "/infill", "/slots", "/lora-adapters", "/api/pull", "/api/create", "/api/delete"),
        )
    ),
}


def explained(request: Request, error: HTTPException) -> HTTPException:
    """Return the error with a message for the client; a 405 has all methods of the path in `Allow`."""
    if error.status_code == 404:
        return HTTPException(404, _not_found(request.app, request.url.path))
    if error.status_code == 405:
        methods = sorted(_methods(request))
        return HTTPException(405, f"This path takes {' or '.join(methods)} only.", {"Allow": ", ".join(methods)})
    return HTTPException(error.status_code, "The request could not be served.", error.headers)


def _not_found(app: FastAPI, path: str) -> str:
    path = re.sub("/+", "/", path).rstrip("/")
    served = {getattr(route, "path", "") for route in app.routes} - {"/"}
    for corrected in (path, f"/v1{path}", path.replace("/v1/v1/", "/v1/")):
        if corrected in served:
            return f"There is nothing at this path; use {corrected}."
    while path:
        if path in INSTEAD:
            use = INSTEAD[path]
            return f"{path} is not served here{f'; use {use}' if use else ': this server generates text only'}."
        path = path.rpartition("/")[0]
    return "There is nothing at this path; GET /docs lists the routes."


def _methods(request: Request) -> set[str]:
    """Return the methods that some route of the path takes."""
    routes: list[BaseRoute] = request.app.routes
    found: set[str] = set()
    for route in routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return found
