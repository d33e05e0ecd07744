"""Real weights: the text that transformers and llama.cpp write themselves."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multicolm import Ensemble
from multicolm.testing import check_model

from .conftest import SMOL, in_llama_cpp, in_transformers

PROMPTS = [
    "The capital of France is",
    "def add(a, b):\n\treturn  ",
    "caf\u00e9, \u4f60\u597d \U0001f469\u200d\U0001f467: \u05e9\u05dc\u05d5\u05dd means",
    "1 2 3 4 5 6",
]
CHAT: Any = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
]
N = 16


def in_their_own_words(model: Any, ids: list[int], n: int) -> list[int]:
    """What transformers' `generate` writes after some tokens, ends included."""
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=n
    )
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_a_model_alone_writes_what_transformers_generate_writes(
    name: str, request: pytest.FixtureRequest
) -> None:
    served = request.getfixturevalue(name)
    ensemble = Ensemble([served])
    prompts = [*PROMPTS, CHAT] if served.tokenizer.chat_template else PROMPTS
    tokenizer = served.tokenizer
    wanted = [
        in_their_own_words(
            served.model,
            tokenizer.encode(p) if isinstance(p, str) else tokenizer.encode_chat(p),
            N,
        )
        for p in prompts
    ]
    answers = ensemble.generate(prompts, max_new_tokens=N)
    assert [[token.id for token in answer.trace] for answer in answers] == wanted


def test_a_chat_ends_where_its_model_ends_it(smol: Any, smol_gguf: Any) -> None:
    for model in (smol, smol_gguf):
        [answer] = Ensemble([model]).generate([CHAT], max_new_tokens=64)
        assert answer.finish_reason == "eos" and "Paris" in answer.text
        assert answer.trace.tokens[-1].text == "<|im_end|>" and "im_end" not in answer.text


def test_any_of_several_ends_of_text_ends_it(smol_folder: Path, tmp_path: Path) -> None:
    # Such configs are common: Llama 3 lists three, Gemma's chat models two.
    for file in smol_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    own = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    ends = [2, vocabulary["."]]
    (tmp_path / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": ends}))
    model = in_transformers("m", tmp_path)
    assert model.tokenizer.end_ids == set(ends)
    prompt = PROMPTS[0]
    [answer] = Ensemble([model]).generate([prompt], max_new_tokens=N)
    wanted = in_their_own_words(model.model, model.tokenizer.encode(prompt), N)
    assert [token.id for token in answer.trace] == wanted and wanted[-1] == ends[1]
    assert answer.finish_reason == "eos" and "." not in answer.text


@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_a_gguf_model_alone_writes_what_llama_cpp_writes(name: str) -> None:
    import llama_cpp

    from .conftest import GEMMA

    path = SMOL if name == "smol" else GEMMA
    ensemble = Ensemble([in_llama_cpp(name, path)])
    tokenizer = ensemble.backends[0].tokenizer
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False
        )
    for prompt in PROMPTS[:2]:
        ids = tokenizer.encode(prompt)
        assert (
            theirs.tokenize(prompt.encode(), add_bos=False)
            == ids[-len(ids) :][len(tokenizer.encode("")) :]
        )
        wanted: list[int] = []
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            wanted.append(int(token))
            if len(wanted) == N or token in tokenizer.end_ids:
                break
        [answer] = ensemble.generate([prompt], max_new_tokens=N)
        assert [token.id for token in answer.trace] == wanted
    theirs.close()


def test_caches_of_real_weights_change_nothing(smol: Any) -> None:
    check_model(smol)


def test_hidden_states_of_llama_cpp_are_those_of_transformers_but_for_rounding(
    smol: Any, smol_gguf: Any
) -> None:
    # What co-llm's head reads of a base model in a GGUF file: the state after the final norm.
    ids = smol.tokenizer.encode("The capital of France is Paris, and that of Italy is Rome.")
    states = [m.open(1).feed([0], [ids], [len(ids)], hidden=True).hidden for m in (smol, smol_gguf)]
    assert states[0].shape == states[1].shape == (len(ids), 576)
    alike = torch.nn.functional.cosine_similarity(states[0], states[1])
    # llama.cpp rounds what it multiplies to 8 bits, transformers computes in float32.
    assert alike.min() > 0.98, alike


def test_a_llama_is_served_in_rows(smol: Any) -> None:
    smol.open(1)
    assert smol.served_as == "rows"
