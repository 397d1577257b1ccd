"""Products of prompts of many lengths, and the memory that stays with them."""

import os
import subprocess
import sys

# In a process of its own, which has compiled nothing yet.
PROGRAM = """
import ctypes
import psutil, torch
from adakv_worker.compiled_products import bound_compiled_products
from adakv_serve.kernels.policies.attention import row_products

bound_compiled_products()
weight = torch.ones(576, 64)

def multiply(lengths):
    for length in lengths:
        row_products(torch.ones(length, 64), weight)
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss >> 20

many = multiply(range(1, 300))
print(multiply(range(300, 600)) - many)
"""


def grown_mib(**variables: str) -> int:
    """Return what 300 more lengths add to the memory of a process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_more_lengths_take_no_more_memory_unless_the_operator_wants_it() -> None:
    bounded = grown_mib()
    wanted = grown_mib(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert bounded < wanted / 3
