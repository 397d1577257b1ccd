"""The chaos run: its plan, how requests are judged, recoveries, and what a fault may cost."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adakv_serve.loadtest.chaos import Disturbed
from adakv_serve.loadtest.client.token_answers import Answer
from adakv_serve.loadtest.faults.asking import Asked, Known, Outcome, Questions, Reply, Users
from adakv_serve.loadtest.faults.kinds import KINDS, Kind, kinds_for, plan
from adakv_serve.loadtest.faults.recovery import Living, Recovery
from adakv_serve.loadtest.faults.windows import Struck, Window, summary, sums, table, windows
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch


def test_a_plan_is_the_same_for_a_seed_and_does_all_before_it_repeats() -> None:
    names = list(KINDS)
    planned = plan(3, names, 2 * len(names) + 1)
    assert planned == plan(3, names, 2 * len(names) + 1)
    assert planned != plan(4, names, 2 * len(names) + 1)
    assert sorted(planned[: len(names)]) == sorted(names)
    assert len(planned) == 2 * len(names) + 1


def test_the_documentation_states_what_each_kind_may_cost() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    section = text.partition("## What each kind may cost")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    stated = [[cell.strip() for cell in (line[0], *line[2:])] for line in lines[1:]]
    assert stated == [
        [
            name, "yes" if kind.loses else "no", f"{kind.serves_within_s:.0f} s",
            f"{kind.whole_within_s:.0f} s",
        ]
        for name, kind in KINDS.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "parts", "lacks"),
    [
        (2, True, set()),
        (1, True, {"kill raylet", "kill node"}),
        (1, False, {"kill raylet", "kill node", "part from Valkey"}),
    ],
)
def test_kinds_that_a_deployment_cannot_be_struck_by_are_left_out(
    nodes: int, parts: bool, lacks: set[str]
) -> None:
    assert set(KINDS) - set(kinds_for(nodes, parts=parts)) == lacks


BODIES = [{"model": "fake", "prompt": "Once", "max_tokens": 3}]
ANSWER = Answer([1, 2, 3], None, None, [1.0, 1e-6, 1.0])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], Outcome.RIGHT),
        ([1, 9, 9], Outcome.TIE),
        ([9, 2, 3], Outcome.WRONG),
        ([1, 2, 9], Outcome.WRONG),
        ([1, 2], Outcome.WRONG),
        ([], Outcome.WRONG),
    ],
)
def test_an_answer_is_compared_with_the_undisturbed_one(
    tokens: list[int], expected: Outcome
) -> None:
    assert Questions(BODIES, [Known(ANSWER)]).judge(0, Reply(tokens)) == expected


@pytest.mark.parametrize(
    ("tokens", "cached", "expected"),
    [
        # As undisturbed.
        ([1, 2, 3], 100, Outcome.RIGHT),
        ([1, 2, 9], 100, Outcome.WRONG),
        # Compressed anew with two tokens of the answer: the third may be another one.
        ([1, 2, 3], 102, Outcome.RIGHT),
        ([1, 2, 9], 102, Outcome.CONTINUED),
        ([9, 2, 3], 102, Outcome.WRONG),
        ([1, 9, 9], 102, Outcome.TIE),
        ([9, 9, 9], 101, Outcome.WRONG),
        ([1, 2], 102, Outcome.WRONG),
        # Never compressed.
        ([1, 2, 9], None, Outcome.WRONG),
    ],
)
def test_a_continued_answer_is_compared_up_to_the_loss_of_its_cache(
    tokens: list[int], cached: int | None, expected: Outcome
) -> None:
    skipped = "within_budget" if cached is None else None
    proof = {"original_tokens": cached or 100, "skipped": skipped}
    questions = Questions(BODIES, [Known(ANSWER, compressed_tokens=100)])
    assert questions.judge(0, Reply(tokens, proof)) == expected


@pytest.mark.parametrize(
    ("tokens", "skipped", "cached", "expected"),
    [
        ([4, 5, 6], "shared_prefix", 100, Outcome.RIGHT),
        ([1, 2, 3], "shared_prefix", 100, Outcome.WRONG),
        ([4, 5, 6], None, 100, Outcome.WRONG),
        # Compressed first, and whole after the loss of its cache.
        ([1, 2, 9], "no_room", 102, Outcome.CONTINUED),
    ],
)
def test_an_answer_that_stayed_whole_is_compared_with_the_whole_one(
    tokens: list[int], skipped: str | None, cached: int, expected: Outcome
) -> None:
    whole = Answer([4, 5, 6], None, None, [1.0, 1.0, 1.0])
    questions = Questions(BODIES, [Known(ANSWER, compressed_tokens=100, whole=whole)])
    proof = {"original_tokens": cached, "skipped": skipped}
    assert questions.judge(0, Reply(tokens, proof)) == expected


def test_a_wrong_answer_is_described_by_its_first_difference_and_its_cache() -> None:
    questions = Questions(BODIES, [Known(ANSWER, compressed_tokens=100)])
    proof = {"original_tokens": 101, "skipped": None}
    text = questions.describe(0, Reply([1, 9, 3], proof))
    assert "at 1 differs" in text
    assert "1e-06 apart" in text
    assert "101 tokens cached" in text
    assert "100 undisturbed" in text
    assert "differs" not in questions.describe(0, Reply([1, 2], proof))


def test_an_answer_whose_prompt_was_not_compressed_alone_is_compared_to_its_end() -> None:
    proof = {"original_tokens": 102, "skipped": None}
    questions = Questions(BODIES, [Known(ANSWER)])
    assert questions.judge(0, Reply([1, 2, 9], proof)) == Outcome.WRONG


async def test_questions_are_learnt_with_what_was_compressed() -> None:
    client = httpx.AsyncClient(
        base_url="http://fake", transport=httpx.MockTransport(Server("good"))
    )
    questions = await Questions.learn(client, "fake", 1, 3)
    proof = {"original_tokens": 102, "skipped": None}
    # The server's answers have 100 compressed tokens, and no ties.
    assert questions.judge(0, Reply([1, 2, 4], proof)) == Outcome.CONTINUED
    assert questions.judge(0, Reply([1, 2, 4], {**proof, "original_tokens": 100})) == Outcome.WRONG


PROOF = {"original_tokens": 100, "skipped": None}


class Server:
    """Answers completions in one way."""

    def __init__(self, way: str) -> None:
        self.way = way

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        # Let other tasks run, like a socket.
        await asyncio.sleep(0)
        if request.url.path == "/health":
            return httpx.Response(503 if self.way == "unhealthy" else 200)
        body = json.loads(request.content)
        tokens = [1, 9, 3] if self.way == "wrong" else [1, 2, 3]
        match self.way:
            case "hang":
                await asyncio.Event().wait()
            case "full":
                return httpx.Response(503, headers={"retry-after": "1"})
            case "unstated":
                return httpx.Response(503)
            case "gone":
                raise httpx.ConnectError("no")
        if not body.get("stream"):
            tops = [{"a": -0.1, "b": -2.0}] * 3
            choice = {"token_ids": tokens, "logprobs": {"top_logprobs": tops}}
            return httpx.Response(200, json={"choices": [choice], "kv_compression": PROOF})
        lines = [f"data: {json.dumps({'choices': [{'text': 'a', 'token_ids': tokens}]})}"]
        match self.way:
            case "broken":
                lines.append('data: {"error": {"message": "died"}}')
            case "cut":
                pass
            case _:
                lines.append("data: [DONE]")
        return httpx.Response(200, text="\n\n".join(lines) + "\n\n")


def users_of(way: str) -> Users:
    client = httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(Server(way)))
    answer = ANSWER if way != "wrong" else Answer([1, 2, 3], None, None, [1.0, 1.0, 1.0])
    return Users(client, Questions(BODIES, [Known(answer)]), hang_s=0.1)


@pytest.mark.parametrize(
    ("way", "stream", "expected"),
    [
        ("good", True, Outcome.RIGHT),
        ("good", False, Outcome.RIGHT),
        ("wrong", True, Outcome.WRONG),
        ("wrong", False, Outcome.WRONG),
        ("broken", True, Outcome.FAILED),
        ("unstated", False, Outcome.FAILED),
        ("full", True, Outcome.REFUSED),
        ("cut", True, Outcome.CUT),
        ("gone", False, Outcome.CUT),
        ("hang", True, Outcome.HUNG),
        ("hang", False, Outcome.HUNG),
    ],
)
async def test_what_becomes_of_a_request(way: str, stream: bool, expected: Outcome) -> None:
    asked = await users_of(way).ask(0, stream=stream)
    assert asked.outcome == expected
    assert asked.ended_s >= asked.began_s


async def test_users_ask_until_they_are_stopped() -> None:
    users = users_of("good")
    running = asyncio.create_task(users.run(3, seed=0))
    while len(users.asked) < 10:
        await asyncio.sleep(0)
    users.stop()
    await running
    assert {one.outcome for one in users.asked} == {Outcome.RIGHT}


def asked(began_s: float, ended_s: float, outcome: Outcome = Outcome.RIGHT) -> Asked:
    return Asked(began_s, ended_s, outcome, "why")


def struck(name: str = "a", at_s: float = 0.0, whole_s: float | None = 1.0) -> Struck:
    return Struck(name, at_s, at_s, whole_s)


def test_requests_belong_to_the_last_fault_before_their_end() -> None:
    faults = [struck("kill engine", 10.0, 3.0), struck("flush Valkey", 20.0, None)]
    requests = [
        asked(1, 9, Outcome.WRONG),
        asked(9, 11, Outcome.FAILED),
        asked(12, 13),
        asked(14, 15, Outcome.CONTINUED),
        asked(19, 21, Outcome.TIE),
        asked(21, 22, Outcome.HUNG),
    ]
    made = windows(faults, requests, slow_s=5.0)
    first, second = made
    assert (first.under_way, second.under_way) == (1, 1)
    assert first.outcomes == {Outcome.FAILED: 1, Outcome.RIGHT: 1, Outcome.CONTINUED: 1}
    assert first.reasons == {"failed: why": 1}
    assert second.outcomes == {Outcome.TIE: 1, Outcome.HUNG: 1}
    rows = [row.split() for row in table(made, began_s=8.0)]
    assert rows[1][2:] == ["2.0", "1", "2", "1", "0", "1", "0", "0", "0", "0.0", "3.0"]
    assert rows[2][2:] == ["12.0", "1", "1", "0", "0", "0", "0", "1", "0", "1.0", "never"]


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([asked(10, 12)], 0.0),
        # Under way when the fault came: it counts as failed, and not as a time without service.
        ([asked(8, 12, Outcome.FAILED)], 0.0),
        ([asked(11, 12, Outcome.FAILED), asked(13, 14)], 1.0),
        ([asked(11, 12, Outcome.REFUSED), asked(12.5, 13, Outcome.CUT), asked(14, 15)], 2.5),
        # Right, but late.
        ([asked(11, 15.9), asked(12, 17.1), asked(13, 14)], 2.0),
    ],
)
def test_the_fleet_serves_again_after_the_last_request_with_an_error_or_a_delay(
    requests: list[Asked], expected: float
) -> None:
    # The fault came at 9, and was undone at 10.
    (window,) = windows([Struck("a", 9.0, 10.0, 3.0)], requests, slow_s=5.0)
    assert window.serves_s == expected


def test_faults_of_a_kind_are_summed_with_their_longest_recoveries() -> None:
    faults = [struck("a", 10.0, 3.0), struck("b", 20.0, None), struck("a", 30.0, 7.0)]
    requests = [
        asked(9, 11, Outcome.FAILED),
        asked(12, 13, Outcome.CUT),
        asked(21, 22, Outcome.HUNG),
        asked(29, 31, Outcome.WRONG),
        asked(35, 36, Outcome.REFUSED),
    ]
    first, second = rows = sums(windows(faults, requests, slow_s=5.0))
    assert first == ("a", 2, 2, 3, 0, 1, 5.0, 7.0)
    assert second == ("b", 1, 0, 0, 1, 0, 1.0, None)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary(rows)]
    assert lines[0][0] == "kind"
    assert lines[2] == ["a", "2", "2", "3", "0", "1", "5.0", "7.0"]
    assert lines[3][-1] == "never"


async def _nothing(scene: Any) -> tuple[()]:
    return ()


@pytest.mark.parametrize(
    ("outcome", "loses", "is_problem"),
    [
        (Outcome.RIGHT, False, False),
        (Outcome.TIE, False, False),
        (Outcome.FAILED, True, False),
        (Outcome.CUT, True, False),
        (Outcome.REFUSED, True, False),
        (Outcome.FAILED, False, True),
        (Outcome.CUT, False, True),
        (Outcome.REFUSED, False, True),
        (Outcome.HUNG, True, True),
        (Outcome.WRONG, True, True),
    ],
)
def test_what_a_fault_must_not_do(outcome: Outcome, loses: bool, is_problem: bool) -> None:
    window = Window(struck(), 0, Counter([outcome]), Counter(), 0.0)
    assert bool(window.problems(Kind(_nothing, loses=loses))) is is_problem


@pytest.mark.parametrize(
    ("serves_s", "whole_s", "is_problem"),
    [(1.9, 3.9, False), (2.1, 3.9, True), (1.9, 4.1, True), (1.9, None, True)],
)
def test_a_recovery_must_be_quick(serves_s: float, whole_s: float | None, is_problem: bool) -> None:
    window = Window(struck(whole_s=whole_s), 0, Counter(), Counter(), serves_s)
    kind = Kind(_nothing, serves_within_s=2, whole_within_s=4)
    assert bool(window.problems(kind)) is is_problem


def test_what_a_fault_has_seen_itself_is_a_problem() -> None:
    window = Window(struck()._replace(seen=["half an answer"]), 0, Counter(), Counter(), 0.0)
    assert window.problems(Kind(_nothing)) == ["half an answer"]


def test_what_is_left_over_is_a_problem_of_the_run() -> None:
    window = Window(struck("kill engine"), 0, Counter(), Counter(), 0.0)
    assert Disturbed([window], 0.0, []).problems == []
    assert Disturbed([window], 0.0, ["a process"]).problems == ["a process"]


def reports(*ids: str) -> list[dict[str, Any]]:
    return [{"id": one, "epoch": 1} for one in ids]


def recovery_of(way: str, seen: list[frozenset[Living]]) -> tuple[Recovery, OccupancyWatch]:
    """A fleet of two at the start, and the watch through which it is seen."""
    watch = OccupancyWatch()
    watch.looks.append(Look(0.0, reports("a", "b")))
    users = users_of(way)
    client = httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(Server(way)))
    looks = iter(seen)
    return Recovery(client, watch, users, 60.0, lambda: next(looks, seen[-1]), 0.1), watch


def engines(*pids: int) -> frozenset[Living]:
    return frozenset(Living("engine", pid) for pid in pids)


TWO, ONE, NEW = engines(1, 2), engines(1), engines(1, 3)


@pytest.mark.parametrize(
    ("way", "ids", "seen", "recovers"),
    [
        ("good", "ac", [TWO, TWO, NEW], True),
        ("good", "a", [TWO, TWO, NEW], False),
        # The report of the lost one still counts.
        ("good", "ab", [TWO, TWO, NEW], False),
        ("good", "ac", [TWO, TWO, ONE], False),
        # The lost one lives on for a while.
        ("good", "ac", [TWO, TWO, TWO], False),
        # A new one is there after two looks.
        ("good", "ac", [TWO, TWO, TWO, ONE, NEW], True),
        ("unhealthy", "ac", [TWO, TWO, NEW], False),
        ("wrong", "ac", [TWO, TWO, NEW], False),
        ("full", "ac", [TWO, TWO, NEW], False),
    ],
)
async def test_a_fleet_has_recovered_when_all_is_as_before(
    way: str, ids: str, seen: list[frozenset[Living]], recovers: bool
) -> None:
    recovery, watch = recovery_of(way, seen)
    before = recovery.before()
    watch.looks.append(Look(1.0, reports(*ids)))
    timeout_s = 60.0 if recovers else 0.6
    found = await recovery.wait(time.monotonic(), "engine", before, timeout_s)
    assert (found is not None) is recovers


async def test_a_fault_that_ends_nothing_is_over_when_all_is_well() -> None:
    recovery, _ = recovery_of("good", [TWO])
    before = recovery.before()
    assert await recovery.wait(time.monotonic(), None, before, 60.0) is not None


async def test_a_fault_waits_for_all_reports_after_the_one_before_it() -> None:
    recovery, watch = recovery_of("good", [TWO])
    watch.looks.append(Look(1.0, []))
    waiting = asyncio.create_task(recovery.all_report())
    await asyncio.sleep(0)
    assert not waiting.done()
    watch.looks.append(Look(2.0, reports("a", "b")))
    await waiting
    watch.looks.append(Look(3.0, reports("a")))
    await recovery.all_report(timeout_s=0.1)


def test_processes_that_are_left_over_are_named() -> None:
    assert recovery_of("good", [TWO])[0].left_over() is None
    assert "'engine': -1" in str(recovery_of("good", [TWO, ONE])[0].left_over())
    more = TWO | {Living("haproxy", 3)}
    assert "'haproxy': 1" in str(recovery_of("good", [TWO, more])[0].left_over())


class _Scene:
    def __init__(self, process: psutil.Process) -> None:
        self._process = process

    def one(self, role: str) -> psutil.Process:
        return self._process


async def test_a_paused_process_goes_on_afterwards() -> None:
    code = "print(1, flush=True); input(); print(2, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        scene: Any = _Scene(process)
        striking = asyncio.create_task(KINDS["pause engine"].strike(scene))
        while process.status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        await striking
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.stdout.readline() == b"2\n"
