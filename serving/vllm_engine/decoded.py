"""Counts the tokens that an engine decodes for each HTTP request."""

from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM

from adakv_serve.serving.http.decoded import Decoded, current_decoded


def count_decoded(engine: AsyncLLM) -> None:
    """Make the engine note each request's tokens in the count that was current at its start."""
    processor = engine.output_processor
    add_request, process_outputs = processor.add_request, processor.process_outputs
    # Weak references, because a count ends with its HTTP request even if the engine's goes on.
    counts: WeakValueDictionary[str, Decoded] = WeakValueDictionary()

    def adding(request: Any, *args: Any, **kwargs: Any) -> None:
        if (count := current_decoded.get()) is not None:
            counts[request.request_id] = count
        add_request(request, *args, **kwargs)

    def processing(outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if (count := counts.get(output.request_id)) is not None:
                count.note(len(output.new_token_ids))
        return process_outputs(outputs, *args, **kwargs)

    # vLLM has no hook for the outputs of requests.
    processor.add_request = adding  # type: ignore[method-assign]
    processor.process_outputs = processing  # type: ignore[method-assign, assignment]
