"""All token paths that cover some bytes, and what they say about the next byte.

For the bytes ``b`` so far, a *branch* is a valid path that ends within ``b`` and has tokens that
reach beyond its end (or ends exactly there). At every path the model's probabilities are
restricted to the tokens that may follow, the end of the text among them where one may end:

    p(t | path) = P(t | path) / Z(path),   Z = sum of P over what may follow

The *mass* of bytes, M(b), is the sum over all paths that minimally cover them (the last token
reaches the end of ``b`` or beyond, the one before does not) of the product of ``p``. Then
``M(b) = sum_x M(b x) + M(b, end)``, and the next byte is ``x`` with probability ``M(b x) / M(b)``.

The tree knows no model: it says which paths it needs (:meth:`TokenLattice.wanted`) and learns their
probabilities (:meth:`Node.learn`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from multicolm.errors import InputError
from multicolm.exact.canonical import Canonical, State

__all__ = ["END", "N_OUTCOMES", "Branch", "Frontier", "Node", "SortedBytes", "TokenLattice"]

END = 256
"""The outcome after the 256 bytes: the text ends."""
N_OUTCOMES = 257


class SortedBytes:
    """The tokens of a vocabulary in the order of their bytes, so that prefixes are ranges."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.lengths: Int[np.ndarray, "slots"] = np.array([len(c) for c in contents])
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._buffer = np.frombuffer(b"".join(contents) or b"\0", dtype=np.uint8)
        self._columns: list[np.ndarray] = []

    def column(self, depth: int) -> np.ndarray:
        """Every token's byte at one depth; of no meaning for tokens that are shorter."""
        while len(self._columns) <= depth:
            places = np.minimum(self._starts + len(self._columns), len(self._buffer) - 1)
            self._columns.append(self._buffer[places])
        return self._columns[depth]

    def narrow(self, low: int, high: int, depth: int, byte: int) -> tuple[int, int, int]:
        """Those of a range of tokens, all longer than ``depth``, that have a byte there.

        Returns:
            Three places: from the first to the second are the tokens that end with this byte,
            from the second to the third those that are longer.
        """
        column = self.column(depth)[low:high]
        first = low + int(np.searchsorted(column, byte, "left"))
        last = low + int(np.searchsorted(column, byte, "right"))
        ended = first
        while ended < last and self.lengths[ended] == depth + 1:
            ended += 1
        return first, ended, last


class Node:
    """One valid path, and what the model says after it.

    Attributes:
        parent: the path without its last token; ``None`` for the empty path.
        slot: the last token, -1 for the empty path.
        token_id: its id, -1 for the empty path.
        n_tokens: number of tokens.
        n_bytes: their length in bytes.
        left_out: 1 - Z, the share of the model's mass on what may not follow; 0 until learned.
        end: probability that the text ends here.
    """

    __slots__ = (
        "_allowed", "_logp", "_paths", "_probs", "_sums", "end", "is_learned", "left_out",
        "n_bytes", "n_tokens", "parent", "slot", "state", "token_id",
    )  # fmt: skip

    def __init__(self, paths: Canonical, parent: Node | None, slot: int, state: State) -> None:
        self._paths = paths
        self.parent = parent
        self.slot = slot
        self.token_id = -1 if parent is None else int(paths.ids[slot])
        self.state = state
        self.n_tokens: int = 0 if parent is None else parent.n_tokens + 1
        self.n_bytes: int = 0 if parent is None else parent.n_bytes + len(paths.contents[slot])
        self.left_out = 0.0
        self.end = 0.0
        self.is_learned = False
        self._allowed: Bool[np.ndarray, "slots"] | None = None
        self._probs: Float[np.ndarray, "slots"] | None = None
        self._sums: dict[tuple[int, int], float] = {}
        self._logp: float | None = 0.0 if parent is None else None

    @property
    def allowed(self) -> Bool[np.ndarray, "slots"]:
        """Which tokens may follow."""
        if self._allowed is None:
            self._allowed = self._paths.allowed(self.state)
        return self._allowed

    @property
    def probs(self) -> Float[np.ndarray, "slots"]:
        """The restricted probability of each token that may follow."""
        assert self._probs is not None
        return self._probs

    def learn(self, weights: Float[np.ndarray, "slots"], end: float) -> float:
        """Take in what the model predicts after the path.

        Args:
            weights: the model's probability of every token of text.
            end: its probability of the end of the text.

        Returns:
            Z. If it is 0, the model puts everything on what may not follow, and the restricted
            model says nothing.
        """
        kept = weights * self.allowed
        end = end if self._paths.may_end(self.state) else 0.0
        total = float(kept.sum()) + end
        if total > 0:
            kept, end = kept / total, end / total
        self._probs, self.end, self.is_learned = kept, end, True
        self.left_out = max(0.0, 1.0 - total)
        return total

    def forget(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Give the probabilities back, all but the sums over some ranges of tokens.

        A path that has forgotten answers for these ranges, and is learned again for others.
        """
        if self._probs is not None:
            for low, high in ranges:
                self.share(low, high)
        self._probs, self._allowed = None, None
        self.is_learned = False

    def share(self, low: int, high: int) -> float:
        """Probability that the next token is one of a range of slots."""
        if (low, high) not in self._sums or self._probs is not None:
            self._sums[low, high] = float(self.probs[low:high].sum())
        return self._sums[low, high]

    def knows(self, low: int, high: int) -> bool:
        """Whether :meth:`share` can answer."""
        return self.is_learned or (low, high) in self._sums

    @property
    def logp(self) -> float | None:
        """Natural log of the path's probability; ``None`` until the paths before are learned."""
        above: list[Node] = []
        node = self
        while node._logp is None:
            assert node.parent is not None
            if not node.parent.knows(node.slot, node.slot + 1):
                return None
            above.append(node)
            node = node.parent
        logp = node._logp
        for node in reversed(above):
            assert node.parent is not None
            logp += _log(node.parent.share(node.slot, node.slot + 1))
            node._logp = logp
        return logp

    def ids(self) -> list[int]:
        """The path's tokens."""
        return [node.token_id for node in self.chain()[1:]]

    def chain(self) -> list[Node]:
        """The path's nodes from the empty path on."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class Branch:
    """A path and those of the tokens after it that have the bytes that are there already.

    Attributes:
        node: the path.
        depth: how many bytes of the text lie after the path.
        low: the first token that has these bytes and continues after them.
        high: the one after the last.
    """

    node: Node
    depth: int
    low: int
    high: int

    @property
    def log_mass(self) -> float | None:
        """Natural log of the branch's part of M(b); ``None`` until it is known."""
        logp = self.node.logp
        if self.depth == 0 or logp is None or logp == -math.inf:
            return logp
        if not self.node.knows(self.low, self.high):
            return None
        return logp + _log(self.node.share(self.low, self.high))

    @property
    def log_end(self) -> float:
        """Natural log of the branch's part of M(b, end)."""
        logp = self.node.logp
        return -math.inf if self.depth or logp is None else logp + _log(self.node.end)


Frontier = tuple[Branch, ...]


class TokenLattice:
    """The branches of one text.

    Attributes:
        n_bytes: how long the text is.

    Args:
        paths: the valid paths of the model's tokenizer.
        table: its tokens by their bytes.
        given: tokens at the start of the text that are certain.
    """

    def __init__(self, paths: Canonical, table: SortedBytes, given: Sequence[int] = ()) -> None:
        self._paths = paths
        self._table = table
        root = Node(paths, None, -1, paths.start)
        self._given = b"".join(paths.contents[slot] for slot in given)
        for slot in given:
            root = Node(paths, root, slot, paths.after(root.state, slot))
            root._logp = 0.0
        n_slots = len(paths.contents)
        self.root = root
        self._tidied = 0  # frontiers whose paths have forgotten what they were told
        self._frontiers: list[Frontier] = [(Branch(root, 0, 0, n_slots),)]

    @property
    def n_bytes(self) -> int:
        """How many bytes of text have been followed, with those of the given tokens."""
        return len(self._given) + len(self._frontiers) - 1

    @property
    def frontier(self) -> Frontier:
        """The branches at the end of the text; none if no path of the model covers it."""
        return self._frontiers[-1]

    def advance(self, content: bytes) -> None:
        """Append bytes. Paths that nothing can continue are dropped; no model is asked."""
        for byte in content:
            self._frontiers.append(self._advanced(self.frontier, byte))

    def _advanced(self, frontier: Frontier, byte: int) -> Frontier:
        after: list[Branch] = []
        for branch in frontier:
            node, depth = branch.node, branch.depth
            first, ended, last = self._table.narrow(branch.low, branch.high, depth, byte)
            if first == last or node.logp == -math.inf:
                continue
            allowed = node.allowed
            for slot in range(first, ended):
                if allowed[slot]:
                    state = self._paths.after(node.state, slot)
                    child = Node(self._paths, node, slot, state)
                    after.append(Branch(child, 0, 0, len(self._paths.contents)))
            if allowed[ended:last].any():
                after.append(Branch(node, depth + 1, ended, last))
        return tuple(after)

    def frontier_at(self, n_bytes: int) -> Frontier:
        """The branches after the first bytes."""
        return self._frontiers[n_bytes - len(self._given)]

    def truncate(self, n_bytes: int) -> None:
        """Cut the text back.

        Raises:
            InputError: if that would cut into the given tokens.
        """
        keep = n_bytes - len(self._given)
        if keep < 0:
            raise InputError(
                f"a text cannot be cut to {n_bytes} bytes: its first {len(self._given)} are given."
            )
        del self._frontiers[keep + 1 :]
        self._tidied = min(self._tidied, keep)

    def wanted(
        self, frontier: Sequence[Branch], *, predict: bool, prune: float = 0.0
    ) -> list[Node]:
        """Paths that have to be learned, those before others first.

        Args:
            frontier: the branches that are asked about.
            predict: whether the next byte is wanted, and not only the mass of the text.
            prune: leave branches alone that have less than this part of the known mass.
        """
        least = _log(prune) + self.log_mass(frontier) if prune > 0 else -math.inf
        needed: dict[Node, None] = {}
        seen: set[Node] = set()
        for branch in frontier:
            if self._is_ready(branch, predict) or (prune > 0 and _bound(branch.node) <= least):
                continue
            node = branch.node
            chain = [node] if predict or branch.depth else []
            while node.logp is None and node not in seen:
                assert node.parent is not None
                seen.add(node)
                node = node.parent
                chain.append(node)
            needed.update(dict.fromkeys(n for n in reversed(chain) if not n.is_learned))
        return list(needed)

    def trunk(self, frontiers: Iterable[Frontier], *, predict: bool) -> list[Node]:
        """Of the paths that have to be learned those that end nearest to each place.

        Most of the mass is on them, and it tells which of the others need not be learned.
        """
        nearest = [min(f, key=lambda branch: branch.depth) for f in frontiers if f]
        return self.wanted(nearest, predict=predict)

    def _is_ready(self, branch: Branch, predict: bool) -> bool:
        if branch.node.logp == -math.inf:
            return True
        if predict:
            return branch.node.is_learned and branch.node.logp is not None
        return branch.log_mass is not None

    def log_mass(self, frontier: Sequence[Branch]) -> float:
        """Natural log of M, over the branches that are known."""
        return log_sum([m for b in frontier if (m := b.log_mass) is not None])

    def outcomes(self, frontier: Frontier | None = None) -> Float[np.ndarray, "257"]:
        """Probability of each next byte, and of the end (the last one), given the text.

        Over the branches that have been learned, normalised; the text must have a mass.

        Args:
            frontier: the branches at some place of the text; ``None`` for its end.
        """
        total = np.zeros(N_OUTCOMES)
        for branch, weight in self.scaled(frontier):
            node, low, high = branch.node, branch.low, branch.high
            probs = node.probs[low:high]
            bins = self._table.column(branch.depth)[low:high]
            total[:END] += weight * np.bincount(bins, weights=probs, minlength=END)
            if branch.depth == 0:
                total[END] += weight * node.end
        return np.asarray(total / total.sum())

    def scaled(self, frontier: Frontier | None = None) -> list[tuple[Branch, float]]:
        """Learned branches and their paths' probabilities, up to one factor."""
        branches = self.frontier if frontier is None else frontier
        learned = [b for b in branches if b.node.is_learned]
        most = self.log_mass(learned)
        assert most > -math.inf, "the text has a mass"
        logps = [-math.inf if (logp := b.node.logp) is None else logp for b in learned]
        # A path may be far more likely than its branch; beyond e^700 there is no such float.
        return [
            (branch, math.exp(min(logp - most, 700.0)))
            for branch, logp in zip(learned, logps, strict=True)
        ]

    def weights(self) -> list[tuple[Branch, float]]:
        """The learned branches and their parts of the mass; they sum to 1."""
        return [
            (b, weight * (b.node.share(b.low, b.high) if b.depth else 1.0))
            for b, weight in self.scaled()
        ]

    def tidy(self, n_kept: int) -> None:
        """Let paths forget that ended their part more than ``n_kept`` bytes ago.

        They are wanted again if the text is cut back that far.
        """
        until = len(self._frontiers) - 1 - n_kept
        for i in range(self._tidied, until):
            going_on = {branch.node for branch in self._frontiers[i + 1]}
            for branch in self._frontiers[i]:
                if branch.node not in going_on:
                    branch.node.forget()
        self._tidied = max(self._tidied, until)


def _bound(node: Node) -> float:
    """Natural log of a number that the path's probability does not exceed."""
    while (logp := node.logp) is None:
        assert node.parent is not None
        node = node.parent
    return logp


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def log_sum(values: Sequence[float]) -> float:
    """Natural log of a sum of numbers that are given by their logs."""
    most = max(values, default=-math.inf)
    if most == -math.inf:
        return most
    return most + math.log(sum(math.exp(value - most) for value in values))
