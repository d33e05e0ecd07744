"""Variables of chat templates: from the ensemble file, and of one chat."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import multicolm
from multicolm import catalog
from multicolm.errors import ConfigError, InputError, MulticolmWarning
from multicolm.types import Chat

# The manner of Qwen3's: thinking is asked for, or closed at once, after the last turn.
THINKING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}{{ extra }}"
)
TURNS: Any = [{"role": "user", "content": "What is 1 + 2?"}]
OPEN = b"user: What is 1 + 2?\nassistant: "
CLOSED = OPEN + b"<think>\n\n</think>\n\n"


def loaded(folder: Path, **settings: Any) -> multicolm.Ensemble:
    """The embedded maths expert with a template that knows of thinking."""
    model = {"model": "tiny-math", "dtype": "float32", "chat_template": THINKING, **settings}
    config = multicolm.config.EnsembleConfig(base_model="math", models={"math": model})
    return multicolm.load(config)


def read(ensemble: multicolm.Ensemble, chat: Any) -> bytes:
    tokenizer = ensemble.backends[0].tokenizer
    return tokenizer.decode(tokenizer.encode_chat(chat))


def test_variables_of_a_template_are_those_of_the_chat_or_else_of_the_file(tmp_path: Path) -> None:
    asks = loaded(tmp_path)
    assert read(asks, TURNS) == OPEN
    assert read(asks, Chat(TURNS, {"enable_thinking": False})) == CLOSED
    never = loaded(tmp_path, chat_template_args={"enable_thinking": False})
    assert read(never, TURNS) == CLOSED
    assert read(never, Chat(TURNS, {"enable_thinking": True})) == OPEN
    # And whatever is written after them is written after just that.
    [one] = never.generate([TURNS], max_new_tokens=4)
    [other] = asks.generate([Chat(TURNS, {"enable_thinking": False})], max_new_tokens=4)
    [plain] = asks.generate([CLOSED.decode()], max_new_tokens=4)
    assert one.text == other.text == plain.text
    assert other.as_json()["prompt"] == {
        "messages": TURNS,
        "chat_template_args": {"enable_thinking": False},
    }


def test_a_variable_of_a_chat_cannot_write_special_tokens(tmp_path: Path) -> None:
    ensemble = loaded(tmp_path)
    tokenizer = ensemble.backends[0].tokenizer
    ids = tokenizer.encode_chat(Chat(TURNS, {"extra": "<|end|>"}))
    assert tokenizer.decode(ids).endswith(b"<|end|>")
    assert not any(tokenizer.special_name(i) for i in ids)


def test_what_a_template_is_given_anyway_is_refused_and_what_it_does_not_use_is_warned_of(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="'add_generation_prompt' is set by multicolm itself"):
        loaded(tmp_path, chat_template_args={"add_generation_prompt": False})
    with pytest.warns(MulticolmWarning, match="models.math: its chat template does not use think,"):
        loaded(tmp_path, chat_template_args={"think": True})
    folder = tmp_path / "facts"
    shutil.copytree(catalog.registry() / "tiny/facts", folder)
    file = tmp_path / "e.yaml"
    file.write_text(
        "base_model: a\nmodels:\n  a: {model: ./facts, chat_template_args: {tokenize: 1}}\n"
    )
    with pytest.raises(ConfigError, match=r"e\.yaml:3:.*models\.a\.chat_template_args"):
        multicolm.load(file)
    with pytest.raises(InputError, match="fails on these messages: TypeError"):
        read(loaded(tmp_path), Chat(TURNS, {"messages": 3}))
