"""The CPU worker with compression."""

from vllm.v1.worker.cpu_worker import CPUWorker

from adakv_worker.config import compression_config
from adakv_worker.runner import AdaKVCPUModelRunner
from adakv_worker.support import refuse_unsupported


class AdaKVCPUWorker(CPUWorker):
    def init_device(self) -> None:
        if compression_config(self.vllm_config.additional_config) is not None:
            refuse_unsupported(self.vllm_config)
        super().init_device()
        if compression_config(self.vllm_config.additional_config) is not None:
            # vLLM's CPU worker makes its runner itself and asks nobody for the class.
            self.model_runner.__class__ = AdaKVCPUModelRunner

    # For `collective_rpc`, which runs between two steps.

    def adakv_export(self, request_id: str, path: str, policy: str) -> list[int] | None:
        return self._adakv_runner.export_request(request_id, path, policy)

    def adakv_stage(self, name: str, path: str, policy: str, token_ids: list[int]) -> str | None:
        return self._adakv_runner.stage_state(name, path, policy, token_ids)

    def adakv_unstage(self, name: str) -> None:
        self._adakv_runner.unstage_state(name)

    @property
    def _adakv_runner(self) -> AdaKVCPUModelRunner:
        assert isinstance(self.model_runner, AdaKVCPUModelRunner)
        return self.model_runner
