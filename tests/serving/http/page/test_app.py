"""The page over HTTP: what is open, what needs a key, and how a feed ends."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.http.page.app import FleetPage
from adakv_serve.serving.http.page.feed import Feed, FeedSource
from adakv_serve.serving.http.page.files import page_files
from tests.serving.http.page.viewers import Source, parsed
from tests.serving.http.scripted_backend import WHOLE, Clock, ScriptedBackend, error_of


class Served:
    """A page before a front door, without a server."""

    def __init__(self, most_viewers: int = 2, **settings: Any) -> None:
        self.clock = Clock()
        self.backend = ScriptedBackend([WHOLE])
        logger = logging.getLogger("test")
        self.door = FrontDoor(self.backend, FrontDoorSettings(**settings), logger, self.clock)
        self.feed = Feed(FeedSource(Source(2).read), {}, most_viewers)
        self.app = FleetPage(self.door, self.door, self.feed, self.clock)

    def client(self, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, root_path=options.pop("prefix", ""))
        return httpx.AsyncClient(transport=transport, base_url="http://door", **options)

    @asynccontextmanager
    async def viewer(self, key: str = "") -> AsyncIterator["Viewer"]:
        viewer = Viewer(self.app, key)
        task = asyncio.create_task(viewer.run())
        try:
            yield viewer
        finally:
            viewer.leave()
            await task


class Viewer:
    """One that follows the feed, as fast as a test lets it."""

    def __init__(self, app: FleetPage, key: str) -> None:
        self._app = app
        self._headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.ended = asyncio.Event()

    async def run(self) -> None:
        scope: Scope = {
            "type": "http", "method": "GET", "path": "/page/feed", "headers": self._headers,
        }  # fmt: skip
        await self._app(scope, self._incoming.get, self._send)
        self.ended.set()

    async def _send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.put_nowait(message)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def next(self) -> Message:
        async with asyncio.timeout(60):
            return await self.sent.get()


async def test_the_page_is_open_and_tells_whether_it_needs_a_key() -> None:
    for keys, needs in (((), "false"), (("k",), "true")):
        response = await Served(api_keys=keys).client().get("/")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert f'data-needs-key="{needs}"' in response.text


async def test_all_files_of_the_page_are_there_and_guarded() -> None:
    client = Served(api_keys=("k",)).client()
    page = (await client.get("/")).text
    linked = re.findall(r'(?:src|href)="(page/[^"]+)"', page)
    assert {"page/app.js", "page/style.css", "page/uplot.js"} <= set(linked)
    for path in [*(f"/{one}" for one in linked), *page_files(needs_key=True)]:
        response = await client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_has_nothing_inline_and_nothing_of_other_hosts() -> None:
    for path, file in page_files(needs_key=False).items():
        if path.startswith("/page/uplot"):
            continue
        text = file.body.decode()
        hosts = re.findall(r"https?://[^\"' )]+", text)
        assert set(hosts) <= {"http://www.w3.org/2000/svg"}, path
        assert "innerHTML" not in text
    page = page_files(needs_key=False)["/"].body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style| style=| on\w+=", page)


async def test_a_file_that_a_browser_has_is_not_sent_again() -> None:
    client = Served().client()
    first = await client.get("/page/app.js")
    again = await client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = await client.head("/page/app.js")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


async def test_below_a_prefix_the_page_has_a_slash_at_its_end() -> None:
    client = Served().client(prefix="/llm")
    response = await client.get("/llm")
    assert (response.status_code, response.headers["location"]) == (307, "/llm/")
    assert (await client.get("/llm/")).status_code == 200
    assert (await client.get("/llm/page/style.css")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/"), ("GET", "/v1/models"), ("POST", "/page/app.js")]
)
async def test_everything_else_goes_to_the_front_door(method: str, path: str) -> None:
    served = Served(more_paths=("/page",))
    await served.client().request(method, path)
    assert [scope["path"] for scope, _ in served.backend.calls] == [path]


@pytest.mark.parametrize("key", ["", "wrong"])
async def test_the_feed_needs_a_key(key: str) -> None:
    served = Served(api_keys=("right",))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    response = await served.client(headers=headers).get("/page/feed")
    assert response.status_code == 401
    assert error_of(response)["type"] == "AuthenticationError"
    async with served.viewer("right") as viewer:
        assert (await viewer.next())["status"] == 200


async def test_a_viewer_gets_events_until_it_leaves() -> None:
    served = Served()
    served.feed.tick()
    async with served.viewer() as viewer:
        start = await viewer.next()
        assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
        assert parsed((await viewer.next())["body"])[0] == "facts"
        name, state = parsed((await viewer.next())["body"])
        assert (name, len(state["rows"])) == ("state", 2)
        assert served.feed.viewers == 1
    assert served.feed.viewers == 0


async def test_one_viewer_too_many_is_refused_and_may_come_later() -> None:
    served = Served(most_viewers=1)
    async with served.viewer() as viewer:
        await viewer.next()
        response = await served.client().get("/page/feed")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
    async with served.viewer() as viewer:
        assert (await viewer.next())["status"] == 200


async def test_a_view_ends_after_a_minute_so_that_an_ingress_can_end() -> None:
    served = Served()
    async with served.viewer() as viewer:
        for _ in range(3):
            await viewer.next()
        served.clock.now += 61
        served.feed.tick()
        assert parsed((await viewer.next())["body"])[0] == "state"
        assert (await viewer.next())["more_body"] is False
        await asyncio.wait_for(viewer.ended.wait(), 60)


async def test_a_drain_ends_views_and_waits_for_none() -> None:
    served = Served()
    async with served.viewer() as viewer:
        for _ in range(3):
            await viewer.next()
        served.door.draining.refuse_for(60)
        assert served.door.draining.running() == []
        served.feed.tick()
        await viewer.next()
        assert (await viewer.next())["more_body"] is False
    assert (await served.client().get("/page/feed")).status_code == 503


async def test_a_viewer_that_does_not_read_gets_the_newest_state_later() -> None:
    served = Served()
    async with served.viewer() as viewer:
        for _ in range(3):
            await viewer.next()
        viewer.may_send.clear()
        for _ in range(50):
            served.feed.tick()
            await asyncio.sleep(0)
        assert viewer.sent.empty()
        viewer.may_send.set()
        states = [parsed((await viewer.next())["body"])[1] for _ in range(2)]
        # The one that it was about to take, and the newest.
        assert [state["whole"] for state in states] == [False, True]
        assert viewer.sent.empty()
