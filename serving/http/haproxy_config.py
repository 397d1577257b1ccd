"""Changes the configuration of HAProxy that Ray Serve has written, before HAProxy reads it.

Serve opens HAProxy's admin socket to all users, and its statistics to all addresses, and has
neither TLS nor OpenAI's errors. `configs/haproxy` runs this file, without our packages.
"""

import argparse
import json
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_MARK = "# Changed by serving/http/haproxy_config.py.\n"
# Most bytes of a path with its query, and of all headers together; HAProxy's buffer must hold both.
_MOST_BYTES = 1 << 16
_SHUT_MODE = 0o700
# Browsers show scripts no error without it. These errors hold nothing of an answer.
_CORS = ("access-control-allow-origin", "*")


class _Error(NamedTuple):
    status: int
    type: str
    message: str

    @property
    def body(self) -> str:
        error = {"message": self.message, "type": self.type, "param": None, "code": self.status}
        return json.dumps({"error": error})


_UNAVAILABLE = _Error(503, "ServiceUnavailable", "no front door can answer")
_LATE = _Error(504, "GatewayTimeout", "no answer in time")
# The second is a front door that ended before it answered.
_FILES = {503: _UNAVAILABLE, 502: _UNAVAILABLE, 504: _LATE}
_REFUSED = (
    _Error(400, "BadRequestError", "not a valid HTTP request"),
    _Error(408, "RequestTimeout", "the request did not arrive in time"),
    _Error(500, "InternalServerError", "internal error"),
)
_NOT_FOUND = _Error(404, "NotFoundError", "no application at this path")
_LONG_PATH = _Error(414, "UriTooLong", f"the path is longer than {_MOST_BYTES} bytes")
_LONG_HEADERS = _Error(431, "HeadersTooLarge", f"the headers are larger than {_MOST_BYTES} bytes")


class _Change(NamedTuple):
    """A line of Serve's configuration, and what takes its place."""

    what: str
    line: str
    instead: str


def changed(text: str, folder: Path, certificate: Path | None = None) -> str:
    """Return Serve's configuration of HAProxy, private and with OpenAI's errors.

    Args:
        folder: has the files of `error_files`.
        certificate: file with a certificate's chain and its private key, for TLS to clients.

    Raises:
        ValueError: a line is not as this version of Ray writes it, so that a door would stay open.
    """
    if text.startswith(_MARK):
        return text
    for what, line, instead in _changes(folder, certificate):
        text, count = re.subn(line, instead, text, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"HAProxy's configuration has another form than expected: {what}")
    return _MARK + text


def error_files() -> dict[str, str]:
    """Return the answers for HAProxy's own failures, by file name."""
    return {f"{status}.http": _answer(error) for status, error in _FILES.items()}


def _changes(folder: Path, certificate: Path | None) -> Iterable[_Change]:
    yield _Change("admin socket", r"^( *stats socket \S+ mode )666\b", r"\g<1>600")
    yield _Change("metrics", r"^(frontend prometheus\n *bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\2")
    yield _Change("statistics", r"^(listen stats\n *bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\2")
    for status in _FILES:
        path = json.dumps(str(folder / f"{status}.http")).replace("\\", r"\\")
        yield _Change("errors", rf"^( *errorfile {status} ).*$", rf"\g<1>{path}")
    yield _Change(
        "errors", r"^( *)(balance .*)$",
        "".join(rf"\1http-error status {e.status} {_reply(e)}" "\n" for e in _REFUSED) + r"\1\2",
    )  # fmt: skip
    yield _Change(
        "unknown paths", r"^( *http-request return status 404) content-type text/plain .*$",
        rf"\1 {_reply(_NOT_FOUND)}",
    )  # fmt: skip
    tls = "" if certificate is None else _tls(certificate)
    limits = "\n".join(
        f"    http-request return status {error.status} {_reply(error)} "
        f"if {{ {size} gt {_MOST_BYTES} }}"
        for error, size in ((_LONG_PATH, "url_len"), (_LONG_HEADERS, "req.hdrs,length"))
    )
    yield _Change(
        "front", r"^(frontend http_frontend\n *bind \S*:\d+)$", rf"\g<1>{tls}" "\n" + limits
    )


def _tls(certificate: Path) -> str:
    quoted = json.dumps(str(certificate)).replace("\\", r"\\")
    return f" ssl crt {quoted} ssl-min-ver TLSv1.2 alpn http/1.1"


def _reply(error: _Error) -> str:
    """Return the arguments of a rule that answers with an error."""
    name, value = _CORS
    # No message has a quote, so that HAProxy takes it as it stands.
    body = error.body.replace("\\", r"\\")
    return f"content-type application/json string '{body}' hdr {name} {value}"


def _answer(error: _Error) -> str:
    name, value = _CORS
    headers = {
        "content-type": "application/json",
        "content-length": str(len(error.body)),
        "retry-after": "1",
        "cache-control": "no-cache",
        "connection": "close",
        name: value,
    }
    lines = [f"HTTP/1.1 {error.status} {error.type}", *map(": ".join, headers.items())]
    return "\r\n".join([*lines, "", error.body])


def make_private(folder: Path) -> None:
    """Shut other users out of a folder and of the one above it.

    Raises:
        PermissionError: one of them belongs to another user, who could replace what is in it.
    """
    for one in (folder.parent, folder):
        status = one.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(
                f"{one} belongs to another user: set RAY_SERVE_HAPROXY_CONFIG_FILE_LOC and the "
                "like as configs/ray.env does"
            )
        if status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"{one} is a folder of all users: HAProxy needs its own")
        if stat.S_IMODE(status.st_mode) != _SHUT_MODE:
            one.chmod(_SHUT_MODE)


def _write(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Change the file that HAProxy's own option `-f` names."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("-f", dest="config", type=Path, required=True)
    path: Path = parser.parse_known_args(argv)[0].config
    certificate = os.environ.get("ADAKV_TLS_CERTIFICATE")
    try:
        make_private(path.parent)
        text = changed(path.read_text(), path.parent, Path(certificate) if certificate else None)
        for name, content in error_files().items():
            _write(path.parent / name, content)
        _write(path, text)
    except (OSError, ValueError) as error:
        print(f"HAProxy does not start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
