"""What the scheduler tells the workers, and what they answer.

Both ride as attributes on vLLM's own messages of the step (plain dataclasses, which keep them when
pickled).
"""

from typing import Any, NamedTuple

from kernels.policies.presets import PolicyChoice

ATTRIBUTE = "adakv"
# Looks at no queries.
WITHOUT_QUERIES = PolicyChoice("streaming_llm")


class Capture(NamedTuple):
    """Keep the queries of the last `query_span` of `prompt_tokens` tokens for a later step.

    That is the one that completes them: the prompt, or as many as are cached when it next evicts.
    """

    prompt_tokens: int
    query_span: int


class Compress(NamedTuple):
    """In this step's forward pass, copy what the policy keeps into `slabs`.

    The scorer wants the queries of the last `query_span` of `prompt_tokens` tokens.
    sink_tokens: first entries that stay in any case.
    """

    choice: PolicyChoice
    prompt_tokens: int
    query_span: int
    keep: int
    slabs: list[int]
    sink_tokens: int = 0


class Evict(NamedTuple):
    """After this step's forward pass, leave a compressed request `keep` entries in its first slabs.

    The scorer wants the queries of the last `query_span` of `tokens` tokens.
    """

    choice: PolicyChoice
    tokens: int
    query_span: int
    keep: int
    slabs: int


class TakeUp(NamedTuple):
    """A new request's first `prompt_tokens` tokens are its prompt, the others its answer so far.

    state: the staged cache to place in its blocks, which are slabs then; None if there is none.
    """

    prompt_tokens: int
    state: str | None


class StepCommands(NamedTuple):
    """One scheduler step, by request id. Empty dicts are the common case."""

    capture: dict[str, Capture]
    compress: dict[str, Compress]
    take_up: dict[str, TakeUp]
    evict: dict[str, Evict]


NOTHING = StepCommands({}, {}, {}, {})


class Kept(NamedTuple):
    """Mean, least and most entries that the heads of a compressed request keep."""

    mean: float
    least: int
    most: int


class Answer(NamedTuple):
    """What the workers did of a step's commands.

    kept: of the requests that were compressed.
    failed: requests whose policy raised an error in compressing or evicting.
    """

    kept: dict[str, Kept]
    failed: list[str]

    @property
    def is_empty(self) -> bool:
        return not self.kept and not self.failed


NO_ANSWER = Answer({}, [])


def commands_of(scheduler_output: Any) -> StepCommands:
    return getattr(scheduler_output, ATTRIBUTE, NOTHING)


def answer_of(runner_output: Any) -> Answer:
    return getattr(runner_output, ATTRIBUTE, NO_ANSWER)
