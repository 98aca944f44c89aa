"""Pages of the explorer: shells, and the documents (documents.py) that scripts draw in them."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.templating import Jinja2Templates

from analysis.browser import documents, safety, search, study_pages, table, wire
from analysis.browser.run import Run
from sae_jax import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What the pages know.

    Attributes:
      run: what is explored.
      state: the folder of the index and of what people write.
      templates: of pages; `asset` in them is the address of a static file.
      token: the owner's, where one is needed.
    """

    run: Run
    state: Path
    templates: Jinja2Templates
    token: str | None = None

    def owner(self, request: Request) -> bool:
        """Whether a request is the owner's, not some rater's."""
        return safety.owns(request, self.token) and study_pages.rater_of(request) is None


class Pages:
    """The explorer's pages and data."""

    def __init__(self, context: Context) -> None:
        self.context, self.run = context, context.run
        self.salt = secrets.token_hex(8)  # another start may show other columns of the same run

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A template as a response; `values` are its variables."""
        return self.context.templates.TemplateResponse(
            request, template, values, status_code=status
        )

    def overview(self, request: Request) -> Response:
        """The table and the map of all features."""
        return self.page(request, "overview.html", page="overview", subject="overview")

    def feature(self, request: Request) -> Response:
        """One feature, by its name."""
        name = request.path_params["name"]
        number = self.run.feature(name)
        if number is None:
            raise HTTPException(404, f"There is no feature {name[:100]!r} in this run.")
        return self.page(
            request, "feature.html", page="feature", subject=f"feature/{number}", name=name
        )

    def gene(self, request: Request) -> Response:
        """One gene, by symbol, alias or Ensembl id."""
        name = request.path_params["name"]
        number = search.gene(self.run, name)
        if number is None:
            raise HTTPException(404, f"No gene of this run is called {name[:100]!r}.")
        return self.page(request, "entity.html", page="gene", subject=f"gene/{number}")

    def numbered(self, request: Request) -> Response:
        """A term, a cell, or a value of a column of labels."""
        kind = request.url.path.split("/")[1]
        subject = "/".join([kind, *map(str, request.path_params.values())])
        self.document(subject)
        return self.page(request, "entity.html", page=kind, subject=subject)

    def random(self, request: Request) -> Response:
        """A feature that a term names; any, where none is."""
        features = self.run.features
        named = np.flatnonzero(features["n_terms"].fillna(0) > 0) if "n_terms" in features else []
        chosen = np.random.default_rng().choice(named if len(named) else len(features))
        return RedirectResponse(f"/feature/{quote(str(features.index[chosen]), safe='')}", 303)

    def document(self, key: str) -> dict[str, Any]:
        """A document; 404 where the run has none of that key."""
        try:
            return documents.document(self.run, key)
        except documents.NoDocumentError:
            raise HTTPException(404, f"There is no {key[:100]!r} in this run.") from None
        except InputError as error:  # the folder has been changed since it was opened
            raise HTTPException(500, str(error)) from None

    def data(self, request: Request) -> Response:
        """A document, packed."""
        key = request.path_params["key"]
        tag = f'"{self.salt}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        packed = wire.pack(self.document(key))
        return Response(packed, headers=headers, media_type="application/octet-stream")

    def table(self, request: Request) -> Response:
        """One page of the table of features, as JSON."""
        try:
            found = table.query(self.run, request.query_params)
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse(found)

    def search(self, request: Request) -> Response:
        """JSON for the box; for a form sent without scripts, the best hit's page."""
        text = request.query_params.get("q", "")[:200]
        found = search.find(self.run, text)
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(found)
        return self.page(request, "search.html", page="search", text=text)

    async def enter(self, request: Request) -> Response:
        """The owner's token becomes a cookie."""
        if request.method == "GET":
            return self.page(request, "enter.html", page="enter", csrf=safety.csrf_token(request))
        form = await safety.form(request)
        safety.check_csrf(request, form.get("csrf"))
        given = form.get("token", "").strip()
        token = self.context.token
        if token is None or not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(403, "This is not the token that `sae-jax browse` printed.")
        response = RedirectResponse("/", 303)
        response.headers.append("Set-Cookie", safety.cookie(safety.OWNER, token))
        return response

    async def failed(self, request: Request, error: Exception) -> Response:
        """One sentence, as a page where a page was asked for."""
        known = isinstance(error, HTTPException)
        status = error.status_code if known else 500
        told = error.detail if known else "Something went wrong here; the server's log says what."
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(told, status)
        return self.page(request, "failed.html", status, page="failed", told=told)
