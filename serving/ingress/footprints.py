"""Predicts in the ingress how much KV memory a request takes, by rendering its prompt."""

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from adakv_serve.router.footprint import Budget, Footprint, OutputQuantiles, predict, prefix_hashes
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.rendered import NotRendered, Rendered, Renderer
from adakv_serve.serving.ingress.sender import Sender
from adakv_serve.serving.models.embedded import model_path_and_name
from adakv_worker.config import FULL, CompressionConfig
from adakv_worker.options import RequestOptions
from adakv_worker.salts import seed_hash, tenant_salt

logger = logging.getLogger("ray.serve")

# Longer bodies are not parsed: to parse lists of tokens holds all threads of this process.
_LONGEST_BODY_BYTES = 1 << 20
# Bodies that are rendered at once; others that come meanwhile are estimated.
_MOST_BYTES_AT_ONCE = 4 << 20
_BYTES_PER_TOKEN = 4
# Tokens of all requests that are not rendered again, of 40 bytes each in Python's lists.
_MOST_REMEMBERED_TOKENS = 1 << 20
# Threads that tokenize, so that short prompts need not wait for a long one.
_WORKERS = 4
# Answers of a class from which on they say more than those of all requests.
_ENOUGH_OUTPUTS = 8
# vLLM's own limit of `n`, unless the operator raises it.
_MOST_ANSWERS = 16384


class Prediction(NamedTuple):
    """What is known of a request before it is sent.

    footprint: None if it generates nothing or is malformed.
    body: the request, with its prompt's ids if the engine takes them.
    kind: the class of requests by whose answers its length is expected.
    answers: number of its answers.
    priority: as in vLLM, a lower number is more important.
    unknown: why its prompt was estimated, or not even that; None if it is known.
    """

    footprint: Footprint | None
    body: bytes
    kind: str = ""
    answers: int = 1
    unknown: str | None = None
    priority: int = 0


_NOBODY = Sender()


class FootprintPredictor:
    """Predicts footprints off the event loop, by rendering requests as the engine does."""

    def __init__(
        self,
        renderer: Renderer,
        compression: CompressionConfig | None,
        block_size_tokens: int,
        prior_output_tokens: int = 256,
        served_name: str | None = None,
        remembered_prompts: int = 512,
        page_tokens: int | None = None,
        remembered_tokens: int = _MOST_REMEMBERED_TOKENS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            compression: None if compression is off.
            prior_output_tokens: expected length of answers before the first.
            served_name: the model's name; requests for another name are for an adapter.
            remembered_prompts: number of recent requests that are not rendered again in the same
                minute. Templates of chats may have the date and the time.
            page_tokens: entries of a compressed page; None for as many as a block has tokens.
            remembered_tokens: most tokens of those requests.
        """
        self._clock = clock
        self._page_tokens = page_tokens
        self._renderer = renderer
        self._compression = compression
        self._block_size_tokens = block_size_tokens
        self._prior_output_tokens = prior_output_tokens
        self._served_name = served_name
        self._remembered_prompts = remembered_prompts
        self._rendered: OrderedDict[bytes, Rendered] = OrderedDict()
        self._most_remembered_tokens = remembered_tokens
        self._remembered_tokens = 0
        self._outputs: dict[str, OutputQuantiles] = {}
        self._bytes_at_once = 0
        # A loop of its own: vLLM's rendering is not all in its threads.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="renderer", daemon=True).start()

    async def predict(self, path: str, body: bytes, sender: Sender = _NOBODY) -> Prediction:
        """Return what is known of a request."""
        if not self._renderer.takes(path):
            return Prediction(None, body, priority=sender.priority)
        size = len(body)
        if size > _LONGEST_BODY_BYTES:
            return self._estimated(path, body, "long", sender)
        if self._bytes_at_once and self._bytes_at_once + size > _MOST_BYTES_AT_ONCE:
            return self._estimated(path, body, "busy", sender)
        self._bytes_at_once += size
        try:
            work = asyncio.run_coroutine_threadsafe(self._predict(path, body, sender), self._loop)
            return await asyncio.wrap_future(work)
        except Exception as error:
            reason = error.reason if isinstance(error, NotRendered) else "malformed"
            logger.debug("not rendered (%s): %r", reason, error)
            if reason == "malformed":
                # The engine refuses it with a better message.
                return Prediction(None, body, unknown=reason, priority=sender.priority)
            if isinstance(error, NotRendered):
                sender = sender.with_body(error.handling)
            return self._estimated(path, body, reason, sender)
        finally:
            self._bytes_at_once -= size

    def note_output(self, kind: str, tokens: int) -> None:
        """Learn the length of an answer that has ended."""
        self._outputs_of(kind).note(tokens)
        if kind:
            self._outputs_of("").note(tokens)

    def _outputs_of(self, kind: str) -> OutputQuantiles:
        if kind not in self._outputs:
            self._outputs[kind] = OutputQuantiles(self._prior_output_tokens)
        return self._outputs[kind]

    def _expected(self, kind: str, most: int | None) -> int:
        known = self._outputs.get(kind)
        if known is None or known.count < _ENOUGH_OUTPUTS:
            known = self._outputs_of("")
        return known.expected(most)

    def _estimated(self, path: str, body: bytes, reason: str, sender: Sender) -> Prediction:
        """Return the footprint of a prompt as long as the request's bytes suggest."""
        kind = _kind(path, None, None)
        tokens = len(body) // _BYTES_PER_TOKEN
        footprint = predict(
            tokens,
            self._expected(kind, None),
            self._budget(None),
            self._block_size_tokens,
            page_tokens=self._page_tokens,
        )
        footprint = footprint._replace(session=sender.session)
        return Prediction(footprint, body, kind, unknown=reason, priority=sender.priority)

    async def _predict(self, path: str, body: bytes, sender: Sender) -> Prediction:
        rendered = await self._render(path, body)
        sender = sender.with_body(rendered.handling, rendered.extra_args)
        budget = self._budget(RequestOptions.of(rendered.extra_args))
        most = rendered.most_output_tokens
        if not 1 <= rendered.answers <= _MOST_ANSWERS or (most is not None and most < 0):
            raise NotRendered("malformed", "a count is out of range")
        kind = _kind(path, most, rendered.model)
        outputs = self._expected(kind, most)
        each = [
            predict(
                len(ids),
                outputs,
                budget,
                self._block_size_tokens,
                answers=rendered.answers,
                most_output_tokens=most,
                page_tokens=self._page_tokens,
            )
            for ids in rendered.prompts
        ]
        longest = max(rendered.prompts, key=len)
        salt = tenant_salt(sender.tenant, rendered.cache_salt)
        seed = seed_hash(salt, self._adapter(rendered.model))
        hashes = prefix_hashes(longest, self._block_size_tokens, seed)
        footprint = Footprint(
            sum(one.peak_blocks for one in each),
            sum(one.steady_blocks for one in each),
            sum(one.prompt_tokens for one in each),
            sum(one.output_tokens for one in each),
            hashes,
            sender.session,
        )
        answers = rendered.answers * len(each)
        body = _with_ids(body, rendered)
        return Prediction(footprint, body, kind, answers, priority=sender.priority)

    async def _render(self, path: str, body: bytes) -> Rendered:
        minute = int(self._clock() // 60)
        key = hashlib.sha256(f"{minute} {path} ".encode() + body).digest()
        known = self._rendered.get(key)
        if known is None:
            known = await self._renderer.render(path, body)
            self._remember(key, known)
        else:
            self._rendered.move_to_end(key)
        return known

    def _remember(self, key: bytes, rendered: Rendered) -> None:
        """Keep a rendered request in place of the oldest ones."""
        # Another task may have rendered the same one.
        if (before := self._rendered.pop(key, None)) is not None:
            self._remembered_tokens -= _tokens(before)
        self._rendered[key] = rendered
        self._remembered_tokens += _tokens(rendered)
        while (
            len(self._rendered) > self._remembered_prompts
            or self._remembered_tokens > self._most_remembered_tokens
        ):
            _, oldest = self._rendered.popitem(last=False)
            self._remembered_tokens -= _tokens(oldest)

    def _adapter(self, model: str | None) -> str | None:
        return None if model == self._served_name else model

    def _budget(self, options: RequestOptions | None) -> Budget | None:
        if self._compression is None:
            return None
        budget = (options or RequestOptions()).budget(self._compression)
        if budget.choice.preset == FULL:
            return None
        return Budget(budget.budget_tokens, budget.keep_ratio, budget.decode, budget.limit)


def _tokens(rendered: Rendered) -> int:
    return sum(map(len, rendered.prompts))


def _kind(path: str, most_output_tokens: int | None, model: str | None) -> str:
    """Return the class of a request: its endpoint, model, and the size of its limit."""
    limit = "" if most_output_tokens is None else most_output_tokens.bit_length()
    return f"{path} {model or ''} {limit}"


def _with_ids(body: bytes, rendered: Rendered) -> bytes:
    """Return a request with its prompt's ids, so that the engine need not render it again."""
    start = body.find(b"{") + 1
    # A zero byte means UTF-16 or UTF-32, into which no ASCII can be inserted.
    if not rendered.takes_ids or len(rendered.prompts) != 1 or not start or b"\0" in body:
        return body
    ids = ",".join(map(str, rendered.prompts[0]))
    given = f'"kv_transfer_params":{{"prompt_token_ids":[{ids}]}},'
    return body[:start] + given.encode() + body[start:]


def footprint_predictor(config: AppConfig) -> FootprintPredictor:
    """Return a predictor with the configured model's renderer, made in some seconds."""
    # A slow import, needed only in an ingress that predicts.
    from adakv_serve.serving.vllm_engine.rendering import VllmRenderer

    path, name = model_path_and_name(config.model)
    compression = config.compression if config.compression and config.compression.enabled else None
    engine = {"renderer_num_workers": _WORKERS, **config.engine}
    renderer = VllmRenderer.of_model(path, name, engine, config.server)
    cache_dtype, page_tokens = str(engine.get("kv_cache_dtype", "auto")), None
    if compression is not None:
        page_tokens = renderer.page_tokens(
            config.block_size_tokens, cache_dtype, compression.chosen_page_dtype
        )
        compression = renderer.in_entries(compression, cache_dtype)
    return FootprintPredictor(
        renderer,
        compression,
        config.block_size_tokens,
        config.routing.prior_output_tokens,
        name,
        page_tokens=page_tokens,
    )
