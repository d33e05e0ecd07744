"""The laws of policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multicolm.decoding.sampling import Sampling
from multicolm.errors import CapabilityError
from multicolm.policy.base import (
    MixPolicy,
    NewTokens,
    Policy,
    SegmentPolicy,
    Segments,
    SelectPolicy,
    VerifyPolicy,
    check_used,
)
from multicolm.testing.laws import LawBroken
from multicolm.views import ModelNames, View, Views, prompt_hidden_key

__all__ = ["check_policy"]

_VOCAB, _HIDDEN, _POSITIONS = 11, 6, 24


def check_policy(policy: Policy, *, seed: int = 0) -> None:
    """A policy is a pure function of the views, position by position.

    Laws: it is deterministic; it leaves the views as they are; a position's answer depends on that
    position alone; it names models that exist and that it said it would use; a distribution has no
    NaN and a possible token; a token that a mixing policy ascribes to a model is drawn from that
    model's distribution; ``certain`` deferral is a hand-over. What it remembers of a text is a row
    of numbers of one width, and follows from the views alone.

    Args:
        policy: what to check; tried on random views of ensembles of 1 to 4 models.
        seed: of the random views.

    Raises:
        LawBroken: naming the law.
        CapabilityError: if no ensemble of 1 to 4 models suits it.
    """
    refusal: CapabilityError | None = None
    n_tried = 0
    for n_models in range(1, 5):
        models = ModelNames(["base", *(f"assistant-{k}" for k in range(1, n_models))])
        try:
            policy.needs(models)
            check_used(policy, models)
        except CapabilityError as error:
            refusal = error
            continue
        n_tried += 1
        for temperature in (0.0, 0.8):
            _check_on(policy, _Scene(policy, models, seed + n_models, Sampling(temperature)))
    if n_tried == 0 and refusal is not None:
        raise refusal


class _Scene:
    """Random views of some models at some positions, any of which can be shown again."""

    def __init__(self, policy: Policy, models: ModelNames, seed: int, sampling: Sampling) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = _POSITIONS
        self.models = models
        self.needs = policy.needs(models)
        self.history = policy.history
        self.prompts = policy.prompts
        self.sampling = sampling
        # Flat and peaked distributions alike, so that thresholds fall on both sides.
        scale = torch.rand(len(models), n, 1, generator=generator) * 6
        self.logits = torch.randn(len(models), n, _VOCAB, generator=generator) * scale
        self.hidden = torch.randn(len(models), n, _HIDDEN, generator=generator)
        self.context = {
            "previous": torch.randint(-1, len(models), (n,), generator=generator),
            "base_run": torch.randint(0, 15, (n,), generator=generator),
            "place": torch.randint(0, 40, (n,), generator=generator),
            "uniform": torch.rand(n, generator=generator),
            "greedy": torch.full((n,), sampling.greedy),
            "thinking": torch.arange(n) % 3 == 0,
            "prompt_mean_nll": torch.rand(n, len(models), generator=generator) * 4,
        }
        # Token i begins like token (i - 1) // 2, as in a binary tree.
        self.extends = torch.eye(_VOCAB, dtype=torch.bool)
        for token in range(_VOCAB - 1, 0, -1):
            self.extends[(token - 1) // 2] |= self.extends[token]
        self.context["prompt_length"] = torch.randint(1, 20, (n,), generator=generator)
        self.text_nll = torch.rand(n, len(models), generator=generator) * 30
        self.likelihoods = policy.likelihoods
        for k, pooling in policy.prompt_states(models).items():
            for how in sorted(pooling):
                states = torch.randn(n, _HIDDEN, generator=generator)
                self.context[prompt_hidden_key(k, how)] = states
        self.costs = (torch.rand(len(models), generator=generator) * 9).tolist()
        self.allowed: Tensor | None = None
        self.generator = generator
        self.starts_word = torch.rand(_VOCAB, generator=generator) < 0.5

    def may(self, position: int, model: int) -> bool:
        """Whether a model may write the text of a position, if that was said."""
        return self.allowed is None or bool(self.allowed[position, model])

    def new_tokens(self, writers: Sequence[int]) -> NewTokens:
        """A random token at every position, of one of some writers."""
        n = _POSITIONS
        chosen = torch.randint(0, len(writers), (n,), generator=self.generator)
        return NewTokens(
            torch.randint(0, _VOCAB, (n,), generator=self.generator),
            torch.tensor(writers)[chosen],
            -torch.rand(n, generator=self.generator) * 5,
        )

    def views(self, which: Sequence[int], shown: Sequence[int] | None = None) -> Views:
        """What is seen at some positions: of all models that are needed, or of some of these."""
        index = self.shown_last = torch.tensor(list(which), dtype=torch.long)
        shown = range(len(self.models)) if shown is None else shown
        views = {
            k: View(
                self.logits[k][index].clone(),
                self.hidden[k][index].clone() if "hidden" in self.needs.of(k) else None,
                signals=self.needs.of(k),
                name=self.models[k],
            )
            for k in shown
            if self.needs.of(k)
        }
        hidden = {"previous", "base_run"} if not self.history else set()
        hidden |= {"prompt_mean_nll", "prompt_length"} if not self.prompts else set()
        known = [what for what in self.context if what not in hidden]
        text_nll = torch.full((len(index), len(self.models)), torch.nan)
        for k in views:
            text_nll[:, k] = self.text_nll[index, k]

        def fetch(what: str) -> Callable[[], Tensor]:
            return lambda: self.context[what][index].clone()

        return Views(
            self.models,
            views,
            n_positions=len(index),
            context={what: fetch(what) for what in known}
            | ({"text_nll": text_nll.clone} if self.likelihoods else {}),
            drawn=self.sampling.probs,
            starts_word=self.starts_word,
            extends=lambda ids: self.extends[ids],
            costs=self.costs,
        )


def _turned(segments: Segments) -> Segments:
    """The same in the opposite order."""
    state = None if segments.state is None else segments.state.flip(0)
    return Segments(segments.nats.flip(0), segments.n_tokens.flip(0), state)


def _check_ratings(policy: SegmentPolicy, scene: _Scene) -> None:
    """Ratings of some proposals, and what is learned of them, again and in another order."""
    n_models, generator = len(policy.uses(scene.models)), scene.generator
    shape = (_POSITIONS, n_models, n_models)
    n_tokens = torch.randint(1, 6, shape, generator=generator)
    state = scene.context.get("state")
    segments = Segments(torch.rand(shape, generator=generator) * 9, n_tokens, state)
    turned = _turned(segments)
    rated = policy.rate(segments)
    if rated.shape != shape[:2] or bool(rated.isnan().any()):
        raise LawBroken("one number per proposal", f"rate() returned {list(rated.shape)}.")
    if not _same(rated, policy.rate(segments)) or not _same(rated, policy.rate(turned).flip(0)):
        raise LawBroken(
            "a position's answer depends on that position alone",
            "rate() of the same proposals, again or in another order, differs.",
        )
    if not policy.keeps_state:
        return
    chosen = rated.argmax(-1)
    state = policy.feedback(segments, chosen)
    again = policy.feedback(segments, chosen)
    back = policy.feedback(turned, chosen.flip(0)).flip(0)
    if segments.state is None or state.shape != segments.state.shape:
        raise LawBroken(
            "what is remembered of a text keeps its width", f"feedback() gave {list(state.shape)}."
        )
    if not _same(state, again) or not _same(state, back):
        raise LawBroken(
            "a position's answer depends on that position alone",
            "feedback() on the same segments, again or in another order, differs.",
        )
    scene.context["state"] = state


def _check_on(policy: Policy, scene: _Scene) -> None:
    _check_memory(policy, scene)
    _check_endings(policy, scene)
    if isinstance(policy, SegmentPolicy):
        for _ in range(3 if policy.keeps_state else 1):
            _check_ratings(policy, scene)
        return
    every = list(range(_POSITIONS))
    deferring = every
    if policy.can_defer:
        ask: Callable[[Views], Tensor] = policy.defers
        answer = _check_pure("defers", ask, scene, every, [0])
        deferring = answer.nonzero()[:, 0].tolist()
    asked = deferring if policy.assistants == "deferred" else every
    if not asked:
        return
    name, method = _method(policy)
    answer = _answers(policy, name, method, scene, asked)
    if isinstance(policy, SelectPolicy):
        allowed = policy.uses(scene.models)
        outside = [i for i, k in zip(asked, answer.tolist(), strict=True) if not scene.may(i, k)]
        if outside:
            raise LawBroken(
                "a text is written by the models that were said to be used for it",
                f"select() named another one at position {outside[0]} than text_uses() gave.",
            )
        wrong = sorted(set(answer.tolist()) - allowed)
        if wrong:
            raise LawBroken(
                "a policy names models that exist and that it uses",
                f"select() named {wrong}; uses() allows {sorted(allowed)}.",
            )
        if policy.certain and len(scene.models) > 1:
            base_wrote = [i for i in deferring if int(answer[asked.index(i)]) == 0]
            if base_wrote:
                raise LawBroken(
                    "certain deferral is a hand-over",
                    f"defers() was true and select() gave the base model at {base_wrote[0]}.",
                )
        return
    if bool(answer.isnan().any()) or bool((answer.max(-1).values == float("-inf")).any()):
        raise LawBroken(
            "a distribution has no NaN and a possible token", f"{name}() returned one without."
        )
    if isinstance(policy, MixPolicy):
        _check_writers(policy, scene, asked, answer)
    if isinstance(policy, VerifyPolicy) and bool(((answer.sum(-1) - 1).abs() > 1e-3).any()):
        raise LawBroken("target probabilities sum to 1", f"sums: {answer.sum(-1).tolist()}.")


def _answers(
    policy: Policy,
    name: str,
    method: Callable[[Views], Tensor],
    scene: _Scene,
    asked: Sequence[int],
) -> Tensor:
    """What the policy answers, shown the models that it wants to see at each position."""
    if not policy.names_models:
        return _check_pure(name, method, scene, asked)
    always = sorted(scene.needs.always)
    flags = _check_pure("models_at", policy.models_at, scene, asked, always)
    if flags.dtype != torch.bool or flags.shape != (len(asked), len(scene.models)):
        raise LawBroken("one flag per position and model", f"models_at() gave {flags.shape}.")
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, line in zip(asked, flags.tolist(), strict=True):
        named = [k for k in scene.needs.deferred if line[k]]
        groups.setdefault(tuple(sorted({*always, *named})), []).append(i)
    answers: dict[int, Tensor] = {}
    for shown, which in groups.items():
        found = _check_pure(name, method, scene, which, shown)
        answers |= dict(zip(which, found, strict=True))
    return torch.stack([answers[i] for i in asked])


def _check_writers(policy: MixPolicy, scene: _Scene, asked: Sequence[int], mixed: Tensor) -> None:
    """Whoever is named as the writer has drawn the token from its own distribution."""
    if policy.names_models or policy.writers(scene.views(asked)) is None:
        return

    def named(views: Views) -> Tensor:
        answer = policy.writers(views)
        return torch.empty(0) if answer is None else answer

    writers = _check_pure("writers", named, scene, asked)
    n_models = len(scene.models)
    wrong = sorted(set(writers.tolist()) - policy.uses(scene.models) - {n_models})
    if wrong:
        raise LawBroken(
            "a policy names models that exist and that it uses",
            f"writers() named {wrong}; uses() allows {sorted(policy.uses(scene.models))}.",
        )
    for line in (writers < n_models).nonzero()[:, 0].tolist():
        k = int(writers[line])
        own = scene.logits[k][asked[line]].log_softmax(-1)
        if not _same(mixed[line].log_softmax(-1), own):
            raise LawBroken(
                "a token that a mixing policy ascribes to a model is drawn from its distribution",
                f"writers() named model {k} at position {asked[line]}; mix() returned another one.",
            )


def _check_memory(policy: Policy, scene: _Scene) -> None:
    """What it remembers of texts, from their beginnings through some tokens; left in the scene."""
    every, models = list(range(_POSITIONS)), scene.models
    if policy.keeps_state:
        scene.context["state"] = _check_pure(
            "initial_state", policy.initial_state, scene, every, []
        )
    if policy.narrows:
        flags = _check_pure("text_uses", policy.text_uses, scene, every, [])
        allowed = torch.tensor([k in policy.uses(models) for k in range(len(models))])
        if flags.dtype != torch.bool or flags.shape != (_POSITIONS, len(models)):
            raise LawBroken("one flag per text and model", f"text_uses() gave {flags.shape}.")
        if not bool(flags.any(-1).all()) or bool((flags & ~allowed).any()):
            raise LawBroken(
                "a text has a model, and only models that the policy uses",
                f"text_uses() gave {flags.tolist()}; uses() allows {allowed.tolist()}.",
            )
        scene.allowed = flags
    writers = [len(models)] if policy.acts == "mix" else sorted(policy.uses(models))
    needs = scene.needs
    everybody, always = sorted({*needs.always, *needs.deferred}), sorted(needs.always)
    # A model that runs only where the base model defers is not always there to see.
    for shown in (everybody, always, everybody) if policy.keeps_state else ():
        written = scene.new_tokens(writers)

        def update(views: Views, written: NewTokens = written) -> Tensor:
            at = scene.shown_last
            return policy.update(
                views, NewTokens(written.ids[at], written.writers[at], written.logprobs[at])
            )

        before = scene.context["state"]
        after = _check_pure("update", update, scene, every, shown)
        if after.shape != before.shape:
            raise LawBroken(
                "what is remembered of a text keeps its width",
                f"update() made {list(after.shape)} out of {list(before.shape)}.",
            )
        scene.context["state"] = after


def _check_endings(policy: Policy, scene: _Scene) -> None:
    """Whether texts end, asked about some and again."""
    if not policy.can_end_texts:
        return
    writers = sorted(policy.uses(scene.models))
    for length in (0, 1, 12):
        written = scene.new_tokens(writers)
        ids, wrote = written.ids.tolist()[:length], written.writers.tolist()[:length]
        for writer in writers:
            answers: list[object] = [policy.ends_text(ids, wrote, writer) for _ in range(2)]
            if not all(isinstance(answer, bool) for answer in answers) or len(set(answers)) > 1:
                raise LawBroken(
                    "a policy ends a text by what is written alone",
                    f"ends_text() asked twice about the same text gave {answers}.",
                )


def _method(policy: Policy) -> tuple[str, Callable[[Views], Tensor]]:
    if isinstance(policy, SelectPolicy):
        return "select", policy.select
    if isinstance(policy, MixPolicy):
        return "mix", policy.mix
    if isinstance(policy, VerifyPolicy):
        return "target_probs", policy.target_probs
    raise LawBroken(
        "a policy is a SelectPolicy, a MixPolicy, a VerifyPolicy or a SegmentPolicy",
        f"got {type(policy).__name__}.",
    )


def _check_pure(
    name: str,
    method: Callable[[Views], Tensor],
    scene: _Scene,
    which: Sequence[int],
    shown: Sequence[int] | None = None,
) -> Tensor:
    """Ask about all positions, again, in another order, and one by one; the answers must agree."""
    views = scene.views(which, shown)
    answer = method(views).clone()  # it may be a view's own tensor, written into by the next call
    if answer.shape[:1] != (len(which),):
        raise LawBroken(
            "one answer per position",
            f"{name}() returned shape {list(answer.shape)} for {len(which)} positions.",
        )
    again = method(views)
    if not _same(answer, again):
        raise LawBroken(
            "a policy is deterministic and leaves the views as they are",
            f"{name}() asked twice: {_difference(answer, again)}",
        )
    turned = method(scene.views(list(reversed(which)), shown)).flip(0)
    singly = torch.cat([method(scene.views([i], shown)) for i in which])
    for how, other in (("in another order", turned), ("one by one", singly)):
        if not _same(answer, other):
            raise LawBroken(
                "a position's answer depends on that position alone",
                f"{name}() of all positions at once and {how}: {_difference(answer, other)}",
            )
    return answer


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}."
    line = next(i for i in range(len(a)) if not _same(a[i : i + 1], b[i : i + 1]))
    return f"position {line} got {a[line].tolist()} and {b[line].tolist()}."


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_floating_point:
        return torch.allclose(a, b, atol=1e-5, rtol=1e-4, equal_nan=True)
    return bool(torch.equal(a, b))
