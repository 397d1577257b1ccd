"""What our workers have in common, whatever the platform."""

from typing import Any

from vllm.config import set_current_vllm_config
from vllm.v1.worker.worker_base import WorkerBase

from adakv_worker.worker.step import AdaKVRunner


class AdaKVWorkerMixin(WorkerBase):
    """Before a platform's worker."""

    model_runner: Any

    def get_supported_kv_cache_layouts(self) -> list[str]:
        # The backend looks there for whether it is on.
        with set_current_vllm_config(self.vllm_config):
            return super().get_supported_kv_cache_layouts()

    # For `collective_rpc`, which runs between two steps.

    def adakv_export(self, request_id: str, path: str, policy: str) -> list[int] | None:
        return self._adakv_runner.export_request(request_id, path, policy)

    def adakv_stage(self, name: str, path: str, policy: str, token_ids: list[int]) -> str | None:
        return self._adakv_runner.stage_state(name, path, policy, token_ids)

    def adakv_unstage(self, name: str) -> None:
        self._adakv_runner.unstage_state(name)

    @property
    def _adakv_runner(self) -> AdaKVRunner:
        assert isinstance(self.model_runner, AdaKVRunner)
        return self.model_runner
