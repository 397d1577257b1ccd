"""vLLM's settings, as the configuration turns into them."""

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from adakv_serve.serving.vllm_engine.options import (
    check_movable,
    refusing_without_values,
    server_arg_names,
    server_options,
    with_compression,
    with_kv_events,
)
from adakv_worker.config import CompressionConfig


def test_the_servers_options_are_vllms_with_the_configured_ones_over_them(tmp_path: Path) -> None:
    engine = AsyncEngineArgs(model=str(tmp_path), max_model_len=77)
    given = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True, "response_role": "me"}
    options = server_options(str(tmp_path), "name", engine, given)
    assert {name: getattr(options, name) for name in given} == given
    assert (options.model, options.served_model_name) == (str(tmp_path), ["name"])
    assert options.max_model_len == 77
    plain = server_options(str(tmp_path), "name", engine, {})
    assert (plain.tool_call_parser, plain.enable_auto_tool_choice) == (None, False)


def test_options_that_contradict_each_other_are_refused_as_by_vllm(tmp_path: Path) -> None:
    engine = AsyncEngineArgs(model=str(tmp_path))
    with pytest.raises((TypeError, ValueError), match="tool"):
        server_options(str(tmp_path), "name", engine, {"enable_auto_tool_choice": True})


def test_options_of_the_socket_and_of_the_engine_are_not_the_apis() -> None:
    names = server_arg_names()
    assert {"tool_call_parser", "chat_template", "allowed_origins"} <= names
    assert not names & {"host", "port", "api_key", "ssl_keyfile", "max_model_len", "model"}


COMPRESSION = CompressionConfig(budget_tokens=256)


def test_compression_adds_what_it_needs_and_overrides_nothing() -> None:
    given = {"max_num_seqs": 4, "worker_cls": "mine", "additional_config": {"other": 1}}
    args = with_compression(given, COMPRESSION, movable=False)
    assert (args["max_num_seqs"], args["worker_cls"]) == (4, "mine")
    assert args["additional_config"]["other"] == 1
    assert len(args["additional_config"]) == 2
    assert "scheduler_cls" in args


@pytest.mark.parametrize("compression", [None, CompressionConfig(enabled=False)])
def test_without_compression_nothing_is_added(compression: CompressionConfig | None) -> None:
    given = {"max_num_seqs": 4}
    assert with_compression(given, compression, movable=False) == given


@pytest.mark.parametrize("movable", [False, True])
def test_an_explicit_choice_of_asynchronous_steps_stays(movable: bool) -> None:
    args = with_compression({"async_scheduling": True}, COMPRESSION, movable)
    assert args["async_scheduling"] is True
    # None is vLLM's own default, which must not hide ours.
    assert with_compression({"async_scheduling": None}, COMPRESSION, movable) == (
        with_compression({}, COMPRESSION, movable)
    )


def test_kv_events_get_sockets_of_this_replica_alone() -> None:
    first, second = [
        with_kv_events({"kv_events_config": {"enable_kv_cache_events": True}}) for _ in range(2)
    ]
    (args, sockets), (_, others) = first, second
    assert sockets is not None
    assert others is not None
    endpoints = [sockets.events, sockets.replay, others.events, others.replay]
    assert len(set(endpoints)) == 4
    assert all(one.startswith("ipc://") for one in endpoints)
    events = args["kv_events_config"]
    assert isinstance(events, KVEventsConfig)
    assert [events.endpoint, events.replay_endpoint] == endpoints[:2]
    folders = [Path(one.removeprefix("ipc://")).parent for one in endpoints]
    assert all(folder.is_dir() for folder in folders)
    sockets.remove()
    others.remove()
    assert not any(folder.exists() for folder in folders)


def test_the_operators_endpoints_of_kv_events_stay() -> None:
    given = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
    args, sockets = with_kv_events({"kv_events_config": {"enable_kv_cache_events": True, **given}})
    assert args["kv_events_config"].endpoint == "tcp://*:5557"
    assert sockets is not None
    assert sockets == ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", None)


@pytest.mark.parametrize(
    "events",
    [
        None,
        {"enable_kv_cache_events": False},
        {"enable_kv_cache_events": True, "publisher": "null"},
    ],
)
def test_without_kv_events_there_are_no_sockets(events: dict[str, Any] | None) -> None:
    given = {} if events is None else {"kv_events_config": events}
    assert with_kv_events(given)[1] is None


@pytest.mark.parametrize(
    ("asynchronous", "compressing", "message"),
    [(False, False, "compression"), (True, True, "async_scheduling: false")],
)
def test_requests_that_cannot_move_are_refused_with_the_settings_name(
    asynchronous: bool, compressing: bool, message: str
) -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
    with pytest.raises(ValueError, match=message):
        check_movable(config, compressing)
    check_movable(SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=False)), True)


def test_adapters_are_mappings_of_vllms_fields(tmp_path: Path) -> None:
    engine = AsyncEngineArgs(model=str(tmp_path))
    modules = [{"name": "a", "path": "/a"}]
    (module,) = server_options(
        str(tmp_path), "name", engine, {"lora_modules": modules}
    ).lora_modules
    assert (module.name, module.path) == ("a", "/a")
    with pytest.raises(ValueError, match=r"server\.lora_modules.*'nam'"):
        server_options(str(tmp_path), "name", engine, {"lora_modules": [{"nam": "a"}]})


def test_vllms_refusals_have_the_settings_name_and_no_value() -> None:
    events = {"publisher": "hush", "enable_kv_cache_events": True}
    with (
        pytest.raises(ValueError, match=r"^engine\.publisher: ") as caught,
        refusing_without_values(),
    ):
        with_kv_events({"kv_events_config": events})
    assert "hush" not in "".join(traceback.format_exception(caught.value))
