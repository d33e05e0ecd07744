"""Which policies clients may choose, and by which names.

``tiny``                     the ensemble's own policy
``tiny:confidence``          another one, as far as the operator allows
``tiny:confidence@0.3``      the same with another threshold of deferral; ``tiny@0.3`` likewise

A client names policies and their params, and never a path or a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from multicolm import catalog
from multicolm.config import file_params, is_path, load_policy_file
from multicolm.ensemble import Ensemble
from multicolm.errors import ConfigError, InputError, MulticolmError, UnknownNameError, unknown
from multicolm.policy.base import Policy

__all__ = ["DEFAULT", "Catalog", "Choice", "NotServedError", "ServedModel"]

DEFAULT = "default"
"""What the ensemble's own policy is called."""


class NotServedError(UnknownNameError):
    """A model or a policy that a client cannot choose here.

    Attributes:
        param: the field that names it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Choice:
    """A policy that a client has chosen.

    Attributes:
        name: of the policy in the catalog.
        policy: the policy.
        params: that the client has given.
    """

    name: str
    policy: Policy
    params: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Equal for equal choices."""
        return json.dumps([self.name, self.params], sort_keys=True)


@dataclass(frozen=True)
class ServedModel:
    """A policy that may be chosen.

    Attributes:
        name: by which it is.
        policy: with the params that it has if a client gives none.
        summary: one line about it.
    """

    name: str
    policy: Policy
    summary: str = ""


class Catalog:
    """What clients may choose from.

    Args:
        ensemble: that the policies are for.
        served: the ensemble's name for clients.
        allowed: policies that may be chosen besides the ensemble's own: each a preset's name, or
            ``name=source`` with whatever :meth:`Ensemble.generate` takes for a policy. ``None``
            allows every preset that fits these models.

    Raises:
        ConfigError: if an allowed policy is not known, or two have one name.
        CapabilityError: if one does not fit these models.
    """

    def __init__(
        self, ensemble: Ensemble, served: str, allowed: Sequence[str] | None = None
    ) -> None:
        self.served = served
        self._ensemble = ensemble
        own = ServedModel(DEFAULT, ensemble.policy, f"the ensemble's own, {ensemble.policy.name}")
        self.models: dict[str, ServedModel] = {DEFAULT: own}
        for model in _presets(ensemble) if allowed is None else map(self._read, allowed):
            if model.name == DEFAULT:
                continue
            if model.name in self.models:
                raise ConfigError(f"--allow-policy: '{model.name}' names two policies.")
            self.models[model.name] = model

    def _read(self, written: str) -> ServedModel:
        """A policy that the operator allows.

        Raises:
            MulticolmError: if there is none, or it does not fit.
        """
        if written == DEFAULT:
            return self.models[DEFAULT]
        name, _, source = written.partition("=")
        if not source and (is_path(name) or ".py:" in name):
            raise ConfigError(
                f"--allow-policy {written}: clients need a name for it; write NAME={written}."
            )
        if not name or set(name) & set(":@/\\"):
            raise ConfigError(
                f"--allow-policy {written}: a name has no ':', '@', '/' or '\\' in it."
            )
        policy = self._ensemble.resolve(source or name)
        self._ensemble.check(policy)
        known = not source and name in catalog.names("policies")
        return ServedModel(name, policy, load_policy_file(name).summary if known else "")

    def ids(self) -> list[str]:
        """What a client may write for a model, the ensemble's own policy first."""
        others = [f"{self.served}:{name}" for name in self.models if name != DEFAULT]
        return [self.served, *others]

    def choose(
        self,
        model: str,
        policy: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Choice:
        """What a client means.

        Args:
            model: the name of a model, as above.
            policy: of the extension field; it must not contradict ``model``.
            params: params that replace those of the policy.

        Raises:
            NotServedError: if there is no such model or policy.
            InputError: if the policy has no threshold, or a param cannot be set by a client.
            ConfigError: if a param is not known, or of the wrong type.
        """
        name, threshold = self._parse(model)
        if policy is not None:
            if name is not None and name != policy:
                raise InputError(
                    f"model '{model}' names policy '{name}' and multicolm.policy names "
                    f"'{policy}'; name one."
                )
            name = policy
        name = name or DEFAULT
        if name not in self.models:
            param = "model" if policy is None else "multicolm.policy"
            raise NotServedError(unknown("policy", name, self.models), param)
        chosen = self.models[name].policy
        given = dict(params or {})
        if given:
            _check_params(name, chosen, given)
            chosen = self._ensemble.resolve(chosen, given)
        if threshold is not None:
            at = _params_at(name, chosen, threshold)
            given |= at
            chosen = self._ensemble.resolve(chosen, at)
        return Choice(name, chosen, given)

    def _parse(self, model: str) -> tuple[str | None, float | None]:
        """``tiny:confidence@0.3`` as its parts."""
        rest = model.removeprefix(self.served) if model.startswith(self.served) else "?"
        if rest[:1] not in ("", ":", "@"):
            raise NotServedError(unknown("model", model, self.ids()), "model")
        name, at, number = rest.removeprefix(":").partition("@")
        if not at:
            return name or None, None
        # As JSON and everybody else writes numbers; Python also takes `1_000`, blanks and `٣`.
        threshold = float(number) if _NUMBER.fullmatch(number) else math.nan
        if not math.isfinite(threshold):
            raise InputError(f"model '{model}': expected a number after '@', got '{number}'.")
        return name or None, threshold


def _presets(ensemble: Ensemble) -> list[ServedModel]:
    """The presets that fit an ensemble."""
    fit = []
    for name in catalog.names("policies"):
        try:
            policy = ensemble.resolve(name)
            ensemble.check(policy)
        except MulticolmError:
            continue
        fit.append(ServedModel(name, policy, load_policy_file(name).summary))
    return fit


def _check_params(name: str, policy: Policy, params: Mapping[str, Any]) -> None:
    """Refuse params that are files.

    Raises:
        InputError: naming the param.
    """
    fields = set(policy.as_config()["params"])
    closed = file_params(type(policy)) | ({"made_for"} & fields)
    for param in params:
        if param in closed:
            raise InputError(
                f"multicolm.params.{param} of policy '{name}' is the operator's to set; allowed "
                f"are {', '.join(sorted(fields - closed)) or 'none'}."
            )


def _params_at(name: str, policy: Policy, threshold: float) -> dict[str, Any]:
    params = policy.params_at(threshold)
    if params is None:
        raise InputError(
            f"policy '{name}' has no threshold of deferral for '@'; leave it out, or set its "
            "params in the field 'multicolm'."
        )
    return params
