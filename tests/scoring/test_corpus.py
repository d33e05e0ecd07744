"""What may be in a corpus, and the one sentence for everything else."""

from __future__ import annotations

import json
import re

import pytest
from score_worlds import records, write

from multicolm.errors import ConfigError, InputError
from multicolm.scoring.corpus import open_corpus

GOOD = '{"prompt": "a", "completion": "b"}'
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(tmp_path, content: str | bytes):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_corpus(path))


def test_texts_and_chats_are_read_in_order_with_their_places(tmp_path) -> None:
    found = read(tmp_path, GOOD + "\n" + json.dumps({"messages": CHAT, "id": 3}) + "\n")
    assert [(e.prompt, e.completion) for e in found] == [("a", "b"), (CHAT[:1], "b")]
    assert [e.place for e in found] == [f"{tmp_path / 'd.jsonl'}:{n}" for n in (1, 2)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD + "\r\n\r\n",
        "\n  \n" + GOOD + "\n\n",
        b"\xef\xbb\xbf\n" + GOOD.encode(),
    ],
)
def test_a_mark_at_the_start_and_blank_lines_are_passed_over(tmp_path, content) -> None:
    [example] = read(tmp_path, content)
    assert (example.prompt, example.completion) == ("a", "b")


def test_blank_lines_count_for_the_place(tmp_path) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl:4: no JSON"):
        read(tmp_path, GOOD + "\n\n\n{\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("1", "a record is"),
        ("null", "a record is"),
        ('["prompt"]', "a record is"),
        ("{}", "this one has nothing"),
        ('{"question": "a", "answer": "b"}', "this one has question, answer"),
        ('{"prompt": "a"}', "this one has prompt"),
        ('{"prompt": "a", "completion": null}', "a record is"),
        ('{"prompt": "a", "completion": 3}', "a record is"),
        ('{"prompt": "a", "completion": ["b"]}', "a record is"),
        ('{"prompt": "", "completion": "b"}', "the prompt is empty"),
        ('{"prompt": [], "completion": "b"}', "the prompt is empty"),
        ('{"prompt": 3, "completion": "b"}', "the prompt is a int"),
        ('{"prompt": {"role": "user"}, "completion": "b"}', "the prompt is a dict"),
        ('{"prompt": [1, 99999], "completion": "b"}', "the prompt of this one is a list of token"),
        ('{"prompt": ["a"], "completion": "b"}', "is no message"),
        ('{"messages": []}', "a record is"),
        ('{"messages": "hi"}', "a record is"),
        ('{"messages": null}', "a record is"),
        (json.dumps({"messages": CHAT[:1]}), "a record is"),
        (json.dumps({"messages": CHAT[1:]}), "a record is"),
        (json.dumps({"messages": [*CHAT, CHAT[0]]}), "end with one of the assistant"),
        (json.dumps({"messages": [CHAT[0], {"role": "assistant"}]}), "a record is"),
        (json.dumps({"messages": [{"role": "user"}, CHAT[1]]}), "is no message"),
        (json.dumps({"messages": [3, CHAT[1]]}), "is a list of token ids"),
        (r'{"prompt": "a\ud800", "completion": "b"}', "is not valid Unicode"),
        (r'{"prompt": "a", "completion": "\ud800b"}', "is not valid Unicode"),
        (r'{"prompt": [{"role": "\ud800", "content": "a"}], "completion": ""}', "not valid Unic"),
    ],
)
def test_an_odd_record_is_one_sentence_with_file_and_line(tmp_path, line, said) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, GOOD + "\n" + line + "\n" + GOOD)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'd.jsonl'}:2: ")
    assert said in message and message.endswith(".") and "\n" not in message


def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl:2: not UTF-8 text; convert it first\.$"):
        read(tmp_path, GOOD.encode() + b'\n{"prompt": "\xe9", "completion": "b"}\n')


def test_csv_is_read_by_the_names_in_its_first_line(tmp_path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfcompletion,prompt\r\n"b, and ""c""","a\nb"\r\n\r\nd,e\r\n')
    found = list(open_corpus(path))
    assert [(e.prompt, e.completion) for e in found] == [("a\nb", 'b, and "c"'), ("e", "d")]
    assert [e.place for e in found] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,completion\na,b,c\n", "d.csv:2: 3 fields, and the first line names 2 (prompt"),
        (b'prompt,completion\n"a"b,c\n', "no CSV ("),
        (b"prompt,completion\n\xe9,c\n", "d.csv: not UTF-8 text; convert it first."),
        (b"", "d.csv holds no example; a record is"),
    ],
)
def test_a_csv_file_that_is_not_right_is_one_sentence(tmp_path, content, said) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(open_corpus(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path, content) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl holds no example; a record is"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "there is no file"),
        ("missing.parquet", "there is no file"),
        ("./missing", "is no data set; allowed are"),
        ("folder", "is no data set; allowed are"),
        ("folder.jsonl", "there is no file"),
        ("data.txt", "is no data set; allowed are"),
    ],
)
def test_what_is_no_corpus_is_refused_before_anything_is_loaded(tmp_path, name, said) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "data.csv").write_text("a,b\n")
    source = name if name.startswith(".") else str(tmp_path / name)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        open_corpus(source)
    assert name in str(caught.value)


def test_a_damaged_parquet_file_is_one_sentence(tmp_path) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ConfigError, match=r"d\.parquet cannot be read: ") as caught:
        list(open_corpus(path))
    assert "\n" not in str(caught.value)


def test_chats_in_parquet_are_those_of_json_lines(tmp_path) -> None:
    from datasets import Dataset

    lines = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "s"}, *CHAT]}]
    path = write(tmp_path / "d.jsonl", lines)
    Dataset.from_list(lines).to_parquet(str(tmp_path / "d.parquet"))
    assert open_corpus(tmp_path / "d.parquet").digest() == open_corpus(path).digest()
    places = [e.place for e in open_corpus(tmp_path / "d.parquet")]
    assert places == [f"{tmp_path / 'd.parquet'}:{n}" for n in (1, 2)]


def test_a_parquet_record_of_the_wrong_columns_is_named_by_its_row(tmp_path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"ask": "a", "answer": "b"}]).to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(InputError, match=r"d\.parquet:1: .*this one has ask, answer"):
        list(open_corpus(tmp_path / "d.parquet"))


def test_the_digest_tells_content_and_order_and_nothing_else(tmp_path) -> None:
    lines = records(5)
    plain = open_corpus(write(tmp_path / "a.jsonl", lines)).digest()
    noted = [{"id": n, **line} for n, line in enumerate(lines)]
    assert open_corpus(write(tmp_path / "b.jsonl", noted)).digest() == plain
    assert open_corpus(write(tmp_path / "c.jsonl", lines[::-1])).digest() != plain
    assert open_corpus(write(tmp_path / "d.jsonl", lines[:-1])).digest() != plain
    moved = [{"prompt": "ab", "completion": "c"}], [{"prompt": "a", "completion": "bc"}]
    digests = {open_corpus(write(tmp_path / f"{n}.jsonl", m)).digest() for n, m in enumerate(moved)}
    assert len(digests) == 2, "where the completion begins counts"


def test_a_corpus_can_be_read_any_number_of_times(tmp_path) -> None:
    corpus = open_corpus(write(tmp_path / "a.jsonl", records(5)))
    assert list(corpus) == list(corpus) and len(list(corpus)) == 5
