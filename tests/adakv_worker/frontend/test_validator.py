"""Sampling parameters that the plug-in refuses at admission, wherever vLLM serves."""

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adakv_worker.frontend.validator import RequestOptionsValidator

HALF = "\ud83d"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop": ["ok", HALF]}, r"stop\[1\]"),
        ({"bad_words": [HALF]}, r"bad_words\[0\]"),
        ({"extra_args": {"mine": [{"a": HALF}]}}, r"vllm_xargs\.mine\[0\]\.a"),
        ({"extra_args": {HALF: 1}}, "vllm_xargs"),
        (
            {"structured_outputs": StructuredOutputsParams(choice=["ok", HALF])},
            r"structured_outputs\.choice\[1\]",
        ),
        (
            {"structured_outputs": StructuredOutputsParams(json={"title": HALF})},
            r"structured_outputs\.json\.title",
        ),
        ({"structured_outputs": StructuredOutputsParams(regex=HALF)}, r"structured_outputs\.regex"),
    ],
)
def test_strings_that_cannot_be_encoded_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} has half of a surrogate pair"):
        RequestOptionsValidator.validate_params(SamplingParams(**options))


def test_all_other_strings_pass() -> None:
    text = "Ünïcode \U0001f600 \\ud83d"
    for structured in ({"regex": text}, {"json": {"title": text}}, {"json_object": True}):
        RequestOptionsValidator.validate_params(
            SamplingParams(
                stop=[text],
                bad_words=[text],
                extra_args={text: [text, 1, None]},
                structured_outputs=StructuredOutputsParams(**structured),
            )
        )
