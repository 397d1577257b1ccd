"""What one request gets: the operator's settings, overridden by its own options."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adakv_serve.kernels.blocks import SINK_TOKENS, DecodeBound, KeepLimit, kept_tokens
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.config import (
    CONFIG_KEY,
    FULL,
    SHOWN_CHARACTERS,
    CompressionConfig,
    check_bound,
    check_policy_name,
    meant_keys,
    shown,
)


class RequestBudget(BaseModel):
    """What one request gets: the operator's settings, overridden by its own options.

    limit: most entries that it may keep, whatever it asks for.
    unsupported: presets that do not work with the model; `auto` chooses another.
    fallback: why it gets another policy or budget than it asked for, or None.
    session: whether it may begin with a held cache and leave one.
    detail: whether its proof has a `HeadDetail`.
    """

    model_config = ConfigDict(frozen=True)

    choice: PolicyChoice
    budget_tokens: int
    keep_ratio: float
    decode: DecodeBound | None = None
    limit: KeepLimit | None = None
    unsupported: frozenset[str] = frozenset()
    fallback: str | None = None
    session: bool = True
    detail: bool = False

    def keep_of(self, num_tokens: int) -> int:
        """Return the mean entries per (layer, KV head) that are kept of a prompt."""
        return kept_tokens(num_tokens, self.budget_tokens, self.keep_ratio, self.decode, self.limit)

    def choice_for(self, keep_tokens: int, num_tokens: int) -> PolicyChoice:
        """Return the policy for a prompt of which so many entries stay: `auto` is one of two."""
        return self.choice.for_budget(keep_tokens, num_tokens, self.unsupported)

    def why_less(self, num_tokens: int) -> str | None:
        """Return why a prompt keeps less than was asked for, or None."""
        asked = kept_tokens(num_tokens, self.budget_tokens, self.keep_ratio, self.decode)
        kept = self.keep_of(num_tokens)
        if kept == asked:
            return None
        return f"{asked} entries were asked for: this server keeps at most {kept} of them"


class RequestOptions(BaseModel):
    """The `adakv_*` values of a request's `vllm_xargs` (`SamplingParams.extra_args`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str | None = None
    budget_tokens: int | None = Field(default=None, ge=1)
    keep_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    window_tokens: int | None = Field(default=None, ge=1)
    decode_budget_tokens: int | None = Field(default=None, ge=1)
    decode_interval_tokens: int | None = Field(default=None, ge=1)
    session: Literal["auto", "off"] | None = None
    detail: bool = False

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Read the values.

        Raises:
            ValueError: an unknown name or a bad value; the text names it as the request did.
        """
        prefix = f"{CONFIG_KEY}_"
        given = {
            name.removeprefix(prefix): value
            for name, value in (extra_args or {}).items()
            if name.startswith(prefix)
        }
        for name in given:
            if name not in cls.model_fields:
                near = [
                    prefix + key for key in meant_keys(name[:SHOWN_CHARACTERS], cls.model_fields)
                ]
                hint = f": did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"unknown option {shown(prefix + name)}{hint}")
        try:
            options = cls(**given)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{prefix}{problem['loc'][0]}: {problem['msg']}") from None
        if options.policy is not None:
            check_policy_name(options.policy)
        return options

    def budget(self, config: CompressionConfig) -> RequestBudget:
        """Return the operator's settings, overridden by the options.

        A request that names a budget or a ratio gets exactly that, up to the operator's limit; a
        request that names neither gets the operator's.

        Raises:
            ValueError: the operator's bounds forbid an option, or the policy does not take it.
        """
        self._check_named(config)
        budget = self._laid_over(config)
        if budget.choice.preset != FULL:
            _check_resulting(budget, config)
        return budget

    def _check_named(self, config: CompressionConfig) -> None:
        """Check each option by itself."""
        whole = self.policy == FULL or self.keep_ratio == 1.0
        if whole and config.policy != FULL and not config.allow_full:
            name = "adakv_policy" if self.policy == FULL else "adakv_keep_ratio"
            raise ValueError(f"{name}: this server does not allow `full`")
        if self.detail and not config.allow_detail:
            raise ValueError("adakv_detail: this server does not allow it")
        least, most = config.min_budget_tokens, config.max_budget_tokens
        _check_range("budget_tokens", self.budget_tokens, least, most)
        _check_range("decode_budget_tokens", self.decode_budget_tokens, least, most)
        _check_range(
            "decode_interval_tokens",
            self.decode_interval_tokens,
            config.min_decode_interval_tokens,
            config.max_decode_interval_tokens,
        )
        if self.window_tokens is not None:
            name = self.policy if self.policy is not None else config.policy
            _check_range("window_tokens", self.window_tokens, 1, _most_window(name, config))

    def _laid_over(self, config: CompressionConfig) -> RequestBudget:
        name = self.policy if self.policy is not None else config.policy
        choice = PolicyChoice(
            name,
            self.alpha if self.alpha is not None else _if_same(config.alpha, name, config.policy),
            self.window_tokens
            if self.window_tokens is not None
            else _if_same(config.window_tokens, name, config.policy),
        )
        window = _window_of(choice)
        budget, ratio = config.budget_tokens, config.keep_ratio
        if self.budget_tokens is not None or self.keep_ratio is not None:
            budget = self.budget_tokens or max(config.min_budget_tokens, window)
            ratio = self.keep_ratio or 0.0
        elif name != config.policy:
            # The operator's budget fits the operator's policy; another policy may need more.
            budget = max(budget, window)
        if budget < window:
            if self.budget_tokens is None:
                raise ValueError(f"adakv_window_tokens={window} is above the budget of {budget}")
            raise ValueError(
                f"adakv_budget_tokens={budget} is below the observation window of {window}"
            )
        decode = self._decode_bound(choice, config)
        if decode is not None:
            # The sinks of bounded requests always stay.
            budget = max(budget, window + SINK_TOKENS)
        return RequestBudget(
            choice=choice,
            budget_tokens=budget,
            keep_ratio=ratio,
            decode=decode,
            limit=_keep_limit(config),
            session=self.session != "off",
            detail=self.detail,
        )

    def _decode_bound(self, choice: PolicyChoice, config: CompressionConfig) -> DecodeBound | None:
        if choice.preset == FULL:
            return None
        own, interval = self.decode_budget_tokens, self.decode_interval_tokens
        if own is None and config.decode_budget_tokens is None:
            if interval is not None:
                raise ValueError(
                    "adakv_decode_interval_tokens: there is no adakv_decode_budget_tokens"
                )
            return None
        try:
            check_bound(choice, own, interval)
        except ValueError as error:
            raise ValueError(f"{CONFIG_KEY}_{error}") from None
        # The operator's bound fits the operator's policy; another policy may need more.
        window = choice.build().scorer.window_tokens
        return DecodeBound(
            own or max(config.decode_budget_tokens or 0, window + SINK_TOKENS),
            interval or max(config.decode_interval_tokens, window),
        )


def budget_of(
    extra_args: Mapping[str, Any] | None,
    config: CompressionConfig,
    unsupported: Mapping[str, str],
) -> RequestBudget:
    """Return what a request gets, whatever it asks for.

    Where the operator's bounds or the model forbid an option, the request gets the operator's own
    settings, and `fallback` names the reason.

    Args:
        unsupported: presets that do not work with the model, with the reason.
    """
    options = RequestOptions()
    try:
        options = RequestOptions.of(extra_args)
        budget = options.budget(config)
    except ValueError as error:
        budget = RequestOptions().budget(config).model_copy(update={"fallback": str(error)})
    if (reason := unsupported.get(budget.choice.preset)) is not None:
        why = f"policy '{budget.choice.preset}' does not work with this model: {reason}"
        of_policy = {"policy": None, "alpha": None, "window_tokens": None}
        try:
            budget = options.model_copy(update=of_policy).budget(config)
        except ValueError:
            budget = RequestOptions().budget(config)
        budget = budget.model_copy(update={"fallback": why})
    return budget.model_copy(update={"unsupported": frozenset(unsupported)})


def _keep_limit(config: CompressionConfig) -> KeepLimit | None:
    """Return the most that requests may keep; the operator's own settings are always allowed."""
    if config.policy == FULL or (config.allow_full and config.max_budget_tokens is None):
        return None
    own = max(config.budget_tokens, _window_of(config.default_choice) + SINK_TOKENS)
    return KeepLimit(max(own, config.max_budget_tokens or 0), config.keep_ratio)


def _most_window(name: str, config: CompressionConfig) -> int:
    """Return the largest observation window that a request may ask for of a policy."""
    if config.max_window_tokens is not None:
        return config.max_window_tokens
    if name == FULL:
        return 0
    own = PolicyChoice(name, window_tokens=_if_same(config.window_tokens, name, config.policy))
    return max(
        scorer.query_span_tokens if scorer.query_span_tokens else scorer.window_tokens
        for scorer in (PolicyChoice(name).build().scorer, own.build().scorer)
    )


def _window_of(choice: PolicyChoice) -> int:
    return 0 if choice.preset == FULL else choice.build().scorer.window_tokens


def _check_resulting(budget: RequestBudget, config: CompressionConfig) -> None:
    """Check the options together: one may raise another.

    The operator's own settings are always within the operator's bounds.
    """
    own = RequestOptions()._laid_over(config)
    if config.max_budget_tokens is not None:
        most = max(config.max_budget_tokens, own.budget_tokens)
        _check_range("budget_tokens", budget.budget_tokens, 1, most)
    window, limit = _window_of(budget.choice), budget.limit
    if limit is not None and window + SINK_TOKENS > limit.tokens:
        raise ValueError(
            f"adakv_window_tokens={window} and {SINK_TOKENS} sinks are above this server's most "
            f"entries, {limit.tokens}"
        )
    if budget.decode is None:
        return
    own_bound = own.decode or DecodeBound(0, 0)
    if config.max_budget_tokens is not None:
        most = max(config.max_budget_tokens, own_bound.budget_tokens)
        _check_range("decode_budget_tokens", budget.decode.budget_tokens, 1, most)
    most = max(config.max_decode_interval_tokens, own_bound.interval_tokens)
    _check_range("decode_interval_tokens", budget.decode.interval_tokens, 1, most)


def _if_same(value: Any, name: str, default: str) -> Any:
    # The operator's fine-tuning belongs to the operator's policy.
    return value if name == default else None


def _check_range(name: str, tokens: int | None, least: int, most: int | None) -> None:
    if tokens is None:
        return
    if tokens < least:
        raise ValueError(f"{CONFIG_KEY}_{name}={tokens} is below this server's least, {least}")
    if most is not None and tokens > most:
        raise ValueError(f"{CONFIG_KEY}_{name}={tokens} is above this server's most, {most}")
