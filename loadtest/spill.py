"""`python -m loadtest.spill`: a replica with little memory, with and without one that lends.

All requests come at once, to one replica. A few with short answers come before them: admission
learns from those to expect short answers, so without a lender running requests are preempted and
computed again. Five arms get the same requests: stock vLLM; compression without and with a lender;
with a lender on another Ray node, with an object store of its own; and, for the answers to expect,
compression with memory enough for all.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import ray
import yaml

from adakv_serve.loadtest.client.records import percentile
from adakv_serve.loadtest.client.token_answers import Answer, ask, likeness
from adakv_serve.loadtest.engines.state_transfer import measure
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch, occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run
from adakv_serve.loadtest.servers.two_nodes import sent_bytes, two_nodes
from adakv_serve.loadtest.traffic.workloads import Session, Sizes, sessions

_CONFIG = Path(__file__).parents[1] / "serving" / "configs" / "spill.yaml"
_AMPLE_BYTES = 3 << 30
ARMS = ("on", "two_nodes", "off", "undisturbed", "stock")
_LENDING = ("on", "two_nodes")
_SHORT_ANSWERS, _SHORT_PROMPT_TOKENS, _SHORT_TOKENS = 8, 300, 16
# Entries for each head, and so 6 to 34 MiB.
_TRANSFERRED = (128, 256, 512, 768)
SAME_NODE = "same_node"
# Ray exports metrics every 10 s by default.
_METRICS_INTERVAL_S = 12
# Replicas report once a second.
_SETTLE_S = 3.0


class Run(NamedTuple):
    """What one arm measured.

    moves: the replica's log of each move. crossed_bytes: bytes between the nodes' object stores.
    """

    answers: list[Answer]
    elapsed_s: float
    looks: list[Look]
    moves: list[dict[str, Any]]
    crossed_bytes: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.tokens) for answer in self.answers) / self.elapsed_s

    def counted(self, name: str) -> int | None:
        """Return the growth of a count over all replicas; None where they do not report it."""
        first, last = self.looks[0].loads, self.looks[-1].loads
        if any(load[name] is None for load in last):
            return None
        return sum(load[name] for load in last) - sum(load[name] or 0 for load in first)

    def figures(self) -> dict[str, Any]:
        """Return the arm's figures for the report."""
        figures: dict[str, Any] = {
            "tokens_per_s": round(self.tokens_per_s, 2),
            "elapsed_s": round(self.elapsed_s, 1),
            "output_tokens": sum(len(answer.tokens) for answer in self.answers),
            "preemptions": self.counted("preemptions"),
            "recomputed_tokens": self.counted("recomputed_tokens"),
            "moved": len(self.moves),
        }
        if self.moves:
            figures["move"] = {
                name: round(statistics.median(move[name] for move in self.moves), 2)
                for name in ("bytes", "export_ms", "first_output_ms")
            }
        if self.crossed_bytes is not None:
            figures["moved_bytes"] = sum(move["bytes"] for move in self.moves)
            figures["crossed_bytes"] = int(self.crossed_bytes)
        for name in ("ttft_s", "tpot_s"):
            values = [v for answer in self.answers if (v := getattr(answer, name)) is not None]
            stem = name.removesuffix("_s")
            figures |= {f"{stem}_p{p}_s": percentile(values, p / 100) for p in (50, 95)}
        return figures


def deployment(arm: str) -> dict[str, Any]:
    """Return the arm's configuration of `serve run`."""
    config = yaml.safe_load(_CONFIG.read_text())
    (application,) = config["applications"]
    args = application["args"]
    if arm not in _LENDING:
        args["spill"] = {"enabled": False}
    if arm == "stock":
        args["compression"] = {"enabled": False}
    if arm == "undisturbed":
        args["engine"]["kv_cache_memory_bytes"] = _AMPLE_BYTES
    return config


def run_arm(arm: str, asked: Sequence[Session], folder: Path) -> Run:
    """Start the arm's deployment and ask it everything."""
    log, config, port = folder / f"{arm}.log", deployment(arm), free_port()
    with contextlib.ExitStack() as stack:
        nodes = None
        if arm == "two_nodes":
            nodes = stack.enter_context(two_nodes(folder / "nodes.log"))
        base_url = stack.enter_context(serve_run(config, log, port, nodes and nodes.address))
        (application,) = config["applications"]
        before = sent_bytes(nodes.metrics_url) if nodes else 0.0
        store_url = f"redis://127.0.0.1:{port}"
        run = asyncio.run(
            _ask_at(base_url, store_url, application["name"], asked, arm == "undisturbed")
        )
        if nodes:
            time.sleep(_METRICS_INTERVAL_S)
            run = run._replace(crossed_bytes=sent_bytes(nodes.metrics_url) - before)
    return run._replace(moves=logged_moves(log.read_text(errors="replace")))


def logged_moves(log: str) -> list[dict[str, Any]]:
    """Return what the replicas logged of each move."""
    return [json.loads(line) for line in re.findall(r"spill moved (\{.*\})", log)]


async def _ask_at(
    base_url: str, store_url: str, application: str, asked: Sequence[Session], with_gaps: bool
) -> Run:
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=3600) as client,
        occupancy_watch(store_url, application, 0.5) as watch,
    ):
        return await ask_all(client, watch, asked, with_gaps)


async def ask_all(
    client: httpx.AsyncClient,
    watch: OccupancyWatch,
    asked: Sequence[Session],
    with_gaps: bool,
    settle_s: float = _SETTLE_S,
) -> Run:
    """Ask short questions one after the other, then all of `asked` at once.

    Args:
        with_gaps: asks for the gaps between the two most likely tokens, and streams nothing.
        settle_s: how long replicas take to report after the last answer.
    """
    (card,) = (await client.get("/v1/models")).json()["data"]
    body = {"model": card["id"], "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for session in asked[:_SHORT_ANSWERS]:
        short = {"prompt": session.turns[0].prompt[:_SHORT_PROMPT_TOKENS]}
        await ask(client, {**body, **short, "max_tokens": _SHORT_TOKENS})
    while not watch.looks:
        await asyncio.sleep(0.1)
    first = len(watch.looks) - 1
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(
            ask(client, {**body, **_question(session, number, with_gaps)})
            for number, session in enumerate(asked)
        )
    )
    elapsed_s = time.perf_counter() - started
    await asyncio.sleep(settle_s)
    return Run(list(answers), elapsed_s, watch.looks[first:], [])


def _question(session: Session, number: int, with_gaps: bool) -> dict[str, Any]:
    (turn,) = session.turns
    question: dict[str, Any] = {"prompt": turn.prompt, "max_tokens": turn.output_tokens}
    if with_gaps:
        return question | {"logprobs": 2}
    if number % 2 == 0:
        question |= {"stream": True, "stream_options": {"include_usage": True}}
    return question


def transfers(repeat: int) -> dict[str, list[dict[str, Any]]]:
    """Return what a move costs by itself, for each way and size."""
    folder = Path("/dev/shm")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return {
            way: [
                measure(kept, repeat, folder, through_ray=way != SAME_NODE).figures()
                for kept in _TRANSFERRED
            ]
            for way in (SAME_NODE, "through_object_store")
        }
    finally:
        ray.shutdown()


def figures(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return the figures of the arms that ran, and those of one against another."""
    result: dict[str, Any] = {arm: run.figures() for arm, run in runs.items()}
    if "undisturbed" in runs:
        for arm in set(_LENDING) & runs.keys():
            alike = likeness(runs[arm].answers, runs["undisturbed"].answers)
            result[arm] |= {"identical_outputs": [alike.same, alike.total], "ties": alike.ties}
    if "on" in runs:
        on = runs["on"]
        if "undisturbed" in runs:
            result["identical_outputs"] = result["on"]["identical_outputs"]
        for arm in {"off", "stock"} & runs.keys():
            result[f"ratio_to_{arm}"] = round(on.tokens_per_s / runs[arm].tokens_per_s, 3)
    return result


def _sessions(requests: int, sizes: Sizes) -> list[Session]:
    from transformers import AutoTokenizer

    from adakv_serve.serving.models.embedded import embedded_model_path

    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    endless = sessions("synthetic", tokenizer, 4096, sizes)
    return [next(endless) for _ in range(requests)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.spill", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--requests", type=int, default=56)
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--output-tokens", type=int, default=448)
    parser.add_argument("--repeat", type=int, default=15, help="of each transfer")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"transfers": transfers(args.repeat)}
    result["transfer"] = next(
        moved for moved in result["transfers"][SAME_NODE] if moved["bytes"] > 8 << 20
    )
    print(json.dumps(result, indent=2), flush=True)
    asked = _sessions(args.requests, Sizes(args.prompt_tokens, args.output_tokens))
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="adakv-spill-") as folder:
        for arm in args.arms:
            print(f"{arm}: starting", flush=True)
            runs[arm] = run_arm(arm, asked, Path(folder))
            print(f"{arm}: {json.dumps(runs[arm].figures())}", flush=True)
    result |= figures(runs)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
