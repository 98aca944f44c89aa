"""The guard before the pages: other names, other sites, other people."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from analysis.browser import safety
from sae_jax import InputError

TOKEN = "an-owner's-token"


def rater(request: Request) -> str | None:
    return request.cookies.get("rater")


async def page(request: Request) -> Response:
    if request.method == "POST":
        safety.check_csrf(request, (await safety.form(request)).get("csrf"))
    return PlainTextResponse(safety.csrf_token(request))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., TestClient]:
    def make(token: str | None = None, name: str = "localhost:8080") -> TestClient:
        guard = Middleware(
            safety.Guard, hosts=safety.names_allowed("127.0.0.1"), token=token, rater_of=rater
        )
        paths = ("/", "/data/about", "/static/core.js", "/study", "/study/item/1", "/enter")
        routes = [Route(path, page, methods=["GET", "POST"]) for path in paths]
        app = Starlette(routes=routes, middleware=[guard])
        app.state.secret = safety.secret(tmp_path)
        return TestClient(app, base_url=f"http://{name}", follow_redirects=False)

    return make


@pytest.mark.parametrize("name", ["localhost", "LocalHost.:8080", "127.0.0.1:8080", "[::1]:80"])
def test_the_loopback_has_three_names(made: Callable[..., TestClient], name: str) -> None:
    assert made(name=name).get("/").status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example:8080", "10.0.0.7:8080"])
def test_a_name_that_was_rebound_is_refused(made: Callable[..., TestClient], name: str) -> None:
    answer = made(name=name).get("/data/about")
    assert answer.status_code == 421
    assert "allow_host" in answer.text


def test_every_answer_carries_the_policy(made: Callable[..., TestClient]) -> None:
    for path in ("/", "/nowhere"):
        headers = made().get(path).headers
        assert "'unsafe-eval'" not in headers["content-security-policy"]
        assert "script-src 'self';" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_forms_need_the_token_of_their_session(made: Callable[..., TestClient]) -> None:
    mine, other = made(), made()
    token = mine.get("/").text
    assert "HttpOnly; SameSite=Strict" in made().get("/").headers["set-cookie"]
    assert other.get("/").text != token
    assert mine.post("/", data={"csrf": token}).status_code == 200
    for wrong in ({}, {"csrf": ""}, {"csrf": token[:-1] + "x"}, {"csrf": "ü"}):
        assert mine.post("/", data=wrong).status_code == 403
    assert other.post("/", data={"csrf": token}).status_code == 403


def test_the_token_of_a_session_outlives_the_server(made: Callable[..., TestClient]) -> None:
    before = made()
    token = before.get("/").text
    after = made()
    after.cookies = before.cookies
    assert after.post("/", data={"csrf": token}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
     {"Origin": "http://localhost:9999"}],
)  # fmt: skip
def test_pages_of_other_sites_change_nothing(
    made: Callable[..., TestClient], headers: dict[str, str]
) -> None:
    client = made()
    token = client.get("/").text
    assert client.post("/", data={"csrf": token}, headers=headers).status_code == 403


def test_elsewhere_than_on_the_loopback_a_token_is_needed(made: Callable[..., TestClient]) -> None:
    client = made(TOKEN)
    assert client.get("/data/about").status_code == 401
    answer = client.get("/", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/enter")
    for path in ("/enter", "/static/core.js", "/study"):
        assert client.get(path).status_code == 200
    client.cookies.set(safety.OWNER, TOKEN + "x")
    assert client.get("/data/about").status_code == 401
    client.cookies.set(safety.OWNER, TOKEN)
    assert client.get("/data/about").status_code == 200


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_rater_sees_the_study_alone(made: Callable[..., TestClient], token: str | None) -> None:
    client = made(token)
    client.cookies.set("rater", "ann")
    for path, status in {"/": 403, "/data/about": 403, "/study/item/1": 200, "/study": 200,
                         "/static/core.js": 200, "/studying": 403}.items():  # fmt: skip
        assert client.get(path).status_code == status, path


def test_a_form_is_read_to_a_bound(made: Callable[..., TestClient]) -> None:
    client = made()
    answer = client.post("/", data={"csrf": client.get("/").text, "more": "x" * 70_000})
    assert answer.status_code == 413


def test_the_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    first = safety.secret(tmp_path)
    assert safety.secret(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert len(first) == 32
    for wrong in ("no hexadecimal", "", "00", "\ud83d".encode("utf-8", "replace").decode()):
        (tmp_path / "secret").write_text(wrong)
        with pytest.raises(InputError, match=r"damaged: .*; delete it"):
            safety.secret(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give --state=DIR"):
        safety.check_state(tmp_path / "file" / "state")
    made = safety.check_state(tmp_path / "a" / "b")
    assert list(made.iterdir()) == []
