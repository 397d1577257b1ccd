import json
from typing import Any

import httpx
import pytest

from adakv_serve.loadtest.client.token_answers import Answer, Likeness, likeness
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch
from adakv_serve.loadtest.spill import ARMS, Run, ask_all, deployment, figures, logged_moves
from adakv_serve.loadtest.traffic.workloads import Session, Turn
from adakv_serve.serving.config import AppConfig

LOAD: dict[str, Any] = {"preemptions": 1, "recomputed_tokens": 100}


def run(seconds: float, tokens: list[int], gaps: tuple[float, ...] = ()) -> Run:
    looks = [Look(0.0, [LOAD, LOAD]), Look(9.0, [LOAD, {**LOAD, "preemptions": 4}])]
    return Run([Answer(tokens, 0.5, 0.1, list(gaps))], seconds, looks, [])


def test_arms_are_compared_with_the_one_that_lends() -> None:
    runs = {
        "on": run(2.0, [1, 2, 3]), "off": run(4.0, [1, 2, 3]), "stock": run(8.0, [1, 2, 3]),
        "undisturbed": run(1.0, [1, 2, 3], (1.0,) * 3),
    }  # fmt: skip
    found = figures(runs)
    assert (found["ratio_to_off"], found["ratio_to_stock"]) == (2.0, 4.0)
    assert found["identical_outputs"] == found["on"]["identical_outputs"] == [1, 1]
    assert "ratio_to_off" not in figures({"off": runs["off"], "stock": runs["stock"]})


def test_an_arm_counts_what_happened_while_it_ran() -> None:
    move = {"bytes": 10, "export_ms": 1.0, "first_output_ms": 3.0}
    mine = run(2.0, [1, 2, 3])._replace(moves=[move, {**move, "bytes": 30}], crossed_bytes=44.0)
    found = mine.figures()
    assert (found["tokens_per_s"], found["output_tokens"]) == (1.5, 3)
    assert (found["preemptions"], found["recomputed_tokens"]) == (3, 0)
    assert (found["moved"], found["move"]["bytes"]) == (2, 20)
    assert (found["moved_bytes"], found["crossed_bytes"]) == (40, 44)
    assert (found["ttft_p50_s"], found["tpot_p95_s"]) == (0.5, 0.1)


def test_a_count_that_stock_vllm_does_not_report_is_left_out() -> None:
    stock = [Look(0.0, [LOAD]), Look(1.0, [{**LOAD, "recomputed_tokens": None}])]
    assert run(1.0, [1])._replace(looks=stock).counted("recomputed_tokens") is None


@pytest.mark.parametrize(
    ("tokens", "gaps", "expected"),
    [
        ([1, 2, 3], [1.0, 1.0, 1.0], Likeness(1, 0, 1)),
        ([1, 9, 9], [1.0, 1e-5, 1.0], Likeness(0, 1, 1)),
        # Only the first difference may be a tie.
        ([1, 9, 9], [1.0, 0.1, 1e-5], Likeness(0, 0, 1)),
    ],
)
def test_an_answer_may_differ_from_a_near_tie_on(
    tokens: list[int], gaps: list[float], expected: Likeness
) -> None:
    ours, theirs = Answer(tokens, None, None, []), Answer([1, 2, 3], None, None, gaps)
    assert likeness([ours], [theirs]) == expected


def test_moves_are_read_from_the_log() -> None:
    log = 'INFO spill moved {"bytes": 1}\nINFO other {"bytes": 2}\nx spill moved {"bytes": 3}\n'
    assert logged_moves(log) == [{"bytes": 1}, {"bytes": 3}]


def test_the_arms_are_valid_deployments_that_differ_in_what_they_compare() -> None:
    made = {
        arm: AppConfig.model_validate(deployment(arm)["applications"][0]["args"]) for arm in ARMS
    }
    assert {arm for arm in ARMS if made[arm].spill.enabled} == {"on", "two_nodes"}
    assert {arm for arm in ARMS if not made[arm].compression.enabled} == {"stock"}
    memory = {arm: made[arm].engine["kv_cache_memory_bytes"] for arm in ARMS}
    assert {arm for arm in ARMS if memory[arm] > memory["on"]} == {"undisturbed"}


class Server:
    """Answers completions with token ids, and logprobs where they are asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "fake"}]})
        body = json.loads(request.content)
        self.asked.append(body)
        if body.get("stream"):
            event = {"choices": [{"text": "ab", "token_ids": [1, 2]}]}
            return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
        tops = [{"a": -0.5, "b": -2.5}, {"same text": -0.5}] if "logprobs" in body else None
        choice = {"token_ids": [1, 2], "logprobs": tops and {"top_logprobs": tops}}
        return httpx.Response(200, json={"choices": [choice]})


@pytest.mark.parametrize("with_gaps", [False, True])
async def test_short_answers_come_before_all_others(with_gaps: bool) -> None:
    server, watch = Server(), OccupancyWatch()
    watch.looks += [Look(0.0, []), Look(0.5, [LOAD])]
    asked = [Session(f"s{number}", (Turn([number] * 400, 50),), chat=False) for number in range(10)]
    client = httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(server))
    done = await ask_all(client, watch, asked, with_gaps, settle_s=0.0)
    assert [body["max_tokens"] for body in server.asked] == [16] * 8 + [50] * 10
    assert [len(body["prompt"]) for body in server.asked] == [300] * 8 + [400] * 10
    assert [answer.tokens for answer in done.answers] == [[1, 2]] * 10
    # Counts begin where the other requests do.
    assert done.looks == watch.looks[1:]
    streamed = [answer.ttft_s is not None for answer in done.answers]
    assert streamed == ([False] * 10 if with_gaps else [True, False] * 5)
    assert {tuple(answer.gaps) for answer in done.answers} == {(2.0, 0.0) if with_gaps else ()}
