"""The deployment that is soaked and disturbed: two replicas that lend and keep sessions."""

from pathlib import Path
from typing import Any

import yaml

_CONFIG = Path(__file__).parents[2] / "serving" / "configs" / "spill.yaml"
_HOST_BYTES = 256 << 20


def twins_config() -> dict[str, Any]:
    """Return a configuration of `serve run`: two equal replicas, with spill and sessions."""
    config: dict[str, Any] = yaml.safe_load(_CONFIG.read_text())
    (application,) = config["applications"]
    args = application["args"]
    del args["spill"]["lenders"]
    args["replica"]["count"] = 2
    args["compression"]["sessions"] = {"enabled": True, "host_bytes": _HOST_BYTES}
    args["engine"]["kv_events_config"] = {"enable_kv_cache_events": True}
    return config


def on_the_head(config: dict[str, Any], deployment: str) -> dict[str, Any]:
    """Return a copy of a configuration with one deployment on the head of a cluster.

    Its options are those of `serving.app.ingress_options`, which such a change replaces as a whole.
    """
    (application,) = config["applications"]
    options = {
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
        "runtime_env": {
            "env_vars": {
                "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
                "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
            }
        },
    }
    placed = {"name": deployment, "ray_actor_options": options}
    deployments = [*application.get("deployments", ()), placed]
    return {**config, "applications": [{**application, "deployments": deployments}]}
