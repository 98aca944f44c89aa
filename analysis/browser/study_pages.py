"""The pages of a study: a rater's, which know nothing but items, and the owner's.

A rater is who carries a rater's token, in a cookie that no script reads. It comes in the part of a
link behind #, which browsers send to no server and name to no other page. What a rater is sent is
made of the rater's own rows and of `study_panels`' projection; nothing else of the run is in reach.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from analysis.browser import safety, study
from analysis.browser.answers import MOST, Answers, NotSavedError, RaterAnswers
from analysis.browser.study import Item, Rater, Study
from sae_jax import InputError

Endpoint = Callable[[Request], Any]  # a response, or awaited for one
COOKIE = "sae_rater"
MOST_BYTES = 200_000  # of a request: three answers of 5,000 characters, escaped as JSON, and more
UNTITLED = "Study"  # where the study is not known yet
RESTART = "restart `sae-jax browse` to open this study"
FULL = "Not saved: the disk of this server is full"
_AWAY = f"{COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"


class Context(Protocol):
    """What these pages need to know: the state folder, the templates, and who the owner is."""

    state: Path
    templates: Jinja2Templates

    def owner(self, request: Request) -> bool:
        """Whether a request is the owner's, not some rater's."""
        ...


def routes(context: Context) -> list[Route]:
    """All routes; they lie under /study.

    Raises:
        InputError: if the files of a study are damaged: before the first rater comes.
    """
    known = study.load_all(context.state)
    for each in known:
        study.open_answers(context.state, each)
        study.content(context.state, each)
    pages = StudyPages(context, {each.name for each in known})
    raters = [
        Route("/study", pages.home),
        Route("/study/enter", pages.enter, methods=["GET", "POST"]),
        Route("/study/leave", pages.leave, methods=["POST"]),
        Route("/study/item/{number}", pages.item),
        Route("/study/item/{number}/data", pages.data),
        Route("/study/item/{number}/answer", pages.answer, methods=["POST"]),
        Route("/study/item/{number}/undo", pages.undo, methods=["POST"]),
    ]
    owners = [
        Route("/study/owner/{name}", pages.report),
        Route("/study/owner/{name}/answers.csv", pages.answers_csv),
        Route("/study/owner/{name}/history.csv", pages.history_csv),
        Route("/study/owner/{name}/agreement.csv", pages.agreement_csv),
        Route("/study/owner/{name}/figure.png", pages.figure),
    ]
    rest = [Route(path, pages.nothing, methods=_METHODS) for path in ("/study", "/study/{_:path}")]
    return [
        Route(each.path, pages.told(each.endpoint, each in owners), methods=list(each.methods))
        for each in (*raters, *owners, *rest)
    ]


def rater_of(request: HTTPConnection) -> str | None:
    """The rater whose token a request carries; None without one, and for one that is nobody's."""
    found = study.rater_of_token(request.app.state.context.state, request.cookies.get(COOKIE, ""))
    return found and found[1].name


@dataclasses.dataclass(frozen=True)
class _Place:
    """A rater in their study, perhaps at an item."""

    study: Study
    rater: Rater
    answers: RaterAnswers

    def item(self, request: Request) -> Item:
        number = request.path_params["number"]
        if number not in self.study.item:
            raise HTTPException(404, "There is no such item in this study.")
        return self.study.item[number]


class StudyPages:
    """The endpoints."""

    def __init__(self, context: Context, known: Collection[str]) -> None:
        """known: the studies that were there at the start. A later one opens with the next start,
        which asks for an owner's token: without it, its raters would be owners elsewhere."""
        self.context, self.known = context, known

    def told(self, endpoint: Endpoint, owners: bool) -> Endpoint:
        """Tells errors in a page of the study: the explorer's page of errors names the run, and is
        for the owner at the owner's addresses alone."""

        async def told(request: Request) -> Response:
            try:
                if iscoroutinefunction(endpoint):
                    return await endpoint(request)
                return await run_in_threadpool(endpoint, request)
            except HTTPException as error:
                page = "text/html" in request.headers.get("accept", "")
                if not page or (owners and self.context.owner(request)):
                    raise
                return self._page(
                    request, "study_failed.html", error.status_code, title=UNTITLED,
                    told=error.detail,
                )  # fmt: skip

        return told

    def home(self, request: Request) -> Response:
        """A rater's list of items; for the owner, the list of studies."""
        if study.rater_of_token(self.context.state, request.cookies.get(COOKIE, "")) is None:
            return self._studies(request)
        place = self._place(request)
        held = place.answers.all()
        items = [
            {"number": number, "complete": place.study.is_complete(held.get(number, {})),
             "begun": any(held.get(number, {}).values())}
            for number in place.rater.order
        ]  # fmt: skip
        left = [each["number"] for each in items if not each["complete"]]
        return self._page(request, "study_home.html", place=place, items=items, left=left)

    def item(self, request: Request) -> Response:
        """The form of an item; its panels are fetched."""
        place = self._place(request)
        item, order = place.item(request), place.rater.order
        at = order.index(item.number)
        held, saved = place.answers.all(), place.answers.get(item.number)
        return self._page(
            request, "study_item.html", place=place, number=item.number, position=at + 1,
            n_answered=sum(map(place.study.is_complete, held.values())),
            previous=order[at - 1] if at else None,
            following=order[at + 1] if at + 1 < len(order) else None,
            saved=saved, answer=place.study.check_answer(saved.answer), options=study.OPTIONS,
            most=study.MOST_TEXT,
        )  # fmt: skip

    def data(self, request: Request) -> Response:
        """What an item shows; the very same bytes when it is shown again."""
        place = self._place(request)
        with _intact():
            shown = study.content(self.context.state, place.study)[place.item(request).shown]
        return JSONResponse(
            {"columns": place.study.metadata, **shown}, headers={"Cache-Control": "no-store"}
        )

    async def answer(self, request: Request) -> Response:
        """Saves what the form holds: {answer, base, save}."""
        return await self._change(request, lambda place, item, sent: place.answers.save(
            item.number, place.study.check_answer(sent.get("answer")), *_named(sent)))  # fmt: skip

    async def undo(self, request: Request) -> Response:
        """Brings back what held before: {base, save}."""
        return await self._change(
            request, lambda place, item, sent: place.answers.undo(item.number, *_named(sent))
        )

    async def enter(self, request: Request) -> Response:
        """A rater's token becomes a cookie."""
        if request.method == "GET":
            return self._page(request, "study_enter.html", title=UNTITLED)
        form = await _form(request)
        safety.check_csrf(request, form.get("csrf"))
        token = form.get("token", "").strip()
        found = await run_in_threadpool(study.rater_of_token, self.context.state, token)
        if found is None:
            raise HTTPException(403, "This is no rater's link, or no longer: ask who sent it.")
        self._check_known(found[0])
        response = RedirectResponse("/study", 303)
        response.headers.append("Set-Cookie", safety.cookie(COOKIE, token))
        return response

    async def leave(self, request: Request) -> Response:
        """Takes the cookie away."""
        safety.check_csrf(request, (await _form(request)).get("csrf"))
        response = RedirectResponse("/study/enter", 303)
        response.headers.append("Set-Cookie", _AWAY)
        return response

    def report(self, request: Request) -> Response:
        """Progress and agreement of a study."""
        design, answers = self._owned(request)
        from analysis.browser import study_results  # statsmodels and more: no rater waits for them

        return self._page(
            request, "study_report.html", study=design,
            progress=study.progress(design, answers),
            tables=study_results.report(design, answers), titles=TABLES,
        )  # fmt: skip

    def answers_csv(self, request: Request) -> Response:
        """What holds now; with ?raw=1 the words are exactly those that were typed."""
        return self._file(request, "answers")

    def history_csv(self, request: Request) -> Response:
        """Every change; `raw` as of `answers_csv`."""
        return self._file(request, "history")

    def agreement_csv(self, request: Request) -> Response:
        """The tables of the report in one, the name of each in its first column."""
        return self._file(request, "agreement")

    async def nothing(self, request: Request) -> Response:
        """Any other address under /study, so that `told` tells it."""
        raise HTTPException(404, "There is no such page.")

    def figure(self, request: Request) -> Response:
        """Figure 3A."""
        owned = self._owned(request)
        from analysis.browser import study_results

        try:
            picture = study_results.figure_png(*owned)
        except InputError as error:
            raise HTTPException(404, str(error)) from None
        return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})

    def _studies(self, request: Request) -> Response:
        self._check_owner(request)
        designs = study.load_all(self.context.state)
        found = [
            (each, study.progress(each, study.open_answers(self.context.state, each)))
            for each in designs
            if each.name in self.known
        ]
        new = [each.name for each in designs if each.name not in self.known]
        return self._page(request, "study_owner.html", studies=found, new=new, restart=RESTART)

    def _file(self, request: Request, what: str) -> Response:
        owned = self._owned(request)
        from analysis.browser import study_results

        make = {
            "answers": study_results.answers_csv, "history": study_results.history_csv,
            "agreement": study_results.report_csv,
        }[what]  # fmt: skip
        raw = request.query_params.get("raw") == "1"
        name = f"{owned[0].name}_{what}{'_raw' if raw else ''}.csv"
        headers = {
            "Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store",
        }  # fmt: skip
        return Response(make(*owned, raw=raw), headers=headers, media_type="text/csv")

    def _check_owner(self, request: Request) -> None:
        if not self.context.owner(request):
            raise HTTPException(403, "Enter by the link that you were sent.")

    def _owned(self, request: Request) -> tuple[Study, Answers]:
        self._check_owner(request)
        known = {each.name: each for each in study.load_all(self.context.state)}
        design = known.get(request.path_params["name"])
        if design is None:
            raise HTTPException(404, "There is no study of this name.")
        self._check_known(design)
        return design, study.open_answers(self.context.state, design)

    def _place(self, request: Request) -> _Place:
        found = study.rater_of_token(self.context.state, request.cookies.get(COOKIE, ""))
        if found is None:
            raise HTTPException(403, "Enter by the link that you were sent.")
        design, rater = found
        self._check_known(design)
        with _intact():
            answers = study.open_answers(self.context.state, design).of(rater.name)
        return _Place(design, rater, answers)

    def _check_known(self, design: Study) -> None:
        if design.name not in self.known:
            raise HTTPException(403, RESTART)

    async def _change(self, request: Request, make: Callable[..., Any]) -> Response:
        safety.check_csrf(request, request.headers.get("x-csrf-token"))
        sent = await _json(request)

        def change() -> dict[str, Any]:
            place = self._place(request)
            return dataclasses.asdict(make(place, place.item(request), sent))

        try:
            return JSONResponse(await run_in_threadpool(change))
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except NotSavedError as error:
            _log.error("an answer was not saved: %s", error)
            raise HTTPException(507, FULL) from None

    def _page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        values = {"csrf": safety.csrf_token(request), "page": "study"} | values
        if "place" in values:  # a rater reads the study's title, and not the run's
            values["title"] = values["place"].study.title
        response = self.context.templates.TemplateResponse(
            request, template, values, status_code=status
        )
        response.headers["Cache-Control"] = "no-store"
        return response


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_log = logging.getLogger(__name__)
TABLES = {
    "shares": "Interpretable share, with Wilson's 95 % interval",
    "comparison": "Concepts less neurons",
    "within": "Agreement of each rater with themselves, on repeats (approximate 95 % interval)",
    "changes": "Answers to a first showing and to its repeat",
    "between": "Agreement of every two raters (approximate 95 % interval)",
    "alphas": "Krippendorff's alpha of all raters, with a bootstrap 95 % interval",
}


def _named(sent: dict[str, Any]) -> tuple[int, str]:
    """The version that the page showed, and its name for the change."""
    base, save = sent.get("base"), sent.get("save")
    counts = type(base) is int and 0 <= base <= MOST
    names = isinstance(save, str) and 8 <= len(save) <= 64 and save.isascii() and save.isprintable()
    if not counts or not names:
        raise HTTPException(400, "This page is of another version of the program: reload it.")
    return base, save


@contextmanager
def _intact() -> Iterator[None]:
    """Files that were damaged while the server ran: raters are told, and no paths with it."""
    try:
        yield
    except InputError as error:
        _log.error("%s", error)
        told = "The files of this study cannot be read: tell who sent you the link."
        raise HTTPException(500, told) from None


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, "This is more than an answer can hold.")
    return body


async def _json(request: Request) -> dict[str, Any]:
    try:
        sent = json.loads(await _body(request))
    except (ValueError, RecursionError):
        sent = None
    if not isinstance(sent, dict):
        raise HTTPException(400, "This is no answer.")
    return sent


async def _form(request: Request) -> dict[str, str]:
    """Fields of a form; Starlette's own reader would need one more package."""
    try:
        return dict(parse_qsl((await _body(request)).decode(), max_num_fields=5))
    except ValueError:
        raise HTTPException(400, "This is no form of ours.") from None
