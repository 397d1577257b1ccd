"""What becomes of streams and of processes when `make serve` is told to stop, or is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import ray_environment
from tests.installed import build_wheel, install, outside
from tests.system.deployment import MODEL, ROOT
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.long]


class Running:
    """One engine behind `python -m serving.run`, which has started Ray itself."""

    def __init__(self, folder: Path, adakv: Path | None = None) -> None:
        """
        Args:
            adakv: the program of an installed wheel, to run in place of the checkout.
        """
        http_port = free_port()
        self.base_url = f"http://127.0.0.1:{http_port}"
        config = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
        config["http_options"]["port"] = http_port
        args = config["applications"][0]["args"]
        args["store"] = {"port": free_port()}
        args["replica"]["count"] = 1
        # Another cluster has been killed: Ray would look for that one.
        (folder / "ray").mkdir()
        (folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
        path = folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        # Other clusters of this machine are of no concern.
        environment = {**outside(), **ray_environment(), "RAY_TMPDIR": str(folder)}
        command = [sys.executable, "-m", "adakv_serve.serving.run", str(path)]
        if adakv is not None:
            # It sets the rest itself.
            ports = {name: one for name, one in ray_environment().items() if name.endswith("_PORT")}
            environment = {**outside(), **ports, "RAY_TMPDIR": str(folder)}
            command = [str(adakv), "serve", str(path)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                command, cwd=ROOT if adakv is None else folder, env=environment,
                stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_heed_ctrl_c,
            )  # fmt: skip
        self.family: list[psutil.Process] = []
        # HAProxy's, once it has started.
        self.proxy_folder = folder

    def start(self) -> None:
        eventually(self._is_healthy, 300, "the application")
        # A fleet on its way from zero counts as healthy; a request waits for it.
        self.client(timeout=300).completions.create(model=MODEL, prompt="Once", max_tokens=1)
        self.family = [self.process, *self.process.children(recursive=True)]
        names = [" ".join(one.cmdline()) for one in self.family if one.is_running()]
        for name in ("raylet", "haproxy", "valkey-server", "VLLM::EngineCore"):
            assert any(name in one for one in names), (name, names)
        (config,) = {one for name in names for one in name.split() if one.endswith("/haproxy.cfg")}
        self.proxy_folder = Path(config).parent

    def _is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
        try:
            return httpx.get(f"{self.base_url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def client(self, timeout: float = 120) -> openai.OpenAI:
        url = f"{self.base_url}/v1"
        return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=timeout)

    def finish(self, tokens: int, begun: threading.Event) -> str:
        """Read one stream; return its finish reason, or how it broke."""
        stream: Any = self.client().completions.create(
            model=MODEL, prompt="Once", max_tokens=tokens, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        reasons = []
        try:
            for chunk in stream:
                begun.set()
                reasons += [choice.finish_reason for choice in chunk.choices]
        except (openai.APIError, httpx.HTTPError) as error:
            return f"{type(error).__name__}: {error}"
        return reasons[-1] or "cut"

    def refusal(self) -> httpx.Response | None:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 1}
        response = httpx.post(f"{self.base_url}/v1/completions", json=body, timeout=60)
        return response if response.status_code == 503 else None

    def left(self, timeout_s: float) -> list[psutil.Process]:
        """Return the processes that are still there after a while."""
        return psutil.wait_procs(self.family, timeout=timeout_s)[1]


def _heed_ctrl_c() -> None:
    """Undo what a shell sets for its background jobs: they ignore SIGINT, and so do children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(adakv: Path | None = None) -> Iterator[Running]:
    # Unix sockets below it allow only a short path.
    with tempfile.TemporaryDirectory(prefix="akv", dir="/tmp", ignore_cleanup_errors=True) as name:
        one = Running(Path(name), adakv)
        try:
            one.start()
            yield one
        finally:
            for process in {*one.family, one.process}:
                if process.is_running():
                    process.kill()


def _at_work(one: Running, pool: ThreadPoolExecutor, tokens: int) -> "Future[str]":
    begun = threading.Event()
    answer = pool.submit(one.finish, tokens, begun)
    assert begun.wait(120)
    return answer


@pytest.fixture(scope="module")
def killed() -> "Iterator[tuple[Running, Future[str]]]":
    """A deployment whose driver has been killed, and the stream that it was at."""
    with running() as one, ThreadPoolExecutor(1) as pool:
        answer = _at_work(one, pool, 4000)
        one.process.kill()
        yield one, answer


# The processes of the killed one end meanwhile, which takes them a minute.
@pytest.mark.usefixtures("killed")
def test_ctrl_c_lets_a_stream_of_an_installed_wheel_finish_and_refuses_others(
    tmp_path: Path,
) -> None:
    programs = install(build_wheel(tmp_path), tmp_path / "venv")
    with running(programs / "adakv") as one, ThreadPoolExecutor(1) as pool:
        answer = _at_work(one, pool, 500)
        # A terminal sends it to the whole process group.
        os.killpg(one.process.pid, signal.SIGINT)
        refusal = eventually(one.refusal, 30, "a refusal")
        assert int(refusal.headers["retry-after"]) >= 1
        assert refusal.json()["error"]["type"] == "ServiceUnavailable"
        assert answer.result() == "length"
        assert one.process.wait(90) == 0
        assert one.left(60) == []
        eventually(lambda: not one.proxy_folder.exists(), 60, "the end of HAProxy's folder")


def test_nothing_outlives_a_killed_driver(killed: "tuple[Running, Future[str]]") -> None:
    one, answer = killed
    # Ray's own agents look for their raylet now and then.
    assert one.left(180) == []
    assert answer.result() != "length"
    eventually(lambda: not one.proxy_folder.exists(), 60, "the end of HAProxy's folder")
