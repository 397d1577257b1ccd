"""Changes the configuration of HAProxy that Ray Serve has written, before HAProxy reads it.

Serve opens HAProxy's admin socket to all users, and its statistics to all addresses, and has
neither TLS, nor a deadline for headers, nor OpenAI's errors. `configs/haproxy` runs this file,
without our packages.
"""

import argparse
import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_MARK = "# Changed by serving/http/haproxy_config.py.\n"
# Most bytes of a path with its query, and of all headers together; HAProxy's buffer must hold both.
_MOST_BYTES = 1 << 16
_SHUT_MODE = 0o700
_HEADERS_TIMEOUT_S = 20
# Methods that the front door's own server can read. RFC 9110 has an answer of 405 list them.
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# A connection has a file to each side. HAProxy itself has fewer others than these.
_FILES_OF_A_CONNECTION, _OTHER_FILES = 2, 124
# HAProxy refuses requests once this share of its connections is in use. With all of them in use a
# client would get no answer.
_BUSY_SHARE = 0.9
# A line of Serve's configuration for each application.
_BACKEND = re.compile(r"^ *use_backend http-", re.MULTILINE)
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
_INVALID = _Error(400, "BadRequestError", "not a valid HTTP request")
_INTERNAL = _Error(500, "InternalServerError", "internal error")
_REFUSED = (
    _INVALID,
    _Error(408, "RequestTimeout", "the request did not arrive in time"),
    _INTERNAL,
)
_UNKNOWN_METHOD = _Error(405, "MethodNotAllowed", f"the method is none of {', '.join(_METHODS)}")
_BUSY = _Error(503, "ServiceUnavailable", "too many connections")
_NOT_FOUND = _Error(404, "NotFoundError", "no application at this path")
_LONG_PATH = _Error(414, "UriTooLong", f"the path is longer than {_MOST_BYTES} bytes")
_LONG_HEADERS = _Error(431, "HeadersTooLarge", f"the headers are larger than {_MOST_BYTES} bytes")


class Front(NamedTuple):
    """What operators set for HAProxy, and what the machine allows.

    certificate: file with a certificate's chain and its private key, for TLS to clients.
    headers_timeout_s: longest time until a request's headers are there.
    open_files: most files that HAProxy may open.
    """

    certificate: Path | None = None
    headers_timeout_s: int = _HEADERS_TIMEOUT_S
    open_files: int | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Front":
        """Return what the environment of this process has.

        Raises:
            ValueError: a variable has no such value.
        """
        name = "ADAKV_HEADERS_TIMEOUT_S"
        timeout = environment.get(name) or str(_HEADERS_TIMEOUT_S)
        if not timeout.isdecimal() or int(timeout) == 0:
            raise ValueError(f"{name}={timeout} is no number of seconds, such as 20")
        certificate = environment.get("ADAKV_TLS_CERTIFICATE")
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return cls(
            certificate=Path(certificate) if certificate else None,
            headers_timeout_s=int(timeout),
            open_files=None if files == resource.RLIM_INFINITY else files,
        )

    def connections(self, wanted: int) -> int:
        """Return how many connections HAProxy can have at once, if it is to have so many.

        Raises:
            ValueError: it could not have one.
        """
        if self.open_files is None:
            return wanted
        possible = (self.open_files - _OTHER_FILES) // _FILES_OF_A_CONNECTION
        if possible < 1:
            raise ValueError(f"{self.open_files} open files are too few: raise `ulimit -n`")
        return min(wanted, possible)


class _Change(NamedTuple):
    """A line of Serve's configuration, and what takes its place."""

    what: str
    line: str
    instead: str


def changed(text: str, folder: Path, front: Front | None = None) -> str:
    """Return Serve's configuration of HAProxy, private and with OpenAI's errors.

    Args:
        folder: has the files of `error_files`.

    Raises:
        ValueError: a line is not as this version of Ray writes it, so that a door would stay open.
    """
    if text.startswith(_MARK):
        return text
    front = front or Front()
    most = re.search(r"^ *maxconn (\d+)$", text, re.MULTILINE)
    connections = front.connections(int(most[1])) if most else 0
    has_applications = _BACKEND.search(text) is not None
    for what, line, instead in _changes(folder, front, connections, has_applications):
        text, count = re.subn(line, instead, text, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"HAProxy's configuration has another form than expected: {what}")
    return _MARK + text


def error_files() -> dict[str, str]:
    """Return the answers for HAProxy's own failures, by file name."""
    return {f"{status}.http": _answer(error) for status, error in _FILES.items()}


def _changes(
    folder: Path, front: Front, connections: int, has_applications: bool
) -> Iterable[_Change]:
    yield _Change("admin socket", r"^( *stats socket \S+ mode )666\b", r"\g<1>600")
    yield _Change("metrics", r"^(frontend prometheus\n *bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\2")
    yield _Change("statistics", r"^(listen stats\n *bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\2")
    yield _Change("connections", r"^( *maxconn )\d+$", rf"\g<1>{connections}")
    yield _Change(
        "deadlines", r"^( *)(timeout client .*)$",
        rf"\1\2\n\1timeout http-request {front.headers_timeout_s}s",
    )  # fmt: skip
    for status in _FILES:
        path = json.dumps(str(folder / f"{status}.http")).replace("\\", r"\\")
        yield _Change("errors", rf"^( *errorfile {status} ).*$", rf"\g<1>{path}")
    yield _Change(
        "errors", r"^( *)(balance .*)$",
        "".join(rf"\1http-error status {e.status} {_reply(e)}" "\n" for e in _REFUSED) + r"\1\2",
    )  # fmt: skip
    unknown = f"404 {_reply(_NOT_FOUND)}"
    if not has_applications:
        # It has just begun, and gets its applications in a moment. Nobody asks again after a 404.
        unknown = f"503 {_reply(_UNAVAILABLE)} hdr retry-after 1"
    yield _Change(
        "unknown paths", r"^( *http-request return status) 404 content-type text/plain .*$",
        rf"\1 {unknown}",
    )  # fmt: skip
    tls, rules = "", list(_rules(connections))
    if front.certificate is not None:
        tls = _tls(front.certificate)
        # The application does not know that its clients use TLS.
        rules.append(r"http-response replace-header location ^http:(.*) https:\\1")
    yield _Change(
        "front", r"^(frontend http_frontend\n *bind \S*:\d+)$",
        "\n    ".join([rf"\g<1>{tls}", *rules]),
    )  # fmt: skip


def _rules(connections: int) -> Iterable[str]:
    """Yield what HAProxy answers itself, and what it answers instead of the door's server."""
    refused = (
        (_LONG_PATH, "", f"{{ url_len gt {_MOST_BYTES} }}"),
        (_LONG_HEADERS, "", f"{{ req.hdrs,length gt {_MOST_BYTES} }}"),
        (
            _UNKNOWN_METHOD,
            f"hdr allow '{', '.join(_METHODS)}'",
            f"!{{ method {' '.join(_METHODS)} }}",
        ),
        (_BUSY, "hdr retry-after 1", f"{{ fe_conn gt {int(_BUSY_SHARE * connections)} }}"),
    )
    for error, more, condition in refused:
        yield f"http-request return status {error.status} {_reply(error)} {more} if {condition}"
    # Errors of the application have another type. These are uvicorn's own, which no setting of
    # Serve's changes: a request that it cannot parse, and an application that raises.
    for error in (_INVALID, _INTERNAL):
        yield (
            f"http-response return status {error.status} {_reply(error)} if "
            f"{{ status {error.status} }} {{ res.hdr(content-type) -m beg text/plain }}"
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
    try:
        make_private(path.parent)
        text = changed(path.read_text(), path.parent, Front.of(os.environ))
        for name, content in error_files().items():
            _write(path.parent / name, content)
        _write(path, text)
    except (OSError, ValueError) as error:
        print(f"HAProxy does not start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
