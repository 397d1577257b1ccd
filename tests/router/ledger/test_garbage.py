"""The subscription takes garbage of every type from its channels and keys, and goes on."""

import asyncio
import random
import time
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader, LedgerWriter
from adakv_serve.router.ledger.sendings import Sending, Sendings
from adakv_serve.router.ledger.subscription import LedgerSubscription
from adakv_serve.router.local_view import LocalView
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "garbage")
TTL_S = 600
FOOTPRINT = Footprint(10, 10, 300, 50, (1, 2))

NUMBERS = st.one_of(
    st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.sampled_from([0, -1, 1e308])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
SENDING = Sending(
    request_id="1", replica_id="r1", peak_blocks=1, steady_blocks=1, prompt_tokens=1,
    output_tokens=1, block_hashes=[1], session=1,
)  # fmt: skip
MESSAGES = [
    occupancy("r1", decode_steps_per_s=1.0).model_dump(),
    PrefixChange(replica_id="r1", stored=[1], removed=[2]).model_dump(),
    Sendings(ingress_id="i", sent=[SENDING]).model_dump(),
]


@st.composite
def changed_messages(draw: st.DrawFn) -> bytes:
    """Messages of each kind in which one field, or one of a list's entry, has any value."""
    message: dict[str, Any] = dict(draw(st.sampled_from(MESSAGES)))
    if "sent" in message and draw(st.booleans()):
        entry = dict(message["sent"][0])
        entry[draw(st.sampled_from(sorted(entry)))] = draw(VALUES)
        message["sent"] = [entry]
    else:
        message[draw(st.sampled_from(sorted(message)))] = draw(VALUES)
    return as_json(message)


def as_json(value: Any) -> bytes:
    """Return JSON, also for infinities and integers without end."""
    match value:
        case dict():
            pairs = (as_json(str(key)) + b":" + as_json(one) for key, one in value.items())
            return b"{" + b",".join(pairs) + b"}"
        case list():
            return b"[" + b",".join(map(as_json, value)) + b"]"
        case str():
            escaped = "".join(f"\\u{ord(sign) & 0xFFFF:04x}" for sign in value)
            return f'"{escaped}"'.encode()
        case None:
            return b"null"
        case bool():
            return str(value).lower().encode()
    return repr(value).replace("nan", "NaN").replace("inf", "Infinity").encode()


PAYLOADS = st.one_of(
    st.binary(max_size=20),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    VALUES.map(as_json),
    changed_messages(),
    st.just(b"[" * 5000),
)
NAMES = st.sampled_from([b"r1", b"", b"\xff", b"a\nb", b"1:2"])
TYPES = st.sampled_from(["string", "list", "hash", "set", "zset", "stream"])


def put(client: redis.Redis, key: str | bytes, kind: str, content: bytes) -> None:
    """Put a value of any type at a key."""
    client.delete(key)
    match kind:
        case "string":
            client.set(key, content)
        case "list":
            client.rpush(key, content)
        case "hash":
            client.hset(key, content, content)
        case "set":
            client.sadd(key, content)
        case "zset":
            client.zadd(key, {content: float("inf")})
        case "stream":
            client.xadd(key, {content: content})


class Ingress:
    """What an ingress does with messages."""

    def __init__(self, url: str) -> None:
        self.view = LocalView(ttl_s=TTL_S)
        self.chooser = Chooser(self.view, rng=random.Random(0))
        self.subscription = LedgerSubscription(
            url, KEYS, self.view, on_prefixes=self.chooser.learn, on_sendings=self.book, ttl_s=TTL_S
        )

    def book(self, sendings: Sendings) -> None:
        for one in sendings.sent:
            footprint = Footprint(
                one.peak_blocks, one.steady_blocks, one.prompt_tokens, one.output_tokens,
                tuple(one.block_hashes), one.session,
            )  # fmt: skip
            self.chooser.sent(one.request_id, one.replica_id, footprint, time.monotonic())

    async def hears(self, url: str, garbage: list[tuple[str, bytes]]) -> None:
        """Listen to garbage, and then to a report, which has to come without a new start."""
        writer = LedgerWriter(url, KEYS, TTL_S)
        task = asyncio.create_task(self.subscription.run())
        async with asyncio.timeout(60):
            await self._reported(writer, task, "before")
            for channel, payload in garbage:
                await writer._client.publish(channel, payload)
            await self._reported(writer, task, "after")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await writer.close()

    async def _reported(
        self, writer: LedgerWriter, task: asyncio.Task[None], replica_id: str
    ) -> None:
        sequence = 0
        while replica_id not in self.view.replica_ids:
            sequence += 1
            await writer.publish(occupancy(replica_id, sequence=sequence))
            await asyncio.sleep(0.002)
            assert not task.done(), "the subscription has ended"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    index=st.tuples(TYPES, st.binary(max_size=5)),
    stored=st.lists(st.tuples(NAMES, TYPES, PAYLOADS), max_size=4),
    published=st.lists(
        st.tuples(
            st.sampled_from([KEYS.channel, KEYS.prefix_channel, KEYS.sendings_channel]), PAYLOADS
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_garbage_of_every_type_neither_ends_nor_stalls_the_subscription(
    store_url: str,
    client: redis.Redis,
    index: tuple[str, bytes],
    stored: list[tuple[bytes, str, bytes]],
    published: list[tuple[str, bytes]],
) -> None:
    client.flushall()
    put(client, KEYS.members, *index)
    for name, kind, content in stored:
        put(client, KEYS.replica_of(name), kind, content)
        if index[0] == "zset":
            client.zadd(KEYS.members, {name: float("inf")})
    ingress = Ingress(store_url)
    asyncio.run(ingress.hears(store_url, published))
    # Garbage may look like a report; choosing among what was taken works all the same.
    names = ingress.view.replica_ids
    assert ingress.chooser.choose("request", names, FOOTPRINT, time.monotonic()) is not None
    reader = LedgerReader(store_url, KEYS, TTL_S)
    assert {"before", "after"} <= {report.occupancy.replica_id for report in reader.read().reports}
    reader.close()


@pytest.mark.parametrize("field", ["blocks_total", "waiting", "running", "prefill_tokens_queued"])
@pytest.mark.parametrize(
    "amount", [10**400, float("inf"), float("nan")], ids=["400 digits", "infinity", "nan"]
)
def test_amounts_that_cannot_be_reckoned_with_are_dropped(field: str, amount: float) -> None:
    view = LocalView(ttl_s=TTL_S)
    view.receive(as_json({**MESSAGES[0], field: amount}), 0.0)
    view.receive(as_json({**MESSAGES[0], "decode_tokens_per_s": float("inf")}), 0.0)
    assert (view.dropped, view.replica_ids) == (2, [])
