"""Checks settings from YAML against the types that vLLM declares for them.

vLLM's command line converts what it gets; its Python classes take anything, and fail later without
a name, or not at all: the text "false" counts as true.
"""

import contextlib
import dataclasses
import enum
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

_COLLECTIONS = (list, set, frozenset, tuple)
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off")


def check_types(given: Mapping[str, Any], declaring: type[Any], section: str) -> None:
    """Check settings against the fields of a dataclass; names that it lacks are not checked.

    A value of one of vLLM's own classes may be a mapping of its fields, or the name of a constant.

    Args:
        section: of the configuration, for the error.

    Raises:
        ValueError: a setting has another type. The message has its name, but not its value.
    """
    fields = {field.name: field for field in dataclasses.fields(declaring)}
    for name, value in given.items():
        field = fields.get(name)
        # Some types omit the None that is their default.
        if field is None or (value is None and _default(field) is None):
            continue
        if not _fits(value, field.type):
            raise ValueError(
                f"{section}.{name} must be {_described(field.type)}, not {_kind(value)}"
                + _remedy(value, set(_alternatives(field.type)))
            )


def _default(field: "dataclasses.Field[Any]") -> Any:
    # pydantic's fields wrap their defaults.
    return getattr(field.default, "default", field.default)


def _alternatives(hint: Any) -> Iterable[Any]:
    """Yield the types of which a value may have any."""
    origin = get_origin(hint)
    if origin is Annotated:
        yield from _alternatives(get_args(hint)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, one) for one in _alternatives(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if (origin or hint) in _COLLECTIONS:
        elements = [one for one in arguments if one is not Ellipsis] or [Any]
        return isinstance(value, _COLLECTIONS) and all(
            any(_fits(element, one) for one in elements) for element in value
        )
    if (origin or hint) is dict or is_typeddict(hint):
        pairs = value.items() if isinstance(value, dict) else ()
        keys, values = arguments or (Any, Any)
        return isinstance(value, dict) and all(
            _fits(key, keys) and _fits(one, values) for key, one in pairs
        )
    if isinstance(hint, type) and hint not in (object, Any):
        return isinstance(value, (hint, str if issubclass(hint, enum.Enum) else dict))
    if origin is Callable:
        return callable(value)
    # `Any`, and types that are named in quotes.
    return origin is not type or isinstance(value, type)


def _described(hint: Any) -> str:
    described = [_described_one(one) for one in _alternatives(hint)]
    return " or ".join(one for one in dict.fromkeys(described) if one)


def _described_one(hint: Any) -> str:
    """Return what YAML can hold of a type, perhaps nothing."""
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in get_args(hint))
    if origin in _COLLECTIONS:
        return "a list"
    if origin in _NAMES:
        return _NAMES[origin]
    if isinstance(origin, type) and origin not in (type, types.NoneType, Callable):
        return "a name" if issubclass(origin, enum.Enum) else "a mapping"
    return ""


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, _COLLECTIONS):
        return "a list"
    return _NAMES.get(type(value), f"a {type(value).__name__}")


def _remedy(value: Any, wanted: set[Any]) -> str:
    """Return advice for values that YAML reads as another type than they look like."""
    if isinstance(value, str):
        if bool in wanted and value.lower() in _BOOLEAN_WORDS:
            return ": write true or false without quotes"
        if wanted & {int, float}:
            with contextlib.suppress(ValueError):
                float(value)
                return ": write the number without quotes, and 1e-3 as 1.0e-3"
    elif str in wanted and not isinstance(value, (dict, *_COLLECTIONS, types.NoneType)):
        return ": put it into quotes (YAML reads yes, no, on and off as true and false)"
    return ""
