"""Scores equal what a plain double loop over the models says, example by example."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from score_worlds import HiddenTable, contents, records, table, tables, write
from tables import TOKENS
from tiny_models import byte_level, model, shared_tokenizer

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import ArtefactError, CapabilityError, ConfigError, InputError, ModelError
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_prompt_digests, load_table
from multicolm.types import prompt_digest

END = TOKENS.index(".")


def scored(ensemble, path: Path, out: Path, **settings):
    index = score(ensemble, open_corpus(path), out, **settings)
    return index, load_table(out)


def by_hand(ensemble: Ensemble, lines, end: int | None):
    """Per model and token: log-probability, first choice, its log-probability, entropy, margin."""
    columns = []
    for each in ensemble.backends:
        column = []
        for line in lines:
            ids = each.tokenizer.encode(line["prompt"])
            gold = each.tokenizer.encode_continuation(line["completion"])
            for token in [*gold, *([] if end is None else [end])]:
                logprobs = each.logits_after(ids).double().tolist()
                probs = sorted((math.exp(x) for x in logprobs), reverse=True)
                best = max(range(len(logprobs)), key=lambda i: logprobs[i])
                entropy = -sum(p * math.log(p) for p in probs if p > 0)
                column.append((logprobs[token], best, logprobs[best], entropy, probs[0] - probs[1]))
                ids.append(token)
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).permute(2, 1, 0)


@pytest.mark.parametrize("end_of_text", [True, False])
@pytest.mark.parametrize(("shard_positions", "batch_tokens"), [(1, 4096), (13, 20), (10_000, 1)])
def test_scores_equal_a_plain_loop(tmp_path, end_of_text, shard_positions, batch_tokens) -> None:
    lines = records(17)
    ensemble = tables("base", "left", "right")
    index, found = scored(
        ensemble,
        write(tmp_path / "data.jsonl", lines),
        tmp_path / "out",
        end_of_text=end_of_text,
        shard_positions=shard_positions,
        batch_tokens=batch_tokens,
    )
    gold, best, best_logprobs, entropies, margins = by_hand(
        ensemble, lines, END if end_of_text else None
    )
    torch.testing.assert_close(found.gold_logprobs.double(), gold, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top1_ids, best.long())
    torch.testing.assert_close(found.top1_logprobs.double(), best_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropies.double(), entropies, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.margins.double(), margins, atol=1e-5, rtol=1e-5)
    assert found.known.all()
    assert torch.equal(found.correct, best.long() == found.gold_ids[:, None])
    assert found.models == ("base", "left", "right")
    assert found.identities == ("table:0", "table:1", "table:2")
    assert index.n_positions == len(found) == len(gold) and index.n_examples == 17
    lengths = [len(TABLE.encode_continuation(line["completion"])) + end_of_text for line in lines]
    assert found.example.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert found.place.tolist() == [place for length in lengths for place in range(length)]
    if shard_positions == 1:
        assert len(index.shards) == 17


TABLE = table("base", 0).tokenizer


def test_prompts_are_kept_as_digests_in_the_order_of_the_corpus(tmp_path) -> None:
    lines = records(9)
    scored(tables("base"), write(tmp_path / "d.jsonl", lines), tmp_path / "out", shard_positions=5)
    expected = [prompt_digest(line["prompt"]) for line in lines]
    assert load_prompt_digests(tmp_path / "out") == expected
    assert any(int(digest, 16) >= 1 << 63 for digest in expected), "also those with the top bit"


# --- the end of a text ---------------------------------------------------------------------------


def two_ended(name: str, ends: tuple[str, ...], after_a: dict[str, float]) -> TableModel:
    return TableModel(name, ["a", "b", "<1>", "<2>"], {"": {"a": 1.0}, "a": after_a}, ends=ends)


def test_the_end_of_a_text_has_the_sum_of_all_end_tokens_of_each_model(tmp_path) -> None:
    base = two_ended("base", ("<1>", "<2>"), {"b": 0.4, "<1>": 0.35, "<2>": 0.25})
    one = two_ended("one", ("<1>", "<2>"), {"<2>": 0.7, "a": 0.3})
    none = two_ended("none", ("<1>", "<2>"), {"a": 1.0})
    ensemble = Ensemble([base, one, none])
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "a"}])
    _, found = scored(ensemble, path, tmp_path / "out")
    assert found.gold_ids.tolist() == [0, 2]
    probs = found.gold_logprobs[1].exp().tolist()
    assert probs == pytest.approx([0.6, 0.7, 0.0], abs=1e-6)
    assert found.gold_logprobs[1, 2] == float("-inf")
    # The base's likeliest token is b, though its ends together are likelier: tokens are compared.
    assert found.top1_ids[1].tolist() == [1, 2, 0]
    assert found.correct[1].tolist() == [False, True, False], "<2> is an end as good as <1>"
    assert found.top1_logprobs[1].exp().tolist() == pytest.approx([0.4, 0.7, 1.0], abs=1e-6)


def test_without_the_end_an_end_token_counts_as_nothing_special(tmp_path) -> None:
    base = two_ended("base", ("<1>", "<2>"), {"b": 0.4, "<1>": 0.35, "<2>": 0.25})
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "ab"}])
    index, found = scored(Ensemble([base]), path, tmp_path / "out", end_of_text=False)
    assert found.gold_ids.tolist() == [0, 1] and not index.end_of_text
    assert found.gold_logprobs.exp()[1].tolist() == pytest.approx([0.4])


def test_an_ensemble_without_end_tokens_is_told_how_to_score(tmp_path) -> None:
    endless = TableModel("base", ["a"], {"": {"a": 1.0}})
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "a"}])
    with pytest.raises(InputError, match="has an end-of-text token; score with --no-end"):
        score(Ensemble([endless]), open_corpus(path), tmp_path / "out")
    index, _ = scored(Ensemble([endless]), path, tmp_path / "out", end_of_text=False)
    assert index.n_positions == 1


def test_a_completion_of_one_token_is_one_position_and_its_end(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": " c"}])
    _, found = scored(tables("base", "left"), path, tmp_path / "out")
    assert found.gold_ids.tolist() == [TOKENS.index(" c"), END]
    assert found.place.tolist() == [0, 1]
    _, bare = scored(tables("base", "left"), path, tmp_path / "bare", end_of_text=False)
    assert bare.gold_ids.tolist() == [TOKENS.index(" c")]
    assert torch.equal(bare.gold_logprobs, found.gold_logprobs[:1])


def test_an_empty_completion_is_its_end_or_nothing(tmp_path) -> None:
    lines = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "d"}]
    path = write(tmp_path / "d.jsonl", lines)
    index, found = scored(tables("base"), path, tmp_path / "out")
    assert found.gold_ids.tolist() == [END, TOKENS.index("d"), END] and index.n_skipped == 0
    index, found = scored(tables("base"), path, tmp_path / "bare", end_of_text=False)
    assert found.gold_ids.tolist() == [TOKENS.index("d")] and index.n_skipped == 1
    assert found.example.tolist() == [1], "examples keep their numbers"


def test_a_corpus_of_which_nothing_can_be_scored_is_refused(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(InputError, match="nothing can be scored: every prompt is longer than"):
        score(tables("base"), open_corpus(path), tmp_path / "out", end_of_text=False)


# --- contexts ------------------------------------------------------------------------------------


def limited(base: int | None, left: int | None) -> Ensemble:
    return Ensemble([table("base", 0, context_length=base), table("left", 1, context_length=left)])


def test_an_example_whose_prompt_exceeds_the_base_models_context_is_skipped(tmp_path) -> None:
    lines = [{"prompt": "abdf", "completion": "a"}, {"prompt": "abd", "completion": "a"}]
    path = write(tmp_path / "d.jsonl", lines)
    index, found = scored(limited(3, None), path, tmp_path / "out")
    assert index.n_skipped == 1 and index.n_examples == 2
    assert found.example.tolist() == [1], "and of the other one the end lies beyond the context"
    assert found.gold_ids.tolist() == [0]


def test_a_completion_longer_than_the_context_is_scored_as_far_as_it_reaches(tmp_path) -> None:
    lines = [{"prompt": "ab", "completion": "abdf" * 5}, {"prompt": "a", "completion": "b"}]
    path = write(tmp_path / "d.jsonl", lines)
    index, found = scored(limited(6, None), path, tmp_path / "out")
    _, whole = scored(limited(None, None), path, tmp_path / "whole")
    assert found.place.tolist() == [0, 1, 2, 3, 4, 0, 1] and index.n_skipped == 0
    keep = torch.tensor([0, 1, 2, 3, 4, 21, 22])
    assert torch.equal(found.gold_logprobs, whole.rows(keep).gold_logprobs)
    assert torch.equal(found.gold_ids, whole.rows(keep).gold_ids)


def test_what_an_assistants_context_does_not_reach_is_unknown_and_counted(tmp_path) -> None:
    lines = [{"prompt": "abdf", "completion": "ab"}, {"prompt": "ab", "completion": "abdfa"}]
    path = write(tmp_path / "d.jsonl", lines)
    index, found = scored(limited(None, 3), path, tmp_path / "out", shard_positions=3)
    assert [m.n_unknown for m in index.models] == [0, 3 + 4]
    assert found.known[:, 0].all()
    assert found.known[:, 1].tolist() == [False] * 3 + [True, True] + [False] * 4
    _, whole = scored(limited(None, None), path, tmp_path / "whole")
    known = found.known[:, 1]
    assert torch.equal(found.gold_logprobs[known], whole.gold_logprobs[known])
    assert not found.correct[:, 1][~known].any(), "what is unknown is never right"


def test_skipped_examples_at_the_end_make_no_empty_shard(tmp_path) -> None:
    """A base model that read nothing of a shard had no hidden states to give for it."""
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "abdf", "completion": "a"}]
    path = write(tmp_path / "d.jsonl", lines)
    ensemble = Ensemble([HiddenTable(table("base", 0, context_length=3)), table("left", 1)])
    index, found = scored(ensemble, path, tmp_path / "out", features=["hidden"], shard_positions=1)
    assert [(s.n_examples, s.n_positions) for s in index.shards] == [(2, 2)]
    assert found.feature("hidden").shape == (2, len(TOKENS) + 1)
    assert len(load_prompt_digests(tmp_path / "out")) == 2


# --- features ------------------------------------------------------------------------------------


def test_features_are_those_of_the_base_model_at_each_place(tmp_path) -> None:
    base, left = model("llama", "base"), model("llama", "left", 1)
    lines = [
        {"prompt": "The quick", "completion": " brown fox"},
        {"prompt": "a", "completion": "nd so on, and so on"},
    ]
    path = write(tmp_path / "d.jsonl", lines)
    _, found = scored(
        Ensemble([base, left]),
        path,
        tmp_path / "out",
        features=["topk", "hidden", "embedding"],
        top_k=7,
        shard_positions=3,
    )
    assert {name: tuple(f.shape) for name, f in found.base.items()} == {
        "embedding": (len(found), 32),
        "hidden": (len(found), 32),
        "topk": (len(found), 7),
    }
    logits = found.feature("hidden") @ base.model.get_output_embeddings().weight.T
    logprobs = logits.log_softmax(-1)
    topk = logprobs.topk(7, dim=-1).values
    torch.testing.assert_close(found.feature("topk"), topk, atol=1e-4, rtol=1e-4)
    assert torch.equal(logprobs.argmax(-1), found.top1_ids[:, 0])
    rows = base.model.get_input_embeddings().weight[logprobs.argmax(-1)]
    torch.testing.assert_close(found.feature("embedding"), rows)


def test_more_log_probabilities_than_tokens_are_padded_with_minus_infinity(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", records(3))
    _, found = scored(tables("base"), path, tmp_path / "out", features=["topk"], top_k=10)
    assert found.feature("topk").shape[1] == 10
    assert (found.feature("topk")[:, len(TOKENS) :] == float("-inf")).all()


def test_a_feature_that_the_base_model_does_not_show_is_refused_before_anything_is_read(
    tmp_path,
) -> None:
    path = write(tmp_path / "d.jsonl", records(3))
    with pytest.raises(CapabilityError, match="'base' does not show 'hidden'; it shows topk"):
        score(tables("base"), open_corpus(path), tmp_path / "out", features=["hidden"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(CapabilityError, match="does not show 'hiden'"):
        score(tables("base", hidden=True), open_corpus(path), tmp_path / "o", features=["hiden"])


def test_a_table_without_a_feature_says_how_to_get_it(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", records(3))
    _, found = scored(tables("base"), path, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"holds no 'hidden' .*--hidden"):
        found.feature("hidden")


@pytest.mark.parametrize("name", ["text", "index.json", "a/b", "..", "a b", ".lock"])
def test_names_that_cannot_be_folders_of_a_table_are_refused(tmp_path, name) -> None:
    """A model called 'text' used to write its scores over the texts."""
    path = write(tmp_path / "d.jsonl", records(3))
    with pytest.raises(ConfigError, match=f"model '{name}' cannot be scored under this name"):
        score(tables("base", name), open_corpus(path), tmp_path / "out")


def test_a_model_that_gives_nan_is_named_with_its_type(tmp_path) -> None:
    class Broken(TableModel):
        def logits_after(self, ids):
            logits = super().logits_after(ids)
            return logits * float("nan") if len(ids) == 4 else logits

    left = table("left", 1)
    broken = Broken.__new__(Broken)
    broken.__dict__.update(left.__dict__)
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "abd", "completion": "ff"}]
    path = write(tmp_path / "d.jsonl", lines)
    with pytest.raises(ModelError, match=r"'left' .computing in float32. predicts .*NaN"):
        score(Ensemble([table("base", 0), broken]), open_corpus(path), tmp_path / "out")


# --- chats ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatting(name: str, seed: int, template: str | None) -> TransformersModel:
    from tiny_models import network

    tokenizer = byte_level()
    tokenizer.chat_template = template
    return TransformersModel(name, network("llama", seed), tokenizer)


def test_a_chat_is_scored_behind_each_models_own_template(tmp_path) -> None:
    other = TEMPLATE.replace("<", "[").replace(">", "]")
    ensemble = Ensemble([chatting("base", 0, TEMPLATE), chatting("left", 1, other)])
    question = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "hello there"}
    path = write(tmp_path / "chat.jsonl", [{"messages": [*question, answer]}])
    _, found = scored(ensemble, path, tmp_path / "out")
    texts = ["<system>be nice<user>hi<assistant>", "[system]be nice[user]hi[assistant]"]
    for k, prompt in enumerate(texts):
        plain = Ensemble([ensemble.backends[k]])
        one = write(tmp_path / f"{k}.jsonl", [{"prompt": prompt, "completion": "hello there"}])
        _, alone = scored(plain, one, tmp_path / f"out{k}")
        torch.testing.assert_close(found.gold_logprobs[:, k], alone.gold_logprobs[:, 0])
    as_prompt = write(tmp_path / "p.jsonl", [{"prompt": question, "completion": "hello there"}])
    assert open_corpus(as_prompt).digest() == open_corpus(path).digest() == found.digest


def test_a_chat_for_a_model_without_a_template_names_the_line_and_the_model(tmp_path) -> None:
    ensemble = Ensemble([chatting("base", 0, TEMPLATE), chatting("left", 1, None)])
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "chat.jsonl", [chat])
    with pytest.raises(InputError, match=r"chat\.jsonl:1: .*'left'.*chat template"):
        score(ensemble, open_corpus(path), tmp_path / "out")


def test_a_text_that_a_vocabulary_does_not_cover_names_the_line(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", [*records(2), {"prompt": "a", "completion": "xyz"}])
    with pytest.raises(InputError, match=r"d\.jsonl:3: .*no token for 'x'"):
        score(tables("base"), open_corpus(path), tmp_path / "out")
    path = write(tmp_path / "e.jsonl", [{"prompt": "xyz", "completion": "a"}])
    with pytest.raises(InputError, match=r"e\.jsonl:1: .*no token for 'x'"):
        score(tables("base"), open_corpus(path), tmp_path / "out")


def test_parquet_gives_the_same_bytes_as_json_lines(tmp_path) -> None:
    from datasets import Dataset

    lines = records(20)
    path = write(tmp_path / "d.jsonl", lines)
    parquet = tmp_path / "d.parquet"
    Dataset.from_list(lines).to_parquet(str(parquet))
    a, _ = scored(tables("base", "left"), path, tmp_path / "a", shard_positions=15)
    b, _ = scored(tables("base", "left"), parquet, tmp_path / "b", shard_positions=15)
    assert a.digest == b.digest == open_corpus(path).digest() == open_corpus(parquet).digest()
    assert a.files == b.files and len(a.shards) > 2
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one.pop("index.json").replace(b".jsonl", b".parquet") == other.pop("index.json")
    assert one == other


def test_the_shared_tokenizer_of_the_tests_was_not_changed() -> None:
    assert shared_tokenizer().chat_template is None
