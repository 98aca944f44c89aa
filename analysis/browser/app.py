"""The server: routes, and the guard before them."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from analysis.browser import assets, documents, safety, study_pages
from analysis.browser.pages import Context, Pages
from analysis.browser.run import Run


class AnyName(Convertor[str]):
    """A name of a feature or a gene, which may hold slashes and even line ends."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("any", AnyName())


def create(
    run: Run,
    state: Path,
    *,
    host: str = "127.0.0.1",
    allow: tuple[str, ...] = (),
    token: str | None = None,
) -> Starlette:
    """The application.

    host: where it will listen. allow: further names by which it may be called. token: the owner's,
    asked for where the host is not the loopback.
    """
    title = documents.document(run, "about")["title"]
    templates = Jinja2Templates(env=assets.live_environment(title))
    context = Context(run, state, templates, token)
    pages = Pages(context)
    routes = [
        Route("/", pages.overview), Route("/random", pages.random),
        Route("/feature/{name:any}", pages.feature), Route("/gene/{name:any}", pages.gene),
        Route("/term/{i:int}", pages.numbered), Route("/cell/{i:int}", pages.numbered),
        Route("/label/{c:int}/{v:int}", pages.numbered),
        Route("/data/{key:path}", pages.data), Route("/table", pages.table),
        Route("/search", pages.search), Route("/static/{hash}/{name}", assets.static),
        Route("/enter", pages.enter, methods=["GET", "POST"]),
        *study_pages.routes(context),
    ]  # fmt: skip
    guard = Middleware(
        safety.Guard, hosts=safety.names_allowed(host, allow), token=token,
        rater_of=study_pages.rater_of,
    )  # fmt: skip
    app = Starlette(
        routes=routes, middleware=[guard, Middleware(GZipMiddleware, compresslevel=5)],
        exception_handlers={HTTPException: pages.failed, Exception: pages.failed},
    )  # fmt: skip
    app.state.secret = safety.secret(state)
    app.state.context = context
    return app
