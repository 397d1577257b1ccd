"""Renders the chart, and reads what comes out."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house.sources import ROOT

WITH_EXTRA = "needs scripts/install loadtest,dev,deploy"
helm = pytest.importorskip("helm_python", reason=WITH_EXTRA)

CHART = ROOT / "deploy" / "helm" / "adakv-serve"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))

# Everything on, as no example has it.
ALL_ON: dict[str, Any] = {
    "image": {"repository": "images.example/adakv-serve", "tag": "7", "pullSecrets": ["pull"]},
    "app": {
        "model": {"path": "/models/m", "name": "m"},
        "engine": {"tensor_parallel_size": 2, "max_model_len": 4096},
        "auth": {"limits": {"requests_at_once": 3}},
    },
    "replicas": {"min": 1, "max": 8},
    "gpu": {"enabled": True},
    "worker": {
        "annotations": {"a": "b"},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
    },
    "modelVolume": {"existingClaim": "models"},
    "secrets": {"modelHub": "hub", "tls": "tls"},
    "networkPolicy": {"clients": [{"podSelector": {}}]},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "env": [{"name": "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "value": "grpc"}],
}
ALL_OFF: dict[str, Any] = {
    "app": {"compression": None, "auth": {"open": True}},
    "secrets": {"apiKeys": ""},
    "store": {"redis": {"enabled": False}},
    "networkPolicy": {"enabled": False},
    "rayToken": False,
}


def example(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    return values


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all_on": ALL_ON,
    "all_off": ALL_OFF,
    "to_zero": {"replicas": {"min": 0, "max": 2}},
    **{path.stem: example(path.stem) for path in EXAMPLES},
}
each_variant = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)


def texts(values: dict[str, Any], name: str = "adakv", chart: Path = CHART) -> dict[str, str]:
    """Return the rendered files by their names in templates/."""
    with helm.Chart.load(chart) as loaded:
        rendered = loaded.render(values, name=name, namespace="serve")
    return {path.rpartition("/")[2]: text for path, text in rendered.items()}


def documents(values: dict[str, Any], name: str = "adakv") -> list[dict[str, Any]]:
    rendered = texts(values, name)
    del rendered["NOTES.txt"]
    return [one for text in rendered.values() for one in yaml.safe_load_all(text) if one]


def kind(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the first document of a kind."""
    return next(one for one in found if one["kind"] == name)


def ray_service(values: dict[str, Any], name: str = "adakv") -> dict[str, Any]:
    spec: dict[str, Any] = kind(documents(values, name), "RayService")["spec"]
    return spec


def serve_config(values: dict[str, Any], name: str = "adakv") -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(ray_service(values, name)["serveConfigV2"])
    return config


def groups(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the head's and the workers' group of a RayService."""
    cluster = service["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"], "worker": workers}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return dict(found)


def environment(group: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(group)["env"]}
