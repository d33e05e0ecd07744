"""One model of an ensemble: what it is, where it is found, and how this run wants it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, model_validator

from multicolm import catalog
from multicolm.config.chat_template import TemplateArgs, chat_template_text
from multicolm.config.document import Document, check_length
from multicolm.config.wording import Problem, Strict, check
from multicolm.errors import ConfigError, UnknownNameError, unknown

__all__ = ["SERVERS", "ModelConfig", "ModelFile", "ResolvedModel", "load_model_file"]

SERVERS = ("llama-cpp-server", "openai", "sglang", "vllm")
"""Backends whose models run in a server."""

_OF_ALL = frozenset({"backend", "model", "chat_template", "chat_template_args", "cost"})
_FETCHED = frozenset({"revision", "trust_remote_code"})
_OF_SERVERS = frozenset(
    {
        "url",
        "served_model",
        "api_key_env",
        "timeout",
        "connect_timeout",
        "retries",
        "look_ahead",
        "logprobs",
    }
)
_OF_PROCESSES = frozenset(
    {
        "dtype",
        "device",
        "device_map",
        "attn_implementation",
        "adapter",
        "allow_pickled_weights",
    }
)
_SETTINGS: dict[str, frozenset[str]] = {
    "transformers": _FETCHED | _OF_PROCESSES,
    "llama-cpp": frozenset({"cache_type", "context_length", "gpu_layers", "tokenizer"}),
    "table": frozenset(),
    "vllm-engine": _FETCHED
    | {"context_length", "dtype", "engine_options", "logprobs", "look_ahead"},
    **dict.fromkeys(SERVERS, _FETCHED | _OF_SERVERS),
}
"""What each backend can be told, besides what all can."""

_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")


def _is_url(text: str) -> bool:
    try:
        # A port is looked at only when it is asked for.
        return bool(_URL.fullmatch(text)) and urlsplit(text).port != 0
    except ValueError:
        return False


class ModelFile(Strict):
    """What is known of a model anywhere: the schema of ``registry/models/*.yaml``.

    Attributes:
        summary: one line for ``multicolm ls``.
        repository: its id on the Hugging Face Hub.
        path: its folder, from ``registry/``; for the embedded models.
        revision: the pinned commit of ``repository``.
        context_length: maximum number of tokens it takes.
        parameters: number of weights, shared ones counted once.
        tokenizer: name or digest of its tokenizer; equal for models with one vocabulary.
        licence: of the weights, an SPDX name where there is one.
        source: where the facts are from.
        weights_dtype: the type in which the weights are published.
    """

    summary: str = Field(min_length=1)
    repository: str | None = None
    path: str | None = None
    revision: str | None = None
    context_length: int = Field(ge=1)
    parameters: int = Field(ge=1)
    tokenizer: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    source: str = Field(min_length=1)
    weights_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> ModelFile:
        if (self.repository is None) == (self.path is None):
            raise ValueError("give `repository` or `path`, one of the two.")
        if self.repository is not None and self.revision is None:
            raise ValueError("`repository` needs a `revision`: the commit that the facts are of.")
        return self


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What the settings of a model stand for.

    Attributes:
        location: an absolute folder, a Hub id, or what another backend calls the model.
        revision: the revision of a Hub id, the catalogue's if the ensemble file gives none.
        is_local: whether ``location`` is a folder.
        adapter: the adapter's absolute folder.
        chat_template: jinja text.
        tokenizer: an absolute folder or a Hub id, where it is not at ``location``.
    """

    location: str
    revision: str | None
    is_local: bool
    adapter: str | None
    chat_template: str | None
    tokenizer: str | None = None


class ModelConfig(Strict):
    """One model of an ensemble, and how this run wants it.

    Attributes:
        backend: what runs it; a name in :data:`multicolm.plugins.backends`.
        model: a name in ``registry/models/``, a folder, a Hub id ``org/name``, or the GGUF file of
            backend ``llama-cpp``. Of a model in a server, where its tokenizer and ``config.json``
            are.
        revision: commit, tag or branch of a Hub id.
        dtype: the type to compute in; ``auto`` takes that of the weights.
        device: such as ``cpu`` or ``cuda:0``.
        device_map: accelerate's, instead of ``device``.
        attn_implementation: transformers' attention kernel.
        adapter: folder of a PEFT adapter.
        chat_template: jinja text, a ``.jinja`` file, or a name in ``registry/chat_templates/``:
            ``chatml``, or ``plain``, which needs no special tokens. Beside what transformers gives
            to a template, ``start_of_text`` is what the tokenizer puts at the start of a text.
        chat_template_args: variables of the chat template, such as ``enable_thinking: false``.
        cost: of one forward pass for one text, in any unit; what budgets are counted in.
        trust_remote_code: run Python that comes with the weights.
        allow_pickled_weights: load weights that are not safetensors.
        tokenizer: registry name, folder or Hub id of the tokenizer, instead of the one in a GGUF
            file.
        context_length: maximum number of tokens of a text, where that is less than the model's.
        cache_type: in what llama.cpp keeps what it has read; ``f16`` is smaller, ``f32`` exact.
        gpu_layers: how many layers llama.cpp puts on an accelerator.
        engine_options: keyword arguments of ``vllm.LLM``, for backend ``vllm-engine``.
        url: of the server that runs the model, such as ``http://127.0.0.1:8000/v1``.
        served_model: what the server calls it; not needed where it serves one model.
        api_key_env: the environment variable that holds the server's key.
        timeout: the most seconds that one request may take; the first one, which warms the server
            up, may take three minutes.
        connect_timeout: the most seconds to wait for a connection.
        retries: how often a request that failed is sent again, with growing pauses; one that ran
            out of time, once at most.
        look_ahead: maximum number of tokens to ask for at a time while the same model writes.
        logprobs: of how many of its likeliest tokens to ask for the log-probability, or ``all``.
            Not given: all of a vocabulary of up to 4096 tokens, else 20; less where the server
            gives less.
    """

    backend: str = "transformers"
    model: str = Field(min_length=1, description="a registry name, a folder, or a Hub id")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    device_map: str | dict[str, int | str] | None = None
    attn_implementation: str | None = None
    adapter: str | None = None
    chat_template: str | None = None
    chat_template_args: TemplateArgs = Field(default_factory=dict)
    cost: float = Field(default=1.0, ge=0)
    trust_remote_code: bool = False
    allow_pickled_weights: bool = False
    tokenizer: str | None = Field(default=None, min_length=1)
    context_length: int | None = Field(default=None, ge=1)
    cache_type: Literal["f16", "f32"] = "f16"
    gpu_layers: int = Field(default=0, ge=0)
    engine_options: dict[str, bool | int | float | str] | None = None
    url: str | None = None
    served_model: str | None = Field(default=None, min_length=1)
    api_key_env: str | None = Field(default=None, min_length=1)
    timeout: float = Field(default=60.0, gt=0)
    connect_timeout: float = Field(default=5.0, gt=0)
    retries: int = Field(default=2, ge=0)
    look_ahead: int = Field(default=16, ge=1)
    logprobs: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    _resolved: ResolvedModel | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_device(self) -> ModelConfig:
        if self.device is not None and self.device_map is not None:
            raise ValueError("give `device` or `device_map`, not both.")
        return self

    @model_validator(mode="after")
    def _settings_of_its_backend(self) -> ModelConfig:
        if self.backend in SERVERS and self.url is None:
            raise ValueError(
                f"backend '{self.backend}' needs a `url`: that of the server, such as "
                "http://127.0.0.1:8000/v1."
            )
        if self.url is not None and not _is_url(self.url):
            # A name and password in it are refused, and not shown.
            got = "one with '@' in it" if "@" in self.url else f"'{self.url}'"
            raise ValueError(f"`url` must be http://host:port or https://..., got {got}.")
        known = _SETTINGS.get(self.backend)  # a backend of somebody else takes what it likes
        for key in sorted(self.model_fields_set - _OF_ALL) if known is not None else ():
            if key not in (known or ()):
                owners = sorted(backend for backend, keys in _SETTINGS.items() if key in keys)
                raise ValueError(
                    f"`{key}` belongs to {_backends(owners)}, and this model has backend "
                    f"'{self.backend}'; leave it out."
                )
        return self

    def resolve(self, base_dir: Path) -> list[Problem]:
        """Find what ``model`` and other places in the settings stand for, and remember it.

        Args:
            base_dir: the folder that relative paths start from.

        Returns:
            What cannot be found.
        """
        problems: list[Problem] = []
        found: dict[str, Any] = {"adapter": None, "chat_template": None}
        try:
            check_length(base_dir / self.model, "a model")
            found |= _locate(self, base_dir)
        except ConfigError as error:
            unknown_name = isinstance(error, UnknownNameError)
            problems.append(Problem(("model",), str(error), unknown_name=unknown_name))
        try:
            if self.adapter is not None:
                check_length(base_dir / self.adapter, "an adapter")
                found["adapter"] = _folder(self.adapter, base_dir, "adapter_config.json")
        except ConfigError as error:
            problems.append(Problem(("adapter",), str(error)))
        try:
            if self.tokenizer is not None:
                check_length(base_dir / self.tokenizer, "a tokenizer")
                found["tokenizer"] = _tokenizer(self.tokenizer, base_dir)
        except ConfigError as error:
            problems.append(Problem(("tokenizer",), str(error)))
        try:
            if self.chat_template is not None:
                found["chat_template"] = chat_template_text(self.chat_template, base_dir)
        except ConfigError as error:
            unknown_name = isinstance(error, UnknownNameError)
            problems.append(Problem(("chat_template",), str(error), unknown_name=unknown_name))
        if found.get("is_local") and self.revision is not None:
            text = "only a Hub id has revisions, and `model` is a folder."
            problems.append(Problem(("revision",), text))
        if not problems:
            self._resolved = ResolvedModel(**found)
        return problems

    @property
    def resolved(self) -> ResolvedModel:
        """What the settings stand for. Paths start from the working folder if no file says else.

        Raises:
            ConfigError: if something cannot be found.
        """
        if self._resolved is None:
            problems = self.resolve(Path.cwd())
            if problems:
                raise ConfigError("\n".join(f"{p.place[0]}: {p.text}" for p in problems))
        assert self._resolved is not None
        return self._resolved

    @property
    def location(self) -> str:
        """An absolute folder, a Hub id, or a GGUF file."""
        return self.resolved.location

    @property
    def tokenizer_location(self) -> str:
        """Where the tokenizer is: an absolute folder or a Hub id."""
        return self.resolved.tokenizer or self.resolved.location

    @property
    def resolved_revision(self) -> str | None:
        """The revision to load, the catalogue's if the ensemble file gives none."""
        return self.resolved.revision

    @property
    def adapter_location(self) -> str | None:
        """The adapter's absolute folder."""
        return self.resolved.adapter

    @property
    def chat_template_text(self) -> str | None:
        """The chat template itself, also where ``chat_template`` is the name of one."""
        return self.resolved.chat_template


def load_model_file(name: str) -> ModelFile:
    """Read an entry of ``registry/models/``.

    Raises:
        UnknownNameError: if there is none of that name.
        ConfigError: if it is wrong.
    """
    document = Document.parse(catalog.read("models", name), str(catalog.path("models", name)))
    file, problems = check(ModelFile, document.data)
    if file is None:
        raise document.error(problems)
    return file


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _locate(config: ModelConfig, base_dir: Path) -> dict[str, Any]:
    """Where a model is; the fields of :class:`ResolvedModel` that say so.

    Raises:
        ConfigError: if it is nowhere.
    """
    name = config.model
    if config.backend == "llama-cpp":
        return {"location": _gguf_file(name, base_dir), "revision": None, "is_local": True}
    if name in catalog.names("models"):
        entry = load_model_file(name)
        if entry.path is not None:
            folder = _folder(entry.path, catalog.registry(), "config.json")
            return {"location": folder, "revision": None, "is_local": True}
        revision = config.revision or entry.revision
        return {"location": entry.repository, "revision": revision, "is_local": False}
    if config.backend != "transformers" and (base_dir / name).is_file():
        return {"location": str((base_dir / name).resolve()), "revision": None, "is_local": True}
    if config.backend == "transformers" and name.endswith(".gguf"):
        raise ConfigError(f"'{name}' is a GGUF file; add `backend: llama-cpp`, which loads these.")
    elsewhere = {"location": name, "revision": config.revision, "is_local": False}
    if _written_as_path(name) or (base_dir / name).exists():
        folder = _folder(name, base_dir, "config.json")
        return {"location": folder, "revision": None, "is_local": True}
    if config.backend != "transformers":
        return elsewhere  # A name on a server, say: for the backend to check.
    if _HUB_ID.fullmatch(name):
        _refuse_misspelt_folder(name, base_dir)
        return elsewhere
    raise UnknownNameError(
        f"{unknown('model', name, catalog.names('models'))} A folder is written './{name}', a "
        "model of the Hub 'organisation/name'."
    )


def _written_as_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text


def _folder(text: str, base_dir: Path, file: str) -> str:
    """The absolute folder ``text``, which must hold ``file``."""
    folder = (base_dir / Path(text).expanduser()).absolute()
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}.")
    if not (folder / file).is_file():
        raise ConfigError(f"{folder} holds no {file}, so no model can be loaded from it.")
    return str(folder.resolve())


def _backends(names: list[str]) -> str:
    return f"backend{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _gguf_file(text: str, base_dir: Path) -> str:
    """The absolute file ``text``; of a model in several files the first."""
    path = (base_dir / Path(text).expanduser()).absolute()
    if path.is_file():
        return str(path.resolve())
    if not path.is_dir():
        raise ConfigError(f"there is no file {path}; backend 'llama-cpp' loads a GGUF file.")
    files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f" it holds {', '.join(files[:5])}." if files else " it holds none."
    raise ConfigError(f"{path} is a folder; backend 'llama-cpp' loads a GGUF file:{hint}")


def _tokenizer(text: str, base_dir: Path) -> str:
    """The absolute folder or the Hub id of a tokenizer."""
    if text in catalog.names("models"):
        entry = load_model_file(text)
        if entry.path is None:
            return str(entry.repository)
        return _folder(entry.path, catalog.registry(), "tokenizer.json")
    if _written_as_path(text) or (base_dir / text).exists():
        return _folder(text, base_dir, "tokenizer.json")
    if _HUB_ID.fullmatch(text):
        return text
    raise UnknownNameError(
        f"{unknown('tokenizer', text, catalog.names('models'))} A folder is written './{text}', "
        "one of the Hub 'organisation/name'."
    )


def _refuse_misspelt_folder(name: str, base_dir: Path) -> None:
    """``models/fatcs`` beside a folder ``models`` of models is a slip, and no id on the Hub."""
    parent = base_dir / name.split("/")[0]
    if not parent.is_dir():
        return
    folders = [f"{parent.name}/{f.name}" for f in parent.iterdir() if (f / "config.json").is_file()]
    if folders:
        raise UnknownNameError(unknown("folder", name, folders))
