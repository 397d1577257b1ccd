"""Predicts in the ingress how much KV memory a request takes, by tokenizing its prompt."""

import asyncio
import hashlib
import json
import logging
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from adakv_worker.config import FULL, CompressionConfig
from adakv_worker.options import RequestOptions
from router.footprint import Budget, Footprint, OutputQuantiles, predict, prefix_hashes
from serving.config import AppConfig
from serving.http.asgi import Message
from serving.models.embedded import model_path_and_name

logger = logging.getLogger("ray.serve")

_PATHS = ("/v1/chat/completions", "/v1/completions")
# Longer texts are estimated: tokenizing them would delay the prompts behind them.
_LONGEST_TEXT_BYTES = 1 << 20
_BYTES_PER_TOKEN = 4
# The first event of a chat has the role, the last is [DONE].
_EVENTS_WITHOUT_TOKEN = 2


class _Prompt(NamedTuple):
    """A prompt's length and the prefix hashes of its full blocks."""

    tokens: int
    block_hashes: tuple[int, ...]


class OutputCounter:
    """Counts the tokens of a passing answer: by its usage, else by its stream's events."""

    _USAGE = re.compile(rb'"completion_tokens": ?(\d+)')

    def __init__(self) -> None:
        self._events = 0
        self._usage = 0

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return self._usage or max(0, self._events - _EVENTS_WITHOUT_TOKEN)

    def see(self, batch: list[Message]) -> None:
        """Count the tokens of the next response messages."""
        for message in batch:
            if body := message.get("body", b""):
                self._events += body.count(b"data: ")
                if found := self._USAGE.search(body):
                    self._usage = int(found[1])


class FootprintPredictor:
    """Predicts footprints off the event loop, with the model's own tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        compression: CompressionConfig | None,
        block_size_tokens: int,
        outputs: OutputQuantiles,
        remembered_prompts: int = 512,
    ) -> None:
        """
        Args:
            tokenizer: a tokenizer of transformers.
            compression: None if compression is off.
            remembered_prompts: number of recent prompts that are not tokenized again.
        """
        self._tokenizer = tokenizer
        self._compression = compression
        self._block_size_tokens = block_size_tokens
        self._outputs = outputs
        self._remembered_prompts = remembered_prompts
        self._prompts: OrderedDict[bytes, _Prompt] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def footprint(self, path: str, body: bytes) -> Footprint | None:
        """Return a request's footprint; None if it generates nothing or is malformed."""
        if path not in _PATHS:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._predict, body)

    def note_output(self, tokens: int) -> None:
        """Learn the length of an answer that has ended."""
        self._outputs.note(tokens)

    def _predict(self, body: bytes) -> Footprint | None:
        try:
            request = json.loads(body)
            prompt = self._prompt(request)
            budget = self._budget(request)
            asked = request.get("max_completion_tokens") or request.get("max_tokens")
            return predict(
                prompt.tokens,
                self._outputs.expected(asked),
                budget,
                self._block_size_tokens,
                prompt.block_hashes,
                answers=request.get("n") or 1,
                most_output_tokens=asked,
            )
        except Exception as error:
            # The engine refuses a malformed request with a better message.
            logger.debug("no footprint: %s", error)
            return None

    def _budget(self, request: dict[str, Any]) -> Budget | None:
        if self._compression is None:
            return None
        budget = RequestOptions.of(request.get("vllm_xargs")).budget(self._compression)
        if budget.choice.preset == FULL:
            return None
        return Budget(budget.budget_tokens, budget.keep_ratio, budget.decode, budget.limit)

    def _prompt(self, request: dict[str, Any]) -> _Prompt:
        given: dict[str, Any] = {
            name: request[name] for name in ("prompt", "messages", "tools") if name in request
        }
        text = json.dumps(given).encode()
        if len(text) > _LONGEST_TEXT_BYTES:
            return _Prompt(len(text) // _BYTES_PER_TOKEN, ())
        key = hashlib.sha256(text).digest()
        known = self._prompts.get(key)
        if known is None:
            ids = self._token_ids(given)
            known = _Prompt(len(ids), prefix_hashes(ids, self._block_size_tokens))
            self._prompts[key] = known
            if len(self._prompts) > self._remembered_prompts:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return known

    def _token_ids(self, given: dict[str, Any]) -> list[int]:
        ids: list[int]
        if "messages" in given:
            text = self._tokenizer.apply_chat_template(
                given["messages"],
                tools=given.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
            )
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        elif isinstance(prompt := given["prompt"], str):
            ids = self._tokenizer.encode(prompt)
        elif all(isinstance(item, int) for item in prompt):
            ids = prompt
        else:
            # Several prompts in one request run on one replica, side by side.
            ids = [token for one in prompt for token in self._token_ids({"prompt": one})]
        return ids


def footprint_predictor(config: AppConfig) -> FootprintPredictor:
    """Return a predictor with the configured model's tokenizer."""
    # A slow import, needed only in an ingress that predicts.
    from transformers import AutoTokenizer

    path, _ = model_path_and_name(config.model)
    compression = config.compression
    return FootprintPredictor(
        AutoTokenizer.from_pretrained(config.engine.get("tokenizer") or path),
        compression if compression and compression.enabled else None,
        config.block_size_tokens,
        OutputQuantiles(config.routing.prior_output_tokens),
    )
