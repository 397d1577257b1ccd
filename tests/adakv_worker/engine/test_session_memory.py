"""Sessions in engines with other settings: each test has one of its own."""

from pathlib import Path

from tests.adakv_worker.conversation import SESSIONS, Conversation
from tests.adakv_worker.engines import Engine, Reference, prompt


def test_all_turns_may_be_compressed_again(in_process: None, gqa_model: Path) -> None:
    sessions = {**SESSIONS, "compress": "all"}
    engine = Engine(gqa_model, {"budget_tokens": 64, "keep_ratio": 0.0, "sessions": sessions})
    talk = Conversation(engine, Reference(gqa_model))
    last = talk.turn(prompt(300, seed=60))
    for turn in range(3):
        last = talk.turn([*last.prompt, *last.tokens, *prompt(50, seed=61 + turn)])
        assert talk.resumed == len(last.prompt) - 51
        assert talk.proof["kept_mean"] == 64
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


def test_held_caches_make_nobody_wait(in_process: None, gqa_model: Path) -> None:
    # 31 blocks: each prompt takes 10, and then 6.
    engine = Engine(
        gqa_model, {"budget_tokens": 48, "keep_ratio": 0.5, "sessions": SESSIONS},
        kv_cache_memory_bytes=32 * 4 * 2 * 32 * 2 * 32 * 4, max_model_len=512,
    )  # fmt: skip
    assert engine.free_blocks == 31
    for number in range(12):
        (result,) = engine.run([prompt(300, seed=90 + number)], engine.params(max_tokens=8))
        assert result.proof is not None
        assert result.proof["skipped"] is None
        assert engine.free_blocks == 31
        assert 0 < engine.manager.held.blocks <= 31
    assert engine.preemptions == 0
    results = engine.run(
        [prompt(300, seed=110 + number) for number in range(6)], engine.params(max_tokens=60)
    )
    assert [len(result.tokens) for result in results] == [60] * 6
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


def test_a_cache_comes_back_from_the_host(in_process: None, gqa_model: Path) -> None:
    # 31 blocks: a second conversation overwrites what the first one has left.
    sessions = {**SESSIONS, "host_bytes": 64 << 20}
    engine = Engine(
        gqa_model, {"budget_tokens": 48, "keep_ratio": 0.5, "sessions": sessions},
        kv_cache_memory_bytes=32 * 4 * 2 * 32 * 2 * 32 * 4, max_model_len=768,
    )  # fmt: skip
    reference = Reference(gqa_model)
    talks = [Conversation(engine, reference) for _ in range(5)]
    last = [talk.turn(prompt(300, seed=130 + number)) for number, talk in enumerate(talks)]
    sources = []
    for turn in range(2):
        for number, talk in enumerate(talks):
            before = last[number]
            new = prompt(60, seed=140 + 10 * turn + number)
            # The client cuts the end of each second answer.
            answer = before.tokens[: 12 - 5 * (number % 2)]
            last[number] = talk.turn([*before.prompt, *answer, *new])
            assert talk.resumed > 300
            sources.append(talk.proof["session"]["source"])
    assert sources.count("host") >= 5
    # Two branches of one that is on the host.
    branch = Conversation(engine, reference)
    branch.tokens, branch.seen, branch._kept = talks[0].tokens, talks[0].seen, talks[0]._kept
    asked = [[*last[0].prompt, *last[0].tokens, *prompt(20, seed=160 + n)] for n in range(2)]
    params = engine.params(max_tokens=12)
    for talk, result in zip((talks[0], branch), engine.run(asked, params), strict=True):
        talk.note(result)
        assert talk.proof["session"]["source"] == "host"
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


def test_a_client_that_names_its_session_keeps_its_cache_longer(
    in_process: None, gqa_model: Path
) -> None:
    sessions = {**SESSIONS, "max_held": 2}
    engine = Engine(gqa_model, {"budget_tokens": 48, "keep_ratio": 0.5, "sessions": sessions})
    core, prompts = engine.llm.llm_engine, [prompt(300, seed=170 + n) for n in range(3)]
    for number, ids in enumerate(prompts):
        name = "a session" if number == 0 else None
        params = engine.params(max_tokens=8)
        core.add_request(str(number), {"prompt_token_ids": ids}, params, session_id=name)
        while core.has_unfinished_requests():
            core.step()
        engine.flush()
    turns = [
        proof["session"]["turn"]
        for ids in (prompts[0], prompts[1])
        for result in engine.run([[*ids, *prompt(40, seed=180)]])
        if (proof := result.proof) is not None
    ]
    assert turns == [2, 1]
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()
