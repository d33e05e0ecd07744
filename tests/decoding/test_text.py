"""From bytes of several writers to text that can be shown."""

from __future__ import annotations

import codecs
from itertools import groupby, pairwise
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multicolm.decoding.text import TextStream

Shown = list[tuple[str, int]]
Push: TypeAlias = tuple[bytes, int] | tuple[bytes, int, str]
"""What was written, by whom, and the name of the special token if it was one."""


def characters(pieces: Shown) -> Shown:
    """Every character with its writer."""
    return [(character, writer) for text, writer in pieces for character in text]


def expected(pushes: list[Push], stops: list[str]) -> tuple[Shown, bool]:
    """The whole text, cut before the first stop that is complete; a character's last byte counts.

    Read anew after every push: slow, and too simple to be wrong.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    read: list[tuple[str, int, bool]] = []  # characters, their writers, whether they are text
    within: set[int] = set()  # places inside a name
    last_writer = next((push[1] for push in reversed(pushes) if push[0] and len(push) == 2), 0)
    for number, (content, writer, *name) in enumerate([*pushes, (b"", last_writer)]):
        if name:
            within |= set(range(len(read) + 1, len(read) + len(name[0])))
            read += [(character, writer, False) for character in name[0]]
        else:
            decoded = decoder.decode(content, final=number == len(pushes))
            read += [(character, writer, True) for character in decoded]
        text = "".join(character for character, _, _ in read)
        places = [
            at
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and not within & {at, at + len(stop)}
        ]
        if places:
            return [(c, w) for c, w, shown in read[: min(places)] if shown], True
    return [(c, w) for c, w, shown in read if shown], False


def run(pushes: list[Push], stops: list[str]) -> tuple[Shown, bool, list[str]]:
    stream = TextStream(stops)
    pieces: Shown = []
    seen: list[str] = []
    for push in pushes:
        pieces += [piece[:2] for piece in stream.push(*push)]
        seen.append(stream.text)
        if stream.stopped:
            break
    pieces += [piece[:2] for piece in stream.finish()]
    assert "".join(text for text, _ in pieces) == stream.text
    assert all(text for text, _ in pieces), "an empty piece"
    return pieces, stream.stopped, [*seen, stream.text]


LETTERS = st.text("ab.\né😀", max_size=12)
PUSHES = st.lists(
    st.one_of(
        st.tuples(st.one_of(st.binary(max_size=4), LETTERS.map(str.encode)), st.integers(0, 2)),
        st.tuples(st.just(b""), st.integers(0, 2), st.sampled_from(["a.", "b", "\n"])),
    ),
    max_size=12,
)
STOPS = st.lists(st.text("ab.\né", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(pushes=PUSHES, stops=STOPS)
def test_pieces_join_to_the_text_cut_at_the_first_stop_with_the_right_writers(
    pushes: list[Push], stops: list[str]
) -> None:
    pieces, stopped, _ = run(pushes, stops)
    assert (characters(pieces), stopped) == expected(pushes, stops)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab.\né😀你", max_size=20), data=st.data())
def test_valid_text_in_any_pieces_shows_whole_characters_only(
    text: str, data: st.DataObject
) -> None:
    content = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    pieces, _, seen = run([(part, number % 3) for number, part in enumerate(parts)], [])
    assert "".join(piece for piece, _ in pieces) == text
    assert all(text.startswith(early) for early in seen)
    assert "\ufffd" not in "".join(seen)


@settings(max_examples=200, deadline=None)
@given(pushes=PUSHES, stops=STOPS)
def test_what_is_shown_is_never_taken_back(pushes: list[Push], stops: list[str]) -> None:
    _, _, seen = run(pushes, stops)
    for early, late in pairwise(seen):
        assert late.startswith(early)


@given(pushes=PUSHES)
def test_without_stops_nothing_but_a_broken_character_is_held_back(
    pushes: list[Push],
) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stream = TextStream()
    for push in pushes:
        decoded = decoder.decode(push[0])
        assert "".join(text for text, _, _ in stream.push(*push)) == decoded


@pytest.mark.parametrize(
    ("pushes", "stops", "pieces", "stopped"),
    [
        # A stop that straddles tokens and writers.
        ([(b"one E", 0), (b"N", 1), (b"D two", 0)], ["END"], [("one ", 0)], True),
        # What looked like a stop and was none keeps its writers.
        (
            [(b"a E", 0), (b"N", 1), (b"d", 0)],
            ["END"],
            [("a ", 0), ("E", 0), ("N", 1), ("d", 0)],
            False,
        ),
        # Held back until the end.
        ([(b"a E", 0), (b"N", 1)], ["END"], [("a ", 0), ("E", 0), ("N", 1)], False),
        # The earliest of several.
        ([(b"a.b\n", 0)], ["\n", "."], [("a", 0)], True),
        # Overlapping stops: the one that is complete first.
        ([(b"ab", 0), (b"c", 0)], ["abc", "b"], [("a", 0)], True),
        # A stop inside a token, and one that begins again within itself.
        ([(b"xaab.", 0)], ["ab"], [("xa", 0)], True),
        ([(b"aa", 0), (b"ab", 0)], ["aab"], [("a", 0)], True),
        # A character of two writers is the last byte's writer's.
        ([("é".encode()[:1], 0), ("é".encode()[1:], 1)], [], [("é", 1)], False),
        # A stop that is cut in mid-character.
        ([("a😀".encode()[:3], 0), ("a😀".encode()[3:], 1)], ["😀"], [("a", 0)], True),
        # Bytes that are no text, in the middle and at the end.
        ([(b"a\xff", 0), (b"b", 1)], [], [("a\ufffd", 0), ("b", 1)], False),
        ([(b"a", 0), (b"\xf0\x9f", 1)], [], [("a", 0), ("\ufffd", 1)], False),
        ([], ["x"], [], False),
        # A special token by its name, alone and with what stands around it.
        ([(b"a", 0), (b"", 0, "<e>"), (b"b", 0)], ["<e>"], [("a", 0)], True),
        ([(b"a\n", 0), (b"", 1, "<e>"), (b"b", 0)], ["\n<e>b"], [("a", 0)], True),
        # The same as text; and no part of a name.
        ([(b"a<e", 0), (b">b", 1)], ["<e>"], [("a", 0)], True),
        (
            [(b"a", 0), (b"", 0, "<e>"), (b"b", 0)],
            [">", "<", "e", ">b"],
            [("a", 0), ("b", 0)],
            False,
        ),
        # What looked like a stop and was none: the text comes, the name does not.
        ([(b"a\n", 0), (b"", 1, "<e>"), (b"c", 0)], ["\n<e>b"], [("a\n", 0), ("c", 0)], False),
    ],
)
def test_examples(pushes: list[Push], stops: list[str], pieces: Shown, stopped: bool) -> None:
    got, was_stopped, _ = run(pushes, stops)
    assert characters(got) == characters(pieces)
    assert was_stopped is stopped


def test_no_part_of_a_stop_that_may_still_come_is_shown() -> None:
    stream = TextStream(["<stop>"])
    shown = ""
    for character in "a<sto<stop":
        shown += "".join(text for text, _, _ in stream.push(character.encode(), 0))
    assert shown == stream.text == "a<sto"
    assert stream.push(b">", 0) == [] and stream.stopped and stream.finish() == []


def test_writers_alternate_in_the_order_of_the_text() -> None:
    stream = TextStream(["zz"])
    pieces = [piece for i in range(9) for piece in stream.push(b"xz"[i % 2 : i % 2 + 1], i)]
    pieces += stream.finish()
    assert [writer for writer, _ in groupby(pieces, key=lambda piece: piece[1])] == list(range(9))
