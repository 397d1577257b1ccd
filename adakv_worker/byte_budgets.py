"""Budgets in bytes of KV memory, as the budgets in entries that everything else works with."""

from vllm.config import ModelConfig, ParallelConfig, VllmConfig

from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.stored_dtypes import entry_bytes, pages_stored_as


def settings_of(config: VllmConfig) -> CompressionConfig | None:
    """Return an engine's settings of compression in entries; None if compression is off.

    Raises:
        ValueError: see `in_entries`.
        pydantic.ValidationError: unknown keys or bad values.
    """
    compression = compression_config(config.additional_config)
    if compression is None:
        return None
    cache_dtype = config.cache_config.cache_dtype
    return in_entries(compression, config.model_config, cache_dtype, config.parallel_config)


def in_entries(
    config: CompressionConfig,
    model: ModelConfig,
    cache_dtype: str,
    parallel: ParallelConfig | None = None,
) -> CompressionConfig:
    """Return settings whose budgets in bytes have become budgets in entries, rounded down.

    A share of a prompt's bytes is a larger share of its entries where pages store fewer bits.

    Args:
        cache_dtype: of blocks, by vLLM's `kv_cache_dtype`.

    Raises:
        ValueError: `budget_bytes` is less than one entry of each head takes, or than the policy's
            window.
    """
    stored = pages_stored_as(cache_dtype, config.chosen_page_dtype)
    of_a_page = entry_bytes(model, stored)
    # What it stands for depends on the budgets that go.
    changes: dict[str, object] = {"page_dtype": config.chosen_page_dtype}
    if config.budget_bytes is not None:
        heads = model.get_num_layers(parallel or ParallelConfig()) * model.get_total_num_kv_heads()
        one_of_each = heads * of_a_page
        if config.budget_bytes < one_of_each:
            raise ValueError(
                f"adakv: budget_bytes={config.budget_bytes} is less than one entry of each head "
                f"takes, {one_of_each}"
            )
        entries = config.budget_bytes // one_of_each
        named = f"budget_bytes={config.budget_bytes} ({entries} entries of each head)"
        config.refuse_below_window(named, entries)
        changes |= {"budget_bytes": None, "budget_tokens": entries}
    if config.keep_bytes_ratio is not None:
        share = min(1.0, config.keep_bytes_ratio * entry_bytes(model, cache_dtype) / of_a_page)
        changes |= {"keep_bytes_ratio": None, "keep_ratio": share}
    return config.model_copy(update=changes)
