"""An ensemble: models that write one text together, and a policy that says who writes."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypedDict, cast

from typing_extensions import Unpack

from multicolm.backend.base import Model
from multicolm.config import EnsembleConfig, GenerationConfig, PolicyConfig, load_ensemble
from multicolm.decoding.slots import Slots
from multicolm.errors import (
    CapabilityError,
    ConfigError,
    InputError,
    MulticolmWarning,
    ServerError,
)
from multicolm.exact.byte_vocabulary import ByteVocabulary
from multicolm.exact.character_vocabulary import CharacterVocabulary
from multicolm.exact.paths import covers
from multicolm.live import Live
from multicolm.numbers import as_python, check_seed, check_whole
from multicolm.plugins import backends
from multicolm.policy.base import (
    ModelFacts,
    Policy,
    Schedule,
    SegmentPolicy,
    check_used,
    checked_prompt_states,
)
from multicolm.policy.resolve import resolve_policy
from multicolm.streaming import Answers, Run, Stream
from multicolm.tokenizer.bridged import join
from multicolm.tokenizer.bridges import Pair, pairs
from multicolm.tokenizer.chats import not_special_here
from multicolm.tokenizer.shared import SharedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import (
    MIXTURE,
    GenerationSettings,
    Prompt,
    Signal,
)
from multicolm.views import ModelNames, implied

__all__ = ["Answers", "Ensemble", "Stream", "load"]

PolicySource = str | Path | Policy | PolicyConfig | Mapping[str, Any]


class Ensemble:
    """Models that write one text together.

    Attributes:
        vocabulary: the tokens that they write with. Models of different vocabularies hand over
            where a token of both ends.

    Args:
        models: the base model first; their names are the ensemble's names.
        policy: who writes if a call does not say: whatever :meth:`generate` takes. The base
            model alone if not given.
        generation: settings of calls that do not give their own.
        config: the file it was made from, if any.
        base_dir: the folder that relative paths in ``policy`` start from.
        bridge: how models of different vocabularies hand over; see
            :class:`multicolm.config.EnsembleConfig`.

    Raises:
        VocabularyError: if the bridge is ``shared`` and the vocabularies differ.
        ConfigError: if two models have the same name, or the policy is not known.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        policy: PolicySource | None = None,
        generation: GenerationConfig | None = None,
        config: EnsembleConfig | None = None,
        base_dir: Path | None = None,
        bridge: Literal["auto", "shared", "boundary", "exact"] = "auto",
    ) -> None:
        names = [model.name for model in models]
        if not names or len(set(names)) != len(names) or MIXTURE in names:
            raise ConfigError(
                f"an ensemble needs one model or more, with different names other than "
                f"'{MIXTURE}'; got {', '.join(names) or 'none'}."
            )
        for role, place in (("base", 0), ("assistant", 1)):
            if role in names and names.index(role) != place:
                raise ConfigError(
                    f"model {names.index(role)} is called '{role}', which is the word for model "
                    f"{place}; give it another name."
                )
        self.models = ModelNames(names)
        self.config = config
        self.generation = generation or GenerationConfig()
        self.backends = tuple(models)
        tokenizers = [model.tokenizer for model in models]
        self.vocabulary: Vocabulary = (
            SharedVocabulary(self.models, tokenizers)
            if bridge == "shared"
            else join(self.models, tokenizers, covers if bridge == "exact" else None)
        )
        if bridge == "exact":
            self._refuse_unknown()
        self._characters: CharacterVocabulary | None = None  # made when it is first asked for
        self.policy = resolve_policy(policy or {"kind": "single"}, base_dir=base_dir)
        self.check(self.policy)

    @classmethod
    def from_config(cls, config: EnsembleConfig) -> Ensemble:
        """Load the models that a configuration declares.

        Raises:
            MulticolmError: if a policy, a model or a tokenizer cannot be used.
        """
        classes = {
            name: cast("type[Model]", backends.get(config.models[name].backend))
            for name in config.names
        }
        # The policy first: what does not fit should not cost the loading of weights.
        policy = resolve_policy(config.policy, base_dir=config.base_dir)
        _check_signals(
            policy, ModelNames(config.names), [_Shown(c.signals) for c in classes.values()]
        )
        models = [cls_.from_config(name, config.models[name]) for name, cls_ in classes.items()]
        for model in models:
            _warn_of_template(model, config.models[model.name].chat_template_text)
        return cls(
            models,
            policy=config.policy,
            generation=config.generation,
            config=config,
            base_dir=config.base_dir,
            bridge=config.bridge,
        )

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        policy: PolicySource | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        seed: SupportsIndex | Sequence[SupportsIndex] | None = None,
        batch_size: int = 16,
        **settings: Unpack[GenerationSettings],
    ) -> Answers:
        """Write a text for each prompt.

        Args:
            prompts: texts, chats or lists of shared token ids; one text may stand alone.
            policy: a preset's name, a path, ``file.py:Class``, ``{"kind": ..., "params": ...}``,
                a policy, or ``None`` for the ensemble's own.
            params: params that replace those of the policy.
            seed: of everything random; one number, or one per prompt. Equal seeds give equal
                texts for the same prompt, whatever the batch and the schedule. ``None`` draws a
                fresh one for each prompt, so that copies of a prompt are answered in several
                ways; each answer reports its own.
            batch_size: how many texts are written at a time.
            **settings: see :class:`multicolm.types.GenerationSettings`.

        Returns:
            One answer per prompt, in the same order.

        Raises:
            InputError: if a prompt is empty or longer than a context, or a setting is out of
                range.
            ConfigError: if the policy or a param is not known.
            CapabilityError: if the policy needs what these models cannot show.
            ServerError: if a model's server fails for good; its ``answers`` are those that were
                finished before.
        """
        stream = self.stream(
            prompts, policy, params=params, seed=seed, batch_size=batch_size, **settings
        )
        try:
            for _ in stream:
                pass
        except ServerError as error:
            error.answers = stream.answers
            raise
        return stream.answers

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        policy: PolicySource | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        seed: SupportsIndex | Sequence[SupportsIndex] | None = None,
        batch_size: int = 16,
        clock: Callable[[], float] = time.perf_counter,
        **settings: Unpack[GenerationSettings],
    ) -> Stream:
        """Like :meth:`generate`, letting the text out while it is written.

        Takes what :meth:`generate` takes, and a ``clock`` that tells the time in seconds. Prompts
        and settings are checked at once, before the first piece is asked for.

        Returns:
            An iterator over pieces of text, which holds the answers when it has ended.

        Raises:
            MulticolmError: see :meth:`generate`.
        """
        chosen = self.policy if policy is None and not params else self.resolve(policy, params)
        self._warn_of(chosen)
        wanted = self.generation.updated(dict(settings))
        batch_size = check_whole("batch_size", batch_size, least=1)
        asked = _as_list(prompts)
        seeds = _seeds(seed if seed is not None else wanted.seed, len(asked))
        live = self._live(
            chosen,
            policy,
            schedule=wanted.schedule,
            block_size=wanted.block_size,
            slots=Slots(self.backends, max(1, min(batch_size, len(asked)))),
            clock=clock,
        )
        rows = [
            live.row(prompt, number, wanted, seeds[number]) for number, prompt in enumerate(asked)
        ]
        run = Run(live, rows)
        return Stream(run, run.write(self.backends, wanted.threads, clock))

    def live(
        self,
        policy: PolicySource | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        n_slots: int = 16,
        slots: Slots | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Live:
        """A policy at work, for texts that come and go; what servers are made of.

        Args:
            policy: see :meth:`generate`.
            params: params that replace those of the policy.
            n_slots: how many texts are written at a time.
            slots: places that several policies share, instead of so many of its own.
            clock: current time in seconds.

        Raises:
            ConfigError: if the policy or a param is not known.
            CapabilityError: if the policy needs what these models cannot show.
        """
        n_slots = check_whole("n_slots", n_slots, least=1)
        chosen = self.policy if policy is None and not params else self.resolve(policy, params)
        self._warn_of(chosen)
        return self._live(
            chosen,
            policy,
            schedule=self.generation.schedule,
            block_size=self.generation.block_size,
            slots=slots or Slots(self.backends, n_slots),
            clock=clock,
        )

    def _live(self, chosen: Policy, asked: PolicySource | None, **how: Unpack[_How]) -> Live:
        name = asked if isinstance(asked, str) else chosen.name
        written_in = self.written_in(chosen)
        return Live(
            self.backends, self.vocabulary, written_in, chosen, name, costs=self.costs, **how
        )

    def resolve(
        self, policy: PolicySource | None, params: Mapping[str, Any] | None = None
    ) -> Policy:
        """The policy that :meth:`generate` would use for these arguments.

        Raises:
            ConfigError: if it is not known, or a param is not.
        """
        return resolve_policy(self.policy if policy is None else policy, params)

    @property
    def bridges(self) -> list[Pair]:
        """How each two models hand over to each other, and why in this way."""
        return pairs(self.vocabulary, [model.tokenizer for model in self.backends])

    @property
    def facts(self) -> list[ModelFacts]:
        """What each model is, the base model first."""
        return [ModelFacts(m.name, m.identity, m.hidden_size) for m in self.backends]

    @property
    def costs(self) -> list[float]:
        """What one forward pass of each model costs for one text, in the ensemble's unit."""
        if self.config is None:
            return [1.0] * len(self.models)
        return [self.config.models[name].cost for name in self.models]

    def _refuse_unknown(self) -> None:
        for model in self.backends:
            if model.max_top_logprobs is not None:
                raise CapabilityError(
                    f"the exact bridge needs every probability of model '{model.name}', and its "
                    f"server {model.server} returns {model.max_top_logprobs} tokens; set "
                    "`bridge: boundary`, or `logprobs: all` if the server allows it."
                )

    def written_in(self, policy: Policy) -> Vocabulary:
        """What texts are written in under a policy: tokens, bytes or characters."""
        if policy.support == "bytes":
            return ByteVocabulary(self.models)
        if policy.support == "characters":
            if self._characters is None:
                tokenizers = [model.tokenizer for model in self.backends]
                self._characters = CharacterVocabulary(self.models, tokenizers)
            return self._characters
        return self.vocabulary

    def _warn_of(self, policy: Policy) -> None:
        for sentence in self.check(policy):
            warnings.warn(sentence, MulticolmWarning, stacklevel=4)

    def check(self, policy: Policy) -> list[str]:
        """Refuse a policy that does not fit these models, before anything is read or written.

        Returns:
            What has to be known of how it fits them, one sentence each.

        Raises:
            CapabilityError: if it needs what a model cannot show, or was made for other models.
        """
        check_used(policy, self.models)
        shown = [_Shown(m.shows, m.server, m.max_top_logprobs) for m in self.backends]
        sentences = _check_signals(policy, self.models, shown)
        self._check_vocabulary(policy)
        self._check_prompts(policy)
        policy.check_models(self.facts)
        return sentences

    def _check_prompts(self, policy: Policy) -> None:
        """Refuse a policy that wants to know what cannot be known of a prompt or a text.

        Raises:
            CapabilityError: naming the policy.
        """
        if isinstance(policy, SegmentPolicy) and (policy.narrows or policy.names_models):
            raise CapabilityError(
                f"policy '{policy.name}' rates what all models that it uses propose, and defines "
                "text_uses() or models_at(), by which some do not; leave models out with uses()."
            )
        reads = policy.prompts or policy.likelihoods or bool(policy.prompt_states(self.models))
        if policy.support in ("bytes", "characters") and reads:
            raise CapabilityError(
                f"policy '{policy.name}' reads what models make of the prompt or of the text so "
                f"far, and writes in {policy.support}; such a policy writes in tokens (support "
                "shared or union)."
            )

    def _check_vocabulary(self, policy: Policy) -> None:
        """Refuse a policy whose distributions are over what these models do not share.

        Raises:
            CapabilityError: naming the policy and two models, or a model whose tokenizer the exact
                bridge does not cover.
        """
        used = sorted(policy.uses(self.models))
        if policy.support == "bytes":
            for k in used:
                if reason := covers(self.backends[k].tokenizer):
                    raise CapabilityError(
                        f"policy '{policy.name}' needs model '{self.models[k]}' byte by byte: "
                        f"{reason}"
                    )
        if policy.acts in ("select", "segment") or policy.support != "shared":
            return
        for k in used[1:]:
            if self.vocabulary.groups[k] != self.vocabulary.groups[used[0]]:
                one, other = self.models[used[0]], self.models[k]
                raise CapabilityError(
                    f"policy '{policy.name}' compares the models' probabilities token by token, "
                    f"and '{one}' and '{other}' have different vocabularies; choose a policy that "
                    "selects one model per token, such as cosd-rule, one that mixes bytes, such as "
                    "byte-mixture, or models of one family."
                )


def _warn_of_template(model: Model, template: str | None) -> None:
    """Say where the template of an ensemble file writes special tokens that a model has not."""
    if template is None or not (names := not_special_here(model.tokenizer, template)):
        return
    warnings.warn(
        f"models.{model.name}: its `chat_template` writes {' and '.join(names)}, which its "
        "tokenizer does not have as tokens, so that the model reads them as text; give the "
        "template that it was trained with, or `chat_template: plain`.",
        MulticolmWarning,
        stacklevel=4,
    )


class _How(TypedDict):
    """Arguments of :class:`multicolm.live.Live`."""

    schedule: Schedule | None
    block_size: int
    slots: Slots
    clock: Callable[[], float]


def _as_list(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    """What stands for prompts, one by one.

    Raises:
        InputError: if it is no list.
    """
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        raise InputError(
            f"prompts are a {type(prompts).__name__}; give a list of prompts, each a text, a "
            "chat (a list of messages), or a list of token ids."
        )
    if isinstance(prompts, str):
        return [prompts]
    return [p.tolist() if hasattr(p, "tolist") else as_python(p) for p in prompts]


def _seeds(seed: SupportsIndex | Sequence[SupportsIndex] | None, n_prompts: int) -> list[int]:
    """One seed per prompt; a fresh one for each if none is given.

    Raises:
        InputError: if there are more or fewer, or one is no whole number.
    """
    if seed is None:
        return [secrets.randbits(32) for _ in range(n_prompts)]
    single = isinstance(seed, str | bytes) or not isinstance(as_python(seed), Iterable)
    seeds = [seed] * n_prompts if single else list(cast("Iterable[int]", seed))
    try:
        seeds = [check_seed(number) for number in seeds]
    except InputError as error:
        raise InputError(
            f"seed is {seed!r}; give a whole number, or one for each prompt."
        ) from error
    if len(seeds) != n_prompts:
        raise InputError(f"got {len(seeds)} seeds for {n_prompts} prompts; give one for each.")
    return seeds


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a model shows, as far as it is known.

    Attributes:
        signals: of the model, or of its backend at most.
        server: where it runs.
        max_top_logprobs: of how many of its likeliest tokens it tells; ``None`` for all.
    """

    signals: frozenset[Signal]
    server: str = ""
    max_top_logprobs: int | None = None

    @property
    def where(self) -> str:
        """Its server, behind its name."""
        return f" (server {self.server})" if self.server else ""


def _check_signals(policy: Policy, models: ModelNames, shown: Sequence[_Shown]) -> list[str]:
    """Refuse a policy that needs what a model cannot show.

    Returns:
        How the policy treats what a server does not tell, one sentence per model.

    Raises:
        CapabilityError: naming the policy, the model, its server, and the signal.
    """
    needs = policy.needs(models)
    states = checked_prompt_states(policy, models)
    sentences = []
    for k, its in enumerate(shown):
        wanted = needs.of(k) | ({"hidden"} if k in states else frozenset())
        wanted |= {"token_logprobs"} if policy.likelihoods and needs.of(k) else frozenset()
        missing = wanted - implied(its.signals)
        if missing == {"logprobs"} and policy.partial and its.max_top_logprobs:
            sentences.append(
                f"policy '{policy.name}' knows only the {its.max_top_logprobs} likeliest tokens of "
                f"model '{models[k]}' ({its.server}): {policy.partial}."
            )
        elif missing:
            raise CapabilityError(
                f"policy '{policy.name}' needs {' and '.join(sorted(missing))} of model "
                f"'{models[k]}'{its.where}, which shows only {', '.join(sorted(its.signals))}; "
                "choose another policy, or another backend for that model."
            )
    if isinstance(policy, SegmentPolicy):
        sentences += _check_judges(policy, models, shown)
    return sentences


def _check_judges(policy: Policy, models: ModelNames, shown: Sequence[_Shown]) -> list[str]:
    """Refuse models that propose where none can judge.

    Returns:
        Who proposes and does not judge, one sentence each.

    Raises:
        CapabilityError: naming the policy and the models.
    """
    used = sorted(policy.uses(models))
    silent = [k for k in used if "token_logprobs" not in implied(shown[k].signals)]
    if silent == used:
        listed = " and ".join(f"'{models[k]}'{shown[k].where}" for k in silent)
        raise CapabilityError(
            f"policy '{policy.name}' needs a model that returns the log-probabilities of what "
            f"another one proposes (signal token_logprobs), and {listed} do not; add a local "
            "model, or a "
            "server that returns tokens that are named, such as vLLM's."
        )
    return [
        f"policy '{policy.name}' lets model '{models[k]}'{shown[k].where} propose and not "
        "judge: it does not return the log-probabilities of given text."
        for k in silent
    ]


def load(source: str | Path | EnsembleConfig) -> Ensemble:
    """Load an ensemble with its models.

    Args:
        source: a name in ``registry/ensembles/``, a YAML file, a folder that holds an
            ``ensemble.yaml``, or a configuration.

    Raises:
        ConfigError: if the file is missing or not right; it names line and column.
        ModelError: if a model cannot be loaded.
        VocabularyError: if the tokens of a tokenizer cannot be turned into bytes.
    """
    config = source if isinstance(source, EnsembleConfig) else load_ensemble(source)
    return Ensemble.from_config(config)
