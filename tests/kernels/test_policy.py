"""Selections against brute force, published implementations and their own contract."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.kernels.policies.attention import attention_rows, pool, window_attention
from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads
from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.layer_budgets.joint import JointLayers
from adakv_serve.kernels.policies.layer_budgets.pyramid import PyramidLayers
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import check_selection
from adakv_serve.kernels.policies.presets import PRESETS, preset
from adakv_serve.kernels.policies.scorers.window import WindowScorer
from adakv_serve.kernels.policies.top import top_mask
from tests.kernels.observations import observations

CASES = json.loads((Path(__file__).parent / "data" / "selection_cases.json").read_text())
AUTHORS = [case for case in CASES if case["case"] < 100]
KVPRESS = [case for case in CASES if case["case"] >= 100]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("keep", [32, 33, 64, 99, 149, 150, 200])
def test_every_preset_conserves_the_total_and_keeps_the_window(name: str, keep: int) -> None:
    policy = preset(name)
    layers = observations(4, 3, 2, 150, 16, seed=keep)
    selection = policy.select(layers, keep)
    check_selection(selection, keep, policy.scorer.window_tokens)
    assert torch.equal(policy.select(layers, keep).kept, selection.kept)


def test_a_budget_below_the_window_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="raise the budget or lower the window"):
        preset("snapkv").select(observations(1, 2, 1, 100, 8, seed=0), 31)


def test_overflown_keys_score_lowest() -> None:
    (observation,) = observations(1, 2, 1, 60, 8, seed=2)
    keys = observation.keys.clone()
    keys[0, 7], keys[1, 9, 3] = float("nan"), float("inf")
    policy = preset("key_norm")
    scores = policy.score(observation._replace(keys=keys)).scores
    assert bool(scores.isfinite().all())
    kept = policy.select([observation._replace(keys=keys)], 59).kept[0]
    assert (~kept).nonzero().tolist() == [[0, 7], [1, 9]]


scores = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@given(scores, st.data())
@settings(max_examples=500, deadline=None)
def test_threshold_selection_equals_the_stable_sort_under_ties(
    values: list[int], data: st.DataObject
) -> None:
    row = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[best] = True
    assert torch.equal(top_mask.reference(row, torch.tensor(count)), expected)
    assert torch.equal(top_mask(row, torch.tensor(count)), expected)


@given(st.integers(1, 5), st.integers(1, 20), st.floats(0, 1), st.integers(0, 10**6), st.data())
@settings(max_examples=300, deadline=None)
def test_adaptive_heads_equal_brute_force(
    heads: int, m: int, alpha: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 5, (heads, m), generator=generator).float()
    total = data.draw(st.integers(0, heads * m))
    mask = AdaptiveHeads(alpha).allocate(values[None], [total])[0]
    floor = int(alpha * total / heads)
    kept: set[tuple[int, int]] = set()
    for head in range(heads):
        ranked = sorted(range(m), key=lambda i: (-values[head, i].item(), i))
        kept |= {(head, i) for i in ranked[:floor]}
    rest = [(h, i) for h in range(heads) for i in range(m) if (h, i) not in kept]
    rest.sort(key=lambda at: (-values[at].item(), at))
    kept |= set(rest[: total - len(kept)])
    assert {(h, i) for h, i in mask.nonzero().tolist()} == kept


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 500), st.integers(1, 600))
@settings(max_examples=300, deadline=None)
def test_pyramid_totals_fall_and_sum_exactly(layers: int, heads: int, quota: int, m: int) -> None:
    quota = min(quota, m)
    totals = PyramidLayers().totals((layers, heads, m), quota)
    assert sum(totals) == layers * heads * quota
    assert totals == sorted(totals, reverse=True)
    assert all(0 <= total <= heads * m for total in totals)


def test_joint_layers_with_adaptive_heads_is_one_top_k_over_everything() -> None:
    values = torch.rand(4, 3, 50, generator=torch.Generator().manual_seed(5))
    totals = JointLayers().totals((4, 3, 50), 10, values)
    split = AdaptiveHeads(0.0).allocate(values, totals)
    assert torch.equal(split.flatten(), top_mask(values.flatten(), torch.tensor(120)))


@pytest.mark.parametrize("case", KVPRESS, ids=lambda case: case["case"])
def test_selections_equal_kvpress(case: dict[str, Any]) -> None:
    heads, n, window = case["H"], case["S"], case["window"]
    generator = np.random.Generator(np.random.PCG64(case["seed"]))
    powers = np.linspace(1, 12, heads)[:, None]
    values = torch.from_numpy((generator.random((heads, n)) ** powers).astype(np.float32))
    values[:, -window:] = values.max() + 1
    budget = case["budget_incl_window"]
    # kvpress counts the window among the scores, so that its floor covers window entries.
    adaptive = AdaptiveHeads(case["alpha_safeguard"]).allocate(values[None], [heads * budget])[0]
    uniform = UniformHeads().allocate(values[None], [heads * budget])[0]
    assert adaptive.sum(dim=-1).tolist() == case["ada_head_lens"]
    for mask, kept in ((adaptive, case["ada_kept"]), (uniform, case["uniform_kept"])):
        assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(k) for k in kept]


@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: case["case"])
def test_selections_follow_the_authors(case: dict[str, Any]) -> None:
    generator = np.random.Generator(np.random.PCG64(case["seed"]))
    n, dim, window = case["S"], case["head_dim"], case["window"]
    queries = generator.standard_normal((case["num_q_heads"], n, dim)).astype(np.float32)
    keys = generator.standard_normal((case["num_kv_heads"], n, dim)).astype(np.float32)
    keys *= np.asarray(case["key_scale_per_kv_head"], dtype=np.float32)[:, None, None]
    tensors = torch.from_numpy(queries), torch.from_numpy(keys)
    observation = Observation(*tensors, tensors[1], dim**-0.5)
    pooling = "max" if case["pooling"] == "maxpool" else "avg"
    scorer = WindowScorer(window, case["kernel"], pooling)
    values = scorer.score(observation)
    for layer in case["layers"]:
        if "snap_kept" not in layer:
            continue
        quota = min(layer["snap_cap"], n) - window
        ours = UniformHeads().allocate(values[None], [quota * case["num_kv_heads"]])[0]
        _assert_equally_good(ours, layer["snap_kept"], values)
        # The authors blend and round head capacities: a few entries and the total differ.
        floor = AdaptiveHeads(case["floor_alpha"])
        adaptive = floor.allocate(values[None], [quota * case["num_kv_heads"]])[0]
        theirs = sum(layer["ada_head_lens"]) - window * case["num_kv_heads"]
        assert abs(int(adaptive.sum()) - theirs) <= 2 * case["num_kv_heads"]


def _assert_equally_good(mask: torch.Tensor, kept: list[list[int]], scores: torch.Tensor) -> None:
    """Same counts and same scores: pooled scores tie at the cut, where indices mean nothing."""
    for row, theirs, worth in zip(mask, kept, scores, strict=True):
        expected = [index for index in theirs if index < row.shape[0]]
        assert int(row.sum()) == len(expected)
        torch.testing.assert_close(worth[row].sort().values, worth[expected].sort().values)


def test_window_attention_is_the_last_rows_of_causal_attention() -> None:
    (observation,) = observations(1, 2, 3, 40, 8, seed=1)
    full = torch.nn.functional.scaled_dot_product_attention(
        observation.queries,
        observation.keys.repeat_interleave(3, dim=0),
        torch.eye(40).expand(6, 40, 40),
        is_causal=True,
        scale=observation.scale,
    )
    window = observation.grouped_queries(8), observation.keys, observation.scale
    torch.testing.assert_close(window_attention(*window).reshape(6, 8, 40), full[:, -8:])
    rows = torch.cat([part.attention.clone() for part in attention_rows(*window)])
    torch.testing.assert_close(rows.view(6, 8, 40), full[:, -8:])


def test_pooling_keeps_the_length() -> None:
    row = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    assert pool(row, 3, "max").tolist() == [[3.0, 3.0, 3.0, 0.0]]
    assert pool(row, 3, "avg").tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert pool(row, 3, "none") is row
