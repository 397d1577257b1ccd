"""The GPU's kernels as machine code: the interpreter takes programs that the compiler refuses."""

import os
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adakv_serve.kernels.gpu import compaction, tables, top, window_scores

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

# Types by parameter where they are not whole numbers of 32 bits.
POINTERS = {
    "queries": "*bf16", "keys": "*bf16", "values": "*bf16", "most": "*fp32", "total": "*fp32",
    "pages": "*i64", "normalizer": "*fp32", "scores": "*fp32", "scale": "fp32", "prefix": "*i32",
    "histogram": "*i32", "left": "*i32", "ties": "*i32", "before": "*i32", "mask": "*i1",
    "kept": "*i1", "counts": "*i32", "source": "*i64", "tables": "*i32", "needed": "*i64",
    "first": "*i64", "slabs": "*i32", "offsets": "*i64", "lens": "*i32", "used": "*i32",
    "granted": "*i32", "slots": "*i64", "positions": "*i32",
    "scales": "*fp32",
}  # fmt: skip
ATTENTION = {
    "PAGE": 16, "DIM": 128, "BLOCK_DIM": 128, "BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "EXACT": False,
    "RAGGED": False, "FORMAT": window_scores._PLAIN.value,
}  # fmt: skip
WIDE = {**ATTENTION, "DIM": 256, "BLOCK_DIM": 256}
# As wide as float32 gets.
WIDEST = {**WIDE, "BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "EXACT": True}
FLOAT32 = {"queries": "*fp32", "keys": "*fp32"}
# Bytes that a program may have, of A100 and H100.
SHARED_BYTES = {80: 166_912, 90: 232_448}
ROWS = {"PAGE": 16, "DIM": 128, "BLOCK_DIM": 128, "TILE": 64}
BYTES = {"keys": "*u8", "values": "*u8"}
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "log-sum-exp": (window_scores._log_sum_exp, ATTENTION, {}),
    "log-sum-exp, float32, no pages": (
        window_scores._log_sum_exp,
        {**ATTENTION, "PAGE": 0, "EXACT": True},
        {**FLOAT32, "pages": "*fp32"},
    ),
    "log-sum-exp, ragged": (window_scores._log_sum_exp, {**ATTENTION, "RAGGED": True}, {}),
    "column squares, ragged": (
        window_scores._column_scores,
        {**ATTENTION, "SQUARES": True, "RAGGED": True},
        {},
    ),
    "log-sum-exp, wide": (window_scores._log_sum_exp, WIDE, {}),
    "log-sum-exp, widest": (window_scores._log_sum_exp, WIDEST, FLOAT32),
    "combined splits": (window_scores._combine, {"BLOCK_SPLITS": 64}, {}),
    "column means, wide": (window_scores._column_scores, {**WIDE, "SQUARES": False}, {}),
    "column means, widest": (window_scores._column_scores, {**WIDEST, "SQUARES": False}, FLOAT32),
    "column means": (window_scores._column_scores, {**ATTENTION, "SQUARES": False}, {}),
    **{
        f"{name}, {form}": (
            kernel,
            {**ATTENTION, **constants, "FORMAT": number.value},
            {"keys": pointer},
        )
        for form, number, pointer in (
            ("a scale for each head", window_scores._BY_HEAD, "*fp8e4nv"),
            ("int8", window_scores._BY_ENTRY, "*i8"),
            ("fp8", window_scores._BY_ENTRY, "*fp8e4nv"),
            ("int4", window_scores._FOUR_BITS, "*u8"),
        )
        for name, kernel, constants in (
            ("log-sum-exp", window_scores._log_sum_exp, {}),
            ("column means", window_scores._column_scores, {"SQUARES": False}),
        )
    },
    "column squares": (window_scores._column_scores, {**ATTENTION, "SQUARES": True}, {}),
    "digits": (top._count_digits, {"SHIFT": 24, "TILE": 1024}, {}),
    "further digits": (top._count_digits, {"SHIFT": 0, "TILE": 1024}, {}),
    "choice": (top._choose_digit, {"SHIFT": 24}, {}),
    "ties": (top._count_ties, {"TILE": 1024}, {}),
    "marks": (top._mark, {"TILE": 1024}, {}),
    "counts": (compaction._count_kept, {"TILE": 1024}, {}),
    "lists": (compaction._list_kept, {"TILE": 1024, "SPLITS": 8}, {}),
    "copies": (compaction._copy_listed, ROWS, {}),
    "moves": (compaction._move_kept, ROWS, {}),
    # Numbers of four and of eight bits, with their scales, in pages of bf16's bytes.
    "copies of bytes": (compaction._copy_listed, {**ROWS, "DIM": 132, "BLOCK_DIM": 256}, BYTES),
    "moves in pages of four bits": (
        compaction._move_kept,
        {**ROWS, "PAGE": 60, "DIM": 68},
        BYTES,
    ),
    "moves in pages of eight bits": (
        compaction._move_kept,
        {**ROWS, "PAGE": 31, "DIM": 132, "BLOCK_DIM": 256},
        BYTES,
    ),
    "placement": (tables._place, {"EACH": 256, "TILE": 64}, {}),
    "growth": (tables._grow, {"PAGE": 16, "EACH": 256, "BLOCK": 256}, {}),
}


# Only GPUs from 8.9 on have numbers of this type.
FP8 = "*fp8e4nv"
CASES = [
    *((name, 90) for name in KERNELS),
    *(
        pytest.param(name, 80, marks=pytest.mark.slow)
        for name, (_, _, types) in KERNELS.items()
        if FP8 not in types.values()
    ),
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_compiles(name: str, architecture: int) -> None:
    kernel, constants, types = KERNELS[name]
    signature = {
        parameter: "constexpr"
        if parameter in constants
        else {**POINTERS, **types}.get(parameter, "i32")
        for parameter in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
