"""The Serve configuration that the chart writes is what Ray Serve and our application take."""

import copy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from adakv_serve.serving.app import engine_options, ingress_options
from adakv_serve.serving.autoscaling import OccupancyPolicy
from adakv_serve.serving.config import AppConfig
from tests.deploy.charts import VARIANTS, each_variant, example, ray_service, serve_config
from tests.house.sources import ROOT

SERVED_ALIKE = {"autoscale": "autoscale.yaml", "cpu": "cluster.yaml", "spill": "spill.yaml"}


def app_config(values: dict[str, Any]) -> AppConfig:
    (application,) = serve_config(values)["applications"]
    return AppConfig.model_validate(application["args"])


@each_variant
def test_ray_serve_takes_it(values: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(values))
    (application,) = schema.applications
    assert application.import_path == "adakv_serve.serving.app:build"
    # Deployments that are named must be those that `build` makes.
    assert {one.name for one in application.deployments} <= {"Engine"}


@each_variant
def test_the_application_takes_its_args(values: dict[str, Any]) -> None:
    config = app_config(values)
    on_cpus = not values.get("gpu", {}).get("enabled", False)
    assert engine_options(config, on_cpus)["num_replicas"] == max(
        1, values.get("replicas", {}).get("max", 1)
    )
    assert ingress_options(config)["num_replicas"] == config.ingress.count


def test_settings_of_the_application_pass_through_unchanged() -> None:
    values = VARIANTS["all_on"]
    (application,) = serve_config(values)["applications"]
    args = copy.deepcopy(application["args"])
    assert args.pop("store") == {
        "url_env": "ADAKV_STORE_URL",
        "key_prefix": app_config(values).store.key_prefix,
    }
    assert args["auth"].pop("keys_file") == "/etc/adakv/keys/keys"
    assert args.pop("replica") == {"count": 8}
    assert args == {**values["app"], "compression": {"policy": "auto"}}


@pytest.mark.parametrize(("name", "file"), SERVED_ALIKE.items())
def test_an_example_serves_as_the_configuration_of_that_kind(name: str, file: str) -> None:
    (ours,) = yaml.safe_load((ROOT / "configs" / file).read_text())["applications"]
    (theirs,) = serve_config(example(name))["applications"]
    for section in ("engine", "compression", "server", "spill"):
        assert theirs["args"].get(section) == ours["args"].get(section), section


def test_an_engine_on_cpus_has_its_pod_for_itself() -> None:
    assert app_config({"worker": {"cpus": 6}}).replica.cpus == 6
    assert app_config({"app": {"replica": {"cpus": 0.5}}}).replica.cpus == 0.5
    assert "cpus" not in app_config(example("gpu")).replica.model_fields_set


def test_the_occupancy_policy_scales_where_max_is_above_min() -> None:
    (application,) = serve_config(example("autoscale"))["applications"]
    (engine,) = application["deployments"]
    scaling = engine["autoscaling_config"]
    assert (engine["num_replicas"], scaling["min_replicas"], scaling["max_replicas"]) == (
        "auto", 1, 3
    )  # fmt: skip
    assert scaling["policy"]["policy_function"] == "adakv_serve.serving.autoscaling:OccupancyPolicy"
    OccupancyPolicy(**scaling["policy"]["policy_kwargs"])
    assert "deployments" not in serve_config(example("cpu"))["applications"][0]


def test_wrong_targets_of_the_policy_are_found() -> None:
    with pytest.raises(ValidationError, match="target_occupancy"):
        OccupancyPolicy(target_occupancy=2)


def test_two_ray_clusters_of_an_upgrade_have_keys_of_their_own() -> None:
    def prefix(**values: Any) -> str:
        return app_config(values).store.key_prefix

    assert prefix(image={"tag": "2"}) != prefix(image={"tag": "3"})
    assert prefix() != app_config_of_release("other").store.key_prefix


def test_what_changes_in_a_running_ray_cluster_keeps_its_keys() -> None:
    first = app_config({"replicas": {"min": 1, "max": 2}}).store.key_prefix
    more = {"replicas": {"min": 1, "max": 4}, "app": {"engine": {"max_num_seqs": 8}}}
    assert app_config(more).store.key_prefix == first


def app_config_of_release(name: str) -> AppConfig:
    (application,) = serve_config({}, name)["applications"]
    return AppConfig.model_validate(application["args"])


@each_variant
def test_streams_may_end_before_the_cluster_from_before_an_upgrade_goes(
    values: dict[str, Any],
) -> None:
    delay = ray_service(values)["rayClusterDeletionDelaySeconds"]
    assert delay >= app_config(values).replica.graceful_shutdown_timeout_s
