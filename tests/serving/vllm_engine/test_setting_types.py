"""Settings of another type than vLLM's are refused by name, and those of its types pass."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import ValidationError

from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.vllm_engine.setting_types import check_types


class Color(enum.Enum):
    RED = 1


@dataclass
class Nested:
    depth: int = 0


@dataclass
class Settings:
    number: int = 0
    share: float = 0.5
    flag: bool = False
    name: str = ""
    maybe: int | None = None
    untold: int = None  # type: ignore[assignment]
    choice: Literal["a", "b", 3] = "a"
    names: list[str] = field(default_factory=list)
    unique: set[str] = field(default_factory=set)
    table: dict[str, int] | None = None
    nested: Nested | None = None
    color: Color | None = None
    marked: Annotated[int, "mark"] = 0
    override: dict[str, Any] | Callable[[Any], Any] = field(default_factory=dict)
    cls: str | type[object] | None = None
    quoted: "Unknown | None" = None  # type: ignore[name-defined]  # noqa: F821
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", 3), ("share", 1), ("share", 0.5), ("flag", True), ("name", "x"),
        ("maybe", None), ("maybe", 4), ("untold", None), ("choice", "b"), ("choice", 3),
        ("names", []), ("names", ["a"]), ("unique", ["a"]), ("table", {"a": 1}), ("table", None),
        ("nested", {"depth": 1}), ("nested", Nested()), ("color", "red"), ("marked", 1),
        ("override", {"a": {}}), ("override", print), ("cls", "a.b"), ("cls", object),
        ("quoted", 5), ("anything", object()), ("unknown", 1),
    ],
)  # fmt: skip
def test_a_value_of_the_declared_type_passes(name: str, value: Any) -> None:
    check_types({name: value}, Settings, "engine")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("number", "many", "a whole number, not text"),
        ("number", "7", "a whole number, not text: write the number without quotes"),
        ("number", 1.5, "a whole number, not a number"),
        ("number", True, "a whole number, not true or false"),
        ("number", None, "a whole number, not empty"),
        ("share", "5e-1", "a number, not text: write the number without quotes, and 1e-3 as"),
        ("flag", "false", "true or false, not text: write true or false without quotes"),
        ("flag", 1, "true or false, not a whole number"),
        ("name", True, "text, not true or false: put it into quotes"),
        ("name", 20241231, "text, not a whole number: put it into quotes"),
        ("maybe", [], "a whole number, not a list"),
        ("choice", "c", "one of a, b, 3, not text"),
        ("names", "a", "a list, not text"),
        ("names", [1], "a list, not a list"),
        ("table", {"a": "b"}, "a mapping, not a mapping"),
        ("nested", 5, "a mapping, not a whole number"),
        ("nested", "x", "a mapping, not text"),
        ("color", 1, "a name, not a whole number"),
        ("override", "x", "a mapping, not text"),
        ("cls", 5, "text, not a whole number"),
    ],
)
def test_another_type_is_refused_with_its_name_and_advice(
    name: str, value: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=rf"^engine\.{name} must be ") as caught:
        check_types({name: value}, Settings, "engine")
    assert f"must be {problem}" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"engine": {"max_num_seqs": "many"}}, "engine.max_num_seqs"),
        ({"engine": {"gpu_memory_utilization": "9e-1"}}, "engine.gpu_memory_utilization"),
        ({"engine": {"enforce_eager": "false"}}, "engine.enforce_eager"),
        ({"engine": {"dtype": "float31"}}, "engine.dtype"),
        ({"engine": {"compilation_config": "fast"}}, "engine.compilation_config"),
        ({"engine": {"tensor_parallel_size": None}}, "engine.tensor_parallel_size"),
        ({"server": {"enable_auto_tool_choice": "false"}}, "server.enable_auto_tool_choice"),
        ({"server": {"tool_call_parser": True}}, "server.tool_call_parser"),
        ({"server": {"allowed_origins": "*"}}, "server.allowed_origins"),
    ],
)
def test_vllms_own_settings_are_checked(args: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name} must be "):
        AppConfig.model_validate(args)


def test_vllms_own_settings_pass_in_yamls_types() -> None:
    engine = {
        "max_model_len": None, "max_num_seqs": None, "dtype": "float32", "hf_token": False,
        "gpu_memory_utilization": 1, "kv_events_config": {"enable_kv_cache_events": True},
        "compilation_config": {"cudagraph_mode": "NONE"}, "attention_backend": "TRITON_ATTN",
        "additional_config": {"a": 1}, "speculative_config": {"method": "ngram"},
        "cudagraph_capture_sizes": [1, 2], "hf_overrides": {"a": 1}, "quantization": "fp8",
        "limit_mm_per_prompt": {"image": 2}, "distributed_executor_backend": "ray",
        "scheduler_cls": "adakv_worker.scheduler.AdaKVScheduler", "cpu_offload_params": ["w"],
    }  # fmt: skip
    server = {
        "chat_template": None, "allowed_origins": ["*"], "tool_call_parser": "hermes",
        "default_chat_template_kwargs": {"enable_thinking": False}, "sse_keep_alive_interval": 5,
        "lora_modules": [{"name": "a", "path": "b"}], "fingerprint_mode": "none",
    }  # fmt: skip
    config = AppConfig.model_validate({"engine": engine, "server": server})
    assert (config.engine, config.server) == (engine, server)
