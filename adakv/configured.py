"""What is right and wrong with a configuration on this machine."""

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from adakv.findings import Finding, of_ports
from adakv_serve.router import DEFAULT_APPLICATION
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.serve_file import ServeFile
from adakv_serve.serving.store import store_url

# By the store's errors.
_ADVICE = {"AuthenticationError": "its URL has a wrong password, or none"}


def of_config(config: object) -> Iterator[Finding]:
    """Yield findings about a configuration of `serve run` on this machine.

    Raises:
        Exception: a package that its settings are checked with cannot be imported.
    """
    try:
        file = ServeFile.of(config)
    except ValidationError as error:
        yield _malformed(error)
        return
    ports = [("http", file.host, file.port)]
    for name, args in file.applications:
        try:
            app = AppConfig.model_validate(args)
        except ValidationError as error:
            yield _malformed(error)
            continue
        yield Finding("configuration", "ok", name)
        if app.store.url is None and app.store.url_env is None:
            ports.append(("embedded store", "127.0.0.1", app.store.port))
        else:
            yield _store(app)
    yield from of_ports(ports)


def _malformed(error: ValidationError) -> Finding:
    # Its text would repeat what was given, which may be a secret.
    places = sorted({_place(one["type"], one["loc"]) for one in error.errors()})
    named = ", ".join(places)
    return Finding("configuration", "error", named, "see `adakv serve` for why")


def _place(kind: str, place: Sequence[object]) -> str:
    if place:
        return ".".join(map(str, place))
    # A validator of several settings names no place.
    return "no mapping" if kind.endswith("_type") else "settings that contradict each other"


def _store(app: AppConfig) -> Finding:
    """Return whether a configuration's store answers; nothing of its URL, which may be secret."""
    try:
        keys = LedgerKeys(app.store.key_prefix, DEFAULT_APPLICATION)
        LedgerReader(store_url(app.store), keys).read()
    except ValueError as error:
        # Ours, whose text has nothing of the URL.
        return Finding("store", "error", "unusable", str(error))
    except Exception as error:
        kind = type(error).__name__
        advice = _ADVICE.get(kind, "the store does not answer from here")
        return Finding("store", "error", kind, advice)
    return Finding("store", "ok", "answers")
