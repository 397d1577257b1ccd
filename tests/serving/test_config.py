"""The configuration: what it refuses, and the options of Ray Serve that it turns into."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serving.app import api_keys, engine_options
from serving.config import AppConfig
from serving.http.api_keys import ApiKeys, vllm_keys

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    AppConfig.model_validate(application["args"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modle": {}}, "unknown key 'modle' in AppConfig: did you mean 'model'?"),
        ({"replica": {"cont": 1}}, "unknown key 'cont' in ReplicaConfig: did you mean 'count'?"),
        (
            {"engine": {"max_model_length": 5}},
            "unknown key 'max_model_length' in engine (vllm.AsyncEngineArgs): "
            "did you mean 'max_model_len'?",
        ),
        ({"server": {"tool_parser": "x"}}, "unknown key 'tool_parser' in server"),
        ({"engine": {"model": "x"}}, "engine.model is set by model.path"),
        ({"store": {"url": "http://x"}}, "redis:// or rediss://"),
        ({"replica": {"placement_group_bundles": [{"GPU": 1}]}}, "executor_backend: ray"),
        ({"replica": {"count": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_remedy(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(args)
    assert message in str(caught.value)


def test_a_printed_configuration_hides_its_secrets() -> None:
    config = AppConfig.model_validate(
        {"auth": {"api_keys": ["hush"]}, "store": {"url": "redis://:hush@h"}}
    )
    assert "hush" not in repr(config)


def test_keys_come_from_the_config_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAKV_API_KEYS", "b, c,")
    assert api_keys(AppConfig.model_validate({"auth": {"api_keys": ["a"]}})) == ("a", "b", "c")


@pytest.mark.parametrize(
    "auth", [{"api_keys": [""]}, {"api_keys": [" "]}, {"api_keys_env": "PROD_KEYS"}]
)
def test_missing_keys_are_an_error_if_the_configuration_asks_for_some(
    auth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PROD_KEYS", "ADAKV_API_KEYS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="auth asks for API keys"):
        api_keys(AppConfig.model_validate({"auth": auth}))
    assert api_keys(AppConfig()) == ()


def test_the_key_in_vllms_own_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "xyzzy")
    keys = ApiKeys(vllm_keys())
    assert keys.allow("/v1/models", "GET", {"authorization": "Bearer xyzzy"})
    assert not keys.allow("/v1/models", "GET", {})
    monkeypatch.delenv("VLLM_API_KEY")
    assert vllm_keys() == ()


def test_configured_gpus_are_reserved() -> None:
    config = AppConfig.model_validate({"replica": {"gpus": 2, "cpus": 3}})
    assert engine_options(config)["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 2}


@pytest.mark.parametrize(("on_cpus", "gpus"), [(True, {}), (False, {"num_gpus": 2})])
def test_gpus_follow_tensor_parallel_size_with_vllm_for_gpus(
    on_cpus: bool, gpus: dict[str, int]
) -> None:
    config = AppConfig.model_validate({"engine": {"tensor_parallel_size": 2}})
    assert engine_options(config, on_cpus)["ray_actor_options"] == {"num_cpus": 1, **gpus}


@pytest.mark.parametrize(
    ("args", "most"),
    [
        ({"engine": {"max_num_seqs": 256}}, 512),
        ({"engine": {"max_num_seqs": 256}, "replica": {"max_ongoing_requests": 8}}, 8),
        ({}, 2048),
    ],
)
def test_a_replica_takes_twice_the_requests_that_its_engine_runs_at_once(
    args: dict[str, Any], most: int
) -> None:
    assert engine_options(AppConfig.model_validate(args))["max_ongoing_requests"] == most


def test_a_replica_over_several_nodes_gets_one_bundle_per_worker() -> None:
    bundles = [{"GPU": 1, "CPU": 1}] * 2
    config = AppConfig.model_validate(
        {
            "engine": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
            "replica": {"placement_group_bundles": bundles},
        }
    )
    options = engine_options(config)
    assert options["placement_group_bundles"] == bundles
    assert "num_gpus" not in options["ray_actor_options"]
