"""Containment of a policy's errors: they affect its request only, and the engine goes on."""

from types import TracebackType

from vllm.logger import init_logger

from adakv_serve.kernels.policies.presets import PolicyChoice

# Below vLLM's own logger, so that its settings show it.
logger = init_logger("vllm.adakv")


class Contained:
    """A context that logs and notes an exception instead of raising it.

    It includes out-of-memory errors of a device: the memory beside the cache is the policy's.

    failed: whether there was an exception. The caller then selects without the policy.
    """

    def __init__(self, request_id: str, choice: PolicyChoice) -> None:
        self.failed = False
        self._request_id = request_id
        self._choice = choice

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.failed = True
        logger.error(
            "adakv: policy %s failed for request %s, which keeps its first and its most recent "
            "entries instead",
            self._choice.preset,
            self._request_id,
            exc_info=error,
        )
        return True
