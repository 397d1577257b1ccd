"""Asks a deployment that spills more than its small replica has room for."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai

from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.lending.leases import Lending
from adakv_serve.router.lending.redis_leases import LendingLedger
from tests.system.deployment import MODEL, Deployment

SENTENCE = "The harbour master wrote down the weather of the hour and every ship that passed. "


def ask(client: openai.OpenAI, number: int, *, stream: bool = False, tokens: int = 160) -> str:
    """The text of so many tokens after about 1,300."""
    arguments: dict[str, Any] = {
        "model": MODEL, "prompt": f"{number}. {SENTENCE * 80}", "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "vllm_xargs": {"adakv_session": "off"}},
        "extra_headers": {"x-request-id": f"spilling-{number}"},
    }  # fmt: skip
    if not stream:
        return client.completions.create(**arguments).choices[0].text
    chunks = client.completions.create(stream=True, **arguments)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def outcomes(deployment: Deployment) -> dict[str, float]:
    """How many requests have moved and come back so far."""
    exported = httpx.get(deployment.metrics_url, timeout=30).text
    line = r'^ray_adakv_spill_moves_total\{.*outcome="(\w+)".*\} ([\d.e+]+)'
    found = re.findall(line, exported, re.MULTILINE)
    sums: dict[str, float] = {}
    for outcome, count in found:
        sums[outcome] = sums.get(outcome, 0.0) + float(count)
    return sums


def lent(deployment: Deployment) -> int:
    return sum(report.blocks_lent for report in deployment.occupancy().values())


def ask_many(deployment: Deployment, numbers: range, tokens: int = 160) -> list[str]:
    client = deployment.client(timeout=300)
    with ThreadPoolExecutor(len(numbers)) as pool:
        asked = [
            pool.submit(ask, client, number, stream=number % 2 == 0, tokens=tokens)
            for number in numbers
        ]
        return [answer.result() for answer in asked]


def read_as_if_alone(deployment: Deployment, crowded: list[str]) -> bool:
    """Whether the first of those that have moved and of those that have not answer the same again.

    All of them would take minutes.
    """
    moved = {
        int(number)
        for move in moves(deployment)
        for number in re.findall(r"spilling-(\d+)-", move["request_id"])
    }
    stayed = set(range(len(crowded))) - moved
    asked = [*sorted(moved)[:2], *sorted(stayed)[:1]]
    client = deployment.client(timeout=300)
    return bool(moved) and all(ask(client, number) == crowded[number] for number in asked)


def lending(deployment: Deployment) -> Lending:
    """Offers and leases of now."""

    async def read() -> Lending:
        ledger = LendingLedger(deployment.store_url, LedgerKeys("adakv", "llm"))
        try:
            return await ledger.read()
        finally:
            await ledger.close()

    return asyncio.run(read())


def moves(deployment: Deployment) -> list[dict[str, Any]]:
    """What the borrower has logged of each request that has moved."""
    return [json.loads(line) for line in re.findall(r"spill moved (\{.*\})", deployment.log())]
