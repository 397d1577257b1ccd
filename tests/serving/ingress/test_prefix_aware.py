"""Ray Serve's prefix-aware router: what of our requests it compares."""

import json

import pytest

from adakv_serve.serving.app import engine_options
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.ingress.prefix_aware import prompt_text

PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]


@pytest.mark.parametrize(("body", "text"), [
    ({"messages": [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": PARTS}]},
     "Be kind. Hello there"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, ""),
    ({"prompt": ["Hello ", "there"]}, "Hello there"),
    ({"input": [{"role": "user", "content": "Hello"}]}, "Hello"),
    ({"model": "m"}, ""),
    ([1], ""),
])  # fmt: skip
def test_the_text_of_a_prompt_is_compared(body: object, text: str) -> None:
    assert prompt_text(json.dumps(body).encode()) == text


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff", b"[" * 100_000, b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}"],
)
def test_a_malformed_body_has_no_text(body: bytes) -> None:
    assert prompt_text(body) == ""


@pytest.mark.parametrize("policy", ["occupancy", "prefix_aware"])
def test_the_configuration_names_a_router_that_serve_can_load(policy: str) -> None:
    config = AppConfig.model_validate({"routing": {"policy": policy}})
    router = engine_options(config, on_cpus=True)["request_router_config"]
    assert router.get_request_router_class().__module__.startswith("adakv_serve.serving.ingress.")
