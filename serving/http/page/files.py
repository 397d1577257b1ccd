"""The files of the fleet page: its own, and those of the library that draws its lines."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from adakv_serve.serving.http.asgi import Message

_OWN = Path(__file__).parent / "static"
# A Python package that brings uPlot. It is not imported, since that imports an interactive shell.
_LIBRARY = "uplot-python"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own files alone, and talks to its own server alone.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_NEEDS_KEY = b'data-needs-key="false"'


class PageFile(NamedTuple):
    """One file, as it is answered."""

    body: bytes
    type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    def messages(self, *, with_body: bool, known: str) -> list[Message]:
        """Return the messages of an answer.

        Args:
            known: the tag that the client has, in which case nothing is sent again.
        """
        is_known = known == self.etag
        body = b"" if is_known or not with_body else self.body
        headers = {**_HEADERS, "etag": self.etag}
        if not is_known:
            headers |= {"content-type": self.type, "content-length": str(len(self.body))}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        return [
            {"type": "http.response.start", "status": 304 if is_known else 200, "headers": raw},
            {"type": "http.response.body", "body": body, "more_body": False},
        ]


def page_files(*, needs_key: bool) -> dict[str, PageFile]:
    """Return the files by their paths below the application's prefix."""
    files = {
        f"/page/{path.name}": PageFile(path.read_bytes(), _TYPES[path.suffix])
        for path in _OWN.iterdir()
    }
    page = files.pop("/page/index.html")
    if needs_key:
        page = page._replace(body=page.body.replace(_NEEDS_KEY, b'data-needs-key="true"'))
    return {"/": page, **files, **_library_files()}


def _library_files() -> dict[str, PageFile]:
    """Return uPlot's files; empty ones without the package, with which the page has no lines."""
    script = style = b"/* no lines: pip install --no-deps uplot-python */"
    try:
        library = importlib.metadata.distribution(_LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        script, style = (
            Path(str(library.locate_file(f"uplot/static/{name}"))).read_bytes()
            for name in ("uPlot.iife.js", "uPlot.min.css")
        )
    return {
        "/page/uplot.js": PageFile(script, _TYPES[".js"]),
        "/page/uplot.css": PageFile(style, _TYPES[".css"]),
    }
