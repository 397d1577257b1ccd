"""Ray metrics of predicted footprints: what was not known, and how long answers really were."""

import logging

from ray.serve import metrics

from adakv_serve.serving.ingress.footprints import Prediction

logger = logging.getLogger("ray.serve")

_MEANINGS = {
    "long": "their prompts are too long to be rendered at the door",
    "busy": "too many prompts are being rendered at the door",
    "content": "the router cannot render their images, embeddings or stored responses",
    "form": "the router does not know their form",
}


class PredictionMetrics:
    """Counts requests whose prompts were not known, with one warning for each reason."""

    def __init__(self) -> None:
        self._unknown = metrics.Counter(
            "adakv_prompts_not_rendered",
            "Requests whose prompts the router could not render, by reason: it estimates them by "
            "their size, or, if malformed, leaves them to the engine",
            ("reason",),
        )
        self._lengths = metrics.Histogram(
            "adakv_output_length_ratio",
            "Length of an answer over the expected length",
            boundaries=[0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 10.0],
        )
        self._warned: set[str] = set()

    def note(self, prediction: Prediction) -> None:
        """Count a request that is about to be sent."""
        reason = prediction.unknown
        if reason is None:
            return
        self._unknown.inc(tags={"reason": reason})
        if reason in _MEANINGS and reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "requests are routed by their size alone, without prefix affinity: %s "
                "(adakv_prompts_not_rendered counts them)",
                _MEANINGS[reason],
            )

    def note_output(self, prediction: Prediction, tokens: int) -> None:
        """Compare the answers of a request that has ended with what was expected."""
        footprint = prediction.footprint
        if footprint is not None and footprint.output_tokens:
            self._lengths.observe(tokens / footprint.output_tokens)
