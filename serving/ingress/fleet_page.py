"""The fleet page of an ingress: what it shows, and the size that Serve wants the fleet to have."""

from typing import Any

from ray import serve
from ray.serve.context import _get_global_client

from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.asgi import ASGIApp
from adakv_serve.serving.http.door import Door
from adakv_serve.serving.http.page.app import FleetPage
from adakv_serve.serving.http.page.feed import Feed, FeedSource, Scale
from adakv_serve.serving.ingress.routing import Routing
from adakv_serve.serving.ingress.watched import Watched
from adakv_serve.serving.supervision import Supervisor
from adakv_worker.config import policy_names


def with_fleet_page(
    app: ASGIApp, door: Door, config: AppConfig, routing: Routing | None, tasks: Supervisor
) -> ASGIApp:
    """Return an app that answers the fleet page, too, unless the configuration turns it off."""
    page = config.ingress.page
    if not page.enabled:
        return app
    application = serve.get_replica_context().app_name
    watch = Watched("the fleet's wanted size", lambda: wanted_scale(application))
    source = FeedSource(list, None, lambda: watch.latest)
    if routing is not None:
        source = source._replace(reports=routing.reports, decisions=routing.decisions)
    facts = {"application": application, "ingress": routing.ingress_id[:8] if routing else ""}
    feed = Feed(source, {**facts, **configured_facts(config)}, page.max_viewers)
    tasks.keep("fleet page", feed.run)
    tasks.keep("fleet size", lambda: watch.run(lambda: feed.viewers > 0))
    return FleetPage(app, door, feed)


def configured_facts(config: AppConfig) -> dict[str, Any]:
    """Return what the page shows of the configuration, and what its form may ask for."""
    facts: dict[str, Any] = {
        "routing": config.routing.policy,
        "block_size_tokens": config.block_size_tokens,
        "spill": config.spill.enabled,
        "compression": None,
    }
    compression = config.compression
    if compression is not None and compression.enabled:
        facts["compression"] = {
            "policy": compression.policy,
            "policies": [
                name for name in policy_names() if name != "full" or compression.allow_full
            ],
            "min_budget_tokens": compression.min_budget_tokens,
            "max_budget_tokens": compression.max_budget_tokens,
            "detail": compression.allow_detail,
        }
    return facts


def wanted_scale(application: str) -> Scale | None:
    """Return the number of replicas that Serve's controller wants; None if there are none."""
    client = _get_global_client()
    assert client is not None, "an ingress is part of a cluster"
    applications: dict[str, Any] = client.get_serve_details()["applications"]
    deployments = applications.get(application, {}).get("deployments", {})
    engine = deployments.get("Engine")
    if engine is None:
        return None
    # Lenders report, too, and do not scale.
    lenders = deployments.get("Lender", {}).get("target_num_replicas", 0)
    auto = engine["deployment_config"].get("autoscaling_config") or {}
    bounds = (auto.get(name) for name in ("min_replicas", "max_replicas"))
    least, most = (None if bound is None else bound + lenders for bound in bounds)
    return Scale(engine["target_num_replicas"] + lenders, least, most)
