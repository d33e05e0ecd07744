"""An ensemble as a model of EleutherAI's lm-evaluation-harness (the extra ``eval``).

    from multicolm.evaluation.harness_model import EnsembleLM
    lm_eval.simple_evaluate(model=EnsembleLM(multicolm.load("tiny"), "co-llm"), tasks=["hellaswag"])

What it answers for a policy that lets one model write alone is what the harness's own ``hf`` model
answers for that model's folder, but for these:

- A tokenizer's own beginning of a text is read and not scored, also by ``loglikelihood_rolling``;
  ``hf`` scores it once too unless it is told ``add_bos_token=False``.
- A continuation is encoded by itself, as it is while a text is written; ``hf`` encodes context and
  continuation in one go and cuts them apart. The tokens differ only where one would lie across
  the seam.
- Names of special tokens are these tokens in a context, as with ``hf``, and text where they are
  scored; ``hf`` takes them for tokens there, too.
- White space at the end of a context is scored with the continuation, as ``hf`` does, but not that
  of a chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble, PolicySource
from multicolm.errors import InputError
from multicolm.numbers import as_python, check_number, check_whole
from multicolm.scoring.likelihood import Kind, Likelihood, LikelihoodReader, Passage
from multicolm.types import Message, OwnTokens, Prompt, finite

__all__ = ["EnsembleLM", "Kept", "generation_settings"]

# Requests whose texts are read before they are kept and reported; fewer if they are long.
_CHUNK = 128
_CHUNK_PASSES = 4
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LONGEST_ANSWER = 256  # tokens, of tasks that do not say; as the harness's other models have it

# What other settings have to be, for then they change nothing.
_NEUTRAL: Mapping[str, object] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "min_p": 0.0,
}


@runtime_checkable
class Kept(Protocol):
    """Answers by key, which may outlive the model that gave them; a dictionary is one.

    They are plain values as JSON has them, and never ``None``.
    """

    def get(self, key: str, /) -> Any:
        """The answer; ``None`` if there is none."""

    def __setitem__(self, key: str, answer: Any, /) -> None: ...


class EnsembleLM(LM):  # type: ignore[misc]
    """An ensemble under one policy, as the harness wants a model.

    Given the answers that another one kept, of the same ensemble, policy, likelihood, sizes of
    batches, and seed, it asks the models for the rest. Likelihoods are equal then, bit by bit: what
    is read together depends on all requests and not on which are kept. A text is written beside
    others than it was before, which changes it only where a model's rounding depends on them.

    Attributes:
        likelihood: which log-likelihoods it gives; ``None`` where the policy has none.
        n_cut: requests whose context was too long and was cut on the left, kept ones included.
        n_impossible: texts whose likelihood was asked for and is 0, kept ones included.

    Args:
        ensemble: whose models read and write.
        policy: decides who writes; the ensemble's own if not given.
        likelihood: ``joint`` or ``routed`` (:mod:`multicolm.scoring.likelihood`); the policy's
            first if not given.
        batch_size: how many texts are written at a time.
        batch_tokens: maximum number of tokens of one pass while texts are read.
        seed: of everything random.
        kept: what is answered already, and where answers go as they come; they go nowhere if not
            given.
        progress: called with how many requests of a kind are answered, kept ones included, and
            of how many.

    Raises:
        CapabilityError: if the policy does not fit the ensemble, or has no such likelihood.
        ConfigError: if there is no such policy.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        policy: PolicySource | None = None,
        *,
        likelihood: Kind | None = None,
        batch_size: int = 16,
        batch_tokens: int = 4096,
        seed: int = 0,
        kept: Kept | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self._ensemble = ensemble
        self._policy = ensemble.resolve(policy)
        self._reader = LikelihoodReader(
            ensemble, self._policy, seed=seed, batch_tokens=batch_tokens
        )
        if likelihood is not None:
            self._reader.check(likelihood)
        self.likelihood: Kind | None = likelihood or next(iter(self._reader.kinds), None)
        self.n_cut = 0
        self.n_impossible = 0
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._kept = kept
        self._progress = progress
        self._used = sorted(self._policy.uses(ensemble.models))
        self._chats: dict[str, tuple[list[Message], str]] = {}

    # --- likelihoods -----------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Per request its continuation's log-likelihood in nats, and whether it is greedy.

        Raises:
            CapabilityError: if the policy has no likelihoods.
        """
        texts = [[self._passage(*request.args[:2])] for request in requests]
        found = self._likelihoods("loglikelihood", requests, texts)
        return [(each.logprob, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Per request the log-likelihood of a whole text, in nats."""
        texts = [list(self._reader.windows(request.args[0])) for request in requests]
        found = self._likelihoods("loglikelihood_rolling", requests, texts)
        return [each.logprob for each in found]

    def _likelihoods(
        self, kind: str, requests: Sequence[Any], texts: Sequence[Sequence[Passage]]
    ) -> list[Likelihood]:
        """Per request how likely its passages are together."""
        kept = self._answers()
        keys = list(_keys(kind, requests))
        found: list[Likelihood] = []
        models, threads = self._ensemble.backends, self._ensemble.generation.threads
        with torch_threads(models, threads):
            for chunk in self._chunks(texts):
                known = [kept.get(keys[i]) for i in chunk]
                # A chunk is read whole or not at all: what stands beside a text moves the last
                # digits of its likelihood.
                if None in known:
                    read = self._read(texts[chunk.start : chunk.stop])
                    known = [[finite(each.logprob), each.is_greedy] for each in read]
                    for i, answer in zip(chunk, known, strict=True):
                        kept[keys[i]] = answer
                found += [
                    Likelihood(-math.inf if logprob is None else logprob, is_greedy)
                    for logprob, is_greedy in known
                ]
                self._progress(len(found), len(requests))
        self.n_impossible += sum(each.logprob == -math.inf for each in found)
        return found

    def _read(self, texts: Sequence[Sequence[Passage]]) -> Iterator[Likelihood]:
        passages = [passage for text in texts for passage in text]
        found = iter(self._reader.likelihoods(passages, self.likelihood))
        for text in texts:
            parts = [next(found) for _ in text]
            yield Likelihood(sum(p.logprob for p in parts), all(p.is_greedy for p in parts))

    def _chunks(self, texts: Sequence[Sequence[Passage]]) -> Iterator[range]:
        """Texts that are read and kept at a time: so few that little is lost with them."""
        start = n_tokens = 0
        for end, text in enumerate(texts, start=1):
            n_tokens += sum(len(p.ids) + max(map(len, p.prompt_ids)) for p in text)
            is_long = n_tokens >= _CHUNK_PASSES * self._batch_tokens
            if is_long or end - start == _CHUNK or end == len(texts):
                yield range(start, end)
                start, n_tokens = end, 0

    def _answers(self) -> Kept:
        return {} if self._kept is None else self._kept

    def _passage(self, context: str, continuation: str) -> Passage:
        written = ""
        if context in self._chats:
            _, written = self._chats[context]
        else:
            n_kept = len(context.rstrip())
            context, continuation = context[:n_kept], context[n_kept:] + continuation
        prompt = self._own_tokens(context) if context else ""
        passage, was_cut = self._reader.fitted(
            self._reader.passage(prompt, continuation, written=written)
        )
        self.n_cut += was_cut
        return passage

    def _own_tokens(self, context: str) -> OwnTokens:
        """A context as every model in use reads it; what begins a text if there is none.

        Names of special tokens stand for these tokens, as for the harness's own models: tasks
        write them. What a chat was rendered to is read as that chat, by each model's own template.
        """
        ids: list[tuple[int, ...]] = [()] * len(self._ensemble.backends)
        for k in self._used:
            tokenizer = self._ensemble.backends[k].tokenizer
            if context in self._chats:
                own = tokenizer.encode_chat(self._chats[context][0])
            else:
                own = tokenizer.encode_rendered(context) if context else tokenizer.start_ids
            ids[k] = tuple(own)
        return OwnTokens(tuple(ids))

    # --- texts -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Per request the text that is written, up to the first of its stop strings."""
        kept = self._answers()
        keys = list(_keys("generate_until", requests))
        texts = {i: text for i, key in enumerate(keys) if (text := kept.get(key)) is not None}
        if texts:
            self._progress(len(texts), len(requests))
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        times: Counter[str] = Counter()
        for group, numbers in groups.items():
            settings = generation_settings(json.loads(group))
            # Of kept ones too: what is cut is counted, and what is asked again is drawn anew.
            prompts, seeds = {}, {}
            for i in numbers:
                context = requests[i].args[0]
                prompts[i] = self._prompt(context, settings["max_new_tokens"])
                # A request that is asked several times is to be answered in several ways.
                seeds[i] = self._seed + times[context]
                times[context] += 1
            open_ = [i for i in numbers if i not in texts]
            if not open_:
                continue
            stream = self._ensemble.stream(
                [prompts[i] for i in open_],
                self._policy,
                seed=[seeds[i] for i in open_],
                batch_size=self._batch_size,
                **settings,
            )
            with stream:
                for number, answer in stream.finished():
                    i = open_[number]
                    texts[i] = kept[keys[i]] = answer.content
                    self._progress(len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _prompt(self, context: str, max_new_tokens: int) -> Prompt:
        """The context, cut on the left so far that the answer fits after it."""
        if context in self._chats and self._chats[context][1]:
            raise InputError(
                "a task that begins the answer itself (`gen_prefix`) cannot have texts written "
                "with --apply-chat-template; leave that out."
            )
        whole = self._own_tokens(context)
        cut = list(whole.ids)
        for k in self._used:
            model = self._ensemble.backends[k]
            limit = model.context_length
            if limit is None:
                continue
            if limit <= max_new_tokens:
                raise InputError(
                    f"answers of up to {max_new_tokens} tokens are wanted, and the context of "
                    f"model '{model.name}' holds {limit} with the question; set max_gen_toks "
                    "with --gen-kwargs."
                )
            cut[k] = cut[k][-(limit - max_new_tokens) :]
        self.n_cut += tuple(cut) != whole.ids
        return OwnTokens(tuple(cut))

    # --- chats -----------------------------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat in the template of the first model in use.

        The other models read it in their own: what the text stands for is remembered.

        Raises:
            InputError: if that model has no template, or the template refuses the messages.
        """
        messages = [Message(role=m["role"], content=m["content"]) for m in chat_history]
        written = "" if add_generation_prompt else messages.pop()["content"]
        tokenizer = self._ensemble.backends[self._used[0]].tokenizer
        ids = tokenizer.encode_chat(messages)
        names = [tokenizer.special_name(i) for i in ids]
        pieces = [
            tokenizer.token_bytes(i) if name is None else name.encode()
            for i, name in zip(ids, names, strict=True)
        ]
        text = b"".join(pieces).decode(errors="replace") + written
        self._chats[text] = (messages, written)
        return text

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes the templates of one ensemble from those of another."""
        return "multicolm " + " ".join(m.identity or m.name for m in self._ensemble.backends)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Every model has its own; none of them stands for all.

        Raises:
            InputError: if a template is asked for by name.
        """
        if isinstance(chat_template, str):
            raise InputError(
                f"chat template '{chat_template}': models use the template of their tokenizer, or "
                "`chat_template:` of the ensemble file; ask for none by name."
            )
        return ""


def _keys(kind: str, requests: Sequence[Any]) -> Iterator[str]:
    """What answers are kept under: the kind, what is asked, and how often it was asked before."""
    times: Counter[str] = Counter()
    for request in requests:
        asked = json.dumps([kind, *request.args[:2]], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:32]
        yield f"{kind} {digest} {times[digest]}"
        times[digest] += 1


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose values are what the harness takes them for; nothing is ``None``.

    Raises:
        InputError: naming the setting and its value.
    """
    checked: dict[str, Any] = {}
    for name, value in as_python(dict(given)).items():
        if value is None or value in ("None", "none"):
            continue  # as the harness's own command line has it
        if name in _LENGTHS:
            value = check_whole(name, _number(value), least=1)
        elif name == "temperature":
            value = check_number(name, _number(value), least=0)
        elif name == "top_k":
            value = check_whole(name, _number(value), least=-1)  # -1 and 0: all tokens
        elif name == "top_p":
            value = check_number(name, _number(value), above=0, most=1)
        elif name == "do_sample" and not isinstance(value, bool):
            raise InputError(f"do_sample must be true or false, got {value!r}.")
        elif name == "until" and not _is_texts(value):
            raise InputError(f"until must be a text or a list of texts, got {value!r}.")
        checked[name] = value
    return checked


def _number(value: Any) -> Any:
    """A number that was written as text in a task's file."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _is_texts(value: Any) -> bool:
    texts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(text, str) for text in texts)


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's settings of a generation as those of :meth:`Ensemble.generate`.

    Raises:
        InputError: if one of them is not known here, or its value is none that it can have.
    """
    known = dict(normalize_gen_kwargs(_checked(given), _LONGEST_ANSWER))
    stop = known.pop("until", None) or []
    settings: dict[str, Any] = {
        "max_new_tokens": known.pop("max_gen_toks"),
        "temperature": float(known.pop("temperature", 0.0)),
        "stop": [text for text in ([stop] if isinstance(stop, str) else stop) if text],
    }
    known.pop("do_sample", None)
    top_k, top_p = known.pop("top_k", 0), known.pop("top_p", None)
    if settings["temperature"] and top_k > 0:
        settings["top_k"] = top_k
    if settings["temperature"] and top_p is not None:
        settings["top_p"] = top_p
    strange = [key for key, value in known.items() if _NEUTRAL.get(key, ...) != value]
    if strange:
        raise InputError(
            f"the task asks for {strange[0]} = {known[strange[0]]!r} when texts are written, which "
            "an ensemble does not have; it has until, max_gen_toks, do_sample, temperature, top_k "
            "and top_p, which --gen-kwargs can set."
        )
    return settings
