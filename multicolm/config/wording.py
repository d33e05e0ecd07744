"""What is wrong in a file, in our words instead of pydantic's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from multicolm.errors import shorten

__all__ = ["Place", "Problem", "Strict", "check", "problems_of", "show", "unknown_key", "worded"]

Place: TypeAlias = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Frozen, and forgives nothing: no unknown key, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        place: where.
        text: what is wrong, what was allowed.
        at_key: whether the key is to blame, not its value.
        unknown_name: whether the value is a name that nothing has.
    """

    place: Place
    text: str
    at_key: bool = False
    unknown_name: bool = False


def check(schema: type[M], data: object) -> tuple[M | None, list[Problem]]:
    """The data as an instance of ``schema``, or what is wrong with it."""
    try:
        return schema.model_validate(data), []
    except ValidationError as error:
        return None, problems_of(error, schema, data)


def problems_of(
    error: ValidationError, schema: Any, data: object, most: int | None = None
) -> list[Problem]:
    """Pydantic's complaints in our words; at most one for each place.

    Args:
        error: of pydantic.
        schema: of the data.
        data: what is wrong.
        most: how many places are wanted; each costs a search for the nearest name.
    """
    found: dict[Place, Problem] = {}
    for item in error.errors(include_url=False):
        kind, context = item["type"], item.get("ctx", {})
        at_key = kind in ("extra_forbidden", "missing")
        place = item["loc"] if at_key else _inside(item["loc"], data)
        if len(found) == most and place not in found:
            break
        if kind == "extra_forbidden":
            allowed = _fields(_schema_at(schema, place[:-1]))
            problem = Problem(place, unknown_key(str(place[-1]), allowed), at_key=True)
        elif kind == "missing":
            info = _fields(_schema_at(schema, place[:-1])).get(str(place[-1]))
            hint = f": {info.description}" if info is not None and info.description else ""
            problem = Problem(place, f"required, but missing{hint}.")
        elif place in found:
            text = _either(found[place].text, _wording(kind, context, item))
            problem = Problem(place, text)
        else:
            problem = Problem(place, _wording(kind, context, item))
        found[place] = problem
    return list(found.values())


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The sentence for a key that is not known."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown key '{shorten(key)}'.{hint} Allowed: {', '.join(names) or 'none'}."


def show(value: object) -> str:
    """A value as a complaint shows it, short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "dataclass": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "none": "nothing (null)",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
}


def worded(item: Mapping[str, Any]) -> str:
    """One of pydantic's complaints in our words; where it is, is not said."""
    return _wording(item["type"], item.get("ctx", {}), item)


def _wording(kind: str, context: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    got = show(item["input"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words.format(f'{context[name]:g}')}, got {got}."
    if kind == "literal_error":
        near = difflib.get_close_matches(
            str(item["input"]), re.findall("'(.+?)'", context["expected"])
        )
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"must be {context['expected']}, got {got}.{hint}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind == "string_too_short":
        return "must not be empty."
    if kind == "too_short":
        return f"must hold {context['min_length']} or more, got {context['actual_length']}."
    if kind == "too_long":
        return f"must hold at most {context['max_length']}; send fewer."
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters, got {len(item['input'])}."
    word = _WORDS.get(kind.split("_")[0])
    if word is None:
        return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {got}."
    scalar = not isinstance(item["input"], Mapping | list | None)
    quotes = "; put it in quotes" if word == "text" and scalar else ""
    return f"must be {word}, got {got}{quotes}."


def _either(one: str, other: str) -> str:
    """Joins the complaints of a union, as in "must be text or a mapping, got a list"."""
    match = [re.fullmatch(r"must be (.+?)(, got .*)", text) for text in (one, other)]
    if match[0] is None or match[1] is None:
        return one
    first, got = match[0].groups()
    words = [*first.split(" or "), match[1].group(1)]
    got = got.replace("; put it in quotes", "")
    return f"must be {' or '.join(dict.fromkeys(words))}{got}"


def _inside(place: Sequence[str | int], data: object) -> Place:
    """``place`` as far as it leads through the data; pydantic appends a union's members."""
    walked: list[str | int] = []
    for step in place:
        reaches = isinstance(data, Mapping) and step in data
        if isinstance(data, list | tuple) and isinstance(step, int):
            reaches = step < len(data)
        if not reaches:
            break
        data = data[step]  # type: ignore[index]  # checked above
        walked.append(step)
    return tuple(walked)


def _schema_at(schema: Any, place: Place) -> Any:
    for step in place:
        schema = _fields(schema)[str(step)].annotation if _fields(schema) else get_args(schema)[-1]
        schema = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    return schema


def _fields(schema: Any) -> dict[str, Any]:
    """The fields of a pydantic model or dataclass."""
    fields: dict[str, Any] = getattr(schema, "__pydantic_fields__", {})
    return fields
