"""Clients of the store: one server, or the primary of a set that Redis Sentinel watches.

After a failover the former primary lives on as a replica, with the connections to it. It answers
writes with READONLY, so a connection that gets this answer is closed: the next one leads to
wherever the name, or Sentinel, leads now.
"""

import contextlib
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.connection as async_connection
import redis.asyncio.sentinel as async_sentinel
import redis.connection
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

SOCKET_TIMEOUT_S = 1.0
SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
_SENTINEL_PORT = 26379


class StoreAddress(NamedTuple):
    """Where the store is, from its URL.

    options: those of redis-py for connections to the primary; without `host` behind sentinels.
    sentinels: hosts and ports; none if the primary is at a fixed address.
    service: the primary's name at the sentinels.
    sentinel_options: those for connections to the sentinels.
    """

    options: dict[str, Any]
    is_tls: bool
    sentinels: tuple[tuple[str, int], ...]
    service: str
    sentinel_options: dict[str, Any]

    @classmethod
    def parse(cls, url: str) -> "StoreAddress":
        """Parse `redis://` and `rediss://` URLs of redis-py, and those of sentinels.

        The latter are `redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE`,
        with options as queries: those of redis-py, `sentinel_username` and `sentinel_password`.

        Raises:
            ValueError: it cannot be parsed. The message has nothing of the URL, which may hold a
                password.
        """
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"must begin with {', '.join(f'{known}://' for known in SCHEMES)}")
        try:
            return cls._of_sentinels(url) if "+" in scheme else cls._of_server(url)
        except _NoService:
            raise ValueError("names no service after the sentinels, as in .../mymaster") from None
        except ValueError:
            # Python's message shows what it took for the port.
            raise ValueError(
                "cannot be read: percent-encode / : @ ? # in a password, and check hosts, ports "
                "and options"
            ) from None

    @classmethod
    def _of_server(cls, url: str) -> "StoreAddress":
        options: dict[str, Any] = dict(async_connection.parse_url(url))
        options.pop("connection_class", None)
        return cls(options, url.startswith("rediss"), (), "", {})

    @classmethod
    def _of_sentinels(cls, url: str) -> "StoreAddress":
        parts = urlsplit(url)
        is_tls = parts.scheme.startswith("rediss")
        account, _, hosts = parts.netloc.rpartition("@")
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise _NoService
        queries = dict(parse_qsl(parts.query))
        own = {name: queries.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        # As a URL of one server, whose options redis-py converts to their types.
        plain = f"redis{'s' * is_tls}://{account}@any/{db}?{urlencode(queries)}"
        options = cls._of_server(plain).options
        del options["host"]
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        return cls(
            options,
            is_tls,
            tuple(_host_and_port(host) for host in hosts.split(",")),
            service,
            {**own, **tls, "ssl": is_tls},
        )


class _NoService(ValueError):
    """A URL of sentinels without a service."""


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname, parts.port or _SENTINEL_PORT


def _is_demotion(error: redis.ResponseError) -> bool:
    # An older Redis wraps the code into the message of a failed script.
    return isinstance(error, redis.ReadOnlyError) or "-READONLY" in str(error)


class _ToPrimary(async_connection.AbstractConnection):
    """Base of connections that are closed when their server is no primary any more."""

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().send_packed_command(*args, **kwargs)
        except RuntimeError as error:
            # Ray runs on uvloop, which raises it if the server has closed the connection.
            raise redis.ConnectionError("the store has closed the connection") from error

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if not _is_demotion(error):
                raise
            await self.disconnect(nowait=True)
            raise redis.ConnectionError("the store's primary is a replica now") from error


class _BlockingToPrimary(redis.connection.AbstractConnection):
    """`_ToPrimary` of blocking connections."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if not _is_demotion(error):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError("the store's primary is a replica now") from error


class _Plain(_ToPrimary, async_connection.Connection):
    pass


class _Tls(_ToPrimary, async_connection.SSLConnection):
    pass


class _Watched(_ToPrimary, async_sentinel.SentinelManagedConnection):
    pass


class _WatchedTls(_ToPrimary, async_sentinel.SentinelManagedSSLConnection):
    pass


class _BlockingPlain(_BlockingToPrimary, redis.connection.Connection):
    pass


class _BlockingTls(_BlockingToPrimary, redis.connection.SSLConnection):
    pass


class _BlockingWatched(_BlockingToPrimary, redis.sentinel.SentinelManagedConnection):
    pass


class _BlockingWatchedTls(_BlockingToPrimary, redis.sentinel.SentinelManagedSSLConnection):
    pass


class _SentinelPool(async_sentinel.SentinelConnectionPool):
    """A pool that closes the connections to its sentinels, too."""

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


def connect(url: str, timeout_s: float = SOCKET_TIMEOUT_S) -> redis.asyncio.Redis:
    """Return a client whose calls take `timeout_s` at most, without redis-py's seconds of retries.

    A report that late would be worth nothing. Behind sentinels each one that is dead adds as much.

    Raises:
        ValueError: the URL cannot be parsed; see `StoreAddress.parse`.
    """
    address = StoreAddress.parse(url)
    common = _common(timeout_s, AsyncRetry(NoBackoff(), 0))
    options = {**common, **address.options, "decode_responses": False}
    if not address.sentinels:
        pool = redis.asyncio.ConnectionPool(_Tls if address.is_tls else _Plain, **options)
        return redis.asyncio.Redis.from_pool(pool)
    sentinel = async_sentinel.Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels, sentinel_kwargs={**common, **address.sentinel_options}, **options
    )
    client: redis.asyncio.Redis = sentinel.master_for(
        address.service,
        connection_pool_class=_SentinelPool,
        connection_class=_WatchedTls if address.is_tls else _Watched,
    )
    return client


def connect_blocking(url: str, timeout_s: float = SOCKET_TIMEOUT_S) -> redis.Redis:
    """Return a blocking client like that of `connect`."""
    address = StoreAddress.parse(url)
    common = _common(timeout_s, Retry(NoBackoff(), 0))
    options = {**common, **address.options, "decode_responses": False}
    if not address.sentinels:
        connection = _BlockingTls if address.is_tls else _BlockingPlain
        return redis.Redis.from_pool(redis.ConnectionPool(connection, **options))
    sentinel = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels, sentinel_kwargs={**common, **address.sentinel_options}, **options
    )
    client: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        address.service,
        connection_class=_BlockingWatchedTls if address.is_tls else _BlockingWatched,
    )
    return client


def _common(timeout_s: float, retry: object) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": retry,
        # If they are on, redis-py does not check whether an idle connection has been closed.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def refuse_unfit_store(url: str) -> None:
    """Refuse a server that is no single primary. One that does not answer may come later.

    Raises:
        ValueError: the URL leads to a node of a Redis Cluster, or to a sentinel.
    """
    # Without a type in redis-py.
    client: Any = connect_blocking(url)
    try:
        with contextlib.suppress(redis.RedisError, OSError):
            mode = _mode(client.execute_command("HELLO"))
            if mode == "cluster":
                raise ValueError(
                    "store.url leads to a node of a Redis Cluster, which is not supported: use a "
                    "single server, or a primary with replicas and Redis Sentinel"
                )
            if mode == "sentinel":
                raise ValueError(
                    "store.url leads to a sentinel: write redis+sentinel://HOST:PORT/SERVICE"
                )
    finally:
        client.close()


def _mode(hello: Any) -> str:
    """Return the mode in an answer to HELLO, a dictionary or a list by protocol version."""
    pairs = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=True))
    mode = pairs.get(b"mode", pairs.get("mode", b""))
    return mode.decode() if isinstance(mode, bytes) else str(mode)
