"""What routers learn of running replicas."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import redis
from transformers import AutoTokenizer

from adakv_serve.router.footprint import prefix_hashes
from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.serving.models.embedded import embedded_model_path
from adakv_worker.salts import seed_hash, tenant_salt
from tests.system.deployment import API_KEY, MODEL, Deployment
from tests.waiting import eventually

PROMPT = "The lighthouse keeper wrote the hour down, and the weather of the hour. " * 12


def test_replicas_tell_which_prefixes_they_have_cached(deployment: Deployment) -> None:
    (report, *_) = deployment.occupancy().values()
    tokens = AutoTokenizer.from_pretrained(embedded_model_path()).encode(PROMPT)
    # Each key's prompts are cached by themselves.
    tenant = hashlib.sha256(API_KEY.encode()).hexdigest()[:16]
    seed = seed_hash(tenant_salt(tenant, None), None)
    expected = set(prefix_hashes(tokens, report.block_size_tokens, seed))
    assert expected
    heard: set[int] = set()
    with redis.Redis.from_url(deployment.store_url).pubsub() as pubsub:
        pubsub.subscribe(LedgerKeys("adakv", "llm").prefix_channel)

        def complete() -> bool:
            message = pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is not None:
                heard.update(json.loads(message["data"])["stored"])
            return expected <= heard

        eventually(lambda: pubsub.get_message(timeout=1), 30, "the subscription")
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
        assert deployment.post("/v1/completions", body).status_code == 200
        eventually(complete, 30, "the prompt's blocks")


def test_requests_that_come_at_once_are_spread(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    eventually(lambda: len(deployment.who_answer()) == 2, 60, "answers from both")
    eventually(lambda: deployment.running() == 0, 60, "an idle deployment")

    def begin(number: int) -> Any:
        """An answer that is not at its end before the last one has begun."""
        return client.completions.with_raw_response.create(
            model=MODEL, prompt=f"{number}. Once", max_tokens=4000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(begin, range(6)))
    for answer in answers:
        answer.parse().close()
    taken = Counter(answer.headers["x-replica-id"] for answer in answers)
    assert len(taken) == 2
    assert min(taken.values()) >= 2
    eventually(lambda: deployment.running() == 0, 60, "the generations stopped")
