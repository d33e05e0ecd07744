"""The page of a report in a real browser: it works, asks for nothing, and keeps what it shows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_results import answer, fake_comparison, fake_traces
from pages import chromium, complaints_of, opened, requests_of
from playwright.sync_api import Browser, Page

from multicolm.evaluation.page import as_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(as_page(fake_comparison(), fake_traces()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Page:
    return opened(browser, address)


def test_it_asks_for_nothing_and_complains_of_nothing(page: Page, address: str) -> None:
    assert requests_of(page) == [address]
    assert complaints_of(page) == []
    assert page.evaluate("document.querySelectorAll('#plot svg .mark').length") == 10
    policy = page.evaluate("document.querySelector('meta[http-equiv]').content")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_request_that_the_policy_forbids_is_complained_of_and_not_made(
    page: Page, address: str
) -> None:
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => null)")
    assert requests_of(page) == [address]
    assert any("Content Security Policy" in complaint for complaint in complaints_of(page))


def test_a_click_on_a_heading_sorts_and_a_third_one_undoes_it(page: Page) -> None:
    def names() -> list[str]:
        return [text.split("\n")[0] for text in page.locator("#results tbody th").all_inner_texts()]

    before = names()
    heading = "#results thead th:nth-child(2) button"
    page.click(heading)
    values = page.evaluate(
        "[...document.querySelectorAll('#results tbody tr')].map(r => r.cells[1].dataset.value)"
    )
    numbers = [float(value) for value in values if value is not None]
    assert numbers == sorted(numbers, reverse=True) and names() != before
    page.click(heading)
    page.click(heading)
    assert names() == before


def test_interval_bars_of_all_rows_lie_on_one_axis(page: Page) -> None:
    bars = (
        "[...document.querySelectorAll('#results svg.interval')]"
        ".map(bar => bar.getBoundingClientRect())"
    )
    lefts, widths = (page.evaluate(f"{bars}.map(box => box.{side})") for side in ("left", "width"))
    assert len(lefts) == len(fake_comparison().rows)
    assert len(set(lefts)) == len(set(widths)) == 1
    scale = "document.querySelector('#results .scale').getBoundingClientRect()"
    assert page.evaluate(f"[{scale}.left, {scale}.width]") == [lefts[0], widths[0]]


def test_stars_are_for_models_alone_and_policies(page: Page) -> None:
    starred = page.evaluate(
        "[...document.querySelectorAll('#results .best')].map(s => s.closest('tr').className)"
    )
    assert starred and set(starred) <= {"model", "policy"}


def test_what_was_found_is_read_first(page: Page) -> None:
    assert tuple(page.locator(".findings p").all_inner_texts()) == fake_comparison().findings
    assert page.inner_text(".verdict").endswith("beats any routing of whole questions.")


def test_a_model_of_a_policy_s_cost_and_quality_is_seen_all_the_same(
    browser: Browser, tmp_path: Path
) -> None:
    rows = [replace(row, cost=2.0, quality=0.5) for row in fake_comparison().rows]
    path = tmp_path / "same.html"
    path.write_text(as_page(replace(fake_comparison(), rows=tuple(rows)), []), encoding="utf-8")
    page = opened(browser, path.as_uri())
    marks = page.evaluate(
        "[...document.querySelectorAll('#plot .mark')]"
        ".map(mark => [mark.classList[1], mark.getBBox().width])"
    )
    kinds = [kind for kind, _ in marks]  # what comes later is on top
    assert kinds == ["policy"] * 3 + ["random"] + ["sweep"] * 3 + ["model"] * 3
    widths = dict(marks)
    assert widths["policy"] > widths["random"] > widths["model"]


def test_the_token_panel_is_closed_by_its_button(page: Page) -> None:
    page.select_option("#row", label="confidence")
    page.click(".answers .token:nth-of-type(3)")
    assert page.evaluate("document.querySelector('#panel').classList.contains('idle')") is False
    page.click("#panel .close")
    assert page.evaluate("document.querySelector('#panel').classList.contains('idle')") is True
    assert page.evaluate("document.querySelector('.token[aria-pressed=true]')") is None
    assert page.evaluate("document.activeElement.classList.contains('token')") is True


def test_on_a_phone_the_panel_leaves_the_selected_token_to_be_seen(
    browser: Browser, address: str
) -> None:
    page = opened(browser, address, width=390)
    page.select_option("#row", label="confidence")
    page.click(".answers .token:nth-of-type(28)")
    token, panel = (
        page.evaluate(f"document.querySelector('{what}').getBoundingClientRect().toJSON()")
        for what in (".token[aria-pressed=true]", "#panel")
    )
    assert token["top"] >= 0 and token["bottom"] <= panel["top"]


def test_no_name_is_broken_within_a_word_on_a_phone(browser: Browser, address: str) -> None:
    page = opened(browser, address, width=390)
    # Every word of a row's name is on one line: its text has one rectangle.
    broken = page.evaluate(
        """(() => {
          const broken = [];
          for (const cell of document.querySelectorAll('#results tbody th')) {
            for (const node of [...cell.childNodes].filter((n) => n.nodeType === 3)) {
              for (const word of node.data.matchAll(/[^ ]+/g)) {
                const range = document.createRange();
                range.setStart(node, word.index);
                range.setEnd(node, word.index + word[0].length);
                if (range.getClientRects().length > 1) broken.push(word[0]);
              }
            }
          }
          return broken;
        })()"""
    )
    assert broken == []


def test_a_click_on_a_token_shows_what_every_model_and_the_policy_thought(page: Page) -> None:
    page.select_option("#row", label="confidence")
    page.select_option("#question", label="dose-000")
    page.click(".answers .token:nth-of-type(3)")
    shown = page.inner_text("#panel")
    for name in ("generalist", "facts", "sums"):
        assert name in shown
    assert page.evaluate(
        "document.querySelectorAll('#panel .bar, #panel meter, #panel rect').length"
    )
    assert page.evaluate("document.querySelector('.token[aria-pressed=true]') !== null")


def test_tokens_can_be_walked_along_with_the_keyboard(page: Page) -> None:
    page.select_option("#row", label="confidence")
    page.evaluate("document.querySelector('.answers .token').focus()")
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.dataset.i"
    assert page.evaluate(focused) == "1"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_answers_are_filtered_by_right_and_wrong(page: Page) -> None:
    page.select_option("#row", label="confidence")

    def count() -> int:
        return int(page.inner_text("#count").split(" of ")[1].split()[0])

    total = count()
    counts = []
    for option in page.locator("#filter option").all_inner_texts()[1:3]:
        page.select_option("#filter", label=option)
        counts.append(count())
    assert all(0 < n < total for n in counts) and sum(counts) == total


def test_what_models_write_cannot_break_out_of_the_page(page: Page) -> None:
    page.evaluate("window.broken = false; window.alert = () => { window.broken = true; }; null")
    page.select_option("#row", label="confidence")
    for question in page.locator("#question option").all_inner_texts():
        if question.startswith("odd-"):
            page.select_option("#question", label=question)
    page.select_option("#question", label="odd-script")
    assert "</script>" in page.inner_text(".answers")
    assert page.evaluate("window.broken") is False
    assert page.evaluate("document.querySelectorAll('.answers script, .answers img').length") == 0
    assert complaints_of(page) == []


def test_two_rows_are_shown_side_by_side(page: Page) -> None:
    page.select_option("#row", label="confidence")
    page.select_option("#other", label="average")
    assert len(page.locator(".answers .answer").all_inner_texts()) == 2


def test_nothing_scrolls_sideways_on_a_phone(browser: Browser, address: str) -> None:
    page = opened(browser, address, width=390)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390 and complaints_of(page) == []


def test_it_follows_the_colour_scheme(browser: Browser, address: str) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (
        opened(browser, address, dark=dark).evaluate(background) for dark in (False, True)
    )
    assert light != dark


def test_two_thousand_answers_open_at_once(browser: Browser, tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    some = [answer("confidence", i, rng, right=True) for i in range(20)]
    traces = [replace(some[i % 20], question=f"q{i}") for i in range(2000)]
    path = tmp_path / "large.html"
    path.write_text(as_page(fake_comparison(), traces), encoding="utf-8")
    start = time.monotonic()
    page = opened(browser, path.as_uri())
    # Only what is looked at is made; so it is a matter of reading the file.
    assert time.monotonic() - start < 20
    assert page.evaluate("document.querySelectorAll('.token').length") < 1000
    assert "of 2000" in page.inner_text("#count").replace(",", "")
