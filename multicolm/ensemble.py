"""An ensemble: models that write one text together, and a policy that says who writes."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast

from typing_extensions import Unpack

from multicolm.backend.base import Model
from multicolm.checking import Shown, check_policy, check_signals, facts_of
from multicolm.config import (
    EnsembleConfig,
    GenerationConfig,
    ModelConfig,
    PolicyConfig,
    load_ensemble,
)
from multicolm.decoding.live import Live
from multicolm.decoding.plan import Plan
from multicolm.decoding.runner import Runner
from multicolm.decoding.streaming import Answers, GenerateCall, Stream
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
from multicolm.numbers import as_python, check_seed, check_whole
from multicolm.plugins import backends
from multicolm.policy.base import (
    ModelFacts,
    Policy,
)
from multicolm.policy.resolve import resolve_policy
from multicolm.tokenizer.bridged import join
from multicolm.tokenizer.bridges import Pair, pairs
from multicolm.tokenizer.chats import not_special_here, unknown_args
from multicolm.tokenizer.shared import SharedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import (
    MIXTURE,
    GenerationSettings,
    Prompt,
)
from multicolm.views import ModelNames

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
        self._sentences = self.check(self.policy)

    def __repr__(self) -> str:
        base, *assistants = self.models
        names = f"{base} with {', '.join(assistants)}" if assistants else base
        bridges = ", ".join(sorted({pair.bridge for pair in self.bridges}))
        bridge = f", bridge {bridges}" if bridges else ""
        return f"<Ensemble {names}: policy {self.policy.name}{bridge}>"

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
        check_signals(
            policy, ModelNames(config.names), [Shown(c.signals) for c in classes.values()]
        )
        loaded: dict[str, Model] = {}
        for cls_ in dict.fromkeys(classes.values()):
            of_backend = {n: config.models[n] for n in config.names if classes[n] is cls_}
            loaded |= zip(of_backend, cls_.from_configs(of_backend), strict=True)
        models = [loaded[name] for name in config.names]
        for model in models:
            model.tokenizer.template_args = config.models[model.name].chat_template_args
            _warn_of_template(model, config.models[model.name])
        return cls(
            models,
            policy=policy,
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
            prompts: texts, chats or lists of shared token ids; a single text may be given as it is.
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

        Takes what :meth:`generate` takes, and a ``clock``, the current time in seconds. Prompts
        and settings are checked at once, before the first piece is asked for.

        Returns:
            An iterator over pieces of text, which holds the answers when it has ended.

        Raises:
            MulticolmError: see :meth:`generate`.
        """
        plan, name = self._plan(policy, params)
        wanted = self.generation.updated(dict(settings))
        batch_size = check_whole("batch_size", batch_size, least=1)
        asked = _as_list(prompts)
        seeds = _seeds(seed if seed is not None else wanted.seed, len(asked))
        runner = Runner(self.backends, max(1, min(batch_size, len(asked))), clock)
        live = Live(
            plan,
            self.vocabulary,
            name,
            runner,
            schedule=wanted.schedule,
            block_size=wanted.block_size,
        )
        rows = [
            live.row(prompt, number, wanted, seeds[number]) for number, prompt in enumerate(asked)
        ]
        run = GenerateCall(live, rows)
        return Stream(run, run.write(self.backends, wanted.threads, clock))

    def live(
        self,
        policy: PolicySource | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        n_slots: int = 16,
        runner: Runner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Live:
        """A policy at work, for texts that come and go; what servers are made of.

        Args:
            policy: see :meth:`generate`.
            params: params that replace those of the policy.
            n_slots: how many texts are written at a time.
            runner: what several policies share, with its places, instead of one of its own.
            clock: current time in seconds.

        Raises:
            ConfigError: if the policy or a param is not known.
            CapabilityError: if the policy needs what these models cannot show.
        """
        n_slots = check_whole("n_slots", n_slots, least=1)
        plan, name = self._plan(policy, params)
        return Live(
            plan,
            self.vocabulary,
            name,
            runner or Runner(self.backends, n_slots, clock),
            schedule=self.generation.schedule,
            block_size=self.generation.block_size,
        )

    def _plan(
        self, source: PolicySource | None, params: Mapping[str, Any] | None
    ) -> tuple[Plan, str]:
        """A policy over these models, resolved and checked once, and its name for answers."""
        own = source is None and not params
        policy = self.policy if own else self.resolve(source, params)
        for sentence in self._sentences if own else self.check(policy):
            warnings.warn(sentence, MulticolmWarning, stacklevel=4)
        name = source if isinstance(source, str) else policy.name
        return self.plan(policy), name

    def plan(self, policy: Policy) -> Plan:
        """What loops have to know of a policy over these models."""
        return Plan.of(policy, self.backends, self.models, self.written_in(policy), self.costs)

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
        return facts_of(self.backends)

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

    def check(self, policy: Policy) -> list[str]:
        """Refuse a policy that does not fit these models, before anything is read or written.

        Returns:
            What has to be known of how it fits them, one sentence each.

        Raises:
            CapabilityError: if it needs what a model cannot show, or was made for other models.
        """
        return check_policy(policy, self.backends, self.models, self.vocabulary)


def _warn_of_template(model: Model, config: ModelConfig) -> None:
    """Say what of a template does not fit: special tokens that the model has not, variables."""
    unused = unknown_args(model.tokenizer.chat_template or "", config.chat_template_args)
    if unused:
        warnings.warn(
            f"models.{model.name}: its chat template does not use {' and '.join(unused)}, which "
            "`chat_template_args` sets; see what it calls it, or leave it out.",
            MulticolmWarning,
            stacklevel=4,
        )
    template = config.chat_template_text
    if template is None or not (names := not_special_here(model.tokenizer, template)):
        return
    warnings.warn(
        f"models.{model.name}: its `chat_template` writes {' and '.join(names)}, which its "
        "tokenizer does not have as tokens, so that the model reads them as text; give the "
        "template that it was trained with, or `chat_template: plain`.",
        MulticolmWarning,
        stacklevel=4,
    )


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
