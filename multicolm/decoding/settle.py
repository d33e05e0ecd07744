"""From what the models show to who writes which token: the one place where policies are asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Likeliest, likeliest
from multicolm.errors import PolicyError
from multicolm.policy.base import MixPolicy, Needs, Policy, SelectPolicy, VerifyPolicy
from multicolm.views import ModelNames, View, Views

__all__ = ["PolicyDesk", "Verdict", "ends_text"]


@dataclass
class Verdict:
    """What was decided at the positions of a draft; absent where it must be asked later.

    Attributes:
        writers: per position number, the index of the writer.
        tokens: per position number, the token.
        logprobs: per position number, its log-probability in nats.
        alternatives: per position number, the likeliest tokens there, where they are wanted.
        wanted: per position number, how many of these.
    """

    writers: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)
    alternatives: dict[int, Likeliest] = field(default_factory=dict)
    wanted: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def on(cls, draft: Draft) -> Verdict:
        """Nothing is decided yet."""
        rows = draft.positions.rows
        return cls(wanted={i: row.n_alternatives for i, row in enumerate(rows)})

    def enter(
        self,
        which: Sequence[int],
        writers: Sequence[int],
        tokens: Tensor,
        logits: Tensor,
        *,
        partial: bool = False,
    ) -> None:
        """Note tokens and their log-probabilities under ``logits``.

        Args:
            which: position numbers.
            writers: of these positions.
            tokens: of these positions.
            logits: of these positions.
            partial: whether they are log-probabilities of some tokens only, which are not to be
                normalised; +inf is one that is not known.
        """
        known = logits.float() if partial else logits.float().log_softmax(-1)
        logprobs = known.gather(-1, tokens[:, None])[:, 0]
        logprobs = logprobs.masked_fill(logprobs == float("inf"), float("nan"))
        self.writers.update(zip(which, writers, strict=True))
        self.tokens.update(zip(which, tokens.tolist(), strict=True))
        self.logprobs.update(zip(which, logprobs.tolist(), strict=True))
        for line, i in enumerate(which):
            if n := self.wanted.get(i):
                self.alternatives[i] = likeliest(known[line], n)


class PolicyDesk:
    """Asks one policy, hands it the right views, and checks what it answers.

    Args:
        policy: the policy.
        models: names of the ensemble's models.
        starts_word: per shared token, whether it begins a word.
        embeds: per model index, what gives the input embeddings of shared ids.
        first_tokens: per model index, with which token it begins to spell each token, where models
            have different vocabularies.
        max_top_logprobs: of models that tell of their likeliest tokens only, by index: of how many.
        costs: per model, of one forward pass for one text; see :attr:`multicolm.Views.costs`.
        extends: per shared token, which tokens begin with its text.
        text_nll: of positions and some models, see :attr:`multicolm.views.Views.text_nll`.

    Raises:
        CapabilityError: if the policy speaks of a model that is not there.
    """

    def __init__(
        self,
        policy: Policy,
        models: ModelNames,
        starts_word: Tensor,
        embeds: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        first_tokens: Callable[[int], Tensor] | None = None,
        max_top_logprobs: Mapping[int, int] | None = None,
        costs: Sequence[float] | None = None,
        extends: Callable[[Tensor], Tensor] | None = None,
        text_nll: Callable[[Positions, Sequence[int]], Tensor] | None = None,
    ) -> None:
        self.policy = policy
        self._text_nll = text_nll
        self._extends = extends
        self._costs = costs
        self._max_top_logprobs = max_top_logprobs or {}
        self.models = models
        self.needs: Needs = policy.needs(models)
        self._starts_word = starts_word
        self._embeds = embeds or {}
        self._first_tokens = first_tokens
        self._uses = policy.uses(models)
        if unused := sorted(set(policy.prompt_states(models)) - self._uses):
            raise PolicyError(
                f"policy '{policy.name}': prompt_states() names model '{models[unused[0]]}', "
                "which uses() leaves out; name it there too."
            )
        self._scores = type(policy).score is not Policy.score
        self._narrows = policy.narrows

    def views(
        self,
        positions: Positions,
        which: Sequence[int],
        shown: dict[int, Shown],
        candidates: Mapping[int, Tensor] | None = None,
        models: Collection[int] | None = None,
    ) -> Views:
        """Views of the positions numbered ``which`` from all models that were looked at there.

        Args:
            positions: of the draft.
            which: some of them.
            shown: per model index, what it shows.
            candidates: per model index, what its server was asked about besides.
            models: those that are to be seen; all that were looked at, if not given.
        """
        device = torch.device("cpu")
        views: dict[int, View] = {}
        for k, model in shown.items():
            if not model.knows(which) or (models is not None and k not in models):
                continue
            logits = model.logits(which, flat=k in self._max_top_logprobs)
            device = logits.device
            views[k] = View(
                logits,
                model.hidden(which),
                signals=self.needs.of(k),
                name=self.models[k],
                embed=self._embeds.get(k),
                max_top_logprobs=self._max_top_logprobs.get(k),
                candidates=(candidates or {}).get(k),
            )
        here = positions.at(which)
        context = here.context(device)
        if not self.policy.history:
            del context["previous"], context["base_run"]
        if self.policy.likelihoods and self._text_nll is not None:
            context["text_nll"] = partial(self._text_nll, here, sorted(views))
        return Views(
            self.models,
            views,
            n_positions=len(which),
            context=context,
            drawn=here.probs,
            starts_word=self._starts_word,
            first_tokens=self._first_tokens,
            closed={
                k: torch.tensor([i in model.closed for i in which], device=device)
                for k, model in shown.items()
                if k in views and model.closed
            },
            costs=self._costs,
            extends=self._extends,
        )

    def text_views(self, positions: Positions) -> Views:
        """What is known of new texts before any model is looked at: one position of each."""
        device = torch.device("cpu")
        context = positions.text_context(device)
        context["uniform"] = lambda: positions.uniform("text")
        return Views(
            self.models,
            {},
            n_positions=len(positions),
            context=context,
            costs=self._costs,
        )

    def seen(self, draft: Draft, which: Sequence[int]) -> Views:
        """What the policy sees at positions where it sees the same models."""
        models = draft.seen.get(which[0]) if which else None
        return self.views(draft.positions, which, draft.shown, draft.candidates, models)

    def candidates(self, draft: Draft, which: Sequence[int]) -> dict[int, Tensor]:
        """Per model index whose server does not tell of all tokens: which ones the policy names."""
        wanting = [
            k
            for k in self._max_top_logprobs
            if "token_logprobs" in self.needs.of(k) and k in draft.shown
        ]
        if not wanting:
            return {}
        if "logprobs" in frozenset().union(*(self.needs.of(k) for k in wanting)):
            return {}  # it says itself what it makes of the others
        views = self.seen(draft, which)
        wanting = [k for k in wanting if k in views]
        named = {}
        for k in wanting:
            named[k] = self.policy.candidates(views, k)
            if named[k].dtype != torch.int64 or named[k].shape[:1] != (len(which),):
                raise PolicyError(
                    f"policy '{self.policy.name}': candidates() must return an int64 tensor with "
                    f"{len(which)} rows, one per position."
                )
        return named

    def defers(self, views: Views) -> list[bool]:
        """Where the base model may hand over, judged by its own view."""
        answer = self.policy.defers(views)
        self.check(answer, views, "defers", {torch.bool})
        return [bool(flag) for flag in answer.tolist()]

    def scores(self, views: Views) -> list[float | None]:
        """The numbers the policy decides on; ``None`` where it gives none."""
        answer = self.policy.score(views) if self._scores else None
        if answer is None:
            return [None] * views.n_positions
        self.check(answer, views, "score", {torch.float32, torch.float64})
        return [float(number) for number in answer.tolist()]

    def decide(self, draft: Draft, which: Sequence[int], verdict: Verdict) -> dict[int, int]:
        """Ask the policy about the positions numbered ``which``.

        Decided positions are entered into ``verdict``.

        Returns:
            Per position number, the writer that still has to be looked at before it can write.
        """
        views = self.seen(draft, which)
        if self.policy.assistants == "always" and self._scores:
            for i, score in zip(which, self.scores(views), strict=True):
                draft.scores[i] = score
        acts = self.policy.acts
        if acts == "select" and isinstance(self.policy, SelectPolicy):
            return self._select(self.policy, views, draft, which, verdict)
        if acts == "mix" and isinstance(self.policy, MixPolicy):
            self._mix(self.policy, views, draft, which, verdict)
        elif acts == "verify" and isinstance(self.policy, VerifyPolicy):
            self._verify(self.policy, views, draft, which, verdict)
        else:
            raise PolicyError(
                f"policy '{self.policy.name}' is a {type(self.policy).__name__}; a policy derives "
                "from SelectPolicy, MixPolicy, VerifyPolicy or SegmentPolicy."
            )
        return {}

    def write(self, draft: Draft, writer: int, which: Sequence[int], verdict: Verdict) -> None:
        """Let a model that was looked at write the positions numbered ``which``."""
        logits = draft.shown[writer].logits(which)
        if writer == 0 and draft.tokens:
            tokens = torch.tensor([draft.tokens[i] for i in which], device=logits.device)
        else:
            tokens = draft.positions.at(which).draw(logits)
        partial = writer in self._max_top_logprobs
        verdict.enter(which, [writer] * len(which), tokens, logits, partial=partial)

    def _select(
        self,
        policy: SelectPolicy,
        views: Views,
        draft: Draft,
        which: Sequence[int],
        verdict: Verdict,
    ) -> dict[int, int]:
        answer = policy.select(views)
        self.check(answer, views, "select", {torch.int64, torch.int32})
        writers: list[int] = answer.tolist()
        wrong = sorted(set(writers) - self._uses)
        if wrong:
            used = ", ".join(f"{k} {self.models[k]}" for k in sorted(self._uses))
            raise PolicyError(
                f"policy '{policy.name}' chose model {wrong[0]}; allowed are those that it uses "
                f"({used})."
            )
        rows = draft.positions.rows
        if self._narrows:
            for i, k in zip(which, writers, strict=True):
                if k not in rows[i].models:
                    raise PolicyError(
                        f"policy '{policy.name}' chose model {k} for a text for which text_uses() "
                        f"gave {list(rows[i].models)}."
                    )
        # Between the places where it can go on, another model's turn is that of who writes.
        writers = [draft.able(k, i) for i, k in zip(which, writers, strict=True)]
        waiting: dict[int, int] = {}
        for k in sorted(set(writers)):
            theirs = [i for i, writer in zip(which, writers, strict=True) if writer == k]
            known = k in draft.shown and all(i in draft.shown[k].line_of for i in theirs)
            if known:
                self.write(draft, k, theirs, verdict)
            else:
                waiting.update(dict.fromkeys(theirs, k))
        return waiting

    def _mix(
        self, policy: MixPolicy, views: Views, draft: Draft, which: Sequence[int], verdict: Verdict
    ) -> None:
        mixed = policy.mix(views)
        self.check(
            mixed, views, "mix", {torch.float32, torch.float64}, width=len(self._starts_word)
        )
        # The greatest of a row is NaN if anything in the row is.
        if not bool(mixed.max(-1).values.isfinite().all()):
            raise PolicyError(
                f"policy '{policy.name}' returned a distribution without any possible token, "
                "or with NaN or infinity."
            )
        tokens = draft.positions.at(which).draw(mixed)
        writers = self._mix_writers(policy, views)
        for k in sorted(set(writers)):
            lines = [line for line, writer in enumerate(writers) if writer == k]
            theirs = [which[line] for line in lines]
            partial = k in self._max_top_logprobs
            verdict.enter(theirs, [k] * len(lines), tokens[lines], mixed[lines], partial=partial)

    def _mix_writers(self, policy: MixPolicy, views: Views) -> list[int]:
        """Per position, the model whose own distribution was returned, or the mixture."""
        answer = policy.writers(views)
        if answer is None:
            return [len(self.models)] * views.n_positions
        self.check(answer, views, "writers", {torch.int64, torch.int32})
        writers: list[int] = answer.tolist()
        if wrong := sorted(set(writers) - self._uses - {len(self.models)}):
            raise PolicyError(
                f"policy '{policy.name}': writers() named model {wrong[0]}; allowed are those that "
                f"it uses ({', '.join(map(str, sorted(self._uses)))}), and {len(self.models)} for "
                "the mixture."
            )
        return writers

    def _verify(
        self,
        policy: VerifyPolicy,
        views: Views,
        draft: Draft,
        which: Sequence[int],
        verdict: Verdict,
    ) -> None:
        target = policy.target_probs(views)
        self.check(
            target,
            views,
            "target_probs",
            {torch.float32, torch.float64},
            width=len(self._starts_word),
        )
        # Asked in this way round, so that NaN is refused too.
        if not bool((target >= 0).all()) or not bool(((target.sum(-1) - 1).abs() <= 1e-3).all()):
            raise PolicyError(
                f"policy '{policy.name}' returned target_probs whose rows are no probabilities."
            )
        positions = draft.positions.at(which)
        drafted = torch.tensor([draft.tokens[i] for i in which], device=target.device)[:, None]
        proposal = (1 - policy.lenience) * views.drawn_probs(0)
        uniform = positions.uniform("accept")
        wanted, proposed = target.gather(-1, drafted)[:, 0], proposal.gather(-1, drafted)[:, 0]
        # u < p / q without the division: nothing is kept that the target rules out, and with full
        # lenience, where q counts as 0, everything is.
        kept = (uniform.to(target.device) * proposed < wanted) | (policy.lenience >= 1)
        residual = (target - proposal).clamp_min(0)
        # Rounding may leave nothing where target and proposal are equal; nothing is rejected there.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
        replaced = positions.jittered(residual.log(), "residual")
        tokens = torch.where(kept, drafted[:, 0], replaced.argmax(-1))
        writer = policy.replaces(self.models)
        if writer not in draft.shown or not draft.shown[writer].knows(which):
            raise PolicyError(
                f"policy '{policy.name}': replaces() named model {writer}, which was not run; "
                f"name one of its needs ({', '.join(map(str, sorted(draft.shown)))})."
            )
        for k, chosen in ((0, kept), (writer, ~kept)):
            lines = chosen.nonzero()[:, 0]
            theirs = [which[line] for line in lines.tolist()]
            if theirs:
                logits = draft.shown[k].logits(theirs)
                partial = k in self._max_top_logprobs
                verdict.enter(theirs, [k] * len(theirs), tokens[lines], logits, partial=partial)

    def check(
        self,
        answer: object,
        views: Views,
        method: str,
        dtypes: set[torch.dtype],
        *,
        width: int | None = None,
    ) -> None:
        """Refuse what is not one number per position, or one row of ``width`` numbers.

        Raises:
            PolicyError: naming the policy and its method.
        """
        n = views.n_positions
        shape = (n,) if width is None else (n, width)
        got: object = type(answer).__name__
        if isinstance(answer, Tensor):
            if answer.dtype in dtypes and answer.shape == shape:
                return
            got = f"a {answer.dtype} tensor of shape {list(answer.shape)}"
        allowed = " or ".join(sorted(str(dtype) for dtype in dtypes))
        size = f"{n} entries" if width is None else f"{n} rows of {width}"
        raise PolicyError(
            f"policy '{self.policy.name}': {method}() must return a {allowed} tensor with "
            f"{size}, one per position, and returned {got}."
        )


def ends_text(policy: Policy, row: Row, writer: int) -> bool:
    """Whether a policy ends a text here, in the place of a token of ``writer``'s.

    Raises:
        PolicyError: if it answers anything but a bool.
    """
    if not policy.can_end_texts:
        return False
    ids, writers = [t.token for t in row.written], [t.writer for t in row.written]
    answer: object = policy.ends_text(ids, writers, writer)
    if not isinstance(answer, bool):
        raise PolicyError(
            f"policy '{policy.name}': ends_text() must return True or False, and returned "
            f"{answer!r}."
        )
    return answer
