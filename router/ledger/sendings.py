"""The message in which an ingress lists the requests that it has sent, for other ingresses."""

from typing import Self

from pydantic import BaseModel, ConfigDict

from adakv_serve.router.ledger.occupancy import SCHEMA_MAJOR, Count, check_schema


class Sending(BaseModel):
    """A request that a replica got, with its footprint: see `router.footprint.Footprint`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    request_id: str
    replica_id: str
    peak_blocks: Count
    steady_blocks: Count
    prompt_tokens: Count
    output_tokens: Count
    block_hashes: list[int] = []
    session: int | None = None


class Sendings(BaseModel):
    """Requests that an ingress has sent since its last message."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_major: int = SCHEMA_MAJOR
    ingress_id: str
    sent: list[Sending]

    @classmethod
    def parse(cls, payload: bytes | str) -> Self:
        """Parse a message.

        Raises:
            SchemaMismatch: it has another major version.
            pydantic.ValidationError: it is malformed.
        """
        check_schema(payload)
        return cls.model_validate_json(payload)
