"""Sessions: which requests begin with a held cache, and which leave one."""

import time
from dataclasses import replace

import numpy as np
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue
from vllm.v1.request import Request

from adakv_serve.kernels.blocks import compressed_blocks_bound
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.config import FULL, SessionsConfig
from adakv_worker.core.floor import Floor, Resumed
from adakv_worker.core.held import Held, Match, ToHold
from adakv_worker.core.held_caches import HeldCaches
from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import Plan, query_span
from adakv_worker.options import RequestBudget
from adakv_worker.session_messages import (
    HELD_MEDIUM,
    HeldCard,
    Hold,
    SessionProof,
    TokenIds,
    scope_of,
)

# Entries that stay of a new turn where earlier ones have used up the budget: as many as those of
# the usual window.
_LEAST_OF_NEWEST = 32


class Sessions:
    """The sessions of one engine core."""

    def __init__(
        self, config: SessionsConfig, manager: AdaKVManager, layers: int, reach_blocks: int
    ) -> None:
        """
        Args:
            layers: attention layers of the model.
            reach_blocks: blocks that one step may allocate.
        """
        pool = manager.block_pool
        usable = pool.num_gpu_blocks - 1
        self._config = config
        self._manager = manager
        self._held = manager.held = HeldCaches(
            pool,
            int(config.share * usable),
            config.max_held,
            config.max_idle_s,
            min(reach_blocks, usable // 4),
            config.patience_s,
            config.host_bytes // (layers * manager.kv_cache_spec.page_size_bytes),
            config.arrival_bytes // (layers * manager.kv_cache_spec.page_size_bytes),
            publish=self._publish,
        )
        self._holds: dict[str, Hold] = {}
        # The held caches that waiting requests will probably begin with.
        self._wanted: dict[str, str] = {}
        # Tokens of waiting requests, which are looked up in each step: a copy of a long prompt
        # takes milliseconds.
        self._tokens: dict[str, TokenIds] = {}

    def await_turn(self, request: Request, budget: RequestBudget) -> None:
        """Note a request that begins to wait: its held cache stays longer than others."""
        if not len(self._held) or not _may_share(request, budget):
            return
        match = self._match(request, budget)
        if match is not None and match.tokens >= self._config.min_saved_tokens:
            self._wanted[request.request_id] = match.held.name
            self._held.refresh(match.held.name)

    def end_wait(self, request_id: str) -> None:
        """Note that a request does not wait any more."""
        self._wanted.pop(request_id, None)
        self._tokens.pop(request_id, None)

    def order(self, waiting: RequestQueue, now_s: float) -> None:
        """Move the requests that resume to the front of the queue, in their order.

        They take few blocks and little time; behind others that overwrite their caches they would
        compute everything. Nobody is overtaken for longer than `overtake_s`.
        """
        if not len(self._held):
            self._wanted.clear()
            return
        overdue_since = now_s - self._config.overtake_s
        # Patience delays requests, so it has a limit even where `overtake_s` is 0.
        longest_s = self._config.overtake_s or self._config.patience_s
        self._held.patient = all(one.arrival_time >= now_s - longest_s for one in waiting)
        wanted = {name for name, held in self._wanted.items() if held in self._held}
        self._wanted = {name: self._wanted[name] for name in wanted}
        if not wanted or not isinstance(waiting, FCFSRequestQueue):
            return

        def rank(request: Request) -> int:
            if request.arrival_time < overdue_since:
                return 0
            return 1 if request.request_id in wanted else 2

        ordered = sorted(waiting, key=rank)
        waiting.clear()
        waiting.extend(ordered)

    def plan(self, request: Request, plan: Plan, budget: RequestBudget, hit_tokens: int) -> Plan:
        """Return a waiting request's plan with the held cache that it should begin with, if any.

        Args:
            plan: its plan without one.
            hit_tokens: tokens that it would take from the prefix cache.
        """
        if not _may_share(request, budget):
            return plan
        match = self._match(request, budget)
        skipped = "no_match"
        if match is not None:
            if match.tokens - hit_tokens >= self._config.min_saved_tokens:
                newest_only = self._config.compress == "newest"
                # One that was preempted goes on with what it had, if it finds its own cache.
                keeps_all = (
                    request.num_output_tokens > 0 and match.tokens >= request.num_prompt_tokens
                )
                resuming = with_held(
                    plan, match.held, match.tokens, newest_only=newest_only, keeps_all=keeps_all
                )
                return self._copying(request.request_id, resuming, match.held)
            skipped = "saves_little"
        record = SessionProof(1, 0, plan.prompt_tokens - hit_tokens, skipped=skipped)
        return replace(plan, session=record)

    def _match(self, request: Request, budget: RequestBudget) -> Match | None:
        """Return the held cache that saves most tokens of a waiting request, or None."""
        if not len(self._held):
            return None
        tokens = self._tokens.get(request.request_id)
        # The token of an asynchronous step may come after the request was preempted.
        if tokens is None or len(tokens) != request.num_tokens:
            tokens = self._tokens[request.request_id] = _token_ids(request)
        return self._held.find(_scope(request, budget), tokens)

    def _copying(self, request_id: str, plan: Plan, held: Held) -> Plan:
        """Return a plan that copies its held cache if others wait for it and both have room."""
        assert plan.resumed is not None
        begun = {request_id, *self._manager.resuming}
        others = any(held.name == name for one, name in self._wanted.items() if one not in begun)
        room = self._manager.block_pool.get_num_free_blocks() - len(held.blocks)
        if not others or plan.blocks_to_extend > room:
            return plan
        return replace(plan, resumed=plan.resumed._replace(copies=True))

    def leave(self, request: Request, budget: RequestBudget) -> None:
        """Hold the cache of a request whose blocks are about to be freed, if it has one."""
        if not _may_share(request, budget):
            return
        # Routers know held caches of prompts without adapters.
        plain = request.lora_request is None
        to_hold = ToHold(
            _scope(request, budget), _token_ids(request), request.num_computed_tokens,
            request.block_hashes if plain else (), request.session_id is not None,
            request.cache_salt, has_adapter=not plain,
        )  # fmt: skip
        held = self._manager.hold(request.request_id, to_hold)
        if held is not None:
            self._holds[request.request_id] = Hold(held.name, held.card(time.time()))

    def arrive(self, request: Request, card: HeldCard) -> None:
        """Hold a cache from another replica, which the workers have under the request's name.

        Args:
            request: has the cache's tokens; it is not to be scheduled.
        """
        floor = Floor(card.floor_tokens, card.floor_entries)
        blocks = compressed_blocks_bound(
            floor.entries_at(card.entry_tokens), 0, self._manager.page_tokens
        )
        held = Held(
            request.request_id, card.scope, card.token_ids, card.entry_tokens, floor,
            card.compressed_at, (), card.turn, tuple(request.block_hashes if card.is_named else ()),
            parked_blocks=blocks, has_arrived=True, has_session=card.has_session,
            cache_salt=card.cache_salt,
        )  # fmt: skip
        self._held.arrive(held, age_s=max(0.0, time.time() - card.held_at_s))

    def _publish(self, held: Held, is_there: bool) -> None:
        """Tell who follows vLLM's KV events that a prompt's tokens are cached here, or no more."""
        pool, size = self._manager.block_pool, self._manager.block_size
        if not pool.enable_kv_cache_events or not held.block_hashes:
            return
        hashes = [maybe_convert_block_hash(block_hash) for block_hash in held.block_hashes]
        if not is_there:
            pool.kv_event_queue.append(BlockRemoved(block_hashes=hashes, medium=HELD_MEDIUM))
            return
        tokens = held.token_ids[: len(hashes) * size].tolist()
        stored = BlockStored(
            block_hashes=hashes, parent_block_hash=None, token_ids=tokens, block_size=size,
            lora_id=None, lora_name=None, medium=HELD_MEDIUM,
            # As vLLM has it for blocks: the salt belongs to the first one.
            extra_keys=[(held.cache_salt,)] if held.cache_salt is not None else None,
        )  # fmt: skip
        pool.kv_event_queue.append(stored)

    def check(self, waiting: set[str]) -> None:
        """Assert that no other requests are noted than those that wait, by their ids."""
        noted = self._wanted.keys() | self._tokens.keys()
        assert noted <= waiting, "a request is noted as waiting that does not wait"

    def take_holds(self) -> dict[str, Hold]:
        """Return the requests whose caches are held since the last call."""
        holds, self._holds = self._holds, {}
        return holds


def _may_share(request: Request, budget: RequestBudget) -> bool:
    return (
        budget.session
        and budget.choice.preset != FULL
        and not request.skip_reading_prefix_cache
        and not request.resumable
        # Their tokens do not say what they are of.
        and not request.mm_features
        and request.prompt_embeds is None
    )


def _scope(request: Request, budget: RequestBudget) -> str:
    lora = request.lora_request
    assert request.sampling_params is not None
    # An adapter that is loaded again under its name has another id.
    adapter = (lora.name, lora.adapter_id, lora.path) if lora is not None else None
    return scope_of(budget, adapter, request.cache_salt)


def _token_ids(request: Request) -> TokenIds:
    return np.array(request._all_token_ids, dtype=np.int32)


def with_held(
    plan: Plan, held: Held, tokens: int, *, newest_only: bool, keeps_all: bool = False
) -> Plan:
    """Return a request's plan if it begins with the first `tokens` tokens of a held cache.

    Args:
        plan: its plan without one.
        newest_only: whether the entries of earlier turns stay. Those of a bounded request compete.
        keeps_all: whether all entries stay. A bounded request is cut to its budget all the same.
    """
    base = Floor(tokens, held.floor.entries_at(tokens))
    compressed_at = min(held.compressed_at, tokens)
    new, computed = plan.prompt_tokens - compressed_at, plan.prompt_tokens - tokens
    choice = _with_window_within(plan.choice, computed)
    whole = base.entries_at(plan.prompt_tokens)
    if plan.keep >= whole or (keeps_all and plan.bound is None):
        among, keep = new, new
    elif newest_only and plan.bound is None:
        least = max(choice.build().scorer.window_tokens, _LEAST_OF_NEWEST)
        among, keep = new, min(new, max(plan.keep - (whole - new), least))
    else:
        among, keep = None, plan.keep
    resumed = Resumed(
        held.name, held.turn + 1, base, held.floor, compressed_at, among, keep, choice
    )
    total = keep if among is None else whole - new + keep
    span = min(query_span(choice), computed) if total < whole else 0
    return replace(
        plan, keep=total, query_span=span, skipped=None, resumed=resumed,
        session=SessionProof(resumed.turn, tokens, computed, held.source),
    )  # fmt: skip


def _with_window_within(choice: PolicyChoice, tokens: int) -> PolicyChoice:
    """Return a choice that looks at no more queries than there are."""
    if choice.build().scorer.window_tokens <= tokens:
        return choice
    return choice._replace(window_tokens=tokens)
