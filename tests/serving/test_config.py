"""The configuration: what it refuses, and the options of Ray Serve that it turns into."""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from adakv_serve.serving.app import api_keys, engine_options, ingress_options
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.config_sections import ModelConfig
from adakv_serve.serving.http.api_keys import ApiKeys, digests_of, vllm_keys
from adakv_serve.serving.models.embedded import (
    EMBEDDED_MODEL_NAME,
    embedded_model_path,
    model_path_and_name,
)

DOCS = "\n".join(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("*.md"))
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
        ({"engine": {"data_parallel_size": 2}}, "engine.data_parallel_size is 1 here: set replica"),
        (
            {"compression": {"budget": 1}},
            "unknown key 'budget' in CompressionConfig: "
            "did you mean 'budget_tokens' or 'budget_bytes'?",
        ),
        (
            {"engine": {"max_model_length": 5}},
            "unknown key 'max_model_length' in engine (vllm.AsyncEngineArgs): "
            "did you mean 'max_model_len'?",
        ),
        ({"server": {"tool_parser": "x"}}, "unknown key 'tool_parser' in server"),
        ({"engine": {"model": "x"}}, "engine.model is set by model.path"),
        ({"store": {"url": "http://x"}}, "store.url must begin with redis://, rediss://"),
        ({"store": {"url": "redis+sentinel://h"}}, "store.url names no service"),
        ({"store": {"url": "redis://:pass/word@h"}}, "store.url cannot be read"),
        ({"replica": {"placement_group_bundles": [{"GPU": 1}]}}, "executor_backend: ray"),
        ({"replica": {"count": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_remedy(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(args)
    assert message in str(caught.value)


def _types(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) or (field.annotation,)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = [
            kind for kind in _types(field) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if inner:
            yield from _keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


@pytest.mark.parametrize(
    ("key", "field"), [pytest.param(*pair, id=pair[0]) for pair in _keys(AppConfig)]
)
def test_every_key_is_described_and_in_the_docs(key: str, field: FieldInfo) -> None:
    *_, name = key.split(".")
    assert re.search(rf"\b{name}\b", DOCS)
    assert field.description or key.startswith("compression.")


@pytest.mark.parametrize(
    "key", [key for key, field in _keys(AppConfig) if float in _types(field)], ids=str
)
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_no_number_is_infinite(key: str, number: float) -> None:
    value: Any = number
    for name in reversed(key.split(".")):
        value = {name: value}
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(value)
    assert key in {".".join(map(str, error["loc"])) for error in caught.value.errors()}


@pytest.mark.parametrize("path", ["/", "", "v1/load_lora_adapter", "/sleep?level=1", "//", "/a b"])
def test_a_path_to_open_has_a_part_of_its_own(path: str) -> None:
    with pytest.raises(ValidationError, match="more_paths"):
        AppConfig.model_validate({"ingress": {"more_paths": [path]}})
    AppConfig.model_validate({"ingress": {"more_paths": ["/v1/load_lora_adapter", "/sleep/"]}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_front_doors_have_places_for_all_that_autoscaling_may_start(path: Path) -> None:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    config = AppConfig.model_validate(application["args"])
    for deployment in application.get("deployments", ()):
        most = deployment.get("autoscaling_config", {}).get("max_replicas", 0)
        if deployment["name"] == "Engine":
            assert config.replica.count >= most


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"path": "/models/llama"}, ("/models/llama", "llama")),
        ({"path": "org/llama/"}, ("org/llama/", "llama")),
        ({"path": "/models/llama", "name": "mine"}, ("/models/llama", "mine")),
    ],
)
def test_a_model_is_named_after_its_path(model: dict[str, str], expected: tuple[str, str]) -> None:
    config = AppConfig.model_validate({"model": model})
    assert model_path_and_name(config.model) == expected


def test_the_embedded_model_is_served_without_a_path() -> None:
    path, name = model_path_and_name(AppConfig().model)
    assert (path, name) == (str(embedded_model_path()), EMBEDDED_MODEL_NAME)
    assert model_path_and_name(ModelConfig(name="mine")) == (path, "mine")


@pytest.mark.parametrize(
    "spill",
    [
        {"spill": {"enabled": True}},
        {"spill": {"enabled": True}, "compression": {"enabled": False}},
        {
            "spill": {"enabled": True}, "compression": {}, "routing": {"policy": "power_of_two"},
        },
    ],
)  # fmt: skip
def test_spilling_without_its_conditions_is_refused(spill: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"spill\.enabled needs"):
        AppConfig.model_validate(spill)


def test_lenders_are_like_the_other_replicas_but_lend_all() -> None:
    args: dict[str, Any] = {
        "compression": {}, "engine": {"max_num_seqs": 4, "kv_cache_memory_bytes": 100},
        "replica": {"count": 3, "cpus": 2},
        "spill": {"enabled": True, "lend_share": 0.25, "lenders": {"count": 2}},
    }  # fmt: skip
    lending = AppConfig.model_validate(args).for_lenders()
    assert lending is not None
    assert (lending.replica.count, lending.replica.cpus, lending.spill.lend_share) == (2, 2, 1.0)
    assert lending.engine == args["engine"]
    args["spill"]["lenders"]["kv_cache_memory_bytes"] = 900
    larger = AppConfig.model_validate(args).for_lenders()
    assert larger is not None
    assert larger.engine == {"max_num_seqs": 4, "kv_cache_memory_bytes": 900}
    args["spill"]["enabled"] = False
    assert AppConfig.model_validate(args).for_lenders() is None


def test_a_printed_configuration_hides_its_secrets() -> None:
    config = AppConfig.model_validate({"store": {"url": "redis://hush@h"}})
    assert "hush" not in repr(config)


_HUSH: list[dict[str, Any]] = [
    {"auth": {"api_keys": ["hush"]}, "engin": {}},
    {"auth": {"api_keys": ["hush"], "api_key_env": "X"}},
    {"auth": {"api_keys": "hush"}},
    {"auth": {"api_keys": [912345678]}},
    {"auth": {"api_keys": {"hush": 912345678}}},
    {"auth": ["hush"]},
    {"auth": "hush"},
    {"store": {"url": "valkey://:hush@h:1"}},
    {"store": {"url": "redis://:hush/more@h:1"}},
    {"store": {"url": "redis://:hush@h:1"}},
    {"store": {"url": "redis://:hush@h:1", "por": 2}},
    {"store": {"url": ["redis://:hush@h:1"]}},
    {"store": {"url": "redis://hush@h:1", "url_env": "X"}},
    {"engine": {"hf_token": "hush"}},
    {"engine": [{"hf_token": "hush"}]},
    {"server": "hush"},
]


@pytest.mark.parametrize("args", _HUSH, ids=str)
def test_no_refusal_shows_a_secret_and_each_names_its_setting(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(args)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hush" not in shown
    assert "912345678" not in shown
    assert next(iter(args)) in shown or "engin" in shown


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        ({"auth": {"api_keys": ["k"]}}, "auth.keys_file"),
        ({"store": {"url": "redis://:k@h"}}, "store.url_env"),
        ({"engine": {"hf_token": "k"}}, "HF_TOKEN"),
    ],
)
def test_a_secret_that_serve_would_log_is_refused_with_another_way(
    args: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValidationError, match=rf"`serve config`.*{re.escape(remedy)}"):
        AppConfig.model_validate(args)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAKV_API_KEYS", "b, c,")
    assert api_keys(AppConfig()) == ("b", "c")


def test_the_stored_application_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAKV_API_KEYS", "hush")
    digests = digests_of(api_keys(AppConfig()))
    assert not any(b"hush" in digest for digest in digests)
    keys = ApiKeys((), more_digests=digests)
    assert keys.caller("/v1/models", {"authorization": "Bearer hush"})
    assert not keys.caller("/v1/models", {"authorization": "Bearer hus"})


def test_missing_keys_are_an_error_if_the_configuration_asks_for_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("PROD_KEYS", "ADAKV_API_KEYS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="auth asks for API keys"):
        api_keys(AppConfig.model_validate({"auth": {"api_keys_env": "PROD_KEYS"}}))
    assert api_keys(AppConfig()) == ()


def test_the_key_in_vllms_own_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "xyzzy")
    keys = ApiKeys(vllm_keys())
    assert keys.caller("/v1/models", {"authorization": "Bearer xyzzy"})
    assert not keys.caller("/v1/models", {})
    monkeypatch.delenv("VLLM_API_KEY")
    assert vllm_keys() == ()


def _reserved(config: AppConfig, on_cpus: bool | None = None) -> dict[str, Any]:
    """Return what an engine reserves of its node."""
    options = dict(engine_options(config, on_cpus)["ray_actor_options"])
    del options["runtime_env"]
    return options


def test_messages_between_deployments_may_be_as_large_as_grpc_can_count() -> None:
    config = AppConfig()
    for options in (engine_options(config, on_cpus=True), ingress_options(config)):
        variables = options["ray_actor_options"]["runtime_env"]["env_vars"]
        assert variables["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"] == str((1 << 31) - 1)


def test_configured_gpus_are_reserved() -> None:
    config = AppConfig.model_validate({"replica": {"gpus": 2, "cpus": 3}})
    assert _reserved(config) == {"num_cpus": 3, "num_gpus": 2}


@pytest.mark.parametrize(("on_cpus", "gpus"), [(True, {}), (False, {"num_gpus": 2})])
def test_gpus_follow_tensor_parallel_size_with_vllm_for_gpus(
    on_cpus: bool, gpus: dict[str, int]
) -> None:
    config = AppConfig.model_validate({"engine": {"tensor_parallel_size": 2}})
    assert _reserved(config, on_cpus) == {"num_cpus": 1, **gpus}


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


@pytest.mark.parametrize(
    ("args", "most"),
    [
        # Two engines of 64 and a queue of 256.
        ({"engine": {"max_num_seqs": 32}}, 1000),
        ({"engine": {"max_num_seqs": 256}, "replica": {"count": 8}}, 5440),
        (
            {
                "engine": {"max_num_seqs": 256},
                "replica": {"count": 8},
                "ingress": {"count": 4},
            },
            1360,
        ),
        ({"replica": {"count": 8}, "ingress": {"max_ongoing_requests": 50}}, 50),
        ({"engine": {"max_num_seqs": 8}, "replica": {"max_queued_requests": -1}}, 1000),
    ],
)
def test_the_limit_of_an_ingress_follows_the_fleet(args: dict[str, Any], most: int) -> None:
    options = ingress_options(AppConfig.model_validate(args))
    assert options["max_ongoing_requests"] == most
    # Without a limit what comes next would wait for a place without an answer.
    assert 0 < options["max_queued_requests"] < 100
    assert options["backpressure_config"].status_code == 503
    assert options["num_replicas"] == args.get("ingress", {}).get("count", 1)


def test_keys_share_what_the_fleet_computes_and_queues() -> None:
    config = AppConfig.model_validate(
        {
            "engine": {"max_num_seqs": 4},
            "replica": {"count": 2, "max_queued_requests": 10},
            "auth": {"limits": {"share_at_once": 0.5}},
        }
    )
    assert config.places == 26
    with pytest.raises(ValidationError, match="share_at_once"):
        AppConfig.model_validate({"auth": {"limits": {"share_at_once": 1.5}}})


def test_the_edge_of_an_ingress_has_the_limit_of_its_bodies() -> None:
    options = ingress_options(AppConfig.model_validate({"ingress": {"max_body_bytes": 5000}}))
    variables = options["ray_actor_options"]["runtime_env"]["env_vars"]
    assert variables["ADAKV_MAX_BODY_BYTES"] == "5000"


def test_a_dead_ingress_is_noticed_as_soon_as_a_dead_engine() -> None:
    config = AppConfig.model_validate({"replica": {"health_check_period_s": 0.5}})
    assert ingress_options(config)["health_check_period_s"] == 0.5
    assert engine_options(config, on_cpus=True)["health_check_period_s"] == 0.5


def test_the_number_of_ingresses_follows_the_load() -> None:
    options = ingress_options(AppConfig.model_validate({"ingress": {"count": 2, "max_count": 6}}))
    assert options["autoscaling_config"] == {
        "min_replicas": 2, "max_replicas": 6,
        "target_ongoing_requests": options["max_ongoing_requests"] / 2,
    }  # fmt: skip
    assert "num_replicas" not in options
    with pytest.raises(ValueError, match="max_count=1 is below"):
        AppConfig.model_validate({"ingress": {"count": 2, "max_count": 1}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_line_ends_of_windows_change_nothing(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with copy.open() as file:
        (application,) = yaml.safe_load(file)["applications"]
    (original,) = yaml.safe_load(path.read_text())["applications"]
    assert application == original
    assert AppConfig.model_validate(application["args"]).model_dump() == (
        AppConfig.model_validate(original["args"]).model_dump()
    )


def test_a_section_whose_lines_are_comments_has_its_defaults() -> None:
    args = yaml.safe_load("engine:\n  # max_num_seqs: 4\nserver:\nreplica:\nstore:\nspill:\n")
    assert AppConfig.model_validate(args) == AppConfig()
