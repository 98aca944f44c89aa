"""The pages of a study: a rater's, which know nothing but items, and the owner's.

A rater is who carries a rater's token, in a cookie that no script reads. It comes in the part of a
link behind #, which browsers send to no server and name to no other page. What a rater is sent is
made of the rater's own rows and of `study_panels`' projection; nothing else of the run is in reach.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
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
from analysis.browser.answers import Answers, RaterAnswers
from analysis.browser.study import Item, Rater, Study
from sae_jax import InputError

COOKIE = "sae_rater"
MOST_BYTES = 200_000  # of a request: three answers of 5,000 characters, escaped as JSON, and more
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
    for each in study.load_all(context.state):
        study.open_answers(context.state, each)
        study.content(context.state, each)
    pages = StudyPages(context)
    return [
        Route("/study", pages.home),
        Route("/study/enter", pages.enter, methods=["GET", "POST"]),
        Route("/study/leave", pages.leave, methods=["POST"]),
        Route("/study/item/{number}", pages.item),
        Route("/study/item/{number}/data", pages.data),
        Route("/study/item/{number}/answer", pages.answer, methods=["POST"]),
        Route("/study/item/{number}/undo", pages.undo, methods=["POST"]),
        Route("/study/owner/{name}", pages.report),
        Route("/study/owner/{name}/answers.csv", pages.answers_csv),
        Route("/study/owner/{name}/history.csv", pages.history_csv),
        Route("/study/owner/{name}/agreement.csv", pages.agreement_csv),
        Route("/study/owner/{name}/figure.png", pages.figure),
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

    def __init__(self, context: Context) -> None:
        self.context = context

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
            return self._page(request, "study_enter.html", title="Study")
        form = await _form(request)
        safety.check_csrf(request, form.get("csrf"))
        token = form.get("token", "").strip()
        if await run_in_threadpool(study.rater_of_token, self.context.state, token) is None:
            raise HTTPException(403, "This is no rater's link, or no longer: ask who sent it.")
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
        """What holds now."""
        return self._file(request, "answers", lambda results, *of: results.answers_csv(*of))

    def history_csv(self, request: Request) -> Response:
        """Every change."""
        return self._file(request, "history", lambda results, *of: results.history_csv(*of))

    def agreement_csv(self, request: Request) -> Response:
        """The tables of the report in one, the name of each in its first column."""
        return self._file(request, "agreement", lambda results, *of: results.report_csv(*of))

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
        found = [
            (each, study.progress(each, study.open_answers(self.context.state, each)))
            for each in study.load_all(self.context.state)
        ]
        return self._page(request, "study_owner.html", studies=found)

    def _file(self, request: Request, what: str, make: Callable[..., str]) -> Response:
        design, answers = self._owned(request)
        from analysis.browser import study_results

        headers = {
            "Content-Disposition": f'attachment; filename="{design.name}_{what}.csv"',
            "Cache-Control": "no-store",
        }
        return Response(
            make(study_results, design, answers), headers=headers, media_type="text/csv"
        )

    def _check_owner(self, request: Request) -> None:
        if not self.context.owner(request):
            raise HTTPException(403, "Enter by the link that you were sent.")

    def _owned(self, request: Request) -> tuple[Study, Answers]:
        self._check_owner(request)
        known = {each.name: each for each in study.load_all(self.context.state)}
        design = known.get(request.path_params["name"])
        if design is None:
            raise HTTPException(404, "There is no study of this name.")
        return design, study.open_answers(self.context.state, design)

    def _place(self, request: Request) -> _Place:
        found = study.rater_of_token(self.context.state, request.cookies.get(COOKIE, ""))
        if found is None:
            raise HTTPException(403, "Enter by the link that you were sent.")
        design, rater = found
        return _Place(design, rater, study.open_answers(self.context.state, design).of(rater.name))

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

    def _page(self, request: Request, template: str, **values: Any) -> Response:
        values = {"csrf": safety.csrf_token(request), "page": "study"} | values
        if "place" in values:  # a rater reads the study's title, and not the run's
            values["title"] = values["place"].study.title
        response = self.context.templates.TemplateResponse(request, template, values)
        response.headers["Cache-Control"] = "no-store"
        return response


TABLES = {
    "shares": "Interpretable share, with Wilson's 95 % interval",
    "comparison": "Concepts less neurons",
    "within": "Agreement of each rater with themselves, on repeats",
    "changes": "Answers to a first showing and to its repeat",
    "between": "Agreement of every two raters",
    "alphas": "Krippendorff's alpha of all raters, with a bootstrap 95 % interval",
}


def _named(sent: dict[str, Any]) -> tuple[int, str]:
    """The version that the page showed, and its name for the change."""
    base, save = sent.get("base"), sent.get("save")
    if type(base) is not int or base < 0 or not isinstance(save, str) or not 8 <= len(save) <= 64:
        raise InputError("this page is of another version of the program: reload it.")
    return base, save


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
    except ValueError:
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
