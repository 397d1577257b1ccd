"""Policies by their choices."""

import gc
import weakref

from kernels.policies.presets import PolicyChoice


def test_policies_that_clients_once_chose_are_forgotten() -> None:
    chosen = weakref.ref(PolicyChoice("ada_snapkv", alpha=0.123456).build())
    assert PolicyChoice("ada_snapkv", alpha=0.123456).build() is chosen()
    for number in range(1000):
        PolicyChoice("ada_snapkv", alpha=0.5 + number / 10_000).build()
    gc.collect()
    assert chosen() is None
