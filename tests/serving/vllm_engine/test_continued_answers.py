"""Answers that go on at a real engine from tokens that another one has decoded."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adakv_serve.serving.http.asgi import Message
from adakv_serve.serving.http.continued_streams import ContinuedStreams
from adakv_serve.serving.http.failures import ReplicaLost
from adakv_serve.serving.http.followed import BEGUN_WITH, parted
from adakv_serve.serving.http.replica_answers import ReplicaAnswers
from adakv_serve.serving.http.sse import JsonObject, data_of, split_events
from adakv_worker.config import CompressionConfig
from tests.adakv_worker.engines import VOCABULARY, make_tiny_model
from tests.serving.vllm_engine.test_host import OPTIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "Once upon a time there was a house"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT, "/v1/completions": {"prompt": TEXT},
}  # fmt: skip
# More than the prompt's budget with its answer, but the prompt alone stays whole.
TOKENS = 60


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model whose tokens are bytes, of which many are no character by themselves."""
    folder = make_tiny_model(tmp_path_factory.mktemp("bytes"), heads=6, kv_heads=2)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"w{number}" for number in range(VOCABULARY - len(alphabet))]
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


# What the chunk that ends an answer has.
_END = b'"finish_reason":"'


class Replica:
    """A backend with one engine, whose answers break off after some tokens."""

    def __init__(self, answers: ReplicaAnswers) -> None:
        self._answers = answers
        self.breaks_after: list[int] = []
        self.begun: list[list[int]] = []

    async def ping(self) -> None: ...

    async def stream(
        self, scope: Any, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        self.begun.append(scope[BEGUN_WITH])
        most = self.breaks_after.pop(0) if self.breaks_after else None
        seen = 0
        async with aclosing(self._answers.answer(scope, body)) as batches:
            async for batch in batches:
                yield batch
                if any(_END in one.get("body", b"") for one in batch):
                    # On a busy machine tokens come together. This answer does not break any more.
                    most = None
                tokens = parted(batch)[1]
                # Of answers whose tokens nobody follows, the batches count.
                seen += 1 if tokens is None else len(tokens)
                if most is not None and seen >= most:
                    raise ReplicaLost


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["ours", "stock"])
async def replica(
    request: pytest.FixtureRequest, in_process: None, bytes_model: Path
) -> AsyncIterator[Replica]:
    from adakv_serve.serving.vllm_engine.host import VllmHost

    compression = CompressionConfig(
        budget_tokens=48, keep_ratio=0.0, window_tokens=16, min_budget_tokens=32
    )
    options = {**OPTIONS, "enable_prefix_caching": True}
    host = await VllmHost.start(
        str(bytes_model), "tiny", options, {}, compression if request.param == "ours" else None
    )
    yield Replica(ReplicaAnswers(host.app, lambda: host.dead, "one"))
    host.shutdown()


class Seen(NamedTuple):
    text: str
    finish_reason: str | None
    stop_reason: Any
    usage: JsonObject | None
    counts: list[int]
    ids: list[int]
    begun: list[list[int]]


async def ask(replica: Replica, path: str, breaks_after: list[int], **options: Any) -> Seen:
    replica.breaks_after, replica.begun = list(breaks_after), []
    backend = ContinuedStreams(replica, logging.getLogger("test"))
    body = {
        "model": "tiny", "stream": True, "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, **BODIES[path], **options,
    }  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"asked")],
    }  # fmt: skip
    stream = b""
    async for batch in backend.stream(scope, json.dumps(body).encode(), lambda tokens: None):
        for message in batch:
            assert message.get("status", 200) == 200
            stream += message.get("body", b"")
    return _seen(stream, replica.begun)


def _seen(stream: bytes, begun: list[list[int]]) -> Seen:
    text, reason, stop, usage = "", None, None, None
    counts: list[int] = []
    ids: list[int] = []
    heads = set()
    events, rest = split_events(stream)
    assert rest == b""
    assert events[-1] == b"data: [DONE]\n\n"
    for event in events[:-1]:
        data = data_of(event)
        assert data is not None
        assert "error" not in data, data
        heads.add((data["id"], data["created"]))
        if not data["choices"]:
            usage = data["usage"]
        for choice in data["choices"]:
            text += choice.get("delta", choice).get("content") or choice.get("text") or ""
            reason = choice["finish_reason"] or reason
            stop = choice.get("stop_reason") or stop
            ids += choice.get("token_ids") or []
            if data.get("usage"):
                counts.append(data["usage"]["completion_tokens"])
    assert len(heads) == 1
    return Seen(text, reason, stop, usage, counts, ids, begun)


WITH_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("path", "options"),
    [
        *((path, {}) for path in BODIES),
        *((path, {"return_token_ids": True}) for path in BODIES),
        *((path, {"repetition_penalty": 1.3}) for path in BODIES),
        ("/v1/completions", {"echo": True}),
    ],
)
async def test_wherever_it_breaks_off_a_greedy_answer_is_the_same(
    replica: Replica, path: str, options: dict[str, Any]
) -> None:
    options = {**WITH_USAGE, **options}
    whole = await ask(replica, path, [], **options)
    assert whole.usage is not None
    assert whole.usage["completion_tokens"] == TOKENS
    assert "\ufffd" in whole.text
    attempts = []
    for moments in ([1], [2], [3], [17], [18], [40], [TOKENS - 1], [5, 5, 5]):
        broken = await ask(replica, path, moments, **options)
        attempts.append(len(broken.begun))
        assert broken.text == whole.text, moments
        assert (broken.finish_reason, broken.usage) == ("length", whole.usage)
        assert broken.ids == whole.ids
        assert broken.counts == sorted(set(broken.counts))
        assert broken.counts[-1] == TOKENS
    assert max(attempts) > 1


@pytest.mark.parametrize("path", BODIES)
async def test_a_stop_string_across_the_cut_is_found(replica: Replica, path: str) -> None:
    whole = await ask(replica, path, [])
    stop = whole.text[20:26]
    stopped = await ask(replica, path, [], stop=[stop], **WITH_USAGE)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stop not in stopped.text
    assert stopped.usage is not None
    for moment in range(1, stopped.usage["completion_tokens"] - 1, 3):
        broken = await ask(replica, path, [moment], stop=[stop], **WITH_USAGE)
        assert broken[:4] == stopped[:4], moment


@pytest.mark.parametrize("path", BODIES)
async def test_a_sampled_answer_goes_on_to_its_limit(replica: Replica, path: str) -> None:
    options = {"temperature": 1.0, "seed": 4, "return_token_ids": True, **WITH_USAGE}
    answer = await ask(replica, path, [1], **options)
    assert len(answer.begun) == 2
    assert (answer.finish_reason, len(answer.ids)) == ("length", TOKENS)
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == TOKENS
    assert answer.ids[: len(answer.begun[1])] == answer.begun[1]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 1},
        {"structured_outputs": {"regex": "a+"}},
    ],
    ids=["n", "logprobs", "structured"],
)  # fmt: skip
async def test_what_is_more_than_its_tokens_ends_with_the_loss(
    replica: Replica, path: str, options: dict[str, Any]
) -> None:
    if path == "/v1/completions" and "logprobs" in options:
        options = {"logprobs": 1}
    with pytest.raises(ReplicaLost):
        await ask(replica, path, [1], **options)
    assert replica.begun == [[]]
