"""What a worker does about compressed requests in each step, whichever vLLM runner computes it."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from adakv_worker.attention.folded import Pages, Step
from adakv_worker.attention.folding import FoldingBuilder
from adakv_worker.attention.watcher import Watcher
from adakv_worker.messages import (
    NO_ANSWER,
    Answer,
    Compress,
    Evict,
    Kept,
    Recompress,
    StepCommands,
    attach_answer,
    commands_of,
)
from adakv_worker.worker.head_detail import over_ranks
from adakv_worker.worker.held_moves import HeldMoves
from adakv_worker.worker.moves import Moves
from adakv_worker.worker.ranks import Ranks
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.timings import Part, TimedWatcher, Timings

Result = TypeVar("Result")


class Row(NamedTuple):
    """A request in the batch: its tokens in this step, and those computed before."""

    request_id: str
    tokens: int
    computed: int


class Batch(Protocol):
    """The requests of a vLLM runner, which each of its versions stores in its own way."""

    def blocks(self, request_id: str) -> list[int]:
        """Return all blocks of a request."""
        ...

    def replace_blocks(self, blocks: Mapping[str, list[int]]) -> None:
        """Give requests these blocks from the next step on; the device has been waited for."""
        ...

    def tokens(self, request_id: str) -> list[int] | None:
        """Return all tokens of a request so far, or None if it is not here."""
        ...

    def random_state(self, request_id: str) -> Tensor | None:
        """Return the state of a request's own random generator, or None if it has none."""
        ...


class StepWork:
    """The compressions, evictions and captures of one worker, step by step.

    A runner owns one. It calls `run` around a step, and within it first `add_slabs` and
    `place_caches` as its batch changes, then `plan` when the batch has its order.

    state: the compressed requests.
    moves: the caches of requests that leave and arrive. held_moves: the same for held caches.
    step: the scheduler's output while a real step runs, None in profiles and warm-ups.
    timings: the measurements of this work, None while nothing is measured.
    """

    def __init__(
        self,
        state: CompressionState,
        pages: Pages,
        builders: Sequence[FoldingBuilder],
        batch: Batch,
        moves: Moves,
        held_moves: HeldMoves,
        ranks: Ranks,
        *,
        graph_queries: Tensor | None = None,
        check_invariants: bool = False,
    ) -> None:
        """
        Args:
            graph_queries: [L, rows, Hq, D], where full CUDA graphs leave the queries of their rows.
        """
        self.state = state
        self.moves = moves
        self.held_moves = held_moves
        self.timings: Timings | None = None
        self._builders = builders
        self._batch = batch
        self._ranks = ranks
        self._graph_queries = graph_queries
        # Watchers that look at those after the step.
        self._late_watchers: list[Watcher] = []
        self._check_invariants = check_invariants
        self.step: SchedulerOutput | None = None
        # Held caches that are gone, and that requests of this step still copy.
        self._to_drop: set[str] = set()
        self._answer = NO_ANSWER
        for builder in builders:
            builder.pages, builder.tables = pages, state.tables
            builder.graph_queries = graph_queries

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside the engine's KV memory."""
        queries = 0 if self._graph_queries is None else self._graph_queries.nbytes
        return self.state.extra_bytes + queries

    @property
    def _commands(self) -> StepCommands:
        assert self.step is not None
        return commands_of(self.step)

    def run(self, scheduler_output: SchedulerOutput, execute: Callable[[], Result]) -> Result:
        """Run vLLM's part of a step, then finish what the step commands."""
        self.step = scheduler_output
        sessions = self._commands.sessions
        for request_id, hold in sessions.hold.items():
            self.state.hold(request_id, hold)
        for name in sessions.park:
            self.state.held.park(name)
        # The others go once they are copied. Each row that goes may be wanted in this step.
        copied = {resume.held for resume in sessions.resume.values() if resume.copies}
        self._to_drop = copied.intersection(sessions.drop)
        for name in sessions.drop:
            if name not in self._to_drop:
                self.state.drop(name)
        try:
            result = execute()
            self._see_graph()
            commands = self._commands
        finally:
            self.step, self._late_watchers = None, []
        self._answer = self._finish(commands)
        self.state.windows.drop(scheduler_output.num_scheduled_tokens.keys() - commands.capture)
        if self._check_invariants:
            self.state.check()
        return result

    def add_slabs(self, scheduler_output: SchedulerOutput) -> None:
        """Give compressed requests the blocks that the scheduler granted for growth."""
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_blocks is not None and request_id in self.state:
                self.state.add_slabs(request_id, new_blocks[0])

    def place_caches(self, scheduler_output: SchedulerOutput) -> None:
        """Give requests that begin in this step their held caches, or their staged ones."""
        resume = commands_of(scheduler_output).sessions.resume
        copies = Counter(resumed.held for resumed in resume.values() if resumed.copies)
        for request_id, resumed in resume.items():
            self.state.resume(request_id, resumed)
            copies[resumed.held] -= 1
            if not copies[resumed.held] and resumed.held in self._to_drop:
                self._to_drop.remove(resumed.held)
                self.state.drop(resumed.held)
        self._share_lengths(resume)
        take_up = commands_of(scheduler_output).take_up
        for new in scheduler_output.scheduled_new_reqs:
            if (command := take_up.get(new.req_id)) and command.state is not None:
                moved = self.moves.staged[command.state]
                self.state.restore(new.req_id, moved.cache, list(new.block_ids[0]))
                self._share_lengths([new.req_id])

    def may_replay(self) -> bool:
        """Return whether a full CUDA graph can run this step if all its requests decode."""
        assert self.step is not None
        if self._commands.needs_queries and self._graph_queries is None:
            return False
        rows = self.state.rows(self.step.num_scheduled_tokens)
        return self.state.tables.fits_graphs(rows)

    def plan(self, rows: Sequence[Row], graph_rows: int | None = None) -> None:
        """Prepare a step's attention, before the builders make its metadata.

        Args:
            rows: the batch in its order: compressed requests with one token first, then those with
                several.
            graph_rows: rows of the full CUDA graph that runs the step, None without a graph.
        """
        assert self.step is not None
        with self._timed("plan"):
            decodes, extends = self._compressed_first(rows)
            watchers = self._watchers(rows, self._commands)
            if graph_rows is not None:
                # A graph calls nothing of ours while it runs.
                self._late_watchers, watchers = watchers, []
            extended = None
            if extends:
                tokens = [row.tokens for row in extends]
                extended = self.state.extend([row.request_id for row in extends], tokens)
            grown = None
            if decodes or graph_rows is not None:
                grown = self.state.grow([row.request_id for row in decodes], graph_rows)
            for builder in self._builders:
                folded = several = None
                if grown is not None:
                    fold = builder.fold if graph_rows is None else builder.fold_for_graph
                    folded = fold(grown, len(decodes))
                if extended is not None:
                    several = builder.fold_extends(extended, tokens, len(decodes))
                step = Step(folded, watchers, several)
                builder.next_step = step if step.folded or watchers else None

    def _see_graph(self) -> None:
        """Show the layers of the full graph that has run this step to its watchers."""
        if self._late_watchers:
            assert self._graph_queries is not None
            for layer, queries in enumerate(self._graph_queries):
                for watcher in self._late_watchers:
                    watcher.see(layer, queries)

    def attach_answer(self, output: Any) -> Any:
        """Attach the answer to the step's commands to vLLM's output, now or when it is there."""
        if not self._answer.is_empty:
            answer, self._answer = self._answer, NO_ANSWER
            if isinstance(output, ModelRunnerOutput):
                attach_answer(output, answer)
            elif output is not None:
                _attach_later(output, answer)
        return output

    def _timed(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext() if self.timings is None else self.timings.part(part)

    def _compressed_first(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Return the compressed requests with one token and those with several.

        Asserts that they come first, in this order.
        """
        compressed = [row for row in rows if row.request_id in self.state]
        assert list(rows[: len(compressed)]) == compressed, "compressed rows must come first"
        decodes = [row for row in compressed if row.tokens == 1]
        assert compressed[: len(decodes)] == decodes, "decodes must come first"
        return decodes, compressed[len(decodes) :]

    def _watchers(self, rows: Sequence[Row], commands: StepCommands) -> list[Watcher]:
        if not commands.needs_queries:
            return []
        watchers: list[Watcher] = []
        start = 0
        for request_id, count, first in rows:
            if compress := commands.compress.get(request_id):
                with self._timed("compress"):
                    blocks = self._prompt_blocks(request_id, compress)
                    compression = self.state.compress(request_id, compress, blocks, start, first)
                watchers.append(self._watched(compression, "compress"))
            elif evict := commands.evict.get(request_id):
                with self._timed("evict"):
                    eviction = self.state.evict(request_id, evict, start)
                watchers.append(self._watched(eviction, "evict"))
            elif recompress := commands.recompress.get(request_id):
                with self._timed("compress"):
                    again = self.state.recompress(request_id, recompress, start, count)
                watchers += [self._watched(again, "compress")] if again is not None else []
            elif capture := commands.capture.get(request_id):
                watcher = self.state.windows.capture(request_id, capture, start, first, count)
                watchers += [watcher] if watcher is not None else []
            start += count
        return watchers

    def _watched(self, watcher: Watcher, part: Part) -> Watcher:
        return watcher if self.timings is None else TimedWatcher(watcher, self.timings, part)

    def _prompt_blocks(self, request_id: str, command: Compress) -> list[int]:
        blocks = self._batch.blocks(request_id)
        return blocks[: len(blocks) - len(command.slabs)]

    def _finish(self, commands: StepCommands) -> Answer:
        """Leave the step's requests the entries that their policies keep, and their slabs."""
        cut: dict[str, Evict | Recompress] = {**commands.evict, **commands.recompress}
        if not commands.compress and not cut:
            return NO_ANSWER
        with self._timed("compress"):
            answer = self.state.finish_compressions()
        self._share_lengths(commands.compress)
        with self._timed("evict"):
            evicted = self.state.finish_evictions()
        self._share_lengths(cut)
        self._batch.replace_blocks(
            {
                **{name: list(compress.slabs) for name, compress in commands.compress.items()},
                **{name: self._batch.blocks(name)[: one.slabs] for name, one in cut.items()},
            }
        )
        answer = Answer({**answer.kept, **evicted.kept}, [*answer.failed, *evicted.failed])
        return _over_ranks(answer, [*commands.compress, *cut], self._ranks)

    def _share_lengths(self, request_ids: Collection[str]) -> None:
        """Account for other ranks' heads of requests whose heads have new lengths."""
        if request_ids and self._ranks.size > 1:
            self.state.tables.share_longest(self.state.rows(request_ids), self._ranks.most)


def _attach_later(output: Any, answer: Answer) -> None:
    """Attach an answer to the result of an asynchronous output."""
    get_output = output.get_output

    def with_answer() -> ModelRunnerOutput:
        result = get_output()
        attach_answer(result, answer)
        return result

    output.get_output = with_answer


def _over_ranks(answer: Answer, request_ids: list[str], ranks: Ranks) -> Answer:
    """Return least, most and failures over all tensor-parallel ranks; the mean is each rank's."""
    if ranks.size == 1:
        return answer
    mine = [
        [-kept.least, kept.most, request_id in answer.failed]
        for request_id in request_ids
        for kept in (answer.kept.get(request_id, Kept(0.0, 0, 0)),)
    ]
    all_ranks = dict(zip(request_ids, ranks.most(torch.tensor(mine)).tolist(), strict=True))
    return Answer(
        {
            request_id: Kept(
                kept.mean,
                -all_ranks[request_id][0],
                all_ranks[request_id][1],
                None if kept.detail is None else over_ranks(kept.detail, ranks),
            )
            for request_id, kept in answer.kept.items()
        },
        [request_id for request_id, (_, _, failed) in all_ranks.items() if failed],
    )
