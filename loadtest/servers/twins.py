"""The deployment that is soaked and disturbed: two replicas that lend and keep sessions."""

from pathlib import Path
from typing import Any

import yaml

_CONFIG = Path(__file__).parents[2] / "configs" / "spill.yaml"
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
