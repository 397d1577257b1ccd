"""Selections of kvpress for the cross-check: `python reference.py MODEL ASKED.json OUT.pt`.

It runs in a Python environment that has kvpress and none of our packages.
"""

import contextlib
import json
import sys
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    CriticalAdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

_WINDOW = 32


def press_of(name: str, ratio: float, keep: int) -> Any:
    # kvpress counts the window towards a head's floor; ours is a share of the rest.
    floor = (_WINDOW + int(0.2 * (keep - _WINDOW)) + 0.5) / keep
    snapkv = SnapKVPress(ratio, window_size=_WINDOW, kernel_size=5)
    expected = ExpectedAttentionPress(ratio)
    return {
        "snapkv": lambda: snapkv,
        "ada_snapkv": lambda: AdaKVPress(snapkv, alpha_safeguard=0.0),
        "ada_snapkv_floor": lambda: AdaKVPress(snapkv, alpha_safeguard=floor),
        "critical_ada_snapkv": lambda: CriticalAdaKVPress(snapkv, alpha_safeguard=0.0),
        "expected_attention": lambda: expected,
        "ada_expected_attention": lambda: AdaKVPress(expected, alpha_safeguard=0.0),
        "key_norm": lambda: KnormPress(ratio),
        "key_diff": lambda: KeyDiffPress(ratio),
        "streaming_llm": lambda: StreamingLLMPress(ratio, n_sink=4),
    }[name]()


class Compressed:
    """A model after a prompt, under a press.

    kept: [L, H, n] bool.
    """

    def __init__(self, model: Any, prompt: list[int], press: Any | None) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._position = len(prompt)
        self._scores: dict[int, Tensor] = {}
        with self._recording_scores(press), press(model) if press else contextlib.nullcontext():
            self.logits = self._forward(torch.tensor([prompt]), torch.arange(len(prompt))[None])
        first: Any = self._cache.layers[0]
        kept_tokens = first.keys.shape[2]
        self.kept = torch.stack(
            [self._kept(layer.self_attn, kept_tokens) for layer in model.model.layers]
        )

    @contextlib.contextmanager
    def _recording_scores(self, press: Any | None) -> Any:
        scorer = getattr(press, "press", press)
        if scorer is None:
            yield
            return
        score = scorer.score

        def recorded(module: Any, *args: Any, **kwargs: Any) -> Tensor:
            found = score(module, *args, **kwargs)
            self._scores[module.layer_idx] = found[0].clone()
            return found

        scorer.score = recorded
        try:
            yield
        finally:
            del scorer.score

    def _kept(self, module: Any, kept_tokens: int) -> Tensor:
        kept = torch.ones(module.config.num_key_value_heads, self._position, dtype=torch.bool)
        masked = getattr(module, "masked_key_indices", None)
        if masked is not None:
            kept[masked[1], masked[2]] = False
        elif kept_tokens < self._position:
            top = self._scores[module.layer_idx].topk(kept_tokens, dim=-1).indices
            kept = torch.zeros_like(kept).scatter_(-1, top, True)
        return kept

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        done = self._model(
            ids, position_ids=positions, past_key_values=self._cache, logits_to_keep=1
        )
        return done.logits[0, -1].float().log_softmax(-1)

    def force(self, tokens: list[int]) -> list[Tensor]:
        """Return the log-probabilities at each forced token."""
        distributions = [self.logits]
        for token in tokens[:-1]:
            position = torch.tensor([[self._position]])
            distributions.append(self._forward(torch.tensor([[token]]), position))
            self._position += 1
        return distributions


@torch.no_grad()
def main(model_path: str, asked_path: str, out_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with open(asked_path) as file:
        asked = json.load(file)
    found: dict[str, Any] = {}
    for number, one in enumerate(asked["prompts"]):
        prompt, forced, begin = one["prompt"], one["forced"], one["compressed"]
        full = Compressed(model, prompt, None).force(forced)[begin:]
        for name in asked["presses"]:
            for keep in asked["keeps"]:
                ratio = 1 - (keep + 0.5) / len(prompt)
                pressed = Compressed(model, prompt, press_of(name, ratio, keep))
                kept = pressed.kept
                ours = pressed.force(forced)[begin:]
                found[f"{number}/{name}/{keep}"] = {
                    "kept": kept,
                    "kl": [
                        float((a.exp() * (a - b)).sum()) for a, b in zip(full, ours, strict=True)
                    ],
                    "agreement": [
                        int(a.argmax()) == int(b.argmax()) for a, b in zip(full, ours, strict=True)
                    ],
                }
    torch.save(found, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:4])
