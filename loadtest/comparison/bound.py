"""The ratio to a reference that faster decoding alone could reach (docs/compression.md)."""


def bound(
    total_s: float, prefill_s: float, decode_gain: float, computed_share: float = 1.0
) -> float:
    """Return T / (c P + D / g).

    Args:
        total_s: T, the time of the reference; what is not prefill, D, is decoding.
        prefill_s: P, the part of it that prefills take.
        decode_gain: g, the arm's decode rate over the reference's, each at its own peak batch;
            infinite for the most that any arm could reach (S_max).
        computed_share: c, the prompt tokens that the arm computes over the reference's; less than 1
            where it resumes sessions.
    """
    prefill_s = min(prefill_s, total_s)
    return total_s / (computed_share * prefill_s + (total_s - prefill_s) / decode_gain)
