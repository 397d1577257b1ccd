"""The configuration of a comparison: a base deployment, arms that differ from it, and loads."""

import copy
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adakv_serve.loadtest.traffic.workloads import WORKLOADS

# Arms and loads name files.
_NAME = r"^[\w.-]+$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class ArmConfig(_Section):
    """How one arm's application differs from the base."""

    args: dict[str, Any] = Field(
        default_factory=dict, description="Laid over the base's application args, dict by dict"
    )
    beside_kv_bytes: int = Field(
        default=0, ge=0, description="Held beside the KV blocks; taken off this arm's KV memory"
    )


class LoadConfig(_Section):
    """One load. users: the concurrency of a closed loop, or the most sessions of an open one."""

    name: str = Field(pattern=_NAME)
    workload: str
    prompt_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    users: int = Field(gt=0)
    sessions: int = Field(gt=0)
    warmup: int = Field(default=1, ge=0, description="Requests that are answered before")
    seed: int = 0
    rate_per_s: float | None = Field(default=None, gt=0)
    limit_ttft_s: float | None = Field(default=None, gt=0)
    limit_tpot_s: float | None = Field(default=None, gt=0)

    @property
    def has_bound(self) -> bool:
        """Return whether this is a closed loop: in others the reference does not always work."""
        return self.rate_per_s is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.workload not in WORKLOADS:
            known = ", ".join(WORKLOADS)
            raise ValueError(f"unknown workload '{self.workload}': known are {known}")
        return self


class CompareConfig(_Section):
    base: Path = Field(description="A configuration of `serve run`")
    args: dict[str, Any] = Field(
        default_factory=dict, description="Laid over the base's application args, for all arms"
    )
    kv_cache_memory_bytes: int = Field(gt=0, description="Of each replica, in every arm")
    repetitions: int = Field(default=3, ge=1)
    tokenizer: str | None = Field(
        default=None, description="Folder or hub id; None takes the served model's folder"
    )
    reference: str = Field(default="stock", description="The arm that ratios are taken against")
    arms: dict[Annotated[str, Field(pattern=_NAME)], ArmConfig]
    loads: list[LoadConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference not in self.arms:
            raise ValueError(f"the reference arm '{self.reference}' is not among the arms")
        names = [load.name for load in self.loads]
        if len(set(names)) < len(names):
            raise ValueError("two loads have the same name")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            pydantic.ValidationError, yaml.YAMLError, OSError: it is not a valid comparison.
        """
        return cls.model_validate(yaml.safe_load(path.read_text()))

    def deployment(self, arm: str) -> dict[str, Any]:
        """Return the arm's configuration of `serve run`."""
        config = yaml.safe_load(self.base.read_text())
        (application,) = config["applications"]
        kv_bytes = self.kv_bytes(arm)
        for layer in (
            self.args,
            {"engine": {"kv_cache_memory_bytes": kv_bytes}},
            self.arms[arm].args,
        ):
            application["args"] = _laid_over(application.get("args", {}), layer)
        return config

    def kv_bytes(self, arm: str) -> int:
        return self.kv_cache_memory_bytes - self.arms[arm].beside_kv_bytes


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _laid_over(merged[key], value)
        else:
            merged[key] = value
    return merged
