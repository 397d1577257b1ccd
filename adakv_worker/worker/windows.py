"""Windows: queries that scorers need and that earlier steps computed."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger

from adakv_worker import messages

# Below vLLM's own logger, so that its settings show it.
logger = init_logger("vllm.adakv")


class Window(NamedTuple):
    """The queries of the last `span` of `prompt_tokens` tokens: queries [L, span, Hq, D].

    Allocated only for a window that lies across two chunks of a prefill, and for evictions. For
    those `prompt_tokens` includes the answer so far.
    """

    prompt_tokens: int
    span: int
    queries: Tensor


class Capture(NamedTuple):
    """Copy of the queries of batch tokens [start, stop) to `target` [L, stop - start, Hq, D]."""

    start: int
    stop: int
    target: Tensor

    def see(self, layer: int, query: Tensor) -> None:
        self.target[layer] = query[self.start : self.stop]


class Windows:
    """The windows of a worker's requests, at most one for each."""

    def __init__(
        self, num_layers: int, queries: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            queries: heads of a layer's queries, and numbers of a head.
            dtype: of the queries.
        """
        self._num_layers = num_layers
        self._queries = queries
        self._dtype = dtype
        self._device = device
        self._windows: dict[str, Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def nbytes(self) -> int:
        held = (window.queries for window in self._windows.values())
        return sum(queries.numel() * queries.element_size() for queries in held)

    def get(self, request_id: str) -> Window | None:
        return self._windows.get(request_id)

    def take(self, request_id: str) -> Window | None:
        """Return a request's window, which ends, if there is one."""
        return self._windows.pop(request_id, None)

    def put(self, request_id: str, window: Window) -> None:
        """Copy a window from elsewhere to this device, for a request."""
        queries = window.queries.to(self._device, copy=True)
        self._windows[request_id] = window._replace(queries=queries)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Drop the windows of these requests."""
        if self._windows:
            for request_id in request_ids:
                self._windows.pop(request_id, None)

    def no_queries(self, tokens: int) -> Tensor:
        """Return zeros [tokens, Hq, D] in the shape of a layer's queries."""
        return torch.zeros((tokens, *self._queries), dtype=self._dtype, device=self._device)

    def capture(
        self,
        request_id: str,
        command: messages.Capture,
        start: int,
        first_token: int,
        num_tokens: int,
    ) -> Capture | None:
        """Begin to copy the queries of this step's tokens that a scorer will look at.

        Args:
            start: index of the request's first token in the batch.
            first_token: its position in the request.
            num_tokens: its tokens in this step.
        """
        prompt_tokens, span = command
        window_start = prompt_tokens - span
        first = max(first_token, window_start)
        last = first_token + num_tokens
        if first >= last:
            return None
        window = self._windows.get(request_id)
        if window is None or window[:2] != (prompt_tokens, span):
            if first > window_start:
                # The window's first queries are gone.
                return None
            window = self._allocated(request_id, prompt_tokens, span)
            if window is None:
                return None
        return Capture(
            start + first - first_token,
            start + last - first_token,
            window.queries[:, first - window_start : last - window_start],
        )

    def _allocated(self, request_id: str, prompt_tokens: int, span: int) -> Window | None:
        shape = (self._num_layers, span, *self._queries)
        try:
            queries = torch.empty(shape, dtype=self._dtype, device=self._device)
        except RuntimeError as error:
            # The device is full: the policy that needs these queries will fail.
            logger.warning("adakv: request %s: no memory for queries: %s", request_id, error)
            return None
        window = self._windows[request_id] = Window(prompt_tokens, span, queries)
        return window
