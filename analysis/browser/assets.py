"""Static files, under names that change with their contents, and the templates' environment."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import mimetypes
from pathlib import Path
from typing import Any

import jinja2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sae_jax import InputError

HERE = Path(__file__).parent
FOREVER = "public, max-age=31536000, immutable"
PLOTLY = "plotly.min.js"


@functools.cache
def static_files() -> dict[str, bytes]:
    """Name -> contents of every static file, plotly's from its wheel, without importing it."""
    found = {path.name: path.read_bytes() for path in sorted((HERE / "static").iterdir())}
    home = importlib.util.find_spec("plotly")
    if home is None or not home.submodule_search_locations:
        raise InputError("plotly is missing: pip install 'sae-jax[browser]'")
    found[PLOTLY] = (
        Path(home.submodule_search_locations[0]) / "package_data" / PLOTLY
    ).read_bytes()
    return found


@functools.cache
def asset_name(name: str) -> str:
    """The name with a hash of the contents in it, so that it can be cached for ever."""
    return f"{hashlib.sha256(static_files()[name]).hexdigest()[:12]}/{name}"


@functools.cache
def zipped(name: str) -> bytes:
    """A static file, gzipped."""
    return gzip.compress(static_files()[name], 9, mtime=0)


def static(request: Request) -> Response:
    """A static file under its hashed name."""
    asked = f"{request.path_params['hash']}/{request.path_params['name']}"
    name = request.path_params["name"]
    if name not in static_files() or asset_name(name) != asked:
        raise HTTPException(404, "There is no such file.")
    headers = {"Cache-Control": FOREVER, "Vary": "Accept-Encoding"}
    body = static_files()[name]
    if "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["Content-Encoding"] = zipped(name), "gzip"
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(body, headers=headers, media_type=kind)


def environment(**constants: Any) -> jinja2.Environment:
    """Of the templates: everything is escaped, nothing undefined is passed over."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.globals |= constants
    return found


def live_environment(title: str) -> jinja2.Environment:
    """Of pages that this server serves."""
    return environment(
        mode="live", base="", home="/", page="", subject="", title=title,
        asset=lambda name: f"/static/{asset_name(name)}",
    )  # fmt: skip
