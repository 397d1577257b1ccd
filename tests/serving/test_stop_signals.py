"""One stop may reach a process as two signals; a later signal ends it at once."""

import signal
from collections.abc import Iterator

import pytest

from adakv_serve.serving.stop_signals import StopSignals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_passed_on_by_a_parent_is_no_second_stop(number: signal.Signals) -> None:
    now_s = 100.0
    stop = StopSignals(lambda: now_s)
    signal.raise_signal(number)
    stop.wait()
    now_s += 0.5
    signal.raise_signal(number)
    now_s += 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_the_end_of_a_terminal_stops_nothing_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopSignals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
