"""The page of `sdlora-edge label`: one person, one browser, on this machine.

It listens on 127.0.0.1 only, and answers only below a random token, which no other page can know.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from ..errors import SdloraError
from ..fleet.doors import HEADERS, Door, Server, configured, url_of
from .board import THROWN, Board, Written
from .eyes import Seen
from .grouping import grouped

FILES = {"label.css": "text/css", "label.js": "text/javascript"}
FIELDS = 20_000
"""of a form: one for each image and each group"""


@dataclass(frozen=True)
class Place:
    """Where the result goes, and where the page is served.

    Attributes:
        out: Folder to write.
        train: The command that takes it, for the page to show.
        port: 0 takes a free one.
    """

    out: Path
    train: str
    port: int = 0


class Page:
    """The pages and what they do."""

    def __init__(self, board: Board, seen: Seen, place: Place, end: Callable[[], object]) -> None:
        self._board, self._seen, self._place, self._end = board, seen, place, end
        self._said, self._is_error = "", False
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._template = environment.get_template("label.html")

    def application(self, token: str) -> Starlette:
        """The whole site, below the token."""
        routes = [
            Route("/", self.show),
            Route("/", self.act, methods=["POST"]),
            Route("/image/{number:int}", self.image),
            *(Route(f"/{name}", self.file) for name in FILES),
        ]
        icon = Route("/favicon.ico", lambda _: Response(status_code=204))
        return Starlette(routes=[icon, Mount(f"/{token}", routes=routes)])

    async def show(self, request: Request) -> Response:
        """The page as it is now."""
        return self._page()

    def _page(self, after: BackgroundTask | None = None) -> Response:
        text = self._template.render(
            board=self._board,
            seen=self._seen,
            noun=self._seen.kind.noun,
            said=self._said,
            is_error=self._is_error,
            place=self._place,
        )
        return Response(text, media_type="text/html", headers=HEADERS, background=after)

    async def act(self, request: Request) -> Response:
        """Take the names of all groups, and do what a button says."""
        async with request.form(max_fields=FIELDS, max_files=0) as form:
            try:
                self._said, self._is_error = self._done(form), False
            except SdloraError as error:
                self._said, self._is_error = str(error), True
            except (KeyError, ValueError):
                self._said, self._is_error = "this form is incomplete: load the page again", True
            if form.get("do") == "end":  # nobody would answer a redirection
                return self._page(BackgroundTask(self._end))
        return RedirectResponse(request.url.path, 303, HEADERS)

    def _done(self, form: FormData) -> str:
        """Do it, and say what was done."""
        for field, value in form.items():
            kind, _, number = field.partition("-")
            if kind == "name" and number.isdecimal():
                self._board.name(int(number), str(value))
        do, _, more = str(form.get("do", "")).partition(" ")
        noun = self._seen.kind.noun
        images = {int(str(i)) for i in form.getlist("image") if str(i).isdecimal()}
        if do == "move":
            self._board.move(images, int(str(form["to"])))
            return f"Moved {_counted(len(images), noun)}."
        if do == "throw":
            self._board.move(images, THROWN)
            return f"Threw away {_counted(len(images), noun)}. They are at the end of the page."
        if do == "use":
            number, _, name = more.partition(" ")
            self._board.name(int(number), name)
        elif do == "write":
            return _told(self._board.write(self._place.out), self._place, noun)
        elif do == "end":
            return "The program has ended. You can close this page."
        return ""

    async def image(self, request: Request) -> Response:
        """A small image, or the beginning of a text."""
        number = request.path_params["number"]
        if number >= len(self._board.paths):
            return PlainTextResponse(f"no such {self._seen.kind.noun}", 404, HEADERS)
        try:
            media, data = await run_in_threadpool(self._seen.preview, self._board.paths[number])
        except SdloraError as error:  # it was removed meanwhile
            return PlainTextResponse(str(error), 404, HEADERS)
        return Response(data, media_type=media, headers=HEADERS)

    async def file(self, request: Request) -> Response:
        """The script and the style."""
        name = request.url.path.rpartition("/")[2]
        data = Path(__file__).with_name(name).read_bytes()
        return Response(data, media_type=FILES[name], headers=HEADERS)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _told(written: Written, place: Place, noun: str) -> str:
    classes = ", ".join(f"{name} {count}" for name, count in written.classes.items())
    left = f" {_counted(written.unnamed, noun)} without a class name left out." * bool(
        written.unnamed
    )
    return f"Wrote {written.out}: {classes}.{left} Now run: {place.train}"


def serve(seen: Seen, place: Place, distance: float, ready: Callable[[str], object]) -> Written:
    """Show the page until its button to end, SIGTERM or Ctrl-C.

    Args:
        seen: The images.
        place: Where the result goes.
        distance: As for `grouped`.
        ready: Called with the address when the page can be opened.

    Returns:
        What was written last.
    """
    groups = grouped(seen.features, seen.centre, distance)
    board = Board(seen.paths, seen.answers, seen.classes, groups)
    token = secrets.token_urlsafe(24)

    def end() -> None:
        server.should_exit = True

    door = Door("127.0.0.1", place.port)
    site = Page(board, seen, place, end).application(token)
    server = Server(configured(door, site, 2), lambda: ready(f"{url_of(door, server)}/{token}/"))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return board.written
