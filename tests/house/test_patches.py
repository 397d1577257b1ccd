"""Tests pass a seam in where they need other behaviour: they do not patch our own code."""

import ast
from pathlib import Path

import pytest

from tests.house.sources import PACKAGES, ROOT, tree

TESTS = sorted((ROOT / "tests").rglob("*.py"))
_PATCHING = {"setattr", "delattr", "setitem", "delitem"}
# Files that still do, and how often. Numbers may only fall.
STILL = {
    "tests/adakv_worker/engine/test_containment.py": 1,
    "tests/adakv_worker/gpu/interpreted.py": 3,
    "tests/adakv_worker/gpu/test_attention_bench.py": 4,
    "tests/adakv_worker/gpu/test_backends.py": 1,
    "tests/loadtest/test_comparison.py": 1,
}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_file_does_not_patch_our_code(path: Path) -> None:
    assert _patches(path) <= STILL.get(str(path.relative_to(ROOT)), 0)


def _patches(path: Path) -> int:
    """Return how often a file replaces attributes or items of what it imports from our packages."""
    ours = _imported_from_us(path)
    return sum(_is_ours(target, ours) for node in ast.walk(tree(path)) for target in _patched(node))


def _patched(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Assign(targets=targets):
            return [target for target in targets if isinstance(target, ast.Attribute)]
        case ast.Call(func=ast.Attribute() as function, args=[first, *_]):
            is_patch = ast.unparse(function).startswith("mock.patch")
            return [first] if is_patch or function.attr in _PATCHING else []
    return []


def _imported_from_us(path: Path) -> set[str]:
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in PACKAGES
    }


def _is_ours(target: ast.expr, ours: set[str]) -> bool:
    if isinstance(target, ast.Constant):
        return str(target.value).split(".")[0] in PACKAGES
    return ast.unparse(target).split(".")[0] in ours
