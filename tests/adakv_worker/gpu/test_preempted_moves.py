"""A moved request that is preempted later still has its prompt and answer apart."""

from pathlib import Path
from typing import Any

import pytest

from adakv_worker.messages import Continuation
from tests.adakv_worker.engine.test_moves import add_continued, run
from tests.adakv_worker.engines import make_tiny_model, prompt
from tests.adakv_worker.gpu.test_backends import Kind, started


@pytest.mark.parametrize("use_v2", [False, True], ids=["V1", "V2"])
@pytest.mark.slow
def test_a_preempted_continuation_ends_as_if_it_had_stayed(tmp_path: Path, use_v2: bool) -> None:
    model = make_tiny_model(tmp_path / "model", heads=4, kv_heads=2, layers=2)
    with started(model, Kind("Flash", use_v2)) as engine:
        core: Any = engine.llm.llm_engine
        ids = prompt(20)
        # It ends with the first of many tokens once its answer is long enough. Its penalties count
        # the answer, but not the prompt.
        params = engine.params(
            max_tokens=60, min_tokens=30, stop_token_ids=list(range(40, 160)),
            presence_penalty=1.0, frequency_penalty=0.5,
        )  # fmt: skip
        core.add_request("staying", {"prompt_token_ids": ids}, params)
        staying = run(engine, "staying")
        tokens = [*ids, *staying.tokens[:10]]
        add_continued(engine, "arriving", tokens, params, Continuation(len(ids)))
        before = run(engine, "arriving", until=6)
        assert core.reset_prefix_cache(reset_running_requests=True)
        after = run(engine, "arriving")
        assert engine.preemptions == 1
        # Outputs have all tokens since it arrived.
        assert after.tokens[: len(before.tokens)] == before.tokens
        assert after.tokens == staying.tokens[10:]
        assert len(staying.tokens) < 60
        engine.flush()
