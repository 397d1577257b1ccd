"""The sections of the application's configuration, each a key under `args:`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from adakv_serve.router import DEFAULT_KEY_PREFIX, DEFAULT_STORE_PORT
from adakv_serve.router.score import Speeds
from adakv_serve.router.stores import checked_url, has_password
from adakv_worker.config import Section

# A path with at least one part: "/" would open all endpoints.
OpenedPath = Annotated[str, Field(pattern=r"^(/[^/?#\s]+)+/?$")]

# Why a secret is refused.
SHOWN = "would be in Serve's log and in `serve config`"


class ModelConfig(Section):
    """The model to serve."""

    path: str | None = Field(
        default=None,
        description="Local folder or hub id; None serves the embedded SmolLM2-135M-Instruct",
    )
    name: str | None = Field(
        default=None, description="Name in the API; None derives it from the path"
    )


class ReplicaConfig(Section):
    """Replicas of the engine: number, resources, queue, health."""

    count: int = Field(
        default=2,
        ge=1,
        description="Number of engines; with autoscaling set it to `max_replicas`, for which the "
        "front doors then have places",
    )
    cpus: float = Field(default=1.0, ge=0.0, description="CPUs that Ray reserves for each replica")
    cpu_threads: int | None = Field(
        default=None, ge=1, description="Engine threads on CPU; None takes `cpus`, at least 1"
    )
    gpus: float | None = Field(
        default=None,
        ge=0.0,
        description="GPUs for each replica; None takes tensor_parallel_size, or 0 on CPUs",
    )
    placement_group_bundles: list[dict[str, float]] | None = Field(
        default=None,
        description="One bundle per worker when a replica spans nodes (executor `ray`)",
    )
    placement_group_strategy: str = Field(
        default="PACK", description="Ray's placement strategy of the bundles"
    )
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests inside one engine; None takes twice max_num_seqs",
    )
    max_queued_requests: int = Field(
        default=256, ge=-1, description="Requests waiting for a replica before 503; -1 has no limit"
    )
    graceful_shutdown_timeout_s: float = Field(
        default=120.0, ge=0.0, description="Time for streams to end on redeploy"
    )
    health_check_period_s: float = Field(
        default=2.0,
        gt=0.0,
        description="Time between two health checks; an engine is replaced after three that fail",
    )
    hang_s: float = Field(
        default=300.0,
        gt=0.0,
        description="Time without an answer after which an engine is ended and replaced; longer "
        "than its longest step",
    )

    @property
    def threads(self) -> int:
        """Threads of an engine on CPUs."""
        return self.cpu_threads or max(1, int(self.cpus))


class PageConfig(Section):
    """The fleet page."""

    enabled: bool = Field(default=True, description="Whether `GET /` is the fleet page")
    max_viewers: int = Field(
        default=16, ge=1, description="Views of the page at once, of one front door"
    )


class IngressConfig(Section):
    """The front door: number of processes, and limits."""

    count: int = Field(default=1, ge=1, description="Number of front doors, at least")
    max_count: int | None = Field(
        default=None, ge=1, description="Number of front doors under load; None keeps `count`"
    )
    more_paths: list[OpenedPath] = Field(
        default_factory=list,
        description="Endpoints of vLLM that are closed otherwise, such as /v1/load_lora_adapter",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1, description="Size above which a body is refused by 413"
    )
    max_held_body_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=1,
        description="Size of all bodies inside one front door above which more are refused by 503",
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0.0, description="Time after which an unfinished body is refused by 408"
    )
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests inside one front door; None takes its share of what the engines "
        "compute and queue, at least 1000",
    )
    retry_after_s: float = Field(default=1.0, ge=0.0, description="Retry-After of a 503")
    request_deadline_s: float = Field(
        default=3600.0,
        gt=0.0,
        description="Longest time from a request's body to the end of its answer, then 504",
    )
    health_timeout_s: float = Field(
        default=2.0, gt=0.0, description="Longest time that /health waits for a replica"
    )
    page: PageConfig = PageConfig()


class KeyLimitsConfig(Section):
    """What the holder of one API key may ask for. Keys of one name count together."""

    requests_per_minute: int | None = Field(default=None, ge=1, description="Most requests")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Most tokens of prompts and answers"
    )
    requests_at_once: int | None = Field(
        default=None, ge=1, description="Most requests that wait or are answered"
    )
    share_at_once: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Largest share of the requests that the fleet computes and queues",
    )


class AuthConfig(Section):
    """API keys. Without any the API must be meant to be open, or on this machine's own address."""

    api_keys: list[SecretStr] = Field(
        default_factory=list, description="Refused: keys belong into no configuration"
    )
    api_keys_env: str = Field(
        default="ADAKV_API_KEYS", description="Environment variable with keys, comma-separated"
    )
    keys_file: Path | None = Field(
        default=None,
        description="File with lines `NAME SHA256` of more keys, on every node with an ingress; "
        "read again when it changes",
    )
    shares_caches: bool = Field(
        default=False, description="Whether requests find cached prompts of other keys' requests"
    )
    limits: KeyLimitsConfig = KeyLimitsConfig()
    limits_by_key: dict[str, KeyLimitsConfig] = Field(
        default_factory=dict, description="Other limits, by names of keys in `keys_file`"
    )
    open: bool = Field(
        default=False, description="Serve without keys on addresses that others can reach"
    )

    @field_validator("api_keys")
    @classmethod
    def _refuse_keys(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if keys:
            raise ValueError(
                f"auth.api_keys {SHOWN}: put digests of the keys into auth.keys_file, or the keys "
                "into the environment variable that auth.api_keys_env names"
            )
        return keys


class StoreConfig(Section):
    """The store of the occupancy ledger."""

    url: SecretStr | None = Field(
        default=None,
        description="redis://, rediss://, redis+sentinel:// or rediss+sentinel:// URL without a "
        "password; without any URL an embedded Valkey is started",
    )
    url_env: str | None = Field(
        default=None,
        description="Environment variable with the URL, on every node; it may have a password",
    )
    port: int = Field(
        default=DEFAULT_STORE_PORT, ge=1, le=65535, description="Port of the embedded Valkey"
    )
    key_prefix: str = Field(
        default=DEFAULT_KEY_PREFIX,
        min_length=1,
        pattern=r"^[^\s:{}*?\[\]]+$",
        description="Prefix of all keys in the store",
    )
    report_interval_s: float = Field(
        default=0.5, gt=0.0, le=1.0, description="Longest time between two occupancy reports"
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and has_password(checked_url(url.get_secret_value(), "store.url")):
            raise ValueError(
                f"the password in store.url {SHOWN}: put the URL into an environment variable and "
                "name that in store.url_env"
            )
        return url

    @model_validator(mode="after")
    def _check_one_url(self) -> Self:
        if self.url is not None and self.url_env is not None:
            raise ValueError("store.url and store.url_env exclude each other")
        return self


class RoutingConfig(Section):
    """How requests choose a replica. The speeds weigh memory against prefill and decode."""

    policy: Literal["occupancy", "power_of_two", "prefix_aware"] = Field(
        default="occupancy",
        description="`power_of_two` and `prefix_aware` are Ray Serve's own, to compare with",
    )
    log_decisions: bool = Field(default=False, description="Write a log line for each choice")
    prior_output_tokens: int = Field(
        default=256, ge=1, description="Expected length of an answer before any has ended"
    )
    prefill_tokens_per_s: float = Field(
        default=Speeds().prefill_tokens_per_s, gt=0.0, description="Prompt tokens per second"
    )
    decode_step_s: float = Field(
        default=Speeds().decode_step_s, gt=0.0, description="Time of a decode step of one request"
    )
    decode_step_s_per_request: float = Field(
        default=Speeds().decode_step_s_per_request,
        ge=0.0,
        description="Additional time of a decode step for each further request",
    )


class LenderConfig(Section):
    """Replicas that get no requests of their own and only lend, otherwise like the others."""

    count: int = Field(default=1, ge=1, description="Number of lenders")
    kv_cache_memory_bytes: int | None = Field(
        default=None, gt=0, description="Cache size of a lender; None takes the other replicas'"
    )


class SpillConfig(Section):
    """Moves of compressed requests from a replica without room to a lender."""

    enabled: bool = Field(default=False, description="Whether requests move")
    lenders: LenderConfig | None = Field(
        default=None, description="Lenders beside the replicas, which also lend to each other"
    )
    lend_share: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Share of its spare blocks that a replica lends; `lenders` lend all",
    )
    folder: str = Field(default="/dev/shm", description="Folder in memory for moving caches")
    interval_s: float = Field(default=0.5, gt=0.0, description="Time between two looks for moves")
    moves_per_request: int = Field(default=2, ge=1, description="Most moves of one request")
    moves_at_once: int = Field(default=4, ge=1, description="Most moves in progress")
    rest_s: float = Field(default=5.0, ge=0.0, description="Time between two moves of a request")
    worth: float = Field(default=2.0, gt=0.0, description="Least ratio of recompute to move time")
    spare_blocks: int = Field(default=4, ge=0, description="Blocks of an offer left to the lender")
    expected_tokens: int = Field(default=1024, ge=1, description="Most tokens still expected")
    first_output_s: float = Field(default=20.0, gt=0.0, description="Time for a lender to continue")
    park_bytes: int = Field(
        default=1 << 28, ge=0, description="Host memory for caches that wait for blocks"
    )
    parked_s: float = Field(default=300.0, gt=0.0, description="Longest wait of a cache for blocks")
    bytes_per_s: float = Field(
        default=5e8, gt=0.0, description="Speed of a move before one has been measured"
    )
