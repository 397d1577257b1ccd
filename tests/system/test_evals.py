"""Answer quality over HTTP."""

from collections.abc import Iterator

import httpx
import pytest
from transformers import AutoTokenizer

from adakv_serve.evals.answering.http import HttpServer
from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.samples import tokenize
from adakv_serve.evals.tasks import samples
from adakv_serve.serving.models.embedded import embedded_model_path
from tests.system.deployment import API_KEY, Deployment


@pytest.fixture
def server(deployment: Deployment) -> Iterator[HttpServer]:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    server = HttpServer(deployment.base_url, tokenizer, API_KEY)
    yield server
    server.close()


@pytest.mark.parametrize("task", ["factbook", "continuation"])
def test_a_server_answers_whole_and_compressed(server: HttpServer, task: str) -> None:
    (sample,) = samples(task, server.tokenizer, 400, 1)
    tokens = tokenize(sample, server.tokenizer, "aware")
    little = Choice("ada_snapkv", tokens=64)
    found = server.outcomes(sample, tokens, [little])
    # The prompt is token for token what an engine in this process is asked.
    assert found[Choice(FULL)].kept_tokens == len(tokens.prompt)
    assert found[little].kept_tokens == 64
    assert all(outcome.predicted for outcome in found.values())


def test_what_a_server_refuses_is_told_with_its_reason(server: HttpServer) -> None:
    (sample,) = samples("factbook", server.tokenizer, 400, 1)
    tokens = tokenize(sample, server.tokenizer, "aware")
    with pytest.raises(httpx.HTTPStatusError, match="unknown policy"):
        server.outcomes(sample, tokens, [Choice("no_such_policy", tokens=64)])
