"""The cover tree, against counting all valid paths one by one."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from byte_worlds import MAKERS, Reference, adapter, peaked, support_of

from multicolm.errors import InputError
from multicolm.exact.lattice import SortedBytes, TokenLattice
from multicolm.exact.paths import canonical

CHARACTERS = "the 'l1\n你"


def world(kind: str, seed: int) -> tuple[Reference, TokenLattice]:
    tokenizer = adapter(kind)
    support = support_of(tokenizer, CHARACTERS, 24, seed)
    reference = Reference(tokenizer, support, lambda path: peaked(support, path, seed))
    paths = canonical(tokenizer)
    return reference, TokenLattice(paths, SortedBytes(paths.contents))


def learn(reference: Reference, cover: TokenLattice, *, predict: bool, prune: float = 0.0) -> int:
    """Tell the nodes that are wanted what the model says; how many there were."""
    paths = canonical(reference.tokenizer)
    n = 0
    while wanted := cover.wanted(cover.frontier, predict=predict, prune=prune):
        for node in wanted:
            probs = reference.probs(tuple(node.ids()))
            weights = np.array([probs.get(i, 0.0) for i in paths.ids.tolist()])
            end = sum(probs.get(i, 0.0) for i in reference.tokenizer.end_ids)
            total = node.learn(weights, end)
            assert total == pytest.approx(reference.after(tuple(node.ids()))[2], abs=1e-12)
            n += 1
    return n


def written(reference: Reference, n_bytes: int, seed: int) -> bytes:
    """Bytes that the restricted model itself writes."""
    chance, path, content = random.Random(seed), (), b""
    while len(content) < n_bytes:
        probs, _, _ = reference.after(path)
        if not probs:
            break
        path = (*path, *chance.choices(list(probs), list(probs.values())))
        content = reference.tokenizer.decode(path)
    return content[:n_bytes]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("seed", range(2))
def test_masses_and_next_bytes_are_those_of_all_valid_paths(kind: str, seed: int) -> None:
    reference, cover = world(kind, seed)
    content = written(reference, 5, seed)
    for n in range(len(content)):
        learn(reference, cover, predict=True)
        mass = reference.mass(content[:n])
        assert math.exp(cover.log_mass(cover.frontier)) == pytest.approx(mass, rel=1e-9)
        outcomes = cover.outcomes()
        assert outcomes.sum() == pytest.approx(1)
        wanted = [reference.mass(content[:n] + bytes([x])) for x in range(256)]
        wanted.append(reference.end_mass(content[:n]))
        assert sum(wanted) == pytest.approx(mass)
        np.testing.assert_allclose(outcomes, np.array(wanted) / mass, atol=1e-9)
        cover.advance(content[n : n + 1])


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "gemma"])
def test_texts_do_not_depend_on_how_their_bytes_came(kind: str) -> None:
    reference, one_by_one = world(kind, seed=7)
    content = written(reference, 12, seed=7)
    chance = random.Random(7)
    for byte in content:
        learn(reference, one_by_one, predict=True)
        one_by_one.advance(bytes([byte]))
    learn(reference, one_by_one, predict=True)
    for _ in range(4):
        _, other = world(kind, seed=7)
        done = 0
        while done < len(content):
            n = chance.randint(1, len(content) - done)
            other.advance(content[done : done + n] + b"the 1"[: chance.randint(0, 5)])
            if chance.random() < 0.5:
                learn(reference, other, predict=True)
            other.tidy(chance.randint(0, 3))
            done += n
            other.truncate(done)
        learn(reference, other, predict=True)
        np.testing.assert_allclose(other.outcomes(), one_by_one.outcomes(), atol=1e-12)
        assert other.log_mass(other.frontier) == pytest.approx(
            one_by_one.log_mass(one_by_one.frontier)
        )


def test_pruned_branches_come_back_when_they_count() -> None:
    for seed in range(3):
        reference, exact = world("gpt2", seed)
        _, pruned = world("gpt2", seed)
        content = written(reference, 8, seed)
        read = [0, 0]
        for n in range(len(content)):
            for i, (cover, prune) in enumerate([(exact, 0.0), (pruned, 0.02)]):
                read[i] += learn(reference, cover, predict=True, prune=prune)
            n_branches = len(pruned.frontier)
            distance = 0.5 * np.abs(exact.outcomes() - pruned.outcomes()).sum()
            assert distance <= 0.02 * n_branches
            for cover in (exact, pruned):
                cover.advance(content[n : n + 1])
            assert pruned.frontier  # whatever was pruned, no text is lost
        assert read[1] <= read[0]


def test_bytes_without_a_path_have_no_mass() -> None:
    _, cover = world("llama2", 0)
    cover.advance("a▁".encode())  # what it writes for a blank; no token is the character itself
    assert cover.frontier == () and cover.log_mass(cover.frontier) == -math.inf


def test_a_text_is_not_cut_into_what_is_given() -> None:
    paths = canonical(adapter("gpt2"))
    given = [paths.slot_of[i] for i in adapter("gpt2").encode_continuation("the")]
    cover = TokenLattice(paths, SortedBytes(paths.contents), given)
    cover.advance(b" cat")
    assert cover.n_bytes == 7
    with pytest.raises(InputError, match="cannot be cut to 2 bytes: its first 3 are given"):
        cover.truncate(2)
    cover.truncate(3)
    assert [branch.node for branch in cover.frontier] == [cover.root]
