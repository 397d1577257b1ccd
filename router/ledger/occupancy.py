"""The occupancy report of a replica: the schema of the live ledger."""

from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 4

# How long a report counts, and its key lives in Redis.
REPORT_TTL_S = 2.0

# What is larger could not be converted to a float.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class SchemaMismatch(ValueError):
    """The report has another major version of the schema."""


class Occupancy(BaseModel):
    """KV-memory report of one replica. Blocks are vLLM KV blocks; all counts are of one instant.

    Fields that the engine does not measure are None: without compression vLLM counts neither
    evictable prefix blocks nor the blocks of waiting requests. Readers ignore unknown fields, so a
    minor version may add some; they refuse another major version.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    schema_major: int = SCHEMA_MAJOR
    schema_minor: int = SCHEMA_MINOR
    replica_id: str
    model: str
    epoch: int = Field(description="Start of this replica's life, ns")
    sequence: Count = Field(description="Reports sent in this epoch")

    block_size_tokens: int = Field(gt=0, lt=1 << 63)
    blocks_total: Count
    blocks_free: Count = Field(description="Free blocks, evictable prefix blocks included")
    blocks_evictable: Count | None = None
    blocks_compressed: Count = 0
    blocks_uncompressed: Count = 0
    blocks_reserved_growth: Count = 0
    blocks_held: Count = Field(
        default=0, description="Free blocks of held caches, among the evictable ones"
    )
    blocks_lent: Count = 0
    blocks_borrowed: Count = 0

    sessions_held: Count = Field(default=0, description="Caches that the next turn can resume")
    running: Count
    waiting: Count
    waiting_blocks: Count | None = None
    prefill_tokens_queued: Count = 0
    decode_tokens_per_s: float = Field(default=0.0, ge=0.0)
    prefill_tokens_per_s: float = Field(default=0.0, ge=0.0)
    decode_steps_per_s: float | None = Field(
        default=None, ge=0.0, description="Without it a replica's speed is not compared"
    )
    achieved_compression: float = Field(
        default=1.0, gt=0.0, description="Kept over original entries"
    )
    preemptions: Count = Field(default=0, description="Since the start of this life")
    recomputed_tokens: Count | None = Field(
        default=None, description="Computed a second time, since the start of this life"
    )
    decode_evictions: Count | None = Field(
        default=None, description="Evictions during decoding, since the start of this life"
    )
    selection_failures: Count | None = Field(
        default=None, description="Requests whose policy failed, since the start of this life"
    )
    moves: Count | None = Field(
        default=None, description="Requests gone on elsewhere, since the start of this life"
    )
    failed_moves: Count | None = Field(
        default=None, description="Moves that brought their requests back, since then"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.blocks_free > self.blocks_total:
            raise ValueError(
                f"blocks_free={self.blocks_free} exceeds blocks_total={self.blocks_total}"
            )
        return self

    @classmethod
    def parse(cls, payload: bytes | str) -> "Occupancy":
        """Parse a report.

        Raises:
            SchemaMismatch: the report has another major version.
            pydantic.ValidationError: the report is malformed or contradicts itself.
        """
        check_schema(payload)
        return cls.model_validate_json(payload)

    @staticmethod
    def claimed_replica_id(payload: bytes | str) -> str | None:
        """Return the replica id in a malformed report, if it has one."""
        try:
            return _Claim.model_validate_json(payload).replica_id
        except ValidationError:
            return None


class Report(NamedTuple):
    """A report, and the time since its replica sent it."""

    occupancy: Occupancy
    age_s: float


def check_schema(payload: bytes | str) -> None:
    """Raise SchemaMismatch for another major version, ValidationError for a missing one."""
    version = _Version.model_validate_json(payload)
    if version.schema_major != SCHEMA_MAJOR:
        raise SchemaMismatch(
            f"report has schema {version.schema_major}, this reader needs {SCHEMA_MAJOR}"
        )


class _Version(BaseModel):
    schema_major: int


class _Claim(BaseModel):
    replica_id: str
