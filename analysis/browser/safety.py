"""What keeps other pages, other machines and other people out of the browser.

The server listens on the loopback unless told otherwise. There a page of another site could still
send requests, by a name of its own that resolves to 127.0.0.1 (DNS rebinding: refused by the Host
header) or by a form (refused by the CSRF token). On any other address a token is needed as well.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_jax import InputError, files
from sae_jax.reading import check_file, reading

SESSION, OWNER = "sae_session", "sae_owner"  # cookies
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with "no-referrer" our own forms come from "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
RATERS = ("/study/", "/static/")  # all that a rater's token opens
OPEN = (*RATERS, "/enter/")  # what needs no owner's token; a study has its own


def secret(state: Path) -> bytes:
    """The key of this folder's CSRF tokens, made once: pages outlive a restart of the server."""
    path = state / "secret"
    if not path.exists() and not path.is_symlink():
        with files.write_aside(path) as fresh:
            fresh.touch(0o600)
            fresh.write_text(secrets.token_hex(32))
    with reading(check_file(path), advice="; delete it"):
        found = bytes.fromhex(path.read_text())
        if len(found) != 32:
            raise ValueError(f"it holds {len(found)} bytes, not 32")
    return found


def csrf_token(request: HTTPConnection) -> str:
    """What forms of this browser session must carry."""
    return _signed(request.app.state.secret, request.state.session)


def check_csrf(request: HTTPConnection, token: str | None) -> None:
    """Refuse a form that was not made for this session.

    Raises:
      HTTPException: 403.
    """
    if not token or not hmac.compare_digest(token.encode(), csrf_token(request).encode()):
        raise HTTPException(403, "This page is of another session: reload it. Nothing was changed.")


def _signed(key: bytes, session: str) -> str:
    return hmac.new(key, session.encode(), "sha256").hexdigest()


def names_allowed(host: str, more: tuple[str, ...] = ()) -> set[str]:
    """Names in the Host header that are this server's: of the loopback, and what it was told."""
    own = {"127.0.0.1", "localhost", "[::1]", *(name.lower() for name in more)}
    return own if host in ("0.0.0.0", "::") else own | {host.lower()}


class Guard:
    """ASGI middleware: Host, origin, tokens, headers.

    hosts: names allowed in Host. token: the owner's, where the server is not of the loopback alone.
    rater_of: the rater whose cookie a request carries, who is let into the study and nowhere else.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: set[str],
        token: str | None,
        rater_of: Callable[[Request], str | None],
    ) -> None:
        self.app, self.hosts, self.token, self.rater_of = app, hosts, token, rater_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself what it refuses."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        refused = self._refused(request)
        session = request.cookies.get(SESSION, "")
        fresh = None
        if not re.fullmatch(r"[0-9a-f]{32}", session):
            session = fresh = secrets.token_hex(16)
        scope.setdefault("state", {})["session"] = session

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                if fresh:
                    headers.append("Set-Cookie", cookie(SESSION, fresh))
            await send(message)

        await (refused or self.app)(scope, receive, sent)

    def _refused(self, request: Request) -> ASGIApp | None:
        path, method = request.url.path.rstrip("/") + "/", request.method
        host = re.sub(r"\.?(:\d+)?$", "", request.headers.get("host", "").lower())
        if host not in self.hosts:
            told = f"This server is not called {host[:100]!r}: see --allow_host."
            return PlainTextResponse(told, 421)
        foreign = request.headers.get("sec-fetch-site", "same-origin") in (
            "cross-site",
            "same-site",
        )
        origin = request.headers.get("origin")
        if origin not in (None, f"{request.url.scheme}://{request.headers['host']}"):
            foreign = True
        if foreign and method not in SAFE_METHODS:
            return PlainTextResponse("Sent by a page of another site: refused.", 403)
        if path.startswith(RATERS):
            return None
        if self.rater_of(request) is not None:
            return PlainTextResponse("Raters see the study alone: see /study.", 403)
        if self.token is None or path.startswith(OPEN) or self.is_owner(request):
            return None
        if method in SAFE_METHODS and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/enter", 303)
        return PlainTextResponse("The token that `sae-jax browse` printed is needed.", 401)

    def is_owner(self, request: HTTPConnection) -> bool:
        """Whether a request carries the owner's token."""
        return owns(request, self.token)


def owns(request: HTTPConnection, token: str | None) -> bool:
    """Whether it is the owner's: everybody on the loopback is, elsewhere who has the token."""
    given = request.cookies.get(OWNER, "")
    return token is None or hmac.compare_digest(given.encode(), token.encode())


def cookie(name: str, value: str) -> str:
    """Of this server alone: no script reads it, no other site sends it."""
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"


def check_state(state: Path) -> Path:
    """The folder for the index and for what people write, made if it is not there.

    Raises:
      InputError: it cannot be written.
    """
    try:
        if not state.exists():
            state.mkdir(parents=True, mode=0o700)
        probe = state / f"{files.ASIDE}probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{state} cannot be written ({error.strerror}); give --state=DIR, a folder for the "
            "browser's index and the studies' answers"
        ) from None
    return state


async def form(request: Request, most: int = 65536) -> dict[str, str]:
    """The fields of a form as browsers send it (urlencoded), at most so many bytes.

    Raises:
      HTTPException: 413, it is larger.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, "This form is too large.")
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
