from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from multicolm.errors import ArtefactError, InputError
from multicolm.evaluation.ledger import Ledger

HEADER = {"task": "t", "seed": 0}


def written(path: Path, n: int = 3) -> bytes:
    """A ledger of ``n`` records, closed; its bytes."""
    with Ledger.open(path, HEADER) as ledger:
        for i in range(n):
            ledger.append(f"k{i}", {"i": i, "text": "ä\n€"})
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def test_what_was_appended_is_there_when_it_is_opened_again(path: Path) -> None:
    written(path)
    with Ledger.open(path, HEADER) as ledger:
        assert list(ledger) == ["k0", "k1", "k2"]
        assert ledger.get("k1") == {"i": 1, "text": "ä\n€"}
        assert "k3" not in ledger
        assert ledger.get("k3") is None
        ledger.append("k3", None)
        assert "k3" in ledger
        assert ledger.get("k0") == {"i": 0, "text": "ä\n€"}
        assert len(ledger) == 4


def test_a_later_record_of_a_key_replaces_the_earlier(path: Path) -> None:
    written(path)
    with Ledger.open(path, HEADER) as ledger:
        ledger.append("k1", "new")
        assert ledger.get("k1") == "new"
    with Ledger.open(path, HEADER) as ledger:
        assert (ledger.get("k1"), len(ledger)) == ("new", 3)


def test_a_file_cut_at_any_byte_keeps_every_whole_line_and_can_go_on(path: Path) -> None:
    whole = written(path)
    n_lines = [whole[:end].count(b"\n") for end in range(len(whole) + 1)]
    for end, n in enumerate(n_lines):
        path.write_bytes(whole[:end])
        with Ledger.open(path, HEADER) as ledger:
            assert list(ledger) == [f"k{i}" for i in range(max(0, n - 1))]
            ledger.append("more", end)
            assert ledger.get("more") == end
        lines = path.read_bytes().splitlines()
        assert len([json.loads(line) for line in lines]) == max(1, n) + 1


def test_a_record_outlives_the_process_at_once(path: Path) -> None:
    with Ledger.open(path, HEADER) as ledger:
        ledger.append("k", 1)
        assert json.loads(path.read_bytes().splitlines()[-1]) == {"key": "k", "record": 1}


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b'{"record": 1}', b"[]", b""])
def test_a_damaged_line_elsewhere_is_named(path: Path, damage: bytes) -> None:
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))
    with pytest.raises(ArtefactError, match=r"ledger\.jsonl:3: this line is damaged"):
        Ledger.open(path, HEADER)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"key": "k", "record": 1}'])
def test_a_damaged_header_is_named(path: Path, damage: bytes) -> None:
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([damage + b"\n", *lines[1:]]))
    with pytest.raises(ArtefactError, match=r"ledger\.jsonl:1: "):
        Ledger.open(path, HEADER)


def test_another_format_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 99, "header": HEADER}) + "\n")
    with pytest.raises(ArtefactError, match="has format 99, and this multicolm reads 1"):
        Ledger.open(path, HEADER)


def test_another_run_is_refused_by_what_differs_and_its_file_stays_as_it_is(path: Path) -> None:
    before = written(path)
    with pytest.raises(InputError) as caught:
        Ledger.open(path, {"task": "t", "seed": 1, "limit": "x" * 200})
    assert str(caught.value) == (
        f'{path.parent} holds another run (seed 0 there, 1 here; limit null there, "{"x" * 76}... '
        "here); choose another folder (--out), or remove that one."
    )
    assert path.read_bytes() == before


def test_a_header_of_tuples_is_the_same_as_one_of_lists(path: Path) -> None:
    Ledger.open(path, {"stop": ("a", "b")}).close()
    before = path.read_bytes()
    Ledger.open(path, {"stop": ["a", "b"]}).close()
    assert path.read_bytes() == before


def test_what_json_cannot_hold_is_refused_and_leaves_no_trace(path: Path) -> None:
    with Ledger.open(path, HEADER) as ledger:
        with pytest.raises(ValueError, match="Out of range float"):
            ledger.append("k", float("nan"))
        assert "k" not in ledger
    assert len(path.read_bytes().splitlines()) == 1


def test_a_folder_belongs_to_one_ledger_at_a_time(path: Path) -> None:
    with (
        Ledger.open(path, HEADER),
        pytest.raises(InputError, match="another process is at work here"),
    ):
        Ledger.open(path, HEADER)
    Ledger.open(path, HEADER).close()


def test_a_refused_ledger_gives_the_folder_free(path: Path) -> None:
    written(path)
    with pytest.raises(InputError, match="another run"):
        Ledger.open(path, {"seed": 5})
    Ledger.open(path, HEADER).close()


def test_no_file_stays_open(path: Path) -> None:
    written(path)
    before = len(os.listdir("/proc/self/fd"))
    for header in (HEADER, {"seed": 7}):
        try:
            Ledger.open(path, header).close()
        except InputError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
