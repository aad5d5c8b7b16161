"""The dashboard: a static page at /, the feed it reads, and its controls.

No control can change an answer: one sets the policy (all are lossless), one a background load that gives way to
clients. The routes exist only with `--dashboard`. PAGES need no key (they contain no data of the server); /dashboard/
needs one.
"""

import itertools
import uuid
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import Field, ValidationError

from dspark_server import __version__
from dspark_server.api.background import BackgroundLoad
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.api.feed import Feed, FeedResponse, OwnPrompt, Viewer
from dspark_server.api.intake import Intake
from dspark_server.api.prompting import Prompting
from dspark_server.api.sample_prompts import SAMPLE_PROMPTS
from dspark_server.api.schema import Body
from dspark_server.engine.request import SamplingParams
from dspark_server.errors import RequestError

STATIC = Path(__file__).parent / "static"
PAGES = {  # path: file, type
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/static/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/static/views.js": ("views.js", "text/javascript; charset=utf-8"),
    "/static/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NO_DRAFTER = "none"

T = TypeVar("T", bound=Body)


class PromptBody(Body):
    """POST /dashboard/prompt."""

    feed: str = Field(max_length=64)
    prompt: str = Field(min_length=1, max_length=8000)
    max_tokens: int = Field(256, ge=1, le=1024)
    temperature: float = Field(0.0, ge=0, le=2)


class StopBody(Body):
    """POST /dashboard/stop."""

    feed: str = Field(max_length=64)


class PolicyBody(Body):
    """POST /dashboard/policy; a missing field stays as it is."""

    policy: str | None = Field(None, max_length=64)
    drafter: str | None = Field(None, max_length=64)


class LoadBody(Body):
    """POST /dashboard/load."""

    requests: int = Field(ge=0)
    domain: str = Field("chat", max_length=64)


class Dashboard:
    """Routes and state (see the module)."""

    def __init__(self, intake: Intake, template: ChatTemplate) -> None:
        engine = intake.engine
        self._engine = engine
        self._intake = intake
        self._prompting = Prompting(intake, template)
        self._load = BackgroundLoad(engine, self._prompting, engine.max_num_seqs)
        self._feed = Feed(engine, hello=self._hello, state=self._state, tick=self._tick, on_leave=self._on_leave)
        self._policy = engine.selection
        self._drafter = engine.drafter or NO_DRAFTER
        self._numbers = itertools.count(1)

    def add_to(self, app: FastAPI) -> None:
        """Add the page and its routes; /openapi.json has none of them."""
        for path, (name, kind) in PAGES.items():
            app.add_api_route(path, _page(name, kind), methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route("/dashboard/feed", self.feed, methods=["GET"], include_in_schema=False)
        for name, post in (
            ("prompt", self.prompt),
            ("stop", self.stop),
            ("policy", self.policy),
            ("load", self.load),
        ):
            app.add_api_route(f"/dashboard/{name}", post, methods=["POST"], include_in_schema=False)

    # -- routes ------------------------------------------------------------------------------------------------------

    async def feed(self, request: Request) -> Response:
        """Server-sent events; 503 when too many feeds are open."""
        await self._prompting.warm_up()
        return FeedResponse(self._feed, self._feed.open())

    async def prompt(self, request: Request) -> Response:
        """Start a prompt and end the feed's earlier one. Its tokens come on the feed named, and only there."""
        body = await self._read(request, PromptBody)
        viewer = self._viewer(body.feed)
        self._end(viewer)
        request_id = f"dash-{uuid.uuid4().hex}"
        blocks = self._feed.watch.follow(request_id)
        own = viewer.own = OwnPrompt(next(self._numbers), request_id, blocks, self._prompting)
        params = SamplingParams(max_tokens=body.max_tokens, temperature=body.temperature)
        try:
            own.generation = await self._prompting.start(body.prompt, params, request_id)
        except BaseException:
            self._feed.watch.unfollow(request_id)
            if viewer.own is own:
                viewer.own = None
            raise
        if viewer.own is not own or viewer.over:  # stopped, or its viewer left, during encoding
            own.generation.close()
            self._feed.watch.unfollow(request_id)
        return _json({"number": own.number})

    async def stop(self, request: Request) -> Response:
        """End the prompt of a feed."""
        body = await self._read(request, StopBody)
        own = self._viewer(body.feed).own
        if own is not None and own.generation is not None:
            own.generation.close()
        return _json({})

    async def policy(self, request: Request) -> Response:
        """Choose policy and drafter, for all requests, from the next step on."""
        body = await self._read(request, PolicyBody)
        if body.policy is not None and body.policy not in self._engine.policies:
            raise RequestError(
                f"`policy` must be one of those loaded: {', '.join(self._engine.policies)}.", param="policy"
            )
        if body.drafter is not None and body.drafter not in self._drafters:
            raise RequestError(f"`drafter` must be one of those loaded: {', '.join(self._drafters)}.", param="drafter")
        self._policy = body.policy or self._policy
        self._drafter = body.drafter or self._drafter
        self._engine.select("none" if self._drafter == NO_DRAFTER else self._policy)
        return _json({"policy": self._policy, "drafter": self._drafter})

    async def load(self, request: Request) -> Response:
        """Keep this number of background requests running until the last viewer leaves."""
        body = await self._read(request, LoadBody)
        if body.requests > self._load.limit:
            raise RequestError(
                f"`requests` must be at most {self._load.limit}, what the server runs together (--max-num-seqs).",
                param="requests",
            )
        if body.domain not in SAMPLE_PROMPTS:
            raise RequestError(f"`domain` must be one of {', '.join(SAMPLE_PROMPTS)}.", param="domain")
        if body.requests and not self._feed.viewers:
            raise RequestError("The load runs only while a dashboard is open: open /dashboard/feed first.", status=409)
        self._load.set(body.requests, body.domain)
        return _json({"requests": body.requests, "domain": body.domain})

    # -- state and hooks of the feed ---------------------------------------------------------------------------------

    @property
    def _drafters(self) -> tuple[str, ...]:
        return (NO_DRAFTER,) if self._engine.drafter is None else (self._engine.drafter, NO_DRAFTER)

    def _hello(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "version": __version__,
            "model": engine.model_name,
            "backend": engine.backend,
            "gamma": engine.gamma,
            "max_num_seqs": engine.max_num_seqs,
            "policies": engine.policies,
            "drafters": self._drafters,
            "prompts": SAMPLE_PROMPTS,
        }

    def _state(self) -> dict[str, Any]:
        load = {"requests": self._load.wanted, "running": self._load.running, "domain": self._load.domain}
        return {"policy": self._policy, "drafter": self._drafter, "load": load}

    def _tick(self) -> None:
        self._load.make_room()
        if self._load.wanted and self._engine.health() != "ready":
            self._load.stop()

    def _on_leave(self, viewer: Viewer) -> None:
        self._end(viewer)
        if not self._feed.viewers:
            self._load.stop()

    def _end(self, viewer: Viewer) -> None:
        own, viewer.own = viewer.own, None
        if own is not None:
            self._feed.watch.unfollow(own.request_id)
            if own.generation is not None:
                own.generation.close()

    def _viewer(self, identifier: str) -> Viewer:
        viewer = self._feed.viewers.get(identifier)
        if viewer is None:
            raise RequestError("`feed` is not the id of an open feed; read it from the hello event.", param="feed")
        return viewer

    async def _read(self, request: Request, kind: type[T]) -> T:
        # HTML forms cannot send this type, so pages of other sites cannot use these routes through a visitor's browser.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("The body must be sent as content-type application/json.", status=415)
        text = await self._intake.read(request)
        try:
            return kind.model_validate(orjson.loads(text))
        except orjson.JSONDecodeError as error:
            raise RequestError(f"The body is not valid JSON: {error.msg} (at byte {error.pos}).") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"`{name or 'body'}`: {first['msg']}.", param=name or None) from None


def _page(name: str, kind: str) -> Any:
    content = (STATIC / name).read_bytes()

    async def page() -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=kind)

    return page


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
