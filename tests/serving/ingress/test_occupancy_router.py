"""The request router that Ray Serve creates, with a chooser that the ingress has set."""

import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.lending.leases import Lease
from adakv_serve.router.local_view import LocalView
from adakv_serve.serving.app import engine_options
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.ingress.occupancy_router import OccupancyRouter
from adakv_serve.serving.ingress.routing import Routing, configured_routing
from adakv_serve.serving.spill.parcels import LenderName
from adakv_serve.serving.spill.peers import Addressee
from tests.router.occupancies import occupancy

FOOTPRINT = Footprint(10, 10, 300, 20, (1, 2, 3))
ENGINE = DeploymentID("Engine", "llm")


class Replica:
    """The part of Serve's running replica that a router uses."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, ENGINE)
        self.max_ongoing_requests = 8

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace()


ONE, TWO, THREE = replicas = [Replica(name) for name in ("one", "two", "three")]


class Router(OccupancyRouter):
    """A router of its own process, as far as `routing` goes."""


@pytest.fixture
def view() -> LocalView:
    """The replicas' reports: `two` has the least to do, `one` the most."""
    view = LocalView(ttl_s=600)
    for name, queued in (("one", 9000), ("two", 0), ("three", 3000)):
        report = occupancy(name, waiting=0, prefill_tokens_queued=queued)
        view.accept(report, time.monotonic())
    return view


@pytest.fixture
def router(view: LocalView) -> Iterator[OccupancyRouter]:
    Router.routing = Routing(Chooser(view, rng=random.Random(0)), log_decisions=True)
    yield Router(ENGINE, DeploymentHandleSource.REPLICA)
    Router.routing = None


def pending(*args: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id=f"{id(args)}")
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


async def ranks(router: OccupancyRouter, request: PendingRequest | None) -> list[list[str]]:
    chosen = await router.choose_replicas(replicas, request)  # type: ignore[arg-type]
    return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]


async def test_a_request_with_a_footprint_tries_replicas_from_the_best_to_the_worst(
    router: OccupancyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    request = pending({}, b"", FOOTPRINT)
    assert await ranks(router, request) == [["two"], ["three"], ["one"]]
    router.on_request_routed(request, TWO.replica_id, None)
    (line,) = [one.message for one in caplog.records if one.message.startswith("routing ")]
    assert json.loads(line.removeprefix("routing "))["replica"] == "two"


async def test_other_requests_go_to_one_of_two_random_replicas(router: OccupancyRouter) -> None:
    for request in (pending({}, b"", None), pending(), None):
        (two,) = await ranks(router, request)
        assert len(set(two)) == 2
    Router.routing = None
    (two,) = await ranks(router, pending({}, b"", FOOTPRINT))
    assert len(set(two)) == 2


async def test_before_the_first_report_all_go_to_one_of_two_random_replicas() -> None:
    Router.routing = Routing(Chooser(LocalView()), log_decisions=False)
    try:
        (two,) = await ranks(
            Router(ENGINE, DeploymentHandleSource.REPLICA), pending({}, b"", FOOTPRINT)
        )
    finally:
        Router.routing = None
    assert len(set(two)) == 2


async def test_a_request_tells_its_replica_who_holds_its_prompt(router: OccupancyRouter) -> None:
    first, other = (
        pending({}, b"", FOOTPRINT),
        pending({}, b"", FOOTPRINT._replace(block_hashes=(9,))),
    )
    await ranks(router, first)
    assert first.args[-1].holder is None
    router.on_request_routed(first, THREE.replica_id, None)
    again = pending({}, b"", FOOTPRINT)
    # It may have less to do elsewhere.
    for request, holder in ((again, "three"), (other, None)):
        await ranks(router, request)
        assert request.args[-1].holder == holder


async def test_a_call_between_replicas_goes_to_its_addressee_alone(router: OccupancyRouter) -> None:
    assert await ranks(router, pending("ask", "node", Addressee("three"))) == [["three"]]
    assert await ranks(router, pending("ask", "node", Addressee("gone"))) == [["one"]]


async def test_a_moved_request_goes_to_its_lender_alone(router: OccupancyRouter) -> None:
    name = LenderName("Engine", "three", "node")
    lease = Lease("id", str(name), "borrower", "blocks", 5)
    assert await ranks(router, pending("guest", lease)) == [["three"]]
    gone = lease._replace(lender=str(name._replace(replica_id="gone")))
    # Any other replica refuses it. Without candidates Serve would look for ever.
    assert await ranks(router, pending("guest", gone)) == [["one"]]


async def test_a_request_that_has_been_routed_is_booked_where_it_went(
    router: OccupancyRouter, view: LocalView
) -> None:
    request = pending({}, b"", FOOTPRINT)
    router.on_request_routed(request, ONE.replica_id, None)
    router.on_request_routed(pending({}, b"", None), TWO.replica_id, None)
    views = view.views(["one", "two"], time.monotonic())
    booked = {one.replica_id: one.waiting for one in views}
    assert booked == {"one": 1, "two": 0}


async def test_replicas_that_are_gone_are_forgotten(
    router: OccupancyRouter, view: LocalView
) -> None:
    router.update_replicas([ONE, THREE])  # type: ignore[list-item]
    assert set(view.replica_ids) == {"one", "three"}


def test_routers_in_another_process_have_what_is_set_there(tmp_path: Path) -> None:
    config = engine_options(AppConfig(), on_cpus=True)["request_router_config"]
    sent = tmp_path / "class"
    sent.write_bytes(config.get_serialized_request_router_cls())
    other_process = f"""
import pathlib, cloudpickle
from adakv_serve.serving.ingress.occupancy_router import OccupancyRouter
OccupancyRouter.routing, OccupancyRouter.membership = "routing", "membership"
router = cloudpickle.loads(pathlib.Path({str(sent)!r}).read_bytes())
print(router.__name__, router.routing, router.membership)
"""
    output = subprocess.check_output([sys.executable, "-c", other_process], text=True)
    assert output.split() == ["ServedRouter", "routing", "membership"]


def test_routing_is_configured_or_left_to_serve() -> None:
    assert configured_routing(AppConfig()) is not None
    stock = AppConfig.model_validate({"routing": {"policy": "power_of_two"}})
    assert configured_routing(stock) is None


async def test_a_request_counts_once_however_often_it_looks_for_a_place(
    router: OccupancyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert Router.routing is not None
    known, unknown = pending({}, b"", FOOTPRINT), pending({}, b"", None)
    for request in (known, unknown):
        for _ in range(20):
            await ranks(router, request)
    assert Router.routing.decisions.counts == {}
    for request in (known, unknown):
        router.on_request_routed(request, TWO.replica_id, None)
    assert Router.routing.decisions.counts == {"least_cost": 1, "no_footprint": 1}
    assert len([one for one in caplog.records if one.message.startswith("routing ")]) == 1


async def test_calls_between_replicas_are_no_routed_requests(router: OccupancyRouter) -> None:
    assert Router.routing is not None
    router.on_request_routed(pending("ask", "node", Addressee("three")), THREE.replica_id, None)
    assert Router.routing.decisions.counts == {}


async def test_a_footprint_out_of_all_range_hangs_no_request(
    router: OccupancyRouter, caplog: pytest.LogCaptureFixture
) -> None:
    request = pending({}, b"", FOOTPRINT._replace(output_tokens=10**400))
    (two,) = await ranks(router, request)
    assert len(set(two)) == 2
    assert "no replica could be chosen" in caplog.text
    router.on_request_routed(request, ONE.replica_id, None)
