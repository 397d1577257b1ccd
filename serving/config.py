"""The application's configuration, as written under `args:` in `configs/*.yaml`."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from adakv_serve.serving.config_sections import (
    SHOWN,
    AuthConfig,
    IngressConfig,
    ModelConfig,
    ReplicaConfig,
    RoutingConfig,
    SpillConfig,
    StoreConfig,
)
from adakv_worker.config import CompressionConfig, Section, unknown_key_message

# vLLM's defaults; for the second the larger one, which vLLM takes on large GPUs.
_DEFAULT_BLOCK_SIZE_TOKENS = 16
_DEFAULT_MAX_NUM_SEQS = 1024
_LEAST_INGRESS_REQUESTS = 1000


class AppConfig(Section):
    """Arguments of `adakv_serve.serving.app:build`."""

    model: ModelConfig = ModelConfig()
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Fields of vllm.AsyncEngineArgs"
    )
    server: dict[str, Any] = Field(
        default_factory=dict,
        description="API options of `vllm serve`, such as tool_call_parser, with underscores",
    )
    compression: CompressionConfig | None = Field(
        default=None, description="KV compression, see docs/compression.md; None turns it off"
    )
    replica: ReplicaConfig = ReplicaConfig()
    ingress: IngressConfig = IngressConfig()
    auth: AuthConfig = AuthConfig()
    store: StoreConfig = StoreConfig()
    routing: RoutingConfig = RoutingConfig()
    spill: SpillConfig = SpillConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, values: Any) -> Any:
        """Take a section whose lines are all comments, which YAML reads as null, as empty."""
        if not isinstance(values, dict):
            return values
        return {
            name: {} if section is None and name != "compression" else section
            for name, section in values.items()
        }

    @field_validator("engine")
    @classmethod
    def _check_engine_keys(cls, engine: dict[str, Any]) -> dict[str, Any]:
        from adakv_serve.serving.vllm_engine.options import check_engine_types, engine_arg_names

        known = engine_arg_names()
        for key in engine:
            if key in ("model", "served_model_name"):
                raise ValueError(f"engine.{key} is set by model.path and model.name")
            if key not in known:
                raise ValueError(unknown_key_message(key, known, "engine (vllm.AsyncEngineArgs)"))
        if isinstance(engine.get("hf_token"), str):
            raise ValueError(f"engine.hf_token {SHOWN}: set HF_TOKEN in the environment")
        check_engine_types(engine)
        if int(engine.get("data_parallel_size") or 1) > 1:
            raise ValueError("engine.data_parallel_size is 1 here: set replica.count instead")
        return engine

    @field_validator("server")
    @classmethod
    def _check_server_keys(cls, server: dict[str, Any]) -> dict[str, Any]:
        if server:
            from adakv_serve.serving.vllm_engine.options import check_server_types, server_arg_names

            known = server_arg_names()
            for key in server:
                if key not in known:
                    raise ValueError(unknown_key_message(key, known, "server (vllm serve)"))
            check_server_types(server)
        return server

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        if (
            self.replica.placement_group_bundles
            and self.engine.get("distributed_executor_backend") != "ray"
        ):
            raise ValueError(
                "replica.placement_group_bundles needs engine.distributed_executor_backend: ray"
            )
        return self

    @model_validator(mode="after")
    def _check_ingress(self) -> Self:
        most = self.ingress.max_count
        if most is not None and most < self.ingress.count:
            raise ValueError(
                f"ingress.max_count={most} is below ingress.count={self.ingress.count}"
            )
        return self

    @model_validator(mode="after")
    def _check_spill(self) -> Self:
        if not self.spill.enabled:
            return self
        if self.compression is None or not self.compression.enabled:
            raise ValueError("spill.enabled needs compression: only compressed requests move")
        if self.routing.policy != "occupancy":
            raise ValueError("spill.enabled needs routing.policy: occupancy")
        return self

    def for_lenders(self) -> "AppConfig | None":
        """Return the configuration of the replicas that only lend; None without such replicas."""
        lenders = self.spill.lenders
        if lenders is None or not self.spill.enabled:
            return None
        engine = dict(self.engine)
        if lenders.kv_cache_memory_bytes is not None:
            engine["kv_cache_memory_bytes"] = lenders.kv_cache_memory_bytes
        replica = self.replica.model_copy(update={"count": lenders.count})
        spill = self.spill.model_copy(update={"lend_share": 1.0})
        return self.model_copy(update={"engine": engine, "replica": replica, "spill": spill})

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def holds_sessions(self) -> bool:
        """Whether replicas hold the compressed caches of requests that have ended."""
        compression = self.compression
        return compression is not None and compression.enabled and compression.sessions.enabled

    @property
    def max_ongoing_requests(self) -> int:
        """Most requests inside one replica."""
        running = int(self.engine.get("max_num_seqs") or _DEFAULT_MAX_NUM_SEQS)
        return self.replica.max_ongoing_requests or 2 * running

    @property
    def places(self) -> int:
        """Number of requests that the fleet computes and queues; an unlimited queue counts 0."""
        replica = self.replica
        return replica.count * self.max_ongoing_requests + max(0, replica.max_queued_requests)

    @property
    def ingress_max_ongoing_requests(self) -> int:
        """Most requests inside one ingress: its share of the fleet's, with a quarter to spare."""
        if self.ingress.max_ongoing_requests is not None:
            return self.ingress.max_ongoing_requests
        return max(_LEAST_INGRESS_REQUESTS, -(-5 * self.places // (4 * self.ingress.count)))

    @property
    def block_size_tokens(self) -> int:
        return int(self.engine.get("block_size") or _DEFAULT_BLOCK_SIZE_TOKENS)
