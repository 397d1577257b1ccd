"""`python -m loadtest.spill`: a replica with little memory, with and without one that lends.

All requests come at once, to one replica. Before them come a few with short answers, from which
admission learns to expect more of those; so without a lender running requests are preempted and
computed again. Five arms get the same requests: stock vLLM; compression without and with a lender;
with a lender on another Ray node, with an object store of its own; and, to tell what the answers
should be, compression with memory enough for all.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import ray
import yaml

from loadtest.client.records import percentile
from loadtest.client.stream import StreamedAnswer
from loadtest.engines.state_transfer import measure
from loadtest.servers.occupancy import Look, occupancy_watch
from loadtest.servers.ports import free_port
from loadtest.servers.processes import serve_run
from loadtest.servers.two_nodes import sent_bytes, two_nodes
from loadtest.traffic.workloads import Session, Sizes, sessions

_CONFIG = Path(__file__).parents[1] / "configs" / "spill.yaml"
_AMPLE_BYTES = 3 << 30
ARMS = ("on", "two_nodes", "off", "undisturbed", "stock")
_LENDING = ("on", "two_nodes")
_SHORT_ANSWERS, _SHORT_PROMPT_TOKENS, _SHORT_TOKENS = 8, 300, 16
# Two logits that are closer may change places with the order of additions.
_TIE = 1e-4
# Entries for each head, and so 6 to 34 MiB.
_TRANSFERRED = (128, 256, 512, 768)
SAME_NODE = "same_node"
# Ray's default is 10 s.
_METRICS_INTERVAL_S = 12


@dataclass
class Answer:
    """ttft_s, tpot_s: None where it was not streamed. gaps: between the logarithms of the two most
    likely tokens' probabilities, where they were asked for."""

    tokens: list[int]
    ttft_s: float | None
    tpot_s: float | None
    gaps: list[float]


class Run(NamedTuple):
    """What one arm has brought.

    moves: what the replica has logged of each. crossed_bytes: that went between object stores.
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
        """How much a count of all replicas has grown; None where they do not tell."""
        first, last = self.looks[0].loads, self.looks[-1].loads
        if any(load[name] is None for load in last):
            return None
        return sum(load[name] for load in last) - sum(load[name] or 0 for load in first)

    def figures(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "tokens_per_s": round(self.tokens_per_s, 2),
            "elapsed_s": round(self.elapsed_s, 1),
            "output_tokens": sum(len(answer.tokens) for answer in self.answers),
            "preemptions": self.counted("preemptions"),
            "recomputed_tokens": self.counted("recomputed_tokens"),
            "moved": len(self.moves),
        }
        if self.moves:
            told["move"] = {
                name: round(statistics.median(move[name] for move in self.moves), 2)
                for name in ("bytes", "export_ms", "first_output_ms")
            }
        if self.crossed_bytes is not None:
            told["moved_bytes"] = sum(move["bytes"] for move in self.moves)
            told["crossed_bytes"] = int(self.crossed_bytes)
        for name in ("ttft_s", "tpot_s"):
            values = [v for answer in self.answers if (v := getattr(answer, name)) is not None]
            stem = name.removesuffix("_s")
            told |= {f"{stem}_p{p}_s": percentile(values, p / 100) for p in (50, 95)}
        return told


def deployment(arm: str) -> dict[str, Any]:
    """The arm's configuration of `serve run`."""
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
    log, config, port = folder / f"{arm}.log", deployment(arm), free_port()
    with contextlib.ExitStack() as stack:
        nodes = None
        if arm == "two_nodes":
            nodes = stack.enter_context(two_nodes(folder / "nodes.log"))
        address = nodes and nodes.address
        base_url = stack.enter_context(serve_run(config, log, port, address))
        (application,) = config["applications"]
        before = sent_bytes(nodes.metrics_url) if nodes else 0.0
        run = asyncio.run(
            _ask_all(
                base_url, f"redis://127.0.0.1:{port}", application["name"], asked,
                with_gaps=arm == "undisturbed",
            )
        )  # fmt: skip
        if nodes:
            time.sleep(_METRICS_INTERVAL_S)
            run = run._replace(crossed_bytes=sent_bytes(nodes.metrics_url) - before)
    lines = re.findall(r"spill moved (\{.*\})", log.read_text(errors="replace"))
    return run._replace(moves=[json.loads(line) for line in lines])


async def _ask_all(
    base_url: str, store_url: str, application: str, asked: Sequence[Session], with_gaps: bool
) -> Run:
    async with httpx.AsyncClient(base_url=base_url, timeout=3600) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        body = {"model": card["id"], "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        for session in asked[:_SHORT_ANSWERS]:
            short = {"prompt": session.turns[0].prompt[:_SHORT_PROMPT_TOKENS]}
            await _ask(client, {**body, **short, "max_tokens": _SHORT_TOKENS})
        async with occupancy_watch(store_url, application, 0.5) as watch:
            while not watch.looks:
                await asyncio.sleep(0.1)
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(
                    _ask(client, {**body, **_question(session, number, with_gaps)})
                    for number, session in enumerate(asked)
                )
            )
            elapsed_s = time.perf_counter() - started
            # Replicas report once a second.
            await asyncio.sleep(3)
        return Run(list(answers), elapsed_s, watch.looks, [])


def _question(session: Session, number: int, with_gaps: bool) -> dict[str, Any]:
    (turn,) = session.turns
    question: dict[str, Any] = {"prompt": turn.prompt, "max_tokens": turn.output_tokens}
    if with_gaps:
        return question | {"logprobs": 2}
    if number % 2 == 0:
        question |= {"stream": True, "stream_options": {"include_usage": True}}
    return question


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Raises httpx.HTTPError, StreamBroken: the server has failed it."""
    if body.get("stream"):
        streamed = StreamedAnswer(time.perf_counter())
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                streamed.take(line, time.perf_counter())
        return Answer(streamed.token_ids, streamed.ttft_s, streamed.tpot_s, [])
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    (choice,) = response.json()["choices"]
    tops = (choice["logprobs"] or {}).get("top_logprobs") or []
    gaps = [_gap(sorted(top.values(), reverse=True)) for top in tops]
    return Answer(choice["token_ids"], None, None, gaps)


def _gap(logprobs: list[float]) -> float:
    # Two tokens of the same text come as one.
    return logprobs[0] - logprobs[1] if len(logprobs) > 1 else 0.0


class Likeness(NamedTuple):
    """Of answers with those of the undisturbed arm. ties: that differ from where it was a toss."""

    same: int
    ties: int
    total: int


def likeness(answers: Sequence[Answer], expected: Sequence[Answer]) -> Likeness:
    same = ties = 0
    for ours, theirs in zip(answers, expected, strict=True):
        pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=True))
        first = next((step for step, (a, b) in pairs if a != b), None)
        same += first is None
        ties += first is not None and theirs.gaps[first] < _TIE
    return Likeness(same, ties, len(expected))


def transfers(repeat: int) -> dict[str, list[dict[str, Any]]]:
    """What moving costs by itself, by way."""
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


def figures(runs: dict[str, Run]) -> dict[str, Any]:
    """What the arms bring together, for those that have run."""
    told: dict[str, Any] = {arm: run.figures() for arm, run in runs.items()}
    if "undisturbed" in runs:
        for arm in set(_LENDING) & runs.keys():
            alike = likeness(runs[arm].answers, runs["undisturbed"].answers)
            told[arm] |= {"identical_outputs": [alike.same, alike.total], "ties": alike.ties}
    if "on" in runs:
        on = runs["on"]
        if "undisturbed" in runs:
            told["identical_outputs"] = told["on"]["identical_outputs"]
        for arm in {"off", "stock"} & runs.keys():
            told[f"ratio_to_{arm}"] = round(on.tokens_per_s / runs[arm].tokens_per_s, 3)
    return told


def main(argv: list[str] | None = None) -> int:
    from transformers import AutoTokenizer

    from serving.models.embedded import embedded_model_path

    parser = argparse.ArgumentParser(prog="python -m loadtest.spill", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--requests", type=int, default=56)
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--output-tokens", type=int, default=448)
    parser.add_argument("--repeat", type=int, default=15, help="of each transfer")
    args = parser.parse_args(argv)
    told: dict[str, Any] = {"transfers": transfers(args.repeat)}
    told["transfer"] = next(
        moved for moved in told["transfers"][SAME_NODE] if moved["bytes"] > 8 << 20
    )
    print(json.dumps(told, indent=2), flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    endless = sessions("synthetic", tokenizer, 4096, Sizes(args.prompt_tokens, args.output_tokens))
    asked = [next(endless) for _ in range(args.requests)]
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="adakv-spill-") as folder:
        for arm in args.arms:
            print(f"{arm}: starting", flush=True)
            runs[arm] = run_arm(arm, asked, Path(folder))
            print(f"{arm}: {json.dumps(runs[arm].figures())}", flush=True)
    told |= figures(runs)
    print(json.dumps(told, indent=2))
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
