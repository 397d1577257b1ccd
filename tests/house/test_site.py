"""The documents as a site: it builds, its links hold, and it needs no other server."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.house.sources import ROOT
from tests.house.test_documents import DOCUMENTS, anchors

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None,
    reason="the site is not checked: `make docs` installs what builds it",
)
SITE = ROOT / "build" / "site"
_ARTICLE = re.compile(r"<article.*?</article>", re.DOTALL)
_CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="([^"]+)"')
_LINKED = re.compile(r'<a\b[^>]*?\bhref="([^"]+)"')


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The built pages by their paths in the site."""
    done = subprocess.run(
        [sys.executable, "scripts/site"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(SITE)): path.read_text() for path in SITE.rglob("*.html")}


def test_each_document_has_a_page_with_the_anchors_of_a_forge(pages: dict[str, str]) -> None:
    for path in DOCUMENTS:
        name = "index" if path.name == "README.md" else path.stem
        page = pages[f"{name if path.parent.name == 'docs' else name.lower()}.html"]
        assert anchors(path) - set(re.findall(r'\bid="([^"]*)"', page)) == set(), path.name


def test_pages_load_nothing_from_another_server(pages: dict[str, str]) -> None:
    loaded = {target for page in pages.values() for target in _LOADED.findall(page)}
    assert [target for target in loaded if re.match(r"(https?:)?//", target)] == []


def test_files_that_pages_name_are_there(pages: dict[str, str]) -> None:
    # MkDocs checks the links of documents only. Those of 404.html start at the site's root.
    for name, page in pages.items():
        for target in {*_LINKED.findall(page), *_LOADED.findall(page)}:
            path = target.partition("#")[0]
            if path and not re.match(r"\w+:", target) and name != "404.html":
                assert (SITE / name).parent.joinpath(path).exists(), f"{name}: {target}"


def test_no_list_of_a_document_is_a_paragraph_of_its_page(pages: dict[str, str]) -> None:
    # Forges take less space before an item than Python-Markdown.
    for name, page in pages.items():
        text = _CODE.sub("", "".join(_ARTICLE.findall(page)))
        assert re.findall(r"^ *(?:<p>)?(?:[-*]|\d+\.) .*", text, re.MULTILINE) == [], name


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# Home\n\n[gone](#gone)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    for old, new in ((r"^docs_dir: .*", "docs_dir: pages"), (r"^nav:\n(?:  .*\n)+", "")):
        settings = re.sub(old, new, settings, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "gone" in done.stderr
