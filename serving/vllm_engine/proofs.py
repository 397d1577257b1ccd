"""Takes the proofs out of an engine's outputs and gives them to the HTTP answers.

They arrive in `kv_transfer_params`, where vLLM would lose most of them: merged outputs keep the
last one, several choices share one, and a whole answer gets the one of its last step. So they are
taken out before vLLM reads the outputs; its answers are then the same as without compression.
"""

from collections.abc import AsyncGenerator
from typing import Any
from weakref import WeakValueDictionary

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM

from adakv_serve.serving.http.answer_proofs import AnswerProofs, current_answer
from adakv_worker.messages import PROOF_KEY, Proof, proof_in


def take_proofs(engine: AsyncLLM) -> None:
    """Make the engine note each request's proofs in the answer that was current at its start."""
    processor = engine.output_processor
    generate, add_request = engine.generate, processor.add_request
    process_outputs = processor.process_outputs
    # Weak references, because an answer ends with its HTTP request even if the engine's goes on.
    answers: WeakValueDictionary[str, AnswerProofs] = WeakValueDictionary()

    # Not a generator function, so that `expect` runs at the call: handlers call it in the order of
    # the prompts, but start the generators in any order.
    def generating(
        prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if (answer := current_answer()) is not None:
            answer.expect(request_id, sampling_params.n)
        return generate(prompt, sampling_params, request_id, *args, **kwargs)

    def adding(request: Any, *args: Any, **kwargs: Any) -> None:
        if (answer := current_answer()) is not None:
            answers[request.request_id] = answer
        add_request(request, *args, **kwargs)

    def processing(outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            proof = _taken(output)
            answer = answers.get(output.request_id)
            state = processor.request_states.get(output.request_id)
            if proof is not None and answer is not None and state is not None:
                answer.note(state.external_req_id, state.request_index, proof)
        return process_outputs(outputs, *args, **kwargs)

    engine.generate = generating  # type: ignore[method-assign]
    processor.add_request = adding  # type: ignore[method-assign]
    processor.process_outputs = processing  # type: ignore[method-assign, assignment]


def _taken(output: EngineCoreOutput) -> Proof | None:
    proof = proof_in(output.kv_transfer_params)
    if proof is not None and (params := output.kv_transfer_params):
        output.kv_transfer_params = {k: params[k] for k in params if k != PROOF_KEY} or None
    return proof
