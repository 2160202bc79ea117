"""The web page, used in a real browser as people do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_ARGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_WAIT_MS = 60_000
_TEXT = (
    "lampreader is a small viewer for log files. It follows files as they grow, marks lines that "
    "match a pattern and folds the ones that repeat. It runs in a terminal and needs no setup."
)
# Keeps what was shown along the way, however quickly it went by.
_RECORD = """() => {
  window.seen = [];
  const note = () => window.seen.push({
    status: document.getElementById("status").textContent,
    progress: document.getElementById("progress").hidden ? null
      : [document.getElementById("progress").value, document.getElementById("progress").max],
  });
  new MutationObserver(note).observe(document.getElementById("result"),
    { subtree: true, childList: true, characterData: true, attributes: true });
}"""
# Answers the page's request with given bytes, one byte at a time.
_DRIP = """bytes => {
  const fetched = window.fetch;
  window.fetch = (path, options) => path !== "v1/summarize" ? fetched(path, options)
    : Promise.resolve(new Response(new ReadableStream({
        async start(controller) {
          for (const byte of bytes) {
            controller.enqueue(new Uint8Array([byte]));
            await null;
          }
          controller.close();
        },
      }), { headers: { "Content-Type": "text/event-stream" } }));
}"""
_ANSWER: dict[str, Any] = {
    "id": "sum-1",
    "model": {"name": "demo", "revision": "0123456789ab"},
    "summary": "Grüße 👋",
    "truncated": True,
    "finish_reason": "max_new_tokens",
    "chunks": [],
    "usage": {
        "input_tokens": 1234,
        "output_tokens": 1,
        "chunks": 1,
        "queue_ms": 1.25,
        "compute_ms": 2500.0,
        "total_ms": 2501.25,
    },
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if _CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed, and CI must test the page")
        pytest.skip("Chromium is not installed (looked for chromium and chromium-browser)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def console() -> list[str]:
    """Errors of the page and its console, violations of the Content-Security-Policy included."""
    return []


@pytest.fixture
def blank(browser: Browser, console: list[str]) -> Iterator[Page]:
    """A tab that has not gone anywhere yet. In the end, no script may have failed in it."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(_WAIT_MS)
    expect.set_options(timeout=_WAIT_MS)
    page.on("console", lambda said: console.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    yield page
    context.close()
    # Chromium itself reports every answer with an error status.
    assert [said for said in console if not said.startswith("Failed to load resource")] == []


@pytest.fixture
def page(blank: Page, service: Any) -> Page:
    """The page, with a valid token."""
    blank.goto(f"{service.url}/#token={service.token}")
    expect(blank.locator("#model")).to_be_visible()
    return blank


def _ask(service: Any, **body: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {service.token}"}
    answer = httpx.post(f"{service.url}/v1/summarize", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def _long_text(sentences: int) -> str:
    return " ".join(
        f"Module {n} of the toolkit reads files of format {n} and writes a report about them."
        for n in range(sentences)
    )


def _tab_to(target: Locator) -> None:
    for _ in range(40):
        if target.evaluate("element => element === document.activeElement"):
            return
        target.page.keyboard.press("Tab")
    pytest.fail("not reached with the Tab key")


def _frame(name: str, data: dict[str, Any], newline: str = "\n") -> str:
    # Indented, so that the data takes several lines.
    lines = json.dumps(data, ensure_ascii=False, indent=1).split("\n")
    return newline.join([f"event: {name}", *(f"data: {line}" for line in lines), "", ""])


def test_summary_is_that_of_the_api(page: Page, service: Any) -> None:
    page.locator("#text").fill(_TEXT)
    expect(page.locator("#count")).to_have_text(
        f"{len(_TEXT.split())} words · {len(_TEXT)} characters"
    )
    page.keyboard.press("Control+Enter")
    expect(page.locator("#facts")).to_be_visible()
    answer = _ask(service, text=_TEXT)
    expect(page.locator("#summary")).to_have_text(answer["summary"])
    expect(page.locator("#summary")).to_have_attribute("aria-busy", "false")
    facts = page.locator("#facts")
    expect(facts).to_contain_text(f"{answer['usage']['input_tokens']} tokens")
    expect(facts).to_contain_text(answer["model"]["revision"][:12])
    expect(facts).to_contain_text(answer["finish_reason"])
    expect(page.locator("#copy")).to_be_visible()


def test_nothing_is_refused_by_the_browser(blank: Page, service: Any, console: list[str]) -> None:
    blank.goto(f"{service.url}/#token={service.token}")
    expect(blank.locator("#model")).to_be_visible()
    blank.locator("#example").click()
    blank.locator("#go").click()
    expect(blank.locator("#facts")).to_be_visible()
    blank.get_by_role("link", name="API docs").click()
    expect(blank.locator(".swagger-ui .opblock").first).to_be_visible()
    assert console == []


def test_works_under_a_path_prefix(blank: Page, service: Any) -> None:
    asked: list[str] = []

    def forward(route: Route) -> None:
        path = route.request.url.removeprefix(service.url)
        asked.append(path)
        route.continue_(url=service.url + path.removeprefix("/some/prefix"))

    blank.route("**/*", forward)
    blank.goto(f"{service.url}/some/prefix/#token={service.token}")
    expect(blank.locator("#model")).to_be_visible()
    blank.locator("#text").fill(_TEXT)
    blank.locator("#go").click()
    expect(blank.locator("#facts")).to_be_visible()
    assert "/some/prefix/v1/summarize" in asked
    assert [path for path in asked if not path.startswith("/some/prefix/")] == []


def test_wrong_token_then_the_right_one(blank: Page, service: Any) -> None:
    blank.goto(f"{service.url}/#token=wrong")
    field = blank.get_by_label("Access token")
    expect(field).to_be_visible()
    expect(blank.locator("#token-problem")).to_contain_text("did not accept")
    assert "wrong" not in blank.url
    field.fill("wrong-again")
    field.press("Enter")
    expect(field).to_be_focused()
    field.fill(service.token)
    field.press("Enter")
    expect(field).to_be_hidden()
    blank.locator("#text").fill(_TEXT)
    blank.locator("#go").click()
    expect(blank.locator("#facts")).to_be_visible()
    blank.reload()
    expect(blank.locator("#model")).to_be_visible()
    expect(field).to_be_hidden()


def test_no_token_is_asked_for_quietly(blank: Page, service: Any) -> None:
    blank.goto(service.url)
    expect(blank.get_by_label("Access token")).to_be_visible()
    expect(blank.locator("#token-problem")).to_be_empty()


def test_a_token_that_expires_is_asked_for_and_the_request_repeated(
    page: Page, service: Any
) -> None:
    page.route("**/v1/summarize", lambda route: route.fulfill(status=401, json={}), times=1)
    page.locator("#text").fill(_TEXT)
    page.keyboard.press("Control+Enter")
    field = page.get_by_label("Access token")
    expect(field).to_be_focused()
    field.fill(service.token)
    field.press("Enter")
    expect(page.locator("#summary")).to_have_text(_ask(service, text=_TEXT)["summary"])


def test_long_text_shows_progress_and_its_parts(page: Page, service: Any) -> None:
    text = _long_text(150)
    page.evaluate(_RECORD)
    page.locator("#text").fill(text)
    page.locator("#go").click()
    expect(page.locator("#facts")).to_be_visible()
    answer = _ask(service, text=text)
    count = len(answer["chunks"])
    assert count > 2
    seen = page.evaluate("window.seen")
    assert f"Part 1 of {count} summarized" in [moment["status"] for moment in seen]
    assert [count - 1, count] in [moment["progress"] for moment in seen]
    expect(page.locator("#progress")).to_be_hidden()
    page.locator("#parts-title").click()
    expect(page.locator("#parts-title")).to_have_text(
        f"Summaries of the parts ({count} of {count})"
    )
    shown = page.locator("#part-list li p:last-child").all_text_contents()
    assert shown == [chunk["summary"] or "(nothing)" for chunk in answer["chunks"]]


def test_stop(page: Page) -> None:
    page.locator("#text").fill(_long_text(4000))
    page.locator("#go").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#go")).to_be_focused()
    expect(page.locator("#facts")).to_be_hidden()
    page.locator("#text").fill(_TEXT)
    page.locator("#go").click()
    expect(page.locator("#facts")).to_be_visible()


def test_a_file_dropped(page: Page) -> None:
    transfer = page.evaluate_handle(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["Käse, dropped"], "a.txt", { type: "text/plain" }));
          return transfer;
        }"""
    )
    page.dispatch_event("#text", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#form")).to_have_class(re.compile("dropping"))
    page.dispatch_event("#text", "drop", {"dataTransfer": transfer})
    expect(page.locator("#text")).to_have_value("Käse, dropped")
    expect(page.locator("#form")).not_to_have_class(re.compile("dropping"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_a_file_chosen(page: Page, encoding: str) -> None:
    content = {"name": "a.txt", "mimeType": "text/plain", "buffer": "Käse".encode(encoding)}
    page.set_input_files("#file", content)  # type: ignore[arg-type]
    expect(page.locator("#text")).to_have_value("Käse")


def test_a_file_that_is_no_text(page: Page) -> None:
    content = {"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG\0\0"}
    page.set_input_files("#file", content)  # type: ignore[arg-type]
    expect(page.get_by_role("alert").filter(has_text="a.png")).to_contain_text("not a text file")
    expect(page.locator("#text")).to_have_value("")


def test_keyboard_alone(page: Page, service: Any) -> None:
    _tab_to(page.get_by_role("button", name="Try an example"))
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    text = page.locator("#text").input_value()
    _tab_to(page.get_by_label("The model’s own"))
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("One sentence")).to_be_checked()
    _tab_to(page.locator("#advanced summary"))
    page.keyboard.press("Space")
    _tab_to(page.get_by_label("Beams"))
    page.keyboard.type("2")
    _tab_to(page.get_by_role("button", name="Summarize"))
    page.keyboard.press("Space")
    expect(page.locator("#facts")).to_be_visible()
    answer = _ask(service, text=text, num_beams=2, length={"sentences": 1})
    expect(page.locator("#summary")).to_have_text(answer["summary"])
    _tab_to(page.locator("#copy"))
    page.keyboard.press("Enter")
    expect(page.locator("#copy")).to_have_text("Copied")


def test_a_word_limit_is_kept(page: Page) -> None:
    page.locator("#text").fill(_TEXT)
    page.get_by_label("Most words").fill("2")
    expect(page.locator("#by-words")).to_be_checked()
    page.get_by_label("Most words").press("Enter")
    expect(page.locator("#facts")).to_be_visible()
    assert len(page.locator("#summary").inner_text().split()) <= 2


def test_every_field_error_is_shown(page: Page) -> None:
    page.locator("#text").fill(_TEXT)
    page.locator("#advanced summary").click()
    page.get_by_label("Beams").fill("0")
    page.locator("#advanced summary").click()
    page.get_by_label("Most words").fill("0")
    page.locator("#go").click()
    problem = page.get_by_role("alert").filter(has_text="Invalid request")
    expect(problem.locator("li")).to_have_count(2)
    expect(problem).to_contain_text("num_beams: Input should be greater than or equal to 1")
    expect(problem).to_contain_text("length.words: Input should be greater than or equal to 1")
    expect(page.get_by_label("Beams")).to_be_visible()
    expect(page.get_by_label("Beams")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Beams").fill("1")
    page.get_by_label("Most words").fill("9")
    page.locator("#go").click()
    expect(page.locator("#facts")).to_be_visible()
    expect(page.locator("#problem")).to_be_empty()


def test_an_empty_text_is_explained(page: Page) -> None:
    expect(page.locator("#go")).to_have_attribute("aria-disabled", "true")
    expect(page.locator("#go-hint")).to_contain_text("Put a text in first")
    page.locator("#go").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#status")).to_be_empty()


def test_overload_tells_when_to_come_back(page: Page) -> None:
    document = {"title": "Overloaded", "detail": "the queue is full", "request_id": "abc"}
    page.route(
        "**/v1/summarize",
        lambda route: route.fulfill(
            status=503,
            body=json.dumps(document),
            headers={"Content-Type": "application/problem+json", "Retry-After": "12"},
        ),
    )
    page.locator("#text").fill(_TEXT)
    page.locator("#go").click()
    problem = page.locator("#problem")
    expect(problem).to_contain_text("the queue is full")
    expect(problem).to_contain_text("Try again in 12 seconds.")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_byte_by_byte(page: Page, newline: str) -> None:
    start = {"id": "sum-1", "model": _ANSWER["model"], "chunks": 1}
    stream = (
        f": ping{newline}{newline}"
        + _frame("start", start, newline)
        + _frame("delta", {"text": "Grüße "}, newline)
        + _frame("delta", {"text": "👋"}, newline)
        + _frame("done", _ANSWER, newline)
    )
    page.evaluate(_DRIP, list(stream.encode()))
    page.locator("#text").fill(_TEXT)
    page.locator("#go").click()
    expect(page.locator("#facts")).to_contain_text("1,234 tokens")
    expect(page.locator("#facts")).to_contain_text("1 token")
    expect(page.locator("#facts")).to_contain_text("2.5 s")
    expect(page.locator("#summary")).to_have_text("Grüße 👋")
    expect(page.locator("#cut")).to_be_visible()


def test_a_connection_that_breaks_is_an_error(page: Page) -> None:
    start = {"id": "sum-1", "model": _ANSWER["model"], "chunks": 1}
    stream = _frame("start", start) + _frame("delta", {"text": "Half of a"})
    page.evaluate(_DRIP, list((stream + _frame("done", _ANSWER)[:-1]).encode()))
    page.locator("#text").fill(_TEXT)
    page.locator("#go").click()
    expect(page.locator("#problem")).to_contain_text("The connection broke")
    expect(page.locator("#summary")).to_have_text("Half of a")
    expect(page.locator("#facts")).to_be_hidden()


def test_an_error_event_is_shown(page: Page) -> None:
    start = {"id": "sum-1", "model": _ANSWER["model"], "chunks": 1}
    problem = {"title": "Deadline exceeded", "detail": "the deadline passed", "request_id": "r-1"}
    page.evaluate(_DRIP, list((_frame("start", start) + _frame("error", problem)).encode()))
    page.locator("#text").fill(_TEXT)
    page.locator("#go").click()
    expect(page.locator("#problem")).to_contain_text("the deadline passed")
    expect(page.locator("#problem")).to_contain_text("r-1")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_curl_command_survives_the_shell(page: Page, service: Any) -> None:
    text = "It's `here` \"$HOME\" \\n !!\nsecond line 👋 '; exit 1; '"
    page.locator("#text").fill(text)
    page.get_by_label("One sentence").check()
    page.locator("#curl-box summary").click()
    expect(page.locator("#curl")).to_contain_text("curl")
    command = page.locator("#curl").inner_text()
    assert service.token not in command
    script = f'curl() {{ printf "%s\\0" "$@"; }}\n{command}'
    shell = subprocess.run(
        ["sh", "-c", script],
        env={"T5_SERVE_TOKEN": "a-token"},
        stdout=subprocess.PIPE,
        check=True,
    )
    arguments = shell.stdout.decode().split("\0")
    assert arguments[0] == f"{service.url}/v1/summarize"
    assert "Authorization: Bearer a-token" in arguments
    sent = json.loads(arguments[arguments.index("--data") + 1])
    assert sent == {"text": text, "length": {"sentences": 1}}


def test_curl_command_of_a_long_text_reads_a_file(page: Page, service: Any) -> None:
    page.locator("#text").fill(_long_text(100))
    page.get_by_label("Most words").fill("9")
    page.locator("#curl-box summary").click()
    command = page.locator("#curl")
    expect(command).to_contain_text(f"'{service.url}/v1/summarize?words=9'")
    expect(command).to_contain_text("--data-binary @text.txt")


# Each sets `ran` if it is taken for markup, or asks for something that is not of the page.
_MARKUP = (
    "<script>ran = 1</script><img src=x onerror='ran = 1'><svg onload='ran = 1'></svg>"
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe><a href='javascript:ran = 1'>a</a>"
    "</p></section><style>body { display: none }</style><base href='//evil.example/'>&lt;b&gt;"
)
_ELEMENTS = "body script, img, svg[onload], iframe, base, style, a[href^=javascript]"


@pytest.fixture(params=[False, True], ids=["as served", "without its policy"])
def guarded(request: pytest.FixtureRequest, browser: Browser, service: Any) -> Iterator[Page]:
    """The page; without its policy nothing but its own code keeps markup from being run."""
    context = browser.new_context(bypass_csp=request.param)
    page = context.new_page()
    page.set_default_timeout(_WAIT_MS)
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(f"{service.url}/#token={service.token}")
    expect(page.locator("#model")).to_be_visible()
    elements = page.locator(_ELEMENTS).count()
    yield page
    assert page.evaluate("typeof ran") == "undefined"
    assert page.locator(_ELEMENTS).count() == elements
    assert [url for url in asked if not url.startswith(service.url)] == []
    assert page.url == f"{service.url}/"
    context.close()


def test_markup_in_a_text_is_text(guarded: Page, service: Any) -> None:
    text = f"{_TEXT} {_MARKUP}"
    guarded.locator("#text").fill(text)
    guarded.locator("#curl-box summary").click()
    guarded.locator("#go").click()
    expect(guarded.locator("#facts")).to_be_visible()
    expect(guarded.locator("#summary")).to_have_text(_ask(service, text=text)["summary"])
    expect(guarded.locator("#curl")).to_contain_text("<script>ran = 1</script>")


def test_markup_in_a_stream_is_text(guarded: Page) -> None:
    part = {"index": 0, "chunks": 2, "start": 0, "end": 9, "summary": _MARKUP}
    answer = {
        **_ANSWER,
        "model": {"name": _MARKUP, "revision": "<b>0123"},
        "summary": _MARKUP,
        "finish_reason": _MARKUP,
        "chunks": [part],
    }
    events = [
        ("start", {"id": "sum-1", "model": answer["model"], "chunks": 2}),
        ("chunk", part),
        *(("delta", {"text": piece}) for piece in re.findall(".{1,7}", _MARKUP)),
        ("done", answer),
    ]
    stream = "".join(_frame(name, data) for name, data in events)
    guarded.evaluate(_DRIP, list(stream.encode()))
    guarded.locator("#text").fill(_TEXT)
    guarded.locator("#go").click()
    expect(guarded.locator("#facts")).to_contain_text("<b>0123")
    assert guarded.locator("#summary").text_content() == _MARKUP
    guarded.locator("#parts-title").click()
    assert guarded.locator("#part-list li p:last-child").all_text_contents() == [_MARKUP]


def test_markup_in_an_error_is_text(guarded: Page) -> None:
    problem = {
        "type": "urn:t5-serve:problem:invalid",
        "title": _MARKUP,
        "status": 422,
        "detail": _MARKUP,
        "request_id": _MARKUP,
        "errors": [{"field": _MARKUP, "message": _MARKUP}],
    }
    guarded.evaluate(_DRIP, list(_frame("error", problem).encode()))
    guarded.locator("#text").fill(_TEXT)
    guarded.locator("#go").click()
    expect(guarded.get_by_role("alert").first).to_contain_text("<script>ran = 1</script>")


def test_the_browser_runs_no_script_but_the_pages(browser: Browser, service: Any) -> None:
    # A tab whose console has errors: they are what this looks for.
    page = browser.new_page()
    console: list[str] = []
    page.on("console", lambda said: console.append(said.text))
    response = page.goto(f"{service.url}/#token={service.token}")
    assert response is not None
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    expect(page.locator("#model")).to_be_visible()
    # As if the page had taken markup for its own.
    page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", _MARKUP)
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "ran = 1";
      document.body.append(script);
    }""")
    expect(page.locator("img[src=x]")).to_be_attached()
    assert page.evaluate("typeof ran") == "undefined"
    assert any("Content Security Policy" in said for said in console)
    page.close()
