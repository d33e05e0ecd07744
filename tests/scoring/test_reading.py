"""Reading whole texts equals a plain forward pass, position by position."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, byte_level, fresh_network, model, network, shared_tokenizer

from multicolm.backend.transformers import TransformersModel
from multicolm.scoring.reading import Text, read_texts
from multicolm.tokenizer.shared import SharedVocabulary
from multicolm.views import ModelNames

PAIRS = (
    ("The quick", " brown fox jumps over the lazy dog and runs away from all the others"),
    ("a", "b"),
    ("Hello there, how are", " you"),
    ("What is this and that and those?", " It is naïve café, 😀 and more than that, so wait."),
    ("xyz 123", " 456 789"),
)


def vocabulary(*models: TransformersModel) -> SharedVocabulary:
    return SharedVocabulary(ModelNames(m.name for m in models), [m.tokenizer for m in models])


def with_tokenizer(name: str, tokenizer, seed: int = 0) -> TransformersModel:
    """A Llama that has a row for each token."""
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    return TransformersModel(name, fresh_network(config, seed), tokenizer)


def texts_of(reader: TransformersModel) -> list[Text]:
    tokenizer = reader.tokenizer
    return [Text(tokenizer.encode(p), tokenizer.encode_continuation(c)) for p, c in PAIRS]


def plainly(net, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what goes into the output layer, at every place of one text."""
    ids = torch.tensor([[*text.prompt_ids, *text.ids]])
    caught: list[torch.Tensor] = []
    hook = net.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0])
    )
    with torch.inference_mode():
        logits = net(input_ids=ids, use_cache=False).logits[0]
    hook.remove()
    places = slice(len(text.prompt_ids) - 1, ids.shape[1] - 1)
    return logits[places], caught[0][0, places]


def read(reader, shared, texts, k=0, **settings):
    """Per text and place: logits and hidden state; fails if a place comes twice."""
    found = {}
    for reading in read_texts(reader, k, shared, texts, **settings):
        for line, at in enumerate(
            zip(reading.numbers.tolist(), reading.places.tolist(), strict=True)
        ):
            assert at not in found
            hidden = None if reading.hidden is None else reading.hidden[line]
            found[at] = (reading.logits[line], hidden)
    return found


@pytest.mark.parametrize("batch_tokens", [1, 7, 4096])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "mamba", "bloom"])
def test_reading_equals_a_forward_pass_of_prompt_and_completion(kind, batch_tokens) -> None:
    reader, net = model(kind), network(kind)
    texts = texts_of(reader)
    found = read(reader, vocabulary(reader), texts, hidden=True, batch_tokens=batch_tokens)
    assert len(found) == sum(len(text.ids) for text in texts)
    for number, text in enumerate(texts):
        logits, hidden = plainly(net, text)
        for place in range(len(text.ids)):
            mine, state = found[number, place]
            torch.testing.assert_close(mine, logits[place], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(state, hidden[place], atol=2e-4, rtol=1e-4)


def test_hidden_states_times_the_output_layer_are_the_logits() -> None:
    reader = model("llama")
    for reading in read_texts(reader, 0, vocabulary(reader), texts_of(reader), hidden=True):
        head = reader.model.get_output_embeddings().weight
        torch.testing.assert_close(reading.hidden @ head.T, reading.logits, atol=1e-4, rtol=1e-4)


def test_hidden_states_are_there_only_if_they_were_asked_for() -> None:
    reader = model("llama")
    readings = list(read_texts(reader, 0, vocabulary(reader), texts_of(reader)))
    assert readings and all(reading.hidden is None for reading in readings)


def test_no_pass_is_fed_more_tokens_than_it_may_be(monkeypatch) -> None:
    reader, fed = model("llama"), []
    plain_open = reader.open
    plain_open(1)  # the probe feeds what it likes

    def watched(n_rows):
        session = plain_open(n_rows)
        feed = session.feed

        def counted(rows, tokens, n_last, *, hidden=False):
            fed.append(len(rows) * max(map(len, tokens)))
            return feed(rows, tokens, n_last, hidden=hidden)

        session.feed = counted
        return session

    monkeypatch.setattr(reader, "open", watched)
    for budget in (1, 7, 33, 100, 4096):
        fed.clear()
        list(read_texts(reader, 0, vocabulary(reader), texts_of(reader), batch_tokens=budget))
        assert 0 < max(fed) <= budget
    assert len(fed) == 1, "all of it fits one pass"


def test_equal_calls_give_equal_bits() -> None:
    reader = model("llama")
    once, again = (
        read(reader, vocabulary(reader), texts_of(reader), batch_tokens=64) for _ in range(2)
    )
    assert list(once) == list(again)
    assert all(torch.equal(once[at][0], again[at][0]) for at in once)


@pytest.mark.parametrize("limit", [1, 5, 9, 12, 40, 200])
def test_places_beyond_the_context_are_left_out(limit) -> None:
    reader = TransformersModel("llama", network("llama"), shared_tokenizer())
    texts = texts_of(reader)
    everything = read(reader, vocabulary(reader), texts, batch_tokens=7)
    reader.context_length = limit
    found = read(reader, vocabulary(reader), texts, batch_tokens=7)
    expected = {
        (number, place)
        for number, text in enumerate(texts)
        for place in range(len(text.ids))
        if len(text.prompt_ids) + place <= limit
    }
    assert set(found) == expected
    for at in expected:
        torch.testing.assert_close(found[at][0], everything[at][0], atol=1e-4, rtol=1e-4)


def test_a_text_that_fills_the_context_to_the_last_token_is_read_whole() -> None:
    reader = TransformersModel("llama", network("llama"), shared_tokenizer())
    text = Text([1, 2, 3], [4, 5, 6])
    reader.context_length = 5  # the last token is predicted and not read
    assert set(read(reader, vocabulary(reader), [text])) == {(0, 0), (0, 1), (0, 2)}


def test_texts_without_tokens_and_no_texts_at_all_give_nothing() -> None:
    reader = model("llama")
    assert read(reader, vocabulary(reader), [Text([1], []), Text([2], [])]) == {}
    assert read(reader, vocabulary(reader), []) == {}


def test_another_models_tokens_are_read_in_the_readers_own() -> None:
    """The base has a token `<think>`, which the reader reads letter by letter."""
    base = with_tokenizer("base", byte_level(added=["<think>"]))
    other = with_tokenizer("other", byte_level(specials=["<x>"]), 1)
    shared = vocabulary(base, other)
    names = {shared.name(i): i for i in range(shared.size)}
    a, think, b = names["a"], names["<think>"], names["b"]
    text = Text(other.tokenizer.encode("ok"), [a, think, b, a])
    spelled = shared.read(1, [think])
    assert len(spelled) > 1
    found = read(other, shared, [text], k=1, batch_tokens=3)
    own = [*text.prompt_ids, a, *spelled, b]
    with torch.inference_mode():
        logits = other.model(torch.tensor([own]), use_cache=False).logits[0]
    before = len(text.prompt_ids) - 1
    for place, at in enumerate([before, before + 1, before + 1 + len(spelled), len(own) - 1]):
        expected = shared.logits(1, logits[at : at + 1])[0]
        torch.testing.assert_close(found[0, place][0], expected, atol=1e-4, rtol=1e-4)
        assert found[0, place][0][think] == float("-inf")


def test_a_special_token_that_the_reader_lacks_changes_nothing_for_it() -> None:
    base = with_tokenizer("base", byte_level(specials=["<x>"]))
    other = with_tokenizer("other", byte_level(), 1)
    shared = vocabulary(base, other)
    x = next(i for i in range(shared.size) if shared.name(i) == "<x>")
    found = read(other, shared, [Text([5], [6, x, 7, 8])], k=1, batch_tokens=2)
    assert set(found) == {(0, place) for place in range(4)}
    assert torch.equal(found[0, 1][0], found[0, 2][0]), "it read nothing in between"
    plain = read(other, shared, [Text([5], [6, 7, 8])], k=1, batch_tokens=2)
    torch.testing.assert_close(found[0, 3][0], plain[0, 2][0], atol=1e-4, rtol=1e-4)
