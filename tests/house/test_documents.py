"""What the documents name exists: files and links."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.sources import ROOT, folder_name, modules, tree

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FOLDERS = (
    "adakv_worker|configs|deploy|docs|evals|examples|kernels|loadtest|router|scripts|serving|tests"
)
_PATH = re.compile(rf"`((?:{_FOLDERS})/[\w./-]*)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")

_ROW = re.compile(r"^\| `(\w+\.py)` \|", re.MULTILINE)

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@each_document
def test_files_that_a_document_names_exist(path: Path) -> None:
    named = set(_PATH.findall(path.read_text()))
    assert not sorted(name for name in named if not (ROOT / name).exists())


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in _LINK.findall(path.read_text()):
        linked = (path.parent / target) if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_the_structure_page_lists_the_files_of_each_folder() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    sections = re.findall(r"^### `([\w/]+)/`\n(.*?)(?=^###|\Z)", text, re.MULTILINE | re.DOTALL)
    listed = {f"{folder}/{name}" for folder, body in sections for name in _ROW.findall(body)}
    files = {str(path.relative_to(ROOT)) for path in modules().values() if path.stem != "__init__"}
    assert listed == files


def test_installed_commands_and_plug_ins_exist() -> None:
    for place in _entry_points():
        module, _, attribute = place.partition(":")
        file = modules()[folder_name(module)]
        defined = {getattr(node, "name", None) for node in ast.walk(tree(file))}
        assert attribute in defined, place


def _entry_points() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["scripts"].values()
    for group in project["entry-points"].values():
        yield from group.values()


def anchors(path: Path) -> set[str]:
    """Return the anchors that a forge makes of a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def test_drawings_match_their_texts() -> None:
    subprocess.run([sys.executable, "scripts/drawings", "--check"], cwd=ROOT, check=True)
