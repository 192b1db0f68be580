"""The collector's HTTP: reports in, pages, JSON and metrics out. Only reports change anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import SdloraError
from ..access import COOKIE, SESSION, Access
from ..doors import HEADERS
from ..report import SIZE_LIMIT
from . import inbox as boxes
from . import openapi, paper
from .inbox import Inbox
from .lookups import CONDITIONS, Filter, event_rows
from .measures import metrics_page
from .views import PAGE, PERIODS, Views

CODES = {
    boxes.STORED: 200,
    boxes.STALE: 409,
    boxes.TOO_LARGE: 413,
    boxes.MALFORMED: 400,
    boxes.UNSIGNED: 401,
    boxes.FORGED: 403,
    boxes.NOT_ENROLLED: 403,
}
FREE = "/healthz", "/v1/reports", "/login", "/collector.css", "/favicon.ico"
"""What everybody may ask for. A report's signature is its permission."""
FORM_LIMIT = 4096
SLOWEST = 20
"""Seconds that a body may take to arrive."""


@dataclass(frozen=True)
class Desk:
    """What the requests need."""

    views: Views
    inbox: Inbox
    access: Access


class TooLarge(Exception):
    """A body has more bytes than it may have."""


def application(desk: Desk) -> ASGIApp:
    """The whole site."""
    routes = _Routes(desk)
    site = Starlette(
        routes=[
            Route("/healthz", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/reports", routes.report, methods=["POST"]),
            Route("/v1/devices", routes.list_devices),
            Route("/v1/devices/{id}", routes.one_device),
            Route("/v1/channels", routes.channels),
            Route("/v1/events", routes.events),
            Route("/", routes.fleet_page),
            Route("/devices/{id}", routes.device_page),
            Route("/login", routes.login, methods=["GET", "POST"]),
            Route("/logout", routes.logout, methods=["POST"]),
            Route("/collector.css", routes.file),
            Route("/collector.js", routes.file),
            Route("/favicon.ico", routes.no_icon),
        ],
        exception_handlers={SdloraError: _unavailable},
    )
    return Gate(site, desk)


class Gate:
    """Lets in who may look, and puts HEADERS on every answer."""

    def __init__(self, site: ASGIApp, desk: Desk) -> None:
        self._site = site
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._site(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        connection = HTTPConnection(scope)
        free = scope["path"] in FREE
        allowed = free or self._desk.access.allows(connection, self._desk.views.clock())
        answer: ASGIApp = self._site if allowed else self._refusal(connection)
        await answer(scope, receive, with_headers)

    def _refusal(self, connection: HTTPConnection) -> Response:
        """People are sent to the login page, programs are told what is missing."""
        person = "text/html" in connection.headers.get("accept", "")
        if person and self._desk.access.token:
            return RedirectResponse("/login", 303)
        if self._desk.access.open:
            text = (
                "without a token, this collector answers to the names 127.0.0.1 and localhost only"
            )
            return PlainTextResponse(f"{text}\n", 403)
        return PlainTextResponse(
            "a token is missing or wrong: send the header Authorization: Bearer TOKEN\n",
            401,
            {"www-authenticate": "Bearer"},
        )


class _Routes:
    """One method for each address. Those that ask the database run in threads."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._views = desk.views
        self._pages = paper.environment()

    def health(self, request: Request) -> Response:
        with self._views.database.begin() as connection:
            connection.exec_driver_sql("SELECT 1")
        return JSONResponse({"status": "ok"})

    def metrics(self, request: Request) -> Response:
        page = metrics_page(self._views, self._desk.inbox)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.description())

    async def report(self, request: Request) -> Response:
        try:
            data = await _body(request, SIZE_LIMIT)
        except TooLarge:
            self._desk.inbox.count(boxes.TOO_LARGE)
            reason = f"a report has at most {SIZE_LIMIT} bytes"
            return JSONResponse({"outcome": boxes.TOO_LARGE, "reason": reason}, 413, _CLOSE)
        except asyncio.TimeoutError:
            return JSONResponse({"outcome": "too slow"}, 408, _CLOSE)
        done = await run_in_threadpool(self._desk.inbox.take, data)
        return JSONResponse(done.to_dict(), CODES[done.kind])

    def list_devices(self, request: Request) -> Response:
        rows = self._views.rows(_chosen(request.query_params))
        if (condition := request.query_params.get("condition")) is not None:
            if condition not in CONDITIONS:
                return _wrong(f"condition {condition!r}: use one of {', '.join(CONDITIONS)}")
            rows = [row for row in rows if row.condition == condition]
        offset, limit = _number(request, "offset", 0), _number(request, "limit", 1000)
        shown = rows[offset : offset + min(limit, 1000)]
        return JSONResponse({"devices": [row.to_dict() for row in shown], "total": len(rows)})

    def one_device(self, request: Request) -> Response:
        found = self._views.device(request.path_params["id"], 1)
        if found is None:
            return JSONResponse({"error": "this device is not enrolled"}, 404)
        return JSONResponse({**found.device.to_dict(), "report": found.report})

    def channels(self, request: Request) -> Response:
        waves = self._views.waves()
        if waves is None:
            return JSONResponse({"channels": None, "reason": "started without --repository"})
        found: dict[str, list[dict[str, Any]]] = {}
        for wave in waves:
            found.setdefault(wave.channel, []).append(wave.to_dict())
        return JSONResponse({"channels": found})

    def events(self, request: Request) -> Response:
        asked = request.query_params
        chosen = Filter(channel=asked.get("channel", ""), device=asked.get("device", ""))
        most = min(_number(request, "limit", 200), 1000)
        rows = event_rows(self._views.database, chosen, most=most)
        return JSONResponse({"events": [row.to_dict() for row in rows]})

    def fleet_page(self, request: Request) -> Response:
        chosen = _chosen(request.query_params)
        view = self._views.fleet(chosen, _days(request))
        at = min(_number(request, "page", 1), max(1, -(-len(view.devices) // PAGE)))
        rows = view.devices[(at - 1) * PAGE : at * PAGE]
        return self._page("fleet.html", view=view, rows=rows, page=max(1, at), size=PAGE)

    def device_page(self, request: Request) -> Response:
        view = self._views.device(request.path_params["id"], _days(request))
        if view is None:
            return self._page("missing.html", 404)
        return self._page("device.html", view=view)

    async def login(self, request: Request) -> Response:
        access = self._desk.access
        if request.method == "GET" or not access.token:
            return self._page("login.html", wrong=False, known=bool(access.token))
        try:
            form = parse_qs((await _body(request, FORM_LIMIT)).decode("utf-8", "replace"))
        except (TooLarge, asyncio.TimeoutError):
            return self._page("login.html", 413, wrong=True, known=True)
        if not access.is_token(form.get("token", [""])[0].strip()):
            return self._page("login.html", 401, wrong=True, known=True)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE,
            access.session(self._views.clock()),
            max_age=SESSION,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    async def logout(self, request: Request) -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE)
        return answer

    async def file(self, request: Request) -> Response:
        path = Path(__file__).with_name(request.url.path.removeprefix("/"))
        kind = "text/css" if path.suffix == ".css" else "text/javascript"
        return Response(path.read_bytes(), media_type=kind)

    async def no_icon(self, request: Request) -> Response:
        return Response(status_code=204)

    def _page(self, name: str, code: int = 200, **values: Any) -> Response:
        now = self._views.clock()
        text = self._pages.get_template(name).render(
            now=int(now),
            refused=self._desk.inbox.refused,
            token=bool(self._desk.access.token),
            periods=PERIODS,
            **values,
        )
        return Response(text, code, media_type="text/html")


_CLOSE: Mapping[str, str] = {"connection": "close"}


async def _body(request: Request, most: int) -> bytes:
    """Read a body of at most `most` bytes; of a longer one no more than that."""
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:10]) > most:
        raise TooLarge

    async def read() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise TooLarge
        return bytes(data)

    return await asyncio.wait_for(read(), SLOWEST)


def _chosen(asked: Mapping[str, str]) -> Filter:
    task = asked.get("task", "")
    number = int(task) if task.isascii() and task.isdigit() and len(task) < 10 else None
    return Filter(asked.get("channel", ""), asked.get("group", ""), number)


def _days(request: Request) -> int:
    days = _number(request, "days", 7)
    return days if days in PERIODS else 7


def _number(request: Request, name: str, usual: int) -> int:
    given = request.query_params.get(name, "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else usual


def _wrong(reason: str) -> Response:
    return JSONResponse({"error": reason}, 400)


async def _unavailable(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503, {"retry-after": "60"})
