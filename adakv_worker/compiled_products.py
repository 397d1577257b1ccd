"""Bounds the memory of matrix products that an engine on a CPU has compiled."""

import os

# oneDNN compiles a product for each number of rows, and keeps 1,024 by itself. PyTorch keeps the
# descriptions of another 1,024, each with its code: products of prompts of 1,200 lengths took
# 1.7 GB. What a step needs again is among the latest; with these numbers it was no slower.
_MOST = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 32}


def bound_compiled_products() -> None:
    """Have oneDNN and PyTorch keep few of them; call it before this process's first product.

    Variables that the operator has set keep their values.
    """
    for name, most in _MOST.items():
        os.environ.setdefault(name, str(most))
