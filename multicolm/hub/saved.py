"""An ensemble, and a score table, as folders that others can use: each with a card.

An ensemble's folder holds its YAML, its chat templates, its policy if that was learned, and such
models as lie beside the YAML; all others are named by their ids. A score table's folder is what
``multicolm score`` wrote, and a card.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from multicolm import catalog
from multicolm.artefacts import Artefact
from multicolm.config import EnsembleConfig, ModelConfig, load_ensemble
from multicolm.ensemble import Ensemble, load
from multicolm.errors import ArtefactError, ConfigError
from multicolm.files import leads_out, links_out, sha256, write_whole
from multicolm.hub.cards import ensemble_card, scores_card
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy
from multicolm.score_table import ScoreTable
from multicolm.scoring.store import ROLLOUTS, TEXT, Index, TableFiles, load_table, read_index
from multicolm.training.checkpoint import Checkpoint
from multicolm.training.provenance import read_provenance
from multicolm.transfer import FILES, folder_of, upload, upload_saved

__all__ = ["SharedEnsemble", "SharedScores"]

# Facts about the machine that an ensemble ran on, which mean nothing elsewhere.
_OF_THIS_MACHINE = ("device", "device_map")
# What would run code of others, or hand them what is secret here.
# The options of an engine are any keyword arguments of a library: they can name code, too.
_UNSAFE = ("trust_remote_code", "allow_pickled_weights", "api_key_env", "engine_options")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SharedEnsemble:
    """An ensemble as others can have it.

        SharedEnsemble("tiny").push_to_hub("organisation/tiny")
        SharedEnsemble.from_pretrained("organisation/tiny").load()

    Attributes:
        config: of the ensemble.

    Args:
        source: whatever :func:`multicolm.load` takes.
        with_models: whether models go along that lie elsewhere on this disk; those that lie in the
            folder of the ensemble's file always do.
        results: folder of a comparison, whose table the card shows.
        license: of the ensemble's file and policy, for the card; the models have their own.

    Raises:
        ConfigError: if the ensemble's file is missing or wrong.
    """

    def __init__(
        self,
        source: str | Path | EnsembleConfig,
        *,
        with_models: bool = False,
        results: str | Path | None = None,
        license: str = "",
    ) -> None:
        self.config = source if isinstance(source, EnsembleConfig) else load_ensemble(source)
        self._with_models = with_models
        self._results = None if results is None else Path(results)
        self._license = license

    def load(self) -> Ensemble:
        """The ensemble with its models; see :func:`multicolm.load`."""
        return load(self.config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the folder; ``ensemble.yaml`` last, so that what is half written is not used.

        Raises:
            ConfigError: if a model lies where nobody else has it, or would have to run code that
                comes with it.
            ArtefactError: if a learned param cannot be read, or ``results`` hold no comparison.
        """
        folder = Path(save_directory)
        _refuse_unsafe(self.config, "ensemble.yaml")
        data: dict[str, Any] = {}
        if self.config.summary:
            data["summary"] = self.config.summary
        data["base_model"] = self.config.base_model
        data["models"] = {
            name: self._model(name, model, folder) for name, model in self.config.models.items()
        }
        data["policy"] = self._policy(folder)
        generation = self.config.generation.model_dump(
            mode="json", exclude_defaults=True, exclude={"threads"}
        )
        if generation:
            data["generation"] = generation
        if self.config.bridge != "auto":
            data["bridge"] = self.config.bridge
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
        card = ensemble_card(self.config, text, self._results, self._license)
        write_whole(folder / "README.md", card)
        write_whole(folder / "ensemble.yaml", text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Save to a repository on the Hub; returns its address.

        Args:
            repo_id: ``organisation/name``; made if there is none.
            private: whether a repository that is made now is private.
            revision: a branch to write to.
            commit_message: what the commit says.
            token: of the Hub; the one that is logged in if not given.

        Raises:
            HubError: if the Hub cannot be reached, or refuses.
            MulticolmError: see :meth:`save_pretrained`.
        """
        return upload_saved(
            self.save_pretrained,
            repo_id,
            private=private,
            revision=revision,
            message=commit_message,
            token=token,
        )

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> SharedEnsemble:
        """An ensemble from a folder, or from a repository on the Hub; no model is loaded yet.

        Raises:
            HubError: if the Hub cannot be reached, or has no such repository.
            ConfigError: if there is no ensemble, a wrong one, or one that would run code that
                comes with a model or send a secret of yours to a server.
        """
        folder = folder_of(source, revision=revision, token=token)
        config = load_ensemble(folder / "ensemble.yaml")
        _refuse_unsafe(config, str(folder / "ensemble.yaml"))
        _refuse_outside(config, folder)
        return cls(config)

    def _model(self, name: str, model: ModelConfig, folder: Path) -> dict[str, Any]:
        """A model's settings as the new folder can have them, with what belongs to them."""
        settings: dict[str, Any] = model.model_dump(
            mode="json", exclude_defaults=True, exclude=set(_OF_THIS_MACHINE)
        )
        resolved = model.resolved
        if resolved.is_local and model.model not in catalog.names("models"):
            source = Path(resolved.location)
            settings["model"] = self._taken(name, source, folder, f"models/{name}")
        if resolved.adapter is not None:
            source = Path(resolved.adapter)
            settings["adapter"] = self._taken(name, source, folder, f"models/{name}-adapter")
        if model.chat_template is not None and not self._with_models:
            _refuse_template(model.chat_template, f"model '{name}'", self.config.base_dir)
        if resolved.chat_template is not None:
            settings["chat_template"] = f"./templates/{name}.jinja"
            write_whole(folder / "templates" / f"{name}.jinja", resolved.chat_template)
        return settings

    def _taken(self, name: str, source: Path, folder: Path, place: str) -> str:
        """Copy a model's files of known kinds; the path to them from the new folder.

        Raises:
            ConfigError: if it lies elsewhere and was not asked for.
        """
        home = self.config.base_dir
        if not self._with_models and leads_out(source, home):
            raise ConfigError(
                f"model '{name}' lies in {source}, on this machine only; push it to the Hub "
                "and name it by its id, or push its files too (--with-models)."
            )
        if source.is_file():
            target = folder / place / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            return f"./{place}/{source.name}"
        for pattern in FILES:
            for file in source.glob(pattern):
                if not self._with_models and leads_out(file, home):
                    raise ConfigError(
                        f"model '{name}': {file} is a link that leads out of {home}; put the file "
                        "itself in its place, or let such files go along (--with-models)."
                    )
                target = folder / place / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.resolve() != file.resolve():
                    shutil.copyfile(file, target)
        return f"./{place}"

    def _policy(self, folder: Path) -> Any:
        """The policy as the file says it; one that was learned lies in a folder of its own."""
        policy = resolve_policy(self.config.policy, base_dir=self.config.base_dir)
        params = policy.as_config()["params"]
        learned = [value for value in params.values() if isinstance(value, Artefact)]
        if not learned:
            given = self.config.policy
            return {"kind": given.kind, **({"params": dict(given.params)} if given.params else {})}
        home = self.config.base_dir
        for value in learned if not self._with_models else ():
            if value.path is None or not leads_out(value.path, catalog.registry()):
                continue  # not read from a file yet, or shipped with multicolm
            if leads_out(value.path, home):
                raise ConfigError(
                    f"policy: what it has learned is in {value.path}, and not in {home}; copy "
                    "its folder there, or let files from elsewhere go along (--with-models)."
                )
        _checkpoint_of(policy, learned[0]).save_pretrained(folder / "policy")
        return "./policy"


def _checkpoint_of(policy: Policy, learned: Artefact[Any]) -> Checkpoint:
    """The policy with what its folder says of its origin."""
    folder = learned.path.parent if learned.path is not None else None
    if folder is None or not (folder / "policy.yaml").is_file():
        return Checkpoint(policy)
    known = Checkpoint.from_pretrained(folder)
    return Checkpoint(policy, read_provenance(folder), known.summary, known.tasks)


def _refuse_unsafe(config: EnsembleConfig, origin: str) -> None:
    """Refuse an ensemble that would run code of others, or send them what is secret.

    Raises:
        ConfigError: naming the model and the setting.
    """
    for name, model in config.models.items():
        for setting in _UNSAFE:
            if getattr(model, setting):
                raise ConfigError(
                    f"{origin}: models.{name}.{setting}: a shared ensemble must not have this "
                    "setting, which would act on other people's machines; leave it out, and "
                    "let them set it."
                )


def _refuse_template(given: str, where: str, home: Path) -> None:
    """Refuse a chat template that is a file outside of a folder.

    Raises:
        ConfigError: beginning with ``where``.
    """
    if not given.endswith(".jinja") or "{" in given or given in catalog.names("chat_templates"):
        return
    path = home / Path(given).expanduser()
    if leads_out(path, home):
        raise ConfigError(
            f"{where}: its chat template {path} does not lie in {home}; copy it there, or let "
            "files from elsewhere go along (--with-models)."
        )


def _refuse_outside(config: EnsembleConfig, folder: Path) -> None:
    """Refuse an ensemble of somebody else's that names files of this machine outside its folder.

    Raises:
        ConfigError: naming the model and the setting, or the file.
    """
    origin = folder / "ensemble.yaml"
    for link in links_out(folder):
        raise ConfigError(f"{link} is a link that leads out of {folder}, which nothing may.")
    for name, model in config.models.items():
        resolved, known = model.resolved, catalog.names("models")
        places = {
            "model": resolved.location if resolved.is_local and model.model not in known else None,
            "adapter": resolved.adapter,
            "tokenizer": resolved.tokenizer if model.tokenizer not in known else None,
        }
        for setting, place in places.items():
            if place is not None and Path(place).is_absolute() and leads_out(Path(place), folder):
                raise ConfigError(
                    f"{origin}: models.{name}.{setting}: {place} leads out of the folder; a "
                    "shared ensemble names only what is in it, or on the Hub."
                )
        if model.chat_template is not None:
            _refuse_template(model.chat_template, f"{origin}: models.{name}", folder)
    for value in config.policy.params.values():
        path = Path(value) if isinstance(value, str) else getattr(value, "path", None)
        if path is None or not path.is_absolute() or not leads_out(path, catalog.registry()):
            continue  # no file, or one that ships with multicolm
        if leads_out(path, folder):
            raise ConfigError(f"{origin}: policy: {path} leads out of the folder.")


class SharedScores:
    """A score table as others can have it.

        SharedScores("scores").push_to_hub("organisation/scores")
        SharedScores.from_pretrained("organisation/scores").table()

    Attributes:
        folder: that holds it.
        index: what it says of itself.

    Args:
        folder: that ``multicolm score`` wrote.
        license: of the texts and scores, for the card.

    Raises:
        ArtefactError: if there is no score table, or it is not finished.
    """

    def __init__(self, folder: str | Path, *, license: str = "") -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        self._license = license
        if not self.index.files:
            raise ArtefactError(
                f"{folder} is not finished: repeat the same `multicolm score`, which resumes "
                "where it stopped."
            )
        for model in self.index.models:
            if not _MODEL_NAME.fullmatch(model.name) or model.name == TEXT:
                raise ArtefactError(
                    f"{folder}/index.json names a model '{model.name}', which no score table can "
                    "hold; it was not written by multicolm."
                )

    def table(self, models: list[str] | None = None) -> ScoreTable:
        """The scores in memory; see :func:`multicolm.scoring.store.load_table`."""
        return load_table(self.folder, models)

    def check(self) -> None:
        """See that every file is whole.

        Raises:
            ArtefactError: naming one that is not.
        """
        for name in self._names():
            path = self.folder / name
            if leads_out(path, self.folder):
                raise ArtefactError(f"{path} is a link that leads out of {self.folder}.")
            if not path.is_file() or sha256(path) != self.index.files.get(name):
                raise ArtefactError(
                    f"{path} is missing or has changed since it was written; fetch or score the "
                    "table once more."
                )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the table and its card; ``index.json`` last, so that half a table is none.

        Raises:
            ArtefactError: if a file is missing or damaged.
        """
        self.check()
        target = Path(save_directory)
        for name in self._names():
            if (target / name).resolve() != (self.folder / name).resolve():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, target / name)
        write_whole(target / "README.md", self.card())
        write_whole(target / "index.json", self.index.as_json())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Save to a repository of data on the Hub; returns its address.

        The card is written into the table's folder.

        Args:
            repo_id: ``organisation/name``; made if there is none.
            private: whether a repository that is made now is private.
            revision: a branch to write to.
            commit_message: what the commit says.
            token: of the Hub; the one that is logged in if not given.

        Raises:
            HubError: if the Hub cannot be reached, or refuses.
            ArtefactError: if a file is missing or damaged.
        """
        self.check()
        write_whole(self.folder / "README.md", self.card())
        return upload(
            self.folder,
            repo_id,
            "dataset",
            private=private,
            revision=revision,
            message=commit_message,
            token=token,
            files=["index.json", "README.md", *self._names()],
        )

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> SharedScores:
        """A score table from a folder, or from a repository of data on the Hub.

        Raises:
            HubError: if the Hub cannot be reached, or has no such repository.
            ArtefactError: if it holds no score table, or a file is not whole.
        """
        scores = cls(folder_of(source, "dataset", revision=revision, token=token))
        scores.check()
        return scores

    def card(self) -> str:
        """Markdown that says what was scored, and what the models gave to it."""
        return scores_card(self.index, self._figures(), self._license)

    def _names(self) -> list[str]:
        """Every file but index and card."""
        files = TableFiles(self.folder, self.index)
        names = [f"{part}/{files.path(part, n).name}" for part, n in self.index.parts()]
        return [*names, *({ROLLOUTS} & self.index.files.keys())]

    def _figures(self) -> Mapping[str, tuple[float, float]]:
        """Per model: nats per token, and the part of the tokens that are its most likely ones."""
        files = TableFiles(self.folder, self.index)
        found = {}
        for model in self.index.models:
            nats = n_right = n_known = 0.0
            for number in range(len(self.index.shards)):
                scores = files.read(model.name, number)
                gold = files.read(TEXT, number)["gold_ids"]
                known = scores["known"].bool()
                nats -= float(scores["gold_logprobs"][known].double().sum())
                n_right += int(((scores["top1_ids"] == gold) & known).sum())
                n_known += int(known.sum())
            found[model.name] = (nats / max(1, n_known), n_right / max(1, n_known))
        return cast("Mapping[str, tuple[float, float]]", found)
