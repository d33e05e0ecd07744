"""Trains the tiny models from scratch: byte-level tokenizers and small Llamas."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from embedded.corpora import facts_documents, generalist_documents, math_documents
from multicolm.tiny.world import END, World, stream

CONTEXT_TOKENS: Final = 512
LONG_ROW_TOKENS: Final = 384
LONG_EVERY: Final = 8
"""Each eighth step trains on fewer, longer rows, so that long prompts are not unheard of."""
TOKENIZER_DOCUMENTS: Final = 6000

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'Question: ' + message['content'] + '\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'Response: ' + message['content'] | trim + eos_token + '\\n' }}"
    "{%- else -%}{{ message['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Response:' }}{%- endif -%}"
)
"""A user message becomes "Question: ...\\nResponse:", the form of the question files."""

DOCUMENTS: Final[dict[str, Callable[[World, random.Random], Iterator[str]]]] = {
    "generalist": generalist_documents,
    "facts": facts_documents,
    "math": math_documents,
}

Progress = Callable[[int, float], None]
"""Called with the number of finished steps and the last loss in nats per token."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model is made.

    Attributes:
        corpus: key of `DOCUMENTS`.
        vocabulary: entries of the tokenizer, the end token among them.
        tokenizer_corpora: what the tokenizer is learnt on.
        row_tokens: length of a training row; each step sees `rows` of them.
    """

    corpus: str
    vocabulary: int
    tokenizer_corpora: tuple[str, ...]
    layers: int
    steps: int
    rows: int
    row_tokens: int


_ALL: Final = ("generalist", "facts", "math")
PLANS: Final[dict[str, Plan]] = {
    "generalist": Plan("generalist", 768, _ALL, layers=3, steps=2600, rows=16, row_tokens=96),
    "math": Plan("math", 768, _ALL, layers=3, steps=2500, rows=16, row_tokens=128),
    "math-own": Plan("math", 512, ("math",), layers=3, steps=2500, rows=16, row_tokens=128),
    "facts": Plan("facts", 768, _ALL, layers=2, steps=1600, rows=16, row_tokens=128),
    "facts-own": Plan("facts", 896, ("facts",), layers=2, steps=1600, rows=16, row_tokens=128),
}
"""The models by folder name, the slowest first."""


def learn_tokenizer(world: World, plan: Plan) -> Tokenizer:
    """A byte-level BPE with single digits, the same for equal plans; the end token is entry 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.chain.from_iterable(
        itertools.islice(
            DOCUMENTS[name](world, stream(world.seed, f"tokenizer/{name}")), TOKENIZER_DOCUMENTS
        )
        for name in plan.tokenizer_corpora
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(plan: Plan, seed: int) -> LlamaForCausalLM:
    """A model with random weights; the global generator stays as it was."""
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batches(
    plan: Plan, tokenizer: Tokenizer, documents: Iterator[str], rng: random.Random
) -> Iterator[Tensor]:
    """Endless batches of token ids, rows by tokens; each row begins where a document begins.

    Documents in a row are parted by the end token and, half of the time, a line break, as in chats.
    """
    breaks = {True: tokenizer.encode("\n").ids, False: []}
    for step in itertools.count():
        long = step % LONG_EVERY == LONG_EVERY - 1
        length = LONG_ROW_TOKENS if long else plan.row_tokens
        count = max(1, plan.rows * plan.row_tokens // length)
        rows = []
        for _ in range(count):
            ids: list[int] = []
            while len(ids) < length:
                ids += tokenizer.encode(next(documents)).ids + [0] + breaks[rng.random() < 0.5]
            rows.append(ids[:length])
        yield torch.tensor(rows)


def learning_rate(step: int, steps: int, peak: float = 3e-3, warm_up: int = 60) -> float:
    """Linear warm-up, constant to 40 % of the steps, then linear down to 5 % of the peak."""
    flat = 0.4 * steps
    fall = 1.0 if step < flat else 1.0 - 0.95 * (step - flat) / max(1.0, steps - flat)
    return peak * min(1.0, (step + 1) / warm_up) * fall


def optimise(
    model: LlamaForCausalLM, rows: Iterable[Tensor], steps: int, progress: Progress | None = None
) -> float:
    """Trains in place on the next-token loss.

    Returns:
        The loss in nats per token, as an average over the last steps.

    Raises:
        FloatingPointError: if the loss is no longer a finite number.
    """
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    model.train()
    smooth_nats = math.nan
    for step, ids in enumerate(itertools.islice(rows, steps)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        nats = float(loss.detach())
        if not math.isfinite(nats):
            raise FloatingPointError(f"the loss is {nats} at step {step}; nothing was saved")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        smooth_nats = nats if math.isnan(smooth_nats) else 0.98 * smooth_nats + 0.02 * nats
        if progress is not None:
            progress(step + 1, smooth_nats)
    model.train(False)
    return smooth_nats


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (fp16), configuration, tokenizer and chat template.

    `config.json` asks for float32: whoever loads the folder computes in float32 with fp16 values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "padding_side": "left",
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type]
    model.to(torch.float32)  # type: ignore[arg-type]
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    name: str,
    world: World,
    folder: Path,
    steps: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Makes one model of `PLANS` from nothing and saves it.

    Args:
        name: key of `PLANS`.
        world: what it reads about.
        folder: where it is saved, once it is finished.
        steps: fewer than planned, for a trial.
        progress: called after each step.

    Returns:
        The last loss, in nats per token.
    """
    plan = PLANS[name]
    torch.set_num_threads(1)
    tokenizer = learn_tokenizer(world, plan)
    model = new_model(plan, world.seed)
    documents = DOCUMENTS[plan.corpus](world, stream(world.seed, f"training/{name}"))
    rows = batches(plan, tokenizer, documents, stream(world.seed, f"rows/{name}"))
    loss_nats = optimise(model, rows, plan.steps if steps is None else steps, progress)
    save(model, tokenizer, folder)
    return loss_nats
