"""Tenants take turns, in the real scheduler and in the order of its queue."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from adakv_worker.core.turns import Turns
from adakv_worker.session_messages import TENANT_KEY
from tests.adakv_worker.fake_worker import CoreConfig, Fake

TENANTS = st.sampled_from([None, "a", "b", "c"])


def request(name: int, tenant: str | None, preemptions: int = 0) -> Any:
    extra = {TENANT_KEY: tenant} if tenant else None
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        request_id=str(name), tenant=tenant, sampling_params=params, num_preemptions=preemptions
    )


@given(
    waits=st.lists(st.tuples(TENANTS, st.booleans()), max_size=30),
    runs=st.lists(TENANTS, max_size=10),
)
def test_each_next_request_is_of_a_tenant_with_the_fewest(
    waits: list[tuple[str | None, bool]], runs: list[str | None]
) -> None:
    turns, queue = Turns(), FCFSRequestQueue()
    for name, (tenant, is_preempted) in enumerate(waits):
        one = request(name, tenant, is_preempted)
        turns.note(one)
        queue.append(one)
    running = [request(1000 + name, tenant) for name, tenant in enumerate(runs)]
    turns.order(queue, running)
    assert len(queue) == len(waits)
    if len({tenant for tenant, _ in waits}) < 2:
        assert [one.request_id for one in queue] == [str(name) for name in range(len(waits))]
        return
    first = [one for one in queue if one.num_preemptions]
    assert list(queue)[: len(first)] == first
    fresh = list(queue)[len(first) :]
    for group in (first, *([one for one in fresh if one.tenant == tenant] for tenant in "abc")):
        assert group == sorted(group, key=lambda one: int(one.request_id))
    begun = list(runs)
    for place, one in enumerate(fresh):
        fewest = min(begun.count(other.tenant) for other in fresh[place:])
        assert begun.count(one.tenant) == fewest
        begun.append(one.tenant)


@pytest.mark.parametrize("in_flight", [0, 1], ids=["synchronous", "asynchronous"])
def test_a_tenant_with_many_requests_delays_no_other_one_by_all_of_them(
    small: CoreConfig, in_flight: int
) -> None:
    fake = Fake(small, in_flight)
    for seed in range(20):
        fake.add(600, 40, seed, {TENANT_KEY: "many"})
    for seed in range(2):
        fake.add(600, 40, 100 + seed, {TENANT_KEY: "few"})
    fake.finish()
    of_many = sorted(fake.starts[f"r{number}"] for number in range(20))
    # Those that began before it came, and one for each of its own.
    began_at_once = of_many.count(of_many[0])
    assert fake.starts["r20"] <= of_many[began_at_once]
    assert fake.starts["r21"] <= of_many[began_at_once + 1]
