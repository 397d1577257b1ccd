"""Starts the real application on its own Ray cluster and ports, and stops it by pid."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import yaml

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import ray_environment
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader
from adakv_serve.router.stores import full_url
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
API_KEY = "test-key-that-no-log-has"
MODEL = "smollm2-135m-instruct"


class Deployment:
    """A Ray head node and `serve run` on it, as an operator would start them."""

    # The head's address for clients, and for the nodes of its cluster.
    host = node_ip = "127.0.0.1"

    def __init__(
        self,
        ray_port: int,
        http_port: int,
        store_port: int,
        config: Callable[[int, int], dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            config: what to run, by HTTP and store port; None takes `cluster_config`.
        """
        self.metrics_port = free_port()
        self.metrics_url = f"http://{self.host}:{self.metrics_port}/metrics"
        self.base_url = f"http://{self.host}:{http_port}"
        self._store_port = store_port
        self._ray_port = ray_port
        self._token = secrets.token_hex(32)
        self._processes: list[psutil.Popen] = []
        # Unix sockets below it allow only a short path.
        self._folder = tempfile.TemporaryDirectory(prefix="akv", dir="/tmp")
        self._config = Path(self._folder.name) / "cluster.yaml"
        self._config.write_text(yaml.safe_dump((config or cluster_config)(http_port, store_port)))
        self.log_path = Path(self._folder.name) / "log"
        self._log = self.log_path.open("wb")

    @property
    def store_url(self) -> str:
        """With the password of the embedded store, once that has started."""
        return full_url(f"redis://127.0.0.1:{self._store_port}")

    def start(self) -> None:
        self._start_ray()
        eventually(self._ray_answers, 60, "the Ray head node")
        self.serve_run()
        eventually(self.healthy, 180, "the application")
        eventually(lambda: len(self.occupancy()) == 2, 120, "two replicas")

    def _start_ray(self) -> None:
        self._spawn(
            "ray", "start", "--head", "--block", f"--port={self._ray_port}", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            f"--temp-dir={self._folder.name}/ray",
            f"--metrics-export-port={self.metrics_port}",
        )  # fmt: skip

    def reconfigure(self, change: Callable[[dict[str, Any]], None]) -> psutil.Popen:
        """Runs the configuration again, changed."""
        config = yaml.safe_load(self._config.read_text())
        change(config)
        self._config.write_text(yaml.safe_dump(config))
        return self.serve_run()

    def serve_run(self) -> psutil.Popen:
        address = f"{self.node_ip}:{self._ray_port}"
        return self._spawn("serve", "run", "-a", address, str(self._config))

    def _ray_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self._ray_port)) == 0

    def start_drain(self, *args: str) -> "subprocess.Popen[str]":
        """Runs the drain command; who calls it reads and ends it."""
        address = f"127.0.0.1:{self._ray_port}"
        return subprocess.Popen(
            [sys.executable, "-m", "adakv_serve.serving.drain", "--address", address, *args],
            cwd=ROOT, env=self._environment(), stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            **ray_environment(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "ADAKV_API_KEYS": API_KEY,
        }
        environment.pop("RAY_ADDRESS", None)
        return environment

    def _spawn(self, command: str, *args: str, within: Sequence[str] = ()) -> psutil.Popen:
        """Start a command of the environment.

        Args:
            within: a command that runs another one.
        """
        process = psutil.Popen(
            [*within, str(BIN / command), *args],
            cwd=ROOT,
            env=self._environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """Stops everything; returns when no process of the deployment is left."""
        family = self.family()
        served = [one for one in family if _is_called(one, "ServeReplica", "VLLM::")]
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(served, timeout=60)
        # Ray itself waits half a minute for actors that nobody ends. Who started it is left to end
        # by itself: else the next `serve run` would look for this cluster.
        started = {process.pid for process in self._processes}
        for process in family:
            if process.pid not in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        _, left = psutil.wait_procs(family, timeout=60)
        for process in left:
            process.kill()
        alive += left
        self._log.close()
        self._folder.cleanup()
        assert not alive, f"still there a minute after the stop: {alive}"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def occupancy(self) -> dict[str, Any]:
        """The live table by replica id, straight from the ledger."""
        reader = LedgerReader(self.store_url, LedgerKeys("adakv", "llm"))
        try:
            return {
                report.occupancy.replica_id: report.occupancy for report in reader.read().reports
            }
        except Exception:
            return {}
        finally:
            reader.close()

    def running(self) -> int:
        return sum(report.running + report.waiting for report in self.occupancy().values())

    def who_answer(self) -> set[str]:
        """The replicas that answer a few requests at once.

        A new one reports before Serve's ingress sends it anything.
        """
        client = self.client()

        def answers(number: int) -> str:
            return client.completions.with_raw_response.create(
                model=MODEL,
                prompt=f"{number}. Once",
                max_tokens=20,
                extra_body={"ignore_eos": True},
            ).headers["x-replica-id"]

        with ThreadPoolExecutor(4) as pool:
            return set(pool.map(answers, range(4)))

    def inspect(self) -> list[dict[str, Any]]:
        url = f"redis://127.0.0.1:{self._store_port}"
        command = [sys.executable, "-m", "adakv_serve.router.inspect", "--url", url, "--json"]
        done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        return json.loads(done.stdout)["replicas"]

    def kill(self, name: str) -> int:
        """Kills the first process whose command line holds `name`; returns its pid."""
        pid = eventually(lambda: self.pids(name), 60, f"a process {name}")[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def pids(self, name: str) -> list[int]:
        """Processes of this deployment whose command line holds `name`."""
        head = psutil.Process(self._processes[0].pid)
        return [one.pid for one in head.children(recursive=True) if _is_called(one, name)]

    def family(self) -> list[psutil.Process]:
        """All processes of this deployment."""
        alive = [process for process in self._processes if process.is_running()]
        return [one for process in alive for one in (process, *process.children(recursive=True))]

    @property
    def folder(self) -> Path:
        """Where it writes, Ray's logs included."""
        return Path(self._folder.name)

    def metric_names(self) -> set[str]:
        """Of all metrics that the cluster exports."""
        exported = httpx.get(self.metrics_url, timeout=30).text
        return set(re.findall(r"^(ray_[a-z_]+)\{", exported, re.MULTILINE))

    def client(self, **options: Any) -> openai.OpenAI:
        defaults: dict[str, Any] = {"api_key": API_KEY, "max_retries": 0, "timeout": 120}
        return openai.OpenAI(base_url=f"{self.base_url}/v1", **{**defaults, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        defaults: dict[str, Any] = {
            "headers": {"authorization": f"Bearer {API_KEY}"},
            "timeout": 120,
        }
        return httpx.post(self.base_url + path, json=body, **{**defaults, **options})

    def get(self, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {API_KEY}"}
        return httpx.get(self.base_url + path, headers=headers, timeout=60)


def dashboard_metrics() -> set[str]:
    """Those that the shipped dashboard asks for."""
    dashboard = json.loads((ROOT / "configs" / "monitoring" / "grafana" / "adakv.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    return set(re.findall(r"\bray_(?!io_)[a-z_]+", asked))


def _is_called(process: psutil.Process, *names: str) -> bool:
    """Whether its command line holds one of them."""
    try:
        return any(name in part for part in process.cmdline() for name in names)
    except psutil.Error:
        return False


class TwoNodes(Deployment):
    """Two nodes with an object store each, and a CPU each, so with a replica each."""

    def _start_ray(self) -> None:
        self._spawn(
            "python", "-m", "adakv_serve.loadtest.servers.two_nodes", str(self._ray_port),
            str(self.metrics_port), f"{self._folder.name}/ray",
        )  # fmt: skip


@contextmanager
def deployed(
    kind: type[Deployment] = Deployment,
    config: Callable[[int, int], dict[str, Any]] | None = None,
) -> Iterator[Deployment]:
    """A deployment that has started, on free ports; stopped on leaving."""
    deployment = kind(
        ray_port=free_port(),
        http_port=free_port(),
        store_port=free_port(),
        config=config,
    )
    try:
        try:
            deployment.start()
        except AssertionError:
            print(deployment.log()[-8000:])
            raise
        yield deployment
    finally:
        deployment.stop()


def twins_config(http_port: int, store_port: int) -> dict[str, Any]:
    """As `spill_config`, but two replicas that lend to each other, behind two ingresses.

    They hold caches for the next turns, and tell all ingresses of them.
    """
    config = spill_config(http_port, store_port)
    args = config["applications"][0]["args"]
    del args["spill"]["lenders"]
    args["replica"]["count"] = 2
    args["ingress"] = {"count": 2}
    args["compression"]["sessions"] = {"enabled": True, "host_bytes": 256 << 20}
    args["engine"]["kv_events_config"] = {"enable_kv_cache_events": True}
    config["applications"][0]["deployments"] = [{"name": "Engine", "num_replicas": 2}]
    return config


def spill_config(http_port: int, store_port: int) -> dict[str, Any]:
    """The shipped configuration of a small replica and a lender, on other ports, with a key."""
    config = yaml.safe_load((ROOT / "configs" / "spill.yaml").read_text())
    config["http_options"]["port"] = http_port
    args = config["applications"][0]["args"]
    args["store"] = {"port": store_port}
    return config


def cluster_config(http_port: int, store_port: int) -> dict[str, Any]:
    """The shipped configuration, on other ports, with a key and a short queue.

    The queue holds what the tests send at once: all of it queues while a dead replica is found out.
    """
    config = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    config["http_options"]["port"] = http_port
    args = config["applications"][0]["args"]
    args["store"] = {"port": store_port}
    # No step of the small model takes long, even beside other tests.
    args["replica"] |= {"max_ongoing_requests": 8, "max_queued_requests": 8, "hang_s": 20}
    args["engine"] |= {
        "kv_cache_memory_bytes": 402653184,
        "kv_events_config": {"enable_kv_cache_events": True},
    }
    args["compression"]["allow_detail"] = True
    return config
