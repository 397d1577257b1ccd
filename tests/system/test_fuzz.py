"""Odd requests at the running application; `python -m loadtest.fuzz` sends more of them."""

from adakv_serve.loadtest.fuzz import Deployed, fuzz
from tests.system.deployment import API_KEY, Deployment


def test_odd_requests_break_nothing(deployment: Deployment) -> None:
    deployed = Deployed(deployment.base_url, deployment.store_url, replicas=2, key=API_KEY)
    found = fuzz(deployed, seed=1, numbers=range(150), concurrency=6, limit_s=60)
    faults = found.campaign.faults
    assert not faults, "\n".join([*map(str, faults), *found.lines()])
    assert found.wrong_after == []
