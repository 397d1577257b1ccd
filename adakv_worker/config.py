"""The operator's settings of the compression."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adakv_serve.kernels.blocks import SINK_TOKENS
from adakv_serve.kernels.policies.presets import AUTO, DEFAULT_POLICY, PRESETS, PolicyChoice

CONFIG_KEY = "adakv"
FULL = "full"
# Most characters of a request's own text in a message.
SHOWN_CHARACTERS = 64
# Largest share of a prompt's bytes at which entries of eight bits answer better than exact ones.
MOST_SHARE_OF_EIGHT_BITS = 0.6


def meant_keys(key: str, known: Iterable[str]) -> list[str]:
    """Return the known keys that begin with `key` and `_`, or else the nearest one, if any."""
    known = list(known)
    longer = [name for name in known if name.startswith(f"{key}_")]
    return longer or difflib.get_close_matches(key, known, n=1, cutoff=0.4)


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """Return an error message that names the known keys that may be meant."""
    near = meant_keys(key, known)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown key '{key}' in {where}{hint}"


class Section(BaseModel):
    """A part of the configuration that refuses unknown keys and names the nearest known one."""

    # A rejected input may be a secret, or lie beside one.
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(unknown_key_message(str(key), cls.model_fields, cls.__name__))
        return values


class SessionsConfig(Section):
    """Compressed caches that outlive their requests, for the next turn of a conversation."""

    enabled: bool = False
    share: float = Field(
        default=0.5, gt=0.0, le=1.0, description="Most of the KV blocks that held caches have"
    )
    max_held: int = Field(default=256, ge=1, description="Most caches that are held")
    host_bytes: int = Field(
        default=0,
        ge=0,
        description="Host memory of each worker for caches whose blocks the pool wants; 0: none",
    )
    arrival_bytes: int = Field(
        default=256 << 20,
        ge=0,
        description="Host memory of each worker for caches from other replicas until a request "
        "resumes them; 0: none come",
    )
    max_idle_s: float = Field(default=3600.0, gt=0.0, description="How long a cache is held")
    overtake_s: float = Field(
        default=60.0,
        ge=0.0,
        description="How long waiting requests may be overtaken by turns that resume; 0: never",
    )
    patience_s: float = Field(
        default=0.5,
        ge=0.0,
        description="How long a request without a held cache leaves one alone whose request has "
        "just ended, while others run: the client may be about to ask on",
    )
    min_saved_tokens: int = Field(
        default=128,
        ge=1,
        description="Tokens that a held cache must save beyond the prefix cache's hit",
    )
    compress: Literal["newest", "all"] = Field(
        default="all",
        description="Entries that compete at the end of a resumed prompt: all, or only those since "
        "the last compression",
    )


class CompressionConfig(Section):
    """`additional_config["adakv"]` of an engine. See `kept_tokens` for what is kept of a prompt."""

    enabled: bool = True
    policy: str = Field(default=DEFAULT_POLICY, description="A preset's name, `auto` or `full`")
    budget_tokens: int = Field(
        default=256, ge=1, description="Mean entries per (layer, KV head) that are kept at least"
    )
    keep_ratio: float = Field(
        default=0.5, ge=0.0, le=1.0, description="Share of the prompt that is kept at least"
    )
    budget_bytes: int | None = Field(
        default=None,
        ge=1,
        description="In place of budget_tokens: bytes of all entries, over layers, heads and ranks",
    )
    keep_bytes_ratio: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="In place of keep_ratio: share of the bytes that the whole prompt takes",
    )
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    window_tokens: int | None = Field(default=None, ge=1)
    page_dtype: Literal["auto", "by_bytes", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "int4"] = Field(
        default="auto",
        description="How pages of compressed prompts store numbers; auto: as the blocks of whole "
        "prompts; by_bytes: as the prompt is answered best from a budget in bytes",
    )
    decode_budget_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Mean entries per (layer, KV head) that evictions while decoding leave; none: "
        "answers grow without end",
    )
    decode_interval_tokens: int = Field(
        default=128, ge=1, description="Tokens from one eviction while decoding to the next"
    )
    min_decode_interval_tokens: int = Field(
        default=16, ge=1, description="Least that a request may ask for"
    )
    max_decode_interval_tokens: int = Field(
        default=1024, ge=1, description="Most that a request may ask for"
    )
    min_budget_tokens: int = Field(default=64, ge=1, description="Least that a request may ask for")
    max_budget_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most that a request may come to, by a budget or a ratio, where the settings "
        "above would not keep more; none: no limit where `allow_full` is on, else those settings",
    )
    max_window_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest observation window that a request may ask for; none: as many queries "
        "as the preset looks at by itself",
    )
    allow_full: bool = Field(default=True, description="Whether a request may keep all")
    allow_detail: bool = Field(
        default=False,
        description="Whether a request may ask for what each head keeps of its prompt",
    )
    graph_table_bytes: int = Field(
        default=128 << 20,
        ge=0,
        description="Most memory for the page tables of full CUDA graphs; 0: no such graphs",
    )
    sessions: SessionsConfig = SessionsConfig()
    check_invariants: bool = Field(
        default=False, description="Check all bookkeeping after every step: slow, for debugging"
    )
    record_selections: bool = Field(
        default=False, description="Keep the kept positions of running requests, for debugging"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> "CompressionConfig":
        for tokens, in_bytes in (("budget_tokens", "budget_bytes"),
                                 ("keep_ratio", "keep_bytes_ratio")):  # fmt: skip
            if getattr(self, in_bytes) is not None and tokens in self.model_fields_set:
                raise ValueError(f"{tokens} and {in_bytes} say the same in two ways: give one")
        return self

    @model_validator(mode="after")
    def _bytes_for_a_choice_by_bytes(self) -> "CompressionConfig":
        if self.page_dtype == "by_bytes" and (self.budget_bytes, self.keep_bytes_ratio) == (
            None,
            None,
        ):
            raise ValueError("page_dtype by_bytes needs budget_bytes or keep_bytes_ratio")
        return self

    @model_validator(mode="after")
    def _policy_exists(self) -> "CompressionConfig":
        check_policy_name(self.policy)
        if self.policy != FULL:
            self.default_choice.build()
            if self.budget_bytes is None:
                self.refuse_below_window(f"budget_tokens={self.budget_tokens}", self.budget_tokens)
            if self.decode_budget_tokens is not None:
                check_bound(
                    self.default_choice, self.decode_budget_tokens, self.decode_interval_tokens
                )
        return self

    def refuse_below_window(self, budget: str, entries: int) -> None:
        """Raise ValueError if a budget of so many entries a head is below the policy's window.

        Args:
            budget: how the error names it.
        """
        window = self.default_choice.build().scorer.window_tokens if self.policy != FULL else 0
        if entries < window:
            raise ValueError(f"{budget} is below the observation window of {window}")

    @property
    def chosen_page_dtype(self) -> str:
        """Return `page_dtype`, or what it stands for where it is `by_bytes`.

        A budget in bytes is either fewer exact entries or more entries of fewer bits. The more
        entries answered better where full precision would keep three fifths of them or less
        (docs/quality.md). A budget without a share is small beside long prompts.
        """
        if self.page_dtype != "by_bytes":
            return self.page_dtype
        share = self.keep_bytes_ratio or 0.0
        return "fp8" if share <= MOST_SHARE_OF_EIGHT_BITS else "auto"

    @property
    def most_held(self) -> int:
        """Most caches that are held."""
        return self.sessions.max_held if self.sessions.enabled else 0

    @property
    def default_choice(self) -> PolicyChoice:
        return PolicyChoice(self.policy, self.alpha, self.window_tokens)


def check_bound(
    choice: PolicyChoice, budget_tokens: int | None, interval_tokens: int | None
) -> None:
    """Raise ValueError if the policy needs more; the text names the setting without its prefix."""
    window = choice.build().scorer.window_tokens
    if budget_tokens is not None and budget_tokens < window + SINK_TOKENS:
        raise ValueError(
            f"decode_budget_tokens={budget_tokens} is below the observation window of {window} "
            f"and {SINK_TOKENS} sinks"
        )
    if interval_tokens is not None and interval_tokens < window:
        raise ValueError(
            f"decode_interval_tokens={interval_tokens} is below the observation window of {window}"
        )


def policy_names() -> list[str]:
    """Return the names of all policies, `auto` and `full` included."""
    return sorted([*PRESETS, FULL, AUTO])


def check_policy_name(name: str) -> None:
    """Raise ValueError, with the known names, if there is no such policy."""
    if name not in policy_names():
        raise ValueError(f"unknown policy {shown(name)}: known are {', '.join(policy_names())}")


def shown(text: str) -> str:
    """Return a request's text for a message: short, and writable in any encoding."""
    return ascii(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def compression_config(additional_config: Any) -> CompressionConfig | None:
    """Return the settings in an engine's `additional_config`, or None if compression is off.

    Raises:
        pydantic.ValidationError: unknown keys or bad values.
    """
    if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
        return None
    config = CompressionConfig.model_validate(additional_config[CONFIG_KEY])
    return config if config.enabled else None
