"""The work of a worker's steps, without a vLLM runner."""

from collections.abc import Mapping

import pytest
import torch
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from adakv_serve.kernels.paging.growth import GrownStep
from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.attention.folded import Folded, Pages, Step
from adakv_worker.attention.folding import FoldingBuilder
from adakv_worker.config import CompressionConfig
from adakv_worker.messages import (
    Answer,
    Capture,
    Compress,
    Evict,
    StepCommands,
    answer_of,
    attach_commands,
)
from adakv_worker.worker.held_moves import HeldMoves
from adakv_worker.worker.moves import CacheKind, Moves
from adakv_worker.worker.ranks import Ranks
from adakv_worker.worker.step import Row, StepWork
from adakv_worker.worker.timings import Timings
from adakv_worker.worker.windows import Capture as CopiedQueries
from tests.adakv_worker.worker.test_warm_up import DIM, HEADS, LAYERS, PAGE, make_state

PROMPT, KEEP, SPAN = 100, 40, 16
NOTHING = StepCommands.none()
COMPRESS = Compress(PolicyChoice("ada_snapkv"), PROMPT, SPAN, KEEP, slabs=[10, 11])


class Batch:
    """Requests whose blocks are a dict."""

    def __init__(self, blocks: dict[str, list[int]]) -> None:
        self.held = blocks

    def blocks(self, request_id: str) -> list[int]:
        return self.held[request_id]

    def replace_blocks(self, blocks: Mapping[str, list[int]]) -> None:
        self.held |= blocks

    def tokens(self, request_id: str) -> list[int] | None:
        return [1, 2, 3] if request_id in self.held else None

    def random_state(self, request_id: str) -> None:
        return None


class Builder(FoldingBuilder):
    """Folds without a backend."""

    def __init__(self) -> None:
        pass

    def fold(self, grown: GrownStep, requests: int) -> Folded:
        return Folded(requests, grown, self.pages, torch.arange(requests * HEADS + 1), 0, requests)


class GraphTables(HostTables):
    """Tables whose requests all fit CUDA graphs."""

    def fits_graphs(self, rows: list[int]) -> bool:
        return True


class Worker:
    """A step work with everything around it."""

    def __init__(self) -> None:
        self.batch, self.builder = Batch({"a": [1, 2, 3, 4, 10, 11], "b": [5]}), Builder()
        state = make_state(20, GraphTables)
        kind = CacheKind(
            "m", "f", "float32", "float32", PAGE, LAYERS, HEADS, DIM, DIM, 0, 1, state.packing
        )
        nothing = torch.empty(0)
        moves = Moves(state, self.batch, kind)
        held = HeldMoves(state.held, kind, CompressionConfig(), {}, moves.files)
        self.work = StepWork(
            state, Pages(nothing, nothing), [self.builder], self.batch, moves, held, Ranks(),
            check_invariants=True,
        )  # fmt: skip

    def step(self, tokens: dict[str, int], computed: dict[str, int], **commands: object) -> Step:
        """Run one step of requests in this order, and return what the backend was given."""
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = tokens
        attach_commands(output, NOTHING._replace(**commands))  # type: ignore[arg-type]
        rows = [Row(name, count, computed[name]) for name, count in tokens.items()]

        def execute() -> Step:
            self.work.plan(rows)
            step, self.builder.next_step = self.builder.next_step, None
            for layer in range(LAYERS):
                query = torch.randn((sum(tokens.values()), 2 * HEADS, DIM))
                for watcher in step.watchers if step is not None else []:
                    watcher.see(layer, query)
            return step or Step(None, [])

        return self.work.run(output, execute)

    def compress(self, **changes: object) -> None:
        command = COMPRESS._replace(**changes)  # type: ignore[arg-type]
        self.step({"a": PROMPT}, {"a": 0}, compress={"a": command})

    def answer(self) -> Answer:
        """Return what goes with the step's output."""
        output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
        return answer_of(self.work.attach_answer(output))


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_a_compressed_request_holds_its_slabs_alone_and_grows(worker: Worker) -> None:
    worker.compress()
    assert worker.batch.held["a"] == [10, 11]
    step = worker.step({"a": 1, "b": 5}, {"a": PROMPT, "b": 0})
    assert step.decodes is not None
    assert step.decodes.requests == 1
    assert not step.watchers
    assert int(step.decodes.grown.lens.sum()) == LAYERS * HEADS * (KEEP + 1)


def test_the_answer_rides_on_the_next_output_only(worker: Worker) -> None:
    worker.compress()
    assert worker.answer().kept["a"].mean == KEEP
    assert worker.answer().is_empty


def test_a_request_may_ask_what_each_head_keeps(worker: Worker) -> None:
    worker.compress(detail=True)
    detail = worker.answer().kept["a"].detail
    assert detail is not None
    lens = worker.work.state.tables.lens(worker.work.state.rows(["a"])[0])
    assert detail.kept == lens.tolist()
    assert detail.keeping is not None
    assert (len(detail.keeping), sum(detail.keeping)) == (PROMPT, KEEP * LAYERS * HEADS)
    # The observation window stays in every head.
    assert detail.keeping[-SPAN:] == [LAYERS * HEADS] * SPAN
    worker = Worker()
    worker.compress()
    assert worker.answer().kept["a"].detail is None


def test_an_eviction_gives_back_the_last_slabs(worker: Worker) -> None:
    worker.compress()
    evict = Evict(PolicyChoice("streaming_llm"), PROMPT + 1, 0, keep=20, slabs=1)
    worker.step({"a": 1}, {"a": PROMPT}, evict={"a": evict})
    assert worker.batch.held["a"] == [10]
    assert int(worker.work.state.tables.lens(worker.work.state.rows(["a"])[0]).max()) <= 20 * HEADS


def test_rows_out_of_order_are_refused(worker: Worker) -> None:
    worker.compress()
    with pytest.raises(AssertionError, match="compressed rows must come first"):
        worker.step({"b": 5, "a": 1}, {"a": PROMPT, "b": 0})
    # The failed step is over.
    assert worker.work.step is None


def test_graphs_replay_only_steps_without_watchers(worker: Worker) -> None:
    output = SchedulerOutput.make_empty()
    assert worker.work.run(output, worker.work.may_replay)
    attach_commands(output, NOTHING._replace(capture={"b": Capture(40, 16)}))
    assert not worker.work.run(output, worker.work.may_replay)


def test_watchers_read_their_own_rows_of_the_batch(worker: Worker) -> None:
    step = worker.step({"a": 20, "b": 10}, {"a": 0, "b": 0}, capture={"b": Capture(10, 4)})
    (capture,) = step.watchers
    assert isinstance(capture, CopiedQueries)
    assert (capture.start, capture.stop) == (20 + 6, 20 + 10)


def test_granted_blocks_become_slabs_of_compressed_requests_only(worker: Worker) -> None:
    worker.compress()
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData.make_empty()
    output.scheduled_cached_reqs.req_ids = ["a", "b"]
    output.scheduled_cached_reqs.new_block_ids = [([12],), ([6],)]
    worker.work.add_slabs(output)
    pages = worker.work.state.tables.pages(worker.work.state.rows(["a"])[0])
    assert len(pages) == 3 * LAYERS * HEADS


def test_timings_measure_each_part(worker: Worker) -> None:
    ticks = iter(range(1000))
    timings = Timings(lambda: worker.work.state.extra_bytes, lambda: float(next(ticks)))
    worker.work.timings = timings
    worker.compress()
    figures = timings.figures()
    # It starts, sees each layer and finishes; a clock that ticks when read counts one for each.
    assert figures["compress_s"] == 2 + LAYERS
    assert figures["evict_s"] == 1
    assert figures["extra_bytes"] == worker.work.state.extra_bytes
    worker.work.timings = None
    worker.step({"a": 1}, {"a": PROMPT})
    assert timings.figures() == figures


def test_timings_of_steps_add_sampling_and_count_preemptions() -> None:
    ticks = iter((0.0, 1.0, 5.0, 5.5, 6.0, 8.0))
    timings = Timings(lambda: 7, lambda: next(ticks))
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {"a": 30, "b": 1, "c": 1}
    output.preempted_req_ids = {"d"}
    with timings.step(output):
        pass
    with timings.sampling():
        pass
    # Plans of steps with prefills do not count.
    with timings.part("plan"):
        pass
    assert timings.figures()["steps"] == [(1.5, 30, 2, 1)]
    assert (timings.figures()["plan_s"], timings.figures()["extra_bytes"]) == (0.0, 7)
