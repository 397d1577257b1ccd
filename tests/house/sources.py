"""The Python files of the repository, and what each of them imports."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Folders that are installed within `adakv_serve`, under which all code imports them.
LINKED = ("evals", "kernels", "loadtest", "router", "serving")
PACKAGES = ("adakv", "adakv_worker", *LINKED)


@cache
def modules() -> dict[str, Path]:
    """Return the files of our packages by dotted name."""
    return {
        _dotted(path): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(module: str) -> str:
    """Return the folder of a module: `serving.http` for `serving.http.asgi`."""
    parts = module.split(".")
    is_package = modules()[module].name == "__init__.py"
    return ".".join(parts if is_package else parts[:-1])


@cache
def our_imports(module: str) -> frozenset[str]:
    """Return the modules of ours that a module imports, inside functions too."""
    ours = set()
    for name in _imported(modules()[module]):
        name = folder_name(name)
        if name.split(".")[0] not in PACKAGES:
            continue
        while name not in modules():
            name = name.rpartition(".")[0]
        ours.add(name)
    return frozenset(ours - {module})


@cache
def libraries(module: str) -> frozenset[str]:
    """Return the top-level packages of others that a module imports."""
    names = _first_names(module)
    return frozenset(names - {*PACKAGES, "adakv_serve"} - sys.stdlib_module_names)


def names_that_need_a_checkout(module: str) -> frozenset[str]:
    """Return the folders that a module imports by names that they have in a checkout only."""
    return frozenset(_first_names(module) & set(LINKED))


def installed_name(module: str) -> str:
    """Return the name under which a module is imported: `adakv_serve.router` for `router`."""
    return f"adakv_serve.{module}" if module.split(".")[0] in LINKED else module


def folder_name(module: str) -> str:
    """Return the name of a module by the folders of the checkout."""
    return module.removeprefix("adakv_serve.")


def _first_names(module: str) -> set[str]:
    return {name.split(".")[0] for name in _imported(modules()[module])}


def _imported(path: Path) -> Iterator[str]:
    """Yield `package.module.name` for each import, but for those that only type checkers see."""
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
