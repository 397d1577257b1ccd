"""Finds the names of vLLM and Ray that our code overrides, or that are private there."""

import ast
import importlib
import inspect
from collections.abc import Iterator

from tests.house.sources import installed_name, libraries, modules, room, tree

UPSTREAM = ("vllm", "ray")
_NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}


def overridden() -> Iterator[tuple[str, str, str]]:
    """Yield (room, upstream class, name) for each upstream method that our classes override."""
    for module in _facing_upstream():
        imported = installed_name(module)
        for ours in vars(importlib.import_module(imported)).values():
            if inspect.isclass(ours) and ours.__module__ == imported:
                for name in vars(ours):
                    if owner := _upstream_owner(ours, name):
                        yield room(module), owner, name


def private() -> set[tuple[str, str]]:
    """Return (room, name) for each private attribute in files with upstream imports, not ours."""
    used = {
        (room(module), node.attr)
        for module in _facing_upstream()
        for node in ast.walk(tree(modules()[module]))
        if isinstance(node, ast.Attribute) and _is_private(node.attr)
    }
    ours = set().union(*map(_defined, modules())) | _NAMED_TUPLE
    return {(place, name) for place, name in used if name not in ours}


def _facing_upstream() -> list[str]:
    return [module for module in modules() if libraries(module) & set(UPSTREAM)]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _upstream_owner(ours: type, name: str) -> str | None:
    if name.startswith("__"):
        return None
    for base in ours.__mro__[1:]:
        if base.__module__.split(".")[0] in UPSTREAM and callable(getattr(base, name, None)):
            owner = next(b for b in base.__mro__ if name in vars(b))
            return f"{owner.__module__}.{owner.__qualname__}"
    return None


def _defined(module: str) -> set[str]:
    """Return the private names that a module of ours defines: functions, attributes, globals."""
    names = set()
    for node in ast.walk(tree(modules()[module])):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if _is_private(name)}
