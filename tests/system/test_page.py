"""The fleet page in a real browser, before the running application.

With ADAKV_PAGE_IMAGES=docs/images it also takes the pictures of `docs/page.md`.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.deployment import API_KEY, MODEL, Deployment
from tests.waiting import eventually

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright: pip install 'adakv-serve[browser]'"
)
_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
IMAGES = os.environ.get("ADAKV_PAGE_IMAGES")
# SmolLM2-135M has so many layers, with so many KV heads each.
LAYERS, HEADS = 30, 3
ROW = "#replica-table tbody tr"
PATIENCE_S = 120

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox refuses to run as root, as containers do.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class View:
    """A page in a browser of its own, and what its console and its network saw."""

    def __init__(self, browser: Any, deployment: Deployment, **options: Any) -> None:
        settings: dict[str, Any] = {"viewport": {"width": 1240, "height": 900}, **options}
        self.page = browser.new_context(**settings).new_page()
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.base_url = deployment.base_url
        self.problems: list[str] = []
        self.requested: set[str] = set()
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requested.add(request.url))
        self.page.goto(f"{self.base_url}/")

    def open(self, key: str = API_KEY) -> None:
        """Types a key, as the page asks for it: the field has the focus."""
        self.page.wait_for_selector("#key:focus")
        self.page.keyboard.type(key)
        self.page.keyboard.press("Enter")

    def until(self, script: str) -> None:
        """Waits until an expression is true in the page.

        Playwright's own way needs `eval` there, which the page's policy forbids.
        """
        eventually(lambda: self.page.evaluate(script), PATIENCE_S, script)

    def rows(self, number: int) -> None:
        """Waits for so many replicas with fresh reports."""
        self.until(f"document.querySelectorAll('{ROW}[data-state=fresh]').length === {number}")

    def total(self, name: str) -> str:
        tile = self.page.locator("#totals div", has_text=name)
        text: str = tile.locator("dd span").inner_text()
        return text

    def shoot(self, name: str, selector: str | None = None) -> None:
        """Takes a picture, if pictures are asked for."""
        if IMAGES is None:
            return
        path = str(Path(IMAGES) / f"page-{name}.png")
        if selector is None:
            self.page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1240, "height": 1330},
                                 full_page=True)  # fmt: skip
        else:
            self.page.locator(selector).screenshot(path=path)

    def close(self) -> None:
        self.page.context.close()


@contextmanager
def viewing(browser: Any, deployment: Deployment, **options: Any) -> Iterator[View]:
    """A view whose console stays empty, and that asks no other host."""
    view = View(browser, deployment, **options)
    try:
        yield view
        assert view.problems == []
        assert {url for url in view.requested if not url.startswith(view.base_url)} == set()
    finally:
        view.close()


@pytest.fixture
def view(browser: Any, deployment: Deployment) -> Iterator[View]:
    eventually(lambda: len(deployment.occupancy()) == 2, 180, "two replicas before the test")
    with viewing(browser, deployment) as view:
        view.open()
        view.rows(2)
        yield view


@contextmanager
def load(deployment: Deployment, requests: int = 10) -> Iterator[list["Future[Any]"]]:
    """Long prompts with long answers, all at once."""
    # The front door has a queue of eight, which ten at once fill on a slow machine.
    client = deployment.client(timeout=600, max_retries=20)

    def ask(number: int) -> Any:
        prompt = (
            f"{number}. " + "The clerk counted the boats on the river, and wrote it down. " * 105
        )
        return client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=100, extra_body={"ignore_eos": True}
        )  # fmt: skip

    with ThreadPoolExecutor(requests) as pool:
        yield [pool.submit(ask, number) for number in range(requests)]


def test_the_page_asks_for_a_key_and_shows_the_idle_fleet(
    browser: Any, deployment: Deployment
) -> None:
    with viewing(browser, deployment) as view:
        assert not view.page.is_visible("#fleet")
        view.open("wrong")
        view.until("document.getElementById('key-problem').textContent !== ''")
        # The browser itself reports the refusal.
        assert [problem for problem in view.problems if "401" not in problem] == []
        view.problems.clear()
        view.open()
        view.rows(2)
        named = set(view.page.locator(f"{ROW} td:first-child span:first-child").all_inner_texts())
        assert named == set(deployment.occupancy())
        assert view.total("Replicas") == "2"
        view.until("document.querySelector('#totals small').textContent !== ''")
        assert "target 2" in view.page.inner_text("#totals")
        assert view.page.locator("#charts canvas").count() == 4
        view.shoot("idle")


def test_bars_and_decisions_move_under_load(view: View, deployment: Deployment) -> None:
    with load(deployment) as answers:
        # Some replica holds compressed blocks, and its bar shows them.
        view.until(
            f"[...document.querySelectorAll('{ROW} .bar .compressed')]"
            ".some((part) => parseFloat(part.style.width) > 0)"
        )
        view.until("document.querySelectorAll('#decisions tbody tr').length >= 10")
        label = view.page.locator(f"{ROW} .bar").first.get_attribute("aria-label")
        assert "blocks" in label
        view.until(
            "parseFloat([...document.querySelectorAll('#totals div')]"
            ".find((tile) => tile.textContent.includes('Answers')).querySelector('span')"
            ".textContent) > 0"
        )
        view.shoot("load")
        assert [answer.result().usage.completion_tokens for answer in answers] == [100] * 10
    assert view.page.locator("#reasons li").count() >= 1


def test_a_prompt_shows_its_proof_and_what_each_head_kept(view: View) -> None:
    page = view.page
    page.click("#sample")
    needle = page.input_value("#prompt")
    page.fill("#prompt", f"<img src=x onerror=alert(1)> {needle}")
    page.focus("#budget")
    while "96 entries" not in page.inner_text("#budget-text"):
        page.keyboard.press("ArrowRight")
    page.fill("#answer-tokens", "24")
    page.click("#ask")
    page.wait_for_selector("#heads:not([hidden])")
    assert "96 on average" in page.inner_text("#proof")
    assert page.inner_text("#answer")
    cells = page.locator("#heads-map rect")
    assert cells.count() == LAYERS * HEADS
    assert len({cells.nth(each).get_attribute("fill-opacity") for each in range(12)}) > 1
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#head-text").startswith("layer 1, head 0: ")
    # Whatever a prompt has is text.
    assert "<img src=x onerror=alert(1)>" in page.inner_text("#words")
    assert page.locator("#words img").count() == 0
    marked = "[...document.querySelectorAll('#words span')].filter((one) => one.style.background)"
    assert 0 < page.evaluate(f"{marked}.length") <= page.locator("#words span").count()
    page.locator("#words span", has_text="secret").first.scroll_into_view_if_needed()
    view.shoot("heads", "#heads")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, deployment: Deployment, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    with viewing(browser, deployment, **phone) as view:
        view.open()
        view.rows(2)
        assert view.page.evaluate("document.documentElement.scrollWidth") <= 390
        background = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 380) is (scheme == "light")


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_replica_shows_and_another_takes_its_place(
    view: View, deployment: Deployment
) -> None:
    before = set(deployment.occupancy())
    deployment.kill("ServeReplica:llm:Engine")
    # Replicas that earlier tests killed may still be shown as gone.
    shown_gone = view.page.locator(f"{ROW}[data-state=gone] td:first-child span:first-child")
    gone = eventually(lambda: before & set(shown_gone.all_inner_texts()), PATIENCE_S, "one gone")
    assert f"{gone.pop()} is gone" in view.page.inner_text("#events")
    view.shoot("gone")
    view.rows(2)
    assert "joined" in view.page.inner_text("#events")
