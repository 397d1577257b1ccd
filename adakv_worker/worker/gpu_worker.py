"""The GPU worker with compression."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from adakv_worker.config import compression_config
from adakv_worker.refusals import refuse_unsupported
from adakv_worker.worker.base import AdaKVWorkerMixin


class AdaKVGPUWorker(AdaKVWorkerMixin, Worker):
    def init_device(self) -> None:
        if compression_config(self.vllm_config.additional_config) is not None:
            refuse_unsupported(self.vllm_config)
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        if compression_config(self.vllm_config.additional_config) is not None:
            self._adakv_runner.warm_up_compression()
        return super().compile_or_warm_up_model()

    # vLLM types it as a Model Runner V1, whichever it is.
    def _make_model_runner(self) -> Any:
        if compression_config(self.vllm_config.additional_config) is None:
            return super()._make_model_runner()
        from adakv_worker.worker.gpu_runner import AdaKVGPUModelRunner, AdaKVGPUModelRunnerV2

        runner: Any = AdaKVGPUModelRunnerV2 if self.use_v2_model_runner else AdaKVGPUModelRunner
        return runner(self.vllm_config, self.device)
