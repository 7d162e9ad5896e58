"""`name` or `name:field=value,field=value`, as the command line writes what is chosen by name and then configured."""

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

LIMIT = 2**31  # of whole numbers, which training holds in 32 bits


class SpecError(ValueError):
    """A SPEC that cannot be, in one line that lists what can."""


def nearest(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=3)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def parse_spec(text: str, registry: Mapping[str, Callable[..., Any]], kind: str, given: tuple[str, ...] = ()) -> Any:
    """The function of that name in `registry` with the fields of the SPEC bound; `given` are those it gets later.

    Values are read by the annotations of the function: int, float, bool (true or false), str, Literal, tuple (a+b) and
    `X | None` (none). SpecError says what is wrong and what there is; whether a value makes sense is for the function to say.
    """
    name, _, fields = text.partition(":")
    if name not in registry:
        raise SpecError(f"unknown {kind} {name!r}{nearest(name, registry)}; there are: {', '.join(registry)}")
    function = registry[name]
    hints = typing.get_type_hints(function)
    known = {field: hints[field] for field in inspect.signature(function).parameters if field not in given}
    values: dict[str, Any] = {}
    for part in fields.split(",") if fields else ():
        field, equals, value = part.partition("=")
        if not equals and field in known:
            raise SpecError(f"{kind} {name}: {field} has no value; it is written {field}=VALUE")
        if not equals or field not in known:
            has = f"its fields are: {', '.join(known)}" if known else "it has no fields"
            raise SpecError(f"{kind} {name} has no field {field!r}{nearest(field, known)}; {has}")
        if field in values:
            raise SpecError(f"{kind} {name}: {field} is given twice")
        values[field] = _read(value, known[field], f"{kind} {name}: {field}")
    return functools.partial(function, **values)


def _read(text: str, hint: Any, what: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and type(None) in choices:
        others = [choice for choice in choices if choice is not type(None)]
        return None if text.lower() == "none" else _read(text, others[0], what)
    if origin is typing.Literal:
        if text not in choices:
            raise SpecError(f"{what} must be one of {', '.join(choices)}, not {text!r}")
        return text
    if origin is tuple:
        return tuple(_read(part, choices[0], what) for part in text.split("+"))
    if hint not in (bool, int, float, str):
        raise SpecError(f"{what} cannot be given here")
    try:
        value = {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise SpecError(f"{what} must be {wanted}, not {text!r}") from None
    if hint is int and abs(value) >= LIMIT:
        raise SpecError(f"{what} must be below 2^31, not {text}")
    return value
