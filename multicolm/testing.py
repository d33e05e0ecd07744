"""The laws that every plug-in keeps, as checks that its author can run.

    from multicolm.testing import check_policy

    def test_my_policy_keeps_the_laws():
        check_policy(MyPolicy(threshold=0.3))

Each check returns nothing, or raises :class:`LawBroken`, which names the law and what was seen.
multicolm runs the same checks on everything that it ships.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.decoding.sampling import Sampling
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError
from multicolm.policy.base import MixPolicy, Policy, SelectPolicy, VerifyPolicy
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Prompt
from multicolm.views import ModelNames, View, Views

__all__ = [
    "LawBroken",
    "check_model",
    "check_policy",
    "check_removable",
    "check_routing",
    "check_tokenizer",
]

_VOCAB, _HIDDEN, _POSITIONS = 11, 6, 24


class LawBroken(AssertionError):
    """A plug-in does not keep a law; the message says which and what was seen."""

    def __init__(self, law: str, seen: str) -> None:
        super().__init__(f"law broken: {law}. {seen}")
        self.law = law


# --- policies -------------------------------------------------------------------------------------


def check_policy(policy: Policy, *, seed: int = 0) -> None:
    """A policy is a pure function of the views, position by position.

    Laws: it is deterministic; it leaves the views as they are; a position's answer depends on that
    position alone; it names models that exist and that it said it would use; a distribution has no
    NaN and a possible token; ``certain`` deferral is a hand-over.

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
            policy.uses(models)
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
        self.sampling = sampling
        # Flat and peaked distributions alike, so that thresholds fall on both sides.
        scale = torch.rand(len(models), n, 1, generator=generator) * 6
        self.logits = torch.randn(len(models), n, _VOCAB, generator=generator) * scale
        self.hidden = torch.randn(len(models), n, _HIDDEN, generator=generator)
        self.context = {
            "previous": torch.randint(-1, len(models), (n,), generator=generator),
            "base_run": torch.randint(0, 15, (n,), generator=generator),
            "uniform": torch.rand(n, generator=generator),
        }
        self.starts_word = torch.rand(_VOCAB, generator=generator) < 0.5

    def views(self, which: Sequence[int], *, base_only: bool = False) -> Views:
        index = torch.tensor(list(which), dtype=torch.long)
        shown = [0] if base_only else range(len(self.models))
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
        known = ("uniform", "previous", "base_run") if self.history else ("uniform",)

        def fetch(what: str) -> Callable[[], Tensor]:
            return lambda: self.context[what][index].clone()

        return Views(
            self.models,
            views,
            n_positions=len(index),
            context={what: fetch(what) for what in known},
            drawn=self.sampling.probs,
            starts_word=self.starts_word,
        )


def _check_on(policy: Policy, scene: _Scene) -> None:
    every = list(range(_POSITIONS))
    deferring = every
    if policy.can_defer:
        ask: Callable[[Views], Tensor] = policy.defers
        answer = _check_pure("defers", ask, scene, every, base_only=True)
        deferring = answer.nonzero()[:, 0].tolist()
    asked = deferring if policy.assistants == "deferred" else every
    if not asked:
        return
    name, method = _method(policy)
    answer = _check_pure(name, method, scene, asked)
    if isinstance(policy, SelectPolicy):
        allowed = policy.uses(scene.models)
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
    if isinstance(policy, VerifyPolicy) and bool(((answer.sum(-1) - 1).abs() > 1e-3).any()):
        raise LawBroken("target probabilities sum to 1", f"sums: {answer.sum(-1).tolist()}.")


def _method(policy: Policy) -> tuple[str, Callable[[Views], Tensor]]:
    if isinstance(policy, SelectPolicy):
        return "select", policy.select
    if isinstance(policy, MixPolicy):
        return "mix", policy.mix
    if isinstance(policy, VerifyPolicy):
        return "target_probs", policy.target_probs
    raise LawBroken(
        "a policy is a SelectPolicy, a MixPolicy or a VerifyPolicy", f"got {type(policy).__name__}."
    )


def _check_pure(
    name: str,
    method: Callable[[Views], Tensor],
    scene: _Scene,
    which: Sequence[int],
    *,
    base_only: bool = False,
) -> Tensor:
    """Ask about all positions, again, in another order, and one by one; the answers must agree."""
    views = scene.views(which, base_only=base_only)
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
    turned = method(scene.views(list(reversed(which)), base_only=base_only)).flip(0)
    singly = torch.cat([method(scene.views([i], base_only=base_only)) for i in which])
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


# --- tokenizers -----------------------------------------------------------------------------------

_TEXTS = (
    "What is 2 * x + 15 if x = 7?",
    "two  blanks,\ttabs and\nnew lines ",
    "naïve café, Straße, 你好, 😀👩‍👩‍👧",
    "<|end|> is only text here",
)


def check_tokenizer(tokenizer: TokenizerAdapter, texts: Sequence[str] = _TEXTS) -> None:
    """An adapter turns text into tokens and back without loss.

    Laws: ``decode(encode_continuation(text))`` is the text's bytes; decoding in pieces equals
    decoding at once; special tokens have no bytes; end tokens exist.

    Args:
        tokenizer: what to check.
        texts: texts that it claims to cover.

    Raises:
        LawBroken: naming the law.
    """
    for text in texts:
        ids = tokenizer.encode_continuation(text)
        if tokenizer.decode(ids) != text.encode():
            raise LawBroken(
                "decode(encode(text)) is the text",
                f"{text!r} became {tokenizer.decode(ids)!r}.",
            )
        half = len(ids) // 2
        if tokenizer.decode(ids[:half]) + tokenizer.decode(ids[half:]) != tokenizer.decode(ids):
            raise LawBroken("decoding in pieces equals decoding at once", f"for {text!r}.")
    for token_id in range(tokenizer.n_tokens):
        if tokenizer.special_name(token_id) is not None and tokenizer.token_bytes(token_id):
            raise LawBroken(
                "special tokens leave no text", f"token {token_id} has bytes and a special name."
            )
    missing = [i for i in tokenizer.end_ids if not 0 <= i < tokenizer.n_tokens]
    if missing:
        raise LawBroken("end tokens exist", f"{missing[0]} is none of {tokenizer.n_tokens} tokens.")


# --- backends -------------------------------------------------------------------------------------


def check_model(model: Model, *, seed: int = 0, tolerance: float = 1e-3) -> None:
    """A model's caches change nothing but the time.

    Laws: predictions are distributions; a cached look equals an uncached one; after any roll-back
    a row equals a fresh start; a batch equals its rows one by one.

    Args:
        model: what to check.
        seed: of the random texts and cuts.
        tolerance: greatest difference of probabilities that still counts as equal.

    Raises:
        LawBroken: naming the law.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    n_rows, n_steps = 3, 12
    longest = model.context_length or 40
    texts = [[number(0, model.tokenizer.n_tokens)] for _ in range(n_rows)]
    session = model.open(n_rows)
    session.feed(range(n_rows), texts, [1] * n_rows)
    for _ in range(n_steps):
        rows = [row for row in range(n_rows) if number(0, 3)] or [0]
        for row in rows:
            length = number(1, len(texts[row]) + 1)
            session.truncate(row, length)
            del texts[row][length:]
            if session.lengths[row] != length:
                raise LawBroken(
                    "a cut row has the length it was cut to",
                    f"row {row}: {session.lengths[row]} instead of {length}.",
                )
        rows = [row for row in rows if len(texts[row]) < min(longest, 40)] or []
        if not rows:
            continue
        new = [
            [
                number(0, model.tokenizer.n_tokens)
                for _ in range(min(number(1, 6), longest - len(texts[row])))
            ]
            for row in rows
        ]
        n_last = [number(1, len(tokens) + 1) for tokens in new]
        for row, tokens in zip(rows, new, strict=True):
            texts[row].extend(tokens)
        probs = _probs(session.feed(rows, new, n_last).logits, model)
        fresh = [
            _probs(model.open(1).feed([0], [texts[row]], [count]).logits, model)
            for row, count in zip(rows, n_last, strict=True)
        ]
        error = float((probs - torch.cat(fresh)).abs().max())
        if not error <= tolerance:
            raise LawBroken(
                "a cached look after roll-backs, in a batch, equals a fresh start of the row alone",
                f"probabilities differ by {error:.2g} (allowed {tolerance:.2g}).",
            )


def _probs(logits: Tensor, model: Model) -> Tensor:
    if logits.shape[-1] < model.tokenizer.n_tokens:
        missing = model.tokenizer.n_tokens - logits.shape[-1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    probs = logits.float().softmax(-1)
    total = probs.sum(-1)
    if bool(probs.isnan().any()) or bool(((total - 1).abs() > 1e-4).any()):
        raise LawBroken("predictions are distributions", f"probabilities sum to {total.tolist()}.")
    return probs


# --- the loop -------------------------------------------------------------------------------------


def check_routing(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    policy: Policy | str | None = None,
    *,
    max_new_tokens: int = 24,
    temperatures: Sequence[float] = (0.0, 0.9),
    seed: int = 0,
) -> None:
    """How models are run changes nothing in the text.

    Laws: ``block`` equals ``stepwise`` for every block size; a batch equals its prompts one by one;
    equal seeds give equal texts; streamed pieces join to the text.

    Args:
        ensemble: the models.
        prompts: what to ask.
        policy: who writes; the ensemble's own if not given.
        max_new_tokens: length of the texts, in tokens.
        temperatures: greedy (0) and sampling.
        seed: of the draws.

    Raises:
        LawBroken: naming the law.
    """

    def write(some: Sequence[Prompt], **settings: Any) -> list[list[tuple[int, str]]]:
        settings = {"schedule": "stepwise", "max_new_tokens": max_new_tokens, **settings}
        stream = ensemble.stream(some, policy, seed=seed, **settings)
        shown = [""] * len(some)
        for piece in stream:
            shown[piece.row] += piece.text
        for text, answer in zip(shown, stream.answers, strict=True):
            if text != answer.text:
                raise LawBroken(
                    "streamed pieces join to the text", f"{text!r} and {answer.text!r}."
                )
        return [[(token.id, token.model) for token in a.trace] for a in stream.answers]

    for temperature in temperatures:
        plain = write(prompts, temperature=temperature)
        ways = {
            "equal seeds give equal texts": [write(prompts, temperature=temperature)],
            "a batch equals its prompts one by one": [
                [write([prompt], temperature=temperature)[0] for prompt in prompts]
            ],
            "rows that wait for a free slot are written as if alone": [
                write(prompts, temperature=temperature, batch_size=2)
            ],
            "block equals stepwise": [
                write(prompts, temperature=temperature, schedule="block", block_size=size)
                for size in (1, 2, 3, 8)
            ],
        }
        for law, others in ways.items():
            for other in others:
                _compare(law, plain, other, f"temperature {temperature}")


def _compare(
    law: str,
    plain: Sequence[list[tuple[int, str]]],
    other: Sequence[list[tuple[int, str]]],
    at: str,
) -> None:
    for number, (one, two) in enumerate(zip(plain, other, strict=True)):
        if one != two:
            raise LawBroken(law, f"{at}, prompt {number + 1}: {one} became {two}.")


def check_removable(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    model: str,
    policy: Policy | str | None = None,
    *,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> None:
    """A model that is never chosen can be removed unnoticed.

    Args:
        ensemble: the models.
        prompts: what to ask.
        model: name of an assistant that writes nothing in answer to these prompts.
        policy: who writes; the ensemble's own if not given. Its roles and weights must go by name.
        max_new_tokens: length of the texts, in tokens.
        seed: of the draws.

    Raises:
        LawBroken: if the model did write, or the text changed without it.
    """
    chosen = ensemble.resolve(policy)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    with_it = ensemble.generate(prompts, chosen, **settings)
    if any(answer.trace.share(model) > 0 for answer in with_it):
        raise LawBroken("a model that is never chosen can be removed", f"'{model}' did write.")
    smaller = Ensemble([m for m in ensemble.backends if m.name != model])
    without = smaller.generate(prompts, chosen, **settings)
    for a, b in zip(with_it, without, strict=True):
        if [(t.id, t.model) for t in a.trace] != [(t.id, t.model) for t in b.trace]:
            raise LawBroken(
                "a model that is never chosen can be removed unnoticed",
                f"{a.text!r} became {b.text!r}.",
            )
