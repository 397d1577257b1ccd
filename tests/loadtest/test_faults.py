"""The faults themselves, done to small real things: memory, a store, its network, slow readers."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from adakv_serve.loadtest.faults.of_clients import read_slowly
from adakv_serve.loadtest.faults.of_stores import refuse_writes
from adakv_serve.loadtest.faults.scene import Scene
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import in_own_shared_memory
from adakv_serve.loadtest.servers.store import ProxiedStore, proxied_store
from adakv_serve.loadtest.servers.tcp_proxy import TcpProxy


def run_with_shared_memory(size: int, code: str) -> str:
    """Run Python in a `/dev/shm` of its own; return what it prints."""
    command = [sys.executable, "-c", code]
    inside = in_own_shared_memory(command, size)
    if inside == command:
        pytest.skip("this machine allows no namespaces")
    return subprocess.run(inside, stdout=subprocess.PIPE, check=True, text=True).stdout


def test_a_full_shared_memory_has_room_again_afterwards() -> None:
    code = """if True:
        import os
        from pathlib import Path
        from adakv_serve.loadtest.faults.of_memory import filled
        with filled(Path("/dev/shm"), left_bytes=1 << 16):
            try:
                Path("/dev/shm/a").write_bytes(bytes(1 << 17))
            except OSError as error:
                print(error.strerror, os.listdir("/dev/shm"))
        print(Path("/dev/shm/a").write_bytes(bytes(1 << 17)))
    """
    lines = run_with_shared_memory(8 << 20, code).splitlines()
    assert lines == ["No space left on device ['a']", str(1 << 17)]


def test_a_killed_run_leaves_shared_memory_as_it_was() -> None:
    code = """if True:
        import os, subprocess, sys
        own = "import time; from pathlib import Path\\n"
        own += "from adakv_serve.loadtest.faults.of_memory import filled\\n"
        own += "with filled(Path('/dev/shm')): print('full', flush=True); time.sleep(600)"
        before = os.statvfs("/dev/shm").f_bavail
        child = subprocess.Popen([sys.executable, "-c", own], stdout=subprocess.PIPE)
        child.stdout.readline()
        full = os.statvfs("/dev/shm").f_bavail
        child.kill()
        child.wait()
        print(full < before, os.statvfs("/dev/shm").f_bavail == before, os.listdir("/dev/shm"))
    """
    assert run_with_shared_memory(8 << 20, code).split() == ["True", "True", "[]"]


def test_shared_memory_that_the_machine_does_not_have_is_not_filled() -> None:
    code = """if True:
        import os
        from pathlib import Path
        from adakv_serve.loadtest.faults.of_memory import filled
        before = os.statvfs("/dev/shm").f_bavail
        try:
            with filled(Path("/dev/shm")):
                print("filled")
        except MemoryError:
            print(os.statvfs("/dev/shm").f_bavail == before)
    """
    assert run_with_shared_memory(2 * psutil.virtual_memory().total, code).split() == ["True"]


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
                await writer.drain()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(echo, "127.0.0.1", port):
        yield port


async def test_a_stalled_proxy_keeps_what_is_sent_until_it_goes_on() -> None:
    async with echo_server() as port, TcpProxy(free_port(), port).running() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        async with proxy.stalled():
            writer.write(b"b")
            late_reader, late_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            late_writer.write(b"c")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.3)
        assert await reader.read(1) == b"b"
        assert await late_reader.read(1) == b"c"
        writer.close()
        late_writer.close()


async def test_a_cut_proxy_resets_and_refuses_until_it_goes_on() -> None:
    async with echo_server() as port, TcpProxy(free_port(), port).running() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        async with proxy.cut():
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", proxy.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"b")
        assert await reader.read(1) == b"b"
        writer.close()


@pytest.fixture(scope="module")
def store() -> Iterator[ProxiedStore]:
    with proxied_store() as store:
        yield store


def scene_of(url: str = "", store: ProxiedStore | None = None) -> Scene:
    port = 0 if store is None else store.server_port
    return Scene(url, port, "fake", random.Random(0), 60.0, store)


def client_at(port: int, timeout_s: float = 60.0) -> redis.asyncio.Redis:
    """A client that does not try again by itself."""
    return redis.asyncio.Redis(port=port, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


async def failures_during(
    fault: Coroutine[Any, Any, Any], client: redis.asyncio.Redis
) -> set[type[Exception]]:
    """Return how writes fail while a fault lasts."""
    found: set[type[Exception]] = set()
    striking = asyncio.create_task(fault)
    while not striking.done():
        try:
            await client.set("a", 1)
        except redis.RedisError as error:
            found.add(type(error))
        await asyncio.sleep(0.01)
    await striking
    return found


async def until_it_takes_writes(client: redis.asyncio.Redis) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(redis.RedisError):
                await client.set("a", 1)
                return
            await asyncio.sleep(0.05)


def test_a_store_and_its_proxy_run_before_the_deployment(store: ProxiedStore) -> None:
    first = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    if subprocess.run(
        [sys.executable, "-c", first], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("this user may run no process before others")
    listeners = {
        connection.laddr.port: child.pid
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN
    }
    for port in (store.port, store.server_port):
        assert os.sched_getscheduler(listeners[port]) == os.SCHED_FIFO


async def test_a_read_only_store_takes_writes_again_afterwards(store: ProxiedStore) -> None:
    async with client_at(store.port) as client:
        await until_it_takes_writes(client)
        found = await failures_during(refuse_writes(scene_of(store=store)), client)
        assert redis.ReadOnlyError in found
        await client.set("a", 3)


async def test_a_killed_store_comes_back_at_its_address(store: ProxiedStore) -> None:
    async with client_at(store.port) as client:
        before = (await client.info("server"))["process_id"]
        psutil.Process(before).kill()
        await until_it_takes_writes(client)
        assert (await client.info("server"))["process_id"] != before


async def test_a_store_that_is_out_of_reach_lives_on(store: ProxiedStore) -> None:
    async with (
        client_at(store.port, timeout_s=0.2) as waiting,
        client_at(store.port) as parted,
        client_at(store.server_port) as beside,
    ):
        await until_it_takes_writes(waiting)
        assert await failures_during(store.stall(2.0), waiting) == {redis.TimeoutError}
        await until_it_takes_writes(parted)
        assert await failures_during(store.cut(2.0), parted) == {redis.ConnectionError}
        await until_it_takes_writes(parted)
        assert await failures_during(store.cut(1.0), beside) == set()


STREAM = b"data: {}\n\ndata: [DONE]\n\n"
ANSWERS = {
    "whole": (STREAM, b'{"choices": []}', 0),
    "cut stream": (b"data: {}\n\n", b"{}", 3),
    "cut answer": (STREAM, b'{"choices": [', 3),
    "error": (b"{}", b"{}", 6),
}


@pytest.mark.parametrize("way", ANSWERS)
async def test_slow_readers_must_get_whole_answers(way: str) -> None:
    stream, answer, problems = ANSWERS[way]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        is_stream = b'"stream": true' in await reader.readexactly(length)
        status = b"500 No" if way == "error" else b"200 OK"
        kind = b"text/event-stream" if is_stream else b"application/json"
        body = stream if is_stream else answer
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-type: " + kind)
        writer.write(b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", port):
        found = await read_slowly(scene_of(f"http://127.0.0.1:{port}"))
    assert len(found) == problems, found


def test_orphans_stay_in_sight() -> None:
    code = """if True:
        import subprocess, sys, psutil
        from adakv_serve.loadtest.servers.orphans import adopt_orphans
        adopt_orphans()
        parent = "import subprocess as s; "
        parent += "print(s.Popen(['sleep', '600'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
        orphan = int(subprocess.check_output([sys.executable, "-c", parent]))
        print(orphan in [one.pid for one in psutil.Process().children()])
        psutil.Process(orphan).kill()
    """
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"True"]
