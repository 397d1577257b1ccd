"""A simulated replica: queue, blocks, prefills, decode batches and preemptions of an engine."""

from collections import OrderedDict, deque
from typing import NamedTuple

from adakv_serve.kernels.blocks import blocks_for_tokens
from adakv_serve.router.footprint import Budget, Footprint, predict
from adakv_serve.router.simulate.traces import BLOCK_SIZE_TOKENS, Request

# The most decode steps simulated at once. Requests grow only between such groups of steps.
_STEPS_AT_ONCE = 8


class ServiceTimes(NamedTuple):
    """Times of an engine's work, from a live run (`python -m loadtest.service_times`)."""

    blocks_total: int
    prefill_tokens_per_s: float
    decode_step_s: float
    decode_step_s_per_request: float

    def decode_tokens_per_s(self, batch: int) -> float:
        """Return the tokens per second of so many requests that decode together."""
        return 1 / (self.decode_step_s_per_request + self.decode_step_s / batch)

    def slower(self, times: float) -> "ServiceTimes":
        """Return the times of a replica that is so many times as slow."""
        return self._replace(
            prefill_tokens_per_s=self.prefill_tokens_per_s / times,
            decode_step_s=self.decode_step_s * times,
            decode_step_s_per_request=self.decode_step_s_per_request * times,
        )


class Running:
    """A request in a replica."""

    __slots__ = ("blocks", "done_tokens", "footprint", "request", "waited_s")

    def __init__(self, request: Request, footprint: Footprint) -> None:
        self.request = request
        self.footprint = footprint
        self.done_tokens = 0
        self.blocks = 0
        self.waited_s: float | None = None

    @property
    def remaining_tokens(self) -> int:
        return self.request.output_tokens - self.done_tokens

    def blocks_after(self, more_tokens: int) -> int:
        """Return the blocks held after so many more decoded tokens."""
        left = self.remaining_tokens - more_tokens
        return self.footprint.steady_blocks - max(0, left) // BLOCK_SIZE_TOKENS


class SimulatedReplica:
    """Replica that goes from event to event.

    busy_until_s: time of the next event.
    prefilled_tokens, decoded_tokens, decode_steps: computed so far.
    waits_s: times to the first token of ended requests, without their own prefills.
    """

    def __init__(self, replica_id: str, times: ServiceTimes, budget: Budget | None) -> None:
        self.replica_id = replica_id
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.free_blocks = times.blocks_total
        self.preemptions = 0
        self.prefilled_tokens = self.decoded_tokens = self.decode_steps = 0
        self.waits_s: list[float] = []
        self.busy_until_s: float | None = None
        self._times = times
        self._budget = budget
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._doing: tuple[Running | None, int] = (None, 0)

    @property
    def ongoing(self) -> int:
        return len(self.waiting) + len(self.running) + (self._doing[0] is not None)

    @property
    def pending(self) -> list[Request]:
        """Requests whose prompts are not complete, or that were preempted."""
        prefilling = self._doing[0]
        return [one.request for one in (*self.waiting, *([prefilling] if prefilling else ()))]

    @property
    def growth_blocks(self) -> int:
        """Blocks that running requests will still take."""
        return sum(max(0, one.footprint.steady_blocks - one.blocks) for one in self.running)

    @property
    def waiting_blocks(self) -> int:
        return sum(one.footprint.peak_blocks for one in self.waiting)

    @property
    def prefill_tokens(self) -> int:
        prefilling = self._doing[0]
        queued = sum(one.request.prompt_tokens for one in self.waiting)
        return queued + (prefilling.request.prompt_tokens if prefilling else 0)

    def add(self, request: Request, now_s: float) -> None:
        budget = self._budget if request.compressed else None
        footprint = predict(request.prompt_tokens, request.output_tokens, budget, BLOCK_SIZE_TOKENS)
        self.waiting.append(Running(request, footprint))
        if self.busy_until_s is None:
            self._begin(now_s)

    def advance(self, now_s: float) -> None:
        """End the step that is due and begin the next one."""
        prefilled, steps = self._doing
        if prefilled is not None:
            self._end_prefill(prefilled, now_s)
        elif steps:
            self._end_decode(steps)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        times = self._times
        self._doing, self.busy_until_s = (None, 0), None
        if self.waiting and self._admissible(self.waiting[0]):
            one = self.waiting.popleft()
            held = self._prompt_blocks(one)
            one.blocks = max(one.footprint.peak_blocks if not one.done_tokens else 0, held)
            self.free_blocks -= one.blocks
            self._doing = (one, 0)
            tokens = self._tokens_to_compute(one)
            self.prefilled_tokens += tokens
            prefill_s = tokens / times.prefill_tokens_per_s
            if one.waited_s is None:
                one.waited_s = -prefill_s
            self.busy_until_s = now_s + prefill_s
        elif self.running:
            steps = min(_STEPS_AT_ONCE, *(one.remaining_tokens for one in self.running))
            self._make_room(steps)
            batch = len(self.running) - 1
            step_s = times.decode_step_s + times.decode_step_s_per_request * batch
            self._doing = (None, steps)
            self.busy_until_s = now_s + steps * step_s

    def _admissible(self, one: Running) -> bool:
        # A request alone on the replica runs even if the prediction does not fit.
        return one.footprint.peak_blocks <= self.free_blocks or not self.running

    def _prompt_blocks(self, one: Running) -> int:
        return blocks_for_tokens(one.request.prompt_tokens + one.done_tokens, BLOCK_SIZE_TOKENS)

    def _tokens_to_compute(self, one: Running) -> int:
        cached = 0
        for block in one.request.block_hashes:
            if block not in self._cached:
                break
            cached += BLOCK_SIZE_TOKENS
        return max(one.request.prompt_tokens + one.done_tokens - cached, 1)

    def _end_prefill(self, one: Running, now_s: float) -> None:
        for block in one.request.block_hashes:
            self._cached[block] = None
            self._cached.move_to_end(block)
        if one.waited_s is not None and one.done_tokens == 0:
            one.waited_s += now_s - one.request.arrival_s
        one.done_tokens = max(one.done_tokens, 1)
        self._resize(one, one.blocks_after(0))
        while len(self._cached) > max(0, self.free_blocks):
            self._cached.popitem(last=False)
        if one.remaining_tokens <= 0:
            self._finish(one)
        else:
            self.running.append(one)

    def _end_decode(self, steps: int) -> None:
        self.decode_steps += steps
        self.decoded_tokens += steps * len(self.running)
        for one in self.running:
            one.done_tokens += steps
        ended = [one for one in self.running if one.remaining_tokens <= 0]
        self.running = [one for one in self.running if one.remaining_tokens > 0]
        for one in ended:
            self._finish(one)

    def _make_room(self, steps: int) -> None:
        """Grow the running requests for the next steps; preempt the latest if blocks run out."""
        while True:
            needed = sum(max(0, one.blocks_after(steps) - one.blocks) for one in self.running)
            if needed <= self.free_blocks or len(self.running) == 1:
                break
            self._preempt(self.running.pop())
        for one in self.running:
            self._resize(one, max(one.blocks, one.blocks_after(steps)))

    def _preempt(self, one: Running) -> None:
        self.preemptions += 1
        self.free_blocks += one.blocks
        one.blocks = 0
        self.waiting.appendleft(one)

    def _resize(self, one: Running, blocks: int) -> None:
        self.free_blocks -= blocks - one.blocks
        one.blocks = blocks

    def _finish(self, one: Running) -> None:
        self._resize(one, 0)
        self.waits_s.append(max(0.0, one.waited_s or 0.0))


def check_replica(replica: SimulatedReplica, blocks_total: int) -> None:
    """Assert that every block is held once or free."""
    held = sum(one.blocks for one in replica.running)
    prefilling = replica._doing[0]
    held += prefilling.blocks if prefilling else 0
    assert held + replica.free_blocks == blocks_total, "blocks were lost or made up"
    assert all(one.blocks == 0 for one in replica.waiting), "a waiting request holds blocks"
