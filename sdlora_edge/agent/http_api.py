"""The agent's HTTP: images in, answers out; health and metrics. Errors are {"error", "code"}."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..device.answers import Answered, Asked, Prediction
from ..errors import (
    HealthError,
    InputError,
    LimitError,
    NothingToDo,
    ResourceError,
    SdloraError,
    UsageError,
)
from ..fleet.access import Access
from ..inputs.image_files import ImageLike
from ..inputs.modality import Preparation
from . import open_inference
from .batching import Answer, Batcher, Busy
from .bodies import Bodies, TooSlow, parts
from .held import Held, Unserved
from .meters import Meters

log = logging.getLogger(__name__)
FREE = "/healthz", "/v2/health/live", "/v2/health/ready"
"""what everybody may ask for"""
AGAIN = {"retry-after": "1"}
REFUSALS: list[tuple[type[SdloraError], int, str]] = [
    (Busy, 429, "busy"),
    (LimitError, 413, "too_large"),
    (TooSlow, 408, "too_slow"),
    (UsageError, 400, "malformed"),
    (InputError, 400, "unreadable"),
    (Unserved, 503, "no_model"),
    (HealthError, 503, "unhealthy"),
    (NothingToDo, 503, "no_model"),
    (ResourceError, 503, "short_of_memory"),
]
"""(error, HTTP status, code): the first that fits"""
CODES = {404: "not_found", 405: "method_not_allowed", 415: "compressed"}


@dataclass(frozen=True)
class Counter:
    """What the requests need.

    Attributes:
        name: Of the model, in the Open Inference Protocol.
        page: Folder of static files for browsers.
    """

    held: Held
    batcher: Batcher
    bodies: Bodies
    meters: Meters
    name: str
    page: Path | None = None


def refused(error: SdloraError) -> tuple[int, dict[str, str]]:
    """The HTTP status of an error, and what the client is told."""
    for kind, status, code in REFUSALS:
        if isinstance(error, kind):
            return status, {"error": str(error), "code": code}
    return 500, {"error": str(error), "code": "internal"}


def application(counter: Counter) -> Starlette:
    """All addresses."""
    routes = _Routes(counter)
    model = "/v2/models/{name}"
    version = model + "/versions/{version}"
    page = [Mount("/", StaticFiles(directory=counter.page, html=True))] if counter.page else []
    site = Starlette(
        routes=[
            Route("/healthz", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/predict", routes.predict, methods=["POST"]),
            Route("/v2", routes.server),
            Route("/v2/health/live", routes.live),
            Route("/v2/health/ready", routes.ready),
            *(Route(base, routes.model) for base in (model, version)),
            *(Route(f"{base}/ready", routes.model_ready) for base in (model, version)),
            *(Route(f"{base}/infer", routes.infer, methods=["POST"]) for base in (model, version)),
            *page,  # last: it answers to every other address
        ],
        exception_handlers={SdloraError: _refusal, HTTPException: _not_there, Exception: _bug},
    )
    site.router.redirect_slashes = False  # to a host that the client names
    return site


class _Routes:
    """One method for each address."""

    def __init__(self, counter: Counter) -> None:
        self._held, self._batcher = counter.held, counter.batcher
        self._bodies, self._meters, self._name = counter.bodies, counter.meters, counter.name
        self._parsing = asyncio.Lock()
        """one at a time: JSON takes many times its size"""

    @property
    def _reads(self) -> Preparation:
        """What the model reads. Raises Unserved while there is none."""
        return self._held.device.preparation

    async def health(self, request: Request) -> Response:
        serves = self._held.device.serves
        return JSONResponse({"status": "ok", **serves.to_dict()})

    async def metrics(self, request: Request) -> Response:
        page = await run_in_threadpool(self._meters.page)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(self, request: Request) -> Response:
        asked, noun = _asked(request), self._reads.noun
        async with self._bodies.of(request) as data:
            several = request.headers.get("content-type", "").startswith("multipart/form-data")
            if not data:
                raise UsageError(f"the body is empty: send one {noun}")
            if several:
                named = await parts(request.headers, data, self._batcher.limits.queue)
            else:
                named = [("", data)]
            answers = await self._answers([image for _, image in named], asked)
        if not several and isinstance(answers[0], SdloraError):
            raise answers[0]
        names = [{noun: name} if several else {} for name, _ in named]
        found = [{**name, **_told(one)} for name, one in zip(names, answers, strict=True)]
        return JSONResponse({"predictions": found})

    async def server(self, request: Request) -> Response:
        return JSONResponse(open_inference.server_metadata())

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": bool(self._held.device.serves)})

    async def model(self, request: Request) -> Response:
        return JSONResponse(
            open_inference.model_metadata(self._name, self._generation(request), self._reads.tensor)
        )

    async def model_ready(self, request: Request) -> Response:
        return JSONResponse({"name": self._name, "ready": bool(self._generation(request))})

    async def infer(self, request: Request) -> Response:
        self._generation(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "the body is compressed: send it as it is")
        async with self._bodies.of(request) as data:
            header = request.headers.get(open_inference.HEADER)
            async with self._parsing:
                most = open_inference.Most(
                    self._batcher.limits.queue, self._batcher.room.text, self._reads.tensor
                )
                wanted = await run_in_threadpool(open_inference.read, data, header, most)
            answers = await self._answers(wanted.images, wanted.asked)
        found: list[Prediction] = []
        for one in answers:
            if isinstance(one, SdloraError):
                raise one
            found.append(one.prediction)
        body, length = open_inference.answer(self._name, wanted, found)
        if length is None:
            return Response(body, media_type="application/json")
        return Response(
            body,
            media_type="application/octet-stream",
            headers={open_inference.HEADER: str(length)},
        )

    async def _answers(self, images: Sequence[ImageLike], asked: Asked) -> list[Answer]:
        _ = self._held.device.serves  # before anything waits for nothing
        return await asyncio.wrap_future(self._batcher.submit_all(images, asked))

    def _generation(self, request: Request) -> int:
        """The generation in force. Raises HTTPException if another model or version is wanted."""
        generation = self._held.device.serves.generation
        wanted = request.path_params
        if wanted["name"] != self._name:
            raise HTTPException(404, f"there is no model of this name: it is {self._name}")
        if wanted.get("version", str(generation)) != str(generation):
            raise HTTPException(404, f"only version {generation} is served")
        return generation


def _told(answer: Answer) -> dict[str, Any]:
    return answer.prediction.to_dict() if isinstance(answer, Answered) else {**refused(answer)[1]}


def _asked(request: Request) -> Asked:
    """What the query asks for. Raises UsageError."""
    given = dict(request.query_params)
    try:
        threshold = given.pop("threshold", None)
        asked = Asked(int(given.pop("top", "1")), None if threshold is None else float(threshold))
    except ValueError as error:
        raise UsageError(f"the query cannot be read ({error}): give top and threshold") from error
    if given:
        raise UsageError(f"the query holds {min(given)!r}: give top and threshold alone")
    return asked


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, SdloraError)
    status, said = refused(error)
    return JSONResponse(said, status, AGAIN if status in (429, 503) else None)


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "refused")
    return JSONResponse({"error": error.detail, "code": code}, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "internal error: see the agent's log", "code": "internal"}, 500)


class Gate:
    """Lets in who may come in, measures every request, and answers for bugs.

    Attributes:
        access: Who may come in.
    """

    def __init__(self, site: Starlette, access: Access, meters: Meters) -> None:
        self.access = access
        self._site, self._meters = site, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._site(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        connection = HTTPConnection(scope)
        answer = self._refusal(connection) or self._site
        try:
            await answer(scope, receive, noted)
        except ClientDisconnect:
            log.debug("a client has gone before its request was whole")
        except Exception:  # the client has its answer: `_bug`
            log.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "other")
            self._meters.request(endpoint, status, time.perf_counter() - begin)

    def _refusal(self, connection: HTTPConnection) -> ASGIApp | None:
        if connection.scope["path"] in FREE:
            return None
        if not self.access.allows(connection, time.time()):
            if self.access.open:
                said = (
                    "without a token, the agent answers to the names 127.0.0.1 and localhost only"
                )
                return JSONResponse({"error": said, "code": "forbidden"}, 403)
            said = "a token is missing or wrong: send the header Authorization: Bearer TOKEN"
            headers = {"www-authenticate": "Bearer"}
            return JSONResponse({"error": said, "code": "unauthorized"}, 401, headers)
        origin = connection.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != connection.headers.get("host"):
            said = f"a page of {origin} may not ask: call the agent from a program"
            return JSONResponse({"error": said, "code": "forbidden"}, 403)
        return None
