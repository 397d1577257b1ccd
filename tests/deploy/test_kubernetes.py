"""What the chart renders is what Kubernetes and KubeRay take."""

import importlib
from typing import Any

import pytest
import yaml

from tests.deploy.charts import WITH_EXTRA, documents, each_variant, groups, ray_service
from tests.deploy.kuberay_fields import START_FLAGS, pod_templates, problems
from tests.house.sources import ROOT

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=WITH_EXTRA)

MANIFESTS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
# The oldest that Chart.yaml allows, and the newest that the package has.
VERSIONS = ("1.25", kubernetes_validate.latest_version())
# Their schemas are KubeRay's and the Prometheus operator's.
CUSTOM = {"RayService", "PodMonitor", "PrometheusRule"}

each_version = pytest.mark.parametrize("version", VERSIONS)


def check(found: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(found, version, strict=True)


def check_all(found: list[dict[str, Any]], version: str) -> None:
    assert found
    for one in found:
        if one["kind"] not in CUSTOM:
            check(one, version)
    for service in (one for one in found if one["kind"] == "RayService"):
        assert list(problems(service["spec"])) == []
        for template in pod_templates(service["spec"]):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            check(pod, version)


@each_version
@each_variant
def test_rendered_documents_match_the_schemas(values: dict[str, Any], version: str) -> None:
    check_all(documents(values), version)


@each_version
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_match_the_schemas(path: Any, version: str) -> None:
    check_all(list(yaml.safe_load_all(path.read_text())), version)


def test_an_unknown_field_of_a_pod_is_found() -> None:
    service = ray_service({})
    groups(service)["worker"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    found = {"apiVersion": "ray.io/v1", "kind": "RayService", "spec": service}
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        check_all([found], VERSIONS[-1])


def test_an_unknown_field_of_a_ray_service_is_found() -> None:
    service = ray_service({})
    service["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert list(problems(service)) == [
        "spec.rayClusterConfig.workerGroupSpecs[0].minReplica is unknown"
    ]


@each_variant
def test_flags_of_ray_start_exist(values: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    flags = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    assert flags >= START_FLAGS
    for group in groups(ray_service(values)).values():
        assert set(group["rayStartParams"]) <= START_FLAGS


@pytest.mark.parametrize(("size", "half"), [("1.5Gi", 3 << 28), ("512Mi", 1 << 28), ("2G", 10**9)])
def test_rays_objects_take_half_of_shared_memory(size: str, half: int) -> None:
    both = {"worker": {"sharedMemory": size}, "head": {"sharedMemory": size}}
    for group in groups(ray_service(both)).values():
        assert group["rayStartParams"]["object-store-memory"] == str(half)


def test_commands_that_kuberay_runs_in_the_image_exist() -> None:
    from ray.scripts.scripts import cli

    # For the autoscaler beside the head, and for workers that wait for it.
    assert {"kuberay-autoscaler", "health-check"} <= set(cli.commands)
    importlib.import_module("ray.autoscaler._private.kuberay.run_autoscaler")
