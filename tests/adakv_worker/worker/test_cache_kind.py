"""Engines that name the same kind of caches can read each other's."""

import pytest

from adakv_worker.worker.moves import CacheKind

KIND = CacheKind(
    model="some/model", fingerprint="0a", dtype="float32", query_dtype="float32", page_tokens=32,
    layers=5, heads=3, head_dim=8, entry_size=8, rank=0, ranks=2, packing="as it is",
)  # fmt: skip


def test_all_ranks_name_the_same_kind() -> None:
    assert KIND.name == KIND._replace(rank=1).name


@pytest.mark.parametrize("field", [name for name in CacheKind._fields if name != "rank"])
def test_each_property_that_a_header_has_makes_another_kind(field: str) -> None:
    value = getattr(KIND, field)
    other = "another" if isinstance(value, str) else value + 1
    changed = KIND._replace(**{field: other})
    assert changed.name != KIND.name
    # Else an engine would refuse what its name had promised.
    assert changed.header("policy", [1]) != KIND.header("policy", [1])
