"""The page of `qtool serve` in a browser, against a running server: what it shows, that it asks
nobody else, and that no answer becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server import start_server, wait_until

import qtool

PAGE = (Path(qtool.__file__).parent / "serve" / "http" / "page.html").read_text(encoding="utf-8")
HOSTILE = (
    "<img src=x "
    "onerror=\"document.title='lost'\"><script>document.title='lost'</script>\n```html\n<b>bold</b>\n```\nand the end"
)
LONG_LINE = "x" * 300
pytestmark = pytest.mark.xdist_group("serve")  # one server for all
JSON = {"content-type": "application/json"}
PATIENCE_MS = 60_000  # a busy machine is no failure


def test_the_policy_names_the_style_and_the_script_of_the_page():
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', PAGE)[1]
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert {
        "default-src 'none'",
        "connect-src 'self'",
        "require-trusted-types-for 'script'",
    } <= set(policy.split("; "))


def test_the_page_is_one_small_file_that_makes_no_markup():
    assert len(PAGE.encode()) < 44_000
    assert not re.search(
        r"https?://|url\(|@import|\bimport\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(",
        PAGE,
    )


# From here on in a browser.


@pytest.fixture
def visit(browser, served) -> Iterator[Callable[..., Any]]:
    """A function that opens the page, ready to answer.

    What the browser complains of, but ``refusals``, or asks of others fails the test.
    """
    complaints: list[str] = []

    def note(message: Any, refusals: tuple[int, ...]) -> None:
        if not any(
            message.text.startswith(
                f"Failed to load resource: the server responded with a status of {status} "
            )
            for status in refusals
        ):
            complaints.append(f"{message.type}: {message.text}")

    def open_page(
        *,
        refusals: tuple[int, ...] = (),
        change: Callable[[Any], None] | None = None,
        **context: Any,
    ) -> Any:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: note(message, refusals))
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((f"{served.url}/", "data:,"))
                or complaints.append(f"request: {request.url}")
            ),
        )
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        if change:
            change(page)
        page.goto(served.url)
        page.get_by_role("status").get_by_text("ready").wait_for()
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert complaints == []


def asking_also(**fields: Any) -> Callable[[Any], None]:
    """Return what makes the requests of a page for answers have ``fields`` too."""

    def add(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

    return lambda page: page.route("**/v1/**", add)


def answered_with(status: int, path: str, **reply: Any) -> Callable[[Any], None]:
    """Return what makes a page get that answer from ``path``, once."""
    return lambda page: page.route(
        f"**{path}", lambda route: route.fulfill(status=status, **reply), times=1
    )


def events(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def send(page: Any, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def ask(page: Any, text: str) -> Any:
    """Send ``text`` and return what stands there when the answer is complete."""
    send(page, text)
    return last(page)


def last(page: Any) -> Any:
    page.locator(".exchange:last-child .answer:not([aria-busy])").wait_for()
    return page.locator(".exchange").last


def text_of(exchange: Any) -> str:
    return exchange.locator(".answer .text").inner_text()


def until(page: Any, condition: str) -> None:
    """Wait for a JavaScript expression to be true; playwright's own way is one that the page's
    policy forbids.
    """
    end = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"waited in vain for {condition}"
        page.wait_for_timeout(20)


def width_of(page: Any) -> int:
    return page.evaluate(
        "Math.max(document.documentElement.scrollWidth, document.querySelector('#log').scrollWidth)"
    )


def test_the_facts_of_the_server_are_shown(visit, served):
    page = visit()
    info = httpx.get(f"{served.url}/get_server_info").json()
    facts = page.locator("#facts").inner_text()
    assert (
        info["quantization"] in facts
        and f"{info['context_length']:,} tokens" in facts
        and f"{info['max_total_num_tokens']:,} tokens" in facts
    )
    assert re.search(r"Weights\s+[\d.]+ [kMG]B", facts)
    assert (
        page.get_by_role("heading", level=1).inner_text()
        == Path(info["served_model_name"]).name
        == page.title().removesuffix(" – qtool serve")
    )
    assert re.search(
        r"\d running, \d waiting, KV cache \d+\.\d% in use", page.locator("#load").inner_text()
    )


def test_an_answer_is_shown_as_it_came_with_its_numbers(visit):
    bodies = []

    def look(route: Any) -> None:
        response = route.fetch(
            post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True})
        )
        bodies.append(response.text())
        route.fulfill(response=response)

    page = visit(change=lambda page: page.route("**/v1/chat/completions", look))
    page.get_by_label("Max tokens").fill("48")
    exchange = ask(page, "def main():")
    chunks = [json.loads(line) for line in re.findall(r"^data: (\{.*)", bodies[0], re.MULTILINE)]
    answer = "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )
    assert answer.split() == text_of(exchange).split() != []
    assert re.search(
        r"cut at the token limit · [\d,]+ tokens in, 48 out · [\d.]+ tokens/s · first token after [\d.]+ m?s",
        exchange.inner_text(),
    )
    assert re.fullmatch(r"[\d.]+tokens/s", page.locator("#speed").text_content())


def test_settings_and_the_conversation_are_sent(visit):
    page = visit(change=asking_also(ignore_eos=True))
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in {
        "Temperature": "0.5",
        "Top p": "0.9",
        "Max tokens": "8",
        "Seed": "7",
    }.items():
        page.get_by_label(label).fill(value)
    ask(page, "one")
    page.get_by_label("Seed").fill("")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "two")
    sent = request.value.post_data_json
    assert [message["role"] for message in sent["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert [sent["messages"][index]["content"] for index in (0, 1, 3)] == [
        "Be brief.",
        "one",
        "two",
    ]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (
        0.5,
        0.9,
        8,
    ) and "seed" not in sent
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".exchange").count() == 0
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "three")
    assert len(request.value.post_data_json["messages"]) == 2


def test_plain_text_is_continued(visit):
    page = visit(change=asking_also(ignore_eos=True))
    page.get_by_label("Send as").select_option("text")
    page.get_by_label("Max tokens").fill("8")
    with page.expect_request("**/v1/completions") as request:
        exchange = ask(page, "import os\n")
    assert request.value.post_data_json["prompt"] == "import os\n"
    assert text_of(exchange)


def test_a_new_line_is_not_sent(visit):
    page = visit()
    page.locator("#text").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert (
        page.locator("#text").input_value() == "one\ntwo" and page.locator(".exchange").count() == 0
    )


@pytest.mark.parametrize("by", ["Escape", "the button", "New chat"])
def test_a_stream_is_stopped(visit, served, by):
    page = visit(change=asking_also(ignore_eos=True, max_tokens=1800))
    send(page, "def main():")
    until(page, "document.querySelector('.answer[aria-busy] .text').textContent.length > 20")
    if by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop" if by == "the button" else by).click()
    if by == "New chat":
        assert page.locator(".exchange").count() == 0
    else:
        exchange = last(page)
        assert re.search(
            r"stopped · [\d,]+ tokens in, [\d,]+ out", exchange.inner_text()
        ) and text_of(exchange)
    assert page.locator("#send").is_visible() and page.locator("#text").evaluate(
        "element => element === document.activeElement"
    )
    end = time.monotonic() + PATIENCE_MS / 1000
    while httpx.get(f"{served.url}/get_server_info").json()["internal_states"][0].get("running", 1):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_looks_like_html_stays_text(visit):
    pattern = re.sub(r"([.\[\](){}*+?^$|\\])", r"\\\1", HOSTILE)
    page = visit(change=asking_also(regex=pattern, temperature=0))
    title = page.title()
    exchange = ask(page, HOSTILE)
    for said in (exchange.locator(".prompt .text"), exchange.locator(".answer .text")):
        assert said.locator("> div").all_inner_texts() == [
            HOSTILE.partition("\n")[0],
            "and the end",
        ]
        assert said.locator("pre code").all_inner_texts() == ["<b>bold</b>"]
    assert exchange.locator("img, script, b").count() == 0 and page.title() == title


def test_a_refused_setting_is_shown_at_its_field_and_can_be_mended(visit):
    page = visit(refusals=(400,))
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Temperature").fill("-1")
    exchange = ask(page, "hello")
    assert "temperature" in exchange.locator(".problem").inner_text()
    assert "left out of what is sent next" in exchange.inner_text()
    assert page.get_by_label("Temperature").get_attribute("aria-invalid") == "true"
    page.get_by_label("Temperature").fill("0")
    exchange.get_by_role("button", name="Try again").click()
    assert last(page).locator(".problem").is_hidden() and page.locator(".exchange").count() == 1
    page.get_by_label("Max tokens").fill("1.5")
    assert "Max tokens is not a whole number" in ask(page, "hello").locator(".problem").inner_text()


def test_a_busy_server_is_named_with_the_time_to_wait(visit):
    error = {
        "message": "the queue is full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    page = visit(
        refusals=(429,),
        change=answered_with(
            429, "/v1/chat/completions", json={"error": error}, headers={"Retry-After": "3"}
        ),
    )
    problem = ask(page, "hello").locator(".problem").inner_text()
    assert "the queue is full" in problem and "queue_full" in problem and "wait 3 s" in problem


@pytest.mark.parametrize(
    "tail, said",
    [
        ([{"error": {"message": "a step failed"}}], "a step failed"),
        ([], "The connection ended before the answer did"),
    ],
)
def test_an_answer_that_breaks_off_keeps_its_text_and_says_why(visit, tail, said):
    body = events({"choices": [{"delta": {"content": "half an"}}]}, *tail)
    exchange = ask(
        visit(
            change=answered_with(
                200, "/v1/chat/completions", body=body, content_type="text/event-stream"
            )
        ),
        "hello",
    )
    assert text_of(exchange) == "half an" and said in exchange.locator(".problem").inner_text()


def test_a_model_without_a_chat_template_continues_the_text(visit):
    error = {
        "message": "the model has no chat template",
        "type": "invalid_request_error",
        "param": None,
        "code": "no_chat_template",
    }
    page = visit(
        refusals=(400,), change=answered_with(400, "/v1/chat/completions", json={"error": error})
    )
    page.get_by_label("Max tokens").fill("8")
    exchange = ask(page, "import os")
    assert "no chat template" in exchange.inner_text() and exchange.locator(".problem").is_hidden()
    assert page.get_by_label("Send as").input_value() == "text"


def test_a_key_is_asked_for_and_kept_for_the_session_only(visit):
    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(
                status=401,
                json={
                    "error": {
                        "message": "this server needs a key",
                        "type": "authentication_error",
                        "param": None,
                        "code": None,
                    }
                },
            )

    page = visit(
        refusals=(401,),
        change=lambda page: (
            page.route("**/v1/**", guard),
            page.route("**/get_server_info", guard),
        ),
    )
    page.get_by_label("Max tokens").fill("8")
    assert "this server needs a key" in ask(page, "hello").locator(".problem").inner_text()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The server refused this API key").wait_for()
    page.get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    page.locator("#key-form").wait_for(state="hidden")
    page.locator("#facts dd").first.wait_for()
    assert last(page).locator(".problem").is_hidden()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [
        0,
        "",
        1,
    ]


def test_scrolling_up_is_not_fought(visit):
    page = visit(
        viewport={"width": 900, "height": 500}, change=asking_also(ignore_eos=True, max_tokens=1800)
    )
    send(page, "def main():")
    until(page, "document.querySelector('#log').scrollTop > 400")
    page.locator("#log").hover()
    page.mouse.wheel(0, -300)
    newest = page.get_by_role("button", name="Newest")
    newest.wait_for()
    place, length = page.evaluate(
        "[document.querySelector('#log').scrollTop, document.querySelector('.answer "
        ".text').textContent.length]"
    )
    until(page, f"document.querySelector('.answer .text').textContent.length > {length + 200}")
    assert page.evaluate("document.querySelector('#log').scrollTop") == place
    newest.click()
    until(
        page,
        "(log => log.scrollHeight - log.clientHeight - log.scrollTop < "
        "8)(document.querySelector('#log'))",
    )
    page.keyboard.press("Escape")
    last(page)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1600, "dark")])
def test_the_page_is_never_wider_than_the_window(visit, width, scheme):
    body = (
        events(
            {"choices": [{"delta": {"content": f"{LONG_LINE}\n```{LONG_LINE}\n{LONG_LINE}\n```"}}]}
        )
        + "data: [DONE]\n\n"
    )
    change = answered_with(200, "/v1/chat/completions", body=body, content_type="text/event-stream")
    page = visit(viewport={"width": width, "height": 800}, color_scheme=scheme, change=change)
    assert width_of(page) <= width
    assert LONG_LINE in text_of(ask(page, LONG_LINE))
    assert width_of(page) <= width
    if width < 900:
        page.get_by_role("button", name="Model and settings").click()
        assert page.get_by_label("Temperature").is_visible() and width_of(page) <= width
        page.keyboard.press("Escape")
    assert page.get_by_label("Temperature").is_visible() == (width >= 900)


def chunk(tokens: int, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": usage}


def test_thoughts_are_folded_and_calls_get_their_results(visit):
    call = {"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}
    reply = events(
        chunk(0, role="assistant", content=""),
        *(chunk(number, reasoning_content=f"thought {number} ") for number in range(1, 9)),
        chunk(9, content="Let me look."),
        chunk(10, tool_calls=[call]),
        chunk(11, tool_calls=[rest]),
        chunk(11, "tool_calls"),
    )
    stream = {"content_type": "text/event-stream", "body": f"{reply}data: [DONE]\n\n"}
    page = visit(change=answered_with(200, "/v1/chat/completions", **stream))
    page.get_by_label("Tools, as JSON").fill('[{"type": "function"')
    exchange = ask(page, "How is the weather?")
    assert "Tools are not JSON" in exchange.inner_text()
    tools = [{"type": "function", "function": {"name": "weather"}}]
    page.get_by_label("Tools, as JSON").fill(json.dumps(tools))
    with page.expect_request("**/v1/chat/completions") as request:
        exchange = ask(page, "How is the weather?")
    assert request.value.post_data_json["tools"] == tools
    assert text_of(exchange) == "Let me look."
    thoughts = exchange.locator(".thoughts")
    assert re.match(r"Thought for [\d.]+ m?s$", thoughts.inner_text())  # folded
    thoughts.locator("summary").click()
    assert "thought 1 thought 2" in thoughts.inner_text()
    assert "calls weather" in exchange.inner_text() and '{"city": "Oslo"}' in exchange.inner_text()
    exchange.get_by_label("What weather returns").fill("rain")
    with page.expect_request("**/v1/chat/completions") as request:
        exchange.get_by_role("button", name="Send result").click()
    last(page)
    asked, called, result = request.value.post_data_json["messages"]
    assert asked["role"] == "user" and called["tool_calls"][0]["id"] == "call_1"
    assert called["reasoning_content"].startswith("thought 1")
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


@pytest.fixture(scope="module")
def second(tmp_path_factory, served, quantized_model):
    """A server that shows the answers of `served` beside its own, and that its pages may call."""
    options = ("--reference", f"{served.url}/v1", "--allowed-origins", served.url)
    server = start_server(tmp_path_factory.mktemp("second"), quantized_model, *options)
    yield server
    server.end()


@pytest.mark.slow
def test_answers_of_a_reference_stand_beside(browser, served, second):
    path = f"{second.url}/reference/v1/chat/completions"
    assert httpx.post(path, content=b"[", headers=JSON).status_code == 400
    messages = [{"role": "user", "content": "a"}]
    refused = httpx.post(path, json={"messages": messages, "temperature": -1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
    assert httpx.post(f"{served.url}/reference/v1/completions", json={}).status_code == 404
    assert f"{served.url}/v1" not in httpx.get(f"{second.url}/get_server_info").text
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE_MS)
    asking_also(ignore_eos=True, temperature=0)(page)
    page.goto(second.url)
    page.get_by_role("status").get_by_text("ready").wait_for()
    page.get_by_label("Max tokens").fill("24")
    send(page, "def main():")
    page.locator(".answer:not([aria-busy]) + .answer:not([aria-busy])").wait_for()
    answers = page.locator(".exchange .answer").all()
    assert ["This server" in one.inner_text() for one in answers] == [True, False]
    texts = [one.locator(".text").inner_text() for one in answers]
    assert texts[0] == texts[1] != ""
    assert page.locator("#trend polyline").get_attribute("points").count(",") == 24
    page.get_by_label("Answers of").select_option("one")
    assert ask(page, "two").locator(".answer").count() == 1


CALL = """([url, body]) => fetch(url, {
  method: "POST", headers: {"content-type": "application/json", authorization: "Bearer none"},
  body: JSON.stringify(body),
}).then(async answer => [answer.status, await answer.text()], error => [0, String(error)])"""


@pytest.mark.slow
def test_pages_of_an_allowed_origin_call_and_others_do_not(browser, served, second):
    url = f"{second.url}/v1/completions"
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{served.url}/health")  # of the allowed origin, and without the page's policy
    answered = second.said().count("completion cmpl-") + 1
    status, text = page.evaluate(CALL, [url, body])
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    status, text = page.evaluate(CALL, [url, {**body, "max_token": 2}])
    assert status == 400 and "max_tokens" in text  # a page can read why
    # a stream's line is written once its last bytes have left
    wait_until(lambda: second.said().count("completion cmpl-") == answered, 20)
    page.goto(f"http://localhost:{served.port}/health")  # the same server, but another origin
    assert page.evaluate(CALL, [url, body]) == [0, "TypeError: Failed to fetch"]
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    for origin, status in ((served.url, 200), ("https://example.com", 400)):
        answer = httpx.options(url, headers={"origin": origin, **asks})
        allowed = answer.headers.get("access-control-allow-origin")
        assert (answer.status_code, allowed) == (status, origin if status == 200 else None)
    assert second.said().count("completion cmpl-") == answered  # nothing reached the model
