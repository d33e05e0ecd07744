"""How answers, ensembles and counts show themselves, in a console and in a notebook."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from multicolm import Answer, Ensemble
from multicolm.backend.table import TableModel
from multicolm.types import MIXTURE, Alternative, Trace, TracedToken, Usage

HOSTILE = "</span><script>alert('1')</script> \u202e\x1b[2J \"&"


def answer(*tokens: TracedToken) -> Answer:
    usage = {"small": Usage(3, 9, 1, 0.123456), "<b>expert": Usage()}
    text = "".join(token.text for token in tokens)
    return Answer("p", text, Trace(tokens), usage, "eos", "co-llm")


class Page(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = self.hovered = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:  # type: ignore[no-untyped-def]
        self.tags.append(tag)
        self.hovered += dict(attrs).get("title", "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_every_token_with_its_writer_and_its_numbers() -> None:
    tokens = (
        TracedToken(0, "Made ", "small", -0.5, 0.25),
        TracedToken(1, "of", "<b>expert", -1.25, None, (Alternative(1, "of", -1.25),)),
        TracedToken(2, " sage", MIXTURE, -2.0),
    )
    page = Page(answer(*tokens)._repr_html_())
    assert page.text.startswith("Made of sage")
    assert "co-llm, 3 tokens, eos: small 33 % <b>expert 33 % mixture 33 %" in page.text
    assert "small, log-probability -0.50, score 0.25" in page.hovered
    assert "<b>expert, log-probability -1.25\n'of' -1.25" in page.hovered
    colours = re.findall(r"background:[^\"]*", answer(*tokens)._repr_html_())
    assert len(colours) == 4 and len(set(colours)) == 2  # the base model keeps the page's own


def test_what_a_model_wrote_can_do_nothing_in_a_notebook() -> None:
    token = TracedToken(0, HOSTILE, "small", 0.0, None, (Alternative(0, HOSTILE, 0.0),))
    page = Page(answer(token)._repr_html_())
    assert set(page.tags) == {"div", "span"}
    assert "<script>alert('1')</script> \\u202e\\x1b[2J" in page.text
    assert "\x1b" not in page.text + page.hovered and "\u202e" not in page.text + page.hovered
    Page(answer(TracedToken(0, "\ud800", "small", 0.0))._repr_html_()).text.encode()


def test_an_answer_and_its_account_are_short() -> None:
    long = answer(*[TracedToken(0, "word ", "small", 0.0)] * 200)
    assert repr(long).startswith("<Answer 'word word") and len(repr(long)) < 120
    assert repr(long).endswith("...': 200 tokens by co-llm, eos>")
    assert repr(long.trace) == "<Trace: 200 tokens, 0 handovers>"
    assert repr(long.usage["small"]) == (
        "Usage(forwards=3, tokens_read=9, tokens_written=1, seconds=0.123)"
    )


def test_an_ensemble_names_its_models_its_policy_and_its_bridges() -> None:
    tables = [TableModel(name, ["a", "<end>"], {"": {"a": 1.0}}, ["<end>"]) for name in "pq"]
    shown = repr(Ensemble(tables, policy="average"))
    assert shown == "<Ensemble p with q: policy average, bridge shared>"
    assert repr(Ensemble(tables[:1])) == "<Ensemble p: policy single>"
