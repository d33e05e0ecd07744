"""The page in a real browser: it writes, colours, explains and stops, and speaks to nobody else."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pages import chromium, complaints_of, opened, requests_of
from playwright.sync_api import Browser, Page
from serving_worlds import SECONDS, Gate, ask, running

from multicolm import Ensemble
from multicolm.serving.server import Server

PROMPT = "What is Dulerex made from?"
TEXT = "document.querySelector('.turn:last-child .text').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Server) -> Page:
    return ready(opened(browser, server.address))


def ready(page: Page) -> Page:
    until(lambda: page.evaluate("document.querySelectorAll('#policy option').length > 0"))
    return page


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "that does not come true"
        time.sleep(0.02)


def write(page: Page, prompt: str = PROMPT) -> None:
    page.fill("#prompt", prompt)
    page.click("#go")
    until(lambda: page.evaluate("document.getElementById('go').disabled === false"))


def test_it_shows_the_text_coloured_by_who_wrote_it(page: Page, alone: Ensemble) -> None:
    page.select_option("#policy", label="max-confidence")
    write(page)
    [answer] = alone.generate([chat(PROMPT)], "max-confidence", max_new_tokens=64)
    assert page.evaluate(TEXT) == answer.text
    classes = page.evaluate("[...document.querySelectorAll('.token')].map((n) => n.className)")
    colours = [f"w{alone.models.index(token.model)}" for token in answer.trace]
    assert [text.split()[1] for text in classes] == colours
    assert len(set(colours)) > 1
    assert page.inner_text("#status") == "Finished."
    usage = page.inner_text(".usage")
    for name, used in answer.usage.items():
        assert f"{name} wrote {used.tokens_written} and read {used.tokens_read} tokens" in usage
    assert not re.search(r"\b1 (passes|tokens)", usage)
    assert complaints_of(page) == []


def test_it_speaks_to_its_own_server_and_to_nobody_else(page: Page, server: Server) -> None:
    write(page)
    assert {url.removeprefix(server.address) for url in requests_of(page)} <= {
        *("/", "/v1/models", "/v1/chat/completions", "data:,")
    }
    headers = ask(server, "/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_a_token_shows_its_probability_under_the_mouse_and_by_keys(
    page: Page, alone: Ensemble
) -> None:
    write(page)
    [answer] = alone.generate([chat(PROMPT)], max_new_tokens=64, top_logprobs=5)
    assert not page.is_visible(".detail")  # nothing is picked yet
    page.focus(".text")
    for place in (0, 1, 2):
        detail = page.inner_text(".detail")
        token = answer.trace.tokens[place]
        assert token.model in detail and f"{token.logprob:.3f} nats" in detail
        shown = page.evaluate(
            "[...document.querySelectorAll('.likeliest code')].map((e) => e.textContent)"
        )
        want = [json.dumps(each.text, ensure_ascii=False) for each in token.alternatives]
        assert shown == want and page.inner_text(".likeliest .written") in detail
        page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert answer.trace.tokens[-1].model in page.inner_text(".detail")
    x, y = page.evaluate(
        "(([b]) => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.querySelectorAll('.token')[1].getClientRects())"
    )
    page.mouse.move(x, y)
    assert f"{answer.trace.tokens[1].logprob:.3f} nats" in page.inner_text(".detail")
    assert page.evaluate("document.querySelectorAll('.picked').length") == 1


def chat(*said: str) -> Any:
    """A chat in which two take turns, the user first."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def test_enter_sends_and_a_chat_goes_on_with_what_was_said(page: Page, alone: Ensemble) -> None:
    page.click("summary")
    page.fill("#length", "12")
    said: list[str] = []
    for question in ("Which plant is Sofid extracted from?", "What is 2 * x?"):
        page.fill("#prompt", question)
        page.keyboard.press("Enter")
        until(lambda: page.evaluate("document.getElementById('go').disabled === false"))
        [answer] = alone.generate([chat(*said, question)], max_new_tokens=12)
        assert page.evaluate(TEXT) == answer.text
        said += [question, answer.text]
    assert [asked.inner_text() for asked in page.query_selector_all(".asked")] == said[::2]
    page.click("#new")
    assert page.query_selector_all(".turn") == [] and page.evaluate("turns") == []


def test_a_system_prompt_comes_first_and_shift_enter_starts_a_line(page: Page) -> None:
    page.click("summary")
    page.fill("#system", "Be brief.")
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("b")
    assert page.evaluate("request($('prompt').value)[1].messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
    ]


def test_a_text_is_continued_without_a_template(page: Page, alone: Ensemble) -> None:
    page.click("summary")
    page.select_option("#mode", label="continue a text")
    assert page.inner_text("#prompt-label") == "Text to continue"
    assert not page.is_visible("#system")
    write(page, "What is Dulerex made from?\nResponse:")
    [answer] = alone.generate(["What is Dulerex made from?\nResponse:"], max_new_tokens=64)
    assert page.evaluate(TEXT) == answer.text


def test_models_without_a_template_continue_texts_unless_they_are_to_chat(browser: Browser) -> None:
    with running(Gate().ensemble(), "duo", grace=0.0) as server:
        page = ready(opened(browser, server.address))
        assert page.input_value("#mode") == "text"


def test_a_policy_with_a_threshold_offers_it(page: Page, alone: Ensemble) -> None:
    page.select_option("#policy", label="average")
    assert page.evaluate("document.getElementById('threshold-box').hidden")
    page.select_option("#policy", label="confidence")
    assert not page.evaluate("document.getElementById('threshold-box').hidden")
    page.fill("#threshold", "2")
    write(page)
    [answer] = alone.generate(
        [chat(PROMPT)], "confidence", params={"threshold": 2}, max_new_tokens=64
    )
    assert page.evaluate(TEXT) == answer.text


def test_text_that_looks_like_markup_is_text(page: Page) -> None:
    page.evaluate(
        "answer = begin('<b>'); take({choices: [{multicolm: {"
        "pieces: [{text: '<img src=x>', model: 'math'}],"
        "tokens: [{id: 1, text: '<img src=x>', model: 'math', logprob: null, score: null,"
        "offset: 0}]}}]}, 0)"
    )
    assert page.evaluate(TEXT) == "<img src=x>"
    assert page.evaluate("document.querySelectorAll('.text img').length") == 0


def test_a_complaint_of_the_server_is_shown_and_the_prompt_kept(page: Page) -> None:
    page.click("summary")
    page.fill("#length", "100000")
    write(page)
    assert page.input_value("#prompt") == PROMPT and not page.query_selector_all(".turn")
    assert "must be 1 to 1024 on this server" in page.inner_text("#status")
    assert page.evaluate("document.getElementById('status').classList.contains('wrong')")


@pytest.mark.parametrize("how", ["button", "key"])
def test_it_stops_on_demand_and_the_place_is_free(browser: Browser, how: str) -> None:
    gate = Gate()
    gate.open.set()
    with running(gate.ensemble(), "duo", grace=0.0) as server:
        page = ready(opened(browser, server.address))
        page.click("summary")
        page.fill("#length", "1000")
        page.fill("#prompt", "a")
        page.click("#go")
        until(lambda: page.evaluate("document.querySelectorAll('.token').length > 3"))
        page.click("#stop") if how == "button" else page.keyboard.press("Escape")
        until(lambda: page.inner_text("#status") == "Stopped.")
        until(lambda: server.engine.stats().outcomes["cancelled"] == 1)
        assert page.evaluate("document.getElementById('go').disabled") is False


def test_a_server_with_a_key_is_asked_with_it(browser: Browser) -> None:
    gate = Gate()
    gate.open.set()
    with running(gate.ensemble(), "duo", api_key="secret", grace=0.0) as server:
        page = opened(browser, server.address)
        until(lambda: "invalid API key" in page.inner_text("#status"))
        page.evaluate(
            "document.getElementById('key').value = 'secret';"
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        ready(page)
        page.click("summary")
        page.fill("#length", "5")
        write(page, "a")
        assert page.evaluate("document.querySelectorAll('.token').length") == 5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_width_in_both_schemes(
    browser: Browser, server: Server, width: int, dark: bool
) -> None:
    page = ready(opened(browser, server.address, width=width, dark=dark))
    page.select_option("#policy", label="max-confidence")
    write(page)
    page.focus(".text")
    page.click("summary")
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    dark_paper = "rgb(18, 22, 28)"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == dark_paper) == dark
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((n) => !n.labels.length).map((n) => n.id)"
    )
    assert unnamed == []
