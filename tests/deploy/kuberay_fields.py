"""The fields of KubeRay's RayService that our manifests may have, with their types.

Written by hand after KubeRay's API reference (`ray.io/v1`, 1.5.1 and newer), as far as the chart
uses it. Pod templates are Kubernetes' own and are checked by its schema.
"""

from collections.abc import Iterator
from typing import Any

POD_TEMPLATE = "a pod template"
TEXTS = "a map of texts"
SECURITY = "a security context"

AUTOSCALER = {"idleTimeoutSeconds": int, "securityContext": SECURITY}
HEAD = {"rayStartParams": TEXTS, "template": POD_TEMPLATE}
WORKERS = {
    "groupName": str,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": TEXTS,
    "template": POD_TEMPLATE,
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": AUTOSCALER,
    "headGroupSpec": HEAD,
    "workerGroupSpecs": [WORKERS],
}
SERVICE = {
    "upgradeStrategy": {"type": str},
    "rayClusterDeletionDelaySeconds": int,
    "excludeHeadPodFromServeSvc": bool,
    "serveConfigV2": str,
    "rayClusterConfig": CLUSTER,
}
# Flags of `ray start` that the chart sets; `address` and others are KubeRay's.
START_FLAGS = {
    "num-cpus",
    "num-gpus",
    "port",
    "object-store-memory",
    "node-manager-port",
    "object-manager-port",
    "min-worker-port",
    "max-worker-port",
    "metrics-export-port",
    "dashboard-agent-listen-port",
}


def problems(value: Any, allowed: Any = SERVICE, at: str = "spec") -> Iterator[str]:
    """Yield what a RayService's spec has that KubeRay does not know, or takes otherwise."""
    if isinstance(allowed, dict):
        if not isinstance(value, dict):
            yield f"{at} is no map"
            return
        for key, one in value.items():
            if key not in allowed:
                yield f"{at}.{key} is unknown"
            else:
                yield from problems(one, allowed[key], f"{at}.{key}")
    elif isinstance(allowed, list):
        for number, one in enumerate(value):
            yield from problems(one, allowed[0], f"{at}[{number}]")
    elif allowed == TEXTS:
        yield from (f"{at}.{key} is no text" for key, one in value.items() if type(one) is not str)
    elif isinstance(allowed, type) and type(value) is not allowed:
        yield f"{at} is {value!r}"


def pod_templates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]
