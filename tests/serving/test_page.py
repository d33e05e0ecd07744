"""The page in a real browser: it writes, colours, explains and stops, and speaks to nobody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page
from serving_worlds import SECONDS, Gate, ask, running

from multicolm import Ensemble
from multicolm.serving.server import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PROMPT = "What is Dulerex made from?\nResponse:"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Server) -> Page:
    return ready(browser.open(server.address))


def ready(page: Page) -> Page:
    until(lambda: page.value("document.querySelectorAll('#policy option').length > 0"))
    return page


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "that does not come true"
        time.sleep(0.02)


def write(page: Page, prompt: str = PROMPT) -> None:
    page.choose("#prompt", prompt)
    page.click("#go")
    until(lambda: page.value("document.getElementById('go').disabled === false"))


def test_it_shows_the_text_coloured_by_who_wrote_it(page: Page, alone: Ensemble) -> None:
    page.choose("#policy", "max-confidence")
    write(page)
    [answer] = alone.generate([PROMPT], "max-confidence", max_new_tokens=64)
    assert page.value("document.getElementById('text').textContent") == answer.text
    classes = page.value("[...document.querySelectorAll('.token')].map((n) => n.className)")
    colours = [f"w{alone.models.index(token.model)}" for token in answer.trace]
    assert [text.split()[1] for text in classes] == colours
    assert len(set(colours)) > 1
    assert page.text("#status") == "The writer ended the text."
    usage = page.text("#usage")
    for name, used in answer.usage.items():
        assert f"{name} wrote {used.tokens_written} and read {used.tokens_read} tokens" in usage
    assert page.complaints == []


def test_it_speaks_to_its_own_server_and_to_nobody_else(page: Page, server: Server) -> None:
    write(page)
    assert {url.removeprefix(server.address) for url in page.requests} <= {
        *("/", "/v1/models", "/v1/completions", "data:,")
    }
    headers = ask(server, "/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_a_token_tells_its_probability_under_the_mouse_and_by_keys(
    page: Page, alone: Ensemble
) -> None:
    write(page)
    [answer] = alone.generate([PROMPT], max_new_tokens=64, top_logprobs=5)
    page.value("document.getElementById('text').focus()")
    for place in (0, 1, 2):
        detail = page.text("#detail")
        token = answer.trace.tokens[place]
        assert token.model in detail and f"{token.logprob:.3f} nats" in detail
        shown = page.value(
            "[...document.querySelectorAll('.likeliest code')].map((e) => e.textContent)"
        )
        want = [json.dumps(each.text, ensure_ascii=False) for each in token.alternatives]
        assert shown == want and page.text(".likeliest .written") in detail
        page.press("ArrowRight")
    page.press("End")
    assert answer.trace.tokens[-1].model in page.text("#detail")
    x, y = page.value(
        "(([b]) => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.querySelectorAll('.token')[1].getClientRects())"
    )
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert f"{answer.trace.tokens[1].logprob:.3f} nats" in page.text("#detail")
    assert page.value("document.querySelectorAll('.picked').length") == 1


def test_a_chat_goes_through_the_templates(page: Page, alone: Ensemble) -> None:
    page.choose("#manner", "a chat message")
    write(page, "Which plant is Sofid extracted from?")
    chat = [{"role": "user", "content": "Which plant is Sofid extracted from?"}]
    [answer] = alone.generate([chat], max_new_tokens=64)  # type: ignore[list-item]
    assert page.value("document.getElementById('text').textContent") == answer.text


def test_a_policy_with_a_threshold_offers_it(page: Page, alone: Ensemble) -> None:
    assert page.value("document.getElementById('threshold-box').hidden")
    page.choose("#policy", "confidence")
    assert not page.value("document.getElementById('threshold-box').hidden")
    page.choose("#threshold", "2")
    write(page)
    [answer] = alone.generate([PROMPT], "confidence", params={"threshold": 2}, max_new_tokens=64)
    assert page.value("document.getElementById('text').textContent") == answer.text


def test_text_that_looks_like_markup_is_text(page: Page) -> None:
    page.value(
        "take({choices: [{multicolm: {pieces: [{text: '<img src=x>', model: 'math'}],"
        "tokens: [{id: 1, text: '<img src=x>', model: 'math', logprob: null, score: null,"
        "offset: 0}]}}]}, 0)"
    )
    assert page.value("document.getElementById('text').textContent") == "<img src=x>"
    assert page.value("document.querySelectorAll('#text img').length") == 0


def test_a_complaint_of_the_server_is_shown(page: Page) -> None:
    page.choose("#length", "100000")
    write(page)
    assert "must be 1 to 1024 on this server" in page.text("#status")
    assert page.value("document.getElementById('status').classList.contains('wrong')")


@pytest.mark.parametrize("how", ["button", "key"])
def test_it_stops_when_it_is_told_to_and_the_place_is_free(browser: Browser, how: str) -> None:
    gate = Gate()
    gate.open.set()
    with running(gate.ensemble(), "duo", grace=0.0) as server:
        page = ready(browser.open(server.address))
        page.choose("#length", "1000")
        page.choose("#prompt", "a")
        page.click("#go")
        until(lambda: page.value("document.querySelectorAll('.token').length > 3"))
        page.click("#stop") if how == "button" else page.press("Escape")
        until(lambda: page.text("#status") == "Stopped.")
        until(lambda: server.engine.stats().outcomes["cancelled"] == 1)
        assert page.value("document.getElementById('go').disabled") is False


def test_a_server_with_a_key_is_asked_with_it(browser: Browser) -> None:
    gate = Gate()
    gate.open.set()
    with running(gate.ensemble(), "duo", api_key="secret", grace=0.0) as server:
        page = browser.open(server.address)
        until(lambda: "missing API key" in page.text("#status"))
        page.value(
            "document.getElementById('key').value = 'secret';"
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        ready(page)
        page.choose("#length", "5")
        write(page, "a")
        assert page.value("document.querySelectorAll('.token').length") == 5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_width_in_both_schemes(
    browser: Browser, server: Server, tmp_path: Path, width: int, dark: bool
) -> None:
    page = ready(browser.open(server.address, width=width, dark=dark))
    page.choose("#policy", "max-confidence")
    write(page)
    page.value("document.getElementById('text').focus()")
    page.screenshot(tmp_path / "page.png")
    assert page.value(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    dark_paper = "rgb(18, 22, 28)"
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == dark_paper) == dark
    unnamed = page.value(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((n) => !n.labels.length).map((n) => n.id)"
    )
    assert unnamed == []
