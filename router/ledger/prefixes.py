"""The message by which a replica reports changes of its prefix cache."""

from typing import Self

from pydantic import BaseModel, ConfigDict

from adakv_serve.router.ledger.occupancy import SCHEMA_MAJOR, check_schema


class PrefixChange(BaseModel):
    """Blocks that a replica has cached or evicted, by `router.footprint.prefix_hashes`.

    cleared: whether it evicted everything first.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_major: int = SCHEMA_MAJOR
    replica_id: str
    stored: list[int] = []
    removed: list[int] = []
    cleared: bool = False

    @classmethod
    def parse(cls, payload: bytes | str) -> Self:
        """Parse a change.

        Raises:
            SchemaMismatch: the change has another major version.
            pydantic.ValidationError: the change is malformed.
        """
        check_schema(payload)
        return cls.model_validate_json(payload)
