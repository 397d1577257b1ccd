"""The transition function of requests that move, against engines and a stream made of numbers."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.v1.engine import EngineCoreOutput, FinishReason

from adakv_worker.frontend.movement import (
    DecodedAway,
    DecodedHere,
    Event,
    Exported,
    Leaving,
    Place,
    Signal,
    State,
    transition,
)


def decoded(*tokens: int, ends: bool = False) -> EngineCoreOutput:
    reason = FinishReason.LENGTH if ends else None
    return EngineCoreOutput("request", list(tokens), finish_reason=reason)


OUTPUTS = st.lists(
    st.builds(decoded, st.integers(0, 9), ends=st.booleans()), min_size=1, max_size=3
).map(tuple)
EVENTS = st.one_of(
    st.sampled_from(Signal),
    st.builds(Exported, st.integers(-2, 4)),
    st.builds(DecodedHere, OUTPUTS),
    st.builds(DecodedAway, OUTPUTS),
)
STATES = st.one_of(
    st.sampled_from(Place),
    st.builds(
        Leaving,
        st.lists(st.builds(decoded, st.integers(0, 9), ends=st.booleans()), max_size=3).map(tuple),
        st.none() | st.integers(-2, 4),
    ),
)


@given(event=EVENTS)
def test_a_request_that_has_ended_stays_ended_and_hands_nothing_on(event: Event) -> None:
    assert transition(Place.ENDED, event) == (Place.ENDED, ())


@given(state=STATES)
def test_a_cancelled_request_ends_wherever_it_is(state: State) -> None:
    assert transition(state, Signal.CANCELLED) == (Place.ENDED, ())


@given(state=STATES, event=EVENTS)
def test_a_request_ends_with_its_last_output_or_its_client(state: State, event: Event) -> None:
    after, outputs = transition(state, event)
    is_last = any(output.finished for output in outputs)
    cancelled = event is Signal.CANCELLED
    assert (after is Place.ENDED) == (state is Place.ENDED or is_last or cancelled)


@given(state=STATES, event=EVENTS)
def test_only_a_request_whose_stream_has_caught_up_goes_away(state: State, event: Event) -> None:
    after, _ = transition(state, event)
    if after is Place.AWAY and state is not Place.AWAY:
        assert isinstance(state, Leaving)
        assert state.has_caught_up
        assert event is Signal.LEFT


@given(outputs=OUTPUTS)
def test_outputs_of_the_engine_that_a_request_is_not_in_are_dropped(
    outputs: tuple[EngineCoreOutput, ...],
) -> None:
    assert transition(Place.AWAY, DecodedHere(outputs)) == (Place.AWAY, ())
    assert transition(Place.HERE, DecodedAway(outputs)) == (Place.HERE, ())


def test_outputs_behind_the_last_token_of_the_cache_are_dropped() -> None:
    state: State = Leaving()
    first, second, third = decoded(1), decoded(2), decoded(3)
    handed_on = []
    for event in (
        DecodedHere((first,)),
        Exported(missing=2),
        DecodedHere((second,)),
        DecodedHere((third,)),
        Signal.LEFT,
    ):
        state, outputs = transition(state, event)
        handed_on.append(outputs)
    assert handed_on == [(), (first,), (second,), (), ()]
    assert state is Place.AWAY


def test_a_request_that_stays_hands_on_what_was_held() -> None:
    outputs = (decoded(1), decoded(2))
    assert transition(Leaving(outputs), Signal.STAYED) == (Place.HERE, outputs)


class Lives(RuleBasedStateMachine):
    """A request between two engines, which decode 0, 1, 2, ...: its stream never skips or repeats.

    An engine is the number of tokens that it has decoded, and outputs that are still on their way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: State = Place.HERE
        self.stream: list[int] = []
        self.here = self.there = 0
        self.coming: list[EngineCoreOutput] = []

    def apply(self, event: Event) -> None:
        self.state, outputs = transition(self.state, event)
        for output in outputs:
            self.stream += output.new_token_ids

    @rule(tokens=st.integers(1, 3), ends=st.integers(0, 30).map(lambda number: number == 0))
    def the_engine_decodes(self, tokens: int, ends: bool) -> None:
        self.coming.append(decoded(*range(self.here, self.here + tokens), ends=ends))
        self.here += tokens

    @precondition(lambda self: self.coming)
    @rule()
    def an_output_comes(self) -> None:
        self.apply(DecodedHere((self.coming.pop(0),)))

    @rule()
    def it_is_asked_to_leave(self) -> None:
        self.apply(Signal.ASKED_TO_LEAVE)

    @precondition(lambda self: isinstance(self.state, Leaving) and self.state.missing is None)
    @rule()
    def its_cache_is_written(self) -> None:
        self.there = self.here
        self.apply(Exported(self.here - len(self.stream)))

    @precondition(lambda self: isinstance(self.state, Leaving) and self.state.has_caught_up)
    @rule()
    def it_leaves(self) -> None:
        self.apply(Signal.LEFT)
        assert self.state is Place.AWAY
        assert self.there == len(self.stream)

    @rule()
    def it_cannot_leave(self) -> None:
        self.apply(Signal.STAYED)

    @precondition(lambda self: self.state is Place.AWAY)
    @rule(tokens=st.integers(1, 3))
    def the_other_engine_decodes(self, tokens: int) -> None:
        self.apply(DecodedAway((decoded(*range(self.there, self.there + tokens)),)))
        self.there += tokens

    @precondition(lambda self: self.state is Place.AWAY)
    @rule()
    def it_comes_back(self) -> None:
        # Under a new name: outputs of the old one no longer reach it.
        self.coming = []
        self.here = len(self.stream)
        self.apply(Signal.CAME_BACK)
        assert self.state is Place.HERE

    @invariant()
    def no_token_is_lost_or_doubled(self) -> None:
        assert self.stream == list(range(len(self.stream)))
        if self.state is Place.HERE:
            assert len(self.stream) + sum(len(o.new_token_ids) for o in self.coming) == self.here


Lives.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_no_token_is_lost_or_doubled = Lives.TestCase
