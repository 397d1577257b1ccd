"""What the chart makes of its values, and which it refuses."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from adakv_serve.router.autoscaling import ScalingTargets
from adakv_serve.serving.config import AppConfig
from tests.deploy.charts import (
    CHART,
    VARIANTS,
    container,
    documents,
    each_variant,
    environment,
    example,
    groups,
    helm,
    kind,
    ray_service,
    texts,
)
from tests.house.sources import ROOT

# The table in docs/multinode.md lists these ports. The kernel chooses the others.
PORTS_BETWEEN_NODES = {(6379, 6381), (8000, 8000), (8500, 8500), (10002, 10999), (30000, 31000)}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replica": 1}, "additional properties 'replica' not allowed"),
    ({"image": {"version": "1"}}, "at '/image': additional properties 'version' not allowed"),
    ({"app": {"engin": {}}}, "at '/app': additional properties 'engin' not allowed"),
    ({"app": {"replica": {"count": 3}}}, "at '/app/replica': additional properties 'count'"),
    ({"app": {"store": {"url": "redis://r"}}}, "at '/app': additional properties 'store'"),
    ({"app": {"auth": {"api_keys": ["k"]}}}, "at '/app/auth': additional properties 'api_keys'"),
    ({"app": {"compression": {"budget": 1}}}, "additional properties 'budget' not allowed"),
    ({"app": {"spill": {"lend_share": 2}}}, "at '/app/spill/lend_share': maximum: got 2, want 1"),
    ({"app": {"routing": {"policy": "best"}}}, "at '/app/routing/policy': value must be one of"),
    ({"replicas": {"min": "2"}}, "at '/replicas/min': got string, want integer"),
    ({"replicas": {"min": 3, "max": 2}}, "replicas.max=2 is below replicas.min=3"),
    ({"autoscaling": {"policy": {"target": 1}}}, "at '/autoscaling/policy': additional properties"),
    ({"gpu": {"enabled": "yes"}}, "at '/gpu/enabled': got string, want boolean"),
    ({"worker": {"memory": "8 GB"}}, "at '/worker/memory': '8 GB' does not match pattern"),
    ({"worker": {"minPods": 3, "maxPods": 2}}, "worker.maxPods=2 is below worker.minPods=3"),
    ({"secrets": {"apiKeys": ""}}, "secrets.apiKeys is empty: name a Secret"),
    ({"secrets": {"store": ""}}, "secrets.store is empty: name a Secret"),
    ({"secrets": {"apiKeys": "sk/secret"}}, "at '/secrets/apiKeys'"),
    ({"secrets": {"tls": "t"}, "replicas": {"min": 0}}, "secrets.tls needs replicas.min"),
    ({"upgrade": {"strategy": "Recreate"}}, "at '/upgrade/strategy': value must be one of"),
    ({"localPorts": {"min": 20000, "max": 32000}}, "localPorts contain 30000"),
    (
        {"gpu": {"enabled": True, "perPod": 1}, "app": {"engine": {"tensor_parallel_size": 2}}},
        "gpu.perPod=1 is below app.engine.tensor_parallel_size=2",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(v) for v, _ in REFUSED])
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(message)):
        texts(values)


@pytest.mark.parametrize("name", ["a" * 41, "1st"])
def test_a_name_that_kuberay_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(helm.HelmError, match="the release's name"):
        texts({}, name)


@each_variant
def test_helm_finds_nothing_to_complain_of(values: dict[str, Any]) -> None:
    # 1 is information: there is no icon.
    assert [one for one in helm.lint(CHART, values)["messages"] if one["severity"] > 1] == []


def test_files_that_are_computed_are_up_to_date() -> None:
    subprocess.run([sys.executable, "scripts/manifests", "--check"], cwd=ROOT, check=True)


def test_the_schema_allows_no_unknown_key_but_where_others_decide() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    loose = {
        path
        for path, one in _objects(schema, "")
        if one.get("additionalProperties", True) is True and "$ref" not in one
    }
    # Kubernetes' own objects, vLLM's settings, and values that a parent chart shares.
    others = {"affinity", "valueFrom", "items", "global", "engine", "server"}
    assert {path.rpartition("/")[2] for path in loose} == others


def _objects(value: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(value, list):
        return [found for one in value for found in _objects(one, path)]
    if not isinstance(value, dict):
        return []
    found = [(path, value)] if value.get("type") == "object" else []
    return found + [hit for key, one in value.items() for hit in _objects(one, f"{path}/{key}")]


def test_the_schema_has_all_settings_that_the_chart_does_not_set() -> None:
    definitions = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    settings = set(definitions["AppConfig"]["properties"])
    assert set(AppConfig.model_fields) - settings == {"store"}
    assert set(definitions["ScalingTargets"]["properties"]) == set(ScalingTargets.model_fields)


@each_variant
def test_no_secret_is_rendered(values: dict[str, Any]) -> None:
    found = documents(values)
    assert "Secret" not in {one["kind"] for one in found}
    for group in groups(ray_service(values)).values():
        for name, value in environment(group).items():
            if re.search(r"PASSWORD|TOKEN|KEY", name):
                assert set(value) == {"secretKeyRef"}, name
    for url in re.findall(r"rediss?://\S*", "".join(texts(values).values())):
        assert re.fullmatch(r"redis://:\$\(ADAKV_STORE_PASSWORD\)@[\w-]+:6390/0", url)


@each_variant
def test_pods_have_no_rights_that_they_do_not_need(values: dict[str, Any]) -> None:
    found = documents(values)
    pods = [group["template"]["spec"] for group in groups(ray_service(values)).values()]
    pods += [one["spec"]["template"]["spec"] for one in found if one["kind"] == "Deployment"]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"]:
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["limits"] == one["resources"]["requests"]


@each_variant
def test_the_first_defined_variable_is_the_one_that_the_url_names(values: dict[str, Any]) -> None:
    # Kubernetes expands $(NAME) only of variables that come before.
    for group in groups(ray_service(values)).values():
        names = list(environment(group))
        if "ADAKV_STORE_PASSWORD" in names:
            assert names.index("ADAKV_STORE_PASSWORD") < names.index("ADAKV_STORE_URL")


def test_a_store_of_your_own_needs_no_redis() -> None:
    values = VARIANTS["all_off"]
    assert "Deployment" not in {one["kind"] for one in documents(values)}
    for group in groups(ray_service(values)).values():
        url = environment(group)["ADAKV_STORE_URL"]
        assert url == {"secretKeyRef": {"name": "adakv-store", "key": "url"}}


def test_redis_keeps_all_and_stores_nothing() -> None:
    (redis,) = kind(documents({}), "Deployment")["spec"]["template"]["spec"]["containers"]
    command = redis["command"][-1]
    assert "--maxmemory-policy noeviction" in command
    assert "--save ''" in command
    assert "requirepass $PASSWORD" in command


def test_engines_on_gpus_get_as_many_as_they_span() -> None:
    service = ray_service(VARIANTS["all_on"])
    worker, head = groups(service)["worker"], groups(service)["head"]
    assert worker["rayStartParams"]["num-gpus"] == "2"
    assert container(worker)["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert "num-gpus" not in groups(ray_service({}))["worker"]["rayStartParams"]


def test_the_head_runs_no_engine() -> None:
    flags = groups(ray_service(VARIANTS["all_on"]))["head"]["rayStartParams"]
    assert (flags["num-cpus"], flags["num-gpus"]) == ("0", "0")


@pytest.mark.parametrize(
    ("values", "pods"),
    [
        ({}, (1, 1)),
        ({"replicas": {"min": 0, "max": 5}}, (0, 5)),
        (example("spill"), (2, 2)),
        ({"app": {"spill": {"enabled": True, "lenders": {}}}}, (2, 2)),
        ({"app": {"spill": {"enabled": False, "lenders": {"count": 3}}}}, (1, 1)),
        ({"replicas": {"max": 4}, "worker": {"minPods": 2, "maxPods": 3}}, (2, 3)),
    ],
)
def test_rays_autoscaler_has_room_for_all_engines(
    values: dict[str, Any], pods: tuple[int, int]
) -> None:
    service = ray_service(values)
    worker = groups(service)["worker"]
    assert (worker["minReplicas"], worker["maxReplicas"]) == pods
    assert service["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert "HorizontalPodAutoscaler" not in {one["kind"] for one in documents(values)}


def test_workers_are_ready_by_the_applications_health() -> None:
    probe = container(groups(ray_service({}))["worker"])["readinessProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": "serve"}
    # KubeRay sends the application only to a head that is ready.
    assert "readinessProbe" not in container(groups(ray_service({}))["head"])
    tls = container(groups(ray_service(VARIANTS["all_on"]))["worker"])["readinessProbe"]
    assert tls["httpGet"]["scheme"] == "HTTPS"


def test_a_fleet_that_may_go_to_zero_is_reached_through_the_head() -> None:
    assert ray_service({})["excludeHeadPodFromServeSvc"] is True
    assert ray_service(VARIANTS["to_zero"])["excludeHeadPodFromServeSvc"] is False


def test_a_pod_outlives_its_drain() -> None:
    pod = groups(ray_service({"worker": {"drainSeconds": 100}}))["worker"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 100
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "100"]


def test_the_policy_opens_the_ports_between_nodes_and_the_pods_use_them() -> None:
    values = {"localPorts": {"min": 21000, "max": 21999}}
    between, clients, operator, prometheus = kind(documents(values), "NetworkPolicy")["spec"][
        "ingress"
    ]
    dashboards = {(8265, 8265), (52365, 52365)}
    assert _ranges(between) == PORTS_BETWEEN_NODES | dashboards | {(21000, 21999)}
    assert (_ranges(clients), "from" in clients) == ({(8000, 8000)}, False)
    assert _ranges(operator) == {(8265, 8265), (8000, 8000)}
    assert _ranges(prometheus) == {(8080, 8080), (44217, 44217)}
    for group in groups(ray_service(values)).values():
        flags = group["rayStartParams"]
        assert (flags["node-manager-port"], flags["object-manager-port"]) == ("6380", "6381")
        assert (flags["min-worker-port"], flags["max-worker-port"]) == ("10002", "10999")
        (sysctl,) = group["template"]["spec"]["securityContext"]["sysctls"]
        assert sysctl == {"name": "net.ipv4.ip_local_port_range", "value": "21000 21999"}


def test_the_table_of_ports_between_nodes_has_what_the_policy_opens() -> None:
    text = (ROOT / "docs" / "multinode.md").read_text()
    table = text.partition("## What crosses the network")[2].partition("\n\nEach replica")[0]
    listed = {int(number) for number in re.findall(r"\b\d{4,5}\b", table)}
    opened = {port for low, high in PORTS_BETWEEN_NODES for port in (low, high)}
    # 6380 lies between; the store has a pod and a policy of its own.
    assert listed == opened | {6380, 6390}
    _, redis = [one for one in documents({}) if one["kind"] == "NetworkPolicy"]
    assert _ranges(redis["spec"]["ingress"][0]) == {(6390, 6390)}


def _ranges(rule: dict[str, Any]) -> set[tuple[int, int]]:
    return {(one["port"], one.get("endPort", one["port"])) for one in rule["ports"]}


@each_variant
def test_policies_and_monitors_select_pods_that_there_are(values: dict[str, Any]) -> None:
    found = documents(values)
    labels = [
        group["template"]["metadata"]["labels"] for group in groups(ray_service(values)).values()
    ]
    labels += [
        one["spec"]["template"]["metadata"]["labels"]
        for one in found
        if one["kind"] == "Deployment"
    ]
    selectors = [one["spec"]["podSelector"] for one in found if one["kind"] == "NetworkPolicy"]
    selectors += [one["spec"]["selector"] for one in found if one["kind"] == "PodMonitor"]
    for selector in selectors:
        wanted = selector["matchLabels"].items()
        assert any(wanted <= one.items() for one in labels), selector


def test_prometheus_finds_the_port_that_ray_exports_metrics_on() -> None:
    found = documents(VARIANTS["all_on"])
    (endpoint,) = kind(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    for group in groups(ray_service(VARIANTS["all_on"])).values():
        ports = {one["name"]: one["containerPort"] for one in container(group)["ports"]}
        assert ports[endpoint["port"]] == int(group["rayStartParams"]["metrics-export-port"])


def test_monitoring_brings_the_alerts_and_the_dashboard() -> None:
    found = documents(VARIANTS["all_on"])
    monitoring = ROOT / "configs" / "monitoring"
    rule = kind(found, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((monitoring / "alerts.yml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    dashboard = kind(found, "ConfigMap")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    text = (monitoring / "grafana" / "adakv.json").read_text()
    assert json.loads(dashboard["data"]["adakv.json"]) == json.loads(text)


def test_a_second_release_leaves_alerts_and_dashboard_to_the_first() -> None:
    monitoring = {"enabled": True, "alerts": False, "dashboard": {"enabled": False}}
    kinds = {one["kind"] for one in documents({"monitoring": monitoring})}
    assert "PodMonitor" in kinds
    assert kinds.isdisjoint({"PrometheusRule", "ConfigMap"})


def test_volumes_hold_keys_certificate_and_models() -> None:
    for group in groups(ray_service(VARIANTS["all_on"])).values():
        mounts = {one["name"]: one["mountPath"] for one in container(group)["volumeMounts"]}
        assert mounts == {
            "shared-memory": "/dev/shm",
            "keys": "/etc/adakv/keys",
            "tls": "/etc/adakv/tls",
            "models": "/models",
        }
        assert set(mounts) == {one["name"] for one in group["template"]["spec"]["volumes"]}


@each_variant
def test_the_notes_name_the_service_and_the_secrets(values: dict[str, Any]) -> None:
    notes = texts(values)["NOTES.txt"]
    assert "service/adakv-serve-svc" in notes
    assert "adakv-store" in notes
    assert ("no API keys" in notes) == (values.get("secrets", {}).get("apiKeys") == "")
