"""One model's texts, byte by byte, exactly; see :mod:`multicolm.exact.lattice`.

A row follows all token paths of the model that cover its bytes. The paths are read in *lanes*: a
lane is one row of an ordinary session of the model. A path takes the free lane that holds the
longest part of it; the lane is cut back and fed the rest. What all rows need is fed together.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.backend.checked import open_session
from multicolm.backend.passes import ForwardPass, Passes, run_alone
from multicolm.errors import CapabilityError, InputError, ModelError
from multicolm.exact.lattice import N_OUTCOMES, Frontier, Node, SortedBytes, TokenLattice, log_sum
from multicolm.exact.paths import canonical

__all__ = ["ByteSession", "Continuation", "Pieces", "span_logprobs"]

T = TypeVar("T")

_MOST_NODES = 256  # of one lane in one feed: each has a whole vocabulary of numbers
_CHUNK_BYTES = 256
_KEPT_BYTES = 32  # texts may be cut back this far without anything being read again


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens that a model may write next from one of its paths.

    Attributes:
        n_cut: how many bytes each of them begins with that are in the text already.
        ids: tokens of the model's own vocabulary.
        logprobs: natural logs, normalised over all continuations and the end.
    """

    n_cut: int
    ids: Int[Tensor, "tokens"]
    logprobs: Float[Tensor, "tokens"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a model would write next, token by token, wherever in its own token the text ends.

    Attributes:
        continuations: one for each path.
        end_logprob: natural log of the probability that the text ends here.
    """

    continuations: tuple[Continuation, ...]
    end_logprob: float


@dataclass
class _Job:
    """A path to be read, and the nodes on it that want the prediction after some token.

    Attributes:
        row: the row it belongs to.
        ids: the prompt and the path's tokens.
        nodes: per node the number of tokens before the prediction, ascending.
    """

    row: int
    ids: list[int]
    nodes: list[tuple[int, Node]]


class _Lanes:
    """The lanes of some rows, and the model that reads them."""

    def __init__(self, model: Model, n_rows: int, n_lanes: int) -> None:
        self.paths = canonical(model.tokenizer)
        self.table = SortedBytes(self.paths.contents)
        self.n_forwards = 0
        self.n_calls = 0
        self.n_read = 0
        self.seconds = 0.0
        self.errors: dict[int, InputError | ModelError] = {}  # per row
        # Of these nodes only sums over some ranges are wanted: long texts have many.
        self.asked: dict[Node, set[tuple[int, int]]] = {}
        self._model = model
        self._n_lanes = n_lanes
        self._session = open_session(model, n_rows * n_lanes)
        self._held: list[list[int]] = [[] for _ in range(n_rows * n_lanes)]
        self._ids = torch.from_numpy(self.paths.ids)
        self._ends = torch.tensor(sorted(model.tokenizer.end_ids), dtype=torch.long)

    def clear(self, row: int) -> None:
        """Empty the lanes of a row."""
        for lane in self._of(row):
            self._session.truncate(lane, 0)
            self._held[lane] = []

    def _of(self, row: int) -> range:
        return range(row * self._n_lanes, (row + 1) * self._n_lanes)

    def learn(self, prompts: dict[int, list[int]], wanted: dict[int, list[Node]]) -> Passes[None]:
        """Read the paths of wanted nodes, per row, and give the nodes what is predicted."""
        jobs = [job for row, nodes in wanted.items() for job in _jobs(row, prompts[row], nodes)]
        while jobs:
            now: dict[int, _Job] = {}
            later: list[_Job] = []
            # Of jobs on one path the shorter come first; paths that share less with it come later.
            for job in jobs:
                lane = self._lane(job, now)
                if lane is None:
                    later.append(job)
                else:
                    now[lane] = job
            yield from self._feed(now)
            jobs = later

    def _lane(self, job: _Job, taken: dict[int, _Job]) -> int | None:
        free = [lane for lane in self._of(job.row) if lane not in taken]
        return max(free, key=lambda lane: _n_common(self._held[lane], job.ids), default=None)

    def _feed(self, jobs: dict[int, _Job]) -> Passes[None]:
        lanes = sorted(lane for lane, job in jobs.items() if self._fits(job))
        if not lanes:
            return
        new: list[list[int]] = []
        n_last: list[int] = []
        for lane in lanes:
            job = jobs[lane]
            first = job.nodes[0][0] - 1  # the token whose prediction comes first
            keep = min(_n_common(self._held[lane], job.ids), first)
            if keep < len(self._held[lane]):
                self._session.truncate(lane, keep)
            new.append(job.ids[keep:])
            n_last.append(len(job.ids) - first)
            self._held[lane] = list(job.ids)
        [result] = yield [ForwardPass(self._session, lanes, new, n_last)]
        output = result.output
        self.errors |= {lanes[n] // self._n_lanes: e for n, e in result.errors.items()}
        self.seconds += result.seconds
        self.n_forwards += output.n_passes
        self.n_calls += output.n_calls
        self.n_read += sum(map(len, new))
        for lane, logits in zip(lanes, torch.split(output.logits, n_last), strict=True):
            nodes = jobs[lane].nodes
            places = torch.tensor([n - nodes[0][0] for n, _ in nodes])
            wanting = [node for _, node in nodes]
            self._give(jobs[lane].row, wanting, logits[places.to(logits.device)])

    def _fits(self, job: _Job) -> bool:
        limit = self._model.context_length
        if limit is None or len(job.ids) <= limit:
            return True
        self.errors[job.row] = InputError(
            f"model '{self._model.name}' reads {limit} tokens at most, and this text is longer "
            "in its tokens; shorten the text or use a model with a longer context."
        )
        return False

    def _give(self, row: int, nodes: Sequence[Node], logits: Float[Tensor, "nodes width"]) -> None:
        # Columns of a padded head belong to no token.
        known = logits[:, : self._model.tokenizer.n_tokens].float().log_softmax(-1).cpu().double()
        weights = known[:, self._ids].exp().numpy()
        ends = known[:, self._ends].exp().sum(-1).tolist()
        for node, its_weights, end in zip(nodes, weights, ends, strict=True):
            if not node.learn(its_weights, end) > 0:
                self.errors[row] = ModelError(
                    f"model '{self._model.name}' puts all of its probability on tokens that its "
                    f"tokenizer would never write after the {node.n_bytes} bytes so far; the exact "
                    "byte bridge needs a model with the tokenizer that it was trained with."
                )
            if node in self.asked:
                node.forget(self.asked[node])


def _jobs(row: int, prompt: list[int], nodes: Sequence[Node]) -> list[_Job]:
    """The paths to read for some nodes: each is read on the first path that passes it."""
    left = dict.fromkeys(nodes)
    jobs: list[_Job] = []
    for leaf in sorted(nodes, key=lambda node: node.n_tokens, reverse=True):
        if leaf not in left:
            continue
        chain = leaf.chain()
        ids = [*prompt, *leaf.ids()]
        on_path = [(len(prompt) + node.n_tokens, node) for node in chain if node in left]
        for _, node in on_path:
            del left[node]
        for i in range(0, len(on_path), _MOST_NODES):
            part = on_path[i : i + _MOST_NODES]
            jobs.append(_Job(row, ids[: part[-1][0]], part))
    return jobs


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class _Row:
    prompt: list[int]
    cover: TokenLattice = field(repr=False)


class ByteSession:
    """Some texts that one model follows byte by byte, under the exact byte bridge.

    Attributes:
        n_forwards: forward passes so far.
        n_read: tokens read so far, those of side branches and of tokens read again included.

    Args:
        model: the model.
        n_rows: how many texts.
        lanes: how many paths of a row are read at once; others queue.
        prune: branches that cannot have more than this part of a text's mass are not read until
            their part grows. Each prediction is off by less than this part for each of them in
            total variation; 0 is exact.

    Raises:
        VocabularyError: if the model's tokenizer is not covered.
        InputError: if ``prune`` is no part or ``lanes`` is not positive.
    """

    def __init__(self, model: Model, n_rows: int, *, lanes: int = 4, prune: float = 1e-5) -> None:
        if not 0 <= prune < 1:
            raise InputError(f"prune is a part of the mass, at least 0 and below 1; got {prune}.")
        if model.max_top_logprobs is not None:
            raise CapabilityError(
                f"bytes need every probability of model '{model.name}', and its server "
                f"{model.server} returns {model.max_top_logprobs} tokens."
            )
        if lanes < 1:
            raise InputError(f"a byte session needs 1 lane or more, got {lanes}.")
        self._name = model.name
        self._prune = prune
        self._lanes = _Lanes(model, n_rows, lanes)
        self._rows: list[_Row | None] = [None] * n_rows

    @property
    def n_forwards(self) -> int:
        """Forward passes so far."""
        return self._lanes.n_forwards

    @property
    def n_calls(self) -> int:
        """HTTP requests so far."""
        return self._lanes.n_calls

    @property
    def n_read(self) -> int:
        """Tokens read so far."""
        return self._lanes.n_read

    @property
    def seconds(self) -> float:
        """What the forward passes took so far."""
        return self._lanes.seconds

    @property
    def errors(self) -> Mapping[int, InputError | ModelError]:
        """Per row that cannot be read on, the reason.

        Its text is longer than the model's context, the model gives it no probability, or what the
        model predicts is no distribution.
        """
        return self._lanes.errors

    def begin(self, row: int, prompt_ids: Sequence[int], given: Sequence[int] = ()) -> None:
        """Begin a new text.

        Args:
            row: its row.
            prompt_ids: the model's own tokens that it reads before the text; the text is cut into
                tokens as a continuation.
            given: tokens at the start of the text itself that are taken for certain.

        Raises:
            InputError: if there is nothing to read before the first prediction.
        """
        if not prompt_ids and not given:
            raise InputError(
                f"model '{self._name}' needs a token to begin with: its tokenizer adds none, "
                "so give a prompt or a text that is not empty."
            )
        slots = [self._lanes.paths.slot_of[token_id] for token_id in given]
        self._rows[row] = _Row(
            list(prompt_ids), TokenLattice(self._lanes.paths, self._lanes.table, slots)
        )
        self._lanes.clear(row)
        self._lanes.errors.pop(row, None)

    def feed(self, rows: Sequence[int], contents: Sequence[bytes]) -> None:
        """Append bytes to texts; the model is asked when its predictions are."""
        for row, content in zip(rows, contents, strict=True):
            self._row(row).cover.advance(content)

    def is_covered(self, row: int, n_bytes: int | None = None) -> bool:
        """Whether any path of the model's tokens covers the text; what is no UTF-8 has none.

        The model is not asked.

        Args:
            row: its row.
            n_bytes: of the text's first bytes only.
        """
        return bool(self._frontier(row, n_bytes))

    def _frontier(self, row: int, n_bytes: int | None = None) -> Frontier:
        cover = self._row(row).cover
        return cover.frontier if n_bytes is None else cover.frontier_at(n_bytes)

    def truncate(self, row: int, n_bytes: int) -> None:
        """Cut a text back to its first bytes (those of given tokens counted)."""
        self._row(row).cover.truncate(n_bytes)

    def _row(self, row: int) -> _Row:
        at = self._rows[row]
        if at is None:
            raise InputError(f"row {row} of the byte session has no text yet; begin one.")
        return at

    def _learn(self, asked: Sequence[tuple[int, Frontier]], predict: bool) -> Passes[None]:
        """Learn what is needed of some places; what is pruned may turn out to count."""
        of_row: dict[int, list[Frontier]] = {}
        for row, frontier in asked:
            of_row.setdefault(row, []).append(frontier)
        if len(asked) > len(of_row):
            # Many places of a text at once: first along its likeliest path, all in one go.
            trunks = {r: self._row(r).cover.trunk(f, predict=predict) for r, f in of_row.items()}
            yield from self._read(trunks)
        errors = self._lanes.errors
        while True:
            able = [row for row in of_row if row not in errors]
            if not (yield from self._read({r: self._wanted(r, of_row[r], predict) for r in able})):
                break
        for row, frontier in asked if predict else ():
            if row in errors:
                continue
            if self._row(row).cover.log_mass(frontier) == -math.inf:
                errors[row] = InputError(
                    f"model '{self._name}' cannot write the {self._row(row).cover.n_bytes} bytes "
                    "of this text: no tokens to which it gives any probability spell them."
                )

    def _wanted(self, row: int, frontiers: Sequence[Frontier], predict: bool) -> list[Node]:
        cover = self._row(row).cover
        found = (cover.wanted(f, predict=predict, prune=self._prune) for f in frontiers)
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def _read(self, wanted: dict[int, list[Node]]) -> Passes[bool]:
        """Read some paths; returns whether there were any."""
        wanted = {row: nodes for row, nodes in wanted.items() if nodes}
        if wanted:
            yield from self._lanes.learn({row: self._row(row).prompt for row in wanted}, wanted)
        return bool(wanted)

    def _tidy(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._row(row).cover.tidy(_KEPT_BYTES)

    def _asked_at(
        self, rows: Sequence[int], places: Sequence[Sequence[int]] | None
    ) -> Passes[list[tuple[int, Frontier]]]:
        """The branches at some places of texts, learned."""
        if places is None:
            asked = [(row, self._frontier(row)) for row in rows]
        else:
            pairs = zip(rows, places, strict=True)
            asked = [(row, self._frontier(row, place)) for row, each in pairs for place in each]
        yield from self._learn(asked, predict=True)
        return asked

    def next_byte_logprobs(
        self, rows: Sequence[int], places: Sequence[Sequence[int]] | None = None
    ) -> Float[Tensor, "positions 257"]:
        """Natural logs of the probabilities of the next byte; the last column is the text's end.

        Args:
            rows: distinct rows.
            places: per row, after how many bytes of its text to predict, one or more; ``None`` for
                once at the end of each.

        Returns:
            Row after row, within a row in the order of the places.

        Raises:
            InputError: if the model cannot write one of the texts.
            ModelError: if it puts all of its probability on what may not follow.
        """
        return self._alone(self.read_next_bytes(rows, places), rows)

    def _alone(self, steps: Passes[T], rows: Iterable[int]) -> T:
        result = run_alone(steps)
        for row in rows:
            if row in self.errors:
                raise self.errors[row]
        return result

    def read_next_bytes(
        self, rows: Sequence[int], places: Sequence[Sequence[int]] | None = None
    ) -> Passes[Float[Tensor, "positions 257"]]:
        """:meth:`next_byte_logprobs` as a computation that wants passes.

        A row that cannot be read on is in :attr:`errors`, and its predictions are even.
        """
        asked = yield from self._asked_at(rows, places)
        outcomes = [
            np.full(N_OUTCOMES, 1 / N_OUTCOMES)
            if row in self.errors
            else self._row(row).cover.outcomes(frontier)
            for row, frontier in asked
        ]
        self._tidy(rows)
        return torch.from_numpy(np.stack(outcomes)).log()

    def logprob(self, row: int) -> float:
        """Natural log of M(text so far): that the model's text begins with these bytes."""
        frontier = self._frontier(row)
        self._alone(self._learn([(row, frontier)], predict=False), [row])
        self._tidy([row])
        return self._row(row).cover.log_mass(frontier)

    def read_pieces(
        self, rows: Sequence[int], places: Sequence[Sequence[int]] | None = None
    ) -> Passes[list[Pieces | None]]:
        """What the model would write next in some texts, in its own tokens; all read together.

        ``None`` for a row that cannot be read on, which is in :attr:`errors`.

        Args:
            rows: distinct rows.
            places: as in :meth:`next_byte_logprobs`.
        """
        asked = yield from self._asked_at(rows, places)
        pieces = [
            None if row in self.errors else self._pieces(row, frontier) for row, frontier in asked
        ]
        self._tidy(rows)
        return pieces

    def pieces(self, row: int) -> Pieces:
        """What the model would write next, in its own tokens.

        Raises:
            InputError: if the model cannot write the text.
        """
        [pieces] = self._alone(self.read_pieces([row]), [row])
        assert pieces is not None
        return pieces

    def _pieces(self, row: int, frontier: Frontier) -> Pieces:
        found: list[tuple[int, Tensor, Tensor]] = []
        end = 0.0
        for branch, weight in self._row(row).cover.scaled(frontier):
            probs = torch.from_numpy(branch.node.probs[branch.low : branch.high]) * weight
            ids = torch.from_numpy(self._lanes.paths.ids[branch.low : branch.high])
            found.append((branch.depth, ids[probs > 0], probs[probs > 0]))
            end += weight * branch.node.end if branch.depth == 0 else 0.0
        total = end + sum(float(probs.sum()) for _, _, probs in found)
        return Pieces(
            tuple(Continuation(n, ids, (probs / total).log()) for n, ids, probs in found),
            math.log(end / total) if end > 0 else -math.inf,
        )

    def left_out(self, row: int) -> float:
        """The share of the model's mass that lay on what may not follow, at the last prediction.

        The mean of 1 - Z over the branches by their part of the text's mass.
        """
        self._alone(self._asked_at([row], None), [row])
        return sum(w * b.node.left_out for b, w in self._row(row).cover.weights())

    def mean_left_out(self, row: int) -> float:
        """The mean of 1 - Z per token, along the most likely path so far."""
        self._alone(self._asked_at([row], None), [row])
        branch, _ = max(self._row(row).cover.weights(), key=lambda pair: pair[1])
        n_given = self._row(row).cover.root.n_tokens
        shares = [node.left_out for node in branch.node.chain()[n_given:]]
        return sum(shares) / len(shares)


def span_logprobs(
    model: Model,
    prompt_ids: Sequence[int],
    text: bytes,
    ends: Sequence[int],
    *,
    end: bool = False,
    lanes: int = 8,
) -> Float[Tensor, "spans"]:
    """How likely a model finds the consecutive spans of a known text, each given all before it.

    The paths that run along the text are read at once, side branches after them, some at a time.
    Equal to the differences of :meth:`ByteSession.logprob`.

    Args:
        model: the model.
        prompt_ids: the model's own tokens that it reads before the text.
        text: the text.
        ends: where the spans end, in bytes, ascending; the first begins at 0.
        end: whether the end of the text after the last span is one more span.
        lanes: how many side branches are read at once.

    Returns:
        Natural logs, one per span.

    Raises:
        InputError: if the ends do not ascend within the text, or there is no prompt.
        VocabularyError: if the model's tokenizer is not covered.
    """
    places = [0, *ends]
    if any(a > b for a, b in itertools.pairwise(places)) or places[-1] > len(text):
        raise InputError(f"spans must end in ascending order within the {len(text)} bytes of text.")
    if not prompt_ids:
        raise InputError(f"model '{model.name}' needs a token to begin with; give a prompt.")
    reader = _Lanes(model, 1, lanes)
    cover = TokenLattice(reader.paths, reader.table)
    for i in range(0, places[-1], _CHUNK_BYTES):
        cover.advance(text[i : min(i + _CHUNK_BYTES, places[-1])])
        cover.tidy(_KEPT_BYTES)
    frontiers = [cover.frontier_at(place) for place in places]
    wanted = cover.wanted([branch for frontier in frontiers for branch in frontier], predict=False)
    wanted += cover.wanted(frontiers[-1], predict=True) if end else []
    asked: defaultdict[Node, set[tuple[int, int]]] = defaultdict(set)
    for frontier in frontiers:
        for branch in frontier:
            if branch.depth:
                asked[branch.node].add((branch.low, branch.high))
            node = branch.node
            while node.parent is not None and (node.slot, node.slot + 1) not in asked[node.parent]:
                asked[node.parent].add((node.slot, node.slot + 1))
                node = node.parent
    reader.asked = asked
    run_alone(reader.learn({0: list(prompt_ids)}, {0: wanted}))
    if reader.errors:
        raise reader.errors[0]
    masses = [cover.log_mass(frontier) for frontier in frontiers]
    if end:
        masses.append(log_sum([b.log_end for b in frontiers[-1]]))
    spans = [b - a if b > -math.inf else b for a, b in itertools.pairwise(masses)]
    return torch.tensor(spans, dtype=torch.float64)
