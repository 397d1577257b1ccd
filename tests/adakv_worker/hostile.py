"""Requests as no honest client sends them: every option with every bad value, beside all else.

As a program it sends more of them:
    python -m tests.adakv_worker.hostile --requests 5000 --seed 7
"""

import argparse
import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.exceptions import VLLMValidationError

from adakv_serve.kernels.policies.presets import PRESETS
from adakv_worker.messages import CONTINUATION_KEY
from adakv_worker.options import RequestOptions
from tests.adakv_worker.engines import Engine, prompt
from tests.adakv_worker.tiny_models import MODELS, TinyModel, add_tokenizer

FIELDS = [
    *(f"adakv_{name}" for name in RequestOptions.model_fields if name != "policy"),
    "adakv_", "adakv_budget", "adakv_polcy", "adakv_\ud83d", "ADAKV_POLICY", "adakv",
    CONTINUATION_KEY, "mine",
]  # fmt: skip
POLICIES = [*PRESETS, "auto", "full", "no-such-policy"]
VALUES: dict[str, Any] = {
    "text": "abc", "number as text": "48", "flag": True, "nothing": None, "fraction": 1.5,
    "share": 0.5, "one": 1, "zero": 0, "negative": -1, "count": 48, "large": 100_000,
    "64 bits": 2**63 - 1, "more than 64 bits": 10**30, "huge": 1e300, "tiny": 5e-324,
    "no number": float("nan"), "infinite": float("inf"), "below all": float("-inf"),
    "empty text": "", "no entries": [], "entries": [1, "a", None], "no fields": {},
    "nested": {"a": [{"b": {"c": [float("nan")]}}]}, "unicode": "Ünï\u202e\U0001f600\x00",
    "half a pair": "\ud83d", "long": "x" * 1_000_000, "many": [0] * 10_000,
    "continuation": {"prompt_tokens": 3, "state": "none", "proof": {}},
}  # fmt: skip
BESIDE: list[dict[str, Any]] = [
    {},
    # Without a seed: with one, a prompt of several steps ends a stock engine on a CPU.
    {"n": 2, "temperature": 1.0},
    {"logprobs": 20},
    {"prompt_logprobs": 3},
    {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"structured_outputs": {"regex": "[a-c]{3,9}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"min_tokens": 3},
    {"priority": 5},
    {"bad_words": ["ab"], "detokenize": True},
    {"logit_bias": {5: 3.0, 6: -100.0}},
    {"stop_token_ids": [7, 8, 9], "ignore_eos": False},
    {"min_p": 0.1, "top_p": 0.9, "top_k": 5, "temperature": 0.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"allowed_token_ids": [10, 11, 12]},
    {"stop": ["zz"], "detokenize": True},
    {"max_tokens": 1},
    {"max_tokens": 70},
]
LENGTHS = (1, 20, 90, 300, 520)
# Requests of an engine at a time.
_AT_ONCE = 48


class Hostile(NamedTuple):
    extra_args: Any
    beside: dict[str, Any]
    length: int


class Outcome(NamedTuple):
    """Counts of requests; `refused` ones got a ValueError, which servers answer with 400."""

    refused: int = 0
    finished: int = 0
    aborted: int = 0

    @property
    def sent(self) -> int:
        return sum(self)


def each_pair(seed: int) -> list[Hostile]:
    """Make requests with each value in each field and beside each policy, shuffled."""
    draw = random.Random(seed)
    requests = []
    for value in VALUES.values():
        fields = draw.sample(FIELDS, len(FIELDS))
        pairs = zip(itertools.cycle(fields), draw.sample(POLICIES, len(POLICIES)), strict=False)
        # With bounds and budgets fewer of them are refused.
        choices: list[Any] = [{"adakv_policy": policy, field: value} for field, policy in pairs]
        choices += [{"adakv_policy": value}, {**_bounded(draw), fields[0]: value}]
        requests += [_beside(extra, draw) for extra in choices]
    draw.shuffle(requests)
    return requests


def any_number(seed: int) -> Iterator[Hostile]:
    """Make requests with up to four options at random."""
    draw = random.Random(seed)
    values = list(VALUES.values())
    while True:
        extra = {"adakv_policy": draw.choice(POLICIES)} if draw.random() < 0.8 else {}
        extra |= _bounded(draw) if draw.random() < 0.3 else {}
        for field in draw.sample(FIELDS, draw.randint(0, 3)):
            extra[field] = draw.choice((*values, draw.randint(0, 600), draw.random()))
        yield _beside(extra, draw)


def _bounded(draw: random.Random) -> dict[str, Any]:
    return {
        "adakv_policy": draw.choice(list(PRESETS)),
        "adakv_budget_tokens": draw.randint(36, 200),
        "adakv_decode_budget_tokens": draw.randint(36, 80),
        "adakv_decode_interval_tokens": draw.randint(32, 60),
    }


def _beside(extra: Any, draw: random.Random) -> Hostile:
    return Hostile(extra, draw.choice(BESIDE), draw.choice(LENGTHS))


def start(model: TinyModel) -> Engine:
    """Start an engine that accepts every kind of request."""
    return Engine(
        model.path,
        {"min_budget_tokens": 8, "max_budget_tokens": 400, "max_window_tokens": 64},
        **{"skip_tokenizer_init": False, "disable_log_stats": False,
           "scheduling_policy": "priority", "max_num_seqs": 8, **model.options},
    )  # fmt: skip


def send(engine: Engine, requests: Sequence[Hostile], *, checked: bool) -> Outcome:
    """Send requests and drive the engine until all of them have ended.

    Args:
        checked: whether a front end validates the options, as servers do at admission; otherwise
            they reach the scheduler as they are.
    """
    core, refused, finished, aborted = engine.llm.llm_engine, 0, 0, 0
    numbered = [(f"hostile-{number}", one) for number, one in enumerate(requests)]
    for first in range(0, len(numbered), _AT_ONCE):
        running: set[str] = set()
        for name, request in numbered[first : first + _AT_ONCE]:
            try:
                _add(engine, name, request, checked)
                running.add(name)
            except VLLMValidationError:
                refused += 1
        gone = sorted(running)[::7]
        while core.has_unfinished_requests():
            for output in core.step():
                _check_proof(output)
                if output.finished and output.request_id in running:
                    running.discard(output.request_id)
                    finished += 1
            # Once: some clients leave.
            aborted += len(running.intersection(gone))
            core.abort_request([name for name in gone if name in running])
            running, gone = running.difference(gone), []
        assert not running, f"never finished: {running}"
    engine.flush()
    return Outcome(refused, finished, aborted)


def _add(engine: Engine, name: str, request: Hostile, checked: bool) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    core = engine.llm.llm_engine
    options = {"max_tokens": 12, "logprobs": None, **request.beside}
    priority = options.pop("priority", 0)
    if structured := options.pop("structured_outputs", None):
        options["structured_outputs"] = StructuredOutputsParams(**structured)
    tokens: Any = {"prompt_token_ids": prompt(request.length, seed=request.length)}
    params = engine.params(**options)
    if checked:
        params.extra_args = request.extra_args
        core.add_request(name, tokens, params, priority=priority)
        return
    validated = core.input_processor.process_inputs(
        name, tokens, params, supported_tasks=core.get_supported_tasks(), priority=priority
    )
    # Only a front end may set continuations: admission refuses them from clients.
    extra = {
        field: value for field, value in request.extra_args.items() if field != CONTINUATION_KEY
    }
    validated.sampling_params.extra_args = extra
    core.add_request(validated.request_id, validated, validated.sampling_params)


def _check_proof(output: Any) -> None:
    proof = (output.kv_transfer_params or {}).get("kv_compression")
    # No options of a request make its policy raise.
    assert proof is None or "failed" not in (proof["fallback"] or ""), proof


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=MODELS, default="gqa")
    args = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = MODELS[args.model](Path(folder))
        add_tokenizer(model.path)
        engine = start(model)
        requests = list(itertools.islice(any_number(args.seed), args.requests))
        half = args.requests // 2
        print("checked:", send(engine, requests[:half], checked=True))
        print("unchecked:", send(engine, requests[half:], checked=False))
        engine.assert_nothing_leaked()
        engine.close()


if __name__ == "__main__":
    main()
