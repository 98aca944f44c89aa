import csv
import http.client
import io
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from analysis.browser import safety, study, study_draw, study_pages
from tests.analysis.browser import study_cases
from tests.analysis.browser.study_cases import NASTY, SECRETS

REPOSITORY = Path(__file__).parents[3]
RATERS, SAVES = 8, 25  # of the server that is killed; 8 × 200 were run by hand

Tokens = dict[str, str]


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return study_cases.create(
        tmp_path, title=f"Genes {NASTY}", concepts=5, neurons=4, repeats=3,
        raters=("annabel", f"bob {NASTY}"),
    )  # fmt: skip


@pytest.fixture
def bob() -> str:
    return f"bob {NASTY}"


class Rater:
    """A rater's browser."""

    def __init__(self, state: Path, token: str) -> None:
        self.client = TestClient(study_cases.app(state), follow_redirects=False)
        page = self.client.get("/study/enter")
        form = {"token": token, "csrf": re.search(r'name="csrf" value="(\w+)"', page.text)[1]}
        self.entered = self.client.post("/study/enter", data=form)
        self.design = study.load(state, "first")

    def page(self, number: str) -> str:
        return self.client.get(f"/study/item/{number}").text

    def change(self, number: str, what: str = "answer", **sent: Any) -> Any:
        csrf = re.search(r'data-csrf="(\w+)"', self.page(number))[1]
        body = {"base": 0, "save": f"save {time.perf_counter_ns()}", **sent}
        address = f"/study/item/{number}/{what}"
        return self.client.post(address, json=body, headers={"X-CSRF-Token": csrf})


def whole(**changed: str) -> dict[str, str]:
    return {"cell_type": "no", "tissue": "no", "process": "no", **changed}


def test_a_rater_is_told_nothing_that_would_give_an_item_away(
    tmp_path: Path, tokens: Tokens
) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    order = ann.design.rater["annabel"].order
    ann.change(order[0], answer=whole())
    seen = {"/study": ann.client.get("/study")}
    for number in order:
        for address in (f"/study/item/{number}", f"/study/item/{number}/data"):
            seen[address] = ann.client.get(address)
    names = [each.name for each in ann.design.items] + [ann.design.run]
    for address, response in seen.items():
        assert response.status_code == 200, address
        assert "etag" not in response.headers
        assert "no-store" in response.headers["cache-control"]
        told = (response.text + str(response.headers)).lower()
        assert not [secret for secret in (*SECRETS, *names) if secret in told], address
    numbers = {number for each in seen.values() for number in re.findall(r"item/(\d+)", each.text)}
    assert numbers == set(order)
    for number in set(order):
        keys = seen[f"/study/item/{number}/data"].json().keys()
        assert keys == {"columns", "genes", "average", "samples", "cells"}


def test_a_repeat_looks_as_it_did_without_its_answer(tmp_path: Path, tokens: Tokens) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    again = next(each for each in ann.design.items if each.repeat_of)
    blank = ann.page(again.number)
    ann.change(again.repeat_of, answer=whole(process="yes", process_words="chemotaxis"))
    assert "chemotaxis" in ann.page(again.repeat_of)
    shown = [
        ann.client.get(f"/study/item/{n}/data").content for n in (again.repeat_of, again.number)
    ]
    assert shown[0] == shown[1]
    page = ann.page(again.number)
    assert "chemotaxis" not in page
    assert page.replace("<span id=\"answered\">1<", "<span id=\"answered\">0<").replace(
        'value="1">1<', 'value="0">0<') == blank  # fmt: skip


def test_raters_never_see_each_other(tmp_path: Path, tokens: Tokens, bob: str) -> None:
    ann, other = Rater(tmp_path, tokens["annabel"]), Rater(tmp_path, tokens[bob])
    number = ann.design.items[0].number
    ann.change(number, answer=whole(tissue="yes", tissue_words="zygote"))
    assert "zygote" in ann.page(number)
    assert "zygote" not in other.page(number)
    assert other.change(number, "undo").json()["version"] == 0
    assert "bob" not in ann.client.get("/study").text
    assert "annabel" not in other.client.get("/study").text


def test_a_token_opens_the_study_and_nothing_else(tmp_path: Path, tokens: Tokens) -> None:
    stranger = TestClient(study_cases.app(tmp_path), follow_redirects=False)
    assert stranger.get("/").text == "the explorer"
    ann = Rater(tmp_path, tokens["annabel"])
    cookie = ann.entered.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", tokens["annabel"]))
    assert (ann.entered.status_code, ann.entered.headers["location"]) == (303, "/study")
    owners = ("", "/answers.csv", "/history.csv", "/agreement.csv", "/figure.png")
    for address in ("/", "/data/feature/1/page", *(f"/study/owner/first{each}" for each in owners)):
        assert ann.client.get(address).status_code == 403, address
    number = ann.design.items[0].number
    for address in (f"/study/item/{number}", f"/study/item/{number}/data"):
        assert stranger.get(address).status_code == 403
    assert Rater(tmp_path, "x" * 32).entered.status_code == 403
    for nothing in ("123", "../first", "%2e%2e", "000000", "1" * 300):
        assert ann.client.get(f"/study/item/{nothing}").status_code == 404
    left = ann.client.post(
        "/study/leave",
        data={"csrf": re.search(r'name="csrf" value="(\w+)"', ann.client.get("/study").text)[1]},
    )
    assert "Max-Age=0" in left.headers["set-cookie"]
    assert ann.client.get("/").text == "the explorer"


def test_where_an_owners_token_is_asked_for_a_study_shows_strangers_nothing(
    tmp_path: Path, tokens: Tokens
) -> None:
    stranger = TestClient(study_cases.app(tmp_path, "the owner's"), follow_redirects=False)
    for address in ("/study", "/study/owner/first", "/study/owner/first/answers.csv"):
        assert stranger.get(address).status_code == 403
    assert stranger.get("/study/enter").status_code == 200
    stranger.cookies.set(safety.OWNER, "the owner's")
    assert stranger.get("/study/owner/first/answers.csv").status_code == 200
    assert stranger.get("/study/owner/second").status_code == 404


def test_changes_need_the_pages_own_token_and_form(tmp_path: Path, tokens: Tokens) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    number = ann.design.items[0].number
    address, good = f"/study/item/{number}/answer", {"answer": whole(), "base": 0, "save": "s" * 8}
    csrf = re.search(r'data-csrf="(\w+)"', ann.page(number))[1]

    def status(body: Any, token: str | None = csrf, to: str = address) -> int:
        headers = {"X-CSRF-Token": token} if token else {}
        return ann.client.post(to, content=body, headers=headers).status_code

    assert status(json.dumps(good), None) == 403
    assert status(json.dumps(good), "0" * 64) == 403
    assert status("no JSON") == 400
    assert status("[]") == 400
    for to in (address, address.replace("answer", "undo")):
        for change in (
            {"base": -1}, {"base": "0"}, {"base": True}, {"base": 2**63}, {"base": 10**30},
            {"save": ""}, {"save": "\ud800" * 8}, {"save": "ééééééééé"}, {"save": 10**9},
        ):  # fmt: skip
            assert status(json.dumps(good | change), csrf, to) == 400, change
        for body in ("[" * 100_000, '{"answer":' * 20_000, '{"base":' + "9" * 5000 + "}"):
            assert status(body, csrf, to) == 400
    assert status(json.dumps(good | {"pad": "x" * study_pages.MOST_BYTES})) == 413
    assert status(json.dumps(good | {"answer": {"kind": "x"}})) == 422
    assert status(json.dumps(good), csrf, "/study/item/1/answer") == 404
    assert study.open_answers(tmp_path, ann.design).history() == []
    assert status(json.dumps(good)) == 200
    assert ann.client.post("/study/enter", data={"token": tokens["annabel"]}).status_code == 403
    assert ann.client.post("/study/leave").status_code == 403


def test_undo_and_a_second_window(tmp_path: Path, tokens: Tokens) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    number = ann.design.items[0].number
    first = ann.change(number, answer=whole(tissue="yes", tissue_words="skin")).json()
    assert (first["version"], first["can_undo"], first["other"]) == (1, True, None)
    told = ann.change(number, answer=whole(tissue="yes", tissue_words="lung"), base=0).json()
    assert told["other"]["answer"]["tissue_words"] == "skin"
    back = ann.change(number, "undo", base=2).json()
    assert back["answer"]["tissue_words"] == "skin"
    assert 'value="skin"' in ann.page(number)
    assert 'data-version="3"' in ann.page(number)
    gone = ann.change(number, "undo", base=3).json()
    assert (gone["answer"], gone["can_undo"]) == ({}, False)
    assert 'value="skin"' not in ann.page(number)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_what_people_and_files_supply_is_text(tmp_path: Path, tokens: Tokens, bob: str) -> None:
    rater = Rater(tmp_path, tokens[bob])
    number = rater.design.items[0].number
    words = f'</textarea><script>alert(1)</script>{NASTY}" onfocus="alert(1)'
    rater.change(number, answer=whole(process="yes", process_words=words, tissue_words=words))
    owner = TestClient(study_cases.app(tmp_path))
    pages = [rater.client.get("/study"), rater.client.get(f"/study/item/{number}"),
             owner.get("/study"), owner.get("/study/owner/first")]  # fmt: skip
    for page in pages:
        tags = Tags(page.text).found
        assert NASTY not in page.text
        assert not [a for _, a in tags if any(name.startswith("on") for name in a)]
        assert not [a for tag, a in tags if tag == "img" and a["src"] == "x"]
        assert all(a.get("src", "").startswith("/static/") for tag, a in tags if tag == "script")
        assert "default-src 'self'" in page.headers["content-security-policy"]
    field = next(a for _, a in Tags(pages[1].text).found if a.get("name") == "tissue_words")
    assert field["value"] == words
    shown = rater.client.get(f"/study/item/{number}/data")
    assert shown.headers["content-type"] == "application/json"
    assert shown.headers["x-content-type-options"] == "nosniff"


def test_the_export_equals_what_was_typed(tmp_path: Path, tokens: Tokens, bob: str) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    order = ann.design.rater["annabel"].order
    typed = {
        order[0]: whole(cell_type="yes", cell_type_words='B, or "plasma"; =1+1'),
        order[1]: whole(tissue="yes", tissue_words="=1+1", process_words="'quoted'"),
        order[2]: whole(process="unclear", process_words="  zwei\nZeilen, é 細胞 🧬\t"),
    }
    for number, answer in typed.items():
        ann.change(number, answer=whole(process="yes"), base=0)
        ann.change(number, answer=answer, base=1)
    owner = TestClient(study_cases.app(tmp_path))
    sent = owner.get("/study/owner/first/answers.csv?raw=1")
    assert "first_answers_raw.csv" in sent.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(sent.content.decode(), newline="")))
    assert [(r["rater"], r["position"]) for r in rows] == [
        (rater, str(i + 1)) for rater in ("annabel", bob) for i in range(12)
    ]
    for row in rows:
        item = ann.design.item[row["item"]]
        assert (row["feature"], row["kind"]) == (item.name, item.kind)
        assert row["repeat_of"] == (item.repeat_of or "")
        expected = typed.get(row["item"], {}) if row["rater"] == "annabel" else {}
        for field in ("cell_type", "tissue", "process"):
            assert row[field] == expected.get(field, "")
            assert row[f"{field}_words"] == expected.get(f"{field}_words", "")
        assert row["complete"] == str(bool(expected))
    history = owner.get("/study/owner/first/history.csv").content.decode()
    history = list(csv.DictReader(io.StringIO(history, newline="")))
    assert [(r["version"], r["change"], r["process"]) for r in history] == [
        ("1", "save", "yes"), ("2", "save", "no"), ("1", "save", "yes"), ("2", "save", "no"),
        ("1", "save", "yes"), ("2", "save", "unclear"),
    ]  # fmt: skip


def test_no_cell_of_a_file_for_spreadsheets_runs(tmp_path: Path) -> None:
    token = study_cases.create(tmp_path, concepts=5, neurons=4, raters=("@ann",))["@ann"]
    ann = Rater(tmp_path, token)
    order = ann.design.rater["@ann"].order
    words = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "it's = fine", " =1", ""]
    for number, each in zip(order, words, strict=True):
        ann.change(number, answer=whole(tissue="yes", tissue_words=each))
    owner = TestClient(study_cases.app(tmp_path))

    def cells(name: str, column: str) -> list[str]:
        sent = owner.get(f"/study/owner/first/{name}").content.decode()
        return [row[column] for row in csv.DictReader(io.StringIO(sent, newline=""))]

    for name in ("answers.csv", "history.csv"):
        assert cells(f"{name}?raw=1", "tissue_words") == words
        expected = [f"'{each}" for each in words[:6]] + words[6:]
        assert cells(name, "tissue_words") == expected
        assert set(cells(name, "rater")) == {"'@ann"}
    assert "'@ann" in cells("agreement.csv", "rater")
    assert "'@ann" not in cells("agreement.csv?raw=1", "rater")
    page = owner.get("/study/owner/first").text
    assert page.count("for spreadsheets)") == page.count("exact words, for programs)") == 2


def test_a_full_disk_is_told_and_what_was_saved_can_be_read(tmp_path: Path, tokens: Tokens) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    number = ann.design.items[0].number
    assert ann.change(number, answer=whole(tissue="yes", tissue_words="skin")).status_code == 200
    log = tmp_path / "studies" / "first" / "answers.sqlite-wal"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # SQLite's log cannot grow: 'disk I/O error'
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, unlimited[1]))
        refused = [ann.change(number, what, answer=whole()) for what in ("answer", "undo")]
        page = ann.page(number)
        others = [
            ann.client.get("/study"), ann.client.get(f"/study/item/{number}/data"),
            TestClient(study_cases.app(tmp_path)).get("/study/owner/first/answers.csv"),
        ]  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    for each in refused:
        assert (each.status_code, each.text) == (507, study_pages.FULL)
    assert 'value="skin"' in page
    assert [each.status_code for each in others] == [200] * 3
    assert "skin" in others[-1].text
    assert ann.change(number, answer=whole(), base=1).json()["version"] == 2


def test_a_study_made_while_the_server_runs_opens_after_a_restart(
    tmp_path: Path, tokens: Tokens
) -> None:
    running = study_cases.app(tmp_path)
    drawn = study_draw.make(study_cases.Documents(), name="late", n_genes=10, concepts=5, neurons=4)
    ((_, late),) = study.write(tmp_path, *drawn)
    owner = TestClient(running, follow_redirects=False)
    page = {"Accept": "text/html"}
    told = owner.get("/study").text
    assert study_pages.RESTART in told.replace("<code>", "`").replace("</code>", "`")
    assert "/study/owner/late" not in told
    assert owner.get("/study/owner/late").text == study_pages.RESTART
    assert owner.get("/study/owner/late/answers.csv").status_code == 403
    assert owner.get("/study/owner/first").status_code == 200
    csrf = re.search(r'name="csrf" value="(\w+)"', owner.get("/study/enter").text)[1]
    entered = owner.post("/study/enter", data={"token": late, "csrf": csrf})
    assert (entered.status_code, entered.text) == (403, study_pages.RESTART)
    assert "set-cookie" not in entered.headers
    stale = TestClient(running, cookies={study_pages.COOKIE: late})
    for address in ("/study", f"/study/item/{drawn[0].items[0].number}"):
        for headers in ({}, page):
            refused = stale.get(address, headers=headers)
            assert refused.status_code == 403
            assert study_pages.RESTART in refused.text
    assert stale.get("/").status_code == 403
    again = TestClient(study_cases.app(tmp_path), cookies={study_pages.COOKIE: late})
    assert again.get("/study").status_code == 200


def test_no_page_of_a_rater_names_the_run(tmp_path: Path, tokens: Tokens) -> None:
    ann = Rater(tmp_path, tokens["annabel"])
    page, number = {"Accept": "text/html"}, ann.design.items[0].number
    shown = [
        ann.client.get(address, headers=page)
        for address in (
            "/study", "/study/enter", f"/study/item/{number}", "/study/item/1",
            "/study/item/1/data", "/study/nothing", "/study/leave", f"/study/item/{number}/answer",
            "/study/owner/first", "/study/owner/second/answers.csv",
        )
    ]  # fmt: skip
    shown += [ann.client.post(a, headers=page) for a in ("/study/enter", "/study", "/study/leave")]
    stranger = TestClient(study_cases.app(tmp_path))
    shown.append(stranger.get(f"/study/item/{number}", headers=page))
    (tmp_path / "studies" / "first" / "answers.sqlite").unlink()
    shown.append(ann.client.get(f"/study/item/{number}", headers=page))
    assert [each.status_code for each in shown] == [
        200, 200, 200, 404, 404, 404, 404, 404, 403, 403, 403, 404, 403, 403, 500,
    ]  # fmt: skip
    for each in shown:
        assert "text/html" in each.headers["content-type"]
        assert "hidden label" not in each.text
        assert str(tmp_path) not in each.text


def test_the_owners_report_follows_the_answers(tmp_path: Path, tokens: Tokens) -> None:
    owner = TestClient(study_cases.app(tmp_path))
    assert "No item has been answered yet" in owner.get("/study/owner/first").text
    assert owner.get("/study/owner/first/figure.png").status_code == 404
    assert owner.get("/study/owner/first/agreement.csv").text == "table\n"
    for rater, token in tokens.items():
        browser = Rater(tmp_path, token)
        for item in browser.design.items:
            said = "yes" if item.kind == "concept" and rater == "annabel" else "unclear"
            browser.change(item.number, answer=whole(process=said))
    page = owner.get("/study/owner/first").text
    assert page.count("12 of 12") == 2
    assert "majority" in page
    table = owner.get("/study/owner/first/agreement.csv").text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert {row["table"] for row in rows} == set(study_pages.TABLES)
    shares = {(r["rater"], r["kind"], r["counted"]): r["share"] for r in rows if r["share"]}
    assert (
        shares["annabel", "concept", "yes"]
        == shares["annabel", "neuron", "yes or unclear"]
        == "1.0"
    )
    assert shares["annabel", "neuron", "yes"] == shares["majority", "concept", "yes"] == "0.0"
    picture = owner.get("/study/owner/first/figure.png")
    assert picture.content.startswith(b"\x89PNG")


def test_a_damaged_study_is_refused_when_the_server_starts(tmp_path: Path, tokens: Tokens) -> None:
    (tmp_path / "studies" / "first" / "panels.json").write_text("{}")
    with pytest.raises(study.InputError, match="not what this study was made with"):
        study_cases.app(tmp_path)


def serve(state: Path) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "tests.analysis.browser.study_cases", str(state)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_server_killed_in_the_midst_has_every_acknowledged_answer(tmp_path: Path) -> None:
    names = tuple(f"rater {i}" for i in range(RATERS))
    tokens = study_cases.create(tmp_path, concepts=3, neurons=3, repeats=2, raters=names)
    design = study.load(tmp_path, "first")
    secret, session = safety.secret(tmp_path), "0" * 32
    headers = {
        "X-CSRF-Token": safety._signed(secret, session), "Content-Type": "application/json",
    }  # fmt: skip
    process, port = serve(tmp_path)
    server = {"port": port}
    acknowledged: dict[str, dict[str, dict]] = {name: {} for name in names}
    errors: list[str] = []

    def save(rater: str, number: str, body: dict) -> dict | None:
        """What the server acknowledged; None if it went away."""
        cookie = f"{study_pages.COOKIE}={tokens[rater]}; {safety.SESSION}={session}"
        connection = http.client.HTTPConnection("127.0.0.1", server["port"], timeout=30)
        try:
            connection.request("POST", f"/study/item/{number}/answer", json.dumps(body),
                               headers | {"Cookie": cookie})  # fmt: skip
            response = connection.getresponse()
            told = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status != 200:
            errors.append(f"{response.status} {told[:200]!r}")
            return None
        return json.loads(told)

    def rate(rater: str) -> None:
        order, versions = design.rater[rater].order, dict.fromkeys(design.item, 0)
        for i in range(SAVES):
            number = order[i % len(order)]
            answer = whole(process="yes", process_words=f"{rater} says {i}")
            body = {"answer": answer, "base": versions[number], "save": f"{rater} {i:04d}"}
            while (told := save(rater, number, body)) is None and not errors:
                time.sleep(0.05)
            if errors:
                return
            versions[number] = told["version"]
            acknowledged[rater][body["save"]] = told

    threads = [threading.Thread(target=rate, args=(name,)) for name in names]
    try:
        for thread in threads:
            thread.start()
        for part in (0.3, 0.7):
            while sum(map(len, acknowledged.values())) < part * RATERS * SAVES and not errors:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, server["port"] = serve(tmp_path)
        for thread in threads:
            thread.join()
    finally:
        process.kill()
        process.wait()
    assert errors == []
    answers = study.open_answers(tmp_path, design)  # checks the file's integrity
    kept = {(row["rater"], row["item"], row["version"]): row for row in answers.history()}
    assert len(kept) == RATERS * SAVES  # nothing lost, and no request that was repeated added twice
    for rater, all_told in acknowledged.items():
        assert len(all_told) == SAVES
        for told in all_told.values():
            words = told["answer"]["process_words"]
            number = design.rater[rater].order[int(words.split()[-1]) % len(design.items)]
            row = kept[rater, number, told["version"]]
            assert (row["answer"], row["at"]) == (told["answer"], told["at"])
            assert told["other"] is None
