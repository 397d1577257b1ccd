"""What a replica reports about its KV memory: the schema of the live ledger."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 1

Count = Annotated[int, Field(ge=0)]


class SchemaMismatch(ValueError):
    """A report was written under another major version of the schema."""


class Occupancy(BaseModel):
    """One replica's KV-memory report. Blocks are vLLM KV blocks; all counts are at one instant.

    Fields that the engine cannot know are None (without compression vLLM does not tell which free
    blocks are evictable prefix blocks, nor which waiting request needs how many blocks). Readers
    ignore unknown fields, so a minor version may add some; another major version is refused.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_major: int = SCHEMA_MAJOR
    schema_minor: int = SCHEMA_MINOR
    replica_id: str
    model: str
    epoch: int = Field(
        description="Start of this replica's life, ns; a later life has a higher one"
    )
    sequence: Count = Field(description="Reports sent in this epoch")

    block_size_tokens: int = Field(gt=0)
    blocks_total: Count
    blocks_free: Count = Field(description="Allocatable now, evictable prefix blocks included")
    blocks_evictable: Count | None = None
    blocks_compressed: Count = 0
    blocks_uncompressed: Count = 0
    blocks_reserved_growth: Count = 0
    blocks_lent: Count = 0
    blocks_borrowed: Count = 0

    running: Count
    waiting: Count
    waiting_blocks: Count | None = None
    prefill_tokens_queued: Count = 0
    decode_tokens_per_s: float = Field(default=0.0, ge=0.0)
    achieved_compression: float = Field(
        default=1.0, gt=0.0, description="Kept over original entries"
    )
    preemptions: Count = Field(default=0, description="Since the start of this life")
    recomputed_tokens: Count | None = Field(
        default=None, description="Computed a second time, since the start of this life"
    )
    decode_evictions: Count | None = Field(
        default=None, description="Of requests that write long answers, since then"
    )
    selection_failures: Count | None = Field(
        default=None, description="Requests whose policy raised an error, since then"
    )
    sessions_held: Count = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.blocks_free > self.blocks_total:
            raise ValueError(
                f"blocks_free={self.blocks_free} exceeds blocks_total={self.blocks_total}"
            )
        return self

    @classmethod
    def parse(cls, payload: bytes | str) -> "Occupancy":
        """Reads a report.

        Raises:
            SchemaMismatch: written under another major version.
            pydantic.ValidationError: malformed or self-contradictory.
        """
        check_schema(payload)
        return cls.model_validate_json(payload)

    @staticmethod
    def claimed_replica_id(payload: bytes | str) -> str | None:
        """Whose report a malformed one says it is, if it says so."""
        try:
            return _Claim.model_validate_json(payload).replica_id
        except ValidationError:
            return None


def check_schema(payload: bytes | str) -> None:
    """Raises SchemaMismatch for a report of another major version, ValidationError for none."""
    version = _Version.model_validate_json(payload)
    if version.schema_major != SCHEMA_MAJOR:
        raise SchemaMismatch(
            f"report has schema {version.schema_major}, this reader knows {SCHEMA_MAJOR}"
        )


class _Version(BaseModel):
    schema_major: int


class _Claim(BaseModel):
    replica_id: str
