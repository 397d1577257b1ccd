from pathlib import Path
from typing import Any

import yaml

from adakv_serve.loadtest.front_door import Round, Streams, compare, one_replica, summary
from adakv_serve.serving.config import AppConfig
from tests.loadtest.fake_client import fake_client

CONFIG = Path(__file__).parents[2] / "configs" / "cluster.yaml"


async def test_both_doors_get_the_same_prompts_after_a_warm_up() -> None:
    asked: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    clients = {arm: fake_client(bodies) for arm, bodies in asked.items()}
    figures = await compare(clients, "fake", Streams(2, 3, 5), repeat=2)
    assert asked["ours"] == asked["plain"]
    # A warm-up and two rounds of three requests; no prompt comes twice.
    assert len({body["prompt"] for body in asked["ours"]}) == 9
    assert {body["max_tokens"] for body in asked["ours"]} == {5}
    assert figures["ratio"] > 0


def test_ratios_are_of_rounds_with_the_same_prompts() -> None:
    rounds = {
        "ours": [Round(9.0, 0.1), Round(20.0, 0.3), Round(30.0, 0.2)],
        "plain": [Round(10.0, 0.1), Round(25.0, 0.1), Round(30.0, 0.4)],
    }
    figures = summary(rounds)
    assert (figures["ratio"], figures["ratio_range"]) == (0.9, [0.8, 1.0])
    assert (figures["ours_tokens_per_s"], figures["plain_tokens_per_s"]) == (20.0, 25.0)
    assert figures["ours_tokens_per_s_range"] == [9.0, 30.0]
    assert (figures["ours_ttft_p50_s"], figures["plain_ttft_p50_s"]) == (0.2, 0.1)


def test_our_engine_runs_as_plain_vllm_does() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    before = yaml.safe_dump(config)
    (application,) = one_replica(config)["applications"]
    settings = AppConfig.model_validate(application["args"])
    assert not settings.compression.enabled
    assert (settings.replica.count, settings.replica.cpu_threads) == (1, 1)
    assert yaml.safe_dump(config) == before
