"""The autoscaling policy that Ray Serve loads, by `autoscaling_config.policy` of the Engine."""

import time
from collections.abc import Mapping
from typing import Any

from adakv_serve.router.autoscaling import FleetSize, ReplicaDemand, ScalingTargets


class OccupancyPolicy:
    """Scales by live compressed occupancy, from `record_autoscaling_stats` of the replicas."""

    def __init__(self, **targets: Any) -> None:
        """
        Args:
            targets: Serve's `policy_kwargs`, the fields of `router.autoscaling.ScalingTargets`.

        Raises:
            pydantic.ValidationError: unknown or impossible targets.
        """
        self._size = FleetSize(ScalingTargets(**targets))

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        replicas = reported(ctx.aggregated_metrics or {})
        wanted = self._size.wanted(
            replicas,
            ctx.target_num_replicas,
            ctx.total_num_requests,
            ctx.total_queued_requests or 0.0,
            time.monotonic(),
        )
        return wanted, {}


def reported(metrics: Mapping[str, Mapping[Any, float]]) -> list[ReplicaDemand]:
    """Return the replicas' reports, from Serve's values by metric and replica."""
    by_replica: dict[Any, dict[str, float]] = {}
    for name in ReplicaDemand.model_fields:
        for replica, value in metrics.get(name, {}).items():
            by_replica.setdefault(replica, {})[name] = value
    return [ReplicaDemand(**fields) for fields in by_replica.values() if fields.get("blocks_total")]
