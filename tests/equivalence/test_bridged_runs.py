"""Models of different vocabularies: the laws hold, and hand-overs fall between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from built import adapter, built
from tables import UNTAUGHT, random_table
from tiny_models import fresh_network
from transformers import LlamaConfig

import multicolm
from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import CapabilityError, VocabularyError
from multicolm.exact.byte_session import ByteSession
from multicolm.plugins import policies
from multicolm.testing import check_removable, check_routing

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
RIGHT = ("a", "b", "c", " ", "d", "e", "cab", "ea", "<stop>")
PROMPTS = ["a", "bc", "a d", "e", "cab"]

SELECTING = [
    kind
    for kind in policies
    if issubclass(policies.get(kind), SelectPolicy) and kind not in UNTAUGHT
]


def models(seed: int = 0) -> list[TableModel]:
    return [
        random_table("base", seed + 1, BASE),
        random_table("left", seed + 2, LEFT),
        random_table("right", seed + 3, RIGHT),
    ]


@pytest.fixture(scope="module")
def mixed() -> Ensemble:
    return Ensemble(models())


def certain(name: str, tokens: str, choices: dict[Any, str], **settings: Any) -> TableModel:
    """A model that is sure of everything; its last token ends a text."""
    listed = tokens.split()
    table = {context: {token: 1.0} for context, token in choices.items()}
    return TableModel(name, listed, table, listed[-1:], **settings)


def written(ensemble: Ensemble, policy: Any = None, **settings: Any) -> list[list[tuple[str, str]]]:
    settings = {"max_new_tokens": 20, "seed": 0, **settings}
    answers = ensemble.generate(PROMPTS, policy, **settings)
    return [[(token.text, token.model) for token in answer.trace] for answer in answers]


@pytest.mark.parametrize("kind", SELECTING)
@pytest.mark.parametrize("bridge", ["boundary", "exact"])
def test_every_policy_that_selects_keeps_the_laws_of_the_loop(bridge: Any, kind: str) -> None:
    n_new = 16 if bridge == "boundary" else 8
    ensemble = Ensemble(models(len(kind)), bridge=bridge)
    check_routing(ensemble, PROMPTS[:4], kind, max_new_tokens=n_new)


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bridge", ["boundary", "exact"])
def test_a_model_that_writes_alone_writes_as_outside(
    bridge: Any, k: int, temperature: float
) -> None:
    own, settings = models(), {"temperature": temperature}
    alone = {"kind": "single", "params": {"model": k}}
    together = written(Ensemble(own, bridge=bridge), alone, **settings)
    outside = written(Ensemble([own[k]]), **settings)
    # Noise belongs to ids, and a token's id in an ensemble is not its own.
    if temperature == 0 or k == 0:
        assert [[text for text, _ in row] for row in together] == [
            [text for text, _ in row] for row in outside
        ]
    assert {name for row in together for _, name in row} == {own[k].name}


def test_a_model_that_is_never_chosen_can_be_removed_unnoticed(mixed: Ensemble) -> None:
    mute = random_table("mute", 9, ("a", "b", "c", " ", "d", "e", "abc", "<never>"))
    chosen = Ensemble([*mixed.backends, mute])
    check_removable(chosen, PROMPTS, "mute", policies.get("single")(model="left"))


class InTurn(SelectPolicy):
    """Every model in its turn, by place alone: it would hand over at every token."""

    base_signals: ClassVar[Any] = {"top1"}

    def select(self, views: Views) -> torch.Tensor:
        return views.place % len(views.models)


class Shuffled(InTurn):
    """The same in another order, without a look at the base model."""

    base_signals: ClassVar[Any] = set()

    def select(self, views: Views) -> torch.Tensor:
        return (views.place * 7 + 1) % len(views.models)


@pytest.mark.parametrize("policy", [InTurn(), Shuffled()])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_goes_on_within_a_token_of_the_next_writer_is_who_wrote(
    policy: SelectPolicy, temperature: float
) -> None:
    """Told by a second look at what was written, with nothing but the tokenizers."""
    n_checked = n_held = 0
    for seed in range(6):
        own = models(20 * seed)
        ensemble = Ensemble(own)
        settings = {"temperature": temperature, "max_new_tokens": 20, "seed": seed}
        for answer in ensemble.generate(PROMPTS, policy, **settings):
            names, tokens = list(ensemble.models), answer.trace.tokens
            for place, token in enumerate(tokens):
                k = names.index(token.model)
                wanted = names.index(wanted_at(policy, place, names))
                if k == wanted and place and tokens[place - 1].model != token.model:
                    # It could begin here: what the others wrote before is whole tokens of its own.
                    n_checked += 1
                    run = run_before(tokens, place, token.model)
                    encoder = own[k].tokenizer
                    ids = encoder.encode_continuation(run)
                    assert encoder.decode(ids).decode() == run
                elif k != wanted:
                    n_held += 1
                    # Someone could not: who wrote before goes on, or the base model.
                    assert token.model in {tokens[place - 1].model, "base"}
    assert n_checked > 20 and n_held > 2


def wanted_at(policy: SelectPolicy, place: int, names: Sequence[str]) -> str:
    number = place if isinstance(policy, InTurn) and type(policy) is InTurn else place * 7 + 1
    return names[number % len(names)]


def run_before(tokens: Sequence[Any], place: int, name: str) -> str:
    text = ""
    while place and tokens[place - 1].model != name:
        place -= 1
        text = tokens[place].text + text
    return text


def test_nobody_begins_in_the_middle_of_a_token_of_its_own() -> None:
    # The base model writes `a` and would write `b`; `ab` is one token of the other.
    base = certain("base", "q a b .", {"": "b", "q": "a", "b": "."})
    other = certain("other", "q a ab b x .", {"": "x", "ab": "."})

    class AssistantSecond(InTurn):
        def select(self, views: Views) -> torch.Tensor:
            return (views.place == 1).long()

    [answer] = Ensemble([base, other]).generate(["q"], AssistantSecond(), max_new_tokens=3)
    assert [(t.text, t.model) for t in answer.trace] == [
        ("a", "base"),
        ("b", "base"),
        (".", "base"),
    ]
    # Where the base model would end, the text before is whole, and the other can go on.
    short = certain("base", "q a b x .", {"": ".", "q": "a"})
    [answer] = Ensemble([short, other]).generate(["q"], AssistantSecond(), max_new_tokens=3)
    assert [t.model for t in answer.trace][:2] == ["base", "other"]


def test_each_model_reads_what_others_wrote_in_its_own_tokens() -> None:
    # `a`, `b` of the base model is `ab` to the other, which says so by what it writes then.
    base = certain("base", "q a b c x y .", {"": "c", "q": "a", "a": "b"})
    other = certain("other", "q a ab b c x y !", {"": "y", ("q", "ab"): "x"})

    class AssistantThird(InTurn):
        def select(self, views: Views) -> torch.Tensor:
            return (views.place == 2).long()

    [answer] = Ensemble([base, other]).generate(["q"], AssistantThird(), max_new_tokens=3)
    assert [(t.text, t.model) for t in answer.trace] == [
        ("a", "base"),
        ("b", "base"),
        ("x", "other"),
    ]


def test_the_end_of_a_text_is_one_event_however_each_model_writes_it(mixed: Ensemble) -> None:
    ends = [mixed.vocabulary.end_ids(k) for k in range(3)]
    assert ends[0] == ends[1] == ends[2] and len(ends[0]) == 1
    answers = mixed.generate(PROMPTS, Shuffled(), max_new_tokens=60, temperature=1.0, seed=1)
    assert {answer.finish_reason for answer in answers} >= {"eos"}


def test_mixtures_of_different_vocabularies_are_refused_by_name(mixed: Ensemble) -> None:
    for kind in ("average", "speculative", "proxy-tuning"):
        with pytest.raises(CapabilityError, match=f"policy '{kind}' compares .* token by token"):
            mixed.generate("a", kind)


def test_a_shared_bridge_refuses_models_that_do_not_agree() -> None:
    with pytest.raises(VocabularyError, match="have different tokenizers"):
        Ensemble(models(), bridge="shared")


def test_a_context_ends_a_text_only_when_it_is_full() -> None:
    """What others wrote is counted in one's own tokens, of which there may be fewer than bytes."""
    base = certain("base", "q abc .", {"": "abc"})
    other = certain("other", "q abcabc a b c .", {"": "a"}, context_length=5)

    class Late(InTurn):
        def select(self, views: Views) -> torch.Tensor:
            return (views.place == 50).long()

    [answer] = Ensemble([base, other]).generate(["q"], Late(), max_new_tokens=30)
    # `q` and twice `abcabc` are three tokens; a fifth `abc` is three more of its own.
    assert answer.finish_reason == "context"
    assert len(answer.trace.tokens) == 5


def test_three_embedded_vocabularies_write_together() -> None:
    ensemble = multicolm.load("tiny-mixed")
    assert ensemble.vocabulary.groups == (0, 1, 2)
    prompts = ["Question: What does Zosos treat?\nResponse:", "2 * x if x = 7?"]
    check_routing(ensemble, prompts, "max-confidence", max_new_tokens=16)
    answers = ensemble.generate(prompts, "max-confidence", max_new_tokens=24)
    assert sum(answer.trace.handovers for answer in answers) >= 3


class AssistantAlways(InTurn):
    """The first assistant everywhere but at the start."""

    def select(self, views: Views) -> torch.Tensor:
        return (views.place > 0).long()


def test_the_exact_bridge_lets_a_model_go_on_within_its_own_token() -> None:
    # The base model writes `a`; to the other that is the beginning of `ab` or of `ac`.
    base = certain("base", "q a b c x .", {"": "b", "q": "a"})
    table = {"": {"x": 1.0}, "q": {"ab": 0.3, "ac": 0.5, "x": 0.2}, "ac": {"!": 1.0}}
    other = TableModel("other", ["q", "ab", "ac", "a", "b", "c", "x", "!"], table, ["!"])
    ensemble = Ensemble([base, other], bridge="exact")
    [answer] = ensemble.generate(["q"], AssistantAlways(), max_new_tokens=4)
    shown = [(t.text, t.model, round(t.logprob, 4)) for t in answer.trace]
    # Given that the text begins with `a`, the rest is `c` with 0.5 of 0.8.
    assert shown[:2] == [("a", "base", 0.0), ("c", "other", round(math.log(0.5 / 0.8), 4))]
    assert answer.finish_reason == "eos" and len(shown) == 3
    # By the boundary bridge it cannot: `a` and then `b` are one token of its own.
    [held] = Ensemble([base, other]).generate(["q"], AssistantAlways(), max_new_tokens=2)
    assert [t.model for t in held.trace] == ["base", "base"]


def test_the_exact_bridge_writes_what_the_model_would_write_itself() -> None:
    """Pieces are one way to write a text, so they are no more likely than the text is to it."""
    base, left, _ = models(4)
    ensemble = Ensemble([base, left], bridge="exact")
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    answers = ensemble.generate(PROMPTS * 3, AssistantAlways(), **settings)
    n_checked = 0
    for prompt, answer in zip(PROMPTS * 3, answers, strict=True):
        first, *rest = answer.trace.tokens
        if not rest or {token.model for token in rest} != {"left"}:
            continue
        n_checked += 1
        session = ByteSession(left, 1, prune=0.0)
        session.begin(0, left.tokenizer.encode(prompt))
        session.feed([0], [first.text.encode()])
        before = session.logprob(0)
        session.feed([0], [answer.text.encode()[len(first.text) :]])
        after = session.logprob(0)
        if answer.finish_reason == "eos":
            after += float(session.next_byte_logprobs([0])[0, 256])
        assert sum(token.logprob for token in rest) <= after - before + 1e-4
    assert n_checked > 5


def test_a_model_whose_tokenizer_is_not_covered_gets_the_boundary_bridge_and_a_reason() -> None:
    base, left, _ = models()
    left.tokenizer = adapter("t5")
    [pair] = Ensemble([base, left], bridge="exact").bridges
    assert pair.bridge == "boundary" and pair.reason and pair.reason in str(pair)


def real(name: str, kind: str, seed: int) -> TransformersModel:
    """A random network behind a tokenizer of some manner; it writes any bytes."""
    tokenizer = built(kind)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return TransformersModel(name, fresh_network(config, seed), tokenizer)


@pytest.mark.parametrize("bridge", ["boundary", "exact"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("gpt2", "llama2", "llama3"),
        ("llama3", "smollm", "tekken"),
        ("mistral", "qwen2", "gemma"),
        ("t5", "gpt2", "llama2"),
    ],
)
def test_tokenizers_of_every_manner_write_together_whatever_bytes_they_write(
    bridge: Any, kinds: tuple[str, str, str]
) -> None:
    members = zip(("base", "left", "right"), kinds, range(3), strict=True)
    ensemble = Ensemble([real(*member) for member in members], bridge=bridge)
    prompts = ["The quick brown fox", "héllo wörld 😀 12345 don't"]
    for kind in ("max-confidence", "random"):
        check_routing(ensemble, prompts, kind, max_new_tokens=8, temperatures=(0.0,))


def test_what_a_model_wrote_within_its_own_token_is_not_lost_to_who_reads_the_trace() -> None:
    base = certain("base", "q a b c .", {"": "b", "q": "a"})
    table = {"": {"abc": 1.0}, "abc": {"!": 1.0}}
    other = TableModel("other", ["q", "abc", "a", "b", "c", "!"], table, ["!"])
    ensemble = Ensemble([base, other], bridge="exact")
    [answer] = ensemble.generate(["q"], AssistantAlways(), max_new_tokens=3)
    assert [t.text for t in answer.trace][:2] == ["a", "bc"]
    vocabulary, names = ensemble.vocabulary, list(ensemble.models)
    tokens = answer.trace.tokens[:2]
    follower = vocabulary.follow(1, [])
    follower.extend([t.id for t in tokens], [names.index(t.model) for t in tokens])
    assert other.tokenizer.decode(follower.own) == b"abc"
