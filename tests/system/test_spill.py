"""A replica with little memory is killed, or the one that lends to it.

test_two_nodes.py has the requests that move undisturbed.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.deployment import Deployment, dashboard_metrics, deployed, spill_config
from tests.system.spilling import ask, lending, lent, outcomes
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def spilling() -> Iterator[Deployment]:
    with deployed(config=spill_config) as deployment:
        yield deployment


def test_when_the_borrower_is_killed_the_lender_lets_go_of_its_guests(
    spilling: Deployment,
) -> None:
    client = spilling.client(timeout=300)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, client, n, stream=True, tokens=240) for n in range(40, 50)]
        eventually(lambda: lent(spilling) > 0, 120, "a request at the lender")
        spilling.kill("ServeReplica:llm:Engine")
        broken = [answer.exception() for answer in asked]
    assert any(broken)
    eventually(lambda: lent(spilling) == 0, 60, "the guests' blocks free again")
    eventually(lambda: len(spilling.occupancy()) == 2, 120, "two replicas again")
    eventually(lambda: not lending(spilling).leases, 30, "no lease left")
    assert ask(client, 40)


def test_when_the_lender_is_killed_its_guests_are_computed_anew(spilling: Deployment) -> None:
    client = spilling.client(timeout=300)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, client, n, stream=True, tokens=240) for n in range(20, 30)]
        eventually(lambda: lent(spilling) > 0, 120, "a request at the lender")
        spilling.kill("ServeReplica:llm:Lender")
        answers = [answer.result() for answer in asked]
    assert all(answers)
    eventually(lambda: outcomes(spilling).get("came_back", 0) > 0, 30, "a request that came back")
    names = {name for name in dashboard_metrics() if re.search("spill|recomputed", name)}
    eventually(lambda: names <= spilling.metric_names(), 30, "what the dashboard shows of moves")
    eventually(lambda: spilling.running() == 0, 60, "an idle deployment")
